"""Images beside the attention maps of one or more nets, as one picture: where each group of a net looks.

    python scripts/attention.py --weights logs/resnet_16_2_teacher logs/at_16_1_16_2       # test images of the runs' data set
    python scripts/attention.py --weights logs/at_18_34                                    # val/ photographs, as imagenet.py tests on them
    python scripts/attention.py --weights model.hkl --images cat.jpg photographs/          # images of your own
    python scripts/attention.py --weights model.hkl --dataset folder --dataroot DIR --n 12 --save maps.png

A map is utils.at of a group's output (the squared sum over channels), enlarged to the image and laid over it in colour, from
blue, its smallest value, to red, its largest. Beneath the maps of a net stands what it takes the image for.
"""

import itertools
import sys
from pathlib import Path

import cv2
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import resnet
import utils
from utils import UserError, number

DATASETS = ['CIFAR10', 'CIFAR100', 'folder', 'shapes']

parser = utils.Parser(__doc__)
# fmt: off
parser.add_argument('--weights', nargs='+', required=True, metavar='W', help='run folders, or weights files whose names tell the net')
parser.add_argument('--labels', nargs='+', metavar='NAME', help="a name for each of them (default: the folder's or file's)")
parser.add_argument('--images', nargs='+', metavar='PATH', help='image files, or folders of them')
parser.add_argument('--dataset', choices=DATASETS, help='show its test images, each class in turn (default: the set or photographs that the first run was trained on, or shapes)')
parser.add_argument('--dataroot', help="folder of the data set's files or photographs (default: that of the run, or .)")
parser.add_argument('--n', default=6, type=number(int, 1, 100), help='number of images (default: 6)')
parser.add_argument('--image_size', type=number(int, 8, 1024), help='larger images are shrunk until their longer side has so many pixels: 32 for CIFAR nets, 224 for others show most (default: 128); of the photographs of a run, the side of the crop (default: that of the run)')
parser.add_argument('--save', default='attention.png', metavar='FILE.png', help='the picture (default: attention.png)')
# fmt: on


def main(argv=None):
    opt, _ = parser.parse(argv)
    save = Path(opt.save)
    if save.suffix != '.png':
        raise UserError(f'--save {save}: must end in .png')
    utils.check_writable(save.parent)
    if opt.images and (opt.dataset or opt.dataroot):
        raise UserError('--images and --dataset: give one of them')
    if opt.labels and len(opt.labels) != len(opt.weights):
        raise UserError(f'--labels: {len(opt.labels)} names for {len(opt.weights)} --weights')
    labels = opt.labels or [Path(w).resolve().stem for w in opt.weights]
    nets = [(label, *resnet.load_net(w)) for label, w in zip(labels, opt.weights)]
    run = nets[0][3][0] if nets[0][3] else {}
    if opt.images:
        images, classes = read_images(opt.images, opt.n), []
    elif not opt.dataset and 'dataset' not in run and 'imagenetpath' in run:
        images, classes = choose_photographs(opt, run)
    else:
        dataset = opt.dataset or (run['dataset'] if run.get('dataset') in DATASETS else 'shapes')
        logged = run.get('dataroot') if isinstance(run.get('dataroot'), str) else None
        images, classes = choose_images(dataset, opt.dataroot or logged or '.', opt.n)
    rows = []
    for name, image in images:
        image = shrink(image, opt.image_size or 128)
        rows.append(
            (
                name,
                image,
                [look(image, f, params, records, classes) for _, f, params, records in nets],
            )
        )
    save.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(rows, labels, classes)
    utils.write_atomically(save, lambda file: figure.savefig(file, format='png'))
    plt.close(figure)
    print(f'wrote {save}')


# ---------------------------------------------------------------- images: [(what is known of it, uint8 [H, W, 3] RGB)]


