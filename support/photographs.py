"""Photographs: finding, decoding, cropping, resizing and loading them."""

import contextlib
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import data
from images import is_frame, jpeg_segments
from support import ranks
from support.program import UserError

# ------------------------ folders


MOST_BROKEN = 0.01  # of the images of a set
FEW_BROKEN = 10  # do not tell a failing disk from a few bad files


def scan_photographs(root, option='--imagenetpath', say=print) -> tuple[dict, dict]:
    """data.scan_folder of root/train and root/val (as ImageNet has it) or root/test."""
    return data.scan_folder(root, option, ('val', 'test'), say)


def find_faults(files, nthread=0) -> list:
    """The fault of each image file, None if it can be decoded. Raises UserError, status 1, if the
    disk fails."""

    def fault(file):
        try:
            data.decode(file)
        except data.BrokenImage as e:
            return str(e)

    return data.in_threads(fault, files, 'checking', nthread)


class Photographs:
    """The photographs of a train or val folder, decoded when they are needed.

    folder  {class: [files]}
    opt     image_size, nthread and skip_broken, as imagenet.py has them
    device  receives the batches
    """

    def __init__(self, folder: dict, opt, device):
        self.files = [file for files in folder.values() for file in files]
        self.labels = torch.tensor([c for c, files in enumerate(folder.values()) for _ in files])
        self.classes = list(folder)
        self.opt, self.device = opt, device
        self.broken = set()  # indices of the images that --skip_broken has replaced

    def part(self, chosen: torch.Tensor) -> 'Photographs':
        """The photographs for which `chosen`, bool [images], is True."""
        folder = {name: [] for name in self.classes}
        for i in chosen.nonzero()[:, 0].tolist():
            folder[self.classes[self.labels[i]]].append(self.files[i])
        return Photographs(folder, self.opt, self.device)

    def batches(self, batches, view):
        """Yield (images, labels) on the device for each index tensor of `batches`.

        view(file, i, out) fills `out`, uint8 [image_size, image_size, 3], with sample i. Raises
        data.BrokenImage, or with --skip_broken takes the next image of the class instead. Close the
        generator: what decoders print is silenced until then.
        """

        def view_or_next(i, out):
            i = int(i)
            try:
                return view(self.files[i], i, out)
            except data.BrokenImage as e:
                if not self.opt.skip_broken:
                    raise data.BrokenImage(
                        f'{e}. imagenet.py lists all broken images with --check_images, '
                        'and replaces them with --skip_broken'
                    ) from e
            self.broken.add(i)
            self.check_broken(self.broken)
            same = (self.labels == self.labels[i]).nonzero()[:, 0].tolist()
            for j in same[same.index(i) + 1 :] + same[: same.index(i)]:
                with contextlib.suppress(data.BrokenImage):
                    return view(self.files[j], i, out)
            raise UserError(
                f'--skip_broken: every image of {os.path.dirname(self.files[i])} is broken'
            )

        size, nthread, pin = self.opt.image_size, self.opt.nthread, self.device.type == 'cuda'
        loaded = load_batches(batches, view_or_next, size, nthread, pin=pin)
        return _on_device(loaded, self.labels, self.device)

    def check_broken(self, broken) -> None:
        """Raise UserError, status 1, if so many images of the set are broken that the disk may be
        failing."""
        if len(broken) >= FEW_BROKEN and len(broken) > MOST_BROKEN * len(self.files):
            folder = os.path.commonpath([self.files[0], self.files[-1]])
            raise UserError(
                f'{len(broken)} of the {len(self.files)} images in {folder} are broken, more than '
                f'{MOST_BROKEN:.0%}: is the disk failing? --check_images lists them; '
                'repair or remove them',
                status=1,
            )


def _on_device(loaded, labels: torch.Tensor, device):
    """Yield (images, labels) of each loaded batch on the device. On a GPU, the copy of the next
    batch runs during the step."""
    with contextlib.closing(loaded):
        if device.type != 'cuda':
            for index, images in loaded:
                yield images.to(device), labels[index].to(device)
            return
        stream, ready = torch.cuda.Stream(device), None
        for index, images in loaded:
            with torch.cuda.stream(stream):
                targets = labels[index].pin_memory()
                batch = [v.to(device, non_blocking=True) for v in (images, targets)]
            if ready is not None:
                yield ready
            torch.cuda.current_stream(device).wait_stream(stream)
            for v in batch:
                v.record_stream(torch.cuda.current_stream(device))
            ready = batch
        if ready is not None:
            yield ready


