"""Cross Pseudo Supervision (CPS).

Chen, Yuan, Zeng, Wang: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision,
CVPR 2021, arXiv 2106.01226.

Two networks of one architecture start from different random heads and see the same pictures. On
labelled pictures both learn the truth. On all pictures each learns the hard labels that the other
predicts at that moment, with no threshold on confidence. A label that only one network believes
is noise that differs from network to network and averages out; what both agree on is reinforced,
which pushes the class boundary to where few pixels lie. The first network alone is the result.

Where to find it
    Eqs. (1), (2)  P1, P2, the two networks' predictions      train
    Eq. (3)        L_s, both learn the truth                  supervised_loss
    Eq. (4)        L_cps, each learns the other's labels      cps_loss
    Eq. (5)        L = L_s + λ L_cps                          train
    Sec. 3, CutMix augmentation                               mix, common.augment.cutmix_masks
    Discussion: cross probability consistency                 cross_probability_loss
    Discussion: mean teacher; single network; PseudoSeg       --supervision, unsupervised_loss

Differences from the paper (P) and from the released code (C)
    1.  L_cps is one mean over the pixels of labelled and unlabelled pictures together, as in C;
        P adds the two means. The published λ belong to C's form: half of P's.
    2.  With CutMix, L_cps is taken on the mixed unlabelled pictures alone, as in C; P has the
        labelled term too. `--labeled-cps on` adds it.
    3.  CutMix mixes different pictures: the partner is the next one of the batch. C intends that,
        but its two samplers run in step, so that it mixes two views of one picture. As a picture
        and its partner are one batch, each network labels it once, where C makes two passes.
    4.  Padding of a crop carries no pseudo label. C lets it count: `--count-padding`. Void pixels
        of a labelled picture do get pseudo labels, as in C.
    5.  Pseudo labels are predicted with BatchNorm in training mode, which also moves its running
        statistics, as in C. `--pseudo-eval` predicts them in eval mode.
    6.  Both networks are stepped by one optimiser, equivalent to C's two. The learning rate and
        weight decay are those that C applies in effect: it divides every gradient by the number
        of GPUs twice, so that its 0.01 on 4 GPUs is 0.0025 and its decay of 1e-4 is 4e-4.
    7.  Means over pixels are per process; with several, gradients are averaged, as in C.
    8.  The ResNets are torchvision's, with a 7x7 stem; upsampling does not align corners; the
        head is DeepLabv3+'s own. C has a deep stem, aligned corners and an ASPP of its own.
    9.  A picture is cropped before it is resized, its flip comes last, and the crop's offset is
        uniform over the picture: C can draw one pixel too few.
    10. The last checkpoint is the result; C reports the best one on the validation set. Pictures
        are evaluated at their own size, Cityscapes in C's windows.
    11. `--ramp` raises λ linearly from 0 over a first share of the steps. Ours: networks that
        start from random weights teach each other noise at first. 0, as in P, with ImageNet's.
    12. With `--weights none` the backbones are drawn apart as well as the heads; with pretrained
        weights only the heads differ, as in P.
    13. Mean teacher: the teacher is updated after the step, C before it. Single network, cross
        probability and PseudoSeg are not in C, and P gives no weight for them: they use λ.

    python cps.py
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import PHOTOMETRY, cutmix_masks, train_view, whole_view
from common.data import VOID, check, load, training_loader, val_loader
from common.deeplab import DeepLabV3Plus
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import evaluate, iou
from common.optim import sgd_poly
from common.predict import panels
from common.run import InputError, Result, Run, RunConfig, main

Supervision = Literal["cps", "prob_l2", "prob_kl", "mean_teacher", "single", "pseudoseg"]


@dataclass
class Config(RunConfig):
    """CPS's own settings, here those of the embedded dataset; RECIPES has the others."""

    supervision: Supervision = "cps"  # beside the labels: CPS, or an alternative of the Discussion
    cutmix: bool = True  # teach on CutMix pictures; goes with cps, single and mean_teacher
    lam: float = 1.5  # λ of Eq. (5) without CutMix: 1.5 on VOC, 6 on Cityscapes
    lam_cutmix: float = 2.0  # λ with CutMix: 1 on VOC, 5 on Cityscapes
    lam_mt: float = 100.0  # mean teacher's weight without CutMix, on a mean over classes too
    ramp: float = 0.15  # share of the steps over which λ rises from 0; ours, for random weights
    labeled_cps: Literal["auto", "on", "off"] = "auto"  # L_cps on labelled: auto: unless CutMix
    count_padding: bool = False  # give padding pseudo labels too, as the released code does
    pseudo_eval: bool = False  # pseudo labels from eval mode; the released code's are from train
    ema_decay: float = 0.99  # of the mean teacher
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)  # of a training crop, one drawn for each
    ohem: bool = False  # L_s over the hard pixels only: on Cityscapes
    width: int = 64  # channels of ASPP and decoder: 256 in the paper
    eval_window: int = 0  # side of the sliding windows of evaluation, pixels; 0: whole pictures


