"""Cross Pseudo Supervision (CPS).

Chen, Yuan, Zeng, Wang: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision,
CVPR 2021, arXiv 2106.01226.

Two networks of one architecture start from different random heads and see the same pictures. On
labelled pictures both learn the truth. On all pictures each also learns the hard labels that the
other predicts at that moment, with no threshold on confidence. A network taught by its own labels
only grows surer of its errors; the other's errors differ, for it started elsewhere. So the two
predictions are drawn together while unlabelled pictures become training data, and in the end the
first network alone is the result.

Where to find it
    Eqs. (1), (2)  P1, P2, the networks' predictions            train; the losses hold the softmax
    Eq. (3)        L_s, both learn the truth                    supervised_loss
    Eq. (4)        L_cps^u, each learns the other's labels      cps_loss; L_cps^l has its form
    Eq. (5)        L = L_s + λ L_cps, L_cps = L_cps^l + L_cps^u train
    CutMix         pseudo labels of two pictures, mixed         mix, common.augment.cutmix_masks
    Discussions    cross probability consistency                cross_probability_loss
                   mean teacher                                 mean_teacher_loss, ema_update
                   single network, PseudoSeg                    discussion_loss

Differences from the paper (P) and from the released code (C)
    1.  L_cps is one mean over the pixels of labelled and unlabelled pictures together, as in C.
        That is half of P's sum; the published λ belong to C's form.
    2.  With CutMix, L_cps is taken on the mixed unlabelled pictures alone, as in C; P has the
        labelled term too. `--labeled-cps on` adds it.
    3.  CutMix mixes different pictures: a picture's partner is the one before it in the batch. C
        intends that, but its two samplers run in step, so that it mixes two views of one picture,
        and its loader processes repeat one sequence of masks. As all partners are in the batch,
        each network labels it once, where C makes two passes.
    4.  Padding of a crop carries no pseudo label; C lets it count: `--count-padding`. Void pixels
        of a labelled picture do get pseudo labels, as in C.
    5.  Pseudo labels come from BatchNorm in training mode, which also moves its running
        statistics, as in C. `--pseudo-eval` predicts them in eval mode.
    6.  Learning rate and weight decay are those that C applies in effect: by our reading it divides
        every gradient by the number of GPUs once too often, so that its 0.01 on 4 GPUs acts as
        0.0025 and its decay of 1e-4 as 4e-4. P prints a decay of 5e-4, which its authors call a
        typo, and a rate of 0.04 for Cityscapes. One optimiser steps both networks.
    7.  Means over pixels are per process, as in C; so is OHEM's threshold, here over the batch,
        in C over its one picture, with 50,000 pixels kept for each. CutMix partners and masks
        depend on the number of processes, the pictures do not. A process has two pictures or more.
    8.  The ResNets are torchvision's, with a 7x7 stem, and ASPP is DeepLabv3+'s; C has a deep stem
        and an ASPP of its own. Upsampling does not align corners, C's does.
    9.  A picture is cropped before it is resized and flipped last; C can draw crops a pixel short.
    10. The last checkpoint is the result; C reports the best one on the validation set. Pictures
        are evaluated at their own size, where C pads VOC's to 512 x 512; Cityscapes in C's windows.
    11. Labelled pictures are every r-th of the sorted ids; C's VOC lists are the same, its
        Cityscapes lists follow another order. P says that it draws at random.
    12. Iterations are the same for every share of labels; C rounds its epochs to within 1 % of it.
    13. bf16 autocast on GPUs; C is in float32. A batch without a valid pixel costs 0; in C, NaN.
    14. `--ramp` lets λ rise from 0 over a first share of the steps. Ours, for networks that start
        at random and teach each other noise at first; 0, as in P, with pretrained ones.
    15. With `--weights none` the backbones are drawn apart too; otherwise only the heads, as in P.
    16. The mean teacher sees the student's view, as in C, where P draws two views; it is updated
        after the step, in C before it. With CutMix it is CutMix-Seg (French et al., BMVC 2020),
        whose λ is 1. The other alternatives are not in C, and we found no weight for them in P:
        they use λ. PseudoSeg is P's Fig. 1(d): a weak view labels a strong one of one network.

    python cps.py    # 53.6 mIoU, mean of three seeds (supervised 44.3); 6 minutes on two CPU cores
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

from common.augment import cutmix_masks, photometry, train_view, whole_view
from common.data import VOID, check, load, training_loader, val_loader
from common.deeplab import DeepLabV3Plus
from common.flags import SemiConfig
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import evaluate, iou
from common.optim import sgd_poly
from common.predict import panels
from common.run import InputError, Result, Run, main

Supervision = Literal["cps", "prob_l2", "prob_kl", "mean_teacher", "single", "pseudoseg"]


@dataclass
class Config(SemiConfig):
    """CPS's own settings, here those of the embedded dataset; RECIPES has the others."""

    supervision: Supervision = "cps"  # beside the labels: CPS, or an alternative of the Discussions
    cutmix: bool = True  # teach on CutMix pictures; goes with cps, single and mean_teacher
    lam: float = 1.5  # λ of Eq. (5) without CutMix: 1.5 on VOC, 6 on Cityscapes
    lam_cutmix: float = 2.0  # λ with CutMix: 1 on VOC, 5 on Cityscapes; 2 here is ours
    lam_mt: float = 100.0  # mean teacher's λ without CutMix, on a mean over pixels and classes
    ramp: float = 0.15  # share of the steps over which λ rises from 0; ours, for random weights
    labeled_cps: Literal["auto", "on", "off"] = "auto"  # L_cps^l too; auto: on without CutMix
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
CONFIDENT = 0.97  # CutMix-Seg weights its loss with the share of pixels this confident


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
    """CutMix: inside the masks a picture gives way to the one before it in the batch.

    tensor: pictures or logits (B, C, H, W), or maps (B, H, W); masks (B, 1, H, W) bool.
    """
    masks = masks if tensor.ndim == 4 else masks[:, 0]
    return torch.where(masks, tensor.roll(1, 0), tensor)


