"""IAL's mathematics against naive loops and dense matrices in float64, and SLIC."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from benchmark_ial import by_pixel, four_loops

import ial
from common.slic import UNITS, grid_shape, slic, to_lab

H, W, N = 5, 6, 30
RULES = ["softmax", "abs"]


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gates_for(*shape, scale=1.5):
    """Logits (B, 4, 4, H, W); one picture of H x W when no shape is given."""
    batch, height, width = shape or (1, H, W)
    return scale * tensor(batch, 4, 4, height, width)


def dense(gates, passes=1, rule="softmax"):
    """G (N, N) of the first picture: column j is the response to an impulse at pixel j."""
    height, width = gates.shape[-2:]
    impulses = torch.eye(height * width, dtype=gates.dtype).view(1, -1, height, width)
    return ial.propagate(impulses, gates[:1], passes, rule)[0].flatten(1).T


def only(direction, gates):
    """The gates of one scan; the other three let everything stay, so that 4 G - 3 I is the scan."""
    stay = torch.zeros_like(gates)
    stay[:, :, 3] = 1e3
    stay[:, direction] = gates[:, direction]
    return stay


def close(ours, expected, tolerance=1e-10):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# --- propagation ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("passes", [1, 2])
def test_propagate_is_the_loop_over_pixels(rule, shape, passes):
    values, gates = tensor(2, 3, *shape).requires_grad_(), gates_for(2, *shape).requires_grad_()
    ours, expected = (f(values, gates, passes, rule) for f in (ial.propagate, by_pixel))
    close(ours, expected)
    weights = tensor(*ours.shape)
    inputs = values, gates
    ours, expected = (
        torch.autograd.grad((weights * y).sum(), inputs, materialize_grads=True)
        for y in (ours, expected)
    )
    for pair in zip(ours, expected, strict=True):
        close(*pair)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("direction", range(4))
def test_each_scan_is_its_loop(rule, direction):
    gates = only(direction, gates_for(2, H, W))
    values = tensor(2, 3, H, W)
    close(ial.propagate(values, gates, 1, rule), by_pixel(values, gates, 1, rule))


def test_the_benchmark_compares_equals():
    values, gates = tensor(2, 3, H, W), gates_for(2, H, W)
    close(ial.propagate(values, gates, 2), four_loops(values, gates, 2))


def test_pictures_and_channels_do_not_mix():
    values, gates = tensor(3, 4, H, W), gates_for(3, H, W)
    together = ial.propagate(values, gates, 2)
    for b, c in product(range(3), range(4)):
        alone = ial.propagate(values[b : b + 1, c : c + 1], gates[b : b + 1], 2)
        close(together[b : b + 1, c : c + 1], alone)


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_g_sum_to_one(rule):
    matrix = dense(gates_for(), rule=rule)
    close(matrix.sum(1), torch.ones(N, dtype=torch.float64))
    if rule == "softmax":
        assert (matrix > 0).all()  # four scans reach every pixel
    else:
        assert (matrix < 0).any()


def test_identity_minus_g_is_a_laplacian():
    matrix = dense(gates_for(), passes=2)
    laplacian = torch.eye(N, dtype=torch.float64) - matrix
    close(laplacian.sum(1), torch.zeros(N, dtype=torch.float64))
    others = laplacian - torch.diag(laplacian.diagonal())
    assert (others <= 0).all()
    close(laplacian.diagonal(), -others.sum(1))


@pytest.mark.parametrize("rule", RULES)
def test_constant_maps_stay_and_probabilities_sum_to_one(rule):
    gates = gates_for(2, H, W)
    constant = torch.full((2, 1, H, W), 0.7, dtype=torch.float64)
    close(ial.propagate(constant, gates, 2, rule), constant)
    probs = ial.propagate(tensor(2, 4, H, W).softmax(1), gates, 2, rule)
    close(probs.sum(1), torch.ones(2, H, W, dtype=torch.float64))
    if rule == "softmax":
        assert (probs >= 0).all() and (probs <= 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_propagation_is_linear_and_is_g(rule):
    gates, first, second = gates_for(), tensor(1, 3, H, W), tensor(1, 3, H, W)
    whole = ial.propagate(2 * first - 3 * second, gates, 2, rule)
    parts = [ial.propagate(v, gates, 2, rule) for v in (first, second)]
    close(whole, 2 * parts[0] - 3 * parts[1])
    once = dense(gates, 1, rule)
    close(dense(gates, 2, rule), once @ once)
    close(whole[0].flatten(1), (2 * first - 3 * second)[0].flatten(1) @ (once @ once).T)


@pytest.mark.parametrize("rule", RULES)
def test_opposite_scans_mirror_each_other(rule):
    values, gates = tensor(1, 3, H, W), gates_for()
    mirrored = gates.flip(4)[:, [1, 0, 2, 3]]  # sources of a horizontal scan: the same rows
    mirrored[:, 2:, :3] = mirrored[:, 2:, :3].flip(2)  # of a vertical one: columns change sides
    ours = ial.propagate(values.flip(3), mirrored, 1, rule)
    close(ours, ial.propagate(values, gates, 1, rule).flip(3))
    turned = gates.mT[:, [2, 3, 0, 1]]
    close(ial.propagate(values.mT, turned, 1, rule), ial.propagate(values, gates, 1, rule).mT)


def test_a_scan_hears_only_what_lies_behind():
    """Left to right: pixel (r, c) hears the 45-degree cone of columns before its own."""
    matrix = 4 * dense(only(0, gates_for())) - 3 * torch.eye(N, dtype=torch.float64)
    heard = matrix.view(H, W, H, W).abs() > 1e-12
    for r, c, row, column in product(range(H), range(W), range(H), range(W)):
        behind = column < c and abs(row - r) <= c - column
        assert heard[r, c, row, column] == (behind or (r, c) == (row, column))


def test_a_row_with_equal_gates_halves_at_each_step():
    """Both diagonal sources are outside, so that same and own weigh 1/2 each."""
    gates = only(0, torch.zeros(1, 4, 4, 1, 6, dtype=torch.float64))
    impulse = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    impulse[..., 0] = 1
    scan = 4 * ial.propagate(impulse, gates) - 3 * impulse
    close(scan.flatten(), 0.5 ** torch.arange(6, dtype=torch.float64))


def test_gates_that_keep_everything_make_the_identity():
    gates = gates_for()
    gates[:, :, 3] = 1e3
    close(dense(gates), torch.eye(N, dtype=torch.float64), 0)
    close(dense(torch.zeros_like(gates), rule="abs"), torch.eye(N, dtype=torch.float64), 0)


def test_a_wall_lets_nothing_through():
    """Nearly nothing of a pixel's own passes, but at the wall its own value alone does."""
    wall, gates = 3, gates_for()
    gates[:, :2, 3] = -1e3
    gates[:, 0, 3, :, wall] = gates[:, 1, 3, :, wall - 1] = 1e3
    gates[:, 2:, (0, 2)] = -1e3  # vertical scans go straight
    step = (torch.arange(W) >= wall).double().expand(1, 1, H, W)
    close(ial.propagate(step, gates, 2), step)
    gates[:, 0, 3, 1, wall] = -1e3  # a hole
    assert (ial.propagate(step, gates, 1) - step).abs().max() > 0.1


