"""What attention.py and agreement.py share: mapping functions, nets with labels, test images."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import data
import resnet
from support import photographs
from support.logs import check_logged_folder
from support.program import UserError
from support.weights import image_shape, load_net, normalisation

# The mapping functions of the paper's Table 2: as written there, and as arguments of utils.at.
MAPS = {
    'sum1': ('sum |A|', {'p': 1}),
    'sum2': ('sum |A|²', {'p': 2}),
    'sum4': ('sum |A|⁴', {'p': 4}),
    'max': ('max |A|', {'p': 1, 'map': 'max'}),
}
MAPS_HELP = 'sum over channels of |A|^1, |A|^2, |A|^4, or max of |A| (paper, default: sum2)'
IMAGE_SIZES = (8, 1024)  # the least and the greatest --image_size
DATASETS = ['CIFAR10', 'CIFAR100', 'folder', 'shapes']


def add_net_options(add) -> None:
    """Add the options that choose nets and test images, by a parser's add_argument."""
    add(
        '--weights',
        nargs='+',
        required=True,
        metavar='W',
        help='run folders or weights files of nets',
    )
    add('--labels', nargs='+', metavar='NAME', help='a name for each net (default: its file name)')
    add(
        '--dataset',
        choices=DATASETS,
        help="data set of the test images (default: the first run's, or shapes)",
    )
    add(
        '--dataroot',
        help="folder of the data set or of photographs (default: the first run's, or .)",
    )


# ------------------------ nets


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
        return data.normalize(images, *normalisation(self.params))

    def is_small(self):
        """Whether the net is one of cifar.py's, for small images."""
        return resnet.layout(self.params) in resnet.SMALL

    def first_record(self):
        """The first line of the net's log, {} of a weights file."""
        return self.records[0] if self.records else {}


def load_nets(opt):
    """The LabelledNets of --weights and --labels."""
    if opt.labels and len(opt.labels) != len(opt.weights):
        raise UserError(f'--labels: {len(opt.labels)} names for {len(opt.weights)} --weights')
    labels = opt.labels or [Path(w).resolve().stem for w in opt.weights]
    return [LabelledNet(label, *load_net(w)) for label, w in zip(labels, opt.weights)]


# ------------------------ test images


class Source(NamedTuple):
    """Where test images come from."""

    dataset: str  # one of DATASETS, or 'photographs': those that imagenet.py tests a run on
    root: str  # folder of the data set
    option: str  # that names this folder, for errors

    def name(self):
        return Path(self.root).resolve().name if self.is_folder() else self.dataset

    def is_folder(self):
        return self.dataset in ('folder', 'photographs')

    def scan(self):
        """{class: [files]} of the test images of a folder."""
        if self.dataset == 'photographs':
            return photographs.scan_photographs(self.root, self.option)[1]
        return data.scan_folder(self.root, self.option)[1]


def find_source(opt, net):
    """The Source that the options name; what they leave open is as in the run of `net`.

    The folder of another data set, or one that is not here, is not used. Raises UserError if the
    run's folder of images is missing.
    """
    run, weights = net.first_record(), f'--weights {opt.weights[0]}'
    if not opt.dataset and 'dataset' not in run and 'imagenetpath' in run:
        dataset, name, kind = 'photographs', 'imagenetpath', 'photographs'
    else:
        dataset = opt.dataset or (run['dataset'] if run.get('dataset') in DATASETS else 'shapes')
        name, kind = 'dataroot', 'images'
    logged = run.get(name) if dataset in ('photographs', run.get('dataset')) else None
    if opt.dataroot or not isinstance(logged, str):
        return Source(dataset, opt.dataroot or '.', '--dataroot')
    source = Source(dataset, logged, f'{weights}: its --{name}')
    if source.is_folder():
        check_logged_folder(weights, kind, logged, 'another data set with --dataset')
    elif not os.path.isdir(logged):
        return Source(dataset, '.', '--dataroot')
    return source


def side_of(opt, net):
    """The longer side of the net's images: --image_size, or as its run has it, or 32 or 224."""
    return opt.image_size or max(image_shape(f'--weights {opt.weights[0]}', net))
