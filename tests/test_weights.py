"""support/weights.py: files of other programs, damaged and malicious files, and their nets."""

import math
import os
import pickle

import h5py
import hickle
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import resnet
import utils
from samples import AffineNet, fold, from_torchvision, randn, random_resnet, torchvision_net
from support import devices, files, names, weights
from support.program import UserError


@pytest.fixture
def hkl(tmp_path):
    return tmp_path / 'm.hkl'


def assert_refused(path, match=None, load=weights.load_params):
    with pytest.raises(UserError, match=match) as e:
        load(path)
    assert str(path) in str(e.value)


# ------------------------ checks


def expected_params():
    return {'a': torch.zeros(2, 3), 'b.running_mean': torch.zeros(4)}


def test_checked_params_have_the_expected_order_and_dtype():
    params = {'b.running_mean': torch.ones(4, dtype=torch.float64)}
    params |= {'a': torch.ones(3, 2).t().half()}
    checked = weights.check_params(params, expected_params())
    assert list(checked) == ['a', 'b.running_mean']
    assert all(
        v.dtype == torch.float32 and v.is_contiguous() and not v.requires_grad and v.eq(1).all()
        for v in checked.values()
    )


@pytest.mark.parametrize(
    'change, message',
    [
        ({'a': None}, r'^1 parameters missing \(a\)'),
        ({'c': torch.zeros(1)}, r'^1 parameters not understood \(c\)'),
        (
            {f'c{i}': torch.zeros(1) for i in range(9)},
            r'9 parameters not understood \(c0, c1, c2, …\)',
        ),
        ({'a': torch.zeros(3, 2)}, r'^a has shape \(3, 2\), this net needs \(2, 3\)'),
        ({'a': torch.tensor([[0, 0, 0], [0, 0, math.nan]])}, r'^a holds nan or inf'),
        (
            {'b.running_mean': torch.tensor([0, 0, -math.inf, 0])},
            r'b\.running_mean holds nan or inf',
        ),
    ],
)
def test_unfit_parameters_are_named(change, message):
    params = {k: v for k, v in (expected_params() | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        weights.check_params(params, expected_params())


def test_crc_follows_every_byte_and_no_memory_layout():
    x = randn(3, 2, 2, 2)
    y, z = x.clone(), x.contiguous(memory_format=torch.channels_last)
    assert weights.checksum([x]) == weights.checksum([y]) == weights.checksum([z])
    y.view(torch.uint8)[2, 1, 1, 7] ^= 1
    assert weights.checksum([x]) != weights.checksum([y])


# ------------------------ .hkl


def arrays():
    rng = np.random.default_rng(0)
    return {
        'conv0': rng.standard_normal((4, 3, 3, 3)).astype('f4'),
        'group0.block0.bn0.running_mean': rng.standard_normal(4).astype('f8'),
        'fc.weight': rng.standard_normal((2, 4)).astype('f2'),
        'fc.bias': rng.standard_normal(2).astype('>f4'),
        'big': rng.standard_normal(3).astype('>f8'),
        'count': np.array([3, -4], 'i8'),
        'scalar': np.array(2.5, 'f4'),
    }


def write_hickle_2(path, values, version=2, kinds=None, root_type='dict'):
    with h5py.File(path, 'w') as h:
        h.attrs['CLASS'], h.attrs['VERSION'] = np.bytes_('hickle'), version
        h.attrs['PYTHON_VERSION'] = np.bytes_('2.7.13')
        group = h.create_group('data_0')
        group.attrs['type'] = [np.bytes_(root_type)]
        for key, value in values.items():
            item = group.create_group(key)
            item.attrs['type'] = [np.bytes_('dict_item')]
            dataset = item.create_dataset('data_0', data=value)
            dataset.attrs['type'] = [np.bytes_((kinds or {}).get(key, 'ndarray'))]


def write_hickle_2_1(path, values, **more):
    write_hickle_2(path, values, version=3, **more)


def write_hickle_3(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['CLASS'], h.attrs['VERSION'], h.attrs['PYTHON_VERSION'] = 'hickle', '3.4.9', '3.6.9'
        group = h.create_group('data_0')
        group.attrs['type'] = np.array([b"<class 'dict'>"])
        for key, value in values.items():
            item = group.create_group(repr(key))
            item.attrs['type'] = [b'dict_item']
            item.attrs['key_type'] = [b"<class 'str'>"]
            dataset = item.create_dataset('data_0', data=value)
            dataset.attrs['type'] = [(kinds or {}).get(key, 'ndarray').encode()]


def write_hickle_4(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['HICKLE_VERSION'], h.attrs['HICKLE_PYTHON_VERSION'] = '4.0.4', '3.8.5'
        group = h.create_group('data')
        group.attrs['base_type'], group.attrs['type'] = b'dict', np.array(pickle.dumps(dict))
        for key, value in values.items():
            item = group.create_group(repr(key))
            item.attrs['base_type'], item.attrs['type'] = b'dict_item', np.array(pickle.dumps(dict))
            dataset = item.create_dataset('data', data=value)
            dataset.attrs['base_type'] = (kinds or {}).get(key, 'ndarray').encode()
            dataset.attrs['type'] = np.array(Payload.last or pickle.dumps(np.ndarray))


def write_hickle_5(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['HICKLE_VERSION'], h.attrs['HICKLE_PYTHON_VERSION'] = '5.0.3', '3.11.7'
        table = h.create_group('hickle_types_table')
        for i, base in enumerate(['dict', 'ndarray', 'list']):
            named = table.create_dataset(base, shape=None, dtype='S1')
            pickled = Payload.last or pickle.dumps(np.ndarray)
            entry = table.create_dataset(str(i), data=np.frombuffer(pickled, 'S1').reshape(1, -1))
            entry.attrs['base_type'] = named.ref
        group = h.create_group('data')
        group.attrs['type'] = table['0'].ref
        for i, (key, value) in enumerate(values.items()):
            dataset = group.create_dataset(f'"{key}"', data=value)
            dataset.attrs['key_base_type'], dataset.attrs['key_idx'] = 'str', i
            kind = (kinds or {}).get(key, 'ndarray')
            if kind != 'pickle':
                dataset.attrs['type'] = table[{'dict': '0', 'ndarray': '1', 'list': '2'}[kind]].ref


class Payload:
    """A pickle that touches a file when it is loaded. `last` is put where the layouts keep pickled
    types."""

    last = None

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


WRITERS = [write_hickle_2, write_hickle_2_1, write_hickle_3, write_hickle_4, write_hickle_5]


def assert_same(params, values):
    assert set(params) == set(values)
    for name, value in values.items():
        assert params[name].numpy().dtype == value.dtype.newbyteorder('='), name
        np.testing.assert_array_equal(params[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize('write', WRITERS)
def test_every_layout_of_hickle_is_read(write, hkl):
    write(hkl, arrays())
    assert_same(weights.load_params(hkl), arrays())


def test_files_of_hickle_itself_are_read(tmp_path, hkl):
    hickle.dump(arrays(), str(hkl), mode='w')
    assert_same(weights.load_params(hkl), arrays())
    values = {k: v for k, v in arrays().items() if v.ndim}
    hickle.dump(values, str(tmp_path / 'small.hkl'), mode='w', compression='gzip')
    assert_same(weights.load_params(str(tmp_path / 'small.hkl')), values)


@pytest.mark.parametrize('write', WRITERS)
def test_a_pickled_object_is_refused_by_name_and_not_run(write, tmp_path, hkl):
    touched = tmp_path / 'touched'
    pickled = np.frombuffer(pickle.dumps(Payload(touched)), np.uint8)
    write(hkl, arrays() | {'evil': pickled}, kinds={'evil': 'pickle'})
    assert_refused(hkl, r"m\.hkl: 'evil' is .*refused")
    assert not touched.exists()
    pickle.loads(pickled.tobytes())
    assert touched.exists(), 'the payload would do nothing'


@pytest.mark.parametrize('write', [write_hickle_4, write_hickle_5])
def test_pickled_types_are_left_alone(write, tmp_path, hkl, monkeypatch):
    monkeypatch.setattr(Payload, 'last', pickle.dumps(Payload(tmp_path / 'touched')))
    write(hkl, arrays())
    assert_same(weights.load_params(hkl), arrays())
    assert not (tmp_path / 'touched').exists()


def test_objects_that_hickle_pickles_are_refused(tmp_path, hkl):
    touched = tmp_path / 'touched'
    hickle.dump({'conv0': np.zeros(3), 'evil': Payload(touched)}, str(hkl), mode='w')
    touched.unlink(missing_ok=True)
    assert_refused(hkl, "'evil'")
    assert not touched.exists()


@pytest.mark.parametrize(
    'value', [[1, 2], 'text', None, 3.5, {'a': np.zeros(2)}, np.array(['a', 'b']), np.array([True])]
)
def test_what_is_no_array_of_numbers_is_refused(value, hkl):
    hickle.dump({'conv0': np.zeros(3), 'odd': value}, str(hkl), mode='w')
    assert_refused(hkl, "'odd'")


@pytest.mark.parametrize('value', [np.zeros(3), [np.zeros(3)], 'text'])
def test_a_file_without_a_dict_is_refused(value, hkl):
    hickle.dump(value, str(hkl), mode='w')
    assert_refused(hkl)
    hickle.dump({}, str(hkl), mode='w')
    assert_refused(hkl)


def dataset_path(write, key):
    return {
        'write_hickle_2': f'data_0/{key}/data_0',
        'write_hickle_2_1': f'data_0/{key}/data_0',
        'write_hickle_3': f"data_0/'{key}'/data_0",
        'write_hickle_4': f"data/'{key}'/data",
        'write_hickle_5': f'data/"{key}"',
    }[write.__name__]


def traps(folder):
    """{name: make(parent group, leaf)} of links and datasets that lead out of the file, or do not
    hold numbers."""
    secret = folder / 'secret.bin'
    secret.write_bytes(np.arange(4, dtype='f4').tobytes())
    with h5py.File(folder / 'other.h5', 'w') as h:
        h['x'] = np.arange(4, dtype='f4')
    layout = h5py.VirtualLayout((4,), 'f4')
    layout[:] = h5py.VirtualSource(folder / 'other.h5', 'x', (4,))

    out_of_it = h5py.ExternalLink(str(folder / 'other.h5'), '/x')
    return {
        'external link': lambda g, k: g.__setitem__(k, out_of_it),
        'soft link': lambda g, k: g.__setitem__(k, h5py.SoftLink('/elsewhere')),
        'dangling link': lambda g, k: g.__setitem__(k, h5py.SoftLink('/nowhere')),
        'external storage': lambda g, k: g.create_dataset(
            k, (4,), 'f4', external=[(str(secret), 0, 16)]
        ),
        'virtual dataset': lambda g, k: g.create_virtual_dataset(k, layout),
        'strings': lambda g, k: g.create_dataset(k, data=['a', 'b'], dtype=h5py.string_dtype()),
        'bytes': lambda g, k: g.create_dataset(k, data=np.array([b'abc'])),
        'references': lambda g, k: g.create_dataset(k, (2,), h5py.ref_dtype),
        'compound': lambda g, k: g.create_dataset(k, (2,), np.dtype([('a', 'f4')])),
        'ragged': lambda g, k: g.create_dataset(k, (2,), h5py.vlen_dtype('f4')),
        'nothing': lambda g, k: g.create_dataset(k, shape=None, dtype='f4'),
        'group': lambda g, k: g.create_group(k),
    }


@pytest.mark.parametrize('write', WRITERS)
@pytest.mark.parametrize(
    'trap',
    ['external link', 'soft link', 'dangling link', 'external storage', 'virtual dataset']
    + ['strings', 'bytes', 'references', 'compound', 'ragged', 'nothing', 'group'],
)
def test_what_leads_out_of_the_file_is_refused(trap, write, tmp_path, hkl):
    write(hkl, {'conv0': np.zeros(3, 'f4'), 'odd': np.zeros(4, 'f4')})
    make = traps(tmp_path)[trap]
    with h5py.File(hkl, 'a') as h:
        h['elsewhere'] = np.zeros(4, 'f4')
        parent, _, leaf = dataset_path(write, 'odd').rpartition('/')
        marks = dict(h[parent][leaf].attrs)
        del h[parent][leaf]
        make(h[parent], leaf)
        if not trap.endswith('link'):
            for k, v in marks.items():
                h[parent][leaf].attrs[k] = v
    assert_refused(hkl)


@pytest.mark.parametrize('write', WRITERS)
def test_a_root_that_is_a_link_is_refused(write, tmp_path, hkl):
    write(tmp_path / 'other.hkl', arrays())
    write(hkl, arrays())
    with h5py.File(hkl, 'a') as h:
        root = 'data' if 'data' in h else 'data_0'
        del h[root]
        h[root] = h5py.ExternalLink(str(tmp_path / 'other.hkl'), f'/{root}')
    assert_refused(hkl)


@pytest.mark.parametrize('write', WRITERS)
def test_weights_of_another_file_are_refused(write, tmp_path, hkl):
    """Both files have the same marks, so only the link shows it."""
    write(tmp_path / 'other.hkl', arrays())
    write(hkl, arrays())
    path = dataset_path(write, 'conv0')
    with h5py.File(hkl, 'a') as h:
        del h[path]
        h[path] = h5py.ExternalLink(str(tmp_path / 'other.hkl'), f'/{path}')
        assert h[path].shape == (4, 3, 3, 3), 'HDF5 follows the link'
    assert_refused(hkl, 'is not part of this file')


@pytest.mark.parametrize('write', WRITERS)
def test_an_entry_of_a_dict_in_a_dict_is_refused(write, hkl):
    write(hkl, arrays())
    with h5py.File(hkl, 'a') as h:
        root = h['data' if 'data' in h else 'data_0']
        nested = '"nested"' if write is write_hickle_5 else 'nested'
        h.copy(root, root, name=nested)
        root[nested].attrs.update(root.attrs)
    assert_refused(hkl, 'nested')


def test_a_version_string_that_hdf5_would_hang_on_is_not_read(hkl):
    # A string of variable length is in a heap of the file. If that heap is damaged, HDF5 can loop
    # for ever.
    write_hickle_5(hkl, arrays())
    with h5py.File(hkl, 'a') as h:
        h.attrs['HICKLE_VERSION'] = 'nonsense'
    assert set(weights.load_params(hkl)) == set(arrays())


def test_an_hdf5_file_of_another_program_is_refused(hkl):
    with h5py.File(hkl, 'w') as h:
        h['conv0'] = np.zeros(3)
    assert_refused(hkl, 'not written by hickle')


def test_a_tiny_file_does_not_become_gigabytes(hkl):
    write_hickle_5(hkl, {'conv0': np.zeros(3, 'f4')})
    with h5py.File(hkl, 'a') as h:
        marks = dict(h['data/"conv0"'].attrs)
        d = h['data'].create_dataset('"bomb"', (2**40,), 'f4', chunks=(2**20,))
        d.attrs.update(marks)
    assert hkl.stat().st_size < 2**20
    assert_refused(hkl, 'bomb')


@pytest.mark.parametrize('write', WRITERS)
def test_truncated_hkl_files_are_refused(write, hkl):
    write(hkl, arrays())
    whole = hkl.read_bytes()
    for n in [0, 1, 7, 8, 100, 512, len(whole) // 2, len(whole) - 1]:
        hkl.write_bytes(whole[:n])
        assert_refused(hkl)


def test_saved_parameters_are_read_by_hickle(tmp_path, hkl):
    _, params = resnet.wrn(10, 1, 3)
    params = devices.to_device(params, torch.device('cpu'))  # channels_last memory
    params['step'] = torch.tensor(7)
    weights.save_params(hkl, params)
    loaded = hickle.load(str(hkl))
    assert set(loaded) == set(params)
    for name, value in params.items():
        assert isinstance(loaded[name], np.ndarray)
        np.testing.assert_array_equal(loaded[name], value.detach().numpy())
    assert_same(weights.load_params(hkl), loaded)
    assert os.listdir(tmp_path) == ['m.hkl']


def test_parameters_saved_twice_are_the_same_bytes(tmp_path):
    _, params = resnet.wrn(10, 1, 3)
    weights.save_params(tmp_path / 'a.hkl', params)
    weights.save_params(tmp_path / 'b.hkl', params)
    assert (tmp_path / 'a.hkl').read_bytes() == (tmp_path / 'b.hkl').read_bytes()


# ------------------------ .pth, .pt7, .safetensors


def tensors():
    return {
        'conv0': randn(4, 3, 3, 3),
        'bn.running_mean': randn(4, dtype=torch.float64),
        'fc.weight': randn(2, 4).half(),
        'n': torch.tensor(3),
    }


def assert_tensors(params, expected):
    assert set(params) == set(expected)
    for k, v in expected.items():
        assert params[k].dtype == v.dtype and torch.equal(params[k], v)
        assert not params[k].requires_grad


@pytest.mark.parametrize('suffix', ['.pth', '.pt7', '.pt'])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files_are_read(suffix, zipped, tmp_path):
    path = tmp_path / f'm{suffix}'
    trained = {k: v.requires_grad_(v.is_floating_point()) for k, v in tensors().items()}
    torch.save(trained, path, _use_new_zipfile_serialization=zipped)
    assert_tensors(weights.load_params(path), tensors())


def published(params):
    """A model.pt7 of the published code."""
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], 0.1, 0.9)
    return {'params': params, 'optimizer': optimizer.state_dict(), 'epoch': 200}


def test_a_teacher_of_2018_is_read(tmp_path):
    torch.save(published(tensors()), tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    assert_tensors(weights.load_params(tmp_path / 'model.pt7'), tensors())


def test_of_a_student_of_2018_the_student_is_read(tmp_path):
    merged = {f'student.{k}': v for k, v in tensors().items()}
    merged |= {f'teacher.{k}': torch.zeros(1) for k in tensors()} | {'teacher.more': torch.zeros(1)}
    torch.save(published(merged), tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    assert_tensors(weights.load_params(tmp_path / 'model.pt7'), tensors())


def test_a_state_dict_inside_a_checkpoint_is_read(tmp_path):
    torch.save({'state_dict': tensors(), 'epoch': 3, 'arch': 'wrn'}, tmp_path / 'm.pth')
    assert_tensors(weights.load_params(tmp_path / 'm.pth'), tensors())


@pytest.mark.parametrize('zipped', [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(zipped, tmp_path):
    touched, path = tmp_path / 'touched', tmp_path / 'm.pth'
    params = {'conv0': torch.zeros(3), 'evil': Payload(touched)}
    torch.save(params, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, r"""m\.pth: 'evil' is \w+\.system, not a dense tensor""")
    assert not touched.exists()
    path.write_bytes(pickle.dumps(Payload(touched)))
    assert_refused(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    'content',
    [
        {},
        [],
        torch.zeros(3),
        {'a': 1.0},
        {'a': torch.zeros(2), 'b': 'text'},
        {1: torch.zeros(2)},
        {'params': {}},
        {'params': {'a': [torch.zeros(1)]}},
        None,
        7,
    ],
)
def test_torch_files_without_a_dict_of_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / 'm.pth')
    assert_refused(tmp_path / 'm.pth')


@pytest.mark.filterwarnings('ignore:.*parse')
def test_sparse_tensors_are_refused(tmp_path):
    torch.save({'a': torch.eye(3).to_sparse()}, tmp_path / 'm.pth')
    assert_refused(tmp_path / 'm.pth', "'a'")


def test_safetensors_are_read(tmp_path):
    expected = tensors() | {'half': randn(3).bfloat16()}
    safetensors.torch.save_file(expected, tmp_path / 'm.safetensors')
    assert_tensors(weights.load_params(tmp_path / 'm.safetensors'), expected)
    (tmp_path / 'm.safetensors').write_bytes((tmp_path / 'm.safetensors').read_bytes()[:-3])
    assert_refused(tmp_path / 'm.safetensors')


def test_bfloat16_weights_are_written_as_float32(tmp_path):
    weights.save_params(tmp_path / 'a.hkl', {'w': torch.tensor([1.5, -2]).bfloat16()})
    w = weights.load_params(tmp_path / 'a.hkl')['w']
    assert w.dtype == torch.float32 and w.tolist() == [1.5, -2]


def test_other_and_missing_files_are_named(tmp_path):
    for name, message in (
        ('m', 'No such file'),
        ('m.hkl', 'No such file'),
        ('x/m.pth', 'No such file'),
    ):
        assert_refused(tmp_path / name, message)
    (tmp_path / 'd.hkl').mkdir()
    assert_refused(tmp_path / 'd.hkl')


SOURCES = {}


def whole_file(kind, folder):
    """The bytes of a small, sound weights file of that kind."""
    if kind not in SOURCES:
        path = folder / f'whole{kind.split()[0]}'
        values = {'conv0': np.arange(6, dtype='f4').reshape(2, 3)}
        values |= {'bn.running_var': np.ones(2, 'f4')}
        t = {k: torch.from_numpy(v) for k, v in values.items()}
        if kind == '.hkl':
            weights.save_params(path, t)
        elif kind == '.hkl of 2':
            write_hickle_2(path, values)
        elif kind == '.hkl of 4':
            write_hickle_4(path, values)
        elif kind == '.safetensors':
            safetensors.torch.save_file(t, path)
        else:
            torch.save(t, path, _use_new_zipfile_serialization=kind == '.pth')
        SOURCES[kind] = path.read_bytes()
    return SOURCES[kind]


@pytest.mark.parametrize(
    'kind', ['.hkl', '.hkl of 2', '.hkl of 4', '.pth', '.pth of 2018', '.safetensors']
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_damaged_weights_file_is_refused_or_read_never_a_crash(kind, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(whole_file(kind, folder))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        action = data.draw(st.sampled_from(['set', 'flip', 'cut', 'drop', 'repeat']))
        if action == 'set':
            raw[at : at + 4] = data.draw(st.binary(min_size=1, max_size=8))
        elif action == 'flip':
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == 'cut':
            del raw[max(at, 1) :]
        elif action == 'drop' and len(raw) > 1:
            del raw[at]
        else:
            raw[at:at] = raw[at : at + 20]
    path = folder / f'damaged{kind.split()[0]}'
    path.write_bytes(raw)
    try:
        params = weights.load_params(path)
    except UserError as e:
        assert str(path) in str(e) and '\n' not in str(e)
    else:
        assert params and all(isinstance(k, str) and torch.is_tensor(v) for k, v in params.items())


# ------------------------ nets


def test_a_folded_net_of_any_number_of_blocks_is_read(tmp_path):
    _, params = torchvision_net(18)
    gone = ('group1.block1', 'group3.block1')
    params = {k: v for k, v in params.items() if not k.startswith(gone)}
    folded = fold(params)
    weights.save_params(tmp_path / 'net.hkl', folded)
    f, loaded, _ = weights.load_net(tmp_path / 'net.hkl')
    assert resnet.net_shape(folded) == (14, 1, 7)
    x = torch.randn(2, 3, 64, 64)
    ours, _ = resnet.resnet_function([2, 1, 2, 1])(x, params, False)
    torch.testing.assert_close(f(x, loaded, False)[0], ours, rtol=1e-3, atol=1e-3)


def test_the_weights_in_a_run_folder_have_the_runs_log(tmp_path):
    torch.manual_seed(0)
    weights.save_params(tmp_path / 'model.hkl', resnet.wrn(10, 1, 3)[1])
    assert weights.load_net(tmp_path / 'model.hkl')[2] == []
    files.write_text(tmp_path / 'log.txt', 'json_stats: {"depth": 10, "width": 1, "epoch": 5}\n')
    weights.save_params(tmp_path / 'other.hkl', resnet.wrn(10, 1, 3)[1])
    for source in tmp_path, tmp_path / 'model.hkl':
        assert weights.load_net(source)[2] == [{'depth': 10, 'width': 1, 'epoch': 5}]
    assert weights.load_net(tmp_path / 'other.hkl')[2] == []


def test_torchvisions_names_and_back_are_the_identity():
    for depth, width in (18, 1), (50, 2):
        net, _ = torchvision_net(depth, width)
        state = net.state_dict()
        again = names.to_torchvision(from_torchvision(state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[k], v) or 'num_batches' in k for k, v in state.items())
        assert all(int(v) == 0 for k, v in again.items() if 'num_batches' in k)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors', 'hkl'])
@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {f'module.{k}': v for k, v in s.items()}])
def test_torchvisions_files_load(suffix, wrap, tmp_path):
    net, params = torchvision_net(18)
    file, state = tmp_path / f'net.{suffix}', wrap(net.state_dict())
    if suffix == 'pth':
        torch.save({'state_dict': state, 'epoch': 3}, file)
    elif suffix == 'safetensors':
        safetensors.torch.save_file(state, file)
    else:
        weights.save_params(file, state)
    f, loaded, records = weights.load_net(file)
    assert records == [] and all(torch.equal(loaded[k], v) for k, v in params.items())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(f(x, loaded, False)[0], net.eval()(x), rtol=1e-4, atol=1e-4)


def test_releases_load(hkl):
    torch.manual_seed(1)
    for params in fold(torchvision_net(18)[1]), AffineNet().p:
        weights.save_params(hkl, params)
        _, loaded, _ = weights.load_net(hkl)
        assert all(torch.equal(loaded[k], v) for k, v in params.items())


DAMAGES = {
    'a name that is not understood': (
        lambda p: p | {'group0.block0.se.weight': torch.ones(2)},
        'group0.block0.se',
    ),
    'no head': (lambda p: {k: v for k, v in p.items() if k != 'fc.bias'}, 'fc.bias'),
    'a group is missing': (
        lambda p: {k: v for k, v in p.items() if not k.startswith('group1')},
        'group1',
    ),
    'a block is missing': (
        lambda p: {k: v for k, v in p.items() if not k.startswith('group1.block0')},
        'group1',
    ),
    'nan': (lambda p: p | {'fc.bias': torch.full((7,), np.nan)}, 'nan'),
    'another head': (lambda p: p | {'fc.weight': torch.zeros(7, 100)}, 'fc.weight|shapes'),
    'a vector for a convolution': (
        lambda p: {k: v.flatten() if 'group3.block0.conv0' in k else v for k, v in p.items()},
        'conv0',
    ),
    'whole numbers': (lambda p: p | {'fc.bias': torch.zeros(7, dtype=torch.long)}, 'fc.bias'),
}


@pytest.mark.parametrize(
    'make', [lambda: random_resnet(18, 0.25, 7), lambda: resnet.wrn(10, 1, 7)[1]]
)
def test_a_net_is_checked_without_drawing_another(make, hkl, monkeypatch):
    """Only the shapes of the net that the file is compared with are needed."""
    params = make()
    weights.save_params(hkl, params)
    monkeypatch.setattr(utils, 'kaiming_normal_', None)
    assert weights.load_net(hkl).params.keys() == params.keys()


@pytest.mark.parametrize('damage, named', DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize('kind', ['resnet', 'folded', 'affine'])
def test_unfit_weights_are_named(kind, damage, named, hkl):
    params, small = random_resnet(18, 0.25, 7), AffineNet((64, 16, 32, 64, 128)).p
    params = {'resnet': params, 'folded': fold(params), 'affine': small}[kind]
    weights.save_params(hkl, damage(params))
    assert_refused(hkl, named, weights.load_net)


def test_a_resnet_has_one_of_the_known_depths(hkl):
    """Its names do not tell the topology. Those of the releases do."""
    _, params = torchvision_net(18)
    params = {k: v for k, v in params.items() if not k.startswith('group1.block1')}
    weights.save_params(hkl, params)
    assert_refused(hkl, r'm\.hkl: its groups have 2, 1, 2, 2 blocks', weights.load_net)


def test_a_convolution_that_does_not_fit_is_named(hkl):
    folded = fold(torchvision_net(18)[1])
    folded['group2.block1.conv1.weight'] = torch.zeros(256, 128, 3, 3)
    weights.save_params(hkl, folded)
    assert_refused(hkl, 'shapes do not fit', weights.load_net)
    folded.pop('group2.block1.conv1.weight')
    weights.save_params(hkl, folded)
    assert_refused(hkl, 'group2.block1.conv1', weights.load_net)


def test_the_published_resnet_34_with_another_count_of_blocks_is_refused(hkl):
    """The published definition has [3, 4, 6, 5] blocks; ResNet-34 has [3, 4, 6, 3]."""
    _, params = torchvision_net(34)
    last = {k: v for k, v in params.items() if k.startswith('group3.block2')}
    more = {k.replace('block2', 'block3'): v for k, v in last.items()}
    weights.save_params(hkl, params | more)
    assert_refused(hkl, '3, 4, 6, 4', weights.load_net)
