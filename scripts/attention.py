"""Where each group of a net looks: images beside the attention maps of one or more nets, as one
picture; or, in numbers, how far the maps of nets are from those of their teacher.

    # test images of the runs' data set; of imagenet.py's runs, val/ photographs as it tests on them
    python scripts/attention.py --weights logs/resnet_16_2_teacher logs/at_16_1_16_2
    python scripts/attention.py --weights logs/at_18_34
    # images of your own
    python scripts/attention.py --weights model.hkl --images cat.jpg photographs/
    python scripts/attention.py --weights model.hkl --dataset folder --dataroot DIR --save maps.png
    # a row a net; a row a mapping function
    python scripts/attention.py --weights logs/teacher logs/student --layout rows --gradient
    python scripts/attention.py --weights logs/teacher --layout rows --maps all
    # a table, on all test images
    python scripts/attention.py --agreement --weights logs/teacher logs/student logs/at

A map is utils.at of a group's output (--maps, default: the sum over channels of |A|^2), enlarged to
the image and laid over it in colour, from blue (its smallest value) to red (its largest). Gradient
attention (--gradient) is the derivative of the cross-entropy with respect to the image, the largest
over the colours. It is taken for the image's class, or for the predicted class if the net does not
know that. The predicted class is written beside or beneath the maps of a net.

Images from --images are shrunk until their longer side has --image_size pixels (default: 32 if the
first net is one of cifar.py, else as its run has it, or 224). Those of a data set are shrunk only
if --image_size is given. Photographs of a run are cropped to it (default: as the run has it).

--agreement prints, for each group, the squared distance of a student's normalised map from the
teacher's, averaged over the test images: utils.at_loss times the number of map elements. It lies in
0 .. 2, whatever the size of the map.
"""

import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import plot
import resnet
import utils
from support import photographs, program
from support.files import check_writable, write_atomically, write_text
from support.logs import check_logged_folder, class_names
from support.options import Parser, number
from support.program import UserError
from support.teachers import check_classes, same_classes
from support.weights import load_net

DATASETS = ['CIFAR10', 'CIFAR100', 'folder', 'shapes']
# The mapping functions of the paper's Table 2: how they are written, and the arguments of utils.at.
MAPS = {
    'sum1': ('sum |A|', {'p': 1}),
    'sum2': ('sum |A|²', {'p': 2}),
    'sum4': ('sum |A|⁴', {'p': 4}),
    'max': ('max |A|', {'p': 1, 'map': 'max'}),
}

parser = Parser(__doc__)
add = parser.add_argument
add(
    '--weights',
    nargs='+',
    required=True,
    metavar='W',
    help='run folders, or weights files whose names tell the net',
)
add(
    '--labels',
    nargs='+',
    metavar='NAME',
    help="a name for each of them (default: the folder's or file's)",
)
add('--images', nargs='+', metavar='PATH', help='image files, or folders of them')
add(
    '--dataset',
    choices=DATASETS,
    help='show its test images, classes in turn (default: the data of the first run, or shapes)',
)
add(
    '--dataroot',
    help="folder of the data set's files or photographs (default: as the run has it, or .)",
)
add('--n', default=6, type=number(int, 1, 100), help='number of images (default: 6)')
add(
    '--image_size',
    type=number(int, 8, 1024),
    help='longest side in pixels, or crop of photographs (default: as the net was trained)',
)
add(
    '--maps',
    nargs='+',
    default=['sum2'],
    choices=[*MAPS, 'all'],
    help='sum over channels of |A|^1, |A|^2, |A|^4, or max of |A| (paper, default: sum2)',
)
add(
    '--gradient',
    action='store_true',
    help='add |d loss / d image|, maximum over colours; its top 1 %% is all red',
)
add(
    '--layout',
    default='columns',
    choices=['columns', 'rows'],
    help='columns: nets side by side; rows: nets beneath each other (default: columns)',
)
add(
    '--agreement',
    action='store_true',
    help='print a table: distance of maps from those of the first net, on all test images',
)
add(
    '--save',
    metavar='FILE',
    help='picture, .png (default: attention.png); with --agreement: table, .md (default: none)',
)


