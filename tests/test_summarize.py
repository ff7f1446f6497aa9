"""The tables that are made of the runs' logs."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import resnet
from support.logs import json_stats
from support.program import call_main
from support.weights import save_params
from table_scripts import (
    ROOT,
    write_run,
)

sys.path.insert(0, str(ROOT / 'scripts'))
import summarize
import table_runs


def summary(logs, *words, capsys):
    """(the rows as lists of cells, the text beneath them)."""
    summarize.main([*words[:1], str(logs), *words[1:]])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith('|')]
    rows = [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
    return rows, out.split('\n\n', 1)[1]


def test_summary_has_median_range_and_the_gain_of_pairs(tmp_path, capsys):
    alone, at = [9.0, 8.0, 10.0], [8.0, 7.5, 8.0]
    for seed, (a, b) in enumerate(zip(alone, at)):
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [50.0, a])
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [50.0, b], beta=1e3)
    write_run(tmp_path, 'at_p1_wrn_16_1_from_wrn_16_2_seed1', [50.0, 7.25], beta=1e3, at_p=1.0)
    rows, text = summary(tmp_path, 'table2', capsys=capsys)
    by_name = {row[0]: row for row in rows}
    assert by_name['student'][3:] == ['8.77', '9.00', '8.00–10.00', '3', '', '0.0056']
    # Differences 1, 0.5, 2: mean 7/6, standard deviation 0.7638; 4.303 = t of 2 degrees of freedom.
    half = 4.303 * statistics.stdev([1, 0.5, 2]) / math.sqrt(3)
    gain = f'+1.17 ± {half:.2f} (n = 3)'
    assert by_name[r'sum \|A\|^2'][3:] == ['7.93', '8.00', '7.50–8.00', '3', gain, '0.0056']
    assert by_name[r'sum \|A\|'][3:] == [*('7.99', '7.25', '', '1', '+0.75', '0.0056')], (
        'paired with seed 1'
    )
    assert by_name[r'sum \|A\|^4'][3:] == ['8.09', '—', '', '', '', '']
    assert 'at_p4_wrn_16_1_from_wrn_16_2: missing (seeds 0, 1, 2)' in text
    assert 'at_p1_wrn_16_1_from_wrn_16_2: missing (seeds 0, 2)' in text
    assert '- beta 1000, at_p 1: at_p1_wrn_16_1_from_wrn_16_2\n' in text
    assert by_name['first group'][1:3] == ['', ''] and by_name['student'][1] == '175,066'


def test_the_tables_hold_the_papers_numbers():
    def numbers(table, i=0):
        return [row.paper for row in summarize.sections_of(table)[i].rows]

    assert [numbers('table1', i) for i in range(4)] == [
        [9.38, 8.93, 9.05, 8.55, 8.33, 7.28],
        [8.77, 7.93, 8.51, 7.41, 7.51, 6.31],
        [8.77, 8.25, 8.62, 8.39, 8.01, 6.58],
        [6.31, 5.85, 6.24, 6.08, 5.71, 5.23],
    ]
    assert numbers('table2') == [8.77, 7.99, 7.93, 8.09, 8.08]
    assert numbers('table2', 1) == [8.77, 8.11, 7.96, 7.97]
    assert numbers('table3') == [13.5, 12.5, 11.8, 12.1, 12.1, 11.2]
    assert [numbers('table4', i) for i in (0, 1)] == [
        [28.5, 27.0, 27.0, 26.5],
        [28.2, 28.1, 27.1, 26.0],
    ]
    assert [numbers('table5', i) for i in (0, 1)] == [[30.4, 29.3, 26.1], [10.8, 10.0, 8.3]]
    assert [numbers('cifar100', i) for i in (0, 1)] == [
        [73.26, 74.92, 74.08, 75.61],
        [71.98, 73.54, 72.77, 75.61],
    ]
    columns = zip(*(numbers('convergence', i) for i in range(5)))
    assert list(columns) == [
        (22.0, 12.5, 9.5, 8.7, 8.77),
        (18.4, 11.5, 8.7, 8.0, 7.93),
        (20.4, 12.4, 9.3, 8.5, 8.51),
    ]


def test_intervals_are_those_of_students_t():
    # Quantiles as in NIST's e-Handbook, 1.3.6.7.2.
    for n, t in (2, 12.706), (5, 2.776), (10, 2.262), (31, 2.042):
        values = dict(enumerate(np.linspace(0, 1, n)))
        mean, half, count = summarize.gain(dict.fromkeys(range(n), 3.0), values, 'error')
        expected = t * np.std(list(values.values()), ddof=1) / np.sqrt(n)
        assert count == n and mean == pytest.approx(2.5) and half == pytest.approx(expected)
    for n, t in enumerate(table_runs.T_QUANTILES, 1):
        # 0.5 minus the integral of the density from 0 to t, by the midpoint rule.
        x = t * (np.arange(10000) + 0.5) / 10000
        scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
        density = scale * (1 + x**2 / n) ** (-(n + 1) / 2)
        above = 0.5 - t * density.mean()
        assert (above - 0.025) / density[-1] == pytest.approx(0, abs=6e-4), f'{t} for {n}'
    better = summarize.gain({0: 70.0}, {0: 72.0, 1: 90.0}, 'accuracy')
    assert better == (2.0, None, 1) and summarize.gain({0: 1.0}, {1: 1.0}, 'error') is None


def test_unfinished_runs_have_no_number_and_are_reported(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0, 8.0])
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [7.0], epochs=2)
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0').mkdir()
    rows, text = summary(tmp_path, 'table1', '--seeds', '0', '1', capsys=capsys)
    section = [row[0] for row in rows].index('**WRN-16-1 from WRN-16-2**')
    cells = {row[0]: row[4] for row in rows[section + 1 : section + 7]}
    assert cells == {
        'student': '8.00',
        'AT': '—',
        'F-ActT': '—',
        'KD': '—',
        'AT + KD': '—',
        'teacher': '—',
    }
    assert '- at_wrn_16_1_from_wrn_16_2: epoch 1 of 2 (seed 0)' in text
    assert '- at_wrn_16_1_from_wrn_16_2: missing (seed 1)' in text
    assert '- kd_wrn_16_1_from_wrn_16_2: no epoch done (seed 0)' in text
    assert '- wrn_16_1: missing (seed 1)' in text


def test_logs_that_tell_nothing_are_left_out_by_name(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    for seed, more in enumerate(
        [{'test_acc': None}, {'test_acc': math.nan}, {'epochs': 'many'}, {'epoch': None}]
    ):
        (tmp_path / f'at_wrn_16_1_from_wrn_16_2_seed{seed}').mkdir()
        record = {'epoch': 1, 'epochs': 1, 'test_acc': 90.0} | more
        log = tmp_path / f'at_wrn_16_1_from_wrn_16_2_seed{seed}' / 'log.txt'
        log.write_text(f'json_stats: {json.dumps(record)}\n')
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0').mkdir()
    (tmp_path / 'kd_wrn_16_1_from_wrn_16_2_seed0' / 'log.txt').write_text('json_stats: {"epoch": 1')
    rows, text = summary(tmp_path, 'table1', capsys=capsys)
    assert {row[4] for row in rows if row[0] in ('AT', 'KD')} == {'—'}
    assert 'at_wrn_16_1_from_wrn_16_2: its log is damaged (seeds 0, 1, 2, 3)' in text
    assert 'kd_wrn_16_1_from_wrn_16_2: its log is damaged (seed 0)' in text
    (tmp_path / 'at_beta1e_wrn_16_1_from_wrn_16_2_seed0').mkdir()  # no number
    assert 'beta 1' not in str(summary(tmp_path, 'beta', capsys=capsys)[0])


def test_a_student_that_other_tables_have_more_of_has_the_tables_seeds(tmp_path, capsys):
    for seed in 0, 1, 5:
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0 + seed])
        if seed < 2:
            write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    student = next(row for row in rows if row[0] == 'student')
    assert student[4:7] == ['9.50', '9.00–10.00', '2'] and 'seed 5' not in text


def test_runs_of_different_schedules_are_reported(tmp_path, capsys):
    for seed in 0, 1, 2:
        dtype = 'bfloat16' if seed == 1 else 'float'
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0], dtype=dtype)
    beta = {'beta': 1e3, 'beta_decay': 'none', 'method': 'at'}
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [9.0], **beta)
    write_run(tmp_path, 'factt_wrn_16_1_from_wrn_16_2_seed0', [9.0], beta=100.0, method='factt')
    _, text = summary(tmp_path, 'table1', '--seeds', '0', '1', '2', capsys=capsys)
    assert '- dataset CIFAR10, epochs 1, epoch_step [60,120,160], lr 0.1' in text
    assert '- runs differ in dtype: float (4 runs), bfloat16 (wrn_16_1_seed1)' in text.replace(
        '; ', ', '
    )
    assert '- labels alone: wrn_16_1\n' in text
    assert '- beta 1000: at_wrn_16_1_from_wrn_16_2\n' in text
    assert '- method factt, beta 100: factt_wrn_16_1_from_wrn_16_2\n' in text


def test_runs_that_are_no_seeds_of_one_experiment_have_no_median(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    write_run(tmp_path, 'wrn_16_1_seed1', [20.0, 8.0])
    for seed in 0, 1:
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    by_name = {row[0]: row[4:8] for row in rows}
    assert by_name['student'] == ['—', '', '', '']
    assert by_name['AT from WRN-16-2'] == ['8.00', '8.00–8.00', '2', '']
    assert '- wrn_16_1_seed0: epochs 1; wrn_16_1_seed1: epochs 2\n' in text
    # Three seeds of which one was trained otherwise: the others count.
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed2', [1.0], beta=100.0)
    write_run(tmp_path, 'wrn_16_1_seed2', [11.0])
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    by_name = {row[0]: row[4:8] for row in rows}
    assert by_name['student'] == ['10.00', '9.00–11.00', '2', '']
    assert by_name['AT from WRN-16-2'] == ['8.00', '8.00–8.00', '2', '+1.00 (n = 1)']
    odd, other = 'at_wrn_16_1_from_wrn_16_2_seed2', 'at_wrn_16_1_from_wrn_16_2_seed0'
    assert f'- {odd}: beta 100; {other}: beta 1000\n' in text
    assert '- wrn_16_1_seed1: epochs 2; wrn_16_1_seed0: epochs 1\n' in text


def test_a_gain_of_fewer_pairs_than_runs_says_so(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    for seed in 0, 1, 2:
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    at = next(row for row in rows if row[0].startswith('AT from WRN'))
    assert at[6:8] == ['3', '+1.00 (n = 1)']


def test_damaged_weights_cost_a_table_their_multiply_adds_alone(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    (tmp_path / 'wrn_16_1_seed0' / 'model.hkl').write_bytes(b'half')
    summarize.main(['controls', str(tmp_path)])
    out, err = capsys.readouterr()
    assert '175,066' in out and '9.00' in out
    assert err.startswith('warning: ') and 'model.hkl' in err and err.count('\n') == 1


def test_parameters_and_multiply_adds_are_those_of_the_weights(tmp_path, capsys):
    torch.manual_seed(0)
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0], depth=10, width=0.5, n_parameters=1)
    _, params = resnet.wrn(10, 0.5, 10)
    save_params(tmp_path / 'wrn_16_1_seed0' / 'model.hkl', params)
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    n = sum(v.numel() for v in params.values() if v.requires_grad)
    madds = 3 * 16 * 9 * 32**2 + 32 * 10  # conv0 and fc
    shapes = (16, 8, 32), (8, 16, 16), (16, 32, 8)
    for ni, no, side in shapes:
        madds += (ni * no * 9 + no * no * 9 + ni * no) * side**2
    row = next(row for row in rows if row[0] == 'student')
    assert row[1:3] == [f'{n:,}', f'{madds / 1e6:.1f}M']
    # A log alone tells the net as well.
    (tmp_path / 'logs').mkdir()
    write_run(tmp_path, 'x', [9.0], depth=10, width=0.5, num_classes=10, n_parameters=1)
    (tmp_path / 'x' / 'log.txt').rename(tmp_path / 'logs' / 'wrn_16_1_seed0.txt')
    rows, _ = summary(tmp_path / 'logs', 'controls', capsys=capsys)
    assert next(r for r in rows if r[0] == 'student')[1:3] == row[1:3]


NIN = {'net': 'nin', 'depth': 10, 'width': 4, 'num_classes': 10}
PHOTOGRAPHS = {'imagenetpath': 'x', 'depth': 18, 'width': 1.0, 'num_classes': 1000}


@pytest.mark.parametrize(
    'net, parameters, multiply_adds',
    [
        # 492 weights of convolutions, 50 of the linear layer, and for each of nine convolutions
        # batch norm (8) or a bias (4).
        (NIN, 492 + 50 + 9 * 8, 199720),
        (NIN | {'image_shape': [32, 64]}, 492 + 50 + 9 * 8, 2 * (199720 - 40) + 40),
        (NIN | {'no_pool_relu': True}, 492 + 50 + 6 * 8 + 3 * 4, 199720),
        (NIN | {'no_bn': True}, 492 + 50 + 9 * 4, 199720),
        # ResNet18_Weights.IMAGENET1K_V1.meta of torchvision.
        (PHOTOGRAPHS | {'image_size': 224}, 11689512, 1.814e9),
    ],
)
def test_a_run_without_weights_costs_what_its_net_costs(net, parameters, multiply_adds, tmp_path):
    write_run(tmp_path, 'x_seed0', [9.0], n_parameters=1, **net)
    n, madds = table_runs.cost(table_runs.read_runs('x', {0}, tmp_path))
    assert n == parameters and madds == pytest.approx(multiply_adds, rel=3e-4)


def test_an_impossible_image_size_in_a_log_is_a_warning(tmp_path, capsys):
    write_run(tmp_path, 'x_seed0', [9.0], n_parameters=1, image_shape='x', **NIN)
    assert table_runs.cost(table_runs.read_runs('x', {0}, tmp_path)) == (1, None)
    assert 'warning: x_seed0: its log has an invalid image size, x' in capsys.readouterr().err


def test_there_is_no_gain_over_a_student_on_other_data(tmp_path, capsys):
    write_run(tmp_path, 'wrn_16_1_seed0', [9.0])
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', [8.0], dataset='shapes', beta=1e3)
    write_run(tmp_path, 'wrn_16_1_equal_time_seed0', [9.5, 8.5])
    rows, text = summary(tmp_path, 'controls', capsys=capsys)
    by_name = {row[0]: row for row in rows}
    assert by_name['AT from WRN-16-2'][4] == '8.00' and by_name['AT from WRN-16-2'][7] == ''
    assert by_name['alone, for as long as with AT'][7] == '+0.50', 'longer on purpose'
    assert 'at_wrn_16_1_from_wrn_16_2_seed0: differs in dataset' in text


def test_there_is_no_gain_between_schedules(tmp_path, capsys):
    for seed in 0, 1:
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [20.0, 9.0])
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], beta=1e3)
        more = {'lr_decay_ratio': 0.1 if seed else None, 'alpha': 0.9}
        write_run(tmp_path, f'kd_wrn_16_1_from_wrn_16_2_seed{seed}', [20.0, 7.0], **more)
    rows, text = summary(
        tmp_path, 'table1', '--only', '*_from_wrn_16_2_* wrn_16_1_*', capsys=capsys
    )
    by_name = {row[0]: row for row in rows}
    assert by_name['AT'][4:8] == ['8.00', '8.00–8.00', '2', '']
    assert by_name['KD'][7] == '+2.00 ± 0.00 (n = 2)', 'an option that a log lacks does not differ'
    assert '- at_wrn_16_1_from_wrn_16_2_seed1: differs in epochs' in text


def test_rows_outside_only_are_left_out(tmp_path, capsys, monkeypatch):
    for name in 'wrn_16_1', 'at_wrn_16_1_from_wrn_16_2', 'wrn_16_2':
        write_run(tmp_path, f'{name}_seed0', [9.0 - len(name) / 10])
    for given in ['--only', '*from_wrn_16_2*'], []:
        monkeypatch.setenv('ONLY', '' if given else '*from_wrn_16_2*')
        rows, text = summary(tmp_path, 'table1', *given, capsys=capsys)
        heads = ['', '**WRN-16-1 from WRN-16-2**', 'AT', 'F-ActT', 'KD', 'AT + KD']
        assert [row[0] for row in rows if '--' not in row[0]] == heads
        assert rows[3][7] == '+1.70', 'over the student, which has no row here'
        assert 'nin' not in text and '- wrn_16_1' not in text


def test_all_seeds_in_logs_count_and_those_that_are_asked_for_are_listed(tmp_path, capsys):
    for seed in 1, 2, 7:
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0])
        write_run(tmp_path, f'at_wrn_16_1_from_wrn_16_2_seed{seed}', [8.0], seed == 7 and 3)
    rows, text = summary(tmp_path, 'controls', '--seeds', '1', '4', capsys=capsys)
    assert [row[6] for row in rows if row[0] in ('student', 'AT from WRN-16-2')] == ['3', '2']
    assert '- at_wrn_16_1_from_wrn_16_2: missing (seed 4)' in text
    assert '- at_wrn_16_1_from_wrn_16_2: epoch 1 of 3 (seed 7)' in text


def test_a_column_has_the_hours(tmp_path, capsys):
    for seed, seconds in enumerate((3600.0, 7200.0, 36000.0)):
        write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0] * 3, train_time=seconds, test_time=600.0)
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    assert rows[0][8] == 'hours' and next(r for r in rows if r[0] == 'student')[8] == '6.5'


def test_cifar100_has_means_as_published(tmp_path, capsys):
    for seed, error in enumerate((20.0, 21.0, 28.0)):
        write_run(tmp_path, f'wrn_16_2_seed{seed}', [error])
    rows, text = summary(tmp_path, 'cifar100', capsys=capsys)
    assert next(row for row in rows if row[0] == 'student')[4] == '77.00'
    assert 'mean over n seeds' in text and 'median' not in text


def test_table5_knows_one_folder_under_several_names(tmp_path, capsys):
    top = {'test_acc': [69.0, 89.5]}
    for name, path in (
        ('resnet_18', '/x/ILSVRC2012/'),
        ('at_resnet_18_from_resnet_34', 'ILSVRC2012'),
    ):
        write_run(tmp_path, f'{name}_seed0', [0.0], **top, imagenetpath=path)
    record = {'evaluate': 'x', 'test_acc': [70.0, 90.0], 'n_parameters': 5, 'multiply_adds': 6e6}
    (tmp_path / 'resnet_34.txt').write_text(f'{json_stats(record)}\n')
    rows, text = summary(tmp_path, 'table5', capsys=capsys)
    assert 'another' not in text and 'Not finished' not in text
    assert [row[4] for row in rows if row[0] == 'teacher'] == ['30.00', '10.00']
    assert [row[7] for row in rows if row[0] == 'AT'] == ['+0.00', '+0.00']


def test_cifar100_is_reported_in_accuracy_and_top5_where_there_is_one(tmp_path, capsys):
    write_run(tmp_path / 'c', 'wrn_16_2_seed0', [27.0])
    write_run(tmp_path / 'c', 'at_wrn_16_2_from_wrn_40_2_seed0', [26.0], beta=1e3)
    rows, _ = summary(tmp_path / 'c', 'cifar100', capsys=capsys)
    at = next(row for row in rows if row[0] == 'AT')
    assert at[3:8] == ['74.08', '74.00', '', '1', '+1.00'] and rows[0][4] == 'here: accuracy, %'
    top = {'test_acc': [69.0, 89.5]}
    write_run(tmp_path / 'i', 'resnet_18_seed0', [0.0], **top, imagenetpath='/x/ILSVRC2012')
    rows, text = summary(tmp_path / 'i', 'table5', capsys=capsys)
    assert [r[3:5] for r in rows if r[0].startswith('student')] == [
        ['30.40', '31.00'],
        ['10.80', '10.50'],
    ]
    assert 'dataset ILSVRC2012' in text


def test_convergence_means_are_of_the_papers_schedule_alone(tmp_path, capsys):
    errors = [100.0 - 0.25 * epoch for epoch in range(1, 201)]
    write_run(tmp_path, 'wrn_16_1_seed0', errors)
    write_run(tmp_path, 'at_wrn_16_1_from_wrn_16_2_seed0', errors[:100], beta=1e3)
    rows, text = summary(tmp_path, 'convergence', capsys=capsys)
    students = [row[3:5] for row in rows if row[0].startswith('student')]
    means = [100 - 0.25 * middle for middle in (54.5, 80, 120, 150.5, 200)]
    papers = ['22.00', '12.50', '9.50', '8.70', '8.77']
    assert [float(ours) for _, ours in students] == pytest.approx(means, abs=0.006)
    assert [paper for paper, _ in students] == papers
    assert [row[4] for row in rows if row[0] == 'AT'] == ['—'] * 4 + ['75.00']
    assert "another schedule than the paper's" in text
    # The published code wrote the drops as text; and a log that lacks an epoch of a stretch has no
    # mean of it.
    write_run(tmp_path / 'p', 'wrn_16_1_seed0', errors, epoch_step='[60,120,160]')
    log = tmp_path / 'p' / 'wrn_16_1_seed0' / 'log.txt'
    log.write_text(''.join(log.read_text().splitlines(keepends=True)[52:]))
    rows, _ = summary(tmp_path / 'p', 'convergence', capsys=capsys)
    ours = [row[4] for row in rows if row[0].startswith('student')]
    assert ours[0] == '—' and [float(v) for v in ours[1:]] == pytest.approx(means[1:], abs=0.006)


def test_equal_time_is_the_median_over_the_seeds_that_have_both_runs(tmp_path, capsys):
    def write(seed, alone=None, at=None, **more):
        if alone:
            write_run(tmp_path, f'wrn_16_1_seed{seed}', [9.0] * 3, train_time=alone, **more)
        if at:
            name = f'at_wrn_16_1_from_wrn_16_2_seed{seed}'
            write_run(tmp_path, name, [9.0] * 3, train_time=at)

    write(0, 10.0, 14.4)
    write(1, alone=1.0)  # on another machine, say
    write(2, at=60.0)
    write(3, 1.0, 60.0, epochs=4)  # not finished
    arguments = ['controls', str(tmp_path), '--equal_time', '200']
    summarize.main(arguments)
    assert capsys.readouterr().out == '288\n'
    write(4, 20.0, 40.0)
    write(5, 10.0, 15.0)
    summarize.main(arguments)
    assert capsys.readouterr().out == '300\n', 'of 1.44, 1.5 and 2'


def test_beta_rows_rise_and_the_picture_shows_them(tmp_path, capsys):
    for beta in '10', '1e+3', '316':
        name = f'beta{beta}_wrn_16_1_from_wrn_16_2_seed0'
        write_run(tmp_path, f'at_{name}', [9.0 + float(beta) / 1e3], beta=float(beta))
        write_run(tmp_path, f'at_kd_{name}', [8.0], beta=float(beta), alpha=0.9)
    write_run(tmp_path, 'kd_wrn_16_1_from_wrn_16_2_seed0', [8.5], alpha=0.9)
    write_run(tmp_path, 'wrn_16_1_seed0', [9.5])
    rows, _ = summary(tmp_path, 'beta', capsys=capsys)
    at = [(row[0], row[4]) for row in rows if row[0].startswith('AT, ')]
    assert at == [('AT, beta 10', '9.01'), ('AT, beta 316', '9.32'), ('AT, beta 1000', '10.00')]
    for name in 'a.svg', 'b.svg':
        summarize.main(['beta', str(tmp_path), '--save', str(tmp_path / name)])
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    # Of an AT + KD without its AT, and of a beta that beta.sh has and nothing was trained with.
    write_run(tmp_path, 'at_kd_beta3e4_wrn_16_1_from_wrn_16_2_seed0', [8.0], beta=3e4, alpha=0.9)
    rows, text = summary(tmp_path, 'beta', capsys=capsys)
    assert next(row for row in rows if row[0] == 'AT, beta 30000')[4] == '—'
    assert 'at_beta30000_wrn_16_1_from_wrn_16_2: missing (seed 0)' in text
    rows, text = summary(tmp_path, 'beta', '--betas', '1000', '31.6', capsys=capsys)
    shown = [(row[0], row[4]) for row in rows if ', beta' in row[0]]
    assert [s for s in shown if s[1] != '—'] == [
        ('AT, beta 1000', '10.00'),
        ('AT + KD, beta 1000', '8.00'),
    ]
    assert len(shown) == 4 and 'at_kd_beta31.6_wrn_16_1_from_wrn_16_2: missing (seed 0)' in text
    (tmp_path / 'at_kd_beta3e4_wrn_16_1_from_wrn_16_2_seed0').rename(tmp_path / 'old')
    opt, _ = summarize.parser.parse(['beta', str(tmp_path)])
    axes = summarize.draw_beta(summarize.Table(opt, tmp_path)).axes[0]
    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert curves['AT'] == [[10, pytest.approx(9.01)], [316, pytest.approx(9.316)], [1000, 10.0]]
    lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert lines['KD'] == 8.5 and lines['student'] == 9.5 and axes.get_xscale() == 'log'


def test_logs_may_be_copies_that_bear_the_runs_names(tmp_path, capsys):
    write_run(tmp_path / 'runs', 'wrn_16_1_seed0', [9.0])
    log = tmp_path / 'runs' / 'wrn_16_1_seed0' / 'log.txt'
    (tmp_path / 'wrn_16_1_seed0.txt').write_text(log.read_text())
    rows, _ = summary(tmp_path, 'controls', capsys=capsys)
    assert next(row for row in rows if row[0] == 'student')[1:5] == ['175,066', '', '8.77', '9.00']


def test_summarize_refuses_in_one_line(tmp_path, capsys):
    for words, named in (
        (['table6', tmp_path], 'table6'),
        (['table1', tmp_path / 'none'], 'none'),
        (['table1', tmp_path, '--save', tmp_path / 'x.svg'], '.md'),
        (['table1', tmp_path, '--save', Path(__file__) / 'x.md'], 'is not a folder'),
        (['table1', tmp_path, '--equal_time', '3'], 'controls'),
        (['controls', tmp_path, '--equal_time', '3'], 'at_wrn_16_1'),
        (['beta', tmp_path, '--save', tmp_path / 'x.png'], 'no finished run'),
    ):
        assert call_main(summarize.main, list(map(str, words))) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and named in err
    assert not list(tmp_path.iterdir())
