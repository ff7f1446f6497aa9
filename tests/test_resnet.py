"""resnet.py against independent nets with the same weights.

CIFAR: a torch.nn.Module written from the paper's description. ImageNet: torchvision's models, and
their batch norms folded by hand.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import resnet
import utils
from samples import AffineNet, fold, from_torchvision, torchvision_net
from support import devices
from support.program import UserError

# ------------------------ the independent net


class Block(nn.Module):
    def __init__(self, ni, no, stride):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(ni)
        self.conv0 = nn.Conv2d(ni, no, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(no)
        self.conv1 = nn.Conv2d(no, no, 3, 1, 1, bias=False)
        self.convdim = nn.Conv2d(ni, no, 1, stride, bias=False) if ni != no else None
        self.relu = nn.ReLU()

    def forward(self, x):
        o = self.relu(self.bn0(x))
        z = self.conv1(self.relu(self.bn1(self.conv0(o))))
        return z + (x if self.convdim is None else self.convdim(o))


class WideResNet(nn.Module):
    def __init__(self, depth, width, num_classes):
        super().__init__()
        n = (depth - 4) // 6
        channels = [16, int(16 * width), int(32 * width), int(64 * width)]
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for g in range(3):
            sizes = [(channels[g + (i > 0)], channels[g + 1]) for i in range(n)]
            blocks = [Block(*size, 2 if g and not i else 1) for i, size in enumerate(sizes)]
            setattr(self, f'group{g}', nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels[3])
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x):
        g0 = self.group0(self.conv0(x))
        g1 = self.group1(g0)
        g2 = self.group2(g1)
        return self.fc(self.head(self.bn(g2))), (g0, g1, g2)


CONVOLUTIONS = {'conv0', 'conv1', 'convdim'}


def our_name(name):
    """'group0.0.conv0.weight' of the module -> 'group0.block0.conv0'."""
    parts = name.split('.')
    if parts[0].startswith('group'):
        parts[1] = f'block{parts[1]}'
    if parts[-2] in CONVOLUTIONS:
        parts = parts[:-1]
    return '.'.join(parts)


def module_with(params, depth, width, num_classes, prefix='', dtype=torch.float32):
    """The module with the values of our params."""
    net = WideResNet(depth, width, num_classes).to(dtype)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {prefix + our_name(k) for k in state} == set(params)
    with torch.no_grad():
        for name, value in state.items():
            assert value.shape == params[prefix + our_name(name)].shape, name
            value.copy_(params[prefix + our_name(name)])
    return net


def assert_statistics_equal(params, net, prefix='', **tolerance):
    for name, value in net.named_buffers():
        if not name.endswith('num_batches_tracked'):
            found, about = params[prefix + our_name(name)], lambda m, name=name: f'{name}: {m}'
            torch.testing.assert_close(found, value, msg=about, **tolerance)


NETS = [
    (10, 1, (32, 32)),
    (16, 1, (32, 32)),
    (10, 2, (28, 36)),
    (16, 2, (9, 9)),
    (10, 1.5, (17, 11)),
    (10, 0.5, (20, 8)),
]


# ------------------------ the same function


@pytest.mark.parametrize('prefix', ['', 'student.'])
@pytest.mark.parametrize('depth, width, size', NETS)
def test_wrn_in_training_is_the_module(depth, width, size, prefix):
    torch.manual_seed(0)
    f, params = resnet.wrn(depth, width, 7)
    params = {prefix + k: v for k, v in utils.cast(params, 'double').items()}
    params = {k: v.detach() for k, v in params.items()}
    utils.set_requires_grad_except_bn_(params)
    net = module_with(params, depth, width, 7, prefix, torch.float64).train()
    x, labels = torch.randn(4, 3, *size, dtype=torch.float64, requires_grad=True), torch.arange(4)

    logits, groups = f(x, params, True, prefix)
    expected, expected_groups = net(x)
    torch.testing.assert_close(logits, expected)
    assert isinstance(groups, tuple) and len(groups) == 3
    for g, e in zip(groups, expected_groups):
        torch.testing.assert_close(g, e)

    def loss(y, gs):
        return F.cross_entropy(y, labels) + sum(
            (g * torch.linspace(-1, 1, g.shape[1], dtype=g.dtype).view(-1, 1, 1)).mean() for g in gs
        )

    names = [k for k, v in net.named_parameters()]
    trained = [params[prefix + our_name(k)] for k in names]
    ours = torch.autograd.grad(loss(logits, groups), [x, *trained])
    theirs = torch.autograd.grad(loss(expected, expected_groups), [x, *net.parameters()])
    for name, a, b in zip(['input', *names], ours, theirs):
        assert b.abs().max() > 0, f'{name}: the comparison would say nothing'
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f'{name}: {m}')
    assert_statistics_equal(params, net, prefix)


@pytest.mark.parametrize('depth, width, size', NETS)
def test_wrn_in_testing_is_the_module_and_leaves_statistics_alone(depth, width, size):
    torch.manual_seed(1)
    f, params = resnet.wrn(depth, width, 5)
    with torch.no_grad():
        for name, value in params.items():
            if utils.is_statistic(name):
                value.uniform_(0.5, 2)
            elif name.endswith('bias'):
                value.normal_()
    net = module_with(params, depth, width, 5).eval()
    before = {k: v.clone() for k, v in params.items()}
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        logits, groups = f(x, params, False)
        expected, expected_groups = net(x)
        one = f(x[1:2], params, False)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for g, e in zip(groups, expected_groups):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, logits[1:2], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(params[k], v) for k, v in before.items())


@pytest.mark.parametrize('depth, width', [(10, 1), (16, 2)])
def test_wrn_and_the_module_stay_together_over_steps_of_sgd(depth, width):
    torch.manual_seed(2)
    f, params = resnet.wrn(depth, width, 4)
    params = {f'student.{k}': v.detach().double() for k, v in params.items()}
    utils.set_requires_grad_except_bn_(params)
    net = module_with(params, depth, width, 4, 'student.', torch.float64).train()
    settings = {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 5e-4}
    ours = torch.optim.SGD([v for v in params.values() if v.requires_grad], **settings)
    theirs = torch.optim.SGD(net.parameters(), **settings)
    for _ in range(4):
        x, labels = 3 * torch.randn(6, 3, 12, 12).double() + 1, torch.randint(4, (6,))
        for loss, optimizer in (
            (F.cross_entropy(f(x, params, True, 'student.')[0], labels), ours),
            (F.cross_entropy(net(x)[0], labels), theirs),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_statistics_equal(params, net, 'student.')
    for name, value in net.named_parameters():
        torch.testing.assert_close(params[f'student.{our_name(name)}'].detach(), value.detach())
    assert params['student.bn.running_mean'].abs().max() > 0.01
    x = torch.randn(2, 3, 12, 12).double()
    torch.testing.assert_close(f(x, params, False, 'student.')[0], net.eval()(x)[0])


def test_two_nets_in_one_dict_do_not_touch_each_other():
    torch.manual_seed(3)
    f_s, student = resnet.wrn(10, 1, 3)
    f_t, teacher = resnet.wrn(16, 2, 3)
    params = utils.flatten({'student': student, 'teacher': teacher})
    x = torch.randn(2, 3, 8, 8)
    alone = f_t(x, teacher, False)[0]
    statistics = {k: v.clone() for k, v in params.items() if utils.is_statistic(k)}
    f_s(x, params, True, 'student.')
    torch.testing.assert_close(f_t(x, params, False, 'teacher.')[0], alone, rtol=0, atol=0)
    changed = {k for k, v in statistics.items() if not torch.equal(params[k], v)}
    assert changed == {k for k in statistics if k.startswith('student.')}


# ------------------------ parameters


@pytest.mark.parametrize(
    'depth, width, table, exact',
    [
        (16, 1, '0.2M', 175_066),
        (16, 2, '0.7M', 691_674),
        (40, 1, '0.6M', 563_930),
        (40, 2, '2.2M', 2_243_546),
    ],
)
def test_parameter_counts_are_those_of_table_1(depth, width, table, exact):
    _, params = resnet.wrn(depth, width, 10)
    count = sum(v.numel() for v in params.values() if v.requires_grad)
    assert count == sum(p.numel() for p in WideResNet(depth, width, 10).parameters()) == exact
    assert f'{count / 1e6:.1f}M' == table


def test_parameter_names_are_those_of_the_published_weights():
    _, params = resnet.wrn(16, 2, 10)

    def bn(name):
        return [f'{name}.{part}' for part in ('weight', 'bias', 'running_mean', 'running_var')]

    expected = ['conv0']
    for g in range(3):
        for i in range(2):
            base = f'group{g}.block{i}'
            expected += [*bn(f'{base}.bn0'), f'{base}.conv0', *bn(f'{base}.bn1'), f'{base}.conv1']
            expected += [f'{base}.convdim'] if i == 0 else []
    expected += [*bn('bn'), 'fc.weight', 'fc.bias']
    assert list(params) == expected


def test_width_1_has_no_convdim_in_the_first_group():
    _, params = resnet.wrn(10, 1, 10)
    assert 'group0.block0.convdim' not in params
    assert {'group1.block0.convdim', 'group2.block0.convdim'} <= set(params)


def test_everything_but_statistics_is_trained():
    _, params = resnet.wrn(10, 1, 10)
    for name, value in params.items():
        assert value.requires_grad == (not name.endswith(('running_mean', 'running_var'))), name
        assert value.is_leaf and value.dtype == torch.float32


def test_initial_values_are_kaiming_normal_by_fan_in_and_batch_norm_is_uniform():
    torch.manual_seed(4)
    _, params = resnet.wrn(22, 4, 100)
    scales = []
    for name, value in params.items():
        v = value.detach()
        if v.dim() > 1:
            z = v / math.sqrt(2 / v[0].numel())
            n = v.numel()
            assert abs(z.mean()) < 4.5 / math.sqrt(n), name
            assert abs(z.std() - 1) < 4.5 / math.sqrt(2 * n), name
            if n > 10_000:  # normal, not uniform: its tails and its middle
                assert abs((z.abs() > 2).double().mean() - 0.0455) < 0.01, name
                assert abs((z.abs() < 0.5).double().mean() - 0.3829) < 0.02, name
        elif name.endswith('running_var'):
            assert torch.equal(v, torch.ones_like(v)), name
        elif name.endswith('weight'):
            scales.append(v)
        else:
            assert torch.equal(v, torch.zeros_like(v)), name
    scales = torch.cat(scales)
    assert 0 <= scales.min() and scales.max() < 1
    assert (scales.histc(10, 0, 1) / len(scales) - 0.1).abs().max() < 0.03


def test_initial_values_follow_torchs_generator():
    nets = []
    for seed in 5, 5, 6:
        torch.manual_seed(seed)
        nets.append(resnet.wrn(10, 1, 10)[1])
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert not torch.equal(nets[0]['conv0'], nets[2]['conv0'])


@pytest.mark.parametrize('depth', [-2, 0, 4, 9, 11, 15, 17, 18, 16.5, 39])
def test_depth_other_than_6n_plus_4_is_refused(depth):
    with pytest.raises(UserError, match=f'depth {depth}'):
        resnet.wrn(depth, 1, 10)


@pytest.mark.parametrize('width', [0, -1, 0.01, math.nan, math.inf, 1e9])
def test_width_without_channels_is_refused(width):
    with pytest.raises(UserError, match='width'):
        resnet.wrn(16, width, 10)


@pytest.mark.parametrize('num_classes', [0, -3])
def test_no_classes_are_refused(num_classes):
    with pytest.raises(UserError, match='num_classes'):
        resnet.wrn(16, 1, num_classes)


@pytest.mark.parametrize('depth', [math.nan, math.inf])
def test_depth_that_is_no_number_is_refused(depth):
    # The log of a damaged teacher may hold NaN.
    with pytest.raises(UserError, match='depth'):
        resnet.wrn(depth, 1, 10)


@pytest.mark.parametrize(
    'make, depth, channels',
    [(resnet.wrn, 10, [4, 9, 19]), (resnet.resnet, 18, [19, 38, 76, 153])],
)
def test_a_fraction_of_a_channel_is_left_out(make, depth, channels):
    """0.3 times 16, 32 and 64 are 4.8, 9.6 and 19.2."""
    with torch.device('meta'):
        f, params = make(depth, 0.3, 4)
    assert resnet.group_channels(f, params) == channels
    assert resnet.same_shape(params, depth, 0.3) and not resnet.same_shape(params, depth, 0.32)


# ------------------------ dtypes


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    torch.manual_seed(7)
    f, params = resnet.wrn(16, 1, 10)
    reference = {k: v.detach().clone() for k, v in params.items()}
    utils.set_requires_grad_except_bn_(reference)
    x = torch.randn(16, 3, 16, 16)
    logits, groups = f(x.bfloat16(), params, True)
    expected, expected_groups = f(x, reference, True)
    assert logits.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in groups)
    assert all(v.dtype == torch.float32 for v in params.values())
    assert (logits - expected).norm() < 0.05 * expected.norm()
    for g, e in zip(groups, expected_groups):
        assert (g.float() - e).norm() < 0.03 * e.norm()
    logits.square().mean().backward()
    expected.square().mean().backward()
    gradients = []
    for name, value in params.items():
        if utils.is_statistic(name):
            torch.testing.assert_close(value, reference[name], rtol=0.03, atol=0.01)
        else:
            assert value.grad.dtype == torch.float32, name
            g, e = value.grad.flatten(), reference[name].grad.flatten()
            assert F.cosine_similarity(g, e, 0) > 0.9, name
            gradients.append((g, e))
    g, e = map(torch.cat, zip(*gradients))
    assert F.cosine_similarity(g, e, 0) > 0.99


def test_bfloat16_statistics_average_in_float32():
    # Rounding to bfloat16 in each step would lose the small changes of a running average.
    f, params = resnet.wrn(10, 1, 2)
    x = torch.randn(2, 3, 8, 8).bfloat16()
    for _ in range(3):
        f(x, params, True)
    value = params['bn.running_mean']
    assert not torch.equal(value, value.bfloat16().float())


def test_float64_input_and_parameters_give_float64():
    f, params = resnet.wrn(10, 1, 3)
    params = utils.cast(params, 'double')
    logits, groups = f(torch.randn(2, 3, 8, 8, dtype=torch.float64), params, False)
    assert logits.dtype == torch.float64 and all(g.dtype == torch.float64 for g in groups)


def test_memory_layout_does_not_change_the_function():
    f, params = resnet.wrn(10, 2, 3)
    last = devices.to_device(params, torch.device('cpu'))
    x = torch.randn(2, 3, 12, 10)
    a, groups = f(x, params, False)
    b, groups_last = f(x.contiguous(memory_format=torch.channels_last), last, False)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for g, e in zip(groups, groups_last):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


# ------------------------ topology from names


@pytest.mark.parametrize(
    'depth, width, num_classes',
    [(10, 1, 10), (16, 2, 100), (28, 0.5, 3), (40, 1.5, 2), (10, 0.3, 5)],
)
def test_the_net_is_read_from_its_parameters_names(depth, width, num_classes):
    f, params = resnet.wrn(depth, width, num_classes)
    found = resnet.net_shape(params)
    assert found[0] == depth and found[2] == num_classes
    _, again = resnet.wrn(*found)
    # The width found is int(64 width) / 64, so that the last group has the same channels.
    assert list(again) == list(params)
    if (16 * width) == int(16 * width):
        assert found[1] == width
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in params.items()}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(resnet.from_params(params)(x, params, False)[0], f(x, params, False)[0])


def test_names_of_another_net_are_reported():
    params = {k: torch.zeros(1) for k in ('layer1.0.conv1.weight', 'conv1.weight')}
    with pytest.raises(UserError, match='layer1.0.conv1.weight'):
        resnet.from_params(params)
    with pytest.raises(UserError):
        resnet.net_shape({})


def test_unknown_names_beside_a_whole_wrn_are_reported():
    _, params = resnet.wrn(10, 1, 3)
    with pytest.raises(UserError, match='group0.block0.se'):
        resnet.from_params(params | {'group0.block0.se': torch.zeros(3)})


@pytest.mark.parametrize('name', ['group2.block0.conv0', 'fc.bias'])
def test_a_tensor_without_dimensions_is_no_crash(name):
    _, params = resnet.wrn(10, 1, 3)
    with pytest.raises(UserError):
        resnet.net_shape(params | {name: torch.tensor(1.0)})


# ------------------------ ImageNet: ResNet


def their_groups(net, x):
    groups = []
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    for layer in net.layer1, net.layer2, net.layer3, net.layer4:
        x = layer(x)
        groups.append(x)
    return net.fc(x.mean((2, 3))), groups


@pytest.mark.parametrize(
    'depth, width, prefix', [(18, 1, ''), (34, 1, 'student.'), (50, 1, ''), (50, 2, 'student.')]
)
def test_resnet_is_torchvisions(depth, width, prefix):
    net, params = torchvision_net(depth, width)
    net.double()
    with torch.device('meta'):
        f, ours = resnet.resnet(depth, width, 7)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in params.items()}
    params = {prefix + k: v.double() for k, v in params.items()}
    utils.set_requires_grad_except_bn_(params)
    x = torch.randn(2, 3, 40, 33, dtype=torch.double)
    for training in True, False:
        logits, groups = f(x, params, training, prefix)
        expected, expected_groups = their_groups(net.train(training), x)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-8)
        assert len(groups) == 4
        for g, e in zip(groups, expected_groups):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-8)
        weights = [torch.randn_like(v) for v in (logits, *groups)]
        for outputs in (logits, *groups), (expected, *expected_groups):
            sum((o * w).sum() for o, w in zip(outputs, weights)).backward()
        state = net.state_dict(keep_vars=True)
        names = from_torchvision({k: k for k in state})
        for ours, theirs in names.items():
            p, q = params[prefix + ours], state[theirs]
            if q.requires_grad:
                assert torch.equal(p, q), f'{ours}: a step without an optimizer changes nothing'
                assert (p.grad - q.grad).abs().max() <= 1e-6 * q.grad.abs().max(), ours
                p.grad = q.grad = None
            else:  # running statistics
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
                assert not p.requires_grad


def test_initial_values_are_kaiming_normal_and_batch_norm_starts_at_1():
    _, params = resnet.resnet(50, 1, 1000)
    for name, v in params.items():
        if 'bn' in name:
            expected = 1.0 if name.endswith(('weight', 'running_var')) else 0.0
            assert (v == expected).all(), name
        elif v.dim() > 1:
            fan_in = v[0].numel()
            assert float(v.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name


@pytest.mark.parametrize(
    'depth, width, published',
    [(18, 1, 11.69e6), (34, 1, 21.80e6), (50, 1, 25.56e6), (152, 1, 60.19e6), (50, 2, 68.88e6)],
)
def test_parameter_counts_are_the_published_ones(depth, width, published):
    with torch.device('meta'):
        _, params = resnet.resnet(depth, width, 1000)
    count = sum(v.numel() for k, v in params.items() if not utils.is_statistic(k))
    assert count == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize('depth, width', [(20, 1), (18, 0), (18, 100), (3, 1)])
def test_no_such_resnet(depth, width):
    with pytest.raises(UserError, match='depth|width'):
        resnet.resnet(depth, width, 10)


@pytest.mark.parametrize('depth, width', [(18, 0.5), (34, 1), (50, 0.25), (101, 1), (152, 0.25)])
def test_a_resnet_is_read_from_its_names(depth, width):
    f, params = resnet.resnet(depth, width, 5)
    assert resnet.net_shape(params) == (depth, width, 5)
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(resnet.from_params(params)(x, params, False)[0], f(x, params, False)[0])


# ------------------------ the releases


@pytest.mark.parametrize('depth, width', [(18, 1), (34, 1), (50, 2)])
def test_folded_is_the_resnet_in_testing(depth, width):
    net, params = torchvision_net(depth, width)
    net.eval()
    folded = fold(params)
    f = resnet.folded_resnet(folded)
    x = torch.randn(2, 3, 64, 64)
    expected, expected_groups = their_groups(net, x)
    for prefix in '', 'teacher.':
        named = {prefix + k: v for k, v in folded.items()}
        for training in True, False:
            logits, groups = f(x, named, training, prefix)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            for g, e in zip(groups, expected_groups):
                torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3)
    assert resnet.net_shape(folded) == (depth, width, 7)
    assert torch.equal(resnet.from_params(folded)(x, folded, False)[0], logits)


def test_folded_teacher_keeps_shortcut_bias():
    """The published code dropped it, which made its teacher worse than the release."""
    _, params = torchvision_net(18)
    folded = fold(params)
    f = resnet.folded_resnet(folded)
    x = torch.randn(1, 3, 64, 64)
    logits = f(x, folded, False)[0]
    for name in [k for k in folded if k.endswith('conv_dim.bias')]:
        changed = folded | {name: folded[name] + 1}
        assert not torch.allclose(f(x, changed, False)[0], logits, atol=1e-3), name


@pytest.mark.parametrize('prefix', ['', 'teacher.'])
def test_affine_is_the_description_of_resnet_18_at(prefix):
    torch.manual_seed(0)
    net, x = AffineNet(), torch.randn(2, 3, 64, 48)
    params = {prefix + k: v for k, v in net.p.items()}
    f = resnet.affine_resnet(net.p)
    logits, groups = f(x, params, True, prefix)
    expected, expected_groups = net(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    for g, e in zip(groups, expected_groups):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
    assert resnet.net_shape(net.p) == (18, 1, 7)
    assert resnet.layout(net.p) == 'affine'
    # The convolutions may have the names of the folded layout.
    weighted = {
        f'{k}.weight' if k.rsplit('.', 1)[-1].startswith('conv') else k: v for k, v in net.p.items()
    }
    assert torch.equal(resnet.from_params(weighted)(x, weighted, False)[0], logits)


def test_affine_keeps_bfloat16_from_layer_to_layer():
    net = AffineNet((64, 64, 16, 24, 32))
    x = torch.randn(1, 3, 32, 32)
    logits, groups = resnet.affine_resnet(net.p)(x.bfloat16(), net.p, False)
    assert all(g.dtype == torch.bfloat16 for g in groups)
    expected = net(x)[0]
    assert (logits - expected).norm() < 0.05 * expected.norm()


# ------------------------ strided 1x1 convolutions: a fault of oneDNN


def is_faulty(weight, stride):
    """Whether oneDNN writes past its memory for the weight gradient of this convolution, on some
    CPU."""
    return weight.shape[2:] == (1, 1) and max(stride) > 1 and weight.shape[1] < 16


class BackwardCalls(TorchDispatchMode):
    """Records (weight, stride) of each call of convolution_backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.calls.append((args[2], args[4]))
        return function(*args, **(kwargs or {}))


