"""Iterative Affinity Learning (IAL).

Wang, Liu, Ma, Yang: Weakly-Supervised Semantic Segmentation by Iterative Affinity Learning, IJCV
2020, arXiv 2002.08098.

From image-level tags alone. A classifier of tags shows where it looks: seeds. They train a unary
network, the segmenter. Superpixels on which its predictions agree train a region network; it judges
all superpixels by what regions of a class have in common, and those it is sure of are mined. They
train a pairwise network, which learns the affinity G of pixels from the picture. G carries unary
predictions from pixel to pixel; they train the next unary network: each learns from the other.

We had neither the paper's text nor code. Marks: [paper], its abstract, figures, tables, formulas
that a review reports; [cited: ...], SPN (Liu et al. 2017), PSA (Ahn, Kwak 2018), IRN (Ahn et al.
2019), MCOF (Wang et al. 2018); [ours]. `grep Δ ial.py` lists what is not [paper].

Where to find it
    CAM, seeds Y_0           TagNet, activation_maps, seeds
    80 % rule                majority_labels
    L_m = -Σ L_ij log f^m    RegionNet, region_loss; mine, for Y_t
    α^p = G α^u              GuidanceNet, propagate
    J = α^T L α, EM          energy, and the lines at the top of its section
    L_α = -Y^T log α^p       affinity_loss
    L_s = ||G - G_s||^2      smoothness_loss

Stage               reads, beside the pictures             writes: labels at pixels, °maps at cells
    find_superpixels                                       superpixels
    find_seeds      tags, superpixels                      cam°, seeds
    train_unary     tags, superpixels, seeds or labels     unary°, majority
    mine_regions    tags, superpixels, majority            mined
    train_pairwise  superpixels, mined, unary°             (the network g_t)
    refine          tags, unary°                           refined°, labels
All of round t; only the labels that train_unary reads are those of round t - 1. refine also reads
what two flags ask for: mined (--clamp), superpixels (--project).

Choices that change results, all [ours]: gates are a softmax, and G is the mean of four scans where
SPN takes their maximum, so that G is a matrix whose rows sum to 1; G_s = P G; mining relabels;
f^m sees little around a superpixel; f_t, f^m, g_t start anew in each round; SLIC, and no CRF.

`python ial.py --amp none`: 65.5 mIoU, mean of three seeds (--method direct: 59.9), in minutes.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

from common.augment import normalise, random_flip, train_view
from common.deeplab import ConvBNReLU, DeepLabV3Plus, dilated_resnet
from common.flags import (
    Backbone,
    Batch,
    Count,
    InputError,
    Positive,
    RunConfig,
    Share,
    Side,
    check_config,
    refuse_silence,
    with_recipe,
)
from common.losses import VOID, cross_entropy
from common.maps import Maps, at_pixels, pad
from common.optim import sgd_poly
from common.run import Result, Run, main
from common.slic import slic
from common.tags import load_tagged


@dataclass
class Config(RunConfig):
    """IAL's settings for the embedded dataset; RECIPES has the others."""

    # Δ P: [ours] every value below that names no source.
    iters: Count = 240  # steps of a unary network; the other networks' are shares of them
    eval_every: Count = 120  # steps of a unary network between two looks at its mIoU
    crop_size: Side = 64  # side of a training crop in pixels, a multiple of 8
    batch_size: Batch = 16  # pictures per process
    lr: Positive = 0.06  # of the unary networks, falling to 0 in each round
    background: str = ""  # names of the classes, with commas between, that become class 0
    method: Literal["ial", "direct", "unary", "cam"] = "ial"  # direct: no G; unary: f_1; cam: seeds
    rounds: Count = 2  # T, times that f and g train each other: 5 in the paper
    net: Literal["small", Backbone] = "small"  # the other three networks; in recipes as --backbone
    net_lr: Positive = 0.2  # learning rate of the classifier, region and pairwise networks
    net_steps: tuple[float, ...] = (1.2, 0.5, 1.8)  # classifier, region, pairwise: shares of iters
    clip: Positive = 5.0  # largest norm of a gradient: f begins at 10, g with --rule abs at 80
    tag_scales: tuple[float, ...] = (1.0,)  # scales of the classifier's training crops
    cam_scales: tuple[float, ...] = (1.0,)  # scales of a picture whose activation maps are summed
    fg: Share = 0.3  # a seed of a class is a superpixel with activation above this (cited: IRN)
    bg: Share = 0.05  # a seed of background: one with all activations below this (cited: IRN)
    scales: tuple[float, ...] = (1.0,)  # scales of the unary networks' training crops
    segment_size: Count = 6  # side of a superpixel in pixels, about
    compactness: float = 20.0  # of superpixels: weight of place against colour
    share: Share = 0.8  # of a superpixel's pixels that have to agree on a class (paper)
    balance: bool = True  # classes weigh the same in L_m: ours; else regions do (paper)
    mining: Literal["relabel", "agree", "rule80"] = "relabel"  # agree: as reviewed; rule80: no f^m
    tau: Share = 0.7  # τ: least confidence of a mined region; ours, from the colours of Fig. 4
    stride: Count = 2  # side of a cell in pixels: maps are propagated from cell to cell
    rule: Literal["softmax", "abs"] = "softmax"  # how logits become gates (abs cited: SPN)
    scans: Literal["mean", "sequence"] = "mean"  # G: the four scans' mean, or their product
    passes: Count = 2  # how often G is applied (cited: SPN)
    lam: float = 0.3  # λ, weight of the smoothness loss
    probes: Count = 2  # R, random maps that estimate the smoothness loss
    clamp: bool = False  # propagate mined labels where there are any: ours, not the paper's
    project: bool = False  # labels are those of P G α^u, means over superpixels: ours


