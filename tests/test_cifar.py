"""cifar.py as its users meet it: commands, run folders, kills, mistakes. Every run here is real,
and tiny."""

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

import cifar
import data
import nin
import resnet
import utils
from programs import run_script

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ['--dataset', 'folder', '--dataroot', 'set']
NET = ['--depth', '10', '--width', '0.5', '--batch_size', '64', '--nthread', '1']


def make_images(root, per_class=40, size=12, classes=('cat', 'dog', 'fox')):
    """A folder set: noise whose brightness tells the class a little."""
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
    done = command(home, '--save', 'logs/teacher', '--width', '1', '--epochs', '2')
    assert done.returncode == 0, done.stderr
    return home


def arguments(*options, dataset=FOLDER):
    return [sys.executable, str(ROOT / 'cifar.py'), *dataset, *NET, *map(str, options)]


def command(cwd, *options, dataset=FOLDER):
    return run_script('cifar.py', *dataset, *NET, *options, cwd=cwd)


def start(cwd, *options, **kw):
    env = os.environ | {'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen(
        arguments(*options, **kw),
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log_of(folder, drop=('save',)):
    """The log's records without measured times, and without what two folders must differ in."""
    return [
        {k: v for k, v in r.items() if 'time' not in k and k not in drop}
        for r in utils.read_log(folder / 'log.txt')
    ]


def snapshot(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()
    }


# ------------------------ what a run writes


def test_a_teacher_writes_log_model_and_checkpoint(home):
    records = utils.read_log(home / 'logs/teacher/log.txt')
    assert [r['epoch'] for r in records] == [1, 2]
    last = records[-1]
    assert (
        last['depth'] == 10
        and last['width'] == 1
        and last['classes'] == ['cat', 'dog', 'fox']
        and last['num_classes'] == 3
    )
    assert last['at_losses'] == [] and last['teacher_test_acc'] is None
    options = {a.dest for a in cifar.parser._actions} - {'help', 'resume', 'evaluate'}
    assert options <= last.keys()
    for line in (home / 'logs/teacher/log.txt').read_text().splitlines():
        json.loads(
            line.removeprefix('json_stats: '),
            parse_constant=lambda c: pytest.fail(f'{c} is not strict JSON'),
        )

    f, params = resnet.wrn(10, 1, 3)
    model = utils.check_params(utils.load_params(home / 'logs/teacher/model.hkl'), params, 'model')
    assert last['n_parameters'] == sum(v.numel() for v in params.values() if v.requires_grad)
    checkpoint = torch.load(home / 'logs/teacher/checkpoint.pt', weights_only=True)
    assert all(torch.equal(model[k], v) for k, v in checkpoint['params'].items())

    # The logged accuracy is that of these weights on these files, read by other means.
    right = 0
    for c, name in enumerate(last['classes']):
        for file in (home / 'set/test' / name).iterdir():
            image = torch.from_numpy(cv2.imread(str(file))[:, :, ::-1].copy()).float()
            x = (image - torch.tensor([125.3, 123.0, 113.9])) / torch.tensor([63.0, 62.1, 66.7])
            right += int(f(x.permute(2, 0, 1)[None], model, False)[0].argmax()) == c
    assert last['test_acc'] == pytest.approx(100 * right / 120)


def test_a_student_learns_from_its_teacher_and_keeps_it_out_of_its_weights(home):
    done = command(
        home,
        '--save',
        'logs/both',
        '--teacher_id',
        'teacher',
        '--alpha',
        '0.9',
        '--beta',
        '1e+3',
        '--epochs',
        '2',
    )
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert 'teacher teacher: test accuracy' in done.stdout
    last = utils.read_log(home / 'logs/both/log.txt')[-1]
    assert len(last['at_losses']) == 3 and all(v > 0 for v in last['at_losses'])
    assert last['teacher_test_acc'] == utils.read_log(home / 'logs/teacher/log.txt')[-1]['test_acc']
    names = utils.load_params(home / 'logs/both/model.hkl').keys()
    assert names == resnet.wrn(10, 0.5, 3)[1].keys()


def test_a_teacher_alone_means_attention_transfer(home):
    done = command(home, '--save', 'logs/plain', '--teacher_id', 'teacher', '--epochs', '1')
    assert done.returncode == 0 and '--beta 1e+3' in done.stdout
    assert utils.read_log(home / 'logs/plain/log.txt')[-1]['beta'] == 1000


def test_the_loss_is_distillation_plus_beta_times_the_maps():
    """One step of make_loss against the definition, put together by hand."""
    torch.manual_seed(0)
    f_s, params_s = resnet.wrn(10, 1, 10)
    f_t, params_t = resnet.wrn(16, 2, 10)
    params = {f'student.{k}': v for k, v in params_s.items()} | {
        f'teacher.{k}': v.detach() for k, v in params_t.items()
    }
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    targets, index, draws = torch.arange(8), torch.arange(8), data.crop_and_flip(8, 0, 1, 4)
    opt = cifar.parser.parse_args(['--alpha', '0.9', '--beta', '100', '--temperature', '3'])
    x = data.normalize(data.augment(images, index, draws, 4))
    y_s, g_s = f_s(x, {k: v.detach().clone() for k, v in params_s.items()}, True)
    y_t, g_t = f_t(x, params_t, False)
    soft = torch.softmax(y_t / 3, 1)
    kl = (soft * (soft.log() - torch.log_softmax(y_s / 3, 1))).sum(1).mean()
    maps = [[g.pow(2).sum(1).flatten(1) for g in groups] for groups in (g_s, g_t)]
    ats = [
        ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).mean()
        for a, b in zip(*maps)
    ]
    expected = 0.9 * 9 * kl + 0.1 * torch.nn.functional.cross_entropy(y_s, targets) + 100 * sum(ats)

    loss_of, beta = cifar.make_loss(f_s, f_t, opt, ['cpu']), torch.tensor(100.0)
    loss, terms = loss_of(images, index, draws, targets, params, beta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms[2:5].tolist() == pytest.approx([a.item() for a in ats], rel=1e-4)
    loss.backward()
    assert all(v.grad is not None for v in params_s.values() if v.requires_grad)
    assert all(v.grad is None for v in params_t.values())


def test_training_is_a_plain_loop_over_the_published_recipe(home, tmp_path, monkeypatch):
    """Three epochs of cifar.main against the same written out: torchvision's pad, crop and flip,
    losses by their formulas, SGD with momentum and decay on every trainable parameter, and a new
    one at the drop."""
    from torchvision.transforms import functional as TF

    monkeypatch.chdir(home)
    options = [
        '--dataset',
        'folder',
        '--dataroot',
        'set',
        *NET,
        '--epoch_step',
        '[2]',
        '--seed',
        '3',
    ]
    options += ['--teacher_id', 'teacher', '--alpha', '0.5', '--beta', '100', '--lr', '0.05']
    options += ['--weight_decay', '0.01', '--lr_decay_ratio', '0.5', '--batch_size', '50']
    for name, epochs in ('start', 0), ('end', 3):
        save = ['--save', str(tmp_path / name), '--epochs', str(epochs)]
        assert utils.call_main(cifar.main, [*options, *save]) == 0
    f, params = resnet.wrn(10, 0.5, 3)
    start = utils.load_params(tmp_path / 'start' / 'model.hkl')
    params = {k: start[k].clone() for k in params}
    utils.set_requires_grad_except_bn_(params)
    trainable = [v for v in params.values() if v.requires_grad]
    f_t, params_t, _ = resnet.load_net('logs/teacher')
    train_set = data.open_sets('folder', 'set')[1]()[0]
    images = [image.permute(2, 0, 1) for image in train_set.images]
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    losses = []
    for epoch in 1, 2, 3:
        if epoch < 3:
            lr = 0.05 if epoch == 1 else 0.025
            optimizer = torch.optim.SGD(trainable, lr, momentum=0.9, weight_decay=0.01)
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
                a, b = (g.pow(2).sum(1).flatten(1) for g in (a, b))
                a, b = (q / q.norm(dim=1, keepdim=True) for q in (a, b))
                loss = loss + 100 * (a - b).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += float(loss.detach()) * len(index)
        losses.append(seen / 120)
    end = utils.load_params(tmp_path / 'end' / 'model.hkl')
    logged = [r['train_loss'] for r in utils.read_log(tmp_path / 'end' / 'log.txt')]
    assert logged == pytest.approx(losses, rel=1e-4)
    for name, value in params.items():
        torch.testing.assert_close(end[name], value.detach(), rtol=1e-3, atol=1e-4)
        assert (end[name] - start[name]).abs().max() > 10 * (end[name] - value.detach()).abs().max()


def normalised(v):
    return v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True)


