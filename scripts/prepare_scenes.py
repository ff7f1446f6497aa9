"""Prepare the rooms of MIT indoor-67 for imagenet.py: copy the photographs of the published lists
into the folders train and val.

    # writes rooms/train/CLASS/*.jpg and rooms/val/CLASS/*.jpg
    python scripts/prepare_scenes.py indoorCVPR_09 rooms
    # leave out photographs that cannot be decoded; continue a stopped run
    python scripts/prepare_scenes.py indoorCVPR_09 rooms --skip_broken
    python scripts/prepare_scenes.py indoorCVPR_09 rooms --resume
    python imagenet.py --imagenetpath rooms --finetune --student_params resnet-18.hkl --depth 18

indoorCVPR_09 holds the folder Images of indoorCVPR_09.tar, and the lists TrainImages.txt and
TestImages.txt beside it. Photographs are copied byte by byte, under their own names; all of them
are decoded once before the first is written.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import prepare
from support import program
from support.files import check_writable
from support.options import Parser
from support.photographs import find_faults
from support.program import UserError

ADVICE = 'give the folder that holds TrainImages.txt, TestImages.txt and the unpacked Images'

parser = Parser(__doc__)
add = parser.add_argument
add(
    'scenes_dir',
    metavar='SCENES_DIR',
    help='the folder that holds Images, TrainImages.txt and TestImages.txt',
)
add(
    '--skip_broken',
    action='store_true',
    help='leave out photographs that cannot be decoded (default: list them, write nothing)',
)
prepare.add_options(parser)


def main(argv=None):
    opt, _ = parser.parse(argv)
    out = Path(opt.out_dir)
    photographs = read_lists(Path(opt.scenes_dir))
    prepare.check_classes(photographs, opt.scenes_dir)
    check_writable(out, 'OUT_DIR')
    names = prepare.unwritten(out, photographs, opt.resume)
    faults = find_faults([photographs[name] for name in names], opt.nthread)
    broken = {name for name, fault in zip(names, faults) if fault}
    for fault in filter(None, faults):
        print(fault, file=sys.stderr)
    if broken and not opt.skip_broken:
        raise UserError(
            f'{len(broken)} photographs are broken (listed above); '
            'replace them, or give --skip_broken'
        )
    kept = [name for name in photographs if name not in broken]
    prepare.check_classes(kept, f'{opt.scenes_dir}, without the broken photographs')

    def write(name):
        prepare.write_photograph(out / name, data.read_image(photographs[name]))

    missing = [name for name in names if name not in broken]
    with prepare.resumable():
        data.in_threads(write, missing, 'writing', opt.nthread)
        train = sum(name.startswith('train/') for name in kept)
        skipped = f'; {len(broken)} broken ones left out' if broken else ''
        print(f'wrote {out}: {train} photographs in train, {len(kept) - train} in val{skipped}')


def read_lists(root) -> dict:
    """{train/CLASS/FILE or val/CLASS/FILE: photograph}, all that the lists in `root` tell."""
    photographs = {}
    for split, name in ('train', 'TrainImages.txt'), ('val', 'TestImages.txt'):
        for where, path in prepare.read_lines(root / name, ADVICE):
            if not prepare.is_class_and_file(path):
                raise UserError(
                    f'{where}: {path[:80]!r} is not CLASS/FILE, a path below Images; '
                    'correct the line'
                )
            if not os.path.isfile(root / 'Images' / path):
                raise UserError(
                    f'{where}: there is no photograph {root / "Images" / path}; {ADVICE}'
                )
            if split == 'val' and f'train/{path}' in photographs:
                raise UserError(
                    f'{where}: {path} is in TrainImages.txt too; remove one of the lines'
                )
            photographs[f'{split}/{path}'] = root / 'Images' / path
    return photographs


if __name__ == '__main__':
    sys.exit(program.call_main(main))