class LabelledNet(NamedTuple):
    """A support.weights.Net with the label that it is shown under."""

    label: str
    f: Callable
    params: dict
    records: list

    def logits_and_groups(self, images):
        """(logits [B, K], groups) of uint8 images [B, H, W, 3], in float32."""
        return self.f(self.normalize(images), self.params, False)

    def normalize(self, images):
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], as the net was trained."""
        statistics = () if self.is_small() else (data.IMAGENET_MEAN, data.IMAGENET_STD)
        return data.normalize(images, *statistics)

    def is_small(self):
        """Whether the net is one of cifar.py's, for small images."""
        return resnet.layout(self.params) in ('wrn', 'nin')


def main(argv=None):
    opt, given = parser.parse(argv)
    maps = list(MAPS) if 'all' in opt.maps else list(dict.fromkeys(opt.maps))
    check_options(opt, given, maps)
    labels = opt.labels or [Path(w).resolve().stem for w in opt.weights]
    nets = [LabelledNet(label, *load_net(w)) for label, w in zip(labels, opt.weights)]
    if opt.agreement:
        return tell_agreement(opt, nets, maps[0])
    images, classes = find_images(opt, nets)
    longest, rows = opt.image_size, []
    if opt.images and not longest:
        longest = 32 if nets[0].is_small() else side_of(opt, first_record(nets))
    for name, image in images:
        image = shrink(image, longest) if longest else image
        seen = [look(image, net, maps, opt.gradient, name, classes) for net in nets]
        rows.append((name, image, [strip for net, s in zip(nets, seen) for strip in s]))
    save = Path(opt.save or 'attention.png')
    save.parent.mkdir(parents=True, exist_ok=True)
    figure = {'columns': draw_columns, 'rows': draw_rows}[opt.layout](rows, classes)
    write_atomically(save, lambda file: figure.savefig(file, format='png'))
    plt.close(figure)
    print(f'wrote {save}')


def check_options(opt, given, maps):
    """Raises UserError if options contradict each other, or --save cannot be written."""
    if opt.agreement:
        if pointless := sorted(given & {'images', 'n', 'gradient', 'layout'}):
            raise UserError(
                f'--agreement: is a table on all test images; leave --{pointless[0]} out'
            )
        if len(opt.weights) < 2:
            raise UserError('--agreement: give a teacher and at least one other net to --weights')
        if len(maps) > 1:
            raise UserError('--agreement: give one of --maps')
    suffix = '.md' if opt.agreement else '.png'
    if opt.save:
        if Path(opt.save).suffix != suffix:
            raise UserError(f'--save {opt.save}: must end in {suffix}')
        check_writable(Path(opt.save).parent)
    elif not opt.agreement:
        check_writable('.')
    if opt.images and (opt.dataset or opt.dataroot):
        raise UserError('--images and --dataset: give one of them')
    if opt.labels and len(opt.labels) != len(opt.weights):
        raise UserError(f'--labels: {len(opt.labels)} names for {len(opt.weights)} --weights')


# ------------------------ images: [(what is known of it, uint8 [H, W, 3] RGB)]


def find_images(opt, nets):
    """(the images to show, their names: classes where they are known; all the class names, [] where
    they are not known)."""
    if opt.images:
        return read_images(opt.images, opt.n), []
    if shows_photographs(opt, nets):
        return choose_photographs(opt, first_record(nets))
    return choose_images(*choose_set(opt, nets), opt.n)


def first_record(nets):
    """The first line of the first net's log, {} of a weights file."""
    return nets[0].records[0] if nets[0].records else {}


def shows_photographs(opt, nets):
    """Whether the test images are the val/ photographs of the first net's own run."""
    run = first_record(nets)
    return not opt.dataset and 'dataset' not in run and 'imagenetpath' in run


def choose_set(opt, nets):
    """(dataset, dataroot): those given, or those of the first net's run."""
    run = first_record(nets)
    dataset = opt.dataset or (run['dataset'] if run.get('dataset') in DATASETS else 'shapes')
    logged = run.get('dataroot') if isinstance(run.get('dataroot'), str) else None
    if logged and dataset == 'folder' and not opt.dataroot:
        check_logged_folder(f'--weights {opt.weights[0]}', 'images', logged, '--images')
    return dataset, opt.dataroot or logged or '.'


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
    """(n test images, the first of each class in turn, with their classes; all class names)."""
    if dataset == 'folder':
        _, test = data.scan_folder(dataroot)
        names, files = zip(*in_turn(test, n))
        return list(zip(names, data.decode_all(files))), list(test)
    classes, load = data.open_sets(dataset, dataroot)
    _, test = load()
    members = {c: (test.labels == i).nonzero().flatten().tolist() for i, c in enumerate(classes)}
    return [(c, test.images[i].numpy()) for c, i in in_turn(members, n)], classes


