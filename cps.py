"""Cross Pseudo Supervision (CPS).

Chen, Yuan, Zeng, Wang: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision,
CVPR 2021, arXiv 2106.01226.

Two networks of one architecture start from different random heads and see the same pictures. On
labelled pictures both learn the truth. On all pictures (with CutMix: on mixed unlabelled ones) each
also learns the hard labels that the other predicts at that moment, with no threshold on confidence.
The paper's argument: a network taught by its own labels only grows surer of its errors, while the
other one, which started elsewhere, errs elsewhere. So the two predictions are drawn together while
unlabelled pictures become training data. In the end the first network alone is the result.

Where to find it
    Eqs. (1), (2)  P1, P2, the networks' predictions            train; the losses apply the softmax
    Eq. (3)        L_s, both learn the truth                    supervised_loss
    Eq. (4)        L_cps^u, each learns the other's labels      cps_loss; L_cps^l has its form
    Eq. (5)        L = L_s + λ L_cps                            train
    CutMix         pseudo labels of two pictures, mixed         train; common.augment draws masks
    Discussions    cross probability consistency (CPC)          cross_probability_loss
                   mean teacher                                 mean_teacher_loss, ema_update
                   single network (SPS), PseudoSeg              discussion_loss

Differences from the paper (P) and the released code (C) stand at their lines: `grep Δ cps.py`. What
changes results most:
    1. L_cps = L_cps^l + L_cps^u is one mean over the pixels of both, as in C: half of P's sum.
    2. With CutMix it is taken on the mixed unlabelled pictures alone, as in C.
    3. CutMix mixes different pictures; C, by accident, two views of one picture.
    4. Rate and weight decay are those that C applies in effect: a rate of a quarter or less of the
       published one, a decay of four or eight times C's (P's 5e-4 is a misprint).
    5. In the recipes without pretrained weights λ rises from 0: `--ramp`.
Left out: the recipes for few hundred labels (Table 5), HRNet, self-training.

`python cps.py --amp none`: 53.3 mIoU, mean of three seeds (supervised: 44.1), in minutes.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import cutmix_masks, mix, photometry, train_view
from common.deeplab import DeepLabV3Plus
from common.flags import InputError, SemiConfig, Share, refuse_silence, with_recipe
from common.losses import OHEM_KEPT, VOID, cross_entropy, supervised_criterion
from common.optim import sgd_poly
from common.run import Result, Run, main

Supervision = Literal["cps", "prob_l2", "prob_kl", "mean_teacher", "single", "pseudoseg"]


@dataclass
class Config(SemiConfig):
    """CPS's own settings, here those of the embedded dataset; RECIPES has the others.

    SemiConfig has the rest: 8 + 8 pictures a step, rate, steps, crop, backbone, labelled share.
    """

    supervision: Supervision = "cps"  # what teaches beside labels: CPS, or one of its alternatives
    cutmix: bool = True  # mix unlabelled pictures; only for cps, single and mean_teacher
    lam: float = 2.0  # λ of Eq. (5): 1 on VOC, 5 on Cityscapes, 1.5 and 6 without CutMix; 2 is ours
    # Δ PC: λ is constant in both. Networks without pretrained weights teach noise at first.
    ramp: Share = 0.15  # share of the steps over which λ rises to --lam; 0, no rise, in the paper
    count_padding: bool = False  # padding of a crop gets pseudo labels too, as in the released code
    ema_decay: Share = 0.99  # of mean_teacher's weights: 0.99 in the released code
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)  # of training crops; each crop draws one of them
    ohem: bool = False  # L_s over the hard pixels only: on Cityscapes

    left_out = SemiConfig.left_out + ("supervision", "cutmix", "lam", "ramp", "count_padding")
    left_out += ("ema_decay",)


# A step sees 8 labelled and 8 unlabelled pictures; on several GPUs --batch-size is each process's
# part of the 8, two or more. 16 x 39,680 pictures are 60 epochs of VOC's 10,582, 16 x 44,625 are
# 240 of Cityscapes' 2,975. ResNet-101 takes the same settings: --backbone resnet101.
# Δ C: as many steps for every labelled share; C trains whole epochs, up to 1 % fewer steps.
# Δ C: 1/r of the sorted pictures; C's lists follow another order: give them to --labeled.
# Δ P: rate and decay are those that C applies in effect. It divides gradients by the number of
# processes, n, twice; for SGD the second division amounts to the rate / n and the decay x n. C sets
# 0.01 on 4 processes for VOC, 0.02 on 8 for Cityscapes (P: 0.04), and a decay of 1e-4 (P: 5e-4, by
# its authors' word a typo). Hence 0.01 / 4 = 0.02 / 8 = 0.0025, 4 x 1e-4 = 4e-4, 8 x 1e-4 = 8e-4.
RELEASED = dict(
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    lr=0.0025,
    weight_decay=4e-4,
    lam=1.0,
    ramp=0.0,
    scales=(0.5, 0.75, 1.0, 1.5, 1.75, 2.0),
    width=256,
    workers=4,
)
VOC = RELEASED | dict(
    dataset="voc",
    labeled="1/8",
    crop_size=512,
    iters=39_680,
    eval_every=1_984,
    count_padding=True,
)
CITYSCAPES = RELEASED | dict(
    dataset="cityscapes",
    labeled="1/8",
    crop_size=800,
    iters=44_625,
    eval_every=2_975,
    eval_window=800,
    count_padding=True,
    weight_decay=8e-4,
    lam=5.0,
    ohem=True,
)
# Ours: VOC's rate and λ, on crops and for a number of steps that suit small sets of one's own.
FOLDER = dict(dataset="folder", labeled="all", crop_size=320, iters=20_000, eval_every=2_000)
# Ours: the paper has no COCO. 1/32 is the largest share that later papers report.
COCO = FOLDER | dict(dataset="coco", labeled="1/32")
RECIPES = {
    "shapes": {},
    "folder": RELEASED | FOLDER,
    "coco": RELEASED | COCO,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
}
# Ours: the other alternatives have CPS's λ.
for dataset in list(RECIPES):
    RECIPES |= {
        f"{dataset} no-cutmix": dict(lam=6.0 if dataset == "cityscapes" else 1.5),
        f"{dataset} mean_teacher": dict(lam=1.0),  # CutMix-Seg's
        # C's, for a mean over pixels and classes.
        f"{dataset} mean_teacher no-cutmix": dict(lam=100.0),
    }
# Ours: `--weights none`, a small network from nothing, in minutes on a CPU.
SMALL = dict(backbone="resnet18", width=64, crop_size=96, batch_size=4, workers=0)
SMALL |= dict(iters=500, eval_every=100, lr=0.03, scales=(0.75, 1.0, 1.25), ramp=0.3)
RECIPES["folder no-weights"] = SMALL
CONFIDENT = 0.97  # CutMix-Seg weights its loss with the share of pixels at least this confident


# --- the method (Sec. 3) ---


def supervised_loss(
    logits1: Tensor,
    logits2: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """L_s, Eq. (3): both networks learn the truth.

    logits1, logits2 (B, K, H, W), labels (B, H, W) with 255 void -> (). The sum of two means, each
    over the pixels that are not void; with OHEM as criterion, over the hard ones.
    """
    return criterion(logits1, labels) + criterion(logits2, labels)


def cps_loss(
    logits1: Tensor,
    logits2: Tensor,
    pseudo1: Tensor | None = None,
    pseudo2: Tensor | None = None,
) -> Tensor:
    """Eq. (4): each network learns the labels that the other one predicts.

    logits1, logits2 (B, K, H, W) -> (). pseudo1, pseudo2 (B, H, W): what networks 1 and 2 predict,
    255 where a pixel does not count; the argmax of the logits when None. A sum over the networks,
    each a mean over the pixels that count.
    """
    # argmax passes no gradient back: a pseudo label is a constant target, as in the paper.
    pseudo1 = logits1.argmax(dim=1) if pseudo1 is None else pseudo1  # (B, H, W)  Y1
    pseudo2 = logits2.argmax(dim=1) if pseudo2 is None else pseudo2  # (B, H, W)  Y2
    return cross_entropy(logits1, pseudo2) + cross_entropy(logits2, pseudo1)


@torch.no_grad()
def predict(networks: list[nn.Module], images: Tensor) -> list[Tensor]:
    """The logits (B, K, H, W) with which networks teach, constant.

    In training mode, as in C: BatchNorm uses this batch's statistics and updates its running ones.
    """
    return [network(images) for network in networks]


def labels_of(logits: Tensor, valid: Tensor) -> Tensor:
    """The labels (B, H, W) that logits (B, K, H, W) stand for, void where a pixel is not valid."""
    return logits.argmax(dim=1).masked_fill(~valid, VOID)


def join(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Two batches as one, network by network."""
    return [torch.cat(both) for both in zip(first, second, strict=True)]


