"""Attention transfer on ImageNet, or any folders of photographs: train a student that learns from a
net in a file, or fine-tune.

    # a student alone, and with attention transfer
    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --save logs/resnet_18
    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --save logs/at_18_34 \\
        --teacher_params resnet-34-export.hkl --beta 1e+3 --gpu_id 0,1 --ngpu 2
    # a process a GPU; several machines by torchrun's own options
    torchrun --nproc_per_node 8 imagenet.py ...
    # test any weights file
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate resnet-34-export.hkl

The student's loss is distillation(...) + beta * the sum over --at_groups of at_loss, in utils.py. A
checkpoint is written every --checkpoint_minutes; with --resume the same command goes on at that
very step.
"""

import os
import signal
import sys

# The imports take seconds; a signal in that time ends in one line as well.
# fmt: off
if __name__ == '__main__':
    for s in signal.SIGINT, signal.SIGTERM:
        signal.signal(s, lambda signum, _: (os.write(2, b'imagenet.py: stopped before it began\n'), os._exit(128 + signum)))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# fmt: on

import argparse
import contextlib
import math
import re
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchnet import meter

import data
import resnet
import utils
from utils import UserError, number

PUBLISHED_EPOCHS, PUBLISHED_STEPS = 100, [30, 60, 90]
TRAIN_CROPS = {'resized': data.train_view, 'plain': data.plain_train_view}
# Top-1 error, single crop, per cent, of what has a layout and depth that is known: the releases,
# and torchvision's first weights.
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


parser = utils.Parser(__doc__)
# fmt: off
add = parser.add_argument_group('net').add_argument
add('--depth', default=18, type=number(int, 1), help='layers of the ResNet: 18, 34, 50, 101 or 152 (paper, and default: 18)')
add('--width', default=1.0, type=number(above=0), help='factor of its channels (paper, and default: 1)')
add('--student_params', default='', metavar='FILE', help='weights that the student starts from (default: random)')
add('--finetune', action='store_true', help='replace the head of --student_params for the classes at hand, and keep batch norms and the first group fixed (paper: Table 4)')
add = parser.add_argument_group('data').add_argument
add('--imagenetpath', metavar='DIR', help='photographs: DIR/train/CLASS/* and DIR/val/CLASS/* (or test)')
add('--image_size', default=224, type=number(int, 33, 1024), help='side of the crops in pixels; for testing the shorter side is made 256/224 of it (paper, and default: 224)')
add('--train_crop', choices=list(TRAIN_CROPS), help='resized: 8 to 100 %% of the area at any place, shape 3:4 to 4:3, made --image_size; plain: shorter side made 256/224 of --image_size, then a crop at any place; both are flipped at random (paper: resized for ImageNet, plain for fine-tuning; default: plain with --finetune, else resized)')
add('--check_images', action='store_true', help='decode every image before training, and list those that are broken')
add('--skip_broken', action='store_true', help='put the next image of its class in place of a broken one, and count them in the log; else the first one stops the run')
add = parser.add_argument_group('teacher').add_argument
add('--teacher_params', default='', metavar='FILE', help='weights of the teacher, or its run folder, of any layout that README lists (default: none)')
add('--alpha', type=number(low=0, high=1), help='weight of knowledge distillation, 0 to 1 (paper: not found to help; default: 0)')
add('--temperature', default=4.0, type=number(above=0, high=1e6), help='of knowledge distillation: logits are divided by it (paper, and default: 4)')
add('--beta', type=number(low=0), help='weight of attention transfer (paper: not stated; default: 1e+3 with a teacher and no --alpha, else 0)')
add('--at_groups', default=[0, 1, 2, 3], type=utils.group_list(4), metavar='LIST', help='groups whose maps are transferred (paper: 2,3; published code, and default: 0,1,2,3)')
add('--at_start', default=1, type=number(int, 1), metavar='EPOCH', help='first epoch with attention transfer (paper: 60; published code, and default: 1)')
utils.add_training_options(parser, batch_size=256, lr=0.1, epochs=PUBLISHED_EPOCHS, weight_decay=1e-4, epoch_step=PUBLISHED_STEPS, lr_decay_ratio=0.1)
parser.add_argument('--checkpoint_minutes', default=10.0, type=number(above=0), help='minutes between checkpoints inside an epoch (default: 10)')
# fmt: on


