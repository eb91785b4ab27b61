"""What a step of every script costs beside the passes its method needs, and what the parts cost.

    python tests/bench.py                                # the newcomer's settings, on the CPU
    python tests/bench.py --dataset folder --device cuda --crop 512 --batch 8
    python tests/bench.py --rows cps contrast            # these alone; with --growth, that too

Prints Markdown. Every row has a process and a thread of its own. Figures are medians of --steps
steps after two warm-up steps; ms, on a CPU, of the process's CPU time, which a busy machine
disturbs less than the wall clock's; on a GPU of that, waiting for the GPU at each time stamp.

Steps are those of the scripts' own `train`, without evaluation, logging and checkpoints, and with
the method on from the first step. After each, the floor is run on the same networks and the same
batch: the forward and backward passes that the method needs, with the mean of the output for a
loss. ratio: step / floor; rest: what neither the floor nor a named share explains. Loading is
reading, augmenting and moving to the device; loss counts its own backward pass too. mib: by how
much the process's memory rises, or the peak of a GPU's tensors; for parts glibc is told to give
back what is freed, for its heap may keep ten times what is in use. ms2, mib2: of the program
beside ours. Exponents are those of a power of the size, 1 for what grows in proportion.
"""

import argparse
import contextlib
import ctypes
import io
import math
import multiprocessing
import platform
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torchvision.transforms.v2 import functional as f2

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import losses, shapes
from common.augment import normalise, train_view, whole_view
from common.data import load
from common.deeplab import DeepLabV3Plus
from common.loaders import read_pair, val_loader
from common.machine import has_bf16
from common.maps import Maps
from common.metrics import confusion_matrix, evaluate, evaluating
from common.run import Run
from common.slic import slic

Program = Callable[[], Any]  # one run of what is measured; a list holds tensors to compare

# --- time and memory ---


class Stopwatch:
    """Milliseconds spent in named parts of a step."""

    def __init__(self, device: str):
        self.device, self.on, self.spent, self.since = device, True, Counter(), {}

    def now(self) -> float:
        if self.device != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, part: str, *_: Any) -> None:
        if self.on and part not in self.since:
            self.since[part] = self.now()

    def stop(self, part: str, *_: Any) -> None:
        if part in self.since:
            self.spent[part] += 1000 * (self.now() - self.since.pop(part))

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, whose time counts for the part, and so does its backward pass."""

        def wrapped(*args: Any, **options: Any) -> Any:
            # Autograd runs the latest nodes first. With aliases, whose nodes are made here, those
            # of the loss run in one go, from the result's hook to an alias's.
            args = [a.view_as(a) if self.on and needs_grad(a) else a for a in args]
            self.start(part)
            result = function(*args, **options)
            self.stop(part)
            if self.on and needs_grad(result):
                result.register_hook(partial(self.start, part))
                for arg in filter(needs_grad, args):
                    arg.register_hook(partial(self.stop, part))
            return result

        return wrapped

    def iterate(self, part: str, items: Iterable) -> Iterator:
        step, items = self.timed(part, next), iter(items)
        while (item := step(items, None)) is not None:
            yield item


def needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def memory(device: str, peak: bool = False) -> int:
    """Bytes in use, or their peak since `reset_peak`; of a GPU's tensors, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if sys.platform != "linux":  # the peak of the whole life, for both
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[1])


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone can
        Path("/proc/self/clear_refs").write_text("5")


def hold(block: int) -> None:
    """Let glibc's heap keep blocks of less than so many bytes, and give back larger ones."""
    with contextlib.suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, block), libc.mallopt(-1, 2 * block)  # M_MMAP_, M_TRIM_THRESHOLD


