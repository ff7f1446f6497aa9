"""images.py against torchvision's ImageFolder, on trees of many shapes."""

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import data
import images
from support.program import UserError


@pytest.fixture(autouse=True)
def no_hanging():
    """A loop that does not end fails the test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def write(root, *names, kind='PNG'):
    """Small images of these names below a folder."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(root / name, kind)
    return root


def make_set(root, classes=('cat', 'dog'), splits=('train', 'test')):
    return write(root, *(f'{s}/{c}/{i}.png' for s in splits for c in classes for i in range(3)))


def scan(root, **options):
    """(train, test, printed lines)."""
    lines = []
    train, test = data.scan_folder(root, say=lines.append, **options)
    return train, test, lines


def theirs(folder):
    """{class: [files]} of torchvision."""
    found = ImageFolder(folder)
    return {
        name: [file for file, c in found.samples if c == i] for i, name in enumerate(found.classes)
    }


def test_images_in_nested_folders_are_those_of_torchvision(tmp_path):
    make_set(tmp_path)
    cat = tmp_path / 'train/cat'
    write(cat, 'images/b.png', 'images/a.png', 'images/deep/er/c.png', 'images-2/a.png', 'a/z.png')
    write(cat, '9.png', 'images.2/a.png', 'Images/a.png', 'image/a.png')
    write(tmp_path / 'train/dog', 'x/y/z/1.png')
    train, test, lines = scan(tmp_path)
    assert train == theirs(tmp_path / 'train') and test == theirs(tmp_path / 'test')
    assert len(train['cat']) == 12 and lines == []


def test_a_class_may_have_its_images_in_a_folder_alone(tmp_path):
    names = [f'{s}/{c}/images/{i}.png' for s in ('train', 'val') for c in 'ab' for i in range(2)]
    write(tmp_path, *names)
    train, test, _ = scan(tmp_path)
    assert train == theirs(tmp_path / 'train') and test == theirs(tmp_path / 'val')


def test_the_order_of_flat_folders_is_by_name(tmp_path):
    make_set(tmp_path)
    names = ['10.png', '9.png', 'B.png', 'a.png', 'ä.png', '-.png', ' .png', '中.png']
    write(tmp_path / 'train/cat', *names)
    train, _, _ = scan(tmp_path)
    files = sorted([*names, '0.png', '1.png', '2.png'])
    assert train['cat'] == [str(tmp_path / 'train/cat' / name) for name in files]


def test_links_are_followed_and_loops_end(tmp_path):
    make_set(tmp_path / 'set')
    cat = tmp_path / 'set/train/cat'
    write(tmp_path / 'elsewhere', 'a.png', 'deep/b.png')
    (cat / 'more').symlink_to(tmp_path / 'elsewhere')
    assert scan(tmp_path / 'set')[0] == theirs(tmp_path / 'set/train')
    before = scan(tmp_path / 'set')[0]['cat']
    (cat / 'twice').symlink_to(tmp_path / 'elsewhere')
    (cat / 'self').symlink_to('.')
    (cat / 'up').symlink_to('..')
    (cat / 'top').symlink_to(tmp_path)
    (tmp_path / 'elsewhere/deep/back').symlink_to(cat)
    (tmp_path / 'elsewhere/deep/around').symlink_to('..')
    train, _, _ = scan(tmp_path / 'set')
    assert train['cat'] == before and len(before) == 5 and len(train['dog']) == 3


def test_a_class_folder_may_be_a_link(tmp_path):
    make_set(tmp_path / 'set')
    write(tmp_path / 'cows', '1.png')
    for split in 'train', 'test':
        (tmp_path / 'set' / split / 'cow').symlink_to(tmp_path / 'cows')
    train, test, _ = scan(tmp_path / 'set')
    assert train == theirs(tmp_path / 'set/train') and list(test) == ['cat', 'cow', 'dog']


OTHERS = {
    'cat/.DS_Store': b'\0',
    'cat/._0.png': b'\0\5\x16\7',
    'cat/Thumbs.db': b'\xd0\xcf\x11\xe0',
    'cat/boxes.txt': b'0.png\t0\t0\t8\t8\n',
    'cat/labels.csv': b'file,label\n',
    'cat/desktop.ini': b'[x]\r\n',
    'cat/noname': b'words',
    'dog/readme.md': b'# Dogs',
    'dog/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg': b'\xff\xd8\xff',
    'dog/.thumbs/0.png': b'\x89PNG',
    'dog/__MACOSX/0.png': b'\x89PNG',
    '.cache/0.png': b'\x89PNG',
    '@eaDir/0.png': b'\x89PNG',
    '__MACOSX/cat/0.png': b'\x89PNG',
    'README': b'not a class',
}


