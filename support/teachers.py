"""Nets from files in use: a teacher, its classes, its test and warnings; the end of --evaluate."""

import math
import sys

import torch

import data
import resnet
from support import ranks
from support.devices import multiply_adds
from support.logs import class_names, json_stats
from support.program import UserError, listing
from support.weights import Net, checksum
from utils import is_statistic


def same_classes(params: dict, records: list, classes: list) -> bool:
    """Whether the outputs of the net mean `classes`, as far as its log tells."""
    return len(params['fc.bias']) == len(classes) and class_names(records) in ([], classes)


def check_classes(option: str, net: Net, classes: list) -> None:
    """Raise UserError unless the outputs of the net that `option` names mean `classes`."""
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
    ranks.print_first(f'teacher {source}: has other classes, so that its accuracy is not tested')
    return False


def warn_of_teacher(source: str, acc: float, but: str) -> None:
    """Print that the accuracy is not as expected. A broken teacher teaches nothing, and nothing
    else shows it."""
    ranks.print_first(
        f'warning: teacher {source} has test accuracy {acc:.2f} %, but {but}', sys.stderr
    )


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
    device = net.params['fc.bias'].device
    record = {'evaluate': source} | tested
    record |= {
        'n_parameters': sum(v.numel() for k, v in net.params.items() if not is_statistic(k)),
        'multiply_adds': multiply_adds(net.f, net.params, size, device),
        'images_per_second': images / seconds,
        'test_time': seconds,
    }
    ranks.print_first(json_stats(record))
