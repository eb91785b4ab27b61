"""This code and the authors' own on the same inputs: losses, gradients, masks, schedules, metrics.

README.md says where the arrays are from. What is equal is compared in float64, to 1e-12 unless the
line says otherwise, and in float32. Where this code differs on purpose a test has what it gives,
how far that is from the released value, and what closes the gap. `python tests/released/table.py`
prints the differences row by row.
"""

import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cac
import cps
import psmt
from common import augment
from common.augment import cutmix_masks, mix
from common.deeplab import Ensemble
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import confusion_matrix, iou, mean_iou, slide
from common.optim import poly_lr, sgd_poly

HERE = Path(__file__).parent
in_both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def arrays(name, dtype=torch.float64):
    """A file's arrays: fractions as dtype, whole numbers as int64, and bool."""
    with np.load(HERE / f"{name}.npz") as file:
        tensors = {key: torch.as_tensor(file[key]) for key in file.files}
    kinds = {True: dtype, False: torch.int64}
    return {
        key: value if value.dtype == torch.bool else value.to(kinds[value.is_floating_point()])
        for key, value in tensors.items()
    }


def below(prefix, found):
    """The arrays whose names begin so, by the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def furthest(ours, released):
    """The largest difference between numbers, or tensors of one shape."""
    ours, released = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (ours, released))
    assert ours.shape == released.shape
    return (ours - released).abs().max().item()


@pytest.fixture
def same(record_property):
    """same(row, ours, released): equal, float64 within `double` and float32 within `single`."""

    def same(row, ours, released, double=1e-12, single=0.0, why=""):
        difference = furthest(ours, released)
        if getattr(ours, "dtype", None) == torch.float32:
            assert difference <= single, row
        else:
            record_property(row, (difference, why))
            assert difference <= double, row

    return same


@pytest.fixture
def alike(same):
    """alike(row, ours, released, within): statistics of random draws, here and there."""

    def alike(row, ours, released, within):
        same(row, ours, released, within, why="random draws, here and there")

    return alike


@pytest.fixture
def apart(record_property):
    """apart(row, ours, released, by, why): as far apart as that."""

    def apart(row, ours, released, by, why, rel=1e-3):
        difference = furthest(ours, released)
        record_property(row, (difference, why))
        assert difference == pytest.approx(by, rel=rel), row

    return apart


def pixels(gradient):
    """How many pixels have a gradient (B, K, H, W)."""
    return (gradient != 0).any(dim=1).sum()


# --- CPS: the two steps ---

EVERYWHERE = torch.ones(4, 17, 19, dtype=torch.bool)


@in_both
def test_a_step_of_cps(dtype, same):
    """L_cps is one mean over labelled and unlabelled pixels, whatever their labels."""
    inputs, released = arrays("cps_step", dtype), arrays("cps_step")
    names, labels = ("l1", "u1", "l2", "u2"), inputs["labels"]
    l1, u1, l2, u2 = logits = [inputs[f"logits_{name}"].requires_grad_() for name in names]
    for number, own in enumerate((l1, l2), 1):
        same("cps_step: L_s", cross_entropy(own, labels), released[f"L_s{number}"], single=3e-6)
    loss_sup = cps.supervised_loss(l1, l2, labels)
    same("cps_step: L_s", loss_sup, released["L_s1"] + released["L_s2"], single=3e-6)
    joined = cps.join([l1, l2], [u1, u2])
    pseudo = [cps.labels_of(taught, EVERYWHERE) for taught in joined]
    for number, own in enumerate(pseudo, 1):
        same("cps_step: pseudo labels", own, released[f"pseudo{number}"], double=0)
    loss_cps = cps.cps_loss(*joined, *pseudo)
    same("cps_step: L_cps", loss_cps, released["L_cps"], single=3e-6)
    loss = loss_sup + inputs["lam"].item() * loss_cps
    same("cps_step: L, λ = 1.5", loss, released["total"], single=6e-6)
    for name, gradient in zip(names, torch.autograd.grad(loss, logits), strict=True):
        same("cps_step: gradients", gradient, released[f"grad_{name}"], single=1e-8)


@in_both
def test_a_step_of_cps_with_cutmix(dtype, same):
    """Labels are those of two whole pictures, mixed; labelled pictures have no term in L_cps."""
    inputs, released = arrays("cps_cutmix_step", dtype), arrays("cps_cutmix_step")
    names, labels = ("l1", "l2", "s1_mix", "s2_mix"), inputs["labels"]
    l1, l2, s1, s2 = logits = [inputs[name].requires_grad_() for name in names]
    # The mask shows u1's pictures in u0's. There, these are two batches; here, a picture and the
    # one before it.
    masks = torch.stack([torch.zeros_like(inputs["mask"]), inputs["mask"]], dim=1).flatten(0, 1)
    pseudo = []
    for number in (1, 2):
        whole = torch.stack([inputs[f"t{number}_u{k}"] for k in (1, 0)], dim=1).flatten(0, 1)
        pseudo.append(cps.labels_of(mix(whole, masks), EVERYWHERE)[1::2])
        same("cps_cutmix_step: pseudo labels", pseudo[-1], released[f"pseudo{number}"], double=0)
    loss_sup, loss_cps = cps.supervised_loss(l1, l2, labels), cps.cps_loss(s1, s2, *pseudo)
    expected = released["L_s1"] + released["L_s2"]
    same("cps_cutmix_step: L_s", loss_sup, expected, single=3e-6)
    same("cps_cutmix_step: L_cps", loss_cps, released["L_cps"], single=3e-6)
    loss = loss_sup + inputs["lam"].item() * loss_cps
    same("cps_cutmix_step: L, λ = 1", loss, released["total"], single=6e-6)
    for name, gradient in zip(names, torch.autograd.grad(loss, logits), strict=True):
        same("cps_cutmix_step: gradients", gradient, released[f"grad_{name}"], single=1e-8)


# --- OHEM ---


def ohem(case, dtype=torch.float64):
    """A case's loss and gradient, and what was released for it."""
    inputs, released = below(f"c{case}_", arrays("ohem", dtype)), arrays("ohem")
    expected = below(f"c{case}_", released)
    # Cases with the same pictures, or the same gradient, share them.
    source = below(f"c{inputs['inputs_of']}_", arrays("ohem", dtype))
    expected["grad"] = released[f"c{expected['grad_of']}_grad"]
    logits, options = source["logits"].requires_grad_(), (expected["thresh"], expected["min_kept"])
    loss = ohem_cross_entropy(logits, source["labels"], *(option.item() for option in options))
    return loss, torch.autograd.grad(loss, logits)[0], expected


