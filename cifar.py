"""Attention transfer on CIFAR: train a teacher, or a student that learns from one.

    # a teacher
    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2
    # a student: attention transfer, knowledge distillation, full-activation transfer
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9
    python cifar.py --save logs/f --teacher_id resnet_16_2_teacher --beta 1e+3 --method factt
    # test a run or a weights file
    python cifar.py --evaluate logs/at_16_1_16_2

Add --resume to continue a run that was stopped. --dtype bfloat16 --compile is fastest on a GPU, or
on a CPU with instructions for bfloat16. Without a network, use --dataset folder or shapes.

At half the image side, the same --beta counts four times as much. For images of SxS pixels we
recommend 1e+3 * (S / 32)^2 with --method at and factt.
"""

from support import program

program.start(__name__)

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import nin
import resnet
import utils
from support import devices, logs, options, runs, teachers, weights
from support.averages import Averages
from support.options import number
from support.program import UserError, check_reachable

PUBLISHED = [60, 120, 160], 200  # drops of the learning rate, epochs


class Method(NamedTuple):
    """A loss that --beta weighs; student_loss computes it."""

    teacher: bool  # whether it needs one
    options: tuple  # those of --at_map, --at_p, --at_groups and --beta_decay that it uses
    gradient: bool = False  # whether it differentiates the gradient of the input


METHODS = {
    'at': Method(True, ('at_map', 'at_p', 'at_groups', 'beta_decay')),  # attention maps
    'factt': Method(True, ('at_groups', 'beta_decay')),  # full activations
    'grad': Method(True, ('beta_decay',), gradient=True),  # gradients of the input
    'sym': Method(False, ('beta_decay',), gradient=True),  # symmetry of that gradient
    'minl2': Method(False, ('beta_decay',), gradient=True),  # square of that gradient
}


# ------------------------ options

parser = options.Parser(__doc__)
add = parser.add_argument_group('net').add_argument
add(
    '--net',
    default='wrn',
    choices=['wrn', 'nin'],
    help='wrn: Wide ResNet; nin: network in network (default: wrn)',
)
add(
    '--depth',
    type=number(int, 1),
    help='layers of a Wide ResNet, 6n + 4 (paper: 16 and 40; default: 16)',
)
add(
    '--width',
    type=number(above=0),
    help='WRN: factor of the 16, 32, 64 channels (1); NIN: number of channels (96; wide: 192)',
)
add('--no_bn', action='store_true', help='NIN without batch norm: the student of Table 3')
add(
    '--no_pool_relu',
    action='store_true',
    help='NIN without the batch norm and ReLU before each pooling: a teacher of Table 3',
)
add = parser.add_argument_group('data').add_argument
add(
    '--dataset',
    default='CIFAR10',
    choices=['CIFAR10', 'CIFAR100', 'folder', 'shapes'],
    help='folder: DATAROOT/{train,test}/CLASS/*; shapes: generated images (default: CIFAR10)',
)
add('--dataroot', default='.', help="folder of the data set's files (default: .)")
options.add_validate(add)
add(
    '--randomcrop_pad',
    default=4,
    type=number(int, 0),
    help='pixels of reflected border before the random crop (paper, default: 4)',
)
add = parser.add_argument_group('teacher').add_argument
add(
    '--teacher_id',
    default='',
    metavar='ID|DIR|FILE',
    help='the teacher: logs/ID, a run folder, or a weights file (default: none)',
)
options.add_loss_options(add, paper_alpha='0.9')
add(
    '--beta_decay',
    default='none',
    choices=['none', 'linear', 'cosine', 'step'],
    help='lower --beta to 0 during the run; step: at each epoch of --epoch_step (default: none)',
)
add(
    '--method',
    default='at',
    choices=METHODS,
    help='at: attention maps; factt: activations; grad, sym, minl2: input gradients (default: at)',
)
add(
    '--at_map',
    default='sum',
    choices=['sum', 'max'],
    help='a map is the sum or the maximum over channels of |activation|^p (default: sum)',
)
add(
    '--at_p',
    default=2.0,
    type=number(above=0, high=64),
    help='exponent p of |activation|^p (paper: 1, 2 and 4; default: 2)',
)
add(
    '--at_groups',
    default=[0, 1, 2],
    type=options.group_list(3),
    metavar='LIST',
    help='groups that at and factt transfer, such as 2 or 0,1 (paper, default: 0,1,2)',
)
options.add_training_options(parser, 128, 0.1, 5e-4, PUBLISHED, lr_decay_ratio=0.2)


