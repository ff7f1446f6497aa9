"""Nets from weights files of every format and from run folders: reading, checking, writing."""

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import hickle
import numpy as np
import torch

import data
import nin
import resnet
from support import names, program, readers
from support.files import write_atomically
from support.logs import read_log
from support.program import UserError, check_reachable, listing
from utils import wide

# Where programs store the accuracy of a net.
ACCURACIES = ('best_acc1', 'best_acc', 'best_top1', 'acc1', 'acc', 'test_acc', 'val_acc')
ACCURACIES += ('accuracy', 'best_value', 'metric')
OTHER_NETS = 'This needs a ResNet, Wide ResNet or NIN; examples/transfer.py trains any torch module'


class Net(NamedTuple):
    """A net from a file."""

    f: Callable  # f(x, params, training, base=''), see resnet.py; logits None without a head
    params: dict  # float32 tensors
    records: list  # of its log, [] without one


# ------------------------ nets


def load_net(source) -> Net:
    """(f, params, records) of a weights file of any layout, FILE:KEY, or a run folder.

    The parameters' names tell the net. Without a head (fc.*) f gives None for the logits. A file
    outside a run folder has no records. Folders of the published code (log.txt and model.pt7) are
    run folders too. Raises UserError that names the file if it is damaged, of another kind of net,
    or differs from the log.
    """
    file, folder, records = source, run_folder(source), []
    if not exists(source):
        raise UserError(f'{source}: no such run folder or weights file')
    if folder:
        if not os.path.exists(folder / 'log.txt'):
            check_reachable(folder / 'log.txt')
            raise UserError(
                f'{folder}: has no log.txt: not a run folder, or its first epoch is not finished'
            )
        records = read_log(folder / 'log.txt')
    if os.path.isdir(source):
        file = folder / ('model.hkl' if os.path.exists(folder / 'model.hkl') else 'model.pt7')
        if not os.path.exists(file):
            raise UserError(f'{folder}: has neither model.hkl nor model.pt7')
    params, naming = _load(file)
    f, params = check_net(params, file, naming)
    if records:
        logged, shape = [records[0].get(k) for k in ('depth', 'width')], resnet.net_shape(params)
        if not all(type(v) in (int, float) and abs(v) < 1e6 for v in logged):
            raise UserError(f'{folder / "log.txt"}: its first line has no valid depth and width')
        if not resnet.same_shape(params, *logged):
            raise UserError(
                f'{file}: has depth {shape[0]} and width {shape[1]:g}, '
                f'but its log.txt says {logged[0]} and {logged[1]:g}'
            )
    return Net(f, params, records)


def normalisation(params: dict) -> tuple:
    """(mean, std) of a byte that the images of such a net are normalised with."""
    small = resnet.layout(params) in resnet.SMALL
    return (data.MEAN, data.STD) if small else (data.IMAGENET_MEAN, data.IMAGENET_STD)


def image_shape(source: str, net: Net) -> tuple[int, int]:
    """(height, width) of the images that the net was trained on, as its log says: `image_shape` of
    cifar.py, `image_size` of imagenet.py. Without them 32 or 224, which is printed unless there is
    a log. Raises UserError that begins with `source` if the log has an impossible one."""
    record = net.records[-1] if net.records else {}  # the last: old runs may be continued
    if 'image_shape' in record:
        shape = record['image_shape']
    elif 'image_size' in record:
        shape = [record['image_size']] * 2
    else:
        side = 32 if resnet.layout(net.params) in resnet.SMALL else 224
        if not record:
            program.say_once(f'{source}: has no image size: taking {side}; see --image_size')
        return side, side
    pair = shape if isinstance(shape, list) and len(shape) == 2 else [None]
    if not all(type(n) is int and 1 <= n <= 4096 for n in pair):
        raise UserError(f'{source}: its log has an invalid image size, {shape}: give --image_size')
    return tuple(shape)


