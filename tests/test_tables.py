"""The scripts that reproduce tables and figures, and the tables made of their runs."""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import cifar
import data
import imagenet
import resnet
from support.logs import json_stats
from support.program import call_main
from support.weights import save_params

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import plot
import summarize

CIFAR = ['table1', 'table2', 'table3', 'figure_convergence', 'cifar100', 'controls', 'beta']
PHOTOGRAPHS = ['table4', 'table5']
PROGRAMS = {'cifar.py': cifar, 'imagenet.py': imagenet, 'scripts/summarize.py': summarize}
PROGRAMS['scripts/plot.py'] = plot
MINE = {'SEEDS', 'EPOCHS', 'LOGS', 'DATAROOT', 'EXTRA', 'JOBS', 'NPROC', 'DRY_RUN', 'BETAS', 'CUB'}
MINE |= {
    'ONLY',
    'VALIDATE',
    'SCENES',
    'IMAGENET',
    'STUDENT_PARAMS',
    'TEACHER_PARAMS',
    'CUDA_VISIBLE_DEVICES',
}


def environment(**given):
    kept = {k: v for k, v in os.environ.items() if k not in MINE}
    return kept | {'VENV': sys.prefix, 'OMP_NUM_THREADS': '1'} | given


def start(script, **given):
    """The script, begun, with what it prints in a pipe; of the caller's environment only what does
    not concern it."""
    words = ['bash', str(ROOT / 'scripts' / f'{script}.sh')]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(words, env=environment(**given), **pipes)


def finish(script, **given):
    """(exit status, stdout, stderr) of the script."""
    begun = start(script, **given)
    out, err = begun.communicate()
    return begun.returncode, out, err


def commands(script, **given):
    """The command lines that DRY_RUN prints, as words without the interpreter."""
    photographs = {'CUB': 'birds', 'SCENES': 'rooms', 'IMAGENET': 'photographs'}
    status, out, err = finish(script, **{'DRY_RUN': '1'} | photographs | given)
    assert status == 0 and not err, err
    lines = [shlex.split(line, comments=True) for line in out.splitlines()]
    assert all(words[0] == 'python' for words in lines if words)
    return [words[1:] for words in lines if words]


def options(script, **given):
    """{name of a run: its options, filled in as the program does} in the order of the script."""
    runs = {}
    for program, *words in commands(script, **given):
        if program in ('cifar.py', 'imagenet.py') and '--evaluate' not in words:
            opt = PROGRAMS[program].complete(*PROGRAMS[program].parser.parse(words))
            name = Path(opt.save).name
            assert name not in runs, 'the same run twice'
            runs[name] = opt
    return runs


# ------------------------ the lines of the scripts


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
    text = (ROOT / 'README.md').read_text() + (ROOT / 'docs/README.md').read_text()
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
    assert refused.returncode == 2 and '--epochs: takes no options' in refused.stderr
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
def test_mistakes_are_told_in_one_line(script, given, named, tmp_path):
    status, out, err = finish(script, LOGS=str(tmp_path / 'logs'), **given)
    assert status == 2 and not out and err.count('\n') == 1 and named in err
    assert err.startswith(f'{script}.sh: error: ') and not list(tmp_path.iterdir())


