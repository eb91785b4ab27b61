"""Directional Context-aware Consistency (CAC).

Lai, Tian, Jiang, Liu, Zhao, Wang, Jia: Semi-supervised Semantic Segmentation with Directional
Context-aware Consistency, CVPR 2021, arXiv 2106.14133.

A network that knows few labels leans on the surroundings of a pixel: in another crop of the
picture the same pixel gets another feature. From each unlabelled picture two overlapping crops are
cut, and in the overlap the two features of a pixel must agree, whatever surrounds them. Only the
less confident of the two moves (the loss is "directional"), and only towards one that is confident
itself. A contrastive loss moves it, which also pushes it away from pixels of other classes: of
both crops, the whole batch and the last steps. Classes are pseudo labels, the network's own.

Where to find it
    Eq. (1)    contrastive loss of an anchor, r = exp(cos / τ)        info_nce
    Eq. (2)    direction: the less confident feature learns           active_anchors
    Eq. (3)    both directions: l_dc(o1, o2) + l_dc(o2, o1)           train
    Eq. (4)    pseudo labels                                          ContrastiveNet.features
    Eq. (5)    negatives of the anchor's own class do not count       info_nce
    Eq. (6)    the loss of one direction, masked                      directional_contrastive_loss
    Eq. (7)    targets whose confidence is not above γ do not teach   active_anchors
    Total      L = L_ce + λ L_dc                                      train
    The two crops, their overlap cell by cell          pair_view, overlapping_crops, counterparts
    F_u, the negatives of both crops, the batch, all processes and the last steps      Bank, train

Differences from the paper (P) and the released code (C) stand at their lines: `grep Δ cac.py`. We
had C and P's equations and tables, not its text. What changes results most:
    1. The mean is over the anchors that learn, as in C; in P, it seems, over a picture's overlap
       (`--mean-over overlap`): a far smaller gradient where few cells are confident.
    2. The loss is exact; C adds 1e-8 to denominator and logarithm, which caps it at 18.4.
    3. Pictures are augmented anew each time; C replays its stored batches within an epoch.
Left out: image-level labels (not in C either), PSPNet, Table 3's row I (a distance, no negatives).

`python cac.py --amp none`: 53.9 mIoU, mean of three seeds (supervised: 46.6), in minutes.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.augment import mean_pad, normalise, to_float, train_view
from common.deeplab import DeepLabV3Plus
from common.flags import (
    Count,
    InputError,
    Part,
    Positive,
    SemiConfig,
    Share,
    Span,
    refuse_silence,
    with_recipe,
)
from common.losses import cross_entropy
from common.optim import sgd_poly
from common.run import Result, Run, main

STRIDE = 8  # pixels: the side of a cell, for which there is one feature
Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass
class Config(SemiConfig):
    """CAC's own settings, here those of the embedded dataset; RECIPES has the released ones.

    Table 3 leaves parts out: II --no-directed --no-class-filter --gamma 0, III --no-class-filter
    --gamma 0, IV --gamma 0, V --no-directed, VI --no-context, VII --no-projector; VIII is all.
    """

    iters: Count = 350  # optimisation steps, the warm-up's included
    eval_every: Count = 175  # steps between two evaluations, each of which writes last.pt
    weight_decay: float = 1e-4  # on all parameters, BatchNorm's and biases included
    backbone_lr: Share = 1.0  # the backbone's learning rate as a share of --lr: 0.1 released
    lam: float = 0.1  # λ, weight of the contrastive loss after the warm-up
    tau: Positive = 0.1  # τ, temperature of Eq. (1)
    gamma: Share = 0.75  # γ of Eq. (7): confidence above which a target teaches; 0: all teach
    warmup: Part = 0.1  # share of the steps, at the start, that learn from labels alone
    bank: int = 8  # earlier batches whose features are negatives too: 0 to 2 released
    mean_over: Literal["active", "overlap"] = "active"  # N of Eq. (1): anchors that learn, or all
    projector: bool = True  # contrast Φ's features; if not, the decoder's
    context: bool = True  # two overlapping crops; if not, two views of one crop
    directed: bool = True  # Eq. (2): only the less confident of two features learns
    class_filter: bool = True  # Eq. (5): negatives are of another class than the anchor
    base_size: Count = 64  # long side in pixels that the scales multiply: about your pictures' own
    scales: Span = (0.75, 1.25)  # smallest, largest long side / --base-size, labelled crops
    pair_scales: Span = (0.8, 1.25)  # the same for crop pairs
    # Δ C: milder colours, and no dropout, for short runs on small pictures of classes that differ
    # in colour.
    strength: Share = 0.2  # of the crop pairs' colours and blur: 1 released
    jitter: bool = False  # colour jitter of labelled crops: on Cityscapes
    dropout: Share = 0.0  # rate in ASPP and decoder, a fifth before the classifier: 0.5 released

    left_out = SemiConfig.left_out + ("lam", "tau", "gamma", "warmup", "bank", "mean_over")
    left_out += ("projector", "context", "directed", "class_filter", "pair_scales", "strength")


# The released code's values. 80 epochs of 1,157 steps, whatever the labelled share; the first 5 are
# the warm-up. 8 + 8 pictures a step, as 4 + 4 on each of 2 GPUs (VOC), 2 + 2 on each of 4
# (Cityscapes).
# Δ C: `1/8` is every eighth of the sorted ids; C has random lists, which `--labeled LIST` takes. Of
# those for Cityscapes the masks, of trainIds, are not read, but the pictures' labelIds.
RELEASED = dict(
    dataset="voc",
    labeled="1/8",
    backbone="resnet50",
    weights="IMAGENET1K_V1",
    crop_size=320,
    iters=92_560,
    eval_every=11_570,
    lr=0.01,
    backbone_lr=0.1,
    warmup=5 / 80,
    bank=1,
    base_size=400,
    scales=(0.5, 2.0),
    pair_scales=(0.8, 2.0),
    strength=1.0,
    dropout=0.5,
    width=256,
    workers=4,
)
CITYSCAPES = dict(dataset="cityscapes", crop_size=720, base_size=2048, lr=0.1, bank=0, jitter=True)
FOLDER = dict(dataset="folder", labeled="all", iters=20_000, eval_every=2_000)
# Ours: the paper has no COCO. 1/32 is the largest share that later papers report; the long side is
# 640 pixels mostly, VOC's 500.
COCO = FOLDER | dict(dataset="coco", labeled="1/32", base_size=512)
RECIPES = {
    "shapes": {},
    "folder": RELEASED | FOLDER,
    "coco": RELEASED | COCO,
    "voc": RELEASED,
    "voc resnet101": RELEASED | dict(backbone="resnet101", bank=2),
    "cityscapes": RELEASED | CITYSCAPES,
}
# Ours: `--weights none`, a small network from nothing, in minutes on a CPU.
SMALL = dict(backbone="resnet18", width=64, crop_size=96, batch_size=4, workers=0)
SMALL |= dict(iters=500, eval_every=100, lr=0.03, backbone_lr=1.0, warmup=0.1, dropout=0.0)
SMALL |= dict(base_size=192, scales=(0.75, 1.25), pair_scales=(0.8, 1.25), strength=0.2)
RECIPES["folder no-weights"] = SMALL


# --- the method (Sec. 3) ---


def info_nce(
    anchor: Tensor,
    target: Tensor,
    labels: Tensor,
    negatives: Tensor,
    negative_labels: Tensor,
    tau: float = 0.1,
) -> Tensor:
    """Eq. (1) of each anchor: -log(r(a, p) / (r(a, p) + sum over n of r(a, n))), r = exp(cos / τ).

    anchor, target (N, D), negatives (M, D) unit vectors; labels (N,), negative_labels (M,) -> (N,).
    """
    scaled = anchor / tau
    positive = (scaled * target).sum(dim=1, keepdim=True)  # (N, 1)  cos(a, p) / τ
    negative = scaled @ negatives.T  # (N, M)  cos(a, n) / τ
    # The target is among the negatives too where the crops disagree on its class, as in C.
    same = labels[:, None] == negative_labels  # M_n,1 = 0 there, Eq. (5)
    scores = torch.cat([positive, negative.masked_fill(same, -math.inf)], dim=1)
    # Δ C: exact. There 1e-8 in the denominator and in the logarithm cap the loss at 18.4, and make
    # it positive where there is no negative.
    return -scores.log_softmax(dim=1)[:, 0]


def active_anchors(
    anchor_conf: Tensor, target_conf: Tensor, gamma: float = 0.75, directed: bool = True
) -> Tensor:
    """M_d,pf, Eqs. (2), (7): which anchors learn, (N,) bool.

    Those whose target is more confident than they, strictly, and more than γ.
    """
    active = target_conf > gamma
    return active & (anchor_conf < target_conf) if directed else active


def directional_contrastive_loss(
    anchor: Tensor,
    target: Tensor,
    anchor_conf: Tensor,
    target_conf: Tensor,
    anchor_labels: Tensor,
    negatives: Tensor,
    negative_labels: Tensor,
    tau: float = 0.1,
    gamma: float = 0.75,
    rows: int = 64,
    directed: bool = True,
    class_filter: bool = True,
    mean_over: str = "active",
) -> Tensor:
    """l_dc(anchor, target), Eq. (6): one direction, the mean of Eq. (1) over the anchors.

    anchor, target (N, D) unit vectors, index-aligned; their confidence and the anchors' pseudo
    labels (N,); negatives (M, D), negative_labels (M,) -> (). Only anchors get a gradient. 0, with
    zero gradient, where no anchor learns. Always in float32 or float64, of which a GPU's products
    may be TF32. mean_over: "active", the anchors that learn, or "overlap", all N. rows: for how
    many anchors at a time the matrix of cosines, rows x M, is held.
    """
    if mean_over not in ("active", "overlap"):
        raise ValueError(f'mean_over is "active" or "overlap", not {mean_over!r}')
    # How many learn decides the shapes below: here the host waits for the device.
    active = active_anchors(anchor_conf, target_conf, gamma, directed).nonzero()[:, 0]
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    labels = anchor_labels[active] if class_filter else torch.full_like(active, -1)  # no class
    # Targets and negatives are constants, as in C (there, negatives because gathering them from all
    # GPUs passes no gradient).
    anchor, target = anchor[active].to(dtype), target.detach()[active].to(dtype)
    negatives = negatives.detach().to(dtype)
    # N x M is large: a slice of anchors at a time, its matrix made anew for the gradient.
    options = dict(use_reentrant=False, preserve_rng_state=False)
    slices = zip(anchor.split(rows), target.split(rows), labels.split(rows), strict=True)
    with torch.autocast(anchor.device.type, enabled=False):
        losses = [
            checkpoint(info_nce, *part, negatives, negative_labels, tau, **options)
            for part in slices
        ]
    # Δ P: N is the number of anchors that learn, in a process's batch, as in C. P writes 1 / N; we
    # read N as the cells of a picture's overlap; "overlap" counts those of the whole batch. 0
    # without any, as in C.
    count = len(active) if mean_over == "active" else len(anchor_conf)
    return torch.cat(losses).sum() / max(count, 1)


class Features(NamedTuple):
    """What the contrastive loss knows of a batch of crops, N cells of STRIDE x STRIDE pixels."""

    phi: Tensor  # (N, D), unit vectors
    conf: Tensor  # (N,), the highest probability
    pseudo: Tensor  # (N,), its class, Eq. (4)

    def at(self, cells: Tensor) -> "Features":
        return Features(*(values[cells] for values in self))


class ContrastiveNet(nn.Module):
    """The segmenter and the projector Φ: one module, so that processes share all its gradients."""

    def __init__(self, network: DeepLabV3Plus, width: int, project: bool = True):
        super().__init__()
        self.network = network
        self.projector = nn.Identity()
        if project:
            self.projector = nn.Sequential(
                nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 128, 1)
            )

    def forward(self, images: Tensor, *crops: Tensor) -> Tensor | tuple[Tensor | Features, ...]:
        """Logits (B, K, H, W) of labelled images; with crops, the Features of each batch too.

        A pass for each, as in C: BatchNorm sees labelled pictures and the two crops apart.
        """
        logits = self.network(images)
        return (logits, *(self.features(crop) for crop in crops)) if crops else logits

    def features(self, images: Tensor) -> Features:
        """(B, 3, H, W) -> Features of B x H/8 x W/8 cells, row by row."""
        decoded = self.network.decode(self.network.encode(images))  # (B, width, H/4, W/4)
        pooled = F.avg_pool2d(decoded, 2)  # (B, width, H/8, W/8), a cell each, as in C
        # The classifier learns from labels alone; conf and pseudo labels are constants. They come
        # from the features' own pass, in training mode with dropout, as in C.
        with torch.no_grad():
            probs = self.network.classify(pooled).softmax(dim=1)
            conf, pseudo = probs.max(dim=1)  # (B, H/8, W/8) each  Eq. (4)
        phi = self.projector(pooled)
        phi = F.normalize(phi.to(torch.promote_types(phi.dtype, torch.float32)), dim=1)
        return Features(phi.permute(0, 2, 3, 1).flatten(0, 2), conf.flatten(), pseudo.flatten())


class Bank:
    """The features of the last batches: with the current ones they are F_u, the negatives.

    Every cell of both crops is a negative, on padding too.
    """

    # Δ C: no sampling; C draws a number of cells, in its settings all of them.
    def __init__(self, batches: int):
        self.past = deque(maxlen=batches)

    def push(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a batch's; all negatives, (M, D) and their classes (M,): those and earlier ones.

        All are constants, without a gradient.
        """
        current = features.detach(), labels
        # Entries of a checkpoint are on the CPU.
        past = [tuple(part.to(labels.device) for part in entry) for entry in self.past]
        everything = [*past, current]
        self.past.append(current)
        return tuple(torch.cat(parts) for parts in zip(*everything, strict=True))

    # Δ C: a resumed run has its bank; there, it begins with none.
    def state_dict(self) -> dict:
        return {"past": list(self.past)}

    def load_state_dict(self, state: dict) -> None:
        self.past.extend(tuple(entry) for entry in state["past"])


