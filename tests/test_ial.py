"""IAL's mathematics against naive loops and dense matrices in float64; its networks; SLIC."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bench import four_loops
from torch import Tensor, nn

import ial
from common.augment import MEAN, STD, normalise
from common.losses import VOID
from common.maps import at_pixels, pad
from common.slic import UNITS, grid_shape, slic, to_lab

H, W, N = 5, 6, 30
RULES = ["softmax", "abs"]
SCANS = ["mean", "sequence"]


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gates_for(*shape, scale=1.5):
    """Logits (B, 4, 4, H, W); one picture of H x W when no shape is given."""
    batch, height, width = shape or (1, H, W)
    return scale * tensor(batch, 4, 4, height, width)


def dense(gates, passes=1, rule="softmax", scans="mean"):
    """G (N, N) of the first picture: column j is the response to an impulse at pixel j."""
    height, width = gates.shape[-2:]
    impulses = torch.eye(height * width, dtype=gates.dtype).view(1, -1, height, width)
    return ial.propagate(impulses, gates[:1], passes, rule, scans)[0].flatten(1).T


def only(direction, gates):
    """The gates of one scan; the other three let everything stay, so that 4 G - 3 I is the scan."""
    stay = torch.zeros_like(gates)
    stay[:, :, 3] = 1e3
    stay[:, direction] = gates[:, direction]
    return stay


def eye(size=N):
    return torch.eye(size, dtype=torch.float64)


def close(ours, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=ours.dtype).expand_as(ours)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def same_gradients(ours, expected, inputs, tolerance=1e-10):
    """Both are equal, and their gradients under random weights."""
    close(ours, expected, tolerance)
    weights = torch.randn_like(ours)
    slopes = (
        torch.autograd.grad((weights * y).sum(), inputs, materialize_grads=True)
        for y in (ours, expected)
    )
    for own, other in zip(*slopes, strict=True):
        close(own, other, tolerance)


# --- propagation ---


def by_pixel(values, gates, passes=1, rule="softmax", scans="mean") -> Tensor:
    """`propagate`, pixel by pixel as the recurrence is written."""
    height, width = values.shape[2:]
    for _ in range(passes):
        scanned = []
        for direction in range(4):
            behind = 1 if direction in (1, 3) else -1  # right to left and bottom to top
            rows, columns = range(height)[::-behind], range(width)[::-behind]
            if direction < 2:
                order = [(r, c) for c in columns for r in rows]
            else:
                order = [(r, c) for r in rows for c in columns]
            x, z = pixels(values), pixels(gates[:, direction])  # (B, C), (B, 4) each
            h = {}
            for r, c in order:
                if direction < 2:
                    places = [(r + k, c + behind) for k in (-1, 0, 1)]
                else:
                    places = [(r + behind, c + k) for k in (-1, 0, 1)]
                found = [k for k, place in enumerate(places) if place in x]
                *weights, own = weights_of(z[r, c], found, rule)
                h[r, c] = own * x[r, c]
                for k, weight in zip(found, weights, strict=True):
                    h[r, c] = h[r, c] + weight * h[places[k]]
            lines = [torch.stack([h[r, c] for c in range(width)], dim=2) for r in range(height)]
            scanned.append(torch.stack(lines, dim=2))
            values = scanned[-1] if scans == "sequence" else values
        values = sum(scanned) / 4 if scans == "mean" else values
    return values


def pixels(maps: Tensor) -> dict[tuple[int, int], Tensor]:
    """(B, C, H, W) -> (B, C) by (row, column)."""
    return {
        (r, c): column
        for r, row in enumerate(maps.unbind(2))
        for c, column in enumerate(row.unbind(2))
    }


def weights_of(z: Tensor, found: list[int], rule: str) -> list[Tensor]:
    """Weights (B, 1) of the sources that exist, and of the pixel's own value, from z (B, 4)."""
    if rule == "softmax":
        return list(z[:, [*found, 3]].softmax(dim=1).split(1, dim=1))
    total = z[:, :3].abs().sum(dim=1, keepdim=True).clamp(min=1e-6)
    weights = [z[:, k : k + 1] / total for k in found]
    return [*weights, 1 - sum(weights, torch.zeros_like(total))]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("scans", SCANS)
def test_propagate_is_the_loop_over_pixels(rule, shape, passes, scans):
    inputs = tensor(2, 3, *shape).requires_grad_(), gates_for(2, *shape).requires_grad_()
    same_gradients(*(f(*inputs, passes, rule, scans) for f in (ial.propagate, by_pixel)), inputs)