# The released schedule makes batch x iterations the same for every labelled share: about 39,680
# steps of 8 + 8 pictures on VOC (60 epochs of all 10,582 at batch 16), 44,625 on Cityscapes (240
# of 2,975). Published lr 0.01 and 0.02 (paper: 0.04), weight decay 1e-4: see difference 6.
PAPER = dict(
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    lr=0.0025,
    weight_decay=4e-4,
    lam_cutmix=1.0,
    ramp=0.0,
    scales=(0.5, 0.75, 1.0, 1.5, 1.75, 2.0),
    width=256,
    workers=4,
)
RECIPES = {
    "shapes": {},
    "folder": PAPER
    | dict(dataset="folder", labeled="all", crop_size=320, iters=20_000, eval_every=2_000),
    "voc": PAPER
    | dict(dataset="voc", labeled="1/8", crop_size=512, iters=39_680, eval_every=1_984),
    "cityscapes": PAPER
    | dict(
        dataset="cityscapes",
        labeled="1/8",
        crop_size=800,
        iters=44_625,
        eval_every=2_975,
        weight_decay=8e-4,
        lam=6.0,
        lam_cutmix=5.0,
        ohem=True,
        eval_window=800,
    ),
}
CONF = 0.97  # CutMix-Seg weights the mean teacher with the share of pixels this confident


# --- the method (Sec. 3) ---


