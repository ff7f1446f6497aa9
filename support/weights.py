"""Weights files of every format: reading, checking, writing. Nothing in a file is ever run."""

import contextlib
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import hickle
import numpy as np
import torch

import nin
import resnet
from support.files import write_atomically
from support.logs import read_log
from support.program import UserError, listing
from utils import part, wide


class Net(NamedTuple):
    """A net from a file."""

    f: Callable  # f(x, params, training, base=''), see resnet.py
    params: dict  # float32 tensors
    records: list  # of its log, [] without one


# ------------------------ nets


def load_net(source) -> Net:
    """(f, params, records) of a weights file of any layout, or of a run folder.

    The parameters' names tell the net. A file outside a run folder has no records. Folders of the
    published code (log.txt and model.pt7) are run folders too. Raises UserError that names the
    file if it is damaged or its net differs from the log's.
    """
    weights, folder, records = Path(source), run_folder(source), []
    if not os.path.exists(source):
        raise UserError(f'{source}: no such run folder or weights file')
    if folder:
        if not os.path.exists(folder / 'log.txt'):
            raise UserError(f'{folder}: no finished epoch in it yet (there is no log.txt)')
        records = read_log(folder / 'log.txt')
    if folder == weights:
        weights = folder / ('model.hkl' if os.path.exists(folder / 'model.hkl') else 'model.pt7')
        if not os.path.exists(weights):
            raise UserError(f'{folder}: has neither model.hkl nor model.pt7')
    f, params = check_net(load_params(weights), weights)
    if records:
        logged, shape = [records[0].get(k) for k in ('depth', 'width')], resnet.net_shape(params)
        if not all(type(v) in (int, float) and abs(v) < 1e6 for v in logged):
            raise UserError(f'{folder / "log.txt"}: its first line does not tell depth and width')
        if not resnet.same_shape(params, *logged):
            raise UserError(
                f'{weights}: has depth {shape[0]} and width {shape[1]:g}, '
                f'but its log.txt says {logged[0]} and {logged[1]:g}'
            )
    return Net(f, params, records)


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
    """The run folder that `source` is, or whose weights it is; None for other weights files."""
    source = Path(source)
    if os.path.isdir(source):
        return source
    of_run = source.name in ('model.hkl', 'model.pt7') and os.path.exists(source.parent / 'log.txt')
    return source.parent if of_run else None


def check_net(params: dict, source) -> tuple[Callable, dict]:
    """(f, params in float32) of a net of any layout.

    Raises UserError that names `source` and the parameter if one is missing, not understood, of
    the wrong shape, or not finite.
    """
    try:
        kind, (depth, width, num_classes) = resnet.layout(params), resnet.net_shape(params)
        f = resnet.from_params(params)
        # The meta device allocates nothing, however large the net that the names claim.
        if kind in ('wrn', 'resnet', 'nin'):
            with torch.device('meta'):
                expected = resnet.new_net(kind, depth, width, num_classes, *nin.variant(params))[1]
        else:
            expected = {k: torch.empty(v.shape, device='meta') for k, v in params.items()}
            try:
                logits, _ = f(torch.empty(1, 3, 64, 64, device='meta'), expected, False)
            except KeyError as e:
                raise UserError(f'{e.args[0]} is missing') from e
            except (RuntimeError, ValueError) as e:
                raise UserError(
                    f'its shapes do not fit each other ({str(e).splitlines()[0][:150]})'
                ) from e
            if logits.shape != (1, num_classes):
                raise UserError(f'fc.weight has shape {tuple(params["fc.weight"].shape)}')
    except UserError as e:
        raise UserError(f'{source}: {e}') from e
    return f, check_params(params, expected, source)


def check_params(params: dict, expected: dict, source) -> dict:
    """`params` in the order and dtype of `expected`, detached.

    Raises UserError that names `source` and the tensor if a name is missing or not understood, a
    shape differs, or a value is not finite.
    """
    for what, names in (
        ('missing', expected.keys() - params.keys()),
        ('not understood', params.keys() - expected.keys()),
    ):
        if names:
            raise UserError(
                f'{source}: {len(names)} parameters {what} ({listing(sorted(names), 3)})'
            )
    checked = {}
    for name, e in expected.items():
        p = params[name].detach()
        if p.shape != e.shape:
            raise UserError(
                f'{source}: {name} has shape {tuple(p.shape)}, this net needs {tuple(e.shape)}'
            )
        if not p.is_floating_point():
            raise UserError(f'{source}: {name} holds {p.dtype}, not floating-point numbers')
        if not p.float().isfinite().all():
            raise UserError(f'{source}: {name} holds nan or inf')
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

    def write(temporary):
        # The run folder is locked; without locks on its disk HDF5 would refuse.
        with h5py.File(temporary, 'w', locking=False) as file:
            hickle.dump(arrays, file)

    write_atomically(path, write)


