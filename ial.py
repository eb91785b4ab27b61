"""Iterative Affinity Learning (IAL).

Wang, Liu, Ma, Yang: Weakly-Supervised Semantic Segmentation by Iterative Affinity Learning, IJCV
2020, arXiv 2002.08098.

From image-level tags alone. A classifier of tags shows where it looks; these seeds train a unary
network, the segmenter. Superpixels on which its predictions agree train a region network; it judges
all superpixels by what regions of a class have in common, and those it is sure of, the mined ones,
train a pairwise network, which learns the affinity G of pixels from the picture. G carries the
unary predictions along; what comes out trains the next unary network: each learns from the other.

Each choice is marked: [paper] from its abstract, figures, tables, and formulas that a review
reports, [cited] from related work, [ours]. We did not have its text, and no code is public.

Energy and EM, with that review's slips corrected (argmax for argmin, twice; a factor 2). Pixels are
a graph with weights W >= 0, D = diag(W 1), L = D - W, and G = I - L, whose rows sum to 1 [paper].
J(α) = α^T L α = 1/2 sum w_ij (α_i - α_j)^2 for symmetric W, and the sought α minimises it.
    E-step    dJ/dα = 2 L α; a step of length 1/2 gives α^p = α^u - L α^u = G α^u.
    M-step g  -log p >= 1 - p, and rows of Y sum to 1, so that -Y^T log α^p >= N - Y^T G α^u. For
              Y = α^u that is a constant plus α^T L α: the loss bounds J, and g lowers it over L.
    M-step f  f learns α^p.
With Y = α^u the M-step for g has the trivial solution G = I. Hence the mined Y, of which
Y^T L α <= α^T L α is expected, not proved. The paper claims that alternating descent of J ends in a
local minimum. That J falls in each E-step is a theorem for symmetric G with a spectrum in (-1, 1];
the G of the scans is not symmetric, and steps of SGD on f and g promise nothing: the logged energy
shows what happened. With --passes 2, α^p is two E-steps, G^2 α^u.

Where to find it
    α^p = G α^u         propagate, gate_weights     [cited: SPN] mean and softmax [ours]
    L_α = -Y^T log α^p  affinity_loss               [paper]
    L_s = ||G - G_s||   smoothness_loss             [paper] G_s = P G [ours]
    E(α)                energy                      [ours], the symmetric part of G
    Y_0                 find_seeds, seeds           [paper] loss [cited: PSA], rule [cited: IRN]
    80 % rule           majority_labels             [paper]
    f^m, Y_t            RegionNet, mine             [paper] class weights, relabel, τ [ours]
    f_t                 train_unary                 [paper] its test time [cited: MCOF]
    g_t                 train_pairwise              [paper] network after SPN's [cited]

Left out, with the mIoU that prototypes had on other toy pictures: the maximum over scans (31 for
66; it is not linear), other G_s (P itself 70.8, means of the gates 68.0, of G α^u alone 71.4, or 39
with ten times the weight; ours 71.0, no L_s 70.2), mining by agreement or veto (66.6, 70.7; ours
71.8). Not tried: a G for each class (α would leave the simplex), graph-based superpixels
(sequential), a dense CRF. Mined labels that taught the unary network directly had 75.8 there: most
of the gain is the mining's.

    python ial.py    # 65.5 mIoU, mean of three seeds (first unary 59.6); 9 minutes on two CPU cores
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import train_view, whole_view
from common.data import VOID, check, val_loader
from common.deeplab import DeepLabV3Plus
from common.encoders import GuidanceNet, RegionNet, TagNet, activation_maps
from common.losses import balanced_cross_entropy, cross_entropy
from common.maps import Maps, at_cells, at_pixels, clamped, crop_view, pad, stage_panels, tag_view
from common.metrics import evaluate, iou
from common.optim import descend, sgd_poly
from common.run import InputError, Result, Run, RunConfig, check_config, main
from common.slic import at_least_float32, of_segments, paint, project, segment_mean, slic
from common.spn import propagate
from common.tags import load_tagged, mask_tags


@dataclass
class Config(RunConfig):
    """IAL's settings for the embedded dataset, ours unless marked; RECIPES has the others."""

    iters: int = 240  # steps of a unary network; the other networks' are shares of them
    eval_every: int = 120  # steps of a unary network between two looks at its mIoU
    crop_size: int = 64  # side of a training crop in pixels, a multiple of 8
    batch_size: int = 16  # pictures per process
    background: str = ""  # names of the classes, with commas between, that become class 0
    method: Literal["ial", "direct", "unary", "cam"] = "ial"  # the others are baselines
    rounds: int = 2  # T: 5 in the paper
    net: Literal["small", "resnet18", "resnet50", "resnet101"] = "small"  # the other three networks
    net_lr: float = 0.2  # their learning rate
    net_steps: tuple[float, ...] = (1.2, 0.5, 1.8)  # classifier, region, pairwise: shares of iters
    cam_scales: tuple[float, ...] = (1.0,)  # of a picture, at which activation maps are summed
    fg: float = 0.3  # a seed of a class is a superpixel with activation above this (cited: IRN)
    bg: float = 0.05  # and of background one where all are below this (cited: IRN)
    segment_size: int = 6  # side of a superpixel in pixels, about
    compactness: float = 20.0  # of superpixels: weight of place against colour
    share: float = 0.8  # of a superpixel's pixels that have to agree on a class (paper)
    mining: Literal["relabel", "rule80"] = "relabel"  # by the region network (paper), or without
    tau: float = 0.7  # τ: confidence from which on a region is mined; read off the paper's Fig. 4
    lam: float = 0.3  # λ, weight of the smoothness loss
    probes: int = 2  # R, random maps that estimate it
    passes: int = 2  # how often G is applied (cited: SPN)
    rule: Literal["softmax", "abs"] = "softmax"  # what makes gates of logits (abs cited: SPN)
    clamp: bool = False  # propagate mined labels where there are any: ours, not the paper's
    stride: int = 2  # side of a cell in pixels: maps are propagated from cell to cell
    scales: tuple[float, ...] = (1.0,)  # of the classifier's and unary networks' training crops
    width: int = 64  # channels of ASPP and decoder: 256 in the DeepLabv3+ paper


