"""data.py against torchvision's own transforms and files, PIL's decoders, and statistics of
chance."""

import hashlib
import io
import math
import os
import pickle
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

import data
from data import UserError


def random_images(n=3, h=32, w=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), np.uint8))


# ------------------------ augmentation


@pytest.mark.parametrize('h, w, pad', [(32, 32, 4), (7, 12, 3), (9, 5, 4), (5, 5, 0)])
def test_augmentation_is_torchvisions_pad_crop_and_flip(h, w, pad):
    images = random_images(3, h, w)
    offsets = [(i, j, f) for i in range(2 * pad + 1) for j in range(2 * pad + 1) for f in (0, 1)]
    draws = torch.tensor(offsets)
    index = torch.arange(len(draws)) % 3
    ours = data.augment(images, index, draws, pad)
    assert ours.dtype == torch.uint8 and ours.shape == (len(draws), h, w, 3)
    padded = TF.pad(images.permute(0, 3, 1, 2), pad, padding_mode='reflect')
    for image, k, (i, j, flip) in zip(ours, index, offsets):
        expected = TF.crop(padded[k], i, j, h, w)
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(image.permute(2, 0, 1), expected), (i, j, flip)


def test_the_middle_crop_without_flip_is_the_image():
    images = random_images(4)
    ours = data.augment(images, torch.tensor([2, 0]), torch.tensor([[4, 4, 0], [4, 4, 0]]), 4)
    assert torch.equal(ours, images[[2, 0]])


def test_offsets_and_flips_are_uniform_and_independent():
    n, pad = 80_000, 4
    draws = data.crop_and_flip(n, seed=0, epoch=1, pad=pad)
    assert draws.shape == (n, 3) and draws.dtype == torch.int64
    cell = (draws[:, 0] * 9 + draws[:, 1]) * 2 + draws[:, 2]
    assert draws.min() == 0 and cell.max() == 161
    counts = torch.bincount(cell, minlength=162).double()
    assert counts.min() > 0, 'every offset occurs with and without flip'
    chi = float(((counts - n / 162) ** 2 / (n / 162)).sum())
    assert abs(chi - 161) < 4 * math.sqrt(2 * 161), 'too far from uniform, or too close to it'


@pytest.mark.parametrize('a, b', [((0, 1), (0, 2)), ((0, 1), (1, 1)), ((3, 1), (1, 3))])
def test_draws_of_other_seeds_and_epochs_are_independent(a, b):
    n = 40_000
    first, second = (data.crop_and_flip(n, *s, 4) for s in (a, b))
    for k, choices in enumerate((9, 9, 2)):
        counts = torch.bincount(first[:, k] * choices + second[:, k], minlength=choices**2).double()
        df = choices**2 - 1
        chi = float(((counts - n / choices**2) ** 2 / (n / choices**2)).sum())
        assert abs(chi - df) < 4.5 * math.sqrt(2 * df)


def test_neighbouring_samples_draw_independently():
    draws = data.crop_and_flip(40_001, 0, 1, 4)[:, 0]
    counts = torch.bincount(draws[:-1] * 9 + draws[1:], minlength=81).double()
    chi = float(((counts - 40_000 / 81) ** 2 / (40_000 / 81)).sum())
    assert abs(chi - 80) < 4.5 * math.sqrt(160)


def test_the_draw_of_a_sample_is_a_function_of_seed_epoch_and_index_alone():
    whole = data.crop_and_flip(1000, 5, 7, 4)
    for n in 1, 2, 999:
        assert torch.equal(data.crop_and_flip(n, 5, 7, 4), whole[:n])
    np.random.seed(3), torch.manual_seed(3)
    assert torch.equal(data.crop_and_flip(1000, 5, 7, 4), whole)
    for seed, epoch in (5, 8), (6, 7), (7, 5), (57, 0):
        assert (data.crop_and_flip(1000, seed, epoch, 4) == whole).all(1).sum() < 30


def test_without_padding_only_flips_are_drawn():
    draws = data.crop_and_flip(1000, 0, 1, 0)
    assert not draws[:, :2].any() and 400 < draws[:, 2].sum() < 600


