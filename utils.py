"""What the training scripts share, by subject: parameters, losses, several devices, weights files,
logs, run folder and checkpoint, optimizer, devices, options, signals."""

import argparse
import contextlib
import ctypes
import fcntl
import json
import logging
import math
import os
import pickle
import re
import signal
import sys
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import h5py
import hickle
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.init import kaiming_normal_
from torch.nn.parallel import parallel_apply
from torch.nn.parallel._functions import Broadcast
from torch.nn.parallel.scatter_gather import scatter
from torch.utils.flop_counter import FlopCounterMode


class UserError(ValueError):
    """A mistake of the user's, or a limit of the machine: one line on stderr, this exit status, and
    no traceback."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def listing(names, most: int = 5) -> str:
    """The first names, for a message: 'a, b, c, …'."""
    return ', '.join(map(str, names[:most])) + (', …' if len(names) > most else '')


# ------------------------ parameters: a flat dict of tensors


def cast(params, dtype: str = 'float'):
    """A tensor, or a dict of tensors (nested too), in the dtype of that name: 'float', 'bfloat16',
    'double', 'long' …"""
    if isinstance(params, dict):
        return {k: cast(v, dtype) for k, v in params.items()}
    return getattr(params, dtype)()


def flatten(nested: dict) -> dict:
    """{'group0': {'conv0': w}} -> {'group0.conv0': w}; entries that are None are left out."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
        elif value is not None:
            flat[name] = value
    return flat


def part(params: dict, name: str) -> dict:
    """The entries named `name`.*, without that prefix: one net out of a merged dict."""
    return {k.removeprefix(f'{name}.'): v for k, v in params.items() if k.startswith(f'{name}.')}


def conv_params(ni: int, no: int, k: int = 1) -> torch.Tensor:
    """Kaiming-normal (fan-in) weight [no, ni, k, k]."""
    return kaiming_normal_(torch.empty(no, ni, k, k))


def linear_params(ni: int, no: int) -> dict:
    """Kaiming-normal (fan-in) weight [no, ni] and zero bias [no]."""
    return {'weight': kaiming_normal_(torch.empty(no, ni)), 'bias': torch.zeros(no)}


def bnparams(n: int) -> dict:
    """Batch norm over n channels: weight uniform(0, 1) as the published CIFAR recipe had it,
    bias 0, mean 0, variance 1."""
    return {
        'weight': torch.rand(n),
        'bias': torch.zeros(n),
        'running_mean': torch.zeros(n),
        'running_var': torch.ones(n),
    }


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: bfloat16 loses too much in sums and squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_norm(x: torch.Tensor, params: dict, base: str, training: bool) -> torch.Tensor:
    """Batch norm of x [B, C, H, W] with params[`base`.weight, .bias, .running_mean, .running_var],
    momentum 0.1, eps 1e-5.

    In training the running statistics are updated in place. Statistics and parameters keep their
    own dtype (float32) whatever that of x."""
    # Compiled, batch norm would keep the batch's mean and 1/std in the narrower dtype for the
    # backward pass.
    o = wide(x) if torch.compiler.is_compiling() else x
    bn = [params[f'{base}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
    return F.batch_norm(o, *bn, training=training).to(x.dtype)


def conv2d(x, weight, stride=1, padding=0, bias=None) -> torch.Tensor:
    """Convolution of x [B, C, H, W] in its dtype; `weight` and `bias` themselves stay float32."""
    if stride > 1 and weight.shape[1] < 8 and weight.shape[2:] == (1, 1) and not padding:
        # The same by a stride of 1. On CPUs without AVX-512, the library's gradient of such a
        # weight writes past the end of its memory in channels_last (torch 2.14): a crash, at best.
        x, stride = x[:, :, ::stride, ::stride], 1
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)


def classify(x: torch.Tensor, params: dict, base: str) -> torch.Tensor:
    """Global average pooling and the linear layer `base`fc, in at least float32:
    [B, C, H, W] -> [B, num_classes]."""
    o = wide(x).mean((2, 3))
    return F.linear(o, params[f'{base}fc.weight'].to(o.dtype), params[f'{base}fc.bias'].to(o.dtype))


def is_statistic(name: str) -> bool:
    """Whether a parameter's name is that of a running statistic, which is not trained."""
    return name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def set_requires_grad_except_bn_(params: dict) -> None:
    """Marks everything for training but the running statistics of batch norm."""
    for name, value in params.items():
        if not is_statistic(name):
            value.requires_grad_()


def print_tensor_dict(params: dict) -> None:
    """One line a tensor: number, name, shape, type, whether it is trained."""
    width = max(map(len, params), default=0)
    for i, (name, v) in enumerate(params.items()):
        print(f'{i:<5}{name:<{width + 3}}{tuple(v.shape)!s:<23}{v.type():<23}{v.requires_grad}')


def check_params(params: dict, expected: dict, source) -> dict:
    """`params` in the order and dtype of `expected`, detached. Raises UserError, naming `source`
    and the tensor, where a name is missing or not understood, a shape differs, or a value is not
    finite."""
    for what, names in (
        ('missing', expected.keys() - params.keys()),
        ('not understood', params.keys() - expected.keys()),
    ):
        if names:
            raise UserError(
                f'{source}: {len(names)} parameters {what} ({listing(sorted(names), 3)})'
            )
    checked = {}
    for name, e in expected.items():
        p = params[name].detach()
        if p.shape != e.shape:
            raise UserError(
                f'{source}: {name} has shape {tuple(p.shape)}, this net needs {tuple(e.shape)}'
            )
        if not p.is_floating_point():
            raise UserError(f'{source}: {name} holds {p.dtype}, not floating-point numbers')
        if not p.float().isfinite().all():
            raise UserError(f'{source}: {name} holds nan or inf')
        checked[name] = p.to(e.dtype).contiguous()
    return checked


def checksum(tensors) -> int:
    """CRC-32 of the bytes of CPU tensors or arrays, to notice that a set or a teacher is not the
    one of before."""
    value = 0
    for t in tensors:
        value = zlib.crc32(np.ascontiguousarray(t).data, value)
    return value


# ------------------------ losses


def _channel_map(x, p, map):
    # The sum divided: a mean hands its gradient back in contiguous memory, and with it goes all of
    # a channels_last net's. The square by itself: through abs, its second derivative is lost where
    # x is 0.
    x = wide(x)
    if p not in (1, 2):
        # A high power of what is not near 1 overflows. As the map is normalised its scale does not
        # matter, and counts as a constant.
        x = x / x.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    powers = x.square() if p == 2 else x.abs() if p == 1 else _power(x.abs(), p)
    return powers.amax(1) if map == 'max' else powers.sum(1) / x.shape[1]


def _power(x, p):
    # Of p below 1 the derivative at 0 is infinite, and no number once multiplied by a zero; here it
    # is 0.
    return torch.where(x > 0, x, 1).pow(p) * (x > 0)


def _normalize(q):
    # Divided by its largest element first, or a map of tiny activations would vanish in its square;
    # that element counts as a constant, as the result does not depend on it. Then the sum of
    # squares is at least 1, but for a map of zeros, which stays zero together with its derivatives.
    # Not flattened: of channels_last activations that would be a slow copy.
    dims = tuple(range(1, q.dim()))
    q = q / q.detach().abs().amax(dims, keepdim=True).clamp_min(1e-30)
    return q / q.square().sum(dims, keepdim=True).clamp_min(1).sqrt()


def _same_size(x, y):
    # The larger of two maps, or activations, average-pooled to the size of the smaller.
    size = [min(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:])]
    return [v if v.shape[-2:] == tuple(size) else F.adaptive_avg_pool2d(v, size) for v in (x, y)]


