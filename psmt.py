"""Perturbed and Strict Mean Teachers (PS-MT).

Liu, Tian, Chen, Liu, Belagiannis, Carneiro: Perturbed and Strict Mean Teachers for
Semi-supervised Semantic Segmentation, CVPR 2022, arXiv 2111.12903.

A student learns from labels, and on unlabelled pictures from two teachers, whose weights are
moving averages of its own. The average of the two teachers' predictions is more accurate than one
teacher's. Where they are confident, it is taken as a hard label ("strict"), weighted with its
confidence; where they are not, the pixel does not count. Such targets bear a hard test: the
student sees another photometry and CutMix, and noise on its features. That noise is adversarial,
the small step that changes what the teachers' decoders make of the student's features most.

Where to find it (the paper's numbers other than (4) were not at hand)
    Eq. (4)    the ensemble: mean of both teachers' logits, softmax after it   ensemble_logits
    Conf-CE    hard labels, weighted with confidence, above a threshold        conf_ce_loss
    T-VAT      r_adv = argmax KL(p(z) || p(z + r)), ||r|| <= eps               t_vat
    EMA        teacher <- decay teacher + (1 - decay) student                  ema_update
    total      L = L_sup + λ(t) L_conf                                         train, ramp_up
    CutMix, ZoomIn/Out                                                         box_masks, mix, zoom

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

from common.augment import PHOTOMETRY, cutmix_masks, train_view, whole_view
from common.data import check, load, training_loader, val_loader
from common.deeplab import DeepLabV3Plus, Ensemble
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import evaluate, evaluating, iou
from common.optim import sgd_poly
from common.predict import panels
from common.run import InputError, Result, Run, RunConfig, main


@dataclass
class Config(RunConfig):
    """PS-MT's own settings, here those of the embedded dataset; RECIPES has the others."""

    threshold: float = 0.6  # τ: a pixel teaches where the teachers' confidence is at least this
    lam: float = 1.5  # λ, the weight of Conf-CE after its rise: 1.5 on VOC, 3 on Cityscapes
    ramp: float = 0.15  # share of the steps over which λ rises from 0, after the warm-up
    warmup: float = 0.1  # share of the steps that are supervised, at the start
    teachers: Literal["own", "random", "copy"] = "copy"  # how they start: see difference 5
    ema_decay: float = 0.97  # of the teachers: 0.996 in the released code
    tvat: Literal["on", "off", "released"] = "on"  # feature noise; released: its constants
    eps: float = 2.0  # norm of T-VAT's noise, for each picture
    cutmix: Literal["box", "boxes", "off"] = "box"  # one box a picture (VOC), three (Cityscapes)
    zoom: bool = False  # ZoomIn/Out of the strong view
    assist_top: int = 0  # released code: 7 classes are kept of one teacher; 0: a plain mean
    pseudo_eval: bool = False  # teachers in eval mode; the released code's are in training mode
    count_padding: bool = False  # padding of a crop teaches too, as in the released code
    scales: tuple[float, ...] = (0.75, 1.25)  # smallest and largest scale of a training crop
    ohem: bool = False  # L_sup over the hard pixels only: on Cityscapes, as the paper says
    width: int = 64  # channels of ASPP and decoder: 256 in the paper
    eval_window: int = 0  # side of the sliding windows of evaluation, pixels; 0: whole pictures