def test_abs_with_positive_gates_ignores_the_inside():
    gates = gates_for().abs() + 0.1
    values = tensor(1, 1, H, W)
    changed = values.clone()
    changed[..., 1:-1, 1:-1] += 5
    for direction in range(4):
        scan = [
            4 * ial.propagate(v, only(direction, gates), 1, "abs") - 3 * v
            for v in (values, changed)
        ]
        inside = torch.zeros(H, W, dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        close(scan[0][..., inside], scan[1][..., inside])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 3)])
def test_gradients_are_the_numerical_ones(rule, shape):
    values, gates = tensor(1, 2, *shape).requires_grad_(), gates_for(1, *shape).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, z: ial.propagate(x, z, 2, rule), (values, gates), fast_mode=False
    )


def test_gradients_go_where_they_are_asked_for():
    values, gates = tensor(1, 2, H, W), gates_for()
    both = [t.clone().requires_grad_() for t in (values, gates)]
    expected = torch.autograd.grad(ial.propagate(*both, 2).square().sum(), both)
    alone = values.clone().requires_grad_()
    ial.propagate(alone, gates, 2).square().sum().backward()
    close(alone.grad, expected[0])
    alone = gates.clone().requires_grad_()
    ial.propagate(values, alone, 2).square().sum().backward()
    close(alone.grad, expected[1])
    assert not ial.propagate(values, gates, 2).requires_grad


