"""data.py against torchvision's transforms and files, PIL's decoders, and statistics of chance."""

import contextlib
import errno
import hashlib
import io
import math
import os
import pickle
import pty
import select
import sys
import tarfile

import cv2
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

import data
from support.program import UserError


def random_images(n=3, h=32, w=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), np.uint8))


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
    words = [(0,), (0, 'a'), (0, 'b'), (1, 'a'), ('0', 'a'), (0, 'a', 1), (0, 'a1'), (10, 'a')]
    seeds = [data.seed_of(*w) for w in words]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)


def test_draws_are_uniform_and_a_function_of_seed_epoch_and_sample():
    u = np.array([data.uniforms(23, 5, 2, i) for i in range(3000)])
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.03 and np.abs(u.std(0) - 12**-0.5).max() < 0.02
    correlation = np.corrcoef(u.T) - np.eye(23)
    assert np.abs(correlation).max() < 0.08
    assert np.array_equal(data.uniforms(23, 5, 2, 7), u[7])
    for other in (6, 2, 7), (5, 3, 7), (5, 2, 8):
        assert not np.array_equal(data.uniforms(23, *other), u[7])


def test_normalisation_is_the_published_one():
    images = random_images(5, 6, 9)
    ours = data.normalize(images)
    mean, std = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
    transform = torchvision.transforms.Normalize([m / 255 for m in mean], [s / 255 for s in std])
    expected = torch.stack([transform(TF.to_tensor(i.numpy())) for i in images])
    assert ours.dtype == torch.float32 and ours.shape == (5, 3, 6, 9)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# ------------------------ held-out images