@in_both
@pytest.mark.parametrize("case", [0, 1, 2, 3, 5, 6, 7, 8, 10])
def test_ohem(case, dtype, same):
    """The threshold decides, or min_kept; as many are valid, or fewer; one picture; much void."""
    loss, gradient, released = ohem(case, dtype)
    same("ohem: loss", loss, released["loss"], single=1e-6)
    same("ohem: gradient", gradient, released["grad"], single=1e-7)
    same("ohem: pixels kept", pixels(gradient), released["n_kept"], double=0)


def test_ohem_that_must_keep_no_pixel_still_has_its_threshold(same, apart):
    """Case 4 has the pictures of case 0, where the threshold decides, as it does here."""
    (loss, gradient, released), (*_, filtered) = ohem(4), ohem(0)
    why = "the threshold counts; C keeps every valid pixel; no recipe has 0"
    apart("ohem: loss where min_kept is 0", loss, released["loss"], 0.12326, why)
    same("ohem: loss", loss, filtered["loss"])
    same("ohem: gradient", gradient, filtered["grad"])
    assert (pixels(gradient), released["n_kept"]) == (214, 226)


def test_ohem_of_void_alone_is_0_and_not_nan(record_property):
    loss, gradient, released = ohem(9)
    assert loss == 0 and (gradient == 0).all()
    assert released["loss"].isnan() and released["n_kept"] == 0
    record_property("ohem: loss where all is void", (math.nan, "0, with zero gradient; C's is NaN"))


# --- schedules ---