def load_net_for(option: str, source, layouts: tuple, otherwise: str) -> Net:
    """load_net of what an option names. Raises UserError that begins with the option; if the net's
    layout is not one of `layouts`, it ends with `otherwise`."""
    try:
        net = load_net(source)
    except UserError as e:
        raise UserError(f'{option} {e}') from e
    if resnet.layout(net.params) not in layouts:
        raise UserError(f'{option} {source}: {otherwise}')
    return net


def run_folder(source) -> Path | None:
    """The run folder that `source` is, or whose weights it is; None for other weights files and
    for FILE:KEY, which can be the teacher beside a run's student."""
    file, key = split_key(source)
    if key:
        return None
    if os.path.isdir(file):
        return file
    of_run = file.name in ('model.hkl', 'model.pt7') and os.path.exists(file.parent / 'log.txt')
    return file.parent if of_run else None


def check_net(params: dict, source, naming: str = 'ours') -> tuple[Callable, dict]:
    """(f, params in float32) of a net of any layout.

    naming: of the file, see names.ANCHORS. Raises UserError that names `source` and the parameter,
    as the file calls it, if one is missing, not understood, of the wrong shape, or not finite.
    """
    other_nets = '' if naming == 'ours' else f'. {OTHER_NETS}'
    try:
        kind, (depth, width, num_classes) = resnet.layout(params), resnet.net_shape(params)
        f = resnet.from_params(params)
        expected = expected_params(f, params, kind, depth, width, num_classes)
    except UserError as e:
        fault = names.spell(str(e), naming)
        if naming:
            theirs = [names.to_theirs(name, naming) for name in params]
            fault += f' (it has {listing(theirs)})'
        raise UserError(f'{source}: {fault}{other_nets}') from e
    try:
        return f, check_params(params, expected)
    except UserError as e:
        raise UserError(f'{source}: {names.spell(str(e), naming)}{other_nets}') from e


def expected_params(f, params: dict, kind, depth, width, num_classes) -> dict:
    """The parameters that such a net has, on the meta device, which allocates nothing however
    large they are. Raises UserError if they do not fit each other."""
    if kind in ('wrn', 'resnet', 'nin'):
        with torch.device('meta'):
            variant = nin.variant(params)
            expected = resnet.new_net(kind, depth, width, num_classes or 1, *variant)[1]
        return {k: v for k, v in expected.items() if num_classes or not k.startswith('fc.')}
    expected = {k: torch.empty(v.shape, device='meta') for k, v in params.items()}
    try:
        logits, _ = f(torch.empty(1, 3, 64, 64, device='meta'), expected, False)
    except KeyError as e:
        raise UserError(f'{e.args[0]} is missing') from e
    except (RuntimeError, ValueError) as e:
        raise UserError(f'its shapes do not fit each other ({str(e).splitlines()[0][:150]})') from e
    if num_classes and logits.shape != (1, num_classes):
        raise UserError(f'fc.weight has shape {tuple(params["fc.weight"].shape)}')
    return expected


def check_params(params: dict, expected: dict) -> dict:
    """`params` in the order and dtype of `expected`, detached.

    Raises UserError with the tensor's name if one is missing or not understood, a shape differs, or
    a value is not finite.
    """
    for what, unfit in (
        ('missing', expected.keys() - params.keys()),
        ('not understood', params.keys() - expected.keys()),
    ):
        if unfit:
            raise UserError(f'{len(unfit)} parameters {what} ({listing(sorted(unfit), 3)})')
    checked = {}
    for name, e in expected.items():
        p = params[name].detach()
        if p.shape != e.shape:
            raise UserError(f'{name} has shape {tuple(p.shape)}, this net needs {tuple(e.shape)}')
        if not p.is_floating_point():
            raise UserError(f'{name} holds {p.dtype}, not floating-point numbers')
        if not p.float().isfinite().all():
            raise UserError(f'{name} holds nan or inf')
        checked[name] = p.to(e.dtype).contiguous()
    return checked