def test_half_precision_is_raised():
    values, gates = tensor(1, 2, H, W).bfloat16(), gates_for().half()
    ours = ial.propagate(values, gates, 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, ial.propagate(values.float(), gates.float(), 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ial.propagate(values, gates, 2), ours)
    assert ial.propagate(values.double(), gates.double()).dtype == torch.float64


def test_propagation_leaves_its_inputs_alone():
    values, gates = tensor(1, 2, H, W), gates_for()
    copies = values.clone(), gates.clone()
    for rule in RULES:
        ial.propagate(values, gates, 2, rule)
    assert torch.equal(values, copies[0]) and torch.equal(gates, copies[1])
    with pytest.raises(ValueError, match="softmax"):
        ial.propagate(values, gates, 1, "max")


# --- energy ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [1, 2])
def test_energy_is_the_sum_over_pairs(rule, passes):
    values, gates = tensor(2, 3, H, W), gates_for(2, H, W)
    ours = ial.energy(values, gates, passes, rule)
    for b in range(2):
        matrix, total = dense(gates[b : b + 1], passes, rule), 0.0
        columns = values[b].flatten(1)
        for i, j in product(range(N), range(N)):
            total += 0.5 * matrix[i, j] * (columns[:, i] - columns[:, j]).square().sum()
        close(ours[b], total)
        symmetric = (matrix + matrix.T) / 2
        laplacian = torch.diag(symmetric.sum(1)) - symmetric
        close(ours[b], torch.einsum("ci,ij,cj->", columns, laplacian, columns))
        if rule == "softmax":
            assert torch.linalg.eigvalsh(laplacian).min() > -1e-12


def test_energy_falls_when_a_map_is_propagated():
    """No theorem for a G that is not symmetric, but so in every trial."""
    for _ in range(50):
        gates, values = gates_for(4, H, W), tensor(4, 3, H, W).softmax(1)
        for _ in range(3):
            before = ial.energy(values, gates)
            values = ial.propagate(values, gates)
            after = ial.energy(values, gates)
            assert (after >= 0).all() and (after < before).all()


def test_energy_of_a_symmetric_g_falls_always():
    """The theorem: doubly stochastic, spectrum in (-1, 1]. A Gaussian kernel on 30 points."""
    points = torch.rand(30, 2, dtype=torch.float64)
    matrix = torch.exp(-torch.cdist(points, points).square() / 0.1)
    for _ in range(1000):  # Sinkhorn, kept symmetric
        scale = matrix.sum(1).rsqrt()
        matrix = scale[:, None] * matrix * scale
    laplacian = torch.eye(30, dtype=torch.float64) - matrix
    close(laplacian.sum(1), torch.zeros(30, dtype=torch.float64))
    values = tensor(30, 3)
    energies = []
    for _ in range(6):
        energies.append(torch.einsum("ic,ij,jc->", values, laplacian, values).item())
        values = matrix @ values
    assert all(after < before for before, after in zip(energies, energies[1:], strict=False))


def test_energy_is_zero_without_edges_or_differences():
    constant = torch.full((1, 2, H, W), 0.3, dtype=torch.float64)
    close(ial.energy(constant, gates_for(), 2), torch.zeros(1, dtype=torch.float64))
    identity = only(0, gates_for())
    identity[:, 0] = identity[:, 1]
    close(ial.energy(tensor(1, 2, H, W), identity), torch.zeros(1, dtype=torch.float64))


# --- superpixels: means, projection, smoothness ---


def some_segments(batch=1, count=7, height=H, width=W):
    """Ids below count - 1: the last superpixel is empty."""
    return torch.randint(count - 1, (batch, height, width))


def dense_p(segments):
    """P (N, N) of the first picture, entry by entry."""
    ids = segments[0].flatten().tolist()
    return torch.tensor([[(i == j) / ids.count(i) for j in ids] for i in ids], dtype=torch.float64)


def test_segment_mean_is_the_loop_over_pixels():
    values, segments = tensor(2, 3, H, W), some_segments(2)
    means, sizes = ial.segment_mean(values, segments, 7)
    assert means.shape == (2, 7, 3) and sizes.shape == (2, 7) and sizes.dtype == torch.int64
    for b, s in product(range(2), range(7)):
        own = [values[b, :, r, c] for r, c in product(range(H), range(W)) if segments[b, r, c] == s]
        assert sizes[b, s] == len(own)
        close(means[b, s], sum(own) / len(own) if own else torch.zeros(3).double())
    assert sizes[:, 6].eq(0).all() and sizes.sum(1).eq(N).all()


def test_segment_mean_hears_its_own_pixels_only():
    values, segments = tensor(2, 3, H, W), some_segments(2)
    means, _ = ial.segment_mean(values, segments, 7)
    changed = torch.where((segments == 2)[:, None], values, tensor(2, 3, H, W))
    close(ial.segment_mean(changed, segments, 7)[0][:, 2], means[:, 2])
    half, _ = ial.segment_mean(values.bfloat16(), segments, 7)
    assert half.dtype == torch.float32


def test_projection_is_orthogonal():
    segments = some_segments()
    impulses = torch.eye(N, dtype=torch.float64).view(1, N, H, W)
    matrix = ial.project(impulses, segments, 7)[0].flatten(1).T
    close(matrix, dense_p(segments))
    close(matrix @ matrix, matrix)
    close(matrix, matrix.T)
    close(matrix.sum(1), torch.ones(N, dtype=torch.float64))
    values = tensor(2, 3, H, W).requires_grad_()
    segments = some_segments(2)
    assert torch.autograd.gradcheck(lambda v: ial.project(v, segments, 7), (values,))


def dense_smoothness(gates, segments, passes=1, rule="softmax"):
    """||(I - P) G||^2 / N, a mean over the batch."""
    total = 0.0
    for b in range(len(gates)):
        matrix = dense(gates[b : b + 1], passes, rule)
        total = total + (matrix - dense_p(segments[b : b + 1]) @ matrix).square().mean(0).sum()
    return total / len(gates)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [1, 2])
