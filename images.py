"""Image files and folders of them: which files are images, reading and decoding one.

data.py makes sets of them, support/photographs.py crops photographs.
"""

import errno
import os
import re
import unicodedata
from pathlib import Path

import cv2
import numpy as np

from support.program import (
    UserError,
    check_reachable,
    listing,
    open_regular,
    printable,
    warn_once,
)

MOST_PIXELS = 200_000_000  # a decoder takes 3 to 6 bytes for each
MOST_BYTES = 2**31 - 1  # what OpenCV can decode

# Errors that concern one file. Others, such as EIO and EMFILE, concern the disk or the machine.
ONE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENAMETOOLONG,
}


class BrokenImage(UserError):
    """An image file that cannot be opened or decoded."""


# ------------------------ reading


def read_image(file) -> bytes:
    """The bytes of an image file.

    Raises BrokenImage if it cannot be opened, is cut off, is too large, or holds floats. Raises
    UserError, status 1, if the disk fails or the folder is gone.
    """
    try:
        with open_regular(file) as f:
            if (size := os.fstat(f.fileno()).st_size) > MOST_BYTES:
                raise BrokenImage(f'{file}: broken image ({size:,} bytes: at most 2 GB)')
            raw = f.read()
    except OSError as e:
        raise unreadable(file, e) from e
    width, height = image_size(raw) or (0, 0)
    if width * height > MOST_PIXELS:
        raise BrokenImage(f'{file}: broken image ({width}x{height} pixels: at most 200 megapixels)')
    if kind := float_kind(raw):
        raise BrokenImage(f'{file}: broken image (float {kind}: convert it to 8 or 16 bits)')
    if is_cut_off(raw):
        raise BrokenImage(f'{file}: broken image (truncated)')
    return raw


def unreadable(file, error: OSError) -> UserError:
    """The error for an image file that cannot be read: BrokenImage, or status 1 if more than this
    file is concerned."""
    folder = os.path.dirname(os.path.abspath(file))
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir(folder):
        return UserError(f'{file}: cannot be read: its folder is gone', status=1)
    message = f'{file}: cannot be read: {error.strerror or error}'
    return BrokenImage(message) if error.errno in ONE_FILE else UserError(message, status=1)


# ------------------------ kinds

# First bytes of what OpenCV reads: JPEG, PNG, WebP, BMP, TIFF, GIF, PNM, PAM, PFM, JPEG 2000, AVIF,
# Radiance, Sun raster. BMP and PNM need more than two letters, which a text may begin with.
SIGNATURE = re.compile(
    rb'\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0'
    rb'|II[*+]\0|MM\0[*+]|GIF8[79]a|P[1-6Ff]\s+[#\d]|P7\s+[#A-Z]'
    rb'|\0\0\0\x0cjP  |\xff\x4f\xff\x51|.{4}ftypavi[fs]|#\?R(?:ADIANCE|GBE)\n|\x59\xa6\x6a\x95',
    re.DOTALL,
)


def begins_as_image(file) -> bool:
    """Whether the first bytes of a file are those of an image. Raises OSError."""
    with open_regular(file) as f:
        return SIGNATURE.match(f.read(64)) is not None


def float_kind(raw: bytes) -> str:
    """'TIFF' or 'PFM' if the samples are floats, which have no range to scale by; else ''."""
    if raw[:2] in (b'II', b'MM') and tiff_tags(raw).get(339) == 3:  # SampleFormat
        return 'TIFF'
    return 'PFM' if re.match(rb'P[Ff]\s', raw) else ''


# ------------------------ sizes


