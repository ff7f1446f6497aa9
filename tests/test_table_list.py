"""The lists of the table scripts, and the commands that they give."""

import re
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

import cifar
import data
import resnet
from support.logs import json_stats
from support.weights import save_params
from table_scripts import (
    CIFAR,
    PHOTOGRAPHS,
    PROGRAMS,
    ROOT,
    commands,
    environment,
    finish,
    make_photographs,
    options,
    start,
    until,
)

sys.path.insert(0, str(ROOT / 'scripts'))
import summarize


@pytest.mark.parametrize('script', CIFAR + PHOTOGRAPHS)
def test_every_line_is_a_command_whose_teacher_stands_above_it(script):
    runs = options(script, SEEDS='0 3', LOGS='some/logs')
    seen = set()
    for name, opt in runs.items():
        assert opt.resume is True and Path(opt.save).parent.as_posix().endswith('some/logs')
        assert name.endswith(f'_seed{opt.seed}')
        teacher = getattr(opt, 'teacher_id', None) or getattr(opt, 'teacher_params', '')
        if 'seed' in teacher:
            assert teacher in seen
            if '_from_wrn_16_1' not in name:
                assert teacher.endswith(f'_seed{opt.seed}')
        assert ('_from_' in name) == bool(teacher)
        seen.add(opt.save)
    assert {opt.seed for opt in runs.values()} >= {0, 3}


@pytest.mark.parametrize('script', CIFAR + PHOTOGRAPHS)
def test_dry_run_writes_nothing(script, tmp_path):
    given = {'LOGS': str(tmp_path / 'logs'), 'DATAROOT': str(tmp_path / 'data'), 'SEEDS': '0'}
    commands(script, **given)
    assert not list(tmp_path.iterdir())


def check(opt, **expected):
    assert {k: getattr(opt, k) for k in expected} == expected


AS_PUBLISHED = {
    'dataset': 'CIFAR10',
    'epochs': 200,
    'epoch_step': [60, 120, 160],
    'lr': 0.1,
    'lr_decay_ratio': 0.2,
    'batch_size': 128,
    'weight_decay': 5e-4,
    'randomcrop_pad': 4,
    'validate': 0,
    'dtype': 'float',
}
NETS = {
    'nin_96': {'net': 'nin', 'width': 96},
    'nin_192': {'net': 'nin', 'width': 192},
    'wrn_16_1': {'net': 'wrn', 'depth': 16, 'width': 1},
    'wrn_16_2': {'net': 'wrn', 'depth': 16, 'width': 2},
    'wrn_40_1': {'net': 'wrn', 'depth': 40, 'width': 1},
    'wrn_40_2': {'net': 'wrn', 'depth': 40, 'width': 2},
}
METHODS = {
    '': {'alpha': 0, 'beta': 0},
    'at_': {'method': 'at', 'alpha': 0, 'beta': 1000, 'beta_decay': 'none'},
    'kd_': {'alpha': 0.9, 'beta': 0, 'temperature': 4},
    'at_kd_': {'method': 'at', 'alpha': 0.9, 'beta': 1000, 'temperature': 4},
    'factt_': {'method': 'factt', 'alpha': 0},
}


@pytest.mark.parametrize('script', ['table1', 'table2', 'figure_convergence', 'controls'])
def test_lines_are_the_papers(script):
    for name, opt in options(script, DATAROOT='/no/such').items():
        match = re.fullmatch(
            r'(|at_|kd_|at_kd_|factt_)(nin_\d+|wrn_\d+_\d)(_from_\w+)?_seed\d', name
        )
        if match:
            check(opt, **AS_PUBLISHED, **NETS[match[2]], **METHODS[match[1]])
            check(opt, at_map='sum', at_p=2, at_groups=[0, 1, 2])
            if match[1] in ('at_kd_', 'factt_'):
                assert opt.beta > 0 and opt.beta_decay != 'none'


def test_table1_has_each_cell_of_the_paper_for_five_seeds():
    names = set(options('table1'))
    pairs = 'nin_96 nin_192', 'wrn_16_1 wrn_16_2', 'wrn_16_1 wrn_40_1', 'wrn_16_2 wrn_40_2'
    expected = set()
    for student, teacher in map(str.split, pairs):
        students = {f'{m}_{student}_from_{teacher}' for m in ('at', 'factt', 'kd', 'at_kd')}
        expected |= {student, teacher} | students
    assert names == {f'{stem}_seed{s}' for stem in expected for s in range(5)}


