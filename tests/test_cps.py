"""CPS's equations against per-pixel loops in float64, gradients, limits, and short runs."""

import math
from functools import partial

import pytest
import torch
import trees
from torch import nn

import cps
from common.augment import cutmix_masks
from common.losses import cross_entropy, ohem_cross_entropy
from common.run import InputError

B, K, H, W = 2, 4, 3, 5


def logits(*shape):
    return torch.randn(shape or (B, K, H, W), dtype=torch.float64, requires_grad=True)


def labels(void=0.2):
    y = torch.randint(K, (B, H, W))
    return torch.where(torch.rand(B, H, W) < void, 255, y)


def softmax(column):
    top = max(float(v.detach()) for v in column)
    exps = [torch.exp(v - top) for v in column]
    return [e / sum(exps) for e in exps]


def ce_by_pixel(x, y):
    """Mean of -log softmax at the label, pixel by pixel, void left out."""
    terms = []
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                if y[b, i, j] != 255:
                    terms.append(-torch.log(softmax(list(x[b, :, i, j]))[int(y[b, i, j])]))
    return sum(terms) / len(terms)


def assert_same(ours, reference, inputs):
    """Equal values and equal gradients."""
    assert ours.shape == ()
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True),
        torch.autograd.grad(reference, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- Eq. (3) and Eq. (4) ---


def test_supervised_loss_is_eq_3():
    x1, x2, y = logits(), logits(), labels()
    assert_same(cps.supervised_loss(x1, x2, y), ce_by_pixel(x1, y) + ce_by_pixel(x2, y), [x1, x2])


def test_supervised_loss_takes_a_criterion():
    x1, x2, y = logits(), logits(), labels()
    ours = cps.supervised_loss(x1, x2, y, lambda x, y: ohem_cross_entropy(x, y, 0.5, 4))
    expected = ohem_cross_entropy(x1, y, 0.5, 4) + ohem_cross_entropy(x2, y, 0.5, 4)
    torch.testing.assert_close(ours, expected)


def test_cps_loss_is_eq_4():
    x1, x2 = logits(), logits()
    reference = ce_by_pixel(x1, x2.argmax(1)) + ce_by_pixel(x2, x1.argmax(1))
    assert_same(cps.cps_loss(x1, x2), reference, [x1, x2])


def test_cps_loss_with_given_pseudo_labels_leaves_padding_out():
    x1, x2, y1, y2 = logits(), logits(), labels(), labels()
    # pseudo1 is what network 1 predicts: it teaches network 2.
    assert_same(
        cps.cps_loss(x1, x2, pseudo1=y1, pseudo2=y2),
        ce_by_pixel(x1, y2) + ce_by_pixel(x2, y1),
        [x1, x2],
    )


def test_no_gradient_reaches_the_network_that_teaches():
    x1, x2 = logits(), logits()
    one_way = cross_entropy(x1, x2.argmax(1))
    assert torch.autograd.grad(one_way, x2, allow_unused=True)[0] is None
    # The whole loss: network 1's gradient is softmax - onehot(Y2) over the pixels, no more.
    grad = torch.autograd.grad(cps.cps_loss(x1, x2), x1)[0]
    onehot = nn.functional.one_hot(x2.argmax(1), K).permute(0, 3, 1, 2)
    torch.testing.assert_close(grad, (x1.softmax(1) - onehot) / (B * H * W))


def test_swapping_the_networks_changes_nothing():
    x1, x2, y1, y2 = logits(), logits(), labels(), labels()
    torch.testing.assert_close(cps.cps_loss(x1, x2), cps.cps_loss(x2, x1))
    torch.testing.assert_close(cps.cps_loss(x1, x2, y1, y2), cps.cps_loss(x2, x1, y2, y1))


def test_equal_networks_sharpen_themselves():
    x = logits()
    expected = -2 * x.softmax(1).amax(1).log().mean()
    torch.testing.assert_close(cps.cps_loss(x, x), expected)


def test_constant_logits_cost_2_ln_k():
    for classes, value in ((21, 6.0890), (19, 5.8889)):
        x = torch.zeros(1, classes, 2, 2, dtype=torch.float64)
        assert cps.cps_loss(x, x).item() == pytest.approx(value, abs=1e-4)


def test_one_mean_over_both_sets_is_half_the_sum_of_two():
    l1, l2, u1, u2 = logits(), logits(), logits(), logits()
    joint = cps.cps_loss(torch.cat([l1, u1]), torch.cat([l2, u2]))
    torch.testing.assert_close(joint, (cps.cps_loss(l1, l2) + cps.cps_loss(u1, u2)) / 2)


def test_all_void_costs_nothing_and_pulls_nowhere():
    x1, x2 = logits(), logits()
    void = torch.full((B, H, W), 255)
    for loss in (cps.cps_loss(x1, x2, void, void), cps.supervised_loss(x1, x2, void)):
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [x1, x2]))


