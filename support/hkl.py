"""The arrays in .hkl files of hickle 2 to 5, by h5py. hickle itself would unpickle what it finds.

All errors are UserError without the file's name, see readers.reading.
"""

import itertools
import math
import mmap
import re
import zlib

import h5py
import numpy as np
import torch

from support.program import UserError

SHUFFLE, FLETCHER32, GZIP, LZF = 2, 3, 1, 32000  # HDF5's numbers of filters
MOST_CHUNK = 2**21  # bytes; h5py makes chunks of 1 MiB at most
MOST_CHUNKS = 100_000  # of one dataset
MOST_MEMBERS = 10_000  # of one group
MOST_STRINGS = 300_000  # in heaps, see _check_heaps
HEAP = b'GCOL\1\0\0\0'  # how HDF5 marks a heap of strings


def open_nodes(h: h5py.File, file_size: int) -> tuple[dict, int]:
    """({name: dataset}, bytes that their arrays may take) of an open .hkl file.

    Raises UserError with the name of what is not an array of numbers in this file, or claims more
    numbers than the file holds.
    """
    # The groups and their marks tell as much as the strings with the versions, which are not read.
    if 'HICKLE_VERSION' in h.attrs:
        hickle_4 = 'base_type' in _member(h, 'data').attrs
        entries = _entries_nested(h, 'data', 'base_type') if hickle_4 else _entries_5(h)
    elif 'CLASS' in h.attrs and 'VERSION' in h.attrs:
        entries = _entries_nested(h, 'data_0', 'type')  # hickle 2 and 3
    else:
        raise UserError('an HDF5 file, but not written by hickle')
    nodes = dict(entries)
    compressed = [_check(name, node) for name, node in nodes.items()]
    # Weights hardly compress. A file that claims 16 times its size is not one of weights.
    return nodes, (16 if any(compressed) else 2) * file_size + 2**26


def read(node: h5py.Dataset) -> torch.Tensor:
    array = np.asarray(node[()])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder('='), copy=False))