# ------------------------ options


def complete(opt):
    """The options, with what was left open. Raises UserError if they contradict each other."""
    opt = argparse.Namespace(**vars(opt))
    resnet.check_resnet(opt.depth, opt.width)
    utils.complete_losses(opt, 'teacher_params')
    if not opt.imagenetpath:
        raise UserError('--imagenetpath: give the folder that holds train/CLASS/* and val/CLASS/*')
    if opt.finetune and not opt.student_params:
        raise UserError('--finetune: needs the weights to start from; give --student_params')
    if opt.batch_size < world_size():
        raise UserError(
            f'--batch_size {opt.batch_size}: must be at least {world_size()}, the number of processes of torchrun'
        )
    if world_size() > 1 and opt.ngpu > 1:
        raise UserError(f'--ngpu {opt.ngpu}: under torchrun a process has one GPU; leave it out')
    if world_size() > 1 and opt.gpu_id:
        raise UserError(
            f'--gpu_id: torchrun has begun; run CUDA_VISIBLE_DEVICES={opt.gpu_id} torchrun …'
        )
    for name in 'at_groups', 'at_start':
        if getattr(opt, name) != parser.get_default(name) and not opt.teacher_params:
            raise UserError(f'--{name}: has no effect without a teacher, --teacher_params')
    if opt.epoch_step is None:
        opt.epoch_step = utils.scaled_steps(PUBLISHED_STEPS, PUBLISHED_EPOCHS, opt.epochs)
    if opt.train_crop is None:
        opt.train_crop = usual_crop(opt)
    if not opt.save:
        opt.save = os.path.join('logs', run_name(opt))
    return opt


def usual_crop(opt):
    """The paper's --train_crop: section 4.2 fine-tunes on crops of one scale."""
    return 'plain' if opt.finetune else 'resized'


def run_name(opt):
    """Data, net, teacher, and whatever else is not as published:
    ILSVRC2012_resnet-18-1_resnet-34-export_beta1000_seed0."""
    net = f'resnet-{opt.depth}-{opt.width:g}'
    parts = [Path(opt.imagenetpath).resolve().name, net, utils.without_suffix(opt.teacher_params)]
    said = {'depth', 'width', 'teacher_params'}
    said |= {'train_crop'} if opt.train_crop == usual_crop(opt) else set()
    return utils.run_name(parts, opt, parser, said, PUBLISHED_STEPS, PUBLISHED_EPOCHS)


# ------------------------ processes of torchrun: ranks


def rank():
    return int(os.environ.get('RANK', '0'))


def world_size():
    return int(os.environ.get('WORLD_SIZE', '1'))


def join():
    """Under torchrun: the processes meet. Tensors on CPUs travel by gloo, those on GPUs by nccl."""
    if world_size() > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')


def open_device(opt):
    """(device, device_ids) of this process; under torchrun each has a GPU of its own, if any."""
    device, device_ids = utils.choose_device(opt)
    if world_size() > 1 and device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        if device.index >= torch.cuda.device_count():
            raise UserError(f'torchrun: more processes here than GPUs, {torch.cuda.device_count()}')
        torch.cuda.set_device(device)
        device_ids = [device]
    return device, device_ids


def broadcast(value):
    """The first rank's value, in every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather(tensor):
    """[ranks, *]: the tensors, on the CPU, of all ranks, in each of them."""
    if world_size() == 1:
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def all_gather_list(items):
    """All ranks' items in one list, in each of them."""
    if world_size() == 1:
        return list(items)
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]


def all_or_none(f, *arguments):
    """f(*arguments) in every rank. A mistake of the user's, which mostly all ranks find, is told by
    the first that finds it, and ends them all, as --help does. f waits for no other rank."""
    result = end = None
    try:
        result = f(*arguments)
    except SystemExit as e:
        end = e
    except ValueError as e:
        if not hasattr(e, 'status'):  # neither utils.UserError nor data.UserError: a bug
            raise
        end = e
    statuses = all_gather_list([None if end is None else getattr(end, 'status', 0)])
    for i, status in enumerate(statuses):
        if status is not None:
            end_all(end, i, status)
    return result


