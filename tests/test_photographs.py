"""support/photographs.py against torchvision's transforms and PIL's decoders."""

import errno
import math
import os
import re
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision import transforms

import data
import imagenet
import images
from programs import ROOT
from samples import make_photographs, records_of, words
from support import photographs, program
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


@pytest.mark.parametrize(
    'size, crop', [((900, 120), (370, 0, 160, 120)), ((120, 900), (0, 370, 120, 160))]
)
def test_a_crop_that_never_fits_becomes_the_centre(size, crop):
    """The largest of ratio 3/4 to 4/3: here ten draws of nearly the whole area fail."""
    assert photographs.random_crop(*size, [0.999] * 22) == crop


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
    for n, (batch, pixels) in enumerate(loaded):
        assert batch == batches[n] and pixels.shape == (20, 4, 4, 3)
        assert (pixels[:, 0, 0, 0] == torch.tensor(batch)).all()
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


# ------------------------ --validate


def opened(root, n, **changes):
    """The sets of --validate n."""
    changes = {'imagenetpath': str(root), 'validate': n} | changes
    return photographs.open_sets(options(**changes), torch.device('cpu'))


def make_uneven(root):
    """Photographs of 12, 8 and 4 training images a class."""
    make_photographs(root, train=12, val=2)
    for name, n in ('city', 8), ('wood', 4):
        for i in range(n, 12):
            (root / 'train' / name / f'{i}.jpg').unlink()
    return root


@pytest.mark.parametrize('n, held_out', [(4, [2, 1, 1]), (6, [3, 2, 1]), (12, [6, 4, 2])])
def test_validate_holds_out_of_each_class_its_share(n, held_out, tmp_path):
    whole, (train, val) = opened(root := make_uneven(tmp_path / 'set'), 0), opened(root, n)
    assert torch.bincount(val.labels).tolist() == held_out and len(val.files) == n
    assert not set(train.files) & set(val.files)
    assert sorted(train.files + val.files) == sorted(whole.train.files)
    for part in train, val:
        assert part.classes == ['beach', 'city', 'wood']
        named = [Path(file).parent.name for file in part.files]
        assert [part.classes[label] for label in part.labels] == named
    assert len(whole.val.files) == 6 and all('/val/' in file for file in whole.val.files)


def test_validate_holds_out_the_same_images_for_any_seed(tmp_path):
    root = make_uneven(tmp_path / 'set')
    first = opened(root, 6, seed=0)
    torch.manual_seed(5), np.random.seed(5)
    for again in opened(root, 6, seed=5), opened(root, 6, image_size=32, nthread=2):
        assert again.val.files == first.val.files and again.train.files == first.train.files
    names = {Path(file).name for file in first.val.files}
    assert names != {f'{i}.jpg' for i in range(3)}, 'they are drawn, not the first of each class'


@pytest.mark.parametrize('n', [1, 2, 22, 24, 100])
def test_validate_must_leave_images_of_each_class_on_both_sides(n, tmp_path):
    with pytest.raises(UserError, match=rf'--validate {n}: each of .* there are 24 images in all'):
        opened(make_uneven(tmp_path / 'set'), n)


def test_a_part_has_the_chosen_photographs_and_counts_its_own_broken_ones(tmp_path):
    files = with_broken(tmp_path, 40, 6)
    whole, _ = loaded(files, options())
    chosen = torch.arange(40) % 4 == 0
    part, rest = whole.part(chosen), whole.part(~chosen)
    assert part.files == whole.files[::4] and part.labels.equal(whole.labels[::4])
    assert len(rest.files) == 30 and part.opt is whole.opt and part.classes == whole.classes
    assert not part.broken and len(whole.broken) == 6
    for _ in part.batches([torch.arange(10)], view):
        pass
    broken = [file for file in files[:6] if file in part.files]
    assert [part.files[i] for i in sorted(part.broken)] == broken and len(whole.broken) == 6


# ------------------------ extreme shapes


@pytest.mark.parametrize(
    'size', [(2, 8000), (8000, 2), (1, 20000), (3, 500), (4, 4), (1, 1), (5, 81)]
)
def test_long_and_tiny_images_are_viewed_in_bounded_memory(size, tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / 'a.png'), photograph(*size))
    made, resize = [], photographs.resize

    def watched(image, size):
        made.append(size[0] * size[1])
        return resize(image, size)

    monkeypatch.setattr(photographs, 'resize', watched)
    for i in range(8):
        for view in photographs.train_view, photographs.plain_train_view:
            assert view(tmp_path / 'a.png', 224, 0, 1, i).shape == (224, 224, 3)
    assert photographs.centre_view(tmp_path / 'a.png', 224).shape == (224, 224, 3)
    assert max(made) <= 256 * 256 * 16