def made(make, *arguments):
    """(f, params) as training has them: placed by to_device, and read from their names."""
    torch.manual_seed(0)
    params = devices.to_device(make(*arguments), 'cpu')
    for name, value in params.items():
        value.requires_grad_(not utils.is_statistic(name))
    return resnet.from_params(params), params


def wrn_params(*arguments):
    return resnet.wrn(*arguments, 3)[1]


def resnet_params(*arguments):
    return resnet.resnet(*arguments, 3)[1]


def folded_params(*arguments):
    return fold(resnet_params(*arguments))


def affine_params(*widths):
    return AffineNet((64, 64, *widths), 3).p


NARROW = [
    *[(wrn_params, 10, width) for width in (1 / 16, 0.25, 0.5, 0.75, 0.95, 1, 2)],
    *[(resnet_params, 18, width) for width in (1 / 64, 1 / 16, 0.125, 0.2, 0.25)],
    (resnet_params, 50, 1 / 64),
    *[(folded_params, 18, width) for width in (1 / 64, 0.2)],
    (affine_params, 4, 15, 20),
    (affine_params, 12, 16, 7),
]


@pytest.mark.parametrize('twice', [False, True])
@pytest.mark.parametrize('make, arguments', [(make, arguments) for make, *arguments in NARROW])
def test_no_net_makes_the_faulty_call(make, arguments, twice):
    f, params = made(make, *arguments)
    x, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    x = x.contiguous(memory_format=torch.channels_last)
    with BackwardCalls() as recorded:
        *_, J = utils.input_gradient(lambda x: f(x, params, True), x, targets, create_graph=twice)
        loss = utils.min_l2_loss(J) if twice else f(x, params, True)[0].sum()
        loss.backward()
    assert recorded.calls and not any(is_faulty(*call) for call in recorded.calls)