def supervised_loss(
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """L_s, Eq. (3): both networks learn the truth.

    logits1, logits2 (B, K, H, W), labels (B, H, W) with 255 void -> (). A sum over the networks,
    each a mean over the pixels that are not void.
    """
    return criterion(logits1, labels) + criterion(logits2, labels)


def cps_loss(
    logits1: Tensor,
    logits2: Tensor,
    pseudo1: Tensor | None = None,
    pseudo2: Tensor | None = None,
) -> Tensor:
    """L_cps, Eq. (4): each network learns the labels that the other one predicts.

    logits1, logits2 (B, K, H, W) -> (). pseudo1, pseudo2 (B, H, W): what networks 1 and 2 predict,
    255 where a pixel does not count; the argmax of the logits when None. One mean over all pixels
    given.
    """
    # argmax passes no gradient back: a pseudo label is a constant target, as in the paper.
    pseudo1 = logits1.argmax(dim=1) if pseudo1 is None else pseudo1  # (B, H, W)  Y1
    pseudo2 = logits2.argmax(dim=1) if pseudo2 is None else pseudo2  # (B, H, W)  Y2
    return cross_entropy(logits1, pseudo2) + cross_entropy(logits2, pseudo1)


def mix(tensor: Tensor, masks: Tensor) -> Tensor:
    """CutMix: inside the masks each picture of the batch gives way to the next one.

    tensor (B, ..., H, W): pictures, label maps or probabilities; masks (B, 1, H, W) bool.
    """
    masks = masks if tensor.ndim == 4 else masks[:, 0]
    return torch.where(masks, tensor.roll(1, 0), tensor)


# --- the alternatives of the paper's Discussion ---


def cross_probability_loss(
    logits1: Tensor, logits2: Tensor, kind: str = "l2", valid: Tensor | None = None
) -> Tensor:
    """Cross probability consistency: each network moves towards the other's probabilities.

    logits1, logits2 (B, K, H, W) -> (); kind l2: the squared distance, summed over classes; kl: the
    divergence KL(other || own). valid (B, H, W) bool leaves pixels out. In each of the two terms
    the other network's probabilities are constant: otherwise both terms were one, counted twice.
    """
    total = 0.0
    for own, other in ((logits1, logits2), (logits2, logits1)):
        if kind == "l2":
            distance = (own.softmax(dim=1) - other.softmax(dim=1).detach()).square()
        elif kind == "kl":
            target = other.log_softmax(dim=1).detach()
            distance = F.kl_div(own.log_softmax(dim=1), target, reduction="none", log_target=True)
        else:
            raise ValueError(f"kind must be l2 or kl, not {kind!r}")
        total = total + pixel_mean(distance.sum(dim=1), valid)
    return total


def mean_teacher_loss(
    logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, conf: float = 0.0
) -> Tensor:
    """Mean teacher: squared distance to the teacher's probabilities, summed over classes.

    logits, teacher_logits (B, K, H, W) -> (). valid (B, H, W) bool leaves pixels out. The loss is
    weighted with the share of pixels where the teacher is at least as confident as `conf`.
    """
    teacher_probs = teacher_logits.softmax(dim=1).detach()
    distance = (logits.softmax(dim=1) - teacher_probs).square().sum(dim=1)  # (B, H, W)
    confident = (teacher_probs.amax(dim=1) >= conf).float()
    return pixel_mean(confident, valid) * pixel_mean(distance, valid)


def pixel_mean(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of values (B, H, W) over the valid pixels, 0 when there are none."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student, parameters alone.

    The teacher's BatchNorm keeps its own running statistics, as in the released code.
    """
    for mean, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def unsupervised_loss(
    supervision: str, logits: list[Tensor], targets: list[Tensor], valid: Tensor, conf: float = 0.0
) -> Tensor:
    """The term beside L_s, by --supervision.

    logits: of each trained network, (B, K, H, W); targets: the logits that teach, of networks 1
    and 2, or of the one that teaches. valid (B, H, W) bool: pixels that count. conf: the mean
    teacher's threshold.
    """
    if supervision in ("prob_l2", "prob_kl"):
        return cross_probability_loss(*logits, supervision.removeprefix("prob_"), valid)
    if supervision == "mean_teacher":
        return mean_teacher_loss(logits[0], targets[0], valid, conf)
    pseudo = [target.argmax(dim=1).masked_fill(~valid, VOID) for target in targets]  # (B, H, W)
    if supervision == "cps":
        return cps_loss(*logits, *pseudo)
    return cross_entropy(logits[0], pseudo[0])  # single network, PseudoSeg


@torch.no_grad()
def predict(networks: list[nn.Module], images: Tensor, eval_mode: bool = False) -> list[Tensor]:
    """What the networks teach: logits (B, K, H, W) without a gradient.

    In training mode, as released, these passes move BatchNorm's running statistics too.
    """
    for network in networks:
        network.train(not eval_mode)
    logits = [network(images) for network in networks]
    for network in networks:
        network.train()
    return logits


# --- training (Sec. 4.1) ---


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is network 1, the one the paper evaluates."""
    if cfg.cutmix and cfg.supervision not in ("cps", "single", "mean_teacher"):
        raise InputError(f"--supervision {cfg.supervision}: has no CutMix form; add --no-cutmix")
    if cfg.ema_decay > 1:
        raise InputError(f"--ema-decay {cfg.ema_decay}: must be between 0 and 1")
    if 0 < cfg.eval_window < 32:
        raise InputError(f"--eval-window {cfg.eval_window}: must be 0, or 32 pixels and more")
    run = Run("cps", cfg)
    data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
    run.print(data.summary())
    check(data, run.rank, run.world)

    # Same architecture, same pretrained backbone; only the random heads differ. That difference
    # is the whole perturbation: with equal heads, Eq. (4) is each network taught by itself.
    twins = cfg.supervision in ("cps", "prob_l2", "prob_kl") and not cfg.supervised_only
    networks = [
        DeepLabV3Plus(len(data.classes), cfg.backbone, cfg.weights, cfg.width)
        for _ in range(1 + twins)
    ]
    mean_teacher = cfg.supervision == "mean_teacher" and not cfg.supervised_only
    teachers = [deepcopy(networks[0]).requires_grad_(False)] if mean_teacher else networks
    trained = [run.wrap(network) for network in networks]
    modules = nn.ModuleList(dict.fromkeys(networks + teachers)).to(run.device)
    optimizer, schedule = sgd_poly(networks, cfg.lr, cfg.weight_decay, cfg.iters)
    state = dict(networks=modules, optimizer=optimizer, schedule=schedule)
    run.start(networks[:1], data.classes, data.colors, state)

    strong = PHOTOMETRY if cfg.supervision == "pseudoseg" else None
    view = partial(train_view, crop=cfg.crop_size, scales=cfg.scales)
    labelled = iter(training_loader(data, "labeled", view, **run.drawing))
    view = partial(view, strong=strong)
    unlabelled = iter(training_loader(data, "unlabeled", view, **run.drawing))
    val = val_loader(data, whole_view, **run.loading)
    window = (cfg.eval_window, ceil(cfg.eval_window * 2 / 3)) if cfg.eval_window else None
    criterion = ohem_cross_entropy if cfg.ohem else cross_entropy
    lam = cfg.lam_cutmix if cfg.cutmix else cfg.lam
    if mean_teacher and not cfg.cutmix:
        lam = cfg.lam_mt / len(data.classes)
    teach_labeled = cfg.labeled_cps == "on" or (cfg.labeled_cps == "auto" and not cfg.cutmix)

    for step in run.loop():
        images_l, labels_l, valid_l = run.to_device(next(labelled))
        with run.autocast():
            logits_l = [network(images_l) for network in trained]  # (B, K, H, W)  Eqs. (1), (2)
            loss_sup = loss = sum(criterion(logits, labels_l) for logits in logits_l)  # Eq. (3)
            loss_cps = 0.0
            if not cfg.supervised_only:
                images_u, _, valid_u, *strong_u = run.to_device(next(unlabelled))
                targets_u = None
                if cfg.cutmix or mean_teacher or strong_u:
                    targets_u = predict(teachers, images_u, cfg.pseudo_eval)
                if cfg.cutmix:
                    masks = cutmix_masks(len(images_u), *images_u.shape[2:]).to(run.device)
                    images_u, valid_u = mix(images_u, masks), mix(valid_u, masks)
                    targets_u = [mix(target, masks) for target in targets_u]
                logits = [network(*strong_u or [images_u]) for network in trained]
                targets, valid = targets_u or logits, valid_u
                if teach_labeled:
                    targets_l = predict(teachers, images_l) if mean_teacher else logits_l
                    targets = [torch.cat(pair) for pair in zip(targets_l, targets, strict=True)]
                    logits = [torch.cat(pair) for pair in zip(logits_l, logits, strict=True)]
                    valid = torch.cat([valid_l, valid])
                if cfg.count_padding:
                    valid = torch.ones_like(valid)
                conf = CONF if cfg.cutmix else 0.0
                loss_cps = unsupervised_loss(
                    cfg.supervision, logits, targets, valid, conf
                )  # Eq. (4)
                ramp = min(1.0, (step + 1) / max(cfg.ramp * cfg.iters, 1))
                loss = loss_sup + ramp * lam * loss_cps  # Eq. (5)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if mean_teacher:
            ema_update(teachers[0], networks[0], cfg.ema_decay)
        run.log(step, loss_sup=loss_sup, loss_cps=loss_cps)
        if run.due(step):
            run.average_buffers(modules)
            with run.autocast():
                confusion = evaluate(networks[0], val, len(data.classes), run.device, window)
            run.record(step, iou(confusion))

    if run.rank == 0:
        panels(networks[0], data, run.folder / "panels.png", run.device)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
