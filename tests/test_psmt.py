"""PS-MT's equations against per-pixel loops in float64, T-VAT, gradients, limits, short runs."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import trees
from test_run import finish, start
from torch import nn

import psmt
from common import shapes
from common.deeplab import DeepLabV3Plus, Ensemble
from common.flags import parse_config
from common.metrics import evaluating
from common.optim import poly_lr
from common.run import InputError, Run

B, K, H, W = 2, 4, 3, 5


def logits(*shape, scale=2.0):
    return (scale * torch.randn(shape or (B, K, H, W), dtype=torch.float64)).requires_grad_()


def softmax(column):
    top = max(float(v.detach()) for v in column)
    exps = [torch.exp(v - top) for v in column]
    return [e / sum(exps) for e in exps]


# --- Eq. (4) and Conf-CE ---


def conf_ce_by_pixel(student, teacher, threshold, valid):
    total, passing = student.sum() * 0, 0
    for b in range(student.shape[0]):
        for i in range(student.shape[2]):
            for j in range(student.shape[3]):
                probs = [float(p) for p in softmax(list(teacher[b, :, i, j].detach()))]
                conf = max(probs)
                if valid[b, i, j] and conf >= threshold:
                    own = softmax(list(student[b, :, i, j]))
                    total = total - conf * torch.log(own[probs.index(conf)])
                    passing += 1
    return total / max(passing, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("padding", [False, True])
def test_conf_ce_is_the_loop_over_pixels(threshold, padding):
    student, teacher = logits(), logits()
    valid = torch.rand(B, H, W) < (0.6 if padding else 2)
    ours = psmt.conf_ce_loss(student, teacher, threshold, valid if padding else None)
    reference = conf_ce_by_pixel(student, teacher, threshold, valid)
    assert ours.shape == () and reference > 0
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, reference)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_conf_ce_pulls_with_confidence_and_only_the_student():
    student, teacher = logits(), logits()
    conf, pseudo = teacher.softmax(1).max(1)
    passing = conf >= 0.6
    onehot = F.one_hot(pseudo, K).permute(0, 3, 1, 2)
    expected = (passing * conf)[:, None] * (student.softmax(1) - onehot) / passing.sum()
    psmt.conf_ce_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_a_confidence_equal_to_the_threshold_passes():
    """Two equal logits have a confidence of exactly one half."""
    student, teacher = logits(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert psmt.conf_ce_loss(student, teacher, threshold=0.5) > 0
    assert psmt.conf_ce_loss(student, teacher, threshold=math.nextafter(0.5, 1)) == 0


def test_conf_ce_limits():
    student, teacher = logits(), logits()
    conf, pseudo = teacher.softmax(1).max(1)
    every = F.cross_entropy(student, pseudo, reduction="none")
    torch.testing.assert_close(psmt.conf_ce_loss(student, teacher, 0.0), (conf * every).mean())
    sure = psmt.conf_ce_loss(student, 1000 * teacher)  # c = 1: plain cross-entropy
    torch.testing.assert_close(sure, every.mean())
    plain = every[conf >= 0.6].mean()
    assert 0.6 * plain <= psmt.conf_ce_loss(student, teacher, 0.6) <= plain


def test_without_a_confident_pixel_the_loss_is_zero_and_connected():
    student = logits(2, 21, 3, 3)
    loss = psmt.conf_ce_loss(student, torch.zeros(2, 21, 3, 3))
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()
    student, nothing = logits(), torch.zeros(B, H, W, dtype=torch.bool)
    loss = psmt.conf_ce_loss(student, logits(), 0.0, valid=nothing)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_only_passing_pixels_count_in_the_mean():
    student, teacher = logits(), logits()
    loss = psmt.conf_ce_loss(student, teacher)
    twice = [torch.cat([t, t]) for t in (student, teacher)]
    torch.testing.assert_close(psmt.conf_ce_loss(*twice), loss)
    unsure = [torch.cat([student, logits()]), torch.cat([teacher, 0 * teacher])]
    torch.testing.assert_close(psmt.conf_ce_loss(*unsure), loss)
    shifted = teacher + torch.randn(B, 1, H, W, dtype=torch.float64)
    torch.testing.assert_close(psmt.conf_ce_loss(student, shifted), loss)


def test_the_ensemble_averages_logits_not_probabilities():
    first, second = (torch.tensor(v).double().reshape(1, 2, 1, 1) for v in ([4, 0], [0, 0]))
    mean = psmt.ensemble_logits(first, second)
    assert mean.softmax(1).amax().item() == pytest.approx(1 / (1 + math.exp(-2)))  # 0.8808
    assert (first.softmax(1) + second.softmax(1)).amax().item() / 2 == pytest.approx(
        0.7410, abs=1e-4
    )
    networks = [nn.Conv2d(3, K, 1) for _ in range(2)]
    images = torch.randn(2, 3, 4, 4)
    expected = psmt.ensemble_logits(*(network(images) for network in networks))
    torch.testing.assert_close(Ensemble(networks)(images), expected)


def test_the_assist_mask_keeps_the_highest_classes():
    core, assist = logits(1, 10, 3, 3), logits(1, 10, 3, 3)
    ours = psmt.ensemble_logits(core, assist, top=7)
    for i in range(3):
        for j in range(3):
            ranked = sorted(range(10), key=lambda k: -assist[0, k, i, j].item())
            for rank, k in enumerate(ranked):
                other = assist if rank < 7 else core
                expected = (core[0, k, i, j] + other[0, k, i, j]) / 2
                torch.testing.assert_close(ours[0, k, i, j], expected)
    few = logits(1, 5, 3, 3), logits(1, 5, 3, 3)  # no more than 7 classes: a plain mean
    assert torch.equal(psmt.ensemble_logits(*few, top=7), psmt.ensemble_logits(*few))
    torch.testing.assert_close(psmt.ensemble_logits(core, core, top=7), core)


# --- T-VAT ---


def small_decoder(channels=6, classes=4):
    """Like the network's: two convolutions with BatchNorm, a classifier."""
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, classes, 1),
    )
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return net.eval()