def choose_photographs(opt, run):
    """(n photographs of val/ of a run of imagenet.py, the first of each class in turn, each with
    its class; all the class names), in the view that the run is tested on. Sets --image_size to its
    side where it was not given."""
    val = val_photographs(opt, run)
    names, files = zip(*in_turn(val, opt.n))
    views = data.in_threads(lambda f: photographs.centre_view(f, opt.image_size), files, 'decoding')
    return list(zip(names, views)), list(val)


def val_photographs(opt, run):
    """{class: [files]} of val/ of a run of imagenet.py. Sets --image_size, if it was not given, to
    the side that the run is tested at."""
    root, run_folder = opt.dataroot or str(run['imagenetpath']), opt.weights[0]
    if not opt.dataroot:
        check_logged_folder(f'--weights {run_folder}', 'photographs', root, '--images')
    opt.image_size = side_of(opt, run)
    option = '--dataroot' if opt.dataroot else f'--weights {run_folder}: its --imagenetpath'
    return photographs.scan_photographs(root, option)[1]


def side_of(opt, run):
    """The side of the crop that photographs are tested at: --image_size, or that of the run."""
    side = opt.image_size or run.get('image_size', 224)
    if type(side) is not int or not 8 <= side <= 1024:
        raise UserError(
            f'--weights {opt.weights[0]}: its log has the impossible image_size {side}; '
            'give --image_size'
        )
    return side


def in_turn(folder, n):
    """The first n of {class: files}, each class in turn: [(class, file)]."""
    pairs = [[(name, file) for file in files[:n]] for name, files in folder.items()]
    return [pair for turn in itertools.zip_longest(*pairs) for pair in turn if pair][:n]


def shrink(image, longest):
    H, W = image.shape[:2]
    if max(H, W) <= longest:
        return image
    size = [max(8, round(side * longest / max(H, W))) for side in (W, H)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


# ------------------------ maps


class Strip(NamedTuple):
    """One mapping function of one net on one image."""

    label: str  # the net's
    mapping: str  # how the function is written, '' where there is but one
    maps: list  # float32 [h, w], one a group
    gradient: np.ndarray | None  # float32 [H, W]
    # The class that the net takes the image for, None where it has no known name.
    answer: str | None


@torch.no_grad()
def look(image, net, maps, gradient, name, classes):
    """The Strips of a net on an image, uint8 [H, W, 3], one for each of `maps`, names in MAPS; the
    first also holds, where it is asked for, the gradient.

    name: what is known of the image, its class if it is one of `classes`."""
    x = torch.from_numpy(image)[None]
    logits, groups = net.logits_and_groups(x)
    names = class_names(net.records) or classes
    names = names if len(names) == logits.shape[1] else []
    taken_for = int(logits.argmax())
    known = name in classes and name in names
    target = names.index(name) if known else taken_for
    J = gradient_map(x, net, target) if gradient else None
    answer = names[taken_for] if names else None
    strips = []
    for key in maps:
        written, arguments = MAPS[key]
        found = [utils.at(g, **arguments)[0].view(g.shape[2:]).numpy() for g in groups]
        strips.append(Strip(net.label, written if len(maps) > 1 else '', found, J, answer))
        J = answer = None
    return strips


def gradient_map(images, net, target):
    """Gradient attention float32 [H, W] of one image, uint8 [1, H, W, 3], and of the class
    `target`: the largest over the colour channels of |d cross_entropy / d x| (section 3.2 of the
    paper), x being the image as the net sees it, normalised."""
    x, targets = net.normalize(images), torch.tensor([target])
    _, _, J = utils.input_gradient(lambda x: net.f(x, net.params, False), x, targets)
    return J[0].abs().amax(0).numpy()


def overlay(image, attention, highest=100):
    """The map, enlarged, in colour over the image in grey: uint8 [H, W, 3] RGB. What lies above the
    percentile `highest` is red alike."""
    H, W = image.shape[:2]
    attention = np.minimum(attention, np.percentile(attention, highest))
    if attention.shape != (H, W):
        attention = cv2.resize(attention, (W, H), interpolation=cv2.INTER_CUBIC)
    attention = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-30)
    colours = cv2.applyColorMap(np.uint8(255 * attention), cv2.COLORMAP_JET)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(cv2.addWeighted(grey, 0.4, colours, 0.6, 0), cv2.COLOR_BGR2RGB)