# Δ P: [ours] lengths and rates, one rate for all layers; crops of 320 pixels. The classifier's
# scales keep PSA's proportions [cited], crops of 448 pixels of long sides of 256 to 512; VOC's long
# sides are 500. At the unary's scales a crop would show 60 % of a picture, on average, and yet
# carry all its tags.
REAL = dict(backbone="resnet50", weights="IMAGENET1K_V1", width=256, crop_size=320, workers=4)
REAL |= dict(iters=20_000, eval_every=10_000, lr=0.005, weight_decay=5e-4, rounds=5, batch_size=8)
REAL |= dict(net_lr=0.01, net_steps=(0.33, 0.25, 0.5), stride=4, probes=4)
REAL |= dict(tag_scales=(0.4, 0.5, 0.6, 0.7), cam_scales=(0.5, 1.0, 1.5, 2.0))
REAL |= dict(scales=(0.5, 0.75, 1.0, 1.25, 1.5), segment_size=13, compactness=10.0)
# Δ P: [ours] COCO of 2017, its 118,287 training pictures; which ones the paper has is not known to
# us. The classifier's scales are for long sides of 640 pixels.
RECIPES = {name: REAL | dict(dataset=name) for name in ("folder", "voc", "coco", "cityscapes")}
RECIPES["coco"] |= dict(tag_scales=(0.3, 0.4, 0.5))
RECIPES["cityscapes"] |= dict(tag_scales=(0.1, 0.15), cam_scales=(0.125, 0.25, 0.375, 0.5))
# Δ P: [ours] all networks have one kind of encoder.
RECIPES |= {f"{name} {net}": dict(net=net) for name in RECIPES for net in get_args(Backbone)}
RECIPES["shapes"] = {}
# Ours: `--weights none`, a small network from nothing, in minutes on a CPU.
SMALL = dict(backbone="resnet18", width=64, crop_size=96, batch_size=4, workers=0)
SMALL |= dict(iters=500, eval_every=100, lr=0.03, net="small", net_lr=0.1, rounds=2)
RECIPES["folder no-weights"] = SMALL


# --- seeds: a classifier of tags, and where it looks ---

resize = partial(F.interpolate, mode="bilinear", align_corners=False)


def trunk(net: str, weights: str, depth: int, small: list) -> tuple[nn.Sequential, list[int]]:
    """An encoder's stages and their widths.

    A ResNet gives its first `depth` stages, at strides 2, 4, 8, 16, 16; "small" gives 3x3
    convolutions, each a (width, stride, dilation) of the list.
    """
    if net == "small":
        widths = [width for width, _, _ in small]
        layers = zip([3, *widths], small, strict=False)
        stages = [ConvBNReLU(c, w, 3, stride, dilation=d) for c, (w, stride, d) in layers]
        return nn.Sequential(*stages), widths
    resnet = dilated_resnet(net, weights)
    first = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
    second = nn.Sequential(resnet.maxpool, resnet.layer1)
    stages = [first, second, resnet.layer2, resnet.layer3, resnet.layer4]
    widths = [64, *(resnet.layer1[0].expansion * width for width in (64, 128, 256, 512))]
    return nn.Sequential(*stages[:depth]), widths[:depth]


class TagNet(nn.Sequential):
    """The tag classifier: images (B, 3, H, W) -> scores (B, K, h, w), whose mean is a picture's."""

    def __init__(self, num_tags: int, net: str, weights: str):
        # Δ P: [cited: IRN] a ResNet of stride 16; [ours] the dilations of its last stage, which
        # are the unary's; the small network.
        stages, widths = trunk(net, weights, 5, [(16, 2, 1), (32, 2, 1), (64, 1, 1)])
        super().__init__(*stages, nn.Conv2d(widths[-1], num_tags, 1, bias=False))


@torch.no_grad()
def activation_maps(net: TagNet, images: Tensor, tags: Tensor, scales: Sequence[float]) -> Tensor:
    """CAM [paper]: where in a picture the classifier finds a class.

    images (B, 3, H, W), tags (B, K) -> (B, K, H, W) in [0, 1], 0 for absent classes.
    """
    total = 0.0
    for scale in scales:  # Δ P: [cited: PSA] the sum over scales and flips, over its maximum
        scaled = resize(images, [max(round(scale * side), 32) for side in images.shape[2:]])
        total = total + resize(net(scaled).relu(), images.shape[2:])
        total = total + resize(net(scaled.flip(-1)).relu(), images.shape[2:]).flip(-1)
    total = total * tags[:, :, None, None]
    return total / total.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)


def seeds(cams: Tensor, tags: Tensor, fg: float, bg: float) -> Tensor:
    """Y_0 from activation maps: a class above fg, background below bg, unknown between.

    cams (B, K, H, W) in [0, 1], tags (B, K) bool -> (B, H, W) int64, 0 the background, 255 unknown.
    Only a picture's own tags count; without any it is all background.
    """
    # Δ P: [cited: IRN] two thresholds, [ours] without its CRF; the paper shows seeds, no rule.
    score, best = cams.masked_fill(~tags[:, :, None, None], -torch.inf).max(dim=1)  # (B, H, W)
    return torch.where(score > fg, best + 1, torch.where(score < bg, 0, VOID))


# --- mining: confident regions ---


