"""The tools that make folders of photographs out of published sets, on small trees in the published
formats, against PIL."""

import errno
import fcntl
import io
import os
import pty
import runpy
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from support import program

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import prepare
import prepare_cub
import prepare_imagenet
import prepare_scenes

BIRDS = ['001.Black_footed_Albatross', '002.Laysan_Albatross']


def photograph(file, seed=0, size=(80, 100), mode='RGB', **options):
    """A smooth picture of that (height, width) in a file; PNG keeps its pixels, whatever the file
    is called."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.BICUBIC).convert(mode)
    image.save(file, **({'format': 'PNG'} | options))
    return image


def make_cub(root, n=2, **boxes):
    """A tree with two classes of n photographs to train on and n to test on; boxes: {'id3': 'X Y
    WIDTH HEIGHT'}, else 5 4 60 50."""
    root.mkdir(parents=True)
    lists = {
        name: [] for name in ('images', 'bounding_boxes', 'train_test_split', 'image_class_labels')
    }
    i = 0
    for c, bird in enumerate(BIRDS, 1):
        for j in range(2 * n):
            i += 1
            path = f'{bird}/{bird[4:]}_{j:04d}_{796000 + i}.jpg'
            photograph(root / 'images' / path, seed=i)
            lists['images'].append(f'{i} {path}')
            lists['bounding_boxes'].append(f'{i} {boxes.get(f"id{i}", "5.0 4.0 60.0 50.0")}')
            lists['train_test_split'].append(f'{i} {int(j < n)}')
            lists['image_class_labels'].append(f'{i} {c}')
    lists['classes'] = [f'{c} {bird}' for c, bird in enumerate(BIRDS, 1)]
    for name, lines in lists.items():
        (root / f'{name}.txt').write_text(''.join(f'{line}\n' for line in lines))
    return root


def make_scenes(root, n=2, end='\n'):
    """A tree of two classes as published: n photographs of each to train on and n to test on, with
    spaces in some names."""
    lists = {'TrainImages.txt': [], 'TestImages.txt': []}
    for c, room in enumerate(['airport_inside', 'living room']):
        for j in range(2 * n):
            path = f'{room}/{"view " * (j % 2)}{j}_{room[0]}.jpg'
            photograph(root / 'Images' / path, seed=10 * c + j, format='JPEG')
            lists['TrainImages.txt' if j < n else 'TestImages.txt'].append(path)
    for name, lines in lists.items():
        (root / name).write_bytes(end.join(lines).encode())  # the last line without an end
    photograph(root / 'Images' / 'airport_inside' / 'in no list.jpg')
    return root


def tree(folder):
    """{path below folder: (bytes, time of writing)} of all that is there, folders too."""
    found = sorted(Path(folder).rglob('*'))
    return {
        str(f.relative_to(folder)): f.is_file() and (f.read_bytes(), f.stat().st_mtime_ns)
        for f in found
    }


def names(folder):
    return sorted(name for name, is_file in tree(folder).items() if is_file)


def run(tool, *argv):
    """The exit status."""
    return program.call_main(tool.main, [str(a) for a in argv])


def refused(capsys, where, tool, *argv, lines=1):
    """What a tool says as it refuses, in that many lines, with status 2 and with nothing written
    below `where`."""
    before = tree(where)
    capsys.readouterr()
    assert run(tool, *argv) == 2
    said = capsys.readouterr().err
    assert tree(where) == before
    assert said.count('\n') == lines and ': error: ' in said.splitlines()[-1], said
    assert 'Traceback' not in said
    return said


def edit(file, old, new):
    """Replaces what must be there once."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


# ------------------------ prepare_cub.py


def pil_crop(file, x, y, width, height):
    """The box cut out by PIL, clipped to the photograph, its shorter side scaled to 256."""
    image = Image.open(file).convert('RGB')
    left, top, right, bottom = map(round, (x, y, x + width, y + height))
    image = image.crop(
        (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    )
    short = min(image.size)
    return image.resize([int(256 * side / short) for side in image.size], Image.BILINEAR)


@pytest.mark.parametrize(
    'size, box, scaled',
    [
        ((80, 100), (5.0, 4.0, 60.0, 50.0), (256, 307)),  # enlarged
        ((700, 900), (30.0, 50.0, 411.0, 600.0), (373, 256)),  # shrunk
        ((700, 900), (20.4, 30.6, 299.2, 330.9), (282, 256)),  # fractions of pixels
        ((300, 400), (0.0, 0.0, 400.0, 300.0), (256, 341)),  # the whole
        ((300, 400), (10.0, 10.0, 256.0, 260.0), (260, 256)),  # as it is
        ((300, 400), (350.0, 200.0, 80.0, 200.0), (512, 256)),  # sticks out right and below
        ((300, 400), (-20.0, -9.0, 80.0, 300.0), (1241, 256)),  # left and above
    ],
)
def test_a_bird_is_pils_crop_and_resize(tmp_path, size, box, scaled):
    file = tmp_path / 'a.jpg'
    photograph(file, size=size)
    ours = prepare_cub.scaled(prepare_cub.cut(file, box, 'bounding_boxes.txt, line 1'))
    theirs = np.asarray(pil_crop(file, *box))
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape == (*scaled, 3)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.3


def test_birds_are_written_as_jpeg_of_quality_95_by_class_and_split(tmp_path, capsys):
    root = make_cub(tmp_path / 'CUB_200_2011', id2='20.0 10.0 90.0 300.0')
    out = tmp_path / 'new' / 'birds'
    assert run(prepare_cub, root, out) == 0
    said = capsys.readouterr()
    assert said.out == f'wrote {out}: 4 photographs in train, 4 in val\n' and said.err == ''
    assert names(out) == sorted(
        f'{split}/{bird}/{bird[4:]}_{j:04d}_{796001 + 4 * c + j}.jpg'
        for c, bird in enumerate(BIRDS)
        for j, split in enumerate(['train', 'train', 'val', 'val'])
    )
    train, val = data.scan_folder(out, '--imagenetpath')
    assert list(train) == list(val) == BIRDS
    for i, box in (1, (5, 4, 60, 50)), (2, (20, 10, 90, 300)):
        file = Path(train[BIRDS[0]][i - 1])
        wanted = pil_crop(root / 'images' / BIRDS[0] / file.name, *box)
        stream = io.BytesIO()
        wanted.save(stream, 'JPEG', quality=95)
        written = Image.open(file)
        assert written.format == 'JPEG' and written.size == wanted.size
        assert written.quantization == Image.open(stream).quantization
        difference = np.abs(np.asarray(written).astype(int) - np.asarray(Image.open(stream)))
        assert difference.mean() < 0.8 and difference.max() <= 8


def test_grey_and_turned_birds_are_as_they_are_seen(tmp_path):
    grey, turned = tmp_path / 'grey.jpg', tmp_path / 'turned.jpg'
    photograph(grey, mode='L')
    image = prepare_cub.cut(grey, (0, 0, 100, 80), '')
    assert image.shape == (80, 100, 3) and (image == image[..., :1]).all() and image.std() > 5
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright = np.asarray(
        photograph(turned, exif=exif, format='JPEG', quality=100).rotate(-90, expand=True)
    )
    seen = prepare_cub.cut(turned, (0, 0, 80, 40), '')
    assert seen.shape == (40, 80, 3)
    assert np.abs(seen.astype(int) - upright[:40]).mean() < 3


def test_lists_of_birds_may_be_in_any_order_and_end_in_crlf(tmp_path):
    root = make_cub(tmp_path / 'cub', id3='5.0 5.0 40.0 30.0')
    assert run(prepare_cub, root, tmp_path / 'a') == 0
    for name, end in ('images', '\r\n'), ('bounding_boxes', '\n'), ('train_test_split', '\r\n\n'):
        file = root / f'{name}.txt'
        text = end.join(reversed(file.read_text().split('\n')))
        file.write_bytes(text.encode('utf-8-sig'))  # as editors on Windows save it
    assert run(prepare_cub, root, tmp_path / 'b') == 0
    a, b = ({name: f and f[0] for name, f in tree(tmp_path / x).items()} for x in 'ab')
    assert a == b


CUB_MISTAKES = [
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 4.0 60.0', 'bounding_boxes.txt, line 3'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 4.0 60.0 fifty', 'bounding_boxes.txt, line 3'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 nan 60.0 50.0', 'bounding_boxes.txt, line 3'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 4.0 inf 50.0', 'bounding_boxes.txt, line 3'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 4.0 60.0 0.0', 'with an area'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 65.0 54.0 -60.0 -50.0', 'with an area'),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 100.0 4.0 60.0 50.0', 'line 3: the box has 0x50 '),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 -90.0 4.0 60.0 50.0', 'line 3: the box has 0x50 '),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 5.0 4.0 60.0 0.3', 'line 3: the box has 60x0 '),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0', '3 100.0 80.0 6.0 5.0', 'line 3: the box has 0x0 '),
    ('bounding_boxes', '3 5.0 4.0 60.0 50.0\n', '', 'bounding_boxes.txt: lacks id 3, '),
    ('bounding_boxes', '3 5.0', '4 5.0', 'line 4: id 4 appears twice'),
    ('train_test_split', '3 0\n', '', 'train_test_split.txt: lacks id 3, '),
    ('train_test_split', '3 0\n', '3 2\n', "train_test_split.txt, line 3: '3 2'"),
    ('train_test_split', '3 0\n', '3\n', "train_test_split.txt, line 3: '3'"),
    ('train_test_split', '3 0\n', '3 0\n99 0\n', 'images.txt: lacks id 99, '),
    ('images', '3 001', 'three 001', 'images.txt, line 3'),
    ('images', '3 001', '3 ../images/001', 'images.txt, line 3'),
    ('images', '3 001', '3 /001', 'images.txt, line 3'),
    ('images', '3 001.Black_footed_Albatross/', '3 ../', 'images.txt, line 3'),
    ('images', f'3 {BIRDS[0]}/', f'3 {BIRDS[0]}/../{BIRDS[0]}/', 'images.txt, line 3'),
    ('images', '3 001.Black_footed_Albatross/', '3 ', 'images.txt, line 3'),
    ('images', '3 001', '3 003', 'a CLASS of classes.txt'),
    ('images', '0002_796003', '0002_796999', 'images.txt, line 3: there is no photograph '),
    ('images', '0002_796003', '0002_' + 'x' * 300, 'images.txt, line 3: there is no photograph '),
    ('images', '0002_796003', '0001_796002', 'has a second id'),
    ('classes', '2 002.Laysan_Albatross', '2', 'classes.txt, line 2'),
    ('classes', '2 002.Laysan_Albatross\n', '', 'images.txt, line 5'),
]


@pytest.mark.parametrize('name, old, new, reason', CUB_MISTAKES)
def test_a_wrong_line_of_cub_is_named(tmp_path, capsys, name, old, new, reason):
    root = make_cub(tmp_path / 'cub')
    edit(root / f'{name}.txt', old, new)
    said = refused(capsys, tmp_path, prepare_cub, root, tmp_path / 'out')
    assert reason in said and 'unpack CUB_200_2011.tgz again' in said


def test_cub_is_refused_in_one_line(tmp_path, capsys):
    root, out = make_cub(tmp_path / 'cub'), tmp_path / 'out'

    def said(*argv):
        return refused(capsys, tmp_path, prepare_cub, *argv)

    assert 'classes.txt: cannot be read: No such file' in said(tmp_path / 'none', out)
    assert 'classes.txt' in said(tmp_path, out)  # the folder above
    assert 'OUT_DIR' in said(root)
    assert 'whole number' in said(root, out, '--nthread', '-1')
    assert 'is not empty' in said(root, root)
    assert 'is not part of this set' in said(root, root, '--resume')
    assert 'is not a folder' in said(root, root / 'images.txt')
    (sliver,) = root.glob('images/*/*796008.jpg')
    photograph(sliver, size=(300, 20))
    edit(root / 'bounding_boxes.txt', '8 5.0 4.0 60.0 50.0', '8 5.0 0.0 1.0 300.0')
    assert 'line 8: the box has 1x300 pixels' in said(root, out)
    split = (root / 'train_test_split.txt').read_text()
    (root / 'train_test_split.txt').write_text(split.replace(' 0', ' 1'))
    assert 'has only training images' in said(root, out)
    (root / 'train_test_split.txt').write_text(split)
    for name in 'images', 'bounding_boxes', 'train_test_split':
        lines = (root / f'{name}.txt').read_text().splitlines(True)
        (root / f'{name}.txt').write_text(''.join(lines[:4]))
    assert 'at least 2' in said(root, out)


@pytest.mark.parametrize('content', [b'no image', b''])
def test_a_broken_bird_is_named_before_anything_is_written(tmp_path, capsys, content):
    root = make_cub(tmp_path / 'cub')
    (last,) = root.glob('images/*/*796008.jpg')
    last.write_bytes(content)
    said = refused(capsys, tmp_path, prepare_cub, root, tmp_path / 'out')
    assert f'{last}: broken, or not an image' in said


# ------------------------ prepare_scenes.py


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r\n\r\n'])
def test_scenes_are_copied_byte_by_byte_by_class_and_split(tmp_path, capsys, end):
    root, out = make_scenes(tmp_path / 'mit', end=end), tmp_path / 'rooms'
    photograph(root / 'Images' / 'living room' / '0_l.jpg', mode='L', format='JPEG')
    assert run(prepare_scenes, root, out) == 0
    said = capsys.readouterr()
    assert said.out == f'wrote {out}: 4 photographs in train, 4 in val\n' and said.err == ''
    files = [('train', '0'), ('train', 'view 1'), ('val', '2'), ('val', 'view 3')]
    assert names(out) == sorted(
        f'{split}/{room}/{file}_{room[0]}.jpg'
        for room in ('airport_inside', 'living room')
        for split, file in files
    )
    for name in names(out):
        assert (out / name).read_bytes() == (root / 'Images' / name.split('/', 1)[1]).read_bytes()
    train, val = data.scan_folder(out, '--imagenetpath')
    assert list(train) == list(val) == ['airport_inside', 'living room']


def test_names_of_scenes_keep_their_bytes(tmp_path):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'rooms'
    name = b'caf\xe9 .jpg'  # Latin-1, with a space before the dot
    photograph(root / 'Images' / 'living room' / os.fsdecode(name))
    with open(root / 'TestImages.txt', 'ab') as file:
        file.write(b'\r\nliving room/' + name + b'\r\n')
    assert run(prepare_scenes, root, out) == 0
    assert name in os.listdir(os.fsencode(out / 'val' / 'living room'))


def test_broken_scenes_are_all_named_or_left_out(tmp_path, capsys):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'rooms'
    bad = [root / 'Images' / f for f in ('airport_inside/0_a.jpg', 'living room/view 3_l.jpg')]
    bad[0].write_bytes(b'GIF89a and no more')
    bad[1].write_bytes(bad[1].read_bytes()[:-99])
    said = refused(capsys, tmp_path, prepare_scenes, root, out, lines=3)
    for file, line in zip(bad, said.splitlines()):
        assert line.startswith(f'{file}: broken')
    assert '2 photographs are broken' in said and '--skip_broken' in said
    assert run(prepare_scenes, root, out, '--skip_broken') == 0
    said = capsys.readouterr()
    assert '3 photographs in train, 3 in val; 2 broken ones left out' in said.out
    assert all(f'{file}: broken' in said.err for file in bad)
    assert len(names(out)) == 6 and not {f'train/{bad[0]}', f'val/{bad[1]}'} & set(names(out))
    data.scan_folder(out, '--imagenetpath')
    for file in root.glob('Images/airport_inside/*'):
        file.write_bytes(b'no image')
    (root / 'Images' / 'living room' / 'view 3_l.jpg').write_bytes(b'no image')
    said = refused(capsys, tmp_path, prepare_scenes, root, tmp_path / 'b', '--skip_broken', lines=6)
    assert 'without the broken photographs: has 1 classes' in said


SCENE_MISTAKES = [
    ('TestImages.txt', 'living room/2_l.jpg', '2_l.jpg', "line 3: '2_l.jpg' is not CLASS/FILE"),
    ('TestImages.txt', 'living room/2_l.jpg', '../Images/2_l.jpg', 'line 3'),
    ('TestImages.txt', 'living room/2_l.jpg', '../TestImages.txt', 'line 3'),
    ('TestImages.txt', 'living room/2_l.jpg', 'living room/..', 'line 3'),
    ('TestImages.txt', 'living room/2_l.jpg', '/living room/2_l.jpg', 'line 3'),
    ('TestImages.txt', 'living room/2_l.jpg', 'living room/2_l.jpg\0', 'line 3'),
    ('TestImages.txt', 'living room/2_l.jpg', 'living room/9_l.jpg', 'there is no photograph'),
    ('TestImages.txt', 'living room/2_l.jpg', 'living room/0_l.jpg', 'TrainImages.txt too'),
    ('TrainImages.txt', 'living room/0_l.jpg', 'living room', 'TrainImages.txt, line 3'),
]


@pytest.mark.parametrize('name, old, new, reason', SCENE_MISTAKES)
def test_a_wrong_line_of_scenes_is_named(tmp_path, capsys, name, old, new, reason):
    root = make_scenes(tmp_path / 'mit')
    edit(root / name, old, new)
    said = refused(capsys, tmp_path, prepare_scenes, root, tmp_path / 'out', '--skip_broken')
    assert name in said and reason in said


def test_scenes_are_refused_in_one_line(tmp_path, capsys):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'out'

    def said(*argv):
        return refused(capsys, tmp_path, prepare_scenes, *argv)

    assert 'TrainImages.txt: cannot be read: No such file' in said(tmp_path / 'none', out)
    assert 'OUT_DIR' in said(root)
    assert 'is not empty' in said(root, root)
    assert 'is not part of this set' in said(root, root, '--resume')
    assert 'is not a folder' in said(root, root / 'TestImages.txt')
    test = (root / 'TestImages.txt').read_text()
    (root / 'TestImages.txt').write_text('airport_inside/2_a.jpg\n')
    (root / 'Images' / 'airport_inside' / '2_a.jpg').write_bytes(b'broken, but not decoded yet')
    assert 'class living room has only training images' in said(root, out)
    (root / 'TestImages.txt').write_text(test)
    (root / 'TestImages.txt').rename(root / 'Test.txt')
    assert 'TestImages.txt: cannot be read' in said(root, out)


def test_a_scene_named_twice_in_one_list_is_copied_once(tmp_path):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'out'
    edit(root / 'TestImages.txt', 'living room/2_l.jpg', 'living room/2_l.jpg\nliving room/2_l.jpg')
    assert run(prepare_scenes, root, out) == 0
    assert len(names(out)) == 8


# ------------------------ interruptions


@pytest.mark.parametrize('tool, make', [(prepare_cub, make_cub), (prepare_scenes, make_scenes)])
def test_a_stopped_run_continues_where_it_was(tmp_path, capsys, monkeypatch, tool, make):
    root, out, whole = make(tmp_path / 'set', n=5), tmp_path / 'out', tmp_path / 'whole'
    assert run(tool, root, whole) == 0
    write, count = prepare.write_atomically, []

    def stop_in_the_fourth(path, how):
        count.append(path)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # the main thread cancels what is left
        write(path, how)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'write_atomically', stop_in_the_fourth)
        assert run(tool, root, out, '--nthread', 1) == 143
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'SIGTERM: the same command with --resume continues' in said
    before = tree(out)
    assert 3 <= len(names(out)) < 10
    for name in names(out):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert 'is not empty' in refused(capsys, tmp_path, tool, root, out)

    half = out / f'{names(whole)[-1]}'  # what kill -9 leaves
    half.parent.mkdir(parents=True, exist_ok=True)
    half.unlink(missing_ok=True)
    half.with_name(f'.{half.name}.part').write_bytes(b'half')
    assert run(tool, root, out, '--resume') == 0
    after = tree(out)
    assert {n: f and f[0] for n, f in after.items()} == {
        n: f and f[0] for n, f in tree(whole).items()
    }
    kept = [n for n in before if before[n] and n != str(half.relative_to(out))]
    assert len(kept) >= 2 and all(after[n] == before[n] for n in kept)

    assert run(tool, root, out, '--resume') == 0  # a finished one
    assert tree(out) == after


def test_resume_starts_where_there_is_nothing_and_refuses_what_is_not_of_the_set(tmp_path, capsys):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'out'
    assert run(prepare_scenes, root, out, '--resume') == 0
    (out / 'train' / 'airport_inside' / 'other.jpg').write_bytes(b'')
    said = refused(capsys, tmp_path, prepare_scenes, root, out, '--resume')
    assert 'holds train/airport_inside/other.jpg' in said


def test_a_full_disk_ends_in_one_line(tmp_path, capsys, monkeypatch):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'out'

    def full(path, raw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    assert run(prepare_scenes, root, out) == 1
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'No space left' in said
    assert names(out) == []


@pytest.mark.parametrize('tool, make', [(prepare_cub, make_cub), (prepare_scenes, make_scenes)])
def test_a_tool_runs_as_a_command_with_a_bar_only_on_a_terminal(
    tmp_path, monkeypatch, capfd, tool, make
):
    root, out = make(tmp_path / 'set'), tmp_path / 'out'

    def command(*argv):
        monkeypatch.setattr(sys, 'argv', [tool.__file__, *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(tool.__file__, run_name='__main__')
        return ended.value.code

    assert command(root, out) == 0
    said = capfd.readouterr()
    assert said.out.startswith('wrote ') and said.out.count('\n') == 1 and said.err == ''
    assert command(root, out) == 2
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    os.set_blocking(ours, False)
    stderr = os.dup(2)
    os.dup2(terminal, 2)
    try:
        assert command(root, tmp_path / 'again') == 0
    finally:
        os.dup2(stderr, 2)
    shown = os.read(ours, 1 << 16).decode()
    for fd in ours, terminal, stderr:
        os.close(fd)
    assert 'checking' in shown and 'writing' in shown and '/8 [' in shown


# ------------------------ prepare_imagenet.py

WNIDS = ['n01751748', 'n01440764', 'n09193705']


def make_flat(root, n=9):
    """(flat folder, Kaggle's list, {file name: (class, bytes)}) as ILSVRC2012's are published."""
    flat, lines, photographs = root / 'val', ['ImageId,PredictionString'], {}
    flat.mkdir(parents=True)
    for i in range(1, n + 1):
        name, wnid = f'ILSVRC2012_val_{i:08d}', WNIDS[i % 3]
        photographs[f'{name}.JPEG'] = wnid, os.urandom(20)
        (flat / f'{name}.JPEG').write_bytes(photographs[f'{name}.JPEG'][1])
        boxes = f'{wnid} 111 108 230 213 ' * (1 + i % 2)
        lines.append(f'{name},{boxes}')
    (root / 'LOC_val_solution.csv').write_text('\n'.join(lines) + '\n')
    return flat, root / 'LOC_val_solution.csv', photographs


def in_classes(photographs):
    return {f'{wnid}/{name}': raw for name, (wnid, raw) in photographs.items()}


def contents(folder):
    """{path below folder: bytes} of all files, also through links."""
    files = (f for f in Path(folder).rglob('*') if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


FORMS = 'kaggle', 'pairs', 'pairs without suffix', 'crlf', 'boxes'


@pytest.mark.parametrize('form', FORMS)
def test_a_flat_folder_is_sorted_into_its_classes(form, tmp_path, capsys):
    flat, labels, photographs = make_flat(tmp_path / 'set')
    if form == 'crlf':
        labels.write_bytes(b'\xef\xbb\xbf' + labels.read_bytes().replace(b'\n', b'\r\n'))
    elif form != 'kaggle':
        cut = -5 if 'without' in form else None
        line = '{} {}\n' if 'pairs' in form else '{}\t{}\t0\t32\t44\t62\n'  # of TinyImageNet
        labels.write_text(
            ''.join(line.format(k[:cut], wnid) for k, (wnid, _) in photographs.items())
        )
    (flat / '.DS_Store').write_bytes(b'x')
    (flat / 'readme.txt').write_bytes(b'y')
    others = {'.DS_Store': b'x', 'readme.txt': b'y'}
    assert run(prepare_imagenet, flat, labels) == 0
    assert contents(flat) == in_classes(photographs) | others
    assert '9 photographs sorted' in capsys.readouterr().out
    before = tree(flat)
    assert run(prepare_imagenet, flat, labels) == 0
    assert tree(flat) == before and '9 were there already' in capsys.readouterr().out


def test_links_leave_the_flat_folder_as_it_is(tmp_path, capsys, monkeypatch):
    flat, labels, photographs = make_flat(tmp_path / 'set')
    before, out = tree(flat), tmp_path / 'out'
    monkeypatch.chdir(tmp_path)
    for already in '', '9 were there already':
        assert run(prepare_imagenet, 'set/val', labels, '--links', 'out') == 0
        assert contents(out) == in_classes(photographs) and tree(flat) == before
        assert already in capsys.readouterr().out
    victim = out / next(iter(in_classes(photographs)))
    victim.unlink(), victim.write_bytes(b'mine')
    said = refused(capsys, tmp_path, prepare_imagenet, flat, labels, '--links', out)
    assert f'{victim}: already exists' in said and victim.read_bytes() == b'mine'


@pytest.mark.parametrize('call', ['link', 'unlink'])
@pytest.mark.parametrize('after', [0, 4])
@pytest.mark.parametrize('links', [False, True])
def test_an_interrupted_move_loses_nothing_and_continues(call, after, links, tmp_path, monkeypatch):
    """A crash before each system call; photographs may be links themselves."""
    flat, labels, photographs = make_flat(tmp_path / 'set')
    if links:
        (tmp_path / 'set/store').mkdir()
        for name in photographs:
            (flat / name).rename(tmp_path / 'set/store' / name)
            (flat / name).symlink_to(f'../store/{name}')
    calls, function = [], 'symlink' if links and call == 'link' else call
    real = getattr(os, function)

    def crash(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, crash)
        with pytest.raises(KeyboardInterrupt):
            run(prepare_imagenet, flat, labels)
    there = {Path(name).name: raw for name, raw in contents(flat).items()}
    assert there == {name: raw for name, (_, raw) in photographs.items()}
    assert run(prepare_imagenet, flat, labels) == 0
    assert contents(flat) == in_classes(photographs)
    assert run(prepare_imagenet, flat, labels) == 0


def test_a_disk_without_hard_links_is_sorted_too(tmp_path, monkeypatch):
    flat, labels, photographs = make_flat(tmp_path / 'set')

    def link(*_, **__):
        raise PermissionError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', link)
    assert run(prepare_imagenet, flat, labels) == 0
    assert contents(flat) == in_classes(photographs)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    flat, labels, photographs = make_flat(tmp_path / 'set')

    def link(source, target, **__):
        raise OSError(errno.ENOSPC, 'No space left on device', source, None, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'link', link)
        assert run(prepare_imagenet, flat, labels) == 1
    assert 'No space left on device' in capsys.readouterr().err
    assert contents(flat) == {name: raw for name, (_, raw) in photographs.items()}
    assert run(prepare_imagenet, flat, labels) == 0


@pytest.mark.parametrize('kind', ['file', 'link to the photograph', 'folder'])
def test_what_has_the_new_name_already_is_not_overwritten(kind, tmp_path, capsys):
    flat, labels, photographs = make_flat(tmp_path / 'set')
    name, (wnid, raw) = list(photographs.items())[5]
    target = flat / wnid / name
    target.parent.mkdir()
    if kind == 'file':
        target.write_bytes(b'mine')
    elif kind == 'folder':
        target.mkdir()
    else:
        target.symlink_to(f'../{name}')  # moving would leave it leading to itself
    said = refused(capsys, tmp_path, prepare_imagenet, flat, labels)
    assert f'{target}: already exists' in said
    assert (flat / name).read_bytes() == raw


def test_lists_that_do_not_fit_are_refused_before_anything_is_moved(tmp_path, capsys):
    flat, labels, _ = make_flat(tmp_path / 'set')
    lines = labels.read_text().splitlines()

    def said(*lines):
        labels.write_text(''.join(f'{line}\n' for line in lines))
        return refused(capsys, flat, prepare_imagenet, flat, labels)

    assert '1 of 9 photographs are not in LABELS: ILSVRC2012_val_00000009.JPEG' in said(*lines[:-1])
    assert '1 of the 10 photographs in LABELS are missing: more' in said(
        *lines, 'more,n01440764 1 2 3 4'
    )
    assert 'line 11: ILSVRC2012_val_00000001 has another class' in said(
        *lines, 'ILSVRC2012_val_00000001,n09193705 1 2 3 4'
    )
    for bad in 'words', 'a,', ',n01440764', 'a,../b 1 2', 'a,/etc 1', 'a/../b,n01440764':
        assert 'line 11: ' in said(*lines, bad), bad
    assert 'has no lines' in said()
    assert 'LOC_val_solution.csv' in refused(
        capsys, flat, prepare_imagenet, flat, tmp_path / 'missing.csv'
    )
    said = refused(capsys, tmp_path, prepare_imagenet, tmp_path / 'none', labels)
    assert 'has no lines' in said


def test_sorted_photographs_are_what_imagenet_reads(tmp_path, capsys):
    flat, labels, photographs = make_flat(tmp_path / 'set')
    for name in photographs:
        photograph(flat / name, format='JPEG')
        wnid = photographs[name][0]
        photograph(tmp_path / 'set/train' / wnid / name, format='JPEG')
    with pytest.raises(program.UserError, match='prepare_imagenet'):
        data.scan_folder(tmp_path / 'set', '--imagenetpath', ('val', 'test'))
    assert run(prepare_imagenet, flat, labels) == 0
    train, val = data.scan_folder(tmp_path / 'set', '--imagenetpath', ('val', 'test'))
    assert list(train) == list(val) == sorted(WNIDS) and sum(map(len, val.values())) == 9


def test_scenes_with_control_characters_are_printed_on_one_line(tmp_path, capsys):
    root, out = make_scenes(tmp_path / 'mit'), tmp_path / 'out\x1b[2J'
    name = 'airport_inside/\x1b[2J caf\udce9.jpg'
    (root / 'Images' / name).write_bytes(b'no image')
    with open(root / 'TestImages.txt', 'ab') as file:
        file.write(b'\n' + os.fsencode(name) + b'\n')
    assert run(prepare_scenes, root, out, '--skip_broken') == 0
    said = capsys.readouterr()
    assert '\x1b' not in said.out + said.err and '\\x1b[2J caf\\xe9.jpg: broken' in said.err
