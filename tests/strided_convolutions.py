"""Compare strided 1x1 convolutions, their gradients and the gradients of these with float64. A
script, because a write past the end of memory ends its process, or comes to light later."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from samples import randn


def main():
    torch.set_num_threads(1)
    for channels in (*range(1, 19), 24, 32, 40):
        for B, H, W, stride in (4, 64, 64, 2), (2, 31, 8, 2), (3, 24, 24, 3), (1, 1, 1, 2):
            for layout in torch.channels_last, torch.contiguous_format:
                check((B, channels, H, W), stride, layout)


def check(size, stride, layout):
    def results(conv2d, dtype):
        x = randn(*size, seed=1, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        w = randn(2 * size[1], size[1], 1, 1, seed=2, dtype=dtype) / size[1] ** 0.5
        w = w.contiguous(memory_format=layout).requires_grad_()
        o = conv2d(x, w, stride=stride)
        weights = randn(*o.shape, seed=3, dtype=dtype)
        first = torch.autograd.grad((o * weights).sum(), [x, w], create_graph=True)
        norm = sum(v.square().mean() for v in first)
        return [o, *first, *torch.autograd.grad(norm, [x, w])]

    # torch itself computes float64, without oneDNN.
    for found, expected in zip(results(utils.conv2d, torch.float), results(F.conv2d, torch.double)):
        close = (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert close, (size, stride, layout)


if __name__ == '__main__':
    main()