def segment_mean(values: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (B, S, C) of values (B, C, H, W) over each segment, and pixel counts (B, S) int64.

    segments (B, H, W) int64, ids below count = S; an empty one has mean 0.
    """
    # In half precision a sum over many pixels would lose its digits.
    values = values.to(torch.promote_types(values.dtype, torch.float32)).flatten(2)
    index = segments.flatten(1)
    sums = values.new_zeros(*values.shape[:2], count)
    sums = sums.scatter_add(2, index[:, None].expand_as(values), values)  # (B, C, S)
    sizes = index.new_zeros(len(index), count).scatter_add_(1, index, torch.ones_like(index))
    return (sums / sizes.clamp(min=1)[:, None]).mT, sizes


def project(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """P values, (B, C, H, W): P_ij = 1 / |S(i)| where i and j share the segment S(i), else 0."""
    means, _ = segment_mean(values, segments, count)
    index = segments.flatten(1)[:, None].expand(-1, values.shape[1], -1)
    return means.mT.gather(2, index).view(values.shape)


def paint(labels: Tensor, segments: Tensor) -> Tensor:
    """Labels of superpixels (B, S) -> of their pixels (B, H, W)."""
    return labels.gather(1, segments.flatten(1)).view_as(segments)


def of_segments(painted: Tensor, segments: Tensor, count: int) -> Tensor:
    """The inverse of `paint`: (B, H, W) -> (B, S), void for a superpixel without pixels."""
    labels = torch.full((len(painted), count), VOID, device=painted.device)
    return labels.scatter(1, segments.flatten(1), painted.flatten(1))


def majority_labels(
    unary_labels: Tensor, segments: Tensor, count: int, num_classes: int, share: float = 0.8
) -> Tensor:
    """The 80 % rule [paper]: the class that `share` of a superpixel's pixels or more agree on.

    unary_labels, segments (B, H, W) -> (B, S) int64; 255 where no class has that share.
    """
    columns = num_classes + 1  # one more, for pixels of 255: they agree with none, but count
    votes = segments.flatten(1) * columns + unary_labels.flatten(1).long().clamp(max=num_classes)
    counts = votes.new_zeros(len(votes), count * columns)
    counts = counts.scatter_add_(1, votes, torch.ones_like(votes)).view(-1, count, columns)
    most, label = counts[..., :num_classes].max(dim=2)
    # 80 of 100 pixels are enough, however 0.8 is rounded.
    agreed = (most > 0) & (most >= (share - 1e-6) * counts.sum(dim=2))
    return torch.where(agreed, label, VOID)


class RegionNet(nn.Module):
    """f^m: features pooled in a superpixel, those outside left out [paper], then classified.

    images (B, 3, H, W), segments (B, h, w) at the cells, ids below count = S -> logits (B, S, C).
    """

    def __init__(self, num_classes: int, net: str, weights: str):
        super().__init__()
        # Δ P: [ours] a narrow field of view: 7 pixels of `small`, for superpixels of 6; 35 of
        # ResNet-50's first two stages, for 13 (ResNet-18's: 43). A wide one repeats what the unary
        # network saw; this one finds what regions of a class share.
        self.stages, widths = trunk(net, weights, 2, [(24, 2, 1), (48, 1, 1)])
        # Δ P: [ours] one hidden layer of 128, where Fast R-CNN has fc6 and fc7.
        self.head = nn.Sequential(
            nn.Linear(widths[-1], 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)
        )

    def forward(self, images: Tensor, segments: Tensor, count: int) -> Tensor:
        # Δ P: [ours] a superpixel's mean; the paper pools a grid of its box, as Fast R-CNN does.
        features = resize(self.stages(images), segments.shape[1:])
        return self.head(segment_mean(features, segments, count)[0])


def region_loss(logits: Tensor, labels: Tensor, balance: bool = True) -> Tensor:
    """L_m = -Σ L_ij log f^m(S_ij) [paper] over the regions whose label is known; 0 without any.

    logits (B, S, C) of f^m, labels (B, S), 255 unknown -> ().
    """
    kinds = logits.shape[2]
    onehot = F.one_hot(labels.clamp(max=kinds), kinds + 1)[..., :kinds]  # (B, S, C), 0 of 255
    losses = -(onehot * logits.float().log_softmax(dim=2)).sum(dim=(0, 1))  # (C,)
    sizes = onehot.sum(dim=(0, 1))
    # Δ P: [ours] a mean, not a sum; by default over classes, of the mean over a class's regions:
    # most are background.
    if balance:
        return (losses / sizes.clamp(min=1)).sum() / (sizes > 0).sum().clamp(min=1)
    return losses.sum() / sizes.sum().clamp(min=1)


def mask_tags(probs: Tensor, tags: Tensor) -> Tensor:
    """Probabilities with the classes that a picture's tags exclude set to 0, renormalised.

    probs (B, K + 1, ...), class 0 the background, always possible; tags (B, K) bool. Where nothing
    is left, all possible classes are equally likely.
    """
    # Δ P: [cited: MCOF] absent classes go; [ours] renormalising.
    possible = F.pad(tags, (1, 0), value=True)  # (B, K + 1)
    possible = possible.view(*possible.shape, *[1] * (probs.ndim - 2)).to(probs.dtype)
    # torch.where, not a product: an absent class may be NaN or infinite for all we care.
    kept = torch.where(possible > 0, probs, 0.0)
    total, uniform = kept.sum(dim=1, keepdim=True), possible / possible.sum(dim=1, keepdim=True)
    return torch.where(total == 0, uniform, kept / total.masked_fill(total == 0, 1.0))


def mine(
    region_probs: Tensor | None, majority: Tensor, tags: Tensor, tau: float, mode: str = "relabel"
) -> Tensor:
    """Y_t on superpixels (B, S) int64: a class where the region network is confident, else 255.

    region_probs (B, S, K + 1), majority (B, S) from `majority_labels`, tags (B, K) bool. Confident:
    the probability, renormalised over the picture's own classes, is tau or more.
    """
    if mode == "rule80":  # Δ P: [ours] no region network: the majority's label
        possible = F.pad(F.pad(tags, (1, 0), value=True), (0, VOID - tags.shape[1]))  # (B, 256)
        labels, known = majority, possible.gather(1, majority)
    elif mode in ("relabel", "agree"):
        conf, labels = mask_tags(region_probs.mT, tags).max(dim=1)  # (B, S)
        known = conf >= tau  # False where conf is NaN
        # agree [paper, by a review]: regions that contradict their majority's label are removed.
        # Δ P: [ours] so are those without one. relabel, as we read Fig. 4: noisy regions are
        # removed, and some corrected.
        known = known & (labels == majority) if mode == "agree" else known
    else:
        raise ValueError(f'mode is "relabel", "agree" or "rule80", not {mode!r}')
    return torch.where(known, labels, VOID)


# --- affinity: α^p = G α^u ---

# Energy and EM [paper]. The N pixels of a map are a graph of weights W >= 0, D = diag(W 1); its
# Laplacian is D - W, and G = I - D + W, a matrix N x N whose rows sum to 1.
# J(α) = α^T (D - W) α = 1/2 sum of w_ij (α_i - α_j)^2 for symmetric W; the sought α minimises it.
#   E-step       dJ/dα = 2 (D - W) α; a step of length 1/2 gives α^p = α^u - (D - W) α^u = G α^u.
#   M-step of g  -log p >= 1 - p, and rows of Y sum to 1, so that -Y^T log α^p >= N - Y^T G α^u. For
#                Y = α^u that is N - |α^u|^2 + J(α^u) if G is symmetric: up to what g cannot
#                change, the loss bounds J from above.
#   M-step of f  f learns α^p.
# With Y = α^u, G = I would be a minimiser: nothing to learn. Hence the mined Y, of which it is
# expected, not proved, that Y^T (D - W) α <= α^T (D - W) α. J falls in each E-step if G is
# symmetric with a spectrum in (-1, 1]. A G of scans is not, and SGD on f and g promises nothing:
# the logged energies show what happened.
# Δ P: [ours] the length 1/2 and the bound's derivation; as reviewed, the paper drops the one and
# argues for the other that the logarithm is monotone.


def propagate(
    values: Tensor, gates: Tensor, passes: int = 1, rule: str = "softmax", scans: str = "mean"
) -> Tensor:
    """G^passes applied to a map. The scans are SPN's [cited]; that to the right is

        h[r, c] = own[r, c] x[r, c] + sum over k = -1, 0, 1 of gate_k[r, c] h[r + k, c - 1]

    values (B, C, H, W); gates (B, 4 scans, 4 sources, H, W), logits, see `gate_weights` ->
    (B, C, H, W), float32 at least. scans: G is their "mean", or "sequence", their product.
    """
    if scans not in ("mean", "sequence"):
        raise ValueError(f'scans is "mean" or "sequence", not {scans!r}')
    values, gates = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (values, gates))
    # Δ P: [ours] one G for all classes: a map that sums to 1 over classes still does.
    weights = gate_weights(gates, rule)  # (B, 4, 4, H, W)
    # Δ P: [ours] mean or product; SPN's maximum is not linear, there would be no G.
    apply = mean_of_scans if scans == "mean" else scans_in_sequence
    # Δ P: [cited: SPN] more than one pass with the same gates; [ours] each is read as an E-step.
    return apply(values, weights, passes)


def mean_of_scans(values: Tensor, weights: Tensor, passes: int) -> Tensor:
    """`propagate` with G = (G1 + G2 + G3 + G4) / 4; weights (B, 4, 4, H, W) of `gate_weights`."""
    batch, _, height, width = values.shape
    side = max(height, width)
    square = (0, side - width, 0, side - height)  # what to add: zeros, which feed nothing
    weights = F.pad(weights, square).unbind(1)
    neighbours, own = to_lines(*weights).split((3, 1), dim=1)  # (M, 3, J), (M, 1, J)
    for _ in range(passes):
        whole = F.pad(values, square)
        lines = Scan.apply(own * to_lines(whole, whole, whole, whole), neighbours)  # (M, C, J)
        right, left, down, up = lines.unflatten(2, (4, batch, side)).unbind(2)  # (M, C, B, M)
        columns, rows = right + left.flip(0), down + up.flip(0)
        values = (columns.permute(2, 1, 3, 0) + rows.permute(2, 1, 0, 3)) / 4
        values = values[..., :height, :width]
    return values


def scans_in_sequence(values: Tensor, weights: Tensor, passes: int) -> Tensor:
    """`propagate` with G = G4 G3 G2 G1: to the right, of that to the left, then down, then up.

    One pass can fill an object from any part of it. In the mean it cannot: what one scan brings to
    a pixel counts a quarter, for the other three did not bring it.
    """

    def lines_of(maps: Tensor) -> Tensor:
        """(B, C, M, L) -> (M, C, J): M lines of length L, of all pictures end to end, J = B L."""
        return maps.transpose(0, 2).flatten(2)

    right, left, down, up = weights.unbind(1)
    columns = lines_of(right.mT), lines_of(left.mT).flip(0)
    rows = lines_of(down), lines_of(up).flip(0)
    for _ in range(passes):
        for pair in (columns, rows):
            values = values.mT  # (B, C, W, H), and back
            lines = lines_of(values)
            for weight in pair:
                neighbours, own = weight.split((3, 1), dim=1)  # (M, 3, J), (M, 1, J)
                # Flipped, the last line comes first: the opposite scan's start; then flipped back.
                lines = Scan.apply(own * lines, neighbours).flip(0)
            values = lines.unflatten(2, (len(values), -1)).transpose(0, 2)
    return values


def gate_weights(gates: Tensor, rule: str = "softmax") -> Tensor:
    """The weights of a pixel's sources, sum 1: gates (B, 4, 4, H, W) -> (B, 4, 4, H, W).

    Axis 1: the scan left to right, right to left, top to bottom, bottom to top. Axis 2: the
    previous line's neighbour before (row r - 1, or column c - 1), same, after, and the pixel's own
    value. A source outside the picture has weight 0, and the others still sum to 1 [cited: SPN].
    """
    if rule not in ("softmax", "abs"):
        raise ValueError(f'rule is "softmax" or "abs", not {rule!r}')
    exists = torch.ones(4, 3, *gates.shape[-2:], dtype=torch.bool, device=gates.device)
    exists[0, ..., 0] = exists[1, ..., -1] = False  # the first columns of the horizontal scans
    exists[2, :, 0] = exists[3, :, -1] = False  # the first rows of the vertical ones
    exists[:2, 0, 0] = exists[:2, 2, -1] = False  # no row before the first, none after the last
    exists[2:, 0, :, 0] = exists[2:, 2, :, -1] = False  # and no column
    if rule == "softmax":
        # Δ P: [ours] over the sources that exist. No weight is negative, hence G >= 0: the graph
        # that the paper's theory asks for.
        exists = F.pad(exists, (0, 0, 0, 0, 0, 1), value=True)  # a pixel's own value always does
        return gates.masked_fill(~exists, -torch.inf).softmax(dim=2)
    z = gates[:, :, :3]  # as in SPN's code: of any sign; own is what is missing to 1
    weights = z / z.abs().sum(dim=2, keepdim=True).clamp(min=1e-6) * exists
    return torch.cat([weights, 1 - weights.sum(dim=2, keepdim=True)], dim=2)


def to_lines(right: Tensor, left: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Four maps (B, C, M, M), one for each scan -> M lines (M, C, J) in the order of scanning.

    For the mean all scans run in one loop. A line is a column for `right` and `left`, a row for
    `down` and `up`; those of all scans and pictures lie end to end, J = 4 B M.
    """
    columns, rows = (3, 1, 0, 2), (2, 1, 0, 3)  # -> (M, C, B, M)
    right, left = right.permute(columns), left.permute(columns).flip(0)
    down, up = down.permute(rows), up.permute(rows).flip(0)
    return torch.stack([right, left, down, up], dim=2).flatten(2)


def scan(x: Tensor, gates: Tensor, step: int = 1) -> Tensor:
    """h_t = x_t + before_t R h_(t-1) + same_t h_(t-1) + after_t R' h_(t-1), line by line.

    x (M, C, J), weighted already, gates (M, 3, J), 0 at pictures' borders -> h (M, C, J + 2), a
    place more at each end. R shifts a line by a place to the right, R' to the left. Step -1: from
    the last line to the first, R and R' exchanged.
    """
    h = F.pad(x, (1, 1))
    # Views of h, by line: what is added to here[t], in place, becomes h_t.
    sources = [h[..., k : k + x.shape[2]].unbind() for k in range(3)]  # R h, h, R' h
    first, here, last = sources[::step]
    before, same, after = (gate.unbind() for gate in gates[:, :, None].unbind(1))
    for t in range(len(h))[::step][1:]:
        now = here[t].addcmul_(before[t], first[t - step])
        now.addcmul_(same[t], here[t - step]).addcmul_(after[t], last[t - step])
    return h


class Scan(torch.autograd.Function):
    """`scan` with a gradient that keeps h and the gates, not every product of every step."""

    @staticmethod
    def forward(ctx, x: Tensor, gates: Tensor) -> Tensor:
        h = scan(x, gates)
        ctx.save_for_backward(h, gates)
        return h[..., 1:-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        # The adjoint is a scan from the other end, with the gates of the line that it leaves:
        # d_t = grad_t + R' (before d)_(t+1) + (same d)_(t+1) + R (after d)_(t+1), where d is the
        # derivative by h, and by x.
        h, gates = ctx.saved_tensors
        before, same, after = gates.roll(-1, 0).unbind(1)  # of line t + 1
        back = torch.stack([before.roll(-1, 1), same, after.roll(1, 1)], dim=1)
        d = scan(grad, back, step=-1)[..., 1:-1]
        sources = [h[:-1, :, k : k + d.shape[2]] for k in range(3)]  # R h, h, R' h
        slopes = torch.stack([(d[1:] * source).sum(dim=1) for source in sources], dim=1)
        return d, F.pad(slopes, (0, 0, 0, 0, 1, 0))  # the first line has no gates


def energy(
    values: Tensor, gates: Tensor, passes: int = 1, rule: str = "softmax", scans: str = "mean"
) -> Tensor:
    """J(α) = 1/2 sum over i, j of G_ij (α_i - α_j)^2, summed over classes, without an N x N matrix:

        1/2 sum over i of [α_i^2 - 2 α_i (G α)_i + (G α^2)_i]        (rows of G sum to 1)

    values α (B, C, H, W), gates (B, 4, 4, H, W) -> (B,).
    """
    # Δ P: [ours] the J of W = (G + G^T) / 2, never negative under `softmax`. α^T (I - G) α can be
    # negative where G is not symmetric.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    squares = values.square()
    both = torch.cat([values, squares], dim=1)
    mean, mean_square = propagate(both, gates, passes, rule, scans).chunk(2, dim=1)
    return (squares - 2 * values * mean + mean_square).sum(dim=(1, 2, 3)) / 2


class GuidanceNet(nn.Module):
    """g, an encoder with skips: images (B, 3, H, W) -> logits at the cells (B, 4, 4, h, w)."""

    def __init__(self, net: str, weights: str, stride: int, width: int = 32):
        super().__init__()
        # Δ P: [ours] after SPN's guidance network [cited], on another encoder.
        small = [(12, 2, 1), (24, 2, 1), (48, 1, 1), (48, 1, 2), (48, 1, 4)]
        self.stages, widths = trunk(net, weights, 4, small)
        self.stride = stride
        self.skips = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.gates = nn.Conv2d(width, 16, 3, padding=1)
        nn.init.zeros_(self.gates.bias)  # all sources begin about equal

    def forward(self, images: Tensor) -> Tensor:
        size = images[0, 0, :: self.stride, :: self.stride].shape
        features, skips = images, []
        for stage, skip in zip(self.stages, self.skips, strict=True):
            features = stage(features)
            skips.append(skip(features))
        merged = skips.pop()
        for skip in reversed(skips):
            merged = resize(merged, skip.shape[2:]) + skip
        return self.gates(self.smooth(resize(merged, size))).unflatten(1, (4, 4))


def affinity_loss(refined: Tensor, labels: Tensor) -> Tensor:
    """L_α = -Y^T log α^p [paper], over the pixels whose label is known; 0 without any.

    refined α^p (B, C, H, W), probabilities; labels Y (B, H, W), 255 unknown -> ().
    """
    # Δ P: [ours] a mean, not a sum.
    known = labels != VOID
    chosen = refined.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]  # (B, H, W)
    # Δ P: [ours] below 1e-6 counts as 1e-6, above 1, which `abs` can give, as 1; no gradient there.
    losses = -chosen.clamp(1e-6, 1.0).log()
    return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)