def test_table2_differs_in_the_map_alone():
    runs = options('table2', SEEDS='0')
    tail = '_wrn_16_1_from_wrn_16_2_seed0'
    plain = vars(runs[f'at{tail}'])
    for name, expected in {
        'at_p1': {'at_p': 1},
        'at_p4': {'at_p': 4},
        'at_max': {'at_p': 1, 'at_map': 'max'},
        'at_group0': {'at_groups': [0]},
        'at_group1': {'at_groups': [1]},
        'at_group2': {'at_groups': [2]},
    }.items():
        opt = vars(runs.pop(name + tail))
        assert {k: v for k, v in opt.items() if v != plain[k] and k != 'save'} == expected
    assert set(runs) == {'wrn_16_2_seed0', 'wrn_16_1_seed0', f'at{tail}'}


def test_table3_has_students_without_batch_norm_crops_and_decay():
    runs = options('table3')
    wide = {'net': 'nin', 'width': 192, 'no_bn': False, 'weight_decay': 5e-4, 'randomcrop_pad': 4}
    check(runs.pop('nin_192_seed0'), no_pool_relu=False, **wide)
    check(runs.pop('nin_192_no_pool_relu_seed0'), no_pool_relu=True, **wide)
    methods = {}
    for name, opt in runs.items():
        check(opt, net='nin', width=96, no_bn=True, weight_decay=0, randomcrop_pad=0, seed=0)
        stem = name.split('nin_96')[0]
        methods[stem] = (opt.method if opt.beta else '', opt.alpha, Path(opt.teacher_id).name)
        assert len({r.lr for r in runs.values()}) == 1
    assert methods == {
        '': ('', 0, ''),
        'minl2_': ('minl2', 0, ''),
        'sym_': ('sym', 0, ''),
        'grad_': ('grad', 0, 'nin_192_seed0'),
        'kd_': ('', 0.9, 'nin_192_seed0'),
        'at_': ('at', 0, 'nin_192_no_pool_relu_seed0'),
    }


def test_table4_fine_tunes_the_teacher_and_then_the_student():
    runs = options('table4', SEEDS='2', STUDENT_PARAMS='18.hkl', TEACHER_PARAMS='34.hkl')
    assert len(runs) == 8
    for name, opt in runs.items():
        check(opt, finetune=True, image_size=224, train_crop='plain', seed=2)
        assert opt.imagenetpath.endswith('birds' if 'cub' in name else 'rooms')
        teacher = '_from_' not in name and '_34' in name
        assert opt.depth == (34 if teacher else 18)
        assert opt.student_params.endswith('34.hkl' if teacher else '18.hkl')
    check(runs['kd_cub_resnet_18_from_resnet_34_seed2'], alpha=0.9, temperature=4, beta=0)
    at = runs['at_scenes_resnet_18_from_resnet_34_seed2']
    check(at, alpha=0, at_groups=[2, 3], at_start=1)
    assert at.beta > 0 and Path(at.teacher_params).name == 'scenes_resnet_34_seed2'
    assert len(options('table4', SEEDS='0', SCENES='')) == 4, 'birds alone'


def test_table5_is_the_recipe_of_the_reproduction():
    lines = commands('table5', TEACHER_PARAMS='/nets/34.hkl')
    assert lines[0][0] == 'imagenet.py' and lines[0][-2:] == ['--evaluate', '/nets/34.hkl']
    runs = options('table5', TEACHER_PARAMS='/nets/34.hkl')
    schedule = {'epochs': 100, 'epoch_step': [30, 60, 90], 'lr': 0.1, 'lr_decay_ratio': 0.1}
    for opt in runs.values():
        check(opt, depth=18, width=1, batch_size=256, weight_decay=1e-4, **schedule)
    check(runs.pop('resnet_18_seed0'), beta=0, alpha=0, teacher_params='')
    at = runs.pop('at_resnet_18_from_resnet_34_seed0')
    check(at, beta=1000, alpha=0, at_groups=[2, 3], at_start=1, teacher_params='/nets/34.hkl')
    assert not runs
    for words in commands('table5', NPROC='4')[:3]:
        launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '4']
        assert words[:6] == [*launcher, 'imagenet.py']