def write_others(folder):
    for name, raw in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def test_other_files_are_left_out_and_counted_in_one_line(tmp_path):
    make_set(tmp_path)
    clean = scan(tmp_path)[:2]
    for split in 'train', 'test':
        write_others(tmp_path / split)
    train, test, lines = scan(tmp_path)
    assert (train, test) == clean
    assert len(lines) == 1 and f'{2 * len(OTHERS)} left out' in lines[0], lines
    assert 'train/' in lines[0] and len(lines[0]) < 300


def test_the_line_is_printed(tmp_path, capsys):
    make_set(tmp_path)
    data.scan_folder(tmp_path)
    assert capsys.readouterr().out == ''
    (tmp_path / 'train/cat/a\n\x1b[2J.txt').write_text('')
    data.scan_folder(tmp_path)
    line = capsys.readouterr().out
    assert line == f'--dataroot {tmp_path}: 1 left out, not images: train/cat/a\\n\\x1b[2J.txt\n'


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'])
@pytest.mark.parametrize('name', ['a', 'a.0001', 'a.JPEG~', 'a.', 'a.txt'])
def test_a_file_of_another_suffix_is_an_image_by_its_first_bytes(kind, name, tmp_path):
    make_set(tmp_path)
    write(tmp_path / 'train/dog', name, kind=kind)
    train, _, lines = scan(tmp_path)
    assert str(tmp_path / 'train/dog' / name) in train['dog'] and not lines


def test_files_of_known_suffixes_are_not_opened(tmp_path, monkeypatch):
    make_set(tmp_path)
    for i, suffix in enumerate(['JPG', 'jpeg', 'Png', 'bmp', 'TIF', 'webp', 'ppm']):
        (tmp_path / f'train/cat/{i}.{suffix}').write_bytes(b'')
    monkeypatch.setattr(images, 'begins_as_image', lambda file: pytest.fail(file))
    assert len(scan(tmp_path)[0]['cat']) == 10


def test_pipes_and_devices_are_left_out_and_links_to_nowhere_are_broken_images(tmp_path):
    make_set(tmp_path)
    cat = tmp_path / 'train/cat'
    os.mkfifo(cat / 'pipe.png')
    (cat / 'pipe').symlink_to('pipe.png')
    (cat / 'zero.jpg').symlink_to('/dev/zero')
    (cat / 'dangling.png').symlink_to('nowhere')
    (cat / 'loop.png').symlink_to('loop.png')
    (cat / 'nowhere.txt').symlink_to('nowhere')
    train, _, lines = scan(tmp_path)
    names = [Path(file).name for file in train['cat']]
    assert names == ['0.png', '1.png', '2.png', 'dangling.png', 'loop.png']
    assert len(lines) == 1 and ': 4 left out' in lines[0]
    for name in names[3:]:
        with pytest.raises(data.BrokenImage, match=name):
            data.decode(cat / name)


def test_a_class_of_other_files_alone_is_named(tmp_path):
    make_set(tmp_path)
    for split in 'train', 'test':
        (tmp_path / split / 'cow').mkdir()
        (tmp_path / split / 'cow/cow.txt').write_text('moo')
    with pytest.raises(UserError, match='train/cow: holds no images'):
        scan(tmp_path)