def test_the_order_of_an_epoch_is_a_permutation_of_its_own():
    orders = {}
    for seed, epoch in (0, 1), (0, 2), (1, 1), (1, 2):
        order = data.epoch_order(1000, seed, epoch)
        assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(1000))
        assert torch.equal(order, data.epoch_order(1000, seed, epoch))
        orders[seed, epoch] = order
    values = list(orders.values())
    assert all((a == b).sum() < 15 for i, a in enumerate(values) for b in values[:i])
    assert abs(np.corrcoef(orders[0, 1], np.arange(1000))[0, 1]) < 0.12


def test_seeds_of_other_purposes_differ():
    seeds = [
        data.seed_of(*w)
        for w in [(0,), (0, 'a'), (0, 'b'), (1, 'a'), ('0', 'a'), (0, 'a', 1), (0, 'a1'), (10, 'a')]
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)


def test_normalisation_is_the_published_one():
    images = random_images(5, 6, 9)
    ours = data.normalize(images)
    mean, std = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
    transform = torchvision.transforms.Normalize([m / 255 for m in mean], [s / 255 for s in std])
    expected = torch.stack([transform(TF.to_tensor(i.numpy())) for i in images])
    assert ours.dtype == torch.float32 and ours.shape == (5, 3, 6, 9)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# ------------------------ images held out


def labelled(counts):
    labels = torch.from_numpy(
        np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    )
    n = len(labels)
    images = (
        torch.arange(n)
        .view(n, 1, 1, 1)
        .expand(n, 1, 2, 3)
        .remainder(251)
        .to(torch.uint8)
        .contiguous()
    )
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    return data.ImageSet(images, labels, [f'c{i}' for i in range(len(counts))])


def identities(images):
    return (images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()).tolist()


@pytest.mark.parametrize(
    'counts, n',
    [([500] * 10, 1000), ([500] * 10, 17), ([100, 200, 300], 60), ([7, 11, 13], 10), ([5, 5], 2)],
)
def test_held_out_images_are_stratified_disjoint_and_all_there(counts, n):
    whole = labelled(counts)
    rest, out = data.hold_out(whole, n)
    assert len(out.labels) == len(out.images) == n and len(rest.labels) == sum(counts) - n
    assert sorted(identities(rest.images) + identities(out.images)) == list(range(sum(counts)))
    for part in rest, out:
        assert part.classes == whole.classes
        assert torch.equal(part.labels, whole.labels[identities(part.images)])
    share = torch.bincount(out.labels, minlength=len(counts))
    for c, count in enumerate(counts):
        assert abs(share[c] - count * n / sum(counts)) < 1


def test_held_out_images_are_always_the_same_and_not_the_first():
    whole = labelled([100] * 4)
    first = identities(data.hold_out(whole, 40)[1].images)
    np.random.seed(8), torch.manual_seed(8)
    assert identities(data.hold_out(whole, 40)[1].images) == first
    assert max(first) > 200


@pytest.mark.parametrize('n', [1, 3, 397, 400, 401])
def test_holding_out_too_few_or_too_many_is_refused(n):
    with pytest.raises(UserError, match=f'--validate {n}'):
        data.hold_out(labelled([100] * 4), n)


@pytest.mark.parametrize('counts, n', [([10, 1000], 12), ([1, 50], 25)])
def test_each_class_stays_on_both_sides_or_the_number_is_refused(counts, n):
    whole = labelled(counts)
    try:
        rest, out = data.hold_out(whole, n)
    except UserError as e:
        assert f'--validate {n}' in str(e)
    else:
        for part in rest, out:
            assert torch.bincount(part.labels, minlength=2).min() > 0


# ------------------------ folders