def rates(total, base, shares=(1.0,), **options):
    """The rates of all groups before each step and after the last, (total + 1, groups).

    Each network has two groups: weights, and biases.
    """
    networks, found = [nn.Linear(2, 2) for _ in shares], []
    optimizer, schedule = sgd_poly(networks, base, 1e-4, total, shares, **options)
    optimizer.step()  # a schedule wants to be second
    for step in range(total + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        if step < total:
            schedule.step()
    return torch.tensor(found, dtype=torch.float64)


def test_the_schedule_of_cps(same):
    released = arrays("poly")
    steps, total, base = (released[f"cps_{key}"] for key in ("steps", "T", "base"))
    formula = [base * poly_lr(step, total.item()) for step in steps.tolist()]
    same("poly: CPS's rate", torch.stack(formula), released["cps_lr"])
    ours = rates(total.item(), base.item())[steps]
    same("poly: CPS's rate", ours, released["cps_lr"][:, None].expand(-1, 2))


@pytest.mark.parametrize("method", ["psmt", "cac"])
def test_the_schedules_of_psmt_and_cac(method, same):
    """PS-MT's groups are weights and biases; CAC's are head and backbone, here two each."""
    released, options, groups = below(f"{method}_", arrays("poly")), {}, slice(None)
    row = "poly: PS-MT's rates"
    if method == "cac":
        options, groups = dict(shares=(1.0, 0.1), decay_all=True), slice(None, None, 2)
        row = "poly: CAC's rates"
    small = rates(math.prod(released["small_epochs_iters"].tolist()), 0.01, **options)[:, groups]
    same(row, small[:-1], released["small_lr"])
    same(row, small[-1], released["small_lr_after_last"])
    full = rates(released["full_T"].item(), 0.01, **options)[:, groups]
    same(row, full[released["full_steps"]], released["full_lr"])


def test_the_ramp_of_psmt(same):
    released = below("psmt_ramp_", arrays("poly"))
    epoch, length = released["iters_per_epoch"].item(), released["epochs"].item()
    steps = [whole * epoch + part for whole, part in released["epoch_iter"].tolist()]
    ours = [released["max"] * psmt.ramp_up(step, length * epoch) for step in steps]
    same("poly: PS-MT's λ(t)", torch.stack(ours), released["weight"])


# --- CutMix ---


def place(masks):
    """How often each of 16 x 16 parts of masks (N, H, W) is inside."""
    return F.adaptive_avg_pool2d(masks.sum(dim=0).double()[None] / len(masks), 16)[0]


def shares(masks):
    """What each of masks (N, H, W) takes of the pixels."""
    return torch.cat([some.float().mean(dim=(1, 2)) for some in masks.split(64)]).double()


def test_masks_are_those_of_cps_for_the_same_random_numbers(same, monkeypatch):
    released, boxes = arrays("cutmix_stats"), (8, 3)
    rng = np.random.RandomState(released["cps_exact_seed"].item())
    area, exponent, corner = (rng.random_sample(size) for size in (boxes, boxes, (*boxes, 2)))
    draws = torch.tensor(np.stack([area, exponent, corner[..., 0], corner[..., 1]]))[..., None]
    monkeypatch.setattr(augment.torch, "rand", lambda *_, **__: draws)
    ours, expected = cutmix_masks(8, 32, 48)[:, 0], released["cps_exact_masks_8x32x48"]
    same("cutmix_stats: CPS's masks, the same random numbers", ours, expected, double=0)


def test_masks_have_the_statistics_of_cps(alike):
    """2,000 here, 20,000 there."""
    released, row = arrays("cutmix_stats"), "cutmix_stats: CPS's masks: "
    masks = cutmix_masks(2000, *released["cps_size"].tolist())[:, 0]
    area, expected = shares(masks), released["cps_area_quantiles_20000"]
    found = area.quantile(released["cps_q"])
    alike(row + "mean area", area.mean(), released["cps_area_mean_20000"], 0.006)
    alike(row + "5 to 95 % quantiles", found[2:7], expected[2:7], 0.012)
    alike(row + "1, 99 % quantiles", found[[1, 7]], expected[[1, 7]], 0.02)
    alike(row + "place", place(masks), released["cps_occupancy16_20000"], 0.06)
    assert released["cps_values"].tolist() == [0, 1] and masks.dtype == torch.bool


def test_boxes_are_those_of_psmt_on_voc(alike, apart):
    """A batch has one size of boxes, so batches count: 1,000 here, 10,000 there; or 250."""
    released, row = below("psmt_voc_", arrays("cutmix_stats")), "cutmix_stats: PS-MT's box, VOC: "
    batch, size, q = released["batch"].item(), released["size"].item(), [2, 3, 4, 5, 6]
    masks = torch.cat([psmt.box_masks(batch, size, size)[:, 0] for _ in range(1000)])
    area, some = shares(masks), masks[: 250 * batch]
    alike(row + "mean area", area.mean(), released["box_area_mean"], 0.017)
    alike(row + "its deviation", area.std(), released["box_area_std"], 0.01)
    found = area.quantile(arrays("cutmix_stats")["cps_q"])
    alike(row + "5 to 95 % quantiles", found[q], released["box_area_quantiles"][q], 0.025)
    alike(row + "place", place(some), released["occupancy16"], 0.06)
    large = torch.cat([shares(psmt.box_masks(batch, 512, 512)[:, 0]) for _ in range(250)])
    alike(row + "mean area at 512 pixels", large.mean(), released["box_area_mean_512"], 0.033)
    # A picture's partner is another one. In C partners are a random permutation: one of eight is
    # the picture itself, and shows nothing foreign.
    pictures = torch.arange(batch)[:, None, None].expand(-1, size, size)
    foreign = torch.cat([shares(mix(pictures, m[:, None]) != pictures) for m in some.split(batch)])
    theirs = released["foreign_pixels_mean"]
    assert torch.equal(foreign, area[: len(some)])
    assert theirs == pytest.approx(7 / 8 * area.mean().item(), abs=0.033)
    why = "a partner is another picture; C's is the picture itself, one in eight"
    apart(row + "pixels of another picture", area.mean(), theirs, 0.039, why, rel=0.4)


def test_boxes_are_those_of_psmt_on_cityscapes_but_cancel(alike, apart, monkeypatch):
    """Where two boxes of a picture overlap, C shows the later one's partner."""
    released, row = below("psmt_city_", arrays("cutmix_stats")), "cutmix_stats: PS-MT's boxes, "
    draws = torch.rand(4, 1000, 3, 1, dtype=torch.float64)

    def masks(*boxes):
        monkeypatch.setattr(augment.torch, "rand", lambda *_, **__: draws[:, :, list(boxes)])
        return cutmix_masks(1000, 128, 128)[:, 0]

    # A box alone: that one, and another twice, which cancels itself.
    alone = torch.stack([masks(0, 1, 1), masks(1, 2, 2), masks(2, 0, 0)])
    ours, union = masks(0, 1, 2), alone.any(dim=0)
    assert torch.equal(ours, alone.sum(dim=0) % 2 == 1)
    row, box = row + "Cityscapes: ", shares(alone.flatten(0, 1))
    alike(row + "area of a box", box.mean(), released["box_area_mean"], 0.003)
    alike(row + "area of their union", shares(union).mean(), released["union_area_mean"], 0.01)
    found, q = shares(union).quantile(arrays("cutmix_stats")["cps_q"]), [2, 3, 4, 5, 6]
    expected = released["union_area_quantiles"]
    alike(row + "5 to 95 % quantiles of it", found[q], expected[q], 0.012)
    why = "boxes cancel where two overlap, as in CPS; C's cover each other"
    mixed = shares(ours).mean()
    apart(row + "area that is mixed", mixed, released["union_area_mean"], 0.054, why, rel=0.15)


# --- PS-MT: Conf-CE ---


class Gives(nn.Module):
    """A network with these logits for any picture."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


@in_both
@pytest.mark.parametrize("where", ["voc", "city"])
def test_conf_ce(where, dtype, same):
    """At the last of five thresholds no pixel passes."""
    inputs = below(f"{where}_", arrays("conf_ce", dtype))
    released = below(f"{where}_", arrays("conf_ce"))
    student = inputs["student"].requires_grad_()
    ensemble = Ensemble([Gives(inputs[f"teacher{k}"]) for k in (1, 2)])(None)
    conf, row = ensemble.softmax(1).amax(1), "conf_ce: loss, five thresholds"
    same("conf_ce: confidence of the ensemble", conf, released["conf_plain"], single=2e-6)
    gradients = []
    for index, threshold in enumerate(released["thresholds"].tolist()):
        loss = psmt.conf_ce_loss(student, ensemble, threshold)
        same(row, loss, released["loss"][index], single=2e-6)
        gradients += torch.autograd.grad(loss, student)
        passing = released["n_pass"][index]
        same("conf_ce: pixels that pass", pixels(gradients[-1]), passing, double=0)
        # Here always with a graph. C's 0 for VOC, where no pixel passes, is a constant.
        assert released[f"th{index}_connected"] == (where == "city" or passing > 0)
    row, double = "conf_ce: gradient at 0.6, VOC", 1e-12
    if where == "city":
        row, double = "conf_ce: gradient at 0.6, Cityscapes (kept in float32)", 1e-9
    same(row, gradients[2], released["grad_th2"], double, single=5e-8)
    assert loss == 0 and (gradients[-1] == 0).all()


@in_both
def test_a_confidence_equal_to_the_threshold_passes(dtype, same):
    """In five of six pixels two classes have one half each."""
    inputs, released = below("edge_", arrays("conf_ce", dtype)), below("edge_", arrays("conf_ce"))
    student = inputs["student"].requires_grad_()
    loss = psmt.conf_ce_loss(student, inputs["teacher"], inputs["threshold"].item())
    same("conf_ce: loss, confidence at the threshold", loss, released["loss"], single=2e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    row = "conf_ce: gradient, confidence at the threshold"
    same(row, gradient, released["grad"], single=5e-8)


@pytest.mark.parametrize("where, by", [("voc", 0.12347), ("city", 0.17036)])
def test_the_ensemble_is_the_plain_mean(where, by, same, apart):
    """In C the teacher that follows fills in all but the seven highest logits of the other."""
    data = below(f"{where}_", arrays("conf_ce"))
    student, active, resting = (data[key] for key in ("student", "teacher1", "teacher2"))
    lower = torch.ones_like(resting, dtype=torch.bool)
    lower.scatter_(1, resting.topk(7, dim=1).indices, False)
    completed = (active + torch.where(lower, active, resting)) / 2
    loss, released = psmt.conf_ce_loss(student, completed, 0.6), data["loss_top7_th2"]
    same("conf_ce: loss at 0.6, from C's ensemble", loss, released)
    loss = psmt.conf_ce_loss(student, (active + resting) / 2, 0.6)
    why = "the plain mean, as in the paper; C takes seven logits of a pixel from one teacher"
    apart("conf_ce: loss at 0.6, each from its ensemble", loss, released, by, why)


# --- PS-MT: T-VAT ---

FLOOR = 1e-8  # what C adds to each norm that it divides by


def norms(r):
    return torch.linalg.vector_norm(r, dim=(1, 2, 3), keepdim=True)


def vat(xi, eps, dtype=torch.float64):
    """The noise, from C's features, decoders and start."""
    inputs, decoders = arrays("tvat", dtype), []
    for name in ("dec1.", "dec2."):
        conv, norm = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        layers = nn.ModuleDict(dict(conv=conv, bn=norm, relu=nn.ReLU(), cls=nn.Conv2d(8, 4, 1)))
        layers.to(dtype).load_state_dict(below(name, inputs))
        decoders.append(nn.Sequential(*layers.values()).eval())
    before = [value.clone() for net in decoders for value in net.state_dict().values()]
    start = inputs["rand01"] - 0.5
    # C divides the start by its norm and the floor: as if ξ were smaller by that much.
    r = psmt.t_vat(inputs["x"], *decoders, xi * norms(start) / (norms(start) + FLOOR), eps, start)
    after = [value for net in decoders for value in net.state_dict().values()]
    assert not r.requires_grad and all(map(torch.equal, before, after))
    return r


def test_t_vat_is_the_released_but_for_the_floor(same, apart):
    released = arrays("tvat")
    size = released["xi0.1_eps10_grad_norm"][:, None, None, None]
    r, expected = vat(0.1, 10.0), released["xi0.1_eps10_r_adv"]
    why = "of norm eps; C's falls short, for it adds 1e-8 to the gradient's norm, 5e-4 here"
    apart("tvat: noise, ξ = 0.1, eps = 10", r, expected, 3.232e-5, why)
    same("tvat: noise, ξ = 0.1, C's 1e-8 put back", r * size / (size + FLOOR), expected)
    for eps in (2.0, 10.0):
        length, expected = norms(vat(0.1, eps)), released[f"xi0.1_eps{eps:g}_r_norm"]
        same("tvat: norm, which is eps", length, torch.full_like(length, eps))
        with_floor = (length * size / (size + FLOOR)).flatten()
        same("tvat: norm, C's 1e-8 put back", with_floor, expected)
        assert (1 - expected / eps).max() == pytest.approx(2.24e-5, rel=1e-2)


def test_t_vat_in_float32():
    released, r = arrays("tvat")["xi0.1_eps10_r_adv"], vat(0.1, 10.0, torch.float32).double()
    assert (r - released).norm() < 3e-4 * released.norm()
    assert (F.cosine_similarity(r.flatten(1), released.flatten(1)) > 0.99999).all()


def test_t_vat_with_the_released_constants_has_a_norm_only_here(same, apart):
    """At ξ = 1e-6 the gradient's norm is 5e-14, which the floor swallows."""
    released = below("shipped_xi1e-6_eps2_", arrays("tvat"))
    r, size = vat(1e-6, 2.0), released["grad_norm"][:, None, None, None]
    why = "eps; C's call has ξ = 1e-6, for which its 1e-8 leaves no norm"
    apart("tvat: norm, ξ = 1e-6, eps = 2", norms(r).flatten(), released["r_norm"], 2.0, why)
    assert (released["r_norm"] < 1e-5).all() and (released["r_norm_fp32"] < 1e-4).all()
    row = "tvat: noise, ξ = 1e-6, C's 1e-8 put back"
    same(row, r * size / (size + FLOOR), released["r_adv"], 2e-13)  # kept in float32, up to 2e-6
    torch.testing.assert_close(norms(vat(1e-6, 2.0, torch.float32)), torch.full((3, 1, 1, 1), 2.0))


# --- moving averages ---


def block(dtype):
    return nn.ModuleDict(dict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))).to(dtype)


