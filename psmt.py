"""Perturbed and Strict Mean Teachers (PS-MT).

Liu, Tian, Chen, Liu, Belagiannis, Carneiro: Perturbed and Strict Mean Teachers for
Semi-supervised Semantic Segmentation, CVPR 2022, arXiv 2111.12903.

A student learns from labels and, on unlabelled pictures, from two teachers. A teacher's weights
are a moving average of the student's; the two take turns, one following the student for a pass
over the unlabelled pictures, the other for the next, so that they differ. The mean of their
predictions is better than either. Where it is confident it is a hard label, weighted with its
confidence ("strict"); elsewhere a pixel does not count. The student must find that label under
harder conditions ("perturbed"): other colours, CutMix, and adversarial noise on its features, the
small step that most changes what the teachers' decoders make of them.

Where to find it (we know the number of only one of the paper's equations)
    Eq. (4)    the ensemble: mean of two teachers' logits, then softmax        ensemble_logits
    Conf-CE    hard labels weighted with confidence, above a threshold τ       conf_ce_loss
    T-VAT      r_adv = argmax KL(p(z) || p(z + r)) over ||r|| <= eps           t_vat
    EMA        teacher <- decay teacher + (1 - decay) student, in turns        ema_update, train
    Total      L = L_sup + λ(t) L_conf                                         train, ramp_up
    CutMix, ZoomIn/Out, weak and strong views                     box_masks, mix, zoom, views

Differences from the paper (P) and from the released code (C). We had C, but not the text of P: what
is said of P is from its abstract, notes that others took, and what its authors wrote elsewhere.
    1.  T-VAT's noise has the norm eps, as in P. In C it is nearly zero: its ξ of 1e-6 makes a
        gradient of 1e-14 to 1e-12, and it adds 1e-8 to the norm that it divides by. `--tvat
        released` does so. Our ξ is 1. C's signature has ξ = 0.1 and eps = 10, which it never uses.
        T-VAT takes 27 % of a step with ResNet-50 on a CPU (256 x 256, 21 classes), 7 % on `shapes`.
    2.  Labelled features get noise too, as in C; what we have of P does not say. In the warm-up
        there is none.
    3.  The ensemble is a plain mean of logits. C first takes the teacher that is not being updated
        and, outside its seven highest classes, puts the other's logits: `--assist-top 7`.
    4.  `--teachers own`: all three networks start from the pretrained backbone with a head of their
        own, and each learns by itself in the warm-up. `random`: the teachers' backbones start at
        random, as in C, which loads the weights into the student alone. `copy`, ours, for random
        weights and short runs: both teachers are copies of the student until the warm-up ends. The
        average of networks that started apart predicts nothing until one of them is nearly all of
        it, and short runs have no time for that.
    5.  Teachers label in training mode, as in C: BatchNorm uses the batch's own statistics, and
        each such pass moves the running statistics of both teachers. Those of the one whose turn
        it is are averaged with the student's besides. `--pseudo-eval` labels in eval mode. T-VAT
        uses the running statistics, as in C.
    6.  L_conf is a mean over the passing pixels of a process, as in C; by what P divides we could
        not check. A pixel passes at τ too; in P above it. Where none passes L_conf is 0 with zero
        gradient; in C's code for VOC it has no gradient at all, and several GPUs hang.
    7.  Padding of a crop does not teach; in C it does: `--count-padding`.
    8.  Labelled pictures are augmented anew each time; C replays its first pass over them.
    9.  Cityscapes has OHEM, as C's README says of this setting; C builds it and never calls it:
        `--no-ohem`.
    10. ZoomIn/Out is off: C never runs it for DeepLabv3+, and for PSPNet zooms the target but not
        the picture. `--zoom` does what P describes with C's numbers, before CutMix.
    11. CutMix mixes different pictures: the partner is the one before in the batch. C permutes the
        batch, which can leave a picture its own partner. For Cityscapes the three boxes share a
        partner and cancel where they overlap; in C each has its own.
    12. The model is the mean of the teachers, as in P. C takes teacher 1 alone for Cityscapes, and
        in inference.py, which stops with an error. The last checkpoint counts; C keeps all.
    13. The warm-up (5 passes over the labels) and λ's rise (12 over the unlabelled pictures) are
        shares of --iters. The learning rate is constant in the warm-up, as in C.
    14. Left out: negative learning, which C's scripts switch off (it is on by default, and one of
        C's cluster jobs leaves it on), recipes for sets without a published λ (VOC's 1,464), and
        those for U2PL's lists.
    15. A crop's scale is relative to the picture's own size; for VOC C draws the long side, the
        same where that is 500. Resizing is bilinear, C's bicubic; padding is on all sides, C's at
        the bottom and the right. Pictures are evaluated at their own size, in C at multiples of 8;
        Cityscapes in C's windows. Classes that never occur are left out of the mean.
    16. The ResNets are torchvision's, with a 7x7 stem, and ASPP is DeepLabv3+'s; C has a deep stem
        and an ASPP of its own. All heads start from He's normal weights; in C the teachers' do, and
        the student's from PyTorch's default ones. Upsampling does not align corners, C's does.
    17. bf16 autocast on GPUs; C is in float32. T-VAT, and the student's decoder behind it, are in
        float32: bf16 would round much of the noise away.
    18. As in C, means over pixels and CutMix partners are per process; gradients, and on GPUs
        BatchNorm, are joint. `--labeled 1/r` is every r-th of the sorted ids: for VOC C's lists,
        for Cityscapes not.
    19. `--strength` scales the strong view's photometry: ours, for short runs on small pictures.
    Nearest to C: --tvat released --teachers random --assist-top 7 --count-padding --no-ohem
        --amp none; for Cityscapes read teacher1, not miou, in log.jsonl.

    python psmt.py    # 53.9 mIoU, mean of three seeds (supervised 47.3); 4 minutes on two CPU cores
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop

from common.augment import cutmix_masks, photometry, train_view, whole_view
from common.data import check, load, training_loader, val_loader
from common.deeplab import DeepLabV3Plus, Ensemble
from common.flags import SemiConfig
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import evaluate, evaluating, iou
from common.optim import sgd_poly
from common.predict import panels
from common.run import InputError, Result, Run, main


@dataclass
class Config(SemiConfig):
    """PS-MT's own settings, here those of the embedded dataset; RECIPES has the others."""

    iters: int = 350  # optimisation steps, the warm-up's included
    eval_every: int = 175  # steps between two evaluations, each of which writes last.pt
    threshold: float = 0.6  # τ: a pixel teaches where the teachers' confidence is at least this
    lam: float = 1.5  # λ, weight of Conf-CE after its rise: 0.06 to 1.5 on VOC, 3 on Cityscapes
    ramp: float = 0.15  # share of the steps over which λ rises from 0, after the warm-up
    warmup: float = 0.1  # share of the steps that are supervised, at the start
    teachers: Literal["own", "random", "copy"] = "copy"  # start: pretrained, random, the student's
    ema_decay: float = 0.9  # of the teachers: 0.996 in the released code
    tvat: Literal["on", "off", "released"] = "on"  # feature noise; released: its ξ, next to none
    eps: float = 2.0  # norm of T-VAT's noise, for each picture
    cutmix: Literal["box", "boxes", "off"] = "box"  # one box a picture (VOC), three (Cityscapes)
    zoom: bool = False  # ZoomIn/Out of the strong view
    assist_top: int = 0  # classes kept of the teacher not updated: 7 in the released code; 0: all
    pseudo_eval: bool = False  # teachers label in eval mode; in the released code in training mode
    count_padding: bool = False  # padding of a crop teaches too, as in the released code
    scales: tuple[float, ...] = (0.75, 1.25)  # smallest and largest scale of a training crop
    strength: float = 0.2  # of the strong view's photometry: 1 in the released code
    ohem: bool = False  # L_sup over the hard pixels only: on Cityscapes
    width: int = 64  # channels of ASPP and decoder: 256 in the paper
    eval_window: int = 0  # side of the sliding windows of evaluation, pixels; 0: whole pictures