def picture(h=24, w=32, seed=0):
    """A smooth picture, as photographs are: uint8 [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


def write_folder(
    root, train=('cat', 'dog'), test=('cat', 'dog'), n=3, test_name='test', size=(8, 8)
):
    for split, classes in ('train', train), (test_name, test):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(
                    picture(*size, seed=100 * c + i + 10_000 * (split == 'train'))
                ).save(folder / f'{i}.png')


@pytest.mark.parametrize(
    'name, options',
    [('a.png', {}), ('a.bmp', {}), ('a.webp', {'lossless': True}), ('a.ppm', {}), ('a.tiff', {})],
)
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P', '1'])
def test_lossless_images_are_decoded_as_pil_does(name, options, mode, tmp_path):
    image = Image.fromarray(picture()).convert(mode)
    if mode == 'RGBA':
        image.putalpha(200)
    if (mode, name) in {('RGBA', 'a.ppm'), ('P', 'a.ppm'), ('RGBA', 'a.tiff')}:
        image = image.convert('RGB')
    image.save(tmp_path / name, **options)
    expected = np.asarray(Image.open(tmp_path / name).convert('RGB'))
    ours = data.decode(tmp_path / name)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_are_turned_as_their_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / 'a.jpg', quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.jpg')))
    ours = data.decode(tmp_path / 'a.jpg')
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).mean() < 1.5


def with_thumbnail(jpeg):
    """The JPEG with another whole JPEG inside its EXIF segment, as cameras write it."""
    thumb = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(thumb, 'JPEG')
    body = b'Exif\0\0' + b'II*\0\x08\0\0\0\0\0\0\0\0\0' + thumb.getvalue()
    return jpeg[:2] + b'\xff\xe1' + (len(body) + 2).to_bytes(2, 'big') + body + jpeg[2:]


def jpegs():
    files = {}
    for name, options in {
        'baseline': {},
        'progressive': {'progressive': True},
        'restarts': {'restart_marker_blocks': 1},
        'fine': {'quality': 100, 'subsampling': 0},
    }.items():
        stream = io.BytesIO()
        rng = np.random.default_rng(0)
        noisy = np.clip(picture(40, 48).astype(int) + rng.integers(-40, 40, (40, 48, 3)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(stream, 'JPEG', **options)
        files[name] = stream.getvalue()
    files['thumbnail'] = with_thumbnail(files['baseline'])
    files['thumbnail, progressive'] = with_thumbnail(files['progressive'])
    return files


@pytest.mark.parametrize('kind', jpegs())
def test_a_jpeg_cut_off_anywhere_is_broken(kind, tmp_path):
    raw, file = jpegs()[kind], tmp_path / 'cut.jpg'
    file.write_bytes(raw)
    np.testing.assert_allclose(data.decode(file), np.asarray(Image.open(file)), atol=8)
    assert not data.is_cut_off(raw)
    for n in {0, 1, 2, 3, 20, 160, *range(200, len(raw), 37), *range(len(raw) - 40, len(raw))}:
        file.write_bytes(raw[:n])
        assert n < 2 or data.is_cut_off(raw[:n]), (
            'some versions of the decoder fill the rest with grey'
        )
        with pytest.raises(UserError, match=r'cut\.jpg'):
            data.decode(file)
    for tail in b'\0' * 100, b'\n', raw:
        file.write_bytes(raw + tail)
        assert data.decode(file).shape == (40, 48, 3)


@pytest.mark.parametrize(
    'name, options',
    [
        ('c.png', {}),
        ('c.webp', {}),
        ('c.webp', {'lossless': True}),
        ('c.bmp', {}),
        ('c.ppm', {}),
        ('c.tiff', {}),
        ('c.gif', {}),
        ('c.jp2', {}),
    ],
)
def test_other_images_cut_off_anywhere_are_broken(name, options, tmp_path):
    file = tmp_path / name
    Image.fromarray(picture(40, 48)).save(file, **options)
    raw = file.read_bytes()
    if cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip('this OpenCV does not read the format')
    whole = data.decode(file)
    silent = []
    for n in {
        0,
        1,
        8,
        30,
        *range(40, len(raw), max(1, len(raw) // 40)),
        len(raw) - 13,
        len(raw) - 20,
    }:
        file.write_bytes(raw[:n])
        try:
            if not np.array_equal(data.decode(file), whole):
                silent.append(n)
        except UserError as e:
            assert name in str(e)
    assert not silent, (
        f'accepted, and decoded to another picture, when cut to {silent} of {len(raw)} bytes'
    )


def test_a_png_with_a_damaged_middle_is_broken(tmp_path):
    Image.fromarray(picture(40, 48)).save(tmp_path / 'a.png')
    raw = bytearray((tmp_path / 'a.png').read_bytes())
    whole = data.decode(tmp_path / 'a.png')
    raw[len(raw) // 2 : len(raw) // 2 + 20] = bytes(20)
    (tmp_path / 'a.png').write_bytes(raw)
    try:
        image = data.decode(tmp_path / 'a.png')
    except UserError:
        return
    assert np.array_equal(image, whole)


def test_broken_files_are_named_and_decoders_are_silent(tmp_path, capfd):
    write_folder(tmp_path)
    good = (tmp_path / 'train/cat/0.png').read_bytes()
    jpeg = jpegs()['baseline']
    odd = {
        'a.png': good[: len(good) // 2],
        'b.jpg': jpeg[: len(jpeg) // 2],
        'c.png': good[:20] + bytes(30) + good[50:],
        'd.txt': b'words',
        'e.png': b'',
        'f.webp': b'RIFF\x10\0\0\0WEBPVP8 ',
        'g.jpg': jpeg[:100] + b'\xff\xd9',
    }
    for name, raw in odd.items():
        file = tmp_path / 'train/dog' / name
        file.write_bytes(raw)
        _, load = data.open_sets('folder', tmp_path)
        with pytest.raises(UserError) as e:
            load()
        assert str(file) in str(e.value) and '\n' not in str(e.value)
        file.unlink()
    data.open_sets('folder', tmp_path)[1]()
    assert capfd.readouterr().err == ''


def test_stderr_comes_back_after_decoding(capfd):
    with data.quiet_decoders() as stderr:
        os.write(2, b'chatter')
        stderr.write('bar')
        stderr.flush()
    os.write(2, b' after')
    assert capfd.readouterr().err == 'bar after'
    with pytest.raises(KeyError), data.quiet_decoders():
        raise KeyError
    os.write(2, b'again')
    assert capfd.readouterr().err == 'again'


@pytest.mark.parametrize('test_name', ['test', 'val'])
@pytest.mark.parametrize('nthread', [0, 1, 3])
def test_a_folder_becomes_two_sets(test_name, nthread, tmp_path):
    write_folder(tmp_path, ('b', 'a', 'C'), ('a', 'b', 'C'), test_name=test_name)
    classes, load = data.open_sets('folder', str(tmp_path), nthread)
    assert classes == ['C', 'a', 'b']
    for split, part in zip(('train', test_name), load()):
        assert part.classes == classes and part.labels.dtype == torch.int64
        assert part.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert part.images.shape == (9, 8, 8, 3) and part.images.dtype == torch.uint8
        for i, (image, label) in enumerate(zip(part.images, part.labels)):
            file = tmp_path / split / classes[label] / f'{i % 3}.png'
            np.testing.assert_array_equal(image.numpy(), np.asarray(Image.open(file)))


def test_more_images_than_a_chunk_keep_their_order(tmp_path):
    write_folder(tmp_path, n=300, size=(2, 2))
    train, _ = data.open_sets('folder', tmp_path, 2)[1]()
    files = [f for c in ('cat', 'dog') for f in sorted((tmp_path / 'train' / c).iterdir())]
    expected = np.stack([np.asarray(Image.open(f)) for f in files])
    np.testing.assert_array_equal(train.images.numpy(), expected)


def test_test_is_taken_before_val(tmp_path):
    write_folder(tmp_path)
    (tmp_path / 'val').mkdir()
    assert data.open_sets('folder', tmp_path)[0] == ['cat', 'dog']


def test_hidden_files_and_folders_are_skipped(tmp_path):
    write_folder(tmp_path)
    (tmp_path / 'train/.cache').mkdir()
    (tmp_path / 'train/cat/.DS_Store').write_bytes(b'\0')
    (tmp_path / 'train/README').write_text('not a class')
    classes, load = data.open_sets('folder', tmp_path)
    assert classes == ['cat', 'dog'] and len(load()[0].labels) == 6


def test_an_odd_sized_image_is_named(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(picture(8, 9)).save(tmp_path / 'test/cat/1.png')
    with pytest.raises(UserError, match=r'test/cat/1\.png: is 9x8, most images are 8x8'):
        data.open_sets('folder', tmp_path)[1]()


@pytest.mark.parametrize(
    'train, test, message',
    [
        (('cat', 'dog'), ('cat', 'cow'), 'cow, dog'),
        (('cat', 'dog', 'cow'), ('cat', 'dog'), 'cow'),
        (('cat',), ('cat',), 'at least 2'),
        ((), (), 'no folder'),
        (('cat', 'dog'), (), 'no folder'),
    ],
)
def test_wrong_classes_are_said_before_anything_is_decoded(
    train, test, message, tmp_path, monkeypatch
):
    write_folder(tmp_path, train, test)
    monkeypatch.setattr(data, 'decode', lambda file: pytest.fail('decoded'))
    with pytest.raises(UserError, match=message):
        data.open_sets('folder', tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path, ('cat', 'dog', 'empty'), ('cat', 'dog', 'empty'))
    for file in (tmp_path / 'train/empty').iterdir():
        file.unlink()
    (tmp_path / 'train/empty/.hidden').write_text('')
    with pytest.raises(UserError, match='empty: holds no images'):
        data.open_sets('folder', tmp_path)


@pytest.mark.parametrize('root', ['missing', 'file'])
def test_a_dataroot_that_is_no_folder_is_named(root, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=root):
        data.open_sets('folder', tmp_path / root)


# ------------------------ torchvision's CIFAR


def cifar_files(name, rng):
    """{path in the archive: pickled bytes} in CIFAR's own form (rows of 3072 bytes, planes R, G,
    B), a few images large."""

    def batch(n, labels):
        rows = rng.integers(0, 256, (n, 3072), np.uint8)
        return pickle.dumps({'data': rows, labels: [int(i) for i in rng.integers(0, 10, n)]}), rows

    if name == 'CIFAR10':
        folder, labels, meta, key = 'cifar-10-batches-py', 'labels', 'batches.meta', 'label_names'
        parts = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    else:
        folder, labels, meta, key = 'cifar-100-python', 'fine_labels', 'meta', 'fine_label_names'
        parts = ['train', 'test']
    classes = [f'name of {i}' for i in range(10)]
    files, rows = {f'{folder}/{meta}': pickle.dumps({key: classes})}, {}
    for part in parts:
        files[f'{folder}/{part}'], rows[part] = batch(4, labels)
    return files, rows, classes


@pytest.fixture(params=['CIFAR10', 'CIFAR100'])
def tiny_cifar(request, tmp_path, monkeypatch):
    """(name, folder with a tiny archive, {file: rows}, classes); torchvision's checksums are those
    of the tiny files."""
    name = request.param
    files, rows, classes = cifar_files(name, np.random.default_rng(0))
    cls = getattr(torchvision.datasets, name)
    root = tmp_path / 'root'
    root.mkdir()
    with tarfile.open(root / cls.filename, 'w:gz') as tar:
        for path, raw in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    md5 = {path.split('/')[1]: hashlib.md5(raw).hexdigest() for path, raw in files.items()}
    monkeypatch.setattr(cls, 'tgz_md5', hashlib.md5((root / cls.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(cls, 'train_list', [[f, md5[f]] for f, _ in cls.train_list])
    monkeypatch.setattr(cls, 'test_list', [[f, md5[f]] for f, _ in cls.test_list])
    monkeypatch.setattr(cls, 'meta', cls.meta | {'md5': md5[cls.meta['filename']]})
    monkeypatch.setattr(cls, 'url', 'http://127.0.0.1:9/none.tar.gz')  # nothing listens there
    return name, root, rows, classes


def test_cifar_is_read_from_its_archive(tiny_cifar, capfd):
    name, root, rows, classes = tiny_cifar
    found, load = data.open_sets(name, root)
    assert found == classes
    train, test = load()
    expected = np.concatenate([r for k, r in rows.items() if 'test' not in k])
    for part, raw in (train, expected), (test, rows['test_batch' if name == 'CIFAR10' else 'test']):
        images = raw.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(part.images.numpy(), images)
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert len(part.labels) == len(raw) and part.labels.max() < 10 and part.classes == classes
    assert capfd.readouterr().err == ''


def test_cifar_can_be_augmented(tiny_cifar):
    name, root, _, _ = tiny_cifar
    train, _ = data.open_sets(name, root)[1]()
    draws = torch.tensor([[4, 4, 0], [4, 4, 1]])
    ours = data.augment(train.images, torch.tensor([1, 2]), draws, 4)
    assert torch.equal(ours[0], train.images[1]) and torch.equal(ours[1], train.images[2].flip(1))


def test_a_corrupted_archive_is_refused(tiny_cifar, capfd):
    name, root, _, _ = tiny_cifar
    archive = root / getattr(torchvision.datasets, name).filename
    raw = archive.read_bytes()
    for broken in raw[:-10], raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], b'':
        archive.write_bytes(broken)
        with pytest.raises(UserError) as e:
            data.open_sets(name, root)
        assert (
            archive.name in str(e.value)
            and str(root) in str(e.value)
            and '--dataset folder' in str(e.value)
        )
        assert '\n' not in str(e.value)
    assert capfd.readouterr().err == ''


def test_a_damaged_extracted_file_is_not_used(tiny_cifar):
    name, root, _, _ = tiny_cifar
    data.open_sets(name, root)
    archive = root / getattr(torchvision.datasets, name).filename
    archive.unlink()
    (part,) = root.glob('*/test*')
    part.write_bytes(part.read_bytes()[:-1] + b'x')
    with pytest.raises(UserError, match=archive.name):
        data.open_sets(name, root)


def test_without_data_and_network_nothing_is_written(tiny_cifar, tmp_path):
    name, _, _, _ = tiny_cifar
    with pytest.raises(UserError, match='put cifar-100?-python.tar.gz in'):
        data.open_sets(name, tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()


# ------------------------ shapes


def test_shapes_are_drawn_from_a_fixed_seed():
    a, b, c = data.draw_shapes(40, 0), data.draw_shapes(60, 0), data.draw_shapes(40, 1)
    assert a.images.shape == (40, 32, 32, 3) and a.images.dtype == torch.uint8
    assert torch.equal(a.images, b.images[:40]) and not torch.equal(a.images, c.images)
    assert torch.bincount(a.labels).tolist() == [4] * 10 and len(set(a.classes)) == 10
    assert len({i.numpy().tobytes() for i in torch.cat([a.images, c.images])}) == 80


def test_shapes_need_no_files_and_share_no_image():
    classes, load = data.open_sets('shapes', '/nowhere')
    train, test = load()
    assert classes == train.classes == test.classes and set(train.labels.tolist()) == set(range(10))
    seen = {i.numpy().tobytes() for i in train.images}
    assert len(seen) == len(train.images) and not any(
        i.numpy().tobytes() in seen for i in test.images
    )


# ------------------------ photographs


def photograph(height, width, seed=0):
    """A smooth image with edges: what resizing is judged on."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 7, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        a, b = rng.integers(0, [width, height], (2, 2)).tolist()
        cv2.rectangle(image, a, b, rng.integers(0, 256, 3).tolist(), -1)
    return image