def test_cifar100_has_the_schedule_that_the_field_compares_with():
    runs = options('cifar100', SEEDS='0', DATAROOT='/no/such')
    for name, opt in runs.items():
        check(opt, dataset='CIFAR100', epochs=240, epoch_step=[151, 181, 211], batch_size=64)
        check(opt, lr=0.05, lr_decay_ratio=0.1, weight_decay=5e-4)
        if name.startswith('kd_'):
            check(opt, alpha=0.9, temperature=4, beta=0)
        if name.startswith('at_'):
            check(opt, alpha=0, beta=1000, beta_decay='none')
    assert len(runs) == 7 and {Path(r.save).parent.name for r in runs.values()} == {
        'cifar100_epochs240'
    }
    short = options('cifar100', SEEDS='0', EPOCHS='24')
    assert {tuple(opt.epoch_step) for opt in short.values()} == {(16, 19, 22)}
    assert options('cifar100', SEEDS='0', EPOCHS='1')['wrn_40_2_seed0'].epoch_step == [2]


def test_controls_change_the_teacher_or_the_length():
    runs = options('controls', SEEDS='4', EPOCHS='10')
    check(runs['untrained_wrn_16_2_seed4'], epochs=0, depth=16, width=2)
    check(runs['wrn_16_1_equal_time_seed4'], epochs=15, beta=0)
    teachers = {n: Path(o.teacher_id).name for n, o in runs.items() if o.teacher_id}
    assert teachers == {
        'at_wrn_16_1_from_wrn_16_2_seed4': 'wrn_16_2_seed4',
        'at_wrn_16_1_from_untrained_wrn_16_2_seed4': 'untrained_wrn_16_2_seed4',
        'at_wrn_16_1_from_wrn_16_1_seed4': 'wrn_16_1_seed5',
    }
    for name in teachers:
        check(runs[name], depth=16, width=1, beta=1000, alpha=0, epochs=10)


def test_beta_is_chosen_on_held_out_training_images():
    runs = options('beta')
    betas = sorted(o.beta for n, o in runs.items() if n.startswith('at_beta'))
    assert betas[0] == 10 and betas[-1] == 1e5
    np.testing.assert_allclose(np.diff(np.log10(betas)), 0.5, atol=0.01)
    assert betas == sorted(o.beta for n, o in runs.items() if n.startswith('at_kd_beta'))
    for name, opt in runs.items():
        check(opt, validate=5000, alpha=0.9 if 'kd_' in name else 0)
        assert 'beta' not in name or float(re.search(r'beta([^_]+)_', name)[1]) == opt.beta
    assert set(options('beta', BETAS='3 1e+2')) >= {
        'at_beta1e+2_wrn_16_1_from_wrn_16_2_seed0',
        'at_kd_beta3_wrn_16_1_from_wrn_16_2_seed0',
    }


def test_only_takes_the_runs_that_match():
    patterns = 'wrn_16_[12]_seed? *_from_wrn_16_2_*'
    names = set(options('table1', SEEDS='0 1', ONLY=patterns))
    of_a_row = {'wrn_16_1', 'wrn_16_2'}
    of_a_row |= {f'{m}_wrn_16_1_from_wrn_16_2' for m in ('at', 'factt', 'kd', 'at_kd')}
    assert names == {f'{stem}_seed{s}' for stem in of_a_row for s in (0, 1)}
    assert set(options('table5', ONLY='resnet_18*')) == {'resnet_18_seed0'}
    first, second = commands('table5', ONLY='resnet_34')
    assert first[0] == 'imagenet.py' and '--evaluate' in first and 'table5' in second


