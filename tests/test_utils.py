"""utils.py: losses against their formulas in float64, weights files written by other programs,
files that lie."""

import argparse
import json
import math
import os
import pickle
import platform
import re
import types
from pathlib import Path

import h5py
import hickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import resnet
import utils
from utils import UserError

# ------------------------ the formulas, in float64 numpy


def map_of(x, p):
    """Mean over channels of |x|^p of [B, C, H, W]."""
    return (np.abs(x.astype(np.float64)) ** p).mean(1)


def normalized(q):
    q = q.reshape(len(q), -1)
    return q / np.sqrt((q**2).sum(1, keepdims=True))


def pooled(q, h, w):
    """Means over the windows [floor(i H / h), ceil((i + 1) H / h)) of [B, H, W]."""
    H, W = q.shape[1:]
    rows = [slice(i * H // h, -(-(i + 1) * H // h)) for i in range(h)]
    columns = [slice(j * W // w, -(-(j + 1) * W // w)) for j in range(w)]
    return np.stack([np.stack([q[:, r, c].mean((1, 2)) for c in columns], 1) for r in rows], 1)


def loss_of(x, y, p):
    x, y = map_of(x, p), map_of(y, p)
    h, w = min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2])
    return ((normalized(pooled(x, h, w)) - normalized(pooled(y, h, w))) ** 2).mean()


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def randn(*size, seed=0, dtype=torch.float32):
    return torch.randn(
        *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# ------------------------ attention


@pytest.mark.parametrize('p', [1, 2, 3, 4])
@pytest.mark.parametrize('size', [(3, 5, 4, 6), (1, 1, 1, 1), (2, 16, 8, 8), (4, 7, 1, 9)])
def test_at_is_the_normalised_mean_over_channels(size, p):
    x = randn(*size)
    q = utils.at(x, p)
    assert q.shape == (size[0], size[2] * size[3]) and q.dtype == torch.float32
    np.testing.assert_allclose(q.numpy(), normalized(map_of(x.numpy(), p)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(size[0]))


def test_at_squares_by_default():
    x = randn(2, 3, 4, 4)
    assert torch.equal(utils.at(x), utils.at(x, 2))
    assert not torch.allclose(utils.at(x), utils.at(x, 1), atol=1e-3)


@pytest.mark.parametrize('p', [1, 2, 4])
@pytest.mark.parametrize(
    'a, b',
    [
        ((2, 3, 4, 4), (2, 3, 4, 4)),
        ((3, 4, 6, 5), (3, 9, 6, 5)),
        ((2, 3, 8, 8), (2, 5, 4, 4)),
        ((2, 3, 7, 5), (2, 2, 3, 4)),
        ((2, 3, 4, 9), (2, 3, 8, 3)),
        ((1, 2, 1, 6), (1, 2, 5, 1)),
    ],
)
def test_at_loss_is_its_formula(a, b, p):
    x, y = randn(*a, seed=1), randn(*b, seed=2) ** 2
    expected = loss_of(x.numpy(), y.numpy(), p)
    loss = utils.at_loss(x, y, p)
    assert loss.shape == () and loss.dtype == torch.float32
    assert math.isclose(loss, expected, rel_tol=1e-4, abs_tol=1e-12)
    assert math.isclose(utils.at_loss(y, x, p), expected, rel_tol=1e-4, abs_tol=1e-12)
    assert utils.at_loss(x.double(), y.double(), p).dtype == torch.float64
    assert math.isclose(
        utils.at_loss(x.double(), y.double(), p), expected, rel_tol=1e-10, abs_tol=1e-24
    )


def test_at_loss_pools_the_means_before_it_normalises():
    x, y = randn(2, 3, 4, 4, seed=1).abs() ** 3, randn(2, 3, 2, 2, seed=2)
    normalised_first = pooled(normalized(map_of(x.numpy(), 2)).reshape(2, 4, 4), 2, 2).reshape(
        2, -1
    )
    wrong = ((normalised_first - normalized(map_of(y.numpy(), 2))) ** 2).mean()
    channels_first = loss_of(F.avg_pool2d(x, 2).numpy(), y.numpy(), 2)
    value = float(utils.at_loss(x, y))
    assert math.isclose(value, loss_of(x.numpy(), y.numpy(), 2), rel_tol=1e-4)
    assert abs(value - wrong) > 0.01 * value and abs(value - channels_first) > 0.01 * value


def test_beta_times_at_loss_is_the_published_sum_over_map_and_batch():
    x, y = randn(5, 3, 4, 7, seed=1), randn(5, 6, 4, 7, seed=2)
    difference = normalized(map_of(x.numpy(), 2)) - normalized(map_of(y.numpy(), 2))
    beta = (
        1e3 / (4 * 7) / 5
    )  # "10^3 divided by the number of elements in attention map and batch size"
    assert math.isclose(1e3 * utils.at_loss(x, y), beta * (difference**2).sum(), rel_tol=1e-4)


@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1, 1e3, 1e6])
@pytest.mark.parametrize('p', [1, 2, 4, 64])
def test_at_loss_ignores_scale(scale, p):
    x, y = randn(3, 4, 5, 5, seed=1), randn(3, 4, 5, 5, seed=2)
    torch.testing.assert_close(
        utils.at_loss(scale * x, y, p), utils.at_loss(x, y, p), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        utils.at_loss(x, scale * y, p), utils.at_loss(x, y, p), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        utils.at_loss(scale * x, x, p), torch.tensor(0.0), rtol=0, atol=1e-11
    )


def test_at_loss_ignores_the_scale_of_each_sample():
    x, y = randn(3, 4, 5, 5, seed=1), randn(3, 4, 5, 5, seed=2)
    scales = torch.tensor([1e-5, 1.0, 1e5]).view(3, 1, 1, 1)
    torch.testing.assert_close(utils.at_loss(scales * x, y), utils.at_loss(x, y), rtol=1e-4, atol=0)


def test_the_gradient_at_another_scale_is_inversely_scaled():
    x, y = randn(3, 4, 5, 5, seed=1), randn(3, 4, 5, 5, seed=2)
    gradients = []
    for scale in 1, 1e-5, 1e5:
        z = (scale * x).requires_grad_()
        gradients.append(scale * torch.autograd.grad(utils.at_loss(z, y), z)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize('p', [1, 2, 4])
def test_at_loss_is_zero_at_equality_with_zero_gradient(p):
    x = randn(3, 4, 5, 5).requires_grad_()
    loss = utils.at_loss(x, x.detach().clone(), p)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0


@pytest.mark.parametrize('p', [1, 2, 3, 4])
@pytest.mark.parametrize('b', [(2, 4, 3, 3), (2, 3, 2, 5)])
def test_at_loss_has_the_right_first_and_second_derivatives(b, p):
    x = randn(2, 3, 3, 3, seed=1, dtype=torch.float64).requires_grad_()
    y = randn(*b, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: utils.at_loss(x, y, p), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: utils.at_loss(x, y, p), (x, y))
    assert torch.autograd.gradcheck(lambda x: utils.at(x, p), x)
    assert torch.autograd.gradgradcheck(lambda x: utils.at(x, p), x)


@pytest.mark.parametrize('p', [2, 4])
def test_second_derivatives_are_right_where_activations_are_exactly_zero(p):
    # |x|^p is smooth at 0 for an even p; behind a ReLU half of all activations are there.
    x = randn(2, 3, 3, 3, seed=1, dtype=torch.float64)
    x = (x * (x > -0.3)).requires_grad_()
    y = randn(2, 3, 3, 3, seed=2, dtype=torch.float64)
    assert (x == 0).sum() > 5
    assert torch.autograd.gradcheck(lambda x: utils.at_loss(x, y, p), x)
    assert torch.autograd.gradgradcheck(lambda x: utils.at_loss(x, y, p), x)


def test_a_power_below_1_has_a_gradient_where_activations_are_exactly_zero():
    x = torch.tensor([0.0, 1.0, 4.0, 9.0]).view(1, 1, 2, 2).requires_grad_()
    q = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(utils.at(x, 0.5)[0], q / q.norm())
    (gradient,) = torch.autograd.grad(utils.at_loss(x, torch.ones(1, 1, 2, 2), 0.5), x)
    assert gradient.isfinite().all() and gradient[0, 0, 0, 0] == 0 and gradient.abs().max() > 0
    assert torch.equal(utils.at(torch.zeros(1, 2, 2, 2), 0.5), torch.zeros(1, 4))


def zeros_and_one_zero_sample():
    one = randn(3, 4, 5, 5, seed=3)
    one[1] = 0
    tiny = randn(3, 4, 5, 5, seed=3)
    tiny[0] *= 1e-10
    single = torch.zeros(3, 4, 5, 5)
    single[:, 0, 2, 2] = 5
    return {
        'all zero': torch.zeros(3, 4, 5, 5),
        'one zero sample': one,
        'a tiny sample': tiny,
        'single': single,
    }


@pytest.mark.parametrize('p', [1, 2, 4])
@pytest.mark.parametrize('case', zeros_and_one_zero_sample())
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_map_of_zeros_has_finite_value_and_derivatives(case, p, dtype):
    x = zeros_and_one_zero_sample()[case].to(dtype).requires_grad_()
    y = randn(3, 4, 5, 5, seed=4).to(dtype).requires_grad_()
    loss = utils.at_loss(x, y, p)
    gradients = torch.autograd.grad(loss, (x, y), create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in gradients), (x, y))
    assert all(t.isfinite().all() for t in (loss, *gradients, *second))
    assert loss > 0
    if case == 'one zero sample':
        assert not utils.at(x, p)[1].any() and not gradients[0][1].any()
        assert gradients[0][0].any() and gradients[0][2].any()


@pytest.mark.parametrize('p', [1, 2, 4])
def test_bfloat16_maps_are_exact_to_float32(p):
    x, y = randn(4, 64, 8, 8, seed=1).bfloat16(), randn(4, 32, 8, 8, seed=2).bfloat16()
    assert utils.at(x, p).dtype == utils.at_loss(x, y, p).dtype == torch.float32
    expected = normalized(map_of(x.double().numpy(), p))
    np.testing.assert_allclose(utils.at(x, p).numpy(), expected, rtol=1e-5)
    assert math.isclose(
        utils.at_loss(x, y, p), loss_of(x.double().numpy(), y.double().numpy(), p), rel_tol=1e-4
    )


def test_bfloat16_gradients_are_rounded_once():
    x, y = randn(4, 8, 4, 4, seed=1).bfloat16(), randn(4, 8, 4, 4, seed=2).bfloat16()
    gradients = []
    for dtype in torch.bfloat16, torch.float64:
        z = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(utils.at_loss(z, y.to(dtype)), z)[0].double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-8, atol=1e-9)


def test_student_and_teacher_maps_may_differ_in_dtype():
    x, y = randn(2, 3, 4, 4, seed=1).bfloat16(), randn(2, 3, 4, 4, seed=2)
    assert math.isclose(
        utils.at_loss(x, y), loss_of(x.double().numpy(), y.numpy(), 2), rel_tol=1e-4
    )


@pytest.mark.parametrize('p', [1, 2, 4])
@pytest.mark.parametrize('b', [(2, 3, 4, 6), (2, 5, 2, 3)])
def test_maps_of_the_largest_channel_are_their_formula(b, p):
    x, y = randn(2, 4, 4, 6, seed=1), randn(*b, seed=2)
    peaks = [(np.abs(v.numpy().astype(np.float64)) ** p).max(1) for v in (x, y)]
    np.testing.assert_allclose(utils.at(x, p, 'max').numpy(), normalized(peaks[0]), rtol=1e-5)
    a, b = (normalized(pooled(q, b[2], b[3])) for q in peaks)
    assert math.isclose(utils.at_loss(x, y, p, 'max'), ((a - b) ** 2).mean(), rel_tol=1e-4)
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: utils.at_loss(x, y, p, 'max'), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: utils.at_loss(x, y, p, 'max'), (x, y))


