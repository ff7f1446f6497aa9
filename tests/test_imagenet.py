"""imagenet.py as its users meet it, on a tiny tree of photographs: training, fine-tuning, kills
inside epochs, several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torchvision import transforms

import cifar
import imagenet
import resnet
import utils
from programs import ranks_in
from samples import (
    AffineNet,
    evaluated,
    fold,
    log_of,
    make_photographs,
    random_resnet,
    records_of,
    same_weights,
    torchvision_net,
    warnings_of,
    weights_of,
    words,
)
from support import logs, names, program, runs, weights
from support.program import UserError

# test_ranks.py starts torchrun as a process that is not forked.
pytestmark = pytest.mark.usefixtures('forked_scripts')

ROOT = Path(__file__).resolve().parent.parent
SMALL = '--image_size 40 --width 0.25 --batch_size 12 --nthread 1'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with photographs of 3 classes in set/, and a folded ResNet-18 of half the width in
    teacher.hkl."""
    home = tmp_path_factory.mktemp('imagenet')
    make_photographs(home / 'set')
    weights.save_params(home / 'teacher.hkl', fold(random_resnet(18, 0.5, 3)))
    return home


@pytest.fixture
def run(home, monkeypatch):
    """run(*options): the exit status of imagenet.main in this process."""
    monkeypatch.setattr(sys, 'argv', ['imagenet.py'])

    def call(*options, cwd=home, small=SMALL):
        monkeypatch.chdir(cwd)
        return program.call_main(imagenet.main, words('--imagenetpath set', small, *options))

    return call


def started(home, *options, processes=1):
    """The command, started."""
    launch = '-m torch.distributed.run --standalone --nproc_per_node'
    launch = words(launch, processes) if processes > 1 else []
    argv = [sys.executable, *launch, *words(ROOT / 'imagenet.py', '--imagenetpath set', SMALL)]
    keep = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    env = keep | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen([*argv, *words(*options)], cwd=home, env=env, **pipes)


def command(home, *options, processes=1):
    """The command, with its status and its output."""
    process = started(home, *options, processes=processes)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# ------------------------ training


def test_a_student_learns_from_a_release_and_keeps_it_out_of_its_weights(home, run, capsys):
    options = '--teacher_params teacher.hkl --epochs 2 --epoch_step [2]'
    assert run('--save logs/at', options) == 0
    out, err = capsys.readouterr()
    assert not warnings_of(Namespace(stderr=err)), err
    assert 'using --beta 1000' in out and 'teacher teacher.hkl: test accuracy' in out
    records = records_of(home / 'logs/at')
    assert [r['epoch'] for r in records] == [1, 2]
    assert [r['lr'] for r in records] == pytest.approx([0.1, 0.01])
    last = records[-1]
    assert len(last['at_losses']) == 4 and len(last['test_acc']) == len(last['train_acc']) == 2
    options = {a.dest for a in imagenet.parser._actions} - {'help', 'resume', 'evaluate'}
    assert options <= last.keys()
    assert last['classes'] == ['beach', 'city', 'wood'] and last['beta'] == 1000
    names = weights_of(home / 'logs/at').keys()
    assert names == resnet.resnet(18, 0.25, 3)[1].keys()


def test_the_loss_has_the_chosen_groups_and_starts_at_the_chosen_epoch(home):
    torch.manual_seed(1)
    f_s, params_s = resnet.resnet(18, 0.25, 3)
    f_t, params_t, _ = weights.load_net(home / 'teacher.hkl')
    options = '--beta 100 --alpha 0.5 --temperature 3 --at_groups 1,3'
    opt = imagenet.parser.parse_args(options.split())
    params = utils.flatten({'student': params_s, 'teacher': params_t})
    images, targets = torch.randint(0, 256, (6, 48, 40, 3), dtype=torch.uint8), torch.arange(6) % 3
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    y, g_s = f_s(x, {k: v.detach().clone() for k, v in params_s.items()}, True)
    y_t, g_t = f_t(x, params_t, False)
    soft = torch.softmax(y_t / 3, 1)
    kl = (soft * (soft.log() - torch.log_softmax(y / 3, 1))).sum(1).mean()
    maps = [[g.pow(2).sum(1).flatten(1) for g in (g_s[i], g_t[i])] for i in (1, 3)]
    ats = [
        (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).pow(2).mean()
        for a, b in maps
    ]
    task = 0.5 * 9 * kl + 0.5 * torch.nn.functional.cross_entropy(y, targets)
    loss_of = imagenet.make_loss(imagenet.Nets(f_s, f_t, params), opt, ['cpu'])
    for use_at, expected in (True, task + 100 * sum(ats)), (False, task):
        copy = {k: v.detach().clone() for k, v in params.items()}
        loss, terms = loss_of(images, targets, copy, use_at)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert terms[2:4].tolist() == pytest.approx([a.item() for a in ats], rel=1e-3)
    assert terms[-2].item() == pytest.approx(100 * (y.argmax(1) == targets).float().mean().item())
    assert terms[-1].item() == 100, 'three classes are within the first five'


