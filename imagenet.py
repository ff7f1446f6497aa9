"""Attention transfer on ImageNet, or any folders of photographs: train a student, alone or with a
teacher from a file, or fine-tune a net.

    # a student alone, and with attention transfer
    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --save logs/resnet_18
    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --save logs/at_18_34 \\
        --teacher_params resnet-34-export.hkl --beta 1e+3 --gpu_id 0,1 --ngpu 2
    # one process per GPU; torchrun's own options add machines
    torchrun --nproc_per_node 8 imagenet.py ...
    # test a weights file
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate resnet-34-export.hkl

A checkpoint is written every --checkpoint_minutes and when a signal stops the run. Add --resume to
continue at that step.

At half the image side, the same --beta counts four times as much. For --image_size S we recommend
1e+3 * (S / 224)^2 and --at_groups 2,3. This setting was reproduced independently; we know of no
reproduction with all four groups.
"""

import signal

from support import program

program.start(__name__, ignored=(signal.SIGUSR1,))

import argparse
import contextlib
import os
import re
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import resnet
import utils
from support import devices, logs, options, photographs, ranks, runs, teachers, weights
from support.averages import Averages
from support.checkpoints import Checkpoints, resumed_sums
from support.options import number
from support.photographs import Sets
from support.program import UserError

PUBLISHED = [30, 60, 90], 100  # drops of the learning rate, epochs
LARGE = ('resnet', 'folded', 'affine')  # layouts of nets for photographs
TRAIN_CROPS = {'resized': photographs.train_view, 'plain': photographs.plain_train_view}
# Top-1 error in per cent, single crop, by layout, depth and width: the releases, and torchvision's
# first weights.
KNOWN_ERRORS = {
    ('folded', 18, 1): 30.4,
    ('folded', 34, 1): 26.72,
    ('affine', 18, 1): 29.3,
    ('resnet', 18, 1): 30.24,
    ('resnet', 34, 1): 26.69,
    ('resnet', 50, 1): 23.87,
    ('resnet', 101, 1): 22.63,
    ('resnet', 152, 1): 21.69,
    ('resnet', 50, 2): 21.53,
}


# ------------------------ options

parser = options.Parser(__doc__)
add = parser.add_argument_group('net').add_argument
add(
    '--depth',
    default=18,
    type=number(int, 1),
    help='layers of the ResNet: 18, 34, 50, 101 or 152 (paper, default: 18)',
)
add(
    '--width',
    default=1.0,
    type=number(above=0),
    help='factor of its channels (paper, default: 1)',
)
add(
    '--student_params',
    default='',
    metavar='FILE',
    help='weights that the student starts from (default: random)',
)
add(
    '--finetune',
    action='store_true',
    help='replace the head of --student_params; fix batch norm and the first group (Table 4)',
)
add = parser.add_argument_group('data').add_argument
add(
    '--imagenetpath',
    metavar='DIR',
    help='photographs: DIR/train/CLASS/* and DIR/val/CLASS/* (or test)',
)
add(
    '--image_size',
    default=224,
    type=number(int, 33, 1024),
    help='side of the crops; tests resize the shorter side to 256/224 of it (default: 224)',
)
add(
    '--train_crop',
    choices=list(TRAIN_CROPS),
    help='random crops, of any scale (resized) or of one (plain, default with --finetune)',
)
options.add_validate(add)
add(
    '--check_images',
    action='store_true',
    help='decode every image before training, and list the broken ones',
)
add(
    '--skip_broken',
    action='store_true',
    help='replace broken images by others of their classes, unless 10 or more and over 1 %% of the '
    'set are broken (default: stop with an error)',
)
add = parser.add_argument_group('teacher').add_argument
add(
    '--teacher_params',
    default='',
    metavar='FILE',
    help='the teacher: a run folder or a weights file, see docs/weights.md (default: none)',
)
options.add_loss_options(add, paper_alpha='did not help')
add(
    '--at_groups',
    default=[0, 1, 2, 3],
    type=options.group_list(4),
    metavar='LIST',
    help='groups to transfer; we recommend 2,3 (published, default: 0,1,2,3)',
)
add(
    '--at_start',
    default=1,
    type=number(int, 1),
    metavar='EPOCH',
    help='first epoch with attention transfer (paper: 60; published code, default: 1)',
)
options.add_training_options(parser, 256, 0.1, 1e-4, PUBLISHED, lr_decay_ratio=0.1)
parser.add_argument(
    '--checkpoint_minutes',
    default=10.0,
    type=number(above=0),
    help='minutes between checkpoints inside an epoch (default: 10)',
)


