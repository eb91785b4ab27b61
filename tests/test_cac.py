"""CAC's loss against loops over anchors and negatives, the crops, the bank, short runs."""

import json
import math
from collections import defaultdict
from copy import deepcopy
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trees
from few_shapes import COUNTS, SEMI, end, fork_two, lighten
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import cac
from common import shapes
from common.augment import MEAN, STD, normalise
from common.deeplab import DeepLabV3Plus

PER_ANCHOR = ("anchor", "target", "anchor_conf", "target_conf", "anchor_labels")
OF_NEGATIVES = ("negatives", "negative_labels")
pytestmark = pytest.mark.usefixtures("few", "light")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def draw(anchors=40, negatives=50, dims=6, classes=4):
    """The loss's arguments in float64; a third of the anchors or so learns."""
    unit = lambda count: F.normalize(torch.randn(count, dims).double(), dim=1)  # noqa: E731
    return dict(
        anchor=unit(anchors).requires_grad_(),
        target=unit(anchors).requires_grad_(),
        anchor_conf=torch.rand(anchors).double() ** 0.5,
        target_conf=torch.rand(anchors).double() ** 0.5,
        anchor_labels=torch.randint(classes, (anchors,)),
        negatives=unit(negatives).requires_grad_(),
        negative_labels=torch.randint(classes, (negatives,)),
    )


def changed(inputs, names, change):
    return inputs | {name: change(inputs[name]) for name in names}


def active(inputs):
    return cac.active_anchors(inputs["anchor_conf"], inputs["target_conf"])


def computed(inputs, loss=cac.directional_contrastive_loss, **options):
    """A loss, and its gradient for the anchors."""
    value = loss(**inputs, **options)
    return value.detach(), torch.autograd.grad(value, inputs["anchor"])[0]


def nce_by_loop(anchor, target, label, negatives, negative_labels, tau):
    """Eqs. (1), (5) of one anchor, negative by negative; where its label is None, of all."""
    positive, others = torch.exp(anchor @ target / tau), 0.0
    for negative, its_label in zip(negatives, negative_labels.tolist(), strict=True):
        if its_label != label:
            others = others + torch.exp(anchor @ negative / tau)
    return -torch.log(positive / (positive + others))


def by_loop(tau=0.1, gamma=0.75, directed=True, class_filter=True, mean_over="active", **inputs):
    """Eq. (6), one direction as the paper writes it, anchor by anchor."""
    anchor, target, conf, target_conf, labels, *of_negatives = inputs.values()
    losses = []
    for i, label in enumerate(labels.tolist()):
        if target_conf[i] > gamma and (not directed or conf[i] < target_conf[i]):
            label = label if class_filter else None
            losses.append(nce_by_loop(anchor[i], target[i], label, *of_negatives, tau))
    assert 0 < len(losses) < len(anchor)
    return sum(losses) / (len(losses) if mean_over == "active" else len(anchor))


# --- Eqs. (1), (2), (5)-(7) ---


def test_info_nce_is_the_loop_over_negatives():
    inputs, weights = draw(), torch.rand(40).double()
    anchor, target, _, _, labels, *negatives = inputs.values()
    each = zip(anchor, target, labels.tolist(), strict=True)
    expected = torch.stack([nce_by_loop(*one, *negatives, 0.3) for one in each])
    losses = cac.info_nce(anchor, target, labels, *negatives, 0.3)
    close(losses, expected)
    close(*(torch.autograd.grad(values @ weights, anchor) for values in (losses, expected)))


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("class_filter", [True, False])
@pytest.mark.parametrize("mean_over", ["active", "overlap"])
def test_the_loss_is_the_loop_over_anchors(directed, class_filter, mean_over):
    inputs = draw()
    for tau, gamma in ((0.1, 0.75), (0.5, 0.3)):
        options = dict(tau=tau, gamma=gamma, directed=directed, class_filter=class_filter)
        options |= dict(mean_over=mean_over)
        value, gradient = computed(inputs, rows=7, **options)
        assert value.shape == ()
        close((value, gradient), computed(inputs, by_loop, **options))
    with pytest.raises(ValueError, match="active"):
        computed(inputs, mean_over="pixels")


def test_neither_rows_nor_the_order_of_negatives_matter():
    """And the defaults are the paper's."""
    inputs, order = draw(), torch.randperm(50)
    expected = computed(inputs, by_loop)
    for given in (inputs, changed(inputs, OF_NEGATIVES, lambda values: values[order])):
        for options in (dict(), dict(rows=1), dict(rows=7), dict(rows=10**9)):
            close(computed(given, **options), expected)