def test_at_start_is_the_first_epoch_with_maps(home, run):
    options = '--teacher_params teacher.hkl --beta 1e4 --epochs 2 --epoch_step [9] --seed 2'
    for start in 1, 2, 3:
        assert run(options, f'--at_start {start} --save logs/start{start}') == 0
    losses = [[r['train_loss'] for r in log_of(home / f'logs/start{s}')] for s in (1, 2, 3)]
    assert losses[1][0] == losses[2][0] != losses[0][0] and losses[1][1] > losses[2][1]
    betas = [[r['epoch_beta'] for r in log_of(home / f'logs/start{s}')] for s in (1, 2, 3)]
    assert betas == [[1e4, 1e4], [0, 1e4], [0, 0]]


def test_fine_tuning_has_a_new_head_and_leaves_batch_norm_and_the_first_group_alone(home, run):
    source = random_resnet(18, 0.5, 9)
    torch.save(names.to_torchvision(source), home / 'source.pth')
    options = '--student_params source.pth --width 0.5 --finetune --teacher_params teacher.hkl'
    recipe = '--at_groups 2,3 --epochs 1 --epoch_step [9] --lr 0.01'
    assert run('--save logs/tuned', options, recipe) == 0
    tuned = weights_of(home / 'logs/tuned')
    assert tuned['fc.weight'].shape == (3, 256)
    for name, value in source.items():
        fixed = 'bn' in name or name == 'conv0' or name.startswith('group0')
        if not name.startswith('fc'):
            assert torch.equal(tuned[name], value) == fixed, name
    free = [k for k in tuned if not ('bn' in k or k == 'conv0' or k.startswith('group0'))]
    n = sum(tuned[k].numel() for k in free)
    assert records_of(home / 'logs/tuned')[0]['n_parameters'] == n


def test_a_new_head_begins_at_zero_bias_and_trains_it(home, run):
    weights.save_params(home / 'nine.hkl', resnet.resnet(18, 0.25, 9)[1])
    tune = '--student_params nine.hkl --finetune --epoch_step [9] --lr 1e-3'
    assert run(tune, '--epochs 0 --save logs/head0') == 0
    assert run(tune, '--epochs 1 --save logs/head1') == 0
    new, tuned = weights_of(home / 'logs/head0'), weights_of(home / 'logs/head1')
    assert torch.equal(new['fc.bias'], torch.zeros(3)) and tuned['fc.bias'].abs().min() > 0
    assert new['fc.weight'].shape == (3, 128) and not torch.equal(
        new['fc.weight'], weights.load_params(home / 'nine.hkl')['fc.weight'][:3]
    )


def test_top_5_counts_the_fifth_likeliest_class_and_not_the_sixth():
    logits = torch.tensor([[0.0, 7, 6, 5, 4, 3, 2]]).repeat(7, 1)
    found = imagenet.correct(logits, torch.arange(7))
    assert found[0].tolist() == [False, True, False, False, False, False, False]
    assert found[1].tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize('held_out, known', [(0, None), (9, 61.5)])
def test_the_accuracy_in_a_log_is_of_its_validate_alone(held_out, known):
    record = {'image_size': 40, 'validate': 9, 'test_acc': [61.5, 90.0]}
    net = weights.Net(None, {}, [record])
    opt = Namespace(image_size=40, validate=held_out)
    assert imagenet.known_accuracy('logs/x', net, opt) == known


