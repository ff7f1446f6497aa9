"""support/pickles.py: pickles are data, whatever they name, claim or repeat."""

import argparse
import collections
import io
import os
import pickle
import struct
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

import forked
from support import pickles
from support.pickles import Name, StandIn
from support.program import UserError


def not_implemented(name, arguments):
    return NotImplemented


def load(data: bytes):
    return pickles.load(io.BytesIO(data), not_implemented, lambda identity: identity)


VALUES = [
    *(None, True, False, 0, -1, 255, 2**31, -(2**70), 0.5, float('inf'), '', 'ä€😀', b'', b'abc'),
    *('x' * 300, b'x' * 70_000, bytearray(b'abc'), [], (), {}, (1,), (1, 2), (1, 2, 3), (1,) * 4),
    *([1, [2, (3, {})]], {'a': {1: [None]}, 'b': 'c'}, {True: 1}),
]


FIRST_PROTOCOL = {bytes: 3, bytearray: 5}  # older ones write a call


@pytest.mark.parametrize(
    'value, protocol',
    [(v, p) for v in VALUES for p in (2, 3, 4, 5) if p >= FIRST_PROTOCOL.get(type(v), 2)],
    ids=lambda value: repr(value)[:20],
)
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert load(data) == pickle.loads(data) == value
    assert type(load(data)) is type(value)


def test_shared_and_recursive_values_keep_their_shape():
    shared = [1]
    a, b = load(pickle.dumps([shared, shared]))
    assert a is b
    shared.append(shared)
    value = load(pickle.dumps(shared))
    assert value[1] is value


def test_sets_become_lists():
    assert load(pickle.dumps({1})) == [1] == load(pickle.dumps(frozenset([1])))


def test_objects_become_stand_ins_that_keep_the_items_of_dicts():
    values = [argparse.Namespace(lr=0.1), collections.OrderedDict(a=1), np.float64(3), len]
    values += [PurePosixPath('a/b'), collections.Counter('aab'), 3j, torch.device('cpu')]
    loaded = load(pickle.dumps(values, 2))
    kinds = ['argparse.Namespace', 'collections.OrderedDict', 'numpy._core.multiarray.scalar']
    assert [v.name for v in loaded[:3]] == kinds and loaded[1] == {'a': 1}
    assert loaded[3] == Name('__builtin__', 'len')
    assert all(isinstance(v, StandIn) for v in loaded[4:])


# ------------------------ nothing is called

TOUCHED = '/tmp/touched-by-a-pickle'


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value)) + value.encode()


TOUCH = text(f'touch {TOUCHED}')
MAKES_DIRECTORY = text(TOUCHED)
CALLS = {
    'GLOBAL, REDUCE': b'\x80\x02cos\nsystem\n' + TOUCH + b'\x85R.',
    'STACK_GLOBAL, REDUCE': b'\x80\x04' + text('os') + text('system') + b'\x93' + TOUCH + b'\x85R.',
    'NEWOBJ': b'\x80\x02ctest_pickles\nMade\n' + MAKES_DIRECTORY + b'\x85\x81.',
    'NEWOBJ_EX': b'\x80\x04ctest_pickles\nMade\n' + MAKES_DIRECTORY + b'\x85}\x92.',
    'OBJ': b'\x80\x02(cos\nmkdir\n' + MAKES_DIRECTORY + b'o.',
    'INST': b'\x80\x02(' + MAKES_DIRECTORY + b'ios\nmkdir\n.',
    'BUILD': b'\x80\x02ctest_pickles\nTouches\n)\x81' + TOUCH + b'b.',
    'APPEND': b'\x80\x02ctest_pickles\nTouches\n)\x81' + TOUCH + b'a.',
    'APPENDS': b'\x80\x02ctest_pickles\nTouches\n)\x81(' + TOUCH + b'e.',
    'SETITEM': b'\x80\x02ctest_pickles\nTouches\n)\x81' + TOUCH + b'Ns.',
    'SETITEMS': b'\x80\x02ctest_pickles\nTouches\n)\x81(' + TOUCH + b'Nu.',
    'ADDITEMS': b'\x80\x04ctest_pickles\nTouches\n)\x81(' + TOUCH + b'\x90.',
}


class Made:
    def __new__(cls, path):
        os.mkdir(path)


class Touches:
    def __setstate__(self, state):
        os.mkdir(TOUCHED)

    def __setitem__(self, key, value):
        os.mkdir(TOUCHED)

    def append(self, value):
        os.mkdir(TOUCHED)

    def extend(self, values):
        os.mkdir(TOUCHED)

    def add(self, value):
        os.mkdir(TOUCHED)


