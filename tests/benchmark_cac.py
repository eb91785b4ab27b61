"""Time and memory of CAC's contrastive loss, against the same loss with one dense matrix.

    python tests/benchmark_cac.py --device cpu --threads 1

Forward and backward of both directions at the sizes of a step on VOC: 4 pictures with 4,300 cells
in the overlap of their crops, of which a third learns in either direction, and 51,200 negatives.
Each variant runs in a process of its own, since a process knows only its highest peak so far.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
ANCHORS, NEGATIVES, DIMS, CLASSES = 4_300, 51_200, 128, 21
TAU, GAMMA = 0.1, 0.75


def dense_loss(
    anchor: Tensor,
    target: Tensor,
    anchor_conf: Tensor,
    target_conf: Tensor,
    anchor_labels: Tensor,
    negatives: Tensor,
    negative_labels: Tensor,
) -> Tensor:
    """One direction, all anchors against all negatives at once; autograd does the rest."""
    positive = (anchor * target.detach()).sum(dim=1, keepdim=True) / TAU
    logits = anchor @ negatives.T / TAU
    logits = logits.masked_fill(anchor_labels[:, None] == negative_labels, -torch.inf)
    losses = -torch.cat([positive, logits], dim=1).log_softmax(dim=1)[:, 0]
    active = (target_conf > GAMMA) & (anchor_conf < target_conf)
    return (active * losses).sum() / active.sum().clamp(min=1)


def crop_pair(anchors: int, negatives: int, device: str) -> tuple[list[tuple], tuple]:
    """(features, confidences, labels) of the overlap in each crop, and the negatives with theirs.

    A uniform number to the power of 0.52 is above 0.75 and above another such one in a third of
    the cases.
    """
    torch.manual_seed(0)

    def features(count: int) -> tuple[Tensor, Tensor]:
        phi = torch.randn(count, DIMS)
        phi /= phi.norm(dim=1, keepdim=True)  # in place: a copy would raise the peak already
        return phi.to(device), torch.randint(CLASSES, (count,)).to(device)

    crops = []
    for _ in range(2):
        phi, labels = features(anchors)
        crops.append((phi.requires_grad_(), (torch.rand(anchors) ** 0.52).to(device), labels))
    return crops, features(negatives)


def peak(device: str) -> int:
    """The most memory so far, in bytes: of the process, or of its tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(variant: str, device: str, threads: int, repeats: int) -> dict:
    """Seconds, bytes, the loss and its gradients; for a process that has done nothing yet."""
    # Here, not above: the process that starts the others needs no more than torch.
    from cac import active_anchors, directional_contrastive_loss

    torch.set_num_threads(threads)
    loss = directional_contrastive_loss if variant == "ours" else dense_loss

    def step(crops: list[tuple], negatives: tuple) -> tuple[Tensor, list[Tensor]]:
        (phi1, conf1, labels1), (phi2, conf2, labels2) = crops
        value = loss(phi1, phi2, conf1, conf2, labels1, *negatives)
        value = value + loss(phi2, phi1, conf2, conf1, labels2, *negatives)
        gradients = torch.autograd.grad(value, [phi1, phi2])
        if device == "cuda":
            torch.cuda.synchronize()
        return value, gradients

    step(*crop_pair(64, 256, device))  # libraries load and allocate at their first call
    crops, negatives = crop_pair(ANCHORS, NEGATIVES, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    value, gradients = step(crops, negatives)
    used = peak(device) - before

    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(crops, negatives)
        seconds.append(time.perf_counter() - start)
    conf1, conf2 = (conf for _, conf, _ in crops)
    active = [int(active_anchors(*confs).sum()) for confs in ((conf1, conf2), (conf2, conf1))]
    value, *gradients = (tensor.detach().cpu() for tensor in (value, *gradients))
    return dict(
        seconds=min(seconds), bytes=used, active=active, loss=value, gradients=list(gradients)
    )


def in_a_process(variant: str, args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/measured.pt"
        flags = [f"--{name}={getattr(args, name)}" for name in ("device", "threads", "repeats")]
        subprocess.run(
            [sys.executable, __file__, *flags, f"--variant={variant}", f"--save={path}"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)},
            check=True,
        )
        return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts [%(default)s]")
    parser.add_argument("--variant", choices=("ours", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    if args.variant:
        measured = measure(args.variant, args.device, args.threads, args.repeats)
        torch.save(measured, args.save)
        return

    ours, dense = (in_a_process(variant, args) for variant in ("ours", "dense"))
    torch.testing.assert_close(ours["loss"], dense["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["gradients"], dense["gradients"], rtol=1e-3, atol=1e-7)
    where = f"cpu, {args.threads} thread(s)"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, float32, {DIMS} dimensions, {CLASSES} classes")
    print(
        f"{ANCHORS:,} cells in the overlap, of which {ours['active'][0]:,} and "
        f"{ours['active'][1]:,} learn; {NEGATIVES:,} negatives; forward and backward"
    )
    print(f"{'':8}{'seconds':>10}{'peak MiB':>10}")
    for name, row in (("ours", ours), ("dense", dense)):
        print(f"{name:8}{row['seconds']:10.4f}{row['bytes'] / 2**20:10.0f}")
    ratios = [dense[key] / ours[key] for key in ("seconds", "bytes")]
    print(f"{'ratio':8}{ratios[0]:10.1f}{ratios[1]:10.1f}")
    print(f"same loss ({ours['loss']:.6f}) and gradients")


if __name__ == "__main__":
    main()