def end_all(end, teller=0, status=1):
    """Ends all ranks, which all call this, by what rank `teller` raises."""
    if rank() == teller:
        raise end
    with contextlib.suppress(RuntimeError):  # of the connection, once that rank has told it
        dist.barrier()
    sys.exit(status)


def print_first(text, file=None):
    if rank() == 0:
        print(text, file=file or sys.stdout, flush=True)


# ------------------------ data


class Photographs:
    """The files of a train or val folder: `files`, `labels` int64 [N], `classes`; decoded in
    batches when they are needed."""

    def __init__(self, folder):
        self.files = [file for files in folder.values() for file in files]
        self.labels = torch.tensor([c for c, files in enumerate(folder.values()) for _ in files])
        self.classes = list(folder)
        self.broken = set()  # indices of those that --skip_broken has replaced

    def batches(self, batches, view, opt, device):
        """(images, labels) on the device for each index tensor of `batches`; view(file, i, out)
        fills the image of sample i."""

        def one(i, out):
            i = int(i)
            try:
                return view(self.files[i], i, out)
            except data.BrokenImage:
                if not opt.skip_broken:
                    raise
            self.broken.add(i)
            same = (self.labels == self.labels[i]).nonzero()[:, 0].tolist()
            for j in same[same.index(i) + 1 :] + same[: same.index(i)]:
                with contextlib.suppress(data.BrokenImage):
                    return view(self.files[j], i, out)
            raise UserError(
                f'--skip_broken: every image of {self.classes[self.labels[i]]} is broken'
            )

        pin = device.type == 'cuda'
        loaded = data.load_batches(batches, one, opt.image_size, opt.nthread, pin=pin)
        return on_device(loaded, self.labels, device)


def on_device(loaded, labels, device):
    """(images, labels) of each batch; on a GPU the next one is copied while the step runs."""
    with contextlib.closing(loaded):
        if device.type != 'cuda':
            for index, images in loaded:
                yield images.to(device), labels[index].to(device)
            return
        stream, ready = torch.cuda.Stream(device), None
        for index, images in loaded:
            with torch.cuda.stream(stream):
                targets = labels[index].pin_memory()
                batch = [v.to(device, non_blocking=True) for v in (images, targets)]
            if ready is not None:
                yield ready
            torch.cuda.current_stream(device).wait_stream(stream)
            for v in batch:
                v.record_stream(torch.cuda.current_stream(device))
            ready = batch
        if ready is not None:
            yield ready


def open_photographs(opt):
    """(train, val) Photographs of --imagenetpath."""
    folders = data.scan_photographs(opt.imagenetpath)
    return [Photographs(folder) for folder in folders]


def check_images(sets, opt):
    """--check_images: every image is decoded once, by all ranks together. Raises UserError after a
    line on each that is broken."""
    files = [file for photographs in sets for file in photographs.files]
    faults = data.find_faults(files[rank() :: world_size()], opt.nthread)
    broken = all_gather_list([fault for fault in faults if fault])
    for line in broken:
        print_first(line, sys.stderr)
    if broken and not opt.skip_broken:
        found = f'--check_images: {len(broken)} images are broken (listed above)'
        end_all(UserError(f'{found}; remove them, or give --skip_broken'), status=2)


# ------------------------ nets


def load_student(opt, num_classes, params_t):
    """(f, params) of the net to train: of --student_params, or new. With --finetune its head is
    new, and what stays fixed needs no gradient."""
    # With the same seed, a student of its teacher's shape would draw the teacher's initial values.
    twin = bool(params_t) and resnet.same_shape(params_t, opt.depth, opt.width)
    of_teacher = twin and utils.checksum(params_t.values())
    torch.manual_seed(data.seed_of(opt.seed, 'initial values', opt.depth, opt.width, of_teacher))
    if not opt.student_params:
        return resnet.resnet(opt.depth, opt.width, num_classes)
    f, params, _ = load_net_for(opt, 'student_params')
    depth, width, classes = resnet.net_shape(params)
    if not resnet.same_shape(params, opt.depth, opt.width):
        raise UserError(
            f'--student_params {opt.student_params}: has --depth {depth} and --width {width:g}, not {opt.depth} and {opt.width:g}'
        )
    if opt.finetune:
        head = utils.linear_params(params['fc.weight'].shape[1], num_classes)
        params |= {f'fc.{k}': v for k, v in head.items()}
    elif classes != num_classes:
        raise UserError(
            f'--student_params {opt.student_params}: has {classes} classes, the data {num_classes}; --finetune replaces the head'
        )
    for name, value in params.items():
        value.requires_grad_(not utils.is_statistic(name) and not (opt.finetune and is_fixed(name)))
    return f, params