def dense_scan(gates, direction, rule):
    """G_d of one picture from its definition: h = own x + W h, hence h = (I - W)^-1 own x."""
    height, width = gates.shape[-2:]
    behind, size = 1 if direction in (1, 3) else -1, height * width
    own, links = eye(size), 0 * eye(size)
    for r, c in product(range(height), range(width)):
        near = [(r + k, c + behind) if direction < 2 else (r + behind, c + k) for k in (-1, 0, 1)]
        found = [k for k, (y, x) in enumerate(near) if 0 <= y < height and 0 <= x < width]
        *shares, kept = weights_of(gates[:1, direction, :, r, c], found, rule)
        pixel = r * width + c
        own[pixel, pixel] = kept.item()
        for k, share in zip(found, shares, strict=True):
            links[pixel, near[k][0] * width + near[k][1]] = share.item()
    return torch.linalg.solve(eye(size) - links, own)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(H, W), (6, 3), (4, 4), (1, 5)])
def test_g_is_the_mean_of_four_matrices_or_their_product(rule, shape):
    gates = gates_for(1, *shape)
    first, second, third, fourth = (dense_scan(gates, direction, rule) for direction in range(4))
    matrices = dict(mean=(first + second + third + fourth) / 4)
    matrices["sequence"] = fourth @ third @ second @ first  # to the right first
    for scans, matrix in matrices.items():
        for passes in (1, 2, 3):
            expected = torch.linalg.matrix_power(matrix, passes)
            close(dense(gates, passes, rule, scans), expected)


