"""Residual networks as functions over a flat dict of tensors.

A constructor returns `(f, params)`. `params` maps names such as 'group1.block0.conv0' to tensors, and

    logits, groups = f(x, params, training, base='')

runs the net that the names spell:

    x         [B, 3, H, W], any H and W; its dtype is the one that convolutions and activations compute in
              (a float64 x needs float64 params)
    training  True: batch norm uses the batch's statistics and updates the running ones in `params` in place
    base      a prefix of every name, so that one merged dict serves several nets
    logits    [B, num_classes], float32 (float64 for a float64 x)
    groups    the activations at the end of each group, whose attention maps are transferred
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from utils import (
    UserError,
    batch_norm,
    bnparams,
    check_params,
    conv_params,
    flatten,
    linear_params,
    load_params,
    read_log,
    set_requires_grad_except_bn_,
    wide,
)


def conv2d(x, weight, stride=1, padding=0):
    """Convolution without bias in the dtype of `x`; `weight` itself stays float32."""
    return F.conv2d(x, weight.to(x.dtype), stride=stride, padding=padding)


def classify(x, params, base):
    """Global average pooling and the linear layer `base`fc, in at least float32: [B, C, H, W] -> [B, num_classes]."""
    o = wide(x).mean((2, 3))
    return F.linear(o, params[f'{base}fc.weight'].to(o.dtype), params[f'{base}fc.bias'].to(o.dtype))


# ---------------------------------------------------------------- CIFAR: pre-activation Wide ResNet


def check_wrn(depth, width) -> None:
    """Raises UserError where depth is not 6n + 4 with n >= 1, or width leaves a group without channels or asks for too many."""
    if not 10 <= depth < 10_000 or depth % 6 != 4:
        raise UserError(
            f'depth {depth}: a Wide ResNet has depth 6n + 4 with n >= 1, such as 10, 16, 22, 28 or 40'
        )
    if not 1 / 16 <= width <= 64:
        raise UserError(f'width {width}: must be 1/16, which leaves a group one channel, to 64')


def wrn(depth: int, width: float, num_classes: int) -> tuple[Callable, dict]:
    """Wide ResNet for small images: WRN-depth-width of Zagoruyko & Komodakis, BMVC 2016 (width 1: a pre-activation ResNet).

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels, the first at full resolution, the
    others at a half and a quarter. Initial values come from torch's global generator: Kaiming-normal convolutions and
    fc.weight, batch-norm weights uniform(0, 1), as the published recipe had it.

    Raises UserError as check_wrn, or where num_classes is below 1.
    """
    check_wrn(depth, width)
    if num_classes < 1:
        raise UserError(f'num_classes {num_classes}: must be at least 1')
    n = (int(depth) - 4) // 6
    widths = [int(channels * width) for channels in (16, 32, 64)]

    def block_params(ni, no):
        return {
            'bn0': bnparams(ni),
            'conv0': conv_params(ni, no, 3),
            'bn1': bnparams(no),
            'conv1': conv_params(no, no, 3),
            'convdim': conv_params(ni, no, 1) if ni != no else None,
        }

    def group_params(ni, no):
        return {f'block{i}': block_params(ni if i == 0 else no, no) for i in range(n)}

    params = flatten(
        {
            'conv0': conv_params(3, 16, 3),
            'group0': group_params(16, widths[0]),
            'group1': group_params(widths[0], widths[1]),
            'group2': group_params(widths[1], widths[2]),
            'bn': bnparams(widths[2]),
            'fc': linear_params(widths[2], num_classes),
        }
    )
    set_requires_grad_except_bn_(params)
    return wrn_function(n), params


def wrn_function(n: int) -> Callable:
    """The `f` of every wrn with n blocks a group."""

    def block(x, params, base, training, stride):
        o1 = F.relu(batch_norm(x, params, f'{base}.bn0', training))
        y = conv2d(o1, params[f'{base}.conv0'], stride, padding=1)
        o2 = F.relu(batch_norm(y, params, f'{base}.bn1', training))
        z = conv2d(o2, params[f'{base}.conv1'], padding=1)
        if f'{base}.convdim' in params:
            return z + conv2d(o1, params[f'{base}.convdim'], stride)
        return z + x

    def group(x, params, base, training, stride):
        for i in range(n):
            x = block(x, params, f'{base}.block{i}', training, stride if i == 0 else 1)
        return x

    def f(x, params, training, base=''):
        x = conv2d(x, params[f'{base}conv0'], padding=1)
        g0 = group(x, params, f'{base}group0', training, 1)
        g1 = group(g0, params, f'{base}group1', training, 2)
        g2 = group(g1, params, f'{base}group2', training, 2)
        o = F.relu(batch_norm(g2, params, f'{base}bn', training))
        return classify(o, params, base), (g0, g1, g2)

    return f


# ---------------------------------------------------------------- nets from files


def load_net(source) -> tuple[Callable, dict, list]:
    """(f, params, records) of a weights file, whose names tell the net, or of a run folder, whose log does (`records`, its
    lines; [] of a file). Folders of the published code (log.txt and model.pt7) are run folders too.

    Raises UserError that names the file where it is damaged, or not such a net's."""
    source, records = Path(source), []
    weights = source
    if os.path.isdir(source):
        records = read_log(source / 'log.txt')
        weights = source / ('model.hkl' if os.path.exists(source / 'model.hkl') else 'model.pt7')
        if not os.path.exists(weights):
            raise UserError(f'{source}: has neither model.hkl nor model.pt7')
    params = load_params(weights)
    try:
        depth, width, num_classes = wrn_shape(params)
        if records:
            depth, width = records[0].get('depth'), records[0].get('width')
            if not all(type(v) in (int, float) for v in (depth, width)):
                raise UserError(
                    f'the first line of {source / "log.txt"} does not tell depth and width'
                )
        # No memory for what may turn out not to fit.
        with torch.device('meta'):
            f, expected = wrn(depth, width, num_classes)
    except UserError as e:
        raise UserError(f'{weights}: {e}') from e
    return f, check_params(params, expected, weights), records


def wrn_shape(params: dict) -> tuple[int, float, int]:
    """(depth, width, num_classes) of the wrn whose parameters these are. Raises UserError where they are not a wrn's."""
    block = r'group[0-2]\.block\d+\.(conv0|conv1|convdim|bn[01]\.(weight|bias|running_mean|running_var))'
    known = re.compile(
        rf'conv0|{block}|bn\.(weight|bias|running_mean|running_var)|fc\.(weight|bias)'
    )
    needed = {
        'conv0': 4,
        'group0.block0.conv0': 4,
        'group2.block0.conv0': 4,
        'bn.weight': 1,
        'fc.weight': 2,
        'fc.bias': 1,
    }
    missing = [
        name for name, dim in needed.items() if name not in params or params[name].dim() != dim
    ]
    odd = [name for name in params if not known.fullmatch(name)]
    if missing or odd:
        raise UserError(
            'not the parameters of a Wide ResNet: '
            + '; '.join(
                f'{", ".join(names[:3])} {what}'
                for names, what in ((missing, 'missing'), (odd, 'not understood'))
                if names
            )
        )
    n = len({name.split('.')[1] for name in params if name.startswith('group0.')})
    return 6 * n + 4, params['group2.block0.conv0'].shape[0] / 64, params['fc.weight'].shape[0]


def from_params(params: dict) -> Callable:
    """The function of the net whose parameters these are, its topology read from their names.

    Raises UserError with the names that were not understood.
    """
    depth, _, _ = wrn_shape(params)
    return wrn_function((depth - 4) // 6)