# --- the alternatives of the paper's Discussions ---


def cross_probability_loss(
    logits1: Tensor, logits2: Tensor, kind: str = "l2", valid: Tensor | None = None
) -> Tensor:
    """Cross probability consistency: each network moves towards the other's probabilities.

    logits1, logits2 (B, K, H, W) -> (); kind l2: the squared distance, summed over classes; kl: the
    divergence KL(other || own). valid (B, H, W) bool leaves pixels out. In each of the two terms
    the other network's probabilities are constant; otherwise the two terms would be equal.
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

    The teacher's BatchNorm keeps its own running statistics, as in C.
    """
    # Δ C: after the student's step; there before it, between the teacher's two passes.
    for averaged, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)


def discussion_loss(
    kind: str, logits: list[Tensor], teaching: list[Tensor], valid: Tensor, cutmix: bool
) -> Tensor:
    """The alternative `kind` to Eq. (4).

    logits, teaching: (B, K, H, W) for each network that learns, for each one that teaches.
    """
    if kind in ("prob_l2", "prob_kl"):
        return cross_probability_loss(*logits, kind.removeprefix("prob_"), valid)
    (student,), (teacher,) = logits, teaching
    if kind == "mean_teacher":
        # With CutMix this is CutMix-Seg (French et al., BMVC 2020), which the paper compares with.
        # Its own code has one box of half the area, averages the running statistics too, freezes
        # BatchNorm on VOC, evaluates the teacher, and divides both means by all pixels.
        return mean_teacher_loss(student, teacher, valid, CONFIDENT if cutmix else 0.0)
    # single: the network learns its own labels; pseudoseg: those that it predicts for a weak view.
    return cross_entropy(student, labels_of(teacher, valid))


