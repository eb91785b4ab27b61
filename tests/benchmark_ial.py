"""Time and memory of IAL's propagation and of SLIC, next to straightforward programs.

Each row runs in a process of its own: the smallest time of a few repeats, and by how much the
first repeat raises the process's peak memory (on a GPU: the peak of what is allocated).

    python tests/benchmark_ial.py --threads 1
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.slic import slic
from ial import propagate


def by_pixel(values: Tensor, gates: Tensor, passes: int = 1, rule: str = "softmax") -> Tensor:
    """`propagate`, pixel by pixel as the recurrence is written; the tests' reference too."""
    height, width = values.shape[2:]
    for _ in range(passes):
        scans = []
        for direction in range(4):
            behind = 1 if direction in (1, 3) else -1  # right to left and bottom to top
            rows, columns = range(height)[::-behind], range(width)[::-behind]
            if direction < 2:
                order = [(r, c) for c in columns for r in rows]
            else:
                order = [(r, c) for r in rows for c in columns]
            x, z = pixels(values), pixels(gates[:, direction])  # (B, C), (B, 4) each
            h = {}
            for r, c in order:
                if direction < 2:
                    places = [(r + k, c + behind) for k in (-1, 0, 1)]
                else:
                    places = [(r + behind, c + k) for k in (-1, 0, 1)]
                found = [k for k, place in enumerate(places) if place in x]
                *weights, own = weights_of(z[r, c], found, rule)
                h[r, c] = own * x[r, c]
                for k, weight in zip(found, weights, strict=True):
                    h[r, c] = h[r, c] + weight * h[places[k]]
            lines = [torch.stack([h[r, c] for c in range(width)], dim=2) for r in range(height)]
            scans.append(torch.stack(lines, dim=2))
        values = sum(scans) / 4
    return values


def pixels(maps: Tensor) -> dict[tuple[int, int], Tensor]:
    """(B, C, H, W) -> (B, C) by (row, column)."""
    return {
        (r, c): column
        for r, row in enumerate(maps.unbind(2))
        for c, column in enumerate(row.unbind(2))
    }


def weights_of(z: Tensor, found: list[int], rule: str) -> list[Tensor]:
    """Weights (B, 1) of the sources that exist, and of the pixel's own value, from z (B, 4)."""
    if rule == "softmax":
        return list(z[:, [*found, 3]].softmax(dim=1).split(1, dim=1))
    total = z[:, :3].abs().sum(dim=1, keepdim=True).clamp(min=1e-6)
    weights = [z[:, k : k + 1] / total for k in found]
    return [*weights, 1 - sum(weights, torch.zeros_like(total))]


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


SIDE, SMALL = 81, 12  # of the maps; the loop over pixels is timed on the small one
# name: program, side of the map, repeats, factor of time and memory
ROWS = {
    "propagate": (propagate, SIDE, 5, 1.0),
    "four loops": (four_loops, SIDE, 3, 1.0),
    f"loop over pixels, scaled up from {SMALL} x {SMALL}": (
        by_pixel,
        SMALL,
        1,
        (SIDE / SMALL) ** 2,
    ),
}


def forward_and_backward(program: Callable, side: int, device: str) -> Callable[[], None]:
    values = torch.rand(4, 21, side, side, device=device, requires_grad=True)
    gates = torch.randn(4, 4, 4, side, side, device=device, requires_grad=True)
    return lambda: program(values, gates, 2).square().sum().backward()


def superpixels(device: str) -> Callable[[], None]:
    smooth = F.interpolate(torch.rand(1, 3, 20, 20), (321, 321), mode="bilinear")
    images = (smooth + 0.05 * torch.randn(1, 3, 321, 321)).clamp(0, 1).to(device)
    return lambda: slic(images, 600)


def measure(name: str, device: str, threads: int) -> tuple[float, float]:
    """Seconds, and peak memory in MB, of one row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name in ROWS:
        program, side, repeats, factor = ROWS[name]
        forward_and_backward(program, 8, device)()  # whatever the first call of all loads
        run = forward_and_backward(program, side, device)
    else:
        slic(torch.rand(1, 3, 32, 32, device=device), 16)
        run, repeats, factor = superpixels(device), 5, 1.0
    seconds, megabytes = [], 0.0
    for _ in range(repeats):
        peak = peak_bytes(device)
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
        megabytes = max(megabytes, (peak_bytes(device) - peak) / 1e6)
    return factor * min(seconds), factor * megabytes


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args()
    print("propagate: forward and backward, 4 pictures, 21 classes, 81 x 81, two passes")
    names = [*ROWS, "slic: 321 x 321, 600 segments, 10 iterations"]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        first = None
        for name in names:
            seconds, megabytes = pool.apply(measure, (name, args.device, args.threads))
            first = first or seconds
            ratio = f"{seconds / first:8.1f} x" if name in ROWS else ""
            print(f"{name:45} {seconds:10.4f} s {megabytes:8.1f} MB {ratio}", flush=True)


if __name__ == "__main__":
    main()