def at(x: torch.Tensor, p: float = 2, map: str = 'sum') -> torch.Tensor:
    """Attention map of activations x [B, C, H, W]: [B, H*W], in at least float32.

    The mean (map 'sum') or the largest (map 'max') over channels of |x|^p, flattened and
    L2-normalised per sample (section 3.1 of the paper; the mean is the paper's sum, as the scale is
    normalised away). A map of zeros stays zero.
    """
    return _normalize(_channel_map(x, p, map)).flatten(1)


def at_loss(x: torch.Tensor, y: torch.Tensor, p: float = 2, map: str = 'sum') -> torch.Tensor:
    """Attention transfer loss of activations x [B, C, H, W] and y [B, C', H', W']: a scalar, in at
    least float32.

        mean over the batch and the H*W map elements of (at(x, p, map) - at(y, p, map))^2

    Channels may differ. Maps of unequal size are average-pooled to (min H, min W) before they are
    normalised.

    Equation 2 of the paper adds beta/2 times the norm of at(x) - at(y), not squared, with "beta
    10^3 divided by the number of elements in the map and the batch size". The published code, and
    this one, takes the square; as a mean over map and batch it holds that division, and --beta
    multiplies it whole, not by half. The paper's numbers on CIFAR are the code's.
    """
    x, y = _same_size(_channel_map(x, p, map), _channel_map(y, p, map))
    return (_normalize(x) - _normalize(y)).square().mean()


def factt_loss(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Full-activation transfer (F-ActT, section 4.1.2 of the paper, after FitNets) of activations
    x [B, C, H, W] and y [B, C', H', W']: a scalar, in at least float32.

        mean over the batch and the H*W positions of the sum over channels of
        (n(weight * x) - n(y))^2

    n: all C'*H*W numbers of a sample, L2-normalised. weight [C', C, 1, 1] is a 1x1 convolution that
    brings the channels together, None where they agree. Unequal sizes are pooled as in at_loss,
    whose scale this has too: the squared distance over H*W.
    """
    if weight is not None:
        x = conv2d(x, weight)
    x, y = _same_size(wide(x), wide(y))
    distance = (_normalize(x) - _normalize(y)).square().sum((1, 2, 3))
    return distance.mean() / x[0, 0].numel()


def input_gradient(f, x: torch.Tensor, targets: torch.Tensor, create_graph: bool = False) -> tuple:
    """(logits, groups, J) of logits, groups = f(x), with J [B, 3, H, W] = d cross_entropy / d x,
    where each sample has its own loss: the sum over the batch is differentiated. (Batch norm in
    training ties the samples together; J is then the gradient of that sum.) create_graph: all three
    can be differentiated further, J by double backpropagation; else they are constants."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits, groups = f(x)
        loss = F.cross_entropy(wide(logits), targets, reduction='sum')
        J = wide(torch.autograd.grad(loss, x, create_graph=create_graph)[0])
    if not create_graph:
        logits, groups = logits.detach(), tuple(g.detach() for g in groups)
    return logits, groups, J


def gradient_loss(J: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Gradient-based attention transfer (section 3.2 of the paper) of the student's J [B, 3, H, W]
    and the teacher's: a scalar.

    1/2 mean over the batch of ||J - other||^2, summed over channels and pixels
    """
    return (J - other).square().sum((1, 2, 3)).mean() / 2


def symmetry_loss(J: torch.Tensor, J_flipped: torch.Tensor) -> torch.Tensor:
    """Symmetry norm (section 3.2 of the paper) of J [B, 3, H, W] and of that for the horizontally
    flipped images: 1/2 ||J - flip(J_flipped)||^2, mean over the batch."""
    return gradient_loss(J, J_flipped.flip(3))


def min_l2_loss(J: torch.Tensor) -> torch.Tensor:
    """The min-l2 penalty of Table 3 (double backpropagation, Drucker & LeCun 1992) on J
    [B, 3, H, W]: 1/2 ||J||^2, mean over the batch."""
    return J.square().sum((1, 2, 3)).mean() / 2


def distillation(y, teacher_scores, labels, T: float, alpha: float) -> torch.Tensor:
    """Knowledge distillation (Hinton et al. 2015) of logits y [B, K] from the teacher's [B, K],
    labels [B]: a scalar, the mean over the batch of

        alpha T^2 KL(softmax(teacher / T) || softmax(y / T)) + (1 - alpha) cross_entropy(y, labels)

    With alpha 0 the teacher's scores are not looked at: they may be None, or of other classes.
    """
    loss = (1 - alpha) * F.cross_entropy(wide(y), labels)
    if alpha:
        p, q = F.log_softmax(wide(y) / T, 1), F.log_softmax(wide(teacher_scores) / T, 1)
        loss = loss + alpha * T**2 * F.kl_div(p, q, reduction='batchmean', log_target=True)
    return loss


# ------------------------ several devices


def gather_outputs(outputs: list, sizes: list, device):
    """The devices' outputs as one, on `device`: tensors with a batch dimension are concatenated,
    0-dim ones (losses) become their mean weighted by `sizes`, the samples of each device; tuples,
    lists and dicts keep their form."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {k: gather_outputs([o[k] for o in outputs], sizes, device) for k in first}
    if isinstance(first, (tuple, list)):
        return type(first)(gather_outputs(list(o), sizes, device) for o in zip(*outputs))
    outputs = [o.to(device) for o in outputs]
    if first.dim() == 0:
        return sum(o * (n / sum(sizes)) for o, n in zip(outputs, sizes))
    return torch.cat(outputs)


def data_parallel(f, input, params: dict, training: bool, device_ids, output_device=None):
    """f(input, params, training) with the batch split over device_ids; params and input lie on the
    first.

    `input` is a tensor, or a tuple or dict of tensors with one batch dimension. On one device this
    is a plain call. On several, gradients flow back to `params`, and the running statistics that
    remain are the first device's, as published.
    """
    device_ids = list(device_ids)
    if len(device_ids) == 1:
        return f(input, params, training)
    inputs = scatter([input], device_ids)
    device_ids = device_ids[: len(inputs)]
    copies = Broadcast.apply(device_ids, *params.values())
    replicas = [dict(zip(params, copies[i * len(params) :])) for i in range(len(device_ids))]
    replicas[0].update({k: v for k, v in params.items() if not v.requires_grad})
    fs = [partial(f, params=p, training=training) for p in replicas]
    outputs = parallel_apply(fs, inputs, devices=device_ids)
    sizes = [batch_size(i[0]) for i in inputs]
    return gather_outputs(outputs, sizes, device_ids[0] if output_device is None else output_device)


def batch_size(batch) -> int:
    """Samples in a tensor, or in a tuple or dict of tensors."""
    while not torch.is_tensor(batch):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)


# ------------------------ weights files


def save_params(path, params: dict) -> None:
    """Writes {name: tensor} with hickle, whole or not at all. numpy has no bfloat16: such tensors
    are written as float32."""
    wider = {k: wide(v) if v.dtype == torch.bfloat16 else v for k, v in params.items()}
    arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in wider.items()}
    write_atomically(path, lambda temporary: hickle.dump(arrays, str(temporary), mode='w'))


