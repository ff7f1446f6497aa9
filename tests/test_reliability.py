"""scripts/reliability.py and kill_at.py on small runs."""

import json
import mmap
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from samples import make_photographs, make_run, refused
from support import weights
from support.program import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import reliability


def check(*words, cwd):
    """The lines that a check prints, which must succeed."""
    command = [sys.executable, ROOT / 'scripts/reliability.py', *words]
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ------------------------ kills


def test_imagenet_killed_at_random_continues_with_the_same_bits(tmp_path, forked_scripts):
    root = make_photographs(tmp_path / 'set', ('dark', 'light'), train=12, val=2)
    options = '--image_size 33 --batch_size 4 --checkpoint_minutes 1e-6 --nthread 1'
    words = ['--imagenetpath', root, '--kills', '1', '--epochs', '6', '--options', options]
    *runs, total = check('kills', *words, cwd=tmp_path)
    places = [
        (int(epoch), int(step))
        for line in runs
        for epoch, step in re.findall(r'(\d+)\+(\d+)', line.removeprefix('run '))
    ]
    assert len(places) == 1 and all(line.endswith(': the same bits') for line in runs)
    assert all(epoch <= 6 and step <= 6 for epoch, step in places)  # 24 images are 6 steps
    inside = sum(step > 0 for _, step in places)
    assert (
        total
        == f'1 kills in {len(runs)} runs of 6 epochs, {inside} resumed inside an epoch, none lost'
    )


WRITES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from support.files import write_text
for i in range(4):
    write_text(f'file{{i % 2}}', str(i) * 100)
