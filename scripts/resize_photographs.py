"""Write a smaller copy of a folder of photographs, for a slow disk or large originals.

    python scripts/resize_photographs.py ~/photos ~/photos_256 --side 256

IN has train/CLASS/* and val/CLASS/* (or test), and so has OUT. A photograph whose shorter side has
more than --side pixels becomes a JPEG whose shorter side has as many. Smaller JPEGs are copied.
Broken photographs are listed and left out. Repeat a command that was stopped: it writes what is
missing.
"""

import os
import sys
from functools import partial
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import unwritten, write_photograph
from support import program
from support.files import check_writable, write_text
from support.options import Parser, number
from support.photographs import resize, scan_photographs
from support.program import Stopped, UserError

parser = Parser(__doc__)
add = parser.add_argument
add('source', metavar='IN', help='folder of the originals')
add('out_dir', metavar='OUT', help='folder of the copy')
add(
    '--side',
    default=256,
    type=number(int, 32, 4096),
    metavar='N',
    help='pixels of the shorter side; tests at --image_size S use S * 256/224 (default: 256)',
)
add('--quality', default=95, type=number(int, 1, 100), help='of the JPEGs (default: 95)')
add('--nthread', default=0, type=number(int, 0, 1024), help='CPU threads (default: one per core)')


def main(argv=None):
    program.expect_one_process(argv)
    opt, _ = parser.parse(argv)
    source, out = os.path.realpath(opt.source), os.path.realpath(opt.out_dir)
    if os.path.commonpath([source, out]) in (source, out):
        raise UserError(f'OUT {opt.out_dir}: must lie outside of IN {opt.source}')
    files = find_files(opt.source)
    check_writable(opt.out_dir, 'OUT')
    check_settings(opt)
    missing = unwritten(opt.out_dir, files, resume=True)
    write = partial(write_smaller, opt, files)
    try:
        faults = data.in_threads(write, missing, 'resizing', opt.nthread)
    except Stopped as e:
        e.hint = 'repeat the command to write the rest'
        raise
    broken = [fault for fault in faults if fault]
    for fault in broken:
        print(f'{fault}', file=sys.stderr)
    print(
        f'{opt.out_dir}: {len(files) - len(broken):,} photographs, '
        f'{len(missing) - len(broken):,} of them written now'
    )
    if broken:
        raise UserError(f'IN {opt.source}: {len(broken)} broken photographs were left out')


def find_files(source) -> dict:
    """{path in OUT: file in IN}. Raises UserError if two would have the same path."""
    found = {}
    for folder in scan_photographs(source, 'IN'):
        for file in (file for files in folder.values() for file in files):
            path = os.path.relpath(file, source)
            if not is_jpeg(path):
                path += '.jpg'
            if path in found:
                raise UserError(f'IN {source}: {file} and {found[path]} would both become {path}')
            found[path] = file
    return found


def is_jpeg(path) -> bool:
    return path.lower().endswith(('.jpg', '.jpeg'))


def check_settings(opt) -> None:
    """Raise UserError if OUT was started with another --side or --quality. A new OUT notes them."""
    note, settings = Path(opt.out_dir, '.resized'), f'--side {opt.side} --quality {opt.quality}'
    if os.path.lexists(note):
        before = note.read_text(errors='replace')
        if before != settings:
            raise UserError(f'OUT {opt.out_dir}: was started with {before}; choose a new folder')
        return
    if os.path.isdir(opt.out_dir) and os.listdir(opt.out_dir):
        raise UserError(f'OUT {opt.out_dir}: is not empty; choose a new folder')
    Path(opt.out_dir).mkdir(parents=True, exist_ok=True)
    write_text(note, settings)


def write_smaller(opt, files: dict, path: str) -> str | None:
    """Write the copy of one photograph. Returns its fault if it is broken. Raises UserError, status
    1, if the disk fails."""
    file = files[path]
    try:
        raw = data.read_image(file)
        image = data.decode_bgr(file, raw)
    except data.BrokenImage as e:
        return str(e)
    size, shorter = image.shape[:2], min(image.shape[:2])
    if shorter > opt.side:
        image = resize(image, tuple(round(n * opt.side / shorter) for n in size))
    if shorter > opt.side or not is_jpeg(file):
        raw = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, opt.quality])[1].tobytes()
    write_photograph(Path(opt.out_dir, path), raw)


if __name__ == '__main__':
    sys.exit(program.call_main(main))
