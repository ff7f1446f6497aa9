"""The contents of weights files: plain values, and tensors that are read on demand.

A weights file may come from a stranger. Nothing in it is run, and nothing is allocated unless its
size is in proportion to the file's.
"""

import contextlib
import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import safetensors
import torch

from support import hkl
from support.pickles import MOST_BYTES, Name, StandIn, is_key, load
from support.program import UserError, open_regular

MOST_OF_TENSORS = 2**32  # bytes that are read from one file
MOST_HEADER = 2**22  # bytes of the header of a .safetensors file
MOST_MEMBERS = 50_000  # of an archive
MOST_AT_ONCE = 2**24  # bytes of its list of members


class Stored(NamedTuple):
    """A tensor in an open file."""

    shape: tuple
    nbytes: int
    read: Callable  # read() -> CPU tensor


class Contents(NamedTuple):
    """What an open file holds."""

    values: object  # nested dicts, lists and tuples, plain values, Stored, StandIn
    limit: int  # bytes of tensors that may be read


@contextlib.contextmanager
def opened(path):
    """The Contents of a weights file, whose tensors can be read inside the block.

    The first bytes tell the format: torch.save's, as an archive or as before torch 1.6;
    safetensors; hickle 2 to 5. Raises UserError that names the file and its fault, or says what
    it is instead.
    """
    with reading(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        head, size = file.read(512), os.path.getsize(path)
        limit = 2 * size + 2**26
        header_bytes = int.from_bytes(head[:8], 'little')
        if head.startswith(b'PK\x03\x04'):
            values = _Archive(stack.enter_context(_zip(file)), limit).values
        elif head[2:].startswith(_MAGIC):
            values = _Legacy(file, limit).values
        elif h5py.is_hdf5(path):
            h = stack.enter_context(h5py.File(path, 'r', locking=False))
            nodes, limit = hkl.open_nodes(h, size)
            values = {k: Stored(n.shape, n.nbytes, partial(hkl.read, n)) for k, n in nodes.items()}
        elif head[8:9] == b'{' and 0 < header_bytes < size:
            values = _safetensors(stack, path, header_bytes)
        else:
            raise UserError(_what_else(path, head))
        yield Contents(values, min(limit, MOST_OF_TENSORS))


def read_all(stored: dict, limit: int) -> dict:
    """{name: tensor} of {name: Stored}. Raises UserError if they are too large."""
    total = sum(v.nbytes for v in stored.values())
    if total > limit:
        largest = max(stored.values(), key=lambda v: v.nbytes)
        raise UserError(
            f'its tensors take {total / 2**20:,.0f} MiB, too much for such a file '
            f'(the largest has shape {largest.shape})'
        )
    return {name: v.read() for name, v in stored.items()}


def read_values(path):
    """The values of a whole file with its tensors. Raises UserError as `opened` does."""
    with opened(path) as contents:
        return _with_tensors(contents.values, read_all(_tensors(contents.values), contents.limit))


def _tensors(values) -> dict:
    """{id: Stored} of all tensors in the values."""
    found, seen, todo = {}, set(), [values]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Stored):
            found[id(value)] = value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
    return found


def _with_tensors(value, known: dict):
    """The value with tensors in place of Stored ones. known: {id: copy}, of values seen before
    too, because a small file can hold the same list very often."""
    if id(value) in known or not isinstance(value, (dict, list, tuple)) or isinstance(value, Name):
        return known.get(id(value), value)
    if isinstance(value, dict):
        copy = {k: _with_tensors(v, known) for k, v in value.items()}
    else:
        copy = type(value)(_with_tensors(v, known) for v in value)
    known[id(value)] = copy
    return copy


@contextlib.contextmanager
def reading(path):
    """Turn whatever a reader raises at a damaged file into one line that names the file.

    The readers share no exception class, so this catches them all.
    """
    try:
        yield
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except MemoryError as e:
        raise UserError(f'{path}: damaged, or needs more memory than there is') from e
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise UserError(f'{path}: damaged or truncated ({reason})') from e


def _open(path):
    try:
        return open_regular(path)
    except OSError as e:
        raise UserError(e.strerror) from e


def _what_else(path, head: bytes) -> str:
    """What a file of no known format is, as its first bytes tell."""
    text = head.lstrip().lower()
    if not head:
        return 'is empty'
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        return 'is a web page, not weights; download the file itself'
    if text.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer; fetch the file itself with git lfs pull'
    if b'annex/objects' in head:
        return 'is a git-annex pointer; fetch the file itself with git annex get'
    if head.startswith(b'\x1f\x8b'):
        return 'is compressed by gzip; unpack it first'
    if head[257:262] == b'ustar':
        return 'is a tar archive; unpack it, or, if torch wrote it before 2017, save it again'
    if Path(path).suffix.lower() == '.onnx':
        return 'is an ONNX graph; give the weights it was made from'
    if not any(head):
        return 'holds only zeros at its start; copy or download it again'
    if text.startswith(b'{'):
        return 'is JSON text, not weights'
    return 'not a weights file of a supported format (torch.save, safetensors, hickle), or damaged'