def is_fixed(name):
    """Whether fine-tuning leaves a parameter alone (section 4.2 of the paper): batch norms, the
    first group, and what lies before it."""
    early = name.startswith(('conv0', 'bn0', 'affine0', 'group0.'))
    return early or re.search(r'\b(bn|affine)\w*\.\w+$', name) is not None


def load_net_for(opt, option):
    """(f, params, records) of the net that the option names, which must have four groups."""
    try:
        f, params, records = resnet.load_net(getattr(opt, option))
    except UserError as e:
        raise UserError(f'--{option} {e}') from e
    if resnet.layout(params) in ('wrn', 'nin'):
        raise UserError(
            f'--{option} {getattr(opt, option)}: has no four groups; nets for small images are for cifar.py'
        )
    return f, params, records


def load(opt, checkpoint):
    """(f_student, f_teacher, params_s, params_t, records of the teacher's log, train, val, facts):
    what is read from files, and as facts what a continuation must find unchanged."""
    f_teacher, params_t, records = None, {}, []
    if opt.teacher_params:
        f_teacher, params_t, records = load_net_for(opt, 'teacher_params')
    train_set, val = open_photographs(opt)
    if opt.alpha:
        option = f'--teacher_params {opt.teacher_params} with --alpha'
        utils.check_classes(option, params_t, records, val.classes)
    f_student, params_s = load_student(opt, len(val.classes), params_t)
    names = [os.path.relpath(file, opt.imagenetpath) for file in train_set.files + val.files]
    facts = {
        'data': zlib.crc32('\n'.join(names).encode()),
        'teacher': utils.checksum(params_t.values()),
        'teacher_test_acc': None,
    }
    if checkpoint:
        utils.check_facts(facts, checkpoint)
        for photographs, broken in zip((train_set, val), checkpoint['facts'].get('broken', [])):
            photographs.broken.update(broken)
        trained = {k for k, v in params_s.items() if v.requires_grad}
        source = f'--resume: the run of {opt.save}'
        params_s = utils.check_params(checkpoint['params'], params_s, source)
        params_s = {k: v.requires_grad_(k in trained) for k, v in params_s.items()}
    return f_student, f_teacher, params_s, params_t, records, train_set, val, facts


def prepare(opt, device, checkpoint):
    """(f_student, f_teacher, params, train, val, facts) as of load; `params` of both nets on the
    device, with prefixes student. and teacher."""
    loaded = all_or_none(load, opt, checkpoint)
    f_student, f_teacher, params_s, params_t, records, train_set, val, facts = loaded
    if opt.check_images:
        check_images((train_set, val), opt)
    nets = {'student': params_s, 'teacher': params_t}
    nets = {name: utils.to_device(p, device) for name, p in nets.items()}
    if checkpoint:
        facts['teacher_test_acc'] = checkpoint['facts'].get('teacher_test_acc')
    elif f_teacher:
        facts['teacher_test_acc'] = test_teacher(
            f_teacher, nets['teacher'], records, val, opt, device
        )
    return f_student, f_teacher, utils.flatten(nets), train_set, val, facts


# ------------------------ loss


def normalize(images):
    return data.normalize(images, data.IMAGENET_MEAN, data.IMAGENET_STD)