def test_smoothness_over_all_sign_maps_is_exact(rule, passes, monkeypatch):
    """The estimate's mean over the 2^6 sign maps of six pixels, and its gradient."""
    gates, segments = gates_for(2, 2, 3).requires_grad_(), some_segments(2, 3, 2, 3)
    signs = torch.tensor(list(product((0, 1), repeat=6)), dtype=torch.int8).view(64, 2, 3)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: signs.expand(2, 64, 2, 3))
    ours = ial.smoothness_loss(gates, segments, 3, 64, passes, rule=rule)
    expected = dense_smoothness(gates, segments, passes, rule)
    close(ours, expected)
    close(*(torch.autograd.grad(loss, gates)[0] for loss in (ours, expected)))


def test_smoothness_estimate_has_no_bias():
    gates, segments = gates_for(2, H, W), some_segments(2)
    ours = ial.smoothness_loss(gates, segments, 7, probes=5000)
    assert ours.item() == pytest.approx(dense_smoothness(gates, segments).item(), rel=0.02)


def test_smoothness_of_the_identity_counts_pixels_beyond_one_a_superpixel():
    gates, segments = gates_for(), some_segments()
    gates[:, :, 3] = 1e3
    used = len(segments.unique())
    assert dense_smoothness(gates, segments).item() == pytest.approx((N - used) / N, abs=1e-12)
    ours = ial.smoothness_loss(gates, segments, 7, probes=5000)
    assert ours.item() == pytest.approx((N - used) / N, rel=0.02)


