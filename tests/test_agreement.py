"""scripts/agreement.py: distances of maps against numpy, on sets of every kind."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import cifar
import data
import utils
from attention_samples import IMAGES, as_seen, linear_net, make_photograph_net, net_of
from samples import make_folder_set, make_photographs, make_run, refused
from support import logs, photographs, weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import agreement


def pooled(x, size):
    """Means of blocks of [.., 8, 8]: [.., size, size]."""
    k = x.shape[-1] // size
    return x.reshape(*x.shape[:-2], size, k, size, k).mean((-3, -1))


@pytest.mark.parametrize(('key', 't', 's'), [('sum2', 4, 2), ('max', 2, 4)])
def test_agreement_is_the_squared_distance_of_normalised_maps(key, t, s):
    """Maps of unequal size are pooled to the smaller; in the second batch every answer is right."""
    (teacher, wt, _), (student, ws, head) = linear_net(1, size=t), linear_net(2, size=s)
    answers = (as_seen(IMAGES).reshape(7, -1) @ head.T).argmax(1)
    labels = answers.copy()
    labels[[0, 3]] = (answers[[0, 3]] + 1) % 3
    batches = [
        (torch.from_numpy(IMAGES[i]), torch.from_numpy(labels[i])) for i in (slice(4), slice(4, 7))
    ]
    arguments = agreement.MAPS[key][1]
    (found,) = agreement.measure(batches, net_of(teacher), [net_of(student)], arguments)

    def maps(weight, x, size):
        A = np.abs(np.einsum('kc,bchw->bkhw', weight, x))
        q = pooled((A**2).sum(1) if key == 'sum2' else A.max(1), size).reshape(len(x), -1)
        return q / np.sqrt((q**2).sum(1, keepdims=True))

    x, right = as_seen(IMAGES), labels == answers
    distances = np.stack(
        [
            ((maps(ws[0], x, 8) - maps(wt[0], x, 8)) ** 2).sum(1),
            ((maps(ws[1], pooled(x, s), 2) - maps(wt[1], pooled(x, t), 2)) ** 2).sum(1),
        ]
    )
    assert 0 < distances.min() and distances.max() < 2
    expected = [[chosen.sum(), *distances[:, chosen].sum(1)] for chosen in (right, ~right)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)

    rows = agreement.table([net_of(student, 'student')], [found])
    assert [row[:3] for row in rows[1:]] == [
        ['student', 'all', '7'],
        ['', 'right', '5'],
        ['', 'wrong', '2'],
    ]
    assert rows[1][3:] == [f'{d:.4f}' for d in distances.mean(1)]
    assert rows[3][3:] == [f'{d:.4f}' for d in distances[:, ~right].mean(1)]


def table_of(text):
    """The rows of a Markdown table as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[c.strip() for c in line.strip('|').split('|')] for line in lines[:1] + lines[2:]]


def test_agreement_of_runs_on_shapes(tmp_path, capsys):
    runs = [str(make_run(tmp_path / f'net{seed}', seed)) for seed in (0, 1)]
    save = tmp_path / 'new' / 'agreement.md'
    agreement.main(['--weights', *runs, '--labels', 'a', 'b|b', '--save', str(save)])
    out = capsys.readouterr().out
    assert save.read_text() in out and '1,000 test images of shapes' in out and '|A|²' in out
    _, *rows = table_of(save.read_text().replace(r'\|', '!'))
    assert [row[0] for row in rows] == ['b!b', '', '']
    assert all(0 < float(v) < 2 for v in rows[0][3:])
    f, params, _ = weights.load_net(runs[1])
    _, load = data.open_sets('shapes', '.')
    right = 10 * cifar.test(f, params, load()[1])[1]
    assert [row[2] for row in rows] == ['1,000', f'{right:.0f}', f'{1000 - right:.0f}']