def smoothness_loss(
    gates: Tensor,
    segments: Tensor,
    count: int,
    probes: int = 2,
    passes: int = 1,
    generator: torch.Generator | None = None,
    rule: str = "softmax",
    scans: str = "mean",
) -> Tensor:
    """L_s = ||G - G_s||^2 [paper], Frobenius norm, G with all passes; a mean over the batch.

    gates (B, 4, 4, H, W), segments (B, H, W) at the gates' resolution -> (). Hutchinson's estimate,
    ||(I - P) G z||^2 / N over `probes` maps z of random signs: the mean of z z^T is I.
    """
    # Δ P: [ours] divided by N, and estimated.
    # Δ P: [ours] G_s, "of each superpixel region", is P G. Then L_s is 0 if and only if G makes any
    # map constant on every superpixel: smooth inside, edges at borders.
    shape = len(gates), probes, *gates.shape[-2:]
    device = "cpu" if generator is None else generator.device
    # Drawn on the CPU: the same signs whatever the device.
    coins = torch.randint(2, shape, generator=generator, device=device, dtype=torch.int8)
    signs = (2 * coins - 1).to(gates)  # z, a constant: the gradient reaches the gates alone
    moved = propagate(signs, gates, passes, rule, scans)  # G z
    return (moved - project(moved, segments, count)).square().mean()


