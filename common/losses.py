"""Supervised losses that no paper of ours claims. 255 is void everywhere."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

OHEM_KEPT = 50_000  # pixels a picture, however easy
VOID = 255  # the label of a pixel that does not count


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not void; 0, with zero gradient, without any.

    logits (B, K, H, W), labels (B, H, W) -> (). F.cross_entropy's own mean is NaN on a crop that
    is void throughout.
    """
    # A GPU's own sum has no fixed order, which --deterministic asks for.
    reduction = "none" if torch.are_deterministic_algorithms_enabled() else "sum"
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction=reduction).sum()
    return total / (labels != VOID).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float = 0.7, min_kept: int = 50_000
) -> Tensor:
    """Cross-entropy over the hard pixels: online hard example mining, as for Cityscapes.

    logits (B, K, H, W), labels (B, H, W) -> (). A pixel is kept when the probability p of its true
    class is at most max(threshold, the min_kept-th smallest p); all are kept when fewer than
    min_kept are valid. Nothing valid: 0, with zero gradient.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")  # (B, H, W)
    valid = labels != VOID
    # exp(-loss) is p. Void pixels count as p = 1: with fewer than min_kept valid ones they lift
    # the threshold to 1, which keeps every valid pixel.
    p = torch.where(valid, torch.exp(-losses.detach()), 1.0)
    # Δ C: with min_kept = 0 the threshold decides alone; in C of CPS every valid pixel is kept.
    rank = min(min_kept, p.numel())
    if rank > 0:
        # `kthvalue` would do, but on a GPU takes a single block for all of them.
        lowest = p.flatten().topk(rank, largest=False, sorted=False).values
        threshold = lowest.amax().clamp(min=threshold)
    kept = valid & (p <= threshold)
    return torch.where(kept, losses, 0.0).sum() / kept.sum().clamp(min=1)


def supervised_criterion(ohem: bool, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What labels teach with: cross-entropy, or OHEM that keeps OHEM_KEPT pixels a picture."""
    return partial(ohem_cross_entropy, min_kept=OHEM_KEPT * batch_size) if ohem else cross_entropy
