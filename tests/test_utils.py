"""utils.py: the losses against their formulas in float64, and what nets and optimizers share."""

import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from programs import run_script
from samples import randn

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


@pytest.mark.parametrize('p, kind', [(2, 'mean'), (2, ''), (0, 'sum'), (-1, 'max')])
def test_a_map_that_does_not_exist_is_refused(p, kind):
    x = torch.ones(2, 3, 4, 4)
    for call in lambda: utils.at(x, p, kind), lambda: utils.at_loss(x, x, p, kind):
        with pytest.raises(ValueError, match=f'map {kind!r} with p {p}'):
            call()


def test_at_loss_pools_the_means_before_it_normalises():
    x, y = randn(2, 3, 4, 4, seed=1).abs() ** 3, randn(2, 3, 2, 2, seed=2)
    normalised_first = pooled(normalized(map_of(x.numpy(), 2)).reshape(2, 4, 4), 2, 2)
    wrong = ((normalised_first.reshape(2, -1) - normalized(map_of(y.numpy(), 2))) ** 2).mean()
    channels_first = loss_of(F.avg_pool2d(x, 2).numpy(), y.numpy(), 2)
    value = float(utils.at_loss(x, y))
    assert math.isclose(value, loss_of(x.numpy(), y.numpy(), 2), rel_tol=1e-4)
    assert abs(value - wrong) > 0.01 * value and abs(value - channels_first) > 0.01 * value


def test_beta_times_at_loss_is_the_published_sum_over_map_and_batch():
    x, y = randn(5, 3, 4, 7, seed=1), randn(5, 6, 4, 7, seed=2)
    difference = normalized(map_of(x.numpy(), 2)) - normalized(map_of(y.numpy(), 2))
    # "10^3 divided by the number of elements in attention map and batch size"
    beta = 1e3 / (4 * 7) / 5
    assert math.isclose(1e3 * utils.at_loss(x, y), beta * (difference**2).sum(), rel_tol=1e-4)