# --- views: pictures and maps of them, cut alike ---


def tag_view(image: Tensor, tags: Tensor, crop: int, scales: tuple) -> tuple[Tensor, Tensor]:
    """A random crop of a picture (3, H, W) uint8, and its tags, all of them."""
    # Δ P: [ours] without PSA's colour jitter. train_view wants a label; zeros stand in for it.
    return train_view(image, torch.zeros_like(image[0]), crop, scales)[0], tags


def crop_view(crop: int, stride: int, image: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """One random crop, flipped or not, of a picture (3, H, W) uint8 and of maps of it.

    Labels (H, W) are at its pixels, probabilities (C, h, w) at its cells; what is smaller than the
    crop is continued. Returns the picture normalised.
    """
    # Δ P: [ours] crop and flip, no scales.
    places = [max(side - crop, 0) // stride + 1 for side in image.shape[1:]]
    starts, cuts = [stride * int(torch.randint(count, ())) for count in places], []
    for values in (image, *maps):
        cell = stride if values.is_floating_point() else 1
        (top, left), side = (start // cell for start in starts), crop // cell
        # At most `side` long, so that `pad` continues it to exactly `side`.
        cuts.append(pad(values[..., top : top + side, left : left + side], side))
    return random_flip(normalise(cuts[0].float() / 255), *cuts[1:])


def at_cells(labels: Tensor, stride: int) -> Tensor:
    """Labels (B, H, W) -> (B, h, w), those at one pixel of each cell: labels have no mean."""
    return labels[..., stride // 2 :: stride, stride // 2 :: stride]


def clamped(unary: Tensor, mined: Tensor, stride: int) -> Tensor:
    """--clamp: α^u (B, C, h, w), but where regions were mined, their labels (B, H, W)."""
    known = mined != VOID
    onehot = F.one_hot(mined.masked_fill(~known, 0), unary.shape[1]).permute(0, 3, 1, 2)
    pixels = unary.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    return F.avg_pool2d(torch.where(known[:, None], onehot.to(unary), pixels), stride)


# --- stages: each leaves maps for the next ---

# maps.loader: --accum batches a step, of view(picture, its maps of these kinds). maps.each:
# indices, pictures (B, 3, H', W') of one size padded to whole cells, tags (B, K), maps unpadded.
# maps.count: S, above all ids of superpixels. maps.quality, best_threshold: scores by the masks,
# for the log alone. What maps hold of classes that the tags exclude is 0.


def descend(run: Run, loss: Tensor, optimizer: SGD, schedule: lr_scheduler.PolynomialLR) -> None:
    """A step down the loss; with --accum N, at every N-th call, down the mean of the N losses."""
    run.backward(loss / run.cfg.accum)
    if run.more_to_come:
        return
    run.scaler.unscale_(optimizer)  # with --amp fp16: to clip gradients, not scaled ones
    # Δ P: [ours] clipped.
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], run.cfg.clip)
    run.update(optimizer)
    optimizer.zero_grad()
    schedule.step()


def find_superpixels(run: Run, cfg: Config, maps: Maps) -> None:
    """Superpixels of all pictures, once."""
    for index in maps.share(run, "superpixels"):
        image = maps.image(index)[None].to(run.device) / 255
        count = max(image[0, 0].numel() // cfg.segment_size**2, 1)
        # Δ P: [ours] SLIC; the superpixels of the paper's Fig. 4 look graph-based.
        maps.write("superpixels", index, slic(image, count, cfg.compactness)[0])
    run.barrier()


def find_seeds(run: Run, cfg: Config, maps: Maps, steps: range) -> dict[str, float]:
    """A tag classifier and its activation maps; the seeds Y_0."""
    net = TagNet(maps.tags.shape[1], cfg.net, cfg.weights)
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))
    view = partial(tag_view, crop=cfg.crop_size, scales=cfg.tag_scales)
    batches = iter(maps.loader(run, steps, view, "tags"))
    for step in run.loop(steps, net=net, optimizer=optimizer, schedule=schedule):
        images, tags = run.to_device(next(batches))
        with run.autocast():
            scores = trained(images)  # (B, K, h, w)
        # Δ P: [cited: PSA] its loss.
        loss = F.multilabel_soft_margin_loss(scores.float().mean(dim=(2, 3)), tags.float())
        descend(run, loss, optimizer, schedule)
        run.log(step, loss_tags=loss)
    net.eval()
    run.average_buffers(net)

    for indices, images, tags, segments in maps.each(run, "superpixels"):
        cams = activation_maps(net, images, tags, cfg.cam_scales)  # (B, K, H, W)
        cells = F.avg_pool2d(cams, cfg.stride)  # (B, K, h, w)
        maps.write_batch("cam", indices, F.pad(cells, (0, 0, 0, 0, 1, 0)))  # 0 for background
        height, width = segments.shape[1:]
        # Δ P: [cited: MCOF] averaged over superpixels before the thresholds.
        cams = project(cams[..., :height, :width], segments, maps.count)
        maps.write_batch("seeds", indices, seeds(cams, tags, cfg.fg, cfg.bg))
    maps.tell_absent(run, "seeds", "take a lower --fg, a higher --bg, or more --iters")
    return maps.quality(run, "seeds", "seeds") | {"cam": maps.best_threshold(run, "cam")}


def train_unary(
    run: Run, cfg: Config, maps: Maps, steps: range, t: int, unary: nn.Module, trained: nn.Module
) -> dict[str, float]:
    """f_t on the seeds, or on what the round before refined; its α^u; the 80 % rule."""
    optimizer, schedule = sgd_poly([unary], cfg.lr, cfg.weight_decay, len(steps))
    view = partial(train_view, crop=cfg.crop_size, scales=cfg.scales)
    batches = iter(maps.loader(run, steps, view, "seeds" if t == 1 else f"labels{t - 1}"))
    for step in run.loop(steps, net=unary, optimizer=optimizer, schedule=schedule):
        images, labels, _ = run.to_device(next(batches))
        with run.autocast():
            logits = trained(images)  # (B, C, H, W)
        loss = cross_entropy(logits, labels)
        descend(run, loss, optimizer, schedule)
        run.log(step, loss_unary=loss)
        look = (step + 1 - steps.start) % cfg.eval_every == 0 and step + 1 < steps.stop
        if look and not run.more_to_come:
            run.average_buffers(unary)
            run.note(step, f"unary{t}", val=run.score(unary).nanmean().item())
    unary.eval()
    run.average_buffers(unary)

    for indices, images, tags, segments in maps.each(run, "superpixels"):
        with torch.no_grad(), run.autocast():
            probs = mask_tags(unary(images).softmax(dim=1), tags)  # α^u
        # Δ P: [ours] G acts on cells of stride x stride pixels, on their mean probabilities.
        maps.write_batch(f"unary{t}", indices, F.avg_pool2d(probs, cfg.stride))
        height, width = segments.shape[1:]
        labels = probs.argmax(dim=1)[:, :height, :width]
        majority = majority_labels(labels, segments, maps.count, maps.num_classes, cfg.share)
        maps.write_batch(f"majority{t}", indices, paint(majority, segments))
        if cfg.method == "direct":  # a baseline: f_{t+1} learns what f_t says
            maps.write_batch(f"labels{t}", indices, labels)
    unary.train()
    return maps.quality(run, "majority", f"majority{t}") | maps.quality(run, "unary", f"unary{t}")


def mine_regions(run: Run, cfg: Config, maps: Maps, steps: range, t: int) -> dict[str, float]:
    """f^m learns the superpixels that 80 % agree on, then judges all of them: Y_t."""
    steps = steps[:0] if cfg.mining == "rule80" else steps  # where nothing is learnt
    net = RegionNet(maps.num_classes, cfg.net, cfg.weights)  # Δ P: [ours] anew in each round
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))
    view = partial(crop_view, cfg.crop_size, cfg.stride)
    batches = iter(maps.loader(run, steps, view, "superpixels", f"majority{t}"))
    for step in run.loop(steps, net=net, optimizer=optimizer, schedule=schedule):
        images, segments, painted = run.to_device(next(batches))
        cells = at_cells(segments, cfg.stride)  # (B, h, w)
        majority = of_segments(at_cells(painted, cfg.stride), cells, maps.count)  # (B, S)
        with run.autocast():
            logits = trained(images, cells, maps.count)  # (B, S, C)
        loss = region_loss(logits, majority, cfg.balance)  # L_m
        descend(run, loss, optimizer, schedule)
        run.log(step, loss_region=loss)
    net.eval()
    run.average_buffers(net)

    for indices, images, tags, segments, painted in maps.each(run, "superpixels", f"majority{t}"):
        majority = of_segments(painted, segments, maps.count)  # (B, S)
        cells = at_cells(pad(segments, cfg.stride), cfg.stride)
        with torch.no_grad():
            probs = net(images, cells, maps.count).softmax(dim=2)  # (B, S, C)
        sizes = torch.stack([ids.flatten().bincount(minlength=maps.count) for ids in cells])
        probs = probs.masked_fill(sizes[..., None] == 0, torch.nan)  # no cell, no features
        labels = mine(probs, majority, tags, cfg.tau, cfg.mining)
        maps.write_batch(f"mined{t}", indices, paint(labels, segments))
    flag = "--share" if cfg.mining == "rule80" else "--tau"
    maps.tell_absent(run, f"mined{t}", f"take a lower {flag}, or more --iters")
    return maps.quality(run, "mined", f"mined{t}")