def checksum(tensors) -> int:
    """CRC-32 of the bytes of CPU tensors or arrays, to notice that a data set or a teacher has
    changed."""
    value = 0
    for t in tensors:
        value = zlib.crc32(np.ascontiguousarray(t).data, value)
    return value


# ------------------------ files


def save_params(path, params: dict) -> None:
    """Write {name: tensor} to an .hkl file, atomically. bfloat16, which numpy lacks, becomes
    float32."""
    wider = {k: wide(v) if v.dtype == torch.bfloat16 else v for k, v in params.items()}
    arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in wider.items()}

    # In memory: HDF5 crashes if the disk is full.
    with h5py.File('memory', 'w', driver='core', backing_store=False) as file:
        hickle.dump(arrays, file)
        file.flush()
        image = file.id.get_file_image()
    write_atomically(path, lambda temporary: temporary.write_bytes(image))


def load_params(source) -> dict:
    """{name: CPU tensor, dtype as stored} of a weights file: what torch.save or safetensors
    writes, or .hkl of hickle 2 to 5. 'FILE:KEY' takes one entry of a file with several nets.

    Nets of torchvision, timm, RepDistiller and mdistiller get our names. Prints one line if the
    file holds more than the net. Nothing in a file is run. Raises UserError that names the file
    and the fault.
    """
    return _load(source)[0]


def _load(source) -> tuple[dict, str]:
    """(params, naming of the file, see names.ANCHORS)."""
    tensors, naming = _read(source)
    return {names.to_ours(k, naming): v for k, v in tensors.items()}, naming


def _read(source) -> tuple[dict, str]:
    """(tensors under the names of the file, its naming)."""
    path, key = split_key(source)
    with readers.opened(path) as contents:
        found = names.find(contents.values, key)
        tensors = readers.read_all(found.tensors, contents.limit)
    if found.note:
        program.say_once(f'{source}: {found.note}')
    return tensors, found.naming


def load_into(module: torch.nn.Module, source) -> None:
    """Load a weights file, or FILE:KEY, into a torch module of any kind. Raises UserError that
    names the file and what does not fit."""
    tensors, _ = _read(source)
    try:
        missing, unknown = module.load_state_dict(tensors, strict=False)
    except RuntimeError as e:  # other shapes
        raise UserError(f'{source}: does not fit the net: {str(e)[:300]}') from e
    for what, unfit in (
        ('lacks', [k for k in missing if not k.endswith('num_batches_tracked')]),
        ('has more than the net', unknown),
    ):
        if unfit:
            raise UserError(f'{source}: {what}: {listing(unfit)}')


def stated_accuracy(source) -> float | None:
    """The test accuracy in per cent that a weights file of another program states, None if it does
    not, or for a run folder, whose log does."""
    if run_folder(source):
        return None
    with readers.opened(split_key(source)[0]) as contents:
        values = contents.values if isinstance(contents.values, dict) else {}
        key = next((key for key in ACCURACIES if key in values), None)
        stated = values.get(key)
        if isinstance(stated, readers.Stored) and math.prod(stated.shape) == 1:
            stated = stated.read().item()
    if type(stated) not in (int, float) or not 0 < stated <= 100:
        return None
    if stated <= 1 and key in ('metric', 'best_value'):  # it may be a loss
        return None
    return stated * (100 if stated <= 1 else 1)


def split_key(source) -> tuple[Path, str]:
    """(file, key) of FILE:KEY, (file, '') of a path that exists or has no key."""
    file, colon, key = str(source).rpartition(':')
    if colon and not os.path.exists(source) and os.path.isfile(file):
        return Path(file), key
    return Path(source), ''


def exists(source, option: str = '') -> bool:
    """Whether `source` is an existing path or FILE:KEY of an existing file. Raises UserError, which
    begins with `option`, if it lies in a closed folder."""
    file, _ = split_key(source)
    check_reachable(file, option)
    return os.path.exists(file)
