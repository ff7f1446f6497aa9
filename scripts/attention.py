"""Draw where each group of a net looks: images next to the attention maps of nets.

    # test images of the run's data set; for a run of imagenet.py, photographs in val/
    python scripts/attention.py --weights logs/resnet_16_2_teacher logs/at_16_1_16_2
    python scripts/attention.py --weights logs/at_18_34
    # your own images
    python scripts/attention.py --weights model.hkl --images cat.jpg photographs/
    python scripts/attention.py --weights model.hkl --dataset folder --dataroot DIR --save maps.png
    # one row per net; one row per mapping function
    python scripts/attention.py --weights logs/teacher logs/student --layout rows --gradient
    python scripts/attention.py --weights logs/teacher --layout rows --maps all

A map is utils.at of a group's output (--maps, default: the sum over channels of |A|^2), enlarged to
the image and laid over it. Each map is scaled separately, from dark (low) to bright (high).
Gradient attention (--gradient) is the derivative of the cross-entropy with respect to the image,
the largest over the colours. It is taken for the image's class, or for the predicted class if the
net does not know that.

The predicted class is below the maps of the net, or below its label: green if it is right, red if
it is wrong, grey if the image's class is unknown or is not one of the net's.

Images from --images are shrunk until their longer side has --image_size pixels (default: as the
run of the first net has it, else 32 or 224). Those of a data set are shrunk only if --image_size is
given. Photographs of a run are cropped to it (default: as the run has it).
Distances between maps, in numbers: scripts/agreement.py.
"""

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import data
import resnet
import utils
from attention_nets import (
    IMAGE_SIZES,
    MAPS,
    MAPS_HELP,
    add_net_options,
    find_source,
    load_nets,
    side_of,
)
from attention_page import GREEN, GREY, RED, ByColumns, ByRows, Row, Seen, draw, shrink
from support import photographs, program
from support.files import check_file, write_atomically
from support.logs import class_names
from support.options import Parser, number
from support.program import UserError

LAYOUTS = {'columns': ByColumns, 'rows': ByRows}

parser = Parser(__doc__)
add = parser.add_argument
add_net_options(add)
add(
    '--image_size',
    type=number(int, *IMAGE_SIZES),
    help='longest side in pixels, or crop of photographs (default: as the net was trained)',
)
add('--images', nargs='+', metavar='PATH', help='image files, or folders of them')
add('--n', default=6, type=number(int, 1, 100), help='number of images (default: 6)')
add('--maps', nargs='+', default=['sum2'], choices=[*MAPS, 'all'], help=MAPS_HELP)
add(
    '--gradient',
    action='store_true',
    help='add |d loss / d image|, maximum over colours; its top 1 %% is equally bright',
)
add(
    '--layout',
    default='columns',
    choices=list(LAYOUTS),
    help='columns: nets side by side; rows: one net below the other (default: columns)',
)
add('--save', default='attention.png', metavar='FILE', help='picture, .png (default: %(default)s)')


def main(argv=None):
    opt, _ = parser.parse(argv)
    check_options(opt)
    nets = load_nets(opt)
    for path, net in zip(opt.weights, nets):
        if opt.gradient and resnet.num_classes(net.params) is None:
            raise UserError(f'--gradient: {path} has no head (fc.*), so no loss to differentiate')
    maps = list(MAPS) if 'all' in opt.maps else list(dict.fromkeys(opt.maps))
    images, classes = find_images(opt, nets[0])
    rows = []
    for name, image in images:
        seen = [look(image, net, maps, opt.gradient, name, classes) for net in nets]
        rows.append(Row(name, image, seen))
    page = draw(rows, LAYOUTS[opt.layout])
    Path(opt.save).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(opt.save, lambda file: page.savefig(file, format='png'))
    print(f'wrote {opt.save}')


def check_options(opt):
    """Raise UserError if options contradict each other, or --save cannot be written."""
    if Path(opt.save).suffix != '.png':
        raise UserError(f'--save {opt.save}: must end in .png')
    check_file(opt.save)
    if opt.images and (opt.dataset or opt.dataroot):
        raise UserError('--images: cannot be combined with --dataset or --dataroot')