def alone(function: Callable, *args: Any) -> Any:
    """Call the function in a new process of one thread."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *args).result()


# --- floors: the passes that a method needs ---

# floor(run, *seen): `seen` are the batches that this step moved to the device, in that order.


def learn(run: Run, forward: Callable[..., Tensor], *inputs: Any) -> None:
    with run.autocast():
        output = forward(*inputs)
    output.float().mean().backward()


@torch.no_grad()
def teach(run: Run, network: nn.Module, images: Tensor) -> None:
    with run.autocast():
        network(images)


def cps_floor(run: Run, labeled: list[Tensor], unlabeled: list[Tensor]) -> None:
    for network in run.state["networks"]:
        for images in (labeled[0], unlabeled[0]):
            learn(run, network, images)
        if run.cfg.cutmix:
            teach(run, network, unlabeled[0])


def psmt_floor(run: Run, labeled: list[Tensor], unlabeled: list[Tensor]) -> None:
    student, *teachers = run.state["networks"].values()
    for teacher in teachers:
        teach(run, teacher, unlabeled[0])
    for images in (labeled[3], unlabeled[3]):
        learn(run, student, images)
        if run.cfg.eps:
            side = images.shape[-1] // 4
            z = images.new_zeros(len(images), run.cfg.width + 48, side, side)
            z = z.to(memory_format=torch.channels_last)
            with evaluating(nn.ModuleList(teachers)):
                with torch.no_grad():
                    for teacher in teachers:
                        teacher.classify(teacher.decode(z))
                z.requires_grad_()
                logits = sum(teacher.classify(teacher.decode(z)) for teacher in teachers)
                torch.autograd.grad(logits.mean(), z)


def cac_floor(run: Run, labeled: list[Tensor], _: list[Tensor], crops: list[Tensor]) -> None:
    net = run.state["network"]

    def contrasted(images: Tensor) -> Tensor:
        decoded = net.network.decode(net.network.encode(images))
        return net.projector(F.avg_pool2d(decoded, 2))

    learn(run, net.network, labeled[0])
    for images in crops:
        learn(run, contrasted, images)


def one_pass(run: Run, batch: list[Tensor]) -> None:
    learn(run, run.net, batch[0])


def unary_floor(run: Run, batch: list[Tensor]) -> None:
    learn(run, run.state["unary"], batch[0])


def region_floor(run: Run, batch: list[Tensor]) -> None:
    segments = sys.modules["ial"].at_cells(batch[1], run.cfg.stride)
    learn(run, run.net, batch[0], segments, run.maps.count)


def pairwise_floor(run: Run, batch: list[Tensor]) -> None:
    images, *_, probs = batch
    form = {name: getattr(run.cfg, name) for name in ("passes", "rule", "scans")}
    propagate = partial(sys.modules["ial"].propagate, **form)

    def refined(images: Tensor) -> Tensor:
        gates = run.net(images).float()
        signs = probs.new_ones(len(probs), run.cfg.probes, *probs.shape[2:])
        return propagate(probs, gates).mean() + propagate(signs, gates).mean()

    learn(run, refined, images)


# --- steps of the scripts ---


# By script: a floor for each of its loops; its functions that count as loss, beside cross-entropy.
LOOPS = {
    "cps": ([cps_floor], ["labels_of"]),
    "psmt": ([psmt_floor], ["conf_ce_loss"]),
    "cac": ([cac_floor], ["directional_contrastive_loss"]),
    "ial": (
        [one_pass, unary_floor, region_floor, pairwise_floor],
        # Of the smoothness loss `project`, for its propagation is in the floor.
        ["region_loss", "affinity_loss", "project"],
    ),
}
IAL = dict(rounds=1, net_steps=(1.0, 1.0, 1.0), cam_scales=(1.0,))
STEPS = {  # rows of the first table: script, a title for each of its loops, settings
    "cps": ("cps", ["CPS"], dict(ramp=0.0, cutmix=False)),
    "cps-cutmix": ("cps", ["CPS + CutMix"], dict(ramp=0.0)),
    "psmt": ("psmt", ["PS-MT, no T-VAT"], dict(ramp=0.0, warmup=0.0, eps=0.0)),
    "psmt-vat": ("psmt", ["PS-MT"], dict(ramp=0.0, warmup=0.0)),
    # An untrained network is nowhere as confident as γ, and nothing would be contrasted.
    "cac": ("cac", ["CAC, γ = 0"], dict(warmup=0.0, gamma=0.0)),
    "ial": ("ial", [f"IAL, {s}" for s in "classifier unary region pairwise".split()], IAL),
}


class Enough(Exception):
    """All loops of a run that were to be measured are."""


class TimedRun(Run):
    """A script's run that takes times; it neither logs, evaluates nor saves."""

    watch: Stopwatch
    floors: list[Callable]
    warm: int  # steps before those that count
    empty: int  # bytes before the run
    rows: list[dict]

    log = evaluate = score = record = save = lambda self, *args, **values: None

    def wrap(self, network: nn.Module, *args: Any, **options: Any) -> nn.Module:
        self.net = super().wrap(network, *args, **options)
        return self.net

    def batches(self, *args: Any, **options: Any) -> Iterator[list[Tensor]]:
        return self.watch.iterate("loading", super().batches(*args, **options))

    def to_device(self, batch: list[Tensor]) -> list[Tensor]:
        moved = self.watch.timed("loading", super().to_device)(batch)
        self.seen.append(moved)
        return moved

    def loop(self, steps: range | None = None) -> Iterator[int]:
        floor, device, now = self.floors[len(self.rows)], self.watch.device, self.watch.now
        taken, peak = [], 0
        for index, step in enumerate(super().loop(steps)):
            self.seen, self.watch.spent, self.watch.since = [], Counter(), {}
            # Waiting for a GPU within a step makes it longer: every second step is not disturbed.
            self.watch.on = device != "cuda" or index % 2 == 1
            reset_peak(device)
            start, wall = now(), time.perf_counter()
            yield step
            spent = self.watch.spent
            spent["ms"] = 1000 * (now() - start)
            spent["wall"] = 1000 * (time.perf_counter() - wall)
            peak = max(peak, memory(device, peak=True))
            if index < self.warm - 1:
                continue
            start = now()
            floor(self, *self.seen)
            spent["floor"] = 1000 * (now() - start)
            for part in (self.net, *self.state.values()):
                if isinstance(part, nn.Module):
                    part.zero_grad()
            spent["ratio"] = spent["ms"] / spent["floor"]
            taken.append((self.watch.on, spent))
        whole = [spent for on, spent in taken[1:] if not on or device != "cuda"]  # 0: a warm-up
        times, parts = ("ms", "wall", "floor", "ratio"), ("loading", "optimiser", "loss")
        row = {name: median(spent[name] for spent in whole) for name in times}
        inside = [spent for on, spent in taken[1:] if on]
        shares = {part: median(spent[part] / spent["ms"] for spent in inside) for part in parts}
        shares["rest"] = 1 - 1 / row["ratio"] - sum(shares.values())
        row |= {part: f"{share:.1%}" for part, share in shares.items()}
        self.rows.append(row | dict(mib=(peak - self.empty) / 2**20))
        if len(self.rows) == len(self.floors):
            raise Enough


