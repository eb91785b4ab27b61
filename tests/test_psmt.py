"""PS-MT's equations against per-pixel loops in float64, T-VAT, gradients, limits, short runs."""

import math
import runpy
from itertools import islice, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from few_shapes import SEMI, lighten
from torch import nn

import psmt
from common import augment, shapes
from common.deeplab import DeepLabV3Plus, Ensemble
from common.optim import poly_lr
from common.run import Run

B, K, H, W = 2, 4, 3, 5


def spy(patch, owner, name):
    """All calls of owner.name from now on."""
    calls, function = [], getattr(owner, name)

    def noting(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
        return result

    patch.setattr(owner, name, noting)
    return calls


def logits(*shape):
    return (2 * torch.randn(shape or (B, K, H, W), dtype=torch.float64)).requires_grad_()


# --- Conf-CE ---


def conf_ce_by_pixel(student, teacher, threshold, valid):
    total, passing = student.sum() * 0, 0
    for b, i, j in product(range(B), range(H), range(W)):
        own, other = student[b, :, i, j].exp(), teacher[b, :, i, j].exp()
        probs = [float(value / other.sum()) for value in other]
        if valid[b, i, j] and max(probs) >= threshold:
            total = total - max(probs) * (own[probs.index(max(probs))] / own.sum()).log()
            passing += 1
    return total / max(passing, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("padding", [False, True])
def test_conf_ce_is_the_loop_over_pixels_and_no_gradient_reaches_the_teachers(threshold, padding):
    student, teacher = logits(), logits()
    valid = torch.rand(B, H, W) < (0.6 if padding else 2)
    ours = psmt.conf_ce_loss(student, teacher, threshold, valid if padding else None)
    reference = conf_ce_by_pixel(student, teacher.detach(), threshold, valid)
    assert ours.shape == () and reference > 0
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours, (student, teacher), allow_unused=True)
    expected = torch.autograd.grad(reference, student)[0]
    torch.testing.assert_close(gradients[0], expected, rtol=1e-10, atol=1e-12)
    assert gradients[1] is None


def test_a_confidence_equal_to_the_threshold_passes():
    """Two equal logits have a confidence of exactly one half."""
    student, teacher = logits(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert psmt.conf_ce_loss(student, teacher, threshold=0.5) > 0
    assert psmt.conf_ce_loss(student, teacher, threshold=math.nextafter(0.5, 1)) == 0


@pytest.mark.parametrize("threshold, sure, valid", [(0.6, 0.0, True), (0.0, 1.0, False)])
def test_where_no_pixel_passes_the_loss_is_zero_and_connected(threshold, sure, valid):
    student, valid = logits(2, 21, 3, 3), torch.full((2, 3, 3), valid)
    loss = psmt.conf_ce_loss(student, sure * logits(2, 21, 3, 3), threshold, valid)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


# --- T-VAT ---


def pair(channels=6, classes=K):
    """Two decoders like the network's, in float64: convolutions, BatchNorm, a classifier."""
    nets = []
    for _ in range(2):
        first = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        nets.append(nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1)))
        for parameter in nets[-1].parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return nn.ModuleList(nets).eval().double()


def draw(*shape):
    """Features and a direction, in float64."""
    return torch.randn(2, *(shape or (B, 6, 5, 6)), dtype=torch.float64)


def norms(r):
    return r.flatten(1).norm(dim=1)


def mean_logits(decoders, features, size=None):
    mean = (decoders[0](features) + decoders[1](features)) / 2
    return F.interpolate(mean, size, mode="bilinear", align_corners=False) if size else mean


@torch.no_grad()
def divergence(z, r, decoders, size=None):
    """KL(p(z) || p(z + r)) for each picture, class by class."""
    clean, moved = (mean_logits(decoders, v, size).softmax(1) for v in (z, z + r))
    return (clean * (clean / moved).log()).sum(dim=(1, 2, 3))


