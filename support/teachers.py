"""Nets from files in use: a teacher, its classes, its test and warnings; the end of --evaluate."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable

import torch

import data
import resnet
from support import ranks, runs
from support.devices import multiply_adds
from support.logs import class_names, json_stats
from support.program import UserError, listing
from support.weights import Net, checksum, exists, image_shape
from utils import is_statistic


def load_teacher(run: runs.Run, option: str, load: Callable) -> Net | None:
    """The net of `option`, 'teacher_id' or 'teacher_params', None without one. load(path) -> Net.

    A resumed run takes the first net whose weights are as before: at the path given now, or at the
    stored path as seen from the current folder, from the one that the run was started in, or from
    --save, if the teacher has moved along with it. Raises UserError if another net is given, or
    with the paths tried.
    """
    path = getattr(run.opt, option)
    if not path or not run.checkpoint:
        return load(path) if path else None
    stored, facts = run.checkpoint['options'], run.checkpoint['facts']
    started, old = facts.get('folder', ''), stored[option]
    if path != old and any(exists(p) for p in (path, os.path.join('logs', path))):
        net = load(path)
        if checksum(net.params.values()) == facts.get('teacher'):
            return net
        raise UserError(
            f'--resume: --{option} {path}: has other weights than the teacher of this run, {old}: '
            'leave it out, or start a new run in another --save'
        )
    beside = os.path.relpath(old, stored.get('save') or '.')
    places = [path, old, *(os.path.join(started, logs, old) for logs in ('', 'logs'))]
    places.append(os.path.normpath(os.path.join(run.opt.save, beside)))
    faults = []
    for place in dict.fromkeys(places):
        try:
            net = load(place)
        except UserError as e:
            faults.append(re.sub(': no such .*', ': missing', str(e).removeprefix(f'--{option} ')))
            continue
        if checksum(net.params.values()) == facts.get('teacher'):
            run.options[option] = place
            return net
        faults.append(f'{place}: has other weights')
    raise UserError(
        f'--resume: cannot find the teacher of this run. Give its path with --{option}. Tried '
        f'{"; ".join(faults)}'
    )


def warn_of_training(source: str, net: Net, validate: int, classes: list, shape) -> None:
    """Print a warning if the teacher's log says that its training was cut off, that its images had
    another (height, width) than `shape`, or that it has trained on the images that --validate
    holds out. Its data count as the same if they have the same classes: they may be a resized
    copy."""
    last = net.records[-1] if net.records else {}
    epoch, epochs = (last.get(name) for name in ('epoch', 'epochs'))
    if type(epoch) is type(epochs) is int and epoch < epochs:
        text = f'stopped at epoch {epoch} of {epochs}'
        ranks.print_first(f'warning: teacher {source} {text}', sys.stderr)
    if {'image_size', 'image_shape'} & last.keys():
        with contextlib.suppress(UserError):  # an impossible size in the log is no fault here
            own, here = (f'{w}x{h}' for h, w in (image_shape('', net), shape))
            if own != here:
                text = f'was trained on images of {own}, not {here}: its maps may be worse'
                ranks.print_first(f'warning: teacher {source} {text}', sys.stderr)
    held_out = last.get('validate', 0)
    if type(held_out) is int and held_out < validate and class_names(net.records) == classes:
        ranks.print_first(
            f'warning: teacher {source} was trained on images that --validate {validate} holds '
            f'out. Results on them mean little: train it with --validate {validate} too',
            sys.stderr,
        )


def same_classes(params: dict, records: list, classes: list) -> bool:
    """Whether the net has outputs that mean `classes`, as far as its log tells."""
    same_number = resnet.num_classes(params) == len(classes)
    return same_number and class_names(records) in ([], classes)


def check_classes(option: str, net: Net, classes: list) -> None:
    """Raise UserError unless the net that `option` names has outputs that mean `classes`."""
    if resnet.num_classes(net.params) is None:
        raise UserError(f'{option}: the net has no head (fc.weight, fc.bias), which is needed here')
    if not same_classes(net.params, net.records, classes):
        names = class_names(net.records)
        of = f' ({listing(names)})' if names else ''
        raise UserError(
            f'{option}: the net has {len(net.params["fc.bias"])} classes{of}, '
            f'the data {len(classes)} ({listing(classes)}); '
            'they must be the same, in the same order'
        )


def seed_initial_values(opt, teacher: Net | None) -> None:
    """Seed the draws of the student's initial values from --seed, --depth and --width, and from
    the teacher if it has the same shape.

    Otherwise such a student would draw its teacher's initial values.
    """
    same = teacher is not None and resnet.same_shape(teacher.params, opt.depth, opt.width)
    of_teacher = same and checksum(teacher.params.values())
    torch.manual_seed(data.seed_of(opt.seed, 'initial values', opt.depth, opt.width, of_teacher))


def can_be_tested(source: str, teacher: Net, classes: list) -> bool:
    """Whether the teacher's outputs mean `classes`. If not, print that it is not tested."""
    if same_classes(teacher.params, teacher.records, classes):
        return True
    headless = resnet.num_classes(teacher.params) is None
    why = 'has no head' if headless else 'has other classes'
    ranks.print_first(f'teacher {source}: {why}: its accuracy is not tested')
    return False


def warn_of_accuracy(source: str, net: Net, acc: float, images: int, expected=None) -> None:
    """Print a warning if the test accuracy of a net shows that it is broken, untrained, or another
    function than the names of its parameters say. Nothing else shows it.

    acc: in per cent, on so many images; expected: the accuracy that is known of it. It should not
    be three standard errors below that, and should be three above chance.
    """

    def three_errors(p):
        return 300 * math.sqrt(p * (1 - p) / images)

    num_classes = resnet.num_classes(net.params)
    chance = 100 / num_classes
    known = isinstance(expected, (int, float)) and math.isfinite(expected)
    ask = (
        'check the weights file, and that the net expects RGB images, this normalisation '
        'and this order of classes'
    )
    if known and not expected - acc <= three_errors(0.5):
        but = f'far below its known {str(expected)[:6]} %'
    elif acc <= chance + three_errors(1 / num_classes):
        but = f'not clearly above chance, {chance:.2f} % for {num_classes} classes'
        ask = 'it has little to teach' if known else ask
    else:
        return
    ranks.print_first(f'warning: {source} has test accuracy {acc:.2f} %, {but}: {ask}', sys.stderr)


def print_evaluation(
    source: str, net: Net, size: tuple, tested: dict, images: int, seconds: float
) -> None:
    """Print --evaluate's json_stats line. Call it on every rank.

    size: (height, width) of the images; tested: test_loss, test_acc and whatever else the line
    says; images: how many were tested, in that many seconds. Raises UserError, status 1, if the
    test loss is not finite.
    """
    if not math.isfinite(tested['test_loss']):
        error = f'--evaluate {source}: the test loss is {tested["test_loss"]}'
        ranks.end_all(UserError(error, status=1))
    device = next(iter(net.params.values())).device
    record = {'evaluate': source} | tested
    record |= {
        'n_parameters': sum(v.numel() for k, v in net.params.items() if not is_statistic(k)),
        'multiply_adds': multiply_adds(net.f, net.params, size, device),
        'images_per_second': images / seconds,
        'test_time': seconds,
    }
    ranks.print_first(json_stats(record))