@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1, 1e3, 1e6])
@pytest.mark.parametrize('p', [1, 2, 4, 64])
def test_at_loss_ignores_scale(scale, p):
    x, y = randn(3, 4, 5, 5, seed=1), randn(3, 4, 5, 5, seed=2)
    expected, zero = utils.at_loss(x, y, p), torch.tensor(0.0)
    torch.testing.assert_close(utils.at_loss(scale * x, y, p), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(utils.at_loss(x, scale * y, p), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(utils.at_loss(scale * x, x, p), zero, rtol=0, atol=1e-11)


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
    assert torch.autograd.gradgradcheck(lambda x, y: utils.at_loss(x, y, p), (x, y), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: utils.at(x, p), x)
    assert torch.autograd.gradgradcheck(lambda x: utils.at(x, p), x, fast_mode=True)


@pytest.mark.parametrize('p', [2, 4])
def test_second_derivatives_are_right_where_activations_are_exactly_zero(p):
    # |x|^p is smooth at 0 for an even p, and after a ReLU half of all activations are 0.
    x = randn(2, 3, 3, 3, seed=1, dtype=torch.float64)
    x = (x * (x > -0.3)).requires_grad_()
    y = randn(2, 3, 3, 3, seed=2, dtype=torch.float64)
    assert (x == 0).sum() > 5
    assert torch.autograd.gradcheck(lambda x: utils.at_loss(x, y, p), x)
    assert torch.autograd.gradgradcheck(lambda x: utils.at_loss(x, y, p), x, fast_mode=True)


def test_a_power_below_1_has_a_gradient_where_activations_are_exactly_zero():
    x = torch.tensor([0.0, 1.0, 4.0, 9.0]).view(1, 1, 2, 2).requires_grad_()
    q = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(utils.at(x, 0.5)[0], q / q.norm())
    (gradient,) = torch.autograd.grad(utils.at_loss(x, torch.ones(1, 1, 2, 2), 0.5), x)
    assert gradient.isfinite().all() and gradient[0, 0, 0, 0] == 0 and gradient.abs().max() > 0
    assert torch.equal(utils.at(torch.zeros(1, 2, 2, 2), 0.5), torch.zeros(1, 4))


def zeros_and_one_zero_sample():
    one, tiny, single = (
        randn(3, 4, 5, 5, seed=3),
        randn(3, 4, 5, 5, seed=3),
        torch.zeros(3, 4, 5, 5),
    )
    one[1], single[:, 0, 2, 2] = 0, 5
    tiny[0] *= 1e-10
    cases = {'all zero': torch.zeros(3, 4, 5, 5), 'one zero sample': one}
    return cases | {'a tiny sample': tiny, 'single': single}


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
    loss = loss_of(x.double().numpy(), y.double().numpy(), p)
    assert math.isclose(utils.at_loss(x, y, p), loss, rel_tol=1e-4)


def test_bfloat16_gradients_are_rounded_once():
    x, y = randn(4, 8, 4, 4, seed=1).bfloat16(), randn(4, 8, 4, 4, seed=2).bfloat16()
    gradients = []
    for dtype in torch.bfloat16, torch.float64:
        z = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(utils.at_loss(z, y.to(dtype)), z)[0].double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-8, atol=1e-9)


def test_student_and_teacher_maps_may_differ_in_dtype():
    x, y = randn(2, 3, 4, 4, seed=1).bfloat16(), randn(2, 3, 4, 4, seed=2)
    expected = loss_of(x.double().numpy(), y.numpy(), 2)
    assert math.isclose(utils.at_loss(x, y), expected, rel_tol=1e-4)


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
    assert torch.autograd.gradgradcheck(
        lambda x, y: utils.at_loss(x, y, p, 'max'), (x, y), fast_mode=True
    )


# ------------------------ full activations


@pytest.mark.parametrize('b', [(2, 3, 4, 6), (2, 5, 4, 6), (2, 5, 2, 3), (2, 3, 8, 3)])
def test_factt_loss_is_its_formula(b):
    x, y, w = randn(2, 3, 4, 6, seed=1), randn(*b, seed=2), randn(b[1], 3, 1, 1, seed=3)
    weight = w if b[1] != 3 else None
    z = x.double().numpy()
    if weight is not None:
        z = np.einsum('oi,bihw->bohw', w.double().numpy()[:, :, 0, 0], z)
    h, width = min(4, b[2]), min(6, b[3])
    small = [pooled(v.reshape(-1, *v.shape[2:]), h, width) for v in (z, y.double().numpy())]
    rows = [normalized(v.reshape(2, -1)) for v in small]
    # The squared distance of two unit vectors, divided by the positions of a map.
    expected = np.mean(((rows[0] - rows[1]) ** 2).sum(1)) / (h * width)
    assert math.isclose(utils.factt_loss(x, y, weight), expected, rel_tol=1e-4)
    wide = [v if v is None else v.double().requires_grad_() for v in (x, y, weight)]
    wide = [v for v in wide if v is not None]
    assert math.isclose(utils.factt_loss(*wide).item(), expected, rel_tol=1e-10)
    assert torch.autograd.gradcheck(utils.factt_loss, wide)
    assert torch.autograd.gradgradcheck(utils.factt_loss, wide, fast_mode=True)


def test_factt_loss_sees_what_maps_do_not():
    x = randn(3, 4, 5, 5)
    assert utils.factt_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-12)
    assert utils.at_loss(x, -x).item() == 0
    assert utils.factt_loss(x, -x).item() == pytest.approx(4 / 25)
    assert utils.factt_loss(x.bfloat16(), -x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('loss', [utils.at_loss, utils.factt_loss])
def test_losses_leave_channels_last_activations_where_they_are(loss):
    """Otherwise the gradient of the net is copied to another memory layout in every step."""
    x, y = (randn(3, 4, 5, 6, seed=s).contiguous(memory_format=torch.channels_last) for s in (1, 2))
    (grad,) = torch.autograd.grad(loss(x.requires_grad_(), y), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


# ------------------------ gradients of the input


def small_net(seed=0):
    """(a smooth net for [B, 3, 4, 4] with one group, its parameters), in float64."""
    params = [randn(6, 3, 3, 3, seed=seed, dtype=torch.float64) / 3]
    params.append(randn(5, 6, seed=seed + 1, dtype=torch.float64))
    params = [p.requires_grad_() for p in params]

    def f(x):
        group = torch.tanh(F.conv2d(x, params[0], padding=1))
        return F.linear(group.mean((2, 3)), params[1]), (group,)

    return f, params


def differences(f, x, step=1e-6):
    """The gradient of the scalar f at x by central differences."""
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
    for image, target, row in zip(x.split(1), targets.split(1), J.split(1)):
        expected = differences(lambda v, t=target: cross_entropies(f(v)[0], t).sum(), image)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-8)
    with torch.no_grad():  # a teacher is run without gradients
        torch.testing.assert_close(utils.input_gradient(f, x, targets)[2], J)


GRADIENT_LOSSES = {
    'grad': lambda J, J_t, J_flipped: utils.gradient_loss(J, J_t),
    'sym': lambda J, J_t, J_flipped: utils.symmetry_loss(J, J_flipped),
    'minl2': lambda J, J_t, J_flipped: utils.min_l2_loss(J),
}


@pytest.mark.parametrize('method', GRADIENT_LOSSES)
def test_losses_of_the_input_gradient_and_their_derivatives(method):
    """The value is the formula of J by finite differences. The derivative by a weight, which is a
    second derivative, is compared with finite differences too."""
    (f, params), (f_t, _) = small_net(), small_net(seed=7)
    x, targets = randn(2, 3, 4, 4, seed=4, dtype=torch.float64), torch.tensor([1, 3])

    def J_of(f, x):
        return differences(lambda v: cross_entropies(f(v)[0], targets).sum(), x, 1e-5)

    J, other = J_of(f, x), torch.zeros_like(x)
    if method == 'grad':
        other = J_of(f_t, x)
    elif method == 'sym':
        mirror = [3, 2, 1, 0]  # its columns
        other = J_of(f, x[..., mirror])[..., mirror]
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
        assert torch.autograd.gradgradcheck(loss, (J, other), fast_mode=True)
    assert torch.autograd.gradcheck(utils.min_l2_loss, J)
    assert utils.symmetry_loss(J, J.flip(3)) == 0 < utils.symmetry_loss(J, J)


# ------------------------ distillation


@pytest.mark.parametrize('T', [1, 4.0, 20])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 0.9, 1.0])
def test_distillation_is_its_formula(T, alpha):
    y, t = 5 * randn(6, 10, seed=1), 5 * randn(6, 10, seed=2)
    labels = torch.tensor([0, 3, 9, 9, 1, 4])
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
    for check in torch.autograd.gradcheck, torch.autograd.gradgradcheck:
        assert check(lambda y, t: utils.distillation(y, t, labels, 4, 0.9), inputs)


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