def released_t_vat(z, decoders, start, xi=1e-6, eps=2.0, floor=1e-8):
    """The released function, with the constants of its call."""

    def scaled(d):
        return d / (norms(d)[:, None, None, None] + floor)

    d, clean = scaled(start).requires_grad_(), mean_logits(decoders, z).softmax(1).detach()
    moved = mean_logits(decoders, z + xi * d).log_softmax(1)
    loss = F.kl_div(moved, clean, reduction="batchmean")
    return eps * scaled(torch.autograd.grad(loss, d)[0])


@pytest.mark.parametrize("xi", [1e-2, 0.1, 1, 10])
@pytest.mark.parametrize("size", [None, (20, 24)])
def test_the_noise_has_the_norm_eps_for_each_picture(xi, size):
    decoders, (z, start) = pair().float(), draw().float()
    r = psmt.t_vat(z, *decoders, xi=xi, start=start, size=size)
    assert r.shape == z.shape and r.dtype == z.dtype
    torch.testing.assert_close(norms(r), torch.full((B,), 2.0), rtol=1e-5, atol=0)
    five = psmt.t_vat(z, *decoders, xi=xi, eps=5.0, start=start, size=size)
    torch.testing.assert_close(five, 2.5 * r)


def test_the_noise_is_the_gradient_of_each_pictures_divergence():
    """Against central differences, coordinate by coordinate; alone and in a batch."""
    decoders, size, xi, (z, start) = pair(), (10, 12), 0.1, draw(2, 6, 5, 3)
    r = psmt.t_vat(z, *decoders, xi=xi, start=7 * start, size=size)
    for b in range(2):
        z_b, start_b = z[b : b + 1], start[b : b + 1]
        gradient, d = torch.zeros_like(z_b), start_b / start_b.norm()
        for index in range(d.numel()):
            step = torch.zeros_like(d)
            step.view(-1)[index] = 1e-4
            above, below = (divergence(z_b, xi * v, decoders, size) for v in (d + step, d - step))
            gradient.view(-1)[index] = above - below
        torch.testing.assert_close(
            r[b : b + 1], 2 * gradient / gradient.norm(), rtol=1e-4, atol=1e-6
        )
        alone = psmt.t_vat(z_b, *decoders, xi=xi, start=start_b, size=size)
        torch.testing.assert_close(alone, r[b : b + 1], rtol=1e-9, atol=1e-12)


def test_the_noise_hurts_ten_times_as_much_as_random_noise_and_hardly_depends_on_xi():
    decoders, (z, start) = pair(32, 8), draw(4, 32, 16, 16)
    r = psmt.t_vat(z, *decoders, start=start)
    random = 2 * start / norms(start)[:, None, None, None]
    adversarial, chance = (divergence(z, noise, decoders).mean() for noise in (r, random))
    assert adversarial >= 10 * chance
    fine = psmt.t_vat(z, *decoders, xi=1e-2, start=start)
    assert (F.cosine_similarity(fine.flatten(1), r.flatten(1)) > 0.98).all()


def test_the_released_constants_give_no_noise():
    """The gradient shrinks with ξ squared, and 1e-8 added to its norm swallows it."""
    decoders, (z, start) = pair(), draw()
    lengths = [norms(released_t_vat(z, decoders, start, xi)) for xi in (1e-6, 1e-5)]
    assert (lengths[1] / lengths[0]).tolist() == pytest.approx([100] * B, rel=0.1)
    ours = psmt.t_vat(z, *decoders, xi=0.1, start=start)  # all else is the same
    torch.testing.assert_close(released_t_vat(z, decoders, start, xi=0.1, floor=0), ours)
    decoders, z, start = decoders.float(), z.float(), start.float()
    assert (norms(released_t_vat(z, decoders, start)) < 0.02 * 2.0).all()
    ours = psmt.t_vat(z, *decoders, xi=1e-6, start=start)
    torch.testing.assert_close(norms(ours), torch.full((B,), 2.0))


def test_only_the_noise_comes_out():
    """No gradient is left anywhere; statistics stay; it works where gradients are off."""
    decoders, (z, start) = pair(), draw()
    decoders[0].requires_grad_(False)
    z.requires_grad_()
    before = {name: value.clone() for name, value in decoders.state_dict().items()}
    r = psmt.t_vat(z, *decoders, start=start)
    with torch.no_grad():
        assert torch.equal(psmt.t_vat(z, *decoders, start=start), r)
    assert not r.requires_grad and z.grad is None
    assert all(p.grad is None for p in decoders.parameters())
    assert all(torch.equal(value, before[name]) for name, value in decoders.state_dict().items())


