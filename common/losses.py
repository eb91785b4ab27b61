"""Supervised losses that no paper of ours claims. 255 is void everywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import VOID


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not void; 0, with zero gradient, without any.

    logits (B, K, H, W), labels (B, H, W) -> (). F.cross_entropy's own mean is NaN on a crop that
    is void throughout.
    """
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
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
    rank = min(min_kept, p.numel())
    if rank > 0:
        threshold = p.flatten().kthvalue(rank).values.clamp(min=threshold)
    kept = valid & (p <= threshold)
    return torch.where(kept, losses, 0.0).sum() / kept.sum().clamp(min=1)


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of regions, the mean over classes of the mean over a class's regions.

    logits (B, S, C), labels (B, S), 255 unknown -> (). Nothing known: 0, with zero gradient.
    """
    known = labels != VOID
    onehot = F.one_hot(labels.masked_fill(~known, 0), logits.shape[2]) * known[..., None]
    losses = -(onehot * logits.float().log_softmax(dim=2)).sum(dim=(0, 1))  # (C,)
    sizes = onehot.sum(dim=(0, 1))
    return (losses / sizes.clamp(min=1)).sum() / (sizes > 0).sum().clamp(min=1)