def with_exif(jpeg: bytes, orientation: int, order='little') -> bytes:
    """The JPEG with an EXIF segment that says how it is turned."""
    short, long = ((2, order), (4, order))
    tag = (0x0112).to_bytes(*short) + (3).to_bytes(*short) + (1).to_bytes(*long)
    entry = tag + orientation.to_bytes(*short) + b'\0\0'
    tiff = (b'II' if order == 'little' else b'MM') + (42).to_bytes(*short) + (8).to_bytes(*long)
    exif = b'Exif\0\0' + tiff + (1).to_bytes(*short) + entry + bytes(4)
    return jpeg[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + jpeg[2:]


def jpeg_of(image, *flags):
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95, *flags])[1].tobytes()


def test_a_crop_is_torchvisions_random_resized_crop():
    """Sizes, shapes and places over many draws against torchvision's own."""
    from torchvision.transforms import RandomResizedCrop

    for H, W in (300, 400), (120, 900), (64, 64):
        ours = np.array([data.random_crop(H, W, data.uniforms(23, 0, 1, i)) for i in range(4000)])
        torch.manual_seed(0)
        image = torch.empty(3, H, W)
        get = RandomResizedCrop.get_params
        theirs = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
        for a, b in zip(ours.T, theirs.T):
            quantiles = [np.quantile(v, [0.1, 0.25, 0.5, 0.75, 0.9]) for v in (a, b)]
            assert np.abs(quantiles[0] - quantiles[1]).max() < 0.04 * max(H, W)
        top, left, h, w = ours.T
        assert (
            (top >= 0).all()
            and (left >= 0).all()
            and (top + h <= H).all()
            and (left + w <= W).all()
        )
        assert min(h.min(), w.min()) > 0


