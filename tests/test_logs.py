"""support/logs.py: complete, cut off and damaged logs, and the names of curves."""

import argparse
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samples import LINE
from support import logs
from support.program import UserError


@pytest.mark.parametrize(
    'text, epochs',
    [
        (f'{LINE}\n', [1]),
        (f'{LINE}', [1]),
        (f'{LINE}\njson_stats: {{"epoch": 2, "te', [1]),
        (f'{LINE}\njson_sta', [1]),
        (f'{LINE}\njson_stats: {{"epoch": 2, "te\n{LINE}\n', [1, 1]),
        (f'{LINE}\r\n{LINE}\r\n', [1, 1]),
        (f'some words\n\n{LINE}\n{{}}\njson_stats: [1]\njson_stats: 3\n', [1]),
        (f'[10:00] {LINE}\n', [1]),
    ],
)
def test_complete_lines_of_a_log_are_read(text, epochs, tmp_path):
    (tmp_path / 'log.txt').write_text(text)
    assert [r['epoch'] for r in logs.read_log(tmp_path / 'log.txt')] == epochs


def test_published_logs_are_read(tmp_path):
    line = 'json_stats: {"at_losses": [[0.0012, NaN], [0.002, 0.0001]], "train_loss": Infinity, '
    line += '"depth": 16, "width": 1.0, "classes": 10}'
    (tmp_path / 'log.txt').write_text(f'{line}\n')
    (record,) = logs.read_log(tmp_path / 'log.txt')
    first = record['at_losses'][0]
    assert first[0] == 0.0012 and math.isnan(first[1]) and record['depth'] == 16


@pytest.mark.parametrize(
    'raw',
    [b'', b'\n', b'\x00\xff\xfe', LINE[:-1].encode()]
    + [b'json_stats: ' + b'[' * 100_000, b'json_stats: null'],
)
def test_a_log_without_a_complete_line_is_refused(raw, tmp_path):
    (tmp_path / 'log.txt').write_bytes(raw)
    with pytest.raises(UserError, match=r'log\.txt'):
        logs.read_log(tmp_path / 'log.txt')
    with pytest.raises(UserError, match='No such file'):
        logs.read_log(tmp_path / 'none.txt')


@settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.integers(0, 60).map(lambda n: LINE[:n].encode())
        | st.just(LINE.encode() + b'\n')
    )
)
def test_a_damaged_log_is_read_or_refused_never_a_crash(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / 'damaged.txt'
    path.write_bytes(b''.join(parts))
    try:
        records = logs.read_log(path)
    except UserError as e:
        assert str(path) in str(e)
    else:
        assert records and all(isinstance(r, dict) for r in records)


def test_our_lines_are_strict_json():
    record = {'epoch': 1, 'classes': ['ä', '\u2028'], 'x': None}
    line = logs.json_stats(record)
    assert '\n' not in line and line.isascii()
    assert json.loads(line.removeprefix('json_stats: ')) == record
    with pytest.raises(ValueError):
        logs.json_stats({'x': math.nan})


def test_curves_are_named_by_their_group():
    def names(**record):
        found = {}
        writer = argparse.Namespace(add_scalar=lambda n, v, e: found.update({n: v}), flush=int)
        nothing = dict.fromkeys(('train_loss', 'train_acc', 'test_loss', 'test_acc', 'lr'))
        logs.write_curves(writer, nothing | {'epoch': 1} | record)
        return found

    assert names(at_losses=[5, 7], at_groups=[2, 0]) == {'at_loss/group2': 5, 'at_loss/group0': 7}
    assert names(at_losses=[3], at_groups=[0, 1, 2], method='grad') == {'grad_loss': 3}
    assert names(at_losses=[1, 2]) == {'at_loss/group0': 1, 'at_loss/group1': 2}
    assert names(at_losses=[], at_groups=[0, 1, 2]) == {}