# Crops of about the usual 321 pixels, scales of PSA (cited); networks, lengths, rates are ours.
REAL = dict(backbone="resnet50", weights="IMAGENET1K_V1", width=256, crop_size=320, workers=4)
REAL |= dict(iters=20_000, eval_every=10_000, lr=0.005, weight_decay=5e-4, rounds=5)
REAL |= dict(net="resnet50", net_lr=0.01, net_steps=(0.33, 0.25, 0.5), stride=4, probes=4)
REAL |= dict(cam_scales=(0.5, 1.0, 1.5, 2.0), scales=(0.5, 0.75, 1.0, 1.25, 1.5), batch_size=8)
REAL |= dict(segment_size=13, compactness=10.0)
RECIPES = {name: REAL | dict(dataset=name) for name in ("folder", "voc", "cityscapes")}
RECIPES["shapes"] = {}


# --- the pairwise network: α^p = G α^u ---


def affinity_loss(refined: Tensor, labels: Tensor) -> Tensor:
    """L_α = -Y^T log α^p (paper), a mean over the pixels whose label is known.

    refined α^p (B, C, H, W), probabilities; labels Y (B, H, W), 255 unknown -> (). Nothing known:
    0, with zero gradient. A value below 1e-6 counts as 1e-6, one above 1, which `abs` can give, as
    1; neither passes a gradient (ours).
    """
    known = labels != VOID
    chosen = refined.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]  # (B, H, W)
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
) -> Tensor:
    """L_s = ||G - P G||^2 / N (Frobenius norm), estimated; a mean over the batch.

    gates (B, 4, 4, H, W), segments (B, H, W) at the gates' resolution -> (). The paper's L_s is
    ||G - G_s||^2 with G_s of the superpixels; P G for G_s is our reading. G is `propagate` with all
    its passes. The loss is 0 if and only if G makes any map constant on every superpixel: smooth
    inside, edges at borders. The estimate (Hutchinson) is ||(I - P) G z||^2 / N, a mean over
    `probes` maps z of random signs: without bias, since the mean of z z^T is I. Signs come from
    the CPU, or from where the generator is.
    """
    shape = len(gates), probes, *gates.shape[-2:]
    # A constant input: the gradient reaches the gates alone.
    device = "cpu" if generator is None else generator.device
    coins = torch.randint(2, shape, generator=generator, device=device, dtype=torch.int8)
    signs = (2 * coins - 1).to(gates)  # z
    moved = propagate(signs, gates, passes, rule)  # G z
    return (moved - project(moved, segments, count)).square().mean()