@pytest.mark.parametrize('size', [(20, 4000), (4000, 20), (7, 131), (9, 1000)])
def test_the_crop_of_a_long_image_is_that_of_the_whole_resized(size, tmp_path, monkeypatch):
    """Only what the crop shows is resized; resizing all of it gives the same pixels."""
    cv2.imwrite(str(tmp_path / 'a.png'), photograph(*size))

    def views():
        yield photographs.centre_view(tmp_path / 'a.png', 56)
        for i in range(12):
            yield photographs.plain_train_view(tmp_path / 'a.png', 56, 0, 1, i)

    parts = list(views())
    monkeypatch.setattr(photographs, 'LONGEST', 10**6)
    for part, whole in zip(parts, views()):
        assert difference(part, whole) < 1.5


# ------------------------ broken images


def options(**changes):
    return Namespace(**({'image_size': 64, 'nthread': 1, 'skip_broken': True} | changes))


def view(file, i, out):
    return photographs.centre_view(file, 64, out)


def loaded(images, opt):
    """The sum over an epoch of what the loader yields."""
    cpu = torch.device('cpu')
    part = photographs.Photographs({'a': images[::2], 'b': images[1::2]}, opt, cpu)
    index = torch.arange(len(images)).split(50)
    return part, sum(len(labels) for _, labels in part.batches(index, view))


def with_broken(folder, n, broken):
    """n files, of which the first `broken` lead nowhere. The others are one file."""
    (folder / 'whole.jpg').write_bytes(jpeg_of(photograph(60, 70)))
    for i in range(n):
        (folder / f'{i:05d}.jpg').symlink_to('nowhere' if i < broken else 'whole.jpg')
    return [str(folder / f'{i:05d}.jpg') for i in range(n)]


@pytest.mark.parametrize('n, broken', [(40, 9), (1000, 10)])
def test_some_broken_images_are_replaced(n, broken, tmp_path):
    part, seen = loaded(with_broken(tmp_path, n, broken), options())
    assert seen == n and len(part.broken) == broken
    with pytest.raises(data.BrokenImage, match='cannot be read: No such file.* --skip_broken'):
        loaded(part.files, options(skip_broken=False))


def test_a_broken_image_is_replaced_by_one_of_its_class(tmp_path):
    """Each class has a brightness of its own; the last image of each is broken."""
    folder = {}
    for level, name in (40, 'dark'), (120, 'grey'), (220, 'bright'):
        folder[name] = [str(tmp_path / f'{name}{i}.png') for i in range(3)]
        for file in folder[name][:-1]:
            cv2.imwrite(file, np.full((70, 70, 3), level, np.uint8))
    part = photographs.Photographs(folder, options(), torch.device('cpu'))
    ((images, labels),) = part.batches([torch.arange(9)], view)
    expected = torch.tensor([40, 120, 220])[labels].view(-1, 1, 1, 1)
    assert torch.equal(images.long(), expected.expand(images.shape)) and len(part.broken) == 3


@pytest.mark.parametrize('n, broken', [(40, 10), (1000, 11)])
def test_more_than_one_per_cent_of_broken_images_stop_the_run(n, broken, tmp_path):
    files = with_broken(tmp_path, n, broken)
    with pytest.raises(UserError, match='--check_images') as e:
        loaded(files, options())
    assert e.value.status == 1 and not isinstance(e.value, data.BrokenImage)
    assert f'of the {n} images in {tmp_path} are broken' in str(e.value)


def test_an_image_counts_as_broken_once(tmp_path):
    part, _ = loaded(files := with_broken(tmp_path, 40, 9), options())
    for _ in range(3):
        for _ in part.batches([torch.arange(len(files))], view):
            pass
    assert len(part.broken) == 9