def train_pairwise(run: Run, cfg: Config, maps: Maps, steps: range, t: int) -> GuidanceNet:
    """g_t learns gates from Y_t."""
    net = GuidanceNet(cfg.net, cfg.weights, cfg.stride)  # Δ P: [ours] anew in each round
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))
    view = partial(crop_view, cfg.crop_size, cfg.stride)
    batches = iter(maps.loader(run, steps, view, "superpixels", f"mined{t}", f"unary{t}"))
    form = dict(rule=cfg.rule, scans=cfg.scans)  # of G
    for step in run.loop(steps, net=net, optimizer=optimizer, schedule=schedule):
        images, segments, mined, probs = run.to_device(next(batches))  # α^u: a constant
        with run.autocast():
            gates = trained(images).float()  # (B, 4, 4, h, w)
        refined = propagate(probs, gates, cfg.passes, **form)  # α^p = G α^u
        # Δ P: [ours] at the pixels that were mined, of α^p enlarged, bilinearly.
        loss_affinity = affinity_loss(at_pixels(refined, cfg.stride), mined)
        cells = at_cells(segments, cfg.stride)
        smooth = smoothness_loss(gates, cells, maps.count, cfg.probes, cfg.passes, **form)
        loss = loss_affinity + cfg.lam * smooth  # L_α + λ L_s
        descend(run, loss, optimizer, schedule)
        run.log(step, loss_affinity=loss_affinity, loss_smooth=smooth)
    net.eval()
    run.average_buffers(net)
    return net