def test_fine_tuning_takes_plain_crops_and_older_runs_continue_as_they_started(home, run, capsys):
    weights.save_params(home / 'small.hkl', resnet.resnet(18, 0.25, 3)[1])
    tune = '--student_params small.hkl --finetune --epoch_step [9] --lr 1e-3'

    def tuned(name, options):
        assert run(tune, f'--save logs/{name}', options) == 0
        return log_of(home / f'logs/{name}', ('save', 'epochs'))

    plain, same = tuned('plain', '--epochs 1'), tuned('same', '--epochs 1 --train_crop plain')
    resized = tuned('resized', '--epochs 2 --train_crop resized')
    assert plain == same and plain[0]['train_crop'] == 'plain'
    assert plain[0]['train_loss'] != resized[0]['train_loss']
    assert run('--epochs 0 --save logs/new') == 0
    assert log_of(home / 'logs/new')[0]['train_crop'] == 'resized'

    tuned('older', '--epochs 1 --train_crop resized')
    checkpoint = runs.load_checkpoint(home / 'logs/older')
    del checkpoint['options']['train_crop']
    runs.save_checkpoint(home / 'logs/older', checkpoint)
    assert run(tune, '--save logs/older --epochs 2 --resume --train_crop plain') == 2
    assert '--train_crop plain differs' in capsys.readouterr().err
    assert tuned('older', '--epochs 2 --resume') == resized


def test_a_student_may_start_from_weights(home, run, capsys):
    _, source = torchvision_net(18, num_classes=3)
    weights.save_params(home / 'three.hkl', source)
    assert run('--student_params three.hkl --width 1 --epochs 0 --save logs/started') == 0
    model = weights_of(home / 'logs/started')
    assert all(torch.equal(model[k], v) for k, v in source.items())
    torch.save(torchvision_net(18, num_classes=9)[1], home / 'nine.pth')
    assert run('--student_params nine.pth --width 1') == 2
    assert '--finetune' in capsys.readouterr().err


# ------------------------ evaluation


