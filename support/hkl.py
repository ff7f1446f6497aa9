"""The arrays in .hkl files of hickle 2 to 5, by h5py. hickle itself would unpickle what it finds.

All errors are UserError without the file's name, see readers.reading.
"""

import math
import re
import zlib

import h5py
import numpy as np
import torch

from support.program import UserError

SHUFFLE, FLETCHER32, GZIP, LZF = 2, 3, 1, 32000  # HDF5's numbers of filters
MOST_CHUNK = 2**22  # bytes of a compressed chunk; h5py makes them 1 MiB at most


def open_nodes(h: h5py.File, file_size: int) -> tuple[dict, int]:
    """({name: dataset}, bytes that their arrays may take) of an open .hkl file.

    Raises UserError with the name of what is not an array of numbers in this file, or claims more
    numbers than the file holds.
    """
    # HDF5 can hang on a string of variable length in a damaged file, so the versions are not read.
    # The groups and their marks tell as much.
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


def _check(name, node) -> bool:
    """Whether the dataset is compressed. Raises UserError if it does not hold what it claims."""
    if not isinstance(node, h5py.Dataset) or node.shape is None or node.dtype.kind not in 'fiu':
        _refuse(name, 'no dataset of numbers')
    if node.is_virtual or node.external:
        _refuse(name, 'stored in another file')
    properties = node.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if not filters:
        if node.id.get_storage_size() < node.nbytes:
            raise UserError(f'{name!r} claims more numbers than the file holds; refused')
        return False
    if len(set(filters)) < len(filters) or not set(filters) <= {SHUFFLE, FLETCHER32, GZIP, LZF}:
        raise UserError(f'{name!r} has the HDF5 filters {filters}; only gzip and lzf are read')
    chunk = math.prod(node.chunks) * node.dtype.itemsize
    n = math.prod(-(-size // side) for size, side in zip(node.shape, node.chunks))
    if chunk > MOST_CHUNK or n * chunk > 2 * node.nbytes + 2**20 or node.id.get_num_chunks() != n:
        raise UserError(f'{name!r} has chunks of implausible size or number; refused')
    for i in range(n):
        _check_chunk(name, node, i, chunk, filters)
    return True


def _check_chunk(name, node, i, chunk, filters):
    info = node.id.get_chunk_info(i)
    if info.size > 2 * chunk + 2**10:
        raise UserError(f'{name!r} has a chunk that grew by compression; refused')
    if GZIP in filters and not info.filter_mask >> filters.index(GZIP) & 1:
        # HDF5 would inflate it to any size.
        _, raw = node.id.read_direct_chunk(info.chunk_offset)
        unpacker = zlib.decompressobj()
        unpacker.decompress(raw, chunk + 8)
        if not unpacker.eof:
            raise UserError(f'{name!r} has a chunk that inflates to more than its size; refused')


def _text(value) -> str:
    value = value[0] if isinstance(value, (np.ndarray, list)) and len(value) else value
    return value.decode() if isinstance(value, bytes) else str(value)


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
    group = _member(h, root)
    if _text(group.attrs.get(mark, '')) not in ('dict', "<class 'dict'>"):
        _refuse(root, _text(group.attrs.get(mark, 'unmarked')))
    for key in group:
        name = key[1:-1] if re.fullmatch(r"'.*'", key) else key
        entry = _member(group, key)
        if _text(entry.attrs.get(mark, '')) != 'dict_item':
            _refuse(name, _text(entry.attrs.get(mark, 'unmarked')))
        node = _member(entry, root)
        if _text(node.attrs.get(mark, '')) != 'ndarray':
            _refuse(name, _text(node.attrs.get(mark, 'unmarked')))
        yield name, node


def _entries_5(h):
    """hickle 5: the type of a dataset refers to an entry of a table, which refers to its base type
    by name."""

    def base_type(node):
        if not isinstance(node.attrs.get('type'), h5py.Reference):
            return 'a pickle'
        entry = h[node.attrs['type']]
        if not isinstance(entry.attrs.get('base_type'), h5py.Reference):
            return 'of unknown type'
        return h[entry.attrs['base_type']].name.rsplit('/', 1)[-1]

    group = _member(h, 'data')
    if not isinstance(group, h5py.Group) or base_type(group) != 'dict':
        _refuse('data', base_type(group))
    for key in group:
        name = key[1:-1] if re.fullmatch('".*"', key) else key
        node = _member(group, key)
        if base_type(node) != 'ndarray':
            _refuse(name, base_type(node))
        yield name, node