def make_loss(f_student, f_teacher, opt, device_ids):
    """loss(images, targets, params, use_at) -> (loss, float32 [terms]), the terms as term_names
    lists them; use_at: whether the maps count in this epoch."""

    def f(x, params, training):
        x = utils.cast(normalize(x), opt.dtype)
        y_s, g_s = f_student(x, params, training, 'student.')
        if f_teacher is None:
            return y_s, None, []
        with torch.no_grad():
            y_t, g_t = f_teacher(x, params, False, 'teacher.')
        return y_s, y_t, [utils.at_loss(g_s[g], g_t[g]) for g in opt.at_groups]

    def loss(images, targets, params, use_at):
        y_s, y_t, at_losses = utils.data_parallel(f, images, params, not opt.finetune, device_ids)
        loss = task = utils.distillation(y_s, y_t, targets, opt.temperature, opt.alpha)
        if opt.beta and use_at:
            loss = task + opt.beta * sum(at_losses)
        accuracies = 100 * correct(y_s.detach(), targets).float().mean(1)
        return loss, torch.stack([loss, task, *at_losses, *accuracies]).detach()

    return loss


def correct(logits, targets):
    """bool [2, B]: whether the label is the likeliest class, and one of the five likeliest."""
    found = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
    return torch.stack([found[:, 0], found.any(1)])


def term_names(opt):
    ats = [f'at_loss of group {g}' for g in opt.at_groups] if opt.teacher_params else []
    return ['loss', 'distillation', *ats, 'top-1', 'top-5']


class Student(torch.nn.Module):
    """The loss as a module that owns the student's parameters and statistics: what
    DistributedDataParallel asks for. Gradients become means over the ranks, statistics the first
    rank's."""

    def __init__(self, loss_of, params):
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


def train_epoch(epoch, step_of, train, optimizer, opt, device, begun, checkpoints):
    """One pass over the training images, from where `begun`, a checkpoint or None, left it. Returns
    {train_loss, train_acc, at_losses}, means over samples.

    A checkpoint is written where it is time, and after the last step, so that testing may be
    interrupted. Raises UserError, status 1, where a term of the loss is not finite: it looks every
    20 steps, as a look stops the device."""
    n, world, names = len(train.labels), world_size(), term_names(opt)
    batches = data.epoch_order(n, opt.seed, epoch).split(opt.batch_size)
    # Ranks split a batch. One that gets nothing of the last, smaller one takes its first image with
    # weight 0.
    mine = [b[rank() :: world] if len(b) > rank() else b[:1] for b in batches]
    weights = [len(b[rank() :: world]) for b in batches]
    start, sums = resumed_sums(begun, len(names))
    use_at, rows, looked = epoch >= opt.at_start, [], start

    def view(file, i, out):
        return TRAIN_CROPS[opt.train_crop](file, opt.image_size, opt.seed, epoch, i, out)

    seen = sum(map(len, batches[:start]))
    hidden = rank() > 0 or None
    bar = data.progress(n, f'epoch {epoch}/{opt.epochs}', initial=seen, disable=hidden)
    with bar, contextlib.closing(train.batches(mine[start:], view, opt, device)) as loaded:
        for step, (images, targets) in enumerate(loaded, start):
            loss, terms = step_of(images, targets, use_at)
            # The ranks' gradients are plainly averaged; each should count by its images.
            if world > 1:
                loss = loss * (weights[step] * world / len(batches[step]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append(terms)
            bar.update(len(batches[step]))
            wanted = checkpoints.wanted() or step + 1 == len(batches)
            if (step + 1) % 20 == 0 or wanted:
                recent = torch.stack(rows).cpu()
                utils.check_finite(recent, names, epoch, looked, opt.save)
                for row, weight in zip(recent.double(), weights[looked:]):
                    sums += row * weight
                means = recent.mean(0)
                bar.set_postfix_str(f'loss {means[0]:.3f}, top-1 {means[-2]:.1f} %')
                rows, looked = [], step + 1
            if wanted:
                checkpoints.write(step + 1, sums)

    meters = [meter.AverageValueMeter() for _ in names]
    for m, value in zip(meters, all_gather(sums).sum(0).tolist()):
        m.add(value, n)
    train_loss, _, *at_losses, top_1, top_5 = (float(m.value()[0]) for m in meters)
    return {'train_loss': train_loss, 'train_acc': [top_1, top_5], 'at_losses': at_losses}


def resumed_sums(begun, n):
    """(the step that a checkpoint was written after, this rank's sums of the terms until then,
    float64 [n])."""
    if not begun or not begun['step']:
        return 0, torch.zeros(n, dtype=torch.double)
    sums = torch.tensor(begun['sums'], dtype=torch.double)
    if len(sums) != world_size():  # another number of ranks goes on
        sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, world_size() - 1))
    return begun['step'], sums[rank()]