def test_a_flat_divergence_and_a_tiny_one_keep_the_norm():
    z, start = draw()
    r = psmt.t_vat(z, *[lambda x: 0 * x[:, :4]] * 2, start=start)
    torch.testing.assert_close(r, 2 * start / norms(start)[:, None, None, None])
    r = psmt.t_vat(z, *[lambda x: 1e-18 * x[:, :4]] * 2)
    assert norms(r).tolist() == pytest.approx([2.0] * B)
    small = psmt.unit(torch.tensor([1e-30, 1e-30]).reshape(1, 2, 1, 1))  # squares underflow
    assert small.flatten().tolist() == pytest.approx([0.5**0.5] * 2)
    assert (psmt.unit(torch.zeros(1, 2, 3, 3)) == 0).all()


def test_half_precision_is_raised_and_autocast_is_off():
    decoders, (z, start) = pair(), draw().bfloat16()
    expected = psmt.t_vat(z.double(), *decoders, start=start.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = psmt.t_vat(z, *decoders.float(), start=start)
    assert ours.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_start_is_drawn_from_torchs_generator():
    decoders, (z, _) = pair(), draw()
    torch.manual_seed(1)
    first, second = psmt.t_vat(z, *decoders), psmt.t_vat(z, *decoders)
    torch.manual_seed(1)
    assert torch.equal(psmt.t_vat(z, *decoders), first) and not torch.equal(first, second)


# --- moving averages, ramp ---


def test_ema_follows_its_law_buffers_included():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    teacher.load_state_dict({k: v * 0 + 5 for k, v in teacher.state_dict().items()})
    student.load_state_dict({k: v * 0 + 2 for k, v in student.state_dict().items()})
    for _ in range(7):
        psmt.ema_update(teacher, student, 0.996)
    law = torch.full((3,), 0.996**7 * 5 + (1 - 0.996**7) * 2)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, torch.tensor(5) if "batches" in name else law)
    psmt.ema_update(teacher, student, 0.0)  # a copy, with memory of its own
    assert torch.equal(teacher.weight, student.weight) and (student.weight == 2).all()
    assert teacher.weight.data_ptr() != student.weight.data_ptr()


def test_the_ramp_is_half_a_cosine():
    factors = [psmt.ramp_up(step, 12.0) for step in range(20)]
    assert factors[0] == 0 and set(factors[12:]) == {1.0} and psmt.ramp_up(0, 0) == 1
    some = [factors[step] for step in (1, 3, 6, 9)]
    assert some == pytest.approx([0.0170, 0.146, 0.5, 0.854], abs=5e-4)
    assert factors == sorted(factors)


# --- views, CutMix, ZoomIn/Out ---


def test_a_turn_is_an_epoch_or_a_twelfth_of_the_rise():
    assert [psmt.turn_length(*case) for case in ((30, 360), (30, 0), (30, 120))] == [30, 30, 10]
    assert [psmt.turn_length(*case) for case in ((0, 0), (3, 5))] == [1, 1]


def test_views_share_geometry_and_draw_scales_from_the_whole_range(monkeypatch):
    image, label = torch.randint(256, (3, 50, 70), dtype=torch.uint8), torch.randint(4, (50, 70))
    crops = spy(monkeypatch, augment, "random_crop")
    for _ in range(300):
        weak, cut, valid, strong = psmt.views(image, label, 32, (0.5, 2.0), nn.Identity())
        assert torch.equal(weak, strong) and weak.shape == (3, 32, 32)
        assert (cut[~valid] == 255).all() and (cut[valid] < 4).all()
    scales = [call.args[3] for call in crops]
    assert 0.5 <= min(scales) < 0.55 and 1.9 < max(scales) <= 2
    assert sum(scales) / 300 == pytest.approx(1.25, abs=0.1)


