"""The outputs of layers of torch modules, for transfer.py."""

import torch
from modules import Net

from support.program import UserError


class Watched:
    """Keeps the outputs of layers of a net, in the order of `layers`, at each call.

    It first tries the net on two black images of that size. Raises UserError if the net does not
    take them, gives no logits of its classes, or has no such layer.
    """

    def __init__(self, net: Net, layers: list, size: int):
        known = dict(net.module.named_modules(remove_duplicate=False))
        self.outputs = [None] * len(layers)
        for i, layer in enumerate(layers):
            if layer not in known:
                raise UserError(f'{net.source}: has no layer {layer}; --list prints its layers')
            known[layer].register_forward_hook(lambda _, __, x, i=i: self.keep(i, x))
        try:
            with torch.no_grad():
                net.module.eval()
                logits = net(torch.zeros(2, size, size, 3, dtype=torch.uint8))
        except (AssertionError, RuntimeError, ValueError) as e:
            fails = f'{net.source}: fails on images of {size}x{size}, see --image_size'
            raise UserError(f'{fails}: {str(e)[:300]}') from e
        shape = getattr(logits, 'shape', None)
        if shape is None or len(shape) != 2 or shape[1] < net.num_classes:
            what = type(logits).__name__ if shape is None else tuple(shape)
            raise UserError(f'{net.source}: returns {what}, not (2, {net.num_classes}) logits')

    def keep(self, i: int, x) -> None:
        self.outputs[i] = x

    def maps(self) -> list:
        """The outputs as [B, C, H, W]."""
        return [as_maps(x) for x in self.outputs]


def watch(net: Net, layers: list, size: int):
    """maps() -> [activations [B, C, H, W] of each layer in the net's last call]. Raises UserError
    if a layer has no maps."""
    watched = Watched(net, layers, size)
    for layer, x in zip(layers, watched.outputs):
        if not has_maps(x):
            raise UserError(f'{net.source}: layer {layer} has no maps; --list prints those that do')
    return watched.maps


def print_layers(size: int, *nets) -> None:
    """Print the layers of the nets whose outputs have maps, with the outputs' shapes."""
    for net in filter(None, nets):
        print(f'{net.source}: layers with maps, for 2 images of {size}x{size}')
        layers = [name for name, _ in net.module.named_modules() if name]
        for layer, x in zip(layers, Watched(net, layers, size).outputs):
            if has_maps(x):
                print(f'{layer:40} {tuple(x.shape)}')


def has_maps(x) -> bool:
    """Whether a layer's output for two square images is more than one vector for each.

    The windows of a Swin transformer have another batch size, and its attention scores are not
    square.
    """
    if not torch.is_tensor(x) or x.dim() not in (3, 4) or len(x) != 2:
        return False
    _, _, H, W = as_maps(x).shape
    return H == W > 1


def as_maps(x: torch.Tensor) -> torch.Tensor:
    """Activations [B, C, H, W] of square images, also from NHWC and from the tokens of a ViT
    [B, N, C]: class tokens, then the H*W patches row by row."""
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2) if x.shape[1] == x.shape[2] != x.shape[3] else x
    side = int(x.shape[1] ** 0.5)
    return x[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
