"""What several test files share: random tensors, nets with known values, small sets, logs."""

import copy
import functools
import json

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import resnet
from support import logs, names, options, program, weights

LINE = 'json_stats: {"epoch": 1, "test_acc": 91.5, "depth": 16}'  # of a log.txt


def randn(*size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def a_parser():
    """The options that both training scripts have, with CIFAR's defaults."""
    parser = options.Parser('A test.')
    options.add_training_options(parser, 128, 0.1, 5e-4, ([60, 120, 160], 200), lr_decay_ratio=0.2)
    return parser


def words(*options):
    """The words of a command line. Strings are split at their spaces, paths are not."""
    parts = [o.split() or [''] if isinstance(o, str) else [str(o)] for o in options]
    return [word for part in parts for word in part]


def records_of(folder):
    """The records of a run's log."""
    return logs.read_log(folder / 'log.txt')


def log_of(folder, drop=('save',)):
    """The log's records without measured times and without `drop`, in which two runs differ."""
    records = records_of(folder)
    return [{k: v for k, v in r.items() if 'time' not in k and k not in drop} for r in records]


def weights_of(folder):
    """The parameters that a run has written."""
    return weights.load_params(folder / 'model.hkl')


def same_weights(a, b):
    """Whether the weights of two runs are the same bytes."""
    return (a / 'model.hkl').read_bytes() == (b / 'model.hkl').read_bytes()


def evaluated(output):
    """The json_stats line that --evaluate has printed last."""
    return json.loads(output.splitlines()[-1].removeprefix('json_stats: '))


def make_photographs(root, classes=('beach', 'city', 'wood'), train=14, val=5):
    """root/train and root/val: JPEGs of many sizes, some of them grey, whose colour depends a
    little on the class."""
    rng = np.random.default_rng(0)
    for split, n in ('train', train), ('val', val):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                size = rng.integers(40, 120, 2)
                image = cv2.resize(
                    rng.integers(0, 256, (7, 9, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC
                )
                image[..., c] = np.minimum(255, image[..., c] + 40.0)
                cv2.imwrite(str(root / split / name / f'{i}.jpg'), image if i else image[..., 0])
    return root


def make_run(folder, seed=0, epochs=3, classes=data.SHAPES):
    """A run folder with an untrained WRN-10-1 and the log of a run that learned."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    _, params = resnet.wrn(10, 1, len(classes))
    weights.save_params(folder / 'model.hkl', params)
    records = [
        {
            'depth': 10,
            'width': 1.0,
            'dataset': 'shapes',
            'epoch': epoch,
            'epochs': epochs,
            'train_acc': 50.0 + 3 * epoch,
            'test_acc': 40.0 + 3 * epoch + seed,
            'n_parameters': 77850,
            'classes': classes,
            'train_time': 30.0,
            'test_time': 1.5,
        }
        for epoch in range(1, epochs + 1)
    ]
    (folder / 'log.txt').write_text(''.join(f'{logs.json_stats(r)}\n' for r in records))
    return folder


def make_folder_set(root, n=4, side=32):
    """root/train and root/test with two classes of n images each: dark and light noise."""
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for name, low in ('dark', 0), ('light', 150):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(low, low + 100, (side, side, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    return root


def warnings_of(done):
    """The lines on stderr of a program, without what it says of the weak teachers of these tests,
    which are hardly better than chance, and worse than some students."""
    weak = 'not clearly above chance', 'is better than its teacher'
    return [line for line in done.stderr.splitlines() if not any(said in line for said in weak)]


def picture(file):
    """The picture in a file, which must show something."""
    image = cv2.imread(str(file))
    assert image is not None and min(image.shape[:2]) > 100 and image.std() > 5
    return image


def refused(main, argv, capsys, status=2):
    """The one line with which main refuses these options."""
    capsys.readouterr()
    assert program.call_main(main, [str(a) for a in argv]) == status
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and ': error: ' in error and 'Traceback' not in error
    return error


def from_torchvision(state):
    """torchvision's parameters under our names."""
    state = {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    return {names.to_ours(k, 'torchvision'): v for k, v in state.items()}


MODELS = {18: 'resnet18', 34: 'resnet34', 50: 'resnet50', 101: 'resnet101'}


def torchvision_net(depth, width=1, num_classes=7):
    """(torchvision's model with random batch norms, its parameters with our names)."""
    net = copy.deepcopy(_torchvision_net(depth, width, num_classes))
    torch.manual_seed(depth)
    return net, from_torchvision({k: v.detach().clone() for k, v in net.state_dict().items()})


@functools.lru_cache(2)  # torchvision draws all values twice
def _torchvision_net(depth, width, num_classes):
    torch.manual_seed(depth)
    name = 'wide_resnet50_2' if width == 2 else MODELS[depth]
    net = getattr(torchvision.models, name)(num_classes=num_classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1), nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return net


def random_resnet(depth, width, num_classes):
    """The parameters of a resnet with random batch norms."""
    torch.manual_seed(depth)
    _, params = resnet.resnet(depth, width, num_classes)
    for name, v in params.items():
        kind = name.rsplit('.', 1)[-1]
        if kind in ('running_var', 'weight') and v.dim() == 1:
            nn.init.uniform_(v, 0.5, 1)
        elif kind in ('running_mean', 'bias'):
            nn.init.normal_(v, 0, 0.1)
    return {k: v.detach() for k, v in params.items()}


def fold(params):
    """The parameters of a resnet with its batch norms folded into the convolutions, in float64."""
    folded = {}
    for name in params:
        kind = name.rsplit('.', 1)[-1]
        if not kind.startswith('conv'):
            continue
        bn = name[: -len(kind)] + kind.replace('conv', 'bn')
        names = ('weight', 'bias', 'running_mean', 'running_var')
        w, b, m, v = (params[f'{bn}.{k}'].double() for k in names)
        scale = w / (v + 1e-5).sqrt()
        base = name.replace('convdim', 'conv_dim')
        folded[f'{base}.weight'] = (params[name].double() * scale[:, None, None, None]).float()
        folded[f'{base}.bias'] = (b - m * scale).float()
    return folded | {k: params[k] for k in ('fc.weight', 'fc.bias')}


class AffineNet(nn.Module):
    """ResNet-18-AT as described: pre-activation, group0.block0 without affine0."""

    def __init__(self, widths=(64, 64, 128, 256, 512), num_classes=7):
        super().__init__()
        self.p = {'conv0': torch.randn(64, 3, 7, 7) * 0.05}

        def affine(base, n):
            self.p[f'{base}.a'], self.p[f'{base}.b'] = torch.rand(n) + 0.5, torch.randn(n) * 0.1

        affine('affine0', 64)
        for g in range(4):
            for i in range(2):
                ni, no, base = widths[g + (i > 0)], widths[g + 1], f'group{g}.block{i}'
                if g or i:
                    affine(f'{base}.affine0', ni)
                self.p[f'{base}.conv0'] = torch.randn(no, ni, 3, 3) / (9 * ni) ** 0.5
                affine(f'{base}.affine1', no)
                self.p[f'{base}.conv1'] = torch.randn(no, no, 3, 3) / (9 * no) ** 0.5
                if ni != no:
                    self.p[f'{base}.conv_dim'] = torch.randn(no, ni, 1, 1) / ni**0.5
        affine('affine_last', widths[-1])
        self.p['fc.weight'] = torch.randn(num_classes, widths[-1])
        self.p['fc.bias'] = torch.randn(num_classes)

    def affine(self, x, base):
        a, b = self.p[f'{base}.a'], self.p[f'{base}.b']
        return torch.relu(torch.einsum('bchw,c->bchw', x, a) + b[None, :, None, None])

    def forward(self, x):
        p = self.p
        x = self.affine(F.conv2d(x, p['conv0'], stride=2, padding=3), 'affine0')
        x, groups = nn.MaxPool2d(3, 2, 1)(x), []
        for g in range(4):
            for i in range(2):
                base, stride = f'group{g}.block{i}', 2 if g and not i else 1
                o = x if g == i == 0 else self.affine(x, f'{base}.affine0')
                z = F.conv2d(o, p[f'{base}.conv0'], stride=stride, padding=1)
                z = F.conv2d(self.affine(z, f'{base}.affine1'), p[f'{base}.conv1'], padding=1)
                x = z + (F.conv2d(o, p[f'{base}.conv_dim'], stride=stride) if g and not i else x)
            groups.append(x)
        x = self.affine(x, 'affine_last').mean((2, 3))
        return F.linear(x, p['fc.weight'], p['fc.bias']), groups