@pytest.mark.parametrize('method', ['factt', 'grad', 'sym', 'minl2', 'max', 'some groups'])
def test_the_loss_of_each_method_is_its_definition(method):
    """One step of make_loss against the definition, put together by hand, and the derivatives by
    the student's weights."""
    torch.manual_seed(0)
    f_s, params_s = nin.nin(6, 10, bn=False, pool_relu=False)
    f_t, params_t = resnet.wrn(10, 0.5, 10)
    options = {
        'max': ['--at_map', 'max', '--at_p', '1'],
        'some groups': ['--at_groups', '2,0'],
    }.get(method, ['--method', method])
    opt = cifar.parser.parse_args(['--alpha', '0.9', '--beta', '100', *options])
    adapters = cifar.make_adapters(params_s, params_t, f_s, f_t, opt)
    params = utils.flatten(
        {'student': params_s, 'teacher': utils.cast(params_t), 'adapter': adapters}
    )
    for name in params_t:
        params[f'teacher.{name}'] = params_t[name].detach()
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
        assert {k: v.shape for k, v in adapters.items()} == {
            f'group{i}': (8 * 2**i, 6, 1, 1) for i in range(3)
        }
        adapted = [
            torch.einsum('oi,bihw->bohw', adapters[f'group{i}'][:, :, 0, 0], g_s[i])
            for i in range(3)
        ]
        losses = [
            (normalised(a) - normalised(b)).square().sum(1).mean() / b[0, 0].numel()
            for a, b in zip(adapted, g_t)
        ]
    elif method in ('max', 'some groups'):
        chosen = [0, 2] if method == 'some groups' else [0, 1, 2]
        maps = [
            [(g[i].abs().amax(1) if method == 'max' else g[i].square().sum(1)) for i in chosen]
            for g in (g_s, g_t)
        ]
        losses = [(normalised(a) - normalised(b)).square().mean() for a, b in zip(*maps)]
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
    trained = [v for v in (*params_s.values(), *adapters.values()) if v.requires_grad]
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)

    loss_of = cifar.make_loss(f_s, f_t, opt, ['cpu'])
    loss, terms = loss_of(images, index, draws, targets, params, torch.tensor(50.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms[2:-1].tolist() == pytest.approx([v.item() for v in losses], rel=1e-3)
    assert len(cifar.term_names(argparse.Namespace(**vars(opt) | {'teacher_id': 't'}))) == len(
        terms
    )
    loss.backward()
    for v, g in zip(trained, gradients):
        torch.testing.assert_close(v.grad, g, rtol=1e-3, atol=1e-3 * float(g.abs().max()))
    assert all(v.grad is None for v in params_t.values())


@pytest.mark.parametrize('name, dtype', [('float', torch.float32), ('bfloat16', torch.bfloat16)])
def test_dtype_is_what_activations_are_computed_in(name, dtype):
    torch.manual_seed(0)
    f, params = resnet.wrn(10, 0.5, 3)
    seen = []

    def spied(*arguments):
        logits, groups = f(*arguments)
        seen.extend(g.dtype for g in groups)
        return logits, groups

    opt = cifar.parser.parse_args(['--dtype', name, '--alpha', '0', '--beta', '100'])
    params = {f'{base}.{k}': v for base in ('student', 'teacher') for k, v in params.items()}
    images = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
    index = torch.arange(4)
    draws = data.crop_and_flip(4, 0, 1, 2)
    loss_of = cifar.make_loss(spied, spied, opt, ['cpu'])
    loss, terms = loss_of(images, index, draws, index % 3, params, torch.tensor(100.0))
    assert seen == [dtype] * 6 and loss.dtype == terms.dtype == torch.float32


def test_the_last_smaller_batch_is_kept_and_means_weigh_by_samples(monkeypatch):
    sizes = []

    def loss_of(images, index, draws, targets, params, beta):
        sizes.append(len(index))
        return (params['w'] * 0 + 1).sum(), torch.tensor([float(len(index)), 0.0, 50.0])

    w = torch.zeros(1, requires_grad=True)
    train_set = data.ImageSet(
        torch.zeros(10, 8, 8, 3, dtype=torch.uint8), torch.arange(10), list(range(10))
    )
    opt = cifar.complete(cifar.parser.parse_args(['--batch_size', '4', '--epochs', '1']))
    step = cifar.make_step(loss_of, train_set, {'w': w}, torch.optim.SGD([w], 0.1), opt)
    stats = cifar.train_epoch(1, step, train_set, opt)
    assert sizes == [4, 4, 2]
    assert stats['train_loss'] == pytest.approx((16 + 16 + 4) / 10) and stats[
        'train_acc'
    ] == pytest.approx(50)


def test_the_beta_of_the_epoch_is_what_the_loss_gets():
    seen = []

    def loss_of(images, index, draws, targets, params, beta):
        seen.append(beta.item())
        return (params['w'] * 0).sum(), torch.tensor([0.0, 0.0, 50.0])

    w = torch.zeros(1, requires_grad=True)
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    train_set = data.ImageSet(images, torch.arange(4), list(range(4)))
    words = ['--teacher_id', 't', '--beta', '100', '--beta_decay', 'linear', '--epochs', '3']
    opt = cifar.complete(cifar.parser.parse(words)[0])
    step = cifar.make_step(loss_of, train_set, {'w': w}, torch.optim.SGD([w], 0.1), opt)
    for epoch in 1, 2, 3:
        cifar.train_epoch(epoch, step, train_set, opt)
    assert seen == [100, 50, 0]


def test_beta_may_decay_from_its_default():
    opt, _ = cifar.parser.parse(['--teacher_id', 't', '--beta_decay', 'linear'])
    assert cifar.complete(opt).beta == 1000


def test_curves_are_named_by_their_group():
    def names(**record):
        found = {}
        writer = argparse.Namespace(add_scalar=lambda n, v, e: found.update({n: v}), flush=int)
        usual = dict.fromkeys(('train_loss', 'train_acc', 'test_loss', 'test_acc', 'lr'))
        utils.write_curves(writer, usual | {'epoch': 1} | record)
        return found

    assert names(at_losses=[5, 7], at_groups=[2, 0]) == {'at_loss/group2': 5, 'at_loss/group0': 7}
    assert names(at_losses=[3], at_groups=[0, 1, 2], method='grad') == {'grad_loss': 3}
    assert names(at_losses=[1, 2]) == {'at_loss/group0': 1, 'at_loss/group1': 2}
    assert names(at_losses=[], at_groups=[0, 1, 2]) == {}


def test_the_rate_falls_at_the_given_and_by_default_at_the_published_epochs(home):
    done = command(
        home, '--save', 'logs/steps', '--epochs', '3', '--epoch_step', '[2,3]', '--lr', '0.1'
    )
    assert done.returncode == 0
    assert [r['lr'] for r in utils.read_log(home / 'logs/steps/log.txt')] == pytest.approx(
        [0.1, 0.02, 0.004]
    )
    assert cifar.complete(cifar.parser.parse_args([])).epoch_step == [60, 120, 160]
    assert cifar.complete(cifar.parser.parse_args(['--epochs', '10'])).epoch_step == [4, 7, 9]


def test_a_net_of_its_teachers_shape_starts_from_other_values_and_so_does_its_own_student(home):
    for name, teacher in ('a', []), ('b', ['--teacher_id', 'a']), ('c', ['--teacher_id', 'b']):
        done = command(home, '--save', f'logs/{name}', '--epochs', '0', *teacher)
        assert done.returncode == 0, done.stderr
    a, b, c = (utils.load_params(home / f'logs/{n}/model.hkl') for n in 'abc')
    drawn = [k for k in a if k.endswith(('conv0', 'conv1', 'convdim', 'fc.weight'))]
    assert not any(torch.equal(x[k], y[k]) for k in drawn for x, y in ((a, b), (b, c)))
    assert utils.read_log(home / 'logs/a/log.txt')[0]['epoch'] == 0


def test_a_teacher_that_is_not_what_its_log_says_is_noticed(home):
    shutil.copytree(home / 'logs/teacher', home / 'logs/broken')
    params = utils.load_params(home / 'logs/broken/model.hkl')
    params['fc.weight'] = -params['fc.weight']
    utils.save_params(home / 'logs/broken/model.hkl', params)
    done = command(home, '--save', 'logs/of_broken', '--teacher_id', 'broken', '--epochs', '1')
    assert done.returncode == 0 and done.stderr.count('\n') == 1
    assert 'warning: teacher broken' in done.stderr and ' % on set: ' in done.stderr
    # What the published code could not measure cannot differ.
    log = home / 'logs/broken/log.txt'
    log.write_text(re.sub(r'"test_acc": [0-9.]+', '"test_acc": NaN', log.read_text()))
    done = command(home, '--save', 'logs/of_nan', '--teacher_id', 'broken', '--epochs', '1')
    assert done.returncode == 0 and not done.stderr


def test_a_run_folder_of_the_published_code_teaches_and_is_evaluated(home):
    """log.txt with NaN and [mean, std]; model.pt7 in the file format of 2018, teacher and student
    in one dict."""
    folder = home / 'logs/published'
    folder.mkdir()
    params = utils.load_params(home / 'logs/teacher/model.hkl')
    both = {f'student.{k}': v for k, v in params.items()} | {
        f'teacher.{k}': torch.zeros(3) for k in params
    }
    torch.save(
        {'params': both, 'epoch': 2, 'optimizer': {}},
        folder / 'model.pt7',
        _use_new_zipfile_serialization=False,
    )
    acc = utils.read_log(home / 'logs/teacher/log.txt')[-1]['test_acc']
    line = '{"depth": 10, "width": 1.0, "dataset": "CIFAR10", "epoch_step": "[60,120,160]", "at_losses": [[0.1, NaN]], "test_acc": %s}'
    (folder / 'log.txt').write_text(f'json_stats: {line % acc}\n')
    done = command(
        home, '--save', 'logs/of_published', '--teacher_id', 'published', '--epochs', '1'
    )
    assert done.returncode == 0 and done.stderr == '', done.stderr
    done = command(home, '--evaluate', 'logs/published')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1].removeprefix('json_stats: '))['test_acc'] == acc