# ------------------------ full activations


@pytest.mark.parametrize('b', [(2, 3, 4, 6), (2, 5, 4, 6), (2, 5, 2, 3), (2, 3, 8, 3)])
def test_factt_loss_is_its_formula(b):
    x, y, w = randn(2, 3, 4, 6, seed=1), randn(*b, seed=2), randn(b[1], 3, 1, 1, seed=3)
    weight = w if b[1] != 3 else None
    z = x.double().numpy()
    if weight is not None:
        z = np.einsum('oi,bihw->bohw', w.double().numpy()[:, :, 0, 0], z)
    h, width = min(4, b[2]), min(6, b[3])
    rows = [
        normalized(pooled(v.reshape(-1, *v.shape[2:]), h, width).reshape(2, -1))
        for v in (z, y.double().numpy())
    ]
    # The squared distance of two unit vectors, over the positions of a map.
    expected = np.mean(((rows[0] - rows[1]) ** 2).sum(1)) / (h * width)
    assert math.isclose(utils.factt_loss(x, y, weight), expected, rel_tol=1e-4)
    wide = [v if v is None else v.double().requires_grad_() for v in (x, y, weight)]
    wide = [v for v in wide if v is not None]
    assert math.isclose(utils.factt_loss(*wide).item(), expected, rel_tol=1e-10)
    assert torch.autograd.gradcheck(utils.factt_loss, wide)
    assert torch.autograd.gradgradcheck(utils.factt_loss, wide)


