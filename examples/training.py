"""The epochs of transfer.py: batches, averages, weights files, and stops."""

import contextlib
import os
from pathlib import Path

import torch
from modules import Net  # finds the repository

import data
from support.averages import Averages
from support.files import check_new_file, write_atomically
from support.photographs import train_view
from support.program import Stopped, UserError
from support.weights import load_into


def train_batches(train_set, epoch: int, opt):
    """Yield (images, targets) of an epoch: random crops of all photographs, in random order."""

    def view(file, i, out):
        return train_view(file, opt.image_size, opt.seed, epoch, i, out)

    order = data.epoch_order(len(train_set.labels), opt.seed, epoch)
    batches = [b for b in order.split(opt.batch_size) if len(b) > 1]  # batch norm needs two
    yield from train_set.batches(batches, view)


def finish(averages: Averages) -> list[float]:
    """The averages of an epoch. Raises UserError, status 1, if a term is not finite."""
    images = sum(averages.images)
    averages.update()
    return averages.means(images)


@contextlib.contextmanager
def stoppable(path):
    """Add to a signal's message that the student of the last epoch is saved."""
    try:
        yield
    except Stopped as e:
        if os.path.exists(path):
            e.hint = f'{path} is the student after its last epoch'
        raise


def load(net: Net, option: str, path) -> None:
    """Load a state_dict. Raises UserError that begins with the option."""
    if os.path.isdir(path):
        advice = f'give a state_dict: python scripts/convert.py {path} teacher.pth'
        raise UserError(f'{option} {path}: is a folder; {advice}')
    try:
        load_into(net.module, path)
    except UserError as e:
        hint = f'; the net has {net.num_classes} classes: is --teacher_classes right?'
        hint = hint if 'size mismatch' in str(e) else ''
        raise UserError(f'{option} {e} ({net.source}){hint}') from e


def save(net: Net, path, first: bool) -> None:
    """Write the module's state_dict, which a machine without a GPU can load too. The first time,
    raises UserError if another process has written the file since the start."""
    if first:
        check_new_file(path)
    state = {name: value.cpu() for name, value in net.module.state_dict().items()}
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(state, file))