# ------------------------ the picture, in pixels from its upper left corner

SIDE = 128  # of an image, at most
GAP, BREAK, LINE = 3, 18, 17  # between images, between nets or blocks, of a line of text


class Place(NamedTuple):
    """Where a line of text stands, in pixels."""

    x: float  # of its left end, middle or right end, as `ha` says
    y: float  # of its upper end
    width: float  # at most
    ha: str = 'center'  # or 'left', 'right'


def draw_columns(rows, classes):
    """A row an image: the image, then the maps of each net, a column a group, nets set apart."""
    width, height = cell(rows)
    starts, widths, x = [], [], width
    for strip in rows[0][2]:
        starts.append(x + BREAK)
        widths.append(len(panels(strip)) * (width + GAP) - GAP)
        x += BREAK + widths[-1]
    heads = (2 if any(strip.mapping for strip in rows[0][2]) else 1) * LINE
    top, step = heads + 1.5 * LINE, height + 1.5 * LINE
    page = new_page(x, top + len(rows) * step)
    put_text(page, 'image', width / 2, heads, width)
    for start, wide, strip in zip(starts, widths, rows[0][2]):
        put_text(page, strip.label, start + wide / 2, 0, wide, weight='bold')
        put_text(page, strip.mapping, start + wide / 2, LINE, wide)
        for i, (head, _) in enumerate(panels(strip)):
            put_text(page, head, start + i * (width + GAP) + width / 2, heads, width)
    for k, (name, image, strips) in enumerate(rows):
        y = top + k * step
        put_image(page, image, 0, y, width, height)
        put_text(page, name, width / 2, y + height, width)
        for start, wide, strip in zip(starts, widths, strips):
            for i, (_, picture) in enumerate(panels(strip, image)):
                put_image(page, picture, start + i * (width + GAP), y, width, height)
            put_answer(page, strip, name, classes, Place(start + wide / 2, y + height, wide))
    return page


def draw_rows(rows, classes):
    """A block an image: the image, and beside it a row for each net and mapping function, a column
    a group."""
    width, height = cell(rows)
    groups = max(len(strip.maps) for strip in rows[0][2])
    columns = groups + any(strip.gradient is not None for strip in rows[0][2])
    start = width + SIDE + 2 * BREAK  # the second column is text
    top, block = 1.5 * LINE, max(len(rows[0][2]) * (height + GAP), height + LINE) + BREAK
    page = new_page(start + columns * (width + GAP) - GAP, top + len(rows) * block - BREAK)
    put_text(page, 'image', width / 2, 0, width)
    for i in range(columns):
        head = 'gradient' if i == groups else column_head(i, rows)
        put_text(page, head, start + i * (width + GAP) + width / 2, 0, width)
    for k, (name, image, strips) in enumerate(rows):
        y = top + k * block
        put_image(page, image, 0, y, width, height)
        put_text(page, name, width / 2, y + height, width)
        for strip in strips:
            put_lines(page, strip, name, classes, start - 3 * GAP, y + height / 2)
            for i, (head, picture) in enumerate(panels(strip, image)):
                column = groups if head == 'gradient' else i
                put_image(page, picture, start + column * (width + GAP), y, width, height)
            y += height + GAP
    return page


def panels(strip, image=None):
    """[(head, picture)] of a strip: its maps over the image, then the gradient if it has one.
    Without an image: heads alone."""

    def over(attention, highest=100):
        return None if image is None else overlay(image, attention, highest)

    found = [(f'group {i}, {m.shape[1]}×{m.shape[0]}', over(m)) for i, m in enumerate(strip.maps)]
    return found + ([] if strip.gradient is None else [('gradient', over(strip.gradient, 99))])


def column_head(i, rows):
    """What stands over the maps of group i; their size where all have one."""
    maps = [strip.maps[i] for _, _, strips in rows for strip in strips if i < len(strip.maps)]
    shapes = {m.shape for m in maps}
    return f'group {i}, {maps[0].shape[1]}×{maps[0].shape[0]}' if len(shapes) == 1 else f'group {i}'