class TimedMaps(Maps):
    def loader(self, run: TimedRun, *args: Any) -> Iterator[list[Tensor]]:
        run.maps = self
        return run.watch.iterate("loading", super().loader(run, *args))


def measure_steps(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of the first table; for a new process."""
    (kind, titles, settings), watch = STEPS[name], Stopwatch(args.device)
    floors, names = LOOPS[kind]
    # Before a script imports it by name.
    losses.cross_entropy = watch.timed("loss", losses.cross_entropy)
    script = import_module(kind)
    for holder, name in [(F, "multilabel_soft_margin_loss"), *((script, name) for name in names)]:
        setattr(holder, name, watch.timed("loss", getattr(holder, name)))
    torch_optimizer.register_optimizer_step_pre_hook(partial(watch.start, "optimiser"))
    torch_optimizer.register_optimizer_step_post_hook(partial(watch.stop, "optimiser"))
    script.Run, script.Maps = TimedRun, TimedMaps

    if kind == "ial":  # its passes over all pictures are not measured
        shapes.COUNTS = {"train": max(24, args.batch or 16), "val": 10}
    for name in shapes.names("train"):  # as it is after the first epoch
        shapes.draw(name)
    cfg = config(script, args, **settings)
    warm = 2 + getattr(cfg, "bank", 0)  # a full bank
    steps = warm + args.steps * (2 if args.device == "cuda" else 1)
    TimedRun.watch, TimedRun.floors, TimedRun.rows, TimedRun.warm = watch, floors, [], warm
    TimedRun.empty = memory(args.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(Enough):
            script.train(replace(cfg, iters=steps, output_dir=f"{folder}/run"))
    return [dict(title=title, **row) for title, row in zip(titles, TimedRun.rows, strict=True)]


def config(script: Any, args: argparse.Namespace, **settings: Any) -> Any:
    """A script's Config: its default or its recipe for own pictures, and what the flags say."""
    own = {}
    if args.dataset == "folder":
        own = dict(weights="none", data_path=args.data, crop_size=128, batch_size=2)
        own |= dict(backbone="resnet50", width=256)
        own |= dict(net="resnet50") if script.__name__ == "ial" else {}
    given = dict(crop_size=args.crop, batch_size=args.batch, backbone=args.backbone)
    given = {name: value for name, value in (given | dict(width=args.width)).items() if value}
    machine = dict(device=args.device, amp=args.amp, workers=args.workers, eval_every=10**6)
    return script.recipe(args.dataset, **(own | given | machine | settings))


# --- parts: each a program beside a straightforward one ---


def four_loops(values: Tensor, gates: Tensor, passes: int = 1) -> Tensor:
    """`propagate` with a loop over lines for each scan, on vectors, by plain autograd."""
    for _ in range(passes):
        total = 0
        for direction in range(4):
            x, z = values, gates[:, direction]
            if direction >= 2:
                x, z = x.mT, z.mT
            if direction in (1, 3):
                x, z = x.flip(3), z.flip(3)
            border = torch.zeros_like(z, dtype=torch.bool)
            border[:, 0, 0] = border[:, 2, -1] = True
            before, same, after, own = z.masked_fill(border, -torch.inf).softmax(1).split(1, dim=1)
            h = x[..., 0]
            lines = [h]
            for t in range(1, x.shape[3]):
                near = F.pad(h, (1, 1))
                h = own[..., t] * x[..., t] + same[..., t] * h
                h = h + before[..., t] * near[..., :-2] + after[..., t] * near[..., 2:]
                lines.append(h)
            y = torch.stack(lines, dim=3)
            if direction in (1, 3):
                y = y.flip(3)
            total = total + (y.mT if direction >= 2 else y)
        values = total / 4
    return values


def propagation(
    library: bool, other: str, side: int, args: argparse.Namespace, small: bool
) -> Program:
    """4 pictures, 21 classes, two passes, forward and backward."""
    function = import_module("ial").propagate
    if library:
        function = four_loops if other == "four loops" else import_module("test_ial").by_pixel
    side = 8 if small else side
    values = torch.rand(4, 21, side, side).to(args.device).requires_grad_()
    gates = torch.randn(4, 4, 4, side, side).to(args.device).requires_grad_()

    def program() -> list[Tensor]:
        result = function(values, gates, 2)
        return [result.detach(), *torch.autograd.grad(result.square().sum(), [values, gates])]

    return program


def dense_loss(*inputs: Tensor) -> Tensor:
    """CAC's loss, one direction, all anchors against all negatives at once; autograd's gradient."""
    anchor, target, anchor_conf, target_conf, labels, negatives, negative_labels = inputs
    positive = (anchor * target.detach()).sum(dim=1, keepdim=True)
    negative = (anchor @ negatives.T).masked_fill(labels[:, None] == negative_labels, -torch.inf)
    losses = -(torch.cat([positive, negative], dim=1) / 0.1).log_softmax(dim=1)[:, 0]
    active = import_module("cac").active_anchors(anchor_conf, target_conf)
    return (active * losses).sum() / active.sum()


def contrast(dense: bool, size: int, args: argparse.Namespace, small: bool) -> Program:
    """Both directions on random features, as many cells as in the overlap of 4 crops of 320."""
    loss = dense_loss if dense else import_module("cac").directional_contrastive_loss
    cells, negatives = (64, 256) if small else (4_300, size)
    phi = torch.randn(2 * cells + negatives, 128)
    phi /= phi.norm(dim=1, keepdim=True)  # in place: a copy would raise the peak already
    phi1, phi2, pool = phi.to(args.device).split([cells, cells, negatives])
    labels = torch.randint(21, (len(phi),)).to(args.device).split([cells, cells, negatives])
    # In a third of the cases one is above γ = 0.75 and above the other.
    conf1, conf2 = (torch.rand(2, cells) ** 0.52).to(args.device)
    phi1.requires_grad_(), phi2.requires_grad_()

    def program() -> list[Tensor]:
        value = loss(phi1, phi2, conf1, conf2, labels[0], pool, labels[2])
        value = value + loss(phi2, phi1, conf2, conf1, labels[1], pool, labels[2])
        return [value.detach(), *torch.autograd.grad(value, [phi1, phi2])]

    return program


def superpixels(library: bool, args: argparse.Namespace, small: bool) -> Program:
    side, count = (32, 16) if small else (321, 600)
    smooth = F.interpolate(torch.rand(1, 3, 20, 20), (side, side), mode="bilinear")
    images = (smooth + 0.05 * torch.randn(1, 3, side, side)).clamp(0, 1).to(args.device)
    return partial(segment, library, images, count)


def segment(library: bool, images: Tensor, count: int, compactness: float = 10.0) -> Tensor:
    """(1, 3, H, W) -> superpixels (1, H, W), ours or those of scikit-image."""
    if not library:
        return slic(images, count, compactness)
    scikit = import_module("skimage.segmentation")
    image = images[0].permute(1, 2, 0).cpu().numpy()
    found = scikit.slic(image, count, compactness, max_num_iter=10, enforce_connectivity=False)
    return torch.from_numpy(found)[None]


def counting(library: bool, classes: int, args: argparse.Namespace, small: bool) -> Program:
    """Confusion of 8 pictures of 512 x 512, or a plain bincount of it."""
    shape = (1, 8, 8) if small else (8, 512, 512)
    predictions, labels = torch.randint(classes, (2, *shape)).to(args.device)
    if not library:
        return lambda: [confusion_matrix(predictions, labels, classes)]

    def plain() -> list[Tensor]:
        cells = (labels * classes + predictions).flatten()
        return [cells.bincount(minlength=classes**2).view(classes, classes)]

    return plain


def class_loss(classes: int, args: argparse.Namespace, small: bool) -> Program:
    """CPS's two losses and the pseudo labels, of 2 pictures of 256 x 256, and the gradient."""
    cps, side = import_module("cps"), 8 if small else 256
    logits = torch.randn(2, 2, classes, side, side).to(args.device).requires_grad_()
    labels = torch.randint(classes, (2, side, side)).to(args.device)

    def program() -> list[Tensor]:
        value = cps.supervised_loss(*logits, labels) + cps.cps_loss(*logits)
        return [*torch.autograd.grad(value, logits)]

    return program


def view(library: bool, name: str, crop: int, args: argparse.Namespace, small: bool) -> Program:
    """A labelled picture at each of the scales, read and augmented; or whole, by Pillow."""
    image, mask = f"{args.data}/{name}", f"{args.data}/{Path(name).stem}-mask.png"
    lookup = np.arange(256, dtype=np.uint8)

    def by_pillow(scale: float) -> None:
        picture, label = Image.open(image).convert("RGB"), Image.open(mask)
        size = [round(scale * side) for side in picture.size]
        padding = [0, 0, *(max(crop - side, 0) for side in size)]
        left, top = (int(max(side - crop, 0) * torch.rand(())) for side in size)
        flip, pair = torch.rand(()) < 0.5, []
        for whole, method, fill in ((picture, 2, (124, 116, 104)), (label, 0, 255)):
            cut = f2.crop(f2.pad(whole.resize(size, method), padding, fill), top, left, crop, crop)
            pair.append(f2.pil_to_tensor(f2.horizontal_flip(cut) if flip else cut))
        normalise(pair[0].float() / 255), pair[1].long()

    def ours(scale: float) -> None:
        train_view(*read_pair((image, mask), lookup), crop, (scale,))

    return lambda: list(map(by_pillow if library else ours, SCALES[:1] if small else SCALES)) and ()


SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
# Rows of the second table: title, our program, the one beside it and its name.
PARTS = {
    name: (title, partial(make, False, *sizes), partial(make, True, *sizes), beside)
    for name, title, make, sizes, beside in (
        ("jpeg", "6 views, 500 x 375 JPEG, crop 512", view, ["photo.jpg", 512], "Pillow, whole"),
        ("png", "6 views, 2048 x 1024 PNG, crop 800", view, ["street.png", 800], "Pillow, whole"),
        ("lines", "propagate, 4 x 21 x 81 x 81", propagation, ["four loops", 81], "four loops"),
        ("pixels", "propagate, 4 x 21 x 24 x 24", propagation, ["", 24], "loop over pixels"),
        ("contrast", "contrast, 4,300 cells, 51,200 negatives", contrast, [51_200], "dense"),
        ("slic", "slic, 321 x 321, 600 segments", superpixels, [], "scikit-image"),
        ("confusion", "confusion, 21 classes, 8 x 512 x 512", counting, [21], "bincount"),
    )
}


def measure_part(make: Callable, args: argparse.Namespace) -> tuple[float, float, list]:
    """ms, MiB, and what was computed; for a new process."""
    watch, times = Stopwatch(args.device), []
    torch.manual_seed(0)
    hold(2**20)
    make(args, True)()  # what the first call of all loads
    program = make(args, False)
    reset_peak(args.device)
    before = memory(args.device)
    computed = program()
    mib = (memory(args.device, peak=True) - before) / 2**20
    hold(2**25)  # as much as glibc would keep in a longer run
    while len(times) < 2 + args.steps and sum(times) < 8:
        start = watch.now()
        program()
        times.append(watch.now() - start)
    computed = computed if isinstance(computed, list) else []
    return 1000 * median(times[2:] or times), mib, [t.double().cpu().numpy() for t in computed]


def part_rows(name: str, args: argparse.Namespace) -> Iterator[dict]:
    title, ours, others, beside = PARTS[name]
    ms, mib, computed = alone(measure_part, ours, args)
    row = dict(title=title, ms=ms, mib=mib, beside=beside)
    try:
        ms2, mib2, expected = alone(measure_part, others, args)
    except ImportError:
        yield row | dict(note="not installed")
    else:
        row |= dict(ms2=ms2, mib2=mib2, ratio=ms2 / ms)
        pairs = zip(computed, expected, strict=True)
        errors = [abs(a - b).max() / max(abs(b).max(), 1e-12) for a, b in pairs]
        assert max(errors, default=0) < 1e-4, f"{name}: not equal to {beside}, {errors}"
        row |= dict(note=f"values, gradients equal to {max(errors):.0e}") if errors else {}
        if ours.func is view:
            row |= dict(note=f"{1000 * len(SCALES) / ms:.1f} pictures/s for 6 of them")
        yield row
    for library in (False, True) if name == "slic" else ():
        with contextlib.suppress(ImportError):
            note = alone(boundary_recall, library)
            yield dict(title="scikit-image" if library else "slic, drawn pictures", note=note)


def boundary_recall(library: bool) -> str:
    """The share of true borders that superpixels have, there or within 2 pixels."""

    def borders(labels: Tensor) -> Tensor:  # pixels unlike the one to the right or below
        right, below = F.pad(labels, (0, 1), value=-1), F.pad(labels, (0, 0, 0, 1), value=-1)
        edge = (labels != right[..., 1:]) | (labels != below[:, 1:])
        return F.pad(edge[:, :-1, :-1], (0, 1, 0, 1))

    exact = near = total = ids = 0
    names = shapes.names("val")[:40]
    for name in names:
        image, mask = map(torch.from_numpy, shapes.draw(name))
        labels = segment(library, image.permute(2, 0, 1)[None] / 255, 64 * 64 // 36, 20.0)
        found, truth = borders(labels), borders(mask[None].long())
        exact, total = exact + (found & truth).sum(), total + truth.sum()
        near += (F.max_pool2d(found.float(), 5, 1, 2).bool() & truth).sum()
        ids += len(labels.unique()) / len(names)
    return (
        f"boundary recall {exact / total:.1%}, {near / total:.1%} within 2 px; {ids:.0f} segments"
    )


def measure_evaluation(_: str, args: argparse.Namespace) -> list[dict]:
    """`evaluate` on the validation pictures: a row of the second table; for a new process."""
    cfg, watch = config(import_module("cps"), args), Stopwatch(args.device)
    data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
    count, kinds = len(data.val), len(data.classes)
    network = DeepLabV3Plus(kinds, cfg.backbone, None, cfg.width).to(args.device)
    network = network.to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(lambda *_: watch.start("forward"))
    network.register_forward_hook(lambda *_: watch.stop("forward"))
    loader, taken = list(val_loader(data, whole_view)), []
    native = has_bf16(torch.device(args.device))
    bf16 = args.amp == "bf16" or (args.amp == "auto" and native)
    for _ in range(2 + args.steps):
        watch.spent, start = Counter(), watch.now()
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            evaluate(network, loader, kinds, args.device)
        watch.spent["whole"] = 1000 * (watch.now() - start)
        for _, labels in loader:
            labels = labels.to(args.device)
            watch.timed("confusion", confusion_matrix)(labels % kinds, labels, kinds)
        taken.append(watch.spent)
    parts = "whole", "forward", "confusion"
    whole, forward, confusion = (median(spent[part] for spent in taken[2:]) for part in parts)
    note = f"{1000 * count / whole:.1f} pictures/s; forward is {forward / whole:.0%} of it, "
    note += f"the confusion matrix {confusion / forward:.1%} of forward"
    return [dict(title="evaluate, a picture", ms=whole / count, note=note)]


# --- growth ---


def growth_rows(_: str, args: argparse.Namespace) -> Iterator[dict]:
    """Rows of the third table: sizes, ms at each and their exponent, MiB and theirs."""
    crop, batch = args.crop or 48, args.batch or 8
    classes, negatives = [7, 21, 150], [6_400, 25_600, 102_400]

    def step(batch: int, crop: int) -> tuple[float, float]:
        values = vars(args) | dict(batch=batch, crop=crop)
        (row,) = alone(measure_steps, "cps", argparse.Namespace(**values))
        return row["ms"], row["mib"]

    def part(make: Callable, size: int) -> tuple[float, float]:
        return alone(measure_part, partial(make, size), args)[:2]

    for title, sizes, power, measure in (
        ("CPS, batch", [2, 4, 8], 1, lambda size: step(size, crop)),
        ("CPS, crop (of its area)", [crop, 2 * crop, 4 * crop], 2, lambda size: step(batch, size)),
        ("CPS losses, classes", classes, 1, partial(part, class_loss)),
        ("confusion, classes", classes, 1, partial(part, partial(counting, False))),
        ("contrast, negatives", negatives, 1, partial(part, partial(contrast, False))),
    ):
        row = dict(title=title, sizes=" / ".join(map(str, sizes)))
        for name, values in zip(("ms", "mib"), zip(*map(measure, sizes), strict=True), strict=True):
            slope = math.log(max(values[-1], 0.1) / max(values[0], 0.1))
            row[f"{name}_exponent"] = f"{slope / power / math.log(sizes[-1] / sizes[0]):.2f}"
            row[name] = " / ".join(f"{value:.4g}" for value in values)
        yield row


# --- the report ---


def write_pictures(root: Path, whole: bool) -> None:
    """Two pictures for the loader's rows; `whole`: a --dataset folder of 16 more, 500 x 375."""
    rng, names = np.random.default_rng(0), ["background", *(f"class {k}" for k in range(1, 21))]
    pictures = [("photo.jpg", "photo-mask.png", 500, 375)]
    pictures += [("street.png", "street-mask.png", 2048, 1024)]
    for index in range(16 if whole else 0):
        place = f"{'train' if index < 12 else 'val'}/{index}"
        pictures += [(f"images/{place}.jpg", f"masks/{place}.png", 500, 375)]
    for image, mask, *size in pictures:
        for path in (root / image, root / mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        noisy = np.asarray(smooth.resize(size, Image.BICUBIC)) + rng.normal(0, 9, (*size[::-1], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / image, quality=92)
        regions = Image.fromarray(rng.integers(0, len(names), (6, 8), np.uint8))
        regions.resize(size, Image.NEAREST).save(root / mask)
    (root / "classes.txt").write_text("\n".join(names))


def table(columns: str, rows: Iterable[dict]) -> None:
    """Print the columns of these names; a row may lack some."""
    names = columns.split()
    print("", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}", sep="\n", flush=True)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells)} |", flush=True)


def attempt(function: Callable, name: str, args: argparse.Namespace) -> Iterator[dict]:
    """Its rows, or one that says why there are none: others may still be measured."""
    try:
        yield from function(name, args)
    except Exception as error:  # out of memory, a process killed, results that differ
        yield dict(title=f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def report(args: argparse.Namespace) -> None:
    hidden = "rows", "data", "growth"
    flags = [f"--{k} {v}" for k, v in vars(args).items() if k not in hidden and v is not None]
    print(machine(args.device), f"PyTorch {torch.__version__}", "one thread", *flags, sep=", ")
    in_process = partial(alone, measure_steps)
    kinds = {"evaluate": partial(alone, measure_evaluation)} | dict.fromkeys(PARTS, part_rows)
    steps, parts = ([name for name in names if name in args.rows] for names in (STEPS, kinds))
    if steps:
        columns = "title ms wall floor ratio loading optimiser loss rest mib"
        table(columns, (row for name in steps for row in attempt(in_process, name, args)))
    if parts:
        columns = "title ms mib beside ms2 mib2 ratio note"
        table(columns, (row for name in parts for row in attempt(kinds[name], name, args)))
    if args.growth:
        table("title sizes ms ms_exponent mib mib_exponent", attempt(growth_rows, "growth", args))


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def main() -> None:
    names = [*STEPS, "evaluate", *PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--amp", choices=("none", "bf16", "auto"), default="auto")
    parser.add_argument("--dataset", choices=("shapes", "folder"), default="shapes")
    for name in ("crop", "batch", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--backbone")
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps; of parts fewer, in 8 s"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes per stream")
    parser.add_argument("--rows", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--growth", action="store_true", help="also how cost grows with sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.data:
        write_pictures(Path(args.data), whole=args.dataset == "folder")
        report(args)


if __name__ == "__main__":
    main()
