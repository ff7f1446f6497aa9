"""Sort ImageNet's validation photographs into class folders, by a list of labels. ILSVRC2012
unpacks to one flat folder.

    # moves val/NAME.JPEG to val/WNID/NAME.JPEG
    python scripts/prepare_imagenet.py ILSVRC2012/val LOC_val_solution.csv
    # leaves the photographs where they are; writes links to them
    python scripts/prepare_imagenet.py flat LOC_val_solution.csv --links ILSVRC2012/val

The labels are Kaggle's LOC_val_solution.csv, TinyImageNet's val_annotations.txt, or a file with
lines such as `ILSVRC2012_val_00000001.JPEG n01751748`. Nothing is moved before list and folder
agree, and nothing is overwritten. After an interruption, the same command continues.
"""

import errno
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import images
import prepare
from support import program
from support.files import check_writable
from support.options import Parser
from support.program import Stopped, UserError, listing, printable

ADVICE = 'give LOC_val_solution.csv, or a file with lines such as NAME.JPEG n01751748'
REST = 'the same command sorts the rest'
NO_LINKS = errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS

parser = Parser(__doc__)
add = parser.add_argument
add('flat_dir', metavar='FLAT_DIR', help='the folder that holds the photographs, without classes')
add('labels', metavar='LABELS', help='Kaggle CSV (ImageId,PredictionString), or lines NAME WNID')
add('--links', default='', metavar='OUT_DIR', help='write links in OUT_DIR, move nothing')


def main(argv=None):
    opt, _ = parser.parse(argv)
    flat, out = Path(opt.flat_dir), Path(opt.links or opt.flat_dir)
    labels = read_labels(opt.labels)
    check_writable(out, '--links' if opt.links else 'FLAT_DIR')
    jobs = plan(flat, out, labels, bool(opt.links))
    try:
        for source, target in jobs:
            place(source, target, bool(opt.links))
    except Stopped as e:
        e.hint = REST
        raise
    except OSError as e:
        after = 'this disk may have no links' if opt.links and e.errno in NO_LINKS else REST
        raise UserError(f'{target}: cannot be written: {e.strerror}; {after}', status=1) from e
    before = f'; {len(labels) - len(jobs)} were there already' if len(labels) > len(jobs) else ''
    print(printable(f'{len(jobs)} photographs sorted into class folders of {out}{before}'))


def read_labels(file) -> dict:
    """{name of a photograph, without its suffix: class} of a list in either format."""
    labels = {}
    lines = prepare.read_lines(file, ADVICE)
    comma = bool(lines) and lines[0][1].startswith('ImageId,')  # the header
    for where, line in lines[comma:]:
        if comma:
            parts = line.strip().split(',', 1)
        else:  # TinyImageNet has the box of the object behind
            boxes = line.count('\t') > 1
            parts = line.split('\t')[:2] if boxes else line.rsplit(maxsplit=1)
        name, wnid = parts[0].strip(), (parts[-1].split() or [''])[0]
        if len(parts) < 2 or not prepare.is_class_and_file(f'{wnid}/{name}'):
            raise UserError(f'{where}: {line[:80]!r} has no name and class; {ADVICE}')
        if labels.setdefault(stem(name), wnid) != wnid:
            raise UserError(f'{where}: {name} has another class in an earlier line; {ADVICE}')
    if not labels:
        raise UserError(f'{file}: has no lines; {ADVICE}')
    return labels


def stem(name: str) -> str:
    """A file name without the suffix of an image."""
    return re.sub(f'[.]({"|".join(images.SUFFIXES)})\\Z', '', name, flags=re.IGNORECASE)


def plan(flat, out, labels: dict, links: bool) -> list:
    """[(photograph, its place in a class folder)] of what is still to do. Raises UserError if the
    list and the folders do not agree, or if a place is taken."""
    found = photographs(flat)
    present = set(found)
    for wnid in () if links else set(labels.values()):
        if os.path.isdir(out / wnid):
            present |= {name for name in photographs(out / wnid) if labels.get(name) == wnid}
    if missing := [name for name in labels if name not in present]:
        raise UserError(
            f'{flat}: {len(missing)} of the {len(labels)} photographs in LABELS are missing: '
            f'{listing(missing)}'
        )
    if unknown := [file for name, file in found.items() if name not in labels]:
        raise UserError(
            f'{flat}: {len(unknown)} of {len(found)} photographs are not in LABELS: '
            f'{listing(unknown)}'
        )
    jobs = []
    for name, file in found.items():
        source, target = flat / file, out / labels[name] / file
        there = os.path.lexists(target)
        if there and not is_done(source, target, links):
            raise UserError(f'{target}: already exists, and is not {source}; remove one of them')
        if not (there and links):  # an interrupted move still has its old name
            jobs.append((source, target))
    return jobs


def is_done(source, target, link: bool) -> bool:
    """Whether the target that exists is what `place` makes of the source."""
    if os.path.islink(target):
        return os.readlink(target) == link_text(source, link)
    return not link and os.path.samestat(os.lstat(source), os.lstat(target))


def link_text(source, link: bool) -> str | None:
    """What a link in a class folder leads to: the source, or what the source links to."""
    if link:
        return os.path.abspath(source)
    text = os.readlink(source) if os.path.islink(source) else None
    # One folder deeper than the source.
    return os.path.join(os.pardir, text) if text and not os.path.isabs(text) else text


def photographs(folder) -> dict:
    """{name without suffix: file name} of the photographs directly in a folder."""
    try:
        with os.scandir(folder) as entries:
            files = sorted(e.name for e in entries if not e.is_dir())
    except OSError as e:
        raise UserError(f'{folder}: {e.strerror}') from e
    found = {}
    for file in files:
        is_image = stem(file) != file and not file.startswith('.')
        if is_image and found.setdefault(stem(file), file) != file:
            raise UserError(f'{folder}: has both {found[stem(file)]} and {file}; remove one')
    return found


def place(source, target, link: bool) -> None:
    """Move a photograph to its new name, or link it there. Fails if another file has that name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        if text := link_text(source, link):
            os.symlink(text, target)
        else:
            try:
                os.link(source, target)  # unlike a rename, it never overwrites
            except OSError as e:
                if e.errno not in NO_LINKS:
                    raise
                return os.rename(source, target)
    if not link:
        os.unlink(source)


if __name__ == '__main__':
    sys.exit(program.call_main(main))