def energy(values: Tensor, gates: Tensor, passes: int = 1, rule: str = "softmax") -> Tensor:
    """J(α) = 1/2 sum over i, j of G_ij (α_i - α_j)^2, summed over classes, without an N x N matrix:

        1/2 sum over i of [α_i^2 - 2 α_i (G α)_i + (G α^2)_i]        (rows of G sum to 1)

    values α (B, C, H, W), gates (B, 4, 4, H, W) -> (B,). The paper's J is α^T L α with G = I - L,
    for a symmetric G. That of the scans is not; this is α^T L α with L = D - W of its symmetric
    part W = (G + G^T) / 2 (ours), never negative under `softmax`. α^T (I - G) α of such a G can be.
    """
    values = at_least_float32(values)
    squares = values.square()
    moved = propagate(torch.cat([values, squares], dim=1), gates, passes, rule)
    mean, mean_square = moved.chunk(2, dim=1)
    return (squares - 2 * values * mean + mean_square).sum(dim=(1, 2, 3)) / 2


# --- labels: seeds, and mining of confident regions ---


def seeds(cams: Tensor, tags: Tensor, fg: float, bg: float) -> Tensor:
    """Y_0 from class activation maps: a class above fg, background below bg, unknown between.

    cams (B, K, H, W) in [0, 1], tags (B, K) bool -> (B, H, W) int64, 0 the background, c + 1 for
    class c, 255 unknown. Only a picture's own tags count; without any it is all background. The
    paper shows such maps, not their rule; two thresholds are IRN's (cited).
    """
    score, best = cams.masked_fill(~tags[:, :, None, None], -torch.inf).max(dim=1)  # (B, H, W)
    return torch.where(score > fg, best + 1, torch.where(score < bg, 0, VOID))


def majority_labels(
    unary_labels: Tensor, segments: Tensor, count: int, num_classes: int, share: float = 0.8
) -> Tensor:
    """The 80 % rule (paper): the class that `share` of a superpixel's pixels or more agree on.

    unary_labels, segments (B, H, W) -> (B, S) int64; 255 where no class has that share, and for
    empty superpixels. A pixel labelled 255 agrees with none, but counts in the superpixel's size.
    """
    stride = num_classes + 1  # one cell more, for 255
    cells = segments.flatten(1) * stride + unary_labels.flatten(1).long().clamp(max=num_classes)
    votes = cells.new_zeros(len(cells), count * stride)
    votes = votes.scatter_add_(1, cells, torch.ones_like(cells)).view(-1, count, stride)
    most, label = votes[..., :num_classes].max(dim=2)
    # 80 of 100 pixels are enough, however 0.8 is rounded.
    agreed = (most > 0) & (most >= (share - 1e-6) * votes.sum(dim=2))
    return torch.where(agreed, label, VOID)


def mine(
    region_probs: Tensor | None, majority: Tensor, tags: Tensor, tau: float, mode: str = "relabel"
) -> Tensor:
    """Y_t on superpixels: the region network's class where it is confident. -> (B, S) int64.

    region_probs (B, S, K + 1), majority (B, S) from `majority_labels`, tags (B, K) bool; 255 is
    unknown. relabel (paper's Fig. 4, our reading): the likeliest of the picture's classes where
    its probability, renormalised over them, is tau or more, whatever the majority says; never
    where it is NaN. rule80: the majority's label and no network; region_probs may be None.
    """
    if mode == "relabel":
        conf, labels = mask_tags(region_probs.mT, tags).max(dim=1)  # (B, S)
        known = conf >= tau  # False where conf is NaN
    elif mode == "rule80":
        possible = F.pad(tags, (1, 0), value=True)
        labels = torch.where(majority == VOID, 0, majority)
        known = (majority != VOID) & possible.gather(1, labels)
    else:
        raise ValueError(f'mode is "relabel" or "rule80", not {mode!r}')
    return torch.where(known, labels, VOID)


# --- the stages, in the paper's order; each leaves maps for the next ---