def test_smoothness_is_zero_where_superpixels_are_single_pixels_or_get_equal_rows():
    single = torch.arange(N).view(1, H, W)
    close(ial.smoothness_loss(gates_for(), single, N), torch.zeros((), dtype=torch.float64))
    # Two pixels inside a 3 x 4 map take all from the same places: horizontal scans pass from one
    # to the other, vertical ones read the same pixel, straight or from the side.
    gates = gates_for(1, 3, 4)
    gates[..., 1, 1:3] = -1e3
    gates[:, 0, :, 1, 1], gates[:, 1, :, 1, 2] = tensor(4), tensor(4)  # as they enter: anything
    gates[:, 0, 1, 1, 2] = gates[:, 1, 1, 1, 1] = 0.0
    gates[:, 2:, 1, 1, 1] = gates[:, 2:, 0, 1, 2] = 0.0
    segments = torch.arange(12).view(1, 3, 4)
    segments[0, 1, 2] = segments[0, 1, 1]
    matrix = dense(gates)
    close(matrix[5], matrix[6])
    close(ial.smoothness_loss(gates, segments, 12), torch.zeros((), dtype=torch.float64))


def test_smoothness_draws_from_its_generator():
    gates, segments = gates_for(2, H, W), some_segments(2)

    def loss(seed):
        return ial.smoothness_loss(
            gates, segments, 7, generator=torch.Generator().manual_seed(seed)
        )

    assert loss(3) == loss(3) != loss(4)
    half = gates.half().requires_grad_()
    ial.smoothness_loss(half, segments, 7).backward()
    assert half.grad.isfinite().all()


# --- seeds ---


def test_seeds_of_a_ramp():
    """Class 2 of 3 rises from 0 to 1: background, unknown, class; the border values are unknown."""
    ramp = torch.linspace(0, 1, 11, dtype=torch.float64)
    cams = torch.stack([0 * ramp, ramp, 1 - 0 * ramp])[None, :, None]  # (1, 3, 1, 11)
    tags = torch.tensor([[True, True, False]])  # the third is brightest, but not there
    ours = ial.seeds(cams, tags, fg=ramp[6].item(), bg=ramp[2].item())
    assert ours.dtype == torch.int64
    assert ours[0, 0].tolist() == [0, 0, 255, 255, 255, 255, 255, 2, 2, 2, 2]


def test_seeds_are_the_loop_over_pixels():
    cams, tags = torch.rand(3, 4, H, W), torch.rand(3, 4) < 0.5
    tags[0], tags[1] = False, True
    ours = ial.seeds(cams, tags, 0.6, 0.3)
    for b, r, c in product(range(3), range(H), range(W)):
        scores = {k + 1: cams[b, k, r, c].item() for k in range(4) if tags[b, k]}
        best = max(scores, key=scores.get, default=0)
        if scores.get(best, -1) > 0.6:
            expected = best
        else:
            expected = 0 if scores.get(best, -1) < 0.3 else 255
        assert ours[b, r, c] == expected
    assert (ours[0] == 0).all() and (ial.seeds(cams, tags, 0.6, 0.0)[0] == 0).all()


# --- the 80 % rule and mining ---


@pytest.mark.parametrize("size", [5, 10, 15, 35, 55, 100, 145, 1005, 60_000])
def test_eighty_percent_are_enough_and_less_is_not(size):
    """Superpixel 0 has just the share of class 2; superpixel 1 one pixel less."""
    enough = size * 4 // 5
    labels = torch.ones(2, size, dtype=torch.int64)
    labels[0, :enough], labels[1, : enough - 1] = 2, 2
    segments = torch.arange(2)[:, None].expand(2, size)
    ours = ial.majority_labels(labels[None], segments[None], 3, 4)
    assert ours.dtype == torch.int64 and ours.tolist() == [[2, 255, 255]]