def load_params(path) -> dict:
    """{name: CPU tensor, dtype as stored} of a weights file: .hkl of hickle 2 to 5, .pth, .pt7,
    .safetensors.

    torchvision's and timm's ResNets get our names. A file that holds a net's parameters among other
    things ('params', 'state_dict') gives those; of a student and its teacher in one dict, the
    student's. Nothing in a file is ever run: whatever is not an array of numbers is refused by
    name. Raises UserError with the file and what was wrong with it.
    """
    path = Path(path)
    readers = {
        '.hkl': _read_hkl,
        '.pth': torch_load,
        '.pt': torch_load,
        '.pt7': torch_load,
        '.safetensors': _read_safetensors,
    }
    if path.suffix not in readers:
        raise UserError(f'{path}: not a weights file; its name must end in {", ".join(readers)}')
    try:
        open(path, 'rb').close()
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from e
    params = readers[path.suffix](path)
    for key in 'params', 'state_dict', 'model':
        if isinstance(params, dict) and isinstance(params.get(key), dict):
            params = params[key]
    if not isinstance(params, dict) or not params:
        raise UserError(f'{path}: holds no dict of tensors')
    for name, value in params.items():
        dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not dense:
            raise UserError(f'{path}: {name!r} is {type(value).__name__}, not a dense tensor')
    params = part(params, 'student') or params
    if all(name.startswith('module.') for name in params):  # of nn.DataParallel
        params = {k.removeprefix('module.'): v for k, v in params.items()}
    return from_torchvision({k: v.detach() for k, v in params.items()})


def from_torchvision(params: dict) -> dict:
    """The names of torchvision's and timm's ResNets as those of resnet.resnet:
    layer1.0.conv1.weight becomes group0.block0.conv0. num_batches_tracked is left out, as nothing
    uses it. Other dicts are returned as they are."""
    if 'layer1.0.conv1.weight' not in params:
        return params

    def ours(name):
        name = re.sub(r'^layer(\d)\.(\d+)', lambda m: f'group{int(m[1]) - 1}.block{m[2]}', name)
        name = re.sub(r'downsample\.0\.weight$', 'convdim', name).replace('downsample.1', 'bndim')
        name = re.sub(r'conv(\d)\.weight$', lambda m: f'conv{int(m[1]) - 1}', name)
        return re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) - 1}.', name)

    return {ours(k): v for k, v in params.items() if not k.endswith('num_batches_tracked')}