# ------------------------ every line, run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """train(script, ...): runs what the script would, line by line, in this process, on a few drawn
    images; returns LOGS."""
    logs = tmp_path_factory.mktemp('tables')
    toy = '--dataset shapes --depth 10 --width 1 --batch_size 100 --nthread 1 --lr 0.01'

    def train(script, **given):
        given = {'SEEDS': '0', 'EPOCHS': '1', 'LOGS': str(logs / 'cifar'), 'EXTRA': toy} | given
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, 'SHAPES_TRAIN', 100)
            patch.setattr(data, 'SHAPES_TEST', 50)
            for program, *words in commands(script, **given):
                PROGRAMS[program].main([w if w != '5000' else '20' for w in words])
        return Path(given['LOGS'])

    return train


@pytest.mark.parametrize('script', CIFAR)
def test_every_line_trains_and_the_table_is_whole(script, trained, tmp_path, capsys):
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


def make_photographs(root, classes=3, n=4, size=(48, 40), splits=('train', 'val')):
    """root/SPLIT/CLASS/*.png: noise, lighter from class to class."""
    rng = np.random.default_rng(0)
    for split in splits:
        for c in range(classes):
            (root / split / f'class{c}').mkdir(parents=True)
            for i in range(n):
                image = rng.integers(60 * c, 60 * c + 80, (*size, 3), np.uint8)
                cv2.imwrite(str(root / split / f'class{c}' / f'{i}.png'), image)
    return root


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
    rows = [line for line in (tmp_path / 't.md').read_text().splitlines() if 'teacher' in line]
    assert [re.sub(' +', ' ', r) for r in rows] == [
        '| teacher ResNet-34 | 5 | 6.0M | 26.10 | 30.00 | | 1 | |',
        '| teacher ResNet-34 | 5 | 6.0M | 8.30 | 10.00 | | 1 | |',
    ]


def test_a_script_that_is_killed_goes_on_and_leaves_alone_what_is_done(tmp_path):
    logs = tmp_path / 'logs'
    given = {'SEEDS': '0', 'EPOCHS': '1', 'BETAS': '100', 'LOGS': str(logs), 'JOBS': '2'}
    root = make_photographs(tmp_path / 'set', 2, 6, (32, 32), ('train', 'test'))
    given['DATAROOT'] = str(root)
    given['EXTRA'] = '--validate 4 --depth 10 --width 0.25 --nthread 1'
    begun = start('beta', **given)
    until(lambda: (logs / 'wrn_16_1_seed0' / 'model.hkl').exists() or begun.poll() is not None)
    begun.send_signal(signal.SIGTERM)
    begun.communicate()
    assert begun.returncode == 143
    outputs = {f: f.read_text() for f in logs.glob('*.out')}
    before = {f: f.stat().st_mtime_ns for f in (logs / 'wrn_16_1_seed0').iterdir()}
    assert len(before) >= 3 and not (logs / 'beta.svg').exists()

    status, out, err = finish('beta', **given)
    assert status == 0, err
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert all(f.read_text().startswith(text) for f, text in outputs.items())
    assert '| AT, beta 100' in out and '—' not in (logs / 'beta.md').read_text()
    assert xml.etree.ElementTree.parse(logs / 'beta.svg').getroot().tag.endswith('svg')


# ------------------------ the order of runs, with a program that does nothing

FAKE_PYTHON = """#!/bin/bash
# Stands for python: a run takes a moment, and writes a log and empty weights. Each says in CALLS
# when it begins and ends.
case $1 in *.py) ;; *) exit ;; esac
case $1 in scripts/*) echo "tool $1" >> "$CALLS"; echo 3; exit ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --save) save=$2 ;;
    --epochs) epochs=$2 ;;
    --teacher_id | --teacher_params) [ -f "$2/model.hkl" ] || echo "no teacher" >> "$CALLS" ;;
  esac
  shift
done
name=${save##*/}
echo "begin $name ${CUDA_VISIBLE_DEVICES:-}" >> "$CALLS"
trap 'echo "stopped $name" >> "$CALLS"; exit 143' TERM
sleep "${PAUSE:-0.05}" & wait
if [ -z "$save" ]; then echo "json_stats: {}"; exit; fi # a test of a net
if [ "$name" = "${FAIL:-}" ]; then echo "cifar.py: error: made to fail" >&2; exit 3; fi
mkdir -p "$save"
record="{\\"epochs\\": $epochs, \\"epoch\\": $epochs, \\"test_acc\\": 50.0}"
echo "json_stats: $record" > "$save/log.txt"
touch "$save/model.hkl"
echo "end $name" >> "$CALLS"
"""


@pytest.fixture
def fake(tmp_path):
    """(the environment of a script whose Python does nothing, calls(): what that was called
    for)."""
    (tmp_path / 'venv' / 'bin').mkdir(parents=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / 'calls'
    log.touch()

    def calls():
        return [line.rstrip() for line in log.read_text().splitlines()]

    given = {'VENV': str(tmp_path / 'venv'), 'CALLS': str(log), 'LOGS': str(tmp_path / 'logs')}
    return given | {'DATAROOT': str(tmp_path), 'EPOCHS': '2', 'CUDA_VISIBLE_DEVICES': ''}, calls


def until(true, seconds=300):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.02)


def test_what_is_done_is_skipped_without_a_start_of_python(fake):
    given, calls = fake
    assert finish('figure_convergence', SEEDS='0', **given)[0] == 0
    first = calls()
    assert first.count('tool scripts/plot.py') == 1 and len(first) == 2 * 4 + 2
    status, out, _ = finish('figure_convergence', SEEDS='0 1', **given)
    assert status == 0 and out.count(': done') == 4
    assert len([c for c in calls()[len(first) :] if c.startswith('begin')]) == 4
    # More epochs, or weights that a kill has left older than the log, are not done.
    log = Path(given['LOGS']) / 'wrn_16_1_seed0' / 'log.txt'
    os.utime(log, (time.time() + 100,) * 2)
    status, out, _ = finish('figure_convergence', SEEDS='0 1', **given)
    assert status == 0 and out.count(': done') == 7 and '== wrn_16_1_seed0\n' in out
    # Nor is a run of other options, which the training script itself compares.
    for extra in '--lr 0.5', '--epochs 3':
        status, out, _ = finish('figure_convergence', SEEDS='1', **given | {'EXTRA': extra})
        assert status == 0 and ': done' not in out


def test_a_part_of_a_script_ends_in_its_table(fake):
    """With ONLY, what is left out is neither measured nor drawn."""
    given, calls = fake
    given |= {'SEEDS': '0'}
    status, _, err = finish('controls', **given, ONLY='untrained_*')
    assert status == 0 and calls()[-1] == 'tool scripts/summarize.py', err
    assert not [c for c in Path(given['LOGS']).iterdir() if c.name.startswith('equal_time')]
    for names, pictures in ('wrn_16_2_*', 0), ('wrn_16_1_*', 1):
        before = len(calls())
        status, _, err = finish('figure_convergence', **given, ONLY=names)
        assert status == 0, err
        assert calls()[before:].count('tool scripts/plot.py') == pictures


def test_a_stop_does_not_wait_for_the_test_of_a_net(fake, tmp_path):
    given, calls = fake
    weights = tmp_path / 'a.hkl'
    weights.touch()
    given |= {'IMAGENET': str(tmp_path), 'SEEDS': '0', 'TEACHER_PARAMS': str(weights)}
    begun = start('table5', **given, PAUSE='30')
    until(calls)
    time.sleep(0.2)  # its trap stands
    begun.send_signal(signal.SIGTERM)
    begun.communicate()
    assert begun.returncode == 143 and calls()[-1] == 'stopped'
    assert not [f for f in Path(given['LOGS']).iterdir() if f.suffix == '.txt']


@pytest.mark.parametrize(
    'script, given, named',
    [
        ('table1', {'SEEDS': ' '}, 'SEEDS'),
        ('cifar100', {'EPOCHS': '08'}, 'EPOCHS=08'),
        ('cifar100', {}, '100 classes'),
    ],
)
def test_what_cannot_be_meant_is_refused(script, given, named, fake, tmp_path):
    environment, calls = fake
    for split in 'train', 'test':
        (tmp_path / split / 'cat').mkdir(parents=True)
    status, _, err = finish(script, **environment | given)
    assert status == 2 and named in err and err.count('\n') == 1 and not calls()


def test_a_run_of_another_length_is_not_gone_on_with(fake):
    given, calls = fake
    write_run(Path(given['LOGS']), 'wrn_16_2_seed0', [9.0], epochs=30)
    status, _, err = finish('table2', **given | {'EPOCHS': '200', 'SEEDS': '0'})
    assert status == 2 and 'wrn_16_2_seed0 of 30 epochs, not 200' in err and not calls()
    status, _, err = finish('table2', **given | {'EPOCHS': '30', 'SEEDS': '0'})
    assert status == 0 and len(calls()) > 2, err


def test_a_net_is_tested_again_where_it_is_another(fake, tmp_path):
    given, calls = fake
    given |= {'IMAGENET': str(tmp_path), 'SEEDS': '0'}
    for name, times in ('a.hkl', 1), ('a.hkl', 1), ('b.hkl', 2), ('b.hkl', 3):
        weights = tmp_path / name
        weights.touch()
        os.utime(weights, (time.time() + (100 if times == 3 else -100),) * 2)
        status, _, err = finish('table5', **given, TEACHER_PARAMS=str(weights))
        assert status == 0, err
        assert len([c for c in calls() if c == 'begin']) == times, name


@pytest.mark.parametrize('jobs', ['1', '3'])
def test_a_run_that_fails_stops_the_script_with_its_name(fake, jobs):
    given, calls = fake
    given |= {'SEEDS': '0', 'JOBS': jobs, 'FAIL': 'at_wrn_16_1_from_wrn_16_2_seed0'}
    status, out, err = finish('table2', **given, PAUSE='0.2')
    assert status == 3 and 'made to fail' in err
    assert 'table2.sh: error: the run at_wrn_16_1_from_wrn_16_2_seed0 failed, exit status 3' in err
    begun = [c.split()[1] for c in calls() if c.startswith('begin')]
    over = [c.split()[1] for c in calls() if c.startswith(('end', 'stopped'))]
    assert sorted(over) == sorted(set(begun) - {given['FAIL']}), 'nothing runs on'
    assert 'tool scripts/summarize.py' not in calls() and len(begun) < 9
    del given['FAIL']
    status, out, _ = finish('table2', **given)
    assert status == 0 and '== wrn_16_2_seed0: done' in out and calls()[-1].startswith('tool')


@pytest.mark.parametrize('script', [*CIFAR, 'table4'])
def test_teachers_are_finished_before_their_students_begin(script, fake, tmp_path):
    given, calls = fake
    files = {k: str(tmp_path / 'calls') for k in ('STUDENT_PARAMS', 'TEACHER_PARAMS')}
    given |= {'JOBS': '30', 'SEEDS': '0 1', 'BETAS': '10'} | files
    given |= {'CUB': 'birds', 'SCENES': 'rooms'}
    status, _, err = finish(script, **given)
    assert status == 0, err
    assert 'no teacher' not in calls() and calls()[-1].startswith('tool')
    assert len([c for c in calls() if c.startswith('end')]) == len(options(script, **given))


def test_runs_side_by_side_have_a_gpu_each(fake):
    given, calls = fake
    given |= {'JOBS': '2', 'SEEDS': '0 1', 'CUDA_VISIBLE_DEVICES': '5,7'}
    status, _, err = finish('figure_convergence', **given, PAUSE='0.4')
    assert status == 0, err
    under_way, most, gpus = {}, 0, set()
    for call in calls():
        kind, name, *gpu = call.split()
        if kind == 'begin':
            assert gpu[0] not in under_way.values(), 'two runs on one GPU'
            under_way[name] = gpu[0]
            gpus |= set(gpu)
        elif kind == 'end':
            del under_way[name]
        most = max(most, len(under_way))
    assert most == 2 and gpus == {'5', '7'}
    assert (Path(given['LOGS']) / 'wrn_16_2_seed0.out').exists()


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_stopped_stops_its_runs(fake, signum, status):
    given, calls = fake
    begun = start('table2', **given, SEEDS='0', JOBS='2', PAUSE='30')
    until(lambda: len(calls()) == 2)
    time.sleep(0.2)  # the trap of the second stands
    begun.send_signal(signum)
    begun.communicate()
    assert begun.returncode == status
    assert sorted(calls()[2:]) == ['stopped wrn_16_1_seed0', 'stopped wrn_16_2_seed0']


# ------------------------ summarize.py


def write_run(logs, name, errors, epochs=None, **more):
    """A run folder whose log tells these test errors, an epoch each, of a run of `epochs`."""
    (logs / name).mkdir(parents=True)
    epochs = len(errors) if epochs is None else epochs
    records = [
        {
            'dataset': 'CIFAR10',
            'epochs': epochs,
            'epoch_step': [60, 120, 160],
            'initial_lr': 0.1,
            'dtype': 'float',
            'alpha': 0.0,
            'beta': 0.0,
            'temperature': 4.0,
            'epoch': epoch,
            'test_acc': 100 - error,
            'n_parameters': 175066,
            'train_time': 10.0,
        }
        | more
        for epoch, error in enumerate(errors, 1)
    ]
    (logs / name / 'log.txt').write_text(''.join(f'{json_stats(r)}\n' for r in records))


def summary(logs, *words, capsys):
    """(the rows as lists of cells, the text beneath them)."""
    summarize.main([*words[:1], str(logs), *words[1:]])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith('|')]
    rows = [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
    return rows, out.split('\n\n', 1)[1]


def test_summary_has_median_range_and_the_gain_of_pairs(tmp_path, capsys):
    alone, at = [9.0, 8.0, 10.0], [8.0, 7.5, 8.0]
    for seed, (a, b) in enumerate(zip(alone, at)):
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [50.0, a])
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [50.0, b], beta=1e3)
    write_run(tmp_path, 'at_p1_wrn_16_1_from_wrn_16_2_seed1', [50.0, 7.25], beta=1e3, at_p=1.0)
    rows, text = summary(tmp_path, 'table2', capsys=capsys)
    by_name = {row[0]: row for row in rows}
    assert by_name['student, no map'][3:] == ['8.77', '9.00', '8.00–10.00', '3', '']
    # Differences 1, 0.5, 2: mean 7/6, standard deviation 0.7638; 4.303 = t of 2 degrees of freedom.
    half = 4.303 * statistics.stdev([1, 0.5, 2]) / math.sqrt(3)
    gain = f'+1.17 ± {half:.2f} (n = 3)'
    assert by_name[r'sum \|A\|^2'][3:] == ['7.93', '8.00', '7.50–8.00', '3', gain]
    assert by_name[r'sum \|A\|'][3:] == ['7.99', '7.25', '', '1', '+0.75'], 'paired with seed 1'
    assert by_name[r'sum \|A\|^4'][3:] == ['8.09', '—', '', '', '']
    assert 'at_p4_wrn_16_1_from_wrn_16_2: missing (seeds 0, 1, 2)' in text
    assert 'at_p1_wrn_16_1_from_wrn_16_2: missing (seeds 0, 2)' in text
    assert '- beta 1000, at_p 1: at_p1_wrn_16_1_from_wrn_16_2\n' in text
    assert by_name['first group'][1:3] == ['', ''] and by_name['student, no group'][1] == '175,066'


def test_the_tables_hold_the_papers_numbers():
    def numbers(table, i=0):
        return [row[1] for row in summarize.TABLES[table][i].rows]

    assert [numbers('table1', i) for i in range(4)] == [
        [9.38, 8.93, 9.05, 8.55, 8.33, 7.28],
        [8.77, 7.93, 8.51, 7.41, 7.51, 6.31],
        [8.77, 8.25, 8.62, 8.39, 8.01, 6.58],
        [6.31, 5.85, 6.24, 6.08, 5.71, 5.23],
    ]
    assert numbers('table2') == [8.77, 7.99, 7.93, 8.09, 8.08]
    assert numbers('table2', 1) == [8.77, 8.11, 7.96, 7.97, 7.93]
    assert numbers('table3') == [13.5, 12.5, 12.1, 12.1, 11.8, 11.2]
    assert [numbers('table4', i) for i in (0, 1)] == [
        [28.5, 27.0, 27.0, 26.5],
        [28.2, 28.1, 27.1, 26.0],
    ]
    assert [numbers('table5', i) for i in (0, 1)] == [[30.4, 29.3, 26.1], [10.8, 10.0, 8.3]]
    assert [numbers('cifar100', i) for i in (0, 1)] == [
        [73.26, 74.92, 74.08, 75.61],
        [71.98, 73.54, 72.77, 75.61],
    ]
    columns = zip(*(numbers('convergence', i) for i in range(5)))
    assert list(columns) == [
        (22.0, 12.5, 9.5, 8.7, 8.77),
        (18.4, 11.5, 8.7, 8.0, 7.93),
        (20.4, 12.4, 9.3, 8.5, 8.51),
    ]


def test_intervals_are_those_of_students_t():
    # Quantiles as in NIST's e-Handbook, 1.3.6.7.2.
    for n, t in (2, 12.706), (5, 2.776), (10, 2.262), (31, 2.042):
        values = dict(enumerate(np.linspace(0, 1, n)))
        mean, half, count = summarize.gain(dict.fromkeys(range(n), 3.0), values, 'error')
        expected = t * np.std(list(values.values()), ddof=1) / np.sqrt(n)
        assert count == n and mean == pytest.approx(2.5) and half == pytest.approx(expected)
    better = summarize.gain({0: 70.0}, {0: 72.0, 1: 90.0}, 'accuracy')
    assert better == (2.0, None, 1) and summarize.gain({0: 1.0}, {1: 1.0}, 'error') is None


def test_unfinished_runs_have_no_number_and_are_told(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0, 8.0])
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [7.0], epochs=2)
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0').mkdir()
    rows, text = summary(tmp_path, 'table1', '--seeds', '0', '1', capsys=capsys)
    section = [row[0] for row in rows].index('**WRN-16-1 from WRN-16-2**')
    cells = {row[0]: row[4] for row in rows[section + 1 : section + 7]}
    assert cells == {
        'student': '8.00',
        'AT': '—',
        'F-ActT': '—',
        'KD': '—',
        'AT + KD': '—',
        'teacher': '—',
    }
    assert '- at_wrn_16_1_from_wrn_16_2: epoch 1 of 2 (seed 0)' in text
    assert '- at_wrn_16_1_from_wrn_16_2: missing (seed 1)' in text
    assert '- kd_wrn_16_1_from_wrn_16_2: no epoch done (seed 0)' in text
    assert '- wrn_16_1: missing (seed 1)' in text


def test_logs_that_tell_nothing_are_left_out_by_name(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    for seed, more in enumerate(
        [{'test_acc': None}, {'test_acc': math.nan}, {'epochs': 'many'}, {'epoch': None}]
    ):
        (tmp_path / f'at_wrn_16_1_from_wrn_16_2_seed{seed}').mkdir()
        record = {'epoch': 1, 'epochs': 1, 'test_acc': 90.0} | more
        log = tmp_path / f'at_wrn_16_1_from_wrn_16_2_seed{seed}' / 'log.txt'
        log.write_text(f'json_stats: {json.dumps(record)}\n')
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0').mkdir()
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0' / 'log.txt').write_text('json_stats: {"epoch": 1')
    rows, text = summary(tmp_path, 'table1', capsys=capsys)
    assert {row[4] for row in rows if row[0] in ('AT', 'KD')} == {'—'}
    assert 'at_wrn_16_1_from_wrn_16_2: its log is damaged (seeds 0, 1, 2, 3)' in text
    assert 'kd_wrn_16_1_from_wrn_16_2: its log is damaged (seed 0)' in text
    (tmp_path / 'at_beta1e_wrn_16_1_from_wrn_16_2_seed0').mkdir()  # no number
    assert 'beta 1' not in str(summary(tmp_path, 'beta', capsys=capsys)[0])


def test_a_student_that_other_tables_have_more_of_has_the_tables_seeds(tmp_path, capsys):
    for seed in 0, 1, 5:
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0 + seed])
        if seed < 2:
            write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    student = next(row for row in rows if row[0] == 'student')
    assert student[4:7] == ['9.50', '9.00–10.00', '2'] and 'seed 5' not in text


def test_runs_of_different_schedules_are_told(tmp_path, capsys):
    for seed in 0, 1, 2:
        dtype = 'bfloat16' if seed == 1 else 'float'
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0], dtype=dtype)
    beta = {'beta': 1e3, 'beta_decay': 'none', 'method': 'at'}
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [9.0], **beta)
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed1', [9.0], **beta | {'beta': 100.0})
    _, text = summary(tmp_path, 'table1', '--seeds', '0', '1', '2', capsys=capsys)
    assert '- dataset CIFAR10, epochs 1, epoch_step [60,120,160], lr 0.1' in text
    assert '- runs differ in dtype: float (4 runs), bfloat16 (wrn_16_1_seed1)' in text.replace(
        '; ', ', '
    )
    assert '- labels alone: wrn_16_1\n' in text
    assert '- beta 1000: at_wrn_16_1_from_wrn_16_2_seed0\n' in text
    assert '- beta 100: at_wrn_16_1_from_wrn_16_2_seed1\n' in text


def test_runs_that_are_no_seeds_of_one_experiment_have_no_median(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    write_run(tmp_path, 'wrn_16_1_seed1', [20.0, 8.0])
    for seed in 0, 1:
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    by_name = {row[0]: row[4:] for row in rows}
    assert by_name['student'] == ['—', '', '', '']
    assert by_name['AT from WRN-16-2'] == ['8.00', '8.00–8.00', '2', '']
    assert '- wrn_16_1: its runs differ in epochs' in text


def test_a_gain_of_fewer_pairs_than_runs_says_so(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    for seed in 0, 1, 2:
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    assert next(row for row in rows if row[0].startswith('AT from WRN'))[6:] == [
        '3',
        '+1.00 (n = 1)',
    ]


def test_damaged_weights_cost_a_table_their_multiply_adds_alone(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    (tmp_path / 'wrn_16_1_seed0' / 'model.hkl').write_bytes(b'half')
    summarize.main(['controls', str(tmp_path)])
    out, err = capsys.readouterr()
    assert '175,066' in out and '9.00' in out
    assert err.startswith('warning: ') and 'model.hkl' in err and err.count('\n') == 1


def test_parameters_and_multiply_adds_are_those_of_the_weights(tmp_path, capsys):
    torch.manual_seed(0)
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0], depth=10, width=0.5, n_parameters=1)
    _, params = resnet.wrn(10, 0.5, 10)
    save_params(tmp_path / 'wrn_16_1_seed0' / 'model.hkl', params)
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    n = sum(v.numel() for v in params.values() if v.requires_grad)
    madds = 3 * 16 * 9 * 32**2 + 32 * 10  # conv0 and fc
    shapes = (16, 8, 32), (8, 16, 16), (16, 32, 8)
    for ni, no, side in shapes:
        madds += (ni * no * 9 + no * no * 9 + ni * no) * side**2
    row = next(row for row in rows if row[0] == 'student')
    assert row[1:3] == [f'{n:,}', f'{madds / 1e6:.1f}M']
    # A log alone tells the net as well.
    (tmp_path / 'logs').mkdir()
    write_run(tmp_path, 'x', [9.0], depth=10, width=0.5, num_classes=10, n_parameters=1)
    (tmp_path / 'x' / 'log.txt').rename(tmp_path / 'logs' / 'wrn_16_1_seed0.txt')
    rows, _ = summary(tmp_path / 'logs', 'controls', capsys=capsys)
    assert next(r for r in rows if r[0] == 'student')[1:3] == row[1:3]


def test_there_is_no_gain_over_a_student_on_other_data(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [8.0], dataset='shapes', beta=1e3)
    write_run(tmp_path, 'wrn_16_1_equal_time_seed0', [9.5, 8.5])
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    by_name = {row[0]: row for row in rows}
    assert by_name['AT from WRN-16-2'][4] == '8.00' and by_name['AT from WRN-16-2'][7] == ''
    assert by_name['alone, for as long as with AT'][7] == '+0.50', 'longer on purpose'
    assert 'at_wrn_16_1_from_wrn_16_2: of another dataset' in text


def test_cifar100_is_told_in_accuracy_and_top5_where_there_is_one(tmp_path, capsys):
    write_run(tmp_path / 'c', 'wrn_16_2_seed0', [27.0])
    write_run(tmp_path / 'c', 'at_wrn_16_2_from_wrn_40_2_seed0', [26.0], beta=1e3)
    rows, _ = summary(tmp_path / 'c', 'cifar100', capsys=capsys)
    at = next(row for row in rows if row[0] == 'AT')
    assert at[3:] == ['74.08', '74.00', '', '1', '+1.00'] and rows[0][4] == 'here: accuracy, %'
    top = {'test_acc': [69.0, 89.5]}
    write_run(tmp_path / 'i', 'resnet_18_seed0', [0.0], **top, imagenetpath='/x/ILSVRC2012')
    rows, text = summary(tmp_path / 'i', 'table5', capsys=capsys)
    assert [r[3:5] for r in rows if r[0].startswith('student')] == [
        ['30.40', '31.00'],
        ['10.80', '10.50'],
    ]
    assert 'dataset ILSVRC2012' in text


def test_convergence_means_are_of_the_papers_schedule_alone(tmp_path, capsys):
    errors = [100.0 - 0.25 * epoch for epoch in range(1, 201)]
    write_run(tmp_path, 'wrn_16_1_seed0', errors)
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', errors[:100], beta=1e3)
    rows, text = summary(tmp_path, 'convergence', capsys=capsys)
    students = [row[3:5] for row in rows if row[0].startswith('student')]
    means = [100 - 0.25 * middle for middle in (54.5, 80, 120, 150.5, 200)]
    papers = ['22.00', '12.50', '9.50', '8.70', '8.77']
    assert [float(ours) for _, ours in students] == pytest.approx(means, abs=0.006)
    assert [paper for paper, _ in students] == papers
    assert [row[4] for row in rows if row[0] == 'AT'] == ['—'] * 4 + ['75.00']
    assert "another schedule than the paper's" in text
    # The published code wrote the drops as text; and a log that lacks an epoch of a stretch has no
    # mean of it.
    write_run(tmp_path / 'p', 'wrn_16_1_seed0', errors, epoch_step='[60,120,160]')
    log = tmp_path / 'p' / 'wrn_16_1_seed0' / 'log.txt'
    log.write_text(''.join(log.read_text().splitlines(keepends=True)[52:]))
    rows, _ = summary(tmp_path / 'p', 'convergence', capsys=capsys)
    ours = [row[4] for row in rows if row[0].startswith('student')]
    assert ours[0] == '—' and [float(v) for v in ours[1:]] == pytest.approx(means[1:], abs=0.006)


def test_equal_time_is_the_median_over_the_seeds_that_have_both_runs(tmp_path, capsys):
    def write(seed, alone=None, at=None, **more):
        if alone:
            write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0] * 3, train_time=alone, **more)
        if at:
            name = f'at_wrn_16_1_from_wrn_16_2_seed{seed}'
            write_run(tmp_path, name, [9.0] * 3, train_time=at)

    write(0, 10.0, 14.4)
    write(1, alone=1.0)  # on another machine, say
    write(2, at=60.0)
    write(3, 1.0, 60.0, epochs=4)  # not finished
    arguments = ['controls', str(tmp_path), '--equal_time', '200']
    summarize.main(arguments)
    assert capsys.readouterr().out == '288\n'
    write(4, 20.0, 40.0)
    write(5, 10.0, 15.0)
    summarize.main(arguments)
    assert capsys.readouterr().out == '300\n', 'of 1.44, 1.5 and 2'


def test_beta_rows_rise_and_the_picture_shows_them(tmp_path, capsys):
    for beta in '10', '1e+3', '316':
        name = f'beta{beta}_wrn_16_1_from_wrn_16_2_seed0'
        write_run(tmp_path, f'at_{name}', [9.0 + float(beta) / 1e3], beta=float(beta))
        write_run(tmp_path, f'at_kd_{name}', [8.0], beta=float(beta), alpha=0.9)
    write_run(tmp_path, 'kd_wrn_16_1_from_wrn_16_2_seed0', [8.5], alpha=0.9)
    write_run(tmp_path, 'wrn_16_1_seed0', [9.5])
    rows, _ = summary(tmp_path, 'beta', capsys=capsys)
    at = [(row[0], row[4]) for row in rows if row[0].startswith('AT, ')]
    assert at == [('AT, beta 10', '9.01'), ('AT, beta 316', '9.32'), ('AT, beta 1000', '10.00')]
    for name in 'a.svg', 'b.svg':
        summarize.main(['beta', str(tmp_path), '--save', str(tmp_path / name)])
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    # Of an AT + KD without its AT, and of a beta that beta.sh has and nothing was trained with.
    write_run(tmp_path, 'at_kd_beta3e4_wrn_16_1_from_wrn_16_2_seed0', [8.0], beta=3e4, alpha=0.9)
    rows, text = summary(tmp_path, 'beta', capsys=capsys)
    assert next(row for row in rows if row[0] == 'AT, beta 30000')[4] == '—'
    assert 'at_beta30000_wrn_16_1_from_wrn_16_2: missing (seed 0)' in text
    rows, text = summary(tmp_path, 'beta', '--betas', '1000', '31.6', capsys=capsys)
    shown = [(row[0], row[4]) for row in rows if ', beta' in row[0]]
    assert [s for s in shown if s[1] != '—'] == [
        ('AT, beta 1000', '10.00'),
        ('AT + KD, beta 1000', '8.00'),
    ]
    assert len(shown) == 4 and 'at_kd_beta31.6_wrn_16_1_from_wrn_16_2: missing (seed 0)' in text
    (tmp_path / 'at_kd_beta3e4_wrn_16_1_from_wrn_16_2_seed0').rename(tmp_path / 'old')
    sections = summarize.TABLES['beta']
    section = sections[0]._replace(rows=summarize.expand(sections[0].rows, tmp_path))
    runs = {row[2]: summarize.read_runs(row[2], [0], tmp_path) for row in section.rows}
    axes = summarize.draw_beta(runs, section).axes[0]
    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert curves['AT'] == [[10, pytest.approx(9.01)], [316, pytest.approx(9.316)], [1000, 10.0]]
    lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert lines['KD'] == 8.5 and lines['student'] == 9.5 and axes.get_xscale() == 'log'


def test_logs_may_be_copies_that_bear_the_runs_names(tmp_path, capsys):
    write_run(tmp_path / 'runs', 'wrn_16_1_seed0', [9.0])
    log = tmp_path / 'runs' / 'wrn_16_1_seed0' / 'log.txt'
    (tmp_path / 'wrn_16_1_seed0.txt').write_text(log.read_text())
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    assert next(row for row in rows if row[0] == 'student')[1:5] == ['175,066', '', '8.77', '9.00']


def test_summarize_refuses_in_one_line(tmp_path, capsys):
    for words, named in (
        (['table6', tmp_path], 'table6'),
        (['table1', tmp_path / 'none'], 'none'),
        (['table1', tmp_path, '--save', tmp_path / 'x.svg'], '.md'),
        (['table1', tmp_path, '--equal_time', '3'], 'controls'),
        (['controls', tmp_path, '--equal_time', '3'], 'at_wrn_16_1'),
        (['beta', tmp_path, '--save', tmp_path / 'x.png'], 'no finished run'),
    ):
        assert call_main(summarize.main, list(map(str, words))) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and named in err
    assert not list(tmp_path.iterdir())