def load_params(path) -> dict:
    """{name: CPU tensor, dtype as stored} of a weights file: .hkl of hickle 2 to 5, .pth, .pt,
    .pt7 or .safetensors.

    torchvision's and timm's ResNets get our names. A checkpoint gives its 'params', 'state_dict'
    or 'model'; a file with a student and its teacher gives the student. Nothing in a file is ever
    run: anything but arrays of numbers is refused by name. Raises UserError that names the file
    and the fault.
    """
    path = Path(path)
    readers = {
        '.hkl': _read_hkl,
        '.pth': torch_load,
        '.pt': torch_load,
        '.pt7': torch_load,
        '.safetensors': _read_safetensors,
    }
    if path.suffix not in readers:
        raise UserError(f'{path}: not a weights file; its name must end in {", ".join(readers)}')
    try:
        open(path, 'rb').close()
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from e
    params = readers[path.suffix](path)
    for key in 'params', 'state_dict', 'model':
        if isinstance(params, dict) and isinstance(params.get(key), dict):
            params = params[key]
    if not isinstance(params, dict) or not params:
        raise UserError(f'{path}: holds no dict of tensors')
    for name, value in params.items():
        dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not dense:
            raise UserError(f'{path}: {name!r} is {type(value).__name__}, not a dense tensor')
    params = part(params, 'student') or params
    if all(name.startswith('module.') for name in params):  # saved from nn.DataParallel
        params = {k.removeprefix('module.'): v for k, v in params.items()}
    return from_torchvision({k: v.detach() for k, v in params.items()})


def from_torchvision(params: dict) -> dict:
    """Rename the parameters of torchvision's and timm's ResNets to those of resnet.resnet.

    layer1.0.conv1.weight becomes group0.block0.conv0; num_batches_tracked, which nothing uses, is
    left out. Other dicts are returned unchanged.
    """
    if 'layer1.0.conv1.weight' not in params:
        return params

    def ours(name):
        name = re.sub(r'^layer(\d)\.(\d+)', lambda m: f'group{int(m[1]) - 1}.block{m[2]}', name)
        name = re.sub(r'downsample\.0\.weight$', 'convdim', name).replace('downsample.1', 'bndim')
        name = re.sub(r'conv(\d)\.weight$', lambda m: f'conv{int(m[1]) - 1}', name)
        return re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) - 1}.', name)

    return {ours(k): v for k, v in params.items() if not k.endswith('num_batches_tracked')}