def put_lines(page, strip, name, classes, x, y):
    """Label, mapping function and answer of a strip beneath each other, with their right end at x
    and their middle at y."""
    label = textwrap.wrap(strip.label, 15, max_lines=3, placeholder='…')
    y -= LINE * (len(label) + bool(strip.mapping) + (strip.answer is not None)) / 2
    for line, weight in [(v, 'bold') for v in label] + [(strip.mapping, 'normal')]:
        put_text(page, line, x, y, SIDE + BREAK, weight=weight, ha='right')
        y += LINE if line else 0
    put_answer(page, strip, name, classes, Place(x, y, SIDE + BREAK, 'right'))


def put_answer(page, strip, name, classes, place):
    """What the net takes the image for, if that has a name."""
    if strip.answer is not None:
        colour = verdict(name, strip.answer, classes)
        put_text(page, f'→ {strip.answer}', *place, color=colour)


def new_page(width, height, margin=6, dpi=110):
    """A figure of so many pixels, and a margin around them."""
    size = [round(side + 2 * margin) / dpi for side in (width, height)]
    page = plt.figure(figsize=size, dpi=dpi)
    page.margin = margin
    return page


def put_image(page, image, x, y, width, height):
    """An image in the middle of a cell. It is written pixel by pixel: matplotlib would blur it."""
    image = enlarge(shrink(image, SIDE))
    h, w = image.shape[:2]
    left, upper = round(x + (width - w) / 2), round(y + (height - h) / 2)
    H = round(page.get_figheight() * page.dpi)
    page.figimage(image, page.margin + left, H - page.margin - upper - h, origin='upper')


def put_text(page, text, x, y, width, ha='center', **style):
    """One line of text with its upper end at y. If it is wider than `width`, the middle is cut out,
    because file names differ at their ends."""
    W, H = page.get_size_inches() * page.dpi
    place = [(page.margin + x) / W, 1 - (page.margin + y + LINE / 2) / H]
    style |= {'va': 'center_baseline', 'ha': ha, 'fontsize': 8.5, 'parse_math': False}
    shown = page.text(*place, text, **style)
    kept = len(text)
    while kept > 1 and shown.get_window_extent(page.canvas.get_renderer()).width > width:
        kept -= 1
        shown.set_text(f'{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}')


def cell(rows):
    """(width, height) that the images are shown in, wide enough for what stands above them."""
    shapes = [enlarge(shrink(image, SIDE)).shape for _, image, _ in rows]
    return max(SIDE - LINE, *(w for _, w, _ in shapes)), max(h for h, _, _ in shapes)


