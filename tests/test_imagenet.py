"""imagenet.py as its users meet it, on a tiny tree of photographs: training, fine-tuning, kills
inside epochs, several processes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
from test_resnet import AffineNet, fold, torchvision_net

ROOT = Path(__file__).resolve().parent.parent
SMALL = ['--image_size', '40', '--width', '0.25', '--batch_size', '12', '--nthread', '1']


def make_photographs(root, classes=('beach', 'city', 'wood'), train=14, val=5):
    """JPEGs of many sizes, one of them grey, whose colour tells the class a little."""
    rng = np.random.default_rng(0)
    for split, n in ('train', train), ('val', val):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                size = rng.integers(40, 120, 2)
                image = cv2.resize(
                    rng.integers(0, 256, (7, 9, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC
                )
                image[..., c] = np.minimum(255, image[..., c] + 40.0)
                cv2.imwrite(str(root / split / name / f'{i}.jpg'), image if i else image[..., 0])
    return root


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """Photographs in set/, and as teacher.hkl a folded ResNet-18 with the 3 classes."""
    home = tmp_path_factory.mktemp('imagenet')
    make_photographs(home / 'set')
    torch.manual_seed(0)
    _, params = torchvision_net(18, num_classes=3)
    utils.save_params(home / 'teacher.hkl', fold(params))
    return home


def run(home, *options, monkeypatch=None, small=SMALL):
    """(exit status, what imagenet.main printed is left to capsys) of a run in this process."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, 'argv', ['imagenet.py'])
    return utils.call_main(imagenet.main, ['--imagenetpath', 'set', *small, *map(str, options)])


def words(*options, processes=1):
    launch = [sys.executable]
    if processes > 1:
        launch += [
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            str(processes),
        ]
    return [*launch, str(ROOT / 'imagenet.py'), '--imagenetpath', 'set', *SMALL, *map(str, options)]


def command(home, *options, processes=1, wait=True):
    keep = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    env = keep | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    pipes = {
        'stdout': subprocess.PIPE,
        'stderr': subprocess.PIPE,
        'text': True,
        'cwd': home,
        'env': env,
    }
    process = subprocess.Popen(words(*options, processes=processes), **pipes)
    if not wait:
        return process
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def log_of(folder, drop=('save',)):
    records = utils.read_log(folder / 'log.txt')
    return [{k: v for k, v in r.items() if 'time' not in k and k not in drop} for r in records]


# ------------------------ training


def test_a_student_learns_from_a_release_and_keeps_it_out_of_its_weights(home, monkeypatch, capsys):
    status = run(
        home,
        '--teacher_params',
        'teacher.hkl',
        '--epochs',
        2,
        '--save',
        'logs/at',
        '--epoch_step',
        '[2]',
        monkeypatch=monkeypatch,
    )
    out, err = capsys.readouterr()
    assert status == 0 and not err, err
    assert '--beta 1e+3' in out and 'teacher teacher.hkl: test accuracy' in out
    records = utils.read_log(home / 'logs/at/log.txt')
    assert [r['epoch'] for r in records] == [1, 2] and [r['lr'] for r in records] == pytest.approx(
        [0.1, 0.01]
    )
    last = records[-1]
    assert len(last['at_losses']) == 4 and len(last['test_acc']) == len(last['train_acc']) == 2
    assert {a.dest for a in imagenet.parser._actions} - {
        'help',
        'resume',
        'evaluate',
    } <= last.keys()
    assert last['classes'] == ['beach', 'city', 'wood'] and last['beta'] == 1000
    names = utils.load_params(home / 'logs/at/model.hkl').keys()
    assert names == resnet.resnet(18, 0.25, 3)[1].keys()