def complete(opt, given: set) -> argparse.Namespace:
    """Fill in options that depend on others; reject contradictions.

    given: the names of the options on the command line. Raises UserError.
    """
    opt = argparse.Namespace(**vars(opt))
    method = METHODS[opt.method]
    depth, width, check = {
        'wrn': (16, 1.0, resnet.check_wrn),
        'nin': (nin.DEPTH, 96.0, nin.check_nin),
    }[opt.net]
    opt.depth, opt.width = opt.depth or depth, opt.width or width
    check(opt.depth, opt.width)
    for name in 'no_bn', 'no_pool_relu':
        if getattr(opt, name) and opt.net != 'nin':
            raise UserError(f'--{name}: has no effect without --net nin')
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(*PUBLISHED, opt.epochs)
    if opt.method != 'at' and not opt.beta:
        raise UserError(f'--method {opt.method}: needs a weight: give --beta')
    options.complete_losses(opt, 'teacher_id', beta_alone=not method.teacher)
    for name in ('at_map', 'at_p', 'at_groups', 'beta_decay'):
        if name in given and name not in method.options:
            raise UserError(f'--{name}: has no effect with --method {opt.method}')
    for name in ('at_map', 'at_p', 'at_groups'):
        if name in given and not opt.teacher_id:
            raise UserError(f'--{name}: has no effect without a teacher, --teacher_id')
    if opt.beta_decay != 'none' and not opt.beta:
        raise UserError(f'--beta_decay {opt.beta_decay}: has no effect without --beta')
    drops = any(1 < step <= opt.epochs for step in opt.epoch_step)
    if opt.beta_decay == 'step' and opt.epochs and not drops:
        raise UserError('--beta_decay step: needs a drop in --epoch_step, from epoch 2 to --epochs')
    if not opt.save:
        opt.save = os.path.join('logs', run_name(opt))
    return opt


def run_name(opt) -> str:
    """CIFAR10_wrn-16-1_resnet_16_2_teacher_beta1000_seed0: data, net, teacher, and every option
    that is not as published."""
    root = f'-{Path(opt.dataroot).resolve().name}' if opt.dataset == 'folder' else ''
    parts = [opt.dataset + root, net_name(opt), options.without_suffix(opt.teacher_id)]
    named = {'dataset', 'net', 'depth', 'width', 'teacher_id'}
    return options.run_name(parts, named, opt, parser, PUBLISHED)


def net_name(opt) -> str:
    return f'nin-{opt.width:g}' if opt.net == 'nin' else f'wrn-{opt.depth}-{opt.width:g}'


# ------------------------ nets and data


class Nets(NamedTuple):
    """The nets of a run; see resnet.py for the functions."""

    student: Callable
    teacher: Callable | None
    params: dict  # of both and of the adapters: student.*, teacher.*, adapter.*


def teacher_path(teacher_id: str) -> str:
    """The path of --teacher_id: logs/ID, a run folder or a weights file."""
    path = os.path.join('logs', teacher_id)
    return path if os.path.exists(weights.split_key(path)[0]) else teacher_id


def load_teacher(teacher_id: str) -> weights.Net:
    """The net of --teacher_id."""
    path = teacher_path(teacher_id)
    if not weights.exists(path, '--teacher_id'):
        check_reachable(os.path.join('logs', teacher_id), '--teacher_id')
        raise UserError(
            f'--teacher_id {teacher_id}: no such run folder or weights file, here or in logs/'
        )
    photographs = 'is a net for photographs: use it as a teacher in imagenet.py'
    return weights.load_net_for('--teacher_id', path, resnet.SMALL, photographs)


