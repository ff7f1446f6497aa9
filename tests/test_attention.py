"""scripts/attention.py: maps, gradients and agreement against numpy, and what is drawn of them."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import cifar
import data
import resnet
import utils
from support import logs, photographs, weights
from test_scripts import make_folder_set, make_photographs, make_run, refused

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import attention

ANY = {'bn.weight': 0, 'fc.weight': 0, 'fc.bias': 0}  # the names of a net for small images
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 8, 8, 3), np.uint8)


def net_of(f, label='net', classes=None):
    return attention.LabelledNet(label, f, ANY, [{'classes': classes}] if classes else [])


def linear_net(seed=0, size=8, channels=(5, 4)):
    """(a net of two groups, 1x1 convolutions of the image and of its `size` x `size` means, and a
    linear layer; its weights)."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(c, 3)) for c in channels]
    head = rng.normal(size=(3, 3 * 64)) / 20

    def f(x, params, training):
        assert not training
        small = torch.nn.functional.adaptive_avg_pool2d(x, size)
        groups = tuple(
            torch.einsum('kc,bchw->bkhw', torch.tensor(w, dtype=x.dtype), v)
            for w, v in zip(weights, (x, small))
        )
        return x.flatten(1) @ torch.tensor(head, dtype=x.dtype).T, groups

    return f, weights, head


def as_seen(images):
    """float64 [B, 3, H, W]: images as nets for small images are given them."""
    x = (images - np.array([125.3, 123.0, 113.9])) / np.array([63.0, 62.1, 66.7])
    return x.transpose(0, 3, 1, 2)


def pooled(x, size):
    """Means of blocks of [.., 8, 8]: [.., size, size]."""
    k = x.shape[-1] // size
    return x.reshape(*x.shape[:-2], size, k, size, k).mean((-3, -1))


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


# ------------------------ maps and gradients


def test_mapping_functions_are_those_of_the_paper():
    f, weights, _ = linear_net()
    strips = attention.look(IMAGES[0], net_of(f), list(attention.MAPS), False, 'x', [])
    A = np.abs(np.einsum('kc,chw->khw', weights[0], as_seen(IMAGES[:1])[0]))
    expected = [A.sum(0), (A**2).sum(0), (A**4).sum(0), A.max(0)]
    assert [s.mapping for s in strips] == ['sum |A|', 'sum |A|²', 'sum |A|⁴', 'max |A|']
    for strip, q in zip(strips, expected):
        np.testing.assert_allclose(strip.maps[0], q / np.sqrt((q**2).sum()), rtol=1e-4)


@pytest.mark.parametrize(
    ('name', 'classes', 'logged', 'target'),
    [
        ('b', ['a', 'b', 'c'], None, 1),  # the class of the image
        ('b', ['a', 'b', 'c'], ['c', 'a', 'b'], 2),  # in the net's own order
        ('b', ['a', 'b'], None, None),  # a net of other classes
        ('b.jpg', [], ['a', 'b', 'c'], None),  # nothing is known
        ('b', [], ['a', 'b', 'c'], None),  # a file that happens to be called so
    ],
)
def test_gradient_is_of_the_class_that_is_known_else_of_the_answer(name, classes, logged, target):
    f, _, head = linear_net()
    (strip,) = attention.look(IMAGES[1], net_of(f, classes=logged), ['sum2'], True, name, classes)
    logits = head @ as_seen(IMAGES[1:2])[0].ravel()
    wanted = np.eye(3)[logits.argmax() if target is None else target]
    J = (head.T @ (softmax(logits) - wanted)).reshape(3, 8, 8)  # of cross-entropy, by hand
    np.testing.assert_allclose(strip.gradient, np.abs(J).max(0), rtol=1e-3, atol=1e-6)


def test_gradient_of_a_wide_resnet_by_finite_differences():
    torch.manual_seed(0)
    f, params = resnet.wrn(10, 1, 10)
    params = utils.cast({k: v.detach() for k, v in params.items()}, 'double')
    net = attention.LabelledNet('net', f, params, [])
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)

    class Double(attention.LabelledNet):
        def normalize(self, images):
            return super().normalize(images).double()

    found = attention.gradient_map(torch.from_numpy(image)[None], Double(*net), 3)
    x = net.normalize(torch.from_numpy(image)[None]).double()
    row, column = np.unravel_index(found.argmax(), found.shape)

    def loss(change):
        return float(
            torch.nn.functional.cross_entropy(f(x + change, params, False)[0], torch.tensor([3]))
        )

    slopes = []
    for c in range(3):
        step = torch.zeros_like(x)
        step[0, c, row, column] = 1e-5
        slopes.append(abs(loss(step) - loss(-step)) / 2e-5)
    assert found.max() > 0
    np.testing.assert_allclose(found[row, column], max(slopes), rtol=1e-4)


