"""What prepare_cub.py and prepare_scenes.py share: published lists in, train/CLASS/FILE and
val/CLASS/FILE out."""

import contextlib
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.files import write_atomically
from support.options import number
from support.program import Stopped, UserError


def add_options(parser) -> None:
    """The options of both scripts."""
    add = parser.add_argument
    add('out_dir', metavar='OUT_DIR', help='the folder to write: new or empty')
    add(
        '--resume',
        action='store_true',
        help='continue a stopped run: write only what OUT_DIR lacks',
    )
    add(
        '--nthread',
        default=0,
        type=number(int, 0, 1024),
        help='CPU threads (default: 0, one per core)',
    )


def read_lines(file, advice: str) -> list[tuple[str, str]]:
    """(where, line) for the lines of a published list that are not blank; `where` names file and
    line in a message.

    Raises UserError, with that advice, if the file cannot be read."""
    try:
        # Names keep their bytes, whatever their encoding.
        text = Path(file).read_text(encoding='utf-8-sig', errors='surrogateescape')
    except OSError as e:
        raise UserError(f'{file}: cannot be read: {e.strerror}; {advice}') from e
    lines = enumerate(text.split('\n'), 1)
    return [(f'{file}, line {i}', line) for i, line in lines if line.strip()]


def is_class_and_file(path: str) -> bool:
    """Whether a path is CLASS/FILE, which leads out of no folder, and which scan_folder would not
    pass over as hidden."""
    return re.fullmatch(r'[^/.\0][^/\0]*/[^/.\0][^/\0]*', path) is not None


def check_classes(names, source) -> None:
    """Raises UserError if files of these names, train/CLASS/FILE and val/CLASS/FILE, would not be
    a data set that scan_folder accepts."""
    train, val = (
        {n.split('/')[1] for n in names if n.startswith(split)} for split in ('train/', 'val/')
    )
    if extra := sorted(train ^ val):
        raise UserError(
            f'{source}: class {extra[0]} has only {"training" if extra[0] in train else "test"} '
            'images; it needs both training and test images'
        )
    if len(train) < 2:
        raise UserError(f'{source}: has {len(train)} classes; at least 2 are needed')


def unwritten(folder, names, resume: bool) -> list[str]:
    """Those of `names`, paths below `folder`, that are not there yet. Raises UserError if it
    holds a file of another name, or, without `resume`, anything at all."""
    try:
        if not resume and os.path.isdir(folder) and os.listdir(folder):
            raise UserError(
                f'OUT_DIR {folder}: is not empty; '
                'give a new folder, or --resume to continue a stopped run'
            )
    except OSError as e:
        raise UserError(f'OUT_DIR {folder}: {e.strerror}') from e
    # Hidden files were left half-written by a killed run; they are overwritten.
    found = {
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder)
        for file in files
        if not file.startswith('.')
    }
    if extra := sorted(found - set(names)):
        raise UserError(
            f'OUT_DIR {folder}: holds {extra[0]}, which is not part of this set; give a new folder'
        )
    return [name for name in names if name not in found]


@contextlib.contextmanager
def resumable():
    """While photographs are written: a signal's message says that --resume continues."""
    try:
        yield
    except Stopped as e:
        e.hint = 'the same command with --resume continues'
        raise


def write_photograph(path, raw: bytes) -> None:
    """Write a photograph atomically, and create the folders that it needs."""

    def write(temporary):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(raw)

    write_atomically(path, write)
