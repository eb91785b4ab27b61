"""Losses against per-pixel loops; the optimiser's groups and schedule."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.deeplab import DeepLabV3Plus
from common.losses import cross_entropy, ohem_cross_entropy, supervised_criterion
from common.optim import poly_lr, sgd_poly

B, K, H, W = 2, 5, 4, 6


def inputs(void=0.2):
    x = torch.randn(B, K, H, W, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(K, (B, H, W)).masked_fill(torch.rand(B, H, W) < void, 255)


def pixels(x, y):
    """(-log p, p) of the true class at each valid pixel."""
    found = []
    for b, i, j in itertools.product(range(B), range(H), range(W)):
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
    for x, y in map(inputs, (0.0, 0.2, 0.7)):
        reference = reference_ohem(x, y, threshold, min_kept)
        same(ohem_cross_entropy(x, y, threshold, min_kept), reference, x)


def test_ohem_where_as_many_are_valid_as_must_be_kept():
    x, y = inputs(0.5)
    valid = int((y != 255).sum())
    for min_kept in (valid - 1, valid, valid + 1):
        same(ohem_cross_entropy(x, y, 0.1, min_kept), reference_ohem(x, y, 0.1, min_kept), x)
    torch.testing.assert_close(ohem_cross_entropy(x, y, 0.1, valid), cross_entropy(x, y))


def test_ohem_of_a_script_keeps_50_000_pixels_a_picture():
    x, y = torch.rand(1, 2, 250, 250), torch.zeros(1, 250, 250, dtype=torch.int64)
    x[:, 0] += 2  # no pixel is hard
    hardest = F.cross_entropy(x, y, reduction="none").flatten().topk(50_000).values
    torch.testing.assert_close(supervised_criterion(True, batch_size=1)(x, y), hardest.mean())
    for criterion in (supervised_criterion(True, batch_size=2), supervised_criterion(False, 1)):
        torch.testing.assert_close(criterion(x, y), F.cross_entropy(x, y))


def test_poly_lr_has_the_published_values():
    assert 0.01 * poly_lr(0, 39338) == 0.01
    assert 0.01 * poly_lr(39338 // 2, 39338) == pytest.approx(0.0053589, abs=1e-7)
    assert 0.01 * poly_lr(39337, 39338) == pytest.approx(7.32e-7, rel=1e-3)


def test_schedule_is_the_formula():
    optimizer, schedule = sgd_poly([nn.Linear(2, 2)], lr=0.3, weight_decay=0.1, iters=50)
    for step in range(50):
        for group in optimizer.param_groups:
            assert math.isclose(group["lr"], 0.3 * poly_lr(step, 50), rel_tol=1e-9)
        optimizer.step()
        schedule.step()


def test_only_weights_decay():
    net = DeepLabV3Plus(21, "resnet18", width=8)
    optimizer, _ = sgd_poly([net], lr=0.1, weight_decay=1e-4, iters=10)
    decay, plain = optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    assert decay["momentum"] == 0.9 and not decay["nesterov"]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    bare = [net.classifier.bias, *(p for norm in norms for p in norm.parameters())]
    assert {id(p) for p in plain["params"]} == {id(p) for p in bare}
    everything = [id(p) for group in (decay, plain) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in net.parameters())


def test_double_averaged_gradients_are_a_smaller_rate_with_more_decay():
    """Dividing each gradient by n with (lr, wd) equals (lr / n, n wd): the recipes' rates."""
    nets, batches = [], torch.randn(20, 4, 3, dtype=torch.float64)
    for lr, weight_decay, factor in ((0.01, 1e-4, 0.25), (0.0025, 4e-4, 1.0)):
        torch.manual_seed(1)
        nets.append(nn.Linear(3, 3, bias=False).double())
        optimizer, schedule = sgd_poly(nets[-1:], lr, weight_decay, iters=20)
        for x in batches:
            optimizer.zero_grad()
            (nets[-1](x).square().sum() * factor).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("old", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("new", [torch.contiguous_format, torch.channels_last])
def test_momentum_is_resumed_whatever_its_layout(old, new):
    """A checkpoint of another device may have it in another order of memory."""
    weights = torch.randn(4, 3, 3, 3)
    convs, optimizers = [], []
    for layout in (old, new, new):
        conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=layout)
        conv.load_state_dict({"weight": weights})
        convs.append(conv)
        optimizers.append(sgd_poly([conv], lr=0.1, weight_decay=0.0, iters=9)[0])
    x = torch.randn(2, 3, 8, 8)

    def step(index):
        convs[index](x).square().mean().backward()
        optimizers[index].step()
        optimizers[index].zero_grad()

    step(0), step(1)
    convs[2].load_state_dict(convs[0].state_dict())
    optimizers[2].load_state_dict(optimizers[0].state_dict())
    step(1), step(2)
    torch.testing.assert_close(convs[2].weight, convs[1].weight)


def test_a_first_step_that_a_scaler_skips_leaves_no_trace():
    """A fused SGD would leave its momentum undefined: what memory held, here NaN."""
    torch.use_deterministic_algorithms(True)  # `empty` is NaN
    nets = [nn.Conv2d(2, 3, 1) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    scaler = torch.amp.GradScaler("cpu")
    for net, first in zip(nets, (1.0, math.inf), strict=True):
        optimizer, _ = sgd_poly([net], 0.1, 0.01, 10)
        for factor in (first, 1.0)[math.isfinite(first) :]:
            optimizer.zero_grad()
            scaler.scale(factor * net(torch.ones(1, 2, 1, 1)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    for parameter, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(parameter, other)