def find_superpixels(run: Run, cfg: Config, maps: Maps) -> None:
    """Superpixels of all pictures, once. SLIC is ours; the paper's Fig. 4 looks graph-based."""
    for index in maps.share(run):
        image = maps.image(index)[None].to(run.device) / 255
        count = max(image[0, 0].numel() // cfg.segment_size**2, 1)
        maps.write("superpixels", index, slic(image, count, cfg.compactness)[0])
    run.barrier()


def find_seeds(run: Run, cfg: Config, maps: Maps, steps: range) -> dict[str, float]:
    """A tag classifier and its activation maps; the seeds Y_0."""
    net = TagNet(maps.tags.shape[1], cfg.net, cfg.weights)
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))

    view = partial(tag_view, crop=cfg.crop_size, scales=cfg.scales)
    batches = maps.loader(run, steps, view, "tags")
    for step, batch in zip(run.loop(steps), batches, strict=True):
        images, tags = run.to_device(batch)
        with run.autocast():
            scores = trained(images).mean(dim=(2, 3))  # (B, K)
            loss = F.multilabel_soft_margin_loss(scores, tags.float())  # as PSA's (cited)
        descend(loss, optimizer, schedule)
        run.log(step, loss_tags=loss)
    run.average_buffers(net.eval())

    for index, images in maps.each(run):
        tags = maps.tags[index, None].to(run.device)
        cams = activation_maps(net, images, tags, cfg.cam_scales)  # (1, K, H, W)
        maps.write("cam", index, F.pad(F.avg_pool2d(cams, cfg.stride)[0], (0, 0, 0, 0, 1, 0)))
        segments = maps.read("superpixels", index)[None].to(run.device)
        height, width = segments.shape[1:]
        # Averaged over superpixels before the thresholds, as in MCOF (cited).
        cams = project(cams[..., :height, :width], segments, maps.count)
        maps.write("seeds", index, seeds(cams, tags, cfg.fg, cfg.bg)[0])
    run.barrier()
    best = maps.best_threshold(run, "cam", (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    return maps.quality(run, "seeds", "seeds") | {"cam": best}


def train_unary(
    run: Run, cfg: Config, maps: Maps, steps: range, t: int, trained: nn.Module, score: Callable
) -> dict[str, float]:
    """f_t on the seeds, or on what the round before refined; its α^u; the 80 % rule."""
    unary = run.networks[0]
    optimizer, schedule = sgd_poly([unary], cfg.lr, cfg.weight_decay, len(steps))
    source = "seeds" if t == 1 else f"labels{t - 1}"
    view = partial(train_view, crop=cfg.crop_size, scales=cfg.scales)
    batches = maps.loader(run, steps, view, source)
    for step, batch in zip(run.loop(steps), batches, strict=True):
        images, labels, _ = run.to_device(batch)
        with run.autocast():
            loss = cross_entropy(trained(images), labels)
        descend(loss, optimizer, schedule)
        run.log(step, loss_unary=loss)
        if (step + 1 - steps.start) % cfg.eval_every == 0 and step + 1 < steps.stop:
            run.average_buffers(unary)
            run.note(step, f"unary{t}", val=score().nanmean().item())
    run.average_buffers(unary.eval())

    for index, images in maps.each(run):
        segments = maps.read("superpixels", index)[None]
        height, width = segments.shape[1:]
        with torch.no_grad(), run.autocast():
            probs = mask_tags(unary(images).softmax(dim=1).cpu(), maps.tags[index, None])  # α^u
        maps.write(f"unary{t}", index, F.avg_pool2d(probs, cfg.stride)[0])
        labels = probs.argmax(dim=1)[:, :height, :width]
        majority = majority_labels(labels, segments, maps.count, maps.num_classes, cfg.share)
        maps.write(f"majority{t}", index, paint(majority, segments)[0])
        if cfg.method == "direct":
            maps.write(f"labels{t}", index, labels[0])
    unary.train()
    run.barrier()
    return maps.quality(run, "majority", f"majority{t}") | maps.quality(run, "unary", f"unary{t}")


def mine_regions(run: Run, cfg: Config, maps: Maps, steps: range, t: int) -> dict[str, float]:
    """f^m learns the superpixels that 80 % agree on, then judges all of them: Y_t.

    With --mining rule80 nothing is learnt, and the stage's steps are not taken.
    """
    steps = steps if cfg.mining == "relabel" else steps[:0]
    net = RegionNet(maps.num_classes, cfg.net, cfg.weights)
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))

    view = partial(crop_view, cfg.crop_size, cfg.stride)
    batches = maps.loader(run, steps, view, "superpixels", f"majority{t}")
    for step, batch in zip(run.loop(steps), batches, strict=True):
        images, *both = run.to_device(batch)
        segments, painted = (at_cells(pixels, cfg.stride) for pixels in both)
        majority = of_segments(painted, segments, maps.count)  # (B, S)
        with run.autocast():
            loss = balanced_cross_entropy(trained(images, segments, maps.count), majority)  # L_m
        descend(loss, optimizer, schedule)
        run.log(step, loss_region=loss)
    run.average_buffers(net.eval())

    for index, images in maps.each(run):
        segments = maps.read("superpixels", index)[None]
        painted = maps.read(f"majority{t}", index)[None]
        cells = at_cells(pad(segments, cfg.stride), cfg.stride)
        with torch.no_grad():
            probs = net(images, cells.to(run.device), maps.count).softmax(dim=2).cpu()  # (1, S, C)
        _, sizes = segment_mean(cells[:, None], cells, maps.count)
        probs = probs.masked_fill(sizes[..., None] == 0, torch.nan)  # no cell, no features
        majority = of_segments(painted, segments, maps.count)
        labels = mine(probs, majority, maps.tags[index, None], cfg.tau, cfg.mining)
        maps.write(f"mined{t}", index, paint(labels, segments)[0])
    run.barrier()
    return maps.quality(run, "mined", f"mined{t}")