@torch.inference_mode()
def test(f, params, val, opt, device, sample=None):
    """(mean cross-entropy, [top-1, top-5] accuracy in per cent) of a net in float32, single crop;
    every image counts once, whatever the number of ranks. sample: indices to test on (default:
    all)."""
    index = torch.arange(len(val.labels)) if sample is None else sample
    sums = torch.zeros(3, dtype=torch.double)

    def view(file, i, out):
        return data.centre_view(file, opt.image_size, out)

    mine = [part for part in index[rank() :: world_size()].split(100) if len(part)]
    for images, targets in val.batches(mine, view, opt, device):
        logits, _ = f(normalize(images), params, False)
        loss = F.cross_entropy(logits, targets, reduction='sum')
        right = correct(logits, targets).sum(1)
        sums += torch.stack([loss.double().cpu(), *right.double().cpu()])
    loss, *right = all_gather(sums).sum(0).tolist()
    return loss / len(index), [100 * r / len(index) for r in right]


def test_teacher(f, params, records, val, opt, device):
    """Top-1 accuracy of the teacher in per cent on a fixed sample of 2,000 validation images, None
    where its classes are others. Warns where that is far from its own log, or from the figure known
    for such a net."""
    if not utils.same_classes(params, records, val.classes):
        print_first(
            f'teacher {opt.teacher_params}: has other classes, so that its accuracy is not tested'
        )
        return None
    sample = data.epoch_order(len(val.labels), 0, 0)[:2000].sort().values
    _, (acc, _) = test(f, params, val, opt, device, sample)
    print_first(
        f'teacher {opt.teacher_params}: test accuracy {acc:.2f} % on {len(sample)} validation images'
    )
    depth, width, num_classes = resnet.net_shape(params)
    known = KNOWN_ERRORS.get((resnet.layout(params), depth, width))
    logged = records[-1].get('test_acc') if records else None
    expected = None
    if records and records[0].get('image_size') == opt.image_size:
        expected = logged[0] if isinstance(logged, list) and logged else None
    elif not records and known is not None and num_classes == 1000 and opt.image_size == 224:
        expected = 100 - known
    # Three standard deviations of a share among so many images.
    margin = 300 * math.sqrt(0.25 / len(sample))
    if isinstance(expected, (int, float)) and not expected - acc <= margin:
        print_first(
            f'warning: teacher {opt.teacher_params} has test accuracy {acc:.2f} %, but {str(expected)[:6]} % is '
            'known of it: are these its weights?',
            sys.stderr,
        )
    return acc


class Checkpoints:
    """Those inside an epoch: every --checkpoint_minutes, and at the step after SIGUSR1, or after
    SIGTERM or SIGINT, which then end the run."""

    def __init__(self, opt, make, advice):
        self.opt, self.make, self.advice = opt, make, advice
        self.signals, self.last, self.in_epoch = [], time.time(), False
        for signum in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1:
            signal.signal(signum, self.ask)

    def ask(self, signum, frame):
        # A second time, or where no step is under way: at once.
        if signum != signal.SIGUSR1 and (signum in self.signals or not self.in_epoch):
            raise utils.Stopped(signum)
        self.signals.append(signum)

    def wanted(self):
        due = bool(self.signals) or time.time() - self.last > 60 * self.opt.checkpoint_minutes
        # All ranks must come to the same answer.
        return bool(all_gather(torch.tensor([due], dtype=torch.uint8)).any())

    def write(self, step, sums):
        checkpoint = self.make(step, [row.tolist() for row in all_gather(sums)])
        if not all(v.isfinite().all() for v in checkpoint['params'].values()):
            raise UserError(
                f'after step {step} the parameters are not finite; {self.opt.save} is kept as after its last checkpoint. '
                'A lower --lr or --beta may help',
                status=1,
            )
        if rank() == 0:
            utils.save_checkpoint(self.opt.save, checkpoint)
        main.hint = f'{self.advice} after step {step} of epoch {checkpoint["epoch"] + 1}'
        self.last = time.time()
        self.stop()

    def stop(self):
        """Ends the run where a signal has asked for it, in any rank."""
        asked = max([s for s in self.signals if s != signal.SIGUSR1], default=0)
        self.signals.clear()
        if asked := int(all_gather(torch.tensor([int(asked)])).max()):
            raise utils.Stopped(asked)


