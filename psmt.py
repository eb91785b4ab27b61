"""Perturbed and Strict Mean Teachers (PS-MT).

Liu, Tian, Chen, Liu, Belagiannis, Carneiro: Perturbed and Strict Mean Teachers for
Semi-supervised Semantic Segmentation, CVPR 2022, arXiv 2111.12903.

A student learns from labels and, on unlabelled pictures, from two teachers. A teacher's weights
are a moving average of the student's; the two take turns, one following the student for a while,
then the other, so that they differ. Where the mean of their predictions is confident it is a hard
label, weighted with its confidence ("strict"); elsewhere a pixel does not count. The student must
find that label under harder conditions ("perturbed"): other colours, CutMix, and adversarial noise
on its features, the small step that most changes what the teachers' decoders make of them.

Where to find it (of the paper's equation numbers we know one)
    Eq. (4)   the ensemble: mean of two teachers' logits, then softmax      train; deeplab.Ensemble
    Conf-CE   hard labels weighted with confidence, above a threshold τ     conf_ce_loss
    T-VAT     r_adv = argmax KL(p(z) || p(z + r)) over ||r|| <= eps         t_vat
    L_sup     labelled pictures, strong view, with r_adv                    train; common.losses
    EMA       teacher <- decay teacher + (1 - decay) student, in turns      ema_update, turn_length
    Total     L = L_sup + λ(t) L_conf                                       train, ramp_up
    CutMix, ZoomIn/Out, weak and strong views              box_masks, zoom, views; common.augment

What differs from the paper (P) or the released code (C) stands at its line: `grep Δ psmt.py`. We
had C but not the text of P: what is said of P rests on its abstract, on other readers' notes, and
on what its authors wrote elsewhere. What changes results most:
    1. T-VAT's noise has the norm eps; C's, as released, is nearly zero where it was measured.
    2. The ensemble is the plain mean; in C one teacher counts with its seven highest logits alone.
    3. `--teachers copy` (no pretrained weights): both start as the warmed-up student. `own`
       (the other recipes, and C): each network learns by itself in the warm-up. All three then have
       pretrained backbones, in C the student alone.
    4. A teacher's turn is a pass over the unlabelled pictures, as in C, but no longer than a
       twelfth of λ's rise.
    5. Labelled pictures are augmented anew each time; within an epoch C replays its first pass.
Left out: negative learning, which C's scripts switch off in all but one job for Cityscapes.

`python psmt.py --amp none`: 52.4 mIoU, mean of three seeds (supervised: 48.5), in minutes.
"""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import cutmix_masks, mix, photometry, train_view
from common.deeplab import DeepLabV3Plus, Ensemble
from common.flags import Count, Part, Positive, SemiConfig, Share, Span, refuse_silence, with_recipe
from common.losses import OHEM_KEPT, supervised_criterion
from common.metrics import evaluating
from common.optim import sgd_poly
from common.run import Result, Run, main


@dataclass
class Config(SemiConfig):
    """PS-MT's own settings, here those of the embedded dataset; RECIPES has the others."""

    iters: Count = 350  # optimisation steps, the warm-up's included
    lr: Positive = 0.06  # rate in the warm-up; after it, falls to 0 as (1 - share done)^0.9
    eval_every: Count = 175  # steps between two evaluations, each of which writes last.pt
    threshold: Share = 0.6  # τ: a pixel teaches where the teachers' confidence is at least this
    lam: float = 1.5  # λ, weight of Conf-CE after its rise: 1.5 on VOC, 3 on Cityscapes
    ramp: Share = 0.15  # share of the steps over which λ rises from 0, after the warm-up
    warmup: Part = 0.1  # share of the steps that are supervised, at the start
    teachers: Literal["own", "copy"] = "copy"  # in the warm-up train alone, or copy the student
    ema_decay: Share = 0.9  # EMA decay of the teachers: 0.996 in the released code
    eps: float = 2.0  # norm of T-VAT's noise by picture, 0: none; 2 is the released code's
    cutmix: Literal["box", "boxes", "off"] = "box"  # one box a picture (VOC), three (Cityscapes)
    # Δ P: off, as in C for DeepLabv3+; it is part of P's strong view.
    zoom: bool = False  # ZoomIn/Out of the strong view
    pseudo_eval: bool = False  # teachers label in eval mode; in the released code in training mode
    count_padding: bool = False  # padding of a crop teaches too, as in the released code
    scales: Span = (0.75, 1.25)  # smallest and largest scale of a training crop
    # Δ C: milder colours, for short runs on small pictures whose classes differ in colour.
    strength: Share = 0.2  # of the strong view's colours and blur: 1 in the released code
    ohem: bool = False  # L_sup over the hard pixels only: on Cityscapes

    left_out = SemiConfig.left_out + ("threshold", "lam", "ramp", "teachers", "ema_decay", "eps")
    left_out += ("cutmix", "zoom", "pseudo_eval", "count_padding")


