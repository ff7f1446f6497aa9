"""The tools in scripts/, on runs made here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import data
import resnet
import utils
from support import devices, logs, program, weights
from support.program import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import attention
import kill
import plot


def make_run(folder, seed=0, epochs=3, classes=data.SHAPES):
    """A run folder with an untrained WRN-10-1 and the log of a run that learned."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    _, params = resnet.wrn(10, 1, len(classes))
    weights.save_params(folder / 'model.hkl', params)
    records = [
        {
            'depth': 10,
            'width': 1.0,
            'dataset': 'shapes',
            'epoch': epoch,
            'epochs': epochs,
            'train_acc': 50.0 + 3 * epoch,
            'test_acc': 40.0 + 3 * epoch + seed,
            'n_parameters': 77850,
            'classes': classes,
            'train_time': 30.0,
            'test_time': 1.5,
        }
        for epoch in range(1, epochs + 1)
    ]
    (folder / 'log.txt').write_text(''.join(f'{logs.json_stats(r)}\n' for r in records))
    return folder


def make_folder_set(root, n=4):
    """root/train and root/test with two classes of n images each: dark and light noise."""
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for name, low in ('dark', 0), ('light', 150):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(low, low + 100, (32, 32, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    return root


def make_photographs(root, train=1, val=2):
    """root/train and root/val with two classes of JPEGs of many sizes: dark and light clouds."""
    rng = np.random.default_rng(0)
    for split, n in ('train', train), ('val', val):
        for name, low in ('dark', 0), ('light', 130):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                clouds = rng.integers(low, low + 125, (5, 7, 3), np.uint8)
                image = cv2.resize(clouds, rng.integers(60, 150, 2), interpolation=cv2.INTER_CUBIC)
                cv2.imwrite(str(root / split / name / f'{i}.jpg'), image)
    return root


def picture(file):
    """The picture in a file, which must show something."""
    image = cv2.imread(str(file))
    assert image is not None and min(image.shape[:2]) > 100 and image.std() > 5
    return image


def refused(main, argv, capsys):
    """The one line with which main refuses these options."""
    capsys.readouterr()
    assert program.call_main(main, [str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and ': error: ' in error and 'Traceback' not in error
    return error


# ------------------------ plot.py


def test_plot_shows_the_runs_and_tells_where_they_ended(tmp_path, capsys):
    runs = [make_run(tmp_path / 'teacher'), make_run(tmp_path / 'student', seed=1, epochs=2)]
    plot.main(
        [str(runs[0]), str(runs[1] / 'log.txt'), '--save', str(tmp_path / 'new' / 'curves.png')]
    )
    out = capsys.readouterr().out
    assert '| teacher |     77,850 |      3 |    51.00 % | 1:34 |' in out
    assert '| student |     77,850 |      2 |    53.00 % | 1:03 |' in out
    image = picture(tmp_path / 'new' / 'curves.png')
    colours = {tuple(c) for c in image.reshape(-1, 3)}
    assert {(180, 119, 31), (14, 127, 255)} <= colours  # the first two of tab10, in BGR


def test_plot_says_which_runs_are_not_finished(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    lines = (run / 'log.txt').read_text().splitlines(keepends=True)
    (run / 'log.txt').write_text(''.join(lines[:-1]))
    svg = tmp_path / 'a.svg'
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        plot.main([str(run), '--save', str(svg)])
    assert '| 2 of 3 |' in capsys.readouterr().out
    assert '% (epoch 2 of 3)' in svg.read_text()


def test_plot_writes_svg_the_same_each_time(tmp_path):
    run = make_run(tmp_path / 'run')
    for name in 'a.svg', 'b.svg':
        plot.main([str(run), '--labels', 'student & <friends>', '--save', str(tmp_path / name)])
    assert xml.etree.ElementTree.parse(tmp_path / 'a.svg').getroot().tag.endswith('svg')
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()


def test_plot_reads_published_logs_and_top5(tmp_path):
    published = tmp_path / 'log.txt'
    line = 'json_stats: {"epoch": %d, "test_acc": %s, "train_acc": NaN, '
    line += '"at_losses": [NaN, NaN], "train_time": 1.0}\n'
    published.write_text(
        'loading\n' + line % (1, '81.5') + line % (2, '[70.0, 90.0]') + 'json_stats: {"epo'
    )
    run = plot.read_run(published)
    assert run['test'] == [18.5, 30.0] and np.isnan(run['train']).all()
    plot.main([str(published), '--save', str(tmp_path / 'curves.png')])
    picture(tmp_path / 'curves.png')


def test_names_of_runs_are_where_their_folders_differ():
    assert plot.names_of([Path('logs/a/seed0/log.txt'), Path('logs/b/seed0/log.txt')]) == [
        'a/seed0',
        'b/seed0',
    ]
    assert plot.names_of([Path('/x/logs/teacher/log.txt')]) == ['teacher']


def test_plot_takes_any_label_and_logs_in_one_folder(tmp_path):
    log = make_run(tmp_path / 'run') / 'log.txt'
    logs = [tmp_path / name for name in ('_hidden.txt', 'a$^$b.txt')]
    for other in logs:
        other.write_bytes(log.read_bytes())
    logs.append(log)
    names = plot.names_of(logs)
    assert names == ['_hidden', 'a$^$b', 'run']
    figure = plot.draw({name: plot.read_run(log) for name, log in zip(names, logs)})
    figure.savefig(tmp_path / 'x.svg')
    legend = [t.get_text().replace('\\', '') for t in figure.axes[0].get_legend().get_texts()]
    assert [text.split(':')[0] for text in legend] == names


def test_plot_refuses_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / 'run')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'log.txt').touch()
    (tmp_path / 'other.txt').write_text('json_stats: {"loss": 1}\n')
    save = ['--save', tmp_path / 'x.png']
    assert 'No such file' in refused(plot.main, [tmp_path / 'missing', *save], capsys)
    assert 'no whole' in refused(plot.main, [tmp_path / 'empty', *save], capsys)
    assert 'test_acc' in refused(plot.main, [tmp_path / 'other.txt', *save], capsys)
    assert '.svg' in refused(plot.main, [run, '--save', tmp_path / 'x.gif'], capsys)
    assert '--labels' in refused(plot.main, [run, '--labels', 'a', 'b', *save], capsys)
    assert 'two of the logs' in refused(plot.main, [run, run, *save], capsys)
    assert 'LOG' in refused(plot.main, [], capsys)
    assert not (tmp_path / 'x.png').exists()


def make_log(folder, errors, epochs, epoch_step=(60, 120, 160)):
    """The log of a run with these test errors, an epoch each."""
    folder.mkdir()
    record = {'epochs': epochs, 'epoch_step': list(epoch_step), 'train_acc': 90.0}
    lines = [
        logs.json_stats(record | {'epoch': e, 'test_acc': 100 - float(v)})
        for e, v in enumerate(errors, 1)
    ]
    (folder / 'log.txt').write_text('\n'.join(lines) + '\n')
    return str(folder)


def test_stretches_of_the_paper_and_their_shares_of_other_schedules():
    paper = [plot.stretch(window, 200) for window in plot.STRETCHES]
    assert [(e[0], e[-1], len(e)) for e in paper] == [
        (50, 59, 10),
        (61, 99, 39),
        (101, 139, 39),
        (141, 160, 20),
    ]
    assert [plot.stretch(w, 10) for w in plot.STRETCHES] == [[3], [4, 5], [6, 7], [8]]
    assert [plot.stretch(w, 1) for w in plot.STRETCHES] == [[]] * 4
    # No stretch before a drop of the rate reaches over it.
    for epochs in range(10, 401):
        drop = utils.scaled_steps([60], 200, epochs)[0]
        assert all(e < drop for e in plot.stretch(plot.STRETCHES[0], epochs))


def test_paper_figure_tells_and_draws_means_over_the_stretches(tmp_path, capsys):
    errors = np.random.default_rng(0).uniform(5, 30, (3, 200))
    runs = [make_log(tmp_path / f'run{i}', e, 200) for i, e in enumerate(errors)]
    save = tmp_path / 'figure.svg'
    plot.main(['--paper_figure', *runs, '--save', str(save)])
    lines = [
        [c.strip() for c in line.strip('|').split('|')]
        for line in capsys.readouterr().out.splitlines()
    ]
    expected = [
        [f'{e[a - 1 : b].mean():.2f}' for a, b in ((50, 59), (61, 99), (101, 139), (141, 160))]
        for e in errors
    ]
    assert lines[0][1:] == ['50-59', '61-99', '101-139', '141-160']
    assert lines[2] == ['student', *expected[0]]
    assert lines[3] == ['student, paper', '22.00', '12.50', '9.50', '8.70']
    assert lines[4] == ['AT', *expected[1]] and lines[6] == ['F-ActT', *expected[2]]
    first = save.read_bytes()
    plot.main(['--paper_figure', *runs, '--save', str(save)])
    assert save.read_bytes() == first

    figure = plot.draw_paper_figure({'AT': plot.read_run(Path(runs[1]) / 'log.txt')})
    drawn = [c for c in figure.axes[0].collections if hasattr(c, 'get_segments')]
    segments = [c.get_segments()[0] for c in drawn]
    assert len(segments) == 8 and len({tuple(c.get_color()[0]) for c in drawn}) == 1
    ours, theirs = segments[:4], segments[4:]
    assert [f'{s[0][1]:.2f}' for s in ours] == expected[1]
    assert [s[0][1] for s in theirs] == [18.4, 11.5, 8.7, 8.0]
    for s, t in zip(ours, theirs):
        assert s[:, 0].tolist() == t[:, 0].tolist() and s[0][1] == s[1][1]
    assert [c.get_linestyle()[0][1] is None for c in drawn] == [True] * 4 + [False] * 4
    plot.plt.close(figure)


def test_paper_figure_knows_its_curves_by_their_logs(tmp_path, capsys):
    files = []
    for name, more in ('f', {'method': 'factt', 'teacher_id': 't'}), ('s', {'teacher_id': ''}):
        make_log(tmp_path / name, np.ones(200), 200)
        records = logs.read_log(tmp_path / name / 'log.txt')
        lines = [logs.json_stats(r | {'depth': 16} | more) for r in records]
        (tmp_path / name / 'log.txt').write_text('\n'.join(lines))
        files.append(str(tmp_path / name))
    plot.main(['--paper_figure', *files, '--save', str(tmp_path / 'figure.png')])
    names = [line.split('|')[1].strip() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert names == ['F-ActT', 'F-ActT, paper', 'student', 'student, paper']


def test_paper_numbers_stand_only_beside_its_own_schedule_and_finished_stretches(tmp_path, capsys):
    def said(errors, *arguments, label='student'):
        run = make_log(tmp_path / str(len(list(tmp_path.iterdir()))), errors, *arguments)
        plot.main(
            ['--paper_figure', run, '--labels', label, '--save', str(tmp_path / 'figure.png')]
        )
        return capsys.readouterr().out.splitlines()

    def names_paper(lines):
        return any(', paper' in line for line in lines)

    errors = np.linspace(50, 10, 200)
    assert names_paper(said(errors, 200))
    assert not names_paper(said(errors, 200, label='WRN-16-1'))
    assert not names_paper(said(errors, 200, [100, 150]))
    short = said(np.linspace(50, 10, 10), 10)
    assert not names_paper(short) and [c.strip() for c in short[0].split('|')][2:4] == ['3', '4-5']
    begun = said(errors[:120], 200)
    assert [c.strip() for c in begun[2].split('|')][4:6] == ['—', '—'] and '—' not in begun[3]


def test_paper_figure_refuses_in_one_line(tmp_path, capsys):
    runs = [make_log(tmp_path / f'run{n}', np.ones(n), n) for n in (10, 20)]
    save = ['--save', tmp_path / 'x.png']
    assert 'run20' in refused(plot.main, ['--paper_figure', *runs, *save], capsys)
    assert 'at most 3' in refused(plot.main, ['--paper_figure', *runs[:1] * 4, *save], capsys)
    assert not (tmp_path / 'x.png').exists()


# ------------------------ attention.py


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nets')
    return [make_run(folder / f'net{seed}', seed) for seed in (0, 1)]


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
    net = attention.LabelledNet('net', f, {'bn.weight': 0, 'fc.weight': 0, 'fc.bias': 0}, [])
    (strip,) = attention.look(image, net, ['sum2'], False, 'cat.jpg', ['a', 'b'])
    assert strip.answer == 'a' and strip.gradient is None
    shown = attention.overlay(image, strip.maps[0]).astype(int)
    warmth = shown[..., 0] - shown[..., 2]  # red less blue
    assert shown.shape == image.shape
    assert abs(np.array(np.unravel_index(warmth.argmax(), warmth.shape)) - (26, 6)).max() <= 3
    assert warmth[8, 24] < 0
    assert (
        attention.overlay(image, np.zeros((8, 8), np.float32)).shape == image.shape
    )  # a map of zeros


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
    assert attention.shrink(np.zeros((300, 500, 3), np.uint8), 128).shape == (77, 128, 3)


def test_long_texts_in_a_picture_keep_their_ends():
    page = attention.new_page(200, 50)
    attention.put_text(page, 'a_very_long_name_of_an_image_0017.jpg', 50, 5, 100)
    (text,) = [t.get_text() for t in page.texts]
    assert text.startswith('a_very') and text.endswith('17.jpg') and text.count('…') == 1
    attention.plt.close(page)


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
    net = attention.LabelledNet('net', f, params, records)
    (strip,) = attention.look(image, net, ['sum2'], True, 'cat.jpg', [])
    maps = strip.maps
    assert [m.shape for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert strip.gradient.shape == (64, 96) and strip.answer is None
    x = torch.from_numpy(image / 255.0) - torch.tensor([0.485, 0.456, 0.406])
    x = (x / torch.tensor([0.229, 0.224, 0.225])).permute(2, 0, 1)[None].float()
    expected = utils.at(f(x, params, False)[1][0])[0].detach()
    torch.testing.assert_close(torch.from_numpy(maps[0]).flatten(), expected, rtol=1e-3, atol=1e-5)


def test_attention_on_a_folder_set(nets, tmp_path):
    root = make_folder_set(tmp_path / 'set')
    images, classes = attention.choose_images('folder', root, 3)
    assert classes == ['dark', 'light'] and [name for name, _ in images] == [
        'dark',
        'light',
        'dark',
    ]
    options = ['--dataset', 'folder', '--dataroot', str(root), '--save', str(tmp_path / 'maps.png')]
    attention.main(['--weights', str(nets[0]), *options])
    picture(tmp_path / 'maps.png')


def test_attention_of_a_run_on_photographs_shows_what_it_is_tested_on(tmp_path, capsys):
    root, run, save = make_photographs(tmp_path / 'set'), tmp_path / 'run', tmp_path / 'maps.png'
    run.mkdir()
    weights.save_params(run / 'model.hkl', resnet.resnet(18, 0.25, 2)[1])
    record = {'depth': 18, 'width': 0.25, 'imagenetpath': str(root), 'image_size': 56}
    (run / 'log.txt').write_text(logs.json_stats(record | {'classes': ['dark', 'light']}) + '\n')
    options = ['--weights', str(run), '--n', '3', '--save', str(save)]
    images, classes = attention.choose_photographs(attention.parser.parse(options)[0], record)
    assert classes == ['dark', 'light'] and [c for c, _ in images] == ['dark', 'light', 'dark']
    for (_, image), file in zip(images, ('dark/0.jpg', 'light/0.jpg', 'dark/1.jpg')):
        whole = Image.open(root / 'val' / file).convert(
            'RGB'
        )  # to 64 = 56 * 256 / 224, then the centre
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


def test_an_answer_is_right_or_wrong_only_where_the_class_is_known(nets, tmp_path):
    assert attention.verdict('cat.jpg', 'cat', []) == 'black'
    assert attention.verdict('cat', 'cat', ['cat', 'dog']) != attention.verdict(
        'cat', 'dog', ['cat', 'dog']
    )
    image = tmp_path / 'a$^$.png'
    cv2.imwrite(str(image), np.zeros((20, 20, 3), np.uint8))
    attention.main(
        [
            '--weights',
            str(nets[0]),
            '--labels',
            'n$_',
            '--images',
            str(image),
            '--save',
            str(tmp_path / 'm.png'),
        ]
    )
    picture(tmp_path / 'm.png')


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
    assert 'one of them' in refused(
        attention.main, [*weights, '--images', tmp_path, '--dataset', 'shapes', *save], capsys
    )
    assert not (tmp_path / 'x.png').exists()


# ------------------------ kill.py


def test_imagenet_killed_at_random_goes_on_to_the_same_bits(tmp_path):
    root = make_photographs(tmp_path / 'set', train=12)
    options = '--image_size 33 --batch_size 4 --checkpoint_minutes 1e-6 --nthread 1'
    words = ['--imagenetpath', root, '--kills', '1', '--epochs', '6', '--options', options]
    done = subprocess.run(
        [sys.executable, ROOT / 'scripts' / 'kill.py', *words],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *runs, total = done.stdout.splitlines()
    places = [
        (int(epoch), int(step))
        for line in runs
        for epoch, step in re.findall(r'(\d+)\+(\d+)', line.removeprefix('run '))
    ]
    assert len(places) == 1 and all(line.endswith(': the same bits') for line in runs)
    assert all(epoch <= 6 and step <= 6 for epoch, step in places)  # 24 images are 6 steps
    inside = sum(step > 0 for _, step in places)
    assert (
        total
        == f'1 kills in {len(runs)} runs of 6 epochs, {inside} resumed inside an epoch, none lost'
    )


def test_kills_that_lost_something_are_told(tmp_path):
    whole = make_run(tmp_path / 'whole')
    for name in 'killed', 'other_log', 'other_weights':
        shutil.copytree(whole, tmp_path / name)
    log = (whole / 'log.txt').read_text()
    (tmp_path / 'killed/log.txt').write_text(log.replace('"train_time": 30.0', '"train_time": 9.0'))
    kill.compare(whole, tmp_path / 'killed')
    (tmp_path / 'other_log/log.txt').write_text(
        log.replace('"train_acc": 56.0', '"train_acc": 56.1')
    )
    params = weights.load_params(whole / 'model.hkl')
    params['fc.bias'][0] += 1e-7
    weights.save_params(tmp_path / 'other_weights/model.hkl', params)
    for name in 'other_log', 'other_weights':
        with pytest.raises(UserError, match='differs') as told:
            kill.compare(whole, tmp_path / name)
        assert told.value.status == 1


def test_kill_refuses_in_one_line(tmp_path, capsys):
    nowhere = ['--imagenetpath', tmp_path / 'nowhere']
    assert 'nowhere' in refused(kill.main, nowhere, capsys)
    assert '--full_disk' in refused(kill.main, [*nowhere, '--full_disk'], capsys)
    assert '--kills' in refused(kill.main, ['--kills', '0'], capsys)


# ------------------------ quickstart.sh


def quickstart(cwd, *arguments, **environment):
    environment = {'VENV': sys.prefix, 'OMP_NUM_THREADS': '1'} | environment
    command = ['bash', str(ROOT / 'scripts' / 'quickstart.sh'), *arguments]
    return subprocess.run(
        command, check=False, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def test_quickstart_trains_tells_and_skips_what_is_done(tmp_path):
    make_folder_set(tmp_path / 'set')
    options = {'DATAROOT': 'set', 'SAVE': 'runs', 'SEED': '1', 'EPOCHS': '1'}
    done = quickstart(tmp_path, 'cifar10', **options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'runs' / 'cifar10' / 'seed1' / 'epochs1'
    for row in 'teacher WRN-16-2', 'student WRN-16-1', 'student + AT':
        assert f'| {row}' in done.stdout
    for name in 'curves.png', 'attention.png':
        picture(folder / name)
        assert f'wrote {folder / name}' in done.stdout
    assert logs.read_log(folder / 'student_at' / 'log.txt')[-1]['beta'] == 1000

    models = {f: f.stat().st_mtime_ns for f in folder.glob('*/*')}
    again = quickstart(tmp_path, 'cifar10', **options)
    assert again.returncode == 0 and again.stdout.count('finished') == 3
    assert models == {f: f.stat().st_mtime_ns for f in folder.glob('*/*')}


FAKE_PYTHON = """#!/bin/bash
# Stands for .venv/bin/python: cv2 is there only after the headless package was put in by force.
echo "$*" >> calls
case "$*" in
  *'import cv2'*) [ -f headless ] ;;
  *'uninstall'*) rm -f headless ;;
  *'--force-reinstall --no-deps opencv-python-headless'*) touch headless ;;
esac
"""


def test_setup_puts_the_headless_opencv_where_the_other_cannot_be_imported(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / 'scripts/setup.sh').write_text((ROOT / 'scripts/setup.sh').read_text())
    (tmp_path / '.venv/bin/python').write_text(FAKE_PYTHON)
    (tmp_path / '.venv/bin/python').chmod(0o755)

    def setup(requirements):
        (tmp_path / 'requirements.txt').write_text(requirements)
        (tmp_path / 'calls').write_text('')
        environment = {k: v for k, v in os.environ.items() if k not in ('VENV', 'PYTHON')}
        done = subprocess.run(
            ['bash', '-c', '. scripts/setup.sh; echo "with $VENV_PYTHON"'],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.endswith('with .venv/bin/python\n'), done.stderr
        return done.stdout, (tmp_path / 'calls').read_text()

    said, calls = setup('one')
    assert 'libGL' in said and calls.index('uninstall') < calls.index('opencv-python-headless')
    assert 'pip install' not in setup('one')[1], 'nothing has changed'
    # Later the requirements change, and pip puts opencv-python over the headless files.
    (tmp_path / 'headless').unlink()
    assert 'opencv-python-headless' in setup('two')[1]


def test_setup_says_why_it_cannot_install(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts/setup.sh').write_text((ROOT / 'scripts/setup.sh').read_text())
    (tmp_path / 'requirements.txt').touch()
    old = tmp_path / 'old-python'
    old.write_text('#!/bin/bash\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    for python, reason in (
        ('no-such-python', 'there is no no-such-python'),
        ('./old-python', '3.10'),
    ):
        environment = {k: v for k, v in os.environ.items() if k != 'VENV'} | {'PYTHON': python}
        done = subprocess.run(
            ['bash', '-c', '. scripts/setup.sh'],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count('\n') == 1


def test_quickstart_refuses_in_one_line(tmp_path):
    for wrong in quickstart(tmp_path, 'cifar11'), quickstart(tmp_path, VENV=str(tmp_path)):
        assert wrong.returncode == 2 and wrong.stderr.startswith('quickstart.sh: error: ')
        assert wrong.stderr.count('\n') == 1


def test_quickstart_explains_itself_before_anything_is_installed(tmp_path):
    for wanted in '--help', 'cifar11':  # VENV is no environment, and is not looked for
        assert 'VENV' not in quickstart(tmp_path, wanted, VENV=str(tmp_path)).stderr
    assert quickstart(tmp_path, '--help').stdout.startswith('Attention transfer from nothing')
    dry = quickstart(tmp_path, 'cifar10', DRY_RUN='1', VENV=str(tmp_path), DATAROOT='none')
    commands = [line for line in dry.stdout.splitlines() if line.startswith('python ')]
    assert dry.returncode == 0 and len(commands) == 5 and not list(tmp_path.iterdir())
    assert 'student + AT' in shlex.split(commands[-1]), 'as a shell would take it'


# ------------------------ README


def test_sizes_of_students_in_readme_are_those_of_the_nets():
    lines = (ROOT / 'README.md').read_text().splitlines()
    (i,) = [i for i, line in enumerate(lines) if line.strip().startswith('| | WRN-10-1 |')]
    names, counts, costs = (
        line.strip(' |').split(' | ') for line in lines[i : i + 4] if '--' not in line
    )
    assert len(names) == len(counts) - 1 == len(costs) - 1 == 9
    for name, count, cost in zip(names, counts[1:], costs[1:]):
        *kind, size = name.removeprefix('WRN-').replace('-', ' ').split()
        net = ('nin', None, int(size)) if kind == ['NIN'] else ('wrn', int(kind[0]), int(size))
        f, params = resnet.new_net(*net, 10)
        assert count == f'{sum(v.numel() for v in utils.trainable(params)):,}'
        assert cost == f'{devices.multiply_adds(f, params, (32, 32), "cpu") / 1e6:.1f}M'


def blocks_of_readme():
    return re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


def test_the_lines_of_readme_name_what_a_net_sees(tmp_path, monkeypatch, capsys):
    """The block of README is run as it stands, on a net whose weights are in docs/."""
    (code,) = [block for block in blocks_of_readme() if 'load_net' in block]
    (path,) = re.findall(r"load_net\('(.*)'\)", code)
    image = data.open_sets('shapes', '')[1]()[1].images[3].numpy()
    cv2.imwrite(str(tmp_path / 'horse.png'), image[:, :, ::-1])
    (tmp_path / 'docs').symlink_to(ROOT / 'docs')
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)  # noqa: S102  as a reader would paste it
    f, params, records = weights.load_net(ROOT / path)
    expected, _ = f(data.normalize(torch.from_numpy(image)[None]), params, False)
    assert torch.equal(scope['logits'], expected)
    assert capsys.readouterr().out == f'{records[0]["classes"][expected.argmax()]}\n'


def test_the_nets_in_docs_are_those_of_their_logs():
    folders = [file.parent for file in (ROOT / 'docs/logs/epochs200').glob('*/model.hkl')]
    assert len(folders) == 5
    for folder in folders:
        f, params, records = weights.load_net(folder)
        first, last = records[0], records[-1]
        assert resnet.same_shape(params, first['depth'], first['width'])
        trained = sum(v.numel() for k, v in params.items() if not utils.is_statistic(k))
        assert trained == last['n_parameters']
        assert (last['epoch'], last['epochs'], len(records)) == (200, 200, 200)
        assert first['epoch_step'] == [60, 120, 160] and first['lr'] == 0.1
        logits, _ = f(torch.zeros(1, 3, 32, 32), params, False)
        assert logits.shape == (1, 10) and logits.isfinite().all()


def test_the_loop_of_readme_trains_any_module():
    """The block of README is run as it stands, on random images."""
    (code,) = [block for block in blocks_of_readme() if 'utils.at_loss' in block]
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 64, 64), torch.arange(4))] * 3
    scope = {'loader': loader, 'TEACHER_WEIGHTS': None}
    exec(code, scope)  # noqa: S102  as a reader would paste it
    assert len(code.splitlines()) < 25 and torch.isfinite(scope['loss'])
    x = {k: scope['wanted'][k].shape for k in scope['layers']}
    assert x == {k: scope['found'][k].shape for k in scope['layers']}
    at = sum(utils.at_loss(scope['found'][k], scope['wanted'][k]).item() for k in scope['layers'])
    assert at > 0 and scope['student'].layer1[0].conv1.weight.grad is not None
