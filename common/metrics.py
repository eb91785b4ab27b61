"""Mean intersection over union, counted in integers on the device."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.losses import VOID


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (K, K) int64 on the inputs' device; rows are truth, columns predictions.

    predictions, labels: integer tensors of one shape. Void pixels are left out. Raises ValueError
    for any other label, or prediction, outside [0, K).
    """
    return _checked(_count(predictions, labels, num_classes), num_classes)


def iou(confusion: Tensor) -> Tensor:
    """IoU by class, (..., K, K) -> (..., K) float64; NaN for a class that occurs nowhere."""
    counts = confusion.cpu().double()  # Metal has no float64
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return hits / (counts.sum(dim=-2) + counts.sum(dim=-1) - hits)


def mean_iou(confusion: Tensor) -> float:
    """Mean of `iou` over the classes that occur in truth or prediction."""
    return iou(confusion).nanmean().item()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str,
    window: tuple[int, int] | None = None,
    several: int = 0,
) -> Tensor:
    """Confusion matrix (K, K) of the model over a loader, on the device.

    several: M where the model gives the logits of M models, (M, B, K, H, W); then (M, K, K).
    The loader gives images (B, 3, H, W), normalised, and labels (B, H, W) at the pictures' own
    size. window: None for whole pictures, or (crop, stride) of sliding windows, whose logits are
    summed. Each process gives its own share of the pictures; all get the sum.
    """
    shape = max(several, 1), num_classes**2 + 2
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    with evaluating(model):
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            predictions = classify(model, images, window).view(-1, *labels.shape)  # (M, B, H, W)
            counts += torch.stack([_count(p, labels, num_classes) for p in predictions])
    if dist.is_initialized():
        dist.all_reduce(counts)
    confusions = _checked(counts, num_classes)
    return confusions if several else confusions[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then each module is back in its own former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def classify(model: nn.Module, images: Tensor, window: tuple[int, int] | None) -> Tensor:
    """The classes with the highest logits, (..., H, W) uint8; window is that of `evaluate`."""
    parts = [model(images)] if window is None else slide(model, images, *window)
    # `argmax` would take four times as long on a CPU, a tenth of a forward pass.
    return torch.cat([logits.max(dim=-3).indices.byte() for logits in parts], dim=-2)


def slide(model: nn.Module, images: Tensor, crop: int, stride: int) -> Iterator[Tensor]:
    """Sum of the model's logits over windows of crop x crop pixels: (..., K, rows, W), downwards.

    Windows start every `stride` pixels; the last one is moved inward to end at the border. A
    picture smaller than the window is seen whole along that side. Rows are given away as soon as
    no further window reaches them: logits are held of crop rows, not of the whole picture.
    """
    # Δ C: no padding; C of CPS pads a side that is shorter than the window on both ends.
    height, width = images.shape[-2:]
    tops, total = window_starts(height, crop, stride), None
    for top, below in zip(tops, [*tops[1:], height], strict=True):
        above, total = total, None  # what windows further up have summed of these rows
        for left in window_starts(width, crop, stride):
            logits = model(images[..., top : top + crop, left : left + crop])
            if total is None:
                total = logits.new_zeros(*logits.shape[:-1], width)
                if above is not None:
                    total[..., : above.shape[-2], :] = above
            total[..., left : left + logits.shape[-1]] += logits
        yield total[..., : below - top, :]
        total = total[..., below - top :, :]


def windows(side: int) -> tuple[int, int] | None:
    """Side and stride of sliding windows, that of the released code; None for whole pictures."""
    if side < 0 or 0 < side < 32:
        raise ValueError(f"a window's side must be 0, or 32 pixels and more, not {side}")
    return (side, math.ceil(side * 2 / 3)) if side else None


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows start along a side: 0, stride, 2 stride, ..., and the last at length - crop."""
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def _count(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts (K * K + 2,): the matrix row by row, void pixels, pixels outside [0, K).

    Bad pixels go to a cell of their own, for a look at it would make the host wait for the
    device at every batch. (So would `bincount`, whose size depends on its input.)
    """
    predictions, labels = predictions.flatten().long(), labels.flatten().long()
    bad = (labels < 0) | (labels >= num_classes) | (predictions < 0) | (predictions >= num_classes)
    cells = labels * num_classes + predictions
    cells = torch.where(bad, num_classes**2 + 1, cells)
    cells = torch.where(labels == VOID, num_classes**2, cells)
    counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, cells, torch.ones_like(cells))


def _checked(counts: Tensor, num_classes: int) -> Tensor:
    """Counts (..., K * K + 2) as matrices (..., K, K)."""
    if bad := counts[..., -1].sum().item():
        raise ValueError(f"{bad} pixels have a label or a prediction outside [0, {num_classes})")
    return counts[..., :-2].unflatten(-1, (num_classes, num_classes))