def to_torchvision(params: dict) -> dict:
    """The inverse of from_torchvision for the parameters of resnet.resnet; each batch norm gets a
    num_batches_tracked of 0."""

    def theirs(name):
        name = re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) + 1}.', name)
        name = re.sub(r'\bconv(\d)$', lambda m: f'conv{int(m[1]) + 1}.weight', name)
        name = name.replace('convdim', 'downsample.0.weight').replace('bndim', 'downsample.1')
        return re.sub(r'^group(\d)\.block(\d+)', lambda m: f'layer{int(m[1]) + 1}.{m[2]}', name)

    renamed = {}
    for name, value in params.items():
        renamed[theirs(name)] = value
        if name.endswith('running_var'):
            renamed[theirs(name).replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    return renamed


@contextlib.contextmanager
def reading(path):
    """Turns whatever a reader raises at a damaged file into one line: they share no exception."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise UserError(f'{path}: damaged, or not such a file ({reason})') from e


def torch_load(path):
    """torch.load that runs nothing: tensors and plain values only, on the CPU."""
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, KeyError) as e:
            # torch's own words advise to run what is in the file all the same.
            code = re.search(r'GLOBAL (\S+)', str(e))
            if code:
                raise UserError(
                    f'{path}: holds {code[1]}, not tensors and plain values alone; refused (a state_dict is read)'
                ) from e
            raise UserError(f'{path}: damaged, or not written by torch.save') from e


def _read_safetensors(path):
    from safetensors.torch import load_file

    with reading(path):
        return load_file(path)


def _read_hkl(path):
    with reading(path), h5py.File(path, 'r') as h:
        # hickle 4 and 5 tell their version in a string of variable length, which HDF5 can hang on
        # in a damaged file; the mark that 4 sets on its dict tells them apart as well.
        if 'HICKLE_VERSION' in h.attrs:
            if 'base_type' in _member(path, h, 'data').attrs:
                entries = _entries_nested(path, h, 'data', 'data', 'base_type')
            else:
                entries = _entries_5(path, h)
        elif _text(h.attrs.get('CLASS', '')) == 'hickle':
            version = _text(h.attrs['VERSION']).split('.')[0]
            if version not in ('2', '3'):
                raise UserError(
                    f'{path}: written by hickle {version}; versions 2 to 5 are understood'
                )
            entries = _entries_nested(path, h, 'data_0', 'data_0', 'type')
        else:
            raise UserError(f'{path}: an HDF5 file, but not written by hickle')
        nodes = dict(entries)
        sizes = {k: node.nbytes for k, node in nodes.items() if isinstance(node, h5py.Dataset)}
        if sum(sizes.values()) > 2**32:
            _refuse(path, max(sizes, key=sizes.get), 'too large (more than 4 GiB in one file)')
        return {name: _array(path, name, node) for name, node in nodes.items()}


def _text(value) -> str:
    value = value[0] if isinstance(value, (np.ndarray, list)) and len(value) else value
    return value.decode() if isinstance(value, bytes) else str(value)


def _member(path, group, key):
    # A link into another file would read what the user did not name.
    link = group.get(key, getlink=True) if isinstance(group, h5py.Group) else None
    if not isinstance(link, h5py.HardLink):
        raise UserError(f'{path}: {key!r} is not part of this file')
    return group[key]


def _refuse(path, name, what):
    raise UserError(f'{path}: {name!r} is {what}, not an array of numbers; refused')


def _entries_nested(path, h, root, item, mark):
    """hickle 2, 3 (groups data_0, marked by `type`) and 4 (groups data, marked by `base_type`)."""
    group = _member(path, h, root)
    if _text(group.attrs.get(mark, '')) not in ('dict', "<class 'dict'>"):
        _refuse(path, root, _text(group.attrs.get(mark, 'unmarked')))
    for key in group:
        name = key[1:-1] if re.fullmatch(r"'.*'", key) else key
        entry = _member(path, group, key)
        if _text(entry.attrs.get(mark, '')) != 'dict_item':
            _refuse(path, name, _text(entry.attrs.get(mark, 'unmarked')))
        node = _member(path, entry, item)
        if _text(node.attrs.get(mark, '')) != 'ndarray':
            _refuse(path, name, _text(node.attrs.get(mark, 'unmarked')))
        yield name, node


def _entries_5(path, h):
    """hickle 5: the type of a dataset is a reference into a table, whose entry refers to its base
    type by name."""

    def base_type(node):
        if not isinstance(node.attrs.get('type'), h5py.Reference):
            return 'a pickle'
        entry = h[node.attrs['type']]
        if not isinstance(entry.attrs.get('base_type'), h5py.Reference):
            return 'of unknown type'
        return h[entry.attrs['base_type']].name.rsplit('/', 1)[-1]

    group = _member(path, h, 'data')
    if not isinstance(group, h5py.Group) or base_type(group) != 'dict':
        _refuse(path, 'data', base_type(group))
    for key in group:
        name = key[1:-1] if re.fullmatch('".*"', key) else key
        node = _member(path, group, key)
        if base_type(node) != 'ndarray':
            _refuse(path, name, base_type(node))
        yield name, node


def _array(path, name, node):
    if not isinstance(node, h5py.Dataset) or node.shape is None or node.dtype.kind not in 'fiu':
        _refuse(path, name, 'no dataset of numbers')
    if node.is_virtual or node.external:
        _refuse(path, name, 'stored in another file')
    array = np.array(node[()])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder('='), copy=False))


# ------------------------ files, written whole or not at all


def write_atomically(path, write) -> None:
    """write(temporary path), flushed to disk and renamed over `path`: at any moment the old file is
    there, or the new one.

    Raises UserError, status 1, where the disk refuses (full, read-only); the old file is then
    untouched."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.part')
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as e:
        # torch and HDF5 tell a full disk by a RuntimeError of their own; a second, plain write
        # tells the true reason.
        raise UserError(
            f'cannot write {path}: {_disk_error(temporary, e)}; what was there is kept', status=1
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _disk_error(path, error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with open(path, 'ab') as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as e:
        return e.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def write_text(path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


# ------------------------ log.txt


def json_stats(record: dict) -> str:
    """A line of log.txt: strict JSON."""
    return f'json_stats: {json.dumps(record, allow_nan=False)}'


def read_log(path) -> list[dict]:
    """The records of a log.txt, ours or the published code's (which holds NaN). A last line that
    was cut off is left out.

    Raises UserError if there is no whole line."""
    path = Path(path)
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from e
    records = []
    for line in lines:
        _, found, text = line.partition('json_stats: ')
        try:
            record = json.loads(text) if found else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise UserError(
            f'{path}: no whole "json_stats: {{…}}" line in it; was the run cut off before its first epoch ended?'
        )
    return records


def class_names(records: list) -> list:
    """The class names that a log tells, [] where it does not."""
    names = records[0].get('classes') if records else None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []


def same_classes(params: dict, records: list, classes: list) -> bool:
    """Whether the outputs of a net with these parameters mean `classes`, as its log tells."""
    return len(params['fc.bias']) == len(classes) and class_names(records) in ([], classes)


def check_logged_folder(source: str, what: str, folder, others: str) -> None:
    """Raises UserError if the folder that a run's log names for its images (`what`) is not here;
    `source` is the option that named the run, `others` what may be given in place of --dataroot."""
    if not os.path.isdir(folder):
        raise UserError(
            f'{source}: its {what}, {folder}, are not there; give their folder, --dataroot, or {others}'
        )


def check_classes(option: str, params: dict, records: list, classes: list) -> None:
    """Raises UserError if the outputs of a net do not mean `classes`."""
    if not same_classes(params, records, classes):
        names = class_names(records)
        of = f' ({listing(names)})' if names else ''
        raise UserError(
            f'{option}: the net has {len(params["fc.bias"])} classes{of}, the data {len(classes)} ({listing(classes)}); '
            'they must be the same, in the same order'
        )


def epoch_line(record: dict) -> str:
    """What is printed of a log record."""

    def accuracy(acc):  # top-1, or [top-1, top-5]
        return f'{acc[0]:.2f} % (top-5 {acc[1]:.2f} %)' if isinstance(acc, list) else f'{acc:.2f} %'

    parts = [f'epoch {record["epoch"]}/{record["epochs"]}: lr {record["lr"]:.2g}']
    if record['train_loss'] is not None:
        parts.append(f'train loss {record["train_loss"]:.3f} acc {accuracy(record["train_acc"])}')
    parts.append(f'test loss {record["test_loss"]:.3f} acc {accuracy(record["test_acc"])}')
    if record['at_losses']:
        losses = ' '.join(f'{v:.2e}' for v in record['at_losses'])
        parts.append(f'{record.get("method", "at")} {losses}')
    return ', '.join([*parts, f'{record["train_time"]:.1f} + {record["test_time"]:.1f} s'])


def open_curves(folder, log: list):
    """A tensorboard writer in the run folder; the curves of the log's lines are written anew, those
    of earlier files hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=0)
    for line in log:
        write_curves(writer, json.loads(line.removeprefix('json_stats: ')))
    return writer


def write_curves(writer, record: dict) -> None:
    for name in 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'lr':
        value = record[name][0] if isinstance(record[name], list) else record[name]
        if value is not None:
            writer.add_scalar(name, value, record['epoch'])
    method = record.get('method', 'at')
    groups = record.get('at_groups', range(len(record['at_losses'])))
    names = [f'{method}_loss/group{g}' for g in groups]
    if len(record['at_losses']) != len(groups):
        names = [f'{method}_loss']
    for name, value in zip(names, record['at_losses']):
        writer.add_scalar(name, value, record['epoch'])
    writer.flush()


# ------------------------ run folder and checkpoint


def holds_run(folder) -> bool:
    """Whether a folder holds a run, ours or the published code's."""
    names = ('log.txt', 'checkpoint.pt', 'model.hkl', 'model.pt7')
    return any(os.path.lexists(Path(folder) / name) for name in names)


def check_writable(folder, option: str = '--save') -> None:
    """Raises UserError if `folder` cannot become, or is not, writable. Creates nothing."""
    folder = Path(folder).absolute()
    for part in (folder, *folder.parents):
        try:
            part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise UserError(f'{option} {folder}: {e.strerror}') from e
        if not part.is_dir():
            raise UserError(f'{option} {folder}: {part} is not a folder')
        if not os.access(part, os.W_OK | os.X_OK):
            raise UserError(f'{option} {folder}: {part} cannot be written in')
        return


def begin(opt, given: set, checkpoint: dict | None, folder) -> tuple[bool, bool]:
    """(whether `folder`, which the checkpoint came from, is --save; whether that run is finished
    already), and says so, or where the run will be.

    Raises UserError if --save holds another run, or cannot be written in."""
    check_writable(opt.save)
    here = checkpoint is not None and os.path.realpath(folder) == os.path.realpath(opt.save)
    if holds_run(opt.save) and not here:
        raise UserError(
            f'--save {opt.save}: holds a run already; go on with it by --resume, or choose another folder'
        )
    if here and checkpoint['epoch'] >= opt.epochs:
        with open_folder(opt.save, checkpoint):
            print(f'{opt.save}: finished, {checkpoint["epoch"]} of {opt.epochs} epochs are done')
        return here, True
    print(f'run folder: {opt.save}')
    if opt.beta and not checkpoint and 'beta' not in given:
        print('a teacher, and neither --alpha nor --beta: training with --beta 1e+3')
    return here, False


@contextlib.contextmanager
def open_folder(folder, checkpoint: dict | None, here: bool = True):
    """Creates the run folder, locks it for this process, removes what a killed run left
    half-written, and makes its files agree with the checkpoint.

    checkpoint: the one that the run goes on from, None for a new run; here: it was read from this
    folder. Raises UserError if the folder has changed since, where another process trains in it,
    or where it cannot be created."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f'--save {folder}: cannot be created: {e.strerror}') from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f'--save {folder}: another process is training in it') from e
        now = load_checkpoint(folder) if holds_run(folder) else None
        expected = checkpoint if here else None
        before, after = ((c['epoch'], c['step']) if c else None for c in (expected, now))
        if before != after:
            raise UserError(
                f'--save {folder}: another process has trained in it meanwhile; --resume goes on with its run'
            )
        for half in Path(folder).glob('.*.part'):
            half.unlink()
        if checkpoint:
            if not here:
                save_checkpoint(folder, checkpoint)
            sync_folder(folder, checkpoint)
        yield
    finally:
        os.close(lock)


def save_checkpoint(folder, checkpoint: dict) -> None:
    """Writes checkpoint.pt alone, and leaves log.txt and model.hkl as they are."""
    path = Path(folder) / 'checkpoint.pt'
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def resume_advice(opt, here: bool) -> str:
    """What makes a run go on that was begun with these options; here: it goes on from a checkpoint
    of its own folder."""
    alone = ' alone, without a path,' if isinstance(opt.resume, str) and not here else ''
    return f'the same command with --resume{alone} goes on'


def save_run(folder, checkpoint: dict) -> None:
    """Writes checkpoint.pt, then log.txt and model.hkl, which follow from it."""
    save_checkpoint(folder, checkpoint)
    write_text(Path(folder) / 'log.txt', log_text(checkpoint))
    save_params(Path(folder) / 'model.hkl', checkpoint['params'])


def log_text(checkpoint: dict) -> str:
    return ''.join(line + '\n' for line in checkpoint['log'])


def sync_folder(folder, checkpoint: dict) -> None:
    """Makes log.txt and model.hkl agree with the checkpoint, as a kill between two of them may
    leave them apart; what agrees is not touched. Of a checkpoint inside an epoch only the log
    follows: model.hkl is that of the epoch before."""
    log, model = Path(folder) / 'log.txt', Path(folder) / 'model.hkl'
    if (log.read_bytes() if log.is_file() else b'') != log_text(checkpoint).encode():
        write_text(log, log_text(checkpoint))
    if checkpoint['step']:
        return
    wanted = checksum(v for _, v in sorted(checkpoint['params'].items()))
    try:
        same = model.is_file() and checksum(load_params(model).values()) == wanted
    except UserError:
        same = False
    if not same:
        save_params(model, checkpoint['params'])


def make_checkpoint(
    params, optimizer, opt, epoch: int, log: list, facts: dict, step=0, sums=(), adapters=None
):
    """What --resume needs (see CHECKPOINT_TYPES). sums: those of the epoch's terms so far, a list
    for each process; adapters: trained parameters that are not the net's own, and stay out of
    model.hkl."""
    return {
        'params': {k: v.detach() for k, v in params.items()},
        'adapters': {k: v.detach() for k, v in (adapters or {}).items()},
        'optimizer': optimizer.state_dict(),
        'epoch': epoch,
        'step': step,
        'sums': list(sums),
        'options': run_options(opt),
        'log': log,
        'facts': facts,
        'random': {'torch': torch.get_rng_state()},
    }


# What a checkpoint holds. `step` is the number of steps of epoch + 1 that are done. `random` is
# torch's generator: nothing of a run draws from it after the initial values, so that it is kept for
# those who add something that does.
CHECKPOINT_TYPES = {
    'params': dict,
    'adapters': dict,
    'optimizer': dict,
    'epoch': int,
    'step': int,
    'sums': list,
    'options': dict,
    'log': list,
    'facts': dict,
    'random': dict,
}


def load_checkpoint(path) -> dict:
    """checkpoint.pt of a run folder, or that file. Raises UserError if it is not whole."""
    path = Path(path)
    path = path / 'checkpoint.pt' if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise UserError(
            f'--resume: {path}: no such file; a run goes on from its checkpoint.pt alone'
        )
    checkpoint = torch_load(path)
    with reading(path), zipfile.ZipFile(path) as archive:
        # torch.load does not look at the checksums
        if archive.testzip():
            raise UserError(f'--resume: {path}: damaged, its checksums are wrong')
    if isinstance(checkpoint, dict):
        checkpoint.setdefault('adapters', {})  # runs from before there were any
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint, dict) or type(checkpoint.get(key)) is not kind:
            raise UserError(
                f'--resume: {path}: not a checkpoint of this program ({key!r} is missing or damaged)'
            )
    sound = {
        'params': all(map(torch.is_tensor, checkpoint['params'].values())),
        'adapters': all(map(torch.is_tensor, checkpoint['adapters'].values())),
        'log': all(
            isinstance(line, str) and line.startswith('json_stats: ') for line in checkpoint['log']
        ),
        'epoch': checkpoint['epoch'] >= 0,
        'step': checkpoint['step'] >= 0,
        'sums': all(isinstance(v, list) for v in checkpoint['sums']),
    }
    for key, well in sound.items():
        if not well:
            raise UserError(f'--resume: {path}: its {key!r} is damaged')
    return checkpoint


# What may differ between a run and its continuation: where and how long it runs, not what it
# computes.
MAY_DIFFER = {
    'skip_broken',
    'checkpoint_minutes',
    'check_images',
    'epochs',
    'nthread',
    'device',
    'cuda',
    'gpu_id',
    'ngpu',
    'compile',
    'tensorboard',
    'dataroot',
    'imagenetpath',
}
NOT_OPTIONS_OF_A_RUN = {'resume', 'evaluate'}


def run_options(opt) -> dict:
    """The options that a log line and a checkpoint carry."""
    return {k: v for k, v in vars(opt).items() if k not in NOT_OPTIONS_OF_A_RUN}


def find_checkpoint(opt, given: set, parser, complete) -> tuple:
    """(the checkpoint that --resume goes on from, its folder), or (None, None). Options that were
    not given become those of its run.

    complete(opt): the options with what was left open, --save too. Raises UserError if there is no
    sound checkpoint, or as continue_options."""
    if not opt.resume:
        return None, None
    if opt.resume is True:
        folder = source = Path(opt.save or complete(opt).save)
        if not holds_run(folder):
            return None, None
    else:
        source = folder = Path(opt.resume)
        if source.name == 'checkpoint.pt' and not os.path.isdir(source):
            folder = source.parent
        if not opt.save and os.path.isfile(folder):
            raise UserError(f'--resume {source}: give the folder to go on in, --save')
        opt.save = opt.save or str(folder)
    checkpoint = load_checkpoint(source)
    continue_options(opt, given, checkpoint, parser)
    return checkpoint, folder


def continue_options(opt, given: set, checkpoint: dict, parser) -> None:
    """Sets every option that was not given to that of the run in `checkpoint`. Raises UserError
    naming one that was given and differs."""
    # A run from before there was an option did as its default says, but for this one.
    usual = {k: parser.get_default(k) for k in run_options(opt)} | {'train_crop': 'resized'}
    old = usual | checkpoint['options']
    if not old['epochs']:  # nothing was trained: drops are those of the length that is wanted now
        old['epoch_step'] = None
    old = {k: v for k, v in old.items() if k != 'save' and hasattr(opt, k)}
    for name, value in old.items():
        if not parser.takes(name, value):
            raise UserError(
                f'--resume: the checkpoint has an impossible --{name} {_plain(value)[:60]}: it is damaged'
            )
        if name in given and getattr(opt, name) != value and name not in MAY_DIFFER:
            raise UserError(
                f'--resume: --{name} {_plain(getattr(opt, name))} differs from the run, which has {_plain(value)}'
            )
    longer = 'epochs' in given and old['epochs'] not in (0, opt.epochs)
    if longer and old.get('beta_decay', 'none') != 'none':
        raise UserError(
            f'--epochs {opt.epochs}: beta decays over the {old["epochs"]} epochs of this run, which cannot change'
        )
    if longer and 'epoch_step' not in given:
        print(
            f'--epochs {opt.epochs} in place of {old["epochs"]}: the rate still drops at {_plain(old["epoch_step"])}'
        )
    # A device that is named now stands for all that was said of devices before.
    devices = {'device', 'cuda', 'gpu_id', 'ngpu'}
    for name, value in old.items():
        if name not in given and not (name in devices and given & devices):
            setattr(opt, name, value)


def _plain(value):
    return str(value).replace(' ', '')


def check_facts(facts: dict, checkpoint: dict) -> None:
    """Raises UserError if the data or the teacher is not that of the run in the checkpoint."""
    options = {
        'data': '--dataroot or --imagenetpath',
        'teacher': '--teacher_id or --teacher_params',
    }
    for name, option in options.items():
        if facts[name] != checkpoint['facts'].get(name):
            raise UserError(
                f'--resume: the {name} of {option} is not what the run began with; bring that back, or begin anew in another --save'
            )


# ------------------------ optimizer and schedule


def make_optimizer(params: dict, opt, epoch: int) -> torch.optim.SGD:
    """SGD with momentum 0.9 at the rate of that epoch; decay on every trained parameter."""
    rate = learning_rate(epoch, opt)
    return torch.optim.SGD(trainable(params), rate, momentum=0.9, weight_decay=opt.weight_decay)


def trainable(params: dict) -> list:
    return [v for v in params.values() if v.requires_grad]


def load_optimizer(optimizer, checkpoint: dict) -> None:
    """Raises UserError if the checkpoint's optimizer is not one of these parameters."""
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
        for p, state in optimizer.state.items():
            if any(v is not None and v.shape != p.shape for v in state.values()):
                raise ValueError('momentum of another shape')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'--resume: the optimizer state does not fit the net ({e})') from e


def scaled_steps(steps: list, published_epochs: int, epochs: int) -> list:
    """The published drops, each rate keeping its share of `epochs`:
    round((s - 1) * epochs / published_epochs) + 1."""
    return sorted({round((s - 1) * epochs / published_epochs) + 1 for s in steps})


def learning_rate(epoch: int, opt) -> float:
    """--lr, times --lr_decay_ratio from each of --epoch_step on; epochs count from 1."""
    return opt.lr * opt.lr_decay_ratio ** sum(step <= epoch for step in opt.epoch_step)


def epoch_beta(epoch: int, opt) -> float:
    """The weight of the transfer in that epoch, counted from 1: --beta, decayed to zero by the last
    of --epochs as --beta_decay says.

    linear: a straight line; cosine: half a cosine wave; step: in equal steps at those of
    --epoch_step, zero from the last on."""
    t = (epoch - 1) / max(1, opt.epochs - 1)
    drops = [step for step in opt.epoch_step if step <= opt.epochs]
    share = {
        'none': 1,
        'linear': 1 - t,
        'cosine': (1 + math.cos(math.pi * t)) / 2,
        'step': 1 - sum(step <= epoch for step in drops) / max(1, len(drops)),
    }
    return opt.beta * share[opt.beta_decay]


def check_finite(rows, names: list, epoch: int, steps_before: int, folder) -> None:
    """Raises UserError, status 1, naming step and terms of the first of `rows` [steps, terms] that
    is not finite."""
    bad = (~rows.isfinite()).nonzero()[:, 0]
    if len(bad):
        row = rows[bad[0]].tolist()
        terms = ', '.join(f'{name} {v}' for name, v in zip(names, row) if not math.isfinite(v))
        raise UserError(
            f'epoch {epoch}, step {steps_before + int(bad[0]) + 1}: not finite: {terms}; {folder} is kept as after its last '
            'checkpoint. A lower --lr or --beta may help',
            status=1,
        )


# ------------------------ devices


def choose_device(opt) -> tuple[torch.device, list]:
    """(device, device_ids for data_parallel) of --device, --cuda, --gpu_id and --ngpu; sets
    --nthread and --deterministic."""
    if opt.cuda and opt.device not in ('auto', 'cuda'):
        raise UserError(f'--cuda contradicts --device {opt.device}')
    if opt.gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = opt.gpu_id
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usual = 'cuda' if opt.cuda or n_gpus else 'cpu'
    name = usual if opt.device == 'auto' else opt.device
    if opt.gpu_id and not n_gpus and (name == 'cuda' or opt.device == 'auto'):
        raise UserError(
            f'--gpu_id {opt.gpu_id}: there is no such CUDA device here; --device cpu runs on the CPU'
        )
    if name == 'cuda' and not n_gpus:
        raise UserError(
            '--device cuda: there is no CUDA device here; leave the option out to run on the CPU'
        )
    if name == 'mps' and not torch.backends.mps.is_available():
        raise UserError(
            '--device mps: there is no such device here; leave the option out to run on the CPU'
        )
    if opt.ngpu > max(1, n_gpus) or opt.ngpu > 1 and name != 'cuda':
        but = f', and --device is {name}' if n_gpus else ''
        raise UserError(f'--ngpu {opt.ngpu}: there are {n_gpus} GPUs to use here{but}')
    if opt.ngpu > 1 and opt.compile:
        raise UserError('--compile works on one device; leave it out with --ngpu above 1')
    if opt.nthread:
        torch.set_num_threads(opt.nthread)
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opt.deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; bfloat16 is the fast way
    return torch.device(name), list(range(opt.ngpu)) if name == 'cuda' else [torch.device(name)]


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step. Else a step on the CPU hands its activations
    back to the kernel, which clears their pages anew for the next one: a fifth of the time. Other C
    libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def to_device(params: dict, device) -> dict:
    """Parameters on the device; 4-dimensional weights in channels_last memory, where convolutions
    are faster."""

    def place(v):
        layout = torch.channels_last if v.dim() == 4 else torch.contiguous_format
        return v.detach().to(device, memory_format=layout).requires_grad_(v.requires_grad)

    return {k: place(v) for k, v in params.items()}


def compiler_works(device) -> bool:
    """Whether torch.compile can compile for the device; where it cannot, one line says why."""
    # It warns of CUDA where none is used.
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(4096, device=device))
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = ' '.join(str(e).split())[:200]
        warning = f'warning: --compile: no working compiler here, going on without ({reason})'
        print(warning, file=sys.stderr)
        return False
    return True


def compiled(f, opt, device):
    """f, compiled if --compile asks for it and a compiler works here; else the log will say that it
    was not."""
    opt.compile = opt.compile and compiler_works(device)
    if not opt.compile:
        return f
    # A GPU's compiler would have float32 be less than that.
    warnings.filterwarnings('ignore', 'TensorFloat32 tensor cores')
    # Each batch shape by itself, so that a resumed run runs the same graphs.
    return torch.compile(f, dynamic=False)


class Graphed:
    """step(*tensors) -> tensor on a GPU, played back as a CUDA graph: the same kernels on the same
    memory, launched at once. A small net's step is hundreds of kernels, which Python takes longer
    to launch than the GPU to run.

    The first calls run as they are, then one is recorded. Inputs of another shape than the first
    ones run as they are too. What else the step reads must stay where it is; numbers of Python's,
    such as a learning rate, stay what they were. The memory of the recording is its own: what runs
    in between, such as that of other shapes, takes more.
    """

    WARM_UP = 3  # calls in which kernels are compiled and chosen, and the momentum is made
    # Backward runs on the stream of its forward, so that all calls are on one.
    stream = None

    def __init__(self, step):
        self.step, self.inputs, self.graph, self.calls = step, None, None, 0
        Graphed.stream = Graphed.stream or torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [v.clone() for v in inputs]
        if [v.shape for v in inputs] != [v.shape for v in self.inputs]:
            return self._as_it_is(inputs)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._as_it_is(inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = self.step(*self.inputs)
        for kept, v in zip(self.inputs, inputs):
            kept.copy_(v)
        self.graph.replay()
        return self.output.clone()

    def _as_it_is(self, inputs):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output


def warn_of_slow_dtype(dtype: str, device) -> None:
    """Warns where --dtype bfloat16 is the slow way: a CPU without instructions for it converts each
    number there and back."""
    if dtype != 'bfloat16' or device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(
            'warning: --dtype bfloat16: this processor has no instructions for it and is many times slower than with --dtype float',
            file=sys.stderr,
        )


def multiply_adds(f, params: dict, size, device) -> int:
    """Multiply-adds of convolutions and matrix products for one image of that (height, width)."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        f(torch.zeros(1, 3, *size, device=device), params, False)
    return counter.get_total_flops() // 2


# ------------------------ options


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, defaults in its help, and no abbreviations."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message):
        raise UserError(message)

    def parse(self, argv) -> tuple[argparse.Namespace, set]:
        """(the options, the names of those that were given). An empty value is refused: mostly it
        comes from an unset shell variable."""
        argv = sys.argv[1:] if argv is None else argv
        opt = self.parse_args(argv)
        words = {arg.split('=')[0] for arg in argv}
        given = {a.dest for a in self._actions if words.intersection(a.option_strings)}
        for name in sorted(given):
            value = getattr(opt, name)
            if '' in (value if isinstance(value, list) else [value]):
                self.error(f'--{name}: its value is empty')
        return opt, given

    def takes(self, name: str, value) -> bool:
        """Whether a value of a log or a checkpoint is one that --name can have."""
        action = next((a for a in self._actions if a.dest == name), None)
        if action is None or value == action.default and type(value) is type(action.default):
            return action is not None
        if action.nargs == 0:
            return type(value) is bool
        text = value if isinstance(value, str) else json.dumps(value)
        try:
            parsed = action.type(text) if action.type else text
        except argparse.ArgumentTypeError:
            return False
        same = type(parsed) is type(value) and parsed == value
        return same and (action.choices is None or value in action.choices)


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite number of that kind, low <= number <= high, above < number."""
    bounds = {'at least': low, 'above': above, 'at most': high}
    bounds = ' and '.join(f'{word} {v}' for word, v in bounds.items() if math.isfinite(v))
    wanted = f'{"a whole number" if kind is int else "a number"} {bounds}'.strip()
    limit = 2**31 if kind is int else math.inf

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < limit and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f'{text[:40]!r} is not {wanted}')
        return value

    return parse


def rising_epochs(text):
    """An argparse type: a JSON list of rising positive whole numbers."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    whole = isinstance(epochs, list) and all(type(e) is int and e > 0 for e in epochs)
    if not whole or sorted(set(epochs)) != epochs:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a JSON list of rising positive whole numbers, such as [60,120,160]'
        )
    return epochs


def gpu_list(text):
    """An argparse type: numbers of GPUs, such as '0,1'."""
    if not re.fullmatch(r'\d+(,\d+)*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of GPU numbers, such as 0,1')
    return text


def group_list(n: int):
    """An argparse type: different groups out of the first n, '2,3' or '[3, 2]' -> [2, 3]."""

    def parse(text):
        inside = text.strip()
        if inside.startswith('[') and inside.endswith(']'):
            inside = inside[1:-1]
        groups = inside.replace(' ', '').split(',')
        if not set(groups) <= set(map(str, range(n))) or len(set(groups)) != len(groups):
            raise argparse.ArgumentTypeError(
                f'{text[:40]!r} is not a list of different groups of 0 to {n - 1}, such as {n - 2},{n - 1}'
            )
        return sorted(int(g) for g in groups)

    return parse


def complete_losses(opt, teacher: str, beta_alone: bool = False) -> None:
    """Fills in --alpha and --beta where the option `teacher` names one; beta_alone: what --beta
    weighs has no use for a teacher. Raises UserError if they contradict each other."""
    given = getattr(opt, teacher)
    if given and opt.alpha is None and opt.beta is None and not beta_alone:
        opt.beta = 1e3
    opt.alpha, opt.beta = opt.alpha or 0.0, opt.beta or 0.0
    if given and not opt.alpha and beta_alone:
        raise UserError(
            f'--method {opt.method} needs no teacher: leave --{teacher} out, or give --alpha'
        )
    if given and not opt.alpha and not opt.beta:
        raise UserError(f'--alpha and --beta are both 0: nothing would be learned from --{teacher}')
    for name in ('alpha',) if beta_alone else ('alpha', 'beta'):
        if getattr(opt, name) and not given:
            raise UserError(f'--{name} {getattr(opt, name):g} needs a teacher: give --{teacher}')


def run_name(parts: list, opt, parser, said: set, published_steps: list, published_epochs: int):
    """A folder's name: `parts`, then every option that matters and is not as published, but for
    those that `parts` has `said`."""
    usual = {'alpha': 0, 'beta': 0}
    usual['epoch_step'] = scaled_steps(published_steps, published_epochs, opt.epochs)
    said = said | {'seed', 'save'} | MAY_DIFFER - {'epochs'} | NOT_OPTIONS_OF_A_RUN
    parts = [part for part in parts if part]
    for name in sorted(vars(opt).keys() - said):
        value = getattr(opt, name)
        if value == usual.get(name, parser.get_default(name)):
            continue
        if isinstance(value, list):
            value = '-'.join(map(str, value))
        elif isinstance(value, float):
            value = f'{value:g}'
        parts.append(name if value is True else f'{name}{value}')
    name = '_'.join([*parts, f'seed{opt.seed}']).replace('/', '-')
    return name if len(name) <= 200 else f'{name[:190]}_{zlib.crc32(name.encode()):08x}'


def without_suffix(path: str) -> str:
    """The path of weights or of a run folder without what all have: logs/ and .hkl and the like."""
    return re.sub(r'^logs/|\.(hkl|pth|pt7?|safetensors)$', '', path).strip('./')


def add_training_options(
    parser, *, batch_size, lr, epochs, weight_decay, epoch_step, lr_decay_ratio
) -> None:
    """The options of both training scripts, with the published values of the one that calls."""
    # fmt: off
    add = parser.add_argument_group('training').add_argument
    add('--batch_size', default=batch_size, type=number(int, 1), help=f'images a step (paper, and default: {batch_size})')
    add('--lr', default=lr, type=number(above=0), help=f'learning rate of SGD with momentum 0.9 (paper, and default: {lr})')
    add('--epochs', default=epochs, type=number(int, 0, 1_000_000), help=f'passes over the training images; 0 writes the untrained net (paper, and default: {epochs})')
    add('--epoch_step', type=rising_epochs, metavar='LIST', help=f'epochs, counted from 1, at whose beginning the rate drops (paper: {_plain(epoch_step)}; default: the same, scaled to --epochs)')
    add('--lr_decay_ratio', default=lr_decay_ratio, type=number(above=0, high=1), help=f'what the rate is multiplied by when it drops (paper, and default: {lr_decay_ratio})')
    add('--weight_decay', default=weight_decay, type=number(low=0), help=f'L2 decay, on all trained parameters (paper, and default: {weight_decay})')
    add('--dtype', default='float', choices=['float', 'bfloat16'], help='what convolutions and activations compute in; parameters, statistics, maps, losses and tests are float32 (paper, and default: float)')
    add('--seed', default=0, type=number(int, 0), help='of initial values, order and augmentation (default: 0)')
    add = parser.add_argument_group('run').add_argument
    add('--save', default='', metavar='DIR', help='folder of the run (default: logs/NAME, made from the options)')
    add('--resume', nargs='?', const=True, metavar='PATH', help='go on with the run in --save if there is one, else start it; with PATH: go on from that run folder or checkpoint')
    add('--evaluate', metavar='PATH', help='test a weights file (.hkl, .pth, .pt7, .safetensors) or a run folder, and stop')
    add('--tensorboard', action=argparse.BooleanOptionalAction, default=False, help='also write curves for tensorboard into --save')
    add = parser.add_argument_group('machine').add_argument
    add('--device', default='auto', choices=['auto', 'cpu', 'cuda', 'mps'], help='auto: cuda where there is one, else cpu; mps is untested (default: auto)')
    add('--cuda', action='store_true', help='the same as --device cuda')
    add('--gpu_id', type=gpu_list, help='GPUs to use, such as 0,1 (default: CUDA_VISIBLE_DEVICES as it is)')
    add('--ngpu', default=1, type=number(int, 1), help='GPUs that split a batch; more than 1 is untested (default: 1)')
    add('--nthread', default=0, type=number(int, 0, 1024), help='CPU threads that decode and compute (default: 0, one a core)')
    add('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile the step, which cifar.py plays back as a CUDA graph on a GPU: faster, after a start of a minute or two; on one device')
    add('--deterministic', action='store_true', help='the same bits in every run on one GPU, at some cost; a CPU gives them anyway, with the same --nthread')
    # fmt: on


# ------------------------ mistakes and signals


class Stopped(BaseException):
    """A signal that ends the run, between two bytecodes of wherever it is."""

    def __init__(self, signum):
        self.signum = signum


def call_main(main, argv=None) -> int:
    """Runs main(argv) and returns the exit status: 0, that of a UserError (one line on stderr), or
    130 and 143 for SIGINT and SIGTERM, with a line that says how to go on. main sets `main.hint` to
    that advice as soon as there is something to go on with."""

    def stop(signum, frame):
        raise Stopped(signum)

    program = Path(sys.argv[0]).name
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        program += f', rank {os.environ["RANK"]}'
    main.hint = 'nothing was written; the same command starts it again'
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(argv)
        return 0
    except ValueError as e:
        # UserError, or data.UserError, which this file does not know by name; any other is a bug
        # and keeps its traceback.
        if not hasattr(e, 'status'):
            raise
        print(f'{program}: error: {" ".join(str(e).split())}', file=sys.stderr)
        return e.status
    except Stopped as e:
        for s in before:  # a second signal does not interrupt the line
            signal.signal(s, signal.SIG_IGN)
        after_bar = '\n' if sys.stderr.isatty() else ''
        stopped = f'stopped by {signal.Signals(e.signum).name}'
        print(f'{after_bar}{program}: {stopped}: {main.hint}', file=sys.stderr)
        return 128 + e.signum
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