class Sets(NamedTuple):
    """The photographs of a run."""

    train: Photographs
    val: Photographs


def open_sets(opt, device, option='--imagenetpath') -> Sets:
    """The training and validation photographs of --imagenetpath, or as a program calls it; with
    --validate both are parts of the training set. Raises UserError as data.scan_folder and
    data.held_out do."""
    folders = scan_photographs(opt.imagenetpath, option, ranks.print_first)
    sets = Sets(*(Photographs(folder, opt, device) for folder in folders))
    if opt.validate:
        out = data.held_out(sets.train.labels, len(sets.train.classes), opt.validate)
        sets = Sets(sets.train.part(~out), sets.train.part(out))
    return sets


def check_images(sets: Sets, opt) -> None:
    """--check_images: decode every image once, shared by all ranks, and print the faults. Raises
    UserError if there are any, without --skip_broken; with it, if there are too many."""
    broken = 0
    for part in sets:
        files = part.files[ranks.rank() :: ranks.world_size()]
        faults = ranks.all_or_none(find_faults, files, opt.nthread)
        faults = ranks.all_gather_list([fault for fault in faults if fault])
        for line in faults:
            ranks.print_first(line, sys.stderr)
        broken += len(faults)
        if opt.skip_broken:
            ranks.all_or_none(part.check_broken, faults)
    if broken and not opt.skip_broken:
        found = f'--check_images: {broken} images are broken (listed above)'
        ranks.end_all(UserError(f'{found}; repair or remove them, or give --skip_broken'), status=2)


def broken_images(sets: Sets) -> list[list[int]]:
    """For each set the indices of the images that --skip_broken has replaced, on any rank. Raises
    UserError, status 1, if there are too many."""
    broken = [sorted(set(ranks.all_gather_list(part.broken))) for part in sets]
    for part, indices in zip(sets, broken):
        ranks.all_or_none(part.check_broken, indices)
    return broken


# ------------------------ one photograph


def jpeg_size(raw: bytes):
    """(height, width) of a JPEG after its EXIF rotation; None if its header has no size."""
    if raw[:2] != b'\xff\xd8':
        return None
    turned = False
    for marker, at in jpeg_segments(raw):
        if marker == 0xE1 and raw[at : at + 6] == b'Exif\0\0':
            turned = exif_orientation(raw[at + 6 : at + 6 + 65536]) >= 5
        elif is_frame(marker):
            height, width = (int.from_bytes(raw[at + i : at + i + 2], 'big') for i in (1, 3))
            return ((width, height) if turned else (height, width)) if height and width else None
        elif marker == 0xDA:
            break
    return None


def exif_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 if it has none."""
    order = {b'II': 'little', b'MM': 'big'}.get(tiff[:2])
    if order is None:
        return 1
    start = int.from_bytes(tiff[4:8], order)
    for i in range(int.from_bytes(tiff[start : start + 2], order)):
        entry = tiff[start + 2 + 12 * i : start + 14 + 12 * i]
        if int.from_bytes(entry[:2], order) == 0x0112:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_crop(height: int, width: int, u) -> Box:
    """The crop of torchvision's RandomResizedCrop, drawn from 22 numbers u in
    [0, 1): 8 to 100 % of the area, ratio 3/4 to 4/3."""
    for i in range(10):
        area = height * width * (0.08 + 0.92 * u[2 * i])
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode_part(file, box, size: tuple[int, int]) -> np.ndarray:
    """uint8 BGR: the part of an image file that box(height, width) -> Box chooses, to be resized
    to about `size`.

    A JPEG is decoded at a half, a quarter or an eighth if the part then still has `size` pixels.
    Raises UserError as data.decode does.
    """
    raw = data.read_image(file)
    shape, image = jpeg_size(raw), None
    if shape is None:
        image = data.decode_bgr(file, raw)
        shape = image.shape[:2]
    top, left, height, width = box(*shape)
    if image is None:
        fits = [k for k in REDUCED if height >= k * size[0] and width >= k * size[1]]
        image = data.decode_bgr(file, raw, REDUCED[fits[-1]] if fits else cv2.IMREAD_COLOR)
    # The scale of the decoded image: 1, or about 1/2, 1/4 or 1/8.
    scale_y, scale_x = image.shape[0] / shape[0], image.shape[1] / shape[1]
    top, bottom = round(top * scale_y), round((top + height) * scale_y)
    left, right = round(left * scale_x), round((left + width) * scale_x)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] resized to (height, width), bilinear and antialiased as in PIL, so that a net
    sees the same pixels whatever loads its images. OpenCV's own antialiasing takes twice as long.
    """
    if image.shape[:2] == size:
        return image
    if image.shape[0] <= size[0] and image.shape[1] <= size[1]:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    # Channels_last with all strides, or torch makes [3, H, W], which is slow to flip and to copy.
    x = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(x, size, mode='bilinear', antialias=True)[0].permute(1, 2, 0).numpy()