# ------------------------ agreement


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
    arguments = attention.MAPS[key][1]
    (found,) = attention.measure(batches, net_of(teacher), [net_of(student)], arguments)

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

    rows = attention.agreement_rows([net_of(student, 'student')], [found])
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
    attention.main(['--agreement', '--weights', *runs, '--labels', 'a', 'b|b', '--save', str(save)])
    out = capsys.readouterr().out
    assert save.read_text() in out and '1,000 test images of shapes' in out and '|A|²' in out
    _, *rows = table_of(save.read_text().replace(r'\|', '!'))
    assert [row[0] for row in rows] == ['b!b', '', '']
    assert all(0 < float(v) < 2 for v in rows[0][3:])
    f, params, _ = weights.load_net(runs[1])
    _, load = data.open_sets('shapes', '.')
    right = 10 * cifar.test(f, params, load()[1])[1]
    assert [row[2] for row in rows] == ['1,000', f'{right:.0f}', f'{1000 - right:.0f}']


def make_photograph_net(folder, seed, root, classes):
    folder.mkdir()
    torch.manual_seed(seed)
    weights.save_params(folder / 'model.hkl', resnet.resnet(18, 0.125, len(classes))[1])
    record = {
        'depth': 18,
        'width': 0.125,
        'imagenetpath': str(root),
        'image_size': 64,
        'classes': classes,
    }
    (folder / 'log.txt').write_text(logs.json_stats(record) + '\n')
    return str(folder)


def test_agreement_on_photographs(tmp_path, capsys):
    root = make_photographs(tmp_path / 'set', val=3)
    teacher = make_photograph_net(tmp_path / 'teacher', 0, root, ['cat', 'dog', 'sheep'])
    student = make_photograph_net(tmp_path / 'student', 1, root, ['dark', 'light'])
    attention.main(['--agreement', '--weights', teacher, student])
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
    attention.main(['--agreement', '--weights', teacher, student, *options])
    assert table_of(capsys.readouterr().out)[1] == row


def test_agreement_on_a_folder_of_small_images(tmp_path, capsys):
    root = make_folder_set(tmp_path / 'set')
    nets = [str(make_run(tmp_path / f'net{s}', s, classes=['dark', 'light'])) for s in (0, 1)]
    command = [
        '--agreement',
        '--weights',
        *nets,
        nets[0],
        '--dataset',
        'folder',
        '--dataroot',
        str(root),
    ]
    attention.main(command)
    _, row, *_, same, _, _ = table_of(capsys.readouterr().out)
    assert same[2:] == ['8', '0.0000', '0.0000', '0.0000'], 'a net agrees with itself'
    images = np.stack([data.decode(f) for f in sorted((root / 'test').glob('*/*'))])
    x = data.normalize(torch.from_numpy(images))
    with torch.no_grad():
        groups = [f(x, params, False)[1] for f, params, _ in map(weights.load_net, nets)]
    distances = [((utils.at(a) - utils.at(b)) ** 2).sum(1).mean() for a, b in zip(*groups)]
    assert row[2:] == ['8', *(f'{d:.4f}' for d in distances)]
    cv2.imwrite(str(root / 'test' / 'light' / '2.png'), np.zeros((20, 32, 3), np.uint8))
    assert 'light/2.png' in refused(attention.main, command, capsys)


def test_images_of_a_run_that_are_not_here_are_named(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    record = logs.read_log(run / 'log.txt')[0] | {'dataset': 'folder', 'dataroot': '/nowhere'}
    (run / 'log.txt').write_text(logs.json_stats(record) + '\n')
    error = refused(attention.main, ['--weights', run, '--save', tmp_path / 'a.png'], capsys)
    assert f'--weights {run}: its images, /nowhere, are not there' in error


# ------------------------ the picture


def rows_of(labels, maps, gradient, names=('a', 'b')):
    """What draw_rows and draw_columns are given, of random nets and images."""
    nets = [net_of(linear_net(i)[0], label, ['a', 'b', 'c']) for i, label in enumerate(labels)]
    images = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_NEAREST) for image in IMAGES[:2]]
    nets = [net._replace(f=lambda x, p, t, f=net.f: f(x[..., ::4, ::4], p, t)) for net in nets]
    return [
        (
            name,
            image,
            [
                s
                for net in nets
                for s in attention.look(image, net, maps, gradient, name, ['a', 'b', 'c'])
            ],
        )
        for name, image in zip(names, images)
    ]


