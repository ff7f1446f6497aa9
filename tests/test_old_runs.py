"""Runs that older code began, in old_runs/, must continue in this code and get the same results."""

import json
import shutil
from pathlib import Path

import cv2
import hickle
import numpy as np
import pytest
import torch

from programs import run_script

OLD_RUNS = Path(__file__).parent / 'old_runs'
EXPECTED = json.loads((OLD_RUNS / 'expected.json').read_text())
SIDES = {'cifar': 32, 'imagenet': 46}  # 46 for crops of 40: photographs need no resizing
EPOCHS = {'cifar/at': 2, 'cifar/factt': 3, 'imagenet/at': 2}
FOLDERS = ['cifar/teacher', 'imagenet/teacher', *EPOCHS]


def make_images(root, side):
    """Write 40 noise images a class, for training and for testing: PNG, so decoding is exact."""
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for c, name in enumerate(('dark', 'grey', 'light')):
            (root / split / name).mkdir(parents=True)
            for i in range(40):
                image = rng.integers(50 * c, 50 * c + 156, (side, side, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i:02}.png'), image)


def copy_runs(program, home):
    """Copy the program's run folders to home/runs, and make their images in home/set."""
    shutil.copytree(OLD_RUNS / program, home / 'runs')
    make_images(home / 'set', SIDES[program])


def records_of(folder):
    lines = (folder / 'log.txt').read_text().splitlines()
    return [json.loads(line.removeprefix('json_stats: ')) for line in lines]


def norms_of(folder):
    """{name: L2 norm} of the net in model.hkl and of the adapters in checkpoint.pt."""
    adapters = torch.load(folder / 'checkpoint.pt', weights_only=True)['adapters']
    tensors = hickle.load(folder / 'model.hkl') | {f'adapter.{k}': v for k, v in adapters.items()}
    return {name: float(np.linalg.norm(np.asarray(v))) for name, v in tensors.items()}


def assert_close(record, expected, names):
    """Another processor rounds differently; of 120 test images, that may move one or two."""
    for name in names:
        close = {'abs': 2.0} if name.endswith('acc') else {'rel': 1e-3}
        assert record[name] == pytest.approx(expected[name], **close), name


@pytest.mark.parametrize('run', EPOCHS)
def test_an_old_run_resumes_and_ends_as_in_the_old_code(run, tmp_path):
    program, name = run.split('/')
    copy_runs(program, tmp_path)
    folder = tmp_path / 'runs' / name
    old_records = records_of(folder)
    old = torch.load(folder / 'checkpoint.pt', weights_only=True)
    options = ['--resume', f'runs/{name}', '--epochs', EPOCHS[run]]
    done = run_script(f'{program}.py', *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    records = records_of(folder)
    assert [r['epoch'] for r in records] == list(range(1, EPOCHS[run] + 1))
    assert records[: len(old_records)] == old_records
    names = ['train_loss', 'train_acc', 'at_losses', 'test_loss', 'test_acc', 'lr', 'epoch_beta']
    for record, expected in zip(records, EXPECTED[run]['log'], strict=True):
        assert_close(record, expected, names)
    # Rounding may flip a ReLU, which moves a small bias by 1e-5.
    assert norms_of(folder) == pytest.approx(EXPECTED[run]['norms'], rel=1e-3, abs=1e-4)

    new = torch.load(folder / 'checkpoint.pt', weights_only=True)
    assert (new['epoch'], new['step']) == (EPOCHS[run], 0)
    assert new['options'] == new['options'] | old['options']


@pytest.mark.parametrize('run', FOLDERS)
def test_an_old_run_has_its_logged_accuracy(run, tmp_path):
    program, name = run.split('/')
    copy_runs(program, tmp_path)
    done = run_script(f'{program}.py', '--evaluate', f'runs/{name}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1].removeprefix('json_stats: '))
    logged = records_of(tmp_path / 'runs' / name)[-1]
    assert_close(record, logged, ['test_loss', 'test_acc'])


@pytest.mark.parametrize(
    'run, step', [('cifar/at', False), ('cifar/factt', False), ('imagenet/at', True)]
)
def test_the_old_runs_cover_what_a_checkpoint_holds(run, step):
    """Resuming would test less if a folder were replaced by a finished or simpler run."""
    checkpoint = torch.load(OLD_RUNS / run / 'checkpoint.pt', weights_only=True)
    assert checkpoint['epoch'] == 1 and len(checkpoint['log']) == 1
    assert bool(checkpoint['step']) == bool(checkpoint['sums']) == step
    assert bool(checkpoint['adapters']) == (run == 'cifar/factt')
    assert all(v['momentum_buffer'] is not None for v in checkpoint['optimizer']['state'].values())