def labelled(counts):
    """An ImageSet of `counts` images a class, in random order; image i has the identity i."""
    classes = np.repeat(np.arange(len(counts)), counts)
    labels = torch.from_numpy(np.random.default_rng(1).permutation(classes))
    i = torch.arange(len(labels))
    images = (i % 251).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = i % 256, i // 256
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
    """A smooth picture, like a photograph: uint8 [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


PETS = ('cat', 'dog')


def write_folder(root, train=PETS, test=PETS, n=3, test_name='test', size=(8, 8)):
    for split, classes in ('train', train), (test_name, test):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = picture(*size, seed=100 * c + i + 10_000 * (split == 'train'))
                Image.fromarray(image).save(folder / f'{i}.png')


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
    """The JPEG with another JPEG, a thumbnail, in its EXIF segment, as cameras write it."""
    thumb = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(thumb, 'JPEG')
    body = b'Exif\0\0' + b'II*\0\x08\0\0\0\0\0\0\0\0\0' + thumb.getvalue()
    return jpeg[:2] + b'\xff\xe1' + (len(body) + 2).to_bytes(2, 'big') + body + jpeg[2:]


def jpegs():
    files = {}
    kinds = {'baseline': {}, 'progressive': {'progressive': True}}
    kinds |= {'restarts': {'restart_marker_blocks': 1}, 'fine': {'quality': 100, 'subsampling': 0}}
    for name, options in kinds.items():
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
    # A baseline JPEG that lacks its end marker alone is complete, see test_images.py.
    last = len(raw) if 'progressive' in kind else len(raw) - 3
    for n in {0, 1, 2, 3, 20, 160, *range(200, last, 37), *range(last - 40, last)}:
        file.write_bytes(raw[:n])
        # Some versions of the decoder fill the rest with grey.
        assert n < 2 or data.is_cut_off(raw[:n])
        with pytest.raises(UserError, match=r'cut\.jpg'):
            data.decode(file)
    for tail in b'\0' * 100, b'\n', raw:
        file.write_bytes(raw + tail)
        assert data.decode(file).shape == (40, 48, 3)


@pytest.mark.parametrize(
    'name, options',
    [('c.png', {}), ('c.webp', {}), ('c.webp', {'lossless': True}), ('c.bmp', {}), ('c.ppm', {})]
    + [('c.tiff', {}), ('c.gif', {}), ('c.jp2', {})],
)
def test_other_images_cut_off_anywhere_are_broken(name, options, tmp_path):
    file = tmp_path / name
    Image.fromarray(picture(40, 48)).save(file, **options)
    raw = file.read_bytes()
    if cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip('this OpenCV does not read the format')
    whole = data.decode(file)
    silent, parts = [], range(40, len(raw), max(1, len(raw) // 40))
    for n in {0, 1, 8, 30, *parts, len(raw) - 13, len(raw) - 20}:
        file.write_bytes(raw[:n])
        try:
            if not np.array_equal(data.decode(file), whole):
                silent.append(n)
        except UserError as e:
            assert name in str(e)
    assert not silent, f'cut to {silent} of {len(raw)} bytes, it is decoded to another picture'


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
    broken = {
        'a.png': good[: len(good) // 2],
        'b.jpg': jpeg[: len(jpeg) // 2],
        'c.png': good[:20] + bytes(30) + good[50:],
        'd.jpg': b'words',
        'e.png': b'',
        'f.webp': b'RIFF\x10\0\0\0WEBPVP8 ',
        'g.jpg': jpeg[:100] + b'\xff\xd9',
    }
    for name, raw in broken.items():
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


def test_decoders_stay_silent_until_the_last_user_has_left(capfd):
    first, second = data.quiet_decoders(), data.quiet_decoders()
    before = sys.stderr
    first.__enter__(), second.__enter__()
    os.write(2, b'chatter')
    print('caf\udce9', file=sys.stderr)
    first.__exit__(None, None, None)
    os.write(2, b'chatter')
    second.__exit__(None, None, None)
    assert sys.stderr is before
    os.write(2, b'after')
    assert capfd.readouterr().err == 'caf\\udce9\nafter'


def test_a_bar_reaches_the_terminal_while_decoders_are_silent():
    """The bar begins before the decoders are silenced."""
    terminal, other = pty.openpty()
    tty = os.fdopen(other, 'w')
    saved = os.dup(2)
    os.dup2(other, 2)
    try:
        with (
            contextlib.redirect_stderr(tty),
            data.Progress(3, 'epoch 1') as bar,
            data.quiet_decoders(),
        ):
            os.write(2, b'chatter')
            bar.update(3)
            bar.bar.refresh()
            shown = b''
            while b'3/3' not in shown and select.select([terminal], [], [], 10)[0]:
                shown += os.read(terminal, 1 << 16)
    finally:
        os.dup2(saved, 2)
        os.close(saved), os.close(terminal), tty.close()
    assert b'3/3' in shown and b'chatter' not in shown


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
        (('cat', 'dog'), ('cat', 'cow'), "'dog' only in train; 'cow' only in test"),
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
    """({path in the archive: pickled bytes}, {file: rows}, classes) of a tiny CIFAR. An image is a
    row of 3072 bytes: the planes R, G, B."""

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
    """(name, folder with a tiny archive, {file: rows}, classes). torchvision's checksums are
    replaced by those of the tiny files."""
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
        error = str(e.value)
        assert archive.name in error and str(root) in error and '--dataset folder' in error
        assert '\n' not in error
    assert capfd.readouterr().err == ''


def test_an_archive_that_is_cut_off_is_named_as_such(tiny_cifar):
    name, root, _, _ = tiny_cifar
    archive = root / getattr(torchvision.datasets, name).filename
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError, match='is truncated or damaged .1,000 bytes') as e:
        data.open_sets(name, root)
    assert str(archive) in str(e.value) and 'is not in' not in str(e.value)


@pytest.mark.parametrize('code', [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_archive_on_a_disk_that_cannot_be_written_is_named_as_complete(
    code, tiny_cifar, monkeypatch
):
    name, root, _, _ = tiny_cifar
    archive = root / getattr(torchvision.datasets, name).filename

    def extractall(*_, **__):
        raise OSError(code, os.strerror(code), str(root))

    monkeypatch.setattr(tarfile.TarFile, 'extractall', extractall)
    with pytest.raises(UserError, match='is complete, but cannot be unpacked') as e:
        data.open_sets(name, root)
    assert str(e.value).startswith(f'{archive}: ') and os.strerror(code) in str(e.value)
    assert e.value.status == 1 and archive.is_file()


def test_an_archive_that_cannot_be_read_is_named_as_such(tiny_cifar, monkeypatch):
    name, root, _, _ = tiny_cifar
    archive = root / getattr(torchvision.datasets, name).filename

    def check_md5(path, *_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(torchvision.datasets.utils, 'check_md5', check_md5)
    with pytest.raises(UserError) as e:
        data.open_sets(name, root)
    assert str(e.value).startswith(f'{archive}: cannot be read: Permission denied')


def test_a_damaged_extracted_file_is_not_used(tiny_cifar):
    name, root, _, _ = tiny_cifar
    data.open_sets(name, root)
    archive = root / getattr(torchvision.datasets, name).filename
    archive.unlink()
    (part,) = root.glob('*/test*')
    part.write_bytes(part.read_bytes()[:-1] + b'x')
    with pytest.raises(UserError, match=f'{part.parent.name} is incomplete or damaged') as e:
        data.open_sets(name, root)
    assert archive.name in str(e.value)


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


def test_the_ground_of_shapes_has_no_jumps(monkeypatch):
    """Values are clipped to 0 .. 255 and do not wrap around."""
    monkeypatch.setattr(data, '_paint', lambda *_: None)
    images = data.draw_shapes(20, 0).images.int()
    assert (images.min(), images.max()) == (0, 255)
    assert max(images.diff(dim=dim).abs().max() for dim in (1, 2)) < 150


def test_no_shape_is_cut_off_where_it_is_painted(monkeypatch):
    found = data.draw_shapes(40, 0).images
    monkeypatch.setattr(data.cv2, 'boundingRect', lambda mask: (0, 0, *mask.shape[::-1]))
    assert torch.equal(found, data.draw_shapes(40, 0).images)


def test_shapes_need_no_files_and_share_no_image():
    classes, load = data.open_sets('shapes', '/nowhere')
    train, test = load()
    assert classes == train.classes == test.classes and set(train.labels.tolist()) == set(range(10))
    seen, tested = ({i.numpy().tobytes() for i in part.images} for part in (train, test))
    assert len(seen) == len(train.images) and not seen & tested