@pytest.fixture
def decoders():
    return small_decoder(), small_decoder()


def divergence(z, r, decoders, size=None):
    """KL(p(z) || p(z + r)) for each picture, class by class."""

    def p(features):
        mean = (decoders[0](features) + decoders[1](features)) / 2
        if size:
            mean = F.interpolate(mean, size, mode="bilinear", align_corners=False)
        return mean.softmax(1)

    with torch.no_grad():
        clean, moved = p(z), p(z + r)
        return (clean * (clean / moved).log()).sum(dim=(1, 2, 3))


def norms(r):
    return r.flatten(1).norm(dim=1)


@pytest.mark.parametrize("xi", [1e-2, 0.1, 1, 10])
@pytest.mark.parametrize("size", [None, (20, 24)])
def test_the_noise_has_the_norm_eps_for_each_picture(xi, size, decoders):
    z, start = torch.randn(3, 6, 5, 6), torch.randn(3, 6, 5, 6)
    r = psmt.t_vat(z, *decoders, xi=xi, start=start, size=size)
    assert r.shape == z.shape and r.dtype == z.dtype and not r.requires_grad
    torch.testing.assert_close(norms(r), torch.full((3,), 2.0), rtol=1e-5, atol=0)
    five = psmt.t_vat(z, *decoders, xi=xi, eps=5.0, start=start, size=size)
    torch.testing.assert_close(five, 2.5 * r)


def test_the_noise_is_the_gradient_of_the_divergence(decoders):
    """Against central differences of the divergence, coordinate by coordinate."""
    for decoder in decoders:
        decoder.double()
    size, xi = (10, 12), 0.1
    z, start = torch.randn(2, 1, 6, 5, 3, dtype=torch.float64)
    d = start / start.norm()
    gradient = torch.zeros_like(d)
    for index in range(d.numel()):
        values = []
        for step in (1e-4, -1e-4):
            moved = d.clone()
            moved.view(-1)[index] += step
            values.append(divergence(z, xi * moved, decoders, size).item())
        gradient.view(-1)[index] = values[0] - values[1]
    r = psmt.t_vat(z, *decoders, xi=xi, start=start, size=size)
    torch.testing.assert_close(r, 2 * gradient / gradient.norm(), rtol=1e-4, atol=1e-6)


def test_the_noise_hurts_at_least_ten_times_as_much_as_random_noise():
    decoders = small_decoder(32, 8), small_decoder(32, 8)
    z = torch.randn(4, 32, 16, 16)
    r = psmt.t_vat(z, *decoders)
    random = torch.randn_like(z)
    random = 2 * random / norms(random)[:, None, None, None]
    adversarial, chance = (divergence(z, noise, decoders).mean() for noise in (r, random))
    assert adversarial >= 10 * chance


def test_the_direction_hardly_depends_on_xi():
    decoders = small_decoder(32, 8), small_decoder(32, 8)
    z, start = torch.randn(2, 3, 32, 16, 16, dtype=torch.float64)
    for decoder in decoders:
        decoder.double()
    fine, default = (psmt.t_vat(z, *decoders, xi=xi, start=start) for xi in (1e-2, 1.0))
    assert (F.cosine_similarity(fine.flatten(1), default.flatten(1)) > 0.98).all()