def enlarge(image, side=SIDE):
    """A whole number of times, as far as the longer side stays within `side`; pixels are left as
    squares: what the net saw."""
    scale = max(1, side // max(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)


def verdict(name, taken_for, classes):
    """The colour of an answer: green or red where the image's class is known."""
    return 'black' if name not in classes else '#1a7f37' if name == taken_for else '#b3261e'


# ------------------------ agreement with the teacher, in numbers


def tell_agreement(opt, nets, key):
    """Prints, and with --save writes, the table of --agreement."""
    teacher, students = nets[0], nets[1:]
    check_kinds(opt.weights, nets)
    batches, classes, n, source = open_batches(opt, nets)
    for weights, net in zip(opt.weights[1:], students):
        check_classes(f'--weights {weights}', net, classes)
    if not same_classes(teacher.params, teacher.records, classes):
        print(
            f'warning: --weights {opt.weights[0]}: '
            f'the teacher was trained on other classes than {source} has',
            file=sys.stderr,
        )
    with data.progress(n, 'comparing') as bar:
        distances = measure(batches, teacher, students, MAPS[key][1], bar.update)
    written, _ = MAPS[key]
    text = (
        f'Mean over the {n:,} test images of {source} of the squared distance of two maps, '
        f'{written} over the channels, l2-normalised: '
        f'between those of a net and of its teacher, {teacher.label}. '
        '0: they are the same; 2: no place is in both.\n\n'
        f'{plot.markdown(agreement_rows(students, distances))}\n'
    )
    print(text, end='')
    if opt.save:
        Path(opt.save).parent.mkdir(parents=True, exist_ok=True)
        write_text(opt.save, text)
        print(f'wrote {opt.save}')


def check_kinds(weights, nets):
    """Raises UserError if a net has not as many groups as the teacher."""
    for path, net in zip(weights, nets):
        if net.is_small() != nets[0].is_small():
            kinds = {True: 'small images, with 3 groups', False: 'photographs, with 4 groups'}
            raise UserError(
                f'--agreement: {weights[0]} is a net for {kinds[nets[0].is_small()]}, '
                f'{path} one for {kinds[net.is_small()]}'
            )


def open_batches(opt, nets):
    """(batches, classes, N, name) of the N test images: `batches` yields (uint8 [B, H, W, 3],
    labels int64 [B]), in order. No more of them are in memory than a few batches, but for CIFAR and
    shapes, which are loaded whole. Nets for photographs see the centre of a folder's images, as
    imagenet.py tests."""
    run = first_record(nets)
    if shows_photographs(opt, nets):
        folder, name = val_photographs(opt, run), opt.dataroot or run['imagenetpath']
    else:
        dataset, dataroot = choose_set(opt, nets)
        if dataset != 'folder':
            classes, load = data.open_sets(dataset, dataroot)
            _, test = load()
            batches = zip(test.images.split(250), test.labels.split(250))
            return batches, classes, len(test.labels), dataset
        _, folder = data.scan_folder(dataroot)
        name = dataroot
    files = [file for files in folder.values() for file in files]
    labels = torch.tensor([c for c, files in enumerate(folder.values()) for _ in files])
    decoded = decoded_whole(files) if nets[0].is_small() else centres(files, side_of(opt, run))
    batches = ((images, labels[index]) for index, images in decoded)
    return batches, list(folder), len(files), Path(name).resolve().name


def decoded_whole(files, size=250):
    """(indices, uint8 [B, H, W, 3]) of batches of image files. Raises UserError if not all have
    one size."""
    shape = None
    for index in torch.arange(len(files)).split(size):
        images = data.decode_all([files[i] for i in index])
        shape = shape or images[0].shape
        for i, image in zip(index, images):
            if image.shape != shape:
                raise UserError(
                    f'{files[i]}: is {image.shape[1]}x{image.shape[0]}, '
                    f'the first image is {shape[1]}x{shape[0]}; all must have one size'
                )
        yield index, torch.from_numpy(np.stack(images))


def centres(files, side, size=50):
    """(indices, uint8 [B, side, side, 3]) of batches of photographs, each as
    photographs.centre_view shows it."""
    indices = torch.arange(len(files)).split(size)
    return photographs.load_batches(
        indices, lambda i, out: photographs.centre_view(files[i], side, out), side
    )


@torch.inference_mode()
def measure(batches, teacher, students, arguments, progress=lambda n: None):
    """For each student float64 [2, 1 + groups]: of the images that it answers rightly, and of those
    that it answers wrongly, their number, and for each group the sum over them of the squared
    distance of the two normalised maps,

        ||at(student) - at(teacher)||^2 = at_loss * (number of map elements)

    which lies in 0 .. 2, as no element of a map is negative. Maps of unequal size are pooled as in
    utils.at_loss; `arguments` are its p and map.
    """
    sums = [0.0] * len(students)
    for images, labels in batches:
        _, wanted = teacher.logits_and_groups(images)
        for k, student in enumerate(students):
            logits, groups = student.logits_and_groups(images)
            right = logits.argmax(1) == labels
            parts = [summed(groups, wanted, chosen, arguments) for chosen in (right, ~right)]
            sums[k] = sums[k] + torch.stack(parts)
        progress(len(labels))
    return sums


def summed(groups, wanted, chosen, arguments):
    """float64 [1 + groups]: the number of `chosen` images, bool [B], and the sums over them, as
    `measure` says."""
    n = int(chosen.sum())
    if n == 0:
        return torch.zeros(1 + len(groups), dtype=torch.double)
    sums = []
    for x, y in zip(groups, wanted):
        elements = min(x.shape[2], y.shape[2]) * min(x.shape[3], y.shape[3])
        sums.append(n * elements * float(utils.at_loss(x[chosen], y[chosen], **arguments)))
    return torch.tensor([n, *sums], dtype=torch.double)


def agreement_rows(students, distances):
    """The lines of the table, as lists: three a net, of all images, of those that it answers
    rightly, and wrongly."""
    groups = len(distances[0][0]) - 1
    rows = [['net', 'its answers', 'images', *(f'group {g}' for g in range(groups))]]
    for student, sums in zip(students, distances):
        right, wrong = sums.tolist()
        every = {'all': sums.sum(0).tolist(), 'right': right, 'wrong': wrong}
        for answers, (n, *totals) in every.items():
            means = [f'{total / n:.4f}' if n else '—' for total in totals]
            rows.append([student.label if answers == 'all' else '', answers, f'{n:,.0f}', *means])
    return rows


if __name__ == '__main__':
    sys.exit(program.call_main(main))