def test_box_masks_cover_0_358_of_the_pixels_on_average():
    shares = [psmt.box_masks(4, 256, 256).float().mean() for _ in range(1500)]
    assert sum(shares) / 1500 == pytest.approx(0.358, abs=0.01)


@pytest.mark.parametrize("beta, high, wide, first", [(0.5, 44, 22, 0), (0.98, 8, 4, 4)])
def test_a_picture_has_one_box_and_a_batch_one_size_of_them(beta, high, wide, first, monkeypatch):
    """Half the area: 45 of 64 pixels a side, 44 after halving, where no border cuts."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(beta))
    masks = psmt.box_masks(1000, 64, 32)[:, 0]
    rows, columns = masks.any(2), masks.any(1)
    assert torch.equal(masks, rows[:, :, None] & columns[:, None])
    assert rows.sum(1).max() == high and columns.sum(1).max() == wide
    assert rows.sum(1).min() >= high // 2  # a centre inside leaves half of it
    assert rows.any(0).nonzero()[0] == first and rows.any(0)[-1]  # it is 8 rows down, or more
    assert len(rows.unique(dim=0)) > 30


def test_zoom_shows_one_part_of_pictures_targets_and_valid_pixels():
    """Every pixel tells its row and column, from 1 on; 0 is padding."""
    places = torch.meshgrid(torch.arange(1.0, 49), torch.arange(1.0, 65), indexing="ij")
    target = torch.stack(places).expand(2, -1, -1, -1)  # (2, 2, 48, 64)
    images, valid, kinds = target[:, [0, 1, 0]], target.sum(1) % 5 > 0, []
    for _ in range(400):
        zoomed, moved, seen = psmt.zoom(images, target, valid)
        assert zoomed.shape == images.shape and torch.equal(zoomed[0], zoomed[1])
        assert torch.equal(seen, moved.sum(1) % 5 > 0)
        assert (zoomed[:, :2] - moved).abs().max() < 0.501  # bilinear and nearest agree
        rows, columns = (place.unique() for place in moved[0])
        filled = moved[0, 0] > 0
        kinds.append("none" if moved is target else "in" if filled.all() else "out")
        if kinds[-1] == "in":
            assert 0.09 < len(rows) * len(columns) / filled.numel() < 0.32
            assert 0.9 < len(columns) / len(rows) < 1.45
        if kinds[-1] == "out":
            high, wide = filled.any(1).float(), filled.any(0).float()
            assert torch.equal(filled, (high[:, None] * wide) > 0)
            for side in (high, wide):
                assert 0.28 < side.mean() < 0.52 and (side - side.flip(0)).abs().sum() <= 2
    shares = [kinds.count(kind) / 400 for kind in ("in", "out", "none")]
    assert shares == pytest.approx([0.4, 0.2, 0.4], abs=0.08)


# --- short runs ---


def tell(folder, steps=None, **flags):
    """The start of a run on few pictures that is not evaluated, and what happened in it.

    4 pictures are labelled, 7 are not: a pass over these has 3 steps.
    """
    told, loop = SimpleNamespace(rates=[], lams=[], after=[]), Run.loop

    def average_gradients(self, networks):  # right before the step
        told.rates.append(self.state["optimizer"].param_groups[0]["lr"])

    def log(self, step, **values):
        told.lams.append(values["lam"])
        told.after.append({k: v.clone() for k, v in self.state["networks"].state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 11, "val": 3})
        lighten(patch.setattr)
        patch.setattr(Run, "loop", lambda self: islice(loop(self), steps))
        patch.setattr(Run, "average_gradients", average_gradients)
        patch.setattr(Run, "log", log)
        patch.setattr(Run, "evaluate", lambda *args, **kwargs: None)
        patch.setattr(Run, "finish", lambda self: None)
        for name in ("conf_ce_loss", "t_vat", "ema_update", "photometry", "supervised_criterion"):
            setattr(told, name, spy(patch, psmt, name))
        starts, told.batches = spy(patch, Run, "start"), spy(patch, Run, "to_device")
        told.passes, told.answers = (spy(patch, n, "forward") for n in (DeepLabV3Plus, Ensemble))
        flags = SEMI | dict(iters=1, warmup=0, ramp=0) | flags
        psmt.train(psmt.Config(output_dir=str(folder), **flags))
    told.networks = starts[0].kwargs["networks"]
    return told


def equal(first, second):
    """Whether two networks' parameters are equal."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module", params=["copy", "own"])