def train(opt, step_of, f, params, optimizer, train_set, val, facts, begun, advice):
    """The epochs, from the checkpoint `begun` on; after each the run folder is written, and a line
    is printed. advice: what makes a stopped run go on."""
    done, log = (begun['epoch'], list(begun['log'])) if begun else (0, [])
    device = next(iter(params.values())).device
    params_s = utils.part(params, 'student')
    about = {
        'teacher_test_acc': facts['teacher_test_acc'],
        'initial_lr': opt.lr,
        'n_parameters': sum(v.numel() for v in utils.trainable(params)),
        'num_classes': len(val.classes),
        'classes': val.classes,
        'processes': world_size(),
        'torch': torch.__version__,
    }
    print_first(
        f'{about["n_parameters"]:,} trained parameters; {len(train_set.labels):,} images of {len(val.classes)} classes; '
        f'lr {opt.lr:g}, times {opt.lr_decay_ratio:g} from epochs {opt.epoch_step} on'
    )
    curves = utils.open_curves(opt.save, log) if opt.tensorboard and rank() == 0 else None
    main.hint = f'{advice} after epoch {done} of {opt.epochs}'

    def make(step, sums, epoch=None):
        broken = [sorted(set(all_gather_list(s.broken))) for s in (train_set, val)]
        known = facts | {'broken': broken}
        epoch = done if epoch is None else epoch
        return utils.make_checkpoint(params_s, optimizer, opt, epoch, log, known, step, sums)

    checkpoints = Checkpoints(opt, make, advice)

    def end_epoch(epoch, stats, train_time):
        start = time.time()
        if world_size() > 1:  # the statistics that are kept are the first rank's
            for name, value in params_s.items():
                if utils.is_statistic(name):
                    dist.broadcast(value, 0)
        test_loss, test_acc = test(f, params_s, val, opt, device)
        if not math.isfinite(test_loss):
            kept = f'{opt.save} is kept as after its last checkpoint'
            end_all(UserError(f'epoch {epoch}: the test loss is {test_loss}; {kept}', status=1))
        rate = utils.learning_rate(max(epoch, 1), opt)
        stats |= {'test_loss': test_loss, 'test_acc': test_acc, 'lr': rate}
        stats['epoch_beta'] = opt.beta if epoch >= opt.at_start else 0.0
        stats['broken_images'] = sum(len(set(all_gather_list(s.broken))) for s in (train_set, val))
        times = {'train_time': train_time, 'test_time': time.time() - start}
        record = utils.run_options(opt) | {'epoch': epoch} | stats | about | times
        log.append(utils.json_stats(record))
        checkpoint = make(0, [], epoch)
        if rank() == 0:
            utils.save_run(opt.save, checkpoint)
            if curves:
                utils.write_curves(curves, record)
        main.hint = f'{advice} after epoch {epoch}'
        checkpoints.last = time.time()
        print_first(utils.epoch_line(record))

    if opt.epochs == 0 and not log:
        end_epoch(0, {'train_loss': None, 'train_acc': None, 'at_losses': []}, 0.0)
    while done < opt.epochs:
        epoch = done + 1
        if epoch in opt.epoch_step and not (begun and begun['step']):
            # A new optimizer: momentum restarts at a drop, as published.
            optimizer = utils.make_optimizer(params, opt, epoch)
        start = time.time()
        checkpoints.in_epoch = True
        stats = train_epoch(epoch, step_of, train_set, optimizer, opt, device, begun, checkpoints)
        checkpoints.in_epoch = False
        end_epoch(epoch, stats, time.time() - start)
        done, begun = epoch, None


# ------------------------ main