# The released code's values, but for eps: C's call asks for 2, and gets nearly none.
RELEASED = dict(
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    batch_size=8,
    lr=0.0025,
    threshold=0.6,
    lam=1.5,
    teachers="own",
    ema_decay=0.996,
    eps=2.0,
    scales=(0.5, 2.0),
    strength=1.0,
    width=256,
    workers=4,
)
# Ours, for small sets of one's own.
FOLDER = dict(dataset="folder", labeled="all", crop_size=320, iters=20_000, eval_every=2_000)
FOLDER |= dict(warmup=0.01)
# One process a GPU, as torchrun counts them. As in C, each takes a batch of its own, so that more
# GPUs mean fewer steps; C ran on 4 for VOC, on 2 for Cityscapes.
GPUS = int(os.environ.get("WORLD_SIZE", 1))
# 8 + 8 pictures on each GPU, lr 0.0025 for each: 0.01 on 4. The long side is drawn from 300 to 1200
# pixels, which are these scales for VOC's 500.
# Δ C: 1/r of the sorted pictures; C's lists follow another order: give them to --labeled.
VOC = RELEASED | dict(dataset="voc", crop_size=512, lr=0.0025 * GPUS, scales=(0.6, 2.4))
VOC |= dict(count_padding=True)
# 4 + 4 pictures on each GPU, lr 0.0045 on any number of them.
# Δ C: OHEM, as C's README says of this setting; C builds it and never calls it.
CITYSCAPES = RELEASED | dict(dataset="cityscapes", crop_size=800, eval_window=800, batch_size=4)
CITYSCAPES |= dict(lr=0.0045, lam=3.0, cutmix="boxes", ohem=True, count_padding=True)


