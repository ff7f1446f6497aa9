"""What the paper needs: parameter helpers, the losses, the recipe, and several GPUs.

Imports no other file of this repository. Wrong arguments raise ValueError.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.init import kaiming_normal_
from torch.nn.parallel import parallel_apply
from torch.nn.parallel._functions import Broadcast
from torch.nn.parallel.scatter_gather import scatter

# ------------------------ parameters: a flat dict of tensors


def cast(params, dtype: str = 'float'):
    """A tensor, or a nested dict of tensors, as 'float', 'bfloat16', 'double', 'long' …"""
    if isinstance(params, dict):
        return {k: cast(v, dtype) for k, v in params.items()}
    return getattr(params, dtype)()


def flatten(nested: dict) -> dict:
    """{'group0': {'conv0': w}} -> {'group0.conv0': w}, without the entries that are None."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update({f'{name}.{k}': v for k, v in flatten(value).items()})
        elif value is not None:
            flat[name] = value
    return flat


def part(params: dict, name: str) -> dict:
    """The entries named `name`.* without that prefix: one net of a merged dict."""
    return {k.removeprefix(f'{name}.'): v for k, v in params.items() if k.startswith(f'{name}.')}


def conv_params(ni: int, no: int, k: int = 1) -> torch.Tensor:
    """Kaiming-normal (fan-in) weight [no, ni, k, k]."""
    return _kaiming_normal(no, ni, k, k)


def linear_params(ni: int, no: int) -> dict:
    """Kaiming-normal (fan-in) weight [no, ni] and zero bias [no]."""
    return {'weight': _kaiming_normal(no, ni), 'bias': torch.zeros(no)}


def _kaiming_normal(*size):
    weight = torch.empty(size)
    # On the meta device only shapes count, and drawing nothing takes torch a millisecond for each.
    return weight if weight.is_meta else kaiming_normal_(weight)