def test_anchors_that_learn_go_towards_targets_from_negatives_and_nothing_else_moves():
    inputs = draw()
    anchor, target, _, _, labels, negatives, classes = (t.detach() for t in inputs.values())
    logits = (anchor @ negatives.T / 0.1).masked_fill(labels[:, None] == classes, -math.inf)
    q = torch.cat([(anchor * target).sum(1, keepdim=True) / 0.1, logits], dim=1).softmax(1)
    learn = active(inputs)
    expected = (q[:, 1:] @ negatives - (1 - q[:, :1]) * target) / 0.1 / learn.sum()
    cac.directional_contrastive_loss(**inputs).backward()
    assert inputs["target"].grad is None and inputs["negatives"].grad is None
    close(inputs["anchor"].grad[learn], expected[learn], rtol=1e-12, atol=1e-12)
    assert (inputs["anchor"].grad[~learn] == 0).all() and 0 < learn.sum() < len(learn)


def test_anchors_learn_from_a_more_confident_and_confident_target():
    """Of a pair one side at most, and of a tie none."""
    first = torch.tensor([0.1, 0.8, 0.9, 0.8, 0.1, 0.1])
    second = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.75, 0.76])
    learn = partial(cac.active_anchors, first, second)
    assert learn().tolist() == [True, True, False, False, False, True]
    assert learn(0.85).tolist() == [True, True, False, False, False, False]
    assert learn(directed=False).tolist() == [True, True, True, True, False, True]
    assert torch.equal(learn(0.0) ^ cac.active_anchors(second, first, 0.0), first != second)