def test_the_gradient_grows_with_the_square_of_xi(decoders):
    """KL has its minimum at z. A huge floor turns `unit` into a plain division by it."""
    for decoder in decoders:
        decoder.double()
    z, start = torch.randn(2, 1, 6, 5, 5, dtype=torch.float64)
    lengths = [
        norms(psmt.t_vat(z, *decoders, xi=xi, eps=1.0, start=1e12 * start, floor=1.0)).item()
        for xi in (1e-4, 1e-3, 1e-2)
    ]
    assert lengths[1] / lengths[0] == pytest.approx(100, rel=0.05)
    assert lengths[2] / lengths[1] == pytest.approx(100, rel=0.05)


def test_the_released_constants_give_no_noise(decoders):
    """The divergence's gradient grows with ξ squared, and the floor of 1e-8 swallows it."""
    z, start = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    released = psmt.t_vat(z, *decoders, start=start, **psmt.RELEASED)
    assert (norms(released) < 0.02 * 2.0).all()
    assert (norms(psmt.t_vat(z, *decoders, xi=1e-6, start=start)) > 1.99).all()  # the floor's doing


def test_each_picture_has_its_own_noise(decoders):
    z, start = torch.randn(2, 3, 6, 5, 5, dtype=torch.float64)
    for decoder in decoders:
        decoder.double()
    whole = psmt.t_vat(z, *decoders, start=start)
    for b in range(3):
        alone = psmt.t_vat(z[b : b + 1], *decoders, start=start[b : b + 1])
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-9, atol=1e-12)


def test_two_equal_decoders_are_one():
    decoder, other = small_decoder().double(), small_decoder().double()
    z, start = torch.randn(2, 2, 6, 5, 5, dtype=torch.float64)
    ours = psmt.t_vat(z, decoder, decoder, start=start)
    one = psmt.t_vat(z, lambda x: 2 * decoder(x), lambda x: 0 * decoder(x), start=start)
    torch.testing.assert_close(ours, one)
    assert not torch.allclose(ours, psmt.t_vat(z, decoder, other, start=start))


def test_only_the_noise_comes_out(decoders):
    """No gradient is left anywhere; statistics and modes stay; it works where grad is off."""
    z = torch.randn(2, 6, 5, 5, requires_grad=True)
    frozen, free = decoders
    frozen.requires_grad_(False)
    before = [{k: v.clone() for k, v in d.state_dict().items()} for d in decoders]
    with torch.no_grad():
        r = psmt.t_vat(z, frozen, free)
    assert not r.requires_grad and z.grad is None
    assert all(p.grad is None for d in decoders for p in d.parameters())
    for state, decoder in zip(before, decoders, strict=True):
        assert all(torch.equal(v, decoder.state_dict()[k]) for k, v in state.items())


def test_a_flat_divergence_and_a_tiny_one_keep_the_norm():
    z = torch.randn(2, 6, 5, 5)
    constant = lambda x: 0 * x[:, :4]  # noqa: E731
    start = torch.randn_like(z)
    r = psmt.t_vat(z, constant, constant, start=start)
    torch.testing.assert_close(r, 2 * start / norms(start)[:, None, None, None])
    tiny = lambda x: 1e-18 * x[:, :4]  # noqa: E731
    torch.testing.assert_close(
        norms(psmt.t_vat(z.double(), tiny, tiny)), torch.full((2,), 2.0).double()
    )
    small = psmt.unit(torch.tensor([1e-30, 1e-30]).reshape(1, 2, 1, 1))  # squares underflow
    torch.testing.assert_close(small.flatten(), torch.full((2,), 0.5**0.5))
    assert (psmt.unit(torch.zeros(1, 2, 3, 3)) == 0).all()


def test_half_precision_is_raised_and_autocast_is_off(decoders):
    z, start = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    expected = psmt.t_vat(z.bfloat16().float(), *decoders, start=start)
    with torch.autocast("cpu", torch.bfloat16):
        ours = psmt.t_vat(z.bfloat16(), *decoders, start=start)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


def test_the_start_is_drawn_from_torchs_generator(decoders):
    z = torch.randn(2, 6, 5, 5)
    torch.manual_seed(1)
    first, second = psmt.t_vat(z, *decoders), psmt.t_vat(z, *decoders)
    torch.manual_seed(1)
    assert torch.equal(psmt.t_vat(z, *decoders), first) and not torch.equal(first, second)


def network(width=8):
    return DeepLabV3Plus(5, "resnet18", width=width)