@pytest.mark.parametrize("share", [k / 100 for k in range(51, 101)] + [2 / 3])
def test_a_share_is_reached_however_it_is_rounded(share):
    size = 300
    enough = round(share * size)
    labels = torch.zeros(1, 2, size, dtype=torch.uint8)
    labels[0, 0, enough:], labels[0, 1, enough - 1 :] = 255, 255
    segments = torch.arange(2)[:, None].expand(1, 2, size)
    assert ial.majority_labels(labels, segments, 2, 21, share).tolist() == [[0, 255]]


def test_majority_is_the_loop_over_pixels():
    labels, segments = torch.randint(3, (2, 20, 20)), some_segments(2, 40, 20, 20)
    labels[torch.rand(labels.shape) < 0.2] = 255
    ours = ial.majority_labels(labels, segments, 40, 3, share=0.5)
    for b, s in product(range(2), range(40)):
        votes = labels[b][segments[b] == s].tolist()
        winners = [k for k in range(3) if votes and votes.count(k) / len(votes) >= 0.5]
        assert ours[b, s] in (winners or [255])
    assert (ours == 255).any() and (ours < 3).any() and (ours[:, 39] == 255).all()


def region_case(batch=3, count=50, classes=5):
    probs = tensor(batch, count, classes).mul(2).softmax(2)
    tags = torch.rand(batch, classes - 1) < 0.5
    tags[0] = False
    majority = torch.randint(classes, (batch, count))
    majority[torch.rand(batch, count) < 0.5] = 255
    return probs, majority, tags


def test_mining_is_the_loop_over_superpixels():
    probs, majority, tags = region_case()
    ours = ial.mine(probs, majority, tags, 0.7)
    strict = ial.mine(None, majority, tags, 0.7, "rule80")
    assert ours.dtype == strict.dtype == torch.int64
    for b, s in product(range(3), range(50)):
        allowed = [0, *(k + 1 for k in range(4) if tags[b, k])]
        own = {k: probs[b, s, k].item() for k in allowed}
        best = max(own, key=own.get)
        sure = own[best] / sum(own.values()) >= 0.7
        assert ours[b, s] == (best if sure else 255)
        label = majority[b, s].item()
        assert strict[b, s] == (label if label in allowed else 255)
    assert (ours[0] == 0).all()  # no tags: all is background


def test_mining_relabels_and_coverage_falls_with_tau():
    probs, majority, tags = region_case(count=400)
    mined = [ial.mine(probs, majority, tags, tau) for tau in (0.0, 0.5, 0.7, 0.9, 1.1)]
    cover = [(labels != 255).float().mean().item() for labels in mined]
    assert cover[0] == 1 and cover[-1] == 0 and cover == sorted(cover, reverse=True)
    known = (mined[2] != 255) & (majority != 255)
    assert (mined[2] != majority)[known].any()
    with pytest.raises(ValueError, match="relabel"):
        ial.mine(probs, majority, tags, 0.7, "veto")


def test_a_confidence_equal_to_tau_is_enough():
    """Of equal probabilities the first counts: the background."""
    probs = torch.full((1, 1, 4), 0.25)
    unknown, tags = torch.full((1, 1), 255), torch.tensor([[False, True, False]])
    assert ial.mine(probs, unknown, tags, 0.5).item() == 0
    assert ial.mine(probs, unknown, tags, 0.501).item() == 255


def test_a_superpixel_whose_probabilities_are_nan_is_unknown():
    probs, majority, tags = region_case()
    probs[:, 3] = torch.nan
    for tau in (0.0, 0.7):
        assert (ial.mine(probs, majority, tags, tau)[:, 3] == 255).all()


def test_masked_probabilities_are_those_of_the_tags():
    probs, tags = tensor(3, 4, H, W).softmax(1), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    ours = ial.mask_tags(probs, tags.bool())
    close(ours.sum(1), torch.ones(3, H, W, dtype=torch.float64))
    assert (ours[0, 2] == 0).all() and (ours[1, 0] == 1).all()
    close(ours[0, 1] * probs[0, 3], ours[0, 3] * probs[0, 1])
    close(ours[2], probs[2])