def open_sets(opt, option: str, net: weights.Net | None) -> tuple[data.ImageSet, data.ImageSet]:
    """(training set, test set); with --validate both are parts of the training set.

    Raises UserError, before any image is decoded, if the outputs of `net`, which `option` names,
    do not mean the classes of the set.
    """
    classes, load = data.open_sets(opt.dataset, opt.dataroot, opt.nthread)
    if net:
        teachers.check_classes(option, net, classes)
    train_set, test_set = load()
    return data.hold_out(train_set, opt.validate) if opt.validate else (train_set, test_set)


def new_student(opt, num_classes: int, teacher: weights.Net | None) -> tuple[Callable, dict, dict]:
    """(f, params, adapters) with the initial values of --seed."""
    teachers.seed_initial_values(opt, teacher)
    bn, pool_relu = not opt.no_bn, not opt.no_pool_relu
    f, params = resnet.new_net(opt.net, opt.depth, opt.width, num_classes, bn, pool_relu)
    return f, params, make_adapters(opt, f, params, teacher)


def make_adapters(opt, f: Callable, params: dict, teacher: weights.Net | None) -> dict:
    """{'group0': [C', C, 1, 1]}: the 1x1 convolutions of --method factt, from the student's
    channels to the teacher's, for the groups where these differ."""
    if opt.method != 'factt':
        return {}
    channels = resnet.group_channels(f, params)
    channels_t = resnet.group_channels(teacher.f, teacher.params)
    adapters = {}
    for i in opt.at_groups:
        if channels[i] != channels_t[i]:
            adapter = utils.conv_params(channels[i], channels_t[i])
            adapters[f'group{i}'] = adapter.requires_grad_()
    return adapters


@torch.no_grad()
def check_batches(opt, f: Callable, params: dict, images: torch.Tensor) -> None:
    """Raise UserError if batch norm would get a single 1x1 map in training: a batch of one image
    if the last group has one pixel."""
    n, H, W, _ = images.shape
    params = {k: v.to('meta') for k, v in params.items()}
    _, groups = f(torch.empty(1, 3, H, W, device='meta'), params, False)
    if not any(map(utils.is_statistic, params)) or groups[-1][0, 0].numel() > 1:
        return

    def works(batch_size):
        batches = torch.arange(n).split(batch_size)
        parts = [part for i in (0, -1) for part in batches[i].chunk(opt.ngpu)]
        return min(map(len, parts)) > 1

    if opt.epochs and not works(opt.batch_size):
        good = next(filter(works, range(opt.batch_size + 1, n + 1)), None)
        raise UserError(
            f'--batch_size {opt.batch_size}: the last batch would have one image, and batch norm '
            f'cannot train on one {W}x{H} image; '
            + (f'use --batch_size {good}' if good else f'{n} training images are too few')
        )


# ------------------------ the student's loss


def student_loss(batch: tuple, params: dict, training: bool, beta, nets: Nets, opt) -> list:
    """The terms of the student's loss, 0-dim tensors: [loss, distillation, transfer losses
    before --beta, accuracy in per cent].

    batch   (augmented images uint8 [B, H, W, 3], targets int64 [B])
    params  those of `nets`, or a copy on another GPU
    beta    weight of the transfer in this epoch, a 0-dim tensor
    training  whether batch norm uses the batch's statistics

    A teacher's maps are measured even if only --alpha is given.
    """
    images, targets = batch
    x = utils.cast(data.normalize(images), opt.dtype)
    student = partial(nets.student, params=params, training=training, base='student.')
    teacher = nets.teacher and partial(nets.teacher, params=params, training=False, base='teacher.')
    y_t = g_t = None

    if METHODS[opt.method].gradient:
        y_s, _, J_s = utils.input_gradient(student, x, targets, create_graph=True)
    else:
        y_s, g_s = student(x)
    if teacher and opt.method != 'grad':
        with torch.no_grad():
            y_t, g_t = teacher(x)

    transfer = []
    if opt.method == 'at' and teacher:
        transfer = [utils.at_loss(g_s[i], g_t[i], opt.at_p, opt.at_map) for i in opt.at_groups]
    elif opt.method == 'factt':
        adapters = {i: params.get(f'adapter.group{i}') for i in opt.at_groups}
        transfer = [utils.factt_loss(g_s[i], g_t[i], adapters[i]) for i in opt.at_groups]
    elif opt.method == 'grad':
        y_t, _, J_t = utils.input_gradient(teacher, x, targets)
        transfer = [utils.gradient_loss(J_s, J_t)]
    elif opt.method == 'sym':
        _, _, J_flipped = utils.input_gradient(student, x.flip(3), targets, create_graph=True)
        transfer = [utils.symmetry_loss(J_s, J_flipped)]
    elif opt.method == 'minl2':
        transfer = [utils.min_l2_loss(J_s)]

    loss = task = utils.distillation(y_s, y_t, targets, opt.temperature, opt.alpha)
    if opt.beta:
        loss = task + beta.to(task.device) * sum(transfer)
    accuracy = 100 * (y_s.detach().argmax(1) == targets).float().mean()
    return [loss, task, *transfer, accuracy]