def _check_heaps(path) -> None:
    """Raise UserError if a heap of strings in the file is damaged: HDF5 can loop in it for ever."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        heap, n = data.find(HEAP), 0
        while heap >= 0:
            place, end = heap + 16, heap + int.from_bytes(data[heap + 8 : heap + 16], 'little')
            while place + 16 <= end <= len(data):  # each string has 16 bytes before it
                size = int.from_bytes(data[place + 8 : place + 16], 'little')
                is_free_space = data[place : place + 2] == bytes(2)
                needed = size if is_free_space else 16 + -(-size // 8) * 8
                place, n = place + needed, n + 1
                if not 16 <= needed or place > end or n > MOST_STRINGS:
                    raise UserError('damaged (a heap of strings)')
            heap, n = data.find(HEAP, heap + 1), n + 1


def _check(name, node) -> bool:
    """Whether the dataset is compressed. Raises UserError if it does not hold what it claims."""
    if not isinstance(node, h5py.Dataset) or node.shape is None or node.dtype.kind not in 'fiu':
        _refuse(name, 'a group or text')
    if node.is_virtual or node.external:
        _refuse(name, 'stored in another file')
    if node.chunks:
        return _check_chunks(name, node)
    if node.id.get_storage_size() < node.nbytes:
        raise UserError(f'{name!r} claims more numbers than the file holds; refused')
    return False


def _check_chunks(name, node) -> bool:
    properties = node.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    # In h5py's order a chunk is unpacked once, and the packed bytes are those of the file.
    in_order = [f for f in (SHUFFLE, GZIP, LZF, FLETCHER32) if f in filters]
    if filters != in_order or {GZIP, LZF} <= set(filters):
        raise UserError(f'{name!r} has the HDF5 filters {filters}; only gzip and lzf are read')
    size = math.prod(node.chunks) * node.dtype.itemsize
    n = math.prod(-(-length // side) for length, side in zip(node.shape, node.chunks))
    chunks = []

    def add(chunk):
        chunks.append(chunk)
        return len(chunks) > n or None  # whether to stop

    if size <= MOST_CHUNK and n <= MOST_CHUNKS and n * size <= 2 * node.nbytes + 2**20:
        node.id.chunk_iter(add)
    if len(chunks) != n:
        raise UserError(f'{name!r} has chunks of implausible size or number; refused')
    for chunk in chunks:
        if chunk.size > size + size // 100 + 64:
            raise UserError(f'{name!r} has a chunk that grew by compression; refused')
        for kind, unpacks in (GZIP, _gzip_unpacks), (LZF, _lzf_unpacks):
            if kind in filters and not chunk.filter_mask >> filters.index(kind) & 1:
                _, raw = node.id.read_direct_chunk(chunk.chunk_offset)
                if not unpacks(raw, size):
                    raise UserError(f'{name!r} has a chunk that unpacks to another size; refused')
    return GZIP in filters or LZF in filters


def _gzip_unpacks(raw: bytes, size: int) -> bool:
    """Whether a chunk unpacks to that many bytes. HDF5 would unpack it to any size."""
    unpacker = zlib.decompressobj()
    return len(unpacker.decompress(raw, size + 1)) == size and unpacker.eof


def _lzf_unpacks(raw: bytes, size: int) -> bool:
    """Whether a chunk unpacks to about that many bytes. Behind it there may be a checksum."""
    unpacked = i = 0
    while i < len(raw) and unpacked <= 2 * size:
        code = raw[i]
        if code < 32:  # as many bytes and one more follow
            unpacked, i = unpacked + code + 1, i + code + 2
        else:  # a copy of bytes before it
            length = code >> 5 if code < 224 else 7 + raw[i + 1]
            unpacked, i = unpacked + length + 2, i + (2 if code < 224 else 3)
    return unpacked <= 2 * size


def _members(group) -> list:
    """The keys of a group."""
    keys = list(itertools.islice(group, MOST_MEMBERS + 1))
    if len(keys) > MOST_MEMBERS:
        raise UserError('has too many entries for weights')
    return keys


def _mark(node, name) -> str:
    """The text of an attribute, alone or in an array."""
    if name not in node.attrs:
        return 'unmarked'
    attribute = node.attrs.get_id(name)
    if math.prod(attribute.shape) != 1 or attribute.dtype.itemsize > 1000:
        return 'marked by no text'
    (value,) = np.ravel(node.attrs[name]).tolist()
    return value.decode(errors='replace') if isinstance(value, bytes) else str(value)[:100]


def _member(group, key):
    # A link into another file would read a file that the user did not name.
    link = group.get(key, getlink=True) if isinstance(group, h5py.Group) else None
    if not isinstance(link, h5py.HardLink):
        raise UserError(f'{key!r} is not part of this file')
    return group[key]


def _refuse(name, what):
    raise UserError(f'{name!r} is {what}, not an array of numbers; refused')


def _entries_nested(h, root, mark):
    """hickle 2 and 3 (groups data_0, attribute `type`) and 4 (groups data, `base_type`)."""
    _check_heaps(h.filename)
    group = _member(h, root)
    if _mark(group, mark) not in ('dict', "<class 'dict'>"):
        _refuse(root, _mark(group, mark))
    for key in _members(group):
        name = key[1:-1] if re.fullmatch(r"'.*'", key) else key
        entry = _member(group, key)
        if _mark(entry, mark) != 'dict_item':
            _refuse(name, _mark(entry, mark))
        node = _member(entry, root)
        if _mark(node, mark) != 'ndarray':
            _refuse(name, _mark(node, mark))
        yield name, node


def _entries_5(h):
    """hickle 5: the type of a dataset refers to an entry of a table, which refers to its base type,
    another entry."""
    table = _member(h, 'hickle_types_table')
    types = {_member(table, key): key for key in _members(table)}

    def referred(node, mark):
        """The name in the table of what an attribute refers to."""
        if mark in node.attrs and node.attrs.get_id(mark).dtype == h5py.ref_dtype:
            reference = node.attrs[mark]
            if isinstance(reference, h5py.Reference):
                return types.get(h[reference])
        return None

    base_types = {key: referred(node, 'base_type') for node, key in types.items()}

    def base_type(node):
        return base_types.get(referred(node, 'type')) or 'of unknown type or a pickle'

    group = _member(h, 'data')
    if not isinstance(group, h5py.Group) or base_type(group) != 'dict':
        _refuse('data', base_type(group))
    for key in _members(group):
        name = key[1:-1] if re.fullmatch('".*"', key) else key
        node = _member(group, key)
        if base_type(node) != 'ndarray':
            _refuse(name, base_type(node))
        yield name, node
