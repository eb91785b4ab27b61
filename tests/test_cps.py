"""CPS's equations against per-pixel loops in float64, gradients, limits, and short runs."""

from functools import partial
from tempfile import mkdtemp

import pytest
import torch
from few_shapes import SEMI
from torch import nn

import cps
from common.augment import mix
from common.flags import InputError
from common.losses import ohem_cross_entropy
from common.run import Run

B, K, H, W = 2, 4, 3, 5
PIXELS = [(b, i, j) for b in range(B) for i in range(H) for j in range(W)]
EVERY = torch.ones(B, H, W, dtype=torch.bool)


def logits():
    return torch.randn(B, K, H, W, dtype=torch.float64, requires_grad=True)


def labels(void=0.2):
    return torch.randint(K, (B, H, W)).masked_fill(torch.rand(B, H, W) < void, 255)


def softmax(x, pixel):
    """The probabilities at a pixel, class by class."""
    b, i, j = pixel
    exps = [value.exp() for value in x[b, :, i, j]]
    return [e / sum(exps) for e in exps]


def ce_by_pixel(x, y):
    """Mean of -log softmax at the label, pixel by pixel, void left out."""
    terms = [-softmax(x, p)[y[p]].log() for p in PIXELS if y[p] != 255]
    return sum(terms) / len(terms)


def assert_same(ours, reference, inputs):
    """Equal values and equal gradients."""
    assert ours.shape == ()
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    ours, reference = (
        torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, reference)
    )
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


# --- Eq. (3) and Eq. (4) ---


def test_supervised_loss_is_eq_3_with_any_criterion():
    x1, x2, y = logits(), logits(), labels()
    assert_same(cps.supervised_loss(x1, x2, y), ce_by_pixel(x1, y) + ce_by_pixel(x2, y), [x1, x2])
    hard = partial(ohem_cross_entropy, threshold=0.5, min_kept=4)
    assert_same(cps.supervised_loss(x1, x2, y, hard), hard(x1, y) + hard(x2, y), [x1, x2])


def test_cps_loss_is_eq_4():
    """With given pseudo labels it leaves padding out; pseudo1, network 1's, teaches network 2."""
    x1, x2, y1, y2 = logits(), logits(), labels(), labels()
    reference = ce_by_pixel(x1, x2.argmax(1)) + ce_by_pixel(x2, x1.argmax(1))
    assert_same(cps.cps_loss(x1, x2), reference, [x1, x2])
    reference = ce_by_pixel(x1, y2) + ce_by_pixel(x2, y1)
    assert_same(cps.cps_loss(x1, x2, pseudo1=y1, pseudo2=y2), reference, [x1, x2])


def test_no_gradient_reaches_the_network_that_teaches():
    """Network 1's gradient of the whole loss is softmax - onehot(Y2) over the pixels, no more."""
    x1, x2 = logits(), logits()
    grad = torch.autograd.grad(cps.cps_loss(x1, x2), x1)[0]
    onehot = nn.functional.one_hot(x2.argmax(1), K).permute(0, 3, 1, 2)
    torch.testing.assert_close(grad, (x1.softmax(1) - onehot) / len(PIXELS))


def test_equal_networks_sharpen_themselves():
    x = logits()
    torch.testing.assert_close(cps.cps_loss(x, x), -2 * x.softmax(1).amax(1).log().mean())


def test_one_mean_over_both_sets_is_half_the_sum_of_two():
    labelled, unlabelled = [logits(), logits()], [logits(), logits()]
    joint = cps.cps_loss(*cps.join(labelled, unlabelled))
    torch.testing.assert_close(joint, (cps.cps_loss(*labelled) + cps.cps_loss(*unlabelled)) / 2)


def test_all_void_costs_nothing_and_pulls_nowhere():
    x1, x2, void = logits(), logits(), labels(void=2)
    for loss in (cps.cps_loss(x1, x2, void, void), cps.supervised_loss(x1, x2, void)):
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [x1, x2]))


def test_cutmix_loss_with_an_empty_or_full_mask_is_cps_on_the_pictures():
    """In training mode too, for the batch that BatchNorm sees is the same."""
    nets = [nn.Sequential(nn.Conv2d(3, K, 1), nn.BatchNorm2d(K)).double() for _ in range(2)]
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for full, source in ((False, images), (True, images.roll(1, 0))):
        masks = torch.full((3, 1, 8, 8), full)
        pseudo = [mix(p, masks).argmax(1) for p in cps.predict(nets, images)]
        ours = cps.cps_loss(*(net(mix(images, masks)) for net in nets), *pseudo)
        torch.testing.assert_close(ours, cps.cps_loss(*(net(source) for net in nets)))