# --- CutMix ---


def test_mix_takes_the_partner_inside_the_mask():
    images = torch.randn(3, 3, 4, 4)
    masks = torch.rand(3, 1, 4, 4) < 0.5
    mixed = cps.mix(images, masks)
    for b in range(3):
        for i in range(4):
            for j in range(4):
                source = (b - 1) % 3 if masks[b, 0, i, j] else b
                assert torch.equal(mixed[b, :, i, j], images[source, :, i, j])


def test_mix_empty_and_full_masks():
    images = torch.randn(3, 3, 4, 4)
    empty = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(cps.mix(images, empty), images)
    assert torch.equal(cps.mix(images, ~empty), images.roll(1, 0))


def test_mixing_logits_is_mixing_label_maps():
    x, masks = torch.randn(4, K, 8, 8), cutmix_masks(4, 8, 8)
    assert torch.equal(cps.mix(x, masks).argmax(1), cps.mix(x.argmax(1), masks))


def test_pictures_and_labels_mix_alike():
    """A picture whose colour is its label stays so."""
    label = torch.randint(K, (4, 16, 16))
    picture = label[:, None].float().expand(-1, 3, -1, -1)
    masks = cutmix_masks(4, 16, 16)
    assert torch.equal(cps.mix(picture, masks)[:, 0].long(), cps.mix(label, masks))


def test_cutmix_loss_with_an_empty_mask_is_cps_on_the_pictures():
    """In training mode too, for the batch that BatchNorm sees is the same."""
    net1, net2 = (nn.Sequential(nn.Conv2d(3, K, 1), nn.BatchNorm2d(K)).double() for _ in range(2))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for masks, source in ((False, images), (True, images.roll(1, 0))):
        masks = torch.full((3, 1, 8, 8), masks)
        pseudo = [cps.mix(p, masks).argmax(1) for p in cps.predict([net1, net2], images)]
        mixed = cps.mix(images, masks)
        ours = cps.cps_loss(net1(mixed), net2(mixed), *pseudo)
        torch.testing.assert_close(ours, cps.cps_loss(net1(source), net2(source)))


def test_predict_gives_no_gradient_and_moves_statistics_only_in_training_mode():
    net = nn.Sequential(nn.Conv2d(3, K, 1), nn.BatchNorm2d(K))
    (out,) = cps.predict([net], torch.randn(2, 3, 8, 8))
    assert not out.requires_grad and net[1].num_batches_tracked == 1
    before = net[1].running_mean.clone()
    cps.predict([net], torch.randn(2, 3, 8, 8), eval_mode=True)
    assert torch.equal(net[1].running_mean, before) and net[1].num_batches_tracked == 1
    assert all(module.training for module in net.modules())


# --- the alternatives ---


def reference_probability(x1, x2, kind, valid):
    """Per pixel, the other network's probabilities held constant."""
    total, count = 0.0, 0
    for b in range(B):
        for i in range(H):
            for j in range(W):
                if not valid[b, i, j]:
                    continue
                count += 1
                p, q = softmax(list(x1[b, :, i, j])), softmax(list(x2[b, :, i, j]))
                for own, other in ((p, q), (q, p)):
                    for a, c in zip(own, other, strict=True):
                        c = c.detach()
                        total = total + ((a - c) ** 2 if kind == "l2" else c * (c / a).log())
    return total / count


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_cross_probability_loss(kind):
    x1, x2 = logits(), logits()
    every = torch.ones(B, H, W, dtype=torch.bool)
    some = torch.rand(B, H, W) < 0.5
    ours = cps.cross_probability_loss(x1, x2, kind)
    assert_same(ours, reference_probability(x1, x2, kind, every), [x1, x2])
    ours = cps.cross_probability_loss(x1, x2, kind, some)
    assert_same(ours, reference_probability(x1, x2, kind, some), [x1, x2])
    assert cps.cross_probability_loss(x1, x1, kind).item() == pytest.approx(0, abs=1e-12)
    assert cps.cross_probability_loss(x1, x2, kind, some & False).item() == 0