def complete(opt, given: set) -> argparse.Namespace:
    """Fill in options that depend on others; reject contradictions.

    given: the names of the options on the command line. Raises UserError.
    """
    opt = argparse.Namespace(**vars(opt))
    resnet.check_resnet(opt.depth, opt.width)
    options.complete_losses(opt, 'teacher_params')
    if not opt.imagenetpath:
        raise UserError('--imagenetpath: give the folder that holds train/CLASS/* and val/CLASS/*')
    if opt.finetune and not opt.student_params:
        raise UserError('--finetune: needs the weights to start from; give --student_params')
    world = ranks.world_size()
    if opt.batch_size < world:
        raise UserError(
            f'--batch_size {opt.batch_size}: must be at least {world}, '
            'the number of processes of torchrun'
        )
    if world > 1 and opt.ngpu > 1:
        raise UserError(f'--ngpu {opt.ngpu}: under torchrun a process has one GPU; leave it out')
    if world > 1 and opt.gpu_id:
        raise UserError(
            f'--gpu_id {opt.gpu_id}: under torchrun, set '
            f'CUDA_VISIBLE_DEVICES={opt.gpu_id} torchrun … instead'
        )
    for name in 'at_groups', 'at_start':
        if name in given and not opt.teacher_params:
            raise UserError(f'--{name}: has no effect without a teacher, --teacher_params')
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(*PUBLISHED, opt.epochs)
    if opt.train_crop is None:
        opt.train_crop = default_crop(opt)
    if not opt.save:
        opt.save = os.path.join('logs', run_name(opt))
    return opt


def default_crop(opt) -> str:
    """The paper's --train_crop: section 4.2 fine-tunes on crops of one scale."""
    return 'plain' if opt.finetune else 'resized'


def run_name(opt) -> str:
    """ILSVRC2012_resnet-18-1_resnet-34-export_beta1000_seed0: data, net, teacher, and every option
    that is not as published."""
    net, teacher = f'resnet-{opt.depth}-{opt.width:g}', options.without_suffix(opt.teacher_params)
    parts = [Path(opt.imagenetpath).resolve().name, net, teacher]
    named = {'depth', 'width', 'teacher_params'}
    named |= {'train_crop'} if opt.train_crop == default_crop(opt) else set()
    return options.run_name(parts, named, opt, parser, PUBLISHED)


# ------------------------ nets and data


class Nets(NamedTuple):
    """The nets of a run; see resnet.py for the functions."""

    student: Callable
    teacher: Callable | None
    params: dict  # of both: student.*, teacher.*


def load_net(option: str, path: str) -> weights.Net:
    """The net at the path, which the option names."""
    small = 'is a net for small images, with three groups: use it with cifar.py'
    return weights.load_net_for(f'--{option}', path, LARGE, small)


def new_student(opt, num_classes: int, teacher: weights.Net | None) -> tuple[Callable, dict]:
    """(f, params) of the net to train: from --student_params, or new with the initial values of
    --seed. With --finetune the head is new."""
    teachers.seed_initial_values(opt, teacher)
    if not opt.student_params:
        return resnet.resnet(opt.depth, opt.width, num_classes)
    f, params, _ = load_net('student_params', opt.student_params)
    depth, width, classes = resnet.net_shape(params)
    source = f'--student_params {opt.student_params}'
    if not resnet.same_shape(params, opt.depth, opt.width):
        raise UserError(
            f'{source}: has --depth {depth} and --width {width:g}, '
            f'not {opt.depth} and {opt.width:g}'
        )
    if opt.finetune:
        head = utils.linear_params(resnet.group_channels(f, params)[-1], num_classes)
        params |= {f'fc.{k}': v for k, v in head.items()}
    elif classes is None:
        raise UserError(f'{source}: the net has no head (fc.*); --finetune gives it one')
    elif classes != num_classes:
        raise UserError(
            f'{source}: has {classes} classes, the data {num_classes}; --finetune replaces the head'
        )
    return f, params


