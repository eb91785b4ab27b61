"""CAC's loss against loops over anchors and negatives, the crops, the bank, short runs."""

import json
import math
import sys
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trees
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import cac
from common import shapes
from common.augment import MEAN, STD, normalise
from common.deeplab import DeepLabV3Plus
from common.flags import parse_config
from common.optim import poly_lr
from common.run import Run

same = lambda image: image  # noqa: E731


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def draw(anchors=40, negatives=50, dims=6, classes=4):
    """The loss's arguments in float64; a third of the anchors or so is active."""
    return dict(
        anchor=unit(anchors, dims).requires_grad_(),
        target=unit(anchors, dims).requires_grad_(),
        anchor_conf=torch.rand(anchors, dtype=torch.float64) ** 0.5,
        target_conf=torch.rand(anchors, dtype=torch.float64) ** 0.5,
        anchor_labels=torch.randint(classes, (anchors,)),
        negatives=unit(negatives, dims).requires_grad_(),
        negative_labels=torch.randint(classes, (negatives,)),
    )


def value_and_gradient(loss):
    """A function of the loss's arguments -> its value and the anchors' gradient."""

    def both(anchor, *others, **named):
        value = loss(anchor, *others, **named)
        return value.detach(), torch.autograd.grad(value, anchor)[0]

    return both


ours = value_and_gradient(cac.directional_contrastive_loss)


def by_loop(
    anchor,
    target,
    anchor_conf,
    target_conf,
    anchor_labels,
    negatives,
    negative_labels,
    tau=0.1,
    gamma=0.75,
    directed=True,
    class_filter=True,
):
    """One direction as the paper writes it, anchor by anchor and negative by negative."""
    total, active = anchor.sum() * 0, 0
    for i in range(len(anchor)):
        taught = target_conf[i] > gamma
        if directed:
            taught = taught and anchor_conf[i] < target_conf[i]
        if not taught:
            continue
        positive = torch.exp(anchor[i] @ target[i].detach() / tau)
        others = 0.0
        for negative, label in zip(negatives.detach(), negative_labels, strict=True):
            if not class_filter or label != anchor_labels[i]:
                others = others + torch.exp(anchor[i] @ negative / tau)
        total = total - torch.log(positive / (positive + others))
        active += 1
    return total / max(active, 1)


def alone(cosine, negative_cosines, label=1):
    """The loss of one anchor, given its cosines with its target and its negatives."""
    angles = torch.tensor([cosine, *negative_cosines], dtype=torch.float64).acos()
    others = torch.stack([angles.cos(), angles.sin()], dim=1)
    return cac.directional_contrastive_loss(
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        others[:1],
        torch.tensor([0.5]),
        torch.tensor([0.9]),
        torch.tensor([0]),
        others[1:],
        torch.full((len(negative_cosines),), label),
    ).item()


# --- Eqs. (1), (2), (5)-(7) ---


@pytest.mark.parametrize("tau, gamma", [(0.1, 0.75), (0.5, 0.3)])
@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("class_filter", [True, False])
def test_the_loss_is_the_loop_over_anchors_and_negatives(tau, gamma, directed, class_filter):
    inputs = draw()
    options = dict(tau=tau, gamma=gamma, directed=directed, class_filter=class_filter)
    value, gradient = ours(**inputs, **options, chunk=7)
    expected, expected_gradient = value_and_gradient(by_loop)(**inputs, **options)
    assert value.shape == () and expected > 0
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_defaults_are_the_papers():
    inputs = draw()
    expected = by_loop(**inputs, tau=0.1, gamma=0.75, directed=True, class_filter=True)
    torch.testing.assert_close(cac.directional_contrastive_loss(**inputs), expected)


def test_the_gradient_is_that_of_finite_differences():
    inputs = draw(9, 11)
    anchor = inputs.pop("anchor")
    loss = lambda anchor: cac.directional_contrastive_loss(anchor, **inputs, chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(loss, anchor)
    scaled = lambda anchor: loss(anchor) ** 2  # noqa: E731  the loss's own gradient is not 1
    assert torch.autograd.gradcheck(scaled, anchor)


def test_the_gradient_is_the_difference_between_expected_and_true_partner():
    inputs = draw()
    anchor, target, negatives = (
        inputs[name].detach() for name in ("anchor", "target", "negatives")
    )
    logits = anchor @ negatives.T / 0.1
    logits[inputs["anchor_labels"][:, None] == inputs["negative_labels"]] = -math.inf
    logits = torch.cat([(anchor * target).sum(1, keepdim=True) / 0.1, logits], dim=1)
    q = logits.softmax(1)
    active = (inputs["target_conf"] > 0.75) & (inputs["anchor_conf"] < inputs["target_conf"])
    expected = (q[:, 1:] @ negatives - (1 - q[:, :1]) * target) / 0.1 / active.sum()
    _, gradient = ours(**inputs)
    torch.testing.assert_close(gradient, expected * active[:, None], rtol=1e-12, atol=1e-12)


def test_neither_chunks_nor_the_order_of_negatives_matter():
    inputs = draw(60, 300)
    expected = ours(**inputs, chunk=300)
    for chunk in (1, 7, 8000, 10**9):
        torch.testing.assert_close(ours(**inputs, chunk=chunk), expected, rtol=1e-12, atol=1e-12)
    order = torch.randperm(300)
    for name in ("negatives", "negative_labels"):
        inputs[name] = inputs[name][order]
    torch.testing.assert_close(ours(**inputs, chunk=7), expected, rtol=1e-12, atol=1e-12)


def test_only_anchors_that_learn_get_a_gradient():
    inputs = draw()
    cac.directional_contrastive_loss(**inputs).backward()
    active = cac.active_anchors(inputs["anchor_conf"], inputs["target_conf"])
    assert inputs["target"].grad is None and inputs["negatives"].grad is None
    gradient = inputs["anchor"].grad
    assert 0 < active.sum() < len(active)
    assert (gradient[~active] == 0).all() and (gradient[active] != 0).any(dim=1).all()


def test_anchors_learn_from_a_more_confident_and_confident_target():
    anchor_conf = torch.tensor([0.1, 0.8, 0.9, 0.8, 0.1, 0.1, 0.95])
    target_conf = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.75, 0.76, 0.9])
    learn = [True, True, False, False, False, True, False]
    assert cac.active_anchors(anchor_conf, target_conf).tolist() == learn
    assert cac.active_anchors(anchor_conf, target_conf, 0.85).sum() == 2
    either = [True, True, True, True, False, True, True]
    assert cac.active_anchors(anchor_conf, target_conf, directed=False).tolist() == either


