"""Starts the scripts that reproduce tables, and makes what their runs leave."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

import cifar
import imagenet
from support.logs import json_stats

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
    own = {'VENV': sys.prefix, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    return kept | own | given


def start(script, **given):
    """Start the script, with pipes for its output and without variables of the caller that would
    change it."""
    words = ['bash', str(ROOT / 'scripts' / f'{script}.sh')]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(words, env=environment(**given), **pipes)


def finish(script, **given):
    """(exit status, stdout, stderr) of the script."""
    process = start(script, **given)
    out, err = process.communicate()
    return process.returncode, out, err


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


def write_run(logs, name, errors, epochs=None, **more):
    """A run folder whose log tells these test errors, an epoch each, of a run of `epochs`."""
    (logs / name).mkdir(parents=True)
    epochs = epochs or len(errors)
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


def until(true, seconds=300):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.02)