def test_draws_are_uniform_and_a_function_of_seed_epoch_and_sample():
    u = np.array([data.uniforms(23, 5, 2, i) for i in range(3000)])
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.03 and np.abs(u.std(0) - 12**-0.5).max() < 0.02
    correlation = np.corrcoef(u.T) - np.eye(23)
    assert np.abs(correlation).max() < 0.08
    assert np.array_equal(data.uniforms(23, 5, 2, 7), u[7])
    for other in (6, 2, 7), (5, 3, 7), (5, 2, 8):
        assert not np.array_equal(data.uniforms(23, *other), u[7])


@pytest.mark.parametrize('size', [(500, 375), (90, 300), (1500, 1100), (224, 224)])
def test_views_are_those_of_pil(size, tmp_path):
    """The same crop and flip of the same file by PIL: a fraction of a grey level apart, also where
    it was decoded at a half."""
    file = tmp_path / 'a.jpg'
    file.write_bytes(jpeg_of(photograph(*size)))
    whole = Image.open(file).convert('RGB')
    for i in range(6):
        u = data.uniforms(23, 0, 1, i)
        top, left, h, w = data.random_crop(*size, u)
        image = whole.crop((left, top, left + w, top + h)).resize((224, 224), Image.BILINEAR)
        expected = np.asarray(image)[:, ::-1] if u[22] < 0.5 else np.asarray(image)
        ours = data.train_view(file, 224, 0, 1, i).astype(int)
        reduced = min(h, w) >= 448
        assert np.abs(ours - expected).mean() < (2.5 if reduced else 0.3), (i, reduced)
    H, W = size
    shorter = min(H, W)
    resized = whole.resize((int(256 * W / shorter), int(256 * H / shorter)), Image.BILINEAR)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(int)
    assert np.abs(data.centre_view(file, 224) - expected).mean() < (2.5 if shorter >= 512 else 0.3)


