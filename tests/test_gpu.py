"""What only a GPU can show. Skipped without one; the rest of the suite runs on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet
from samples import log_of, make_photographs
from support import logs, weights

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ['--dataset', 'shapes', '--depth', '10', '--nthread', '2']
TEACHER = ['--teacher_id', 'teacher']


@pytest.fixture(scope='session')
def environment():
    given = {k: v for k, v in os.environ.items() if k != 'CUDA_VISIBLE_DEVICES'}
    if os.environ['GPU_OF_TESTS'] != 'all':
        given['CUDA_VISIBLE_DEVICES'] = os.environ['GPU_OF_TESTS']
    look = 'import torch; print(torch.cuda.is_available())'
    if python(given, '-c', look).stdout != 'True\n':
        pytest.skip('there is no GPU here')
    return given


def python(environment, *words, cwd=ROOT):
    words = [sys.executable, *map(str, words)]
    return subprocess.run(
        words, check=False, env=environment, cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope='session')
def home(environment, tmp_path_factory):
    """A working directory with a teacher in logs/teacher."""
    home = tmp_path_factory.mktemp('gpu')
    cifar(environment, home, '--save', 'logs/teacher', '--width', '2', '--epochs', '2')
    return home


def cifar(environment, home, *options):
    done = python(environment, ROOT / 'cifar.py', *SHAPES, *options, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def measured(folder):
    return log_of(folder, drop=('save', 'device', 'compile'))


def test_a_step_played_back_trains_as_the_step_itself(environment):
    """SGD with momentum on a net with batch norm, a batch of another size in between."""
    program = """
import torch
from support import devices
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

def train(graphed):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 5, 6)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    def step(x, targets):
        loss = torch.nn.functional.cross_entropy(net(x).flatten(1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()[None]
    played = devices.Graphed(step) if graphed else step
    losses = []
    for i in range(12):
        n = 7 if i in (1, 6) else 16
        x, targets = torch.randn(n, 3, 8, 8), torch.randint(5, (n,))
        losses.append(played(x.cuda(), targets.cuda()))
    assert not graphed or played.graph is not None
    return torch.cat(losses), [*net.parameters(), *net.buffers()]

torch.backends.cudnn.deterministic = True
(losses, state), (expected, expected_state) = train(True), train(False)
torch.testing.assert_close(losses, expected)
for a, b in zip(state, expected_state):
    torch.testing.assert_close(a, b)
print('alike', len(set(losses.tolist())))
"""
    done = python(environment, '-c', program)
    assert done.stdout == 'alike 12\n', done.stderr[-2000:]


@pytest.mark.parametrize(
    'options',
    [
        [],
        [*TEACHER, '--alpha', '0.9', '--beta', '1e+3', '--beta_decay', 'linear'],
        [*TEACHER, '--method', 'factt', '--beta', '1e+3'],
        [*TEACHER, '--method', 'grad', '--beta', '1'],
        ['--method', 'sym', '--beta', '1'],
        ['--method', 'minl2', '--beta', '1'],
        ['--net', 'nin', '--width', '16', '--depth', '10'],
    ],
    ids=lambda options: ' '.join(options[2:5]) or 'alone',
)
def test_an_epoch_on_the_gpu_is_that_of_the_cpu(environment, home, options, tmp_path):
    options = ['--epochs', '1', '--lr', '0.01', *options]
    for device in 'cpu', 'cuda':
        cifar(environment, home, *options, '--device', device, '--save', tmp_path / device)
    (a,), (b,) = measured(tmp_path / 'cpu'), measured(tmp_path / 'cuda')
    assert b['train_loss'] == pytest.approx(a['train_loss'], rel=1e-3)
    assert b['at_losses'] == pytest.approx(a['at_losses'], rel=1e-2)
    assert b['test_loss'] == pytest.approx(a['test_loss'], rel=1e-2)


def test_compiled_and_played_back_it_learns_the_same(environment, home, tmp_path):
    options = [*TEACHER, '--beta', '1e+3', '--epochs', '3', '--lr', '0.01']
    for name, more in ('eager', []), ('compiled', ['--compile']):
        cifar(environment, home, *options, *more, '--save', tmp_path / name)
    for a, b in zip(measured(tmp_path / 'eager'), measured(tmp_path / 'compiled')):
        assert b['train_loss'] == pytest.approx(a['train_loss'], rel=1e-2)
        assert b['at_losses'] == pytest.approx(a['at_losses'], rel=5e-2)
        assert b['lr'] == a['lr']


@pytest.mark.parametrize('fast', [[], ['--compile', '--dtype', 'bfloat16']], ids=['eager', 'fast'])
def test_deterministic_runs_and_resumed_ones_have_the_same_bits(environment, home, fast, tmp_path):
    options = [*TEACHER, '--beta', '1e+3', '--deterministic', '--epoch_step', '[3]', *fast]
    for name in 'once', 'again':
        cifar(environment, home, *options, '--epochs', '3', '--save', tmp_path / name)
    for epochs in '1', '2', '3':
        resumed = ['--epochs', epochs, '--save', tmp_path / 'resumed', '--resume']
        cifar(environment, home, *options, *resumed)
    once = measured(tmp_path / 'once')
    assert measured(tmp_path / 'again') == once
    assert measured(tmp_path / 'resumed')[-1] == once[-1]
    weights = (tmp_path / 'once/model.hkl').read_bytes()
    assert (tmp_path / 'again/model.hkl').read_bytes() == weights
    assert (tmp_path / 'resumed/model.hkl').read_bytes() == weights


def test_photographs_on_the_gpu(environment, tmp_path):
    make_photographs(tmp_path / 'set')
    torch.manual_seed(0)
    weights.save_params(tmp_path / 'teacher.hkl', resnet.resnet(34, 0.25, 3)[1])
    words = '--imagenetpath set --image_size 64 --width 0.25 --batch_size 12 --epochs 2 --lr 1e-3'
    options = [*words.split(), '--teacher_params', 'teacher.hkl']
    for name, more in ('float', []), ('fast', ['--compile', '--dtype', 'bfloat16']):
        run = python(
            environment, ROOT / 'imagenet.py', *options, *more, '--save', name, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr[-2000:]
    a, b = (logs.read_log(tmp_path / name / 'log.txt') for name in ('float', 'fast'))
    assert b[0]['train_loss'] == pytest.approx(a[0]['train_loss'], rel=5e-2)
    tested = python(
        environment, ROOT / 'imagenet.py', *options[:4], '--evaluate', 'float', cwd=tmp_path
    )
    line = json.loads(tested.stdout.partition(': ')[2])
    assert line['test_acc'] == a[-1]['test_acc'], tested.stderr[-2000:]