def lengths(labels: int, pictures: int, epochs: int, batch: int) -> dict:
    """The released epochs as steps of `batch` + `batch` pictures on each GPU.

    5 passes over the labelled pictures come first, then `epochs` over the unlabelled ones, the
    first 12 of which λ takes to rise.
    """
    warmup = 5 * max(math.ceil(labels / GPUS) // batch, 1)
    epoch = math.ceil((pictures - labels) / GPUS) // batch
    iters = warmup + epochs * epoch
    return dict(iters=iters, warmup=warmup / iters, ramp=12 * epoch / iters, eval_every=10 * epoch)


# Lengths depend on the labelled set; `--dataset voc --labeled 1/4` selects one of these. Any other
# set (a list, another share) gets those of 1/8: give --iters, --warmup, --ramp and --eval-every.
# C's λ for lists of 92 pictures is 0.06, for those of 183 to 732 it is 0.6.
# Ours: the paper has no COCO. 1/32 is the largest share that later papers report.
COCO = FOLDER | dict(dataset="coco", labeled="1/32")
RECIPES = {"shapes": {}, "folder": RELEASED | FOLDER, "coco": RELEASED | COCO}
RECIPES |= {
    f"voc {share}": VOC | dict(labeled=share) | lengths(labels, 10_582, epochs, batch=8)
    for share, labels, epochs in (
        ("1/16", 662, 80),
        ("1/8", 1323, 80),
        ("1/4", 2646, 200),
        ("1/2", 5291, 300),
    )
}
RECIPES |= {
    f"cityscapes {share}": CITYSCAPES | dict(labeled=share) | lengths(labels, 2975, epochs, batch=4)
    for share, labels, epochs in (("1/8", 372, 320), ("1/4", 744, 450), ("1/2", 1488, 550))
}
# Ours: `--weights none`, a small network from nothing, in minutes on a CPU.
SMALL = dict(backbone="resnet18", width=64, crop_size=96, batch_size=4, workers=0)
SMALL |= dict(iters=500, eval_every=100, lr=0.03, scales=(0.75, 1.25), warmup=0.1, ramp=0.3)
RECIPES["folder no-weights"] = SMALL | dict(teachers="copy", ema_decay=0.97, strength=0.2)
RECIPES |= {"voc": RECIPES["voc 1/8"], "cityscapes": RECIPES["cityscapes 1/8"]}


# --- the method ---


def conf_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    threshold: float = 0.6,
    valid: Tensor | None = None,
) -> Tensor:
    """Conf-CE = sum of m c CE(student, y) / sum of m, both sums over all pixels of the batch.

    student_logits, teacher_logits (B, K, H, W) -> (). Per pixel, c is the highest probability of
    the teachers, y its class, and m = 1 where c >= threshold. valid (B, H, W) bool leaves padding
    out. Where no pixel passes it is 0, with zero gradient.
    """
    # A mean over the pixels that pass, as in C; by what P divides we could not check.
    # Δ P: a pixel of confidence τ passes, as in C; in P those above it.
    # Δ C: where no pixel passes, C's loss for VOC has no gradient at all, and several GPUs hang.
    # What teaches is constant: neither label nor confidence passes a gradient back.
    conf, pseudo = teacher_logits.detach().softmax(dim=1).max(dim=1)  # (B, H, W) each
    passing = conf >= threshold
    if valid is not None:
        passing = passing & valid
    losses = conf * F.cross_entropy(student_logits, pseudo, reduction="none")
    return torch.where(passing, losses, 0.0).sum() / passing.sum().clamp(min=1)