def test_check_images_agrees_with_skip_broken(tmp_path, capsys):
    """Images that are missing, no files, or damaged."""
    files = with_broken(tmp_path, 20, 3)
    os.unlink(files[5]), os.mkfifo(files[5])
    os.unlink(files[6])
    Path(files[7]).unlink(), Path(files[7]).write_bytes(jpeg_of(photograph(60, 70))[:-50])
    broken = [0, 1, 2, 5, 6, 7]
    faults = photographs.find_faults(files, 1)
    assert [i for i, fault in enumerate(faults) if fault] == broken
    part, _ = loaded(files, options())
    places = [files.index(part.files[i]) for i in part.broken]
    assert sorted(places) == broken
    sets = photographs.Sets(part, part)
    with pytest.raises(UserError, match='12 images are broken'):
        photographs.check_images(sets, options(skip_broken=False))
    assert capsys.readouterr().err.count('cannot be read') == 10
    photographs.check_images(sets, options())


@pytest.mark.parametrize('code', [errno.EIO, errno.EMFILE])
def test_a_failing_disk_stops_even_with_skip_broken(code, tmp_path, monkeypatch):
    files = with_broken(tmp_path, 20, 0)
    read = data.read_image

    def fail(file):
        if file == files[7]:
            raise images.unreadable(file, OSError(code, os.strerror(code)))
        return read(file)

    monkeypatch.setattr(data, 'read_image', fail)
    for run in (lambda: loaded(files, options())), (lambda: photographs.find_faults(files, 1)):
        with pytest.raises(UserError, match=os.strerror(code)) as e:
            run()
        assert e.value.status == 1 and files[7] in str(e.value)


def test_decoders_are_silent_while_photographs_are_loaded(tmp_path, capfd):
    """libpng warns of a colour profile, libjpeg of bytes that it passes over."""
    png = cv2.imencode('.png', photograph(60, 70))[1].tobytes()
    body = b'iCCPx\0\0' + zlib.compress(b'no profile')
    crc = zlib.crc32(body).to_bytes(4, 'big')
    (tmp_path / '0.png').write_bytes(
        png[:33] + (len(body) - 4).to_bytes(4, 'big') + body + crc + png[33:]
    )
    jpeg = jpeg_of(photograph(60, 70))
    (tmp_path / '1.jpg').write_bytes(jpeg[:-2] + b'extraneous' + jpeg[-2:])
    files = [str(tmp_path / name) for name in ('0.png', '1.jpg')]
    for file in files:
        photographs.centre_view(file, 64)
    said = capfd.readouterr().err
    assert 'libpng' in said and 'JPEG' in said, 'otherwise nothing is tested'
    assert loaded(files, options())[1] == 2 and photographs.find_faults(files, 1) == [None] * 2
    assert capfd.readouterr().err == ''
    os.write(2, b'after')
    assert capfd.readouterr().err == 'after'


def test_a_bug_while_photographs_are_loaded_keeps_its_traceback(tmp_path):
    """The loader is not closed before the program ends."""
    script = tmp_path / 'script.py'
    script.write_text(
        f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
        'from support import photographs, program\n'
        'def main(argv):\n'
        '    batches = photographs.load_batches([[1]] * 9, lambda *_: None, 4, 1)\n'
        '    for _ in batches:\n'
        '        raise KeyError("a bug")\n'
        'program.call_main(main)\n'
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "KeyError: 'a bug'" in done.stderr, done
    assert done.stderr.startswith('Traceback')


def test_photographs_of_any_name_are_trained_on(tmp_path, capfd):
    """Names in Latin-1, with control characters, and as long as a disk allows, of files and of
    classes. The log can be read again."""
    root = make_photographs(tmp_path / 'set', train=4, val=2)
    names = [b'caf\xe9', b'new\nline\x1b[2J', b'n' * 250]
    for split in b'train', b'val':
        folder = os.fsencode(root) + b'/' + split
        for old, new in zip((b'beach', b'city', b'wood'), names):
            os.rename(folder + b'/' + old + b'/1.jpg', folder + b'/' + old + b'/' + new + b'.jpg')
            os.rename(folder + b'/' + old, folder + b'/' + new)
    argv = words('--epochs 1 --image_size 64 --batch_size 6 --width 0.125 --nthread 1')
    argv += ['--imagenetpath', str(root), '--save', str(tmp_path / 'run')]
    assert program.call_main(imagenet.main, argv) == 0
    assert sorted(map(os.fsencode, records_of(tmp_path / 'run')[0]['classes'])) == sorted(names)
    assert program.call_main(imagenet.main, [*argv[2:], '--epochs', '2', '--resume']) == 0
    assert len(records_of(tmp_path / 'run')) == 2
    printed = capfd.readouterr()
    assert '\x1b' not in printed.out + printed.err and 'Traceback' not in printed.err