def test_of_a_pair_at_most_one_side_learns_and_of_a_tie_none():
    first, second = torch.rand(2, 1000)
    second[:100] = first[:100]
    one, other = cac.active_anchors(first, second, 0.0), cac.active_anchors(second, first, 0.0)
    assert not (one & other).any()
    assert torch.equal(one | other, first != second) and not (one | other)[:100].any()


def test_swapping_the_crops_leaves_the_sum_unchanged():
    def both(one, two):
        pool = torch.cat([one["phi"], two["phi"]]), torch.cat([one["label"], two["label"]])
        first = one["phi"], two["phi"], one["conf"], two["conf"], one["label"]
        second = two["phi"], one["phi"], two["conf"], one["conf"], two["label"]
        loss = cac.directional_contrastive_loss
        return loss(*first, *pool) + loss(*second, *pool)

    crops = [
        dict(phi=unit(30, 6), conf=torch.rand(30) ** 0.5, label=torch.randint(4, (30,)))
        for _ in range(2)
    ]
    torch.testing.assert_close(both(*crops), both(*crops[::-1]), rtol=1e-12, atol=0)


def test_without_a_negative_of_another_class_loss_and_gradient_are_exactly_zero():
    for dtype in (torch.float64, torch.float32):
        inputs = draw() | dict(anchor_labels=torch.full((40,), 3))
        inputs["negative_labels"] = torch.full((50,), 3)
        inputs["anchor"] = inputs["anchor"].detach().to(dtype).requires_grad_()
        value, gradient = ours(**inputs, chunk=7)
        assert value == 0 and (gradient == 0).all()
        assert ours(**inputs, class_filter=False)[0] > 0


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_without_a_confident_target_loss_and_gradient_are_exactly_zero(gamma):
    inputs = draw()
    inputs["target_conf"][0] = 1.0
    value, gradient = ours(**inputs, gamma=gamma)
    assert value == 0 and (gradient == 0).all()
    nothing = {k: v[:0] for k, v in inputs.items() if "negative" not in k}  # no overlap
    value, gradient = ours(**(inputs | nothing))
    assert value == 0 and gradient.shape == (0, 6)


def test_without_any_negative_the_loss_is_zero():
    inputs = draw()
    inputs |= dict(negatives=inputs["negatives"][:0], negative_labels=torch.zeros(0).long())
    value, gradient = ours(**inputs)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("count", [1, 100, 6400])
def test_equal_features_give_the_logarithm_of_the_number_of_candidates(count):
    assert alone(1.0, [1.0] * count) == pytest.approx(math.log(1 + count), rel=1e-12)
    assert alone(-1.0, [-1.0] * count) == pytest.approx(math.log(1 + count), rel=1e-12)
    assert alone(1.0, [1.0] * count, label=0) == 0


@pytest.mark.parametrize(
    "count, expected",
    [
        (1, 4.54e-5),
        (100, 4.53e-3),
        (6400, 0.25508),
        (25600, 0.77114),
        (51200, 1.20131),
        (129600, 1.92918),
    ],
)
def test_orthogonal_negatives_give_known_values(count, expected):
    value = alone(1.0, [0.0] * count)
    assert value == pytest.approx(expected, rel=1e-3)
    assert value == pytest.approx(math.log1p(count * math.exp(-10)), rel=1e-10)


@pytest.mark.parametrize("cosine, expected", [(0.5, 5.00672), (0.0, 10.00005), (-1.0, 20.0)])
def test_an_equal_negative_gives_known_values(cosine, expected):
    """Nothing is added to a denominator: at -1 the released code's 1e-8 gives 18.2."""
    assert alone(cosine, [1.0]) == pytest.approx(expected, abs=1e-5)
    assert alone(cosine, [1.0]) == pytest.approx(math.log1p(math.exp(10 * (1 - cosine))), rel=1e-9)


def test_a_small_temperature_overflows_nothing():
    inputs = draw()
    value, gradient = ours(**inputs, tau=1e-4)
    assert value.isfinite() and gradient.isfinite().all()
    assert alone(-1.0, [1.0]) < 21 and value > 1e3


def test_only_anchors_that_learn_count_in_the_mean():
    inputs = draw()
    expected, gradient = ours(**inputs)
    active = cac.active_anchors(inputs["anchor_conf"], inputs["target_conf"])
    per_anchor = ("anchor", "target", "anchor_conf", "target_conf", "anchor_labels")
    kept = inputs | {name: inputs[name][active] for name in per_anchor}
    torch.testing.assert_close(ours(**kept)[0], expected)
    twice = inputs | {name: torch.cat([inputs[name]] * 2) for name in per_anchor}
    value, halves = ours(**twice)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(halves[:40] + halves[40:], gradient)


def test_a_negative_that_joins_the_anchors_class_takes_no_part():
    inputs = draw(1, 50)
    inputs |= dict(anchor_conf=torch.zeros(1), target_conf=torch.ones(1))
    inputs |= dict(anchor_labels=torch.tensor([3]), negative_labels=torch.zeros(50).long())
    before = ours(**inputs)[0]
    for kept in range(40, -1, -10):
        inputs["negative_labels"][kept:] = 3
        value = ours(**inputs)[0]
        rest = {name: inputs[name][:kept] for name in ("negatives", "negative_labels")}
        assert value < before
        if kept:
            torch.testing.assert_close(value, ours(**(inputs | rest))[0])
        before = value
    assert value == 0


