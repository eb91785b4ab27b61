"""Losses against per-pixel loops; the optimiser's groups and schedule."""

import math

import pytest
import torch

from common.deeplab import DeepLabV3Plus
from common.losses import cross_entropy, ohem_cross_entropy
from common.optim import poly_lr, sgd_poly

B, K, H, W = 2, 5, 4, 6


def inputs(void=0.2):
    x = torch.randn(B, K, H, W, dtype=torch.float64, requires_grad=True)
    y = torch.randint(K, (B, H, W))
    return x, torch.where(torch.rand(B, H, W) < void, 255, y)


def pixels(x, y):
    """(-log p, p) of the true class at each valid pixel."""
    found = []
    for b in range(B):
        for i in range(H):
            for j in range(W):
                if y[b, i, j] != 255:
                    p = x[b, :, i, j].exp()[y[b, i, j]] / x[b, :, i, j].exp().sum()
                    found.append((-p.log(), float(p.detach())))
    return found


def reference_ohem(x, y, threshold, min_kept):
    """Sort the probabilities; keep those up to max(threshold, the min_kept-th smallest)."""
    found = pixels(x, y)
    if len(found) >= min_kept > 0:
        threshold = max(threshold, sorted(p for _, p in found)[min_kept - 1])
    kept = [loss for loss, p in found if p <= threshold or len(found) < min_kept]
    return sum(kept) / len(kept) if kept else 0 * x.sum()


def same(ours, reference, x):
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    ours, reference = (torch.autograd.grad(loss, x)[0] for loss in (ours, reference))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_cross_entropy():
    x, y = inputs()
    found = pixels(x, y)
    same(cross_entropy(x, y), sum(loss for loss, _ in found) / len(found), x)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_nothing_valid_is_zero_with_zero_gradient(loss):
    x, y = inputs(void=2)
    value = loss(x, y)
    assert value.item() == 0 and (torch.autograd.grad(value, x)[0] == 0).all()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("min_kept", [0, 1, 10, 30, B * H * W, B * H * W + 1, 10**6])
def test_ohem(threshold, min_kept):
    for void in (0.0, 0.2, 0.7):
        x, y = inputs(void)
        reference = reference_ohem(x, y, threshold, min_kept)
        same(ohem_cross_entropy(x, y, threshold, min_kept), reference, x)


def test_ohem_where_as_many_are_valid_as_must_be_kept():
    x, y = inputs(0.5)
    valid = int((y != 255).sum())
    for min_kept in (valid - 1, valid, valid + 1):
        same(ohem_cross_entropy(x, y, 0.1, min_kept), reference_ohem(x, y, 0.1, min_kept), x)
    torch.testing.assert_close(ohem_cross_entropy(x, y, 0.1, valid), cross_entropy(x, y))


def test_ohem_gives_dropped_and_void_pixels_no_gradient():
    x, y = inputs()
    grad = torch.autograd.grad(ohem_cross_entropy(x, y, 0.2, 5), x)[0].abs().sum(1)
    p = x.detach().softmax(1).gather(1, y.clamp(max=K - 1)[:, None])[:, 0]
    limit = max(0.2, p[y != 255].sort().values[4].item())
    dropped = (y == 255) | (p > limit)
    assert 0 < dropped.sum() < dropped.numel()
    assert (grad[dropped] == 0).all() and (grad[~dropped] > 0).all()


def test_poly_lr_has_the_published_values():
    assert 0.01 * poly_lr(0, 39338) == 0.01
    assert 0.01 * poly_lr(39338 // 2, 39338) == pytest.approx(0.0053589, abs=1e-7)
    assert 0.01 * poly_lr(39337, 39338) == pytest.approx(7.32e-7, rel=1e-3)


def test_schedule_is_the_formula():
    optimizer, schedule = sgd_poly([torch.nn.Linear(2, 2)], lr=0.3, weight_decay=0.1, iters=50)
    for step in range(50):
        for group in optimizer.param_groups:
            assert math.isclose(group["lr"], 0.3 * poly_lr(step, 50), rel_tol=1e-9)
        optimizer.step()
        schedule.step()


def test_only_weights_decay():
    net = DeepLabV3Plus(21, "resnet50")
    optimizer, _ = sgd_poly([net], lr=0.1, weight_decay=1e-4, iters=10)
    decay, plain = optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    assert decay["momentum"] == 0.9 and not decay["nesterov"]
    bare = {
        id(p) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()
    }
    bare.add(id(net.classifier.bias))
    assert {id(p) for p in plain["params"]} == bare
    assert len(decay["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_double_averaged_gradients_are_a_smaller_rate_with_more_decay():
    """Dividing each gradient by n with (lr, wd) equals (lr / n, n wd): the recipes' rates."""
    torch.manual_seed(0)
    a = torch.nn.Linear(3, 3, bias=False).double()
    b = torch.nn.Linear(3, 3, bias=False).double()
    b.load_state_dict(a.state_dict())
    (first, s1), (second, s2) = (
        sgd_poly([net], lr=lr, weight_decay=wd, iters=20)
        for net, lr, wd in ((a, 0.01, 1e-4), (b, 0.0025, 4e-4))
    )
    for _ in range(20):
        x = torch.randn(4, 3, dtype=torch.float64)
        for net, optimizer, schedule, factor in ((a, first, s1, 0.25), (b, second, s2, 1.0)):
            optimizer.zero_grad()
            (net(x).square().sum() * factor).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-12, atol=1e-13)