def read_images(paths, n):
    """The first n of image files and of those in folders, each with its file's name."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith('.'))
            if not found:
                raise UserError(f'--images {path}: holds no images')
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f'--images {path}: no such file or folder')
    return list(zip([f.name for f in files[:n]], data.decode_all(files[:n])))


def choose_images(dataset, dataroot, n):
    """(n test images, the first of each class in turn, each with its class; all the class names)."""
    if dataset == 'folder':
        _, test = data.scan_folder(dataroot)
        chosen = in_turn(test, n)
        return [
            (name, image)
            for (name, _), image in zip(chosen, data.decode_all([f for _, f in chosen]))
        ], list(test)
    classes, load = data.open_sets(dataset, dataroot)
    _, test = load()
    members = [(test.labels == c).nonzero().flatten().tolist() for c in range(len(classes))]
    chosen = [i for turn in itertools.zip_longest(*members) for i in turn if i is not None][:n]
    return [(classes[test.labels[i]], test.images[i].numpy()) for i in chosen], classes


def choose_photographs(opt, run):
    """(n photographs of val/ of a run of imagenet.py, the first of each class in turn, each with its class; all the class names), in the
    view that the run is tested on. Sets --image_size to its side where it was not given."""
    root, run_folder = opt.dataroot or str(run['imagenetpath']), opt.weights[0]
    if not opt.dataroot and not Path(root).is_dir():
        raise UserError(
            f'--weights {run_folder}: its photographs, {root}, are not there; give their folder, --dataroot, or --images'
        )
    opt.image_size = opt.image_size or run.get('image_size', 224)
    if type(opt.image_size) is not int or not 8 <= opt.image_size <= 1024:
        raise UserError(
            f'--weights {run_folder}: its log has the impossible image_size {opt.image_size}; give --image_size'
        )
    option = '--dataroot' if opt.dataroot else f'--weights {run_folder}: its --imagenetpath'
    _, val = data.scan_folder(root, option, ('val',))
    chosen = in_turn(val, opt.n)
    views = data.in_threads(
        lambda pair: data.centre_view(pair[1], opt.image_size), chosen, 'decoding'
    )
    return [(name, view) for (name, _), view in zip(chosen, views)], list(val)


def in_turn(folder, n):
    """The first n of {class: files}, each class in turn: [(class, file)]."""
    turns = itertools.zip_longest(
        *([(name, file) for file in files[:n]] for name, files in folder.items())
    )
    return [pair for turn in turns for pair in turn if pair][:n]


def shrink(image, longest):
    H, W = image.shape[:2]
    if max(H, W) <= longest:
        return image
    size = [max(8, round(side * longest / max(H, W))) for side in (W, H)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------- maps


@torch.inference_mode()
def look(image, f, params, records, classes):
    """(maps of the groups, each float32 [h, w]; the class that a net takes the image for, None where it has no known name)."""
    small = resnet.layout(params) == 'wrn'
    statistics = () if small else (data.IMAGENET_MEAN, data.IMAGENET_STD)
    logits, groups = f(data.normalize(torch.from_numpy(image)[None], *statistics), params, False)
    maps = [utils.at(g)[0].view(g.shape[2:]).numpy() for g in groups]
    names = utils.class_names(records) or classes
    return maps, names[int(logits.argmax())] if len(names) == logits.shape[1] else None


def overlay(image, attention):
    """The map, enlarged, in colour over the image in grey: uint8 [H, W, 3] RGB."""
    H, W = image.shape[:2]
    attention = cv2.resize(attention, (W, H), interpolation=cv2.INTER_CUBIC)
    attention = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-12)
    colours = cv2.applyColorMap(np.uint8(255 * attention), cv2.COLORMAP_JET)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(cv2.addWeighted(grey, 0.4, colours, 0.6, 0), cv2.COLOR_BGR2RGB)


def enlarge(image, side=256):
    """To `side` pixels on the longer side, pixels left as squares: what the net saw."""
    scale = max(1, side // max(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)


# ---------------------------------------------------------------- the picture


def draw(rows, labels, classes):
    """A row an image: the image, then the maps of each net, a column a group, with a gap between nets."""
    counts = [len(maps) for maps, _ in rows[0][2]]
    ratios = [1, *itertools.chain.from_iterable([0.15, *[1] * count] for count in counts)]
    figure = plt.figure(
        figsize=(1.15 * sum(ratios) + 0.2, 1.35 * len(rows) + 0.7), dpi=110, layout='constrained'
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for top, row, (name, image, seen) in zip([True] + [False] * len(rows), axes, rows):
        image = enlarge(image)
        row[0].imshow(image)
        row[0].set_xlabel(shorten(name), fontsize=9, parse_math=False)
        column = 1
        for label, (maps, taken_for) in zip(labels, seen):
            for i, attention in enumerate(maps):
                ax = row[column + 1 + i]
                ax.imshow(overlay(image, attention))
                if top:
                    h, w = attention.shape
                    ax.set_title(
                        f'{shorten(label, 20) if i == len(maps) // 2 else ""}\ngroup {i}, {w}×{h}',
                        fontsize=8,
                        parse_math=False,
                    )
            if taken_for is not None:
                row[column + 1 + len(maps) // 2].set_xlabel(
                    f'→ {shorten(taken_for)}',
                    fontsize=9,
                    color=verdict(name, taken_for, classes),
                    parse_math=False,
                )
            column += 1 + len(maps)
    axes[0, 0].set_title('\nimage', fontsize=8)
    return figure


def shorten(name, most=14):
    return name if len(name) <= most else f'{name[: most - 1]}…'


def verdict(name, taken_for, classes):
    """The colour of an answer: green or red where the image's class is known."""
    return 'black' if name not in classes else '#1a7f37' if name == taken_for else '#b3261e'


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