# ------------------------ torch.save

_MAGIC = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # of files before torch 1.6: a pickled number
_DTYPES = {
    'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'UntypedStorage': torch.uint8,
}


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0  # of a view, in elements

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize


class _Torch:
    """Tensors of torch.save. Subclasses find the bytes of a storage."""

    def __init__(self, limit):
        self.limit, self.buffers, self.taken, self.storages = limit, {}, 0, {}

    def find(self, storage: _Storage):
        """Raise ValueError unless the file holds as many bytes as it claims for the storage."""

    def fill(self, storage: _Storage, buffer: memoryview):
        """Read the bytes of the storage."""

    def persistent(self, identity):
        """The _Storage of ('storage', type, key, device, numel), and before torch 1.6 of a view
        (key, start, numel) or None."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            return StandIn('a persistent object')
        _, kind, key, _, numel, *view = identity
        if not isinstance(kind, Name) or kind.name not in _DTYPES:
            return StandIn('a storage of unknown type')
        if not isinstance(key, str):  # a tuple of tuples of tuples may take for ever to hash
            return StandIn('a storage of unknown key')
        _, start, _ = view[0] if view and view[0] is not None else (None, 0, None)
        _check_counts(numel, start)
        self.storages[key] = _Storage(key, _DTYPES[kind.name], numel, start)
        return self.storages[key]

    def build(self, name: Name, arguments: tuple):
        """The result of a call, see pickles.load: tensors and what holds plain values."""
        function = str(name)
        if re.fullmatch(r'torch\._?tensor\._rebuild_from_type(_v2)?', function):
            inner, kind, arguments = arguments[:3]
            if kind not in (Name('torch', 'Tensor'), Name('torch.nn.parameter', 'Parameter')):
                return NotImplemented
            function = str(inner) if isinstance(inner, Name) else ''
        if function == 'collections.OrderedDict':
            return dict(*arguments) if _are_pairs(*arguments) else {}
        if function == 'torch.Size' and isinstance(arguments[0], tuple):
            return arguments[0]
        if function == '_codecs.encode' and len(arguments[0]) <= 16:  # how protocol 2 writes bytes
            return arguments[0].encode('latin-1')
        if function == 'numpy.dtype' and isinstance(arguments[0], str):
            return Name('numpy.dtype', arguments[0][:9])
        if re.fullmatch(r'numpy\.(_core|core)\.multiarray\.scalar', function):
            return _numpy_number(*arguments)
        dense = re.fullmatch(r'torch\._utils\._rebuild_tensor(_v2|_v3)?', function)
        if dense and isinstance(arguments[0], _Storage):
            dtype = arguments[6] if function.endswith('_v3') else None
            return self.tensor(*arguments[:4], dtype)
        if function.startswith('torch._utils._rebuild_parameter'):
            return arguments[0]
        return NotImplemented

    def tensor(self, storage, offset, size, stride, dtype=None) -> Stored:
        """Raises ValueError if it claims more than its storage holds."""
        dtype = storage.dtype if dtype is None else vars(torch).get(dtype.name)
        if not isinstance(dtype, torch.dtype) or not len(size) == len(stride) <= 64:
            raise ValueError('a tensor has impossible sizes')
        _check_counts(offset, *size, *stride)
        offset, numel = offset + storage.start, math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        held = storage.nbytes // dtype.itemsize
        if numel > held or numel and last >= held:
            raise ValueError(f'a tensor of shape {tuple(size)} has a storage of {held} numbers')
        self.find(storage)

        def read():
            numbers = self.buffer(storage)[: held * dtype.itemsize].view(dtype)
            return numbers.as_strided(tuple(size), tuple(stride), offset)

        return Stored(tuple(size), numel * dtype.itemsize, read)

    def buffer(self, storage) -> torch.Tensor:
        """The bytes of a storage."""
        if storage.key not in self.buffers:
            self.taken += storage.nbytes
            if self.taken > self.limit:
                raise ValueError(f'its storages take more than {self.limit} bytes')
            buffer = torch.empty(storage.nbytes, dtype=torch.uint8)
            self.fill(storage, memoryview(buffer.numpy()))
            self.buffers[storage.key] = buffer
        return self.buffers[storage.key]


def _check_counts(*numbers):
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError('a tensor has impossible sizes')


def _are_pairs(pairs=None, *more) -> bool:
    return isinstance(pairs, list) and all(
        isinstance(p, (list, tuple)) and len(p) == 2 and is_key(p[0]) for p in pairs
    )


def _numpy_number(dtype, raw=b''):
    """A number of numpy. Little-endian, as almost all are."""
    formats = {'f8': '<d', 'f4': '<f', 'i8': '<q', 'i4': '<i'}
    known = isinstance(dtype, Name) and dtype.name in formats and isinstance(raw, bytes)
    return struct.unpack(formats[dtype.name], raw)[0] if known else NotImplemented


class _Limited:
    """A file for zipfile that refuses to read too much at once, whatever length the list of the
    archive's members claims."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        data = self.file.read(min(size, MOST_AT_ONCE) if size >= 0 else MOST_AT_ONCE)
        if len(data) == MOST_AT_ONCE:
            raise ValueError('an entry is too long')
        return data


