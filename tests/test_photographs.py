"""support/photographs.py against torchvision's transforms and PIL's decoders."""

import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision import transforms

import data
from support import photographs
from support.program import UserError


def photograph(height, width, seed=0):
    """A smooth image with edges, in which wrong resizing shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 7, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        a, b = rng.integers(0, [width, height], (2, 2)).tolist()
        cv2.rectangle(image, a, b, rng.integers(0, 256, 3).tolist(), -1)
    return image


def with_exif(jpeg: bytes, orientation: int, order='little') -> bytes:
    """The JPEG with an EXIF segment that holds its orientation."""
    short, long = (2, order), (4, order)
    tag = (0x0112).to_bytes(*short) + (3).to_bytes(*short) + (1).to_bytes(*long)
    entry = tag + orientation.to_bytes(*short) + b'\0\0'
    tiff = (b'II' if order == 'little' else b'MM') + (42).to_bytes(*short) + (8).to_bytes(*long)
    exif = b'Exif\0\0' + tiff + (1).to_bytes(*short) + entry + bytes(4)
    return jpeg[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + jpeg[2:]


def jpeg_of(image, *flags):
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95, *flags])[1].tobytes()


def difference(a, b):
    """The mean absolute difference of two images in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean()


def test_a_crop_is_torchvisions_random_resized_crop():
    """Sizes, shapes and places of many draws."""
    for H, W in (300, 400), (120, 900), (64, 64):
        draws = (data.uniforms(23, 0, 1, i) for i in range(4000))
        ours = np.array([photographs.random_crop(H, W, u) for u in draws])
        torch.manual_seed(0)
        image = torch.empty(3, H, W)
        get = transforms.RandomResizedCrop.get_params
        theirs = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
        for a, b in zip(ours.T, theirs.T):
            quantiles = [np.quantile(v, [0.1, 0.25, 0.5, 0.75, 0.9]) for v in (a, b)]
            assert np.abs(quantiles[0] - quantiles[1]).max() < 0.04 * max(H, W)
        top, left, h, w = ours.T
        assert top.min() >= 0 and left.min() >= 0
        assert (top + h).max() <= H and (left + w).max() <= W
        assert min(h.min(), w.min()) > 0


@pytest.mark.parametrize('size', [(500, 375), (90, 300), (1500, 1100), (224, 224)])
def test_views_are_those_of_pil(size, tmp_path):
    """PIL's crop and flip of the same file differ by a fraction of a grey level, by more if ours
    was decoded at a half."""
    file = tmp_path / 'a.jpg'
    file.write_bytes(jpeg_of(photograph(*size)))
    whole = Image.open(file).convert('RGB')
    for i in range(6):
        u = data.uniforms(23, 0, 1, i)
        top, left, h, w = photographs.random_crop(*size, u)
        image = whole.crop((left, top, left + w, top + h)).resize((224, 224), Image.BILINEAR)
        expected = ImageOps.mirror(image) if u[22] < 0.5 else image
        reduced = min(h, w) >= 448
        most = 2.5 if reduced else 0.3
        assert difference(photographs.train_view(file, 224, 0, 1, i), expected) < most, i
    H, W = size
    shorter = min(H, W)
    resized = whole.resize((int(256 * W / shorter), int(256 * H / shorter)), Image.BILINEAR)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = resized.crop((left, top, left + 224, top + 224))
    most = 2.5 if shorter >= 512 else 0.3
    assert difference(photographs.centre_view(file, 224), expected) < most


@pytest.mark.parametrize('size', [(500, 375), (90, 300), (1500, 1100), (256, 256)])
def test_plain_crops_are_those_of_torchvision(size, tmp_path):
    """torchvision's Resize(256), crop and flip of the same file, also if ours was decoded at a half
    or a quarter."""
    file = tmp_path / 'a.jpg'
    file.write_bytes(jpeg_of(photograph(*size)))
    resized = TF.resize(Image.open(file).convert('RGB'), 256)
    for i in range(6):
        down, right, flip = data.uniforms(3, 0, 1, i)
        top, left = int(down * (resized.height - 223)), int(right * (resized.width - 223))
        expected = TF.crop(resized, top, left, 224, 224)
        expected = TF.hflip(expected) if flip < 0.5 else expected
        ours = photographs.plain_train_view(file, 224, 0, 1, i)
        assert difference(ours, expected) < (2.5 if min(size) >= 512 else 0.3), i
        out = np.empty_like(ours)
        assert np.array_equal(photographs.plain_train_view(file, 224, 0, 1, i, out), ours)
        assert np.array_equal(out, ours)


