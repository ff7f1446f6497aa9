"""support/readers.py and support/hkl.py: values, damage, what a file is instead, and attacks."""

import functools
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from contextlib import contextmanager

import h5py
import hickle
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import forked
import fuzz_weights
from samples import randn
from support import readers, weights
from support.program import UserError
from test_weights import Payload, write_hickle_2, write_hickle_3, write_hickle_4, write_hickle_5

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def assert_equal(a, b):
    assert type(a) is torch.Tensor
    assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


# ------------------------ values


def tensors():
    base = randn(4, 6, 5)
    values = {str(dtype): (10 * base).to(dtype) for dtype in DTYPES}
    values |= {
        'offset': base[2:],
        'strided': base[::2, 1::3],
        'transposed': base.transpose(0, 2),
        'channels_last': randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        'the same': base,
        'parameter': nn.Parameter(randn(3)),
        'buffer': nn.Buffer(randn(3)),
        'needs a gradient': randn(3).requires_grad_(),
        'empty': torch.empty(0),
        'empty, of shape 3, 0, 2': torch.empty(3, 0, 2),
        'number': torch.tensor(3),
        'one of many': randn(100)[7],
        'overlapping': torch.arange(6.0).as_strided((2, 3), (1, 1)),
    }
    return values


@contextmanager
def without_checksums():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize('kind', ['zip', 'zip without checksums', 'legacy', 'protocol 4'])
def test_tensors_are_read_as_torch_reads_them(kind, tmp_path):
    values = tensors()
    options = {'pickle_protocol': 4} if kind == 'protocol 4' else {}
    options |= {'_use_new_zipfile_serialization': kind != 'legacy'}
    if kind == 'zip without checksums':
        with without_checksums():
            torch.save(values, tmp_path / 'm')
    else:
        torch.save(values, tmp_path / 'm', **options)
    read = readers.read_values(tmp_path / 'm')
    expected = torch.load(tmp_path / 'm', weights_only=kind != 'protocol 4')
    assert list(read) == list(expected) == list(values)
    for name, value in expected.items():
        assert_equal(read[name], value.detach())


@pytest.mark.parametrize('zipped', [True, False])
def test_tied_tensors_stay_tied(zipped, tmp_path):
    base = torch.zeros(4)
    values = {'a': base, 'b': base[2:], 'c': base}
    torch.save(values, tmp_path / 'm', _use_new_zipfile_serialization=zipped)
    read = readers.read_values(tmp_path / 'm')
    read['a'][3] = 1
    assert read['b'].tolist() == [0, 1] and read['c'] is read['a']


def test_five_views_of_one_tensor_are_read(tmp_path):
    """They take five times as much as the file."""
    base = randn(200, 300)
    torch.save([base[:] for _ in range(5)], tmp_path / 'm')
    for view in readers.read_values(tmp_path / 'm'):
        assert_equal(view, base)