def test_the_benchmark_compares_equals():
    values, gates = tensor(2, 3, H, W), gates_for(2, H, W)
    close(ial.propagate(values, gates, 2), four_loops(values, gates, 2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scans", SCANS)
def test_identity_minus_g_is_a_laplacian(rule, scans):
    """Rows of G sum to 1; under softmax all its entries are positive: four scans reach all."""
    for passes in (1, 2):
        matrix = dense(gates_for(), passes, rule, scans)
        close(matrix.sum(1), 1.0)
        laplacian = eye() - matrix
        close(laplacian.diagonal(), -(laplacian - torch.diag(laplacian.diagonal())).sum(1))
        assert (matrix > 0).all() if rule == "softmax" else (matrix < 0).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scans", SCANS)
def test_constant_maps_stay_and_probabilities_sum_to_one(rule, scans):
    gates = gates_for(2, H, W)
    close(ial.propagate(torch.full((2, 1, H, W), 0.7).double(), gates, 2, rule, scans), 0.7, 1e-7)
    probs = ial.propagate(tensor(2, 4, H, W).softmax(1), gates, 2, rule, scans)
    close(probs.sum(1), 1.0)
    assert rule == "abs" or ((probs >= 0) & (probs <= 1)).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scans", SCANS)
def test_propagation_is_linear_and_is_g(rule, scans):
    gates, first, second = gates_for(), tensor(1, 3, H, W), tensor(1, 3, H, W)
    whole = ial.propagate(2 * first - 3 * second, gates, 2, rule, scans)
    parts = [ial.propagate(v, gates, 2, rule, scans) for v in (first, second)]
    close(whole, 2 * parts[0] - 3 * parts[1])
    once = dense(gates, 1, rule, scans)
    close(dense(gates, 2, rule, scans), once @ once)
    close(whole[0].flatten(1), (2 * first - 3 * second)[0].flatten(1) @ (once @ once).T)


@pytest.mark.parametrize("rule", RULES)
def test_opposite_scans_mirror_each_other(rule):
    values, gates = tensor(1, 3, H, W), gates_for()
    mirrored = gates.flip(4)[:, [1, 0, 2, 3]]  # sources of a horizontal scan: the same rows
    mirrored[:, 2:, :3] = mirrored[:, 2:, :3].flip(2)  # of a vertical one: columns change sides
    ours = ial.propagate(values, gates, 1, rule)
    close(ial.propagate(values.flip(3), mirrored, 1, rule), ours.flip(3))
    close(ial.propagate(values.mT, gates.mT[:, [2, 3, 0, 1]], 1, rule), ours.mT)


def test_scans_where_all_stays_leave_a_sequence_as_it_is():
    for direction in range(4):
        gates = only(direction, gates_for())
        close(dense(gates, scans="sequence"), 4 * dense(gates) - 3 * eye())


def test_a_scan_hears_only_what_lies_behind():
    """Left to right: pixel (r, c) hears the 45-degree cone of columns before its own."""
    heard = (4 * dense(only(0, gates_for())) - 3 * eye()).view(H, W, H, W).abs() > 1e-12
    for r, c, row, column in product(range(H), range(W), range(H), range(W)):
        behind = column < c and abs(row - r) <= c - column
        assert heard[r, c, row, column] == (behind or (r, c) == (row, column))


def test_a_row_with_equal_gates_halves_at_each_step():
    """Both diagonal sources are outside, so that same and own weigh 1/2 each."""
    scan = 4 * dense(only(0, torch.zeros(1, 4, 4, 1, 6).double())) - 3 * eye(6)
    close(scan[:, 0], 0.5 ** torch.arange(6).double())


def test_gates_that_keep_everything_make_the_identity():
    gates = gates_for()
    gates[:, :, 3] = 1e3
    close(dense(gates), eye(), 0)
    close(dense(torch.zeros_like(gates), rule="abs"), eye(), 0)


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


def ideal_gates(inside, head):
    """Open inside a region and outside, closed at its border; what is known keeps its own value."""
    height, width = inside.shape
    gates, outer = tensor(1, 4, 4, height, width).zero_(), F.pad(inside[None].float(), (1, 1, 1, 1))
    for direction, k in product(range(4), range(3)):
        behind = 2 if direction in (1, 3) else 0  # in `outer`, whose places are one further
        top, left = (k, behind) if direction < 2 else (behind, k)
        source = outer[0, top : top + height, left : left + width].bool()
        gates[0, direction, k][source != inside] = -1e3
    gates[:, :, 3] = torch.where(head, 1e3, -4.0)
    return gates


@pytest.mark.parametrize("left", [4, 13, 22])  # the bar's left end, its middle, its right end
@pytest.mark.parametrize("upright", [False, True])
def test_a_pass_in_sequence_fills_a_bar_of_which_the_mean_fills_half(left, upright):
    """6 x 24 cells, of which 6 x 6 are known; the others are background, with 90 %."""
    inside, head = torch.zeros(2, 14, 32, dtype=torch.bool)
    inside[4:10, 4:28], head[4:10, left : left + 6] = True, True
    inside, head = (inside.T, head.T) if upright else (inside, head)
    bar = torch.where(head, 1.0, torch.where(inside, 0.1, 0.0)).double()
    values, gates = torch.stack([1 - bar, bar])[None], ideal_gates(inside, head)

    def iou(passes, scans):
        filled = ial.propagate(values, gates, passes, scans=scans)[0].argmax(dim=0).bool()
        return ((filled & inside).sum() / (filled | inside).sum()).item()

    assert iou(1, "sequence") == iou(2, "sequence") == 1
    assert iou(2, "mean") == pytest.approx(0.5 if left == 13 else 0.375)


def test_abs_with_positive_gates_ignores_the_inside():
    gates, inside = gates_for().abs() + 0.1, torch.zeros(H, W, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    for direction in range(4):
        scan = 4 * dense(only(direction, gates), rule="abs") - 3 * eye()
        close(scan[inside.flatten()][:, inside.flatten()], 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 3)])
@pytest.mark.parametrize("scans", SCANS)
def test_gradients_are_the_numerical_ones(rule, shape, scans):
    inputs = tensor(1, 2, *shape).requires_grad_(), gates_for(1, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: ial.propagate(x, z, 2, rule, scans), inputs)


def test_gradients_go_where_they_are_asked_for():
    inputs = tensor(1, 2, H, W), gates_for()
    both = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(ial.propagate(*both, 2).square().sum(), both)
    for which in (0, 1):
        some = [t.clone().requires_grad_(which == k) for k, t in enumerate(inputs)]
        ial.propagate(*some, 2).square().sum().backward()
        close(some[which].grad, expected[which])
    assert not ial.propagate(*inputs, 2).requires_grad


def test_half_precision_is_raised():
    values, gates = tensor(1, 2, H, W).bfloat16(), gates_for().half()
    ours = ial.propagate(values, gates, 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, ial.propagate(values.float(), gates.float(), 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ial.propagate(values, gates, 2), ours)
    assert ial.propagate(values.double(), gates.double()).dtype == torch.float64
    assert ial.energy(values, gates).dtype == torch.float32


def test_propagation_leaves_its_inputs_alone():
    values, gates = tensor(1, 2, H, W), gates_for()
    copies = values.clone(), gates.clone()
    for rule, scans in product(RULES, SCANS):
        ial.propagate(values, gates, 2, rule, scans)
    assert torch.equal(values, copies[0]) and torch.equal(gates, copies[1])
    with pytest.raises(ValueError, match="softmax"):
        ial.propagate(values, gates, 1, "max")
    with pytest.raises(ValueError, match="sequence"):
        ial.propagate(values, gates, scans="max")


# --- energy ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("scans", SCANS)
def test_energy_is_the_sum_over_pairs(rule, passes, scans):
    values, gates = tensor(2, 3, H, W), gates_for(2, H, W)
    ours = ial.energy(values, gates, passes, rule, scans)
    for b in range(2):
        matrix, columns = dense(gates[b : b + 1], passes, rule, scans), values[b].flatten(1)
        pairs = (
            matrix[i, j] * (columns[:, i] - columns[:, j]).square().sum()
            for i, j in product(range(N), range(N))
        )
        close(ours[b], sum(pairs) / 2)
        symmetric = (matrix + matrix.T) / 2
        laplacian = torch.diag(symmetric.sum(1)) - symmetric
        close(ours[b], torch.einsum("ci,ij,cj->", columns, laplacian, columns))
        assert rule == "abs" or torch.linalg.eigvalsh(laplacian).min() > -1e-12


@pytest.mark.parametrize("scans", SCANS)
def test_energy_falls_when_a_map_is_propagated(scans):
    """No theorem for a G that is not symmetric, but so in every trial."""
    for _ in range(50):
        gates, values = gates_for(4, H, W), tensor(4, 3, H, W).softmax(1)
        for _ in range(3):
            before = ial.energy(values, gates, scans=scans)
            values = ial.propagate(values, gates, scans=scans)
            after = ial.energy(values, gates, scans=scans)
            assert (after >= 0).all() and (after < before).all()


def test_energy_is_zero_without_edges_or_differences():
    close(ial.energy(torch.full((1, 2, H, W), 0.3).double(), gates_for(), 2), 0.0)
    identity = only(0, gates_for())
    identity[:, 0] = identity[:, 1]
    close(ial.energy(tensor(1, 2, H, W), identity), 0.0)


# --- superpixels: means, projection, smoothness ---


def some_segments(batch=1, count=7, height=H, width=W):
    """Ids below count - 1: the last superpixel is empty."""
    return torch.randint(count - 1, (batch, height, width))


def dense_p(segments):
    """P (N, N) of the first picture, entry by entry."""
    ids = segments[0].flatten().tolist()
    return torch.tensor([[(i == j) / ids.count(i) for j in ids] for i in ids], dtype=torch.float64)


def test_segment_mean_is_the_loop_over_pixels():
    """Hence a superpixel hears its own pixels alone."""
    values, segments = tensor(2, 3, H, W), some_segments(2)
    means, sizes = ial.segment_mean(values, segments, 7)
    assert means.shape == (2, 7, 3) and sizes.shape == (2, 7) and sizes.dtype == torch.int64
    for b, s in product(range(2), range(7)):
        own = [values[b, :, r, c] for r, c in product(range(H), range(W)) if segments[b, r, c] == s]
        assert sizes[b, s] == len(own)
        close(means[b, s], sum(own) / len(own) if own else 0.0)
    assert ial.segment_mean(values.bfloat16(), segments, 7)[0].dtype == torch.float32


def test_projection_is_orthogonal():
    segments, impulses = some_segments(), eye().view(1, N, H, W)
    matrix = ial.project(impulses, segments, 7)[0].flatten(1).T
    close(matrix, dense_p(segments))
    close(matrix @ matrix, matrix)
    close(matrix, matrix.T)
    close(matrix.sum(1), 1.0)
    values, segments = tensor(2, 3, H, W).requires_grad_(), some_segments(2)
    assert torch.autograd.gradcheck(lambda v: ial.project(v, segments, 7), (values,))


def test_labels_of_superpixels_are_painted_and_found_again():
    segments = torch.tensor([[[0, 0, 2], [2, 4, 4]], [[1, 1, 1], [1, 3, 0]]])
    labels = torch.tensor([[5, 255, 7, 255, 0], [1, 2, 255, 255, 255]])
    painted = ial.paint(labels, segments)
    assert painted.tolist() == [[[5, 5, 7], [7, 0, 0]], [[2, 2, 2], [2, 255, 1]]]
    assert torch.equal(ial.of_segments(painted, segments, 5), labels)


def dense_smoothness(gates, segments, passes=1, rule="softmax", scans="mean"):
    """||(I - P) G||^2 / N, a mean over the batch."""
    total = 0.0
    for b in range(len(gates)):
        matrix = dense(gates[b : b + 1], passes, rule, scans)
        total = total + (matrix - dense_p(segments[b : b + 1]) @ matrix).square().mean(0).sum()
    return total / len(gates)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("scans", SCANS)
def test_smoothness_over_all_sign_maps_is_exact(rule, passes, scans, monkeypatch):
    """The estimate's mean over the 2^6 sign maps of six pixels, and its gradient."""
    gates, segments = gates_for(2, 2, 3).requires_grad_(), some_segments(2, 3, 2, 3)
    signs = torch.tensor(list(product((0, 1), repeat=6)), dtype=torch.int8).view(64, 2, 3)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: signs.expand(2, 64, 2, 3))
    ours = ial.smoothness_loss(gates, segments, 3, 64, passes, rule=rule, scans=scans)
    same_gradients(ours, dense_smoothness(gates, segments, passes, rule, scans), (gates,))


def test_smoothness_estimate_has_no_bias():
    """For gates of all kinds, and for the identity, which has an edge less for each superpixel."""
    gates, segments = gates_for(2, H, W), some_segments(2)
    ours = ial.smoothness_loss(gates, segments, 7, probes=5000)
    assert ours.item() == pytest.approx(dense_smoothness(gates, segments).item(), rel=0.02)
    gates, share = only(0, gates[:1]), (N - len(segments[0].unique())) / N
    gates[:, 0] = gates[:, 1]
    assert dense_smoothness(gates, segments).item() == pytest.approx(share, abs=1e-12)
    ours = ial.smoothness_loss(gates, segments[:1], 7, probes=5000)
    assert ours.item() == pytest.approx(share, rel=0.02)
    close(ial.smoothness_loss(gates_for(), torch.arange(N).view(1, H, W), N), 0.0)


def test_smoothness_draws_from_its_generator():
    gates, segments = gates_for(2, H, W), some_segments(2)
    first, again, other = (
        ial.smoothness_loss(gates, segments, 7, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert first == again != other
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
        score = scores.get(best, -1)
        assert ours[b, r, c] == (best if score > 0.6 else 0 if score < 0.3 else 255)
    assert (ours[0] == 0).all() and (ial.seeds(cams, tags, 0.6, 0.0)[0] == 0).all()


def test_activation_maps_undo_flips_and_scales():
    """A network that looks at single pixels: its maps are those of the unflipped picture."""
    net = nn.Conv2d(3, 4, 1, bias=False)
    net.weight.data[3] = 0  # a class without activation anywhere
    images = torch.randn(2, 3, 40, 48)
    tags = torch.tensor([[True, False, True, True], [True, True, False, False]])

    def over_maximum(scores):
        scores = scores * tags[:, :, None, None]
        return scores / scores.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)

    ours, scores = ial.activation_maps(net, images, tags, (1.0,)), net(images).relu()
    torch.testing.assert_close(ours, over_maximum(scores))
    assert ours.shape == (2, 4, 40, 48) and not ours.requires_grad
    assert ours.amax(dim=(2, 3)).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    twice = ial.resize(net(ial.resize(images, (80, 96))).relu(), (40, 48))
    ours = ial.activation_maps(net, images, tags, (1.0, 2.0))
    torch.testing.assert_close(ours, over_maximum(scores + twice))


def test_activation_maps_see_the_mirrored_picture_too():
    sizes = []

    def ramp(images):
        sizes.append(tuple(images.shape[2:]))
        return torch.arange(1.0, 9).expand(1, 1, 6, 8)

    ours = ial.activation_maps(ramp, torch.zeros(1, 3, 36, 48), torch.tensor([[True]]), (1.0, 0.1))
    torch.testing.assert_close(ours, torch.ones(1, 1, 36, 48))
    assert sizes == [(36, 48)] * 2 + [(32, 32)] * 2  # never too small for a network


# --- the 80 % rule and mining ---


@pytest.mark.parametrize("share", [k / 100 for k in range(51, 101)] + [2 / 3])
@pytest.mark.parametrize("size", [300, 60_000])
def test_a_share_is_enough_and_less_is_not_however_it_is_rounded(share, size):
    """Superpixel 0 has just the share of class 2; superpixel 1 one pixel less; 2 is empty."""
    enough = round(share * size)
    labels = torch.full((1, 2, size), 2, dtype=torch.uint8)
    labels[0, 0, enough:], labels[0, 1, enough - 1 :] = 255, 255
    segments = torch.arange(2)[:, None].expand(1, 2, size)
    ours = ial.majority_labels(labels, segments, 3, 21, share)
    assert ours.dtype == torch.int64 and ours.tolist() == [[2, 255, 255]]


def test_majority_is_the_loop_over_pixels():
    labels, segments = torch.randint(3, (2, 20, 20)), some_segments(2, 40, 20, 20)
    labels[torch.rand(labels.shape) < 0.2] = 255
    for share in (0.5, 0.8):
        ours = ial.majority_labels(labels, segments, 40, 3, share)
        for b, s in product(range(2), range(40)):
            votes = labels[b][segments[b] == s].tolist()
            winners = [k for k in range(3) if votes and votes.count(k) / len(votes) >= share]
            assert ours[b, s] in (winners or [255])
    assert (ours == 255).any() and (ours < 3).any() and (ours[:, 39] == 255).all()
    assert torch.equal(ial.majority_labels(labels, segments, 40, 3), ours)


def region_case(batch=3, count=50, classes=5):
    probs = tensor(batch, count, classes).mul(2).softmax(2)
    tags = torch.rand(batch, classes - 1) < 0.5
    tags[0] = False
    majority = torch.randint(classes, (batch, count))
    majority[torch.rand(batch, count) < 0.5] = 255
    return probs, majority, tags


def test_mining_is_the_loop_over_superpixels():
    probs, majority, tags = region_case()
    ours = {mode: ial.mine(probs, majority, tags, 0.7, mode) for mode in ("relabel", "agree")}
    ours["rule80"] = ial.mine(None, majority, tags, 0.7, "rule80")
    assert torch.equal(ial.mine(probs, majority, tags, 0.7), ours["relabel"])
    assert all(labels.dtype == torch.int64 for labels in ours.values())
    for b, s in product(range(3), range(50)):
        allowed = [0, *(k + 1 for k in range(4) if tags[b, k])]
        own = {k: probs[b, s, k].item() for k in allowed}
        best, label = max(own, key=own.get), majority[b, s].item()
        sure = own[best] / sum(own.values()) >= 0.7
        assert ours["relabel"][b, s] == (best if sure else 255)
        assert ours["agree"][b, s] == (best if sure and label == best else 255)
        assert ours["rule80"][b, s] == (label if label in allowed else 255)
    assert (ours["relabel"][0] == 0).all()  # no tags: all is background
    with pytest.raises(ValueError, match="relabel"):
        ial.mine(probs, majority, tags, 0.7, "veto")


def test_a_confidence_equal_to_tau_is_enough_and_nan_never_is():
    """Of equal probabilities the first counts: the background."""
    probs = torch.full((1, 1, 4), 0.25)
    tags = torch.tensor([[False, True, False]])
    for label in (255, 0, 2):
        majority = torch.full((1, 1), label)
        for mode, expected in (("relabel", 0), ("agree", 255 if label else 0)):
            assert ial.mine(probs, majority, tags, 0.5, mode).item() == expected
            assert ial.mine(probs, majority, tags, 0.501, mode).item() == 255
            assert ial.mine(torch.nan * probs, majority, tags, 0.0, mode).item() == 255


def test_masked_probabilities_are_those_of_the_tags():
    """Where the network was sure of absent classes, all possible ones are equally likely."""
    probs, tags = tensor(3, 4, H, W).softmax(1), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    ours = ial.mask_tags(probs, tags.bool())
    close(ours.sum(1), 1.0)
    assert (ours[0, 2] == 0).all() and (ours[1, 0] == 1).all()
    close(ours[0, 1] * probs[0, 3], ours[0, 3] * probs[0, 1])
    close(ours[2], probs[2])
    nothing = torch.zeros(1, 4, 1, 2)
    nothing[0, 2] = torch.tensor([1.0, torch.nan])  # absent: whatever it is
    ours = ial.mask_tags(nothing.requires_grad_(), tags[:1].bool())
    close(ours, torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 4, 1, 1) / 3, 0)
    ours.square().sum().backward()
    assert nothing.grad.isfinite().all()


def test_region_loss_is_the_mean_over_classes_of_means_over_regions():
    """Unbalanced, the mean over regions: cross-entropy."""
    logits = tensor(2, 9, 4).requires_grad_()
    labels = torch.tensor([[0, 0, 0, 0, 2, 255, 0, 0, 2], [255, 0, 3, 0, 0, 0, 0, 255, 0]])
    means = []
    for kind in (0, 2, 3):
        own = [(b, s) for b, s in product(range(2), range(9)) if labels[b, s] == kind]
        means.append(sum(-logits[b, s].log_softmax(0)[kind] for b, s in own) / len(own))
    same_gradients(ial.region_loss(logits, labels).double(), sum(means) / 3, (logits,), 1e-6)
    ours = ial.region_loss(logits, labels, balance=False).double()
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=VOID)
    same_gradients(ours, plain, (logits,), 1e-6)
    for balance in (True, False):
        nothing = ial.region_loss(logits, torch.full_like(labels, VOID), balance)
        nothing.backward()
        assert nothing == 0 and (logits.grad == 0).all()


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
    same_gradients(ial.affinity_loss(refined, labels), sum(terms) / len(terms), (refined,))


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