# --- data views ---


def overlapping_crops(
    height: int,
    width: int,
    crop: int,
    min_iou: float = 0.1,
    max_iou: float = 1.0,
    stride: int = STRIDE,
    tries: int = 50,
) -> tuple[Box, Box, Box, Box]:
    """Two crop x crop boxes in a picture, and their common rectangle as each of them sees it.

    crop is a multiple of the stride. A picture smaller than the crop counts as padded at the bottom
    and the right; the common rectangle leaves padding out. The second box is the first one moved by
    multiples of the stride, so that all corners of the common rectangle are such multiples. The
    boxes' intersection over union is within the bounds; where none of `tries` draws, from torch's
    generator, has such a one, the second box is the first.
    """

    def draw(size: int) -> int:
        return int(torch.randint(max(size - crop, 0) + 1, ()))

    def move(size: int, start: int) -> int:
        step = (draw(size) - start) // stride * stride
        return step if start + step >= 0 else step + stride

    y, x = draw(height), draw(width)
    for _ in range(tries):
        down, right = move(height, y), move(width, x)
        common = max(crop - abs(down), 0) * max(crop - abs(right), 0)
        if min_iou <= common / (2 * crop**2 - common) <= max_iou:
            break
    else:
        down, right = 0, 0

    def seen(down: int, right: int) -> Box:  # from a box, the other being so far down and right
        top, left = max(0, down), max(0, right)
        bottom = min(crop, crop + down, height // stride * stride)
        end = min(crop, crop + right, width // stride * stride)
        return top, left, max(top, bottom), max(left, end)

    first = y, x, y + crop, x + crop
    second = y + down, x + right, y + down + crop, x + right + crop
    return first, second, seen(down, right), seen(-down, -right)


def counterparts(
    common1: Box, common2: Box, flipped1: bool, flipped2: bool, crop: int, stride: int = STRIDE
) -> Tensor:
    """For each cell of crop 1, row by row, the cell of crop 2 that shows the same place, or -1.

    common1, common2: the common rectangle in the crops before flipping, in pixels -> (cells,)
    int64, for the crops as they are after it.
    """
    side = crop // stride
    cells2 = torch.arange(side**2).view(side, side)
    cells2 = cells2.flip(-1) if flipped2 else cells2
    match = torch.full((side, side), -1)
    (top1, left1, bottom1, right1), (top2, left2, bottom2, right2) = (
        [edge // stride for edge in box] for box in (common1, common2)
    )
    match[top1:bottom1, left1:right1] = cells2[top2:bottom2, left2:right2]
    return (match.flip(-1) if flipped1 else match).flatten()


def jitter(strength: float = 1.0) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2  # here, for it takes a second

    return v2.ColorJitter(*(strength * limit for limit in (0.4, 0.4, 0.4, 0.1)))


def photometry(strength: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Blur, colour jitter and grayscale of a crop (3, H, W) in [0, 1].

    strength in [0, 1] scales the jitter's ranges and the probabilities of blur and grayscale.
    """
    from torchvision.transforms import v2

    blur = v2.GaussianBlur(5, (1.1, 1.1))
    return v2.Compose(
        [
            v2.RandomApply([blur], p=0.5 * strength),
            v2.RandomApply([jitter(strength)], p=0.8),
            v2.RandomGrayscale(p=0.2 * strength),
        ]
    )


def draw_scale(image: Tensor, base_size: int, scales: tuple[float, float]) -> float:
    """The factor that gives a picture (3, H, W) a random long side within scales * base_size."""
    low, high = (int(scale * base_size) for scale in scales)
    return int(torch.randint(low, high + 1, ())) / max(image.shape[-2:])


def labeled_view(
    image: Tensor,
    label: Tensor,
    crop: int,
    base_size: int,
    scales: tuple[float, float],
    change: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A crop of a labelled picture (3, H, W) uint8, perhaps mirrored, changed, and its label."""
    # Δ C: padded on all sides; there at the bottom and the right, as crop pairs are here too.
    scale = draw_scale(image, base_size, scales)
    # Of the views, the one without `change` and the mask of padding are not needed.
    _, label, _, image = train_view(image, label, crop, (scale,), change)
    return image, label


def pair_view(
    image: Tensor,
    label: Tensor,
    crop: int,
    base_size: int,
    scales: tuple[float, float],
    change: Callable[[Tensor], Tensor],
    min_iou: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two overlapping crops (3, crop, crop) of a picture (3, H, W) uint8, and their counterparts.

    Flip and photometry are each crop's own. No label is used.
    """
    # The aligned cells do not see quite the same pixels, as in C: crops are moved by 8 pixels, the
    # backbone's stride is 16, and in a mirrored crop its grid lies 15 pixels off.
    # Δ C: resized bilinearly without antialiasing, as labelled crops are; there, bicubically. Half
    # a pixel of the shorter side is rounded to an even number; there, up.
    scale = draw_scale(image, base_size, scales)
    height, width = (max(round(scale * side), 1) for side in image.shape[-2:])
    image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
    *boxes, common1, common2 = overlapping_crops(height, width, crop, min_iou)
    padding = 0, max(crop - width, 0), 0, max(crop - height, 0)
    views, flipped = [], []
    for top, left, bottom, right in boxes:
        view = to_float(image[:, top:bottom, left:right])
        view = mean_pad(view, padding) if any(padding) else view
        flipped.append(bool(torch.rand(()) < 0.5))
        view = view.flip(-1) if flipped[-1] else view
        views.append(normalise(change(view)))
    return *views, counterparts(common1, common2, *flipped, crop)


def overlap(match: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of counterparts (B, cells) -> aligned indices (n,), (n,) into its B x cells cells."""
    inside = match >= 0
    first = torch.arange(len(match))[:, None] * match.shape[1]  # of each picture
    return inside.flatten().nonzero()[:, 0], (match + first)[inside]


def agreement(o1: Features, o2: Features, gamma: float) -> dict[str, Tensor]:
    """Shares of the overlap's cells: where a target teaches, where the crops disagree."""
    cells = max(len(o1.conf), 1)
    taught = (torch.maximum(o1.conf, o2.conf) > gamma).sum() / cells
    return dict(taught=taught, disagree=(o1.pseudo != o2.pseudo).sum() / cells)


@torch.no_grad()
def shown(
    images: Tensor,
    net: ContrastiveNet,
    crop: int,
    gamma: float,
    directed: bool,
    ious: tuple[float, float],
) -> dict[str, Tensor]:
    """Columns of panels.png: two crops of a picture (1, 3, H, W), and the cells that are taught.

    ious: bounds of the crops' intersection over union.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, max(crop - width, 0), 0, max(crop - height, 0)))
    *boxes, common1, common2 = overlapping_crops(height, width, crop, *ious)
    areas, taught = torch.zeros(2, *padded[:, 0].shape, dtype=torch.uint8)
    features = []
    for number, (top, left, bottom, right) in enumerate(boxes, start=1):
        areas[:, top:bottom, left:right] += number  # 3 where both are
        features.append(net.features(padded[:, :, top:bottom, left:right]))
    cells1, cells2 = overlap(counterparts(common1, common2, False, False, crop)[None])
    conf1, conf2 = features[0].conf[cells1], features[1].conf[cells2]
    first = active_anchors(conf1, conf2, gamma, directed)
    second = active_anchors(conf2, conf1, gamma, directed)
    cells = torch.zeros(crop // STRIDE, crop // STRIDE, dtype=torch.uint8)
    cells.view(-1)[cells1] = (first + 2 * second).byte().cpu()
    top, left, bottom, right = boxes[0]
    large = cells.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    taught[:, top:bottom, left:right] = large
    return {
        "crop 1 yellow, 2 blue, both green": areas[:, :height, :width],
        "taught in 1 yellow, in 2 blue": taught[:, :height, :width],
    }


# --- training (Sec. 4) ---


def recipe(dataset: str, **changes: Any) -> Config:
    """The settings of a dataset's recipe, and what is to differ: what the command line makes."""
    return with_recipe(Config, RECIPES, dataset=dataset, **changes)


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that do not go together."""
    of_the_loss = [] if cfg.lam else ["tau", "bank", "mean_over", "directed", "class_filter"]
    refuse_silence(cfg, RECIPES, **dict.fromkeys(of_the_loss, "with --lam 0"))
    for name in ("scales", "pair_scales"):
        low, flag = getattr(cfg, name)[0], name.replace("_", "-")
        if low * cfg.base_size < STRIDE:
            raise InputError(
                f"--{flag} {low}: times --base-size {cfg.base_size} is under {STRIDE} pixels"
            )


def train(cfg: Config) -> Result:
    """Run the experiment; the result's model is the network without Φ.

    Raises InputError for flags and files that cannot be right.
    """
    run = Run("cac", cfg)
    check_flags(cfg)
    data = run.load()

    build = partial(DeepLabV3Plus, len(data.classes), cfg.backbone, cfg.weights, cfg.width)
    drop = dict(aspp_dropout=cfg.dropout, decoder_dropout=cfg.dropout)
    network = build(**drop, classifier_dropout=cfg.dropout / 5)
    net = ContrastiveNet(network, cfg.width, cfg.projector and not cfg.supervised_only)
    trained = run.wrap(net, find_unused=True)  # the warm-up does not use Φ
    bank = Bank(cfg.bank)
    head = nn.ModuleList(part for part in network.children() if part is not network.backbone)
    # Φ gets no gradient before the warm-up ends, and a fused SGD begins the momentum of a group all
    # at once: Φ is a group of its own.
    parts = [network.backbone, head, net.projector]
    options = dict(shares=[cfg.backbone_lr, 1.0, 1.0], decay_all=True)
    optimizer, schedule = sgd_poly(parts, cfg.lr, cfg.weight_decay, cfg.iters, **options)
    state = dict(network=net, optimizer=optimizer, schedule=schedule, bank=bank)
    run.start(data, [network], **state)

    size = dict(crop=cfg.crop_size, base_size=cfg.base_size)
    change_l, change_u = jitter() if cfg.jitter else nn.Identity(), photometry(cfg.strength)
    view_l = partial(labeled_view, **size, scales=cfg.scales, change=change_l)
    view_u = partial(pair_view, **size, scales=cfg.pair_scales, change=change_u)
    if not cfg.context:  # an IoU of 1: the first box itself, at the latest after all tries
        view_u = partial(view_u, min_iou=1.0)
    warmup = cfg.iters if cfg.supervised_only else round(cfg.warmup * cfg.iters)
    batches_l = run.batches("labeled", view_l)
    # Δ C: passes over the unlabelled pictures begin after the warm-up; there, at the start.
    batches_u = run.batches("unlabeled", view_u, begin=warmup)
    if not cfg.supervised_only:
        ious = (0.1, 0.9) if cfg.context else (1.0, 1.0)  # crops that differ, where they can
        how = dict(crop=cfg.crop_size, gamma=cfg.gamma, directed=cfg.directed, ious=ious)
        run.show = partial(shown, net=net, **how)
    contrast = partial(
        directional_contrastive_loss,
        tau=cfg.tau,
        gamma=cfg.gamma,
        directed=cfg.directed,
        class_filter=cfg.class_filter,
        mean_over=cfg.mean_over,
    )

    for step in run.loop():
        # Δ C: pictures are augmented anew each time; there, an epoch replays its stored batches.
        images_l, labels_l = run.to_device(next(batches_l))
        others = {}
        if step < warmup:
            with run.autocast():
                loss = loss_sup = cross_entropy(trained(images_l), labels_l)  # L_ce
        else:
            crop1, crop2, match = next(batches_u)
            # Cells are paired on the host: the device's `nonzero` would have to be waited for.
            cells1, cells2 = run.to_device(overlap(match))  # the same places in both crops
            crop1, crop2 = run.to_device([crop1, crop2])
            with run.autocast():
                logits_l, u1, u2 = trained(images_l, crop1, crop2)
                loss_sup = cross_entropy(logits_l, labels_l)  # L_ce
                phi = run.gather(torch.cat([u1.phi, u2.phi]))
                pseudo = run.gather(torch.cat([u1.pseudo, u2.pseudo]))
                negatives, classes = bank.push(phi, pseudo)  # F_u
                o1, o2 = u1.at(cells1), u2.at(cells2)
                loss_12 = contrast(o1.phi, o2.phi, o1.conf, o2.conf, o1.pseudo, negatives, classes)
                loss_21 = contrast(o2.phi, o1.phi, o2.conf, o1.conf, o2.pseudo, negatives, classes)
                loss_dc = loss_12 + loss_21  # L_dc, Eq. (3)
                loss = loss_sup + cfg.lam * loss_dc  # L
            others = dict(loss_dc=loss_dc, **agreement(o1, o2, cfg.gamma))

        run.backward(loss / cfg.accum)
        if run.more_to_come:  # with --accum N the loop comes N times to a step
            continue
        run.update(optimizer)
        optimizer.zero_grad()
        schedule.step()
        run.log(step, loss_sup=loss_sup, **others)
        run.evaluate(step)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