def test_a_view_of_a_file_before_torch_0_4_is_read(tmp_path):
    # Those files store the storage of a view as (key, offset, size) of its root.
    path = tmp_path / 'm'
    torch.save({'a': torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    raw, key = path.read_bytes(), b'X\x01\x00\x00\x000'
    at = raw.index(b'K\x06N')
    view = key + b'K\x02K\x04\x87'  # (key, 2, 4)
    raw = raw[:at] + b'K\x06' + view + raw[at + 3 :]
    size = raw.index(b'K\x06\x85', at)
    path.write_bytes(raw[:size] + b'K\x04\x85' + raw[size + 3 :])
    expected = torch.load(path, weights_only=False)['a']
    assert expected.tolist() == [2, 3, 4, 5]
    assert_equal(readers.read_values(path)['a'], expected)


def test_plain_values_beside_the_tensors_are_kept(tmp_path):
    values = {
        'epoch': 3,
        'best': 91.5,
        'names': ['a', ('b', None)],
        'half': {1: True},
        'big': 2**40,
    }
    values |= {'accuracy': np.float64(91.5), 'count': np.int64(7), 'size': torch.Size([2, 3])}
    for protocol in 2, 4:
        torch.save(values, tmp_path / 'm', pickle_protocol=protocol)
        assert readers.read_values(tmp_path / 'm') == values


def test_safetensors_of_a_name_that_is_not_utf8_are_not_called_damaged(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9')
    safetensors.torch.save_file({'a': torch.zeros(2)}, tmp_path / 'm')
    os.rename(tmp_path / 'm', path)
    with pytest.raises(UserError, match='a path that is not UTF-8: rename it'):
        readers.read_values(path)


def test_safetensors_are_read_as_their_library_reads_them(tmp_path):
    values = {k: v.detach().clone().contiguous() for k, v in tensors().items()}
    safetensors.torch.save_file(values, tmp_path / 'm', metadata={'format': 'pt'})
    read, expected = (
        readers.read_values(tmp_path / 'm'),
        safetensors.torch.load_file(tmp_path / 'm'),
    )
    assert read.keys() == expected.keys() == values.keys()
    for name, value in expected.items():
        assert_equal(read[name], value)


FILTERS = [
    {'compression': 'gzip'},
    {'compression': 'gzip', 'shuffle': True, 'fletcher32': True},
    {'compression': 'lzf'},
    {'compression': 'lzf', 'shuffle': True},
    {'fletcher32': True},
    {'chunks': True},
]


@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_hickles_compressed_arrays_are_read_as_hickle_reads_them(filters, tmp_path):
    path = str(tmp_path / 'm.hkl')
    values = {'noise': randn(300, 200).numpy(), 'zeros': np.zeros((200, 300), 'i2')}
    values |= {'big-endian': np.arange(60, dtype='>f8').reshape(6, 10)}
    hickle.dump(values, path, mode='w', **filters)
    read, expected = readers.read_values(path), hickle.load(path)
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name].numpy(), value)


# ------------------------ damage


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 64
    path.write_bytes(raw)


def test_a_flipped_bit_in_the_weights_is_noticed_by_the_checksum(tmp_path):
    path = tmp_path / 'm'
    torch.save({'a': torch.full((50,), 7.0)}, path)
    flip(path, path.read_bytes().index(struct.pack('<f', 7) * 50) + 100)
    with pytest.raises(UserError, match='CRC'):
        weights.load_params(path)
    hickle.dump({'a': np.full(50, 7.0)}, str(path), mode='w', fletcher32=True)
    flip(path, path.read_bytes().index(struct.pack('<d', 7) * 30) + 100)
    with pytest.raises(UserError, match='damaged'):
        weights.load_params(path)


def test_random_damage_ends_in_weights_or_an_error_of_one_line(tmp_path):
    counts, bad = fuzz_weights.fuzz(3, seed=1, folder=tmp_path)
    assert sum(counts.values()) == 36 and not bad


def compressed_by_gzip():
    file = io.BytesIO()
    torch.save({'a': torch.zeros(3)}, file)
    return gzip.compress(file.getvalue())


def tar_archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as tar:
        tar.addfile(tarfile.TarInfo('storages'))
    return file.getvalue()


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def written(write, *values, **options):
    file = io.BytesIO()
    write(file, *values, **options)
    return file.getvalue()


def zip_archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('weights/model.pth', b'')
    return file.getvalue()


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
OTHERS = {
    'is empty': lambda: b'',
    'a web page': lambda: b'\n<!DOCTYPE html><html><body>404</body></html>',
    'Git LFS pointer': lambda: LFS,
    'git-annex pointer': lambda: b'/annex/objects/SHA256E-s1--ab.pth\n',
    'compressed by gzip': compressed_by_gzip,
    'a tar archive': tar_archive,
    'TorchScript': script,
    'numpy arrays': lambda: written(np.savez, a=np.zeros(3)),
    'not of torch.save': zip_archive,
    'JSON': lambda: json.dumps({'a': [1, 2]}).encode(),
    'only zeros': lambda: bytes(5000),
    'truncated: the end of the archive': lambda: written(
        lambda file: torch.save({'a': torch.zeros(999)}, file)
    )[:-500],
    'not a weights file': lambda: bytes(range(1, 200)),
    r'damaged or truncated \(': lambda: pickle.dumps({'protocol': 2}, 2)[:2] + readers._MAGIC,
}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('message', OTHERS)
def test_the_error_says_what_a_file_is(message, tmp_path):
    path = tmp_path / 'm.pth'
    path.write_bytes(OTHERS[message]())
    with pytest.raises(UserError, match=message) as e:
        weights.load_params(path)
    assert str(path) in str(e.value)


def test_an_onnx_graph_is_named_by_its_suffix(tmp_path):
    (tmp_path / 'm.ONNX').write_bytes(b'\x08\x07\x12\x07pytorch')
    with pytest.raises(UserError, match='ONNX graph'):
        weights.load_params(tmp_path / 'm.ONNX')


# ------------------------ nothing is run


class Object:
    """What a pickle calls: function(*arguments), then state and entries."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


class Identity:
    """A persistent id."""

    def __init__(self, identity):
        self.identity = identity


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Identity) else None


def pickled(value) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def write_archive(path, data: bytes, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('m/data.pkl', data)
        archive.writestr('m/byteorder', b'little')
        archive.writestr('m/version', b'3')
        for i, storage in enumerate(storages):
            archive.writestr(f'm/data/{i}', storage)


def storage(numel, key='0', kind=torch.FloatStorage):
    return Identity(('storage', kind, key, 'cpu', numel))


def tensor(storage, size, stride, offset=0):
    arguments = storage, offset, size, stride, False, {}
    return Object(torch._utils._rebuild_tensor_v2, arguments)


def test_hand_written_archives_are_read_as_torch_reads_them(tmp_path):
    """What the attacks below have in common is sound."""
    data = pickled({'a': tensor(storage(6), (2, 2), (3, 1), 1)})
    write_archive(tmp_path / 'm', data, [np.arange(6, dtype='f4').tobytes()])
    expected = torch.load(tmp_path / 'm')['a']
    assert expected.tolist() == [[1, 2], [4, 5]]
    assert_equal(readers.read_values(tmp_path / 'm')['a'], expected)


MOST_MEMORY = 200 * 2**20
NESTED = ()
for _ in range(100):
    NESTED = (NESTED, NESTED)
IDENTITIES = [
    *(None, 7, 'storage', (), ('storage',), ('module', 'm', 'f', 'source'), b'x', NESTED),
    *(('storage', torch.FloatStorage, NESTED, 'cpu', 1), ('storage', NESTED, '0', 'cpu', 1)),
    *(('storage', torch.FloatStorage, '0', 'cpu', n) for n in (-1, 2**70, 1.0, None, '1', True)),
    *(('storage', torch.FloatStorage, k, 'cpu', 1) for k in ('../../x', '9', 0, None, [])),
    ('storage', torch.FloatStorage, '0', 'cpu', 1, ('v', -5, 1)),
    ('storage', torch.FloatStorage, '0', 'cpu', 1, ('v', 10**9, 1)),
    ('storage', torch.FloatStorage, '0', 'cpu', 1, 'view'),
    (NESTED, torch.FloatStorage, '0', 'cpu', 10**9),
]


def load(path):
    weights.load_params(path)


def assert_refused_quickly(path, load=load):
    end = forked.call(load, path)
    assert end.how == 'refused' and str(path) in end.what, end
    assert 'more memory' not in end.what and end.grown < MOST_MEMORY, (end, end.grown / 2**20)


@pytest.mark.parametrize('i', range(len(IDENTITIES)))
@pytest.mark.parametrize('as_tensor', [True, False])
def test_a_persistent_id_with_odd_contents_is_refused(i, as_tensor, tmp_path):
    value = Identity(IDENTITIES[i])
    value = tensor(value, (1,), (1,)) if as_tensor else value
    write_archive(tmp_path / 'm', pickled({'a': value}), [bytes(4)])
    assert_refused_quickly(tmp_path / 'm')


@pytest.mark.parametrize(
    'size, stride, offset', [((7,), (0,), 0), ((2, 2), (4, 2), 0), ((1,), (1,), 6)]
)
def test_a_tensor_that_exceeds_its_storage_is_refused(size, stride, offset, tmp_path):
    data = pickled({'a': tensor(storage(6), size, stride, offset)})
    write_archive(tmp_path / 'm', data, [bytes(24)])
    with pytest.raises(UserError, match='has a storage of 6 numbers'):
        load(tmp_path / 'm')


def test_a_storage_of_another_size_than_its_tensors_say_is_refused(tmp_path):
    path = tmp_path / 'm'
    write_archive(path, pickled({'a': tensor(storage(6), (6,), (1,))}), [bytes(20)])
    with pytest.raises(UserError, match='storage 0 is shorter than its tensors say'):
        load(path)
    torch.save({'a': torch.ones(6)}, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    assert good[-32:-24] == struct.pack('<q', 6)
    for bad in good[:-4], good[:-32] + struct.pack('<q', 5) + good[-24:]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match='has not the size that its tensors say'):
            load(path)


def test_a_stored_member_that_claims_another_size_is_refused(tmp_path):
    path = tmp_path / 'm'
    write_archive(path, pickled({'a': tensor(storage(6), (6,), (1,))}), [bytes(24)])
    data = bytearray(path.read_bytes())
    last = data.rindex(b'PK\x01\x02')  # the last entry of the directory
    held = struct.unpack_from('<2I', data, last + 20)
    assert held[0] == held[1] and zipfile.is_zipfile(path)
    struct.pack_into('<I', data, last + 24, held[1] + 4)
    path.write_bytes(data)
    with pytest.raises(UserError, match='has compressed members'):
        load(path)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_payload_in_a_file_is_not_run(zipped, tmp_path):
    touched, path = tmp_path / 'touched', tmp_path / 'm'
    reduced = Payload(touched).__reduce__()
    for value in (
        Object(*reduced),
        Object(dict, (), None, None, iter([('a', Object(*reduced))])),
        tensor(Object(*reduced), (1,), (1,)),
        Object(torch._tensor._rebuild_from_type_v2, (*reduced, torch.Tensor, {})),
        Object(torch._tensor._rebuild_from_type_v2, (reduced[0], torch.Tensor, reduced[1], {})),
        Object(torch._utils._rebuild_parameter, (Object(*reduced), False, {})),
    ):
        torch.save({'a': value}, path, _use_new_zipfile_serialization=zipped)
        assert_refused_quickly(path)
    assert not touched.exists()


# ------------------------ no file exhausts the machine


def huge_claims():
    """Tensors that claim more than there is."""
    four = np.ones(1, 'f4').tobytes()
    for name, value in {
        'a tensor of 410 GB': tensor(storage(10**11), (10**11,), (1,)),
        'a tensor larger than its storage': tensor(storage(1), (10**9,), (1,)),
        'a tensor expanded by stride 0': tensor(storage(1), (10**5, 10**5), (0, 0)),
        'a tensor of 2^80 numbers': tensor(storage(1), (2**40, 2**40), (0, 0)),
        'sizes with huge numbers': tensor(storage(1), (2 ** (2**20),) * 60, (0,) * 60),
        'a tensor with a million dimensions': tensor(storage(1), (1,) * 10**5, (1,) * 10**5),
        'an offset beyond the storage': tensor(storage(1), (1,), (1,), 2**40),
        'negative strides': tensor(storage(1), (2,), (-1,), 1),
        'a storage of 2^62 numbers': tensor(storage(2**62), (1,), (1,)),
        'a storage of another type': tensor(storage(10**9, kind=torch.DoubleStorage), (1,), (1,)),
    }.items():
        yield name, lambda path, value=value: write_archive(path, pickled({'a': value}), [four])


def shared_list(n):
    value = [torch.zeros(1).numpy().tolist()]
    for _ in range(n):
        value = [value, value]
    return value


def write_bomb_of_a_member(path):
    data = pickled({'a': tensor(storage(2**26), (2**26,), (1,))})
    write_archive(path, data, [np.zeros(2**26, 'f4')], zipfile.ZIP_DEFLATED)


def write_bomb_of_a_pickle(path):
    write_archive(path, b'\x80\x02](' + b'}' * 2**26 + b'e.', compression=zipfile.ZIP_DEFLATED)


def write_long_text_in_a_pickle(path):
    write_archive(path, b'\x80\x02}X\x01\0\0\0aX' + struct.pack('<I', 2**25) + b'x' * 2**25 + b's.')


def write_overlapping_members(path):
    """1,000 members that are the same 1 MB of the file."""
    n = 1000
    values = {f'a{i}': tensor(storage(2**18, str(i)), (2**18,), (1,)) for i in range(n)}
    write_archive(path, pickled(values), [bytes(2**20)])
    with zipfile.ZipFile(path, 'a') as archive:
        first = archive.getinfo('m/data/0')
        for i in range(1, n):
            other = zipfile.ZipInfo(f'm/data/{i}')
            for key in 'header_offset', 'CRC', 'compress_size', 'file_size':
                setattr(other, key, getattr(first, key))
            archive.filelist.append(other)
        archive._didModify = True


def write_many_members(path, n=250_000):
    """An archive whose central directory is 15 MB."""
    entry = b'PK\x01\x02' + struct.pack('<6H3L5H2L', 20, 0, 0, 0, 0, 0, 0, 0, 0, 7, *[0] * 6)
    names = (b'm/%05x' % i for i in range(n))
    directory = b''.join(entry + name for name in names)
    with open(path, 'wb') as file:
        file.write(b'PK\x03\x04' + bytes(26))
        file.write(directory)
        file.write(
            b'PK\x05\x06' + struct.pack('<4H2LH', 0, 0, 0xFFFF, 0xFFFF, len(directory), 30, 0)
        )


def write_larger_directory(path):
    write_many_members(path, 500_000)


def write_many_empty_storages(path):
    values = {f'a{i}': tensor(storage(0, str(i)), (0,), (1,)) for i in range(3_000)}
    write_archive(path, pickled(values), [b''] * 3_000)


def write_legacy_claim(path):
    torch.save({'a': torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'K\x04', b'\x8a\x06' + (2**40).to_bytes(6, 'little')))


def write_safetensors(path, header: bytes, more=b''):
    path.write_bytes(struct.pack('<Q', len(header)) + header + more)


def write_huge_header(path):
    entries = {
        f'{i}': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]} for i in range(100_000)
    }
    write_safetensors(path, json.dumps(entries).encode())


def write_claimed_header(path):
    path.write_bytes(struct.pack('<Q', 2**50) + b'{"a":{}}' + bytes(100))


def write_claimed_tensor(path):
    entry = {'dtype': 'F32', 'shape': [10**11], 'data_offsets': [0, 4 * 10**11]}
    write_safetensors(path, json.dumps({'a': entry}).encode(), bytes(100))


def write_deep_header(path):
    write_safetensors(path, b'{"a":' + b'[' * 10**6 + b']' * 10**6 + b'}')


def write_dataset(make):
    """A writer of an .hkl file with a dataset that make(group, name) adds."""

    def write(path):
        write_hickle_5(path, {'conv0': np.zeros(3, 'f4')})
        with h5py.File(path, 'a') as h:
            make(h['data'], '"a"').attrs.update(h['data/"conv0"'].attrs)

    return write


@functools.cache
def packed_zeros(n):
    packer = zlib.compressobj(9)
    return b''.join(packer.compress(bytes(2**20)) for _ in range(n >> 20)) + packer.flush()


def bomb(filters=(), lzf=False, chunk=2**20, unpacked=2**28):
    """A dataset with one chunk that unpacks to far more than its size."""

    def make(group, name):
        options = {'compression': 'lzf' if lzf else 'gzip', 'chunks': (chunk // 4,)}
        if filters:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((chunk // 4,))
            for code in filters:
                plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (9,) if code == 1 else ())
            space = h5py.h5s.create_simple((chunk // 4,))
            h5py.h5d.create(group.id, name.encode(), h5py.h5t.IEEE_F32LE, space, plist)
            dataset = group[name]
        else:
            dataset = group.create_dataset(name, (chunk // 4,), 'f4', **options)
        if lzf:  # a zero, then copies of 264 bytes
            packed = b'\x00\x00' + b'\xe0\xff\x00' * (chunk // 3)
        else:
            packed = packed_zeros(unpacked)
        if filters.count(1) == 2:
            packed = zlib.compress(packed)
        dataset.id.write_direct_chunk((0,), packed)
        return dataset

    return make


def tiny_chunks(group, name):
    data = np.ones(30_000, 'f4')
    return group.create_dataset(name, data=data, chunks=(1,), compression='gzip')


def sparse(group, name):
    return group.create_dataset(name, (2**31,), 'f4', chunks=(2**18,), compression='gzip')


def filled(group, name):
    return group.create_dataset(name, (2**31,), 'f4', fillvalue=1.5)


def filled_chunks(group, name):
    return group.create_dataset(name, (2**31,), 'f4', fillvalue=1.5, chunks=(2**18,))


def one_huge_chunk(group, name):
    dataset = group.create_dataset(name, (2**29,), 'f4', chunks=(2**29,), compression='gzip')
    dataset.id.write_direct_chunk((0,), zlib.compress(b'x'))
    return dataset


def many_links(group, name):
    dataset = group.create_dataset(name, data=np.zeros(1, 'f4'))
    for i in range(20_000):
        group[f'"a{i}"'] = dataset
    return dataset


def scale_offset(group, name):
    return group.create_dataset(name, data=np.zeros(2**20, 'i4'), scaleoffset=0)


ATTACKS = dict(huge_claims()) | {
    'a list in lists, 2^40 times': lambda p: torch.save({'a': shared_list(40)}, p),
    'lists in lists': lambda p: write_archive(p, b'\x80\x02' + b']' * 10**5 + b'a' * 99_999 + b'.'),
    'a dict in dicts': lambda p: write_archive(p, b'\x80\x02' + b'}K\x01' * 10**5 + b'Ns.'),
    'a bomb as a storage': write_bomb_of_a_member,
    'a bomb as the pickle': write_bomb_of_a_pickle,
    'a long text in the pickle': write_long_text_in_a_pickle,
    'overlapping members': write_overlapping_members,
    'many members': write_many_members,
    'more members': write_larger_directory,
    'a legacy storage of 2^40 numbers': write_legacy_claim,
    'a huge header': write_huge_header,
    'a header of 2^50 bytes': write_claimed_header,
    'a safetensor of 400 GB': write_claimed_tensor,
    'a header of lists in lists': write_deep_header,
    'a gzip bomb in HDF5': write_dataset(bomb()),
    'two gzip filters in HDF5': write_dataset(bomb(filters=(1, 1))),
    'gzip, then shuffle in HDF5': write_dataset(bomb(filters=(1, 2))),
    'an lzf bomb in HDF5': write_dataset(bomb(lzf=True, chunk=2**21)),
    'a larger lzf bomb in HDF5': write_dataset(bomb(lzf=True, chunk=2**23)),
    'chunks that were never written': write_dataset(sparse),
    'fill values that were never written': write_dataset(filled),
    'fill values of chunks': write_dataset(filled_chunks),
    'a chunk of 2 GB': write_dataset(one_huge_chunk),
    'many links to one dataset': write_dataset(many_links),
    'another filter': write_dataset(scale_offset),
}


def never_written(group, name):
    return group.create_dataset(name, (1000,), 'f4')


def chunk_with_a_tail(group, name):
    dataset = group.create_dataset(name, (1000,), 'f4', chunks=(1000,), compression='gzip')
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(4000)) + bytes(5000))
    return dataset


@pytest.mark.parametrize(
    'make, message',
    [
        (never_written, 'claims more numbers than the file holds'),
        (chunk_with_a_tail, 'has a chunk that grew by compression'),
    ],
)
def test_a_dataset_of_another_size_than_it_claims_is_refused(make, message, tmp_path):
    write_dataset(make)(tmp_path / 'm.hkl')
    with pytest.raises(UserError, match=message):
        load(tmp_path / 'm.hkl')


@pytest.mark.parametrize('write', ATTACKS.values(), ids=ATTACKS)
def test_no_file_takes_much_memory_or_time(write, tmp_path):
    write(tmp_path / 'm')
    assert_refused_quickly(tmp_path / 'm')


def test_many_small_parts_are_read_in_little_time(tmp_path):
    write_many_empty_storages(tmp_path / 'm')
    end = forked.call(load, tmp_path / 'm')
    assert end.how == 'value' and end.grown < MOST_MEMORY, end
    write_dataset(tiny_chunks)(tmp_path / 'm')
    end = forked.call(load, tmp_path / 'm')
    assert end.how in ('value', 'refused') and end.grown < MOST_MEMORY, end


@pytest.mark.parametrize('write', [write_hickle_2, write_hickle_4])
def test_a_mark_that_is_a_huge_array_is_refused(write, tmp_path):
    path, mark = tmp_path / 'm', 'type' if write is write_hickle_2 else 'base_type'
    write(path, {'conv0': np.zeros(3, 'f4')})
    with h5py.File(path, 'a') as h:
        group = h['data' if 'data' in h else 'data_0']
        group.attrs[mark] = np.array([b'dict'] * 10_000)
    assert_refused_quickly(path)


def test_a_damaged_heap_of_strings_in_which_hdf5_would_loop_is_refused(tmp_path):
    path = tmp_path / 'm'
    write_hickle_3(path, {'conv0': np.zeros(3, 'f4')})
    raw = bytearray(path.read_bytes())
    place = raw.index(b'GCOL') + 16
    while raw[place : place + 2] != bytes(2):
        size = int.from_bytes(raw[place + 8 : place + 16], 'little')
        place += 16 + -(-size // 8) * 8
    raw[place + 8 : place + 16] = bytes(8)  # the size of the free space
    path.write_bytes(raw)
    assert_refused_quickly(path)


def test_reading_a_checkpoint_with_a_list_2_to_the_40_times_is_quick(tmp_path):
    torch.save({'a': shared_list(40)}, tmp_path / 'm')
    end = forked.call(lambda: len(readers.read_values(tmp_path / 'm')))
    assert end.how == 'value' and end.grown < MOST_MEMORY, end