# The released code's values, but for teachers, warmup and ramp; those two shares are for `folder`,
# VOC and Cityscapes take theirs from `lengths`.
PAPER = dict(
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    batch_size=8,
    lr=0.0025,
    threshold=0.6,
    lam=1.5,
    ramp=0.15,
    warmup=0.01,
    teachers="own",
    ema_decay=0.996,
    eps=2.0,
    scales=(0.5, 2.0),
    strength=1.0,
    width=256,
    workers=4,
)
# 32 + 32 pictures a step, as 8 + 8 on each of 4 GPUs, and lr 0.0025 for each of them: on one GPU,
# --lr 0.0025 and four times the --iters. The long side is drawn from 300 to 1200 pixels, which are
# these scales for VOC's 500.
VOC = PAPER | dict(dataset="voc", crop_size=512, lr=0.01, scales=(0.6, 2.4))
# 8 + 8 pictures a step, as 4 + 4 on each of 2 GPUs.
CITYSCAPES = PAPER | dict(
    dataset="cityscapes",
    crop_size=800,
    batch_size=4,
    lr=0.0045,
    lam=3.0,
    cutmix="boxes",
    ohem=True,
    eval_window=800,
)


def lengths(labels: int, pictures: int, epochs: int, gpus: int, batch: int) -> dict:
    """The released epochs as steps of `batch` + `batch` pictures on each GPU.

    5 passes over the labelled pictures come first, then `epochs` over the unlabelled ones, the
    first 12 of which λ takes to rise.
    """
    warmup = 5 * (math.ceil(labels / gpus) // batch)
    epoch = math.ceil((pictures - labels) / gpus) // batch
    iters = warmup + epochs * epoch
    return dict(iters=iters, warmup=warmup / iters, ramp=12 * epoch / iters, eval_every=10 * epoch)


# λ and lengths depend on the labelled set; `--dataset voc --labeled 1/4` selects one of these. Any
# other set (a list, another share) gets those of 1/8: give --lam, --iters, --warmup, --ramp and
# --eval-every by hand. 92 to 732 were published for lists of finely annotated pictures and
# ResNet-101; here a count draws from all 10,582 pictures, for ResNet-50.
LABELED_SETS = {
    f"voc {name}": VOC | dict(labeled=name, lam=lam) | lengths(labels, 10_582, epochs, 4, 8)
    for name, labels, epochs, lam in (
        ("1/16", 662, 80, 1.5),
        ("1/8", 1323, 80, 1.5),
        ("1/4", 2646, 200, 1.5),
        ("1/2", 5291, 300, 1.5),
        ("92", 92, 80, 0.06),
        ("183", 183, 80, 0.6),
        ("366", 366, 80, 0.6),
        ("732", 732, 80, 0.6),
    )
} | {
    f"cityscapes {name}": CITYSCAPES | dict(labeled=name) | lengths(labels, 2975, epochs, 2, 4)
    for name, labels, epochs in (("1/8", 372, 320), ("1/4", 744, 450), ("1/2", 1488, 550))
}
RECIPES = {
    "shapes": {},
    "folder": PAPER
    | dict(dataset="folder", labeled="all", crop_size=320, iters=20_000, eval_every=2_000),
    "voc": LABELED_SETS["voc 1/8"],
    "cityscapes": LABELED_SETS["cityscapes 1/8"],
}
RELEASED = dict(xi=1e-6, floor=1e-8)  # the released T-VAT's constants: its noise comes out as ~0


# --- the method ---


def ensemble_logits(core: Tensor, assist: Tensor, top: int = 0) -> Tensor:
    """Eq. (4): the mean of the two teachers' logits, of which the softmax is taken afterwards.

    core, assist (B, K, H, W) -> (B, K, H, W). With `top` the released code's assist mask: outside
    its `top` highest classes at a pixel, the assisting teacher's logit gives way to the core's.
    """
    if top:
        highest = assist.topk(min(top, assist.shape[1]), dim=1).indices
        kept = torch.zeros_like(assist, dtype=torch.bool).scatter(1, highest, True)
        assist = torch.where(kept, assist, core)
    return (core + assist) / 2


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
    floor: float = 0.0,
) -> Tensor:
    """T-VAT: the step r, ||r|| <= eps, after which the teachers' prediction differs most.

    r = argmax KL(p(z) || p(z + r)), summed over pixels, where p is the softmax of the mean of the
    two decoders' logits, and z the student's features, encoded (B, C, h, w). One power iteration
    (Miyato et al., 2018): the divergence's gradient at ξ d, d a random direction, scaled to the
    norm eps for each picture.
    Returns r (B, C, h, w), constant, float32 or float64. decoder1, decoder2: encoded -> logits, in
    the mode they are in: put BatchNorm in eval mode first. start: d, of any norm but 0; random when
    None. size: (H, W) to which logits are upsampled first. floor: see `unit`.
    """
    # A small ξ measures the curvature at z exactly, but rounding hides a small step: GPUs convolve
    # float32 as TF32, with 10 bits. With that rounding emulated on trained networks, the cosine to
    # the direction of ξ = 0.01 in float64 was at least 0.98 for ξ = 1, but 0.1 to 0.95 for ξ = 0.1.
    z = encoded.detach().to(torch.promote_types(encoded.dtype, torch.float32))
    d = torch.rand_like(z) - 0.5 if start is None else start.to(z)
    d = unit(d, floor).requires_grad_()

    def log_p(features: Tensor) -> Tensor:
        logits = (decoder1(features) + decoder2(features)) / 2
        if size is not None:  # interpolation is linear: that of the mean is the mean of two
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.log_softmax(dim=1)

    with torch.autocast(z.device.type, enabled=False):
        with torch.no_grad():
            clean = log_p(z)
        with torch.enable_grad():
            divergence = F.kl_div(log_p(z + xi * d), clean, reduction="batchmean", log_target=True)
    # With respect to d alone: no gradient of a decoder's weights is computed or stored.
    (gradient,) = torch.autograd.grad(divergence, d)
    if not floor:  # where the divergence is flat, the start is as good as any other direction
        flat = (gradient == 0).all(dim=(1, 2, 3), keepdim=True)
        gradient = torch.where(flat, d.detach(), gradient)
    return eps * unit(gradient, floor)