def story(request, tmp_path_factory):
    """Two steps of warm-up, four after it. Weak views are 0 throughout, strong ones 1."""

    def views(image, label, crop, **_):
        blank = torch.zeros(3, crop, crop)
        return blank, blank[0].long(), blank[0] == 0, blank + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psmt, "views", views)
        flags = dict(iters=6, warmup=1 / 3, ramp=0.5, lam=3.0, lr=0.01, ema_decay=1.0)
        told = tell(tmp_path_factory.mktemp("run") / "run", teachers=request.param, **flags)
    told.own = request.param == "own"
    return told


def test_the_rate_is_constant_in_the_warm_up_and_then_falls_while_lambda_rises(story):
    assert story.rates == pytest.approx([0.01] * 2 + [0.01 * poly_lr(k, 4) for k in range(4)])
    assert story.lams == pytest.approx([0, 0, *(3 * psmt.ramp_up(k, 3) for k in range(4))])


def test_teachers_see_weak_views_the_student_strong_ones_and_statistics_those_passes_alone(story):
    """The student sees labelled pictures at every step, unlabelled ones after the warm-up."""
    for name, network in story.networks.items():
        student, seen = name == "student", [c.args[1] for c in story.passes if c.args[0] is network]
        assert len(seen) == (10 if student else 6 if story.own else 4)
        assert all((images == student).all() for images in seen)
        end = story.after[5].items()
        assert {int(v) for k, v in end if k.startswith(name) and "batches" in k} == {len(seen)}


def test_labelled_and_unlabelled_features_get_noise_from_both_teachers_after_the_warm_up(story):
    perturbed = [c for c in story.passes if len(c.args) > 2 and c.args[2] is not None]
    assert len(story.t_vat) == len(perturbed) == 8
    for call in story.t_vat:
        z, *decoders = call.args
        assert call.kwargs == dict(eps=2.0, size=(32, 32)) and z.shape == (2, 8 + 48, 8, 8)
        assert (norms(call.result[:, -48:]) > 0).all()  # low-level channels get some too
        for name, decode in zip(("teacher1", "teacher2"), decoders, strict=True):
            assert torch.equal(decode(z), psmt.decoder(story.networks[name])(z))


def test_after_the_warm_up_averages_alone_move_a_teacher(story):
    """Their decay is 1 here. In the warm-up it is 0 for copies, and others learn."""
    assert [c.args[2] for c in story.ema_update] == [0.0] * (0 if story.own else 4) + [1.0] * 4
    for name, value in story.after[1].items():
        if "running" not in name and "batches" not in name and not name.startswith("student"):
            assert torch.equal(value, story.after[5][name]), name
    heads = [story.after[step]["student.classifier.weight"] for step in (1, 5)]
    assert not torch.equal(*heads)
    teachers = [p for n in ("teacher1", "teacher2") for p in story.networks[n].parameters()]
    assert all(not p.requires_grad and p.grad is None for p in teachers)


@pytest.mark.parametrize("ramp, order", [(0.5, "00110"), (1.0, "0001"), (0.0, "0001")])
def test_teachers_take_turns_of_a_pass_or_a_twelfth_of_the_rise(ramp, order, tmp_path):
    """A pass has 3 steps. Of 48 steps half is a rise of 24, whose twelfth has 2."""
    flags = dict(iters=48, warmup=1 / 48, ramp=ramp, ema_decay=0.0, eps=0.0)
    told = tell(tmp_path / "run", steps=1 + len(order), **flags)
    student, *teachers = told.networks.values()
    turns = [teachers.index(call.args[0]) for call in told.ema_update]
    assert turns == [0, 1, *map(int, order)]  # copies first
    # After the student's step: without decay it is what the teacher becomes.
    assert equal(teachers[turns[-1]], student) and not equal(teachers[1 - turns[-1]], student)