def t_vat(
    encoded: Tensor,
    decoder1: Callable[[Tensor], Tensor],
    decoder2: Callable[[Tensor], Tensor],
    xi: float = 1.0,
    eps: float = 2.0,
    start: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """T-VAT: the step r, ||r|| <= eps, after which the teachers' prediction differs most.

    r = argmax KL(p(z) || p(z + r)), summed over pixels, where p is the softmax of the mean of the
    two decoders' logits, and z the student's features, encoded (B, C, h, w). One power iteration
    (Miyato et al., 2018): the divergence's gradient at ξ d, d a random direction, scaled to the
    norm eps for each picture.
    Returns r (B, C, h, w), constant, float32 or float64. decoder1, decoder2: encoded -> logits, in
    the mode they are in: put BatchNorm in eval mode first. start: d, of any norm but 0; random when
    None. size: (H, W) to which logits are upsampled first.
    """
    # Δ C: its call has ξ = 1e-6, where the exact gradient's norm is 1e-14 to 1e-12, and it adds
    # 1e-8 to every norm that it divides by. What comes out in float32 is rounding noise, of a norm
    # of 4e-4 to 1.5e-2 where it was measured, not of eps.
    # A small ξ measures the curvature at z exactly, but rounding hides a small step. The smallest
    # cosine to the direction of ξ = 0.01 in float64, of 64 pictures: 0.998 for ξ = 0.1 and 0.98 for
    # ξ = 1 in float32; but 0.40 and 0.98 with TF32's 10 bits, in which GPUs convolve float32: hence
    # ξ = 1. bf16 has fewer bits still: autocast is off.
    z = encoded.detach().to(torch.promote_types(encoded.dtype, torch.float32))
    d = torch.rand_like(z) - 0.5 if start is None else start.to(z)
    d = unit(d).requires_grad_()

    def log_p(features: Tensor) -> Tensor:
        logits = (decoder1(features) + decoder2(features)) / 2
        if size is not None:  # interpolation is linear: once, of the mean, is enough
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.log_softmax(dim=1)

    with torch.autocast(z.device.type, enabled=False):
        with torch.no_grad():
            clean = log_p(z)
        with torch.enable_grad():
            divergence = F.kl_div(log_p(z + xi * d), clean, reduction="batchmean", log_target=True)
    # With respect to d alone: no gradient of a decoder's weights is computed or stored.
    (gradient,) = torch.autograd.grad(divergence, d)
    # Where the divergence is flat, the start is as good as any other direction.
    flat = (gradient == 0).all(dim=(1, 2, 3), keepdim=True)
    return eps * unit(torch.where(flat, d.detach(), gradient))


def unit(direction: Tensor) -> Tensor:
    """Each sample of (B, C, h, w) divided by its L2 norm, tiny samples too.

    A divergence near its minimum has a tiny gradient, whose squares would underflow.
    """
    tiny = torch.finfo(direction.dtype).tiny
    peak = direction.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=tiny)
    scaled = direction / peak  # the largest entry is 1
    return scaled / torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True).clamp(min=1)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student, parameters and BatchNorm's statistics.

    Buffers that count in integers stay as they are.
    """
    own, other = teacher.state_dict(), student.state_dict()
    for name, averaged in own.items():  # state_dict() shares memory with the module
        if averaged.is_floating_point():
            averaged.lerp_(other[name], 1 - decay)


def ramp_up(step: int, length: float) -> float:
    """λ(t) / λ: from 0 at step 0 to 1 at step `length`, half a cosine."""
    share = min(step / length, 1.0) if length else 1.0
    return 0.5 * (1 - math.cos(math.pi * share))


def turn_length(epoch: int, ramp: float) -> int:
    """Steps until it is the other teacher's turn: an epoch, a pass over the unlabelled pictures.

    ramp: the steps over which λ rises.
    """
    # Δ C: at most a twelfth of λ's rise. For C's rise of 12 passes that changes nothing; in a short
    # run one teacher would rest from before the rise until its end.
    turn = min(epoch, round(ramp / 12)) if ramp else epoch
    return max(turn, 1)


# --- data views: weak and strong, CutMix, ZoomIn/Out ---


def views(
    image: Tensor,
    label: Tensor,
    crop: int,
    scales: tuple[float, float],
    strong: Callable[[Tensor], Tensor],
) -> tuple[Tensor, ...]:
    """The weak view of a crop, its label and valid pixels, and its strong view.

    The scale is uniform between the two of `scales`. Teachers see the weak view, the student the
    strong one: the same pixels after colour jitter, grayscale and blur; of labelled pictures too.
    """
    # Δ C: relative to the picture's own size; for VOC, C draws the long side, the same where that
    # is 500. It resizes bicubically and pads at the bottom and the right, here bilinear, all round.
    low, high = scales
    scale = low + (high - low) * float(torch.rand(()))
    return train_view(image, label, crop, (scale,), strong)


def box_masks(
    batch: int, height: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """CutMix masks (B, 1, H, W) bool by the rule for VOC; True where the partner shows.

    A box has the share 1 - β of the area; β ~ Beta(4, 4) is drawn once for the batch. Each picture
    has a centre of its own, an eighth of a side or more from the top and the left. What reaches
    over the border is cut off, which leaves 36 % of the pixels on average.
    """
    side = math.sqrt(1 - torch.distributions.Beta(4.0, 4.0).sample())

    def span(length: int) -> Tensor:
        half = int(side * length) // 2
        centre = torch.randint(length // 8, length, (batch, 1)).to(device, non_blocking=True)
        positions = torch.arange(length, device=device)
        return (positions >= centre - half) & (positions < centre + half)  # (B, length)

    return span(height)[:, None, :, None] & span(width)[:, None, None]


def zoom(images: Tensor, teacher_logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ZoomIn/Out: a part fills the frame (probability 0.4), or the picture shrinks in it (0.2).

    images (B, 3, H, W) normalised, teacher_logits (B, K, H, W), valid (B, H, W) bool: one draw for
    all. In: a window of 0.1 to 0.3 of the area. Out: 0.3 to 0.5 of the sides, amid padding.
    Pictures are resized bilinearly, targets to the nearest pixel.
    """
    from torchvision.transforms import RandomResizedCrop  # here, for it takes a second

    # Δ C: C never runs it for DeepLabv3+, and for PSPNet zooms the target but not the picture. The
    # method is what notes say of P, the numbers are C's.
    draw, (height, width) = float(torch.rand(())), valid.shape[1:]
    top, left, box_h, box_w, out_h, out_w = 0, 0, height, width, height, width
    if draw < 0.4:
        top, left, box_h, box_w = RandomResizedCrop.get_params(images, [0.1, 0.3], [0.995, 1.333])
    elif draw < 0.6:
        scale = 0.3 + 0.2 * float(torch.rand(()))
        out_h, out_w = round(scale * height), round(scale * width)
    else:
        return images, teacher_logits, valid
    above, before = (height - out_h) // 2, (width - out_w) // 2
    padding = (before, width - out_w - before, above, height - out_h - above)

    def look(tensor: Tensor, mode: str) -> Tensor:
        part = tensor[..., top : top + box_h, left : left + box_w]
        return F.pad(F.interpolate(part, (out_h, out_w), mode=mode), padding)

    valid = look(valid[:, None].float(), "nearest-exact")[:, 0] > 0
    return look(images, "bilinear"), look(teacher_logits, "nearest-exact"), valid