def to_torchvision(params: dict) -> dict:
    """The inverse of from_torchvision. Each batch norm gets a num_batches_tracked of 0."""

    def theirs(name):
        name = re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) + 1}.', name)
        name = re.sub(r'\bconv(\d)$', lambda m: f'conv{int(m[1]) + 1}.weight', name)
        name = name.replace('convdim', 'downsample.0.weight').replace('bndim', 'downsample.1')
        return re.sub(r'^group(\d)\.block(\d+)', lambda m: f'layer{int(m[1]) + 1}.{m[2]}', name)

    renamed = {}
    for name, value in params.items():
        renamed[theirs(name)] = value
        if name.endswith('running_var'):
            renamed[theirs(name).replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    return renamed


@contextlib.contextmanager
def reading(path):
    """Turn whatever a reader raises at a damaged file into one line.

    The readers share no exception class, so this catches them all.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise UserError(f'{path}: damaged, or not such a file ({reason})') from e


def torch_load(path):
    """torch.load of tensors and plain values only, onto the CPU. Runs nothing of the file."""
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, KeyError) as e:
            # torch's own message advises to run the file's code.
            code = re.search(r'GLOBAL (\S+)', str(e))
            if code:
                raise UserError(
                    f'{path}: holds {code[1]}, not tensors and plain values alone; refused '
                    '(a state_dict is read)'
                ) from e
            raise UserError(f'{path}: damaged, or not written by torch.save') from e


def _read_safetensors(path):
    from safetensors.torch import load_file

    with reading(path):
        return load_file(path)


# ------------------------ .hkl


def _read_hkl(path):
    with reading(path), h5py.File(path, 'r', locking=False) as h:
        # hickle 4 and 5 store their version as a string of variable length, on which HDF5 can hang
        # in a damaged file. Only hickle 4 sets base_type on its dict.
        if 'HICKLE_VERSION' in h.attrs:
            if 'base_type' in _member(path, h, 'data').attrs:
                entries = _entries_nested(path, h, 'data', 'data', 'base_type')
            else:
                entries = _entries_5(path, h)
        elif _text(h.attrs.get('CLASS', '')) == 'hickle':
            version = _text(h.attrs['VERSION']).split('.')[0]
            if version not in ('2', '3'):
                raise UserError(
                    f'{path}: written by hickle {version}; versions 2 to 5 are understood'
                )
            entries = _entries_nested(path, h, 'data_0', 'data_0', 'type')
        else:
            raise UserError(f'{path}: an HDF5 file, but not written by hickle')
        nodes = dict(entries)
        sizes = {k: node.nbytes for k, node in nodes.items() if isinstance(node, h5py.Dataset)}
        if sum(sizes.values()) > 2**32:
            _refuse(path, max(sizes, key=sizes.get), 'too large (more than 4 GiB in one file)')
        return {name: _array(path, name, node) for name, node in nodes.items()}


def _text(value) -> str:
    value = value[0] if isinstance(value, (np.ndarray, list)) and len(value) else value
    return value.decode() if isinstance(value, bytes) else str(value)


def _member(path, group, key):
    # A link into another file would read a file that the user did not name.
    link = group.get(key, getlink=True) if isinstance(group, h5py.Group) else None
    if not isinstance(link, h5py.HardLink):
        raise UserError(f'{path}: {key!r} is not part of this file')
    return group[key]


def _refuse(path, name, what):
    raise UserError(f'{path}: {name!r} is {what}, not an array of numbers; refused')


def _entries_nested(path, h, root, item, mark):
    """hickle 2 and 3 (groups data_0, attribute `type`) and 4 (groups data, `base_type`)."""
    group = _member(path, h, root)
    if _text(group.attrs.get(mark, '')) not in ('dict', "<class 'dict'>"):
        _refuse(path, root, _text(group.attrs.get(mark, 'unmarked')))
    for key in group:
        name = key[1:-1] if re.fullmatch(r"'.*'", key) else key
        entry = _member(path, group, key)
        if _text(entry.attrs.get(mark, '')) != 'dict_item':
            _refuse(path, name, _text(entry.attrs.get(mark, 'unmarked')))
        node = _member(path, entry, item)
        if _text(node.attrs.get(mark, '')) != 'ndarray':
            _refuse(path, name, _text(node.attrs.get(mark, 'unmarked')))
        yield name, node


def _entries_5(path, h):
    """hickle 5: the type of a dataset refers to an entry of a table, which refers to its base type
    by name."""

    def base_type(node):
        if not isinstance(node.attrs.get('type'), h5py.Reference):
            return 'a pickle'
        entry = h[node.attrs['type']]
        if not isinstance(entry.attrs.get('base_type'), h5py.Reference):
            return 'of unknown type'
        return h[entry.attrs['base_type']].name.rsplit('/', 1)[-1]

    group = _member(path, h, 'data')
    if not isinstance(group, h5py.Group) or base_type(group) != 'dict':
        _refuse(path, 'data', base_type(group))
    for key in group:
        name = key[1:-1] if re.fullmatch('".*"', key) else key
        node = _member(path, group, key)
        if base_type(node) != 'ndarray':
            _refuse(path, name, base_type(node))
        yield name, node


def _array(path, name, node):
    if not isinstance(node, h5py.Dataset) or node.shape is None or node.dtype.kind not in 'fiu':
        _refuse(path, name, 'no dataset of numbers')
    if node.is_virtual or node.external:
        _refuse(path, name, 'stored in another file')
    array = np.array(node[()])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder('='), copy=False))