# --- training ---


def recipe(dataset: str, **changes: Any) -> Config:
    """The settings of a dataset's recipe, and what is to differ: what the command line makes."""
    return with_recipe(Config, RECIPES, dataset=dataset, **changes)


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that do not go together."""
    ignored = {}
    if cfg.supervision != "mean_teacher":
        ignored["ema_decay"] = "without --supervision mean_teacher"
    if cfg.crop_size**2 <= OHEM_KEPT:
        ignored["ohem"] = f"on crops of {cfg.crop_size} pixels: it keeps {OHEM_KEPT} of a picture"
    if not cfg.lam:
        ignored |= dict.fromkeys(["ramp", "count_padding"], "with --lam 0")
    refuse_silence(cfg, RECIPES, **ignored)
    mixes = cfg.supervision in ("cps", "mean_teacher", "single")
    if cfg.cutmix and not mixes and not cfg.supervised_only:
        raise InputError(f"--supervision {cfg.supervision}: has no CutMix form; add --no-cutmix")


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is network 1, the one the paper evaluates.

    Raises InputError for flags and files that cannot be right, and when training diverges.
    """
    run = Run("cps", cfg)
    check_flags(cfg)
    data = run.load(mixed=cfg.cutmix)

    # Same architecture, same pretrained backbone; only the random heads differ.
    # Δ PC: without pretrained weights (the embedded dataset's recipe) the backbones differ, too.
    semi = not cfg.supervised_only
    kind = cfg.supervision
    twins = semi and kind in ("cps", "prob_l2", "prob_kl")
    build = partial(DeepLabV3Plus, len(data.classes), cfg.backbone, cfg.weights, cfg.width)
    networks = [build() for _ in range(2 if twins else 1)]
    trained = [run.wrap(network) for network in networks]  # averages gradients over processes
    # What labels: for mean_teacher a moving average of the network, else the networks themselves.
    follows = semi and kind == "mean_teacher"
    teachers = [deepcopy(networks[0]).requires_grad_(False)] if follows else networks
    everything = nn.ModuleList(dict.fromkeys(networks + teachers))  # each of them once
    optimizer, schedule = sgd_poly(networks, cfg.lr, cfg.weight_decay, cfg.iters)
    model = networks[:1]  # network 1 is evaluated and saved
    run.start(data, model, networks=everything, optimizer=optimizer, schedule=schedule)

    def shown(images: Tensor) -> dict[str, Tensor]:
        """A column of panels.png: where one network has something to learn from the other."""
        logits1, logits2 = (network(images) for network in networks)
        return {"disagreement in yellow": logits1.argmax(dim=1) != logits2.argmax(dim=1)}

    run.show = shown if twins else None

    # Δ P: the strong view of pseudoseg has PS-MT's colours and blur; we know of none in P.
    view = partial(train_view, crop=cfg.crop_size, scales=cfg.scales)
    view_u = partial(view, strong=photometry()) if kind == "pseudoseg" else view
    batches_l, batches_u = run.batches("labeled", view), run.batches("unlabeled", view_u)
    criterion = supervised_criterion(cfg.ohem, cfg.batch_size)
    # One network alone has one of Eq. (3)'s two terms.
    supervise = partial(supervised_loss, criterion=criterion) if twins else criterion
    # C's λ of a mean teacher weighs a mean over pixels and classes; our loss sums over the classes.
    lam = cfg.lam / len(data.classes) if follows and not cfg.cutmix else cfg.lam

    for step in run.loop():
        images_l, labels_l, valid_l = run.to_device(next(batches_l))  # valid: False on padding
        with run.autocast():
            logits_l = [network(images_l) for network in trained]  # (B, K, H, W)  Eqs. (1), (2)
            loss = loss_sup = supervise(*logits_l, labels_l)  # L_s, Eq. (3)
            loss_unsup = 0.0
            if semi:
                images_u, _, valid_u, *more = run.to_device(next(batches_u))
                if cfg.cutmix:
                    # In each picture boxes, a quarter of its pixels, show the one before it in the
                    # batch. Networks label whole pictures; their labels are then mixed likewise.
                    # Δ P: no term for labelled pictures, as in C.
                    # Δ C: two pictures are mixed; there, two views of one, for the partners come
                    # from a second sampler that runs in step with the first.
                    masks = cutmix_masks(*valid_u.shape, device=run.device)
                    images_mixed, valid = mix(images_u, masks), mix(valid_u, masks)
                    teaching = [mix(whole, masks) for whole in predict(teachers, images_u)]
                    logits = [network(images_mixed) for network in trained]
                elif kind == "pseudoseg":  # Fig. 1(d): a weak view labels a strong one
                    (images_strong,), valid = more, valid_u
                    teaching = predict(teachers, images_u)
                    logits = [network(images_strong) for network in trained]
                else:
                    # Δ P: L_cps^l + L_cps^u as one mean over the pixels of both, as in C, to which
                    # the published λ belong: half of P's sum of two means.
                    valid = torch.cat([valid_l, valid_u])
                    logits = join(logits_l, [network(images_u) for network in trained])
                    teaching = logits
                    if follows:  # Δ P: the teacher sees the student's view, as in C; in P its own
                        teaching = join(predict(teachers, images_l), predict(teachers, images_u))
                if cfg.count_padding:  # Δ C: counted; here only in the paper's recipes
                    valid = torch.ones_like(valid)
                if kind == "cps":
                    pseudo1, pseudo2 = (labels_of(taught, valid) for taught in teaching)  # Y1, Y2
                    loss_unsup = cps_loss(*logits, pseudo1, pseudo2)  # L_cps, Eq. (4)
                else:
                    loss_unsup = discussion_loss(kind, logits, teaching, valid, cfg.cutmix)
                rise = min(1.0, (step + 1) / max(cfg.ramp * cfg.iters, 1))
                loss = loss_sup + rise * lam * loss_unsup  # L, Eq. (5)

        run.backward(loss / cfg.accum)
        if run.more_to_come:  # with --accum N the loop comes N times to a step
            continue
        run.update(optimizer)
        optimizer.zero_grad()  # here, not before `backward`: the next passes need the memory
        schedule.step()
        if follows:
            ema_update(teachers[0], networks[0], cfg.ema_decay)
        run.log(step, loss_sup=loss_sup, loss_unsup=loss_unsup)
        run.evaluate(step)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