def test_masking_survives_having_nothing_left():
    """The network was sure of absent classes: all possible ones are equally likely."""
    probs = torch.zeros(1, 4, 1, 2, requires_grad=True)
    with torch.no_grad():
        probs[0, 2] = torch.tensor([1.0, torch.nan])  # absent: whatever it is
    ours = ial.mask_tags(probs, torch.tensor([[True, False, True]]))
    assert torch.equal(ours[0, :, 0, 0], torch.tensor([1, 1, 0, 1]) / 3)
    assert torch.equal(ours[0, :, 0, 0], ours[0, :, 0, 1])
    ours.square().sum().backward()
    assert probs.grad.isfinite().all()


# --- the affinity loss ---


def test_affinity_loss_is_the_loop_over_pixels():
    refined = tensor(2, 3, H, W).softmax(1)
    refined[0, 1, 0, 0], refined[0, 2, 0, 1] = 1e-9, 1.3
    refined.requires_grad_()
    labels = torch.randint(3, (2, H, W))
    labels[torch.rand(labels.shape) < 0.4] = 255
    labels[0, 0, 0], labels[0, 0, 1], labels[1, 0, 0] = 1, 2, 255
    terms = []
    for b, r, c in product(range(2), range(H), range(W)):
        if labels[b, r, c] != 255:
            p = refined[b, labels[b, r, c], r, c]
            terms.append(-math.log(1e-6) if p < 1e-6 else 0.0 if p > 1 else -torch.log(p))
    ours, expected = ial.affinity_loss(refined, labels), sum(terms) / len(terms)
    close(ours, expected)
    close(*(torch.autograd.grad(loss, refined)[0] for loss in (ours, expected)))


def test_affinity_loss_without_a_known_pixel_is_zero_and_connected():
    gates = gates_for(2, H, W).requires_grad_()
    refined = ial.propagate(tensor(2, 3, H, W).softmax(1), gates)
    loss = ial.affinity_loss(refined, torch.full((2, H, W), 255))
    loss.backward()
    assert loss == 0 and (gates.grad == 0).all()


def test_the_trivial_minimiser_is_why_regions_are_mined():
    """With the unary's own labels for Y the loss is smallest where G does nothing."""
    labels = torch.randint(3, (1, H, W))
    onehot = F.one_hot(labels, 3).permute(0, 3, 1, 2).double()
    gates = gates_for()
    assert ial.affinity_loss(ial.propagate(onehot, gates), labels) > 0.1
    gates[:, :, 3] = 1e3
    assert ial.affinity_loss(ial.propagate(onehot, gates), labels) == 0


# --- SLIC ---


def blobs(batch, height, width, noise=0.05):
    """Pictures with a few soft colours."""
    images = F.interpolate(torch.rand(batch, 3, 4, 4), (height, width), mode="bilinear")
    return (images + noise * torch.randn(batch, 3, height, width)).clamp(0, 1)