def test_half_precision_is_raised_and_autocast_is_off():
    inputs = draw(40, 50)
    phis = ("anchor", "target", "negatives")
    inputs |= {name: inputs[name].detach().bfloat16() for name in phis}
    inputs |= dict(anchor=inputs["anchor"].requires_grad_())
    raised = inputs | {name: inputs[name].detach().float() for name in phis}
    expected = cac.directional_contrastive_loss(**raised)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (raised, inputs):
            value = cac.directional_contrastive_loss(**each)
            assert value.dtype == torch.float32 and value == expected
    value.backward()
    assert inputs["anchor"].grad.dtype == torch.bfloat16
    precise = raised | {name: raised[name].double() for name in phis}
    exact = cac.directional_contrastive_loss(**precise)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_no_matrix_of_anchors_and_negatives_is_made_or_kept():
    """What is made grows with chunk x active anchors; what is kept, with the anchors alone."""
    inputs, kept = draw(400, 5000, dims=2), []
    active = int(cac.active_anchors(inputs["anchor_conf"], inputs["target_conf"]).sum())
    assert 50 < active < 200
    keep = lambda tensor: (kept.append(tensor.numel()), tensor)[1]  # noqa: E731
    for chunk in (200, 400):
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, same):
            cac.directional_contrastive_loss(**inputs, chunk=chunk).backward()
        assert largest.numel == active * chunk
    assert 0 < max(kept) <= 400 * 2


# --- the features ---


class Small(DeepLabV3Plus):
    """The network's cut points in two layers, for tests that need no ResNet."""

    def __init__(self, num_classes, backbone="resnet18", weights=None, width=8, **dropout):
        nn.Module.__init__(self)
        self.arguments = dict(num_classes=num_classes, backbone=backbone, width=width, **dropout)
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width))
        self.decoder = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.classifier_dropout, self.classifier = nn.Identity(), nn.Conv2d(width, num_classes, 1)

    def encode(self, images):
        return self.backbone(images).relu()


def linear(layer, features):
    """A 1x1 convolution at one place."""
    return layer.weight[:, :, 0, 0] @ features + layer.bias