def train_view(file, size: int, seed: int, epoch: int, index: int, out=None) -> np.ndarray:
    """uint8 [size, size, 3] RGB: random resized crop and flip of photograph `index`, a function of
    (seed, epoch, index)."""
    u = data.uniforms(23, seed, epoch, index)
    image = resize(decode_part(file, lambda h, w: random_crop(h, w, u), (size, size)), (size, size))
    image = cv2.flip(image, 1) if u[22] < 0.5 else image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


def plain_train_view(file, size: int, seed: int, epoch: int, index: int, out=None) -> np.ndarray:
    """uint8 [size, size, 3] RGB: random crop and flip of photograph `index`, its shorter side
    resized to size * 256 / 224 (section 4.2 of the paper); a function of (seed, epoch, index)."""
    u = data.uniforms(3, seed, epoch, index)
    image = scaled_crop(file, size, lambda i, rest: int(u[i] * (rest + 1)))
    image = cv2.flip(image, 1) if u[2] < 0.5 else image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


def centre_view(file, size: int, out=None) -> np.ndarray:
    """uint8 [size, size, 3] RGB: the centre of a photograph, its shorter side resized to
    size * 256 / 224, as published."""
    image = scaled_crop(file, size, lambda i, rest: round(rest / 2))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


LONGEST = 16  # times the shorter side; a longer image is resized only around the crop


def scaled_crop(file, size: int, place) -> np.ndarray:
    """uint8 [size, size, 3] BGR: a crop of a photograph, its shorter side resized to
    size * 256 / 224.

    place(i, rest): the crop's offset, 0 to rest, along axis i. Raises UserError as data.decode
    does.
    """
    shorter = round(size * 256 / 224)
    image = decode_part(file, lambda h, w: Box(0, 0, h, w), (shorter, shorter))
    sides = image.shape[:2]
    scaled = [max(shorter, shorter * side // min(sides)) for side in sides]
    offsets = [place(i, side - size) for i, side in enumerate(scaled)]
    for i, (side, new) in enumerate(zip(sides, scaled)):
        if new > LONGEST * shorter:
            # Whole steps of the shorter side, which is resized to a whole number of pixels.
            first, last = max(0, offsets[i] // shorter - 1), offsets[i] // shorter + 4
            ends = last * min(sides), last * shorter
            end, new_end = ends if ends[0] < side else (side, new)
            image = image.take(range(first * min(sides), end), axis=i)
            scaled[i], offsets[i] = new_end - first * shorter, offsets[i] - first * shorter
    top, left = offsets
    return resize(image, tuple(scaled))[top : top + size, left : left + size]


def load_batches(
    batches, view, image_size: int, nthread: int = 0, ahead: int = 3, pin: bool = False
):
    """Yield (batch, uint8 [B, image_size, image_size, 3]) for each of `batches`, in their order.

    batches  iterable of sequences; view(item, out) fills `out`, uint8 [image_size, image_size, 3]
    nthread  decoding threads, 0: one a core. OpenCV decodes outside of Python's lock, so processes
             would gain nothing
    ahead    number of batches that are decoded in advance; bounds the memory
    pin      use pinned memory, from which a copy to a GPU runs in parallel with its work

    Raises what a view raises.
    """
    cv2.setNumThreads(1)  # our own threads decode one image each
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are ours to report
    pool, waiting = ThreadPoolExecutor(nthread or data.cores()), deque()

    def work(items, out):
        for item, o in zip(items, out):
            view(item, o)

    def start(batch):
        size = len(batch), image_size, image_size, 3
        images = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        array, parts = images.numpy(), range(0, len(batch), 8)
        jobs = [pool.submit(work, batch[i : i + 8], array[i : i + 8]) for i in parts]
        waiting.append((batch, images, jobs))

    def finish():
        batch, images, jobs = waiting.popleft()
        for job in jobs:
            job.result()
        return batch, images

    with data.quiet_decoders():
        try:
            for batch in batches:
                start(batch)
                if len(waiting) > ahead:
                    yield finish()
            while waiting:
                yield finish()
        finally:
            pool.shutdown(cancel_futures=True)