def train_pairwise(run: Run, cfg: Config, maps: Maps, steps: range, t: int) -> dict[str, float]:
    """g_t learns gates from Y_t; α^p = G_t α^u; f_{t+1} learns its argmax (paper's Fig. 2)."""
    net = GuidanceNet(cfg.net, cfg.weights, cfg.stride)
    trained = run.wrap(net)
    optimizer, schedule = sgd_poly([net], cfg.net_lr, cfg.weight_decay, len(steps))

    view = partial(crop_view, cfg.crop_size, cfg.stride)
    batches = maps.loader(run, steps, view, "superpixels", f"mined{t}", f"unary{t}")
    for step, batch in zip(run.loop(steps), batches, strict=True):
        images, segments, mined, probs = run.to_device(batch)
        with run.autocast():
            gates = trained(images).float()  # (B, 4, 4, h, w)
        refined = propagate(probs, gates, cfg.passes, cfg.rule)  # α^p = G α^u
        # L_α at the pixels that were mined; that α^p is enlarged, not its logarithm, is ours.
        loss_affinity = affinity_loss(at_pixels(refined, cfg.stride), mined)
        cells = at_cells(segments, cfg.stride)
        smooth = smoothness_loss(gates, cells, maps.count, cfg.probes, cfg.passes, rule=cfg.rule)
        descend(loss_affinity + cfg.lam * smooth, optimizer, schedule)  # L_α + λ L_s
        run.log(step, loss_affinity=loss_affinity, loss_smooth=smooth)
    run.average_buffers(net.eval())

    energies = torch.zeros(2)
    for index, images in maps.each(run):
        probs = maps.read(f"unary{t}", index)[None].to(run.device)
        start = probs
        if cfg.clamp:
            mined = pad(maps.read(f"mined{t}", index), cfg.stride)[None].to(run.device)
            start = clamped(probs, mined, cfg.stride)
        with torch.no_grad():
            gates = net(images)
            refined = propagate(start, gates, cfg.passes, cfg.rule).clamp(min=0.0)
            refined = mask_tags(refined, maps.tags[index, None].to(run.device))  # α^p
            # J of G itself: each pass is one step down.
            both = [energy(a, gates, rule=cfg.rule)[0] for a in (probs, refined)]
            energies += torch.stack(both).cpu()
        maps.write(f"refined{t}", index, refined[0])
        maps.write(f"labels{t}", index, maps.labels(f"refined{t}", index))
    run.barrier()
    before, after = run.gather(energies[None].to(run.device)).sum(dim=0) / len(maps.names)
    energies = dict(energy_unary=before.item(), energy_refined=after.item())
    return maps.quality(run, "refined", f"labels{t}") | energies