def test_features_are_those_of_each_cell_row_by_row():
    """A cell is 2 x 2 of the decoder's; classes are its logits', at stride 8."""
    network = Small(5)
    net = cac.ContrastiveNet(network, 8).eval()
    images = torch.randn(2, 3, 32, 48)
    ours = net.features(images)
    decoded = network.decode(network.encode(images))
    cells = [(b, y, x) for b in range(2) for y in range(4) for x in range(6)]
    assert ours.phi.shape == (len(cells), 128)
    for index, (b, y, x) in enumerate(cells):
        mean = decoded[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
        probs = linear(network.classifier, mean).softmax(0)
        phi = linear(net.projector[2], linear(net.projector[0], mean).relu())
        torch.testing.assert_close(ours.phi[index], phi / phi.norm())
        torch.testing.assert_close(ours.conf[index], probs.max())
        assert ours.pseudo[index] == probs.argmax()
    assert not ours.conf.requires_grad and ours.phi.requires_grad
    bare = cac.ContrastiveNet(network, 8, project=False).eval().features(images).phi
    pooled = F.avg_pool2d(decoded, 2).permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(bare, pooled / pooled.norm(dim=1, keepdim=True))
    paper = cac.ContrastiveNet(Small(21, width=256), 256).projector
    assert sum(weight.numel() for weight in paper.parameters()) == 98_688


def test_the_contrastive_loss_teaches_all_but_the_classifier():
    network = DeepLabV3Plus(5, "resnet18", width=8)
    net = cac.ContrastiveNet(network, 8)
    _, one, two = net(torch.randn(2, 3, 32, 32), [torch.randn(2, 3, 32, 32) for _ in range(2)])
    negatives = torch.cat([one.phi, two.phi]), torch.cat([one.pseudo, two.pseudo + 1]) % 5
    args = one.phi, two.phi, torch.zeros(32), torch.ones(32), one.pseudo
    cac.directional_contrastive_loss(*args, *negatives).backward()
    assert all(weight.grad is None for weight in network.classifier.parameters())
    for part in (net.projector, network.decoder, network.aspp, network.backbone):
        gradients = [weight.grad for weight in part.parameters() if weight.ndim > 1]
        assert all(gradient is not None for gradient in gradients)
        assert any((gradient != 0).any() for gradient in gradients)


def test_a_supervised_step_gives_the_projector_a_gradient_of_zero():
    """Several processes wait for one of every parameter."""
    net = cac.ContrastiveNet(Small(5), 8)
    images, crops = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    (logits,) = net(images)
    logits.sum().backward()
    assert all((weight.grad == 0).all() for weight in net.projector.parameters())
    assert all((weight.grad != 0).any() for weight in net.network.classifier.parameters())
    again, one, two = net(images, [crops, -crops])
    assert torch.equal(again, logits) and torch.equal(net.network(images), logits)
    assert torch.equal(one.phi, net.features(crops).phi)
    assert torch.equal(two.phi, net.features(-crops).phi)


def test_features_are_float32_under_autocast():
    net = cac.ContrastiveNet(Small(5), 8)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        features = net.features(torch.randn(2, 3, 32, 32))
    assert features.phi.dtype == features.conf.dtype == torch.float32
    torch.testing.assert_close(features.phi.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)
    features.phi[:, 0].sum().backward()
    assert all((weight.grad != 0).any() for weight in net.projector.parameters())


# --- the bank ---


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_pool_is_this_steps_features_and_those_of_the_last_steps(steps):
    bank, given = cac.Bank(steps), []
    for step in range(1000):
        features = torch.full((3, 2), float(step), requires_grad=True)
        pool, labels = bank.extended(features, torch.full((3,), step))
        given.append(step)
        assert sorted(labels.tolist()) == sorted(3 * given[-(steps + 1) :])
        assert torch.equal(pool, labels[:, None].expand(-1, 2).float())
        assert not pool.requires_grad and len(bank.past) == min(step + 1, steps)
    assert not any(tensor.requires_grad for entry in bank.past for tensor in entry)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_bank_is_saved_and_goes_on(steps, tmp_path):
    bank, again = cac.Bank(steps), cac.Bank(steps)
    for _ in range(4):
        bank.extended(torch.randn(5, 3), torch.randint(9, (5,)))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    again.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for _ in range(4):
        current = torch.randn(5, 3), torch.randint(9, (5,))
        for ours, theirs in zip(again.extended(*current), bank.extended(*current), strict=True):
            assert torch.equal(ours, theirs)


# --- two overlapping crops ---


def sizes(crop):
    """A picture's random height and width: below, at and above the crop's side."""
    return [int(torch.randint(1, 3 * crop, ())) for _ in range(2)]


def test_crops_overlap_as_they_should_over_ten_thousand_draws():
    seen = set()
    for index in range(10_000):
        crop, low, high = (32, 48, 96)[index % 3], (0.1, 0.5)[index % 2], (1.0, 0.8)[index % 5 > 2]
        height, width = sizes(crop)
        one, two, common1, common2 = cac.overlapping_crops(height, width, crop, low, high)
        for top, left, bottom, right in (one, two):
            assert (bottom - top, right - left) == (crop, crop) and min(top, left) >= 0
            assert bottom <= max(height, crop) and right <= max(width, crop)
        overlaps = [
            max(min(one[axis + 2], two[axis + 2]) - max(one[axis], two[axis]), 0) for axis in (0, 1)
        ]
        common = overlaps[0] * overlaps[1]
        assert low <= common / (2 * crop**2 - common) <= high or one == two
        for axis, side in ((0, height), (1, width)):
            first, last = common1[axis], common1[axis + 2]
            assert first % 8 == 0 and last % 8 == 0 and 0 <= first <= last <= crop
            assert last - first == common2[axis + 2] - common2[axis]
            assert one[axis] + first == two[axis] + common2[axis] == max(one[axis], two[axis])
            # The largest number of whole cells that are in both crops and in the picture.
            end = min(one[axis + 2], two[axis + 2], side)
            assert one[axis] + last <= end < one[axis] + last + 8
        seen.add((one[0] > two[0], one[0] < two[0], one[1] > two[1], one[1] < two[1], one == two))
    assert len(seen) == 9  # the second crop may lie on every side, or be the first


def test_crops_reach_every_place():
    starts = [cac.overlapping_crops(35, 48, 32, 0.0)[:2] for _ in range(400)]
    for box in (0, 1):
        assert {pair[box][0] for pair in starts} == {0, 1, 2, 3}
        assert {pair[box][1] for pair in starts} == set(range(17))
    moved = {(two[0] - one[0], two[1] - one[1]) for one, two in starts}
    assert moved == {(0, 8 * step) for step in (-2, -1, 0, 1, 2)}


def test_bounds_out_of_reach_give_the_same_crop_twice():
    for height, width, bounds in ((300, 300, (1.0, 1.0)), (32, 20, (0.1, 0.5))):
        for _ in range(50):
            one, two, common1, common2 = cac.overlapping_crops(height, width, 32, *bounds)
            assert one == two and common1 == common2
            assert common1 == (0, 0, min(height // 8 * 8, 32), min(width // 8 * 8, 32))
    far = [cac.overlapping_crops(300, 300, 32, 0.1, 0.5) for _ in range(200)]
    assert sum(one != two for one, two, *_ in far) > 100
    # One try seldom finds an overlap in a large picture, fifty tries mostly do.
    once = [cac.overlapping_crops(300, 300, 32, 0.1, 0.5, tries=1) for _ in range(200)]
    assert sum(one != two for one, two, *_ in once) < 20


def test_crops_apart_have_nothing_in_common():
    apart = 0
    for _ in range(200):
        one, two, *common = cac.overlapping_crops(300, 300, 32, min_iou=0.0)
        sides = [(bottom - top, right - left) for top, left, bottom, right in common]
        assert sides[0] == sides[1] and min(sides[0]) >= 0
        match = cac.counterparts(*common, False, True, 32)
        assert (match >= 0).sum() == sides[0][0] * sides[0][1] / 64
        apart += abs(one[0] - two[0]) >= 32 or abs(one[1] - two[1]) >= 32
    assert apart > 100


def places(height, width):
    """A picture whose pixels say where they are: row, column, and 200 for being one."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 200)]).to(torch.uint8)


def cells_of(view):
    """The least and the greatest value of each channel in each 8 x 8 cell, (cells, 6)."""
    side = view.shape[-1] // 8
    blocks = view.reshape(3, side, 8, side, 8)
    return torch.cat([blocks.amin((2, 4)), blocks.amax((2, 4))]).flatten(1).T


def undone(view):
    """A normalised view's values from 0 to 255."""
    return (
        (view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    ).round()


def pair_of_places(height, width, crop=32, **options):
    side = max(height, width)
    return cac.pair_view(places(height, width), None, crop, side, (1.0, 1.0), same, **options)


def test_counterparts_show_the_same_place_and_none_is_missed():
    flips = []
    for _ in range(300):
        height, width = sizes(32)
        one, two, match = pair_of_places(height, width)
        where = [[tuple(cell) for cell in cells_of(undone(view)).tolist()] for view in (one, two)]
        whole = lambda cell: cell[2] == cell[5] == 200  # noqa: E731  no padding in it
        known = {cell: index for index, cell in enumerate(where[1]) if whole(cell)}
        expected = [known.get(cell, -1) for cell in where[0]]
        assert match.tolist() == expected
        columns = [undone(view)[1, 0, : min(width, 32)] for view in (one, two)]
        if width >= 32:
            flips.append(tuple(bool(row[0] > row[-1]) for row in columns))
    shares = [flips.count((a, b)) / len(flips) for a in (True, False) for b in (True, False)]
    assert len(flips) > 150 and min(shares) > 0.15  # each crop has a flip of its own


def test_a_batch_of_overlaps_is_aligned_exactly():
    for _ in range(20):
        pictures = [(100, 70), (24, 130), (17, 29), (40, 40)]
        one, two, match = default_collate([pair_of_places(*size) for size in pictures])
        first, second = cac.overlap(match)
        cells = [torch.cat([cells_of(view) for view in views]) for views in (one, two)]
        assert len(first) == len(second) == (match >= 0).sum() > 4
        assert torch.equal(cells[0][first], cells[1][second])
        assert set((first // match.shape[1]).tolist()) == {0, 1, 2, 3}
        assert torch.equal(first // match.shape[1], second // match.shape[1])
    first, second = cac.overlap(torch.full((3, 16), -1))
    assert len(first) == len(second) == 0


def test_without_context_the_crops_are_one():
    for _ in range(20):
        *views, match = pair_of_places(80, 100, min_iou=1.0)
        assert (match >= 0).all()
        boxes = [undone(view)[:2].amin((1, 2)).tolist() for view in views]
        assert boxes[0] == boxes[1]


def test_a_small_picture_is_padded_below_and_to_the_right_with_the_mean_colour():
    *views, match = cac.pair_view(places(40, 80), None, 32, 24, (1.0, 1.0), same)
    for view in views:
        padding = view.abs().amax(0) < 1e-6
        assert padding[12:].all() and not padding[:12].all(dim=0).all()
        assert padding[0].sum() == 8 and (padding[0, :8].all() or padding[0, 24:].all())
    assert (match >= 0).sum() == 1 * 3  # 12 x 24 pixels hold one row of three cells


def test_each_crop_is_changed_by_itself_before_it_is_normalised():
    seen = []

    def paint(view):
        seen.append(view)
        assert view.min() >= 0 and view.max() <= 1 and view.shape == (3, 32, 32)
        return torch.full_like(view, 0.1 * len(seen))

    one, two, _ = cac.pair_view(places(64, 64), None, 32, 64, (1.0, 1.0), paint)
    assert len(seen) == 2
    torch.testing.assert_close(one, normalise(torch.full_like(one, 0.1)))
    torch.testing.assert_close(two, normalise(torch.full_like(two, 0.2)))


def test_scales_refer_to_the_long_side():
    for shape in ((3, 50, 80), (3, 80, 50)):
        sides = [cac.draw_scale(torch.zeros(shape), 10, (0.8, 2.0)) * 80 for _ in range(500)]
        assert {round(side, 9) for side in sides} == set(range(8, 21))


def test_a_labelled_view_is_scaled_and_perhaps_changed():
    image = places(64, 64)
    label = (torch.arange(64) // 8 % 2).expand(64, 64).to(torch.uint8)
    for _ in range(10):
        view, crop_label = cac.labeled_view(image, label, 32, 64, (1.0, 1.0), nn.Identity())
        assert torch.equal(undone(view)[1] // 8 % 2, crop_label.float())
        view, again = cac.labeled_view(image, label, 32, 64, (1.0, 1.0), torch.zeros_like)
        torch.testing.assert_close(view, normalise(torch.zeros(3, 32, 32)))
        assert set(again.unique().tolist()) == {0, 1}
    _, label = cac.labeled_view(image, label, 32, 64, (0.25, 0.25), nn.Identity())
    assert (label != 255).sum() == 16**2


def test_photometry_changes_as_often_as_it_should():
    image = torch.rand(3, 16, 16)
    assert torch.equal(cac.photometry(0.0)(image), image)
    change, gray, blurred, kept = cac.photometry(), 0, 0, 0
    for _ in range(600):
        view = change(image)
        assert view.shape == image.shape and view.min() >= 0 and view.max() <= 1
        gray += torch.allclose(view[0], view[1], atol=1e-6) / 600
        kept += torch.equal(view, image) / 600
        # Neighbours in white noise differ by 1.4 standard deviations, in its blur by 0.6.
        blurred += bool(view.diff(dim=-1).std() < view.std()) / 600
    assert gray == pytest.approx(0.2, abs=0.06)
    assert kept == pytest.approx(0.5 * 0.2 * 0.8, abs=0.04)
    assert blurred == pytest.approx(0.5, abs=0.08)


# --- whole runs ---

TINY = dict(batch_size=2, crop_size=32, width=8, iters=4, eval_every=4, labeled="4", device="cpu")
TINY |= dict(warmup=0.5, gamma=0.25)  # half of the random networks' cells are more confident
# What the embedded dataset's recipe may change without a test of the method noticing.
TINY |= dict(lam=0.1, tau=0.1, bank=1, backbone_lr=1.0, dropout=0.0, strength=0.2, base_size=64)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The embedded dataset with few pictures: 4 labelled, 8 unlabelled."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 3})


@pytest.fixture
def small(monkeypatch):
    """Networks without a ResNet."""
    monkeypatch.setattr(cac, "DeepLabV3Plus", Small)


def run(folder, **flags):
    return cac.train(cac.Config(output_dir=str(folder), **{**TINY, **flags}))


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def logged(folder):
    """The log's lines that a training step wrote."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "miou" not in line]


@pytest.fixture
def steps(small, monkeypatch):
    """Of each step of a run: the module before it, its batch, its overlap, rates, gradients."""
    seen, matches = [], []
    forward, overlap, begin = cac.ContrastiveNet.forward, cac.overlap, Run.start
    cross_entropy = cac.cross_entropy

    def note_overlap(match):
        matches[:] = [match]
        return overlap(match)

    def note_pass(self, images, crops=()):
        step = SimpleNamespace(images=images, crops=list(crops), match=matches[:])
        step.before = deepcopy(self)
        step.passed = lambda: forward(step.before, images, crops)
        seen.append(step)
        return forward(self, images, crops)

    def note_labels(logits, labels):
        seen[-1].labels = labels
        return cross_entropy(logits, labels)

    def note_update(network, optimizer, *_):
        groups = {
            id(weight): group for group in optimizer.param_groups for weight in group["params"]
        }
        named = dict(network.named_parameters())
        grads = {name: weight.grad for name, weight in named.items()}
        seen[-1].grads = {n: None if grad is None else grad.clone() for n, grad in grads.items()}
        seen[-1].groups = {name: dict(groups[id(weight)]) for name, weight in named.items()}
        assert len(groups) == len(named)

    def start_and_watch(self, networks, data, state):
        note = partial(note_update, state["network"])
        state["optimizer"].register_step_pre_hook(note)
        begin(self, networks, data, state)

    monkeypatch.setattr(cac, "overlap", note_overlap)
    monkeypatch.setattr(cac, "cross_entropy", note_labels)
    monkeypatch.setattr(cac.ContrastiveNet, "forward", note_pass)
    monkeypatch.setattr(Run, "start", start_and_watch)
    return seen


def step_by_loop(step, cfg, history):
    """A step's losses, by loops: L_ce and L_dc. Its own features join the history."""
    logits, one, two = step.passed()
    loss_sup = F.cross_entropy(logits, step.labels, ignore_index=255)
    phi, pseudo = torch.cat([one.phi, two.phi]).detach(), torch.cat([one.pseudo, two.pseudo])
    history.append((phi, pseudo))
    negatives = [torch.cat(parts) for parts in zip(*history[-(cfg.bank + 1) :], strict=True)]
    (match,) = step.match
    cells = match.shape[1]
    pairs = [
        (picture * cells + cell, picture * cells + int(match[picture, cell]))
        for picture in range(len(match))
        for cell in range(cells)
        if match[picture, cell] >= 0
    ]
    first, second = (list(side) for side in zip(*pairs, strict=True))
    loss_dc = 0.0
    for (a, own), (b, other) in (((one, first), (two, second)), ((two, second), (one, first))):
        loss_dc = loss_dc + by_loop(
            a.phi[own],
            b.phi[other],
            a.conf[own],
            b.conf[other],
            a.pseudo[own],
            *negatives,
            cfg.tau,
            cfg.gamma,
            cfg.directed,
            cfg.class_filter,
        )
    return loss_sup, loss_dc


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--no-projector"],
        ["--no-context"],
        ["--no-directed"],
        ["--no-class-filter"],
        ["--gamma=0"],
        ["--tau=0.3"],
        ["--lam=3"],
        ["--bank=0"],
        ["--bank=2"],
    ],
    ids=" ".join,
)
def test_a_step_follows_the_gradient_of_the_total_loss(argv, steps, tmp_path):
    """Loss and gradients of a run of five steps, two of them supervised, against loops."""
    argv = [*FLAGS, "--iters=5", "--warmup=0.4", "--output-dir", str(tmp_path), *argv]
    cfg = parse_config(cac.Config, cac.RECIPES, argv)
    cac.train(cfg)
    plain, history, changed = cac.Config(**TINY), [], False
    for index, (step, line) in enumerate(zip(steps, logged(tmp_path), strict=True)):
        if index < 2:
            (logits,) = step.passed()
            loss = F.cross_entropy(logits, step.labels, ignore_index=255)
            assert set(line) == {"step", "seconds", "loss_sup"} and not step.crops
            assert line["loss_sup"] == pytest.approx(loss.item(), rel=1e-5)
        else:
            loss_sup, loss_dc = step_by_loop(step, cfg, history)
            assert line["loss_sup"] == pytest.approx(loss_sup.item(), rel=1e-5)
            assert line["loss_dc"] == pytest.approx(loss_dc.item(), rel=1e-4)
            assert line["loss_dc"] > 0
            loss = loss_sup + cfg.lam * loss_dc
            changed |= line["loss_dc"] != pytest.approx(
                step_by_loop(step, plain, history[:-1])[1].item(), rel=1e-3
            )
        named = dict(step.before.named_parameters())
        gradients = torch.autograd.grad(loss, named.values(), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is None or index < 2 and name.startswith("projector"):
                # Without a gradient weights do not decay either: Φ before it has begun to learn.
                assert step.grads[name] is None
                continue
            torch.testing.assert_close(step.grads[name], gradient, rtol=1e-3, atol=2e-5, msg=name)
    # The flags that change the loss of given features do change it here.
    kinds = ("--no-directed", "--no-class-filter", "--gamma=0", "--tau=0.3", "--bank")
    assert changed == argv[-1].startswith(kinds)


class Local(Small):
    """Sees cells one by one, and whatever the rest of the batch is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone[0] = nn.Conv2d(3, self.arguments["width"], 1)
        self.decoder = nn.Identity()
        self.eval()

    def encode(self, images):
        return self.backbone(F.avg_pool2d(images, 4))


def test_projector_and_context_can_be_left_out(steps, tmp_path):
    """Without context all cells have a counterpart, for these pictures need no padding."""
    flags = dict(warmup=0.0, iters=1, pair_scales=(1.0, 1.5), batch_size=4)
    for name, left_out in (("all", {}), ("none", dict(projector=False, context=False))):
        run(tmp_path / name, **flags, **left_out)
        known = saved(tmp_path / name)["state"]["network"]
        assert any("projector" in weight for weight in known) == (not left_out)
        assert steps[-1].passed()[1].phi.shape[1] == (8 if left_out else 128)
        assert (steps[-1].match[0] >= 0).all() == bool(left_out)


def test_in_a_run_the_two_features_of_a_place_are_paired(monkeypatch, tmp_path):
    """Nothing but context and photometry tells them apart, and both are off here."""
    calls, loss = [], cac.directional_contrastive_loss

    def note(*args, **options):
        calls.append(args)
        return loss(*args, **options)

    monkeypatch.setattr(cac, "DeepLabV3Plus", Local)
    monkeypatch.setattr(cac, "directional_contrastive_loss", note)
    run(tmp_path, warmup=0.0, strength=0.0)
    assert len(calls) == 8
    for anchor, target, anchor_conf, target_conf, labels, negatives, _ in calls:
        torch.testing.assert_close(anchor, target, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(anchor_conf, target_conf, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(anchor, target.roll(1, 0), atol=1e-2)
        assert len(labels) == len(anchor) <= 32 and len(negatives) in (64, 128)


def test_statistics_move_once_a_step_in_the_warm_up_and_three_times_later(steps, tmp_path):
    run(tmp_path, iters=5, warmup=0.4)
    counts = [int(step.before.network.backbone[1].num_batches_tracked) for step in steps]
    assert counts == [0, 1, 2, 5, 8]
    assert [len(step.crops) for step in steps] == [0, 0, 2, 2, 2]
    state = saved(tmp_path)["state"]
    assert state["network"]["network.backbone.1.num_batches_tracked"] == 11
    assert [len(labels) for _, labels in state["bank"]["past"]] == [64]


def test_unlabelled_pictures_begin_when_the_warm_up_ends(steps, tmp_path, monkeypatch):
    """The passes over them are the same whatever the warm-up; no label of theirs is read."""
    pair_view = cac.pair_view

    def note(image, label, **options):
        assert (label == 255).all()
        return pair_view(image, label, **options)

    monkeypatch.setattr(cac, "pair_view", note)
    for warmup in (0.0, 0.25, 0.5):
        run(tmp_path / str(warmup), warmup=warmup)
    pairs = [step.crops for step in steps if step.crops]
    early, later, last = pairs[:4], pairs[4:7], pairs[7:]
    assert len(last) == 2
    for expected, *others in zip(early, later, last):  # noqa: B905
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_labelled_pictures_are_jittered_on_request(steps, tmp_path):
    for jitter in (True, False):
        run(tmp_path / str(jitter), jitter=jitter, iters=1, warmup=0.9)
    changed, plain = steps
    assert torch.equal(changed.labels, plain.labels)
    assert not torch.allclose(changed.images, plain.images, atol=0.01)


def test_rates_and_decay_are_those_of_the_paper(steps, tmp_path):
    """The backbone takes its share of the rate; everything decays, BatchNorm and biases too."""
    run(tmp_path, iters=5, lr=0.01, backbone_lr=0.1, weight_decay=0.003)
    for index, step in enumerate(steps):
        assert {name.split(".")[1] for name in step.groups} > {"backbone", "classifier", "0"}
        for name, group in step.groups.items():
            share = 0.1 if "backbone" in name else 1.0
            assert group["lr"] == pytest.approx(share * 0.01 * poly_lr(index, 5)), name
            assert group["weight_decay"] == 0.003 and group["momentum"] == 0.9
            assert not group["nesterov"]


def test_without_lambda_the_network_learns_from_labels_alone(small, tmp_path, monkeypatch):
    """Its parameters are the baseline's, bit by bit; the baseline draws no pair of crops."""
    run(tmp_path / "zero", lam=0.0)
    monkeypatch.setattr(cac.ContrastiveNet, "features", None)
    baseline = run(tmp_path / "sup", supervised_only=True)
    (weights,) = saved(tmp_path / "zero")["networks"]
    for name, value in baseline.model.named_parameters():
        assert torch.equal(weights[name], value), name
    state = saved(tmp_path / "sup")["state"]
    assert state["network"]["network.backbone.1.num_batches_tracked"] == 4
    assert not any("projector" in name for name in state["network"])
    assert not any("loss_dc" in line for line in logged(tmp_path / "sup"))


def test_the_result_is_the_network_without_its_projector(small, tmp_path):
    result = run(tmp_path, dropout=0.5, strength=1.0, amp="bf16")
    assert isinstance(result.model, Small) and not result.model.training
    assert 0 <= result.miou == result.history[-1]["miou"] <= 1
    (weights,), (arguments,) = (saved(tmp_path)[name] for name in ("networks", "arguments"))
    assert weights.keys() == result.model.state_dict().keys()
    rates = dict(aspp_dropout=0.5, decoder_dropout=0.5, classifier_dropout=0.1)
    assert arguments == rates | dict(num_classes=7, backbone="resnet18", width=8)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "panels.png", "iou.txt"}


def test_the_log_tells_how_many_pairs_teach_and_disagree(steps, tmp_path):
    run(tmp_path)
    for step, line in list(zip(steps, logged(tmp_path), strict=True))[2:]:
        _, one, two = step.passed()
        first, second = cac.overlap(*step.match)
        conf = torch.maximum(one.conf[first], two.conf[second])
        assert line["taught"] == pytest.approx((conf > TINY["gamma"]).double().mean().item())
        differ = one.pseudo[first] != two.pseudo[second]
        assert line["disagree"] == pytest.approx(differ.double().mean().item())


def test_a_batch_without_overlap_teaches_nothing(small, tmp_path):
    """Pictures of 48 x 64 pixels, 6 x 8 once scaled, hold no whole cell."""
    where = dict(dataset="folder", data_path=str(trees.folder_tree(tmp_path / "data")))
    run(tmp_path / "run", warmup=0.0, pair_scales=(0.125, 0.125), **where)
    for line in logged(tmp_path / "run"):
        assert line["loss_dc"] == line["taught"] == line["disagree"] == 0


@pytest.mark.parametrize("bank", [0, 2])
def test_a_run_that_stops_goes_on_exactly(bank, small, tmp_path, power_cut):
    """In the warm-up, and after an evaluation that follows it: the bank comes back too."""
    flags = dict(iters=8, eval_every=2, warmup=3 / 8, bank=bank)
    run(tmp_path / "whole", **flags)
    for stop in (2, 6):
        power_cut(stop, lambda: run(tmp_path / "cut", **flags, resume=True))
    assert len(saved(tmp_path / "cut")["state"]["bank"]["past"]) == bank
    run(tmp_path / "cut", **flags, resume=True)
    for name in ("last.pt", "iou.txt", "panels.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- several processes ---


class Still(Small):
    """With statistics that no batch moves: a picture's features are the same in any batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval()


def pools(folder, **flags):
    """The negatives of each step of a run whose weights stay: the rate is below their precision."""
    seen, add = [], cac.Bank.extended

    def note(*args):
        seen.append(add(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cac, "DeepLabV3Plus", Still)
        patch.setattr(cac.Bank, "extended", note)
        run(folder, warmup=0.0, iters=3, lr=1e-30, weight_decay=0.0, **flags)
    return seen


def all_learn(folder, **flags):
    """The weights after a run in which every cell has a counterpart, and every anchor learns."""
    everything = dict(context=False, directed=False, gamma=0.0, pair_scales=(1.0, 1.0), lam=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cac, "DeepLabV3Plus", Still)
        return run(folder, warmup=0.0, iters=3, **everything, **flags).model.state_dict()


def one_of_two(rank, folder):
    """What each of two processes does and saves."""
    torch.set_num_threads(1)
    shapes.COUNTS = {"train": 12, "val": 3}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    negatives, even = pools(folder / "still"), all_learn(folder / "even")
    learned = run(folder / "run").model.state_dict()
    rows = torch.arange(6.0).view(2, 3).T + 10 * rank  # in memory column by column
    idle = Run("cac", cac.Config(output_dir=str(folder / "none"), device="cpu"))
    gathered = idle.gather(rows.requires_grad_())
    saved = dict(negatives=negatives, even=even, learned=learned, gathered=gathered)
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_learn_one_network(two_processes):
    first, second = (process["learned"] for process in two_processes)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_with_as_many_anchors_learn_what_one_does(two_processes, tmp_path):
    """The loss is a mean over a process's own anchors, and then over processes."""
    torch.testing.assert_close(
        two_processes[0]["even"], all_learn(tmp_path, batch_size=4), rtol=1e-4, atol=1e-5
    )


def test_rows_of_all_processes_are_gathered_in_order(two_processes):
    rows = torch.arange(6.0).view(2, 3).T
    for process in two_processes:
        assert torch.equal(process["gathered"], torch.cat([rows, rows + 10]))
        assert not process["gathered"].requires_grad


def test_two_processes_have_the_negatives_of_the_whole_batch(two_processes, tmp_path):
    whole = pools(tmp_path, batch_size=4)
    assert [len(labels) for _, labels in whole] == [128, 256, 256]
    pools_of_each = [process["negatives"] for process in two_processes]
    for step in zip(*pools_of_each, whole, strict=True):
        # An entry is a feature and its label; ten times the label is far from any other's.
        one, two, expected = (torch.cat([phi, 10.0 * y[:, None]], 1).double() for phi, y in step)
        assert torch.equal(one, two) and len(one) == len(expected)
        distances = torch.cdist(one, expected, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, partner = distances.min(dim=1)
        assert nearest.max() < 1e-4 and len(partner.unique()) == len(one)


# --- flags ---


@pytest.mark.parametrize(
    "flags",
    [
        "--gamma=1.5",
        "--gamma=-0.1",
        "--warmup=1",
        "--strength=2",
        "--dropout=1.5",
        "--lam=-1",
        "--tau=0",
        "--tau=nan",
        "--bank=-1",
        "--base-size=0",
        "--scales 2 0.5",
        "--scales 1",
        "--scales 0.5 1 2",
        "--pair-scales 2 0.5",
        "--pair-scales 1",
        "--pair-scales 0.5 1 2",
        "--scales 0.001 0.002",
        "--pair-scales 0.001 0.002",
        "--crop-size=50",
        "--backbone-lr=-1",
        "--backbone-lr=1.5",
        "--directed=maybe",
        "--itres=5",
    ],
)
def test_a_flag_that_cannot_be_right_ends_with_one_line_and_status_2(
    flags, small, tmp_path, monkeypatch, capsys
):
    argv = ["cac.py", *FLAGS, "--output-dir", str(tmp_path / "run"), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        cac.main(cac.train, cac.Config, cac.RECIPES)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert flags.split("=")[0].split()[0] in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", ["folder", "voc", "cityscapes"])
def test_recipes_train_on_tiny_trees(dataset, small, tmp_path):
    trees_by_name = dict(
        folder=trees.folder_tree,
        voc=partial(trees.voc_tree, aug=True),
        cityscapes=trees.cityscapes_tree,
    )
    root = trees_by_name[dataset](tmp_path / "data")
    small = dict(backbone="resnet18", weights="none", crop_size=32, base_size=64, width=8)
    few = dict(labeled="1/2", batch_size=2, iters=2, warmup=0.5, workers=0, device="cpu")
    flags = cac.RECIPES[dataset] | small | few
    result = cac.train(cac.Config(data_path=str(root), output_dir=str(tmp_path / "run"), **flags))
    classes = dict(folder=3, voc=21, cityscapes=19)[dataset]
    assert math.isfinite(result.miou) and len(result.history[-1]["iou"]) == classes


def test_recipes_are_the_released_ones():
    parse = lambda *argv: parse_config(cac.Config, cac.RECIPES, list(argv))  # noqa: E731
    voc, city = parse("--dataset", "voc"), parse("--dataset=cityscapes")
    for recipe in (voc, city):
        assert (recipe.iters, recipe.batch_size, recipe.labeled) == (80 * 1157, 8, "1/8")
        assert round(recipe.warmup * recipe.iters) == 5 * 1157
        assert (recipe.tau, recipe.gamma, recipe.lam, recipe.strength) == (0.1, 0.75, 0.1, 1.0)
        assert (recipe.weight_decay, recipe.backbone_lr, recipe.dropout) == (1e-4, 0.1, 0.5)
        assert (recipe.scales, recipe.pair_scales) == ((0.5, 2.0), (0.8, 2.0))
        assert (recipe.backbone, recipe.weights) == ("resnet50", "IMAGENET1K_V1")
        assert recipe.width == 256
        flags = "projector", "context", "directed", "class_filter"
        assert all(getattr(recipe, flag) for flag in flags) and not recipe.supervised_only
    assert (voc.crop_size, voc.base_size, voc.lr, voc.bank) == (320, 400, 0.01, 1)
    assert (city.crop_size, city.base_size, city.lr, city.bank) == (720, 2048, 0.1, 0)
    assert city.jitter and not voc.jitter
    for name, recipe in cac.RECIPES.items():
        assert cac.Config(**recipe).dataset == name.split()[0]


def test_a_larger_backbone_has_a_larger_bank_on_voc():
    parse = lambda *argv: parse_config(cac.Config, cac.RECIPES, list(argv))  # noqa: E731
    larger = ["--backbone", "resnet101"]
    assert parse("--dataset=voc", *larger) == cac.Config(**cac.RECIPES["voc resnet101"])
    assert parse("--dataset=voc", *larger).bank == 2
    assert parse("--dataset=voc", *larger, "--labeled=1/16").bank == 2
    assert parse("--dataset=voc", *larger, "--bank=0").bank == 0
    assert parse("--dataset=cityscapes", *larger).bank == 0