@torch.no_grad()
def refine(run: Run, cfg: Config, maps: Maps, net: GuidanceNet, t: int) -> dict[str, float]:
    """α^p = G_t α^u; its likeliest classes are what f_{t+1} learns [paper's Fig. 2]."""
    form = dict(rule=cfg.rule, scans=cfg.scans)  # of G
    energies = torch.zeros(1, 2, device=run.device)  # of α^u and of α^p
    kinds = "superpixels", f"unary{t}", f"mined{t}"
    for indices, images, tags, segments, probs, mined in maps.each(run, *kinds):
        # Δ P: [ours] --clamp.
        start = clamped(probs, pad(mined, cfg.stride), cfg.stride) if cfg.clamp else probs
        gates = net(images)
        refined = propagate(start, gates, cfg.passes, **form)  # α^p = G α^u
        refined = mask_tags(refined.clamp(min=0.0), tags)  # `abs` can give less than 0
        # J of a single pass's G, before and after; nothing forces it down.
        energies += torch.stack([energy(a, gates, **form).sum() for a in (probs, refined)])
        maps.write_batch(f"refined{t}", indices, refined)
        enlarged = at_pixels(refined.half().float(), cfg.stride)  # of what is stored
        height, width = segments.shape[1:]
        enlarged = enlarged[..., :height, :width]
        if cfg.project:
            # Δ P: [ours] --project: α^p = P G α^u. L_s pulls G towards P G, this goes all the way.
            # P is that of the pixels: a cell at an edge lies on both sides, and its mean hides it.
            enlarged = project(enlarged, segments, maps.count)
        maps.write_batch(f"labels{t}", indices, enlarged.argmax(dim=1))
    maps.tell_absent(run, f"labels{t}", "take more --iters")
    before, after = (run.gather(energies).sum(dim=0) / len(maps.names)).tolist()
    logged = dict(energy_unary=before, energy_refined=after)
    return maps.quality(run, "refined", f"labels{t}") | logged