def lengths(labels: int, unlabeled: int, epochs: int, batch: int) -> dict:
    """The released epochs as steps of `batch` + `batch` pictures, over all processes.

    5 passes over the labelled pictures come first, then `epochs` over the unlabelled ones, the
    first 12 of which λ takes to rise.
    """
    warmup, epoch = 5 * (labels // batch), unlabeled // batch
    iters = warmup + epochs * epoch
    return dict(iters=iters, warmup=warmup / iters, ramp=12 * epoch / iters, eval_every=10 * epoch)


PAPER = dict(
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    teachers="own",
    ema_decay=0.996,
    width=256,
    workers=4,
)
# 32 + 32 pictures, as 8 + 8 on each of 4 GPUs, and lr 0.0025 for each of them. On one GPU the
# released code would take four times as many steps at lr 0.0025. The long side is drawn from 300
# to 1200 pixels, which for VOC's 500 are these scales.
VOC = PAPER | dict(dataset="voc", crop_size=512, lr=0.01, scales=(0.6, 2.4))
# 8 + 8 pictures, as 4 + 4 on each of 2 GPUs.
CITYSCAPES = PAPER | dict(
    dataset="cityscapes",
    crop_size=800,
    batch_size=4,
    lr=0.0045,
    scales=(0.5, 2.0),
    lam=3.0,
    cutmix="boxes",
    ohem=True,
    eval_window=800,
)
# λ and lengths depend on the labelled set: --labeled selects the recipe too. The counts are those
# of the lists of finely labelled VOC pictures; a list of one's own takes the values as flags.
RECIPES = {
    "shapes": {},
    "folder": PAPER
    | dict(
        dataset="folder",
        labeled="all",
        crop_size=320,
        lr=0.0025,
        scales=(0.5, 2.0),
        iters=20_000,
        warmup=0.01,
        eval_every=2_000,
    ),
    "voc 1/16": VOC | dict(labeled="1/16", lam=1.5) | lengths(662, 9920, 80, 32),
    "voc 1/8": VOC | dict(labeled="1/8", lam=1.5) | lengths(1323, 9259, 80, 32),
    "voc 1/4": VOC | dict(labeled="1/4", lam=1.5) | lengths(2646, 7936, 200, 32),
    "voc 1/2": VOC | dict(labeled="1/2", lam=1.5) | lengths(5291, 5291, 300, 32),
    "voc 92": VOC | dict(labeled="92", lam=0.06) | lengths(92, 10_490, 80, 32),
    "voc 183": VOC | dict(labeled="183", lam=0.6) | lengths(183, 10_399, 80, 32),
    "voc 366": VOC | dict(labeled="366", lam=0.6) | lengths(366, 10_216, 80, 32),
    "voc 732": VOC | dict(labeled="732", lam=0.6) | lengths(732, 9850, 80, 32),
    "cityscapes 1/8": CITYSCAPES | dict(labeled="1/8") | lengths(372, 2603, 320, 8),
    "cityscapes 1/4": CITYSCAPES | dict(labeled="1/4") | lengths(744, 2231, 450, 8),
    "cityscapes 1/2": CITYSCAPES | dict(labeled="1/2") | lengths(1488, 1487, 550, 8),
}
RECIPES |= {name: RECIPES[f"{name} 1/8"] for name in ("voc", "cityscapes")}
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
        assist = torch.where(kept & (assist != 0), assist, core)
    return (core + assist) / 2


def conf_ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    threshold: float = 0.6,
    valid: Tensor | None = None,
) -> Tensor:
    """Conf-CE: sum of m c CE(student, y) over sum of m, over the pixels of the batch.

    student_logits, teacher_logits (B, K, H, W) -> (). Per pixel, c is the highest probability of
    the teachers, y its class, and m = 1 where c >= threshold. valid (B, H, W) bool leaves padding
    out. A mean over the passing pixels alone; 0, with zero gradient, where none passes.
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
    Returns r (B, C, h, w), constant, float32 or float64. decoder1, decoder2: encoded -> logits,
    called as they are, so in eval mode if they have BatchNorm. start: d, of any norm, no zeros.
    size: p is taken at these (H, W), upsampled. floor: added to norms, as the released code does.
    """
    # ξ trades the curvature that d sees, for which it should be small, against rounding: on GPUs
    # convolutions of float32 have the 10 bits of TF32, which bury a step of 0.1 (cosine to the
    # exact direction 0.6; at 1, 0.98 and more).
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
    """Each sample of (B, C, h, w) divided by its L2 norm + floor, however small it is.

    Gradients of a divergence near its minimum are tiny. A floor of 1e-8, which the released code
    adds, is far larger than they are, and shrinks the result to nothing.
    """
    peak = direction.abs().amax(dim=(1, 2, 3), keepdim=True)
    peak = peak.clamp(min=torch.finfo(direction.dtype).tiny)
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
    image: Tensor, label: Tensor, crop: int, scales: tuple[float, float]
) -> tuple[Tensor, ...]:
    """A crop with its label and valid pixels, the weak view; and its strong view.

    The scale is uniform between the two of `scales`. Teachers see the weak view, the student the
    strong one: the same pixels after colour jitter, grayscale and blur, labelled pictures too.
    """
    low, high = scales
    scale = low + (high - low) * float(torch.rand(()))
    return train_view(image, label, crop, (scale,), PHOTOMETRY)