def test_evaluate_takes_run_folders_and_files(home):
    logged = utils.read_log(home / 'logs/teacher/log.txt')[-1]
    params = utils.load_params(home / 'logs/teacher/model.hkl')
    torch.save(params, home / 'w.pth')
    for source in 'logs/teacher', 'logs/teacher/model.hkl', 'w.pth':
        done = command(home, '--evaluate', source)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        stats = json.loads(line.removeprefix('json_stats: '))
        assert (stats['test_acc'], stats['test_loss']) == (logged['test_acc'], logged['test_loss'])
        assert stats['n_parameters'] == logged['n_parameters'] and stats['images_per_second'] > 0
    # 12x12 images: conv0, then per group two 3x3 convolutions and, but for the first, a 1x1; and
    # the linear layer
    expected = 144 * 27 * 16 + 2 * 144 * 9 * 16 * 16
    expected += (
        36 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
        + 9 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
        + 64 * 3
    )
    assert stats['multiply_adds'] == expected


def test_validate_tests_on_held_out_training_images(home):
    done = command(home, '--save', 'logs/validate', '--validate', '30', '--epochs', '1')
    assert done.returncode == 0 and '90 images of 3 classes' in done.stdout
    f, params, records = resnet.load_net(home / 'logs/validate')
    held_out = data.hold_out(data.open_sets('folder', home / 'set')[1]()[0], 30)[1]
    assert records[-1]['test_acc'] == pytest.approx(cifar.test(f, params, held_out)[1])