def test_the_networks_noise_reaches_low_level_channels_and_spares_the_teachers():
    student, *teachers = (network() for _ in range(3))
    ensemble = Ensemble(teachers).requires_grad_(False)
    teachers[0].decoder[1].eval()  # a mode of its own must survive
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    seen = []

    def perturb(encoded):
        with evaluating(ensemble):
            seen.append(psmt.t_vat(encoded, *map(psmt.decoder, teachers), size=(64, 64)))
        return seen[-1]

    student(torch.randn(2, 3, 64, 64), perturb).sum().backward()
    (r,) = seen
    assert r.shape == (2, 8 + 48, 16, 16) and (norms(r[:, -48:]) > 0).all()
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items())
    assert teachers[0].training and teachers[1].training
    assert not teachers[0].decoder[1].training
    assert all(p.grad is None for p in ensemble.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_the_gradient_passes_the_noise_unchanged():
    """d loss / d z is that with respect to z + r: the noise is a constant."""
    net = network().eval()
    images, r = torch.randn(2, 3, 32, 32), torch.randn(2, 56, 8, 8)
    z = net.encode(images).detach().requires_grad_()
    moved = (z.detach() + r).requires_grad_()
    net.encode = lambda images: z
    ours = torch.autograd.grad(net(images, lambda encoded: r).square().sum(), z)[0]
    direct = net.classify(net.decode(moved), (32, 32)).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(direct, moved)[0])
    zero = net(images, torch.zeros_like)
    assert torch.equal(zero, net(images))


def test_a_perturbed_encoding_is_decoded_in_float32():
    """bf16 would round z + r back to z wherever r is below its resolution."""
    net = network().eval()
    images, r = torch.randn(2, 3, 32, 32), torch.full((2, 56, 8, 8), 1e-3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z = net.encode(images).float()
        with torch.autocast("cpu", enabled=False):
            expected = net.classify(net.decode(z + r), (32, 32))
        assert torch.equal(net(images, lambda encoded: r), expected)


# --- moving averages, ramp ---


def test_ema_follows_its_law_buffers_included():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(teacher.weight, 5.0)
    nn.init.constant_(student.weight, 2.0)
    teacher.running_mean += 4
    student.running_mean += 1
    student.num_batches_tracked += 9
    kept = {k: v.clone() for k, v in student.state_dict().items()}
    for _ in range(7):
        psmt.ema_update(teacher, student, 0.996)
    share = 0.996**7
    torch.testing.assert_close(teacher.weight.data, torch.full((3,), share * 5 + (1 - share) * 2))
    torch.testing.assert_close(teacher.running_mean, torch.full((3,), share * 4 + (1 - share) * 1))
    assert teacher.num_batches_tracked == 0
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in kept.items())
    psmt.ema_update(teacher, student, 0.0)  # a copy, with memory of its own
    assert torch.equal(teacher.weight, student.weight)
    assert teacher.weight.data_ptr() != student.weight.data_ptr()


def test_the_ramp_is_half_a_cosine():
    factors = [psmt.ramp_up(step, 12.0) for step in range(20)]
    assert factors[0] == 0 and factors[6] == pytest.approx(0.5) and set(factors[12:]) == {1.0}
    for step, expected in ((1, 0.0170), (3, 0.146), (9, 0.854)):
        assert factors[step] == pytest.approx(expected, abs=5e-4)
    assert factors == sorted(factors) and psmt.ramp_up(0, 0) == 1


# --- the strong view ---


def test_views_share_geometry():
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    label = torch.randint(4, (50, 70))
    for seed in range(5):
        torch.manual_seed(seed)
        weak, crop_label, valid, strong = psmt.views(image, label, 32, (0.5, 2.0), nn.Identity())
        assert torch.equal(weak, strong) and weak.shape == (3, 32, 32)
        assert (crop_label[~valid] == 255).all() and (crop_label[valid] < 4).all()


def test_views_draw_scales_from_the_whole_range(monkeypatch):
    scales = []
    monkeypatch.setattr(psmt, "train_view", lambda i, y, crop, scales_, s: scales.extend(scales_))
    for _ in range(300):
        psmt.views(None, None, 32, (0.5, 2.0), None)
    assert 0.5 <= min(scales) < 0.55 and 1.9 < max(scales) <= 2
    assert sum(scales) / 300 == pytest.approx(1.25, abs=0.1)


def test_box_masks_follow_the_rule_for_voc():
    """One rectangle a picture; all of a batch from one draw of its size; 0.358 on average."""
    share, largest = 0.0, set()
    for _ in range(4000):
        masks = psmt.box_masks(4, 64, 64)
        assert masks.shape == (4, 1, 64, 64) and masks.dtype == torch.bool
        share += masks.float().mean().item() / 4000
        rows, columns = masks.any(3, keepdim=True), masks.any(2, keepdim=True)
        assert torch.equal(masks, rows & columns)
        heights, widths = rows.sum((1, 2, 3)), columns.sum((1, 2, 3))
        side = max(heights.max(), widths.max())  # cut by no border, unless all are
        largest.add(int(side))
    assert share == pytest.approx(0.358, abs=0.01)
    assert len(largest) > 20