def is_fixed(name: str) -> bool:
    """Whether fine-tuning leaves the parameter alone (section 4.2 of the paper): batch norm, and
    everything up to the end of the first group."""
    early = name.startswith(('conv0', 'bn0', 'affine0', 'group0.'))
    return early or re.search(r'\b(bn|affine)\w*\.\w+$', name) is not None


def load(run: runs.Run, device) -> tuple[weights.Net, weights.Net | None, Sets]:
    """(student, teacher, sets): everything that is read from files, and the checkpoint's values."""
    opt = run.opt
    teacher = teachers.load_teacher(run, 'teacher_params', partial(load_net, 'teacher_params'))
    sets = photographs.open_sets(opt, device)
    if opt.alpha:
        option = f'--teacher_params {opt.teacher_params} with --alpha'
        teachers.check_classes(option, teacher, sets.val.classes)
    if run.checkpoint:  # --student_params are not read again
        f, params = weights.check_net(run.checkpoint['params'], f'--resume: {opt.save}')
        same = resnet.same_shape(params, opt.depth, opt.width)
        if not same or len(params['fc.bias']) != len(sets.val.classes):
            raise UserError(f'--resume: {opt.save}: its weights do not fit its options')
    else:
        f, params = new_student(opt, len(sets.val.classes), teacher)
    for name, value in params.items():
        fixed = opt.finetune and is_fixed(name)
        value.requires_grad_(not utils.is_statistic(name) and not fixed)
    files = [os.path.relpath(file, opt.imagenetpath) for file in sets.train.files + sets.val.files]
    run.check_facts(
        data=zlib.crc32('\n'.join(files).encode(errors='surrogateescape')),
        teacher=weights.checksum(teacher.params.values() if teacher else ()),
    )
    if run.checkpoint:
        for part, broken in zip(sets, run.checkpoint['facts'].get('broken', [])):
            part.broken.update(broken)
    return weights.Net(f, params, []), teacher, sets


# ------------------------ the student's loss


def normalize(images):
    return data.normalize(images, data.IMAGENET_MEAN, data.IMAGENET_STD)


def student_loss(batch: tuple, params: dict, training: bool, use_at: bool, nets: Nets, opt) -> list:
    """The terms of the student's loss, 0-dim tensors: [loss, distillation, at_loss of each of
    --at_groups before --beta, top-1, top-5 accuracy in per cent].

    batch   (images uint8 [B, H, W, 3], targets int64 [B])
    params  those of `nets`, or a copy on another GPU
    use_at  whether the maps count in this epoch
    training  whether batch norm uses the batch's statistics
    """
    images, targets = batch
    x = utils.cast(normalize(images), opt.dtype)
    y_s, g_s = nets.student(x, params, training, 'student.')
    y_t, transfer = None, []
    if nets.teacher:
        with torch.no_grad():
            y_t, g_t = nets.teacher(x, params, False, 'teacher.')
        transfer = [utils.at_loss(g_s[g], g_t[g]) for g in opt.at_groups]
    loss = task = utils.distillation(y_s, y_t, targets, opt.temperature, opt.alpha)
    if opt.beta and use_at:
        loss = task + opt.beta * sum(transfer)
    return [loss, task, *transfer, *(100 * correct(y_s.detach(), targets).float().mean(1))]


def make_loss(nets: Nets, opt, device_ids: list) -> Callable:
    """loss_of(images, targets, params, use_at) -> (loss, detached terms float32 [terms]), see
    student_loss. This is what --compile compiles."""

    def loss_of(images, targets, params, use_at):
        f = partial(student_loss, use_at=use_at, nets=nets, opt=opt)
        training = not opt.finetune  # fine-tuning keeps batch norm fixed
        loss, *terms = utils.data_parallel(f, (images, targets), params, training, device_ids)
        return loss, torch.stack([loss, *terms]).detach()

    return loss_of


def term_names(opt) -> list[str]:
    """The names of student_loss's terms."""
    ats = [f'at_loss of group {g}' for g in opt.at_groups] if opt.teacher_params else []
    return ['loss', utils.task_name(opt), *ats, 'top-1', 'top-5']