def test_only_of_readme_takes_teachers_with_their_students():
    text = '\n'.join(p.read_text() for p in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')))
    lines = re.findall(r'(ONLY=.*)bash scripts/(\w+)\.sh', text)
    assert len(lines) > 2
    for line, script in lines:
        given = dict(word.split('=', 1) for word in shlex.split(line))
        assert len(options(script, **given)) > 2


def test_a_word_starts_no_training(tmp_path):
    def call(*words):
        script = ['bash', str(ROOT / 'scripts' / 'table1.sh'), *words]
        env = environment(LOGS=str(tmp_path / 'logs'))
        return subprocess.run(
            script, check=False, cwd=tmp_path, env=env, capture_output=True, text=True
        )

    shown = call('--help')
    assert shown.returncode == 0 and shown.stdout.startswith('Table 1 of the paper')
    assert 'Environment' in shown.stdout and 'shellcheck' not in shown.stdout
    refused = call('--epochs', '3')
    assert refused.returncode == 2 and '--epochs: takes no arguments' in refused.stderr
    assert refused.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


def test_paths_are_the_callers_and_extra_comes_last(tmp_path):
    (tmp_path / 'set' / 'train').mkdir(parents=True)
    words = ['bash', str(ROOT / 'scripts' / 'table2.sh')]
    given = {'DRY_RUN': '1', 'SEEDS': '0', 'DATAROOT': 'set', 'LOGS': 'runs'}
    given['EXTRA'] = '--dtype bfloat16 --epoch_step [2,3]'
    done = subprocess.run(
        words, check=True, cwd=tmp_path, env=environment(**given), capture_output=True, text=True
    )
    first = shlex.split(done.stdout.splitlines()[0])
    assert first[-4:] == ['--dtype', 'bfloat16', '--epoch_step', '[2,3]']
    opt, _ = cifar.parser.parse(first[2:])
    assert (opt.dataset, opt.dataroot) == ('folder', str(tmp_path / 'set'))
    assert opt.save == str(tmp_path / 'runs' / 'wrn_16_2_seed0')
    # Within the repository the names are short, and the same from wherever it is called.
    (inside,) = {w[2].split('/wrn')[0] for w in commands('table2', SEEDS='0')[:2]}
    assert inside == 'logs/epochs200'


@pytest.mark.parametrize(
    'script, given, named',
    [
        ('table1', {'JOBS': '0'}, 'JOBS=0'),
        ('table1', {'SEEDS': '0,1'}, 'SEEDS=0,1'),
        ('table1', {'SEEDS': '01'}, 'SEEDS=01'),
        ('table2', {'EPOCHS': 'ten'}, 'EPOCHS=ten'),
        ('table2', {'ONLY': 'wrn nin*', 'DATAROOT': str(ROOT)}, 'ONLY=wrn nin*'),
        ('table1', {'ONLY': '*wrn_16_*'}, 'but not its teacher, wrn_40_1_seed0'),
        ('table4', {'CUB': '', 'SCENES': ''}, 'CUB'),
        ('table4', {'CUB': 'x', 'STUDENT_PARAMS': '/no/18.hkl'}, 'convert.py resnet18'),
        ('table5', {'IMAGENET': ''}, 'IMAGENET'),
        ('table5', {'IMAGENET': 'x', 'TEACHER_PARAMS': '/no/34.hkl'}, '/no/34.hkl'),
        ('table5', {'IMAGENET': 'x', 'TEACHER_PARAMS': '/', 'NPROC': '2', 'JOBS': '2'}, 'NPROC'),
    ],
)
def test_mistakes_are_reported_in_one_line(script, given, named, tmp_path):
    status, out, err = finish(script, LOGS=str(tmp_path / 'logs'), **given)
    assert status == 2 and not out and err.count('\n') == 1 and named in err
    assert err.startswith(f'{script}.sh: error: ') and not list(tmp_path.iterdir())


# ------------------------ every line, run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """train(script, ...): runs what the script would, line by line, in this process, on a few drawn
    images; returns LOGS."""
    logs = tmp_path_factory.mktemp('tables')
    toy = '--dataset shapes --depth 10 --width 1 --batch_size 40 --nthread 1 --lr 0.01'

    def train(script, **given):
        given = {'SEEDS': '0', 'EPOCHS': '1', 'LOGS': str(logs / 'cifar'), 'EXTRA': toy} | given
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, 'SHAPES_TRAIN', 40)
            patch.setattr(data, 'SHAPES_TEST', 20)
            for program, *words in commands(script, **given):
                PROGRAMS[program].main([w if w != '5000' else '20' for w in words])
        return Path(given['LOGS'])

    return train


@pytest.mark.parametrize('script', CIFAR)
def test_every_line_trains_and_the_table_is_complete(script, trained, tmp_path, capsys):
    shared = script not in ('cifar100', 'beta')
    given = {} if shared else {'LOGS': str(tmp_path / 'logs'), 'BETAS': '10 1000'}
    logs = trained(script, **given)
    name = 'convergence' if script == 'figure_convergence' else script
    text = (logs / f'{name}.md').read_text()
    assert 'Not finished' not in text and text in capsys.readouterr().out
    assert 'epochs 1' in text and 'dataset shapes' in text
    # Only the stretches of 200 epochs have no value after one epoch.
    assert text.count('—') == (12 if script == 'figure_convergence' else 0)
    pictures = {'figure_convergence': 'convergence_seed0.svg', 'beta': 'beta.svg'}
    if script in pictures:
        root = xml.etree.ElementTree.parse(logs / pictures[script]).getroot()
        assert root.tag.endswith('svg')


def test_tables_4_and_5_on_a_few_photographs(tmp_path, trained):
    photographs = str(make_photographs(tmp_path / 'photographs'))
    torch.manual_seed(0)
    nets = {'STUDENT_PARAMS': 18, 'TEACHER_PARAMS': 34}
    for name, depth in nets.items():
        nets[name] = str(tmp_path / f'{depth}.hkl')
        save_params(nets[name], resnet.resnet(depth, 0.125, 3)[1])
    extra = '--width 0.125 --image_size 33 --batch_size 12 --nthread 1 --lr 0.01'
    given = {'LOGS': str(tmp_path / 'logs'), 'EXTRA': extra} | nets
    logs = trained('table4', CUB=photographs, SCENES='', **given)
    text = (logs / 'table4.md').read_text()
    assert text.count('—') == 4, 'the four rows of Scenes'
    at = 'finetune True, beta 1000, at_groups [2,3]: at_cub_resnet_18_from_resnet_34'
    assert f'- {at}\n' in text

    logs = trained('table5', IMAGENET=photographs, **given)
    assert (logs / 'table5.md').read_text().count('resnet_34: missing') == 1
    # The script keeps what the test of the teacher prints.
    record = {'evaluate': 'x', 'test_acc': [70.0, 90.0], 'n_parameters': 5, 'multiply_adds': 6e6}
    (logs / 'resnet_34.txt').write_text(f'{json_stats(record)}\n')
    summarize.main(['table5', str(logs), '--save', str(tmp_path / 't.md')])
    rows = [line for line in (tmp_path / 't.md').read_text().splitlines() if '| teacher' in line]
    assert [re.sub(' +', ' ', r) for r in rows] == [
        '| teacher | 5 | 6.0M | 26.10 | 30.00 | | 1 | | |',
        '| teacher | 5 | 6.0M | 8.30 | 10.00 | | 1 | | |',
    ]


def test_a_script_that_is_killed_continues_and_leaves_alone_what_is_done(tmp_path, forked_venv):
    logs = tmp_path / 'logs'
    given = {'SEEDS': '0', 'EPOCHS': '1', 'BETAS': '100', 'LOGS': str(logs), 'JOBS': '2'}
    given['VENV'] = forked_venv
    root = make_photographs(tmp_path / 'set', 2, 6, (32, 32), ('train', 'test'))
    given['DATAROOT'] = str(root)
    given['EXTRA'] = '--validate 4 --depth 10 --width 0.25 --nthread 1'
    process = start('beta', **given)
    until(lambda: (logs / 'wrn_16_1_seed0' / 'model.hkl').exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    outputs = {f: f.read_text() for f in logs.glob('*.out')}
    before = {f: f.stat().st_mtime_ns for f in (logs / 'wrn_16_1_seed0').iterdir()}
    assert len(before) >= 3 and not (logs / 'beta.svg').exists()

    status, out, err = finish('beta', **given)
    assert status == 0, err
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert all(f.read_text().startswith(text) for f, text in outputs.items())
    assert '| AT, beta 100' in out and '—' not in (logs / 'beta.md').read_text()
    assert xml.etree.ElementTree.parse(logs / 'beta.svg').getroot().tag.endswith('svg')