def test_two_stopped_terms_pull_as_one_that_is_not():
    x1, x2 = logits(), logits()
    ours = torch.autograd.grad(cps.cross_probability_loss(x1, x2), x1)[0]
    once = (x1.softmax(1) - x2.softmax(1)).square().sum(1).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(once, x1)[0])


def test_cross_probability_loss_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="l2 or kl"):
        cps.cross_probability_loss(logits(), logits(), "l1")


def test_mean_teacher_loss():
    x, teacher = logits(), logits()
    valid = torch.rand(B, H, W) < 0.6
    total, confident = 0.0, 0
    for b in range(B):
        for i in range(H):
            for j in range(W):
                if valid[b, i, j]:
                    p = softmax(list(x[b, :, i, j]))
                    t = [v.detach() for v in softmax(list(teacher[b, :, i, j]))]
                    total = total + sum((a - c) ** 2 for a, c in zip(p, t, strict=True))
                    confident += max(t) >= 0.5
    count = int(valid.sum())
    assert 0 < confident < count
    reference = confident / count * total / count
    assert_same(cps.mean_teacher_loss(x, teacher, valid, conf=0.5), reference, [x])
    ours = cps.mean_teacher_loss(x, teacher, valid)
    torch.testing.assert_close(ours, total / count)
    assert torch.autograd.grad(ours, teacher, allow_unused=True)[0] is None
    assert cps.mean_teacher_loss(x, x.detach()).item() == 0


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

TINY = dict(batch_size=2, crop_size=32, width=8, iters=2, eval_every=2, labeled="4")


@pytest.fixture
def few(monkeypatch):
    """The embedded dataset with few pictures."""
    from common import shapes

    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 3})


RUNS = [
    dict(),
    dict(cutmix=False),
    dict(labeled_cps="on"),
    dict(cutmix=False, labeled_cps="off", ohem=True, eval_window=48),
    dict(pseudo_eval=True, count_padding=True, scales=(0.5,)),
    dict(supervised_only=True),
    dict(amp="bf16"),
    dict(supervision="prob_l2", cutmix=False),
    dict(supervision="prob_kl", cutmix=False),
    dict(supervision="mean_teacher"),
    dict(supervision="mean_teacher", cutmix=False),
    dict(supervision="single"),
    dict(supervision="single", cutmix=False, pseudo_eval=True),
    dict(supervision="pseudoseg", cutmix=False),
]