def correct(logits, targets):
    """bool [2, B]: whether the target is the likeliest class, and one of the five likeliest."""
    found = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
    return torch.stack([found[:, 0], found.any(1)])


class LossModule(torch.nn.Module):
    """The loss as a module with the student's parameters and statistics, for
    DistributedDataParallel: it averages the gradients of the ranks and copies the first rank's
    statistics to the others. The parameters replace those in `params`, so make the optimizer
    afterwards."""

    def __init__(self, loss_of: Callable, params: dict):
        super().__init__()
        self.loss_of, self.params = loss_of, params
        for i, (name, value) in enumerate(params.items()):
            if name.startswith('student.') and value.requires_grad:
                params[name] = torch.nn.Parameter(value)
                self.register_parameter(str(i), params[name])
            elif name.startswith('student.'):
                self.register_buffer(str(i), value)

    def forward(self, images, targets, use_at):
        return self.loss_of(images, targets, self.params, use_at)


# ------------------------ training and testing


def train_epoch(step_of: Callable, optimizer, train_set, run: runs.Run, checkpoints) -> dict:
    """One pass over the training photographs, from run.step on: {train_loss, train_acc,
    at_losses}, averages over images.

    Writes checkpoints when they are due, and after the last step, so that the test may be
    interrupted. Raises UserError, status 1, if a term of the loss is not finite.
    """
    opt, epoch, n = run.opt, run.epoch + 1, len(train_set.labels)
    rank, world = ranks.rank(), ranks.world_size()
    batches = data.epoch_order(n, opt.seed, epoch).split(opt.batch_size)
    # Ranks share a batch. A rank without a part of the last, smaller one takes its first image with
    # weight 0.
    parts = [b[rank::world] if len(b) > rank else b[:1] for b in batches]
    own_images = [len(b[rank::world]) for b in batches]
    names = term_names(opt)
    averages = Averages(names, epoch, opt.save, run.step, resumed_sums(run, len(names)))

    def view(file, i, out):
        return TRAIN_CROPS[opt.train_crop](file, opt.image_size, opt.seed, epoch, i, out)

    seen = sum(map(len, batches[: run.step]))
    progress = data.Progress(n, f'epoch {epoch}/{opt.epochs}', seen, hidden=rank > 0)
    with progress, contextlib.closing(train_set.batches(parts[run.step :], view)) as loaded:
        for i, (images, targets) in enumerate(loaded, run.step):
            loss, terms = step_of(images, targets, epoch >= opt.at_start)
            if world > 1:  # the mean over ranks of the gradients weighs each by its images
                loss = loss * (own_images[i] * world / len(batches[i]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averages.add(terms, own_images[i])
            due, note = checkpoints.due() or i + 1 == len(batches), ''
            # Not in every step, because reading stops the device.
            if i == 0 or (i + 1) % 20 == 0 or due or progress.is_due():
                loss, *_, top_1, _ = averages.update().tolist()
                left = run.time_left((progress.done + len(batches[i])) / n)
                note = f'loss {loss:.3f}, top-1 {top_1:.1f} %, {left}'
            progress.update(len(batches[i]), note)
            if due:
                checkpoints.write(i + 1, averages.sums, optimizer)
    train_loss, _, *at_losses, top_1, top_5 = averages.means(n)
    return {'train_loss': train_loss, 'train_acc': [top_1, top_5], 'at_losses': at_losses}


@torch.inference_mode()
def test(f: Callable, params: dict, val, opt, sample=None) -> tuple[float, list[float]]:
    """(mean cross-entropy, [top-1, top-5] accuracy in per cent) of a net in float32, single crop.

    Every image counts once, whatever the number of ranks. sample: indices of the images (default:
    all).
    """
    index = torch.arange(len(val.labels)) if sample is None else sample
    sums = torch.zeros(3, dtype=torch.double)

    def view(file, i, out):
        return photographs.centre_view(file, opt.image_size, out)

    parts = index[ranks.rank() :: ranks.world_size()].split(100)
    batches = val.batches([part for part in parts if len(part)], view)
    progress = data.Progress(len(index), 'testing', hidden=ranks.rank() > 0)
    with progress, contextlib.closing(batches) as loaded:
        for images, targets in loaded:
            logits, _ = f(normalize(images), params, False)
            loss = F.cross_entropy(logits, targets, reduction='sum')
            right = correct(logits, targets).sum(1)
            sums += torch.stack([loss.double().cpu(), *right.double().cpu()])
            progress.update(min(len(targets) * ranks.world_size(), len(index) - progress.done))
    loss, *right = ranks.all_gather(sums).sum(0).tolist()
    return loss / len(index), [100 * r / len(index) for r in right]


def test_teacher(opt, teacher: weights.Net, nets: Nets, val) -> float | None:
    """The teacher's top-1 accuracy in per cent on a fixed sample of 2,000 validation images, None
    if its classes differ. Warns if it is far below its log or its known accuracy."""
    source = opt.teacher_params
    if not teachers.can_be_tested(source, teacher, val.classes):
        return None
    sample = data.epoch_order(len(val.labels), 0, 0)[:2000].sort().values
    _, (acc, _) = test(nets.teacher, utils.part(nets.params, 'teacher'), val, opt, sample)
    on = f'on {len(sample)} validation images'
    ranks.print_first(f'teacher {source}: test accuracy {acc:.2f} % {on}')
    expected = known_accuracy(source, teacher, opt)
    teachers.warn_of_accuracy(f'teacher {source}', teacher, acc, len(sample), expected)
    return acc


def known_accuracy(source: str, net: weights.Net, opt) -> float | None:
    """The top-1 accuracy in per cent that the log of the net says, or its file, or its origin."""
    if net.records:
        last = net.records[-1]
        same = last.get('image_size') == opt.image_size and last.get('validate', 0) == opt.validate
        logged = last.get('test_acc')
        return logged[0] if same and isinstance(logged, list) and logged else None
    depth, width, num_classes = resnet.net_shape(net.params)
    error = KNOWN_ERRORS.get((resnet.layout(net.params), depth, width))
    standard = error and num_classes == 1000 and opt.image_size == 224
    return weights.stated_accuracy(source) or (100 - error if standard else None)


def end_epoch(run: runs.Run, trained: dict, nets: Nets, optimizer, sets: Sets):
    """Test the student after an epoch of training, and write the run folder."""
    opt, epoch = run.opt, run.epoch + 1
    train_time, start = run.train_time(), time.monotonic()
    params_s = utils.part(nets.params, 'student')
    if ranks.world_size() > 1:  # keep the first rank's statistics
        for name, value in params_s.items():
            if utils.is_statistic(name):
                dist.broadcast(value, 0)
    test_loss, test_acc = test(nets.student, params_s, sets.val, opt)
    run.facts['broken'] = photographs.broken_images(sets)
    stats = trained | {
        'test_loss': test_loss,
        'test_acc': test_acc,
        'lr': utils.learning_rate(epoch, opt),
        'epoch_beta': opt.beta if epoch >= opt.at_start else 0.0,
        'broken_images': sum(map(len, run.facts['broken'])),
    }
    times = {'train_time': train_time, 'test_time': time.monotonic() - start}
    run.end_epoch(stats, times, nets.params, optimizer)


# ------------------------ main


def evaluate(opt, device) -> None:
    """--evaluate: test a net and print one json_stats line."""

    def load_one():
        net, sets = load_net('evaluate', opt.evaluate), photographs.open_sets(opt, device)
        teachers.check_classes(f'--evaluate {opt.evaluate}', net, sets.val.classes)
        return net, sets.val

    net, val = ranks.all_or_none(load_one)
    net = net._replace(params=devices.to_device(net.params, device))
    start = time.monotonic()
    test_loss, test_acc = test(net.f, net.params, val, opt)
    seconds = time.monotonic() - start
    if not net.records:
        expected = known_accuracy(opt.evaluate, net, opt)
        source = f'--evaluate {opt.evaluate}'
        teachers.warn_of_accuracy(source, net, test_acc[0], len(val.labels), expected)
    tested = {
        'layout': resnet.layout(net.params),
        'image_size': opt.image_size,
        'validate': opt.validate,
        'test_acc': test_acc,
        'test_loss': test_loss,
        'broken_images': len(photographs.broken_images([val])[0]),
    }
    size = opt.image_size, opt.image_size
    teachers.print_evaluation(opt.evaluate, net, size, tested, len(val.labels), seconds)


def begin(argv) -> tuple:
    """(options, run) of the command; (options, None) to --evaluate, (None, None) if the run is
    finished."""
    opt, given = parser.parse(argv)
    if not opt.evaluate:
        run = runs.begin(opt, given, parser, complete)
        return run and run.opt, run
    folder = weights.run_folder(opt.evaluate)
    if folder and os.path.isfile(folder / 'log.txt'):  # test a run at its own size
        record = logs.read_log(folder / 'log.txt')[0]
        names = {'image_size', 'imagenetpath', 'validate'}
        opt = options.logged_options(opt, given, opt.evaluate, record, parser, names)
    if not opt.imagenetpath:
        raise UserError('--evaluate: give the photographs to test on, --imagenetpath')
    return opt, None


def open_device(opt) -> tuple[torch.device, list]:
    """(device, device_ids) of this rank."""
    return ranks.own_device(*devices.choose_device(opt))


def prepare(run: runs.Run, device) -> tuple[Nets, Sets]:
    """(nets, photographs) on the device: new, or as the checkpoint has them."""
    opt = run.opt
    student, teacher, sets = ranks.all_or_none(load, run, device)
    if opt.check_images:
        photographs.check_images(sets, opt)
    parts = {'student': student.params, 'teacher': teacher.params if teacher else {}}
    params = utils.flatten({k: devices.to_device(v, device) for k, v in parts.items()})
    nets = Nets(student.f, teacher and teacher.f, params)
    if teacher and not run.checkpoint:
        classes, shape = sets.val.classes, (opt.image_size, opt.image_size)
        teachers.warn_of_training(opt.teacher_params, teacher, opt.validate, classes, shape)
        run.facts['teacher_test_acc'] = test_teacher(opt, teacher, nets, sets.val)
    return nets, sets


def main(argv=None):
    ranks.join(argv)
    # The first rank reads options and run folder for all, which may be on its disk alone.
    started = ranks.all_or_none(lambda: begin(argv) if ranks.rank() == 0 else None)
    opt, run = ranks.broadcast(started)
    if opt is None:  # the run is finished
        return
    device, device_ids = ranks.all_or_none(open_device, opt)
    if opt.evaluate:
        return evaluate(opt, device)
    devices.keep_freed_memory()

    nets, sets = prepare(run, device)
    if opt.beta and opt.at_start > opt.epochs > 0:
        ranks.print_first(
            f'--at_start {opt.at_start}: no attention transfer, as the run has {opt.epochs} epochs'
        )
    devices.warn_of_slow_dtype(opt.dtype, device)
    loss_of = make_loss(nets, opt, device_ids)
    compiled = devices.compiled(loss_of, device) if opt.compile else loss_of
    run.options['compile'] = compiled is not loss_of
    if compiled is not loss_of:
        run.notes.append(devices.COMPILING)
    step_of = LossModule(compiled, nets.params)
    if ranks.world_size() > 1:
        ids = device_ids if device.type == 'cuda' else None
        step_of = DistributedDataParallel(step_of, device_ids=ids)
    run.describe(nets.params, sets.val.classes, device, processes=ranks.world_size())
    optimizer = utils.make_optimizer(nets.params, opt, epoch=1)
    run.restore_optimizer(optimizer)

    with run.opened():
        ranks.print_first(
            f'{run.about["n_parameters"]:,} trained parameters; '
            f'{len(sets.train.labels):,} images of {len(sets.val.classes)} classes; '
            f'{run.rates()}'
        )
        checkpoints = Checkpoints(run, nets.params, sets)
        if opt.epochs == 0:  # test and save the untrained net
            untrained = {'train_loss': None, 'train_acc': None, 'at_losses': []}
            end_epoch(run, untrained, nets, optimizer, sets)
        for epoch in range(run.epoch + 1, opt.epochs + 1):
            if epoch in opt.epoch_step and not run.step:  # momentum restarts, as published
                optimizer = utils.make_optimizer(nets.params, opt, epoch)
            run.start_epoch()
            with checkpoints.inside_epoch():
                trained = train_epoch(step_of, optimizer, sets.train, run, checkpoints)
            end_epoch(run, trained, nets, optimizer, sets)
        run.print_end()


if __name__ == '__main__':
    ranks.leave(program.call_main(ranks.together(main)))