def test_predictions_that_teach_have_no_gradient_and_move_the_statistics():
    net = nn.Sequential(nn.Conv2d(3, K, 1), nn.BatchNorm2d(K))
    (out,) = cps.predict([net], torch.randn(2, 3, 8, 8))
    assert not out.requires_grad and net[1].num_batches_tracked == 1


# --- the alternatives ---


def probability_by_pixel(x1, x2, kind, valid):
    """Per pixel, the other network's probabilities held constant."""
    total = 0.0
    for pixel in PIXELS:
        p, q = softmax(x1, pixel), softmax(x2, pixel)
        for own, other in ((p, q), (q, p)) if valid[pixel] else ():
            for a, c in zip(own, other, strict=True):
                c = c.detach()
                total = total + ((a - c) ** 2 if kind == "l2" else c * (c / a).log())
    return total / valid.sum()


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_cross_probability_loss(kind):
    x1, x2, some = logits(), logits(), torch.rand(B, H, W) < 0.5
    ours = cps.cross_probability_loss(x1, x2, kind)
    assert_same(ours, probability_by_pixel(x1, x2, kind, EVERY), [x1, x2])
    ours = cps.cross_probability_loss(x1, x2, kind, some)
    assert_same(ours, probability_by_pixel(x1, x2, kind, some), [x1, x2])
    assert cps.cross_probability_loss(x1, x1, kind).item() == pytest.approx(0, abs=1e-12)
    assert cps.cross_probability_loss(x1, x2, kind, ~EVERY).item() == 0


def test_cross_probability_loss_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="l2 or kl"):
        cps.cross_probability_loss(logits(), logits(), "l1")


def test_mean_teacher_loss():
    x, teacher, valid = logits(), logits(), torch.rand(B, H, W) < 0.6
    total, confident, count = 0.0, 0, int(valid.sum())
    for pixel in PIXELS:
        if valid[pixel]:
            p, t = softmax(x, pixel), [value.detach() for value in softmax(teacher, pixel)]
            total = total + sum((a - c) ** 2 for a, c in zip(p, t, strict=True))
            confident += max(t) >= 0.5
    assert 0 < confident < count
    ours = cps.mean_teacher_loss(x, teacher, valid, conf=0.5)
    assert_same(ours, confident / count * total / count, [x])
    ours = cps.mean_teacher_loss(x, teacher, valid)
    torch.testing.assert_close(ours, total / count)
    assert torch.autograd.grad(ours, teacher, allow_unused=True)[0] is None
    assert cps.mean_teacher_loss(x, x.detach()).item() == 0


def test_each_alternative_has_its_loss():
    x1, x2, t, valid = logits(), logits(), logits() * 3, torch.rand(B, H, W) < 0.6
    for kind in ("l2", "kl"):
        ours = cps.discussion_loss(f"prob_{kind}", [x1, x2], [x1, x2], valid, False)
        assert_same(ours, probability_by_pixel(x1, x2, kind, valid), [x1, x2])
    for cutmix, conf in ((False, 0.0), (True, 0.97)):
        ours = cps.discussion_loss("mean_teacher", [x1], [t], valid, cutmix)
        assert_same(ours, cps.mean_teacher_loss(x1, t, valid, conf), [x1])
    taught = ce_by_pixel(x1, t.argmax(1).masked_fill(~valid, 255))
    for kind in ("single", "pseudoseg"):
        assert_same(cps.discussion_loss(kind, [x1], [t], valid, False), taught, [x1])


def test_each_alternative_has_its_weight():
    for kind, plain, mixed in (("cps", 1.5, 1), ("single", 1.5, 1), ("mean_teacher", 100, 1)):
        for cutmix, expected in ((False, plain), (True, mixed)):
            for dataset in ("voc", "coco", "folder"):
                assert cps.recipe(dataset, supervision=kind, cutmix=cutmix).lam == expected
            assert cps.recipe("voc", supervision=kind, cutmix=cutmix, lam=3.0).lam == 3


def test_alternatives_without_a_cutmix_form_are_refused():
    for kind in ("prob_l2", "prob_kl", "pseudoseg"):
        with pytest.raises(InputError, match=f"--supervision {kind}: .* add --no-cutmix"):
            cps.check_flags(cps.Config(supervision=kind))
        cps.check_flags(cps.Config(supervision=kind, cutmix=False))
        cps.check_flags(cps.Config(supervision=kind, supervised_only=True))


def test_ema_follows_its_law_and_leaves_buffers_alone():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(teacher.weight, 5.0)
    nn.init.constant_(student.weight, 2.0)
    student.running_mean += 1
    for _ in range(7):
        cps.ema_update(teacher, student, 0.99)
    expected = 0.99**7 * 5 + (1 - 0.99**7) * 2
    torch.testing.assert_close(teacher.weight, torch.full((3,), expected))
    assert (teacher.running_mean == 0).all()