@contextlib.contextmanager
def _zip(file):
    """The archive of torch.save. Raises UserError if it is another one."""
    try:
        archive = zipfile.ZipFile(_Limited(file))
    except zipfile.BadZipFile as e:
        raise UserError('is truncated: the end of the archive is missing; copy it again') from e
    with archive:
        members = archive.infolist()
        if len(members) > MOST_MEMBERS:
            raise UserError(f'has {len(members)} members, too many for weights')
        names = {m.filename.partition('/')[2] for m in members}
        if any(m.filename.endswith('.npy') for m in members):
            raise UserError('is an archive of numpy arrays; save them by torch.save')
        if 'constants.pkl' in names:
            raise UserError('is a TorchScript program; save the state_dict of the net')
        if 'data.pkl' not in names:
            raise UserError('is a zip archive, but not of torch.save; unpack it first')
        if any(m.compress_type or m.compress_size != m.file_size for m in members):
            raise UserError('has compressed members, which torch.save never writes')
        yield archive


class _Archive(_Torch):
    """What torch.save writes since torch 1.6: a zip archive with a member for each storage."""

    def __init__(self, archive, limit):
        super().__init__(limit)
        self.archive = archive
        self.members = {m.filename.partition('/')[2]: m for m in archive.infolist()}
        for member in self.members.values():
            if member.CRC == 0:  # torch can leave checksums out
                del member.CRC
        if 'byteorder' in self.members and self.read('byteorder') != b'little':
            raise UserError('was written on a big-endian machine')
        self.values = load(io.BytesIO(self.read('data.pkl')), self.build, self.persistent)

    def read(self, name) -> bytearray:
        data = bytearray(min(self.members[name].file_size, self.limit, MOST_BYTES))
        self.read_member(name, memoryview(data))
        return data

    def read_member(self, name, buffer):
        with self.archive.open(self.members[name]) as member:
            _read_into(member, buffer)
            member.read(1)  # the end: the checksum is compared

    def find(self, storage):
        if self.members[f'data/{storage.key}'].file_size < storage.nbytes:
            raise ValueError(f'storage {storage.key} is shorter than its tensors say')

    def fill(self, storage, buffer):
        self.read_member(f'data/{storage.key}', buffer)


class _Legacy(_Torch):
    """What torch.save wrote before torch 1.6: five pickles, then the storages one after another."""

    def __init__(self, file, limit):
        super().__init__(limit)
        self.file = file
        self.file.seek(0)
        pickles = io.BytesIO(file.read(MOST_BYTES))
        _, _, system, self.values, keys = (
            load(pickles, self.build, self.persistent) for _ in range(5)
        )
        if not system.get('little_endian', True):
            raise UserError('was written on a big-endian machine')
        places, place, size = {}, pickles.tell(), os.path.getsize(file.name)
        for key in keys:
            # A storage is its number of elements, then the elements.
            self.file.seek(place)
            numel = int.from_bytes(self.file.read(8), 'little')
            storage = self.storages[key]
            places[key], place = place + 8, place + 8 + numel * storage.dtype.itemsize
            if numel != storage.numel or place > size:
                raise ValueError(f'storage {key} has not the size that its tensors say')
        self.places = places

    def fill(self, storage, buffer):
        self.file.seek(self.places[storage.key])
        _read_into(self.file, buffer)


def _read_into(file, buffer: memoryview) -> None:
    for start in range(0, len(buffer), 2**23):
        piece = buffer[start : start + 2**23]
        if file.readinto(piece) != len(piece):
            raise ValueError('it ends inside a tensor')


# ------------------------ safetensors


def _safetensors(stack, path, header_bytes: int) -> dict:
    if header_bytes > MOST_HEADER:
        raise ValueError('its header is too long')
    try:
        os.fspath(path).encode()
        file = stack.enter_context(safetensors.safe_open(path, framework='pt'))
    except UnicodeError as e:
        raise UserError('safetensors cannot open a path that is not UTF-8: rename it') from e
    except OSError as e:
        raise UserError(f'safetensors cannot open it: {e}; copy it to another disk') from e
    with open(path, 'rb') as raw:
        raw.seek(8)
        header = json.loads(raw.read(header_bytes))

    def read(name):
        return file.get_tensor(name).clone()  # not a view of the file, which may be cut off later

    values = {}
    for name in file.keys():  # noqa: SIM118, it is not a dict
        start, end = header[name]['data_offsets']
        values[name] = Stored(tuple(header[name]['shape']), end - start, partial(read, name))
    return values