@in_both
def test_psmt_averages_parameters_and_statistics(dtype, same, apart):
    student, teacher = (nn.ModuleDict(dict(enc=block(dtype), dec=block(dtype))) for _ in range(2))
    student.load_state_dict(below("student.", arrays("ema", dtype)))
    teacher.load_state_dict(below("teacher_before.", arrays("ema", dtype)))
    counts = []
    for updates in (1, 2, 3):
        psmt.ema_update(teacher, student, 0.996)
        for name, expected in below(f"teacher_after{updates}.", arrays("ema")).items():
            ours = teacher.state_dict()[name]
            if ours.is_floating_point():
                same("ema: PS-MT's teacher", ours, expected, 1e-14, single=1e-6)
            else:
                counts.append(torch.stack([ours, expected]))
    ours, released = torch.stack(counts, dim=1)
    why = "stays; C averages it, too, and drops the fraction; nothing reads it"
    apart("ema: PS-MT's teacher, BatchNorm's count of batches", ours, released, 21, why)


@in_both
def test_cps_averages_parameters_alone(dtype, same):
    student, teacher = block(dtype), block(dtype)
    student.load_state_dict(below("cpsmt_student.", arrays("ema", dtype)))
    teacher.load_state_dict(below("cpsmt_before.", arrays("ema", dtype)))
    cps.ema_update(teacher, student, 0.99)
    for name, expected in below("cpsmt_after.", arrays("ema")).items():
        ours = teacher.state_dict()[name]
        same("ema: CPS's mean teacher, with buffers", ours, expected, 1e-14, single=1e-6)