def unit(direction: Tensor, floor: float = 0.0) -> Tensor:
    """Each sample of (B, C, h, w) divided by (its L2 norm + floor), tiny samples too.

    A divergence near its minimum has a tiny gradient. A floor of 1e-8, which the released code
    adds, is far larger, and shrinks the result to nothing.
    """
    tiny = torch.finfo(direction.dtype).tiny
    peak = direction.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=tiny)
    scaled = direction / peak  # the largest entry is 1, so that no square underflows
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return scaled / (norm + floor / peak)


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


# --- the strong view of unlabelled pictures ---


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


def mix(tensor: Tensor, masks: Tensor) -> Tensor:
    """CutMix: inside the masks a picture gives way to the one before it in the batch.

    tensor: pictures or logits (B, C, H, W), or maps (B, H, W); masks (B, 1, H, W) bool.
    """
    masks = masks if tensor.ndim == 4 else masks[:, 0]
    return torch.where(masks, tensor.roll(1, 0), tensor)


def zoom(images: Tensor, teacher_logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ZoomIn/Out: a part fills the frame (probability 0.4), or the picture shrinks in it (0.2).

    images (B, 3, H, W) normalised, teacher_logits (B, K, H, W), valid (B, H, W) bool: one draw for
    all. In: a window of 0.1 to 0.3 of the area. Out: 0.3 to 0.5 of the sides, amid padding.
    Pictures are resized bilinearly, targets to the nearest pixel.
    """
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


def zoom_mix(
    images: Tensor, teacher_logits: Tensor, valid: Tensor, cfg: Config
) -> list[Tensor] | tuple[Tensor, ...]:
    """ZoomIn/Out and CutMix, as the flags say, on pictures and on what teaches there alike."""
    together = images, teacher_logits, valid
    if cfg.zoom:
        together = zoom(*together)
    if cfg.cutmix != "off":
        rule = box_masks if cfg.cutmix == "box" else cutmix_masks
        masks = rule(*valid.shape, device=valid.device)
        together = [mix(tensor, masks) for tensor in together]
    return together


# --- training ---


def decoder(network: DeepLabV3Plus) -> Callable[[Tensor], Tensor]:
    """What follows the encoding: (B, width + 48, h, w) -> logits (B, K, h, w), not upsampled."""
    return lambda encoded: network.classify(network.decode(encoded))


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that cannot be right."""
    for name in ("threshold", "ramp", "ema_decay", "strength"):
        if getattr(cfg, name) > 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(cfg, name)}: must be between 0 and 1")
    if cfg.warmup >= 1:
        raise InputError(f"--warmup {cfg.warmup}: must be below 1, the share of the steps")
    if len(cfg.scales) != 2 or cfg.scales[0] > cfg.scales[1]:
        given = " ".join(map(str, cfg.scales))
        raise InputError(f"--scales {given}: must be two numbers, the smaller one first")
    if 0 < cfg.eval_window < 32:
        raise InputError(f"--eval-window {cfg.eval_window}: must be 0, or 32 pixels and more")


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is the mean of the teachers' logits (Ensemble).

    With --supervised-only it is the student. Raises InputError for flags and files that cannot be
    right.
    """
    run = Run("psmt", cfg)
    check_flags(cfg)
    data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
    run.print(data.summary())

    num_classes = len(data.classes)
    build = partial(DeepLabV3Plus, num_classes, cfg.backbone, width=cfg.width)
    student = build(weights=cfg.weights)
    check(data, run.rank, run.world)
    trained, teachers, trained_teachers = run.wrap(student), [], []
    if not cfg.supervised_only and cfg.teachers == "copy":
        teachers = [deepcopy(student) for _ in range(2)]
    elif not cfg.supervised_only:
        weights = cfg.weights if cfg.teachers == "own" else "none"
        teachers = [build(weights=weights) for _ in range(2)]
        trained_teachers = [run.wrap(teacher) for teacher in teachers]
    names = ("student", "teacher1", "teacher2")[: 1 + len(teachers)]
    networks = nn.ModuleDict(zip(names, [student, *teachers], strict=True))
    ensemble = Ensemble(teachers)
    # The learning rate is constant in the warm-up and falls after it.
    warmup = round(cfg.warmup * cfg.iters)
    learning = networks.values() if trained_teachers else [student]
    optimizer, schedule = sgd_poly(learning, cfg.lr, cfg.weight_decay, cfg.iters - warmup)
    state = dict(networks=networks, optimizer=optimizer, schedule=schedule)
    run.start(teachers or [student], data, state)

    strong = photometry(cfg.strength)
    view = partial(views, crop=cfg.crop_size, scales=cfg.scales, strong=strong)
    batches_l = iter(training_loader(data, "labeled", view, **run.drawing))
    if teachers:  # their passes over the unlabelled pictures begin when the warm-up is over
        steps_u = range(max(run.first - warmup, 0), cfg.iters - warmup)
        drawing_u = run.drawing | {"steps": steps_u}
        batches_u = iter(training_loader(data, "unlabeled", view, **drawing_u))
    turn = max(
        len(data.unlabeled) // (cfg.batch_size * run.world), 1
    )  # steps of one pass, after which the other teacher follows
    val = val_loader(data, whole_view, **run.loading)
    window = (cfg.eval_window, math.ceil(cfg.eval_window * 2 / 3)) if cfg.eval_window else None

    def score(network: nn.Module) -> Tensor:
        return iou(evaluate(network, val, num_classes, run.device, window))

    criterion = cross_entropy
    if cfg.ohem:
        criterion = partial(ohem_cross_entropy, min_kept=50_000 * cfg.batch_size)
    options = dict(eps=cfg.eps, size=(cfg.crop_size, cfg.crop_size))
    if cfg.tvat == "released":
        options |= RELEASED

    def adversarial_noise(encoded: Tensor) -> Tensor:
        with evaluating(ensemble):  # running statistics, which stay as they are
            return t_vat(encoded, *map(decoder, teachers), **options)  # r_adv

    for step in run.loop():
        weak_l, labels_l, _, strong_l = run.to_device(next(batches_l))
        semi = bool(teachers) and step >= warmup
        perturb = adversarial_noise if semi and cfg.tvat != "off" else None
        lam = cfg.lam * ramp_up(step - warmup, cfg.ramp * cfg.iters) if semi else 0.0  # λ(t)
        # From the warm-up's end on the teachers learn by averaging alone.
        ensemble.requires_grad_(not semi).train(not (semi and cfg.pseudo_eval))
        for weight in ensemble.parameters() if step == warmup else ():
            optimizer.state.pop(weight, None)  # their momentum
        with run.autocast():
            logits_l = trained(strong_l, perturb)  # (B, K, H, W)
            loss = loss_sup = criterion(logits_l, labels_l)
            loss_conf = 0.0
            if semi:
                weak_u, _, valid, strong_u = run.to_device(next(batches_u))
                active = (step - warmup) // turn % 2  # the teacher that follows the student now
                pair = teachers[active], teachers[1 - active]
                with torch.no_grad():  # Eq. (4)
                    teacher_logits = ensemble_logits(*(t(weak_u) for t in pair), cfg.assist_top)
                # The teachers saw uncut pictures: CutMix cuts their answers as it cuts pictures.
                strong_u, teacher_logits, valid = zoom_mix(strong_u, teacher_logits, valid, cfg)
                logits_u = trained(strong_u, perturb)  # (B, K, H, W)
                valid = valid | cfg.count_padding
                loss_conf = conf_ce_loss(logits_u, teacher_logits, cfg.threshold, valid)
                loss = loss_sup + lam * loss_conf  # L
            else:  # in the warm-up teachers that start apart learn by themselves, from weak views
                for teacher in trained_teachers:
                    loss = loss + criterion(teacher(weak_l), labels_l)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= warmup:
            schedule.step()
        if semi:
            ema_update(teachers[active], student, cfg.ema_decay)
        elif cfg.teachers == "copy":
            for teacher in teachers:
                ema_update(teacher, student, 0.0)
        run.log(step, loss_sup=loss_sup, loss_conf=loss_conf, lam=lam)
        if run.due(step):
            run.average_buffers(networks)
            with run.autocast():
                scores = {name: score(network) for name, network in networks.items()}
                ious = score(ensemble) if teachers else scores.pop("student")
            run.record(step, ious, **scores)

    if run.rank == 0:
        panels(ensemble if teachers else student, data, run.folder / "panels.png", run.device)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES | LABELED_SETS)