# --- networks ---


@pytest.mark.parametrize("net, strides", [("small", (4, 2)), ("resnet18", (16, 2))])
def test_networks_fit_odd_sizes(net, strides):
    images = torch.randn(2, 3, 37, 45)
    scores = ial.TagNet(5, net, "none")(images)
    assert scores.shape == (2, 5, *(-(-side // strides[0]) for side in (37, 45)))
    for stride in (2, 3, 4):
        gates = ial.GuidanceNet(net, "none", stride)(images)
        assert gates.shape == (2, 4, 4, -(-37 // stride), -(-45 // stride))
    region = ial.RegionNet(4, net, "none").eval()
    logits = region(images, torch.randint(6, (2, 19, 23)), 7)
    assert logits.shape == (2, 7, 4)
    assert torch.equal(logits[0, 6], logits[1, 6])  # nobody's: features of 0
    assert all(output.isfinite().all() for output in (scores, gates, logits))


def test_the_region_network_sees_little_around_a_superpixel():
    region = ial.RegionNet(4, "small", "none").eval()
    images = torch.randn(1, 3, 48, 48, requires_grad=True)
    segments = torch.zeros(1, 24, 24, dtype=torch.long)
    segments[0, 12:15, 6:9] = 1
    region(images, segments, 2)[0, 1].square().sum().backward()
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero().unbind(1)
    assert rows.min() >= 24 - 4 and rows.max() < 30 + 4
    assert columns.min() >= 12 - 4 and columns.max() < 18 + 4


def test_the_trunk_of_a_larger_resnet_has_its_widths():
    stages, widths = ial.trunk("resnet50", "none", 3, [])
    assert len(stages) == 3 and widths == [64, 256, 512]
    features = torch.randn(1, 3, 32, 32)
    for stage, width, size in zip(stages, widths, (16, 8, 4), strict=True):
        features = stage.eval()(features)
        assert features.shape == (1, width, size, size)


# --- views; pixels and cells ---


@pytest.mark.parametrize("crop, stride", [(16, 2), (16, 4), (48, 2), (48, 4)])
def test_windows_show_the_same_place_of_picture_labels_and_cells(crop, stride):
    """A picture of its own coordinates; crops of 48 reach beyond its 37 x 45 pixels."""
    rows, columns = torch.meshgrid(torch.arange(37), torch.arange(45), indexing="ij")
    picture = torch.stack([rows, columns, 0 * rows]).byte()
    cells = pad(picture, stride)[:, ::stride, ::stride].float() // stride
    tops, lefts, flips = set(), set(), set()
    for _ in range(200):
        image, labels, cut = ial.crop_view(crop, stride, picture, 64 * rows + columns, cells)
        assert image.shape == (3, crop, crop) and labels.shape == (crop, crop)
        assert cut.shape == (3, crop // stride, crop // stride)
        row, column, _ = (255 * (image * STD + MEAN)).round().long()
        assert torch.equal(64 * row + column, labels)
        large = cut.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        assert torch.equal(large[:2], torch.stack([row, column]).float() // stride)
        flipped = bool(column[0, 0] > column[0, -1])
        column = column.flip(-1) if flipped else column
        top, left = int(row[0, 0]), int(column[0, 0])
        assert row[:, 0].tolist() == [min(top + k, 36) for k in range(crop)]
        assert column[0].tolist() == [min(left + k, 44) for k in range(crop)]
        tops, lefts, flips = tops | {top}, lefts | {left}, flips | {flipped}
    assert tops == set(range(0, max(37 - crop, 0) + 1, stride)) and len(flips) == 2
    assert lefts == set(range(0, max(45 - crop, 0) + 1, stride))


def test_a_view_for_tags_is_a_crop_with_all_tags():
    picture, tags = torch.full((3, 40, 40), 255, dtype=torch.uint8), torch.tensor([True, False])
    image, given = ial.tag_view(picture, tags, 32, (1.0,))
    assert image.shape == (3, 32, 32) and torch.equal(given, tags)
    assert torch.equal(image, normalise(torch.ones(3, 32, 32)))


def test_pixels_and_cells():
    """Pictures are continued, labels taken from one pixel of a cell, probabilities enlarged."""
    maps = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(pad(maps, 2), maps[:, [0, 1, 2, 2]])
    assert torch.equal(pad(maps[0], 3), maps[0][:, [0, 1, 2, 3, 3, 3]])
    assert torch.equal(pad(maps, 1), maps)
    labels = torch.arange(48).view(1, 6, 8)
    assert ial.at_cells(labels, 2).tolist() == [
        [[9, 11, 13, 15], [25, 27, 29, 31], [41, 43, 45, 47]]
    ]
    assert torch.equal(ial.at_cells(labels, 1), labels)
    assert at_pixels(torch.rand(1, 2, 3, 5), 4).shape == (1, 2, 12, 20)
    middle = at_pixels(torch.tensor([[[[0.0, 1.0]]]]), 2)[0, 0, 0]
    assert middle.tolist() == [0, 0.25, 0.75, 1]


def test_clamped_cells_are_means_over_their_pixels():
    unary = torch.rand(2, 3, 2, 3).softmax(dim=1)
    mined = torch.randint(4, (2, 4, 6))
    mined[mined == 3] = VOID
    ours = ial.clamped(unary, mined, 2)
    for b, row, column in product(range(2), range(2), range(3)):
        expected = torch.zeros(3)
        for y, x in product((2 * row, 2 * row + 1), (2 * column, 2 * column + 1)):
            label = int(mined[b, y, x])
            expected += (unary[b, :, row, column] if label == VOID else torch.eye(3)[label]) / 4
        torch.testing.assert_close(ours[b, :, row, column], expected)


# --- SLIC ---


def blobs(batch, height, width, noise=0.05):
    """Pictures with a few soft colours."""
    images = F.interpolate(torch.rand(batch, 3, 4, 4), (height, width), mode="bilinear")
    return (images + noise * torch.randn(batch, 3, height, width)).clamp(0, 1)


def test_grids_have_about_as_many_cells_as_asked_for_and_fit_the_picture():
    sides = [*product((1, 2, 3, 5, 8, 13, 20), (1, 2, 3, 37, 50))]
    for height, width in [*sides, *((width, height) for height, width in sides)]:
        for segments in range(1, height * width + 1):
            rows, columns = grid_shape(segments, height, width)
            assert 1 <= rows <= height and 1 <= columns <= width
            assert abs(rows * columns - segments) <= min(rows, columns) / 2
            if height != width:
                assert grid_shape(segments, width, height) == (columns, rows)
    assert grid_shape(600, 321, 321) == (24, 25)


def test_ids_are_below_the_number_of_cells_and_do_not_cross_strong_edges():
    """The second: four blocks of flat colour whose borders are no borders of the grid."""
    for size in ((40, 40), (31, 47), (50, 9)):
        ids = slic(blobs(2, *size), 30)
        assert ids.shape == (2, *size) and ids.dtype == torch.int64 and len(ids.unique()) > 5
        assert ids.min() >= 0 and ids.max() < math.prod(grid_shape(30, *size))
    for zoom in (1, 4):  # pixels of the large picture are labelled in two lots
        image = torch.zeros(1, 3, 40 * zoom, 44 * zoom)
        image[:, 0, : 17 * zoom], image[:, 1, :, : 23 * zoom], image[:, 2] = 1, 1, 0.3
        block = image[0, 0] * 2 + image[0, 1]
        ids = slic(image, 20)[0]
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


@pytest.mark.parametrize("segments", [10, 22, 100])
def test_slic_is_the_loop_over_pixels(segments):
    height, width, compactness = 11, 14, 5.0
    image = torch.rand(1, 3, height, width)
    rows, columns = grid_shape(segments, height, width)
    colour = to_lab(image)
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
    assert slic(image, segments, compactness, 4).flatten().tolist() == expected
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
    colours, expected = (torch.tensor(list(side)).double() for side in (known, known.values()))
    close(to_lab(colours[..., None, None])[..., 0, 0], expected, 0.05)


@pytest.mark.parametrize("segments", [0, -3, 401])
def test_numbers_of_segments_that_cannot_be_are_errors(segments):
    with pytest.raises(ValueError, match=f"{segments} segments"):
        slic(torch.rand(1, 3, 20, 20), segments)