"""


@pytest.mark.parametrize(
    'moment, texts, left',
    [('write', '01', '2' * 50), ('rename', '01', '2' * 100), ('renamed', '21', '')],
)
def test_a_run_is_killed_while_it_writes_its_third_file(tmp_path, moment, texts, left):
    """The script writes file0, file1, file0 and file1. left: what is in the temporary file."""
    (tmp_path / 'script.py').write_text(WRITES)
    command = [sys.executable, ROOT / 'scripts/kill_at.py', moment, '3', 'script.py']
    done = subprocess.run(command, check=False, cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL and done.stderr == b''  # no flush was refused
    for name, text in zip(('file0', 'file1'), texts):
        assert (tmp_path / name).read_text() == text * 100
    temporary = tmp_path / '.file0.part'
    assert (temporary.read_text() if temporary.exists() else '') == left


@pytest.mark.parametrize(
    'code, end',
    [
        ('pass', 'finished'),
        ('os.kill(os.getpid(), 9)', 'killed'),
        ('time.sleep(60)', 'killed'),
        ('sys.exit("cifar.py: error: cannot write a: No space left on device")', 'full'),
        ('sys.exit("cifar.py: error: cannot write a: Input/output error")', None),
        ('raise ValueError("a bug")', None),
    ],
)
def test_the_end_of_a_run_is_recognised(tmp_path, monkeypatch, code, end):
    words = [sys.executable, '-c', f'import os, sys, time; {code}']
    monkeypatch.setattr(reliability, 'launch', lambda opt, _: words)
    opt, given = reliability.parser.parse(['kills'])
    reliability.complete(opt, given)
    rng = random.Random(2 if 'sleep' in code else 0)  # 2: after a random time

    def stop():
        return reliability.stop_once(opt, tmp_path / 'run', tmp_path / 'teacher', rng, (0.5, 0.1))

    if end:
        assert stop() == end
    else:
        with pytest.raises(UserError, match='status 1'):
            stop()


def test_a_checkpoint_that_goes_back_is_an_error(monkeypatch, capsys):
    progress = iter([(1, 3), (2, 0), (1, 5)])
    monkeypatch.setattr(reliability, 'train', lambda *_: None)
    monkeypatch.setattr(reliability, 'time_run', lambda *_: (1, 1))
    monkeypatch.setattr(reliability, 'stop_once', lambda *_: 'killed')
    monkeypatch.setattr(reliability, 'progress', lambda _: next(progress))
    error = refused(reliability.main, ['kills', '--kills', '9'], capsys, status=1)
    assert 'a checkpoint was lost: [(1, 3), (2, 0), (1, 5)]' in error


def test_the_small_disk_is_full_after_three_runs(tmp_path):
    whole = make_run(tmp_path / 'whole')
    size = sum(f.stat().st_size for f in whole.iterdir())
    try:
        with reliability.disk_for(whole, Namespace(full_disk=True)) as disk:
            (disk / 'file').write_bytes(bytes(3 * size))
            with pytest.raises(OSError, match='No space left on device'):
                (disk / 'more').write_bytes(bytes(2**21))
    except UserError:
        pytest.skip('no root: a tmpfs cannot be mounted')
    assert not any(disk.iterdir())


def test_kills_that_lost_something_are_reported(tmp_path):
    whole = make_run(tmp_path / 'whole')
    for name in 'killed', 'other_log', 'other_weights':
        shutil.copytree(whole, tmp_path / name)
    log = (whole / 'log.txt').read_text()
    (tmp_path / 'killed/log.txt').write_text(log.replace('"train_time": 30.0', '"train_time": 9.0'))
    assert (tmp_path / 'killed/log.txt').read_text() != log
    reliability.compare(whole, tmp_path / 'killed')
    (tmp_path / 'other_log/log.txt').write_text(
        log.replace('"train_acc": 56.0', '"train_acc": 56.1')
    )
    params = weights.load_params(whole / 'model.hkl')
    params['fc.bias'][0] += 1e-7
    weights.save_params(tmp_path / 'other_weights/model.hkl', params)
    for name in 'other_log', 'other_weights':
        with pytest.raises(UserError, match='differs') as reported:
            reliability.compare(whole, tmp_path / name)
        assert reported.value.status == 1


# ------------------------ memory


def test_memory_after_each_epoch_is_reported(tmp_path, forked_scripts):
    root = make_photographs(tmp_path / 'set', ('a', 'b'), train=4, val=2)
    words = ['--imagenetpath', root, '--epochs', '20', '--json', 'memory.json']
    options = '--image_size 33 --width 0.1 --batch_size 8 --nthread 1 --device cpu'
    _, *epochs, verdict = check('memory', *words, '--options', options, cwd=tmp_path)
    sizes = json.loads((tmp_path / 'memory.json').read_text())['resident_bytes']
    assert epochs == [f'epoch {i:<4}{size / 1e6:8.1f} MB' for i, size in enumerate(sizes, 1)]
    assert len(sizes) == 20 and min(sizes) > 1e8  # torch alone is more
    early, middle, late = (statistics.median(sizes[i : i + 5]) / 1e6 for i in (2, 10, 15))
    assert [float(v) for v in re.findall(r'([-+.\d]+) MB', verdict)] == [
        round(v, 1) for v in (early, middle, late, late - middle)
    ]
    assert verdict.endswith('it grows' if reliability.grows(sizes) else 'it does not grow')


def test_resident_memory_is_that_of_the_process():
    before = reliability.resident(os.getpid())
    with mmap.mmap(-1, 80_000_000) as held:  # fresh pages, whatever malloc has kept
        for i in range(0, len(held), 4096):
            held[i] = 1
        grown = reliability.resident(os.getpid()) - before
    assert abs(grown - 80e6) < 8e6


def test_memory_that_leaks_is_distinguished_from_memory_that_settles():
    settles = [600, 700] + 4 * [710] + 14 * [720]
    assert not reliability.grows(settles)
    assert not reliability.grows([size + 3 * (i % 2) for i, size in enumerate(settles)])
    assert reliability.grows([size + i for i, size in enumerate(settles)])
    assert reliability.grows([720] * 16 + [730] * 4)
    assert not reliability.grows(settles[::-1])


def test_a_run_that_ends_early_is_reported():
    words = [sys.executable, '-c', 'print("epoch 1/2", flush=True)']
    with pytest.raises(UserError, match='ended early'):
        reliability.watch(words, 2)


# ------------------------ options


VALUES = {'kills': ['3'], 'seed': ['1'], 'ranks': ['2'], 'full_disk': [], 'json': ['memory.json']}


@pytest.mark.parametrize(
    'check, name',
    [
        ('kills', 'json'),
        *(('memory', name) for name in ('kills', 'seed', 'ranks', 'full_disk')),
    ],
)
def test_options_of_another_check_are_refused(check, name, capsys):
    error = refused(reliability.main, [check, f'--{name}', *VALUES[name]], capsys)
    assert f'--{name}: has no effect with {check}' in error


def test_each_check_has_its_own_defaults():
    for check, epochs in ('kills', 40), ('memory', 20):
        opt, given = reliability.parser.parse([check, '--imagenetpath', 'DIR'])
        reliability.complete(opt, given)
        assert opt.epochs == epochs and opt.imagenetpath == 'DIR' and opt.options == ''


@pytest.mark.parametrize(
    'words, names',
    [
        ([], 'CHECK'),
        (['kill'], 'CHECK'),
        (['kills', '--kills', '0'], '--kills'),
        (['kills', '--imagenetpath', 'nowhere'], 'nowhere'),
        (['kills', '--ranks', '2'], '--ranks 2'),
        (['memory'], '--imagenetpath'),
        (['memory', '--imagenetpath', 'nowhere'], 'nowhere'),
        (['memory', '--imagenetpath', 'nowhere', '--epochs', '19'], '--epochs 19'),
        (['memory', '--imagenetpath', 'nowhere', '--json', f'{__file__}/m.json'], '--json'),
    ],
)
def test_mistakes_name_their_option(words, names, capsys):
    assert names in refused(reliability.main, words, capsys)
