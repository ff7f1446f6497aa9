"""The tools in scripts/, on runs made here."""

import itertools
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import cv2
import torch
import torchvision

import data
import imagenet
import resnet
import utils
from samples import make_folder_set, make_photographs, picture, words
from support import devices, logs, photographs, program, weights

ROOT = Path(__file__).resolve().parent.parent


# ------------------------ quickstart.sh


def quickstart(cwd, *arguments, **environment):
    environment = {'VENV': sys.prefix, 'OMP_NUM_THREADS': '1'} | environment
    command = ['bash', str(ROOT / 'scripts' / 'quickstart.sh'), *arguments]
    return subprocess.run(
        command, check=False, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def test_quickstart_trains_prints_and_skips_what_is_done(tmp_path, forked_venv):
    make_folder_set(tmp_path / 'set')
    options = {'DATAROOT': 'set', 'SAVE': 'runs', 'SEED': '1', 'EPOCHS': '1', 'VENV': forked_venv}
    done = quickstart(tmp_path, 'cifar10', **options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'runs' / 'cifar10' / 'seed1' / 'epochs1'
    for row in 'teacher WRN-16-2', 'student WRN-16-1', 'student + AT':
        assert f'| {row}' in done.stdout
    for name in 'curves.png', 'attention.png':
        picture(folder / name)
        assert f'wrote {folder / name}' in done.stdout
    assert logs.read_log(folder / 'student_at' / 'log.txt')[-1]['beta'] == 1000

    models = {f: f.stat().st_mtime_ns for f in folder.glob('*/*')}
    again = quickstart(tmp_path, 'cifar10', **options)
    assert again.returncode == 0 and again.stdout.count('nothing to do') == 3
    assert models == {f: f.stat().st_mtime_ns for f in folder.glob('*/*')}


FAKE_PYTHON = """#!/bin/bash
# Stands for .venv/bin/python: cv2 is there only after the headless package was put in by force.
echo "$*" >> calls
case "$*" in
  *'import cv2'*) [ -f headless ] ;;
  *'uninstall'*) rm -f headless ;;
  *'--force-reinstall --no-deps opencv-python-headless'*) touch headless ;;
esac
"""


def test_setup_puts_the_headless_opencv_where_the_other_cannot_be_imported(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / 'scripts/setup.sh').write_text((ROOT / 'scripts/setup.sh').read_text())
    (tmp_path / '.venv/bin/python').write_text(FAKE_PYTHON)
    (tmp_path / '.venv/bin/python').chmod(0o755)

    def setup(requirements):
        (tmp_path / 'requirements.txt').write_text(requirements)
        (tmp_path / 'calls').write_text('')
        environment = {k: v for k, v in os.environ.items() if k not in ('VENV', 'PYTHON')}
        done = subprocess.run(
            ['bash', '-c', '. scripts/setup.sh; echo "with $VENV_PYTHON"'],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.endswith('with .venv/bin/python\n'), done.stderr
        return done.stdout, (tmp_path / 'calls').read_text()

    said, calls = setup('one')
    assert 'libGL' in said and calls.index('uninstall') < calls.index('opencv-python-headless')
    assert 'pip install' not in setup('one')[1], 'nothing has changed'
    # Later the requirements change, and pip puts opencv-python over the headless files.
    (tmp_path / 'headless').unlink()
    assert 'opencv-python-headless' in setup('two')[1]


def test_setup_says_why_it_cannot_install(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts/setup.sh').write_text((ROOT / 'scripts/setup.sh').read_text())
    (tmp_path / 'requirements.txt').touch()
    old = tmp_path / 'old-python'
    old.write_text('#!/bin/bash\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    for python, reason in (
        ('no-such-python', 'there is no no-such-python'),
        ('./old-python', '3.10'),
    ):
        environment = {k: v for k, v in os.environ.items() if k != 'VENV'} | {'PYTHON': python}
        done = subprocess.run(
            ['bash', '-c', '. scripts/setup.sh'],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count('\n') == 1


def test_quickstart_refuses_in_one_line(tmp_path):
    for wrong in quickstart(tmp_path, 'cifar11'), quickstart(tmp_path, VENV=str(tmp_path)):
        assert wrong.returncode == 2 and wrong.stderr.startswith('quickstart.sh: error: ')
        assert wrong.stderr.count('\n') == 1


def test_quickstart_explains_itself_before_anything_is_installed(tmp_path):
    for wanted in '--help', 'cifar11':  # VENV is not an environment, and is not used
        assert 'VENV' not in quickstart(tmp_path, wanted, VENV=str(tmp_path)).stderr
    assert quickstart(tmp_path, '--help').stdout.startswith('Attention transfer from scratch')
    dry = quickstart(tmp_path, 'cifar10', DRY_RUN='1', VENV=str(tmp_path), DATAROOT='none')
    commands = [line for line in dry.stdout.splitlines() if line.startswith('python ')]
    assert dry.returncode == 0 and len(commands) == 5 and not list(tmp_path.iterdir())
    assert 'student + AT' in shlex.split(commands[-1]), 'as a shell would take it'


# ------------------------ README and docs/


def text_of(*names):
    return '\n'.join((ROOT / name).read_text() for name in names)


def rows_of(name, heading):
    """The cells of the table that follows a line, without its header."""
    after = text_of(name).split(heading, 1)[1].splitlines()
    lines = list(itertools.dropwhile(lambda line: not line.startswith('|'), after))
    table = itertools.takewhile(lambda line: line.startswith('|'), lines)
    return [[cell.strip(' *') for cell in line.strip('|').split('|')] for line in table][2:]


def error_of(log):
    """The test error of the last epoch, in per cent, as printed."""
    record = logs.read_log(ROOT / 'docs/logs' / log)[-1]
    assert record['epoch'] == record['epochs']
    acc = record['test_acc']
    return 100 - (acc[0] if isinstance(acc, list) else acc)


RUNS = {
    'teacher WRN-16-2': 'wrn_16_2',
    'student WRN-16-1': 'wrn_16_1',
    'AT': 'at_wrn_16_1_from_wrn_16_2',
    'KD': 'kd_wrn_16_1_from_wrn_16_2',
    'AT + KD': 'at_kd_wrn_16_1_from_wrn_16_2',
}


def minutes_of(log):
    """The minutes of training and tests, as printed."""
    records = logs.read_log(ROOT / 'docs/logs' / log)
    return f'{sum(r["train_time"] + r["test_time"] for r in records) / 60:.0f}'


def test_the_results_in_readme_are_those_of_the_logs():
    long = {name: f'epochs200/{run}_seed0/log.txt' for name, run in RUNS.items()}
    errors = {name: f'{error_of(log):.2f}' for name, log in long.items()}
    short = {
        name: statistics.median(error_of(f'epochs30/{run}_seed{s}.txt') for s in (0, 1, 2))
        for name, run in RUNS.items()
    }
    teacher, *students = RUNS
    _, row, row_30 = rows_of('README.md', '# Attention Transfer')
    assert row[1:] == [errors[name] for name in (*students, teacher)]
    assert row_30[1:] == [f'{short[name]:.2f}' for name in (*students, teacher)]
    text = text_of('README.md')
    comments = re.findall(r'# ([^#\n]*): ([\d.]+) %, (\d+) minutes', text)
    assert comments == [(name, errors[name], minutes_of(log)) for name, log in long.items()]
    (minutes,) = re.findall(r'took ([\d, ]+) and (\d+) minutes', text)
    short = [minutes_of(f'epochs30/{run}_seed0.txt') for run in RUNS.values()]
    assert [*minutes[0].split(', '), minutes[1]] == short


def test_lines_of_readme_are_short():
    code = False
    for line in text_of('README.md').splitlines():
        code ^= line.startswith('```')
        assert len(line) <= 120 or code or line.startswith('|'), line


def test_links_lead_to_files_and_headings():
    def anchors(file):
        lines = re.findall(r'^#+ (.*)', file.read_text(), re.MULTILINE)
        return {re.sub(r'[^\w\- ]', '', line.lower()).replace(' ', '-') for line in lines}

    files = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'pretrained/README.md']
    for file in files:
        for link in re.findall(r'\]\(([^)]+)\)', file.read_text()):
            path, _, anchor = link.partition('#')
            if not path.startswith('https:'):
                found = (file.parent / path) if path else file
                assert found.exists(), (file, link)
                assert not anchor or anchor in anchors(found), (file, link)


def test_sizes_of_students_are_those_of_the_nets():
    names, *_ = re.findall(r'^\| \| (WRN-10-1.*) \|$', text_of('docs/methods.md'), re.MULTILINE)
    (_, *counts), (_, *costs) = rows_of('docs/methods.md', '## Which net')
    assert len(names.split(' | ')) == len(counts) == len(costs) == 9
    for name, count, cost in zip(names.split(' | '), counts, costs):
        *kind, size = name.removeprefix('WRN-').replace('-', ' ').split()
        net = ('nin', None, int(size)) if kind == ['NIN'] else ('wrn', int(kind[0]), int(size))
        f, params = resnet.new_net(*net, 10)
        assert count == f'{sum(v.numel() for v in utils.trainable(params)):,}'
        assert cost == f'{devices.multiply_adds(f, params, (32, 32), "cpu") / 1e6:.1f}M'


def blocks_of(name):
    return re.findall(r'```python\n(.*?)```', text_of(name), re.DOTALL)


def test_the_lines_of_the_faq_name_what_a_net_sees(tmp_path, monkeypatch, capsys):
    """The block is run as it stands, on a net whose weights are in pretrained/."""
    code, _ = blocks_of('docs/faq.md')
    (path,) = re.findall(r"load_net\('(.*)'\)", code)
    image = data.open_sets('shapes', '')[1]()[1].images[3].numpy()
    cv2.imwrite(str(tmp_path / 'horse.png'), image[:, :, ::-1])
    (tmp_path / 'pretrained').symlink_to(ROOT / 'pretrained')
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)  # noqa: S102  as a reader would paste it
    f, params, records = weights.load_net(ROOT / path)
    expected, _ = f(data.normalize(torch.from_numpy(image)[None]), params, False)
    assert torch.equal(scope['logits'], expected)
    assert capsys.readouterr().out == f'{records[0]["classes"][expected.argmax()]}\n'


def test_the_lines_of_the_faq_name_what_a_net_for_photographs_sees(tmp_path, monkeypatch):
    make_photographs(tmp_path / 'set', ['a', 'b'])
    options = '--imagenetpath set --image_size 40 --width 0.125 --batch_size 4 --nthread 1'
    monkeypatch.chdir(tmp_path)
    assert program.call_main(imagenet.main, words(options, '--epochs 1 --save logs/at')) == 0
    (tmp_path / 'set/val/a/0.jpg').rename('photo.jpg')
    first, code = blocks_of('docs/faq.md')
    imports = ''.join(re.findall(r'^(?:import|from) .*\n', first, re.MULTILINE))
    scope = {}
    exec(imports + code, scope)  # noqa: S102
    view = torch.from_numpy(photographs.centre_view('photo.jpg', 40))[None]
    torch.testing.assert_close(scope['batch'], imagenet.normalize(view))
    assert scope['f'](scope['batch'], scope['params'], False)[0].shape == (1, 2)


PRETRAINED = {
    'wrn_16_2': 'wrn_16_2_seed0',
    'wrn_16_1': 'wrn_16_1_seed0',
    'wrn_16_1_at': 'at_wrn_16_1_from_wrn_16_2_seed0',
    'wrn_16_1_kd': 'kd_wrn_16_1_from_wrn_16_2_seed0',
    'wrn_16_1_at_kd': 'at_kd_wrn_16_1_from_wrn_16_2_seed0',
}


def test_the_pretrained_nets_are_those_of_their_logs():
    """The log beside each net is the one that the tables are computed from."""
    folder = ROOT / 'pretrained/cifar10'
    table = {row[0].strip('`'): row for row in rows_of('pretrained/README.md', '# Trained nets')}
    assert {f'cifar10/{p.name}' for p in folder.iterdir()} == set(table)
    for name, run in PRETRAINED.items():
        log = ROOT / 'docs/logs/epochs200' / run / 'log.txt'
        assert (folder / name / 'log.txt').read_bytes() == log.read_bytes()
        assert table[f'cifar10/{name}'][-1] == f'{error_of(log):.2f}'
        f, params, records = weights.load_net(folder / name)
        first, last = records[0], records[-1]
        assert resnet.same_shape(params, first['depth'], first['width'])
        trained = sum(v.numel() for k, v in params.items() if not utils.is_statistic(k))
        assert trained == last['n_parameters']
        assert (last['epoch'], last['epochs'], len(records)) == (200, 200, 200)
        assert first['epoch_step'] == [60, 120, 160] and first['lr'] == 0.1
        logits, _ = f(torch.zeros(1, 3, 32, 32), params, False)
        assert logits.shape == (1, 10) and logits.isfinite().all()


def test_the_loop_of_methods_trains_any_module(tmp_path, monkeypatch):
    """The block is run as it stands, on random images."""
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet34(num_classes=10).state_dict(), 'teacher.pth')
    (code,) = blocks_of('docs/methods.md')
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 64, 64), torch.arange(4))] * 3
    scope = {'loader': loader}
    exec(code, scope)  # noqa: S102  as a reader would paste it
    assert len(code.splitlines()) < 25 and torch.isfinite(scope['loss'])
    x = {k: scope['wanted'][k].shape for k in scope['layers']}
    assert x == {k: scope['found'][k].shape for k in scope['layers']}
    at = sum(utils.at_loss(scope['found'][k], scope['wanted'][k]).item() for k in scope['layers'])
    assert at > 0 and scope['student'].layer1[0].conv1.weight.grad is not None