def make_loss(nets: Nets, opt, device_ids: list) -> Callable:
    """loss_of(images, index, draws, targets, beta) -> (loss, detached terms float32 [terms]): the
    augmentation of images[index] and their student_loss. This is what --compile compiles."""

    def loss_of(images, index, draws, targets, beta):
        x = data.augment(images, index, draws, opt.randomcrop_pad)
        f = partial(student_loss, beta=beta, nets=nets, opt=opt)
        loss, *terms = utils.data_parallel(f, (x, targets), nets.params, True, device_ids)
        return loss, torch.stack([loss, *terms]).detach()

    return loss_of


def term_names(opt) -> list[str]:
    """The names of student_loss's terms."""
    names = [f'at_loss of group {i}' for i in opt.at_groups] if opt.teacher_id else []
    if 'at_groups' not in METHODS[opt.method].options:
        names = [f'--method {opt.method}']
    return ['loss', utils.task_name(opt), *names, 'accuracy']


# ------------------------ training and testing


def make_step(loss_of: Callable, train_set: data.ImageSet, optimizer, graphed: bool) -> Callable:
    """step(index, draws, beta) -> terms: one step of SGD on the images [index].

    graphed: replay it as a CUDA graph.
    """
    images, labels, _ = train_set

    def step(index, draws, beta):
        loss, terms = loss_of(images, index, draws, labels[index], beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return terms

    return devices.Graphed(step) if graphed else step


def train_epoch(step: Callable, train_set: data.ImageSet, run: runs.Run) -> dict:
    """One pass over the training set: {train_loss, train_acc, at_losses}, averages over images.

    Raises UserError, status 1, if a term of the loss is not finite.
    """
    opt, epoch = run.opt, run.epoch + 1
    n, device = len(train_set.labels), train_set.labels.device
    order = data.epoch_order(n, opt.seed, epoch)
    draws = data.crop_and_flip(n, opt.seed, epoch, opt.randomcrop_pad)[order]
    batches, draws = (v.to(device).split(opt.batch_size) for v in (order, draws))
    beta = torch.tensor(utils.epoch_beta(epoch, opt), device=device)
    averages = Averages(term_names(opt), epoch, opt.save)
    with data.Progress(n, f'epoch {epoch}/{opt.epochs}') as progress:
        for i, (index, drawn) in enumerate(zip(batches, draws), 1):
            averages.add(step(index, drawn, beta), len(index))
            note = ''
            # Not in every step, because reading stops the device.
            if i in (1, len(batches)) or i % 20 == 0 or progress.is_due():
                loss, *_, accuracy = averages.update().tolist()
                left = run.time_left((progress.done + len(index)) / n)
                note = f'loss {loss:.3f}, accuracy {accuracy:.1f} %, {left}'
            progress.update(len(index), note)
    train_loss, _, *at_losses, train_acc = averages.means(n)
    return {'train_loss': train_loss, 'train_acc': train_acc, 'at_losses': at_losses}


@torch.inference_mode()
def test(f: Callable, params: dict, test_set: data.ImageSet) -> tuple[float, float]:
    """(mean cross-entropy, top-1 accuracy in per cent) of a net in float32."""
    images, labels, _ = test_set
    losses, correct = [], 0
    size = 1000 if images.is_cuda else 250  # enough for a GPU; fits into a CPU's cache
    pixels = images[0, ..., 0].numel()  # bounds the memory if they are more than CIFAR's
    size = max(1, min(size, size * 32**2 // pixels))
    for x, targets in zip(images.split(size), labels.split(size)):
        logits, _ = f(data.normalize(x), params, False)
        losses.append(F.cross_entropy(logits, targets, reduction='sum'))
        correct += (logits.argmax(1) == targets).sum()
    total_loss = float(torch.stack(losses).cpu().double().sum())
    return total_loss / len(labels), 100 * int(correct) / len(labels)


def test_teacher(opt, teacher: weights.Net, nets: Nets, test_set) -> float | None:
    """The teacher's test accuracy in per cent, None if its classes differ. Warns if its log has
    another accuracy."""
    if not teachers.can_be_tested(opt.teacher_id, teacher, test_set.classes):
        return None
    _, acc = test(nets.teacher, utils.part(nets.params, 'teacher'), test_set)
    print(f'teacher {opt.teacher_id}: test accuracy {acc:.2f} %')
    last = teacher.records[-1] if teacher.records else {}
    logged = last.get('test_acc')
    known = isinstance(logged, (int, float)) and math.isfinite(logged)
    comparable = known and last.get('validate', 0) == opt.validate
    source = f'teacher {opt.teacher_id}'
    if comparable and not acc - 0.1 <= logged <= acc + 0.1:
        of = last.get('dataset', 'its data')
        of = last.get('dataroot', of) if of == 'folder' else of
        print(
            f'warning: {source} has test accuracy {acc:.2f} %, but its own log says '
            f'{str(logged)[:6]} % on {of}: check its weights and the data',
            file=sys.stderr,
        )
    else:
        stated = logged if comparable else weights.stated_accuracy(teacher_path(opt.teacher_id))
        teachers.warn_of_accuracy(source, teacher, acc, len(test_set.labels), stated)
    return acc


def end_epoch(run: runs.Run, trained: dict, nets: Nets, optimizer, test_set):
    """Test the student after an epoch of training, and write the run folder."""
    opt, epoch = run.opt, run.epoch + 1
    train_time, start = run.train_time(), time.monotonic()
    test_loss, test_acc = test(nets.student, utils.part(nets.params, 'student'), test_set)
    stats = trained | {
        'test_loss': test_loss,
        'test_acc': test_acc,
        'lr': utils.learning_rate(epoch, opt),
        'epoch_beta': utils.epoch_beta(epoch, opt),
    }
    times = {'train_time': train_time, 'test_time': time.monotonic() - start}
    run.end_epoch(stats, times, nets.params, optimizer)


# ------------------------ main


def evaluate(opt, given: set) -> None:
    """--evaluate: test a net and print one json_stats line. Without options the data set is that
    of the run's log."""
    device, _ = devices.choose_device(opt)
    photographs = 'is a net for photographs: test it with imagenet.py'
    net = weights.load_net_for('--evaluate', opt.evaluate, resnet.SMALL, photographs)
    source, record = f'--evaluate {opt.evaluate}', net.records[0] if net.records else {}
    if 'dataset' not in given or opt.dataset == record.get('dataset'):
        names = {'dataset', 'dataroot', 'validate'}
        opt = options.logged_options(opt, given, opt.evaluate, record, parser, names)
        if opt.dataset == 'folder' and 'dataroot' not in given:
            folder = record.get('dataroot', '.')
            logs.check_logged_folder(source, 'images', folder, 'another data set with --dataset')
    _, test_set = open_sets(opt, source, net)
    test_set, net = test_set.to(device), net._replace(params=devices.to_device(net.params, device))
    start = time.monotonic()
    test_loss, test_acc = test(net.f, net.params, test_set)
    seconds = time.monotonic() - start
    tested = {
        'dataset': opt.dataset,
        'validate': opt.validate,
        'test_acc': test_acc,
        'test_loss': test_loss,
    }
    if not net.records:
        stated = weights.stated_accuracy(opt.evaluate)
        teachers.warn_of_accuracy(source, net, test_acc, len(test_set.labels), stated)
    size = test_set.images.shape[1:3]
    teachers.print_evaluation(opt.evaluate, net, size, tested, len(test_set.labels), seconds)


def prepare(run: runs.Run, device) -> tuple[Nets, data.ImageSet, data.ImageSet]:
    """(nets, training set, test set) on the device: new, or as the checkpoint has them."""
    opt = run.opt
    teacher = teachers.load_teacher(run, 'teacher_id', load_teacher)
    option = '--alpha' if opt.alpha else f'--method {opt.method}'
    needs_classes = opt.alpha or opt.method == 'grad'
    sets = open_sets(
        opt, f'--teacher_id {opt.teacher_id} with {option}', teacher if needs_classes else None
    )
    H, W = sets[0].images.shape[1:3]
    if opt.randomcrop_pad >= min(H, W):
        raise UserError(
            f'--randomcrop_pad {opt.randomcrop_pad}: must be smaller than the images, {W}x{H} here'
        )
    f, params_s, adapters = new_student(opt, len(sets[0].classes), teacher)
    check_batches(opt, f, params_s, sets[0].images)
    params_t = teacher.params if teacher else {}
    arrays = [v for images, labels, _ in sets for v in (images, labels)]
    run.check_facts(data=weights.checksum(arrays), teacher=weights.checksum(params_t.values()))
    parts = {
        'student': run.restore(params_s),
        'teacher': params_t,
        'adapter': run.restore(adapters, 'adapters'),
    }
    params = utils.flatten({k: devices.to_device(v, device) for k, v in parts.items()})
    nets = Nets(f, teacher and teacher.f, params)
    train_set, test_set = (s.to(device) for s in sets)
    if teacher and not run.checkpoint:
        shape, classes = test_set.images.shape[1:3], test_set.classes
        teachers.warn_of_training(opt.teacher_id, teacher, opt.validate, classes, shape)
        run.facts['teacher_test_acc'] = test_teacher(opt, teacher, nets, test_set)
    return nets, train_set, test_set


def main(argv=None):
    program.expect_one_process(argv)
    opt, given = parser.parse(argv)
    if opt.evaluate:
        return evaluate(opt, given)
    run = runs.begin(opt, given, parser, complete)
    if run is None:  # it is finished
        return
    opt = run.opt
    device, device_ids = devices.choose_device(opt)
    devices.keep_freed_memory()
    devices.warn_of_slow_dtype(opt.dtype, device)

    nets, train_set, test_set = prepare(run, device)
    params_s, shape = utils.part(nets.params, 'student'), list(train_set.images.shape[1:3])
    run.describe(params_s, train_set.classes, device, image_shape=shape)
    loss_of = make_loss(nets, opt, device_ids)
    compilable = not METHODS[opt.method].gradient
    if opt.compile and not compilable:
        print(
            f'--compile: --method {opt.method} differentiates twice, '
            'which cannot be compiled; continuing without --compile'
        )
    compiled = devices.compiled(loss_of, device) if opt.compile and compilable else loss_of
    run.options['compile'] = compiled is not loss_of
    if compiled is not loss_of:
        run.notes.append(devices.COMPILING)
    graphed = compiled is not loss_of and device.type == 'cuda'
    optimizer = utils.make_optimizer(nets.params, opt, epoch=1)
    run.restore_optimizer(optimizer)
    step = make_step(compiled, train_set, optimizer, graphed)

    with run.opened():
        print(
            f'{net_name(opt).upper()}: {run.about["n_parameters"]:,} parameters; '
            f'{len(train_set.labels):,} images of {len(train_set.classes)} classes; '
            f'{run.rates()}'
        )
        if opt.epochs == 0:  # test and save the untrained net
            untrained = {'train_loss': None, 'train_acc': None, 'at_losses': []}
            end_epoch(run, untrained, nets, optimizer, test_set)
        for epoch in range(run.epoch + 1, opt.epochs + 1):
            if epoch in opt.epoch_step:  # a new optimizer: momentum restarts, as published
                optimizer = utils.make_optimizer(nets.params, opt, epoch)
                step = make_step(compiled, train_set, optimizer, graphed)
            run.start_epoch()
            trained = train_epoch(step, train_set, run)
            end_epoch(run, trained, nets, optimizer, test_set)
        run.print_end()


if __name__ == '__main__':
    sys.exit(program.call_main(main))