# --- training ---


def plan(cfg: Config) -> list[tuple[str, int, range]]:
    """The stages in order: name, round t, and which of the whole run's steps are its own."""
    classifier, region, pairwise = (round(share * cfg.iters) for share in cfg.net_steps)
    # Δ P: [cited: MCOF] the result is one more unary network, which learns from round T.
    last = {"cam": 0, "unary": 1}.get(cfg.method, cfg.rounds + 1)
    stages = [("seeds", 0, classifier)]
    for t in range(1, last + 1):
        stages.append(("unary", t, cfg.iters))
        if cfg.method == "ial" and t < last:
            stages += [("region", t, region), ("pairwise", t, pairwise)]
    ends = accumulate(n for _, _, n in stages)
    return [(name, t, range(end - n, end)) for (name, t, n), end in zip(stages, ends, strict=True)]


def recipe(dataset: str, **changes: Any) -> Config:
    """The settings of a dataset's recipe, and what is to differ: what the command line makes."""
    return with_recipe(Config, RECIPES, dataset=dataset, **changes)


def ignored(cfg: Config) -> dict[str, str]:
    """The fields that have no effect beside the others, and why."""
    names = {}
    if cfg.method != "ial":
        unused = "balance mining tau rule scans passes lam probes clamp project".split()
        names = dict.fromkeys(unused, f"with --method {cfg.method}")
    if cfg.mining == "rule80":
        names |= dict.fromkeys(["balance", "tau"], "with --mining rule80")
    if not cfg.lam:
        names |= {"probes": "with --lam 0"}
    if cfg.method in ("cam", "unary"):
        names |= {"rounds": f"with --method {cfg.method}"}
    if cfg.method == "cam":
        unused = "width lr scales share".split()
        names |= dict.fromkeys(unused, "with --method cam, which trains no unary network")
    return names


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags that cannot be right, or do not go together."""
    check_config(cfg)
    refuse_silence(cfg, RECIPES, **ignored(cfg))
    if cfg.bg > cfg.fg:
        raise InputError(f"--bg {cfg.bg}: must not be above --fg {cfg.fg}")
    if len(cfg.net_steps) != 3 or min(cfg.net_steps) * cfg.iters < 1:
        given = " ".join(map(str, cfg.net_steps))
        raise InputError(
            f"--net-steps {given}: must be three shares of --iters {cfg.iters}, a step or more each"
        )
    if cfg.crop_size % cfg.stride:
        raise InputError(f"--stride {cfg.stride}: must divide --crop-size {cfg.crop_size}")


def train(cfg: Config) -> Result:
    """Run all stages; the result's model is the last unary network, untrained with --method cam."""
    check_flags(cfg)
    stages = plan(cfg)
    run = Run("ial", cfg, total=stages[-1][2].stop)
    data = load_tagged(cfg.dataset, cfg.data_path, cfg.background)
    run.tell(data)
    # Δ P: [ours] DeepLabv3+, for the paper's DeepLab on VGG16 and ResNet.
    unary = DeepLabV3Plus(len(data.classes), cfg.backbone, cfg.weights, cfg.width)
    initial, trained = deepcopy(unary.state_dict()), run.wrap(unary)
    run.start(data, [unary], unary=unary)
    maps = Maps(run.folder / "maps", data, cfg.stride)

    for name, t, steps in stages:
        if run.passed(steps):
            continue
        run.seed(steps.start)  # initial weights of the stage's networks
        if name == "seeds":
            if run.first == 0:  # else they were found before the run was resumed
                find_superpixels(run, cfg, maps)
            figures = find_seeds(run, cfg, maps, steps)  # Y_0
        elif name == "unary":  # M-step of f: f_t learns α^p of the round before, at first Y_0
            unary.load_state_dict(initial)  # Δ P: [ours] each f_t starts anew
            figures = train_unary(run, cfg, maps, steps, t, unary, trained)  # α^u
        elif name == "region":  # the target of g's M-step
            figures = mine_regions(run, cfg, maps, steps, t)  # Y_t
        else:
            pairwise = train_pairwise(run, cfg, maps, steps, t)  # M-step of g: g_t learns Y_t
            figures = refine(run, cfg, maps, pairwise, t)  # E-step: α^p = G α^u
        done = steps.stop - 1
        run.note(done, f"{name}{t or ''}", **figures)
        if name == "unary":
            run.record(done, run.score(unary))
        else:
            run.save(done)

    # Of the last round and what the one before refined; maps that were not made are left out.
    last = stages[-1][1]
    shown = "seeds", f"mined{last - 1}", f"labels{last - 1}", f"unary{last}"
    return run.finish(partial(maps.panels, kinds=shown))


if __name__ == "__main__":
    main(train, Config, RECIPES)