# ------------------------ recipe


def test_beta_goes_to_zero_by_the_last_epoch():
    def betas(decay, epochs=5, steps=(3, 4)):
        opt = argparse.Namespace(beta=8.0, beta_decay=decay, epochs=epochs, epoch_step=list(steps))
        return [utils.epoch_beta(e, opt) for e in range(1, epochs + 1)]

    assert betas('none') == [8] * 5
    assert betas('linear') == pytest.approx([8, 6, 4, 2, 0])
    half = math.sqrt(0.5)
    assert betas('cosine') == pytest.approx([8, 4 + 4 * half, 4, 4 - 4 * half, 0])
    assert betas('step') == [8, 8, 4, 0, 0]
    assert betas('step', steps=(2, 3, 90)) == [8, 4, 0, 0, 0]  # epoch 90 never comes
    assert betas('linear', epochs=1) == betas('cosine', epochs=1) == [8]


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


# ------------------------ several devices


def test_losses_of_devices_become_their_mean_weighted_by_samples():
    outputs = [torch.tensor(1.0), torch.tensor(4.0)]
    assert utils.gather_outputs(outputs, [3, 1], 'cpu').item() == pytest.approx(1.75)
    assert utils.gather_outputs(outputs, [64, 64], 'cpu').item() == pytest.approx(2.5)
    sevens = utils.gather_outputs([torch.tensor(7.0)] * 3, [50, 50, 28], 'cpu')
    assert sevens.item() == pytest.approx(7)


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
    # A student without a teacher: (logits, None, []).
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
    """torch.nn.parallel's Broadcast on the CPU: copies[i * n + k] is that of tensor k for device
    i."""

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
    # Copies on the CPU replace the transport between GPUs.
    def scatter(inputs, ids):
        return [[x] for x in inputs[0].chunk(len(ids))]

    def parallel_apply(fs, inputs, devices):
        assert len(fs) == len(inputs) == len(devices), 'as torch demands'
        return [f(*i) for f, i in zip(fs, inputs)]

    monkeypatch.setattr(utils, 'Broadcast', Copies)
    monkeypatch.setattr(utils, 'scatter', scatter)
    monkeypatch.setattr(utils, 'parallel_apply', parallel_apply)

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