@pytest.mark.parametrize('layout', ['rows', 'columns'])
@pytest.mark.parametrize('maps', [['sum2'], ['sum1', 'max']])
def test_picture_holds_every_map_and_no_text_is_cut_off_or_in_another(layout, maps, tmp_path):
    labels = ['teacher', 'a student of that teacher with a name far too long for its place' * 3]
    rows = rows_of(labels, maps, True, ['a', 'b' * 80])
    figure = getattr(attention, f'draw_{layout}')(rows, ['a', 'b', 'c'])
    figure.savefig(tmp_path / 'x.png')
    shown = cv2.cvtColor(cv2.imread(str(tmp_path / 'x.png')), cv2.COLOR_BGR2RGB)
    H, W = shown.shape[:2]
    places = set()
    for _, image, strips in rows:
        pictures = [image]
        for strip in strips:
            pictures += [picture for _, picture in attention.panels(strip, image)]
        assert len(pictures) == 1 + 2 * (2 * len(maps) + 1)
        for picture in pictures:
            large = np.kron(picture, np.ones((4, 4, 1), np.uint8))
            difference = cv2.matchTemplate(shown, large, cv2.TM_SQDIFF)
            assert difference.min() <= 1e-6 * difference.max(), 'pixel for pixel'
            places.add(np.unravel_index(difference.argmin(), difference.shape))
    assert len(places) == 2 * len(pictures)

    texts = [t for t in figure.texts if t.get_text()]
    boxes = [t.get_window_extent() for t in texts]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= W and b.y1 <= H for b in boxes)
    for i, a in enumerate(boxes):
        assert not any(a.padded(-2).overlaps(b.padded(-2)) for b in boxes[:i]), texts[i]
        for row, column in places:  # the upper left corner of a picture of 128 pixels
            apart = (
                a.x1 <= column or a.x0 >= column + 128 or H - a.y0 <= row or H - a.y1 >= row + 128
            )
            assert apart, texts[i]
    heads = {t.get_text() for t in texts}
    assert {'image', 'gradient', 'group 0, 8×8', 'group 1, 8×8'} <= heads
    assert len(maps) == 1 or {'sum |A|', 'max |A|'} <= heads
    attention.plt.close(figure)


def test_rows_and_all_maps_end_to_end(tmp_path):
    root, save = make_folder_set(tmp_path / 'set'), tmp_path / 'x.png'
    run = str(make_run(tmp_path / 'net', classes=['dark', 'light']))
    command = ['--weights', run, run, '--labels', 'a', 'b', '--n', '2', '--save', str(save)]
    command += ['--dataset', 'folder', '--dataroot', str(root)]
    shapes = []
    for options in (
        ['--layout', 'rows'],
        ['--layout', 'rows', '--gradient'],
        ['--maps', 'all', '--layout', 'rows'],
    ):
        attention.main([*command, *options])
        shapes.append(np.array(cv2.imread(str(save)).shape))
    plain, gradient, all_maps = shapes
    assert list(gradient - plain) == [0, 128 + 3, 0]
    assert list(all_maps - plain) == [2 * 6 * (128 + 3), 0, 0]  # 2 images of 2 nets of 4 maps


def test_options_that_contradict_each_other_are_refused(tmp_path, capsys):
    net, other = (str(make_run(tmp_path / f'net{seed}', seed)) for seed in (0, 1))
    wide = str(make_run(tmp_path / 'wide', classes=['x', 'y']))
    photographs = make_photograph_net(tmp_path / 'photographs', 0, tmp_path, data.SHAPES)
    table = ['--agreement', '--weights', net, other]
    for options, said in (
        (['--agreement', '--weights', net], 'at least one other'),
        ([*table, '--maps', 'all'], 'one of --maps'),
        ([*table, '--gradient'], '--gradient'),
        ([*table, '--layout', 'rows'], '--layout'),
        ([*table, '--n', '3'], '--n'),
        ([*table, '--images', str(tmp_path)], '--images'),
        ([*table, '--save', str(tmp_path / 'x.png')], '.md'),
        (['--weights', net, '--save', str(tmp_path / 'x.md')], '.png'),
        (['--weights', net, '--maps', 'sum3'], 'sum3'),
        (['--weights', net, '--layout', 'grid'], 'grid'),
        ([*table, wide], wide),
        ([*table, photographs], '4 groups'),
        ([*table, '--labels', 'a'], '--labels'),
    ):
        assert re.search(re.escape(said), refused(attention.main, options, capsys)), options
    assert not list(tmp_path.glob('x.*'))