@pytest.mark.parametrize("flags", RUNS, ids=lambda flags: "-".join(map(str, flags.values())) or "-")
def test_train_runs_and_moves_the_weights(flags, few, tmp_path):
    torch.manual_seed(0)
    start = cps.DeepLabV3Plus(7, "resnet18", None, 8).state_dict()
    result = cps.train(cps.Config(output_dir=str(tmp_path / "run"), **{**TINY, **flags}))
    assert math.isfinite(result.miou) and [e["step"] for e in result.history] == [2]
    moved = [k for k, v in result.model.state_dict().items() if not torch.equal(v, start[k])]
    assert set(moved) == set(start)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "panels.png", "iou.txt"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(supervision="prob_l2"), "--no-cutmix"),
        (dict(supervision="prob_kl"), "--no-cutmix"),
        (dict(supervision="pseudoseg"), "--no-cutmix"),
        (dict(supervision="prob_l2", cutmix=False, pseudo_eval=True), "--pseudo-eval"),
        (dict(supervision="pseudoseg", cutmix=False, labeled_cps="on"), "--labeled-cps"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said, tmp_path):
    with pytest.raises(InputError, match=said):
        cps.train(cps.Config(output_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_choices_of_pseudo_labels_change_the_result(few, tmp_path):
    """Eval mode with and without CutMix, padding that counts, the labelled term."""
    for name, flags in dict(
        mixed=(dict(), dict(pseudo_eval=True)),
        plain=(dict(cutmix=False), dict(cutmix=False, pseudo_eval=True)),
        padded=(dict(scales=(0.25,)), dict(scales=(0.25,), count_padding=True)),
        labelled=(dict(), dict(labeled_cps="on")),
        precision=(dict(), dict(amp="bf16")),
    ).items():
        weights = []
        for index, changed in enumerate(flags):
            folder = str(tmp_path / f"{name}{index}")
            config = cps.Config(output_dir=folder, **{**TINY, "ramp": 0.0, **changed})
            weights.append(cps.train(config).model.classifier.weight)
        assert not torch.equal(*weights), name


def test_lambda_0_trains_the_networks_on_the_labels_alone(few, tmp_path):
    """Network 1's parameters are then the baseline's; its statistics saw unlabelled pictures."""
    runs = {}
    for name, flags in dict(
        zero=dict(lam=0.0, cutmix=False), sup=dict(supervised_only=True)
    ).items():
        config = cps.Config(output_dir=str(tmp_path / name), **TINY, **flags)
        runs[name] = cps.train(config).model
    for (name, a), b in zip(runs["zero"].named_parameters(), runs["sup"].parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    stem = [runs[name].backbone.bn1.running_mean for name in ("zero", "sup")]
    assert not torch.equal(*stem)


def test_statistics_move_twice_a_step_and_three_times_with_cutmix(few, tmp_path):
    """Labelled and unlabelled pictures, and with CutMix the pass that labels them."""
    for cutmix, passes in ((False, 2), (True, 3)):
        config = cps.Config(output_dir=str(tmp_path / str(cutmix)), **TINY, cutmix=cutmix)
        model = cps.train(config).model
        assert model.backbone.bn1.num_batches_tracked == passes * TINY["iters"]


def test_the_two_networks_start_apart(few, tmp_path):
    cps.train(cps.Config(output_dir=str(tmp_path / "run"), **TINY))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["networks"]
    assert not torch.allclose(state["0.classifier.weight"], state["1.classifier.weight"], atol=1e-2)


@pytest.mark.parametrize("dataset", ["folder", "voc", "cityscapes"])
def test_recipes_train_on_tiny_trees(dataset, tmp_path):
    """Two steps of each real layout's recipe, with loader processes, at a size for tests."""
    trees_by_name = dict(
        folder=trees.folder_tree,
        voc=partial(trees.voc_tree, aug=True),
        cityscapes=trees.cityscapes_tree,
    )
    root = trees_by_name[dataset](tmp_path / "data")
    small = {**TINY, "backbone": "resnet18", "weights": "none", "labeled": "1/2", "workers": 1}
    window = {"eval_window": 32} if dataset == "cityscapes" else {}
    flags = cps.RECIPES[dataset] | small | window
    config = cps.Config(data_path=str(root), output_dir=str(tmp_path / "run"), **flags)
    result = cps.train(config)
    classes = dict(folder=3, voc=21, cityscapes=19)[dataset]
    assert math.isfinite(result.miou) and len(result.history[-1]["iou"]) == classes


def test_recipes_are_the_papers():
    voc = cps.Config(**cps.RECIPES["voc"])
    city = cps.Config(**cps.RECIPES["cityscapes"])
    assert (voc.lam, voc.lam_cutmix, voc.crop_size, voc.iters) == (1.5, 1.0, 512, 39_680)
    assert (city.lam, city.lam_cutmix, city.crop_size, city.iters) == (6.0, 5.0, 800, 44_625)
    assert (voc.lr, voc.weight_decay, city.lr, city.weight_decay) == (0.0025, 4e-4, 0.0025, 8e-4)
    assert city.ohem and not voc.ohem and voc.ramp == city.ramp == 0.0
    assert voc.backbone == "resnet50" and voc.weights == "IMAGENET1K_V1"