def test_the_loss_is_that_of_labels_and_lambda_times_the_other(tmp_path, monkeypatch):
    """Without λ and noise a step is the baseline's, but for its statistics.

    Each of the 7 classes' biases has the gradient 1 in the loss put in the place of Conf-CE.
    """
    monkeypatch.setattr(psmt, "conf_ce_loss", lambda student_logits, *_: 7 * student_logits.mean())
    several = [dict(lam=0.0, ramp=0.15), dict(lam=1.5), dict(supervised_only=True)]
    told = [tell(tmp_path / str(k), eps=0.0, lr=0.1, **flags) for k, flags in enumerate(several)]
    none, some, baseline = (run.networks["student"] for run in told)
    assert list(told[2].networks) == ["student"] and equal(baseline, none) and not told[0].t_vat
    assert not torch.equal(baseline.backbone.bn1.running_mean, none.backbone.bn1.running_mean)
    moved = (some.classifier.bias - none.classifier.bias).tolist()
    assert moved == pytest.approx([-0.1 * 1.5] * 7, rel=1e-4)


@pytest.mark.parametrize("cutmix, zoom", [("box", 0), ("boxes", 0), ("off", 0), ("box", 1)])
def test_pictures_answers_and_valid_pixels_are_cut_and_zoomed_alike(
    cutmix, zoom, tmp_path, monkeypatch
):
    """Each picture has a colour of its own; teachers and student see the same views."""

    def views(image, label, crop, **_):
        picture, valid = torch.rand(3, 1, 1).expand(3, crop, crop), torch.rand(crop, crop) < 0.5
        return picture, valid.long(), valid, picture

    monkeypatch.setattr(psmt, "views", views)
    monkeypatch.setattr(psmt, "zoom", lambda images, logits, valid: (-images, -logits, ~valid))
    told = tell(tmp_path / "run", eps=0.0, batch_size=4, cutmix=cutmix, zoom=bool(zoom))
    weak, _, valid, strong = told.batches[-1].result
    (answer,), (loss,), student = told.answers, told.conf_ce_loss, told.passes[-1]
    assert torch.equal(answer.args[1], weak) and loss.args[0] is student.result
    before = [-strong, -answer.result, ~valid] if zoom else [strong, answer.result, valid]
    masks = student.args[1][:, :1] != before[0][:, :1]
    assert masks.flatten(1).any(1).all() == (cutmix != "off")
    one_box = torch.equal(masks, masks.any(3, keepdim=True) & masks.any(2, keepdim=True))
    assert one_box == (cutmix != "boxes")
    for old, new in zip(before, [student.args[1], loss.args[1], loss.args[3]], strict=True):
        inside = masks if old.ndim == 4 else masks[:, 0]
        assert torch.equal(new, torch.where(inside, old.roll(1, 0), old))


def test_flags_reach_what_they_are_for(tmp_path):
    padded = dict(scales=(0.3, 0.3), cutmix="off")
    changed = dict(threshold=0.3, eps=5.0, strength=0.7, ohem=True, ema_decay=0.5, amp="bf16")
    changed |= dict(count_padding=True, pseudo_eval=True, crop_size=232)
    first, second = (tell(tmp_path / f"{len(f)}", **padded, **f) for f in ({}, changed))
    for told, threshold, eps, strength, ohem, decay, dtype, passes in (
        (first, 0.6, 2.0, 0.2, False, 0.9, torch.float32, 1),
        (second, 0.3, 5.0, 0.7, True, 0.5, torch.bfloat16, 0),
    ):
        (loss,), (update,) = told.conf_ce_loss, told.ema_update
        assert (loss.args[2], update.args[2]) == (threshold, decay)
        assert loss.args[3].any() and loss.args[3].all() == (told is second)
        assert [(c.kwargs["eps"], c.args[0].dtype) for c in told.t_vat] == [(eps, dtype)] * 2
        assert told.photometry[0].args == (strength,)
        assert told.supervised_criterion[0].args == (ohem, 2)
        assert told.networks["teacher1"].backbone.bn1.num_batches_tracked == passes