def box_masks(
    batch: int, height: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """CutMix masks (B, 1, H, W) bool by the rule for VOC; True where the partner shows.

    The share 1 - β of the sides' product is one draw for the batch, β ~ Beta(4, 4). Each picture
    has a box of its own, its centre at least an eighth of a side from the top and the left; what
    reaches over the border is cut off. 36 % of the pixels on average.
    """
    side = math.sqrt(1 - torch.distributions.Beta(4.0, 4.0).sample())

    def span(length: int) -> Tensor:
        half = int(side * length) // 2
        centre = torch.randint(length // 8, length, (batch, 1))
        positions = torch.arange(length)
        return (positions >= centre - half) & (positions < centre + half)  # (B, length)

    return (span(height)[:, None, :, None] & span(width)[:, None, None]).to(device)


def mix(tensor: Tensor, masks: Tensor) -> Tensor:
    """CutMix: inside the masks a picture gives way to the one before it in the batch.

    tensor: pictures or logits (B, C, H, W), or maps (B, H, W); masks (B, 1, H, W) bool.
    """
    masks = masks if tensor.ndim == 4 else masks[:, 0]
    return torch.where(masks, tensor.roll(1, 0), tensor)


def zoom(images: Tensor, teacher_logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ZoomIn/Out: with probability 0.4 a part fills the picture, with 0.2 it shrinks to a part.

    images (B, 3, H, W) normalised, teacher_logits (B, K, H, W), valid (B, H, W) bool: one draw for
    all. In: a window of 0.1 to 0.3 of the area. Out: 0.3 to 0.5 of the sides, amid padding.
    Pictures are resized bilinearly, targets to the nearest pixel.
    """
    draw, (height, width) = float(torch.rand(())), valid.shape[1:]
    top, left, box_h, box_w, out_h, out_w = 0, 0, height, width, height, width
    if draw < 0.4:
        window = RandomResizedCrop.get_params(images, [0.1, 0.3], [0.995, 1.333])
        top, left, box_h, box_w = window
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


def harder(
    images: Tensor, target: Tensor, valid: Tensor, cfg: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """The strong view's ZoomIn/Out and CutMix, on pictures, teachers' logits and valid pixels."""
    if cfg.zoom:
        images, target, valid = zoom(images, target, valid)
    if cfg.cutmix == "off":
        return images, target, valid
    rule = box_masks if cfg.cutmix == "box" else cutmix_masks
    masks = rule(*valid.shape, device=valid.device)
    return mix(images, masks), mix(target, masks), mix(valid, masks)


# --- training ---


def decoder(network: DeepLabV3Plus) -> Callable[[Tensor], Tensor]:
    """What follows the encoding: (B, 304, h, w) -> logits (B, K, h, w), not upsampled."""
    return lambda encoded: network.classify(network.decode(encoded))


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that cannot be right."""
    for name in ("threshold", "ramp", "ema_decay"):
        if getattr(cfg, name) > 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(cfg, name)}: must be between 0 and 1")
    if cfg.warmup >= 1:
        raise InputError(f"--warmup {cfg.warmup}: must be below 1, the share of the steps")
    if len(cfg.scales) != 2 or cfg.scales[0] > cfg.scales[1]:
        raise InputError(f"--scales {cfg.scales}: must be two numbers, the smaller one first")
    if 0 < cfg.eval_window < 32:
        raise InputError(f"--eval-window {cfg.eval_window}: must be 0, or 32 pixels and more")


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is the mean of the two teachers (Ensemble).

    Raises InputError for flags and files that cannot be right.
    """
    run = Run("psmt", cfg)
    check_flags(cfg)
    data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
    run.print(data.summary())

    num_classes = len(data.classes)
    build = partial(DeepLabV3Plus, num_classes, cfg.backbone, width=cfg.width)
    student, teachers = build(weights=cfg.weights), []
    if not cfg.supervised_only:
        if cfg.teachers == "copy":
            teachers = [deepcopy(student) for _ in range(2)]
        else:
            weights = "none" if cfg.teachers == "random" else cfg.weights
            teachers = [build(weights=weights) for _ in range(2)]
    apart = bool(teachers) and cfg.teachers != "copy"
    check(data, run.rank, run.world)
    networks = nn.ModuleList([student, *teachers])
    trained, *trained_teachers = [run.wrap(network) for network in networks]
    # The learning rate falls after the warm-up. From then on no gradient reaches the teachers, and
    # SGD passes over them.
    warmup = round(cfg.warmup * cfg.iters)
    optimizer, schedule = sgd_poly(
        networks if apart else [student], cfg.lr, cfg.weight_decay, cfg.iters - warmup
    )
    state = dict(networks=networks, optimizer=optimizer, schedule=schedule)
    run.start(teachers or [student], data, state)

    view = partial(views, crop=cfg.crop_size, scales=cfg.scales)
    batches_l = iter(training_loader(data, "labeled", view, **run.drawing))
    # The teachers take turns, a pass over the unlabelled pictures each. The passes begin when the
    # warm-up is over.
    turn = max(len(data.unlabeled) // (cfg.batch_size * run.world), 1)
    if teachers:
        steps_u = range(max(run.first - warmup, 0), cfg.iters - warmup)
        drawing_u = run.drawing | {"steps": steps_u}
        batches_u = iter(training_loader(data, "unlabeled", view, **drawing_u))
    val = val_loader(data, whole_view, **run.loading)
    window = (cfg.eval_window, math.ceil(cfg.eval_window * 2 / 3)) if cfg.eval_window else None
    ensemble = Ensemble(teachers)
    model = ensemble if teachers else student
    others = (
        dict(zip(("student", "teacher1", "teacher2"), networks, strict=False)) if teachers else {}
    )

    def score(network: nn.Module) -> Tensor:
        return iou(evaluate(network, val, num_classes, run.device, window))

    criterion = cross_entropy
    if cfg.ohem:
        criterion = partial(ohem_cross_entropy, min_kept=50_000 * cfg.batch_size)
    noise = dict(eps=cfg.eps, size=(cfg.crop_size, cfg.crop_size))
    if cfg.tvat == "released":
        noise |= RELEASED

    def perturb(encoded: Tensor) -> Tensor:
        with evaluating(ensemble):  # running statistics, which stay as they are
            return t_vat(encoded, *map(decoder, teachers), **noise)  # r_adv

    for step in run.loop():
        images_l, labels_l, _, strong_l = run.to_device(next(batches_l))
        semi = bool(teachers) and step >= warmup
        perturbation = perturb if semi and cfg.tvat != "off" else None
        # The teachers' gradients, and their batch statistics, are those of the warm-up.
        ensemble.requires_grad_(apart and not semi).train(not (semi and cfg.pseudo_eval))
        lam, loss_conf = 0.0, 0.0
        with run.autocast():
            logits_l = trained(strong_l, perturbation)  # (B, K, H, W)
            loss = loss_sup = criterion(logits_l, labels_l)
            if semi:
                images_u, _, valid, strong_u = run.to_device(next(batches_u))
                active = (step - warmup) // turn % 2  # the teacher that follows the student now
                # The teachers see uncut pictures; CutMix then cuts their answers alike.
                with torch.no_grad():
                    logits1, logits2 = teachers[active](images_u), teachers[1 - active](images_u)
                target = ensemble_logits(logits1, logits2, cfg.assist_top)  # Eq. (4)
                strong_u, target, valid = harder(strong_u, target, valid, cfg)
                logits_u = trained(strong_u, perturbation)  # (B, K, H, W)
                valid = valid | cfg.count_padding
                loss_conf = conf_ce_loss(logits_u, target, cfg.threshold, valid)
                lam = cfg.lam * ramp_up(step - warmup, cfg.ramp * cfg.iters)  # λ(t)
                loss = loss_sup + lam * loss_conf  # L
            elif apart:  # each network learns by itself, the teachers from weak views
                logits = [teacher(images_l) for teacher in trained_teachers]
                loss = loss_sup + sum(criterion(x, labels_l) for x in logits)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= warmup:
            schedule.step()
        if semi:
            ema_update(teachers[active], student, cfg.ema_decay)
        elif not apart:
            for teacher in teachers:
                ema_update(teacher, student, 0.0)
        run.log(step, loss_sup=loss_sup, loss_conf=loss_conf, lam=lam)
        if run.due(step):
            run.average_buffers(networks)
            with run.autocast():
                scores = {name: score(network) for name, network in others.items()}
                run.record(step, score(model), **scores)

    if run.rank == 0:
        panels(model, data, run.folder / "panels.png", run.device)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