# --- training ---


def plan(cfg: Config) -> list[tuple[str, int, range]]:
    """The stages in order: name, round t, and which of the whole run's steps are its own."""
    classifier, region, pairwise = (round(share * cfg.iters) for share in cfg.net_steps)
    rounds = cfg.rounds if cfg.method in ("ial", "direct") else 0
    stages = [("seeds", 0, classifier)]
    for t in range(1, rounds + 2) if cfg.method != "cam" else ():
        stages.append(("unary", t, cfg.iters))  # the last is the result, as in MCOF (cited)
        if cfg.method == "ial" and t <= rounds:
            stages += [("region", t, region), ("pairwise", t, pairwise)]
    ends = accumulate(n for _, _, n in stages)
    return [(name, t, range(end - n, end)) for (name, t, n), end in zip(stages, ends, strict=True)]


def check_flags(cfg: Config) -> None:
    """Raise InputError for flags of this script that cannot be right."""
    check_config(cfg)
    for name in ("fg", "bg", "share", "tau"):
        if getattr(cfg, name) > 1:
            raise InputError(f"--{name} {getattr(cfg, name)}: must be between 0 and 1")
    for name in ("segment_size", "probes", "passes", "stride"):
        if not getattr(cfg, name):
            raise InputError(f"--{name.replace('_', '-')} 0: must be positive")
    if cfg.bg > cfg.fg:
        raise InputError(f"--bg {cfg.bg}: must not be above --fg {cfg.fg}")
    if len(cfg.net_steps) != 3 or min(cfg.net_steps) * cfg.iters < 1:
        raise InputError(f"--net-steps {cfg.net_steps}: must be three shares of --iters")
    if cfg.crop_size % cfg.stride:
        raise InputError(f"--stride {cfg.stride}: must divide --crop-size {cfg.crop_size}")


def train(cfg: Config) -> Result:
    """Run all stages; the result's model is the last unary network, untrained after --method cam.

    A resumed run starts again the stage that it was in. Raises InputError for flags and files that
    cannot be right.
    """
    check_flags(cfg)
    stages = plan(cfg)
    run = Run("ial", cfg, total=stages[-1][2].stop)
    tagged = load_tagged(cfg.dataset, cfg.data_path, cfg.background)
    data, num_classes = tagged.data, len(tagged.data.classes)
    run.print(tagged.summary())
    unary = DeepLabV3Plus(num_classes, cfg.backbone, cfg.weights, cfg.width)
    check(data, run.rank, run.world, whole=True)
    initial, trained = deepcopy(unary.state_dict()), run.wrap(unary)
    run.start([unary], data, dict(unary=unary), tagged.summary())
    maps = Maps(run.folder / "maps", tagged, cfg.stride)
    val = val_loader(data, whole_view, **run.loading)

    def score() -> Tensor:
        with run.autocast():
            return iou(evaluate(unary, val, num_classes, run.device))

    for name, t, steps in stages:
        if steps.stop <= run.first:  # done before the run was resumed
            continue
        run.seed(steps.start)  # of the networks that the stage makes
        if name == "seeds":
            find_superpixels(run, cfg, maps)
            figures = find_seeds(run, cfg, maps, steps)  # Y_0
        elif name == "unary":
            unary.load_state_dict(initial)  # each f_t starts anew (ours)
            figures = train_unary(run, cfg, maps, steps, t, trained, score)  # f_t, α^u, 80 % rule
        elif name == "region":
            figures = mine_regions(run, cfg, maps, steps, t)  # f^m, Y_t
        else:
            figures = train_pairwise(run, cfg, maps, steps, t)  # g_t, α^p
        run.note(steps.stop - 1, f"{name}{t or ''}", **figures)
        if name == "unary":
            run.record(steps.stop - 1, score())
        else:
            run.save(steps.stop - 1)

    if run.rank == 0 and cfg.method != "cam":
        shown = {"seeds": "seeds"}
        if cfg.method == "ial" and cfg.rounds:
            shown |= {"mined": f"mined{cfg.rounds}", "refined": f"labels{cfg.rounds}"}
        stage_panels(run.folder / "panels.png", maps, shown, unary, data)
    return run.finish()


if __name__ == "__main__":
    main(train, Config, RECIPES)
