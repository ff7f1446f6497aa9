"""cifar.py as its users meet it: commands, run folders, kills, mistakes. Every run is real, and
tiny."""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as TF

import cifar
import data
import nin
import resnet
import utils
from programs import run_script
from samples import (
    evaluated,
    log_of,
    records_of,
    same_weights,
    warnings_of,
    weights_of,
    words,
)
from support import logs, program, runs, weights
from support.program import UserError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ['--dataset', 'folder', '--dataroot', 'set']
NET = ['--depth', '10', '--width', '0.5', '--batch_size', '64', '--nthread', '1']


def make_images(root, per_class=40, size=12, classes=('cat', 'dog', 'fox')):
    """A folder set of noise, whose brightness depends a little on the class."""
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                image = rng.integers(0, 160 + 40 * c, (size, size, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i:03}.png'), image)
    return root


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A working directory with a folder set and a teacher in logs/teacher."""
    home = tmp_path_factory.mktemp('home')
    make_images(home / 'set')
    trained(home, '--save logs/teacher --width 1 --epochs 2')
    return home


def arguments(*options, dataset=FOLDER):
    return [sys.executable, str(ROOT / 'cifar.py'), *dataset, *NET, *words(*options)]


def command(cwd, *options):
    return run_script('cifar.py', *FOLDER, *NET, *words(*options), cwd=cwd)


def trained(cwd, *options):
    """The command, which must succeed."""
    done = command(cwd, *options)
    assert done.returncode == 0, done.stderr
    return done


def main(*options):
    """The exit status of the command in this process, which saves two seconds."""
    return program.call_main(cifar.main, [*FOLDER, *NET, *words(*options)])


def start(cwd, *options):
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    env = os.environ | {'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen(arguments(*options), cwd=cwd, env=env, **pipes)


def completed(*words):
    """The options of a command line, completed."""
    return cifar.complete(*cifar.parser.parse(list(words)))


def snapshot(folder):
    """{name: bytes} of the files in a run folder."""
    return {f.name: f.read_bytes() for f in folder.iterdir()}


# ------------------------ what a run writes


def test_a_teacher_writes_log_model_and_checkpoint(home):
    records = records_of(home / 'logs/teacher')
    assert [r['epoch'] for r in records] == [1, 2]
    last = records[-1]
    assert last['depth'] == 10 and last['width'] == 1
    assert last['classes'] == ['cat', 'dog', 'fox'] and last['num_classes'] == 3
    assert last['at_losses'] == [] and last['teacher_test_acc'] is None
    options = {a.dest for a in cifar.parser._actions} - {'help', 'resume', 'evaluate'}
    assert options <= last.keys()

    def no_json(constant):
        pytest.fail(f'{constant} is not strict JSON')

    for line in (home / 'logs/teacher/log.txt').read_text().splitlines():
        json.loads(line.removeprefix('json_stats: '), parse_constant=no_json)

    f, params = resnet.wrn(10, 1, 3)
    model = weights.check_params(weights_of(home / 'logs/teacher'), params)
    assert last['n_parameters'] == sum(v.numel() for v in params.values() if v.requires_grad)
    checkpoint = torch.load(home / 'logs/teacher/checkpoint.pt', weights_only=True)
    assert all(torch.equal(model[k], v) for k, v in checkpoint['params'].items())

    # The logged accuracy is that of these weights on these files, read in another way.
    right = 0
    for c, name in enumerate(last['classes']):
        for file in (home / 'set/test' / name).iterdir():
            image = torch.from_numpy(cv2.imread(str(file))[:, :, ::-1].copy()).float()
            x = (image - torch.tensor([125.3, 123.0, 113.9])) / torch.tensor([63.0, 62.1, 66.7])
            right += int(f(x.permute(2, 0, 1)[None], model, False)[0].argmax()) == c
    assert last['test_acc'] == pytest.approx(100 * right / 120)


def test_a_student_learns_from_its_teacher_and_keeps_it_out_of_its_weights(home):
    options = '--teacher_id teacher --alpha 0.9 --beta 1e+3 --epochs 2'
    done = trained(home, '--save logs/both', options)
    assert warnings_of(done) == []
    assert 'teacher teacher: test accuracy' in done.stdout
    last = records_of(home / 'logs/both')[-1]
    assert len(last['at_losses']) == 3 and all(v > 0 for v in last['at_losses'])
    assert last['teacher_test_acc'] == records_of(home / 'logs/teacher')[-1]['test_acc']
    names = weights_of(home / 'logs/both').keys()
    assert names == resnet.wrn(10, 0.5, 3)[1].keys()


def test_a_teacher_alone_means_attention_transfer(home):
    done = trained(home, '--save logs/plain --teacher_id teacher --epochs 1')
    assert 'using --beta 1000' in done.stdout
    assert records_of(home / 'logs/plain')[-1]['beta'] == 1000


def normalised(v):
    return v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True)


def test_the_loss_is_distillation_plus_beta_times_the_maps():
    """One call of make_loss's function, against the definition."""
    torch.manual_seed(0)
    f_s, params_s = resnet.wrn(10, 1, 10)
    f_t, params_t = resnet.wrn(16, 2, 10)
    params_t = {k: v.detach() for k, v in params_t.items()}
    nets = cifar.Nets(f_s, f_t, utils.flatten({'student': params_s, 'teacher': params_t}))
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    targets, index, draws = torch.arange(8), torch.arange(8), data.crop_and_flip(8, 0, 1, 4)
    opt = cifar.parser.parse_args(['--alpha', '0.9', '--beta', '100', '--temperature', '3'])
    x = data.normalize(data.augment(images, index, draws, 4))
    y_s, g_s = f_s(x, {k: v.detach().clone() for k, v in params_s.items()}, True)
    y_t, g_t = f_t(x, params_t, False)
    soft = torch.softmax(y_t / 3, 1)
    kl = (soft * (soft.log() - torch.log_softmax(y_s / 3, 1))).sum(1).mean()
    maps = [[normalised(g.pow(2).sum(1)) for g in groups] for groups in (g_s, g_t)]
    ats = [((a - b) ** 2).mean() for a, b in zip(*maps)]
    expected = 0.9 * 9 * kl + 0.1 * torch.nn.functional.cross_entropy(y_s, targets) + 100 * sum(ats)

    loss_of = cifar.make_loss(nets, opt, ['cpu'])
    loss, terms = loss_of(images, index, draws, targets, torch.tensor(100.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms[2:5].tolist() == pytest.approx([a.item() for a in ats], rel=1e-4)
    loss.backward()
    assert all(v.grad is not None for v in params_s.values() if v.requires_grad)
    assert all(v.grad is None for v in params_t.values())


def test_training_is_a_plain_loop_over_the_published_recipe(home, tmp_path, monkeypatch):
    """Three epochs of cifar.main against the same written out: torchvision's pad, crop and flip,
    the formulas of the losses, SGD with momentum and decay on every trained parameter, and a new
    optimizer at the drop."""
    monkeypatch.chdir(home)
    options = '--teacher_id teacher --alpha 0.5 --beta 100 --lr 0.05 --weight_decay 0.01 '
    options += '--lr_decay_ratio 0.5 --batch_size 50 --epoch_step [2] --seed 3'
    for name, epochs in ('start', 0), ('end', 3):
        assert main(options, '--save', tmp_path / name, '--epochs', epochs) == 0
    f, params = resnet.wrn(10, 0.5, 3)
    initial, end = weights_of(tmp_path / 'start'), weights_of(tmp_path / 'end')
    params = {k: initial[k].clone() for k in params}
    utils.set_requires_grad_except_bn_(params)
    trained_params = [v for v in params.values() if v.requires_grad]
    f_t, params_t, _ = weights.load_net('logs/teacher')
    train_set = data.open_sets('folder', 'set')[1]()[0]
    images = [image.permute(2, 0, 1) for image in train_set.images]
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    losses = []
    for epoch in 1, 2, 3:
        if epoch < 3:
            lr = 0.05 if epoch == 1 else 0.025
            optimizer = torch.optim.SGD(trained_params, lr, momentum=0.9, weight_decay=0.01)
        draws, seen = data.crop_and_flip(120, 3, epoch, 4).tolist(), 0.0
        for index in data.epoch_order(120, 3, epoch).split(50):
            batch = []
            for i in index:
                down, right, flip = draws[i]
                image = TF.crop(TF.pad(images[i], 4, padding_mode='reflect'), down, right, 12, 12)
                batch.append(TF.hflip(image) if flip else image)
            x = (torch.stack(batch).float() - mean[:, None, None]) / std[:, None, None]
            targets = train_set.labels[index]
            (y, groups), (y_t, groups_t) = f(x, params, True), f_t(x, params_t, False)
            soft = torch.softmax(y_t / 4, 1)
            kl = (soft * (soft.log() - torch.log_softmax(y / 4, 1))).sum(1).mean()
            loss = 0.5 * 16 * kl + 0.5 * torch.nn.functional.cross_entropy(y, targets)
            for a, b in zip(groups, groups_t):
                a, b = (normalised(g.pow(2).sum(1)) for g in (a, b))
                loss = loss + 100 * (a - b).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += float(loss.detach()) * len(index)
        losses.append(seen / 120)
    logged = [r['train_loss'] for r in records_of(tmp_path / 'end')]
    assert logged == pytest.approx(losses, rel=1e-4)
    for name, value in params.items():
        error, change = (end[name] - v for v in (value.detach(), initial[name]))
        torch.testing.assert_close(end[name], value.detach(), rtol=1e-3, atol=1e-4)
        assert change.abs().max() > 10 * error.abs().max()


@pytest.mark.parametrize('method', ['factt', 'grad', 'sym', 'minl2', 'max', 'some groups'])
def test_the_loss_of_each_method_is_its_definition(method):
    """One call of make_loss's function, and the derivatives by the student's weights, against the
    definition."""
    torch.manual_seed(0)
    f_s, params_s = nin.nin(6, 10, bn=False, pool_relu=False)
    f_t, params_t = resnet.wrn(10, 0.5, 10)
    params_t = {k: v.detach() for k, v in params_t.items()}
    options = {'max': '--at_map max --at_p 1', 'some groups': '--at_groups 2,0'}
    options = options.get(method, f'--method {method}')
    opt = cifar.parser.parse_args(words('--alpha 0.9 --beta 100', options))
    adapters = cifar.make_adapters(opt, f_s, params_s, weights.Net(f_t, params_t, []))
    params = {'student': params_s, 'teacher': params_t, 'adapter': adapters}
    nets = cifar.Nets(f_s, f_t, utils.flatten(params))
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    targets, index, draws = torch.arange(6), torch.arange(6), data.crop_and_flip(6, 0, 1, 4)
    x = data.normalize(data.augment(images, index, draws, 4))

    def J(f, params, x):
        """The gradient of each sample's own cross-entropy, one sample at a time."""
        rows = []
        for image, target in zip(x, targets):
            image = image[None].clone().requires_grad_()
            loss = -torch.log_softmax(f(image, params, False)[0], 1)[0, target]
            rows.append(torch.autograd.grad(loss, image, create_graph=True)[0])
        return torch.cat(rows)

    (y_s, g_s), (y_t, g_t) = f_s(x, params_s, False), f_t(x, params_t, False)
    if method == 'factt':
        shapes = {f'group{i}': (8 * 2**i, 6, 1, 1) for i in range(3)}
        assert {k: v.shape for k, v in adapters.items()} == shapes
        matrices = [adapters[name][:, :, 0, 0] for name in shapes]
        adapted = [torch.einsum('oi,bihw->bohw', w, g) for w, g in zip(matrices, g_s)]
        losses = [
            (normalised(a) - normalised(b)).square().sum(1).mean() / b[0, 0].numel()
            for a, b in zip(adapted, g_t)
        ]
    elif method in ('max', 'some groups'):

        def map_of(g):
            return g.abs().amax(1) if method == 'max' else g.square().sum(1)

        chosen = [0, 2] if method == 'some groups' else [0, 1, 2]
        maps = [(normalised(map_of(g_s[i])), normalised(map_of(g_t[i]))) for i in chosen]
        losses = [(a - b).square().mean() for a, b in maps]
    else:
        other = {
            'grad': lambda: J(f_t, params_t, x),
            'sym': lambda: J(f_s, params_s, x.flip(3)).flip(3),
            'minl2': lambda: torch.zeros_like(x),
        }[method]()
        losses = [(J(f_s, params_s, x) - other).square().sum((1, 2, 3)).mean() / 2]
    soft = torch.softmax(y_t / 4, 1)
    kl = (soft * (soft.log() - torch.log_softmax(y_s / 4, 1))).sum(1).mean()
    task = 0.9 * 16 * kl + 0.1 * torch.nn.functional.cross_entropy(y_s, targets)
    expected = task + 50 * sum(losses)
    leaves = [v for v in (*params_s.values(), *adapters.values()) if v.requires_grad]
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True)

    loss_of = cifar.make_loss(nets, opt, ['cpu'])
    loss, terms = loss_of(images, index, draws, targets, torch.tensor(50.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms[2:-1].tolist() == pytest.approx([v.item() for v in losses], rel=1e-3)
    opt.teacher_id = 't'
    assert len(cifar.term_names(opt)) == len(terms)
    loss.backward()
    for v, g in zip(leaves, gradients):
        torch.testing.assert_close(v.grad, g, rtol=1e-3, atol=1e-3 * float(g.abs().max()))
    assert all(v.grad is None for v in params_t.values())


@pytest.mark.parametrize('name, dtype', [('float', torch.float32), ('bfloat16', torch.bfloat16)])
def test_dtype_is_what_activations_are_computed_in(name, dtype):
    torch.manual_seed(0)
    f, params = resnet.wrn(10, 0.5, 3)
    seen = []

    def spied(*arguments, **named):
        logits, groups = f(*arguments, **named)
        seen.extend(g.dtype for g in groups)
        return logits, groups

    opt = cifar.parser.parse_args(['--dtype', name, '--alpha', '0', '--beta', '100'])
    nets = cifar.Nets(spied, spied, utils.flatten({'student': params, 'teacher': params}))
    images = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
    index = torch.arange(4)
    draws = data.crop_and_flip(4, 0, 1, 2)
    loss_of = cifar.make_loss(nets, opt, ['cpu'])
    loss, terms = loss_of(images, index, draws, index % 3, torch.tensor(100.0))
    assert seen == [dtype] * 6 and loss.dtype == terms.dtype == torch.float32


def test_the_last_smaller_batch_is_kept_and_means_weigh_by_samples():
    sizes, w = [], torch.zeros(1, requires_grad=True)

    def loss_of(images, index, draws, targets, beta):
        sizes.append(len(index))
        return (w * 0 + 1).sum(), torch.tensor([float(len(index)), 0.0, 50.0])

    images = torch.zeros(10, 8, 8, 3, dtype=torch.uint8)
    train_set = data.ImageSet(images, torch.arange(10), list(range(10)))
    opt = completed('--batch_size', '4', '--epochs', '1')
    step = cifar.make_step(loss_of, train_set, torch.optim.SGD([w], 0.1), graphed=False)
    stats = cifar.train_epoch(step, train_set, runs.Run(opt, None, here=False))
    assert sizes == [4, 4, 2]
    assert stats['train_loss'] == pytest.approx((16 + 16 + 4) / 10)
    assert stats['train_acc'] == pytest.approx(50)


def test_the_beta_of_the_epoch_is_what_the_loss_gets():
    seen, w = [], torch.zeros(1, requires_grad=True)

    def loss_of(images, index, draws, targets, beta):
        seen.append(beta.item())
        return (w * 0).sum(), torch.zeros(len(cifar.term_names(opt)))

    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    train_set = data.ImageSet(images, torch.arange(4), list(range(4)))
    opt = completed(*words('--teacher_id t --beta 100 --beta_decay linear --epochs 3'))
    step = cifar.make_step(loss_of, train_set, torch.optim.SGD([w], 0.1), graphed=False)
    for epoch in 1, 2, 3:
        run = runs.Run(opt, None, here=False, epoch=epoch - 1)
        cifar.train_epoch(step, train_set, run)
    assert seen == [100, 50, 0]


def test_beta_may_decay_from_its_default():
    assert completed('--teacher_id', 't', '--beta_decay', 'linear').beta == 1000


def test_the_rate_falls_at_the_given_and_by_default_at_the_published_epochs(home):
    trained(home, '--save logs/steps --epochs 3 --epoch_step [2,3] --lr 0.1')
    rates = [r['lr'] for r in records_of(home / 'logs/steps')]
    assert rates == pytest.approx([0.1, 0.02, 0.004])
    assert completed().epoch_step == [60, 120, 160]
    assert completed('--epochs', '10').epoch_step == [4, 7, 9]


def test_a_net_of_its_teachers_shape_starts_from_other_values_and_so_does_its_own_student(home):
    for name, teacher in ('a', []), ('b', ['--teacher_id a']), ('c', ['--teacher_id b']):
        trained(home, f'--save logs/{name} --epochs 0', *teacher)
    a, b, c = (weights_of(home / f'logs/{n}') for n in 'abc')
    drawn = [k for k in a if k.endswith(('conv0', 'conv1', 'convdim', 'fc.weight'))]
    assert not any(torch.equal(x[k], y[k]) for k in drawn for x, y in ((a, b), (b, c)))
    assert records_of(home / 'logs/a')[0]['epoch'] == 0


def test_a_teacher_that_is_not_what_its_log_says_is_noticed(home):
    shutil.copytree(home / 'logs/teacher', home / 'logs/broken')
    params = weights_of(home / 'logs/broken')
    params['fc.weight'] = -params['fc.weight']
    weights.save_params(home / 'logs/broken/model.hkl', params)
    done = trained(home, '--save logs/of_broken --teacher_id broken --epochs 1')
    assert done.stderr.count('\n') == 1
    assert 'warning: teacher broken' in done.stderr and ' % on set: ' in done.stderr
    # An accuracy that the published code could not measure is not compared.
    log = home / 'logs/broken/log.txt'
    log.write_text(re.sub(r'"test_acc": [0-9.]+', '"test_acc": NaN', log.read_text()))
    done = trained(home, '--save logs/of_nan --teacher_id broken --epochs 1')
    assert warnings_of(done) == []


def test_a_teacher_without_a_head_teaches_by_its_maps_alone(home):
    params = weights_of(home / 'logs/teacher')
    headless = {k: v for k, v in params.items() if not k.startswith('fc.')}
    weights.save_params(home / 'headless.hkl', headless)
    done = trained(home, '--save logs/of_headless --teacher_id headless.hkl --epochs 1')
    assert 'has no head: its accuracy is not tested' in done.stdout
    (record,) = records_of(home / 'logs/of_headless')
    assert len(record['at_losses']) == 3 and record['teacher_test_acc'] is None
    for options in '--alpha 0.9', '--method grad --beta 1':
        done = command(home, '--save logs/none --teacher_id headless.hkl --epochs 1', options)
        assert done.returncode == 2 and 'the net has no head' in done.stderr
        assert not (home / 'logs/none').exists()


def test_a_run_folder_of_the_published_code_teaches_and_is_evaluated(home):
    """Its log.txt has NaN and [mean, std]. Its model.pt7 has the file format of 2018, with teacher
    and student in one dict."""
    folder = home / 'logs/published'
    folder.mkdir()
    params = weights_of(home / 'logs/teacher')
    both = utils.flatten({'student': params, 'teacher': {k: torch.zeros(3) for k in params}})
    saved = {'params': both, 'epoch': 2, 'optimizer': {}}
    torch.save(saved, folder / 'model.pt7', _use_new_zipfile_serialization=False)
    acc = records_of(home / 'logs/teacher')[-1]['test_acc']
    line = '{"depth": 10, "width": 1.0, "dataset": "CIFAR10", "epoch_step": "[60,120,160]", '
    line += f'"at_losses": [[0.1, NaN]], "test_acc": {acc}}}'
    (folder / 'log.txt').write_text(f'json_stats: {line}\n')
    done = trained(home, '--save logs/of_published --teacher_id published --epochs 1')
    assert warnings_of(done) == [
        'logs/published/model.pt7: took params.student; left out params.teacher'
    ]
    assert evaluated(trained(home, '--evaluate logs/published').stdout)['test_acc'] == acc


def test_evaluate_takes_run_folders_and_files(home):
    logged = records_of(home / 'logs/teacher')[-1]
    params = weights_of(home / 'logs/teacher')
    torch.save(params, home / 'w.pth')
    for source in 'logs/teacher', 'logs/teacher/model.hkl', 'w.pth':
        done = trained(home, '--evaluate', source)
        assert done.stdout.count('\n') == 1
        stats = evaluated(done.stdout)
        assert (stats['test_acc'], stats['test_loss']) == (logged['test_acc'], logged['test_loss'])
        assert stats['n_parameters'] == logged['n_parameters'] and stats['images_per_second'] > 0
    # 12x12 images: conv0; in each group two 3x3 convolutions, and a 1x1 except in the first; the
    # linear layer.
    expected = 144 * 27 * 16 + 2 * 144 * 9 * 16 * 16
    expected += 36 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    expected += 9 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) + 64 * 3
    assert stats['multiply_adds'] == expected


def test_validate_tests_on_held_out_training_images(home):
    done = trained(home, '--save logs/validate --validate 30 --epochs 1')
    assert '90 images of 3 classes' in done.stdout
    f, params, records = weights.load_net(home / 'logs/validate')
    held_out = data.hold_out(data.open_sets('folder', home / 'set')[1]()[0], 30)[1]
    assert records[-1]['test_acc'] == pytest.approx(cifar.test(f, params, held_out)[1])


def test_tensorboard_cannot_write_into_a_folder_whose_name_is_not_utf8(home):
    done = command(home, '--epochs 1 --tensorboard --save', os.fsdecode(b'caf\xe9'))
    assert done.returncode == 2 and '--tensorboard: cannot write into caf\\xe9' in done.stderr
    assert not (home / os.fsdecode(b'caf\xe9')).exists()


def test_tensorboard_has_every_epoch_of_a_resumed_run(home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The first epoch ran without curves.
    for options in '--epochs 1', '--epochs 2 --resume --tensorboard':
        trained(home, '--save logs/tb --epoch_step [9]', options)
    curves = EventAccumulator(str(home / 'logs/tb')).Reload().Scalars('test_acc')
    logged = [r['test_acc'] for r in records_of(home / 'logs/tb')]
    assert [c.step for c in curves] == [1, 2]
    assert [c.value for c in curves] == pytest.approx(logged)


# ------------------------ other methods, other nets


def test_adapters_train_resume_and_stay_out_of_the_weights(home):
    """The student has other widths than its teacher in all groups. The run is stopped, and resumed
    to the same bits."""
    options = '--teacher_id teacher --method factt --beta 10 --epoch_step [9]'
    whole, parts = home / 'logs/factt_whole', home / 'logs/factt_parts'
    trained(home, '--save', whole, options, '--epochs 2')
    for epochs in '--epochs 1', '--epochs 2 --resume':
        assert warnings_of(trained(home, '--save', parts, options, epochs)) == []
    assert same_weights(whole, parts)
    assert log_of(whole, ('save', 'epochs')) == log_of(parts, ('save', 'epochs'))
    own = resnet.wrn(10, 0.5, 3)[1]
    assert weights_of(whole).keys() == own.keys()
    last = records_of(whole)[-1]
    assert last['n_parameters'] == sum(v.numel() for v in own.values() if v.requires_grad)
    assert len(last['at_losses']) == 3 and last['method'] == 'factt'
    a, b = (runs.load_checkpoint(run)['adapters'] for run in (whole, parts))
    shapes = {f'group{i}': (16 * 2**i, 8 * 2**i, 1, 1) for i in range(3)}
    assert {k: v.shape for k, v in a.items()} == shapes
    assert all(torch.equal(a[k], b[k]) for k in a)
    untrained = home / 'logs/factt_begun'
    trained(home, '--save', untrained, options, '--epochs 0')
    initial = runs.load_checkpoint(untrained)['adapters']
    assert all((a[k] - initial[k]).abs().max() > 1e-3 for k in a)


@pytest.mark.parametrize('method', ['grad', 'sym'])
def test_what_differentiates_twice_continues_to_the_same_bits(home, method):
    options = f'--method {method} --beta 10 --epoch_step [9] --compile'
    options += ' --teacher_id teacher' if method == 'grad' else ''
    whole, parts = home / f'logs/{method}_whole', home / f'logs/{method}_parts'
    trained(home, '--save', whole, options, '--epochs 2')
    for epochs in '--epochs 1', '--epochs 2 --resume':
        done = trained(home, '--save', parts, options, epochs)
        assert warnings_of(done) == []
        assert 'which cannot be compiled' in done.stdout and f', {method} ' in done.stdout
    assert same_weights(whole, parts)
    assert log_of(whole, ('save', 'epochs')) == log_of(parts, ('save', 'epochs'))
    assert records_of(whole)[-1]['compile'] is False


def test_a_checkpoint_from_before_adapters_continues(home):
    run = home / 'logs/old'
    trained(home, '--save', run, '--epochs 1')
    checkpoint = runs.load_checkpoint(run)
    new = ['net', 'no_bn', 'no_pool_relu', 'method', 'at_map', 'at_p', 'at_groups', 'beta_decay']
    del checkpoint['adapters']
    for name in new:
        del checkpoint['options'][name]
    torch.save(checkpoint, run / 'checkpoint.pt')
    error = refused(home, '--save', run, '--epochs 2 --resume --method minl2 --beta 1')
    assert 'differs from the run' in error
    assert warnings_of(trained(home, '--save', run, '--epochs 2 --resume')) == []
    assert len(records_of(run)) == 2


def test_beta_decays_as_logged_and_the_run_cannot_be_made_longer(home):
    options = '--save logs/decay --teacher_id teacher --alpha 0.9 --beta 100 --beta_decay linear'
    trained(home, options, '--resume --epochs 3')
    records = records_of(home / 'logs/decay')
    assert [r['epoch_beta'] for r in records] == [100, 50, 0]
    assert [r['beta'] for r in records] == [100] * 3
    last = records[-1]
    assert all(v > 0 for v in last['at_losses'])  # measured, although their weight is 0
    error = refused(home, options, '--resume --epochs 4')
    assert '--epochs 4: beta decays over the 3 epochs' in error


@pytest.mark.parametrize('method', ['sym', 'minl2'])
def test_methods_without_a_teacher(home, method):
    done = trained(home, f'--method {method} --beta 1 --epochs 1 --save logs/{method}')
    assert warnings_of(done) == []
    (last,) = records_of(home / f'logs/{method}')
    assert len(last['at_losses']) == 1 and last['at_losses'][0] > 0
    assert last['teacher_test_acc'] is None


def test_what_is_differentiated_twice_is_not_compiled_and_says_so(home):
    folders = home / 'logs/grad_eager', home / 'logs/grad_compile'
    for folder, extra in zip(folders, ([], ['--compile'])):
        options = '--method grad --teacher_id teacher --beta 1 --epochs 1'
        done = trained(home, '--save', folder, options, *extra)
        assert warnings_of(done) == []
        assert ('--compile: --method grad differentiates twice' in done.stdout) == bool(extra)
    assert same_weights(*folders)


def test_nets_of_either_family_teach_either(home):
    small = '--net nin --depth 10 --width 8'
    for name, options in (
        ('nin', small),
        ('nin_of_wrn', f'{small} --teacher_id teacher --no_bn --lr 0.01'),
        ('wrn_of_nin', '--teacher_id nin --beta 100 --alpha 0.5'),
        ('nin_of_nin', f'{small} --teacher_id nin --no_pool_relu'),
    ):
        done = trained(home, f'--save logs/{name} --epochs 1', options)
        assert warnings_of(done) == []
        last = records_of(home / f'logs/{name}')[-1]
        assert last['net'] == ('wrn' if name == 'wrn_of_nin' else 'nin')
        assert len(last['at_losses']) == (0 if name == 'nin' else 3)
        stats = evaluated(trained(home, f'--evaluate logs/{name}').stdout)
        assert (stats['test_acc'], stats['test_loss']) == (last['test_acc'], last['test_loss'])
    _, params, _ = weights.load_net(home / 'logs/nin_of_wrn')
    assert nin.variant(params) == (False, False)
    assert nin.variant(weights.load_net(home / 'logs/nin_of_nin')[1]) == (True, False)


# ------------------------ chance, kills, resuming


def test_the_same_command_gives_the_same_bits_and_another_seed_others(home):
    for name, seed in ('one', 5), ('two', 5), ('three', 6):
        trained(home, f'--save logs/{name} --seed {seed} --epochs 1')
    one, two, three = (home / f'logs/{name}' for name in ('one', 'two', 'three'))
    assert same_weights(one, two) and not same_weights(two, three)
    assert log_of(one) == log_of(two)


@pytest.mark.usefixtures('forked_scripts')
@pytest.mark.parametrize('dtype, kills', [('float', 3), ('bfloat16', 1)])
def test_killed_at_random_and_resumed_the_run_ends_in_the_same_bits(home, dtype, kills):
    options = '--teacher_id teacher --beta 100 --alpha 0.5'
    options += f' --epochs {4 * kills} --dtype {dtype}'
    whole, killed = home / f'logs/whole_{dtype}', home / f'logs/killed_{dtype}'
    trained(home, '--save', whole, options)
    rng, statuses = random.Random(dtype), []
    for _ in range(kills):
        run = start(home, '--save', killed, '--resume', options)
        epochs = (line for line in run.stdout if line.startswith('epoch '))
        for _ in range(rng.randint(1, 3)):
            next(epochs, None)
        time.sleep(rng.uniform(0, 0.02))  # into the next epoch, or the writing of its files
        run.kill()
        run.communicate()
        statuses.append(run.returncode)
    assert -signal.SIGKILL in statuses, 'every run was over before it was killed'
    trained(home, '--save', killed, '--resume', options)
    assert log_of(killed) == log_of(whole)
    assert same_weights(killed, whole)


def test_killed_between_its_files_a_run_agrees_with_its_checkpoint_again(home):
    trained(home, '--save logs/torn --epochs 2')
    folder = home / 'logs/torn'
    good = snapshot(folder)
    (folder / 'log.txt').write_text((folder / 'log.txt').read_text().splitlines()[0] + '\njson_sta')
    (folder / 'model.hkl').write_bytes(b'half')
    trained(home, '--save logs/torn --epochs 2 --resume')
    assert snapshot(folder) == good
    times = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    trained(home, '--save logs/torn --epochs 2 --resume')
    assert times == {f: f.stat().st_mtime_ns for f in folder.iterdir()}  # finished: untouched


def test_resume_takes_the_options_of_the_run_and_may_continue_longer_or_elsewhere(home):
    short, long, elsewhere = (home / f'logs/{name}' for name in ('short', 'long', 'elsewhere'))
    for folder, epochs in (short, 1), (long, 2):
        trained(home, '--save', folder, f'--epochs {epochs} --epoch_step [3] --seed 3')
    before = snapshot(short)
    trained(home, '--resume logs/short --save logs/elsewhere --epochs 2')
    assert snapshot(short) == before and same_weights(elsewhere, long)
    assert log_of(elsewhere, ('save', 'epochs')) == log_of(long, ('save', 'epochs'))


@pytest.mark.usefixtures('forked_scripts')
@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_that_says_how_to_continue(home, signum, status):
    run = start(home, f'--save logs/signal{status} --epochs 10000')
    for line in run.stdout:
        if line.startswith('epoch 2/'):
            break
    run.send_signal(signum)
    _, error = run.communicate(timeout=300)
    assert run.returncode == status
    assert error.count('\n') == 1 and '--resume' in error and signum.name in error


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_ends_in_one_line(home, signum, status):
    run = start(home, '--save logs/early')
    time.sleep(0.3)
    run.send_signal(signum)
    _, error = run.communicate(timeout=300)
    assert (run.returncode, error.count('\n')) == (status, 1) and 'cifar.py: stopped' in error


@pytest.mark.usefixtures('forked_scripts')
def test_two_processes_do_not_train_in_one_folder(home):
    run = start(home, '--save logs/locked --epochs 10000')
    for line in run.stdout:
        if line.startswith('epoch 1/'):
            break
    done = command(home, '--save logs/locked --epochs 10000 --resume')
    run.kill()
    run.communicate()
    assert done.returncode == 2 and 'another process' in done.stderr


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_epoch(home, tmp_path, monkeypatch, capsys):
    """The disk is full from the third checkpoint on. scripts/reliability.py fills a real one."""
    monkeypatch.chdir(home)
    fsync, epochs = os.fsync, []

    def full(fd):
        if os.readlink(f'/proc/self/fd/{fd}').endswith('checkpoint.pt.part'):
            epochs.append(1)
            if len(epochs) > 2:
                raise OSError(28, 'No space left on device')
        fsync(fd)

    monkeypatch.setattr(os, 'fsync', full)
    run = tmp_path / 'run'
    assert main('--epochs 4 --save', run) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'No space left' in error and 'checkpoint.pt' in error
    assert runs.load_checkpoint(run)['epoch'] == 2 and not list(run.glob('.*'))
    monkeypatch.setattr(os, 'fsync', fsync)
    assert main('--epochs 4 --resume --save', run) == 0
    assert [r['epoch'] for r in records_of(run)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(home):
    done = command(home, '--save logs/nan --lr 1e30 --epochs 3')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'epoch 1, step 2: not finite: loss nan, cross-entropy nan' in done.stderr


def test_a_loss_that_becomes_nan_keeps_the_last_good_epoch(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(home)
    make_loss, steps = cifar.make_loss, []

    def make_nan(*arguments):
        loss_of = make_loss(*arguments)

        def poisoned(*arguments):
            loss, terms = loss_of(*arguments)
            steps.append(1)
            bad = len(steps) == 4  # the second step of epoch 2
            return loss, torch.where(torch.arange(6) == 4, math.nan, terms) if bad else terms

        return poisoned

    monkeypatch.setattr(cifar, 'make_loss', make_nan)
    save = tmp_path / 'run'
    assert main('--teacher_id teacher --epochs 3 --save', save) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert 'epoch 2, step 2: not finite: at_loss of group 2 nan;' in error
    assert runs.load_checkpoint(save)['epoch'] == len(records_of(save)) == 1


def test_a_test_loss_that_is_not_finite_is_reported(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(cifar, 'test', lambda *_: (math.inf, 50.0))
    save = tmp_path / 'run'
    assert main('--epochs 1 --save', save) == 1
    assert 'the test loss is inf' in capsys.readouterr().err and not list(save.iterdir())
    assert main('--epochs 1 --evaluate logs/teacher') == 1
    assert 'the test loss is inf' in capsys.readouterr().err


# cifar.py, which copies the run folder after the first epoch: what a kill at that moment leaves.
# The nets may be of two convolutions, because the compiler takes a second for each kernel.
COPYING = """
import os, shutil, sys
sys.path.insert(0, {root!r})
import cifar, resnet, utils
from support import program, runs
import torch.nn.functional as F

def small_net(n):
    def f(x, params, training, base=''):
        x = utils.conv2d(x, params[f'{{base}}conv0'], padding=1)
        o = F.relu(utils.batch_norm(x, params, f'{{base}}group0.block0.bn0', training))
        g = utils.conv2d(o, params[f'{{base}}group0.block0.conv0'], padding=1)
        weight = params[f'{{base}}fc.weight'][:, :g.shape[1]]
        return F.linear(utils.wide(g).mean((2, 3)), weight, params[f'{{base}}fc.bias']), (g, g, g)
    return f

end_epoch = runs.Run.end_epoch

def end_and_copy(run, *arguments):
    end_epoch(run, *arguments)
    if run.epoch == 1 and not os.path.exists({copy!r}):
        shutil.copytree(run.opt.save, {copy!r})

runs.Run.end_epoch = end_and_copy
if {small}:
    resnet.wrn_function = small_net
sys.exit(program.call_main(cifar.main))
"""


def test_compiled_and_resumed_the_bits_are_those_of_a_compiled_run(home, tmp_path):
    if not shutil.which(os.environ.get('CXX', 'g++')):
        pytest.skip('no C++ compiler here')
    for dtype, method in ('bfloat16', 'at'), ('float', 'factt'):
        options = f'--method {method} --dtype {dtype} --teacher_id teacher --beta 100'
        options += ' --batch_size 60 --epoch_step [9] --epochs 2'
        folder = tmp_path / method
        folder.mkdir()
        whole, parts, eager = (folder / name for name in ('compiled', 'parts', 'eager'))
        script = folder / 'copying.py'
        small = method == 'factt'
        script.write_text(COPYING.format(root=str(ROOT), copy=str(parts), small=small))

        def train(*more, script=script, options=options):
            done = run_script(script, *FOLDER, *NET, *words(options, *more), cwd=home)
            assert done.returncode == 0, done.stderr
            return done

        assert 'no working compiler' not in train('--compile --save', whole).stderr
        assert [r['epoch'] for r in records_of(parts)] == [1]
        train('--compile --resume --save', parts)
        assert same_weights(parts, whole)
        assert log_of(parts) == log_of(whole)
        train('--save', eager)
        losses = [records_of(run)[0]['train_loss'] for run in (whole, eager)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == 'float' else 0.02)


# CXX would do the same, but torch has read it already where the script is forked.
WITHOUT_COMPILER = """
import sys
sys.path.insert(0, {root!r})
import cifar, torch
from support import program
torch._inductor.config.cpp.cxx = ('no-such-compiler',)
sys.exit(program.call_main(cifar.main))
"""


def test_without_a_compiler_the_run_continues(home, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    script = tmp_path / 'script.py'
    script.write_text(WITHOUT_COMPILER.format(root=str(ROOT)))
    options = words('--save logs/no_compiler --compile --epochs 1')
    done = run_script(script, *FOLDER, *NET, *options, cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('\n') == 1 and 'no working compiler found' in done.stderr
    assert records_of(home / 'logs/no_compiler')


# ------------------------ mistakes


def refused(home, *options):
    """The line with which the command refuses the options, having written nothing."""
    before = sorted(str(p) for p in home.rglob('*'))
    done = command(home, *options)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('cifar.py: error: '), done.stderr
    assert sorted(str(p) for p in home.rglob('*')) == before
    return done.stderr


MISTAKES = [
    (['--method', 'attention'], '--method'),
    (['--method', 'grad', '--teacher_id', 'teacher'], '--method grad: needs a weight: give --beta'),
    (['--method', 'factt', '--beta', '1'], '--teacher_id'),
    (
        ['--method', 'sym', '--beta', '1', '--teacher_id', 'teacher'],
        '--method sym needs no teacher',
    ),
    (['--method', 'minl2', '--beta', '1', '--at_map', 'max'], '--at_map'),
    (['--method', 'factt', '--beta', '1', '--teacher_id', 'teacher', '--at_p', '1'], '--at_p'),
    (['--method', 'sym', '--beta', '1', '--at_groups', '0'], '--at_groups'),
    (['--method', 'sym', '--beta', '1', '--at_map', 'sum'], '--at_map: has no effect'),  # default
    (['--teacher_id', 'teacher', '--at_groups', '3'], '--at_groups'),
    (['--teacher_id', 'teacher', '--at_groups', '0,0'], '--at_groups'),
    (['--teacher_id', 'teacher', '--at_groups', '[0,1'], '--at_groups'),
    (['--teacher_id', 'teacher', '--beta_decay', 'step', '--epochs', '1'], '--beta_decay step'),
    (['--teacher_id', 'teacher', '--at_p', '0'], '--at_p'),
    (['--beta_decay', 'linear'], '--beta_decay'),
    (['--at_map', 'max'], '--at_map: has no effect without a teacher'),
    (
        ['--teacher_id teacher --beta_decay step --beta 1 --epochs 2 --epoch_step [3]'],
        '--beta_decay step',
    ),
    (['--no_bn'], '--no_bn: has no effect without --net nin'),
    (['--net', 'nin', '--depth', '16', '--width', '96'], 'depth 16'),
    (['--net', 'nin', '--depth', '10', '--width', '0.5'], 'width 0.5'),
    (['--dept', '10'], '--dept'),
    (['--depth', '11'], 'depth 11'),
    (['--depth', '4'], 'depth 4'),
    (['--depth', 'ten'], '--depth'),
    (['--width', '0'], '--width'),
    (['--width', 'nan'], '--width'),
    (['--width', '0.01'], 'width 0.01'),
    (['--lr', '-1'], '--lr'),
    (['--lr', 'inf'], '--lr'),
    (['--epochs', '-1'], '--epochs'),
    (['--epochs', '1.5'], '--epochs'),
    (['--batch_size', '0'], '--batch_size'),
    (['--weight_decay', 'nan'], '--weight_decay'),
    (['--temperature', '0', '--teacher_id', 'teacher'], '--temperature'),
    (['--epoch_step', '60,120'], '--epoch_step'),
    (['--epoch_step', '[120,60]'], '--epoch_step'),
    (['--epoch_step', '[0]'], '--epoch_step'),
    (['--epoch_step', '{"a":1}'], '--epoch_step'),
    (['--alpha', '1.5', '--teacher_id', 'teacher'], '--alpha'),
    (['--alpha', '0.9'], '--teacher_id'),
    (['--beta', '1e3'], '--teacher_id'),
    (['--beta', '-1', '--teacher_id', 'teacher'], '--beta'),
    (['--alpha', '0', '--beta', '0', '--teacher_id', 'teacher'], 'both 0'),
    (['--teacher_id', 'nobody'], 'nobody'),
    (['--dtype', 'half'], '--dtype'),
    (['--validate', '2'], '--validate'),
    (['--validate', '119'], '--validate'),
    (['--randomcrop_pad', '12'], '--randomcrop_pad'),
    (['--gpu_id', 'x'], '--gpu_id'),
    (['--device', 'tpu'], '--device'),
    (['--cuda', '--device', 'cpu'], '--cuda'),
    (['--save', 'logs/teacher'], '--resume'),
    (['--save', 'set/train/cat/000.png'], 'not a folder'),
    (['--save', '/proc/nowhere/run'], '/proc'),
    (['--resume', 'logs/nowhere'], 'logs/nowhere'),
    (['--resume', '--save', 'logs/teacher', '--width', '2'], '--width'),
    (['--resume', '--save', 'logs/teacher', '--width', '1', '--lr', '0.5'], '--lr'),
    (['--evaluate', 'logs/nowhere'], 'logs/nowhere'),
    (['--evaluate', ''], '--evaluate'),
    (['--evaluate', 'x' * 300], 'xxx'),
    (['--teacher_id', 'x' * 300], 'xxx'),
    (['--teacher_id', ''], '--teacher_id'),
    (['--save', 'x' * 300], '--save'),
    (['--resume', 'x' * 300], '--resume'),
    (['--width', '900'], 'width 900'),
    (['--temperature', '1e200', '--alpha', '0.5', '--teacher_id', 'teacher'], '--temperature'),
    (['--lr_decay_ratio', '1e300'], '--lr_decay_ratio'),
    (['--dataset', 'CIFAR10', '--dataroot', 'nowhere', '--depth', '11'], 'depth 11'),
    (['--dataset', 'CIFAR10', '--dataroot', 'nowhere', '--teacher_id', 'nobody'], 'nobody'),
    (['--evaluate', 'set/train/cat/000.png'], '000.png'),
    (['stray'], 'stray'),
]


def in_process(home, options, capsys, monkeypatch):
    """As `refused`, but in this process."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, 'argv', ['cifar.py'])
    before = sorted(str(p) for p in home.rglob('*'))
    status = main(*options)
    error = capsys.readouterr().err
    assert status == 2 and error.count('\n') == 1 and error.startswith('cifar.py: error: '), error
    assert sorted(str(p) for p in home.rglob('*')) == before
    return error


@pytest.mark.parametrize(
    'options, named', MISTAKES, ids=lambda v: ' '.join(v)[:60] if isinstance(v, list) else ''
)
def test_a_mistake_is_one_line_that_names_it(home, options, named, capsys, monkeypatch):
    assert named in in_process(home, options, capsys, monkeypatch)


def test_a_mistake_ends_the_command_with_status_2(home):
    assert 'depth 11' in refused(home, '--depth 11')
    assert 'nobody' in refused(home, '--teacher_id nobody')


def test_a_gpu_that_is_not_there_is_named(home, capsys, monkeypatch):
    for options, named in (
        (['--gpu_id', '7'], '--gpu_id 7'),
        (['--device', 'cuda'], '--device cuda'),
        (['--cuda'], '--device cuda'),
        (['--ngpu', '2'], '--ngpu 2'),
    ):
        assert named in in_process(home, options, capsys, monkeypatch)


def test_broken_teachers_are_named(home, capsys, monkeypatch):
    def teacher(name, log=None, model=None):
        folder = home / 'logs' / name
        shutil.copytree(home / 'logs/teacher', folder)
        if log is not None:
            (folder / 'log.txt').write_text(log)
        if callable(model):
            params = weights_of(folder)
            model(params)
            weights.save_params(folder / 'model.hkl', params)
        elif model is not None:
            (folder / 'model.hkl').write_bytes(model)
        return ['--teacher_id', name]

    whole = (home / 'logs/teacher/model.hkl').read_bytes()
    cases = [
        (teacher('log_empty', log=''), 'log.txt'),
        (teacher('log_cut', log='json_stats: {"depth": 10, "wid'), 'log.txt'),
        (teacher('log_odd', log='json_stats: {"depth": "x", "width": null}\n'), 'depth and width'),
        (teacher('log_nan', log='json_stats: {"depth": NaN, "width": 1}\n'), 'depth'),
        (teacher('log_other', log='json_stats: {"depth": 16, "width": 1.0}\n'), 'says 16 and 1'),
        (teacher('model_cut', model=whole[: len(whole) // 2]), 'model.hkl'),
        (teacher('model_empty', model=b''), 'model.hkl'),
        (
            teacher('model_shape', model=lambda p: p.update({'conv0': torch.zeros(8, 3, 3, 3)})),
            'conv0',
        ),
        (
            teacher('model_nan', model=lambda p: p['group1.block0.conv1'].fill_(float('nan'))),
            'group1.block0.conv1',
        ),
        (teacher('model_less', model=lambda p: p.pop('bn.bias')), 'bn.bias'),
        (teacher('model_more', model=lambda p: p.update(strange=torch.zeros(1))), 'strange'),
    ]
    (home / 'logs/neither').mkdir()
    shutil.copy(home / 'logs/teacher/log.txt', home / 'logs/neither')
    cases.append((['--teacher_id', 'neither'], 'model.hkl'))
    # Sizes are checked before memory is allocated.
    vast = 'json_stats: {"depth": 9994, "width": 64}\n'
    cases.append((teacher('log_vast', log=vast), 'says 9994 and 64'))
    for options, named in cases:
        assert named in in_process(home, options, capsys, monkeypatch)


def test_a_log_with_odd_values_is_named_by_evaluate(home, capsys, monkeypatch):
    for name, value in ('dataset', 'imagenet'), ('dataset', 3), ('dataroot', 5), ('validate', 'x'):
        folder = home / 'logs' / f'odd_{name}_{value}'
        shutil.copytree(home / 'logs/teacher', folder)
        record = records_of(folder)[0] | {name: value}
        (folder / 'log.txt').write_text(logs.json_stats(record) + '\n')
        monkeypatch.chdir(home)
        assert program.call_main(cifar.main, ['--evaluate', str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and f'give --{name}' in error and str(value) in error


def test_images_of_a_run_that_are_not_here_are_named_by_evaluate(home, capsys, monkeypatch):
    folder = home / 'logs' / 'moved'
    shutil.copytree(home / 'logs/teacher', folder)
    record = records_of(folder)[0] | {'dataroot': '/nowhere/set'}
    (folder / 'log.txt').write_text(logs.json_stats(record) + '\n')
    monkeypatch.chdir(home)
    assert program.call_main(cifar.main, ['--evaluate', str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'its images, /nowhere/set, are missing' in error
    assert program.call_main(cifar.main, ['--evaluate', str(folder), '--dataroot', 'set']) == 0


def test_what_may_not_be_read_is_named(home, tmp_path):
    as_nobody = ['setpriv', '--reuid=65534', '--clear-groups'] if os.geteuid() == 0 else []
    try:
        probe = [*as_nobody, *arguments('--help')]
        subprocess.run(probe, check=True, cwd='/', env={'HOME': '/nowhere'}, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('root reads everything, and nobody else may run this Python')
    locked = tmp_path / 'locked'
    locked.mkdir()
    os.chmod(tmp_path, 0o755)
    os.chmod(locked, 0)
    for option in '--save', '--resume', '--evaluate':
        argv = [*as_nobody, *arguments(option, locked / 'x', dataset=('--dataset', 'shapes'))]
        env = os.environ | {'HOME': '/nowhere'}
        done = subprocess.run(argv, check=False, cwd='/', env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
        assert 'locked' in done.stderr
    os.chmod(locked, 0o755)


def test_a_run_of_no_epochs_continues_with_the_drops_of_its_new_length(home):
    trained(home, '--save logs/nothing --epochs 0')
    done = trained(home, '--save logs/nothing --epochs 4 --resume')
    assert 'in place of' not in done.stdout
    records = records_of(home / 'logs/nothing')[1:]
    assert [r['lr'] for r in records] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert records[0]['epoch_step'] == [2, 3, 4]


def test_a_resumed_run_on_other_classes_names_the_data(home, tmp_path, capsys, monkeypatch):
    make_images(tmp_path / 'two', per_class=8, classes=('cat', 'dog'))
    options = ['--save', 'logs/teacher', '--epochs', '3', '--width', '1', '--resume']
    error = in_process(home, [*options, '--dataroot', str(tmp_path / 'two')], capsys, monkeypatch)
    assert 'the data of --dataroot' in error


def test_a_net_for_photographs_is_not_for_this_script(home, capsys, monkeypatch):
    weights.save_params(home / 'photographs.hkl', resnet.resnet(18, 0.125, 3)[1])
    error = in_process(home, ['--evaluate', 'photographs.hkl'], capsys, monkeypatch)
    assert 'test it with imagenet.py' in error
    (home / 'photographs.hkl').unlink()


def test_other_classes_matter_with_alpha_alone(home, tmp_path, capsys, monkeypatch):
    make_images(tmp_path / 'two', per_class=8, classes=('cat', 'dog'))
    two = ['--dataroot', tmp_path / 'two', '--teacher_id teacher --epochs 1']
    error = in_process(home, [*two, '--alpha 0.9'], capsys, monkeypatch)
    assert '--alpha' in error and 'cat, dog' in error
    error = in_process(home, [*two, '--method grad --beta 1'], capsys, monkeypatch)
    assert '--method grad' in error and 'cat, dog' in error
    assert main(*two, '--beta 100 --save', tmp_path / 'run') == 0
    assert records_of(tmp_path / 'run')[0]['teacher_test_acc'] is None


def test_broken_data_is_named(home, tmp_path, capsys, monkeypatch):
    def data_set(name):
        return make_images(tmp_path / name, per_class=4)

    def cut(root):
        image = cv2.imread(str(root / 'train/dog/001.png'))
        _, raw = cv2.imencode('.jpg', image)
        (root / 'train/dog/bad.jpg').write_bytes(raw.tobytes()[:-30])

    breakers = {
        'cut': (cut, 'bad.jpg'),
        'size': (
            lambda r: cv2.imwrite(str(r / 'test/dog/odd.png'), np.zeros((9, 9, 3), np.uint8)),
            'odd.png',
        ),
        'empty': (lambda r: [f.unlink() for f in (r / 'train/fox').iterdir()], 'fox'),
        'classes': (lambda r: (r / 'test/fox').rename(r / 'test/owl'), 'owl'),
        'one': (
            lambda r: [shutil.rmtree(r / s / c) for s in ('train', 'test') for c in ('dog', 'fox')],
            '1 class',
        ),
        'no_test': (lambda r: shutil.rmtree(r / 'test'), 'test'),
    }
    for name, (breaker, named) in breakers.items():
        root = data_set(name)
        breaker(root)
        assert named in in_process(home, ['--dataroot', str(root)], capsys, monkeypatch)
    nowhere = ['--dataroot', tmp_path / 'nowhere']
    assert 'nowhere' in in_process(home, nowhere, capsys, monkeypatch)


@pytest.mark.parametrize(
    'case',
    [  # side, options, a batch size that works
        (4, '--batch_size 10', 11),
        (4, '--batch_size 1', 3),  # 21 images: 2 leave one image too
        (1, '--batch_size 12 --validate 8', 13),
        (4, '--batch_size 4 --net nin --depth 10 --width 4', 6),
    ],
)
def test_a_last_batch_of_one_tiny_image_is_refused_with_a_size_that_works(
    home, tmp_path, capsys, monkeypatch, case
):
    size, options, good = case
    root = make_images(tmp_path / 'tiny', per_class=7, size=size)
    options = ['--dataroot', root, '--randomcrop_pad 0', options]
    error = in_process(home, options, capsys, monkeypatch)
    assert error.endswith(f'use --batch_size {good}\n')


def test_batches_of_one_image_train_if_batch_norm_has_more_values():
    def check(net, size, n=3, **options):
        opt = argparse.Namespace(**{'batch_size': 1, 'epochs': 1, 'ngpu': 1} | options)
        cifar.check_batches(opt, *net, torch.zeros(n, size, size, 3, dtype=torch.uint8))

    wrn, plain = resnet.wrn(10, 0.5, 3), nin.nin(4, 3, bn=False, pool_relu=False)
    check(wrn, 5)
    check(plain, 1)
    check(wrn, 1, epochs=0)
    check(wrn, 1, batch_size=2, n=4)
    check(wrn, 1, batch_size=4, n=8, ngpu=2)
    for n, batch_size, ngpu in (3, 2, 1), (1, 8, 1), (8, 2, 2):
        with pytest.raises(UserError, match=f'--batch_size {batch_size}: the last batch'):
            check(wrn, 4, n, batch_size=batch_size, ngpu=ngpu)


def test_other_data_or_another_teacher_cannot_continue(home, tmp_path, capsys, monkeypatch):
    trained(home, '--save logs/facts --teacher_id teacher --epochs 1')
    shutil.copytree(home / 'set', tmp_path / 'set')
    cv2.imwrite(str(tmp_path / 'set/train/cat/000.png'), np.zeros((12, 12, 3), np.uint8))
    go_on = ['--save logs/facts --resume --epochs 2']
    other = [*go_on, '--dataroot', tmp_path / 'set']
    assert 'dataroot' in in_process(home, other, capsys, monkeypatch)
    # The same images in the same order, one of them as another class.
    shutil.rmtree(tmp_path / 'set'), shutil.copytree(home / 'set', tmp_path / 'set')
    cat = max((tmp_path / 'set/train/cat').iterdir())
    cat.rename(tmp_path / 'set/train/dog/!.png')
    assert 'dataroot' in in_process(home, other, capsys, monkeypatch)
    teacher = home / 'logs/teacher/model.hkl'
    whole = teacher.read_bytes()
    params = weights.load_params(teacher)
    params['fc.bias'] += 1
    weights.save_params(teacher, params)
    assert 'teacher_id' in in_process(home, go_on, capsys, monkeypatch)
    teacher.write_bytes(whole)


def test_damaged_checkpoints_are_refused_and_kept(home, capsys, monkeypatch):
    trained(home, '--save logs/hurt --epochs 1')
    path = home / 'logs/hurt/checkpoint.pt'
    whole = path.read_bytes()
    go_on = ['--save logs/hurt --resume --epochs 2']
    with zipfile.ZipFile(path) as archive:  # a byte that is padding would not matter
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    lengths = whole[largest.header_offset + 26 : largest.header_offset + 30]
    start = largest.header_offset + 30 + sum(np.frombuffer(lengths, '<u2').tolist())
    flipped = bytearray(whole)
    flipped[start + largest.file_size // 2] ^= 1
    for damaged in b'', whole[: len(whole) // 2], whole[:-7], bytes(flipped), b'x' * 1000:
        path.write_bytes(damaged)
        assert 'checkpoint.pt' in in_process(home, go_on, capsys, monkeypatch)
        assert path.read_bytes() == damaged
    path.unlink()
    assert 'checkpoint.pt' in in_process(home, go_on, capsys, monkeypatch)
    torch.save({'params': {}}, path)
    assert 'not a checkpoint' in in_process(home, go_on, capsys, monkeypatch)


OPTIONS = {s for a in cifar.parser._actions for s in a.option_strings}
OPTIONS = sorted(OPTIONS - {'-h', '--help', '--save'})


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(OPTIONS),
            st.text(max_size=8) | st.floats().map(str) | st.integers().map(str),
        ),
        max_size=4,
    )
)
def test_options_never_end_in_a_traceback(tmp_path_factory, options):
    """Any options are accepted or refused by a UserError, until data and teacher are opened."""
    folder = tmp_path_factory.getbasetemp() / 'options'
    folder.mkdir(exist_ok=True)
    argv = [word for pair in options for word in pair]
    try:
        opt, given_options = cifar.parser.parse(argv)
        opt.save = str(folder / 'none')
        opt, _, _ = runs.find_checkpoint(opt, given_options, cifar.parser, cifar.complete)
        done = cifar.complete(opt, given_options)
        done.save = ''
        assert len(cifar.complete(done, given_options).save) < 210
    except UserError:
        pass


def test_the_names_of_runs_tell_them_apart():
    def name(*options):
        return completed(*options).save

    at = ['--teacher_id', 'resnet_16_2_teacher', '--beta', '1e+3']
    assert name(*at) == 'logs/CIFAR10_wrn-16-1_resnet_16_2_teacher_beta1000_seed0'
    names = [
        name(),
        name('--seed', '1'),
        name('--width', '1.25'),
        name('--width', '1.5'),
        name('--epochs', '100'),
        name('--epochs', '100', '--epoch_step', '[9]'),
        name('--dtype', 'bfloat16'),
        name('--dataset', 'folder', '--dataroot', 'a'),
        name('--dataset', 'folder', '--dataroot', 'b'),
        name('--teacher_id', 'a/teacher'),
        name('--teacher_id', 'b/teacher'),
        name('--teacher_id', 't_wrn-16-1.25_seed0'),
        name('--teacher_id', 't_wrn-16-1.5_seed0'),
        name('--teacher_id', 't' * 250),
        name('--teacher_id', 't' * 251),
    ]
    assert len(set(names)) == len(names) and max(map(len, names)) < 210
    assert name('--compile', '--nthread', '1') == name(), 'these do not change the result'


@pytest.mark.parametrize('method', ['at', 'factt', 'grad', 'sym', 'minl2'])
def test_beta_of_every_method_can_decay(method):
    options = words('--beta 5 --beta_decay linear --method', method)
    if method in ('at', 'factt', 'grad'):
        options += ['--teacher_id', 't']
    opt = completed(*options)
    assert (opt.method, opt.beta, opt.beta_decay) == (method, 5, 'linear')


def test_the_published_commands_parse():
    machine = ' --gpu_id 0,1 --ngpu 2 --cuda --nthread 4'
    recipe = ' --epoch_step [60,120,160] --randomcrop_pad 4 --temperature 4 --dtype float'
    for line in (
        '--save logs/resnet_16_2_teacher --depth 16 --width 2',
        '--save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3',
        '--save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9',
        '--save logs/atkd --teacher_id resnet_16_2_teacher --alpha 0.9 --beta 1e+3' + machine,
        '--dataset CIFAR100 --dataroot .' + recipe,
    ):
        opt = completed(*line.split())
        assert opt.epoch_step == [60, 120, 160] and (opt.beta == 1000 or 'beta' not in line)