def join(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Two batches as one, network by network."""
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


# --- the alternatives of the paper's Discussions ---


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

    logits, teacher_logits (B, K, H, W) -> (). The teacher is constant; valid (B, H, W) bool leaves
    pixels out. The loss is weighted with the share of pixels where the teacher is at least as
    confident as `conf`.
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
    for averaged, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)


def discussion_loss(
    kind: str,
    logits: list[Tensor],
    teaching: list[Tensor],
    pseudo: list[Tensor],
    valid: Tensor,
    conf: float,
) -> Tensor:
    """The alternative `kind` to Eq. (4), from what the training loop has at hand."""
    if kind in ("prob_l2", "prob_kl"):
        return cross_probability_loss(*logits, kind.removeprefix("prob_"), valid)
    if kind == "mean_teacher":
        return mean_teacher_loss(logits[0], teaching[0], valid, conf)
    return cross_entropy(logits[0], pseudo[0])  # single; pseudoseg, whose logits see a strong view


@torch.no_grad()
def predict(networks: list[nn.Module], images: Tensor, eval_mode: bool = False) -> list[Tensor]:
    """The logits (B, K, H, W) with which networks teach, constant.

    In training mode, as released, these passes move BatchNorm's running statistics too.
    """
    for network in networks:
        network.train(not eval_mode)
    logits = [network(images) for network in networks]
    for network in networks:
        network.train()
    return logits


# --- training ---


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that do not go together."""
    if cfg.ema_decay > 1:
        raise InputError(f"--ema-decay {cfg.ema_decay}: must be between 0 and 1")
    if 0 < cfg.eval_window < 32:
        raise InputError(f"--eval-window {cfg.eval_window}: must be 0, or 32 pixels and more")
    if cfg.supervised_only:
        return
    if cfg.cutmix and cfg.supervision not in ("cps", "mean_teacher", "single"):
        raise InputError(f"--supervision {cfg.supervision}: has no CutMix form; add --no-cutmix")
    if cfg.pseudo_eval and cfg.supervision in ("prob_l2", "prob_kl"):
        raise InputError(f"--pseudo-eval: {cfg.supervision} has no pseudo labels; leave it out")
    if cfg.labeled_cps == "on" and cfg.supervision == "pseudoseg":
        raise InputError("--labeled-cps on: pseudoseg has no strong view of labelled pictures")


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is network 1, the one the paper evaluates.

    Raises InputError for flags and files that cannot be right.
    """
    run = Run("cps", cfg)
    check_flags(cfg)
    data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
    run.print(data.summary())

    # Same architecture, same pretrained backbone; only the random heads differ. That difference
    # is the whole perturbation: with equal heads, Eq. (4) is each network taught by itself.
    kind, num_classes = cfg.supervision, len(data.classes)
    if cfg.supervised_only:
        kind = "supervised"
    twins = kind in ("cps", "prob_l2", "prob_kl")
    networks = [
        DeepLabV3Plus(num_classes, cfg.backbone, cfg.weights, cfg.width) for _ in range(1 + twins)
    ]
    check(data, run.rank, run.world)
    trained = [run.wrap(network) for network in networks]
    teachers = networks
    if kind == "mean_teacher":
        teachers = [deepcopy(networks[0]).requires_grad_(False)]
    modules = nn.ModuleList(dict.fromkeys(networks + teachers))
    optimizer, schedule = sgd_poly(networks, cfg.lr, cfg.weight_decay, cfg.iters)
    state = dict(networks=modules, optimizer=optimizer, schedule=schedule)
    run.start(networks[:1], data, state)

    view = partial(train_view, crop=cfg.crop_size, scales=cfg.scales)
    batches_l = iter(training_loader(data, "labeled", view, **run.drawing))
    if kind != "supervised":
        view_u = partial(view, strong=photometry()) if kind == "pseudoseg" else view
        batches_u = iter(training_loader(data, "unlabeled", view_u, **run.drawing))
    val = val_loader(data, whole_view, **run.loading)
    window = (cfg.eval_window, ceil(cfg.eval_window * 2 / 3)) if cfg.eval_window else None

    criterion = cross_entropy
    if cfg.ohem:
        criterion = partial(ohem_cross_entropy, min_kept=50_000 * cfg.batch_size)
    lam = cfg.lam_cutmix if cfg.cutmix else cfg.lam
    if kind == "mean_teacher" and not cfg.cutmix:
        lam = cfg.lam_mt / num_classes
    conf = CONFIDENT if cfg.cutmix else 0.0
    # What teaches takes a pass of its own where it has other weights, another mode, other pixels.
    others = kind == "mean_teacher" or cfg.pseudo_eval
    own_pass = others or cfg.cutmix or kind == "pseudoseg"
    teach_labeled = cfg.labeled_cps == "on" or (cfg.labeled_cps == "auto" and not cfg.cutmix)
    teach_labeled = teach_labeled and kind != "pseudoseg"

    for step in run.loop():
        images_l, labels_l, valid_l = run.to_device(next(batches_l))
        with run.autocast():
            logits_l = [network(images_l) for network in trained]  # (B, K, H, W)  Eqs. (1), (2)
            if twins:
                loss_sup = supervised_loss(*logits_l, labels_l, criterion)  # Eq. (3)
            else:
                loss_sup = criterion(logits_l[0], labels_l)
            loss, loss_unsup = loss_sup, 0.0

            if kind != "supervised":
                images_u, _, valid, *strong_u = run.to_device(next(batches_u))
                teaching = predict(teachers, images_u, cfg.pseudo_eval) if own_pass else []
                if cfg.cutmix:
                    masks = cutmix_masks(*valid.shape, device=run.device)
                    images_u, valid = mix(images_u, masks), mix(valid, masks)
                    teaching = [mix(teach, masks) for teach in teaching]
                logits = [network(*strong_u or [images_u]) for network in trained]
                teaching = teaching or logits
                if teach_labeled:
                    own = predict(teachers, images_l, cfg.pseudo_eval) if others else logits_l
                    logits, teaching = join(logits_l, logits), join(own, teaching)
                    valid = torch.cat([valid_l, valid])
                valid = valid | cfg.count_padding
                # Y1 and Y2, (B, H, W) each: the labels that networks 1 and 2 predict.
                pseudo = [teach.argmax(dim=1).masked_fill(~valid, VOID) for teach in teaching]
                if kind == "cps":
                    loss_unsup = cps_loss(*logits, *pseudo)  # Eq. (4)
                else:
                    loss_unsup = discussion_loss(kind, logits, teaching, pseudo, valid, conf)
                ramp = min(1.0, (step + 1) / max(cfg.ramp * cfg.iters, 1))
                loss = loss_sup + ramp * lam * loss_unsup  # Eq. (5)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if kind == "mean_teacher":
            ema_update(teachers[0], networks[0], cfg.ema_decay)
        run.log(step, loss_sup=loss_sup, loss_unsup=loss_unsup)
        if run.due(step):
            run.average_buffers(modules)
            with run.autocast():
                confusion = evaluate(networks[0], val, num_classes, run.device, window)
            run.record(step, iou(confusion))

    if run.rank == 0:
        panels(networks[0], data, run.folder / "panels.png", run.device)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