@pytest.mark.parametrize('size', [(500, 375), (90, 300), (1500, 1100), (256, 256)])
def test_plain_crops_are_those_of_torchvision(size, tmp_path):
    """Resize(256), crop and flip of the same file by PIL, also where it was decoded at a half or a
    quarter."""
    file = tmp_path / 'a.jpg'
    file.write_bytes(jpeg_of(photograph(*size)))
    resized = TF.resize(Image.open(file).convert('RGB'), 256)
    for i in range(6):
        down, right, flip = data.uniforms(3, 0, 1, i)
        top, left = int(down * (resized.height - 223)), int(right * (resized.width - 223))
        expected = TF.crop(resized, top, left, 224, 224)
        expected = np.asarray(TF.hflip(expected) if flip < 0.5 else expected).astype(int)
        ours = data.plain_train_view(file, 224, 0, 1, i)
        assert np.abs(ours - expected).mean() < (2.5 if min(size) >= 512 else 0.3), i
        out = np.empty_like(ours)
        assert np.array_equal(data.plain_train_view(file, 224, 0, 1, i, out), ours)
        assert np.array_equal(out, ours)


def test_plain_crops_lie_anywhere_and_are_a_function_of_seed_epoch_and_sample(tmp_path):
    """On an image that tells where each pixel is from: no resizing, as its shorter side is 64 = 56
    * 256 / 224."""
    y, x = np.mgrid[:64, :80].astype(np.uint8)
    file = tmp_path / 'a.png'
    cv2.imwrite(str(file), np.dstack([0 * x, x, y]))
    views = [data.plain_train_view(file, 56, 3, 1, i).astype(int) for i in range(3000)]
    tops, lefts = (np.array([v[..., c].min() for v in views]) for c in (0, 1))
    flips = np.array([v[0, 0, 1] > v[0, -1, 1] for v in views])
    for view, top, left, flip in zip(views, tops, lefts, flips):
        cut = np.dstack([y, x, 0 * x])[top : top + 56, left : left + 56]
        assert np.array_equal(view, cut[:, ::-1] if flip else cut)
    # Each of 9 x 25 places and both directions equally often: chi-square, its mean plus 5 standard
    # deviations.
    for drawn, n in (tops, 9), (lefts, 25), (flips.astype(int), 2):
        counts = np.bincount(drawn, minlength=n)
        chi = ((counts - 3000 / n) ** 2).sum() * n / 3000
        assert len(counts) == n and chi < n - 1 + 5 * math.sqrt(2 * (n - 1))
    assert np.abs(np.corrcoef([tops, lefts, flips]) - np.eye(3)).max() < 0.08
    again = [data.plain_train_view(file, 56, *key) for key in ((3, 1, 7), (4, 1, 7), (3, 2, 7))]
    assert np.array_equal(again[0], views[7])
    assert not any(np.array_equal(view, views[7]) for view in again[1:])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('order', ['little', 'big'])