# --- CAC: the loss ---

in_directions = pytest.mark.parametrize("direction", ["12", "21"])


def contrast(case, direction, dtype=torch.float64):
    """The loss's arguments in a direction, "12" or "21", and what was released for it."""
    released, (own, other) = below(f"c{case}_", arrays("cac_loss")), direction
    inputs = below(f"c{case}_", arrays("cac_loss", dtype))
    # In cases 1 and 6 no anchor learns whatever the features: they have those of case 0.
    cells = below("c0_" if case in (1, 6) else f"c{case}_", arrays("cac_loss", dtype))
    arguments = dict(
        anchor=cells["neg"][cells[f"feat{own}_in_neg"]].requires_grad_(),
        target=cells["neg"][cells[f"feat{other}_in_neg"]].requires_grad_(),
        anchor_conf=inputs[f"conf{own}"],
        target_conf=inputs[f"conf{other}"],
        anchor_labels=inputs[f"label{own}"],
        negatives=cells["neg"].requires_grad_(),
        negative_labels=cells["neg_label"],
        tau=released["tau"].item(),
        gamma=released["gamma"].item(),
    )
    return arguments, {k.replace(own, ""): v for k, v in released.items()}


def computed(arguments):
    """The loss and the anchors' gradient; nothing else has one."""
    loss = cac.directional_contrastive_loss(**arguments)
    tensors = [arguments[name] for name in ("anchor", "target", "negatives")]
    gradient, *others = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert others == [None, None]
    return loss, gradient