def test_plain_crops_lie_anywhere_and_are_a_function_of_seed_epoch_and_sample(tmp_path):
    """The image holds the position of each pixel. It is not resized, because its shorter side is
    64 = 56 * 256 / 224."""
    y, x = np.mgrid[:64, :80].astype(np.uint8)
    file = tmp_path / 'a.png'
    cv2.imwrite(str(file), np.dstack([0 * x, x, y]))
    views = [photographs.plain_train_view(file, 56, 3, 1, i).astype(int) for i in range(3000)]
    tops, lefts = (np.array([v[..., c].min() for v in views]) for c in (0, 1))
    flips = np.array([v[0, 0, 1] > v[0, -1, 1] for v in views])
    for view, top, left, flip in zip(views, tops, lefts, flips):
        cut = np.dstack([y, x, 0 * x])[top : top + 56, left : left + 56]
        assert np.array_equal(view, cut[:, ::-1] if flip else cut)
    # All 9 x 25 places and both directions are equally likely: chi-square is below its mean plus 5
    # standard deviations.
    for drawn, n in (tops, 9), (lefts, 25), (flips.astype(int), 2):
        counts = np.bincount(drawn, minlength=n)
        chi = ((counts - 3000 / n) ** 2).sum() * n / 3000
        assert len(counts) == n and chi < n - 1 + 5 * math.sqrt(2 * (n - 1))
    assert np.abs(np.corrcoef([tops, lefts, flips]) - np.eye(3)).max() < 0.08
    keys = (3, 1, 7), (4, 1, 7), (3, 2, 7)
    again = [photographs.plain_train_view(file, 56, *key) for key in keys]
    assert np.array_equal(again[0], views[7])
    assert not any(np.array_equal(view, views[7]) for view in again[1:])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('order', ['little', 'big'])
def test_photographs_are_turned_as_exif_says(orientation, order, tmp_path):
    raw, file = with_exif(jpeg_of(photograph(60, 90)), orientation, order), tmp_path / 'a.jpg'
    file.write_bytes(raw)
    whole = ImageOps.exif_transpose(Image.open(file))
    assert photographs.jpeg_size(raw) == (whole.height, whole.width)
    assert difference(data.decode(file), whole) < 1
    u = data.uniforms(23, 0, 1, 3)
    top, left, h, w = photographs.random_crop(whole.height, whole.width, u)
    image = whole.crop((left, top, left + w, top + h)).resize((32, 32), Image.BILINEAR)
    expected = ImageOps.mirror(image) if u[22] < 0.5 else image
    assert difference(photographs.train_view(file, 32, 0, 1, 3), expected) < 1.5


def test_odd_exif_is_no_crash():
    for block in b'', b'II', b'II*\0\xff\xff\xff\xff', b'MM\0*\0\0\0\x08\xff\xff', b'junk' * 5:
        assert photographs.exif_orientation(block) == 1
    raw = jpeg_of(photograph(20, 30))
    for n in range(2, 200, 7):
        assert photographs.jpeg_size(raw[:n]) in (None, (20, 30))


def test_progressive_grey_and_transparent_photographs_are_rgb(tmp_path):
    image = photograph(50, 70)
    (tmp_path / 'progressive.jpg').write_bytes(jpeg_of(image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
    cv2.imwrite(str(tmp_path / 'grey.jpg'), image[..., 0])
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.dstack([image, np.full((50, 70), 128, np.uint8)]))
    cv2.imwrite(str(tmp_path / '16.png'), image.astype(np.uint16) * 257)
    resized = Image.fromarray(image[..., ::-1]).resize((51, 37), Image.BILINEAR)
    expected = np.asarray(resized)[2:34, 10:42]
    for name in 'progressive.jpg', 'grey.jpg', 'alpha.png', '16.png':
        view = photographs.centre_view(tmp_path / name, 32)
        if name == 'grey.jpg':
            assert (view == view[..., :1]).all()
        else:
            most = 6 if name.endswith('jpg') else 1  # JPEG loses some colour
            assert difference(view, expected) < most, name


def test_batches_come_in_order_few_ahead_and_bring_their_errors():
    started = []

    def view(item, out):
        started.append(item)
        out[:] = item

    batches = [list(range(i, i + 20)) for i in range(0, 200, 20)]
    loaded = photographs.load_batches(iter(batches), view, 4, nthread=3, ahead=2)
    for n, (batch, images) in enumerate(loaded):
        assert batch == batches[n] and images.shape == (20, 4, 4, 3)
        assert (images[:, 0, 0, 0] == torch.tensor(batch)).all()
        assert len(started) <= 20 * (n + 4)
    assert sorted(started) == list(range(200))

    def broken(item, out):
        if item == 45:
            raise UserError('45.jpg: broken')

    seen = []
    with pytest.raises(UserError, match='45.jpg'):
        for batch, _ in photographs.load_batches(batches, broken, 4, nthread=2):
            seen.append(batch)
    assert seen == batches[:2]


def test_memory_does_not_grow_over_epochs(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(jpeg_of(photograph(300, 400)))

    def epoch(number):
        def view(i, out):
            photographs.train_view(tmp_path / 'a.jpg', 64, 0, number, i, out)

        for _ in photographs.load_batches([range(32)] * 4, view, 64, nthread=2):
            pass
        return int(re.search(r'VmRSS:\s+(\d+)', Path('/proc/self/status').read_text())[1])

    sizes = [epoch(n) for n in range(8)]
    assert sizes[-1] - sizes[2] < 20_000, sizes  # kB


def test_broken_photographs_are_listed(tmp_path):
    (tmp_path / 'good.jpg').write_bytes(jpeg_of(photograph(30, 30)))
    (tmp_path / 'cut.jpg').write_bytes(jpeg_of(photograph(30, 30))[:-20])
    (tmp_path / 'text.jpg').write_bytes(b'no image')
    files = [str(tmp_path / name) for name in ('good.jpg', 'cut.jpg', 'text.jpg', 'none.jpg')]
    faults = photographs.find_faults(files, 2)
    assert [fault and fault.split(':')[0] for fault in faults] == [None, *files[1:]]