def test_the_boxes_of_a_batch_have_one_size(monkeypatch):
    """Half the area: 45 of 64 pixels a side, 44 after halving, where no border cuts."""
    draw = torch.distributions.Beta
    monkeypatch.setattr(draw, "sample", lambda self: torch.tensor(0.5))
    masks = psmt.box_masks(200, 64, 32)[:, 0]
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    assert heights.max() == 44 and widths.max() == 22
    assert heights.min() >= 22 and widths.min() >= 11  # a centre inside leaves half of it


def test_mix_takes_pictures_logits_and_valid_pixels_from_one_partner():
    label = torch.randint(K, (4, 16, 16))
    picture = label[:, None].float().expand(-1, 3, -1, -1)
    target = F.one_hot(label, K).permute(0, 3, 1, 2).float()
    masks = psmt.box_masks(4, 16, 16)
    mixed = psmt.mix(target, masks)
    assert torch.equal(psmt.mix(picture, masks)[:, 0], mixed.argmax(1).float())
    assert torch.equal(psmt.mix(label, masks), mixed.argmax(1))
    for b in range(4):
        inside = masks[b, 0]
        assert torch.equal(mixed[b, :, inside], target[b - 1, :, inside])
        assert torch.equal(mixed[b, :, ~inside], target[b, :, ~inside])