def with_epsilons(anchor, target, labels, negatives, negative_labels, tau):
    """`info_nce` with C's two epsilons.

    The one in the denominator is a share of the largest term, which may be a pixel of the anchor's
    own class: as if there were a negative of that similarity with a weight of 1e-8.
    """
    similar = torch.cat([(anchor * target).sum(1, keepdim=True), anchor @ negatives.T], dim=1)
    largest = similar.amax(dim=1, keepdim=True) + tau * math.log(1e-8)
    # One more dimension holds it: a unit vector along it is that negative, of no class.
    anchor, target = torch.cat([anchor, largest], dim=1), F.pad(target, (0, 1))
    negatives = F.pad(negatives, (0, 1, 0, 1))
    negatives[-1, -1] = 1
    exact = cac.info_nce(
        anchor, target, labels, negatives, F.pad(negative_labels, (0, 1), value=-1), tau
    )
    return -(torch.exp(-exact) + 1e-8).log()


@in_directions
@pytest.mark.parametrize("case", [0, 2, 3, 4, 5])
def test_cac_loss_is_the_released_but_for_the_epsilons(case, direction, same):
    """Without them it is the formula's value, and with them put back what C gives."""
    arguments, released = contrast(case, direction)
    same("cac_loss: loss, the formula", computed(arguments)[0], released["derived_loss_no_eps"])
    active = cac.active_anchors(*(arguments[k] for k in ("anchor_conf", "target_conf", "gamma")))
    same("cac_loss: anchors that learn", active, released["mask"], double=0)
    pairs = (arguments[name][active] for name in ("anchor", "target", "anchor_labels"))
    others = arguments["negatives"].detach(), arguments["negative_labels"], arguments["tau"]
    loss = with_epsilons(*pairs, *others).sum() / (active.sum().double() + 1e-12)
    same("cac_loss: loss, C's 1e-8 put back", loss, released["loss"])
    (gradient,) = torch.autograd.grad(loss, arguments["anchor"])
    same("cac_loss: gradient, C's 1e-8 put back", gradient, released["grad_feat"])


@in_both
@in_directions
@pytest.mark.parametrize(
    "case, loss_by, gradient_by", [(0, 5e-9, 6e-8), (2, 3e-8, 3e-8), (4, 7e-8, 2e-7)]
)
def test_cac_loss_is_as_near_as_the_epsilons_are_small(
    case, loss_by, gradient_by, direction, dtype, same
):
    """Any pictures; half of the labels disagree; a bank of two steps."""
    arguments, released = contrast(case, direction, dtype)
    loss, gradient = computed(arguments)
    why = "exact; C adds 1e-8 to denominator and logarithm"
    same("cac_loss: loss", loss, released["loss"], loss_by, single=2e-6, why=why)
    same("cac_loss: gradient", gradient, released["grad_feat"], gradient_by, single=1e-6, why=why)


@pytest.mark.parametrize("direction, by", [("12", 1.4564e-7), ("21", 1.8803e-7)])
def test_cac_loss_without_negatives_is_0(direction, by, apart):
    arguments, released = contrast(3, direction)
    loss, gradient = computed(arguments)
    assert loss == 0 and (gradient == 0).all()
    why = "0 without negatives; C's 1e-8 leaves something"
    apart("cac_loss: loss, a single class", loss, released["loss"], by, why)
    assert 1e-7 < released["grad_feat"].abs().max() < 3e-7


@pytest.mark.parametrize("direction, by", [("12", 3.2912), ("21", 3.6391)])
def test_cac_loss_is_not_capped(direction, by, apart):
    arguments, released = contrast(5, direction)
    loss, gradient = computed(arguments)
    assert released["loss"] < -math.log(1e-8) < loss
    why = "exact; C's 1e-8 caps it at 18.4 and leaves a fifteenth of the gradient"
    apart("cac_loss: loss, opposite features", loss, released["loss"], by, why)
    assert gradient.abs().max() > 14 * released["grad_feat"].abs().max()


# Rounded to float32 a softmax depends on the pixel's place, and the ties of case 6 may break.
@in_directions
@pytest.mark.parametrize(
    "case, dtype", [(1, torch.float64), (1, torch.float32), (6, torch.float64)]
)
def test_cac_loss_where_no_anchor_learns(case, dtype, direction, same):
    """All confidences are below γ, or all are tied, pair by pair."""
    arguments, released = contrast(case, direction, dtype)
    loss, gradient = computed(arguments)
    same("cac_loss: loss where no anchor learns", loss, released["loss"], double=0)
    assert (gradient == 0).all() and not released["mask"].any()


class Stored(nn.Module):
    """A segmenter whose decoder and classifier give stored maps, (D, h, w) and (K, h, w)."""

    def __init__(self, features, logits):
        super().__init__()
        # The decoder has four values for each cell, of which the mean is taken.
        self.features = features[None].repeat_interleave(2, 2).repeat_interleave(2, 3)
        self.logits = logits[None]

    def encode(self, images):
        return images

    def decode(self, encoded):
        return self.features

    def classify(self, decoded):
        assert decoded.shape[2:] == self.logits.shape[2:]
        return self.logits