LIMITS = {
    "no target above γ": (("target_conf",), lambda values: values.clamp(max=0.75)),
    "no cell in the overlap": (PER_ANCHOR, lambda values: values[:0]),
    "no negative": (OF_NEGATIVES, lambda values: values[:0]),
    "one class": (("anchor_labels", "negative_labels"), torch.zeros_like),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_there_is_nothing_to_learn_loss_and_gradient_are_exactly_zero(limit, dtype):
    inputs = changed(draw(), ("anchor",), lambda anchor: anchor.to(dtype))
    assert computed(inputs)[0] > 0
    for mean_over in ("active", "overlap"):
        value, gradient = computed(changed(inputs, *LIMITS[limit]), mean_over=mean_over)
        assert value == 0 and (gradient == 0).all()


def test_an_anchor_alone_has_a_known_loss():
    """By its cosine with its target, that with its negatives, and their number."""

    def alone(cosine, other, count=1, kind=0, **tau):
        angles = torch.tensor([cosine] + [other] * count, dtype=torch.float64).acos()
        features = torch.stack([angles.cos(), angles.sin()], dim=1)
        anchor, labels = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([1, kind])
        negatives = features[1:], labels[1:].expand(count)
        return cac.info_nce(anchor, features[:1], labels[:1], *negatives, **tau).item()

    orthogonal = {1: 4.54e-5, 100: 4.53e-3, 6_400: 0.25508, 51_200: 1.20131, 129_600: 1.92918}
    for count, expected in orthogonal.items():
        assert alone(1.0, 0.0, count) == pytest.approx(expected, rel=1e-3)
    for cosine, expected in {0.5: 5.00672, 0.0: 10.00005, -1.0: 20.0}.items():
        assert alone(cosine, 1.0) == pytest.approx(expected, abs=1e-5)  # C's 1e-8 gives 18.2 at -1
        assert alone(cosine, cosine, 6_400) == pytest.approx(math.log(6_401), rel=1e-12)
    assert alone(-1.0, 1.0, kind=1) == 0
    assert alone(-1.0, 1.0, tau=1e-4) == pytest.approx(20_000)  # and nothing overflows
    assert computed(draw(), tau=1e-4)[1].isfinite().all()


def test_half_precision_is_raised_and_autocast_is_off():
    phis = "anchor", "target", "negatives"
    half = changed(draw(), phis, lambda phi: phi.detach().bfloat16().requires_grad_())
    raised = changed(half, phis, lambda phi: phi.float())
    expected = cac.directional_contrastive_loss(**raised)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (raised, half):
            value = cac.directional_contrastive_loss(**each)
            assert value.dtype == torch.float32 and value == expected
    value.backward()
    assert half["anchor"].grad.dtype == torch.bfloat16
    exact = cac.directional_contrastive_loss(**changed(half, phis, lambda phi: phi.double()))
    assert exact.dtype == torch.float64
    close(expected.double(), exact, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_no_matrix_of_all_anchors_and_negatives_is_made_and_none_is_kept():
    """What is made grows with rows x negatives; what is kept are the arguments."""
    inputs, kept = draw(400, 5000, dims=2), []
    assert 50 < active(inputs).sum() < 200
    keep = lambda tensor: (kept.append(tensor.numel()), tensor)[1]  # noqa: E731
    for rows in (20, 40):
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            cac.directional_contrastive_loss(**inputs, rows=rows).backward()
        assert largest.numel == rows * (5000 + 1)  # and the positive
    assert 0 < max(kept) <= inputs["negatives"].numel()


# --- the features ---


def net(**options):
    return cac.ContrastiveNet(DeepLabV3Plus(5, "resnet18", width=8), 8, **options)


def test_features_are_those_of_each_cell_row_by_row():
    """A cell is 2 x 2 of the decoder's; classes are its logits', at stride 8."""
    both, images = net().double().eval(), torch.randn(2, 3, 32, 48).double()
    network, (hidden, relu, last) = both.network, both.projector
    bare = cac.ContrastiveNet(network, 8, project=False).features(images)
    features, decoded = both.features(images), network.decode(network.encode(images))
    cells = [(b, y, x) for b in range(2) for y in range(0, 8, 2) for x in range(0, 12, 2)]
    assert features.phi.shape == (len(cells), 128) and isinstance(relu, nn.ReLU)
    for index, (b, y, x) in enumerate(cells):
        mean = decoded[b, :, y : y + 2, x : x + 2].mean(dim=(1, 2), keepdim=True)
        probs = network.classifier(mean).flatten().softmax(0)
        phi = last(hidden(mean).relu()).flatten()
        close(features.phi[index], phi / phi.norm())
        close(bare.phi[index], mean.flatten() / mean.norm())
        close(features.conf[index], probs.max())
        assert features.pseudo[index] == probs.argmax()
    paper = cac.ContrastiveNet(nn.Identity(), 256).projector
    assert sum(weight.numel() for weight in paper.parameters()) == 98_688


def test_a_pass_gives_logits_and_with_crops_the_features_of_each():
    """Each batch has a pass, and BatchNorm's statistics, of its own."""
    both, (images, *crops) = net(), torch.randn(3, 2, 3, 32, 32)
    logits = both(images)
    again, *features = both(images, *crops)
    assert torch.equal(logits, both.network(images)) and torch.equal(again, logits)
    for crop, expected in zip(crops, features, strict=True):
        assert all(map(torch.equal, both.features(crop), expected))


def test_the_contrastive_loss_teaches_all_but_the_classifier():
    both = net()
    _, one, two = both(*torch.randn(3, 2, 3, 32, 32))
    assert not one.conf.requires_grad
    negatives = torch.cat([one.phi, two.phi]), torch.cat([one.pseudo, two.pseudo + 1]) % 5
    args = one.phi, two.phi, torch.zeros(32), torch.ones(32), one.pseudo
    cac.directional_contrastive_loss(*args, *negatives).backward()
    for name, weight in both.named_parameters():
        if "classifier" in name:
            assert weight.grad is None
        elif weight.ndim > 1:  # a bias that normalisation cancels may have a gradient of zero
            assert (weight.grad != 0).any(), name


def test_features_are_float32_under_autocast():
    both = net()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        features = both.features(torch.randn(2, 3, 32, 32))
    assert features.phi.dtype == features.conf.dtype == torch.float32
    close(features.phi.norm(dim=1), torch.ones(32), atol=1e-6)
    features.phi[:, 0].sum().backward()
    assert all((weight.grad != 0).any() for weight in both.projector.parameters())


# --- the bank ---


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_pool_is_this_steps_features_and_those_of_the_last_steps(steps):
    bank = cac.Bank(steps)
    for step in range(1000):
        features = torch.full((3, 2), float(step), requires_grad=True)
        pool, labels = bank.push(features, torch.full((3,), step))
        assert sorted(labels.tolist()) == sorted(3 * list(range(max(step - steps, 0), step + 1)))
        assert torch.equal(pool, labels[:, None].expand(-1, 2).float())
        assert not pool.requires_grad and len(bank.past) == min(step + 1, steps)
    assert not any(tensor.requires_grad for entry in bank.past for tensor in entry)


# --- two overlapping crops ---


def sizes(crop):
    """A picture's random height and width: below, at and above the crop's side."""
    return [int(torch.randint(1, 3 * crop, ())) for _ in range(2)]


def test_crops_overlap_as_they_should_over_ten_thousand_draws():
    where, apart = set(), 0
    bounds = ((0.1, 1.0), (0.5, 1.0), (0.1, 0.8), (0.0, 1.0))
    for index in range(10_000):
        crop, (low, high) = (32, 48, 96)[index % 3], bounds[index % 4]
        height, width = sizes(crop)
        one, two, common1, common2 = cac.overlapping_crops(height, width, crop, low, high)
        area = 1
        for axis, side in ((0, height), (1, width)):
            start1, start2, end1, end2 = (box[a] for a in (axis, axis + 2) for box in (one, two))
            assert end1 - start1 == end2 - start2 == crop
            assert 0 <= min(start1, start2) and max(end1, end2) <= max(side, crop)
            start, end = max(start1, start2), min(end1, end2)
            area *= max(end - start, 0)
            first, last = common1[axis], common1[axis + 2]
            assert first % 8 == 0 and last - first == common2[axis + 2] - common2[axis]
            # The largest number of whole cells that are in both crops and in the picture.
            assert last - first == max(min(end, side) - start, 0) // 8 * 8
            if end > start:
                assert start1 + first == start2 + common2[axis] == start
        assert low <= area / (2 * crop**2 - area) <= high or one == two
        where.add(tuple((a > b) - (a < b) for a, b in zip(one[:2], two[:2], strict=True)))
        apart += area == 0
        assert area > 0 or (cac.counterparts(common1, common2, False, True, crop) == -1).all()
    assert len(where) == 9 and apart > 100  # the second crop lies on every side, or is the first


def test_crops_reach_every_place():
    starts = [cac.overlapping_crops(35, 48, 32, 0.0)[:2] for _ in range(400)]
    for box in (0, 1):
        assert {pair[box][0] for pair in starts} == {0, 1, 2, 3}
        assert {pair[box][1] for pair in starts} == set(range(17))
    moved = {(two[0] - one[0], two[1] - one[1]) for one, two in starts}
    assert moved == {(0, 8 * step) for step in (-2, -1, 0, 1, 2)}


def test_bounds_out_of_reach_give_the_same_crop_twice():
    for height, width, bounds in ((300, 300, (1.0, 1.0)), (32, 20, (0.1, 0.5))):
        one, two, common1, common2 = cac.overlapping_crops(height, width, 32, *bounds)
        assert one == two and common1 == common2
        assert common1 == (0, 0, min(height // 8 * 8, 32), min(width // 8 * 8, 32))
    # One try seldom finds an overlap in a large picture, fifty tries mostly do.
    for tries, least, most in ((1, 1, 20), (50, 100, 199)):
        pairs = [cac.overlapping_crops(300, 300, 32, 0.1, 0.5, tries=tries) for _ in range(200)]
        assert least <= sum(one != two for one, two, *_ in pairs) <= most


def places(height, width):
    """A picture whose pixels say where they are: row, column, and 200 for being one."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 200)]).to(torch.uint8)


def pair_of_places(height, width, long_side=None, change=lambda view: view):
    side = long_side or max(height, width)
    return cac.pair_view(places(height, width), None, 32, side, (1.0, 1.0), change)


def undone(view):
    """A normalised view's values from 0 to 255."""
    return ((view * STD + MEAN) * 255).round()


def cells_of(view):
    """The least and the greatest value of each channel in each 8 x 8 cell, (cells, 6)."""
    blocks = undone(view).unfold(1, 8, 8).unfold(2, 8, 8)
    return torch.cat([blocks.amin((3, 4)), blocks.amax((3, 4))]).flatten(1).T


def test_counterparts_show_the_same_place_and_none_is_missed():
    flips = []
    for _ in range(300):
        height, width = sizes(32)
        one, two, match = pair_of_places(height, width)
        cells1, cells2 = ([tuple(cell) for cell in cells_of(view).tolist()] for view in (one, two))
        # No padding is in a cell whose third channel is 200 throughout.
        known = {cell: i for i, cell in enumerate(cells2) if cell[2] == cell[5] == 200}
        assert match.tolist() == [known.get(cell, -1) for cell in cells1]
        if width >= 32:
            flips.append(tuple(bool(view[1, 0, 0] > view[1, 0, -1]) for view in (one, two)))
    shares = [flips.count((a, b)) / len(flips) for a in (True, False) for b in (True, False)]
    assert len(flips) > 150 and min(shares) > 0.15  # each crop has a flip of its own


def test_a_batch_of_overlaps_is_aligned_exactly():
    for _ in range(20):
        pictures = [(100, 70), (24, 130), (17, 29), (40, 40)]
        one, two, match = default_collate([pair_of_places(*size) for size in pictures])
        first, second = cac.overlap(match)
        cells1, cells2 = (torch.cat([cells_of(view) for view in views]) for views in (one, two))
        assert len(first) == len(second) == (match >= 0).sum()
        assert torch.equal(cells1[first], cells2[second])
        assert set((first // match.shape[1]).tolist()) == {0, 1, 2, 3}
        assert torch.equal(first // match.shape[1], second // match.shape[1])


def test_a_small_picture_is_padded_below_and_to_the_right_with_the_mean_colour():
    *views, match = pair_of_places(40, 80, long_side=24)
    for view in views:
        padding = view.abs().amax(0) < 1e-6
        assert padding[12:].all() and not padding[:12].all(dim=0).all()
        assert padding[0].sum() == 8 and (padding[0, :8].all() or padding[0, 24:].all())
    assert (match >= 0).sum() == 1 * 3  # 12 x 24 pixels hold one row of three cells


def test_each_crop_is_changed_by_itself_before_it_is_normalised():
    values = iter((0.1, 0.2))
    paint = lambda view: torch.full_like(view, next(values))  # noqa: E731
    for view, value in zip(pair_of_places(64, 64, change=paint)[:2], (0.1, 0.2), strict=True):
        close(view, normalise(torch.full((3, 32, 32), value)), rtol=1e-6)


def test_scales_refer_to_the_long_side():
    for shape in ((3, 50, 80), (3, 80, 50)):
        sides = [cac.draw_scale(torch.zeros(shape), 10, (0.8, 2.0)) * 80 for _ in range(500)]
        assert {round(side, 9) for side in sides} == set(range(8, 21))


def test_a_labelled_view_is_scaled_and_perhaps_changed():
    image = places(64, 64)
    label = (torch.arange(64) // 8 % 2).expand(64, 64).to(torch.uint8)
    view, crop_label = cac.labeled_view(image, label, 32, 64, (1.0, 1.0), nn.Identity())
    assert torch.equal(undone(view)[1] // 8 % 2, crop_label.float())
    view, _ = cac.labeled_view(image, label, 32, 64, (1.0, 1.0), torch.zeros_like)
    close(view, normalise(torch.zeros(3, 32, 32)))
    _, label = cac.labeled_view(image, label, 32, 64, (0.25, 0.25), nn.Identity())
    assert (label != 255).sum() == 16**2


def test_photometry_changes_as_often_as_it_should():
    image, change, shares = torch.rand(3, 16, 16), cac.photometry(), torch.zeros(3)
    assert torch.equal(cac.photometry(0.0)(image), image)
    for _ in range(600):
        view = change(image)
        assert view.shape == image.shape and view.min() >= 0 and view.max() <= 1
        gray = torch.allclose(view[0], view[1], atol=1e-6)
        # Neighbours in white noise differ by 1.4 standard deviations, in its blur by 0.6.
        blurred = view.diff(dim=-1).std() < view.std()
        shares += torch.tensor([gray, blurred, torch.equal(view, image)]) / 600
    close(shares, torch.tensor([0.2, 0.5, 0.5 * 0.2 * 0.8]), atol=0.05)
    bright = torch.stack([cac.jitter(0.5)(torch.full((3, 1, 1), 0.5)) for _ in range(200)])
    close(torch.stack(bright.aminmax()), torch.tensor([0.4, 0.6]), atol=0.01)  # 0.5 -/+ 20 %


# --- short runs ---

# Half of the random networks' cells are more confident than γ.
TINY = SEMI | dict(warmup=0.0, gamma=0.25, bank=1, lr=0.01)


class Local(DeepLabV3Plus):
    """Sees the mean colour of a place: nothing around it, and no other picture."""

    def encode(self, images):
        return F.avg_pool2d(images, 4)

    def decode(self, encoded):
        return encoded


def run(folder, **flags):
    """A run's result, the state it saved, and the log's lines that its steps wrote."""
    result = cac.train(cac.Config(output_dir=str(folder), **TINY | flags))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    state = torch.load(folder / "last.pt", weights_only=True)["state"]
    return result, state, [line for line in lines if "loss_sup" in line]


@pytest.fixture
def seen(monkeypatch):
    """By function, its calls in runs: arguments, value, a loss's gradients, the module before."""
    calls = defaultdict(list)

    def watch(owner, name):
        function = getattr(owner, name)

        def note(*args, **named):
            before = deepcopy(args[0].state_dict()) if name == "forward" else None
            value = function(*args, **named)
            call = SimpleNamespace(args=args, named=named, value=value, before=before)
            if owner is cac and name != "overlap" and value.requires_grad:
                weights = calls["forward"][-1].args[0].parameters()
                options = dict(retain_graph=True, materialize_grads=True)
                call.grads = torch.autograd.grad(value, weights, **options)
            calls[name].append(call)
            return value

        monkeypatch.setattr(owner, name, note)

    monkeypatch.setattr("common.run.panels", lambda *_, **how: None)  # it has crops of its own
    watch(cac.ContrastiveNet, "forward")
    for name in ("overlap", "cross_entropy", "directional_contrastive_loss"):
        watch(cac, name)
    return calls


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_step_contrasts_the_two_features_of_each_place_both_ways(
    strength, seen, monkeypatch, tmp_path
):
    """Equal here without photometry. Negatives are all features of this step and the last."""
    monkeypatch.setattr(cac, "DeepLabV3Plus", Local)
    flags = dict(tau=0.3, directed=False, class_filter=False, mean_over="overlap")
    *_, log = run(tmp_path, iters=3, width=3, strength=strength, **flags)
    past, losses = [], iter(seen["directional_contrastive_loss"])
    for step, cells, line in zip(seen["forward"], seen["overlap"], log, strict=True):
        _, *crops = step.value
        past.append([torch.cat([getattr(u, name) for u in crops]) for name in ("phi", "pseudo")])
        negatives = [torch.cat(parts) for parts in zip(*past[-2:], strict=True)]
        one, two = (u.at(where) for u, where in zip(crops, cells.value, strict=True))
        calls = next(losses), next(losses)
        for (anchor, target), call in zip(((one, two), (two, one)), calls, strict=True):
            pairs = anchor.phi, target.phi, anchor.conf, target.conf, anchor.pseudo
            assert all(map(torch.equal, call.args, (*pairs, *negatives)))
            assert call.named == flags | dict(gamma=0.25)
        assert torch.allclose(one.phi, two.phi, atol=1e-4) == (strength == 0)
        assert not torch.allclose(one.phi, two.phi.roll(1, 0), atol=1e-2)
        taught = ((one.conf > 0.25) | (two.conf > 0.25)).float().mean()
        disagree = (one.pseudo != two.pseudo).float().mean()
        expected = [sum(call.value for call in calls), taught, disagree]
        logged = [line[name] for name in ("loss_dc", "taught", "disagree")]
        close(torch.stack(expected), torch.tensor(logged), rtol=1e-5)


def test_a_step_descends_the_supervised_and_lambda_times_the_contrastive_loss(seen, tmp_path):
    _, state, _ = run(tmp_path, lr=0.1, lam=3.0, weight_decay=0.0)
    first, second = seen["forward"]
    ce, dc = seen["cross_entropy"], seen["directional_contrastive_loss"]
    for index, (name, _) in enumerate(first.args[0].named_parameters()):
        ce1, ce2, *dc12 = (call.grads[index] for call in ce + dc)
        grad1, grad2 = ce1 + 3 * (dc12[0] + dc12[1]), ce2 + 3 * (dc12[2] + dc12[3])
        after1 = first.before[name] - 0.1 * grad1
        close(after1, second.before[name], rtol=1e-4, atol=1e-6, msg=name)
        after2 = second.before[name] - 0.1 * 0.5**0.9 * (0.9 * grad1 + grad2)
        close(after2, state["network"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_in_the_warm_up_statistics_move_once_a_step_and_the_projector_rests(seen, tmp_path):
    """Later they move three times. Without a gradient a weight does not decay either."""
    _, state, log = run(tmp_path, iters=5, warmup=0.4)
    history = [step.before for step in seen["forward"]] + [state["network"]]
    count = "network.backbone.bn1.num_batches_tracked"
    assert [int(weights[count]) for weights in history] == [0, 1, 2, 5, 8, 11]
    assert [len(step.args) - 2 for step in seen["forward"]] == [0, 0, 2, 2, 2]  # crops
    assert ["loss_dc" in line for line in log] == [False, False, True, True, True]
    for name, rests in (("projector.0.weight", 2), ("network.classifier.weight", 0)):
        moves = [not torch.equal(a[name], b[name]) for a, b in pairwise(history)]
        assert moves == [False] * rests + [True] * (5 - rests)
    assert [len(labels) for _, labels in state["bank"]["past"]] == [64]


def test_unlabelled_pictures_begin_when_the_warm_up_ends(seen, tmp_path):
    """The passes over them are the same whatever the warm-up."""
    for warmup, iters in ((0.5, 4), (0.0, 2)):
        run(tmp_path / str(warmup), iters=iters, warmup=warmup)
    *_, first, second, first_again, second_again = (step.args[2:] for step in seen["forward"])
    assert all(map(torch.equal, first + second, first_again + second_again))


def test_labelled_pictures_and_pairs_have_scales_and_colours_of_their_own(seen, tmp_path):
    """And without context all cells have a counterpart, without projector a decoder's feature."""
    flags = dict(iters=1, seed=1, scales=(0.25, 0.25), pair_scales=(1.0, 1.0))
    for jitter in (True, False):
        run(tmp_path / str(jitter), jitter=jitter, context=False, projector=False, **flags)
    (jittered, plain), labels = seen["forward"], [call.args[1] for call in seen["cross_entropy"]]
    assert torch.equal(*labels) and (labels[0] != 255).sum() == 2 * 16**2
    assert not torch.allclose(jittered.args[1], plain.args[1], atol=0.01)
    assert all(map(torch.equal, jittered.args[2:], plain.args[2:]))
    assert all((call.args[0] >= 0).all() for call in seen["overlap"])
    assert plain.value[1].phi.shape == (2 * 16, 8)


def test_rates_decay_and_dropout_are_those_of_the_paper(tmp_path):
    """The backbone takes its share of the rate; everything decays, BatchNorm and biases too."""
    result, state, _ = run(tmp_path, backbone_lr=0.1, weight_decay=0.003, dropout=0.5)
    counts = {0.001: 0, 0.01: 0}
    for group in state["optimizer"]["param_groups"]:
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.003, 0.9, False)
        assert group["lr"] == 0  # where the polynomial ends
        counts[round(group["initial_lr"], 9)] += len(group["params"])
    backbone = ["backbone" in name for name, _ in net().named_parameters()]
    assert counts == {0.001: sum(backbone), 0.01: len(backbone) - sum(backbone)}
    rates = dict(aspp_dropout=0.5, decoder_dropout=0.5, classifier_dropout=0.1)
    assert result.model.arguments == rates | dict(num_classes=7, backbone="resnet18", width=8)


def test_without_lambda_the_network_learns_from_labels_alone(tmp_path, monkeypatch):
    """Its parameters are the baseline's, bit by bit; the baseline looks at no pair of crops."""
    zero, *_ = run(tmp_path / "zero", lam=0.0, bank=8)
    monkeypatch.setattr(cac.ContrastiveNet, "features", None)
    baseline, state, _ = run(tmp_path / "sup", supervised_only=True)
    for name, value in baseline.model.named_parameters():
        assert torch.equal(value, zero.model.get_parameter(name)), name
    assert baseline.model.backbone.bn1.num_batches_tracked == 2
    assert not any("projector" in name for name in state["network"])


def test_a_batch_without_overlap_teaches_nothing(tmp_path):
    """Pictures of 48 x 64 pixels, 6 x 8 once scaled, hold no whole cell."""
    where = dict(dataset="folder", data_path=str(trees.folder_tree(tmp_path / "data")))
    *_, log = run(tmp_path / "run", pair_scales=(0.125, 0.125), **where)
    assert [line["loss_dc"] + line["taught"] + line["disagree"] for line in log] == [0, 0]


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("height, width", [(100, 83), (40, 130), (36, 36)])
def test_panels_show_the_crops_and_the_cells_that_are_taught(height, width, directed, monkeypatch):
    """By a loop over pixels; what no pixel of the overlap shows has no cell."""
    crops, confs, made, draw_boxes = [], [], [], cac.overlapping_crops

    def features(crop):
        crops.append(crop[0])
        confs.append(torch.rand(8, 8))
        return cac.Features(None, confs[-1].flatten(), None)

    def boxes(*args):
        made.append(draw_boxes(*args))
        return made[-1]

    monkeypatch.setattr(cac, "overlapping_crops", boxes)
    images = torch.rand(1, 3, height, width) + 1
    how = dict(crop=64, gamma=0.3, directed=directed, ious=(0.1, 0.9))
    areas, taught = cac.shown(images, SimpleNamespace(features=features), **how).values()
    (first, second, *_), gamma = made[0], 0.3
    for box, crop in zip((first, second), crops, strict=True):
        part = images[0, :, box[0] : box[2], box[1] : box[3]]
        assert torch.equal(crop[:, : part.shape[1], : part.shape[2]], part)
        assert crop.shape == (3, 64, 64) and crop.count_nonzero() == part.numel()
    within = lambda y, x, box: box[0] <= y < box[2] and box[1] <= x < box[3]  # noqa: E731
    cell = lambda y, x, box: ((y - box[0]) // 8, (x - box[1]) // 8)  # noqa: E731
    count = 0
    for y in range(height):
        for x in range(width):
            inside = [within(y, x, box) for box in (first, second)]
            assert areas[0, y, x] == inside[0] + 2 * inside[1]
            if not all(inside) or y >= height // 8 * 8 or x >= width // 8 * 8:
                assert taught[0, y, x] == 0 or all(inside)
                continue
            conf1, conf2 = confs[0][cell(y, x, first)], confs[1][cell(y, x, second)]
            one = conf2 > gamma and (conf1 < conf2 or not directed)
            two = conf1 > gamma and (conf2 < conf1 or not directed)
            assert taught[0, y, x] == one + 2 * two
            count += 1
    assert count > 100 and areas.shape == taught.shape == (1, height, width)


def test_panels_of_a_run_have_what_is_taught_and_those_of_the_baseline_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("common.run.panels", lambda *_, show, **how: drawn.append(show))
    for name in ("semi", "sup"):
        run(tmp_path / name, supervised_only=name == "sup", gamma=0.0)
    for _ in range(9):  # whole multiples of 8 apart, in a picture that leaves 32 pixels
        columns = drawn[0](torch.randn(1, 3, 64, 64))
        assert set(columns["crop 1 yellow, 2 blue, both green"].unique().tolist()) >= {1, 2, 3}
    assert "taught in 1 yellow, in 2 blue" in columns and drawn[1] is None


# --- several processes ---


def everything_learns(folder, **flags):
    """A run in which all cells are anchors that learn: its weights, and each step's negatives."""
    pools, push = [], cac.Bank.push
    flags |= dict(context=False, directed=False, gamma=0.0, pair_scales=(1.0, 1.0), lam=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", COUNTS)
        lighten(patch.setattr)
        patch.setattr(cac, "DeepLabV3Plus", Local)
        patch.setattr(cac.Bank, "push", lambda *a: pools.append(push(*a)) or pools[-1])
        result = cac.train(cac.Config(output_dir=str(folder), **TINY | flags | dict(width=3)))
        return result.model.state_dict(), pools


def one_of_two(folder):
    """What each of two processes does and saves."""
    learnt = everything_learns(folder / "run")
    torch.save(learnt, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does_from_the_negatives_of_the_whole_batch(tmp_path):
    """The loss is a mean over a process's own anchors, and then over processes."""
    for process in fork_two(partial(one_of_two, tmp_path)):
        end(process)
    weights, pools = everything_learns(tmp_path / "whole", batch_size=4)
    assert [len(labels) for _, labels in pools] == [128, 256]
    # Crop 1 of two pictures, crop 2, then those of the other process; one process has crop 1 of
    # all four pictures first. A step, a crop, a process's pictures, their 2 x 16 cells:
    order = [torch.arange(n).view(-1, 2, 2, 32).transpose(1, 2).flatten() for n in (128, 256)]
    pools = [(phi[o], labels[o]) for (phi, labels), o in zip(pools, order, strict=True)]
    for rank in (0, 1):
        of_process = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        close(of_process, (weights, pools), rtol=1e-4, atol=1e-5)