# ------------------------ parameters


def test_cast_keeps_names_and_nesting():
    params = {'a': torch.ones(2), 'b': {'c': torch.zeros(1, dtype=torch.float64)}}
    dtypes = {'float': torch.float32, 'bfloat16': torch.bfloat16}
    dtypes |= {'double': torch.float64, 'long': torch.int64}
    for name, dtype in dtypes.items():
        c = utils.cast(params, name)
        assert list(c) == ['a', 'b'] and c['a'].dtype == c['b']['c'].dtype == dtype
    assert utils.cast(torch.ones(2)).dtype == torch.float32
    assert params['b']['c'].dtype == torch.float64


def test_flatten_joins_names_with_dots_in_order():
    nested = {'z': 1, 'a': {'c': {'y': 2, 'x': 3}, 'n': None}, 'e': {}, 'b': 0}
    assert list(utils.flatten(nested).items()) == [('z', 1), ('a.c.y', 2), ('a.c.x', 3), ('b', 0)]


def test_parameter_makers_have_published_shapes():
    assert utils.conv_params(3, 5).shape == (5, 3, 1, 1)
    assert utils.conv_params(3, 5, k=3).shape == (5, 3, 3, 3)
    linear = utils.linear_params(4, 7)
    assert linear['weight'].shape == (7, 4) and torch.equal(linear['bias'], torch.zeros(7))
    bn = utils.bnparams(6)
    assert list(bn) == ['weight', 'bias', 'running_mean', 'running_var']
    assert all(v.shape == (6,) for v in bn.values())


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
        ours, theirs = params[f'g.bn.{name}'], getattr(module, name)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = params['g.bn.weight'].grad, module.weight.grad
    torch.testing.assert_close(ours, theirs, rtol=3 * tolerance, atol=3 * tolerance)


def test_compiled_batch_norm_keeps_its_statistics_wide():
    """With mean and 1/std in bfloat16 the weight's gradient would be 1 % off that in float64."""
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
    names = 'conv0 bn.weight bn.bias bn.running_mean teacher.bn.running_var fc.bias'
    params = {k: torch.zeros(1) for k in names.split()}
    utils.set_requires_grad_except_bn_(params)
    trained = [k for k, v in params.items() if v.requires_grad]
    assert trained == ['conv0', 'bn.weight', 'bn.bias', 'fc.bias']


def test_print_tensor_dict_says_all_of_each_tensor(capsys):
    conv0 = torch.zeros(16, 3, 3, 3, requires_grad=True)
    utils.print_tensor_dict({'conv0': conv0, 'bn.running_mean': torch.zeros(16)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['0', 'conv0', '(16,', '3,', '3,', '3)', 'torch.FloatTensor', 'True']
    assert lines[1].split() == ['1', 'bn.running_mean', '(16,)', 'torch.FloatTensor', 'False']
    utils.print_tensor_dict({})


@pytest.mark.parametrize('channels', [1, 4, 7, 8, 15, 16])
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


def test_strided_convolutions_of_few_channels_neither_crash_nor_differ_from_float64(tmp_path):
    done = run_script('tests/strided_convolutions.py', cwd=tmp_path)
    assert done.returncode == 0, f'status {done.returncode}: {done.stderr[-2000:]}'
