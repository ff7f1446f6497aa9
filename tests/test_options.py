"""support/options.py: the parser, its argument types, and the options of a resumed run."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cifar
from samples import a_parser
from support import options
from support.program import UserError

# ------------------------ parser and argument types


@pytest.mark.parametrize(
    'kind, bounds, good, bad',
    [
        (
            int,
            {'low': 1},
            {'1': 1, '200': 200},
            ['0', '-1', '1.5', '1e3', '', 'x', 'nan', 'inf', '9' * 5000, '9' * 400],
        ),
        (
            float,
            {'above': 0},
            {'1e+3': 1e3, '.5': 0.5},
            ['0', '-1', 'nan', 'inf', '-inf', '1e999', '', '1,5', '0x1'],
        ),
        (
            float,
            {'low': 0, 'high': 1},
            {'0': 0.0, '1': 1.0, '0.9': 0.9},
            ['-0.1', '1.1', 'nan', 'inf'],
        ),
    ],
)
def test_numbers_are_finite_and_inside_their_bounds(kind, bounds, good, bad):
    parse = options.number(kind, **bounds)
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as e:
            parse(text)
        assert ('a whole number' if kind is int else 'a number') in str(e.value)


def test_epoch_lists_are_rising_positive_whole_numbers():
    assert options.rising_epochs('[60,120,160]') == [60, 120, 160]
    assert options.rising_epochs('[]') == []
    wrong = '60 [0] [-1] [2,1] [1,1] [1.0] [true] ["1"] [[1]] [1 null {} [NaN] [1e999]'
    for text in ['', *wrong.split(), '[' * 100_000]:
        with pytest.raises(argparse.ArgumentTypeError, match='increasing epochs'):
            options.rising_epochs(text)


def test_the_parser_knows_what_was_given():
    opt, given_ = a_parser().parse(['--lr=0.1', '--epoch_step', '[2,3]', '--cuda', '--resume'])
    assert given_ == {'lr', 'epoch_step', 'cuda', 'resume'}
    assert opt.lr == 0.1 and opt.epoch_step == [2, 3] and opt.resume is True and opt.epochs == 200
    assert a_parser().parse(['--resume', 'logs/x'])[0].resume == 'logs/x'
    assert a_parser().parse([])[1] == set()


@pytest.mark.parametrize(
    'argv, word',
    [
        (['--nonsense', '1'], 'nonsense'),
        (['--epoch', '3'], 'epoch'),  # no abbreviations: is it epochs or epoch_step?
        (['stray'], 'stray'),
        (['--lr'], 'lr'),
        (['--lr', '-1'], 'lr'),
        (['--batch_size', '0'], 'batch_size'),
        (['--epochs', '-1'], 'epochs'),
        (['--epochs', '9' * 400], 'epochs'),
        (['--dtype', 'half'], 'dtype'),
        (['--device', 'tpu'], 'device'),
        (['--gpu_id', 'a'], 'gpu_id'),
        (['--gpu_id', '0,'], 'gpu_id'),
        (['--ngpu', '0'], 'ngpu'),
        (['--weight_decay', 'nan'], 'weight_decay'),
        (['--epoch_step', '[3,2]'], 'epoch_step'),
    ],
)
def test_a_malformed_option_is_named_in_one_line(argv, word):
    with pytest.raises(UserError, match=word) as e:
        a_parser().parse(argv)
    assert '\n' not in str(e.value) and e.value.status == 2


OPTIONS = '--lr --batch_size --epochs --epoch_step --resume --save --dtype --gpu_id --cuda --seed'
OPTIONS = [*OPTIONS.split(), '--no']


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(OPTIONS)
        | st.text(max_size=8)
        | st.integers().map(str)
        | st.floats().map(str)
    )
)
def test_no_command_line_crashes_the_parser(argv):
    if any(word in ('-h', '--help') for word in argv):
        return
    try:
        opt, given_ = a_parser().parse(argv)
    except UserError:
        return
    assert given_ <= set(vars(opt)) and opt.lr > 0 and opt.batch_size >= 1


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as e:
        a_parser().parse(['--help'])
    assert e.value.code == 0 and '--weight_decay' in capsys.readouterr().out


@pytest.mark.parametrize('argv', [['--evaluate', ''], ['--save='], ['--resume', '']])
def test_an_empty_value_is_refused(argv):
    parser = a_parser()
    with pytest.raises(UserError, match=argv[0].strip('=')):
        parser.parse(argv)


@pytest.mark.parametrize(
    'text, said', [('3000000000', ', below 2147483648'), ('-1', ''), ('x', '')]
)
def test_a_number_that_is_too_large_is_told_its_limit(text, said):
    with pytest.raises(UserError, match=f'must be a whole number, at least 0{said}, not {text!r}'):
        a_parser().parse([f'--seed={text}'])


def test_the_home_folder_that_a_shell_leaves_is_meant(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    parser = a_parser()
    parser.add_argument('images', nargs='*')
    opt, _ = parser.parse(['--save=~/run', '~/a.png', 'b~/c', '~', '~x'])
    assert opt.save == '/home/me/run' and opt.images == ['/home/me/a.png', 'b~/c', '~', '~x']


# ------------------------ options of a resumed run


def test_options_of_a_continued_run_are_its_own_unless_given():
    parser = a_parser()
    parser.add_argument('--depth', default=10, type=options.number(int, 1))
    old = {'lr': 0.3, 'epochs': 200, 'depth': 16, 'gone': 3, 'save': 'a', 'cuda': True, 'seed': 4}
    opt, given = parser.parse(['--epochs', '300', '--save', 'b', '--device', 'cpu'])
    opt = options.continue_options(opt, given, old, parser)
    # Any device option given now overrides all of the old run.
    assert (opt.lr, opt.epochs, opt.depth, opt.save) == (0.3, 300, 16, 'b')
    assert (opt.seed, opt.device, opt.cuda) == (4, 'cpu', False)
    opt, given = parser.parse(['--depth', '22'])
    with pytest.raises(UserError, match='--depth 22 differs from the run, which has 16'):
        options.continue_options(opt, given, old, parser)
    for name, value in ('lr', '0.3'), ('lr', -1), ('seed', 1.5), ('cuda', 'yes'), ('dtype', 'half'):
        opt, given = parser.parse([])
        with pytest.raises(UserError, match=f'impossible --{name}'):
            options.continue_options(opt, given, old | {name: value}, parser)


def test_compile_can_be_switched_off_again():
    parser = a_parser()
    opt, given = parser.parse(['--no-compile'])
    opt = options.continue_options(opt, given, {'compile': True, 'tensorboard': True}, parser)
    assert opt.compile is False and opt.tensorboard is True


@pytest.mark.parametrize('teacher', ['注意力' * 40, 'a' * 500, 'caf\udce9' * 60])
def test_a_default_name_fits_on_disk_in_any_script(teacher, tmp_path):
    opt, names = cifar.parser.parse(['--teacher_id', teacher, '--beta', '1'])
    name = Path(cifar.complete(opt, names).save).name
    raw = name.encode(errors='surrogateescape')
    assert len(raw) <= 200 and name.startswith(f'CIFAR10_wrn-16-1_{teacher[:3]}')
    (tmp_path / name).mkdir()
    other, names = cifar.parser.parse(['--teacher_id', teacher + 'x', '--beta', '1'])
    assert Path(cifar.complete(other, names).save).name != name


def test_a_second_separator_is_no_argument():
    parser = options.Parser('A test.')
    parser.add_argument('source', metavar='SOURCE')
    parser.add_argument('out', metavar='OUT')
    assert vars(parser.parse(['--', 'a', '-b'])[0]) == {'source': 'a', 'out': '-b'}
    with pytest.raises(UserError, match='OUT'):
        parser.parse(['--', 'a', '--'])
