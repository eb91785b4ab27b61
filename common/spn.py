"""Spatial propagation (SPN; Liu et al., NIPS 2017): values that walk over a picture, line by line.

Four scans in one loop, with a gradient that needs little memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.slic import at_least_float32

# Which pixel (row, column) feeds pixel (0, 0), for the sources before, same and after of each scan.
SOURCES = (
    ((-1, -1), (0, -1), (1, -1)),  # left to right: the previous line is the column on the left
    ((-1, 1), (0, 1), (1, 1)),  # right to left
    ((-1, -1), (-1, 0), (-1, 1)),  # top to bottom: the row above
    ((1, -1), (1, 0), (1, 1)),  # bottom to top
)


def propagate(values: Tensor, gates: Tensor, passes: int = 1, rule: str = "softmax") -> Tensor:
    """G^passes applied to a map: G is the mean of four scans, each of which is

        h[r, c] = own[r, c] x[r, c] + sum over k of gate_k[r, c] h[r + k, c - 1]

    for the scan from left to right, with k = -1, 0, 1 and the weights of `gate_weights`.

    values (B, C, H, W), gates (B, 4, 4, H, W), logits -> (B, C, H, W), float32 at least. One G
    for all channels (ours), with rows that sum to 1: a map that sums to 1 over classes still does.
    The recurrence is SPN's (cited), as are two passes. The mean of the four scans is ours: SPN
    takes the elementwise maximum, which is not linear, so that there is no G.
    """
    values, (batch, _, height, width) = at_least_float32(values), values.shape
    weights = gate_weights(at_least_float32(gates), rule).unbind(1)
    neighbours, own = to_lines(*weights).split((3, 1), dim=1)  # (L, 3, J), (L, 1, J)
    for _ in range(passes):
        lines = to_lines(values, values, values, values)  # (L, C, J)
        lines = Scan.apply(own * lines, neighbours)
        values = mean_of_scans(lines, batch, height, width)
    return values


def gate_weights(gates: Tensor, rule: str = "softmax") -> Tensor:
    """The weights of a pixel's sources, sum 1: gates (B, 4, 4, H, W) -> (B, 4, 4, H, W).

    Axis 1: scan left to right, right to left, top to bottom, bottom to top. Axis 2: the previous
    line's neighbour before (row r - 1, or column c - 1), same, after, and the pixel's own value.
    A source outside the picture has weight 0, and the others still sum to 1 (cited: SPN).
    softmax (ours): over the sources that exist. No weight is negative, hence G >= 0: the graph
    that the paper's theory asks for. abs (cited: SPN's code): z / sum of |z| over the three
    neighbours, the fourth logit unused, the own weight what is missing to 1. Weights can be
    negative; where all z > 0, the own weight is 0 inside the picture.
    """
    if rule not in ("softmax", "abs"):
        raise ValueError(f'rule is "softmax" or "abs", not {rule!r}')
    height, width = gates.shape[-2:]
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=gates.device), (1, 1, 1, 1))
    exists = torch.stack(
        [inside[1 + y :, 1 + x :][:height, :width] for scan in SOURCES for y, x in scan]
    ).view(4, 3, height, width)
    if rule == "softmax":
        exists = F.pad(exists, (0, 0, 0, 0, 0, 1), value=True)  # a pixel's own value always does
        return gates.masked_fill(~exists, -torch.inf).softmax(dim=2)
    z = gates[:, :, :3]
    weights = z / z.abs().sum(dim=2, keepdim=True).clamp(min=1e-6) * exists
    return torch.cat([weights, 1 - weights.sum(dim=2, keepdim=True)], dim=2)


def to_lines(right: Tensor, left: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Four maps (B, C, H, W), one for each scan -> lines (L, C, J) in the order of scanning.

    All four scans run in one loop, over L = max(H, W) lines. A line is a column for the scans
    `right` and `left`, a row for `down` and `up`; those of all scans and pictures lie end to end,
    J = 4 B L. Scans with fewer or shorter lines are filled up with zeros.
    """
    height, width = right.shape[2:]
    scans = [
        right.permute(3, 1, 0, 2),  # (W, C, B, H)
        left.permute(3, 1, 0, 2).flip(0),
        down.permute(2, 1, 0, 3),  # (H, C, B, W)
        up.permute(2, 1, 0, 3).flip(0),
    ]
    if height != width:
        side = max(height, width)
        ends = [(0, side - scan.shape[3], 0, 0, 0, 0, 0, side - len(scan)) for scan in scans]
        scans = [F.pad(scan, end) for scan, end in zip(scans, ends, strict=True)]
    return torch.stack(scans, dim=2).flatten(2)


def mean_of_scans(lines: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Lines (L, C, 4 B L) of the four scans back in place: their mean, (B, C, H, W)."""
    right, left, down, up = lines.unflatten(2, (4, batch, -1)).unbind(2)  # (L, C, B, L)
    columns = right[:width, ..., :height] + left[:width, ..., :height].flip(0)
    rows = down[:height, ..., :width] + up[:height, ..., :width].flip(0)
    return (columns.permute(2, 1, 3, 0) + rows.permute(2, 1, 0, 3)) / 4


class Scan(torch.autograd.Function):
    """h_t = x_t + before_t S h_(t-1) + same_t h_(t-1) + after_t S' h_(t-1), line by line.

    inputs x (L, C, J), gates (L, 3, J) -> h (L, C, J); S shifts a line by one place to the right,
    S' to the left. Nothing crosses from one picture into the next, for gates are 0 at borders.
    Autograd would keep every product of every step. All that the gradient takes is h and the
    gates: the adjoint of a scan is a scan from the other end, with the gates of the line it leaves.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, gates: Tensor) -> Tensor:
        h = F.pad(inputs, (1, 1))  # one place more at each end, for the shifts
        left, here, right = shifts(h)
        before, same, after = (gate.unbind() for gate in gates[:, :, None].unbind(1))
        for t in range(1, len(h)):
            now = here[t].addcmul_(before[t], left[t - 1])
            now.addcmul_(same[t], here[t - 1]).addcmul_(after[t], right[t - 1])
        ctx.save_for_backward(h, gates)
        return h[..., 1:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        h, gates = ctx.saved_tensors
        d = F.pad(grad, (1, 1))  # becomes dL/dh, which is also dL/dx
        left, here, right = shifts(d)
        # What place j - 1 gave to j through `before`, place j gave to j + 1.
        before, same, after = F.pad(gates[:, :, None], (1, 1)).unbind(1)
        before, same, after = shifts(before)[2], shifts(same)[1], shifts(after)[0]
        for t in range(len(h) - 1, 0, -1):
            last = here[t - 1].addcmul_(before[t], right[t])
            last.addcmul_(same[t], here[t]).addcmul_(after[t], left[t])
        d = d[..., 1:-1]
        if not ctx.needs_input_grad[1]:
            return d, None
        length = d.shape[2]
        shifted = [h[:-1, :, k : k + length] for k in range(3)]
        slopes = torch.stack([(d[1:] * source).sum(dim=1) for source in shifted], dim=1)
        return d, F.pad(slopes, (0, 0, 0, 0, 1, 0))  # the first line has no gates


def shifts(padded: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of padded lines (L, C, J + 2), by line: left neighbours, the places, right ones."""
    return [view.unbind() for view in (padded[..., :-2], padded[..., 1:-1], padded[..., 2:])]