def test_cac_compares_the_released_cells(same):
    """From the maps of two crops, the second one mirrored, to what the loss is given."""
    data, crops = below("c0_", arrays("cac_loss")), []
    for k in (1, 2):
        net = cac.ContrastiveNet(Stored(data[f"feat{k}_map"], data[f"logits{k}_map"]), 16, False)
        crops.append(net.features(torch.zeros(1, 3, 80, 80)))
    ul1, br1, ul2, br2 = data["ul1_br1_ul2_br2"].tolist()
    match = cac.counterparts((*ul1, *br1), (*ul2, *br2), *data["flip"].tolist(), crop=80)
    for k, crop, cells in zip((1, 2), crops, cac.overlap(match[None]), strict=True):
        seen, expected = crop.at(cells), data["neg"][data[f"feat{k}_in_neg"]]
        same("cac_loss: features in the overlap", seen.phi, expected)
        same("cac_loss: confidence in the overlap", seen.conf, data[f"conf{k}"])
        same("cac_loss: pseudo labels in the overlap", seen.pseudo, data[f"label{k}"], double=0)


# --- CAC: the crops ---

in_places = pytest.mark.parametrize("where", ["voc", "city"])


def crops_of(where):
    return {k: v.tolist() for k, v in below(f"{where}_", arrays("cac_crops")).items()}


def draw_of(monkeypatch, values):
    """Random whole numbers are these, one after the other, which have to be possible."""
    values = iter(values)

    def draw(*bounds_and_size):
        *low, high, _ = bounds_and_size
        value = next(values)
        assert sum(low) <= value < high
        return torch.tensor(value)

    monkeypatch.setattr(cac.torch, "randint", draw)


@in_places
def test_crops_are_the_released_for_the_same_draws(where, same, monkeypatch):
    """Every released pair may be drawn here, and has the same common rectangle in both crops."""
    data, row = crops_of(where), "cac_crops: common rectangles"
    crop, (low, high) = data["crop"], data["iou_bound"]
    keys = ("hw", "pad", "xy1", "xy2", "ul1", "br1", "ul2", "br2")
    for size, padding, (x1, y1), (x2, y2), *corners in zip(*map(data.get, keys), strict=True):
        draw_of(monkeypatch, [y1, x1, y2, x2])
        one, two, *common = cac.overlapping_crops(*size, crop, low, high)
        assert one == (y1, x1, y1 + crop, x1 + crop) and two == (y2, x2, y2 + crop, x2 + crop)
        assert padding == [max(crop - side, 0) for side in size]
        same(row, torch.tensor(common), torch.tensor(corners).view(2, 4), double=0)


def statistics(pairs, commons, crop):
    """IoU of pairs of corners, and the common rectangles' share of a crop's cells."""
    ious = []
    for (top1, left1), (top2, left2) in pairs:
        area = max(crop - abs(top1 - top2), 0) * max(crop - abs(left1 - left2), 0)
        ious.append(area / (2 * crop**2 - area))
    cells = [(bottom - top) * (end - left) / crop**2 for top, left, bottom, end in commons]
    return fmean(ious), fmean(iou == 1 for iou in ious), fmean(cells), min(ious)


@pytest.mark.parametrize("where, error", [("voc", 0.02), ("city", 0.03)])
def test_crops_have_the_released_statistics(where, error, alike, monkeypatch):
    """Of the same sizes, 20 draws each; `error` is that of 200 or 60 released pairs."""
    data, drawn, randint, calls = crops_of(where), [], torch.randint, []
    monkeypatch.setattr(cac.torch, "randint", lambda *args: calls.append(1) or randint(*args))
    for size in 20 * data["hw"]:
        one, two, common, _ = cac.overlapping_crops(*size, data["crop"])
        drawn.append(((one[:2], two[:2]), common))
    ours = statistics(*zip(*drawn, strict=True), data["crop"])
    corners = zip(data["xy1"], data["xy2"], strict=True)
    pairs = [((y1, x1), (y2, x2)) for (x1, y1), (x2, y2) in corners]
    commons = [(*first, *last) for first, last in zip(data["ul1"], data["br1"], strict=True)]
    released = statistics(pairs, commons, data["crop"])
    alike("cac_crops: mean IoU", ours[0], released[0], 3 * error)
    alike("cac_crops: pairs that coincide", ours[1], released[1], 3 * error)
    alike("cac_crops: common cells, of a crop's", ours[2], released[2], 3 * error)
    assert min(ours[3], released[3]) >= 0.1
    # Two numbers for the first crop, and two each time that the second one is drawn.
    rejected, expected = len(calls) / len(drawn) / 2 - 2, fmean(data["tries"])
    alike("cac_crops: rejected draws of a pair", rejected, expected, 40 * error)


class Asked(Exception):
    """The size to which a picture was to be resized."""


