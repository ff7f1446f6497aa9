"""scripts/attention.py: maps and gradients against numpy, which images are shown, the picture."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import data
import resnet
import utils
from attention_samples import IMAGES, as_seen, linear_net, net_of
from samples import make_folder_set, make_photographs, make_run, picture, refused
from support import logs, weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
import attention
import attention_nets
from attention_nets import LabelledNet, Source
from attention_page import GREEN, GREY, RED, overlay, shrink


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nets')
    return [make_run(folder / f'net{seed}', seed) for seed in (0, 1)]


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


# ------------------------ maps and gradients


def test_mapping_functions_are_those_of_the_paper():
    f, weights, _ = linear_net()
    seen = attention.look(IMAGES[0], net_of(f), list(attention.MAPS), False, 'x', [])
    A = np.abs(np.einsum('kc,chw->khw', weights[0], as_seen(IMAGES[:1])[0]))
    expected = [A.sum(0), (A**2).sum(0), (A**4).sum(0), A.max(0)]
    assert list(seen.maps) == ['sum |A|', 'sum |A|²', 'sum |A|⁴', 'max |A|']
    for groups, q in zip(seen.maps.values(), expected):
        np.testing.assert_allclose(groups[0], q / np.sqrt((q**2).sum()), rtol=1e-4)


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
def test_gradient_is_of_the_class_that_is_known_else_of_the_prediction(
    name, classes, logged, target
):
    f, _, head = linear_net()
    seen = attention.look(IMAGES[1], net_of(f, classes=logged), ['sum2'], True, name, classes)
    logits = head @ as_seen(IMAGES[1:2])[0].ravel()
    wanted = np.eye(3)[logits.argmax() if target is None else target]
    J = (head.T @ (softmax(logits) - wanted)).reshape(3, 8, 8)  # of cross-entropy, by hand
    np.testing.assert_allclose(seen.gradient, np.abs(J).max(0), rtol=1e-3, atol=1e-6)


def test_gradient_of_a_wide_resnet_by_finite_differences():
    torch.manual_seed(0)
    f, params = resnet.wrn(10, 1, 10)
    params = utils.cast({k: v.detach() for k, v in params.items()}, 'double')
    net = LabelledNet('net', f, params, [])
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)

    class Double(LabelledNet):
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


# ------------------------ images


def test_attention_of_two_nets_on_shapes(nets, tmp_path):
    plain, mixed = tmp_path / 'plain.png', tmp_path / 'mixed.png'
    attention.main(
        ['--weights', str(nets[0]), str(nets[0] / 'model.hkl'), '--n', '3', '--save', str(plain)]
    )
    attention.main(['--weights', *map(str, nets), '--n', '3', '--save', str(mixed)])
    assert picture(plain).shape == picture(mixed).shape
    width = picture(mixed).shape[1]
    assert (picture(plain) != picture(mixed))[
        :, width // 2 :
    ].mean() > 0.05  # the second net's half


def test_attention_falls_where_the_activations_are():
    activations = torch.zeros(1, 4, 8, 8)
    activations[0, :, 6, 1] = 1

    def f(x, params, training):
        return torch.zeros(1, 2), (activations,)

    image = np.full((32, 32, 3), 128, np.uint8)
    seen = attention.look(image, net_of(f), ['sum2'], False, 'cat.jpg', ['a', 'b'])
    assert seen.prediction == 'a' and seen.gradient is None
    shown = overlay(image, seen.maps[''][0])
    light = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY).astype(int)
    assert shown.shape == image.shape
    assert abs(np.array(np.unravel_index(light.argmax(), light.shape)) - (26, 6)).max() <= 3
    assert light[8, 24] < light.max() - 100
    assert overlay(image, np.zeros((8, 8), np.float32)).shape == image.shape  # a map of zeros


def test_attention_on_images_of_any_size(nets, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'photographs').mkdir()
    for name, size in ('wide.jpg', (300, 500)), ('grey.png', (40, 24)), ('line.png', (2, 400)):
        image = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), size[::-1])
        cv2.imwrite(str(tmp_path / 'photographs' / name), image)
    save = tmp_path / 'maps.png'
    images = [str(tmp_path / 'photographs' / 'wide.jpg'), str(tmp_path / 'photographs')]
    attention.main(
        ['--weights', str(nets[0]), '--images', *images, '--labels', 'net', '--save', str(save)]
    )
    picture(save)
    assert shrink(np.zeros((300, 500, 3), np.uint8), 128).shape == (77, 128, 3)


def test_images_are_shrunk_to_what_the_net_saw(nets, tmp_path, monkeypatch):
    seen = []
    real = attention.look
    monkeypatch.setattr(attention, 'look', lambda im, *a: seen.append(im.shape) or real(im, *a))
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((100, 200, 3), np.uint8))
    save = ['--images', str(tmp_path / 'a.png'), '--save', str(tmp_path / 'maps.png')]
    attention.main(['--weights', str(nets[0]), *save])
    weights.save_params(tmp_path / 'big.hkl', resnet.resnet(18, 0.125, 5)[1])
    attention.main(['--weights', str(tmp_path / 'big.hkl'), *save])
    attention.main(['--weights', str(nets[0]), *save, '--image_size', '64'])
    assert seen == [(16, 32, 3), (100, 200, 3), (32, 64, 3)]


def test_attention_of_a_net_for_photographs(tmp_path):
    torch.manual_seed(0)
    weights.save_params(tmp_path / 'net.hkl', resnet.resnet(18, 0.25, 5)[1])
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    f, params, records = weights.load_net(tmp_path / 'net.hkl')
    net = LabelledNet('net', f, params, records)
    seen = attention.look(image, net, ['sum2'], True, 'cat.jpg', [])
    maps = seen.maps['']
    assert [m.shape for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert seen.gradient.shape == (64, 96) and seen.prediction == ''
    x = torch.from_numpy(image / 255.0) - torch.tensor([0.485, 0.456, 0.406])
    x = (x / torch.tensor([0.229, 0.224, 0.225])).permute(2, 0, 1)[None].float()
    expected = utils.at(f(x, params, False)[1][0])[0].detach()
    torch.testing.assert_close(torch.from_numpy(maps[0]).flatten(), expected, rtol=1e-3, atol=1e-5)


def test_attention_on_a_folder_set(nets, tmp_path):
    root = make_folder_set(tmp_path / 'set')
    images, classes = attention.choose_images(Source('folder', root, '--dataroot'), 3)
    assert classes == ['dark', 'light']
    assert [name for name, _ in images] == ['dark', 'light', 'dark']
    options = ['--dataset', 'folder', '--dataroot', str(root), '--save', str(tmp_path / 'maps.png')]
    attention.main(['--weights', str(nets[0]), *options])
    picture(tmp_path / 'maps.png')


def test_attention_of_a_run_on_photographs_shows_what_it_is_tested_on(tmp_path, capsys):
    root = make_photographs(tmp_path / 'set', ['dark', 'light'], train=1, val=2)
    run, save = tmp_path / 'run', tmp_path / 'maps.png'
    run.mkdir()
    weights.save_params(run / 'model.hkl', resnet.resnet(18, 0.25, 2)[1])
    record = {'depth': 18, 'width': 0.25, 'imagenetpath': str(root), 'image_size': 56}
    (run / 'log.txt').write_text(logs.json_stats(record | {'classes': ['dark', 'light']}) + '\n')
    options = ['--weights', str(run), '--n', '3', '--save', str(save)]
    opt, _ = attention.parser.parse(options)
    images, classes = attention.find_images(opt, LabelledNet('net', None, None, [record]))
    assert classes == ['dark', 'light'] and [c for c, _ in images] == ['dark', 'light', 'dark']
    for (_, image), file in zip(images, ('dark/0.jpg', 'light/0.jpg', 'dark/1.jpg')):
        # To 64 = 56 * 256 / 224, then the centre.
        whole = Image.open(root / 'val' / file).convert('RGB')
        size = [64 * side // min(whole.size) for side in whole.size]
        left, top = (round((side - 56) / 2) for side in size)
        view = whole.resize(size, Image.BILINEAR).crop((left, top, left + 56, top + 56))
        assert np.abs(image - np.asarray(view).astype(int)).mean() < 1

    attention.main(options)
    shown = picture(save)
    root.rename(tmp_path / 'moved')
    gone = refused(attention.main, options, capsys)
    assert str(root) in gone and str(run) in gone and '--dataroot' in gone
    save.unlink()
    attention.main([*options, '--dataroot', str(tmp_path / 'moved')])
    assert np.array_equal(picture(save), shown)


def test_attention_refuses_in_one_line(nets, tmp_path, capsys):
    (tmp_path / 'bad.jpg').write_bytes(b'\xff\xd8 no image')
    (tmp_path / 'none').mkdir()
    (tmp_path / 'bad.hkl').write_bytes(b'no weights')
    weights, save = ['--weights', nets[0]], ['--save', tmp_path / 'x.png']
    assert 'bad.jpg' in refused(
        attention.main, [*weights, '--images', tmp_path / 'bad.jpg', *save], capsys
    )
    assert 'no such' in refused(
        attention.main, [*weights, '--images', tmp_path / 'missing.jpg', *save], capsys
    )
    assert 'no images' in refused(
        attention.main, [*weights, '--images', tmp_path / 'none', *save], capsys
    )
    assert 'bad.hkl' in refused(attention.main, ['--weights', tmp_path / 'bad.hkl', *save], capsys)
    assert 'missing' in refused(attention.main, ['--weights', tmp_path / 'missing', *save], capsys)
    assert '--labels' in refused(attention.main, [*weights, '--labels', 'a', 'b', *save], capsys)
    assert '.png' in refused(attention.main, [*weights, '--save', tmp_path / 'x.jpg'], capsys)
    assert 'cannot be combined' in refused(
        attention.main, [*weights, '--images', tmp_path, '--dataset', 'shapes', *save], capsys
    )
    assert not (tmp_path / 'x.png').exists()


def test_images_of_a_run_that_are_not_here_are_named(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    record = logs.read_log(run / 'log.txt')[0] | {'dataset': 'folder', 'dataroot': '/nowhere'}
    (run / 'log.txt').write_text(logs.json_stats(record) + '\n')
    error = refused(attention.main, ['--weights', run, '--save', tmp_path / 'a.png'], capsys)
    assert f'--weights {run}: its images, /nowhere, are missing' in error


# ------------------------ predictions


@pytest.mark.parametrize(
    ('name', 'classes', 'logged', 'colour'),
    [
        ('a', ['a', 'b', 'c'], None, GREEN),
        ('b', ['a', 'b', 'c'], None, RED),
        ('b', ['a', 'b', 'c'], ['c', 'b', 'a'], RED),
        ('c', ['a', 'b', 'c'], ['c', 'b', 'a'], GREEN),  # in the net's own order
        ('b', ['a', 'b', 'c'], ['x', 'y', 'z'], GREY),  # the net does not know the class
        ('a', ['a', 'b'], None, GREY),  # the net has other classes, without names
        ('a', [], ['a', 'b', 'c'], GREY),  # a file that happens to be called so
    ],
)
def test_a_prediction_is_right_wrong_or_cannot_be_judged(name, classes, logged, colour):
    def f(x, params, training):
        return torch.tensor([[1.0, 0, 0]]), (x,)

    seen = attention.look(IMAGES[0], net_of(f, classes=logged), ['sum2'], False, name, classes)
    names = logged or (classes if len(classes) == 3 else [''])
    assert (seen.prediction, seen.colour) == (names[0], colour)


def test_names_are_shown_as_they_are(nets, tmp_path):
    image, save = tmp_path / 'a$^$.png', tmp_path / 'm.png'
    cv2.imwrite(str(image), np.zeros((20, 20, 3), np.uint8))
    command = ['--weights', nets[0], '--labels', 'n$_', '--images', image, '--save', save]
    attention.main(list(map(str, command)))
    picture(save)


# ------------------------ the picture


def test_rows_and_all_maps_end_to_end(tmp_path):
    root, save = make_folder_set(tmp_path / 'set'), tmp_path / 'x.png'
    run = str(make_run(tmp_path / 'net', classes=['dark', 'light']))
    command = ['--weights', run, run, '--labels', 'a', 'b', '--n', '1', '--save', str(save)]
    command += ['--dataset', 'folder', '--dataroot', str(root), '--layout', 'rows']
    shapes = []
    for options in [], ['--gradient'], ['--maps', 'all']:
        attention.main([*command, *options])
        shapes.append(np.array(cv2.imread(str(save)).shape))
    plain, gradient, all_maps = shapes
    assert list(gradient - plain) == [0, 128 + 3, 0]
    # Two nets of four maps, and a gap between the nets.
    assert list(all_maps - plain) == [6 * (128 + 3) + 15, 0, 0]


@pytest.mark.parametrize('layout', ['rows', 'columns'])
def test_a_page_of_fifty_images_is_bounded(nets, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'SHAPES_TEST', 60)
    save = tmp_path / 'x.png'
    command = ['--weights', *map(str, nets), '--n', '50', '--layout', layout, '--save', str(save)]
    attention.main(command)
    assert max(picture(save).shape) <= 2012


def test_options_that_contradict_each_other_are_refused(nets, tmp_path, capsys):
    for options, said in (
        (['--save', tmp_path / 'x.md'], '.png'),
        (['--maps', 'sum3'], 'sum3'),
        (['--layout', 'grid'], 'grid'),
        (['--agreement'], 'unrecognized arguments: --agreement'),  # now agreement.py
    ):
        error = refused(attention.main, ['--weights', nets[0], *options], capsys)
        assert re.search(re.escape(said), error), options
    assert not list(tmp_path.glob('x.*'))


def test_names_of_any_bytes_and_script_are_drawn(nets, tmp_path, capfd):
    folder = tmp_path / 'images'
    folder.mkdir()
    image = cv2.imencode('.png', IMAGES[0])[1].tobytes()
    for name in 'caf\udce9.png', '照片.png', 'a\tb.png':
        (folder / name).write_bytes(image)
    save = str(tmp_path / 'maps.png')
    attention.main(['--weights', str(nets[0]), '--images', str(folder), '--save', save])
    picture(save)
    assert not capfd.readouterr().err


def test_a_logged_folder_is_used_only_if_it_is_here(tmp_path):
    def root(dataset, *given, folder='/stranger/data'):
        records = [{'dataset': dataset, 'dataroot': folder}]
        opt, _ = attention.parser.parse(['--weights', 'x', *given])
        return attention_nets.find_source(opt, LabelledNet('x', None, {}, records)).root

    here = str(tmp_path)
    assert root('CIFAR10') == '.' and root('CIFAR10', folder=here) == here
    assert root('folder', '--dataset', 'CIFAR10', folder=here) == '.', 'nothing is downloaded there'
    assert root('CIFAR10', '--dataroot', 'mine') == 'mine'