def bnparams(n: int) -> dict:
    """Batch norm over n channels: weight uniform(0, 1), as in the published CIFAR recipe, bias 0,
    mean 0, variance 1."""
    return {
        'weight': torch.rand(n),
        'bias': torch.zeros(n),
        'running_mean': torch.zeros(n),
        'running_var': torch.ones(n),
    }


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32, because bfloat16 loses too much in sums and squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_norm(x: torch.Tensor, params: dict, base: str, training: bool) -> torch.Tensor:
    """Batch norm of x [B, C, H, W] with params[`base`.weight, .bias, .running_mean, .running_var],
    momentum 0.1, eps 1e-5.

    In training the running statistics are updated in place. Statistics and parameters stay
    float32, whatever the dtype of x.
    """
    # The compiler would keep the batch's mean and 1/std in the dtype of x for the backward pass.
    o = wide(x) if torch.compiler.is_compiling() else x
    bn = [params[f'{base}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
    return F.batch_norm(o, *bn, training=training).to(x.dtype)


def conv2d(x, weight, stride=1, padding=0, bias=None) -> torch.Tensor:
    """Convolution of x [B, C, H, W] in the dtype of x; `weight` and `bias` stay float32."""
    pointwise = weight.shape[2:] == (1, 1) and not padding
    if pointwise and stride > 1 and weight.shape[1] < 16 and x.device.type == 'cpu':
        # Slice x instead of striding. In channels_last, oneDNN's weight gradient of this strided
        # convolution writes past the end of its memory if there are fewer channels than floats in a
        # vector of the CPU, 8 or 16: https://github.com/uxlfoundation/oneDNN/issues/6035
        x, stride = x[:, :, ::stride, ::stride], 1
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)


def classify(x: torch.Tensor, params: dict, base: str) -> torch.Tensor:
    """Global average pooling and the linear layer `base`fc in at least float32:
    [B, C, H, W] -> [B, num_classes]. None for a net without this layer."""
    if f'{base}fc.weight' not in params:
        return None
    o = wide(x).mean((2, 3))
    return F.linear(o, params[f'{base}fc.weight'].to(o.dtype), params[f'{base}fc.bias'].to(o.dtype))


def is_statistic(name: str) -> bool:
    """Whether the name is that of a running statistic, which is not trained."""
    return name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def set_requires_grad_except_bn_(params: dict) -> None:
    """Set requires_grad on everything except the running statistics of batch norm."""
    for name, value in params.items():
        if not is_statistic(name):
            value.requires_grad_()


def trainable(params: dict) -> list:
    """The tensors that the optimizer trains."""
    return [v for v in params.values() if v.requires_grad]


def print_tensor_dict(params: dict) -> None:
    """Print one line for each tensor: number, name, shape, type, requires_grad."""
    width = max(map(len, params), default=0)
    for i, (name, v) in enumerate(params.items()):
        print(f'{i:<5}{name:<{width + 3}}{tuple(v.shape)!s:<23}{v.type():<23}{v.requires_grad}')


# ------------------------ losses


def at(x: torch.Tensor, p: float = 2, map: str = 'sum') -> torch.Tensor:
    """Attention map of activations x [B, C, H, W]: [B, H*W] in at least float32.

    The mean (map 'sum') or the maximum (map 'max') over channels of |x|^p, flattened and
    L2-normalised per sample (section 3.1 of the paper). The mean equals the paper's sum, because
    the normalisation removes the scale. A map of zeros stays zero.

    Raises ValueError if there is no such map.
    """
    return _normalize(_channel_map(x, p, map)).flatten(1)


def at_loss(x: torch.Tensor, y: torch.Tensor, p: float = 2, map: str = 'sum') -> torch.Tensor:
    """Attention transfer loss of activations x [B, C, H, W] and y [B, C', H', W']: a scalar in at
    least float32.

        mean over the batch and the H*W map elements of (at(x, p, map) - at(y, p, map))^2

    Channels may differ. Maps of unequal size are average-pooled to (min H, min W) before they are
    normalised.

    Equation 2 of the paper adds beta/2 times the norm of at(x) - at(y), not squared, with "beta
    10^3 divided by the number of elements in the map and the batch size". The published code
    squares the norm, divides by taking the mean, and multiplies by beta instead of beta/2. The
    paper's CIFAR numbers came from that code, so this function follows it.

    Raises ValueError unless both are 4-D with the same batch size, or if there is no such map.
    """
    tensors = torch.is_tensor(x) and torch.is_tensor(y)
    if not tensors or x.dim() != 4 or y.dim() != 4 or len(x) != len(y):
        found = [tuple(v.shape) if torch.is_tensor(v) else type(v).__name__ for v in (x, y)]
        raise ValueError(
            f'at_loss needs two activations [B, C, H, W] of one batch, not {found[0]} and '
            f'{found[1]}. Arrange tokens [B, N, C], without class token, by '
            'x.transpose(1, 2).unflatten(2, (H, W)), and NHWC by x.permute(0, 3, 1, 2). Pooled '
            'features [B, C] have no map: take a layer before the pooling'
        )
    x, y = _same_size(_channel_map(x, p, map), _channel_map(y, p, map))
    return (_normalize(x) - _normalize(y)).square().mean()


def _channel_map(x, p, map):
    if map not in ('sum', 'max') or not p > 0:
        raise ValueError(f"map {map!r} with p {p}: map must be 'sum' or 'max', p positive")
    # sum / C, because the gradient of mean() is contiguous and would turn a channels_last net's
    # whole backward pass contiguous. square(), because through abs() the second derivative at 0 is
    # lost.
    x = wide(x)
    if p not in (1, 2):
        # High powers overflow. The normalisation removes the scale, so divide by the maximum first
        # and treat it as a constant.
        x = x / x.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    powers = x.square() if p == 2 else x.abs() if p == 1 else _power(x.abs(), p)
    return powers.amax(1) if map == 'max' else powers.sum(1) / x.shape[1]


def _power(x, p):
    # For p below 1 the derivative at 0 is infinite, and infinity times 0 is nan. Make it 0.
    return torch.where(x > 0, x, 1).pow(p) * (x > 0)


def _normalize(q):
    # Divide by the maximum first, or the square of a map of tiny activations underflows. The result
    # does not depend on the maximum, so it is a constant. The sum of squares is then at least 1,
    # except for a map of zeros, which stays zero with zero derivatives.
    # No flatten: for channels_last activations it is a slow copy.
    dims = tuple(range(1, q.dim()))
    q = q / q.detach().abs().amax(dims, keepdim=True).clamp_min(1e-30)
    return q / q.square().sum(dims, keepdim=True).clamp_min(1).sqrt()


def _same_size(x, y):
    # Average-pool the larger of two maps, or activations, to the size of the smaller.
    size = [min(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:])]
    return [v if v.shape[-2:] == tuple(size) else F.adaptive_avg_pool2d(v, size) for v in (x, y)]