@in_places
def test_pairs_are_scaled_as_released(where, alike, apart, monkeypatch):
    """The long side is drawn, from 0.8 to 2 times the base; the short one is rounded."""
    data = crops_of(where)
    base, theirs = data["base"], [max(size) for size in data["hw"]]

    def resize(image, size, **_):
        raise Asked(*size)

    monkeypatch.setattr(F, "interpolate", resize)

    def size_of(source):
        image = torch.empty(3, *source, device="meta")
        with pytest.raises(Asked) as asked:
            cac.pair_view(image, None, data["crop"], base, (0.8, 2.0), nn.Identity())
        return list(asked.value.args)

    ours = [max(size_of(source)) for source in 20 * data["src_hw"]]
    # The deviation of a uniform number is a twelfth of the range's square, under the root.
    within = 4 * 1.2 / (12 * len(theirs)) ** 0.5
    row = "cac_crops: mean long side, of the base"
    alike(row, fmean(ours) / base, fmean(theirs) / base, within)
    sizes = []
    for source, long in zip(data["src_hw"], theirs, strict=True):
        draw_of(monkeypatch, [long])
        sizes.append(size_of(source))
    sizes, released = torch.tensor(sizes), torch.tensor(data["hw"])
    assert set((released - sizes).flatten().tolist()) == {0, 1}
    assert (released != sizes).sum() == {"voc": 10, "city": 19}[where]
    why = "a half is rounded to an even number, in C up: 29 of 260 pictures"
    apart("cac_crops: a picture's short side, pixels", sizes, released, 1, why)


# --- mIoU ---


def test_miou(same, apart):
    """Eleven of 21 classes are in neither truth nor prediction."""
    data = arrays("miou")
    matrix = confusion_matrix(data["pred"], data["label"], data["num_classes"].item())
    same("miou: confusion matrix", matrix, data["cps_hist"], double=0)
    ours, released = iou(matrix), data["cps_iou"]
    assert torch.equal(ours.isnan(), released.isnan()) and ours.isnan().sum() == 11
    same("miou: IoU by class, CPS's", ours.nan_to_num(-1), released.nan_to_num(-1))
    same("miou: mIoU, CPS's", mean_iou(matrix), data["cps_miou"])
    same("miou: mIoU, CPS's", ours[1:].nanmean(), data["cps_miou_no_background"])
    hits = matrix.diagonal()
    union, accuracy = matrix.sum(0) + matrix.sum(1) - hits, hits.sum().double() / matrix.sum()
    for method in ("cps", "psmt", "cac"):
        same("miou: share of pixels that are right", accuracy, data[f"{method}_pixel_acc"])
    for method in ("psmt", "cac"):
        same("miou: intersections, PS-MT's and CAC's", hits, data[f"{method}_inter"], double=0)
        same("miou: unions, PS-MT's and CAC's", union, data[f"{method}_union"], double=0)
        zeros, released = ours.nan_to_num(0), data[f"{method}_miou"]
        same("miou: IoU by class, PS-MT's and CAC's, absent as 0", zeros, data[f"{method}_iou"])
        same("miou: mIoU, PS-MT's and CAC's, absent as 0", zeros.mean(), released)
        why = "absent classes do not count, as in CPS; there they count as 0: 11 of 21 here"
        apart("miou: mIoU, PS-MT's and CAC's", mean_iou(matrix), released, 0.19500, why)


# --- sliding windows ---


class Recorder(nn.Module):
    """Notes where windows lie, in a picture that tells row and column; logits are 1."""

    def __init__(self):
        super().__init__()
        self.windows = []

    def forward(self, images):
        corner = images[0, :, 0, 0].int().tolist()
        self.windows.append([*corner, *images.shape[2:]])
        return torch.ones_like(images[:, :1])


def slid(case):
    """What was released for a picture, the windows here, and how often each pixel is visited."""
    released, model = below(f"c{case}_", arrays("sliding")), Recorder()
    height, width = released["image_hw"].tolist()
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    picture = torch.stack(torch.broadcast_tensors(rows, columns))[None].float()
    crop = released["crop"].item()
    visits = torch.cat([*slide(model, picture, crop, math.ceil(crop * 2 / 3))], dim=-2)
    assert released.get("stride", math.ceil(crop * 2 / 3)) == math.ceil(crop * 2 / 3)
    return released, torch.tensor(model.windows), visits[0, 0]


@pytest.mark.parametrize("case", [0, 2, 4])
def test_windows_slide_as_released(case, same):
    """Cityscapes; a last window that is moved inward; a picture as large as the window."""
    released, windows, visits = slid(case)
    same("sliding: windows", windows, released["windows_y0x0hw"], double=0)
    ones = torch.ones(1, dtype=torch.int64)
    rows, columns = (released.get(f"{axis}_cover", ones) for axis in ("row", "col"))
    expected = (rows[:, None] * columns).expand_as(visits)
    same("sliding: windows over each pixel", visits.long(), expected, double=0)


@pytest.mark.parametrize("case, by", [(1, 137), (3, 100)])
def test_a_picture_smaller_than_the_window_is_not_padded(case, by, same, apart):
    """C pads the short side, both ends; without the padding its windows are the same."""
    released, windows, _ = slid(case)
    why = "a side shorter than a window is seen as it is; C pads it"
    row, expected = "sliding: windows of small pictures", released["windows_y0x0hw"]
    apart(f"{row}, pixels", windows, expected, by, why)
    above, _, before, _ = released["margin_tblr"]
    start = expected[:, :2] - torch.stack([above, before])
    end = torch.minimum(start + expected[:, 2:], released["image_hw"])
    start = start.clamp(min=0)
    same(f"{row}, less padding", windows, torch.cat([start, end - start], dim=1), double=0)