def test_in_the_warm_up_own_teachers_learn_as_the_student_does(tmp_path, monkeypatch):
    """From equal weights and equal views, which are plain, they come to the same weights."""
    asked = []

    def build(classes, backbone, weights, width):
        asked.append(weights)
        torch.manual_seed(3)
        return DeepLabV3Plus(classes, backbone, None, width)

    monkeypatch.setattr(psmt, "DeepLabV3Plus", build)
    flags = dict(iters=3, warmup=2 / 3, strength=0.0, ema_decay=1.0, weights="IMAGENET1K_V1")
    copy, own = (tell(tmp_path / k, teachers=k, **flags).networks for k in ("copy", "own"))
    assert asked == ["IMAGENET1K_V1"] * 4  # the student of copies, and all three
    for name in ("teacher1", "teacher2"):
        assert equal(own[name], copy[name]) and not equal(own[name], own["student"])


def test_the_result_is_the_mean_of_the_teachers_and_all_are_scored(
    few, light, tmp_path, monkeypatch
):
    starts, scores = spy(monkeypatch, Run, "start"), spy(monkeypatch, Run, "score")
    result = psmt.train(psmt.Config(output_dir=str(tmp_path / "run"), **SEMI))
    networks = starts[0].kwargs["networks"]
    assert list(result.model.networks) == [networks["teacher1"], networks["teacher2"]]
    assert isinstance(result.model, Ensemble) and len(scores) == 1
    run, scored = scores[0].args[0], result.history[-1]
    for name in ("student", "teacher1", "teacher2"):
        assert scored[name] == run.score(networks[name]).nanmean().item()
    assert scored["miou"] == result.miou == run.score(result.model).nanmean().item()


# --- recipes ---

# On as many GPUs: steps of a pass over the unlabelled pictures, of the warm-up, of all after it.
RELEASED = [
    ("voc 1/16", 4, 310, 100, 24_800),
    ("voc 1/8", 4, 289, 205, 23_120),
    ("voc 1/4", 4, 248, 410, 49_600),
    ("voc 1/2", 4, 165, 825, 49_500),
    ("cityscapes 1/8", 2, 325, 230, 104_000),
    ("cityscapes 1/4", 2, 279, 465, 125_550),
    ("cityscapes 1/2", 2, 186, 930, 102_300),
    ("voc 1/8", 1, 1157, 825, 80 * 1157),
]


@pytest.mark.parametrize("name, gpus, epoch, warmup, steps", RELEASED)
def test_recipes_are_the_released_ones(name, gpus, epoch, warmup, steps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    recipe = psmt.Config(**runpy.run_path(psmt.__file__)["RECIPES"][name])
    assert f"{recipe.dataset} {recipe.labeled}" == name
    assert round(recipe.warmup * recipe.iters) == warmup and recipe.iters - warmup == steps
    assert recipe.ramp * recipe.iters == pytest.approx(12 * epoch)
    assert (recipe.threshold, recipe.ema_decay, recipe.teachers) == (0.6, 0.996, "own")
    own = (recipe.lr, recipe.lam, recipe.crop_size, recipe.batch_size, recipe.cutmix, recipe.ohem)
    city = (0.0045, 3.0, 800, 4, "boxes", True)
    assert own == ((0.0025 * gpus, 1.5, 512, 8, "box", False) if recipe.dataset == "voc" else city)


def test_panels_show_the_teachers_confidence_and_where_it_is_too_low(
    few, light, tmp_path, monkeypatch
):
    images, drawn = torch.randn(1, 3, 64, 64), []
    monkeypatch.setattr("common.run.panels", lambda *_, show, **how: drawn.append(show))
    for name in ("semi", "sup"):
        flags = SEMI | dict(output_dir=str(tmp_path / name), threshold=0.2)
        result = psmt.train(psmt.Config(supervised_only=name == "sup", **flags))
        if name == "semi":
            conf, below = drawn[0](images).values()
            expected = result.model(images).softmax(dim=1).max(dim=1).values
            assert torch.equal(conf, expected) and torch.equal(below, expected < 0.2)
    assert len(drawn) == 2 and drawn[1] is None