@pytest.mark.parametrize('data', CALLS.values(), ids=CALLS)
def test_nothing_is_called(data, tmp_path, monkeypatch):
    path = tmp_path / 'touched'
    data = data.replace(TOUCH, text(f'touch {path}')).replace(MAKES_DIRECTORY, text(str(path)))
    monkeypatch.setattr(f'{__name__}.TOUCHED', str(path))
    try:
        value = load(data)
    except ValueError:
        value = None
    assert value is None or isinstance(value, StandIn)
    assert not path.exists()
    pickle.loads(data)
    assert path.exists(), 'the pickle would do nothing'


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'.',
        b'\x80\x02',
        b'\x80\x02N',
        b'\x80\x02e.',
        b'\x80\x02(.',
        b'\x80\x02\x85.',
        b'\x80\x02N\x87.',
        b'\x80\x02h\x05.',
        b'\x80\x02NNR.',
        b'\x80\x02NN\x93.',
        b'\x80\x02}(Nu.',
        b'\x80\x02NNNs.',
        b'\x80\x02I5\n.',
        b'\x80\x02P5\n.',
        b'\x80\x02\x82\x01.',
        b'\x80\x05N\x97.',
        b'\xff',
    ],
)
def test_a_pickle_that_makes_no_sense_is_refused(data):
    with pytest.raises((ValueError, IndexError, KeyError)):
        load(data)


# ------------------------ what is small stays small


def memo(value: bytes, *uses: bytes) -> bytes:
    """A list of what each of `uses` makes. `h\\x00` in them is the value."""
    return b'\x80\x04](' + value + b'q\x00' + b''.join(uses) + b'e.'


def huge_int(n: int) -> bytes:
    return b'\x8b' + struct.pack('<i', n) + b'\x01' * n


def long_text(n: int) -> bytes:
    return text('x' * n)


NESTED = b'q\x00' + b''.join(b'0h%ch%c\x86q%c' % (i, i, i + 1) for i in range(100))
REFUSED = {
    'a string of 8 EiB': b'\x80\x05\x96' + struct.pack('<Q', 2**63 - 1) + b'.',
    'bytes of 1 TiB': b'\x80\x05\x8e' + struct.pack('<Q', 2**40) + b'.',
    'a number of 2 GiB': b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'.',
    'a text of 4 GiB': b'\x80\x02X\xff\xff\xff\xff.',
    'a line without an end': b'\x80\x02c' + b'x' * 2**25,
    'too many empty dicts': b'\x80\x02](' + b'}' * 10**7 + b'e.',
    'too many calls': memo(b'cos\nsystem\n', b'h\x00)R' * 3 * 10**6),
    'too many entries of the memo': b'\x80\x04](N' + b'\x94' * 10**7 + b'e.',
    'a long name many times': memo(
        b'c' + b'x' * 2**22 + b'\nsystem\n', b'h\x00)R' * 10**6, b'h\x00N\x86' * 10
    ),
    'a long list as the arguments of many calls': b'\x80\x04]q\x01('
    + b'N' * 250_000
    + b'e0cos\nsystem\nq\x000]('
    + b'h\x00h\x01\x85R' * 200_000
    + b'e.',
    'a long key': b'\x80\x02}' + long_text(2**20) + b'Ns.',
}
READ = {
    'a memo with huge indices': b'\x80\x02]r\xff\xff\xff\xff.',
    'tuples that take for ever to hash': b'\x80\x02}K\x01' + NESTED + b'Ns.',
    'tuples that take for ever to hash, in a set': b'\x80\x04\x8f(K\x01' + NESTED + b'\x90.',
    'a huge number as a key': b'\x80\x02}('
    + huge_int(2**23)
    + b'q\x00N'
    + b'h\x00N' * 10**5
    + b'u.',
    'numbers with the same hash': b'\x80\x02}('
    + b''.join(
        b'\x8a\x0a' + ((2**61 - 1) * i).to_bytes(10, 'little') + b'N' for i in range(100_000)
    )
    + b'u.',
    'lists in lists': b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
    'a list that holds itself': b'\x80\x02]q\x00h\x00a.',
}


def read_quickly(data):
    """Load the pickle; say whether it could be."""
    try:
        load(data)
    except (ValueError, IndexError) as e:
        raise UserError(str(e)[:200]) from e


@pytest.mark.parametrize('data', REFUSED.values(), ids=REFUSED)
def test_a_small_pickle_cannot_take_much_memory_or_time(data):
    end = forked.call(read_quickly, data)
    assert end.how == 'refused' and end.grown < 2**28, (end, end.grown / 2**20)


@pytest.mark.parametrize('data', READ.values(), ids=READ)
def test_what_other_readers_stumble_over_is_read(data):
    end = forked.call(read_quickly, data)
    assert end.how == 'value' and end.grown < 2**28, (end, end.grown / 2**20)