def reference_accuracy(net, home):
    """(top-1 accuracy in per cent, mean loss) of a module on set/val by torchvision's pipeline."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(46),  # 40 * 256 / 224
            transforms.CenterCrop(40),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    found = torchvision.datasets.ImageFolder(home / 'set/val', pipeline)
    x, y = torch.stack([image for image, _ in found]), torch.tensor(found.targets)
    with torch.no_grad():
        logits = net.eval()(x)
    acc = 100 * (logits.argmax(1) == y).double().mean().item()
    return acc, torch.nn.functional.cross_entropy(logits, y).item()


def test_a_folder_test_does_for_val(home, run, capsys):
    (home / 'tested').mkdir()
    for split, name in ('train', 'train'), ('test', 'val'):
        (home / 'tested' / split).symlink_to(home / 'set' / name)
    found = []
    for root in 'set', 'tested':
        assert run('--evaluate teacher.hkl --imagenetpath', root) == 0
        stats = evaluated(capsys.readouterr().out)
        found.append((stats['test_loss'], stats['test_acc']))
    assert found[0] == found[1]


def test_the_weights_of_a_run_are_tested_as_the_run_is(home, run, capsys):
    assert run('--epochs 1 --save logs/small --image_size 48') == 0
    capsys.readouterr()
    found = []
    for source in 'logs/small', 'logs/small/model.hkl':
        assert program.call_main(imagenet.main, ['--evaluate', source]) == 0
        stats = evaluated(capsys.readouterr().out)
        measured = {k for k in stats if 'time' in k} | {'images_per_second', 'evaluate'}
        found.append({k: v for k, v in stats.items() if k not in measured})
    assert found[0] == found[1] and found[0]['image_size'] == 48
    last = records_of(home / 'logs/small')[-1]
    assert found[0]['test_loss'] == pytest.approx(last['test_loss'])


def test_a_run_that_holds_images_out_is_tested_on_them(home, run, capsys):
    held_out, seen = '--validate 9 --epochs 1', []
    for name, options in ('teacher9', '--seed 3'), ('student9', '--teacher_params logs/teacher9'):
        assert run(held_out, options, f'--save logs/{name}') == 0
        out, err = capsys.readouterr()
        assert '33 images of 3 classes' in out and 'holds out' not in err
        record = records_of(home / f'logs/{name}')[0]
        assert record['validate'] == 9
        assert run('--evaluate', f'logs/{name}') == 0
        tested = evaluated(capsys.readouterr().out)
        assert [tested[k] for k in ('validate', 'test_loss')] == [9, record['test_loss']]
        assert run('--validate 0 --evaluate', f'logs/{name}') == 0
        other = evaluated(capsys.readouterr().out)
        assert other['validate'] == 0 and other['test_loss'] != record['test_loss']
        seen.append(record['data_crc32'])
    assert seen[0] == seen[1], 'the same images whatever the seed'


def test_a_teacher_that_has_seen_what_validate_holds_out_is_warned_of(home, run, capsys):
    assert run('--epochs 1 --save logs/saw_all') == 0
    assert run('--epochs 1 --validate 12 --save logs/saw_less') == 0
    shutil.copytree(home / 'set', home / 'copy')
    shutil.copytree(home / 'set', home / 'others')
    for folder in (home / 'others').iterdir():
        first = min(folder.iterdir())
        first.rename(folder / 'another class')
    for teacher, more, warned in (
        ('saw_all', '--seed 0', True),
        ('saw_less', '--seed 0', False),
        ('saw_all', '--imagenetpath copy', True),
        ('saw_all', '--imagenetpath others', False),
    ):
        capsys.readouterr()
        save = f'--save logs/of_{teacher}{len(more)}'
        taught = f'--teacher_params logs/{teacher} --validate 9 --epochs 0'
        assert run(taught, more, save) == 0
        error = capsys.readouterr().err
        trained = f'teacher logs/{teacher} was trained on images that --validate 9 holds out'
        assert (trained in error) == warned, error
    assert run('--validate 1') == 2
    assert '--validate 1: each of the 3 classes needs a held-out image' in capsys.readouterr().err


def test_evaluate_recognises_every_layout(home, run, capsys):
    net, params = torchvision_net(18, num_classes=3)
    torch.save(net.state_dict(), home / 'tv.pth')
    safetensors.torch.save_file(net.state_dict(), home / 'tv.safetensors')
    weights.save_params(home / 'ours.hkl', params)
    weights.save_params(home / 'folded.hkl', fold(params))
    acc, loss = reference_accuracy(net, home)
    for name in 'tv.pth', 'tv.safetensors', 'ours.hkl', 'folded.hkl':
        assert run('--evaluate', name) == 0
        stats = evaluated(capsys.readouterr().out)
        assert stats['layout'] == ('folded' if name == 'folded.hkl' else 'resnet')
        assert stats['test_loss'] == pytest.approx(loss, rel=0.02)
        assert stats['test_acc'] == [pytest.approx(acc, abs=7), 100]
        assert stats['images_per_second'] > 0
    assert stats['n_parameters'] == sum(v.numel() for k, v in fold(params).items())
    weights.save_params(home / 'affine.hkl', AffineNet(num_classes=3).p)
    assert run('--evaluate affine.hkl') == 0
    assert '"layout": "affine"' in capsys.readouterr().out


def test_a_teacher_far_from_what_is_known_of_it_is_noticed(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    torch.save({'conv0': torch.zeros(1)}, 'resnet-34-export.hkl')  # states no accuracy
    monkeypatch.setattr(imagenet, 'test', lambda *_: (1.0, [30.0, 50.0]))
    val = type('Val', (), {'labels': torch.zeros(5000), 'classes': [str(i) for i in range(1000)]})
    opt = imagenet.parser.parse_args(['--teacher_params', 'resnet-34-export.hkl'])
    with torch.device('meta'):
        teacher = weights.Net(*resnet.resnet(34, 1, 1000), [])
    nets = imagenet.Nets(None, teacher.f, {})
    assert imagenet.test_teacher(opt, teacher, nets, val) == 30.0
    out, err = capsys.readouterr()
    assert '2000 validation images' in out and '73.31' in err and 'warning' in err
    monkeypatch.setattr(imagenet, 'test', lambda *_: (1.0, [72.0, 90.0]))
    imagenet.test_teacher(opt, teacher, nets, val)
    assert not capsys.readouterr().err
    torch.save({'state_dict': {}, 'best_acc1': 76.5}, 'resnet-34-export.hkl')
    imagenet.test_teacher(opt, teacher, nets, val)
    assert 'far below its known 76.5 %' in capsys.readouterr().err


# ------------------------ kills, several processes


AT = '--teacher_params teacher.hkl --beta 100 --epochs 3 --epoch_step [3] --seed 7'
OFTEN = '--checkpoint_minutes 1e-6'  # a checkpoint after each step


def test_killed_inside_epochs_and_resumed_the_run_ends_in_the_same_bits(home):
    at = f'{AT} --batch_size 4 --image_size 64 --epochs 3 --epoch_step [2]'
    assert command(home, at, '--save logs/whole').returncode == 0
    options = f'{at} --save logs/killed {OFTEN} --resume'
    rng, steps = random.Random(0), []
    for _ in range(2):
        process = started(home, options)
        path = home / 'logs/killed/checkpoint.pt'
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        steps.append(runs.load_checkpoint(path)['step'])
    done = command(home, options)
    assert done.returncode == 0, done.stderr
    assert any(steps), steps
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/killed', drop) == log_of(home / 'logs/whole', drop)
    assert same_weights(home / 'logs/killed', home / 'logs/whole')


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_continue(home, signum, status):
    folder = home / f'logs/signal{status}'
    process = started(home, AT, '--epochs 1000 --save', folder)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    process.send_signal(signum)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status
    (line,) = warnings_of(Namespace(stderr=error))
    assert '--resume continues after' in line
    assert runs.load_checkpoint(folder)['epoch'] >= 1


def test_a_stop_while_a_checkpoint_is_written_does_not_promise_it(run, monkeypatch, capsys):
    def stopped(folder, checkpoint):
        raise program.Stopped(signal.SIGTERM)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(runs, 'save_checkpoint', stopped)
    assert run(AT, OFTEN, '--save logs/promised') == 143
    assert 'continues after epoch 0 of 3' in capsys.readouterr().err
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_parameters_that_are_not_finite_are_not_written(home, run, monkeypatch, capsys):
    make_checkpoint, calls = runs.Run.make_checkpoint, []

    def poisoned(self, *arguments, **more):
        checkpoint = make_checkpoint(self, *arguments, **more)
        calls.append(1)
        if len(calls) == 2:
            checkpoint['params']['fc.bias'] = torch.tensor([0.0, torch.inf, 0.0])
        return checkpoint

    monkeypatch.setattr(runs.Run, 'make_checkpoint', poisoned)
    assert run(AT, OFTEN, '--save logs/infinite') == 1
    error = capsys.readouterr().err
    assert 'after step 2 the parameters are not finite; what logs/infinite holds is kept' in error
    assert runs.load_checkpoint(home / 'logs/infinite')['step'] == 1


def test_sigusr1_writes_a_checkpoint_and_continues(home):
    folder = home / 'logs/usr1'
    process = started(home, AT, '--epochs 1000 --save', folder)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    steps = set()
    for _ in range(20):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
        steps.add(runs.load_checkpoint(folder)['step'])
    assert process.poll() is None and len(steps) > 1
    process.kill()
    process.communicate()


def test_momentum_continues_inside_the_epoch_of_a_drop(home, run, monkeypatch):
    """Stopped after step 2 of epoch 2, whose start restarted the momentum."""
    options = f'{AT} --epochs 3 --epoch_step [2] --lr_decay_ratio 1'
    assert run(options, '--save logs/drop') == 0
    save_checkpoint = runs.save_checkpoint

    def stopping(folder, checkpoint):
        save_checkpoint(folder, checkpoint)
        if (checkpoint['epoch'], checkpoint['step']) == (1, 2):
            raise program.Stopped(signal.SIGTERM)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with monkeypatch.context() as patch:
        patch.setattr(runs, 'save_checkpoint', stopping)
        assert run(options, OFTEN, '--save logs/drop2') == 143
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert run(options, '--save logs/drop2 --resume') == 0
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/drop2', drop) == log_of(home / 'logs/drop', drop)
    assert same_weights(home / 'logs/drop2', home / 'logs/drop')


def test_two_processes_are_one_with_the_same_batch(home):
    """With fixed batch norm the split does not change what is computed of an image. 42 images in
    batches of 12: the last batch has 6."""
    torch.save(names.to_torchvision(random_resnet(18, 0.5, 9)), home / 'start.pth')
    options = '--student_params start.pth --width 0.5 --finetune --epochs 2 --epoch_step [2] '
    options += '--lr 0.01 --teacher_params teacher.hkl --beta 100'
    assert command(home, options, '--save logs/one').returncode == 0
    done = command(home, options, '--save logs/two', processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (weights_of(home / f'logs/{n}') for n in ('one', 'two'))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)
    a, b = (logs.read_log(home / f'logs/{n}/log.txt') for n in ('one', 'two'))
    for x, y in zip(a, b):
        for key in 'train_loss', 'test_loss', 'test_acc', 'train_acc', 'at_losses':
            assert x[key] == pytest.approx(y[key], rel=1e-4), key
    assert b[-1]['processes'] == 2


def test_two_processes_stopped_inside_an_epoch_continue_to_the_same_bits(home):
    options = f'{AT} --batch_size 8 --epochs 2 --epoch_step [2] --image_size 64'
    done = command(home, options, '--save logs/pair', processes=2)
    assert done.returncode == 0, done.stderr
    stopped = f'{options} --save logs/pair2 {OFTEN} --resume'
    process = started(home, stopped, processes=2)
    path = home / 'logs/pair2/checkpoint.pt'
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    ranks = ranks_in(home)
    assert ranks.keys() == {0, 1}
    for pid in process.pid, *ranks.values():
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    checkpoint = runs.load_checkpoint(path)
    assert checkpoint['step'] > 0 and len(checkpoint['sums']) == 2
    time.sleep(1)
    done = command(home, stopped, processes=2)
    assert done.returncode == 0, done.stderr
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/pair2', drop) == log_of(home / 'logs/pair', drop)
    assert same_weights(home / 'logs/pair2', home / 'logs/pair')


def test_a_signal_at_one_rank_stops_both_after_a_checkpoint(home):
    folder = home / 'logs/signal_of_one'
    process = started(home, AT, '--epochs 1000 --save', folder, processes=2)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    os.kill(ranks_in(home)[1], signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and error.count('stopped by SIGTERM') == 1, error
    # The first rank, which got no signal.
    assert 'imagenet.py, rank 0: stopped by SIGTERM' in error
    assert 'the same command with --resume continues after step' in error
    assert runs.load_checkpoint(folder)['step'] > 0


def test_a_mistake_is_reported_by_one_process(home):
    """Every rank finds a wrong file or option, but only one of them finds a broken image."""
    weights.save_params(home / 'small.hkl', resnet.wrn(10, 1, 4)[1])
    shutil.copytree(home / 'set', home / 'cut')
    file = min((home / 'cut/train').rglob('*.jpg'))
    file.write_bytes(file.read_bytes()[:200])
    for options, named in (
        ('--teacher_params small.hkl --beta 1', 'three groups: use it with cifar.py'),
        ('--bogus', '--bogus'),
        ('--device mps', '--device mps'),
        ('--imagenetpath cut --check_images', '1 images are broken'),
    ):
        done = command(home, options, '--save logs/mistaken', processes=2)
        printed = [line for line in done.stderr.splitlines() if ': error: ' in line]
        assert done.returncode != 0 and len(printed) == 1, done.stderr
        assert printed[0].startswith('imagenet.py, rank 0: error: ') and named in printed[0]
        # torchrun ends in a traceback of its own.
        assert 'imagenet.py", line' not in done.stderr and not (home / 'logs/mistaken').exists()


# ------------------------ mistakes


@pytest.mark.parametrize(
    'options, named',
    [
        (['--imagenetpath', 'nowhere'], 'nowhere'),
        (['--imagenetpath', 'set/train'], 'train'),
        (['--image_size', '32'], '--image_size'),
        (['--depth', '20'], 'depth 20'),
        (['--at_groups', '4'], '--at_groups'),
        (['--at_groups', '1,1'], '--at_groups'),
        (['--at_start', '0'], '--at_start'),
        (['--at_start', '5'], '--at_start'),
        (['--at_groups', '2,3'], '--at_groups'),
        (['--beta', '1e3'], '--teacher_params'),
        (['--finetune'], '--student_params'),
        (['--teacher_params', 'nobody.hkl'], 'nobody.hkl'),
        (['--teacher_params', 'cifar.hkl'], 'three groups'),
        (['--teacher_params', 'nine_classes.hkl', '--alpha', '0.5'], '--alpha'),
        (['--student_params', 'teacher.hkl', '--depth', '34', '--width', '0.5'], 'not 34 and 0.5'),
        (['--resume', 'logs/nowhere'], 'logs/nowhere'),
        (['--evaluate', 'cifar.hkl'], 'cifar.py'),
        (['--evaluate', 'nine_classes.hkl'], 'classes'),
    ],
)
def test_a_mistake_is_one_line_that_names_it(home, run, options, named, capsys):
    if not (home / 'cifar.hkl').exists():
        weights.save_params(home / 'cifar.hkl', resnet.wrn(10, 1, 4)[1])
        weights.save_params(home / 'nine_classes.hkl', fold(random_resnet(18, 0.5, 9)))
    before = sorted(str(p) for p in home.rglob('*'))
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith('imagenet.py: error: ') and named in error
    assert sorted(str(p) for p in home.rglob('*')) == before


@pytest.mark.parametrize('parser', [cifar.parser, imagenet.parser], ids=['cifar.py', 'imagenet.py'])
def test_whatever_an_option_takes_a_checkpoint_may_hold(parser):
    samples = ['3', '64', '0.25', '[2,5]', '1,3', '0,2', 'bfloat16', 'shapes', 'plain', 'cpu']
    samples += ['a/b.hkl', 'nin', 'factt', 'max', 'linear']
    for action in parser._actions:
        if action.dest in ('help', 'resume', 'evaluate'):
            continue
        name, tried = action.option_strings[0], 0
        for sample in [None] if action.nargs == 0 else samples:
            try:
                opt, _ = parser.parse([name] if sample is None else [name, sample])
            except UserError:
                continue
            value = json.loads(json.dumps(getattr(opt, action.dest)))
            assert parser.takes(action.dest, value), (name, value)
            tried += 1
        assert tried, name
        assert not parser.takes(action.dest, {'a': 1}) and not parser.takes(action.dest, [None])


def test_the_tests_are_in_val_whatever_else_there_is(home, run, tmp_path):
    shutil.copytree(home / 'set', tmp_path / 'set')
    (tmp_path / 'set/test').mkdir()
    cv2.imwrite(str(tmp_path / 'set/test/ILSVRC2012_test_1.jpg'), np.zeros((9, 9, 3), np.uint8))
    assert run('--epochs 0 --save run', cwd=tmp_path) == 0
    assert run('--evaluate run', cwd=tmp_path) == 0


def test_a_run_is_evaluated_at_its_own_size(home, run, capsys):
    assert run('--image_size 64 --epochs 1 --save logs/sized') == 0
    capsys.readouterr()
    assert run('--evaluate logs/sized', small='--nthread 1') == 0
    stats = evaluated(capsys.readouterr().out)
    logged = records_of(home / 'logs/sized')[-1]
    assert (stats['test_loss'], stats['test_acc']) == (logged['test_loss'], logged['test_acc'])


def test_resumed_with_groups_and_a_fraction_of_width(home, run, capsys):
    options = '--teacher_params teacher.hkl --at_groups 2,3 --width 0.3 --epoch_step [9] --resume'
    for epochs in 1, 2:
        status = run(options, f'--save logs/groups --epochs {epochs}')
        assert status == 0, capsys.readouterr().err
    for more in (
        '--student_params logs/groups --save logs/groups2',
        '--save logs/same0',
        '--teacher_params logs/same0 --save logs/same1',
    ):
        assert run('--width 0.3 --epochs 0', more) == 0
    a, b = (weights_of(home / f'logs/same{i}') for i in (0, 1))
    assert not torch.equal(a['conv0'], b['conv0'])


def test_from_inside_an_epoch_a_run_continues_in_another_folder(home, run, monkeypatch, capsys):
    save, seen = runs.save_checkpoint, []

    def stop_at_the_third(folder, checkpoint):
        save(folder, checkpoint)
        seen.append(checkpoint['step'])
        if len(seen) == 3:
            raise program.Stopped(signal.SIGTERM)

    monkeypatch.setattr(runs, 'save_checkpoint', stop_at_the_third)
    assert run(AT, OFTEN, '--save logs/inside') == 143 and seen == [1, 2, 3]
    monkeypatch.setattr(runs, 'save_checkpoint', save)
    capsys.readouterr()
    assert run(AT, '--save logs/straight') == 0
    status = run('--resume logs/inside --save logs/elsewhere')
    assert status == 0, capsys.readouterr().err
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/elsewhere', drop) == log_of(home / 'logs/straight', drop)
    assert runs.load_checkpoint(home / 'logs/inside')['step'] == 3
    shutil.copy(home / 'logs/inside/checkpoint.pt', home / 'other.pt')
    assert run('--resume other.pt') == 2
    assert '--save' in capsys.readouterr().err


def test_a_world_larger_than_the_batch_is_refused(home):
    done = command(home, '--batch_size 1', processes=2)
    assert done.returncode != 0 and '--batch_size 1: must be at least 2' in done.stderr


def test_a_broken_photograph_stops_the_run_by_name_or_is_counted(home, run, tmp_path, capsys):
    shutil.copytree(home / 'set', tmp_path / 'set')
    bad = tmp_path / 'set/train/city/3.jpg'
    bad.write_bytes(bad.read_bytes()[:-40])
    (tmp_path / 'set/val/wood/x.png').write_bytes(b'no image')
    assert run('--epochs 1 --save run', cwd=tmp_path) == 2
    assert '3.jpg' in capsys.readouterr().err
    assert run('--epochs 1 --check_images --save run2', cwd=tmp_path) == 2
    error = capsys.readouterr().err
    assert '3.jpg' in error and 'x.png' in error and '2 images are broken' in error
    assert not (tmp_path / 'run2').exists() and not (tmp_path / 'run/model.hkl').exists()
    # The run that the broken image stopped continues without it.
    status = run('--epochs 1 --save run --resume --skip_broken', cwd=tmp_path)
    assert status == 0, capsys.readouterr().err
    assert run('--epochs 1 --skip_broken --save run3', cwd=tmp_path) == 0
    assert records_of(tmp_path / 'run3')[0]['broken_images'] == 2


def test_the_count_of_broken_images_outlives_a_resumed_run(home, run, tmp_path):
    """The broken photograph is repaired before the run continues."""
    shutil.copytree(home / 'set', tmp_path / 'set')
    bad = tmp_path / 'set/train/city/3.jpg'
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-40])
    assert run('--epochs 1 --skip_broken --save run', cwd=tmp_path) == 0
    bad.write_bytes(whole)
    assert run('--epochs 2 --skip_broken --save run --resume', cwd=tmp_path) == 0
    assert [r['broken_images'] for r in records_of(tmp_path / 'run')] == [1, 1]


def test_the_published_command_parses():
    line = '--imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params '
    line += 'resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3 --save logs/at_18_34'
    opt = imagenet.complete(*imagenet.parser.parse(line.split()))
    assert (opt.epochs, opt.epoch_step) == (100, [30, 60, 90])
    assert (opt.batch_size, opt.weight_decay) == (256, 1e-4)
    assert opt.at_groups == [0, 1, 2, 3] and opt.at_start == 1 and opt.beta == 1000
    assert opt.train_crop == 'resized'


def test_two_processes_count_the_broken_images_of_both(home, tmp_path):
    shutil.copytree(home / 'set', tmp_path / 'broken')
    for files in sorted((tmp_path / 'broken/val').iterdir()):
        min(files.iterdir()).write_bytes(b'broken')  # images 0, n, 2 n of 3 n
    options = f'--imagenetpath {tmp_path}/broken --evaluate teacher.hkl --skip_broken'
    records = [evaluated(command(home, options, processes=n).stdout) for n in (1, 2)]
    assert [record['broken_images'] for record in records] == [3, 3]
    assert records[0]['test_acc'] == records[1]['test_acc']
