"""Residual networks as functions over a flat dict of tensors.

A constructor returns `(f, params)`. `params` maps names such as 'group1.block0.conv0' to tensors.

    logits, groups = f(x, params, training, base='')

    x         [B, 3, H, W], any H and W; convolutions and activations use its dtype (a float64 x
              needs float64 params)
    training  True: batch norm uses the batch's statistics and updates the running ones in place
    base      prefix of every name, so that one merged dict serves several nets
    logits    [B, num_classes], float32 (float64 for a float64 x); None if `params` have no fc.*
    groups    the activations at the end of each group, whose attention maps are transferred
"""

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import nin
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

# ------------------------ CIFAR: pre-activation Wide ResNet


def check_wrn(depth, width) -> None:
    """Raise UserError unless depth is 6n + 4 with n >= 1 and width leaves each group a channel."""
    if not 10 <= depth < 10_000 or depth % 6 != 4:
        raise UserError(
            f'--depth {depth}: a Wide ResNet has depth 6n + 4 with n >= 1, '
            'such as 10, 16, 22, 28 or 40'
        )
    if not 1 / 16 <= width <= 64:
        raise UserError(f'--width {width}: must be between 1/16 (one channel in a group) and 64')


def wrn(depth: int, width: float, num_classes: int) -> tuple[Callable, dict]:
    """Wide ResNet for small images: WRN-depth-width of Zagoruyko & Komodakis, BMVC 2016. Width 1 is
    a pre-activation ResNet.

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels, at full, half
    and quarter resolution. Initial values come from torch's global generator: Kaiming-normal
    convolutions and fc.weight, batch-norm weights uniform(0, 1), as in the published recipe.

    Raises UserError as check_wrn does, or if num_classes is below 1.
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

    nested = {
        'conv0': conv_params(3, 16, 3),
        'group0': group_params(16, widths[0]),
        'group1': group_params(widths[0], widths[1]),
        'group2': group_params(widths[1], widths[2]),
        'bn': bnparams(widths[2]),
        'fc': linear_params(widths[2], num_classes),
    }
    params = flatten(nested)
    set_requires_grad_except_bn_(params)
    return wrn_function(n), params


def wrn_function(n: int) -> Callable:
    """The `f` of every wrn with n blocks in each group."""

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


# ------------------------ ImageNet: ResNet, post-activation


# Blocks of the four groups, and whether they are bottlenecks.
RESNETS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def resnet(depth: int, width: float, num_classes: int) -> tuple[Callable, dict]:
    """ResNet for photographs (He et al. 2015), as in fb.resnet.torch: batch norm on the shortcut's
    convolution, and the stride of a bottleneck in its 3x3. Depths 18 and 34 have basic blocks; 50,
    101 and 152 have bottlenecks.

    Four groups with 64, 128, 256 and 512 times `width` channels at 1/4 to 1/32 of the image's size.
    In a bottleneck `width` widens the 3x3 alone (depth 50 and width 2: WRN-50-2), and its output
    has 4 times the unwidened channels. `groups` are the four outputs, after the last ReLU. Initial
    values: Kaiming-normal convolutions and fc.weight, batch-norm weights 1.

    Raises UserError as check_resnet does, or if num_classes is below 1.
    """
    check_resnet(depth, width)
    if num_classes < 1:
        raise UserError(f'num_classes {num_classes}: must be at least 1')
    blocks, bottleneck = RESNETS[depth]

    def bn(n):
        return bnparams(n) | {'weight': torch.ones(n)}

    def block_params(ni, inner, no):
        sizes = [(ni, no, 3), (no, no, 3)]
        if bottleneck:
            sizes = [(ni, inner, 1), (inner, inner, 3), (inner, no, 1)]
        params = {}
        for i, size in enumerate(sizes):
            params |= {f'conv{i}': conv_params(*size), f'bn{i}': bn(size[1])}
        if ni != no:
            params |= {'convdim': conv_params(ni, no, 1), 'bndim': bn(no)}
        return params

    nested, ni = {'conv0': conv_params(3, 64, 7), 'bn0': bn(64)}, 64
    for g, n in enumerate(blocks):
        inner = int(64 * 2**g * width)
        no = 256 * 2**g if bottleneck else inner
        sizes = [(no if i else ni, inner, no) for i in range(n)]
        nested[f'group{g}'] = {f'block{i}': block_params(*size) for i, size in enumerate(sizes)}
        ni = no
    params = flatten(nested | {'fc': linear_params(ni, num_classes)})
    set_requires_grad_except_bn_(params)
    return resnet_function(blocks), params


def check_resnet(depth, width) -> None:
    """Raise UserError unless there is a resnet of this depth and width."""
    if depth not in RESNETS:
        raise UserError(
            f'--depth {depth}: a ResNet for photographs has depth {", ".join(map(str, RESNETS))}'
        )
    if not 1 / 64 <= width <= 16:
        raise UserError(f'--width {width}: must be between 1/64 (one channel in a group) and 16')


def resnet_function(blocks: Sequence[int]) -> Callable:
    """The `f` of every resnet with these numbers of blocks. A block with conv2 is a bottleneck."""

    def conv_bn(x, params, conv, bn, training, stride=1):
        padding = params[conv].shape[2] // 2
        return batch_norm(conv2d(x, params[conv], stride, padding), params, bn, training)

    def block(x, params, base, training, stride):
        bottleneck = f'{base}.conv2' in params
        first, second = (1, stride) if bottleneck else (stride, 1)
        o = F.relu(conv_bn(x, params, f'{base}.conv0', f'{base}.bn0', training, first))
        o = conv_bn(o, params, f'{base}.conv1', f'{base}.bn1', training, second)
        if bottleneck:
            o = conv_bn(F.relu(o), params, f'{base}.conv2', f'{base}.bn2', training)
        if f'{base}.convdim' in params:
            x = conv_bn(x, params, f'{base}.convdim', f'{base}.bndim', training, stride)
        return F.relu(o + x)

    def f(x, params, training, base=''):
        x = F.relu(conv_bn(x, params, f'{base}conv0', f'{base}bn0', training, 2))
        groups = four_groups(block, F.max_pool2d(x, 3, 2, 1), params, base, training, blocks)
        return classify(groups[-1], params, base), groups

    return f


def four_groups(block, x, params, base, training, blocks):
    """The outputs of the four groups. The first block of each group except group0 halves the
    size."""
    groups = []
    for g, n in enumerate(blocks):
        for i in range(n):
            x = block(x, params, f'{base}group{g}.block{i}', training, 2 if g and not i else 1)
        groups.append(x)
    return tuple(groups)


# ------------------------ ImageNet: the layouts of the released weights


def conv2d_bias(x, params, base, stride=1, padding=0):
    """Convolution `base` of a release: `base`.weight and .bias, or the bare name."""
    weight = params[f'{base}.weight'] if f'{base}.weight' in params else params[base]
    return conv2d(x, weight, stride, padding, params.get(f'{base}.bias'))


def folded_resnet(params: dict) -> Callable:
    """The `f` of a resnet whose batch norms are folded into its convolutions: the released
    ResNet-18, ResNet-34 and WRN-50-2.

    The names in `params` tell the topology: a block with conv2 is a bottleneck; the shortcut is
    conv_dim, with its bias, if it exists. `training` changes nothing. `groups` are the four
    outputs, after the last ReLU.
    """
    blocks = count_blocks(params)

    def block(x, params, base, training, stride):
        bottleneck = f'{base}.conv2.weight' in params
        if bottleneck:
            o = F.relu(conv2d_bias(x, params, f'{base}.conv0'))
            o = F.relu(conv2d_bias(o, params, f'{base}.conv1', stride, 1))
            o = conv2d_bias(o, params, f'{base}.conv2')
        else:
            o = F.relu(conv2d_bias(x, params, f'{base}.conv0', stride, 1))
            o = conv2d_bias(o, params, f'{base}.conv1', 1, 1)
        if f'{base}.conv_dim.weight' in params:
            x = conv2d_bias(x, params, f'{base}.conv_dim', stride)
        return F.relu(o + x)

    def f(x, params, training, base=''):
        x = F.max_pool2d(F.relu(conv2d_bias(x, params, f'{base}conv0', 2, 3)), 3, 2, 1)
        groups = four_groups(block, x, params, base, training, blocks)
        return classify(groups[-1], params, base), groups

    return f


def affine_resnet(params: dict) -> Callable:
    """The `f` of a pre-activation resnet whose batch norms became x -> a x + b: the released
    ResNet-18-AT.

    The names in `params` tell the topology. `training` changes nothing. `groups` are the four
    sums, before the next ReLU.
    """
    blocks = count_blocks(params)

    def affine_relu(x, params, base):
        a, b = (params[f'{base}.{k}'].to(x.dtype).view(1, -1, 1, 1) for k in 'ab')
        return F.relu(x * a + b)

    def block(x, params, base, training, stride):
        o = affine_relu(x, params, f'{base}.affine0') if f'{base}.affine0.a' in params else x
        y = conv2d_bias(o, params, f'{base}.conv0', stride, 1)
        y = affine_relu(y, params, f'{base}.affine1')
        z = conv2d_bias(y, params, f'{base}.conv1', 1, 1)
        if f'{base}.conv_dim' in params or f'{base}.conv_dim.weight' in params:
            x = conv2d_bias(o, params, f'{base}.conv_dim', stride)
        return z + x

    def f(x, params, training, base=''):
        x = affine_relu(conv2d_bias(x, params, f'{base}conv0', 2, 3), params, f'{base}affine0')
        groups = four_groups(block, F.max_pool2d(x, 3, 2, 1), params, base, training, blocks)
        o = affine_relu(groups[-1], params, f'{base}affine_last')
        return classify(o, params, base), groups

    return f


# ------------------------ topology from names


BN = r'(weight|bias|running_mean|running_var)'
FC = r'fc\.(weight|bias)'
BLOCK = r'group[0-3]\.block\d+\.'
# The names that each layout may have.
LAYOUTS = {
    'nin': rf'group[0-2]\.(conv[0-2](\.(weight|bias))?|bn[0-2]\.{BN})|{FC}',
    'wrn': rf'conv0|group[0-2]\.block\d+\.(conv[01]|convdim|bn[01]\.{BN})|bn\.{BN}|{FC}',
    'resnet': rf'conv0|bn0\.{BN}|{BLOCK}(conv[0-2]|convdim|bn([0-2]|dim)\.{BN})|{FC}',
    'folded': rf'(conv0|{BLOCK}(conv[0-2]|conv_dim)|fc)\.(weight|bias)',
    'affine': rf'(conv0|{BLOCK}(conv[01]|conv_dim))(\.weight|\.bias)?'
    rf'|(({BLOCK})?affine[01]|affine_last)\.[ab]|{FC}',
}
SMALL = ('wrn', 'nin')  # layouts for small images
# Names that no other layout has.
MARKS = {
    'affine': {'affine_last.a'},
    'wrn': {'bn.weight'},
    'resnet': {'bn0.weight'},
    'folded': {'conv0.weight'},
    'nin': {'group0.conv0', 'group0.conv0.weight'},
}


def layout(params: dict) -> str:
    """'wrn', 'nin', 'resnet', 'folded' or 'affine', as the names tell. Raises UserError with the
    names that are not understood."""
    found = next((name for name, marks in MARKS.items() if marks & params.keys()), None)
    if found is None:
        names = ', '.join(sorted(params)[:4])
        raise UserError(f'the parameters are of no known net ({names}, …)')
    unknown = [name for name in params if not re.fullmatch(LAYOUTS[found], name)]
    if unknown:
        raise UserError(
            f'looks like the layout {found}, but {len(unknown)} names are not understood '
            f'({", ".join(unknown[:4])})'
        )
    missing = [name for name in ('fc.weight', 'fc.bias') if name not in params]
    if len(missing) == 1:
        raise UserError(f'looks like the layout {found}, but {missing[0]} is missing')
    return found


def count_blocks(params: dict) -> list[int]:
    """The number of blocks of each group. Raises UserError if a group or a block is missing."""
    numbers = {}
    for name in params:
        if found := re.match(r'group(\d)\.block(\d+)\.', name):
            numbers.setdefault(int(found[1]), set()).add(int(found[2]))
    if not numbers:
        raise UserError('has no groups of blocks')
    counts = [len(numbers.get(g, ())) for g in range(max(numbers) + 1)]
    for g, n in enumerate(counts):
        if numbers.get(g) != set(range(n)) or n == 0:
            raise UserError(f'group{g} lacks blocks: it has {sorted(numbers.get(g, ()))}')
    return counts


def net_shape(params: dict) -> tuple[int, float, int]:
    """(depth, width, num_classes) of the net with these parameters, of any layout; num_classes
    None without a head. Raises UserError if they are of no net."""
    kind = layout(params)
    counts = [] if kind == 'nin' else count_blocks(params)

    def channels(name):
        weight = next((params[n] for n in (name, f'{name}.weight') if n in params), None)
        if weight is None or weight.dim() != 4:
            raise UserError(f'{name} is missing, or not a convolution')
        return weight.shape[0]

    classes = num_classes(params)
    if kind == 'nin':
        return nin.DEPTH, channels('group0.conv0'), classes
    if kind == 'wrn':
        if len(counts) != 3:
            raise UserError(f'a Wide ResNet has 3 groups, not {len(counts)}')
        return 6 * counts[0] + 4, channels('group2.block0.conv0') / 64, classes
    bottleneck = any(re.fullmatch(r'group0\.block0\.conv2(\.weight)?', name) for name in params)
    depth = 2 + (3 if bottleneck else 2) * sum(counts)
    if kind == 'resnet' and RESNETS.get(depth) != (tuple(counts), bottleneck):
        known = '; '.join(
            f'{d}: {", ".join(map(str, n))}' for d, (n, b) in RESNETS.items() if b == bottleneck
        )
        raise UserError(
            f'its groups have {", ".join(map(str, counts))} blocks, but a ResNet of depth {known}'
        )
    return depth, channels('group3.block0.conv0') / 512, classes


def num_classes(params: dict) -> int | None:
    """The number of logits, None without a head (fc.*)."""
    if 'fc.bias' not in params:
        return None
    if params['fc.bias'].dim() != 1:
        raise UserError('fc.bias must have one dimension')
    return len(params['fc.bias'])


def group_channels(f: Callable, params: dict) -> list[int]:
    """The channels of the activations of each group. Computes nothing."""
    meta = {k: v.to('meta') for k, v in params.items()}
    _, groups = f(torch.empty(1, 3, 64, 64, device='meta'), meta, False)
    return [g.shape[1] for g in groups]


def same_shape(params: dict, depth, width) -> bool:
    """Whether these are the parameters of a net of that depth and width. (A width is known from
    them up to a fraction of a channel.)"""
    found_depth, found_width, _ = net_shape(params)
    last = {'nin': 1, 'wrn': 64}.get(layout(params), 512)
    return found_depth == depth and round(last * found_width) == int(last * width)


def from_params(params: dict) -> Callable:
    """The `f` of the net with these parameters: a wrn, nin or resnet, or a release (folded,
    affine). Their names tell its layout and topology. Raises UserError with the names that are not
    understood."""
    kind = layout(params)
    makers = {'folded': folded_resnet, 'affine': affine_resnet}
    if kind in makers:
        return makers[kind](params)
    if kind == 'nin':
        return nin.nin_function()
    counts = count_blocks(params)
    return wrn_function(counts[0]) if kind == 'wrn' else resnet_function(counts)


def new_net(kind, depth, width, num_classes, bn=True, pool_relu=True) -> tuple[Callable, dict]:
    """(f, params) of a new net of the layout 'wrn', 'resnet' or 'nin'. See nin.nin for bn and
    pool_relu."""
    if kind == 'nin':
        return nin.nin(width, num_classes, bn, pool_relu)
    return {'wrn': wrn, 'resnet': resnet}[kind](depth, width, num_classes)
