"""Time and memory of CAC's contrastive loss, and of the same loss with one dense matrix.

    python tests/benchmark_cac.py --step

Loss and gradient, both directions, at the sizes of a step on VOC: 4,300 cells in the overlap of the
crops of 4 pictures, of which a third learns in either direction, and 51,200 negatives. --step adds
what else a step computes: ResNet-50's passes over labelled pictures and two crops, forward and
backward, in float32. Every figure has a process and a thread of its own: the least time of three;
by how much the process's peak of memory rises (on a GPU: that of its tensors), while glibc, whose
heap may keep ten times what is in use, is told to give back what is freed.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cac import ContrastiveNet, active_anchors, directional_contrastive_loss
from common.deeplab import DeepLabV3Plus

CELLS, NEGATIVES, DIMS, CLASSES = 4_300, 51_200, 128, 21


def dense_loss(*inputs: Tensor) -> Tensor:
    """One direction, all anchors against all negatives at once; autograd does the rest."""
    anchor, target, anchor_conf, target_conf, labels, negatives, negative_labels = inputs
    positive = (anchor * target.detach()).sum(dim=1, keepdim=True)
    negative = (anchor @ negatives.T).masked_fill(labels[:, None] == negative_labels, -torch.inf)
    losses = -(torch.cat([positive, negative], dim=1) / 0.1).log_softmax(dim=1)[:, 0]
    active = active_anchors(anchor_conf, target_conf)
    return (active * losses).sum() / active.sum()


def both_directions(loss: Callable, device: str, small: bool) -> Callable:
    """What computes the loss of random features, and returns it with its gradients."""
    cells, negatives = (64, 256) if small else (CELLS, NEGATIVES)
    phi = torch.randn(2 * cells + negatives, DIMS)
    phi /= phi.norm(dim=1, keepdim=True)  # in place: a copy would raise the peak already
    phi1, phi2, pool = phi.to(device).split([cells, cells, negatives])
    labels = torch.randint(CLASSES, (len(phi),)).to(device).split([cells, cells, negatives])
    # In a third of the cases one is above γ = 0.75 and above the other.
    conf1, conf2 = (torch.rand(2, cells) ** 0.52).to(device)
    phi1.requires_grad_(), phi2.requires_grad_()

    def compute() -> list[Tensor]:
        value = loss(phi1, phi2, conf1, conf2, labels[0], pool, labels[2])
        value = value + loss(phi2, phi1, conf2, conf1, labels[1], pool, labels[2])
        return [value.detach(), *torch.autograd.grad(value, [phi1, phi2])]

    return compute


def passes(device: str, small: bool) -> Callable:
    """What computes all of a step but the contrastive loss."""
    net, crop = ContrastiveNet(DeepLabV3Plus(CLASSES), 256).to(device), 32 if small else 320
    batches = torch.randn(3, 4, 3, crop, crop).to(device)
    labels = torch.randint(CLASSES, (4, crop, crop)).to(device)

    def compute() -> list[Tensor]:
        logits, one, two = net(*batches)
        (F.cross_entropy(logits, labels) + one.phi.sum() + two.phi.sum()).backward()
        return []

    return compute


def measure(row: str, device: str, repeats: int) -> tuple[float, float, list]:
    """Seconds, peak memory in MiB, and what was computed; for a new process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ROWS[row](device, small=True)()  # what the first call of all loads
    compute, seconds, before = ROWS[row](device, small=False), [], peak(device)
    for _ in range(repeats):
        start = time.perf_counter()
        computed = [tensor.cpu().numpy() for tensor in compute()]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), (peak(device) - before) / 2**20, computed


def peak(device: str) -> int:
    """The most memory so far, in bytes: of the process, or of its tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


ROWS = {
    "cac.py, slices of 64 anchors": partial(both_directions, directional_contrastive_loss),
    "dense": partial(both_directions, dense_loss),
    "a step's passes, crops of 320": passes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--step", action="store_true", help="also a step's passes: minutes")
    args = parser.parse_args()
    rows = [*ROWS] if args.step else [*ROWS][:2]

    def in_a_process(row: str, repeats: int) -> tuple[float, float, list]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, (row, args.device, repeats))

    timed = [in_a_process(row, 3) for row in rows]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    for row, (seconds, *_) in zip(rows, timed, strict=True):
        print(f"{row:30} {seconds:8.3f} s {in_a_process(row, 1)[1]:8.0f} MiB", flush=True)
    (ours, _, computed), (_, _, expected) = timed[:2]
    errors = [abs(a - b).max() / abs(b).max() for a, b in zip(computed, expected, strict=True)]
    assert max(errors) < 1e-4, errors
    print(f"equal values and gradients: relative differences of {max(errors):.0e} and less")
    if args.step:
        print(f"of such a step the loss is {ours / (ours + timed[2][0]):.0%}")


if __name__ == "__main__":
    main()