def test_factt_loss_sees_what_maps_do_not():
    x = randn(3, 4, 5, 5)
    assert utils.factt_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-12)
    assert utils.at_loss(x, -x).item() == 0
    assert utils.factt_loss(x, -x).item() == pytest.approx(4 / 25)
    assert utils.factt_loss(x.bfloat16(), -x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('loss', [utils.at_loss, utils.factt_loss])
def test_losses_leave_channels_last_activations_where_they_are(loss):
    """Else their gradient, and with it that of the whole net, is copied to another memory layout in
    every step."""
    x, y = (randn(3, 4, 5, 6, seed=s).contiguous(memory_format=torch.channels_last) for s in (1, 2))
    (grad,) = torch.autograd.grad(loss(x.requires_grad_(), y), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


# ------------------------ gradients of the input


def small_net(seed=0):
    """A smooth function of [B, 3, 4, 4] with one group, and its parameters, float64."""
    params = [randn(6, 3, 3, 3, seed=seed, dtype=torch.float64) / 3]
    params.append(randn(5, 6, seed=seed + 1, dtype=torch.float64))
    params = [p.requires_grad_() for p in params]

    def f(x):
        group = torch.tanh(F.conv2d(x, params[0], padding=1))
        return F.linear(group.mean((2, 3)), params[1]), (group,)

    return f, params


def differences(f, x, step=1e-6):
    """Central differences of the scalar f by each element of x."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        for sign in 1, -1:
            moved = x.clone().view(-1)
            moved[i] += sign * step
            gradient.view(-1)[i] += sign * float(f(moved.view(x.shape)).detach()) / (2 * step)
    return gradient


def cross_entropies(logits, targets):
    return -torch.log_softmax(logits, 1)[torch.arange(len(targets)), targets]


def test_the_input_gradient_is_that_of_each_samples_own_loss():
    f, _ = small_net()
    x, targets = randn(3, 3, 4, 4, seed=4, dtype=torch.float64), torch.tensor([0, 4, 2])
    logits, groups, J = utils.input_gradient(f, x, targets)
    torch.testing.assert_close(logits, f(x)[0])
    assert groups[0].shape == (3, 6, 4, 4) and not J.requires_grad and not x.requires_grad
    for i in range(3):
        expected = differences(
            lambda v, i=i: cross_entropies(f(v)[0], targets[i : i + 1]).sum(), x[i : i + 1]
        )
        torch.testing.assert_close(J[i : i + 1], expected, rtol=1e-5, atol=1e-8)
    with torch.no_grad():  # a teacher is run without gradients
        torch.testing.assert_close(utils.input_gradient(f, x, targets)[2], J)


GRADIENT_LOSSES = {
    'grad': lambda J, J_t, J_flipped: utils.gradient_loss(J, J_t),
    'sym': lambda J, J_t, J_flipped: utils.symmetry_loss(J, J_flipped),
    'minl2': lambda J, J_t, J_flipped: utils.min_l2_loss(J),
}


@pytest.mark.parametrize('method', GRADIENT_LOSSES)
def test_losses_of_the_input_gradient_and_their_derivatives(method):
    """The value from its formula, with J by finite differences; the derivative by a weight, a
    second one, by finite differences too."""
    (f, params), (f_t, _) = small_net(), small_net(seed=7)
    x, targets = randn(2, 3, 4, 4, seed=4, dtype=torch.float64), torch.tensor([1, 3])

    def J_of(f, x):
        return differences(lambda v: cross_entropies(f(v)[0], targets).sum(), x, 1e-5)

    J, other = J_of(f, x), torch.zeros_like(x)
    if method == 'grad':
        other = J_of(f_t, x)
    elif method == 'sym':
        other = torch.from_numpy(
            J_of(f, torch.from_numpy(x.numpy()[..., ::-1].copy())).numpy()[..., ::-1].copy()
        )
    expected = 0.5 * ((J - other) ** 2).sum() / len(x)

    def loss():
        J = utils.input_gradient(f, x, targets, create_graph=True)[2]
        J_flipped = utils.input_gradient(f, x.flip(3), targets, create_graph=True)[2]
        return GRADIENT_LOSSES[method](J, utils.input_gradient(f_t, x, targets)[2], J_flipped)

    assert loss().item() == pytest.approx(expected.item(), rel=1e-6)
    for p, gradient in zip(params, torch.autograd.grad(loss(), params)):
        saved = p.detach().clone()

        def at_value(value, p=p):
            p.data = value
            return loss()

        numeric = differences(at_value, saved, 1e-5)
        p.data = saved
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, numeric, rtol=1e-4, atol=1e-7)


def test_losses_of_the_input_gradient_pass_gradcheck():
    J, other = (randn(2, 3, 3, 3, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    for loss in utils.gradient_loss, utils.symmetry_loss:
        assert torch.autograd.gradcheck(loss, (J, other))
        assert torch.autograd.gradgradcheck(loss, (J, other))
    assert torch.autograd.gradcheck(utils.min_l2_loss, J)
    assert utils.symmetry_loss(J, J.flip(3)) == 0 < utils.symmetry_loss(J, J)


# ------------------------ weights of the losses


def test_beta_goes_to_zero_by_the_last_epoch():
    def betas(decay, epochs=5, steps=(3, 4)):
        opt = argparse.Namespace(beta=8.0, beta_decay=decay, epochs=epochs, epoch_step=list(steps))
        return [utils.epoch_beta(e, opt) for e in range(1, epochs + 1)]

    assert betas('none') == [8] * 5
    assert betas('linear') == pytest.approx([8, 6, 4, 2, 0])
    half = math.sqrt(0.5)
    assert betas('cosine') == pytest.approx([8, 4 + 4 * half, 4, 4 - 4 * half, 0])
    assert betas('step') == [8, 8, 4, 0, 0]
    assert betas('step', steps=(2, 3, 90)) == [8, 4, 0, 0, 0]  # that of epoch 90 never comes
    assert betas('linear', epochs=1) == betas('cosine', epochs=1) == [8]


# ------------------------ distillation


@pytest.mark.parametrize('T', [1, 4.0, 20])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 0.9, 1.0])
def test_distillation_is_its_formula(T, alpha):
    y, t, labels = (
        5 * randn(6, 10, seed=1),
        5 * randn(6, 10, seed=2),
        torch.tensor([0, 3, 9, 9, 1, 4]),
    )
    a, b = y.double().numpy(), t.double().numpy()
    p = softmax(b / T)
    kl = (p * (np.log(p) - np.log(softmax(a / T)))).sum(1).mean()
    ce = -np.log(softmax(a))[np.arange(6), labels].mean()
    loss = utils.distillation(y, t, labels, T, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    assert math.isclose(loss, alpha * T**2 * kl + (1 - alpha) * ce, rel_tol=1e-5)


def test_distillation_has_the_right_derivatives():
    y, t = randn(4, 5, seed=1, dtype=torch.float64), randn(4, 5, seed=2, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2])
    inputs = (y.requires_grad_(), t.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, t: utils.distillation(y, t, labels, 4, 0.9), inputs)
    assert torch.autograd.gradgradcheck(
        lambda y, t: utils.distillation(y, t, labels, 4, 0.9), inputs
    )


@pytest.mark.parametrize('scores', [None, torch.zeros(6, 3), torch.full((6, 10), math.nan)])
def test_without_alpha_the_teacher_is_not_looked_at(scores):
    y, labels = randn(6, 10), torch.arange(6)
    assert torch.equal(utils.distillation(y, scores, labels, 4, 0), F.cross_entropy(y, labels))


def test_distillation_is_finite_for_sure_nets_and_zero_for_an_equal_one():
    y = 1e4 * torch.eye(5)
    y.requires_grad_()
    loss = utils.distillation(y, -y.detach(), torch.arange(5), 4, 0.9)
    assert loss.isfinite() and torch.autograd.grad(loss, y)[0].isfinite().all()
    assert abs(utils.distillation(y, y.detach(), torch.arange(5), 4, 1.0).item()) < 1e-6


def test_distillation_of_bfloat16_scores_is_computed_in_float32():
    y, t, labels = randn(6, 10, seed=1).bfloat16(), randn(6, 10, seed=2).bfloat16(), torch.arange(6)
    expected = utils.distillation(y.double(), t.double(), labels, 4, 0.9)
    loss = utils.distillation(y, t, labels, 4, 0.9)
    assert loss.dtype == torch.float32 and math.isclose(loss, expected, rel_tol=1e-5)


# ------------------------ several devices


def test_losses_of_devices_become_their_mean_weighted_by_samples():
    outputs = [torch.tensor(1.0), torch.tensor(4.0)]
    assert utils.gather_outputs(outputs, [3, 1], 'cpu').item() == pytest.approx(1.75)
    assert utils.gather_outputs(outputs, [64, 64], 'cpu').item() == pytest.approx(2.5)
    assert utils.gather_outputs(
        [torch.tensor(7.0)] * 3, [50, 50, 28], 'cpu'
    ).item() == pytest.approx(7)


def test_gathered_outputs_keep_their_form():
    a, b = torch.arange(6.0).view(3, 2), torch.tensor([[9.0, 9.0]])
    outputs = [
        (a, [torch.tensor(1.0), {'x': a[:, 0]}], ()),
        (b, [torch.tensor(5.0), {'x': b[:, 0]}], ()),
    ]
    logits, (loss, named), nothing = utils.gather_outputs(outputs, [3, 1], 'cpu')
    assert torch.equal(logits, torch.tensor([[0.0, 1], [2, 3], [4, 5], [9, 9]]))
    assert loss.item() == pytest.approx(2) and torch.equal(named['x'], torch.tensor([0.0, 2, 4, 9]))
    assert nothing == ()


def test_gathered_outputs_may_lack_a_part():
    # a student without teacher: (logits, None, [])
    outputs = [(torch.zeros(2, 3), None, []), (torch.ones(1, 3), None, [])]
    logits, nothing, losses = utils.gather_outputs(outputs, [2, 1], 'cpu')
    assert logits.shape == (3, 3) and nothing is None and losses == []


def test_one_device_is_a_plain_call():
    calls = []
    result = object()

    def f(*arguments):
        calls.append(arguments)
        return result

    x, params = torch.zeros(2), {}
    assert utils.data_parallel(f, x, params, True, iter([torch.device('cpu')])) is result
    assert calls == [(x, params, True)] and calls[0][0] is x and calls[0][1] is params


class Copies(torch.autograd.Function):
    """Broadcast of torch.nn.parallel, on a machine that has the CPU alone: copies[i * n + k] of
    tensor k for device i."""

    @staticmethod
    def forward(ctx, devices, *tensors):
        ctx.n, ctx.fixed = len(tensors), [not t.requires_grad for t in tensors]
        copies = [t.clone() for _ in devices for t in tensors]
        ctx.mark_non_differentiable(*[c for i, c in enumerate(copies) if ctx.fixed[i % ctx.n]])
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *[None if ctx.fixed[k] else sum(gradients[k :: ctx.n]) for k in range(ctx.n)]


@pytest.mark.parametrize('batch, devices', [(6, 2), (7, 3), (2, 4)])
def test_the_loss_on_several_devices_is_the_loss_on_one(monkeypatch, batch, devices):
    # The transport between GPUs is replaced by copies on the CPU; what is tested is all around it.
    monkeypatch.setattr(utils, 'Broadcast', Copies)
    monkeypatch.setattr(
        utils, 'scatter', lambda inputs, ids: [[x] for x in inputs[0].chunk(len(ids))]
    )
    monkeypatch.setattr(
        utils, 'parallel_apply', lambda fs, inputs, devices: [f(*i) for f, i in zip(fs, inputs)]
    )

    def f(x, params, training):
        h = (x @ params['w'] + params['b']).tanh()
        params['running_mean'].mul_(0.5).add_(h.detach().mean(0))
        return h, h.square().mean(), [h.sum(1)]

    results = []
    for ids in [0], range(devices):
        params = {'w': randn(3, 4), 'running_mean': torch.zeros(4), 'b': randn(4, seed=1)}
        params['w'].requires_grad_(), params['b'].requires_grad_()
        x = randn(batch, 3, seed=2)
        out, loss, (sums,) = utils.data_parallel(f, x, params, True, ids, 'cpu')
        (loss + out.sum()).backward()
        results.append((out, loss, sums, params['w'].grad, params['b'].grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    first = x.chunk(devices)[0]
    expected = (first @ params['w'] + params['b']).tanh().mean(0)
    torch.testing.assert_close(params['running_mean'], expected.detach())


@pytest.mark.parametrize(
    'batch',
    [
        torch.zeros(5, 2),
        (torch.zeros(5), torch.zeros(5, 3)),
        {'x': torch.zeros(5, 1)},
        [{'x': torch.zeros(5)}],
    ],
)
def test_batch_size_is_the_number_of_samples(batch):
    assert utils.batch_size(batch) == 5


@pytest.mark.skipif(
    platform.system() != 'Linux' or platform.machine() != 'x86_64', reason='reads /proc/cpuinfo'
)
def test_bfloat16_is_warned_of_where_the_processor_is_slow_at_it(capsys):
    flags = set(
        re.search(r'^flags\s*:(.*)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)[1].split()
    )
    cpu = torch.device('cpu')
    utils.warn_of_slow_dtype('float', cpu)
    utils.warn_of_slow_dtype('bfloat16', torch.device('cuda'))
    assert capsys.readouterr().err == ''
    utils.warn_of_slow_dtype('bfloat16', cpu)
    warned = '--dtype float' in capsys.readouterr().err
    assert warned != ({'avx512bw', 'avx512vl', 'avx512dq'} <= flags)


@pytest.mark.parametrize('supported', [True, False])
def test_the_warning_of_bfloat16_goes_by_what_the_processor_has(monkeypatch, capsys, supported):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    operators = types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported)
    monkeypatch.setattr(torch.ops, 'mkldnn', operators)
    utils.warn_of_slow_dtype('bfloat16', torch.device('cpu'))
    assert capsys.readouterr().err.count('\n') == (not supported)


# ------------------------ parameters


def test_cast_keeps_names_and_nesting():
    params = {'a': torch.ones(2), 'b': {'c': torch.zeros(1, dtype=torch.float64)}}
    for name, dtype in (
        ('float', torch.float32),
        ('bfloat16', torch.bfloat16),
        ('double', torch.float64),
        ('long', torch.int64),
    ):
        c = utils.cast(params, name)
        assert list(c) == ['a', 'b'] and c['a'].dtype == c['b']['c'].dtype == dtype
    assert utils.cast(torch.ones(2)).dtype == torch.float32
    assert params['b']['c'].dtype == torch.float64


def test_flatten_joins_names_with_dots_in_order():
    nested = {'z': 1, 'a': {'c': {'y': 2, 'x': 3}, 'n': None}, 'e': {}, 'b': 0}
    assert list(utils.flatten(nested).items()) == [('z', 1), ('a.c.y', 2), ('a.c.x', 3), ('b', 0)]


def test_parameter_makers_have_published_shapes():
    assert utils.conv_params(3, 5).shape == (5, 3, 1, 1) and utils.conv_params(3, 5, k=3).shape == (
        5,
        3,
        3,
        3,
    )
    linear = utils.linear_params(4, 7)
    assert linear['weight'].shape == (7, 4) and torch.equal(linear['bias'], torch.zeros(7))
    bn = utils.bnparams(6)
    assert list(bn) == ['weight', 'bias', 'running_mean', 'running_var'] and all(
        v.shape == (6,) for v in bn.values()
    )


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_batch_norm_is_torchs(dtype, tolerance):
    module = nn.BatchNorm2d(5)
    nn.init.uniform_(module.weight), nn.init.normal_(module.bias)
    params = {f'g.bn.{k}': v.detach().clone() for k, v in module.state_dict().items()}
    utils.set_requires_grad_except_bn_(params)
    for step in range(4):
        x = randn(4, 5, 3, 2, seed=step, dtype=torch.float32) * 3 + 1
        training = step < 3
        module.train(training)
        a = x.to(dtype).requires_grad_()
        b = a.detach().float().requires_grad_()
        ours, theirs = utils.batch_norm(a, params, 'g.bn', training), module(b)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)
        g = randn(4, 5, 3, 2, seed=9)
        ours.backward(g.to(dtype))
        theirs.backward(g)
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=tolerance, atol=tolerance)
    for name in 'running_mean', 'running_var':
        assert params[f'g.bn.{name}'].dtype == torch.float32
        torch.testing.assert_close(
            params[f'g.bn.{name}'], getattr(module, name), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(
        params['g.bn.weight'].grad, module.weight.grad, rtol=3 * tolerance, atol=3 * tolerance
    )


def test_compiled_batch_norm_keeps_its_statistics_wide():
    """Against float64: with mean and 1/std in bfloat16 the weight's gradient would be some 1 %
    off."""
    params = {f'bn.{k}': v for k, v in utils.bnparams(8).items()}
    params['bn.weight'] += 0.5
    x = (3 + randn(16, 8, 8, 8) * torch.arange(1, 9)[:, None, None] / 8).bfloat16()
    g = randn(16, 8, 8, 8, seed=1)

    def gradient(x, params, compiled):
        params = {k: v.clone() for k, v in params.items()}
        weight = params['bn.weight'].requires_grad_()
        f = torch.compile(utils.batch_norm) if compiled else utils.batch_norm
        (f(x, params, 'bn', True).to(g.dtype) * g).sum().backward()
        return weight.grad.double()

    exact = gradient(x.double(), utils.cast(params, 'double'), compiled=False)
    error = (gradient(x, params, compiled=True) - exact).norm() / exact.norm()
    assert error < 5e-3


def test_running_statistics_are_not_trained():
    names = [
        'conv0',
        'bn.weight',
        'bn.bias',
        'bn.running_mean',
        'teacher.bn.running_var',
        'fc.bias',
    ]
    params = {k: torch.zeros(1) for k in names}
    utils.set_requires_grad_except_bn_(params)
    assert [k for k, v in params.items() if v.requires_grad] == [
        'conv0',
        'bn.weight',
        'bn.bias',
        'fc.bias',
    ]


def test_print_tensor_dict_says_all_of_each_tensor(capsys):
    utils.print_tensor_dict(
        {'conv0': torch.zeros(16, 3, 3, 3, requires_grad=True), 'bn.running_mean': torch.zeros(16)}
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['0', 'conv0', '(16,', '3,', '3,', '3)', 'torch.FloatTensor', 'True']
    assert lines[1].split() == ['1', 'bn.running_mean', '(16,)', 'torch.FloatTensor', 'False']
    utils.print_tensor_dict({})


def expected_params():
    return {'a': torch.zeros(2, 3), 'b.running_mean': torch.zeros(4)}


def test_checked_params_have_the_expected_order_and_dtype():
    given_ = {
        'b.running_mean': torch.ones(4, dtype=torch.float64),
        'a': torch.ones(3, 2).t().half(),
    }
    checked = utils.check_params(given_, expected_params(), 'f.hkl')
    assert list(checked) == ['a', 'b.running_mean']
    assert all(
        v.dtype == torch.float32 and v.is_contiguous() and not v.requires_grad and v.eq(1).all()
        for v in checked.values()
    )


@pytest.mark.parametrize(
    'change, message',
    [
        ({'a': None}, r'f\.hkl: 1 parameters missing \(a\)'),
        ({'c': torch.zeros(1)}, r'f\.hkl: 1 parameters not understood \(c\)'),
        (
            {f'c{i}': torch.zeros(1) for i in range(9)},
            r'9 parameters not understood \(c0, c1, c2, …\)',
        ),
        ({'a': torch.zeros(3, 2)}, r'f\.hkl: a has shape \(3, 2\), this net needs \(2, 3\)'),
        ({'a': torch.tensor([[0, 0, 0], [0, 0, math.nan]])}, r'f\.hkl: a holds nan or inf'),
        (
            {'b.running_mean': torch.tensor([0, 0, -math.inf, 0])},
            r'b\.running_mean holds nan or inf',
        ),
    ],
)
def test_unfit_parameters_are_named(change, message):
    params = {k: v for k, v in (expected_params() | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        utils.check_params(params, expected_params(), 'f.hkl')


@pytest.mark.parametrize('channels', [1, 4, 7, 8])
def test_a_strided_convolution_of_one_pixel_is_its_formula(channels):
    x = randn(2, channels, 9, 8, seed=1).float().to(memory_format=torch.channels_last)
    w = randn(6, channels, 1, 1, seed=2).float().to(memory_format=torch.channels_last)
    x.requires_grad_(), w.requires_grad_()
    o = utils.conv2d(x, w, 2)
    pixels = x.detach().double()[:, :, ::2, ::2]
    matrix = w.detach().double()[:, :, 0, 0]
    expected = torch.einsum('oi,bihw->bohw', matrix, pixels)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-6)
    weights = randn(*o.shape, seed=3).float()
    by_x, by_w = torch.autograd.grad((o * weights).sum(), [x, w])
    expected = torch.zeros(x.shape, dtype=torch.double)
    expected[:, :, ::2, ::2] = torch.einsum('oi,bohw->bihw', matrix, weights.double())
    torch.testing.assert_close(by_x.double(), expected, rtol=1e-5, atol=1e-6)
    expected = torch.einsum('bohw,bihw->oi', weights.double(), pixels)
    torch.testing.assert_close(by_w.double()[:, :, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_multiply_adds_are_those_of_convolutions_and_the_linear_layer():
    f, params = resnet.wrn(10, 1, 10)
    # per output position: in * out * k * k
    by_hand = 32 * 32 * (3 * 16 * 9 + 2 * 16 * 16 * 9)
    by_hand += (
        16 * 16 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
        + 8 * 8 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64)
        + 640
    )
    assert utils.multiply_adds(f, params, (32, 32), 'cpu') == by_hand


# ------------------------ weights files: .hkl


def arrays():
    rng = np.random.default_rng(0)
    return {
        'conv0': rng.standard_normal((4, 3, 3, 3)).astype('f4'),
        'group0.block0.bn0.running_mean': rng.standard_normal(4).astype('f8'),
        'fc.weight': rng.standard_normal((2, 4)).astype('f2'),
        'fc.bias': rng.standard_normal(2).astype('>f4'),
        'big': rng.standard_normal(3).astype('>f8'),
        'count': np.array([3, -4], 'i8'),
        'scalar': np.array(2.5, 'f4'),
    }


def write_hickle_2(path, values, version=2, kinds=None, root_type='dict'):
    with h5py.File(path, 'w') as h:
        h.attrs['CLASS'], h.attrs['VERSION'] = np.bytes_('hickle'), version
        h.attrs['PYTHON_VERSION'] = np.bytes_('2.7.13')
        group = h.create_group('data_0')
        group.attrs['type'] = [np.bytes_(root_type)]
        for key, value in values.items():
            item = group.create_group(key)
            item.attrs['type'] = [np.bytes_('dict_item')]
            dataset = item.create_dataset('data_0', data=value)
            dataset.attrs['type'] = [np.bytes_((kinds or {}).get(key, 'ndarray'))]


def write_hickle_2_1(path, values, **more):
    write_hickle_2(path, values, version=3, **more)


def write_hickle_3(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['CLASS'], h.attrs['VERSION'], h.attrs['PYTHON_VERSION'] = 'hickle', '3.4.9', '3.6.9'
        group = h.create_group('data_0')
        group.attrs['type'] = np.array([b"<class 'dict'>"])
        for key, value in values.items():
            item = group.create_group(repr(key))
            item.attrs['type'] = [b'dict_item']
            item.attrs['key_type'] = [b"<class 'str'>"]
            dataset = item.create_dataset('data_0', data=value)
            dataset.attrs['type'] = [(kinds or {}).get(key, 'ndarray').encode()]


def write_hickle_4(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['HICKLE_VERSION'], h.attrs['HICKLE_PYTHON_VERSION'] = '4.0.4', '3.8.5'
        group = h.create_group('data')
        group.attrs['base_type'], group.attrs['type'] = b'dict', np.array(pickle.dumps(dict))
        for key, value in values.items():
            item = group.create_group(repr(key))
            item.attrs['base_type'], item.attrs['type'] = b'dict_item', np.array(pickle.dumps(dict))
            dataset = item.create_dataset('data', data=value)
            dataset.attrs['base_type'] = (kinds or {}).get(key, 'ndarray').encode()
            dataset.attrs['type'] = np.array(Payload.last or pickle.dumps(np.ndarray))


def write_hickle_5(path, values, kinds=None):
    with h5py.File(path, 'w') as h:
        h.attrs['HICKLE_VERSION'], h.attrs['HICKLE_PYTHON_VERSION'] = '5.0.3', '3.11.7'
        table = h.create_group('hickle_types_table')
        for i, base in enumerate(['dict', 'ndarray', 'list']):
            named = table.create_dataset(base, shape=None, dtype='S1')
            pickled = Payload.last or pickle.dumps(np.ndarray)
            entry = table.create_dataset(str(i), data=np.frombuffer(pickled, 'S1').reshape(1, -1))
            entry.attrs['base_type'] = named.ref
        group = h.create_group('data')
        group.attrs['type'] = table['0'].ref
        for i, (key, value) in enumerate(values.items()):
            dataset = group.create_dataset(f'"{key}"', data=value)
            dataset.attrs['key_base_type'], dataset.attrs['key_idx'] = 'str', i
            kind = (kinds or {}).get(key, 'ndarray')
            if kind != 'pickle':
                dataset.attrs['type'] = table[{'dict': '0', 'ndarray': '1', 'list': '2'}[kind]].ref


class Payload:
    """A pickle that touches a file when it is loaded. `last` is put where the layouts keep pickled
    types."""

    last = None

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


WRITERS = [write_hickle_2, write_hickle_2_1, write_hickle_3, write_hickle_4, write_hickle_5]


def assert_same(params, values):
    assert set(params) == set(values)
    for name, value in values.items():
        assert params[name].numpy().dtype == value.dtype.newbyteorder('='), name
        np.testing.assert_array_equal(params[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize('write', WRITERS)
def test_every_layout_of_hickle_is_read(write, tmp_path):
    write(tmp_path / 'm.hkl', arrays())
    assert_same(utils.load_params(tmp_path / 'm.hkl'), arrays())


def test_files_of_hickle_itself_are_read(tmp_path):
    hickle.dump(arrays(), str(tmp_path / 'm.hkl'), mode='w')
    assert_same(utils.load_params(tmp_path / 'm.hkl'), arrays())
    values = {k: v for k, v in arrays().items() if v.ndim}
    hickle.dump(values, str(tmp_path / 'small.hkl'), mode='w', compression='gzip')
    assert_same(utils.load_params(str(tmp_path / 'small.hkl')), values)


@pytest.mark.parametrize('write', WRITERS)
def test_a_pickled_object_is_refused_by_name_and_not_run(write, tmp_path):
    touched = tmp_path / 'touched'
    pickled = np.frombuffer(pickle.dumps(Payload(touched)), np.uint8)
    write(tmp_path / 'm.hkl', arrays() | {'evil': pickled}, kinds={'evil': 'pickle'})
    with pytest.raises(UserError, match=r"m\.hkl: 'evil' is .*refused"):
        utils.load_params(tmp_path / 'm.hkl')
    assert not touched.exists()
    pickle.loads(pickled.tobytes())
    assert touched.exists(), 'the payload would do nothing'


@pytest.mark.parametrize('write', [write_hickle_4, write_hickle_5])
def test_pickled_types_are_left_alone(write, tmp_path, monkeypatch):
    monkeypatch.setattr(Payload, 'last', pickle.dumps(Payload(tmp_path / 'touched')))
    write(tmp_path / 'm.hkl', arrays())
    assert_same(utils.load_params(tmp_path / 'm.hkl'), arrays())
    assert not (tmp_path / 'touched').exists()


def test_objects_that_hickle_pickles_are_refused(tmp_path):
    touched = tmp_path / 'touched'
    hickle.dump({'conv0': np.zeros(3), 'evil': Payload(touched)}, str(tmp_path / 'm.hkl'), mode='w')
    touched.unlink(missing_ok=True)
    with pytest.raises(UserError, match="'evil'"):
        utils.load_params(tmp_path / 'm.hkl')
    assert not touched.exists()


@pytest.mark.parametrize(
    'value', [[1, 2], 'text', None, 3.5, {'a': np.zeros(2)}, np.array(['a', 'b']), np.array([True])]
)
def test_what_is_no_array_of_numbers_is_refused(value, tmp_path):
    hickle.dump({'conv0': np.zeros(3), 'odd': value}, str(tmp_path / 'm.hkl'), mode='w')
    with pytest.raises(UserError, match="'odd'"):
        utils.load_params(tmp_path / 'm.hkl')


@pytest.mark.parametrize('value', [np.zeros(3), [np.zeros(3)], 'text'])
def test_a_file_without_a_dict_is_refused(value, tmp_path):
    hickle.dump(value, str(tmp_path / 'm.hkl'), mode='w')
    with pytest.raises(UserError, match=r'm\.hkl'):
        utils.load_params(tmp_path / 'm.hkl')
    hickle.dump({}, str(tmp_path / 'm.hkl'), mode='w')
    with pytest.raises(UserError, match=r'm\.hkl'):
        utils.load_params(tmp_path / 'm.hkl')


def dataset_path(write, key):
    return {
        'write_hickle_2': f'data_0/{key}/data_0',
        'write_hickle_2_1': f'data_0/{key}/data_0',
        'write_hickle_3': f"data_0/'{key}'/data_0",
        'write_hickle_4': f"data/'{key}'/data",
        'write_hickle_5': f'data/"{key}"',
    }[write.__name__]


def traps(folder):
    """{name: make(parent group, leaf)} of datasets and links that lead out of the file, or to no
    numbers."""
    secret = folder / 'secret.bin'
    secret.write_bytes(np.arange(4, dtype='f4').tobytes())
    with h5py.File(folder / 'other.h5', 'w') as h:
        h['x'] = np.arange(4, dtype='f4')
    layout = h5py.VirtualLayout((4,), 'f4')
    layout[:] = h5py.VirtualSource(folder / 'other.h5', 'x', (4,))

    def null(g, k):
        g.create_dataset(k, shape=None, dtype='f4')

    return {
        'external link': lambda g, k: g.__setitem__(
            k, h5py.ExternalLink(str(folder / 'other.h5'), '/x')
        ),
        'soft link': lambda g, k: g.__setitem__(k, h5py.SoftLink('/elsewhere')),
        'dangling link': lambda g, k: g.__setitem__(k, h5py.SoftLink('/nowhere')),
        'external storage': lambda g, k: g.create_dataset(
            k, (4,), 'f4', external=[(str(secret), 0, 16)]
        ),
        'virtual dataset': lambda g, k: g.create_virtual_dataset(k, layout),
        'strings': lambda g, k: g.create_dataset(k, data=['a', 'b'], dtype=h5py.string_dtype()),
        'bytes': lambda g, k: g.create_dataset(k, data=np.array([b'abc'])),
        'references': lambda g, k: g.create_dataset(k, (2,), h5py.ref_dtype),
        'compound': lambda g, k: g.create_dataset(k, (2,), np.dtype([('a', 'f4')])),
        'ragged': lambda g, k: g.create_dataset(k, (2,), h5py.vlen_dtype('f4')),
        'nothing': null,
        'group': lambda g, k: g.create_group(k),
    }


@pytest.mark.parametrize('write', WRITERS)
@pytest.mark.parametrize(
    'trap',
    [
        'external link',
        'soft link',
        'dangling link',
        'external storage',
        'virtual dataset',
        'strings',
        'bytes',
        'references',
        'compound',
        'ragged',
        'nothing',
        'group',
    ],
)
def test_what_leads_out_of_the_file_is_refused(trap, write, tmp_path):
    path = tmp_path / 'm.hkl'
    write(path, {'conv0': np.zeros(3, 'f4'), 'odd': np.zeros(4, 'f4')})
    make = traps(tmp_path)[trap]
    with h5py.File(path, 'a') as h:
        h['elsewhere'] = np.zeros(4, 'f4')
        parent, _, leaf = dataset_path(write, 'odd').rpartition('/')
        marks = dict(h[parent][leaf].attrs)
        del h[parent][leaf]
        make(h[parent], leaf)
        if not trap.endswith('link'):
            for k, v in marks.items():
                h[parent][leaf].attrs[k] = v
    with pytest.raises(UserError, match=r'm\.hkl'):
        utils.load_params(path)


@pytest.mark.parametrize('write', WRITERS)
def test_a_root_that_is_a_link_is_refused(write, tmp_path):
    write(tmp_path / 'other.hkl', arrays())
    write(tmp_path / 'm.hkl', arrays())
    with h5py.File(tmp_path / 'm.hkl', 'a') as h:
        root = 'data' if 'data' in h else 'data_0'
        del h[root]
        h[root] = h5py.ExternalLink(str(tmp_path / 'other.hkl'), f'/{root}')
    with pytest.raises(UserError, match=r'm\.hkl'):
        utils.load_params(tmp_path / 'm.hkl')


@pytest.mark.parametrize('write', WRITERS)
def test_an_entry_of_a_dict_in_a_dict_is_refused(write, tmp_path):
    write(tmp_path / 'm.hkl', arrays())
    with h5py.File(tmp_path / 'm.hkl', 'a') as h:
        root = h['data' if 'data' in h else 'data_0']
        nested = '"nested"' if write is write_hickle_5 else 'nested'
        h.copy(root, root, name=nested)
        root[nested].attrs.update(root.attrs)
    with pytest.raises(UserError, match='nested'):
        utils.load_params(tmp_path / 'm.hkl')


def test_a_version_string_that_hdf5_would_hang_on_is_not_read(tmp_path):
    # A string of variable length lies in a heap of the file; HDF5 can loop for ever where the heap
    # is damaged.
    write_hickle_5(tmp_path / 'm.hkl', arrays())
    with h5py.File(tmp_path / 'm.hkl', 'a') as h:
        h.attrs['HICKLE_VERSION'] = 'nonsense'
    assert set(utils.load_params(tmp_path / 'm.hkl')) == set(arrays())


def test_an_hdf5_file_of_another_program_is_refused(tmp_path):
    with h5py.File(tmp_path / 'm.hkl', 'w') as h:
        h['conv0'] = np.zeros(3)
    with pytest.raises(UserError, match='not written by hickle'):
        utils.load_params(tmp_path / 'm.hkl')


def test_a_tiny_file_does_not_become_gigabytes(tmp_path):
    write_hickle_5(tmp_path / 'm.hkl', {'conv0': np.zeros(3, 'f4')})
    with h5py.File(tmp_path / 'm.hkl', 'a') as h:
        marks = dict(h['data/"conv0"'].attrs)
        d = h['data'].create_dataset('"bomb"', (2**40,), 'f4', chunks=(2**20,))
        d.attrs.update(marks)
    assert (tmp_path / 'm.hkl').stat().st_size < 2**20
    with pytest.raises(UserError, match='bomb'):
        utils.load_params(tmp_path / 'm.hkl')


@pytest.mark.parametrize('write', WRITERS)
def test_truncated_hkl_files_are_refused(write, tmp_path):
    write(tmp_path / 'm.hkl', arrays())
    whole = (tmp_path / 'm.hkl').read_bytes()
    for n in [0, 1, 7, 8, 100, 512, len(whole) // 2, len(whole) - 1]:
        (tmp_path / 'm.hkl').write_bytes(whole[:n])
        with pytest.raises(UserError, match=r'm\.hkl'):
            utils.load_params(tmp_path / 'm.hkl')


def test_saved_parameters_are_read_by_hickle(tmp_path):
    _, params = resnet.wrn(10, 1, 3)
    params = utils.to_device(params, torch.device('cpu'))  # channels_last memory
    params['step'] = torch.tensor(7)
    utils.save_params(tmp_path / 'm.hkl', params)
    loaded = hickle.load(str(tmp_path / 'm.hkl'))
    assert set(loaded) == set(params)
    for name, value in params.items():
        assert isinstance(loaded[name], np.ndarray)
        np.testing.assert_array_equal(loaded[name], value.detach().numpy())
    assert_same(utils.load_params(tmp_path / 'm.hkl'), loaded)
    assert os.listdir(tmp_path) == ['m.hkl']


def test_parameters_saved_twice_are_the_same_bytes(tmp_path):
    _, params = resnet.wrn(10, 1, 3)
    utils.save_params(tmp_path / 'a.hkl', params)
    utils.save_params(tmp_path / 'b.hkl', params)
    assert (tmp_path / 'a.hkl').read_bytes() == (tmp_path / 'b.hkl').read_bytes()


# ------------------------ weights files: .pth, .pt7, .safetensors


def tensors():
    return {
        'conv0': randn(4, 3, 3, 3),
        'bn.running_mean': randn(4, dtype=torch.float64),
        'fc.weight': randn(2, 4).half(),
        'n': torch.tensor(3),
    }


def assert_tensors(params, expected):
    assert set(params) == set(expected)
    for k, v in expected.items():
        assert (
            params[k].dtype == v.dtype and torch.equal(params[k], v) and not params[k].requires_grad
        )


@pytest.mark.parametrize('suffix', ['.pth', '.pt7', '.pt'])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files_are_read(suffix, zipped, tmp_path):
    path = tmp_path / f'm{suffix}'
    torch.save(
        {k: v.requires_grad_(v.is_floating_point()) for k, v in tensors().items()},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    assert_tensors(utils.load_params(path), tensors())


def published(params):
    """What the code of 2018 saved beside log.txt."""
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], 0.1, 0.9)
    return {'params': params, 'optimizer': optimizer.state_dict(), 'epoch': 200}


def test_a_teacher_of_2018_is_read(tmp_path):
    torch.save(published(tensors()), tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    assert_tensors(utils.load_params(tmp_path / 'model.pt7'), tensors())


def test_of_a_student_of_2018_the_student_is_read(tmp_path):
    merged = {f'student.{k}': v for k, v in tensors().items()}
    merged |= {f'teacher.{k}': torch.zeros(1) for k in tensors()} | {'teacher.more': torch.zeros(1)}
    torch.save(published(merged), tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    assert_tensors(utils.load_params(tmp_path / 'model.pt7'), tensors())


def test_a_state_dict_inside_a_checkpoint_is_read(tmp_path):
    torch.save({'state_dict': tensors(), 'epoch': 3, 'arch': 'wrn'}, tmp_path / 'm.pth')
    assert_tensors(utils.load_params(tmp_path / 'm.pth'), tensors())


@pytest.mark.parametrize('zipped', [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(zipped, tmp_path):
    touched, path = tmp_path / 'touched', tmp_path / 'm.pth'
    torch.save(
        {'conv0': torch.zeros(3), 'evil': Payload(touched)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match=r'm\.pth: holds \w+\.system, not tensors'):
        utils.load_params(path)
    assert not touched.exists()
    path.write_bytes(pickle.dumps(Payload(touched)))
    with pytest.raises(UserError, match=r'm\.pth'):
        utils.load_params(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    'content',
    [
        {},
        [],
        torch.zeros(3),
        {'a': 1.0},
        {'a': torch.zeros(2), 'b': 'text'},
        {1: torch.zeros(2)},
        {'params': {}},
        {'params': {'a': [torch.zeros(1)]}},
        None,
        7,
    ],
)
def test_torch_files_without_a_dict_of_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / 'm.pth')
    with pytest.raises(UserError, match=r'm\.pth'):
        utils.load_params(tmp_path / 'm.pth')


@pytest.mark.filterwarnings('ignore:.*parse')
def test_sparse_tensors_are_refused(tmp_path):
    torch.save({'a': torch.eye(3).to_sparse()}, tmp_path / 'm.pth')
    with pytest.raises(UserError, match="'a'"):
        utils.load_params(tmp_path / 'm.pth')


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    expected = tensors() | {'half': randn(3).bfloat16()}
    save_file(expected, tmp_path / 'm.safetensors')
    assert_tensors(utils.load_params(tmp_path / 'm.safetensors'), expected)
    (tmp_path / 'm.safetensors').write_bytes((tmp_path / 'm.safetensors').read_bytes()[:-3])
    with pytest.raises(UserError, match=r'm\.safetensors'):
        utils.load_params(tmp_path / 'm.safetensors')


def test_bfloat16_weights_are_written_as_float32(tmp_path):
    utils.save_params(tmp_path / 'a.hkl', {'w': torch.tensor([1.5, -2]).bfloat16()})
    w = utils.load_params(tmp_path / 'a.hkl')['w']
    assert w.dtype == torch.float32 and w.tolist() == [1.5, -2]


def test_other_and_missing_files_are_named(tmp_path):
    for name, message in (
        ('m.txt', 'must end in'),
        ('m', 'must end in'),
        ('m.hkl', 'No such file'),
        ('x/m.pth', 'No such file'),
    ):
        with pytest.raises(UserError, match=message) as e:
            utils.load_params(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
    (tmp_path / 'd.hkl').mkdir()
    with pytest.raises(UserError, match=r'd\.hkl'):
        utils.load_params(tmp_path / 'd.hkl')


SOURCES = {}


def whole_file(kind, folder):
    """The bytes of a good weights file of that kind, small."""
    if kind not in SOURCES:
        path = folder / f'whole{kind.split()[0]}'
        values = {
            'conv0': np.arange(6, dtype='f4').reshape(2, 3),
            'bn.running_var': np.ones(2, 'f4'),
        }
        t = {k: torch.from_numpy(v) for k, v in values.items()}
        if kind == '.hkl':
            utils.save_params(path, t)
        elif kind == '.hkl of 2':
            write_hickle_2(path, values)
        elif kind == '.hkl of 4':
            write_hickle_4(path, values)
        elif kind == '.safetensors':
            from safetensors.torch import save_file

            save_file(t, path)
        else:
            torch.save(t, path, _use_new_zipfile_serialization=kind == '.pth')
        SOURCES[kind] = path.read_bytes()
    return SOURCES[kind]


@pytest.mark.parametrize(
    'kind', ['.hkl', '.hkl of 2', '.hkl of 4', '.pth', '.pth of 2018', '.safetensors']
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_damaged_weights_file_is_refused_or_read_never_a_crash(kind, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(whole_file(kind, folder))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        action = data.draw(st.sampled_from(['set', 'flip', 'cut', 'drop', 'repeat']))
        if action == 'set':
            raw[at : at + 4] = data.draw(st.binary(min_size=1, max_size=8))
        elif action == 'flip':
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == 'cut':
            del raw[max(at, 1) :]
        elif action == 'drop' and len(raw) > 1:
            del raw[at]
        else:
            raw[at:at] = raw[at : at + 20]
    path = folder / f'damaged{kind.split()[0]}'
    path.write_bytes(raw)
    try:
        params = utils.load_params(path)
    except UserError as e:
        assert str(path) in str(e) and '\n' not in str(e)
    else:
        assert params and all(isinstance(k, str) and torch.is_tensor(v) for k, v in params.items())


# ------------------------ run folder


@pytest.mark.parametrize(
    'error',
    [OSError(28, 'No space left on device'), RuntimeError('unexpected pos'), RuntimeError()],
)
def test_a_failed_write_keeps_the_old_file(error, tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text('old')

    def write(temporary):
        temporary.write_text('half')
        raise error

    with pytest.raises(UserError, match=r'cannot write .*log\.txt') as e:
        utils.write_atomically(path, write)
    assert e.value.status == 1
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['log.txt']


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text('old')

    def write(temporary):
        temporary.write_text('half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, write)
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['log.txt']


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'log.txt'
    utils.write_text(path, 'old')
    utils.write_atomically(
        path, lambda t: (t.write_text('new'), path.read_text() == 'old' or pytest.fail('gone'))
    )
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['log.txt']


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(UserError, match='cannot write'):
        utils.write_text(tmp_path / 'gone' / 'log.txt', 'x')


LINE = 'json_stats: {"epoch": 1, "test_acc": 91.5, "depth": 16}'


@pytest.mark.parametrize(
    'text, epochs',
    [
        (f'{LINE}\n', [1]),
        (f'{LINE}', [1]),
        (f'{LINE}\njson_stats: {{"epoch": 2, "te', [1]),
        (f'{LINE}\njson_sta', [1]),
        (f'{LINE}\r\n{LINE}\r\n', [1, 1]),
        (f'some words\n\n{LINE}\n{{}}\njson_stats: [1]\njson_stats: 3\n', [1]),
        (f'[10:00] {LINE}\n', [1]),
    ],
)
def test_whole_lines_of_a_log_are_read(text, epochs, tmp_path):
    (tmp_path / 'log.txt').write_text(text)
    assert [r['epoch'] for r in utils.read_log(tmp_path / 'log.txt')] == epochs


def test_published_logs_are_read(tmp_path):
    line = 'json_stats: {"at_losses": [[0.0012, NaN], [0.002, 0.0001]], "train_loss": Infinity, "depth": 16, "width": 1.0, "classes": 10}'
    (tmp_path / 'log.txt').write_text(f'{line}\n')
    (record,) = utils.read_log(tmp_path / 'log.txt')
    assert (
        record['at_losses'][0][0] == 0.0012
        and math.isnan(record['at_losses'][0][1])
        and record['depth'] == 16
    )


@pytest.mark.parametrize(
    'raw',
    [
        b'',
        b'\n',
        b'\x00\xff\xfe',
        LINE[:-1].encode(),
        b'json_stats: ' + b'[' * 100_000,
        b'json_stats: null',
    ],
)
def test_a_log_without_a_whole_line_is_refused(raw, tmp_path):
    (tmp_path / 'log.txt').write_bytes(raw)
    with pytest.raises(UserError, match=r'log\.txt'):
        utils.read_log(tmp_path / 'log.txt')
    with pytest.raises(UserError, match='No such file'):
        utils.read_log(tmp_path / 'none.txt')


@settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.integers(0, 60).map(lambda n: LINE[:n].encode()),
            st.just(LINE.encode() + b'\n'),
        )
    )
)
def test_a_damaged_log_is_read_or_refused_never_a_crash(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / 'damaged.txt'
    path.write_bytes(b''.join(parts))
    try:
        records = utils.read_log(path)
    except UserError as e:
        assert str(path) in str(e)
    else:
        assert records and all(isinstance(r, dict) for r in records)


def test_our_lines_are_strict_json():
    record = {'epoch': 1, 'classes': ['ä', '\u2028'], 'x': None}
    line = utils.json_stats(record)
    assert (
        '\n' not in line
        and line.isascii()
        and json.loads(line.removeprefix('json_stats: ')) == record
    )
    with pytest.raises(ValueError):
        utils.json_stats({'x': math.nan})


def a_checkpoint(scale=1.0):
    params = {
        'fc.weight': scale * randn(3, 4),
        'conv0': scale * randn(2, 3, 3, 3),
        'bn.running_mean': torch.zeros(2),
        'bn': torch.ones(1),
    }
    return {
        'params': params,
        'optimizer': {},
        'epoch': 2,
        'step': 0,
        'sums': [],
        'options': {},
        'log': [LINE, LINE],
        'facts': {},
        'random': {},
    }


def inode(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_log_and_model_are_made_to_agree_with_the_checkpoint(tmp_path):
    log, model = tmp_path / 'log.txt', tmp_path / 'model.hkl'
    checkpoint = a_checkpoint()
    utils.save_run(tmp_path, checkpoint)
    assert sorted(os.listdir(tmp_path)) == ['checkpoint.pt', 'log.txt', 'model.hkl']
    whole = log.read_bytes(), model.read_bytes()
    assert log.read_text() == f'{LINE}\n{LINE}\n'
    before = inode(log), inode(model)
    utils.sync_folder(tmp_path, checkpoint)
    assert (inode(log), inode(model)) == before, 'what agrees is not touched'
    log.write_text(f'{LINE}\n{LINE}\n{LINE}\n'), model.unlink()
    utils.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole
    log.unlink(), utils.save_params(model, a_checkpoint(2.0)['params'])
    utils.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole
    model.write_bytes(whole[1][:-100])
    utils.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole


def test_a_checkpoint_comes_back_and_is_checked(tmp_path):
    utils.save_run(tmp_path, a_checkpoint())
    for path in tmp_path, tmp_path / 'checkpoint.pt':
        again = utils.load_checkpoint(path)
        assert again['log'] == [LINE, LINE] and torch.equal(
            again['params']['conv0'], a_checkpoint()['params']['conv0']
        )
    raw = (tmp_path / 'checkpoint.pt').read_bytes()
    for n in 0, 10, len(raw) // 2, len(raw) - 1:
        (tmp_path / 'checkpoint.pt').write_bytes(raw[:n])
        with pytest.raises(UserError, match=r'checkpoint\.pt'):
            utils.load_checkpoint(tmp_path)
    odd = [
        {'epoch': 'two'},
        {'epoch': True},
        {'epoch': -1},
        {'log': [5]},
        {'params': {'conv0': 'x'}},
    ]
    for content in [1], {'params': {}}, *(a_checkpoint() | change for change in odd):
        torch.save(content, tmp_path / 'checkpoint.pt')
        with pytest.raises(UserError, match=r'checkpoint\.pt'):
            utils.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match='no such file'):
        utils.load_checkpoint(tmp_path / 'none')


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from(sorted(utils.CHECKPOINT_TYPES)),
    value=st.none()
    | st.integers()
    | st.text()
    | st.lists(st.integers() | st.text(), max_size=3)
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3),
)
def test_a_changed_checkpoint_is_refused_or_goes_on_never_a_crash(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / 'changed'
    folder.mkdir(exist_ok=True)
    torch.save(a_checkpoint() | {key: value}, folder / 'checkpoint.pt')
    opt, given_ = a_parser().parse([])
    w = torch.zeros(2, requires_grad=True)
    try:
        checkpoint = utils.load_checkpoint(folder)
        utils.continue_options(opt, given_, checkpoint, a_parser())
        utils.check_facts({'data': 0, 'teacher': 0}, checkpoint)
        utils.load_optimizer(torch.optim.SGD([w], 0.1), checkpoint)
        utils.check_params(checkpoint['params'], a_checkpoint()['params'], 'it')
    except UserError as e:
        assert str(e)


def test_momentum_of_another_shape_is_refused():
    w, other = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([other], 0.1, momentum=0.9)
    other.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(UserError, match='does not fit'):
        fresh = torch.optim.SGD([w], 0.1, momentum=0.9)
        utils.load_optimizer(fresh, {'optimizer': optimizer.state_dict()})


def test_a_folder_that_another_process_has_trained_in_is_left_alone(tmp_path):
    with utils.open_folder(tmp_path / 'run', None):
        utils.save_run(tmp_path / 'run', a_checkpoint())
    for other in None, a_checkpoint() | {'epoch': 1}, a_checkpoint() | {'step': 3}:
        with (
            pytest.raises(UserError, match='meanwhile'),
            utils.open_folder(tmp_path / 'run', other),
        ):
            pytest.fail('it was opened')
    with utils.open_folder(tmp_path / 'run', a_checkpoint()):
        pass


def test_options_of_a_continued_run_are_its_own_unless_given():
    parser = a_parser()
    parser.add_argument('--depth', default=10, type=utils.number(int, 1))
    old = {'lr': 0.3, 'epochs': 200, 'depth': 16, 'gone': 3, 'save': 'a', 'cuda': True, 'seed': 4}
    opt, given = parser.parse(['--epochs', '300', '--save', 'b', '--device', 'cpu'])
    utils.continue_options(opt, given, {'options': old}, parser)
    # A device that is named takes the place of all that the run said of devices.
    assert (opt.lr, opt.epochs, opt.depth, opt.save) == (0.3, 300, 16, 'b')
    assert (opt.seed, opt.device, opt.cuda) == (4, 'cpu', False)
    opt, given = parser.parse(['--depth', '22'])
    with pytest.raises(UserError, match='--depth 22 differs from the run, which has 16'):
        utils.continue_options(opt, given, {'options': old}, parser)
    for name, value in ('lr', '0.3'), ('lr', -1), ('seed', 1.5), ('cuda', 'yes'), ('dtype', 'half'):
        opt, given = parser.parse([])
        with pytest.raises(UserError, match=f'impossible --{name}'):
            utils.continue_options(opt, given, {'options': old | {name: value}}, parser)


def test_compile_can_be_switched_off_again():
    parser = a_parser()
    opt, given = parser.parse(['--no-compile'])
    utils.continue_options(opt, given, {'options': {'compile': True, 'tensorboard': True}}, parser)
    assert opt.compile is False and opt.tensorboard is True


@pytest.mark.parametrize('argv', [['--evaluate', ''], ['--save='], ['--resume', '']])
def test_an_empty_value_is_refused(argv):
    parser = a_parser()
    with pytest.raises(UserError, match=argv[0].strip('=')):
        parser.parse(argv)


def test_a_folder_to_write_in_is_checked_without_making_it(tmp_path):
    utils.check_writable(tmp_path / 'a' / 'b')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='too long'):
        utils.check_writable(tmp_path / ('x' * 300))
    for path in tmp_path / 'file', tmp_path / 'file' / 'b', tmp_path / 'dangling':
        with pytest.raises(UserError, match='is not a folder'):
            utils.check_writable(path)


def test_crc_follows_every_byte_and_no_memory_layout():
    x = randn(3, 2, 2, 2)
    y = x.clone()
    assert (
        utils.checksum([x])
        == utils.checksum([y])
        == utils.checksum([x.contiguous(memory_format=torch.channels_last)])
    )
    y.view(torch.uint8)[2, 1, 1, 7] ^= 1
    assert utils.checksum([x]) != utils.checksum([y])


def test_mistakes_are_one_line_and_exit_status_2(capsys):
    def main(argv):
        raise UserError('two\nlines')

    assert utils.call_main(main) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith('error: two lines')
    assert utils.call_main(lambda argv: None) == 0


# ------------------------ options


@pytest.mark.parametrize(
    'kind, bounds, good, bad',
    [
        (
            int,
            {'low': 1},
            {'1': 1, '200': 200},
            ['0', '-1', '1.5', '1e3', '', 'x', 'nan', 'inf', '9' * 5000, '9' * 400],
        ),
        (
            float,
            {'above': 0},
            {'1e+3': 1e3, '.5': 0.5},
            ['0', '-1', 'nan', 'inf', '-inf', '1e999', '', '1,5', '0x1'],
        ),
        (
            float,
            {'low': 0, 'high': 1},
            {'0': 0.0, '1': 1.0, '0.9': 0.9},
            ['-0.1', '1.1', 'nan', 'inf'],
        ),
    ],
)
def test_numbers_are_finite_and_inside_their_bounds(kind, bounds, good, bad):
    parse = utils.number(kind, **bounds)
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as e:
            parse(text)
        assert ('a whole number' if kind is int else 'a number') in str(e.value)


def test_epoch_lists_are_rising_positive_whole_numbers():
    assert utils.rising_epochs('[60,120,160]') == [60, 120, 160]
    assert utils.rising_epochs('[]') == []
    for text in [
        '60',
        '[0]',
        '[-1]',
        '[2,1]',
        '[1,1]',
        '[1.0]',
        '[true]',
        '["1"]',
        '[[1]]',
        '[1',
        '',
        'null',
        '{}',
        '[' * 100_000,
        '[NaN]',
        '[1e999]',
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match='rising positive'):
            utils.rising_epochs(text)


@pytest.mark.parametrize(
    'epochs, steps',
    [
        (200, [60, 120, 160]),
        (10, [4, 7, 9]),
        (100, [31, 61, 81]),
        (400, [119, 239, 319]),
        (20, [7, 13, 17]),
    ],
)
def test_published_drops_are_scaled_so_that_each_rate_keeps_its_share(epochs, steps):
    assert utils.scaled_steps([60, 120, 160], 200, epochs) == steps


def a_parser():
    parser = utils.Parser('A test.')
    utils.add_training_options(
        parser,
        batch_size=128,
        lr=0.1,
        epochs=200,
        weight_decay=5e-4,
        epoch_step=[60, 120, 160],
        lr_decay_ratio=0.2,
    )
    return parser


def test_the_parser_tells_what_was_given():
    opt, given_ = a_parser().parse(['--lr=0.1', '--epoch_step', '[2,3]', '--cuda', '--resume'])
    assert given_ == {'lr', 'epoch_step', 'cuda', 'resume'}
    assert opt.lr == 0.1 and opt.epoch_step == [2, 3] and opt.resume is True and opt.epochs == 200
    assert a_parser().parse(['--resume', 'logs/x'])[0].resume == 'logs/x'
    assert a_parser().parse([])[1] == set()


@pytest.mark.parametrize(
    'argv, word',
    [
        (['--nonsense', '1'], 'nonsense'),
        (['--epoch', '3'], 'epoch'),  # no abbreviations: is it epochs or epoch_step?
        (['stray'], 'stray'),
        (['--lr'], 'lr'),
        (['--lr', '-1'], 'lr'),
        (['--batch_size', '0'], 'batch_size'),
        (['--epochs', '-1'], 'epochs'),
        (['--epochs', '9' * 400], 'epochs'),
        (['--dtype', 'half'], 'dtype'),
        (['--device', 'tpu'], 'device'),
        (['--gpu_id', 'a'], 'gpu_id'),
        (['--gpu_id', '0,'], 'gpu_id'),
        (['--ngpu', '0'], 'ngpu'),
        (['--weight_decay', 'nan'], 'weight_decay'),
        (['--epoch_step', '[3,2]'], 'epoch_step'),
    ],
)
def test_a_malformed_option_is_named_in_one_line(argv, word):
    with pytest.raises(UserError, match=word) as e:
        a_parser().parse(argv)
    assert '\n' not in str(e.value) and e.value.status == 2


OPTIONS = [
    '--lr',
    '--batch_size',
    '--epochs',
    '--epoch_step',
    '--resume',
    '--save',
    '--dtype',
    '--gpu_id',
    '--cuda',
    '--seed',
    '--no',
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(OPTIONS),
            st.text(max_size=8),
            st.integers().map(str),
            st.floats().map(str),
        )
    )
)
def test_no_command_line_crashes_the_parser(argv):
    if any(word in ('-h', '--help') for word in argv):
        return
    try:
        opt, given_ = a_parser().parse(argv)
    except UserError:
        return
    assert given_ <= set(vars(opt)) and opt.lr > 0 and opt.batch_size >= 1


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as e:
        a_parser().parse(['--help'])
    assert e.value.code == 0 and '--weight_decay' in capsys.readouterr().out