def test_the_loss_has_the_chosen_groups_and_starts_at_the_chosen_epoch(home):
    torch.manual_seed(1)
    f_s, params_s = resnet.resnet(18, 0.25, 3)
    f_t, params_t, _ = resnet.load_net(home / 'teacher.hkl')
    words = '--beta 100 --alpha 0.5 --temperature 3 --at_groups 1,3'
    opt = imagenet.parser.parse_args(words.split())
    params = {f'student.{k}': v for k, v in params_s.items()} | {
        f'teacher.{k}': v for k, v in params_t.items()
    }
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
    loss_of = imagenet.make_loss(f_s, f_t, opt, ['cpu'])
    for use_at, expected in (True, task + 100 * sum(ats)), (False, task):
        loss, terms = loss_of(
            images, targets, {k: v.detach().clone() for k, v in params.items()}, use_at
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert terms[2:4].tolist() == pytest.approx([a.item() for a in ats], rel=1e-3)
    assert terms[-2].item() == pytest.approx(100 * (y.argmax(1) == targets).float().mean().item())
    assert terms[-1].item() == 100, 'three classes are within the first five'


def test_at_start_is_the_first_epoch_with_maps(home, monkeypatch):
    options = [
        '--teacher_params',
        'teacher.hkl',
        '--beta',
        '1e4',
        '--epochs',
        2,
        '--epoch_step',
        '[9]',
        '--seed',
        2,
    ]
    for start in 1, 2, 3:
        assert (
            run(
                home,
                *options,
                '--at_start',
                start,
                '--save',
                f'logs/start{start}',
                monkeypatch=monkeypatch,
            )
            == 0
        )
    losses = [[r['train_loss'] for r in log_of(home / f'logs/start{s}')] for s in (1, 2, 3)]
    assert losses[1][0] == losses[2][0] != losses[0][0] and losses[1][1] > losses[2][1]
    betas = [[r['epoch_beta'] for r in log_of(home / f'logs/start{s}')] for s in (1, 2, 3)]
    assert betas == [[1e4, 1e4], [0, 1e4], [0, 0]]


def test_fine_tuning_has_a_new_head_and_leaves_batch_norm_and_the_first_group_alone(
    home, monkeypatch
):
    _, source = torchvision_net(18, num_classes=9)
    torch.save(utils.to_torchvision(source), home / 'source.pth')
    options = [
        '--student_params',
        'source.pth',
        '--width',
        1,
        '--finetune',
        '--epochs',
        1,
        '--epoch_step',
        '[9]',
        '--lr',
        0.01,
    ]
    options += ['--teacher_params', 'teacher.hkl', '--at_groups', '2,3', '--save', 'logs/tuned']
    assert run(home, *options, monkeypatch=monkeypatch) == 0
    tuned = utils.load_params(home / 'logs/tuned/model.hkl')
    assert tuned['fc.weight'].shape == (3, 512)
    for name, value in source.items():
        fixed = 'bn' in name or name == 'conv0' or name.startswith('group0')
        if not name.startswith('fc'):
            assert torch.equal(tuned[name], value) == fixed, name
    n = sum(
        v.numel()
        for k, v in tuned.items()
        if not ('bn' in k or k == 'conv0' or k.startswith('group0'))
    )
    assert utils.read_log(home / 'logs/tuned/log.txt')[0]['n_parameters'] == n


def test_fine_tuning_takes_plain_crops_and_older_runs_go_on_as_they_began(
    home, monkeypatch, capsys
):
    utils.save_params(home / 'small.hkl', resnet.resnet(18, 0.25, 3)[1])
    tune = ['--student_params', 'small.hkl', '--finetune', '--epoch_step', '[9]', '--lr', '1e-3']

    def tuned(name, *options):
        assert run(home, *tune, '--save', f'logs/{name}', *options, monkeypatch=monkeypatch) == 0
        return log_of(home / f'logs/{name}', ('save', 'epochs'))

    plain, same = (
        tuned('plain', '--epochs', 1),
        tuned('same', '--epochs', 1, '--train_crop', 'plain'),
    )
    resized = tuned('resized', '--epochs', 2, '--train_crop', 'resized')
    assert plain == same and plain[0]['train_crop'] == 'plain'
    assert plain[0]['train_loss'] != resized[0]['train_loss']
    assert run(home, '--epochs', 0, '--save', 'logs/new', monkeypatch=monkeypatch) == 0
    assert log_of(home / 'logs/new')[0]['train_crop'] == 'resized'

    tuned('older', '--epochs', 1, '--train_crop', 'resized')
    checkpoint = utils.load_checkpoint(home / 'logs/older')
    del checkpoint['options']['train_crop']
    utils.save_checkpoint(home / 'logs/older', checkpoint)
    more = ['--epochs', 2, '--resume']
    other = [*tune, '--save', 'logs/older', *more, '--train_crop', 'plain']
    assert run(home, *other, monkeypatch=monkeypatch) == 2
    assert '--train_crop plain differs' in capsys.readouterr().err
    assert tuned('older', *more) == resized


def test_a_student_may_start_from_weights(home, monkeypatch, capsys):
    _, source = torchvision_net(18, num_classes=3)
    utils.save_params(home / 'three.hkl', source)
    options = ['--student_params', 'three.hkl', '--width', 1, '--epochs', 0]
    assert run(home, *options, '--save', 'logs/started', monkeypatch=monkeypatch) == 0
    model = utils.load_params(home / 'logs/started/model.hkl')
    assert all(torch.equal(model[k], v) for k, v in source.items())
    torch.save(torchvision_net(18, num_classes=9)[1], home / 'nine.pth')
    assert run(home, '--student_params', 'nine.pth', '--width', 1, monkeypatch=monkeypatch) == 2
    assert '--finetune' in capsys.readouterr().err


# ------------------------ evaluation


def reference_accuracy(net, home):
    """[top-1, top-5] of a module on set/val by torchvision's own pipeline, and the mean loss."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(46),  # 40 * 256 / 224
            transforms.CenterCrop(40),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    found = torchvision.datasets.ImageFolder(home / 'set/val', pipeline)
    x, y = (torch.stack([found[i][0] for i in range(len(found))]), torch.tensor(found.targets))
    with torch.no_grad():
        logits = net.eval()(x)
    return 100 * (logits.argmax(1) == y).double().mean().item(), torch.nn.functional.cross_entropy(
        logits, y
    ).item()


def test_a_folder_test_does_for_val(home, monkeypatch, capsys):
    (home / 'tested').mkdir()
    for split, name in ('train', 'train'), ('test', 'val'):
        (home / 'tested' / split).symlink_to(home / 'set' / name)
    found = []
    for root in 'set', 'tested':
        options = ['--imagenetpath', root, '--evaluate', 'teacher.hkl']
        assert run(home, *options, monkeypatch=monkeypatch) == 0
        stats = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix('json_stats: '))
        found.append((stats['test_loss'], stats['test_acc']))
    assert found[0] == found[1]


def test_the_weights_of_a_run_are_tested_as_the_run_is(home, monkeypatch, capsys):
    options = ['--epochs', 1, '--save', 'logs/small', '--image_size', 48]
    assert run(home, *options, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    monkeypatch.chdir(home)
    found = []
    for source in 'logs/small', 'logs/small/model.hkl':
        assert utils.call_main(imagenet.main, ['--evaluate', source]) == 0
        stats = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix('json_stats: '))
        found.append({k: v for k, v in stats.items() if 'time' not in k and k != 'evaluate'})
        found[-1].pop('images_per_second')
    assert found[0] == found[1] and found[0]['image_size'] == 48
    last = utils.read_log(home / 'logs/small/log.txt')[-1]
    assert found[0]['test_loss'] == pytest.approx(last['test_loss'])


def test_evaluate_recognises_every_layout(home, monkeypatch, capsys):
    net, params = torchvision_net(18, num_classes=3)
    torch.save(net.state_dict(), home / 'tv.pth')
    safetensors.torch.save_file(net.state_dict(), home / 'tv.safetensors')
    utils.save_params(home / 'ours.hkl', params)
    utils.save_params(home / 'folded.hkl', fold(params))
    acc, loss = reference_accuracy(net, home)
    for name, layout in (
        ('tv.pth', 'resnet'),
        ('tv.safetensors', 'resnet'),
        ('ours.hkl', 'resnet'),
        ('folded.hkl', 'folded'),
    ):
        assert run(home, '--evaluate', name, monkeypatch=monkeypatch) == 0
        stats = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix('json_stats: '))
        assert stats['layout'] == layout and stats['test_acc'][1] == 100
        assert stats['test_loss'] == pytest.approx(loss, rel=0.02) and stats['test_acc'][
            0
        ] == pytest.approx(acc, abs=7)
        assert stats['images_per_second'] > 0
    assert stats['n_parameters'] == sum(v.numel() for k, v in fold(params).items())
    utils.save_params(home / 'affine.hkl', AffineNet(num_classes=3).p)
    assert run(home, '--evaluate', 'affine.hkl', monkeypatch=monkeypatch) == 0
    assert '"layout": "affine"' in capsys.readouterr().out


def test_a_teacher_far_from_what_is_known_of_it_is_noticed(home, monkeypatch, capsys):
    monkeypatch.setattr(imagenet, 'test', lambda *_: (1.0, [30.0, 50.0]))
    val = type('Val', (), {'labels': torch.zeros(5000), 'classes': [str(i) for i in range(1000)]})
    opt = imagenet.parser.parse_args(['--teacher_params', 'resnet-34-export.hkl'])
    with torch.device('meta'):
        _, params = resnet.resnet(34, 1, 1000)
    assert imagenet.test_teacher(None, params, [], val, opt, 'cpu') == 30.0
    out, err = capsys.readouterr()
    assert '2000 validation images' in out and '73.31' in err and 'warning' in err
    monkeypatch.setattr(imagenet, 'test', lambda *_: (1.0, [72.0, 90.0]))
    imagenet.test_teacher(None, params, [], val, opt, 'cpu')
    assert not capsys.readouterr().err


# ------------------------ kills, several processes


AT = [
    '--teacher_params',
    'teacher.hkl',
    '--beta',
    '100',
    '--epochs',
    3,
    '--epoch_step',
    '[3]',
    '--seed',
    7,
]


def test_killed_inside_epochs_and_resumed_the_run_ends_in_the_same_bits(home):
    at = [*AT, '--batch_size', 4, '--image_size', 64, '--epochs', 8, '--epoch_step', '[3,6]']
    assert command(home, *at, '--save', 'logs/whole').returncode == 0
    options = [*at, '--save', 'logs/killed', '--checkpoint_minutes', '1e-6', '--resume']
    rng, steps = random.Random(0), []
    for _ in range(3):
        process = command(home, *options, wait=False)
        path = home / 'logs/killed/checkpoint.pt'
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        steps.append((utils.load_checkpoint(path)['epoch'], utils.load_checkpoint(path)['step']))
    done = command(home, *options)
    assert done.returncode == 0, done.stderr
    assert any(step for _, step in steps), steps
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/killed', drop) == log_of(home / 'logs/whole', drop)
    assert (home / 'logs/killed/model.hkl').read_bytes() == (
        home / 'logs/whole/model.hkl'
    ).read_bytes()


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(home, signum, status):
    folder = home / f'logs/signal{status}'
    process = command(home, *AT, '--save', folder, '--epochs', 1000, wait=False)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    process.send_signal(signum)
    _, error = process.communicate(timeout=300)
    assert (
        process.returncode == status
        and error.count('\n') == 1
        and '--resume goes on after' in error
    )
    assert utils.load_checkpoint(folder)['epoch'] >= 1


def test_a_stop_while_a_checkpoint_is_written_does_not_promise_it(home, monkeypatch, capsys):
    def stopped(folder, checkpoint):
        raise utils.Stopped(signal.SIGTERM)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(utils, 'save_checkpoint', stopped)
    options = [*AT, '--save', home / 'logs/promised', '--checkpoint_minutes', '1e-6']
    assert run(home, *options, monkeypatch=monkeypatch) == 143
    assert 'goes on after epoch 0 of 3' in capsys.readouterr().err
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_sigusr1_writes_a_checkpoint_and_goes_on(home):
    folder = home / 'logs/usr1'
    process = command(home, *AT, '--save', folder, '--epochs', 1000, wait=False)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    steps = set()
    for _ in range(40):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
        steps.add(utils.load_checkpoint(folder)['step'])
    assert process.poll() is None and len(steps) > 1
    process.kill()
    process.communicate()


def test_two_processes_are_one_with_the_same_batch(home):
    """Fixed batch norm: every image is computed alike, however they are split. 42 images in batches
    of 12: the last has 6."""
    _, source = torchvision_net(18, num_classes=9)
    torch.save(utils.to_torchvision(source), home / 'start.pth')
    options = [
        '--student_params',
        'start.pth',
        '--width',
        1,
        '--finetune',
        '--epochs',
        2,
        '--epoch_step',
        '[2]',
        '--lr',
        0.01,
    ]
    options += ['--teacher_params', 'teacher.hkl', '--beta', 100]
    assert command(home, *options, '--save', 'logs/one').returncode == 0
    done = command(home, *options, '--save', 'logs/two', processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (utils.load_params(home / f'logs/{n}/model.hkl') for n in ('one', 'two'))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)
    a, b = (utils.read_log(home / f'logs/{n}/log.txt') for n in ('one', 'two'))
    for x, y in zip(a, b):
        for key in 'train_loss', 'test_loss', 'test_acc', 'train_acc', 'at_losses':
            assert x[key] == pytest.approx(y[key], rel=1e-4), key
    assert b[-1]['processes'] == 2


def test_two_processes_stopped_inside_an_epoch_go_on_to_the_same_bits(home):
    options = [*AT, '--batch_size', 4, '--epochs', 2, '--epoch_step', '[2]', '--image_size', 64]
    done = command(home, *options, '--save', 'logs/pair', processes=2)
    assert done.returncode == 0, done.stderr
    stopped = [*options, '--save', 'logs/pair2', '--checkpoint_minutes', '1e-6', '--resume']
    process = command(home, *stopped, processes=2, wait=False)
    path = home / 'logs/pair2/checkpoint.pt'
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    for other in Path('/proc').glob('[0-9]*/cmdline'):  # torchrun and its ranks
        with contextlib.suppress(OSError):
            ours = os.readlink(other.parent / 'cwd') == str(home)
            if ours and b'logs/pair2' in other.read_bytes():
                os.kill(int(other.parent.name), signal.SIGKILL)
    process.communicate()
    checkpoint = utils.load_checkpoint(path)
    assert checkpoint['step'] > 0 and len(checkpoint['sums']) == 2
    time.sleep(1)
    done = command(home, *stopped, processes=2)
    assert done.returncode == 0, done.stderr
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/pair2', drop) == log_of(home / 'logs/pair', drop)
    assert (home / 'logs/pair2/model.hkl').read_bytes() == (
        home / 'logs/pair/model.hkl'
    ).read_bytes()


def test_a_mistake_is_told_by_one_process(home):
    """What is found only in loading, by every rank, and a broken image, which one of them finds."""
    utils.save_params(home / 'small.hkl', resnet.wrn(10, 1, 4)[1])
    shutil.copytree(home / 'set', home / 'cut')
    file = min((home / 'cut/train').rglob('*.jpg'))
    file.write_bytes(file.read_bytes()[:200])
    for options, named in (
        (['--teacher_params', 'small.hkl', '--beta', 1], 'has no four groups'),
        (['--bogus'], '--bogus'),
        (['--device', 'mps'], '--device mps'),
        (['--imagenetpath', 'cut', '--check_images'], '1 images are broken'),
    ):
        done = command(home, *options, '--save', 'logs/mistaken', processes=2)
        told = [line for line in done.stderr.splitlines() if ': error: ' in line]
        assert done.returncode != 0 and len(told) == 1, done.stderr
        assert told[0].startswith('imagenet.py, rank 0: error: ') and named in told[0]
        # torchrun itself ends in a traceback of its own.
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
        (['--teacher_params', 'cifar.hkl'], 'four groups'),
        (['--teacher_params', 'nine_classes.hkl', '--alpha', '0.5'], '--alpha'),
        (['--student_params', 'teacher.hkl', '--depth', '34', '--width', '1'], 'not 34 and 1'),
        (['--resume', 'logs/nowhere'], 'logs/nowhere'),
        (['--evaluate', 'cifar.hkl'], 'cifar.py'),
        (['--evaluate', 'nine_classes.hkl'], 'classes'),
    ],
)
def test_a_mistake_is_one_line_that_names_it(home, options, named, monkeypatch, capsys):
    if not (home / 'cifar.hkl').exists():
        utils.save_params(home / 'cifar.hkl', resnet.wrn(10, 1, 4)[1])
        utils.save_params(home / 'nine_classes.hkl', fold(torchvision_net(18, num_classes=9)[1]))
    before = sorted(str(p) for p in home.rglob('*'))
    assert run(home, *options, monkeypatch=monkeypatch) == 2
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
            except utils.UserError:
                continue
            value = json.loads(json.dumps(getattr(opt, action.dest)))
            assert parser.takes(action.dest, value), (name, value)
            tried += 1
        assert tried, name
        assert not parser.takes(action.dest, {'a': 1}) and not parser.takes(action.dest, [None])


def test_the_tests_are_in_val_whatever_else_there_is(home, tmp_path, monkeypatch):
    shutil.copytree(home / 'set', tmp_path / 'set')
    (tmp_path / 'set/test').mkdir()
    cv2.imwrite(str(tmp_path / 'set/test/ILSVRC2012_test_1.jpg'), np.zeros((9, 9, 3), np.uint8))
    assert run(tmp_path, '--epochs', 0, '--save', 'run', monkeypatch=monkeypatch) == 0
    assert run(tmp_path, '--evaluate', 'run', monkeypatch=monkeypatch) == 0


def test_a_run_is_evaluated_at_its_own_size(home, monkeypatch, capsys):
    size = ['--image_size', 64, '--epochs', 1, '--save', 'logs/sized']
    assert run(home, *size, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    small = ['--nthread', '1']
    assert run(home, '--evaluate', 'logs/sized', monkeypatch=monkeypatch, small=small) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix('json_stats: '))
    logged = utils.read_log(home / 'logs/sized/log.txt')[-1]
    assert (stats['test_loss'], stats['test_acc']) == (logged['test_loss'], logged['test_acc'])


def test_resumed_with_groups_and_a_fraction_of_width(home, monkeypatch, capsys):
    options = [
        '--teacher_params',
        'teacher.hkl',
        '--at_groups',
        '2,3',
        '--width',
        '0.3',
        '--epoch_step',
        '[9]',
    ]
    for epochs in 1, 2:
        save = ['--save', 'logs/groups', '--epochs', epochs, '--resume']
        assert run(home, *options, *save, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    more = [
        '--student_params',
        'logs/groups',
        '--width',
        '0.3',
        '--epochs',
        0,
        '--save',
        'logs/groups2',
    ]
    assert run(home, *more, monkeypatch=monkeypatch) == 0
    twin = [
        '--teacher_params',
        'logs/twin0',
        '--width',
        '0.3',
        '--epochs',
        0,
        '--save',
        'logs/twin1',
    ]
    assert (
        run(home, '--width', '0.3', '--epochs', 0, '--save', 'logs/twin0', monkeypatch=monkeypatch)
        == 0
    )
    assert run(home, *twin, monkeypatch=monkeypatch) == 0
    a, b = (utils.load_params(home / f'logs/twin{i}/model.hkl') for i in (0, 1))
    assert not torch.equal(a['conv0'], b['conv0'])


def test_from_inside_an_epoch_a_run_goes_on_in_another_folder(home, tmp_path, monkeypatch, capsys):
    options = [*AT, '--save', 'logs/inside', '--checkpoint_minutes', '1e-6']
    save, seen = utils.save_checkpoint, []

    def stop_at_the_third(folder, checkpoint):
        save(folder, checkpoint)
        seen.append(checkpoint['step'])
        if len(seen) == 3:
            raise utils.Stopped(signal.SIGTERM)

    monkeypatch.setattr(utils, 'save_checkpoint', stop_at_the_third)
    assert run(home, *options, monkeypatch=monkeypatch) == 143 and seen == [1, 2, 3]
    monkeypatch.setattr(utils, 'save_checkpoint', save)
    capsys.readouterr()
    assert run(home, *AT, '--save', 'logs/straight', monkeypatch=monkeypatch) == 0
    elsewhere = ['--resume', 'logs/inside', '--save', 'logs/elsewhere']
    assert run(home, *elsewhere, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    drop = ('save', 'checkpoint_minutes')
    assert log_of(home / 'logs/elsewhere', drop) == log_of(home / 'logs/straight', drop)
    assert utils.load_checkpoint(home / 'logs/inside')['step'] == 3
    shutil.copy(home / 'logs/inside/checkpoint.pt', home / 'other.pt')
    assert run(home, '--resume', 'other.pt', monkeypatch=monkeypatch) == 2
    assert '--save' in capsys.readouterr().err


def test_a_world_larger_than_the_batch_is_refused(home):
    done = command(home, '--batch_size', 1, processes=2)
    assert done.returncode != 0 and '--batch_size 1: must be at least 2' in done.stderr


def test_a_broken_photograph_stops_the_run_by_name_or_is_counted(
    home, tmp_path, monkeypatch, capsys
):
    shutil.copytree(home / 'set', tmp_path / 'set')
    bad = tmp_path / 'set/train/city/3.jpg'
    bad.write_bytes(bad.read_bytes()[:-40])
    (tmp_path / 'set/val/wood/x.png').write_bytes(b'no image')
    options = ['--epochs', 1, '--save', 'run']
    assert run(tmp_path, *options, monkeypatch=monkeypatch) == 2
    assert '3.jpg' in capsys.readouterr().err
    assert run(tmp_path, *options, '--check_images', '--save', 'run2', monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert '3.jpg' in error and 'x.png' in error and '2 images are broken' in error
    assert not (tmp_path / 'run2').exists() and not (tmp_path / 'run/model.hkl').exists()
    # The run that the broken image stopped goes on without it.
    skip = [*options, '--resume', '--skip_broken']
    assert run(tmp_path, *skip, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    assert run(tmp_path, *options, '--skip_broken', '--save', 'run3', monkeypatch=monkeypatch) == 0
    assert utils.read_log(tmp_path / 'run3/log.txt')[0]['broken_images'] == 2


def test_the_published_command_parses():
    line = '--imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3 --save logs/at_18_34'
    opt = imagenet.complete(imagenet.parser.parse(line.split())[0])
    assert (opt.epochs, opt.epoch_step, opt.batch_size, opt.weight_decay) == (
        100,
        [30, 60, 90],
        256,
        1e-4,
    )
    assert opt.at_groups == [0, 1, 2, 3] and opt.at_start == 1 and opt.beta == 1000
    assert opt.train_crop == 'resized'