def image_size(raw: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of an image, not turned; None if it has none that we know."""

    def number(start, size, order):
        return int.from_bytes(raw[start : start + size], order)

    if raw[:2] == b'\xff\xd8':
        frame = jpeg_frame(raw)
        return frame and (number(frame + 3, 2, 'big'), number(frame + 1, 2, 'big'))
    if raw[:8] == b'\x89PNG\r\n\x1a\n':
        return number(16, 4, 'big'), number(20, 4, 'big')
    if raw[:4] == b'RIFF':
        return _webp_size(raw, number)
    if raw[:2] == b'BM':
        if number(14, 4, 'little') == 12:
            return number(18, 2, 'little'), number(20, 2, 'little')
        # A negative height means that the rows run down.
        height = int.from_bytes(raw[22:26], 'little', signed=True)
        return number(18, 4, 'little'), abs(height)
    if raw[:3] == b'GIF':
        return number(6, 2, 'little'), number(8, 2, 'little')
    if raw[:2] in (b'II', b'MM'):
        tags = tiff_tags(raw)
        return tags.get(256, 0), tags.get(257, 0)
    if raw[:4] == b'\xff\x4f\xff\x51':  # JPEG 2000 without a container
        return number(8, 4, 'big'), number(12, 4, 'big')
    if raw[4:8] == b'jP  ':
        at = raw.find(b'ihdr', 0, 4096)
        return (number(at + 8, 4, 'big'), number(at + 4, 4, 'big')) if at > 0 else None
    if raw[4:8] == b'ftyp':  # AVIF may hold several images
        at = [found.end() for found in re.finditer(b'ispe', raw[:65536])]
        sizes = [(number(i + 4, 4, 'big'), number(i + 8, 4, 'big')) for i in at]
        return max(sizes, key=lambda size: size[0] * size[1], default=None)
    if raw[:4] == b'\x59\xa6\x6a\x95':
        return number(4, 4, 'big'), number(8, 4, 'big')
    for header, width, height in TEXT_HEADERS:
        if found := header.match(raw[:65536]):
            return int(found[width]), int(found[height])
    return None


SPACE = rb'(?:\s|#[^\n]*\n)+'
PNM = re.compile(rb'P[1-6Ff]' + SPACE + rb'(\d{1,18})' + SPACE + rb'(\d{1,18})')
PAM = re.compile(rb'P7\s(?:.*\n)*?WIDTH\s+(\d{1,18})\s*\n(?:.*\n)*?HEIGHT\s+(\d{1,18})')
RADIANCE = re.compile(rb'#\?R(?:.*\n)*?[-+]Y\s+(\d{1,18})\s+[-+]X\s+(\d{1,18})')
TEXT_HEADERS = (PNM, 1, 2), (PAM, 1, 2), (RADIANCE, 2, 1)  # groups of width and height


def _webp_size(raw, number):
    kind = raw[12:16]
    if kind == b'VP8X':
        return 1 + number(24, 3, 'little'), 1 + number(27, 3, 'little')
    if kind == b'VP8L':
        bits = number(21, 4, 'little')
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b'VP8 ':
        return number(26, 2, 'little') & 0x3FFF, number(28, 2, 'little') & 0x3FFF
    return None


def tiff_tags(raw: bytes) -> dict:
    """{tag: its first value} of the first image in a TIFF or BigTIFF; {} if it has none."""
    order = {b'II': 'little', b'MM': 'big'}.get(raw[:2])

    def number(start, size):
        return int.from_bytes(raw[start : start + size], order)

    if order is None or number(2, 2) not in (42, 43):
        return {}
    big = number(2, 2) == 43
    word, entry = (8, 20) if big else (4, 12)  # bytes of an offset, of an entry
    start = number(word, word)
    first = start + (8 if big else 2)
    tags = {}
    for at in range(first, min(first + number(start, first - start) * entry, len(raw)), entry):
        size = {1: 1, 3: 2, 4: 4, 16: 8}.get(number(at + 2, 2))  # byte, short, long, long8
        if size:
            value = at + 4 + word
            outside = number(at + 4, word) * size > word
            tags[number(at, 2)] = number(number(value, word) if outside else value, size)
    return tags


# ------------------------ complete or cut off


def is_cut_off(raw: bytes) -> bool:
    """Whether a JPEG, PNG, WebP or BMP ends too early, when decoders silently fill in grey."""
    if raw[:2] == b'\xff\xd8':
        return not (_jpeg_ends(raw) or _jpeg_is_complete(raw))
    if raw[:8] == b'\x89PNG\r\n\x1a\n':
        return b'\0\0\0\0IEND' not in raw  # the last chunk: length 0, name
    if raw[:4] == b'RIFF':
        return len(raw) < 8 + int.from_bytes(raw[4:8], 'little')
    if raw[:2] == b'BM':
        return len(raw) < int.from_bytes(raw[2:6], 'little')
    return False


MARKER = re.compile(rb'\xff[^\x00\x01\xd0-\xd7\xff]')  # neither a stuffed byte nor a restart
JPEG_END = b'\xff\xd9'


def jpeg_segments(raw):
    """Yield (marker, position of the segment's data) of a JPEG. Skips the inside of segments, such
    as a thumbnail with markers of its own."""
    at = 2
    while found := MARKER.search(raw, at):
        yield found.group()[1], found.end() + 2
        at = found.end() + int.from_bytes(raw[found.end() : found.end() + 2], 'big')


def is_frame(marker: int) -> bool:
    """Whether a JPEG marker begins a frame header, which holds the size."""
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def jpeg_frame(raw: bytes) -> int | None:
    """The position of the data of a JPEG's frame header: precision, height, width, components."""
    return next((at for marker, at in jpeg_segments(raw) if is_frame(marker)), None)


def _jpeg_ends(raw):
    # Some files have other bytes after the end marker.
    return raw.endswith(JPEG_END) or any(marker == 0xD9 for marker, _ in jpeg_segments(raw))


def _jpeg_is_complete(raw):
    """Whether a baseline JPEG without an end marker holds all of its pixels: whatever follows does
    not change them."""
    raw = raw[:-1] if raw.endswith(b'\xff') else raw
    segments = list(jpeg_segments(raw))
    frames = [(marker, at) for marker, at in segments if is_frame(marker)]
    scans = [at for marker, at in segments if marker == 0xDA]
    # A progressive JPEG may lack a scan, and nobody could tell.
    if len(frames) != 1 or frames[0][0] not in (0xC0, 0xC1) or not scans or scans[-1] >= len(raw):
        return False
    components = raw[frames[0][1] + 5 : frames[0][1] + 6]
    if bytes([sum(raw[at] for at in scans) & 0xFF]) != components:
        return False
    # Tails whose next bits are 00, 11 and, differing in each bit, noise; and all of them again as
    # the next restart interval.
    noise = np.random.default_rng(0).integers(1, 255, 4096, np.uint8)
    restart = bytes([0xFF, 0xD0 + len(re.findall(rb'\xff[\xd0-\xd7]', raw[scans[-1] :])) % 8])
    restarts = any(marker == 0xDD for marker, _ in segments)
    pixels = None
    for begin in (b'', restart) if restarts else (b'',):
        for tail in noise, ~noise, np.full(4096, 1, np.uint8), np.full(4096, 254, np.uint8):
            whole = np.frombuffer(raw + begin + tail.tobytes() + JPEG_END, np.uint8)
            try:
                image = cv2.imdecode(whole, cv2.IMREAD_COLOR)
            except cv2.error:
                return False
            if image is None or (pixels is not None and not np.array_equal(image, pixels)):
                return False
            pixels = image
    return True


# ------------------------ decoding


def decode_bgr(file, raw: bytes, flags=cv2.IMREAD_COLOR) -> np.ndarray:
    """uint8 [H, W, 3] BGR of the bytes of an image file. Raises BrokenImage."""
    if raw[:2] == b'\xff\xd8' and not raw.endswith(JPEG_END):
        raw += JPEG_END  # without it OpenCV refuses even a complete one
    largest = _largest_value(raw)
    image = _imdecode(raw, flags | cv2.IMREAD_ANYDEPTH if largest else flags)
    if image is None:
        raise BrokenImage(f'{file}: broken, or not an image')
    return _eight_bits(file, image, largest) if image.dtype == np.uint16 else image


def _imdecode(raw, flags):
    try:
        return cv2.imdecode(np.frombuffer(raw, np.uint8), flags) if raw else None
    except cv2.error:
        return None


# Length 1 to 4, name, significant bits of each channel.
PNG_BITS = re.compile(rb'\0\0\0([\1-\4])sBIT(.{4})', re.DOTALL)
PNM_LARGEST = re.compile(PNM.pattern.replace(b'[1-6Ff]', b'[2356]') + SPACE + rb'(\d{1,9})\s')


def _largest_value(raw):
    """The largest value of the samples of a PNG or PNM of 16 bits, as its header has it; 0 for
    other images."""
    if raw[:8] == b'\x89PNG\r\n\x1a\n':
        if raw[24:25] != b'\x10':
            return 0
        found = PNG_BITS.search(raw, 33, raw.find(b'IDAT'))
        bits = max(found[2][: 1 if found[1] < b'\3' else 3]) if found else 16
        return (1 << min(max(bits, 1), 16)) - 1
    found = PNM_LARGEST.match(raw[:65536]) if raw[:1] == b'P' else None
    return int(found[3]) if found and 255 < int(found[3]) < 65536 else 0


def _eight_bits(file, image, largest):
    """uint8 of a uint16 image whose samples end at `largest`; the image decides if it has more."""
    most = int(image.max(initial=0))
    if most <= largest < 65535:
        return (image.astype(np.uint32) * 256 // (largest + 1)).astype(np.uint8)
    if 0 < most < 4096:
        _warn_of_bits(file, most)
    return (image >> 8).astype(np.uint8)


def _warn_of_bits(file, most):
    warn_once(
        'bits',
        f'{file}: has 16 bits per sample but no value above {most}, so it is nearly black. '
        'Other images may be too. An sBIT chunk in a PNG says how many bits are used',
    )


# ------------------------ folders

# Files with other suffixes are opened to see what they are. OpenCV may lack some of these formats;
# such a file is then a broken image, not one that is left out.
SUFFIXES = {
    *('jpg', 'jpeg', 'jpe', 'jfif', 'png', 'webp', 'bmp', 'dib', 'tif', 'tiff', 'gif'),
    *('ppm', 'pgm', 'pbm', 'pnm', 'jp2', 'avif', 'heic', 'heif'),
}
# Folders that archivers, network drives and file systems add.
NO_CLASSES = {
    *('@eaDir', '__MACOSX', '#recycle', '#snapshot', '$RECYCLE.BIN'),
    *('System Volume Information', 'lost+found'),
}


def scan_folder(dataroot, option='--dataroot', tests=('test', 'val'), say=print):
    """({class: [files]} of dataroot/train, the same of dataroot/test), in the order of
    torchvision's ImageFolder.

    tests  names of the second folder: the first that has the classes of train is taken
    say    prints a line: what was left out, and which folder is taken if not the first

    Raises UserError if a folder is missing or empty, there is one class only, or the two have
    different classes.
    """
    root = Path(dataroot)
    names = [name for name in tests if os.path.isdir(root / name)]
    for folder in root / 'train', root / (names[0] if names else tests[0]):
        if not os.path.isdir(folder):
            check_reachable(folder, option)
            cifar = option == '--dataroot' and any(root.glob('cifar-*'))
            hint = '; for the CIFAR files there, give --dataset CIFAR10 or CIFAR100'
            raise UserError(
                f'{option} {root}: there is no folder {folder} '
                f'(wanted: train/CLASS/* and {" or ".join(tests)}/CLASS/*){hint if cifar else ""}'
            )
    train, left_out = _scan(root / 'train', f'{option} {root}')
    faults = []
    for name in names:
        try:
            test, more = _scan(root / name, f'{option} {root}')
            _check_same_classes(train, test, name, f'{option} {root}')
        except UserError as e:
            if e.status != 2:  # the disk
                raise
            faults.append(e)
            continue
        if faults:
            say(printable(f'{option} {root}: testing on {name}/ ({faults[0]})'))
        left_out += more
        if left_out:
            examples = listing([os.path.relpath(path, root) for path in left_out], 3)
            say(printable(f'{option} {root}: {len(left_out)} left out, not images: {examples}'))
        return train, test
    raise faults[0]


def _check_same_classes(train, test, name, source):
    if list(train) != list(test):
        # Quoted, because names may differ in a space alone, or in how an accent is written.
        only = {'train': train.keys() - test.keys(), name: test.keys() - train.keys()}
        looks = [{unicodedata.normalize('NFC', c) for c in found} for found in only.values()]
        spell = ascii if looks[0] & looks[1] else repr
        parts = [
            f'{listing([spell(c) for c in sorted(found)])} only in {where}'
            for where, found in only.items()
            if found
        ]
        raise UserError(f'{source}: train and {name} have different classes: {"; ".join(parts)}')


def _scan(folder, source):
    """({class: [images]}, [paths of what was left out]) of a folder of class folders."""
    try:
        classes, others, left_out = [], [], []
        for e in _entries(folder):
            (classes if _is_folder(e) else others).append(e)
        hidden = [e for e in classes if _is_hidden(e.name)]
        flat = 0
        for e in others:
            flat += not _is_hidden(e.name) and _is_image(e)
            left_out.append(e.path)
        classes = [e for e in classes if not _is_hidden(e.name)]
        left_out += [e.path for e in hidden]
        if len(classes) < 2:
            raise UserError(_too_few(folder, len(classes), flat))
        # A link to a folder above would find the other classes once more.
        real = Path(os.path.realpath(folder))
        above = {_identity(parent) for parent in (real, *real.parents)}
        # Names instead of Paths, because ImageNet has a million.
        files = {e.name: _images(e.path, set(above), left_out) for e in classes}
    except OSError as e:
        status = 2 if e.errno in ONE_FILE else 1
        raise UserError(f'{source}: {e.filename}: {e.strerror}', status) from e
    for name, found in files.items():
        if not found:
            do = 'add some, or remove the folder'
            if os.path.lexists(folder / name / 'log.txt'):
                do = 'move this run folder elsewhere'
            raise UserError(f'{folder / name}: holds no images; {do}')
    return files, left_out


def _too_few(folder, classes, images):
    if images:
        return (
            f'{folder}: holds images outside of class folders ({images}); at least 2 class folders '
            f'are needed, {folder}/CLASS/*. scripts/prepare_imagenet.py makes them from a list'
        )
    has = 'only 1 class folder' if classes else 'no class folders'
    return (
        f'{folder}: has {has}; at least 2 are needed. '
        'scripts/prepare_imagenet.py makes them from a list'
    )


def _images(folder, seen, left_out):
    """The images of a class folder and of the folders in it, each of which is visited once.

    seen: identities of folders that are not visited; left_out: gets the paths of other files
    """
    found, waiting = [], [folder]
    while waiting:
        path = waiting.pop()
        if (identity := _identity(path)) in seen:
            continue
        seen.add(identity)
        files, folders = [], []
        for e in _entries(path):
            if _is_hidden(e.name):
                left_out.append(e.path)
            elif _is_folder(e):
                folders.append(e.path)
            elif _is_image(e):
                files.append(e.path)
            else:
                left_out.append(e.path)
        found.append((path, files))
        waiting += reversed(folders)
    return [file for _, files in sorted(found) for file in files]


def _entries(folder):
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda e: e.name)


def _identity(folder):
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_hidden(name):
    return name.startswith('.') or name in NO_CLASSES


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError as e:  # a link to itself, or into a folder that is closed to us
        if e.errno not in ONE_FILE:
            raise
        return False


def _is_image(entry) -> bool:
    """Whether a file is an image, by its suffix or else by its first bytes.

    A dangling link, and a file that cannot be opened, count as (broken) images unless their suffix
    is not an image's. Pipes, sockets and devices do not.
    """
    _, dot, suffix = entry.name.rpartition('.')
    known = dot and suffix.lower() in SUFFIXES
    if entry.is_symlink():
        if _leads_to_special(entry):
            return False
    elif not entry.is_file(follow_symlinks=False):
        return False
    if known:
        return True
    try:
        return begins_as_image(entry.path)
    except OSError as e:
        if e.errno not in ONE_FILE:
            raise
        return not dot


def _leads_to_special(link):
    try:
        return not link.is_file() and os.path.exists(link.path)
    except OSError:
        return False