def test_zoom_moves_pictures_and_targets_alike():
    """A picture of large blocks, whose colour is its class, stays one whatever the draw."""
    label = torch.randint(1, K, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = label[:, None].float().expand(-1, 3, -1, -1)
    target = F.one_hot(label, K).permute(0, 3, 1, 2).float()
    valid = label != 1  # as if class 1 were padding
    kinds = {"in": 0, "out": 0, "none": 0}
    for _ in range(400):
        zoomed, moved, seen = psmt.zoom(images, target, valid)
        assert zoomed.shape == images.shape and moved.shape == target.shape
        if zoomed is images:
            kinds["none"] += 1
            assert moved is target and seen is valid
            continue
        filled = moved.sum(1) > 0  # where there is a target at all
        kind = "in" if filled.all() else "out"
        kinds[kind] += 1
        assert torch.equal(seen, filled & (moved.argmax(1) != 1))
        assert (zoomed[~filled[:, None].expand_as(zoomed)] == 0).all()
        same = (zoomed[:, 0].round().long() == moved.argmax(1))[filled].float().mean()
        assert same > 0.8  # but for the blocks' blurred borders
        if kind == "out":
            assert 0.3**2 * 0.9 < filled.float().mean() < 0.5**2 * 1.1
    assert kinds["in"] / 400 == pytest.approx(0.4, abs=0.08)
    assert kinds["out"] / 400 == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize(
    "flags", [dict(), dict(cutmix="boxes"), dict(cutmix="off"), dict(zoom=True)]
)
def test_padding_goes_where_its_picture_goes(flags):
    """Class 0 is padding in this coding, whatever is cut and zoomed."""
    label = torch.randint(K, (4, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = label[:, None].float().expand(-1, 3, -1, -1)
    target = F.one_hot(label, K).permute(0, 3, 1, 2).float()
    cfg, changed = psmt.Config(**flags), False
    for _ in range(20):
        _, moved, valid = psmt.zoom_mix(images, target, label > 0, cfg)
        assert torch.equal(valid, moved[:, 1:].sum(1) > 0)
        changed |= not torch.equal(moved, target)
    assert changed == (cfg.cutmix != "off")


# --- whole runs ---

TINY = dict(batch_size=2, crop_size=32, width=8, iters=4, eval_every=4, labeled="4", warmup=0.25)


class Small(DeepLabV3Plus):
    """The network's cut points in two layers, for tests that need no ResNet."""

    def __init__(self, num_classes, backbone, weights=None, width=8):
        nn.Module.__init__(self)
        self.arguments = dict(num_classes=num_classes, backbone=backbone, width=width)
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width))
        self.decoder = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.classifier_dropout, self.classifier = nn.Identity(), nn.Conv2d(width, num_classes, 1)

    def encode(self, images):
        return self.backbone(images).relu()


@pytest.fixture
def small(monkeypatch):
    """Networks without a ResNet."""
    monkeypatch.setattr(psmt, "DeepLabV3Plus", Small)


@pytest.fixture
def few(monkeypatch):
    """The embedded dataset with few pictures: 4 labelled, 8 unlabelled, so 4 steps a turn."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 3})


def run(folder, **flags):
    return psmt.train(psmt.Config(output_dir=str(folder), **{**TINY, **flags}))


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


RUNS = [
    dict(teachers="own", cutmix="boxes", ohem=True, eval_window=48),
    dict(teachers="random", zoom=True, assist_top=3, pseudo_eval=True, count_padding=True),
    dict(tvat="released", cutmix="off", amp="bf16"),
    dict(tvat="off", warmup=0.0, ramp=0.0),
]


@pytest.mark.parametrize("flags", RUNS, ids=lambda flags: "-".join(map(str, flags.values())))
def test_train_runs_and_moves_the_weights(flags, few, tmp_path, started):
    result = run(tmp_path / "run", **flags)
    assert math.isfinite(result.miou) and isinstance(result.model, Ensemble)
    (entry,) = result.history
    assert {"student", "teacher1", "teacher2"} <= entry.keys()
    weights = saved(tmp_path / "run")["state"]["networks"]
    student = [name for name in weights if name.startswith("student.")]
    assert student and not any(torch.equal(weights[k], started["first"][k]) for k in student)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "panels.png", "iou.txt"}


def test_the_result_is_the_mean_of_the_teachers_and_all_are_scored(few, small, tmp_path, capsys):
    result = run(tmp_path)
    state = saved(tmp_path)
    assert len(state["networks"]) == len(state["arguments"]) == 2
    images = torch.randn(1, 3, 48, 48)
    outputs = []
    for weights, arguments in zip(state["networks"], state["arguments"], strict=True):
        net = Small(**arguments).eval()
        net.load_state_dict(weights)
        outputs.append(net(images))
    torch.testing.assert_close(result.model(images), (outputs[0] + outputs[1]) / 2)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    printed = capsys.readouterr().out
    for name in ("student", "teacher1", "teacher2"):
        assert last[name] == result.history[-1][name]
        assert f"{name} {100 * last[name]:.2f}" in printed
    assert result.miou == last["miou"]


def test_teachers_take_turns_after_the_warm_up(few, small, tmp_path, monkeypatch):
    """8 unlabelled pictures in batches of 2: four steps each, then the other."""
    updates, update = [], psmt.ema_update

    def note(teacher, student, decay):
        seen = [{k: v.clone() for k, v in n.state_dict().items()} for n in (teacher, student)]
        update(teacher, student, decay)
        moved = any(not torch.equal(v, seen[0][k]) for k, v in teacher.state_dict().items())
        still = all(torch.equal(v, seen[1][k]) for k, v in student.state_dict().items())
        updates.append((id(teacher), decay, moved and still))

    monkeypatch.setattr(psmt, "ema_update", note)
    run(tmp_path, iters=11, warmup=2 / 11, ema_decay=0.9)
    first, second = updates[0][0], updates[1][0]
    assert [u[:2] for u in updates[:4]] == [(first, 0.0), (second, 0.0)] * 2
    turns = [u[:2] for u in updates[4:]]
    assert turns == [(first, 0.9)] * 4 + [(second, 0.9)] * 4 + [(first, 0.9)]
    assert all(ok for *_, ok in updates[4:])


@pytest.mark.parametrize("teachers", ["copy", "own"])
def test_no_gradient_step_moves_a_teacher_after_the_warm_up(teachers, few, small, tmp_path):
    """With a decay of 1 the teachers' parameters stay where the warm-up left them."""
    run(tmp_path / "stay", teachers=teachers, ema_decay=1.0)
    run(tmp_path / "short", teachers=teachers, iters=1, warmup=0.9, ema_decay=1.0)
    stay, short = (saved(tmp_path / name)["networks"] for name in ("stay", "short"))
    for teacher in range(2):
        for name, value in short[teacher].items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(stay[teacher][name], value), name


@pytest.fixture
def started(monkeypatch):
    """What a run gave to Run.start: the networks' first weights, and the state it trains."""
    seen, begin = {}, Run.start

    def start_and_keep(self, models, data, state):
        first = {k: v.clone() for k, v in state["networks"].state_dict().items()}
        seen.update(state, first=first)
        begin(self, models, data, state)

    monkeypatch.setattr(Run, "start", start_and_keep)
    return seen


@pytest.mark.parametrize("teachers", ["copy", "own"])
def test_teachers_are_frozen_after_the_warm_up(teachers, few, small, tmp_path, started):
    run(tmp_path, teachers=teachers)
    student, *others = started["networks"].values()
    for teacher in others:
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad and p.grad is not None for p in student.parameters())
    held = {id(p) for p in started["optimizer"].state}
    assert held == {id(p) for p in student.parameters()}  # no momentum of teachers is kept