# --- training ---


def recipe(dataset: str, **changes: Any) -> Config:
    """The settings of a dataset's recipe, and what is to differ: what the command line makes."""
    return with_recipe(Config, RECIPES, dataset=dataset, **changes)


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that do not go together."""
    ignored = {}
    if cfg.crop_size**2 <= OHEM_KEPT:
        ignored["ohem"] = f"on crops of {cfg.crop_size} pixels: it keeps {OHEM_KEPT} of a picture"
    if not cfg.lam:
        ignored |= dict.fromkeys(["threshold", "ramp", "count_padding"], "with --lam 0")
    refuse_silence(cfg, RECIPES, **ignored)


def decoder(network: DeepLabV3Plus) -> Callable[[Tensor], Tensor]:
    """What follows the encoding: (B, width + 48, h, w) -> logits (B, K, h, w), not upsampled."""
    return lambda encoded: network.classify(network.decode(encoded))


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is the mean of the teachers' logits (Ensemble).

    With --supervised-only it is the student. Raises InputError for flags and files that cannot be
    right, and when training diverges.
    """
    run = Run("psmt", cfg)
    check_flags(cfg)
    data = run.load(mixed=cfg.cutmix != "off")

    # Δ C: all three start alike, but with `own` each from a random head of its own. C loads the
    # pretrained weights into the student alone, so that the teachers' backbones start at random;
    # and the student's head has PyTorch's default weights.
    build = partial(DeepLabV3Plus, len(data.classes), cfg.backbone, cfg.weights, cfg.width)
    student = build()
    trained, teachers = run.wrap(student), []
    # Δ C: `copy`. The average of networks that started apart predicts nothing until one of them
    # is nearly all of it, and a short run has no time for that.
    own = cfg.teachers == "own" and not cfg.supervised_only
    if not cfg.supervised_only:
        teachers = [run.place(build()) if own else deepcopy(student) for _ in range(2)]
    # Δ C: the plain mean, as in P. In C the teacher that is not being updated counts only with its
    # seven highest logits at a pixel; the others are replaced by the other teacher's.
    ensemble = Ensemble(teachers)
    named = dict(zip(("student", "teacher1", "teacher2"), [student, *teachers], strict=False))
    # The learning rate is constant in the warm-up, as in C, and falls after it.
    warmup = round(cfg.warmup * cfg.iters)
    learning = [student, *teachers] if own else [student]
    optimizer, schedule = sgd_poly(learning, cfg.lr, cfg.weight_decay, cfg.iters - warmup)
    everything = dict(networks=nn.ModuleDict(named), optimizer=optimizer, schedule=schedule)
    # Δ C: the mean of the teachers, as in P; for Cityscapes C takes teacher 1 alone.
    run.start(data, teachers or [student], **everything)

    # Δ C: labelled pictures are augmented anew each time; within an epoch C replays its first pass.
    view = partial(views, crop=cfg.crop_size, scales=cfg.scales, strong=photometry(cfg.strength))
    batches_l = run.batches("labeled", view)
    batches_u = run.batches("unlabeled", view, begin=warmup)
    criterion = supervised_criterion(cfg.ohem, cfg.batch_size)
    # Δ C: a picture's partner is another one, the same for all its boxes, which cancel where they
    # overlap; in C it may be the picture itself, and each box has its own.
    masks_of = box_masks if cfg.cutmix == "box" else cutmix_masks
    ramp = cfg.ramp * cfg.iters
    own_share = math.ceil(len(data.unlabeled) / run.world)
    turn = turn_length(own_share // (cfg.batch_size * cfg.accum), ramp)

    # The part of the teachers' decoders that has BatchNorm.
    normalised = nn.ModuleList(teacher.decoder for teacher in teachers)

    def noise(encoded: Tensor) -> Tensor:
        """r_adv, from the student's features z. Labelled pictures get it too, as in C."""
        with evaluating(normalised):  # running statistics, as in C, which stay as they are
            return t_vat(encoded, *map(decoder, teachers), eps=cfg.eps, size=(cfg.crop_size,) * 2)

    def shown(images: Tensor) -> dict[str, Tensor]:
        """Columns of panels.png: c of Conf-CE, and where it is too low to teach."""
        conf = ensemble(images).softmax(dim=1).amax(dim=1)
        below = f"below {cfg.threshold} in yellow"
        return {"confidence, 1 is white": conf, below: conf < cfg.threshold}

    run.show = shown if teachers else None

    for step in run.loop():
        weak_l, labels_l, _, strong_l = run.to_device(next(batches_l))
        semi = bool(teachers) and step >= warmup
        # After the warm-up teachers' weights change by averaging alone. They label in training
        # mode, as in C, which moves the running statistics of both.
        ensemble.requires_grad_(own and not semi)
        ensemble.train(not (semi and cfg.pseudo_eval))
        perturb = noise if semi and cfg.eps else None
        with run.autocast():
            # decode(z + r_adv), z = encode(strong_l). In bf16 some of r_adv is rounded away: 1 % on
            # pictures of 64 pixels, 10 % at 512, where z is large.
            logits_l = trained(strong_l, perturb)
            loss = loss_sup = criterion(logits_l, labels_l)  # L_sup
            loss_conf = lam = 0.0
            if semi:
                weak_u, _, valid, strong_u = run.to_device(next(batches_u))
                with torch.no_grad():
                    teacher_logits = ensemble(weak_u)  # (B, K, H, W)  Eq. (4)
                if cfg.zoom:
                    strong_u, teacher_logits, valid = zoom(strong_u, teacher_logits, valid)
                if cfg.cutmix != "off":  # teachers saw whole pictures; their logits are mixed now
                    masks = masks_of(*valid.shape, device=run.device)
                    strong_u, teacher_logits = mix(strong_u, masks), mix(teacher_logits, masks)
                    valid = mix(valid, masks)
                if cfg.count_padding:  # Δ C: counted; here only in the paper's recipes
                    valid = torch.ones_like(valid)
                logits_u = trained(strong_u, perturb)  # (B, K, H, W)
                loss_conf = conf_ce_loss(logits_u, teacher_logits, cfg.threshold, valid)  # L_conf
                lam = cfg.lam * ramp_up(step - warmup, ramp)  # λ(t)
                loss = loss_sup + lam * loss_conf  # L
            elif own:  # Δ C: all three from one batch; there, one after the other
                loss = loss + sum(criterion(teacher(weak_l), labels_l) for teacher in teachers)

        run.backward(loss / cfg.accum)
        if run.more_to_come:  # with --accum N the loop comes N times to a step
            continue
        run.average_gradients(ensemble)  # of `own` teachers; the student's wrapper averages its own
        run.update(optimizer)
        optimizer.zero_grad()
        if step >= warmup:
            schedule.step()
        if semi:  # once a step; running statistics of the teachers have moved with each batch
            active = (step - warmup) // turn % 2  # whose turn it is; the other's weights wait
            ema_update(teachers[active], student, cfg.ema_decay)
        elif not own:  # until the warm-up ends, both are the student
            for teacher in teachers:
                ema_update(teacher, student, 0.0)
        run.log(step, loss_sup=loss_sup, loss_conf=loss_conf, lam=lam)
        run.evaluate(step, **(named if teachers else {}))
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
