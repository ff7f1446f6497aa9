"""Small nets and images for the tests of scripts/attention*.py and scripts/agreement.py."""

import sys
from pathlib import Path

import numpy as np
import torch

import resnet
from support import logs, weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))
from attention_nets import LabelledNet

ANY = {'bn.weight': 0, 'fc.weight': 0, 'fc.bias': 0}  # the names of a net for small images
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)


def net_of(f, label='net', classes=None):
    return LabelledNet(label, f, ANY, [{'classes': classes}] if classes else [])


def linear_net(seed=0, size=8, channels=(5, 4)):
    """(a net of two groups, 1x1 convolutions of the image and of its `size` x `size` means, and a
    linear layer; its weights)."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(c, 3)) for c in channels]
    head = rng.normal(size=(3, 3 * 64)) / 20

    def f(x, params, training):
        assert not training
        small = torch.nn.functional.adaptive_avg_pool2d(x, size)
        groups = tuple(
            torch.einsum('kc,bchw->bkhw', torch.tensor(w, dtype=x.dtype), v)
            for w, v in zip(weights, (x, small))
        )
        return x.flatten(1) @ torch.tensor(head, dtype=x.dtype).T, groups

    return f, weights, head


def as_seen(images):
    """float64 [B, 3, H, W]: images as nets for small images are given them."""
    x = (images - np.array([125.3, 123.0, 113.9])) / np.array([63.0, 62.1, 66.7])
    return x.transpose(0, 3, 1, 2)


def make_photograph_net(folder, seed, root, classes):
    """The run folder of an untrained ResNet-18 on the photographs in root."""
    folder.mkdir()
    torch.manual_seed(seed)
    weights.save_params(folder / 'model.hkl', resnet.resnet(18, 0.125, len(classes))[1])
    record = {
        'depth': 18,
        'width': 0.125,
        'imagenetpath': str(root),
        'image_size': 64,
        'classes': classes,
    }
    (folder / 'log.txt').write_text(logs.json_stats(record) + '\n')
    return str(folder)