def evaluate(opt, device):
    """--evaluate: prints one json_stats line."""

    def load_one():
        f, params, records = load_net_for(opt, 'evaluate')
        _, val = open_photographs(opt)
        utils.check_classes(f'--evaluate {opt.evaluate}', params, records, val.classes)
        return f, params, val

    f, params, val = all_or_none(load_one)
    params = utils.to_device(params, device)
    start = time.time()
    test_loss, test_acc = test(f, params, val, opt, device)
    seconds = time.time() - start
    if not math.isfinite(test_loss):
        end_all(UserError(f'--evaluate {opt.evaluate}: the test loss is {test_loss}', status=1))
    record = {
        'evaluate': opt.evaluate,
        'layout': resnet.layout(params),
        'image_size': opt.image_size,
        'test_acc': test_acc,
        'test_loss': test_loss,
        'n_parameters': sum(v.numel() for k, v in params.items() if not utils.is_statistic(k)),
        'multiply_adds': utils.multiply_adds(f, params, (opt.image_size, opt.image_size), device),
        'images_per_second': len(val.labels) / seconds,
        'broken_images': len(val.broken),
        'test_time': seconds,
    }
    print_first(utils.json_stats(record))


def begin(argv):
    """(opt, checkpoint, whether it is that of --save) of the command, None in place of opt where
    nothing is left to do. The first rank does this for all, so that a mistake is told once and a
    run folder on its disk is enough."""
    opt, given = parser.parse(argv)
    if opt.evaluate:
        # A run is tested at its own size.
        folder = resnet.run_folder(opt.evaluate)
        logged = folder and os.path.isfile(folder / 'log.txt')
        record = utils.read_log(folder / 'log.txt')[0] if logged else {}
        for name in {'image_size', 'imagenetpath'} - given:
            if name in record and parser.takes(name, record[name]):
                setattr(opt, name, record[name])
        if not opt.imagenetpath:
            raise UserError('--evaluate: give the photographs to test on, --imagenetpath')
        return opt, None, False
    checkpoint, folder = utils.find_checkpoint(opt, given, parser, complete)
    opt = complete(opt)
    here, finished = utils.begin(opt, given, checkpoint, folder)
    return (None, None, False) if finished else (opt, checkpoint, here)


def run(opt, device, device_ids, checkpoint, here):
    """Trains, from the checkpoint on; `here`: it is that of --save."""
    utils.keep_freed_memory()
    f_student, f_teacher, params, train_set, val, facts = prepare(opt, device, checkpoint)
    if opt.beta and opt.at_start > opt.epochs > 0:
        print_first(
            f'--at_start {opt.at_start}: attention transfer does not begin in {opt.epochs} epochs'
        )
    loss_of = make_loss(f_student, f_teacher, opt, device_ids)
    utils.warn_of_slow_dtype(opt.dtype, device)
    loss_of = utils.compiled(loss_of, opt, device)
    step_of = Student(loss_of, params)
    if world_size() > 1:
        ids = device_ids if device.type == 'cuda' else None
        step_of = DistributedDataParallel(step_of, device_ids=ids)
    optimizer = utils.make_optimizer(params, opt, epoch=1)
    if checkpoint:
        utils.load_optimizer(optimizer, checkpoint)
    folder = utils.open_folder(opt.save, checkpoint, here)
    advice = utils.resume_advice(opt, here)
    with contextlib.ExitStack() as stack:
        all_or_none(lambda: stack.enter_context(folder) if rank() == 0 else None)
        train(opt, step_of, f_student, params, optimizer, train_set, val, facts, checkpoint, advice)


def main(argv=None):
    join()
    begun = all_or_none(lambda: begin(argv) if rank() == 0 else None)
    opt, checkpoint, here = broadcast(begun)
    if opt:
        device, device_ids = all_or_none(open_device, opt)
        if opt.evaluate:
            evaluate(opt, device)
        else:
            run(opt, device, device_ids, checkpoint, here)


if __name__ == '__main__':
    status = utils.call_main(main)
    if world_size() > 1:
        # All is written. The threads of torch.distributed now and then abort a process that is
        # taken down in the usual way.
        if dist.is_initialized() and status == 0:
            dist.barrier()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