# ------------------------ images


def find_images(opt, net):
    """([(name, uint8 [H, W, 3] RGB)] of --n images, class names).

    The name of an image is its class; of --images, whose classes are not known, its file name.
    """
    if opt.images:
        longest = side_of(opt, net)
        return [(name, shrink(image, longest)) for name, image in read_images(opt)], []
    source = find_source(opt, net)
    if source.dataset == 'photographs':
        return choose_photographs(source.scan(), opt.n, side_of(opt, net))
    images, classes = choose_images(source, opt.n)
    longest = opt.image_size or max(max(image.shape) for _, image in images)
    return [(name, shrink(image, longest)) for name, image in images], classes


def read_images(opt):
    """The first --n of the files --images and of those in folders, each with its file's name."""
    files = []
    for path in map(Path, opt.images):
        if os.path.isdir(path):
            found = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith('.'))
            if not found:
                raise UserError(f'--images {path}: holds no images')
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f'--images {path}: no such file or folder')
    files = files[: opt.n]
    return list(zip([file.name for file in files], data.decode_all(files)))


def choose_images(source, n):
    """(n test images, the first of each class in turn, with their classes; all class names)."""
    if source.dataset == 'folder':
        folder = source.scan()  # data.open_sets would decode all of it
        names, files = zip(*in_turn(folder, n))
        return list(zip(names, data.decode_all(files))), list(folder)
    classes, load = data.open_sets(source.dataset, source.root)
    _, test = load()
    members = {c: (test.labels == i).nonzero()[:, 0].tolist() for i, c in enumerate(classes)}
    return [(c, test.images[i].numpy()) for c, i in in_turn(members, n)], classes


def choose_photographs(folder, n, side):
    """As choose_images, of {class: [files]}: the centres of photographs, which the run is tested
    on."""
    names, files = zip(*in_turn(folder, n))
    views = data.in_threads(lambda f: photographs.centre_view(f, side), files, 'decoding')
    return list(zip(names, views)), list(folder)


def in_turn(folder, n):
    """The first n of {class: files}, each class in turn: [(class, file)]."""
    pairs = [[(name, file) for file in files[:n]] for name, files in folder.items()]
    return [pair for turn in itertools.zip_longest(*pairs) for pair in turn if pair][:n]


# ------------------------ maps


@torch.no_grad()
def look(image, net, maps, gradient, name, classes):
    """What a net makes of an image, uint8 [H, W, 3]: Seen.

    maps      names in MAPS
    gradient  whether its gradient attention is wanted
    name      the image's class, if it is one of `classes`, else unknown
    """
    x = torch.from_numpy(image)[None]
    logits, groups = net.logits_and_groups(x)
    # A net without a head answers nothing.
    names = class_names(net.records) or classes
    names = names if logits is not None and len(names) == logits.shape[1] else []
    predicted = None if logits is None else int(logits.argmax())
    known = name in classes and name in names
    target = names.index(name) if known else predicted
    found = {}
    for key in maps:
        written, arguments = MAPS[key]
        found[written if len(maps) > 1 else ''] = [
            utils.at(g, **arguments)[0].view(g.shape[2:]).numpy() for g in groups
        ]
    J = gradient_map(x, net, target) if gradient else None
    colour = GREY if not known else GREEN if predicted == target else RED
    return Seen(net.label, found, J, names[predicted] if names else '', colour)


def gradient_map(images, net, target):
    """Gradient attention float32 [H, W] of one image, uint8 [1, H, W, 3], and of the class
    `target`: the largest over the colour channels of |d cross_entropy / d x| (section 3.2 of the
    paper), with x the normalised image."""
    x, targets = net.normalize(images), torch.tensor([target])
    _, _, J = utils.input_gradient(lambda x: net.f(x, net.params, False), x, targets)
    return J[0].abs().amax(0).numpy()


if __name__ == '__main__':
    sys.exit(program.call_main(main))
