"""Small images: sets in memory as uint8, decoding, augmentation of whole batches, seeds.

images.py finds and reads image files. support/photographs.py loads photographs, with the
decoding and the seeds of this file.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

# BrokenImage and is_cut_off are for those who know them as data.BrokenImage and data.is_cut_off.
from images import BrokenImage, decode_bgr, is_cut_off, read_image, scan_folder  # noqa: F401
from support.program import Output, UserError

# CIFAR-10's mean and standard deviation of a byte, as published; used for all small images.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)
# ImageNet's: .485 .456 .406 and .229 .224 .225 of 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 [N, H, W, 3], RGB
    labels: torch.Tensor  # int64 [N]
    classes: list  # names, in the order of the labels

    def to(self, device):
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


# ------------------------ sets


def open_sets(dataset: str, dataroot, nthread: int = 0) -> tuple[list, Callable]:
    """(class names, load), where load() -> (train, test) ImageSets. Checks at once what needs no
    decoding.

    dataset  CIFAR10 or CIFAR100: torchvision's files in dataroot, downloaded if missing
             folder: dataroot/train/CLASS/* and dataroot/test/CLASS/* (or val)
             shapes: drawn here
    nthread  decoding threads, 0: one a core

    Raises UserError that names the file or folder.
    """
    if dataset == 'shapes':
        return SHAPES, lambda: (draw_shapes(SHAPES_TRAIN, seed=0), draw_shapes(SHAPES_TEST, seed=1))
    if dataset == 'folder':
        train, test = scan_folder(dataroot)
        return list(train), lambda: decode_sets(train, test, nthread)
    sets = [torchvision_set(dataset, dataroot, train) for train in (True, False)]
    return sets[0].classes, lambda: sets


def torchvision_set(dataset, dataroot, train):
    import torchvision

    kind = getattr(torchvision.datasets, dataset)
    root = Path(dataroot).absolute()
    missing = [p for p in (root, *root.parents) if not os.path.exists(p)]
    bar = contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO())
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)  # some networks drop packets without an answer
        with bar:
            raw = kind(root, train=train, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as e:
        # torchvision creates folders before it knows whether it can fetch anything.
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise _cifar_error(kind, root, e) from e
    finally:
        socket.setdefaulttimeout(timeout)
    images = torch.from_numpy(np.ascontiguousarray(raw.data))
    return ImageSet(images, torch.tensor(raw.targets), list(raw.classes))


def _cifar_error(kind, root, error) -> UserError:
    """Why torchvision could not load a CIFAR: what its archive or unpacked folder in `root` is."""
    from torchvision.datasets.utils import check_integrity

    archive, unpacked = root / kind.filename, root / kind.base_folder
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    reason = reason.splitlines()[0]
    other = 'or use --dataset folder | shapes'
    fetched = f'could not be downloaded ({reason})'
    try:
        whole, size = check_integrity(archive, kind.tgz_md5), os.path.getsize(archive)
    except FileNotFoundError:
        is_not = f'{kind.__name__} is not in {root}'
        if os.path.isdir(unpacked):
            is_not = f'{kind.__name__}: {unpacked} is incomplete or damaged'
        if root.name == kind.base_folder:
            is_not = f'{is_not} (perhaps in {root.parent})'
        return UserError(f'{is_not}, and {fetched}: put {archive.name} in {root}, {other}')
    except NotADirectoryError:
        return UserError(f'--dataroot {root}: is not a folder; give the one that holds it, {other}')
    except OSError as e:
        return UserError(f'{archive}: cannot be read: {e.strerror}; make it readable, {other}')
    if whole:
        return UserError(
            f'{archive}: is complete, but cannot be unpacked in {root} ({reason}); '
            f'unpack it in a writable folder, and give that as --dataroot, {other}',
            status=1,
        )
    return UserError(
        f'{archive}: is truncated or damaged ({size:,} bytes, wrong checksum), '
        f'and {fetched}: put the complete {archive.name} in {root}, {other}'
    )


def hold_out(train: ImageSet, n: int) -> tuple[ImageSet, ImageSet]:
    """(the rest, n held-out images) of a training set: stratified, always the same images.

    For choosing constants without the test set.
    """
    out = held_out(train.labels, len(train.classes), n)
    parts = [ImageSet(train.images[i], train.labels[i], train.classes) for i in (~out, out)]
    return parts[0], parts[1]


def held_out(labels: torch.Tensor, num_classes: int, n: int) -> torch.Tensor:
    """bool [images]: the n images that --validate holds out, as many of each class as is its share.

    Raises UserError unless every class keeps an image on both sides.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    exact = counts.double() * n / len(labels)
    share = exact.floor().long()
    share[(exact - share).argsort(descending=True, stable=True)[: n - int(share.sum())]] += 1
    if share.min() < 1 or (counts - share).min() < 1:
        raise UserError(
            f'--validate {n}: each of the {num_classes} classes needs a held-out image and a '
            f'training image, and there are {len(labels)} images in all'
        )
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(len(share)):
        out[shuffled[labels[shuffled] == c][: share[c]]] = True
    return out


# ------------------------ folders of images


def decode_sets(train, test, nthread=0):
    files = [f for split in (train, test) for fs in split.values() for f in fs]
    images = decode_all(files, nthread)
    size = Counter(i.shape for i in images).most_common(1)[0][0]
    for file, image in zip(files, images):
        if image.shape != size:
            raise UserError(
                f'{file}: is {image.shape[1]}x{image.shape[0]}, '
                f'most images are {size[1]}x{size[0]}; '
                'all must have the same size (imagenet.py accepts photographs of any size)'
            )
    sets, start = [], 0
    for split in train, test:
        labels = torch.tensor([c for c, fs in enumerate(split.values()) for _ in fs])
        stack = torch.from_numpy(np.stack(images[start : start + len(labels)]))
        sets.append(ImageSet(stack, labels, list(split)))
        start += len(labels)
    return sets


def decode_all(files, nthread=0) -> list:
    """uint8 [H, W, 3] RGB arrays of image files. Raises UserError that names the first broken
    file."""
    return in_threads(decode, files, 'decoding', nthread, chunk=256)


def in_threads(work, items, doing: str, nthread=0, chunk=1) -> list:
    """[work(item) for item in items] on nthread threads (0: one a core), with a progress bar.

    A thread takes `chunk` items at a time. The first exception is raised here and cancels the
    chunks that have not started.
    """
    chunks = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    results = []
    with (
        quiet_decoders() as stderr,
        ThreadPoolExecutor(nthread or cores()) as pool,
        Progress(len(items), doing, file=stderr) as bar,
    ):
        try:
            for done in pool.map(lambda part: [work(item) for item in part], chunks):
                results += done
                bar.update(len(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


class Progress:
    """How many of the images are done: a bar on a terminal, else a line every few minutes.

    images: of all; doing: what is done with them; done: images so far; hidden: print nothing.
    """

    SILENCE = 240  # seconds; with one step more, a line comes at least every 5 minutes
    last_line = time.monotonic()  # when one was printed, by any loop

    def __init__(self, images: int, doing: str, done: int = 0, hidden: bool = False, file=None):
        self.images, self.doing, self.done, self.hidden = images, doing, done, hidden
        self.bar = tqdm(
            total=images,
            desc=doing,
            unit=' images',
            leave=False,
            initial=done,
            disable=hidden or None,  # None: unless it is a terminal
            file=file or _Stderr(),  # quiet_decoders changes sys.stderr while a bar is shown
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def is_due(self) -> bool:
        """Whether update will print a line."""
        silence = time.monotonic() - Progress.last_line
        return self.bar.disable and not self.hidden and silence > self.SILENCE

    def update(self, images: int, note: str = '') -> None:
        """Count images. note: the loss, the time left, or whatever else is of interest."""
        self.done += images
        self.bar.update(images)
        if note:
            self.bar.set_postfix_str(note)
        if self.is_due():
            Progress.last_line = time.monotonic()
            share = f'{100 * self.done / max(1, self.images):.0f} % of {self.images:,} images'
            print(', '.join([f'{self.doing}: {share}', *[note] * bool(note)]), flush=True)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def decode(file) -> np.ndarray:
    """uint8 [H, W, 3] RGB of an image file, rotated by its EXIF orientation. Raises UserError if it
    is broken or cut off."""
    return cv2.cvtColor(decode_bgr(file, read_image(file)), cv2.COLOR_BGR2RGB)


class _Quiet:
    """The state of quiet_decoders, which may be entered again before it is left."""

    lock, depth = threading.Lock(), 0


@contextlib.contextmanager
def quiet_decoders():
    """Silence what image libraries write to file descriptor 2. Yields a stream that still reaches
    the terminal; sys.stderr is that stream in the meantime."""
    with _Quiet.lock:
        if _Quiet.depth == 0:
            sys.stderr.flush()
            _Quiet.stderr = stderr = _copy_of_stderr()
            _Quiet.before = sys.stderr, sys.excepthook
            with open(os.devnull, 'w') as null:
                os.dup2(null.fileno(), 2)
            sys.stderr, sys.excepthook = stderr, _loud_excepthook
        _Quiet.depth += 1
    try:
        yield _Quiet.stderr
    finally:
        with _Quiet.lock:
            _Quiet.depth -= 1
            if _Quiet.depth == 0:
                sys.stderr, sys.excepthook = _Quiet.before
                os.dup2(_Quiet.stderr.fileno(), 2)
                _Quiet.stderr.close()


def _loud_excepthook(*error):
    # A traceback keeps a generator alive, and with it the silence.
    os.dup2(_Quiet.stderr.fileno(), 2)
    _Quiet.before[1](*error)


def _copy_of_stderr():
    # As Python opens stderr: each line is written at once, and a name of any bytes can be.
    copy = os.fdopen(os.dup(2), 'w', buffering=1, errors='backslashreplace')
    return Output(copy)


class _Stderr:
    """sys.stderr, whatever stream that is at the moment."""

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


# ------------------------ chance


@functools.lru_cache(64)
def seed_of(*what) -> int:
    """A 63-bit seed for one purpose, such as seed_of(0, 'order', 3). Different arguments give
    independent draws."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], 'little') >> 1


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of n samples in an epoch: int64 [n]."""
    return torch.from_numpy(np.random.default_rng(seed_of(seed, 'order', epoch)).permutation(n))


def crop_and_flip(n: int, seed: int, epoch: int, pad: int) -> torch.Tensor:
    """int64 [n, 3]: for each sample of an epoch the crop's offset down and right, uniform in 0 ..
    2 pad, and whether it is flipped. Row i is a function of (seed, epoch, i) alone."""
    key = np.uint64(seed_of(seed, 'crop and flip', epoch))
    samples, columns = _mix(np.arange(n, dtype=np.uint64) + key), []
    for j, choices in enumerate((2 * pad + 1, 2 * pad + 1, 2)):
        draws = _mix(samples + np.uint64(j)) >> np.uint64(33)
        columns.append((draws * np.uint64(choices)) >> np.uint64(31))
    return torch.from_numpy(np.stack(columns, 1).astype(np.int64))


def uniforms(count: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """float64 [count] in [0, 1): the draws of photograph `index` in an epoch, a function of
    (seed, epoch, index) alone."""
    key = np.uint64(seed_of(seed, 'photographs', epoch))
    sample = _mix(np.full(1, index, np.uint64) + key)
    return (_mix(sample + np.arange(count, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def _mix(x):
    """The finaliser of splitmix64, of uint64 arrays: each bit of it depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------ batches, on the training device


def augment(
    images: torch.Tensor, index: torch.Tensor, draws: torch.Tensor, pad: int
) -> torch.Tensor:
    """Reflect-pad, crop and flip images[index]: uint8 [N, H, W, 3] -> [B, H, W, 3], on the device
    of the images.

    draws: int64 [B, 3], rows of crop_and_flip. No padded copy is made: each output pixel is read
    from the position that reflection (without repeating the border) gives.
    """
    _, H, W, _ = images.shape
    rows = _reflect(torch.arange(H, device=images.device) + draws[:, 0:1] - pad, H)
    columns = torch.arange(W, device=images.device)
    columns = torch.where(draws[:, 2:3] == 1, W - 1 - columns, columns)
    columns = _reflect(columns + draws[:, 1:2] - pad, W)
    flat = (index.view(-1, 1, 1) * H + rows.unsqueeze(2)) * W + columns.unsqueeze(1)
    return images.view(-1, 3)[flat]


def _reflect(i, n):
    return n - 1 - (n - 1 - i.abs()).abs()


def normalize(batch: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """(batch - mean) / std: uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in channels_last memory.
    mean and std are those of a byte, 0 to 255."""
    # Python numbers, because copying tensors to a GPU would wait for it in each step.
    channels = [(batch[..., c] - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels, -1).permute(0, 3, 1, 2)


# ------------------------ shapes: a set that is drawn, not loaded


def shape_polygons():
    """{class: [(255 to fill or 0 to cut out, points in the unit disc)]}"""

    def regular(n, radius=1.0, start=0.0):
        t = start + 2 * math.pi * np.arange(n) / n
        return radius * np.stack([np.sin(t), -np.cos(t)], 1)

    bar = np.array([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)])
    diagonal = bar @ (np.array([[1, 1], [-1, 1]]) / math.sqrt(2))
    star = np.stack([regular(5), regular(5, 0.4, math.pi / 5)], 1).reshape(-1, 2)
    arrow = np.array([(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)])
    return {
        'disc': [(255, regular(40, 0.9))],
        'ring': [(255, regular(40, 0.9)), (0, regular(40, 0.5))],
        'square': [(255, regular(4, start=math.pi / 4))],
        'frame': [(255, regular(4, start=math.pi / 4)), (0, regular(4, 0.55, math.pi / 4))],
        'triangle': [(255, regular(3))],
        'diamond': [(255, regular(4))],
        'cross': [(255, diagonal), (255, diagonal[:, ::-1] * (1, -1))],
        'plus': [(255, bar), (255, bar[:, ::-1])],
        'star': [(255, star)],
        'arrow': [(255, arrow)],
    }


POLYGONS = shape_polygons()
SHAPES = list(POLYGONS)
SHAPES_TRAIN, SHAPES_TEST = 1000, 1000


def draw_shapes(n: int, seed: int) -> ImageSet:
    """n images of 32x32 pixels, of ten classes in turn: one small bright shape, which gives the
    class, and grey shapes of any class on a textured ground. A flip does not change the class."""
    rng = np.random.default_rng(seed)
    images = np.stack([_draw_shape(i % len(SHAPES), rng) for i in range(n)])
    return ImageSet(torch.from_numpy(images), torch.arange(n) % len(SHAPES), SHAPES)


def _draw_shape(label, rng, size=32, others=5):
    coarse = rng.uniform(40, 215, (8, 8, 1)) + rng.uniform(-40, 40, (8, 8, 3))
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 8, (size, size, 1))
    for _ in range(others):
        _paint(image, rng.integers(len(SHAPES)), np.full(3, rng.uniform(0, 255)), rng)
    hue = rng.uniform(0, 6) + np.array([0, 2, 4])  # of 6, for red, green, blue
    _paint(image, label, 255 * (np.abs(hue % 6 - 3) - 1).clip(0, 1), rng)
    return image.clip(0, 255).astype(np.uint8)


def _paint(image, label, colour, rng):
    """Paint a shape of that class somewhere into the image, with smooth edges."""
    radius, angle = rng.uniform(3.5, 5), rng.uniform(-0.2, 0.2)
    centre = rng.uniform(radius + 1, len(image) - radius - 1, 2)
    c, s = math.cos(angle), math.sin(angle)
    turn = radius * np.array([[c, s], [-s, c]])
    mask = np.zeros(image.shape[:2], np.uint8)
    for value, polygon in POLYGONS[SHAPES[label]]:
        points = np.rint((centre + polygon @ turn) * 256).astype(np.int32)
        cv2.fillPoly(mask, [points], value, cv2.LINE_AA, shift=8)
    x, y, w, h = cv2.boundingRect(mask)
    painted = image[y : y + h, x : x + w]
    painted += (mask[y : y + h, x : x + w] / 255)[..., None] * (colour - painted)