def test_photographs_are_turned_as_exif_says(orientation, order, tmp_path):
    raw = with_exif(jpeg_of(photograph(60, 90)), orientation, order)
    (tmp_path / 'a.jpg').write_bytes(raw)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / 'a.jpg'))
    assert data.jpeg_size(raw) == (expected.height, expected.width)
    whole = np.asarray(expected).astype(int)
    assert np.abs(data.decode(tmp_path / 'a.jpg') - whole).mean() < 1
    u = data.uniforms(23, 0, 1, 3)
    top, left, h, w = data.random_crop(*whole.shape[:2], u)
    image = np.asarray(
        expected.crop((left, top, left + w, top + h)).resize((32, 32), Image.BILINEAR)
    )
    image = image[:, ::-1] if u[22] < 0.5 else image
    assert np.abs(data.train_view(tmp_path / 'a.jpg', 32, 0, 1, 3) - image.astype(int)).mean() < 1.5


def test_odd_exif_is_no_crash():
    for block in b'', b'II', b'II*\0\xff\xff\xff\xff', b'MM\0*\0\0\0\x08\xff\xff', b'junk' * 5:
        assert data.exif_orientation(block) == 1
    raw = jpeg_of(photograph(20, 30))
    for n in range(2, 200, 7):
        assert data.jpeg_size(raw[:n]) in (None, (20, 30))