@pytest.mark.parametrize('code, status', [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_a_folder_that_cannot_be_read_is_named(code, status, tmp_path, monkeypatch):
    make_set(tmp_path)
    scandir = os.scandir

    def fail(path):
        if str(path).endswith('train/dog'):
            raise OSError(code, os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', fail)
    with pytest.raises(UserError, match=f'train/dog: {os.strerror(code)}') as e:
        scan(tmp_path)
    assert e.value.status == status


# ------------------------ test or val


def unlabelled(root, name):
    """A flat folder of images without classes, as in Kaggle's sets."""
    return write(root, *(f'{name}/{i}.png' for i in range(7)))


@pytest.mark.parametrize('tests', [('test', 'val'), ('val', 'test')])
def test_the_first_folder_with_the_classes_of_train_is_taken(tests, tmp_path):
    first, second = tests
    make_set(tmp_path, splits=('train', second))
    unlabelled(tmp_path, first)
    _, test, lines = scan(tmp_path, tests=tests)
    assert test == theirs(tmp_path / second)
    assert len(lines) == 1 and f'testing on {second}/' in lines[0] and f'{first}: holds' in lines[0]
    for file in (tmp_path / first).iterdir():
        file.unlink()
    make_set(tmp_path, splits=(first,))
    _, test, lines = scan(tmp_path, tests=tests)
    assert test == theirs(tmp_path / first) and lines == []


@pytest.mark.parametrize('classes', [('cat', 'cow'), ('cat',), ('cat', 'dog', 'cow')])
def test_a_folder_of_other_classes_is_not_taken(classes, tmp_path):
    make_set(tmp_path, splits=('train', 'val'))
    make_set(tmp_path, classes, splits=('test',))
    _, test, lines = scan(tmp_path)
    assert test == theirs(tmp_path / 'val') and 'testing on val/' in lines[0]


def test_if_none_fits_the_first_is_explained(tmp_path):
    make_set(tmp_path, splits=('train',))
    make_set(tmp_path, ('cat', 'cow'), splits=('val',))
    unlabelled(tmp_path, 'test')
    with pytest.raises(UserError, match=r'test: holds images outside of class folders \(7\)'):
        scan(tmp_path)
    with pytest.raises(
        UserError, match="different classes: 'dog' only in train; 'cow' only in val"
    ):
        scan(tmp_path, tests=('val', 'test'))


def test_imagenets_flat_folder_leads_to_the_tool_that_sorts_it(tmp_path):
    make_set(tmp_path, splits=('train',))
    write(tmp_path, *(f'val/ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 6)), kind='JPEG')
    with pytest.raises(UserError, match='val: holds images .* scripts/prepare_imagenet.py'):
        scan(tmp_path, option='--imagenetpath', tests=('val', 'test'))


def test_classes_whose_names_look_equal_are_told_apart(tmp_path):
    """macOS may write an accent as a letter of its own."""
    make_set(tmp_path, ('caf\u00e9', 'dog'), splits=('train',))
    make_set(tmp_path, ('cafe\u0301', 'dog', 'x'), splits=('test',))
    with pytest.raises(
        UserError, match=r"'caf\\xe9' only in train; 'cafe\\u0301', 'x' only in test"
    ):
        scan(tmp_path)


def test_tiny_imagenets_flat_folder_leads_to_the_tool_that_sorts_it(tmp_path):
    make_set(tmp_path, splits=('train',))
    write(tmp_path, *(f'val/images/val_{i}.JPEG' for i in range(5)), kind='JPEG')
    with pytest.raises(UserError, match='only 1 class folder.* scripts/prepare_imagenet.py'):
        scan(tmp_path, tests=('val', 'test'))


def test_a_run_folder_among_the_classes_is_not_to_be_removed(tmp_path):
    make_set(tmp_path)
    (tmp_path / 'train/run').mkdir()
    (tmp_path / 'train/run/log.txt').write_text('')
    with pytest.raises(UserError, match='train/run: holds no images; move this run folder'):
        scan(tmp_path)


def test_the_cifar_files_in_the_folder_are_pointed_out(tmp_path):
    (tmp_path / 'cifar-10-batches-py').mkdir()
    with pytest.raises(UserError, match='give --dataset CIFAR10'):
        scan(tmp_path)
    with pytest.raises(UserError, match='no folder') as e:
        scan(tmp_path, option='--imagenetpath')
    assert '--dataset' not in str(e.value)


# ------------------------ names

NAMES = [
    b'caf\xe9',
    '狗'.encode(),
    b'\xb9\xb7',
    b'a b',
    b'\x1b[31m',
    b'new\nline',
    b"'",
    b'n' * 240,
]


@pytest.mark.parametrize('name', NAMES, ids=repr)
def test_names_may_be_of_any_bytes(name, tmp_path, capfd):
    root = os.fsencode(tmp_path)
    make_set(tmp_path)
    image = (tmp_path / 'train/cat/0.png').read_bytes()
    for split in b'train', b'test':
        os.mkdir(root + b'/' + split + b'/' + name)
        for suffix in b'.png', b'':
            with open(b'/'.join([root, split, name, name + suffix]), 'wb') as file:
                file.write(image)
        open(b'/'.join([root, split, name, name + b'.txt']), 'wb').close()
    classes, load = data.open_sets('folder', tmp_path)
    assert name in map(os.fsencode, classes)
    train, test = load()
    assert len(train.labels) == len(test.labels) == 8
    printed = capfd.readouterr().out
    printed.encode()
    assert '2 left out' in printed and printed.count('\n') == 1 and '\x1b' not in printed
    os.rename(root + b'/test/' + name, root + b'/test/other')
    with pytest.raises(UserError) as e:
        data.open_sets('folder', tmp_path)
    assert str(e.value).isprintable()
