"""nin.py against torch.nn modules with the same weights."""

import math

import pytest
import torch
from torch import nn

import nin
import resnet
import utils
from support import weights
from support.program import UserError

VARIANTS = {'table 1': (True, True), 'teacher of table 3': (True, False), 'student': (False, False)}


class Nin(nn.Module):
    """Written from the paper's description, in the order conv, batch norm, ReLU."""

    def __init__(self, width, num_classes, bn, pool_relu):
        super().__init__()
        self.groups = nn.ModuleList()
        for g in range(3):
            layers = []
            for i in range(3):
                plain = not bn or (i == 2 and not pool_relu)
                ni, k = (3 if g == 0 and i == 0 else width), (3 if i == 0 else 1)
                layers.append(nn.Conv2d(ni, width, k, padding=k // 2, bias=plain))
                layers += [] if plain else [nn.BatchNorm2d(width)]
                layers += [nn.ReLU()] if i < 2 or pool_relu else []
            self.groups.append(nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        outputs = []
        for g, group in enumerate(self.groups):
            x = group(self.pool(x) if g else x)
            outputs.append(x)
        return self.fc(x.mean((2, 3))), tuple(outputs)


def module_with(params, width, num_classes, variant):
    """The module with these weights: the layers of both are in the same order."""
    net = Nin(width, num_classes, *variant)
    ours = [v for k, v in params.items()]
    theirs = [v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')]
    assert [v.shape for v in ours] == [v.shape for v in theirs]
    for a, b in zip(theirs, ours):
        a.copy_(b.detach())
    return net


@pytest.mark.parametrize('variant', VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize('training', [True, False])
def test_nin_is_the_module(variant, training):
    torch.manual_seed(0)
    f, params = nin.nin(8, 5, *variant)
    net = module_with(params, 8, 5, variant).train(training)
    x = torch.randn(4, 3, 20, 24)
    prefixed = {f'student.{k}': v for k, v in params.items()}
    logits, groups = f(x, prefixed, training, 'student.')
    expected, expected_groups = net(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert [g.shape for g in groups] == [(4, 8, 20, 24), (4, 8, 10, 12), (4, 8, 5, 6)]
    for a, b in zip(groups, expected_groups):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (logits.square().sum() + sum(g.sum() for g in groups)).backward()
    (expected.square().sum() + sum(g.sum() for g in expected_groups)).backward()
    trained = [v for v in params.values() if v.requires_grad]
    for a, b in zip(trained, net.parameters()):
        assert b.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))
    statistics = [v for k, v in params.items() if utils.is_statistic(k)]
    buffers = [v for k, v in net.named_buffers() if not k.endswith('num_batches_tracked')]
    assert len(statistics) == len(buffers)
    for a, b in zip(statistics, buffers):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('width, millions', [(96, 0.226), (192, 0.895)])
def test_parameters_are_as_many_as_table_1_says(width, millions):
    _, params = nin.nin(width, 10)
    n = sum(v.numel() for v in params.values() if v.requires_grad)
    assert round(n / 1e6, 3) == millions
    # In each group a 3x3 and two 1x1, two numbers a channel of batch norm, the linear layer.
    convolutions = 27 * width + 2 * 9 * width**2 + 6 * width**2
    assert n == convolutions + 9 * 2 * width + 10 * width + 10


@pytest.mark.parametrize('variant', VARIANTS.values(), ids=VARIANTS)
def test_names_tell_the_variant(variant, tmp_path):
    torch.manual_seed(0)
    f, params = nin.nin(6, 4, *variant)
    assert nin.variant(params) == variant and resnet.layout(params) == 'nin'
    weights.save_params(tmp_path / 'w.hkl', params)
    g, loaded, _ = weights.load_net(tmp_path / 'w.hkl')
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(f(x, params, False)[0], g(x, loaded, False)[0])
    assert resnet.net_shape(loaded) == (10, 6, 4)
    assert resnet.same_shape(loaded, 10, 6.0) and not resnet.same_shape(loaded, 10, 7.0)


def test_activations_before_pooling_may_be_negative_without_relu():
    torch.manual_seed(0)
    for variant in VARIANTS.values():
        f, params = nin.nin(8, 5, *variant)
        groups = f(torch.randn(2, 3, 16, 16), params, True)[1]
        assert all((g < 0).any() == (not variant[1]) for g in groups)


def test_a_damaged_nin_is_refused_by_name(tmp_path):
    _, params = nin.nin(6, 4)
    for change, message in (
        (lambda p: p.pop('group1.conv2'), 'group1.conv2'),
        (lambda p: p.update({'group3.conv0': torch.zeros(6, 6, 3, 3)}), 'group3.conv0'),
        (lambda p: p.update({'group2.conv0': torch.zeros(5, 6, 3, 3)}), 'group2.conv0'),
        (lambda p: p.update({'group0.conv0': torch.zeros(6)}), 'group0.conv0'),
    ):
        broken = dict(params)
        change(broken)
        with pytest.raises(UserError, match=message):
            weights.check_net(broken, 'w.hkl')


@pytest.mark.parametrize('width', [0.5, 1.5, 0, 5000])
def test_widths_that_are_no_number_of_channels_are_refused(width):
    with pytest.raises(UserError, match='width'):
        nin.nin(width, 10)


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (4, 4), (1, 9), (2, 800)])
def test_pooling_leaves_no_map_empty(size):
    f, params = nin.nin(4, 3)
    logits, groups = f(torch.randn(2, 3, *size), params, True)
    logits.sum().backward()
    for g, group in enumerate(groups):
        assert group.shape[2:] == tuple(math.ceil(n / 2**g) for n in size)
