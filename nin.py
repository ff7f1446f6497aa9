"""Network in network (Lin et al. 2013) as a function over a flat dict of tensors, as in Tables 1
and 3 of the paper.

The constructor returns `(f, params)` with the signature that resnet.py describes; `groups` are the
three activations before pooling.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from support.program import UserError
from utils import (
    batch_norm,
    bnparams,
    classify,
    conv2d,
    conv_params,
    flatten,
    linear_params,
    set_requires_grad_except_bn_,
)

DEPTH = 10  # nine convolutions and the linear layer


def check_nin(depth, width) -> None:
    """Raise UserError unless there is a NIN of this depth and width."""
    if depth != DEPTH:
        raise UserError(f'--depth {depth}: a NIN has depth {DEPTH}; leave it out')
    if width != int(width) or not 1 <= width <= 4096:
        raise UserError(f'--width {width:g}: for a NIN, this is the number of channels, 1 to 4096')


def nin(
    width: int, num_classes: int, bn: bool = True, pool_relu: bool = True
) -> tuple[Callable, dict]:
    """NIN for small images: three groups of a 3x3 convolution and two 1x1 with `width` channels,
    batch norm and ReLU after each. 3x3 max-pooling with stride 2 between the groups, global average
    pooling and a linear layer at the end. The paper does not state widths and pooling; width 96
    (226 thousand parameters) and 192 (895 thousand) fit the thin and the wide NIN of Table 1.

    pool_relu False: the last convolution of each group has a bias and neither batch norm nor ReLU,
    so that `groups` are outputs of convolutions (the teacher of Table 3). bn False: no batch norm
    at all, and no ReLU before pooling (the student of Table 3). Initial values as in resnet.wrn,
    biases 0.

    Raises UserError as check_nin does, or if num_classes is below 1.
    """
    check_nin(DEPTH, width)
    if num_classes < 1:
        raise UserError(f'num_classes {num_classes}: must be at least 1')
    width = int(width)

    def group_params(ni):
        params = {}
        for i, (channels, k) in enumerate([(ni, 3), (width, 1), (width, 1)]):
            weight = conv_params(channels, width, k)
            if bn and (pool_relu or i < 2):
                params |= {f'conv{i}': weight, f'bn{i}': bnparams(width)}
            else:
                params |= {f'conv{i}': {'weight': weight, 'bias': torch.zeros(width)}}
        return params

    nested = {f'group{g}': group_params(width if g else 3) for g in range(3)}
    params = flatten(nested | {'fc': linear_params(width, num_classes)})
    set_requires_grad_except_bn_(params)
    return nin_function(), params


def variant(params: dict) -> tuple[bool, bool]:
    """(bn, pool_relu) of the NIN with these parameters."""
    return 'group0.bn0.weight' in params, 'group0.bn2.weight' in params


def nin_function() -> Callable:
    """The `f` of every NIN. The names tell which convolutions have batch norm."""

    def unit(x, params, base, i, training):
        padding = 0 if i else 1
        if f'{base}.bn{i}.weight' in params:
            o = conv2d(x, params[f'{base}.conv{i}'], padding=padding)
            return F.relu(batch_norm(o, params, f'{base}.bn{i}', training))
        weight, bias = (params[f'{base}.conv{i}.{k}'] for k in ('weight', 'bias'))
        o = conv2d(x, weight, padding=padding, bias=bias)
        return o if i == 2 else F.relu(o)

    def f(x, params, training, base=''):
        groups = []
        for g in range(3):
            x = F.max_pool2d(x, 3, 2, 1) if g else x
            for i in range(3):
                x = unit(x, params, f'{base}group{g}', i, training)
            groups.append(x)
        return classify(x, params, base), tuple(groups)

    return f