def test_rate_and_weight_follow_their_schedules(few, small, tmp_path, monkeypatch):
    """lr is constant through the warm-up and λ is 0; then lr falls and λ rises."""
    rates, weights, make, log = [], [], psmt.sgd_poly, Run.log

    def note_rate(*args):
        optimizer, schedule = make(*args)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer, schedule

    def note_weight(self, step, **values):
        weights.append(values["lam"])
        log(self, step, **values)

    monkeypatch.setattr(psmt, "sgd_poly", note_rate)
    monkeypatch.setattr(Run, "log", note_weight)
    run(tmp_path, iters=8, warmup=0.25, ramp=0.5, lam=3.0, lr=0.01)
    assert rates == pytest.approx([0.01] * 2 + [0.01 * poly_lr(k, 6) for k in range(6)])
    rise = [3.0 * 0.5 * (1 - math.cos(math.pi * k / 4)) for k in range(4)]
    assert weights == pytest.approx([0, 0, *rise, 3, 3])


def test_teachers_see_weak_views_and_the_student_strong_ones(few, small, tmp_path, monkeypatch):
    def marked(image, label, crop, *_, **__):
        blank = torch.zeros(crop, crop)
        return torch.zeros(3, crop, crop), blank.long(), blank == 0, torch.ones(3, crop, crop)

    seen, forward = {}, psmt.DeepLabV3Plus.forward

    def note(self, images, *args):
        if images.shape[-1] == TINY["crop_size"]:
            seen.setdefault(id(self), set()).update(images.unique().tolist())
        return forward(self, images, *args)

    monkeypatch.setattr(psmt, "views", marked)
    monkeypatch.setattr(psmt.DeepLabV3Plus, "forward", note)
    run(tmp_path, teachers="own")
    assert sorted(map(sorted, seen.values())) == [[0.0], [0.0], [1.0]]


def test_without_lambda_and_noise_the_student_learns_from_labels_alone(few, small, tmp_path):
    """Its parameters are the baseline's, bit by bit; its statistics saw unlabelled pictures."""
    run(tmp_path / "zero", lam=0.0, eps=0.0)
    baseline = run(tmp_path / "sup", supervised_only=True).model
    weights = saved(tmp_path / "zero")["state"]["networks"]
    for name, value in baseline.named_parameters():
        assert torch.equal(weights[f"student.{name}"], value), name
    assert not torch.equal(
        weights["student.backbone.1.running_mean"], baseline.backbone[1].running_mean
    )


def test_statistics_of_the_teachers_move_when_they_label(few, small, tmp_path):
    """Both label at each of three steps, in training mode; in eval mode they count nothing."""
    for flag, passes in ((False, 3), (True, 0)):
        run(tmp_path / str(flag), pseudo_eval=flag)
        for teacher in saved(tmp_path / str(flag))["networks"]:
            assert teacher["backbone.1.num_batches_tracked"] == passes
            assert teacher["decoder.1.num_batches_tracked"] == passes  # T-VAT moves none


def test_teachers_start_as_asked(few, small, tmp_path, started):
    """Copies follow the student through the warm-up; others learn from the labels by themselves."""
    seen = {}
    for kind in ("copy", "own"):
        run(tmp_path / kind, teachers=kind, iters=2, warmup=0.5, ema_decay=1.0)
        seen[kind] = [n["classifier.weight"] for n in saved(tmp_path / kind)["networks"]]
    assert torch.equal(*seen["copy"]) and not torch.allclose(*seen["own"], atol=1e-2)
    for name, weight in zip(("teacher1", "teacher2"), seen["own"], strict=True):
        assert not torch.equal(started["first"][f"{name}.classifier.weight"], weight)  # it learned


def test_pretrained_weights_go_to_all_three_networks_or_to_the_student(few, tmp_path, monkeypatch):
    asked = []

    class Asked(Small):
        def __init__(self, num_classes, backbone, weights=None, width=8):
            super().__init__(num_classes, backbone, weights, width)
            asked.append(weights)

    monkeypatch.setattr(psmt, "DeepLabV3Plus", Asked)
    for kind in ("own", "random", "copy"):
        run(tmp_path / kind, teachers=kind, weights="IMAGENET1K_V1", iters=1)
    pretrained = "IMAGENET1K_V1"
    assert asked == [pretrained] * 3 + [pretrained, "none", "none"] + [pretrained]


def test_choices_change_the_result(few, small, tmp_path):
    weights = []
    choices = [{}, dict(tvat="off"), dict(cutmix="off"), dict(threshold=0.0), dict(zoom=True)]
    choices += [dict(pseudo_eval=True), dict(cutmix="boxes"), dict(lam=0.5), dict(eps=50.0)]
    small = dict(scales=(0.3, 0.3))  # crops with padding
    choices += [dict(strength=1.0), small, small | dict(count_padding=True)]
    for index, flags in enumerate(choices):
        run(tmp_path / str(index), **{"ramp": 0.0, "threshold": 0.2, "iters": 3, **flags})
        state = saved(tmp_path / str(index))["state"]["networks"]
        weights.append(state["student.classifier.weight"])
    for index, value in enumerate(weights):
        for other in weights[:index]:
            assert not torch.equal(value, other), choices[index]