def test_agreement_on_photographs(tmp_path, capsys):
    root = make_photographs(tmp_path / 'set', ['dark', 'light'], train=1, val=3)
    teacher = make_photograph_net(tmp_path / 'teacher', 0, root, ['cat', 'dog', 'sheep'])
    student = make_photograph_net(tmp_path / 'student', 1, root, ['dark', 'light'])
    agreement.main(['--weights', teacher, student])
    out, error = capsys.readouterr()
    assert error.count('\n') == 1 and 'warning' in error and teacher in error
    assert '6 test images of set' in out
    row, right, wrong = table_of(out)[1:]
    assert int(right[2]) + int(wrong[2]) == 6

    files = sorted((root / 'val').glob('*/*'))
    views = [photographs.centre_view(file, 64) for file in files]
    x = data.normalize(torch.from_numpy(np.stack(views)), data.IMAGENET_MEAN, data.IMAGENET_STD)
    with torch.no_grad():
        (_, wanted), (logits, groups) = (
            f(x, params, False) for f, params, _ in map(weights.load_net, (teacher, student))
        )
    distances = [((utils.at(a) - utils.at(b)) ** 2).sum(1).mean() for a, b in zip(groups, wanted)]
    assert row[3:] == [f'{d:.4f}' for d in distances] and len(distances) == 4
    assert int(right[2]) == int((logits.argmax(1) == torch.tensor([0, 0, 0, 1, 1, 1])).sum())

    # The same from a folder that is named.
    options = ['--dataset', 'folder', '--dataroot', str(root)]
    agreement.main(['--weights', teacher, student, *options])
    assert table_of(capsys.readouterr().out)[1] == row


def test_agreement_on_a_folder_of_small_images(tmp_path, capsys):
    root = make_folder_set(tmp_path / 'set')
    nets = [str(make_run(tmp_path / f'net{s}', s, classes=['dark', 'light'])) for s in (0, 1)]
    command = [
        '--weights',
        *nets,
        nets[0],
        '--dataset',
        'folder',
        '--dataroot',
        str(root),
    ]
    agreement.main(command)
    _, row, *_, same, _, _ = table_of(capsys.readouterr().out)
    assert same[2:] == ['8', '0.0000', '0.0000', '0.0000'], 'a net agrees with itself'
    images = np.stack([data.decode(f) for f in sorted((root / 'test').glob('*/*'))])
    x = data.normalize(torch.from_numpy(images))
    with torch.no_grad():
        groups = [f(x, params, False)[1] for f, params, _ in map(weights.load_net, nets)]
    distances = [((utils.at(a) - utils.at(b)) ** 2).sum(1).mean() for a, b in zip(*groups)]
    assert row[2:] == ['8', *(f'{d:.4f}' for d in distances)]
    cv2.imwrite(str(root / 'test' / 'light' / '2.png'), np.zeros((20, 32, 3), np.uint8))
    assert 'light/2.png' in refused(agreement.main, command, capsys)


def test_images_of_a_run_that_are_not_here_are_named(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    record = logs.read_log(run / 'log.txt')[0] | {'dataset': 'folder', 'dataroot': '/nowhere'}
    (run / 'log.txt').write_text(logs.json_stats(record) + '\n')
    error = refused(agreement.main, ['--weights', run, run], capsys)
    assert f'--weights {run}: its images, /nowhere, are missing' in error
    assert '--images' not in error  # which is no option of this tool


def test_options_that_contradict_each_other_are_refused(tmp_path, capsys):
    net, other = (str(make_run(tmp_path / f'net{seed}', seed)) for seed in (0, 1))
    wide = str(make_run(tmp_path / 'wide', classes=['x', 'y']))
    photographs = make_photograph_net(tmp_path / 'photographs', 0, tmp_path, data.SHAPES)
    table = ['--weights', net, other]
    for options, said in (
        (['--weights', net], 'at least one other'),
        ([*table, '--maps', 'all'], "--maps: invalid choice: 'all'"),
        ([*table, '--maps', 'sum2', 'max'], 'max'),
        ([*table, '--gradient'], '--gradient'),
        ([*table, '--layout', 'rows'], '--layout'),
        ([*table, '--n', '3'], '--n'),
        ([*table, '--images', str(tmp_path)], '--images'),
        ([*table, '--save', str(tmp_path / 'x.png')], '.md'),
        ([*table, wide], wide),
        ([*table, photographs], '4 groups'),
        ([*table, '--labels', 'a'], '--labels'),
    ):
        assert re.search(re.escape(said), refused(agreement.main, options, capsys)), options
    assert not list(tmp_path.glob('x.*'))