def factt_loss(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Full-activation transfer (F-ActT, section 4.1.2 of the paper, after FitNets) of activations
    x [B, C, H, W] and y [B, C', H', W']: a scalar in at least float32.

        mean over the batch and the H*W positions of the sum over channels of
        (n(weight * x) - n(y))^2

    n(z): z [B, C', H, W] L2-normalised per sample. weight [C', C, 1, 1]: a 1x1 convolution that
    matches the channels, None if they are equal. Unequal sizes are pooled as in at_loss. Like
    at_loss, the result is a squared distance divided by H*W.
    """
    if weight is not None:
        x = conv2d(x, weight)
    x, y = _same_size(wide(x), wide(y))
    distance = (_normalize(x) - _normalize(y)).square().sum((1, 2, 3))
    return distance.mean() / x[0, 0].numel()


def distillation(y, teacher_scores, labels, T: float, alpha: float) -> torch.Tensor:
    """Knowledge distillation (Hinton et al. 2015) of logits y [B, K] from the teacher's [B, K],
    labels [B]: a scalar, the mean over the batch of

        alpha T^2 KL(softmax(teacher / T) || softmax(y / T)) + (1 - alpha) cross_entropy(y, labels)

    With alpha 0 the teacher's scores are ignored: they may be None, or of other classes.
    """
    loss = (1 - alpha) * F.cross_entropy(wide(y), labels)
    if alpha:
        p, q = F.log_softmax(wide(y) / T, 1), F.log_softmax(wide(teacher_scores) / T, 1)
        loss = loss + alpha * T**2 * F.kl_div(p, q, reduction='batchmean', log_target=True)
    return loss


def task_name(opt) -> str:
    """What `distillation` computes, for a message."""
    return 'distillation' if opt.alpha else 'cross-entropy'


def input_gradient(f, x: torch.Tensor, targets: torch.Tensor, create_graph: bool = False) -> tuple:
    """(logits, groups, J) of logits, groups = f(x), with J [B, 3, H, W] = d cross_entropy / d x
    (section 3.2 of the paper).

    The cross-entropy is summed over the batch, so that each sample has the gradient of its own
    loss. (In training, batch norm couples the samples; J is then the gradient of the sum.)
    create_graph: all three can be differentiated again; without it they are constants.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits, groups = f(x)
        loss = F.cross_entropy(wide(logits), targets, reduction='sum')
        J = wide(torch.autograd.grad(loss, x, create_graph=create_graph)[0])
    if not create_graph:
        logits, groups = logits.detach(), tuple(g.detach() for g in groups)
    return logits, groups, J


def gradient_loss(J: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Gradient-based attention transfer (section 3.2 of the paper): half the mean over the batch of
    ||J - other||^2, for input gradients J of the student and `other` of the teacher, [B, 3, H, W].
    """
    return (J - other).square().sum((1, 2, 3)).mean() / 2


def symmetry_loss(J: torch.Tensor, J_flipped: torch.Tensor) -> torch.Tensor:
    """Symmetry norm (section 3.2 of the paper): half the mean over the batch of
    ||J - flip(J_flipped)||^2, for input gradients [B, 3, H, W] of the images and of the
    horizontally flipped images."""
    return gradient_loss(J, J_flipped.flip(3))


def min_l2_loss(J: torch.Tensor) -> torch.Tensor:
    """Min-l2 penalty of Table 3 (double backpropagation, Drucker & LeCun 1992): half the mean over
    the batch of ||J||^2, for an input gradient J [B, 3, H, W]."""
    return J.square().sum((1, 2, 3)).mean() / 2


# ------------------------ recipe: optimizer, learning rate and beta of an epoch


def make_optimizer(params: dict, opt, epoch: int) -> torch.optim.SGD:
    """SGD with momentum 0.9 at the learning rate of that epoch, and --weight_decay on every trained
    parameter. Call it at each drop of the rate too: momentum restarts there, as published."""
    rate = learning_rate(epoch, opt)
    return torch.optim.SGD(trainable(params), rate, momentum=0.9, weight_decay=opt.weight_decay)


def learning_rate(epoch: int, opt) -> float:
    """--lr, multiplied by --lr_decay_ratio from each epoch of --epoch_step on (1-based)."""
    return opt.lr * opt.lr_decay_ratio ** sum(step <= epoch for step in opt.epoch_step)


def scaled_steps(steps: list, published_epochs: int, epochs: int) -> list:
    """The published drops scaled to `epochs`, so that each rate keeps its share of the run:
    round((s - 1) * epochs / published_epochs) + 1. Drops at epoch 1, before any training at --lr,
    are left out."""
    scaled = {round((s - 1) * epochs / published_epochs) + 1 for s in steps}
    return sorted(scaled - {1})


def epoch_beta(epoch: int, opt) -> float:
    """The weight of the transfer in that epoch (1-based): --beta, which --beta_decay lowers to zero
    by the last epoch.

    linear: a straight line; cosine: half a cosine wave; step: equal steps at the epochs of
    --epoch_step, zero from the last one on.
    """
    t = (epoch - 1) / max(1, opt.epochs - 1)
    drops = [step for step in opt.epoch_step if step <= opt.epochs]
    share = {
        'none': 1,
        'linear': 1 - t,
        'cosine': (1 + math.cos(math.pi * t)) / 2,
        'step': 1 - sum(step <= epoch for step in drops) / max(1, len(drops)),
    }
    return opt.beta * share[opt.beta_decay]


# ------------------------ several GPUs


def data_parallel(f, input, params: dict, training: bool, device_ids, output_device=None):
    """f(input, params, training) with the batch split over device_ids, the first of which holds
    params and input.

    `input` is a tensor, or a tuple or dict of tensors with one batch dimension. On one device this
    is a plain call. On several, gradients flow back to `params`, and the running statistics of the
    first device are kept, as published. Outputs: see gather_outputs.
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


def gather_outputs(outputs: list, sizes: list, device):
    """Join the outputs of all devices on `device`.

    Tensors with a batch dimension are concatenated. 0-dim tensors (losses) become their mean,
    weighted by `sizes`, the samples of each device. Tuples, lists and dicts keep their structure.
    """
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


def batch_size(batch) -> int:
    """The number of samples in a tensor, or in a tuple or dict of tensors."""
    while not torch.is_tensor(batch):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)