@pytest.mark.parametrize("size", [(20, 20), (13, 37), (37, 13), (1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_grids_have_about_as_many_cells_as_asked_for(size, share):
    segments = max(1, int(share * size[0] * size[1]))
    rows, columns = grid_shape(segments, *size)
    assert 1 <= rows <= size[0] and 1 <= columns <= size[1]
    assert abs(rows * columns - segments) <= min(rows, columns) / 2
    if size[0] != size[1]:
        assert grid_shape(segments, *size[::-1]) == (columns, rows)


def test_grids_are_never_larger_than_the_picture():
    for height, width in product((1, 2, 3, 5, 8), (1, 2, 3, 50, 100)):
        for segments in range(1, height * width + 1):
            rows, columns = grid_shape(segments, height, width)
            assert 1 <= rows <= height and 1 <= columns <= width
            assert abs(rows * columns - segments) <= min(rows, columns) / 2
    assert grid_shape(600, 321, 321) == (24, 25)


@pytest.mark.parametrize("size", [(40, 40), (31, 47), (50, 9)])
@pytest.mark.parametrize("color", ["lab", "rgb"])
def test_ids_are_below_the_number_of_cells(size, color):
    rows, columns = grid_shape(30, *size)
    ids = slic(blobs(2, *size), 30, color=color)
    assert ids.shape == (2, *size) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < rows * columns and len(ids.unique()) > 5


@pytest.mark.parametrize("color", ["lab", "rgb"])
def test_segments_do_not_cross_strong_edges(color):
    """Four blocks of flat colour whose borders are no borders of the grid."""
    image = torch.zeros(1, 3, 40, 44)
    image[:, 0, :17], image[:, 1, :, :23], image[:, 2] = 1, 1, 0.3
    block = (torch.arange(40)[:, None] < 17) * 2 + (torch.arange(44) < 23)
    ids = slic(image, 20, color=color)[0]
    assert all(len(block[ids == s].unique()) == 1 for s in ids.unique())


@pytest.mark.parametrize("size", [(40, 40), (31, 47)])
def test_the_most_compact_segments_are_the_grid(size):
    rows, columns = grid_shape(30, *size)
    down, across = (
        torch.arange(n) * cells // n for n, cells in zip(size, (rows, columns), strict=True)
    )
    grid = (down[:, None] * columns + across)[None]
    assert torch.equal(slic(blobs(1, *size), 30, compactness=1e4), grid)
    assert torch.equal(slic(blobs(1, *size), 30, iterations=0), grid)
    assert torch.equal(slic(torch.full((1, 3, *size), 0.4), 30), grid)  # and without any colour


@pytest.mark.parametrize("color, segments", [("lab", 10), ("rgb", 22), ("rgb", 100)])
def test_slic_is_the_loop_over_pixels(color, segments):
    height, width, compactness = 11, 14, 5.0
    image = torch.rand(1, 3, height, width)
    rows, columns = grid_shape(segments, height, width)
    colour = to_lab(image) if color == "lab" else 100 * image
    scale = compactness / (height * width / (rows * columns)) ** 0.5
    every = list(product(range(height), range(width)))
    feature = {
        (y, x): [
            round(UNITS * v) / UNITS for v in (*colour[0, :, y, x].tolist(), scale * y, scale * x)
        ]
        for y, x in every
    }
    cell = {(y, x): (y * rows // height, x * columns // width) for y, x in every}
    assigned, centres, empty = dict(cell), {}, 0
    for _ in range(4):
        for own in product(range(rows), range(columns)):
            members = [feature[p] for p in every if assigned[p] == own]
            empty += not members
            if members:
                centres[own] = [sum(v) / len(members) for v in zip(*members, strict=True)]
        for p in every:
            near = [(cell[p][0] + dy, cell[p][1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            assigned[p] = min(
                (c for c in near if c in centres), key=lambda c: math.dist(feature[p], centres[c])
            )
    expected = [r * columns + c for r, c in (assigned[p] for p in every)]
    ids = slic(image, segments, compactness, 4, color)
    assert ids.flatten().tolist() == expected
    assert empty > 0 or segments < 100  # some of the small segments lost all their pixels


def test_pictures_do_not_depend_on_their_batch():
    images = blobs(5, 33, 45)
    ids = slic(images, 40)
    assert torch.equal(ids, slic(images, 40))
    for image, own in zip(images, ids, strict=True):
        assert torch.equal(slic(image[None], 40)[0], own)


def test_lab_of_known_colours():
    known = {
        (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
        (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
        (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
        (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
        (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    }
    colours = torch.tensor(list(known), dtype=torch.float64)[..., None, None]
    torch.testing.assert_close(
        to_lab(colours)[..., 0, 0], torch.tensor(list(known.values())).double(), rtol=0, atol=0.05
    )


@pytest.mark.parametrize("segments", [0, -3, 401])
def test_numbers_of_segments_that_cannot_be_are_errors(segments):
    with pytest.raises(ValueError, match=f"{segments} segments"):
        slic(torch.rand(1, 3, 20, 20), segments)
    with pytest.raises(ValueError, match="color"):
        slic(torch.rand(1, 3, 20, 20), 10, color="hsv")