def test_a_shortcut_of_16_channels_keeps_its_strided_convolution():
    f, params = made(wrn_params, 10, 1)
    with BackwardCalls() as recorded:
        f(torch.randn(2, 3, 32, 32), params, True)[0].sum().backward()
    strided = [w.shape[1] for w, stride in recorded.calls if w.shape[2] == 1 and max(stride) > 1]
    assert strided == [32, 16]


@pytest.mark.parametrize('make, arguments', [(wrn_params, (10, 0.75)), (resnet_params, (18, 0.2))])
def test_no_compiled_net_makes_the_faulty_call(make, arguments):
    f, params = made(make, *arguments)
    calls = []

    def record(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                calls.append((node.args[2].meta['val'], node.args[4]))
        return make_boxed_func(graph)

    def loss(x):
        return f(x, params, True)[0].sum()

    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=record), dynamic=False)
    compiled(torch.randn(2, 3, 32, 32)).backward()
    assert len(calls) > 8 and not any(is_faulty(*call) for call in calls)


# ------------------------ small images


@pytest.mark.parametrize('size', [(1, 1), (4, 4), (1, 9), (2, 800)])
def test_images_of_any_size_train(size):
    f, params = made(wrn_params, 10, 0.5)
    logits, groups = f(torch.randn(2, 3, *size), params, True)
    logits.sum().backward()
    for g, group in enumerate(groups):
        assert group.shape[2:] == tuple(math.ceil(n / 2**g) for n in size)


def test_the_smallest_photograph_of_a_batch_of_one_trains():
    """imagenet.py takes --image_size 33 and more: batch norm needs two values a channel."""
    f, params = made(resnet_params, 18, 0.125)
    logits, groups = f(torch.randn(1, 3, 33, 33), params, True)
    logits.sum().backward()
    assert groups[-1].shape[2:] == (2, 2)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        f(torch.randn(1, 3, 32, 32), params, True)