def test_tensorboard_has_every_epoch_of_a_resumed_run(home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The first epoch ran without curves.
    for options in ['--epochs', '1'], ['--epochs', '2', '--resume', '--tensorboard']:
        done = command(home, '--save', 'logs/tb', '--epoch_step', '[9]', *options)
        assert done.returncode == 0, done.stderr
    curves = EventAccumulator(str(home / 'logs/tb')).Reload().Scalars('test_acc')
    logged = [r['test_acc'] for r in utils.read_log(home / 'logs/tb/log.txt')]
    assert [c.step for c in curves] == [1, 2]
    assert [c.value for c in curves] == pytest.approx(logged)


# ------------------------ other methods, other nets


def test_adapters_train_resume_and_stay_out_of_the_weights(home):
    """The student has other widths than its teacher in all groups; the run is cut off and goes on
    to the same bits."""
    options = [
        '--teacher_id',
        'teacher',
        '--method',
        'factt',
        '--beta',
        '10',
        '--epoch_step',
        '[9]',
    ]
    runs = [home / f'logs/factt_{name}' for name in ('whole', 'parts')]
    assert command(home, '--save', runs[0], *options, '--epochs', '2').returncode == 0
    for epochs in ['--epochs', '1'], ['--epochs', '2', '--resume']:
        done = command(home, '--save', runs[1], *options, *epochs)
        assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (runs[0] / 'model.hkl').read_bytes() == (runs[1] / 'model.hkl').read_bytes()
    assert log_of(runs[0], ('save', 'epochs')) == log_of(runs[1], ('save', 'epochs'))
    own = resnet.wrn(10, 0.5, 3)[1]
    assert utils.load_params(runs[0] / 'model.hkl').keys() == own.keys()
    last = utils.read_log(runs[0] / 'log.txt')[-1]
    assert last['n_parameters'] == sum(v.numel() for v in own.values() if v.requires_grad)
    assert len(last['at_losses']) == 3 and last['method'] == 'factt'
    a, b = (utils.load_checkpoint(run)['adapters'] for run in runs)
    assert {k: v.shape for k, v in a.items()} == {
        f'group{i}': (16 * 2**i, 8 * 2**i, 1, 1) for i in range(3)
    }
    assert all(torch.equal(a[k], b[k]) for k in a)
    begun = home / 'logs/factt_begun'
    assert command(home, '--save', begun, *options, '--epochs', '0').returncode == 0
    initial = utils.load_checkpoint(begun)['adapters']
    assert all((a[k] - initial[k]).abs().max() > 1e-3 for k in a)


@pytest.mark.parametrize('method', ['grad', 'sym'])
def test_what_differentiates_twice_goes_on_to_the_same_bits(home, method):
    teacher = ['--teacher_id', 'teacher'] if method == 'grad' else []
    options = [*teacher, '--method', method, '--beta', '10', '--epoch_step', '[9]', '--compile']
    runs = [home / f'logs/{method}_{name}' for name in ('whole', 'parts')]
    assert command(home, '--save', runs[0], *options, '--epochs', '2').returncode == 0
    for epochs in ['--epochs', '1'], ['--epochs', '2', '--resume']:
        done = command(home, '--save', runs[1], *options, *epochs)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert 'which is not compiled' in done.stdout and f', {method} ' in done.stdout
    assert (runs[0] / 'model.hkl').read_bytes() == (runs[1] / 'model.hkl').read_bytes()
    assert log_of(runs[0], ('save', 'epochs')) == log_of(runs[1], ('save', 'epochs'))
    assert utils.read_log(runs[0] / 'log.txt')[-1]['compile'] is False


def test_a_checkpoint_from_before_adapters_goes_on(home):
    run = home / 'logs/old'
    assert command(home, '--save', run, '--epochs', '1').returncode == 0
    checkpoint = utils.load_checkpoint(run)
    new = ['net', 'no_bn', 'no_pool_relu', 'method', 'at_map', 'at_p', 'at_groups', 'beta_decay']
    del checkpoint['adapters']
    for name in new:
        del checkpoint['options'][name]
    torch.save(checkpoint, run / 'checkpoint.pt')
    other = ['--method', 'minl2', '--beta', 1]
    error = refused(home, '--save', run, '--epochs', '2', '--resume', *other)
    assert 'differs from the run' in error
    done = command(home, '--save', run, '--epochs', '2', '--resume')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert len(utils.read_log(run / 'log.txt')) == 2


def test_beta_decays_as_logged_and_the_run_cannot_be_made_longer(home):
    options = ['--save', 'logs/decay', '--teacher_id', 'teacher', '--alpha', '0.9', '--beta', '100']
    options += ['--beta_decay', 'linear', '--resume']
    done = command(home, *options, '--epochs', '3')
    assert done.returncode == 0, done.stderr
    records = utils.read_log(home / 'logs/decay/log.txt')
    assert [r['epoch_beta'] for r in records] == [100, 50, 0]
    assert [r['beta'] for r in records] == [100] * 3
    last = records[-1]
    assert all(v > 0 for v in last['at_losses'])  # measured, though they weigh nothing
    assert '--epochs 4: beta decays over the 3 epochs' in refused(home, *options, '--epochs', 4)


@pytest.mark.parametrize('method', ['sym', 'minl2'])
def test_methods_without_a_teacher(home, method):
    options = ['--method', method, '--beta', '1', '--epochs', '1', '--save', f'logs/{method}']
    done = command(home, *options)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    (last,) = utils.read_log(home / f'logs/{method}/log.txt')
    assert len(last['at_losses']) == 1 and last['at_losses'][0] > 0
    assert last['teacher_test_acc'] is None


def test_what_is_differentiated_twice_is_not_compiled_and_says_so(home):
    options = ['--method', 'grad', '--teacher_id', 'teacher', '--beta', '1', '--epochs', '1']
    runs = [home / f'logs/grad_{name}' for name in ('eager', 'compile')]
    for run, extra in zip(runs, ([], ['--compile'])):
        done = command(home, '--save', run, *options, *extra)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert ('--compile: --method grad differentiates twice' in done.stdout) == bool(extra)
    assert (runs[0] / 'model.hkl').read_bytes() == (runs[1] / 'model.hkl').read_bytes()


def test_nets_of_either_family_teach_either(home):
    small = ['--net', 'nin', '--depth', '10', '--width', '8', '--epochs', '1']
    for name, options in (
        ('nin', small),
        ('nin_of_wrn', [*small, '--teacher_id', 'teacher', '--no_bn', '--lr', '0.01']),
        ('wrn_of_nin', ['--teacher_id', 'nin', '--beta', '100', '--alpha', '0.5', '--epochs', '1']),
        ('nin_of_nin', [*small, '--teacher_id', 'nin', '--no_pool_relu']),
    ):
        done = command(home, '--save', f'logs/{name}', *options)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        last = utils.read_log(home / f'logs/{name}/log.txt')[-1]
        assert last['net'] == ('wrn' if name == 'wrn_of_nin' else 'nin')
        assert len(last['at_losses']) == (0 if name == 'nin' else 3)
        done = command(home, '--evaluate', f'logs/{name}')
        stats = json.loads(done.stdout.splitlines()[-1].removeprefix('json_stats: '))
        assert (stats['test_acc'], stats['test_loss']) == (last['test_acc'], last['test_loss'])
    _, params, _ = resnet.load_net(home / 'logs/nin_of_wrn')
    assert nin.variant(params) == (False, False)
    assert nin.variant(resnet.load_net(home / 'logs/nin_of_nin')[1]) == (True, False)


# ------------------------ chance, kills, resuming


def test_the_same_command_gives_the_same_bits_and_another_seed_others(home):
    for name, seed in ('one', 5), ('two', 5), ('three', 6):
        assert (
            command(home, '--save', f'logs/{name}', '--seed', seed, '--epochs', '1').returncode == 0
        )
    models = [(home / f'logs/{name}/model.hkl').read_bytes() for name in ('one', 'two', 'three')]
    assert models[0] == models[1] != models[2]
    assert log_of(home / 'logs/one') == log_of(home / 'logs/two')


@pytest.mark.parametrize('dtype, kills', [('float', 3), ('bfloat16', 2)])
def test_killed_at_random_and_resumed_the_run_ends_in_the_same_bits(home, dtype, kills):
    options = ['--teacher_id', 'teacher', '--beta', '100', '--alpha', '0.5', '--epochs', '24']
    options += ['--dtype', dtype]
    whole, killed = home / f'logs/whole_{dtype}', home / f'logs/killed_{dtype}'
    assert command(home, '--save', whole, *options).returncode == 0
    rng, statuses = random.Random(dtype), []
    for _ in range(kills):
        run = start(home, '--save', killed, '--resume', *options)
        epochs = (line for line in run.stdout if line.startswith('epoch '))
        for _ in range(rng.randint(1, 5)):
            next(epochs, None)
        time.sleep(rng.uniform(0, 0.02))  # into the next epoch, or the writing of its files
        run.kill()
        run.communicate()
        statuses.append(run.returncode)
    assert -signal.SIGKILL in statuses, 'every run was over before it was killed'
    done = command(home, '--save', killed, '--resume', *options)
    assert done.returncode == 0, done.stderr
    assert log_of(killed) == log_of(whole)
    assert (killed / 'model.hkl').read_bytes() == (whole / 'model.hkl').read_bytes()


def test_killed_between_its_files_a_run_agrees_with_its_checkpoint_again(home):
    assert command(home, '--save', 'logs/torn', '--epochs', '2').returncode == 0
    folder = home / 'logs/torn'
    good = snapshot(folder)
    (folder / 'log.txt').write_text((folder / 'log.txt').read_text().splitlines()[0] + '\njson_sta')
    (folder / 'model.hkl').write_bytes(b'half')
    done = command(home, '--save', 'logs/torn', '--epochs', '2', '--resume')
    assert done.returncode == 0 and snapshot(folder) == good
    times = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert command(home, '--save', 'logs/torn', '--epochs', '2', '--resume').returncode == 0
    assert times == {f: f.stat().st_mtime_ns for f in folder.iterdir()}  # finished: untouched


def test_resume_takes_the_options_of_the_run_and_may_go_on_longer_or_elsewhere(home):
    assert (
        command(
            home, '--save', 'logs/short', '--epochs', '1', '--epoch_step', '[3]', '--seed', '3'
        ).returncode
        == 0
    )
    assert (
        command(
            home, '--save', 'logs/long', '--epochs', '2', '--epoch_step', '[3]', '--seed', '3'
        ).returncode
        == 0
    )
    before = snapshot(home / 'logs/short')
    done = command(home, '--resume', 'logs/short', '--save', 'logs/elsewhere', '--epochs', '2')
    assert done.returncode == 0, done.stderr
    assert snapshot(home / 'logs/short') == before
    assert (home / 'logs/elsewhere/model.hkl').read_bytes() == (
        home / 'logs/long/model.hkl'
    ).read_bytes()
    assert log_of(home / 'logs/elsewhere', ('save', 'epochs')) == log_of(
        home / 'logs/long', ('save', 'epochs')
    )


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_that_says_how_to_go_on(home, signum, status):
    run = start(home, '--save', f'logs/signal{status}', '--epochs', '10000')
    for line in run.stdout:
        if line.startswith('epoch 2/'):
            break
    run.send_signal(signum)
    _, error = run.communicate(timeout=300)
    assert run.returncode == status
    assert error.count('\n') == 1 and '--resume' in error and signum.name in error


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_ends_in_one_line(home, signum, status):
    run = start(home, '--save', 'logs/early')
    time.sleep(0.3)
    run.send_signal(signum)
    _, error = run.communicate(timeout=300)
    assert (run.returncode, error.count('\n')) == (status, 1) and 'cifar.py: stopped' in error


def test_two_processes_do_not_train_in_one_folder(home):
    run = start(home, '--save', 'logs/locked', '--epochs', '10000')
    for line in run.stdout:
        if line.startswith('epoch 1/'):
            break
    done = command(home, '--save', 'logs/locked', '--epochs', '10000', '--resume')
    run.kill()
    run.communicate()
    assert done.returncode == 2 and 'another process' in done.stderr


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_epoch(home, tmp_path, monkeypatch, capsys):
    """The disk is full from the third checkpoint on; a real one is tried by scripts/kill.py on a
    small tmpfs."""
    monkeypatch.chdir(home)
    fsync, epochs = os.fsync, []

    def full(fd):
        if os.readlink(f'/proc/self/fd/{fd}').endswith('checkpoint.pt.part'):
            epochs.append(1)
            if len(epochs) > 2:
                raise OSError(28, 'No space left on device')
        fsync(fd)

    monkeypatch.setattr(os, 'fsync', full)
    options = [
        '--dataset',
        'folder',
        '--dataroot',
        'set',
        *NET,
        '--epochs',
        '4',
        '--save',
        str(tmp_path / 'run'),
    ]
    assert utils.call_main(cifar.main, options) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'No space left' in error and 'checkpoint.pt' in error
    assert utils.load_checkpoint(tmp_path / 'run')['epoch'] == 2 and not list(
        (tmp_path / 'run').glob('.*')
    )
    monkeypatch.setattr(os, 'fsync', fsync)
    assert utils.call_main(cifar.main, [*options, '--resume']) == 0
    assert [r['epoch'] for r in utils.read_log(tmp_path / 'run/log.txt')] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(home):
    done = command(home, '--save', 'logs/nan', '--lr', '1e30', '--epochs', '3')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'epoch 1, step 2: not finite: loss nan, distillation nan' in done.stderr


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
    options = ['--dataset', 'folder', '--dataroot', 'set', *NET, '--teacher_id', 'teacher']
    save = tmp_path / 'run'
    assert utils.call_main(cifar.main, [*options, '--epochs', '3', '--save', str(save)]) == 1
    error = capsys.readouterr().err
    assert (
        'epoch 2, step 2: not finite: at_loss of group 2 nan;' in error and error.count('\n') == 1
    )
    assert utils.load_checkpoint(save)['epoch'] == len(utils.read_log(save / 'log.txt')) == 1


def test_a_test_loss_that_is_not_finite_is_told(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(cifar, 'test', lambda *_: (math.inf, 50.0))
    options = ['--dataset', 'folder', '--dataroot', 'set', *NET, '--epochs', '1']
    save = tmp_path / 'run'
    assert utils.call_main(cifar.main, [*options, '--save', str(save)]) == 1
    assert 'the test loss is inf' in capsys.readouterr().err and not list(save.iterdir())
    assert utils.call_main(cifar.main, [*options, '--evaluate', 'logs/teacher']) == 1
    assert 'the test loss is inf' in capsys.readouterr().err


@pytest.mark.parametrize('dtype, method', [('bfloat16', 'at'), ('float', 'factt')])
def test_compiled_and_resumed_the_bits_are_those_of_a_compiled_run(home, dtype, method):
    if not shutil.which(os.environ.get('CXX', 'g++')):
        pytest.skip('no C++ compiler here')
    options = [
        '--teacher_id',
        'teacher',
        '--beta',
        '100',
        '--method',
        method,
        '--dtype',
        dtype,
        '--compile',
        '--epoch_step',
        '[9]',
    ]
    whole, parts, eager = (
        home / f'logs/{name}_{dtype}_{method}' for name in ('compiled', 'parts', 'eager')
    )
    assert command(home, '--save', whole, *options, '--epochs', '2').returncode == 0
    assert command(home, '--save', parts, *options, '--epochs', '1').returncode == 0
    done = command(home, '--save', parts, *options, '--epochs', '2', '--resume')
    assert done.returncode == 0 and 'no working compiler' not in done.stderr
    assert (parts / 'model.hkl').read_bytes() == (whole / 'model.hkl').read_bytes()
    assert log_of(parts, ('save', 'epochs')) == log_of(whole, ('save', 'epochs'))
    options.remove('--compile')
    assert command(home, '--save', eager, *options, '--epochs', '2').returncode == 0
    losses = [utils.read_log(run / 'log.txt')[0]['train_loss'] for run in (whole, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == 'float' else 0.02)


def test_without_a_compiler_the_run_goes_on(home, tmp_path):
    env = os.environ | {
        'CXX': str(tmp_path / 'none'),
        'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'),
    }
    options = arguments('--save', 'logs/no_compiler', '--compile', '--epochs', '1')
    done = subprocess.run(options, check=False, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('\n') == 1 and '--compile: no working compiler' in done.stderr


# ------------------------ mistakes


def refused(home, *options, **kw):
    before = sorted(str(p) for p in home.rglob('*'))
    done = command(home, *options, **kw)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('cifar.py: error: '), done.stderr
    assert sorted(str(p) for p in home.rglob('*')) == before
    return done.stderr


MISTAKES = [
    (['--method', 'attention'], '--method'),
    (['--method', 'grad', '--teacher_id', 'teacher'], '--method grad: give its weight, --beta'),
    (['--method', 'factt', '--beta', '1'], '--teacher_id'),
    (
        ['--method', 'sym', '--beta', '1', '--teacher_id', 'teacher'],
        '--method sym needs no teacher',
    ),
    (['--method', 'minl2', '--beta', '1', '--at_map', 'max'], '--at_map'),
    (['--method', 'factt', '--beta', '1', '--teacher_id', 'teacher', '--at_p', '1'], '--at_p'),
    (['--method', 'sym', '--beta', '1', '--at_groups', '0'], '--at_groups'),
    (['--teacher_id', 'teacher', '--at_groups', '3'], '--at_groups'),
    (['--teacher_id', 'teacher', '--at_groups', '0,0'], '--at_groups'),
    (['--teacher_id', 'teacher', '--at_groups', '[0,1'], '--at_groups'),
    (['--teacher_id', 'teacher', '--beta_decay', 'step', '--epochs', '1'], '--beta_decay step'),
    (['--teacher_id', 'teacher', '--at_p', '0'], '--at_p'),
    (['--beta_decay', 'linear'], '--beta_decay'),
    (['--at_map', 'max'], '--at_map: has no effect without a teacher'),
    (
        [
            '--teacher_id',
            'teacher',
            '--beta_decay',
            'step',
            '--beta',
            '1',
            '--epochs',
            '2',
            '--epoch_step',
            '[3]',
        ],
        '--beta_decay step',
    ),
    (['--no_bn'], '--no_bn: is for --net nin'),
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
    """The refusal of cifar.main in this process: a subprocess costs two seconds. Some mistakes go
    through the real command below."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, 'argv', ['cifar.py'])
    before = sorted(str(p) for p in home.rglob('*'))
    status = utils.call_main(
        cifar.main, ['--dataset', 'folder', '--dataroot', 'set', *NET, *options]
    )
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
    assert 'depth 11' in refused(home, '--depth', '11')
    assert 'nobody' in refused(home, '--teacher_id', 'nobody')


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
            params = utils.load_params(folder / 'model.hkl')
            model(params)
            utils.save_params(folder / 'model.hkl', params)
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
    # Sizes that are checked before anything of them is allocated.
    vast = 'json_stats: {"depth": 9994, "width": 64}\n'
    cases.append((teacher('log_vast', log=vast), 'says 9994 and 64'))
    for options, named in cases:
        assert named in in_process(home, options, capsys, monkeypatch)


def test_a_log_with_odd_values_is_named_by_evaluate(home, capsys, monkeypatch):
    for name, value in ('dataset', 'imagenet'), ('dataset', 3), ('dataroot', 5), ('validate', 'x'):
        folder = home / 'logs' / f'odd_{name}_{value}'
        shutil.copytree(home / 'logs/teacher', folder)
        record = utils.read_log(folder / 'log.txt')[0] | {name: value}
        (folder / 'log.txt').write_text(utils.json_stats(record) + '\n')
        monkeypatch.chdir(home)
        assert utils.call_main(cifar.main, ['--evaluate', str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and f'give --{name}' in error and str(value) in error


def test_images_of_a_run_that_are_not_here_are_named_by_evaluate(home, capsys, monkeypatch):
    folder = home / 'logs' / 'moved'
    shutil.copytree(home / 'logs/teacher', folder)
    record = utils.read_log(folder / 'log.txt')[0] | {'dataroot': '/nowhere/set'}
    (folder / 'log.txt').write_text(utils.json_stats(record) + '\n')
    monkeypatch.chdir(home)
    assert utils.call_main(cifar.main, ['--evaluate', str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'its images, /nowhere/set, are not there' in error
    assert utils.call_main(cifar.main, ['--evaluate', str(folder), '--dataroot', 'set']) == 0


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
    for options in (
        ['--save', locked / 'x'],
        ['--resume', locked / 'x'],
        ['--evaluate', locked / 'x'],
    ):
        words = [*as_nobody, *arguments(*options, dataset=('--dataset', 'shapes'))]
        env = os.environ | {'HOME': '/nowhere'}
        done = subprocess.run(words, check=False, cwd='/', env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
        assert 'locked' in done.stderr
    os.chmod(locked, 0o755)


def test_a_run_of_no_epochs_goes_on_with_the_drops_of_its_new_length(home):
    assert command(home, '--save', 'logs/nothing', '--epochs', '0').returncode == 0
    done = command(home, '--save', 'logs/nothing', '--epochs', '4', '--resume')
    assert done.returncode == 0 and 'in place of' not in done.stdout, done.stderr
    records = utils.read_log(home / 'logs/nothing/log.txt')[1:]
    assert [r['lr'] for r in records] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert records[0]['epoch_step'] == [2, 3, 4]


def test_a_resumed_run_on_other_classes_is_told_of_the_data(home, tmp_path, capsys, monkeypatch):
    make_images(tmp_path / 'two', per_class=8, classes=('cat', 'dog'))
    options = ['--save', 'logs/teacher', '--epochs', '3', '--width', '1', '--resume']
    error = in_process(home, [*options, '--dataroot', str(tmp_path / 'two')], capsys, monkeypatch)
    assert 'the data of --dataroot' in error


def test_a_net_for_photographs_is_not_for_this_script(home, capsys, monkeypatch):
    utils.save_params(home / 'photographs.hkl', resnet.resnet(18, 0.125, 3)[1])
    error = in_process(home, ['--evaluate', 'photographs.hkl'], capsys, monkeypatch)
    assert 'imagenet.py tests it' in error
    (home / 'photographs.hkl').unlink()


def test_other_classes_matter_with_alpha_alone(home, tmp_path, capsys, monkeypatch):
    make_images(tmp_path / 'two', per_class=8, classes=('cat', 'dog'))
    two = ['--dataroot', str(tmp_path / 'two'), '--teacher_id', 'teacher', '--epochs', '1']
    error = in_process(home, [*two, '--alpha', '0.9'], capsys, monkeypatch)
    assert '--alpha' in error and 'cat, dog' in error
    monkeypatch.chdir(home)
    options = ['--dataset', 'folder', *NET, *two, '--beta', '100', '--save', str(tmp_path / 'run')]
    assert utils.call_main(cifar.main, options) == 0
    assert utils.read_log(tmp_path / 'run/log.txt')[0]['teacher_test_acc'] is None


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
    assert 'nowhere' in in_process(
        home, ['--dataroot', str(tmp_path / 'nowhere')], capsys, monkeypatch
    )


def test_other_data_or_another_teacher_cannot_go_on(home, tmp_path, capsys, monkeypatch):
    assert (
        command(home, '--save', 'logs/facts', '--teacher_id', 'teacher', '--epochs', '1').returncode
        == 0
    )
    shutil.copytree(home / 'set', tmp_path / 'set')
    cv2.imwrite(str(tmp_path / 'set/train/cat/000.png'), np.zeros((12, 12, 3), np.uint8))
    go_on = ['--save', 'logs/facts', '--resume', '--epochs', '2']
    assert 'dataroot' in in_process(
        home, [*go_on, '--dataroot', str(tmp_path / 'set')], capsys, monkeypatch
    )
    teacher = home / 'logs/teacher/model.hkl'
    whole = teacher.read_bytes()
    params = utils.load_params(teacher)
    params['fc.bias'] += 1
    utils.save_params(teacher, params)
    assert 'teacher_id' in in_process(home, go_on, capsys, monkeypatch)
    teacher.write_bytes(whole)


def test_damaged_checkpoints_are_refused_and_kept(home, capsys, monkeypatch):
    assert command(home, '--save', 'logs/hurt', '--epochs', '1').returncode == 0
    path = home / 'logs/hurt/checkpoint.pt'
    whole = path.read_bytes()
    go_on = ['--save', 'logs/hurt', '--resume', '--epochs', '2']
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


OPTIONS = sorted(
    s
    for a in cifar.parser._actions
    for s in a.option_strings
    if s not in ('-h', '--help', '--save')
)


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
    """Whatever is typed, the options are taken, or refused by a UserError: here up to where data
    and teacher are opened."""
    folder = tmp_path_factory.getbasetemp() / 'options'
    folder.mkdir(exist_ok=True)
    argv = [word for pair in options for word in pair]
    try:
        opt, given_options = cifar.parser.parse(argv)
        opt.save = str(folder / 'none')
        utils.find_checkpoint(
            opt, given_options, cifar.parser, lambda opt: cifar.complete(opt).save
        )
        done = cifar.complete(opt)
        done.save = ''
        assert len(cifar.complete(done).save) < 210
    except utils.UserError:
        pass


def test_the_names_of_runs_tell_them_apart():
    def name(*options):
        return cifar.complete(cifar.parser.parse_args(options)).save

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
    assert name('--compile', '--nthread', '1') == name(), 'what does not matter is not in it'


def test_the_published_commands_parse():
    for line in (
        '--save logs/resnet_16_2_teacher --depth 16 --width 2',
        '--save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3',
        '--save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9',
        '--save logs/atkd --teacher_id resnet_16_2_teacher --alpha 0.9 --beta 1e+3 --gpu_id 0,1 --ngpu 2 --cuda --nthread 4',
        '--dataset CIFAR100 --dataroot . --epoch_step [60,120,160] --randomcrop_pad 4 --temperature 4 --dtype float',
    ):
        opt = cifar.complete(cifar.parser.parse(line.split())[0])
        assert opt.epoch_step == [60, 120, 160] and (opt.beta == 1000 or 'beta' not in line)