# --- whole runs ---


@pytest.fixture
def model(few, light, tmp_path):
    """model(**flags): the network that two steps on few pictures make."""

    def run(folder=None, **flags):
        folder = str(folder or mkdtemp(dir=tmp_path))
        return cps.train(cps.Config(output_dir=folder, **SEMI | flags)).model

    return run


def test_padding_and_precision_change_the_result(model):
    small = dict(scales=(0.25,))
    for first, second in ((small, small | dict(count_padding=True)), ({}, dict(amp="bf16"))):
        weights = [model(**flags).classifier.weight for flags in (first, second)]
        assert not torch.equal(*weights), second


def test_lambda_0_trains_the_networks_on_the_labels_alone(model):
    """Network 1's parameters are then the baseline's; its statistics saw unlabelled pictures."""
    zero, sup = model(lam=0.0, cutmix=False), model(supervised_only=True)
    for (name, a), b in zip(zero.named_parameters(), sup.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not torch.equal(zero.backbone.bn1.running_mean, sup.backbone.bn1.running_mean)


def test_statistics_move_twice_a_step_and_three_times_with_cutmix(model):
    """Labelled and unlabelled pictures, and with CutMix the pass that labels them."""
    for cutmix, passes in ((False, 2), (True, 3)):
        assert model(cutmix=cutmix).backbone.bn1.num_batches_tracked == passes * 2


def test_lambda_rises_over_its_share_of_the_steps(model, tmp_path, power_cut):
    """After the first of two steps, half of λ has taught. The networks started apart."""
    saved = []
    for ramp, lam in ((1.0, 2.0), (0.0, 1.0), (0.0, 2.0)):
        folder = tmp_path / f"{ramp} {lam}"
        power_cut(1, partial(model, folder, eval_every=1, ramp=ramp, lam=lam))
        saved.append(torch.load(folder / "last.pt", weights_only=True)["state"]["networks"])
    rising, low, high = ([s[f"{k}.classifier.weight"] for k in range(2)] for s in saved)
    assert torch.equal(rising[0], low[0]) and not torch.equal(low[0], high[0])
    assert not torch.allclose(*rising, atol=1e-2)


def test_a_steps_gradient_is_the_mean_over_its_batches(few, light, tmp_path, monkeypatch):
    """With --accum 3: of the supervised loss of each batch."""
    build, update, weights, grads = cps.sgd_poly, torch.optim.SGD.step, [], []

    def note_weights(networks, *args):
        weights.extend(p for network in networks for p in network.parameters())
        return build(networks, *args)

    def criterion(logits, labels):
        loss = cps.cross_entropy(logits, labels)
        grads.append(torch.autograd.grad(loss, weights, retain_graph=True))
        return loss

    def compare(optimizer, *args):
        for weight, *parts in zip(weights, *grads, strict=True):
            torch.testing.assert_close(weight.grad, sum(parts) / 3, rtol=1e-4, atol=1e-6)
        assert len(grads) == 3
        grads.clear()
        return update(optimizer, *args)

    monkeypatch.setattr(cps, "sgd_poly", note_weights)
    monkeypatch.setattr(cps, "supervised_criterion", lambda *_: criterion)
    monkeypatch.setattr(torch.optim.SGD, "step", compare)
    cps.train(cps.Config(accum=3, supervised_only=True, output_dir=str(tmp_path), **SEMI))
    assert weights and not grads


@pytest.mark.parametrize("kind", ["cps", "single"])
def test_panels_mark_where_two_networks_disagree(kind, few, light, tmp_path, monkeypatch):
    """Both predict as in evaluation; what is drawn moves no statistics."""
    drawn, starts, begin = [], [], Run.start

    def note_start(run, data, model, **state):
        starts.extend(state["networks"])
        begin(run, data, model, **state)

    def note(*_, show, **how):
        images = torch.randn(1, 3, 64, 64)
        assert not any(module.training for network in starts for module in network.modules())
        labels = [network(images).argmax(dim=1) for network in starts]
        drawn.append(show and (show(images), labels))

    monkeypatch.setattr(Run, "start", note_start)
    monkeypatch.setattr("common.run.panels", note)
    cps.train(cps.Config(supervision=kind, output_dir=str(tmp_path), **SEMI))
    (found,) = drawn
    if kind == "single":
        assert found is None
        return
    (marks,), (labels1, labels2) = found[0].values(), found[1]
    assert torch.equal(marks, labels1 != labels2) and marks.any()
