"""Prepare the birds of CUB-200-2011 for imagenet.py: cut out each bounding box, and scale its
shorter side to 256 pixels.

    # writes birds/train/CLASS/*.jpg and birds/val/CLASS/*.jpg
    python scripts/prepare_cub.py CUB_200_2011 birds
    python scripts/prepare_cub.py CUB_200_2011 birds --resume       # continue a stopped run
    python imagenet.py --imagenetpath birds --finetune --student_params resnet-18.hkl --depth 18

CUB_200_2011 is the folder that CUB_200_2011.tgz unpacks to; its lists images.txt, classes.txt,
bounding_boxes.txt and train_test_split.txt tell which photographs there are. All of them are
decoded once before the first is written.
"""

import math
import os
import sys
from pathlib import Path

import cv2
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import prepare
from support import program
from support.files import check_writable
from support.options import Parser
from support.photographs import resize
from support.program import UserError

SHORTER_SIDE = 256  # section 4.2 of the paper
QUALITY = 95
SPLITS = {'1': 'train', '0': 'val'}
LONGEST_JPEG = 65500  # of libjpeg
ADVICE = 'unpack CUB_200_2011.tgz again, and give its folder CUB_200_2011'

parser = Parser(__doc__)
parser.add_argument('cub_dir', metavar='CUB_DIR', help='the unpacked folder CUB_200_2011')
prepare.add_options(parser)


def main(argv=None):
    opt, _ = parser.parse(argv)
    out = Path(opt.out_dir)
    photographs = read_lists(Path(opt.cub_dir))
    prepare.check_classes(photographs, opt.cub_dir)
    check_writable(out, 'OUT_DIR')
    names = prepare.unwritten(out, photographs, opt.resume)
    cv2.setNumThreads(1)  # the threads are ours: a photograph each
    torch.set_num_threads(1)

    def check(name):
        cut(*photographs[name])

    def write(name):
        image = cv2.cvtColor(scaled(cut(*photographs[name])), cv2.COLOR_RGB2BGR)
        _, raw = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        prepare.write_photograph(out / name, raw.tobytes())

    data.in_threads(check, names, 'checking', opt.nthread)
    with prepare.resumable():
        data.in_threads(write, names, 'writing', opt.nthread)
        train = sum(name.startswith('train/') for name in photographs)
        print(f'wrote {out}: {train} photographs in train, {len(photographs) - train} in val')


def read_lists(root) -> dict:
    """{train/CLASS/FILE or val/CLASS/FILE: (photograph, its box, where that stands)}, all that the
    lists in `root` tell."""
    classes = read_list(root / 'classes.txt', str, 'ID NAME')
    paths = read_list(root / 'images.txt', str, 'ID CLASS/FILE')
    boxes = read_list(root / 'bounding_boxes.txt', box, 'ID X Y WIDTH HEIGHT of a box with an area')
    splits = read_list(root / 'train_test_split.txt', SPLITS.__getitem__, 'ID 1 or ID 0')
    for name, other in ('bounding_boxes.txt', boxes), ('train_test_split.txt', splits):
        if extra := sorted(paths.keys() ^ other.keys()):
            has, lacks = ('images.txt', name) if extra[0] in paths else (name, 'images.txt')
            raise UserError(f'{root / lacks}: lacks id {extra[0]}, which is in {has}; {ADVICE}')
    known = {name for name, _ in classes.values()}
    photographs, seen = {}, set()
    for i, (path, where) in paths.items():
        if not prepare.is_class_and_file(path) or path.split('/')[0] not in known:
            raise UserError(
                f'{where}: {path[:80]!r} is not CLASS/FILE, with a CLASS of classes.txt; {ADVICE}'
            )
        if path in seen:
            raise UserError(f'{where}: {path} has a second id; {ADVICE}')
        if not os.path.isfile(root / 'images' / path):
            raise UserError(f'{where}: there is no photograph {root / "images" / path}; {ADVICE}')
        seen.add(path)
        photographs[f'{splits[i][0]}/{path}'] = (root / 'images' / path, *boxes[i])
    return photographs


def read_list(file, parse, wanted) -> dict:
    """{id: (parse(what follows the id), where it stands)}."""
    entries = {}
    for where, line in prepare.read_lines(file, ADVICE):
        try:
            i, value = line.split(maxsplit=1)
            i, value = int(i), parse(value.strip())
        except (ValueError, KeyError) as e:
            raise UserError(f'{where}: {line[:80]!r} is not {wanted}; {ADVICE}') from e
        if i in entries:
            raise UserError(f'{where}: id {i} appears twice; {ADVICE}')
        entries[i] = (value, where)
    return entries


def box(text):
    x, y, width, height = map(float, text.split())
    if not (width > 0 and height > 0 and math.isfinite(x + y + width + height)):
        raise ValueError
    return x, y, width, height


def cut(file, box, where):
    """uint8 [h, w, 3] RGB: the part of a photograph that lies in the box."""
    image = data.decode(file)
    H, W = image.shape[:2]
    x, y, width, height = box
    left, right = (max(0, round(v)) for v in (x, x + width))
    top, bottom = (max(0, round(v)) for v in (y, y + height))
    image = image[top:bottom, left:right]
    h, w = image.shape[:2]
    if SHORTER_SIDE * max(h, w) >= LONGEST_JPEG * min(h, w):  # also if no pixel is left
        raise UserError(
            f'{where}: the box has {w}x{h} pixels in {file}, {W}x{H}, too few to scale; {ADVICE}'
        )
    return image


def scaled(image):
    """The shorter side SHORTER_SIDE pixels, the longer in proportion, rounded down, as in
    torchvision."""
    h, w = image.shape[:2]
    return resize(image, tuple(SHORTER_SIDE * side // min(h, w) for side in (h, w)))


if __name__ == '__main__':
    sys.exit(program.call_main(main))