@pytest.mark.parametrize("teachers", ["copy", "own"])
def test_a_run_that_stops_goes_on_exactly(teachers, few, small, tmp_path, power_cut):
    """Once in the warm-up and once after it, between checkpoints."""
    flags = dict(teachers=teachers, iters=7, eval_every=2, warmup=3 / 7)
    run(tmp_path / "whole", **flags)
    for stop in (2, 6):
        power_cut(stop, lambda: run(tmp_path / "cut", **flags, resume=True))
    run(tmp_path / "cut", **flags, resume=True)
    for name in ("last.pt", "iou.txt", "panels.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_agree(tmp_path):
    """The teachers' gradients are joint in the warm-up, the student's all along."""
    check = ["--check", str(tmp_path / "saved")]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    folder = ["--output-dir", str(tmp_path / "run"), "--teachers=own", "--warmup=0.5"]
    finish(start(*check, *flags, *folder, script="psmt", processes=2))
    first, second = (torch.load(f"{tmp_path / 'saved'}-{r}.pt", weights_only=True) for r in (0, 1))
    assert first["miou"] == second["miou"] and first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(threshold=1.5), "--threshold"),
        (dict(ema_decay=1.5), "--ema-decay"),
        (dict(warmup=1.0), "--warmup"),
        (dict(ramp=1.5), "--ramp"),
        (dict(scales=(2.0, 0.5)), "--scales"),
        (dict(scales=(1.0,)), "--scales"),
        (dict(eval_window=8), "--eval-window"),
        (dict(tvat="maybe"), "--tvat"),
        (dict(eps=-1.0), "--eps"),
    ],
)
def test_a_flag_that_cannot_be_right_is_refused(flags, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", ["folder", "voc", "cityscapes"])
def test_recipes_train_on_tiny_trees(dataset, tmp_path):
    trees_by_name = dict(
        folder=trees.folder_tree,
        voc=partial(trees.voc_tree, aug=True),
        cityscapes=trees.cityscapes_tree,
    )
    root = trees_by_name[dataset](tmp_path / "data")
    small = {**TINY, "backbone": "resnet18", "weights": "none", "labeled": "1/2", "workers": 1}
    window = {"eval_window": 32} if dataset == "cityscapes" else {}
    flags = psmt.RECIPES[dataset] | small | window | {"iters": 2, "warmup": 0.5}
    result = psmt.train(psmt.Config(data_path=str(root), output_dir=str(tmp_path / "run"), **flags))
    classes = dict(folder=3, voc=21, cityscapes=19)[dataset]
    assert math.isfinite(result.miou) and len(result.history[-1]["iou"]) == classes


def test_recipes_are_the_released_ones():
    """Steps without the warm-up, those of the warm-up, and λ, by labelled set."""
    known = {
        "voc 1/16": (24_800, 100, 1.5),
        "voc 1/8": (23_120, 205, 1.5),
        "voc 1/4": (49_600, 410, 1.5),
        "voc 1/2": (49_500, 825, 1.5),
        "voc 92": (26_160, 10, 0.06),
        "voc 183": (26_000, 25, 0.6),
        "voc 366": (25_520, 55, 0.6),
        "voc 732": (24_560, 110, 0.6),
        "cityscapes 1/8": (104_000, 230, 3.0),
        "cityscapes 1/4": (125_550, 465, 3.0),
        "cityscapes 1/2": (102_300, 930, 3.0),
    }
    assert psmt.LABELED_SETS.keys() == known.keys()
    for name, (steps, warmup, lam) in known.items():
        dataset, labeled = name.split()
        recipe = parse_config(
            psmt.Config,
            psmt.RECIPES | psmt.LABELED_SETS,
            ["--dataset", dataset, "--labeled", labeled],
        )
        assert recipe == psmt.Config(**psmt.LABELED_SETS[name]) and recipe.labeled == labeled
        assert round(recipe.warmup * recipe.iters) == warmup
        assert recipe.iters - warmup == steps and recipe.lam == lam
        assert (recipe.threshold, recipe.ema_decay, recipe.eps) == (0.6, 0.996, 2.0)
    voc, city = (psmt.Config(**psmt.RECIPES[name]) for name in ("voc", "cityscapes"))
    assert (voc.lr, voc.crop_size, voc.batch_size, voc.cutmix) == (0.01, 512, 8, "box")
    assert (city.lr, city.crop_size, city.batch_size, city.cutmix) == (0.0045, 800, 4, "boxes")
    assert city.ohem and not voc.ohem and voc.teachers == "own"
    assert voc.ramp * voc.iters == pytest.approx(12 * 289)
    for name, recipe in psmt.RECIPES.items():
        assert psmt.Config(**recipe).dataset == name