def test_progressive_grey_and_transparent_photographs_are_rgb(tmp_path):
    image = photograph(50, 70)
    (tmp_path / 'progressive.jpg').write_bytes(jpeg_of(image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
    cv2.imwrite(str(tmp_path / 'grey.jpg'), image[..., 0])
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.dstack([image, np.full((50, 70), 128, np.uint8)]))
    cv2.imwrite(str(tmp_path / '16.png'), image.astype(np.uint16) * 257)
    for name in 'progressive.jpg', 'grey.jpg', 'alpha.png', '16.png':
        view = data.centre_view(tmp_path / name, 32)
        expected = np.asarray(Image.fromarray(image[..., ::-1]).resize((51, 37), Image.BILINEAR))[
            2:34, 10:42
        ]
        if name == 'grey.jpg':
            assert (view == view[..., :1]).all()
        else:
            most = 6 if name.endswith('jpg') else 1  # JPEG has lost some of its colours
            assert np.abs(view.astype(int) - expected).mean() < most, name


def test_batches_come_in_order_few_ahead_and_bring_their_errors():
    started = []

    def view(item, out):
        started.append(item)
        out[:] = item

    batches = [list(range(i, i + 20)) for i in range(0, 200, 20)]
    for n, (batch, images) in enumerate(
        data.load_batches(iter(batches), view, 4, nthread=3, ahead=2)
    ):
        assert batch == batches[n] and images.shape == (20, 4, 4, 3)
        assert (images[:, 0, 0, 0] == torch.tensor(batch)).all()
        assert len(started) <= 20 * (n + 4)
    assert sorted(started) == list(range(200))

    def broken(item, out):
        if item == 45:
            raise data.UserError('45.jpg: broken')

    seen = []
    with pytest.raises(data.UserError, match='45.jpg'):
        for batch, _ in data.load_batches(batches, broken, 4, nthread=2):
            seen.append(batch)
    assert seen == batches[:2]


def test_memory_does_not_grow_over_epochs(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(jpeg_of(photograph(300, 400)))

    def epoch(number):
        def view(i, out):
            data.train_view(tmp_path / 'a.jpg', 64, 0, number, i, out)

        for _ in data.load_batches([range(32)] * 4, view, 64, nthread=2):
            pass
        return int(re.search(r'VmRSS:\s+(\d+)', Path('/proc/self/status').read_text())[1])

    sizes = [epoch(n) for n in range(8)]
    assert sizes[-1] - sizes[2] < 20_000, sizes  # kB


def test_broken_photographs_are_listed(tmp_path):
    (tmp_path / 'good.jpg').write_bytes(jpeg_of(photograph(30, 30)))
    (tmp_path / 'cut.jpg').write_bytes(jpeg_of(photograph(30, 30))[:-20])
    (tmp_path / 'text.jpg').write_bytes(b'no image')
    files = [str(tmp_path / name) for name in ('good.jpg', 'cut.jpg', 'text.jpg', 'none.jpg')]
    faults = data.find_faults(files, 2)
    assert [fault and fault.split(':')[0] for fault in faults] == [None, *files[1:]]
