"""Superpixels by SLIC (Achanta et al., TPAMI 2012), batched."""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# Features are rounded to whole multiples of 1 / UNITS and summed as integers. Such a sum is the
# same in any order, and a GPU adds in any: the same picture gives the same superpixels every time.
UNITS = 256
RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def grid_shape(segments: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of nearly square cells, about `segments` in all: the grid of `slic`.

    The shorter side is rounded first; the longer one makes up for it, and the product misses
    `segments` by at most half the number of cells along the shorter side.
    """
    if not 1 <= segments <= height * width:
        raise ValueError(f"{segments} segments in a picture of {height} x {width} pixels")
    short, long = sorted((height, width))
    few = max(round((segments * short / long) ** 0.5), math.ceil(segments / long))
    many = round(segments / few)
    return (few, many) if height <= width else (many, few)


@torch.no_grad()
def slic(images: Tensor, segments: int, compactness: float = 10.0, iterations: int = 10) -> Tensor:
    """Superpixel ids (B, H, W) int64 of images (B, 3, H, W), RGB in [0, 1].

    k-means on CIE Lab and place, from a regular grid of `grid_shape(segments, H, W)` cells, row by
    row; each pixel joins the nearest of the nine centres around its own cell. The squared distance
    is d_colour^2 + (compactness d_place / side)^2, with `side` that of a cell. Ids are below
    rows x columns; a segment may be empty, or in several pieces: neither connectivity nor a start
    at low gradients is enforced.
    """
    batch, _, height, width = images.shape
    rows, columns = grid_shape(segments, height, width)
    cells = rows * columns
    down, across = (torch.arange(length, device=images.device) for length in (height, width))

    scale = compactness * (cells / (height * width)) ** 0.5
    place = scale * torch.stack(torch.meshgrid(down, across, indexing="ij"))  # (2, H, W)
    colour = to_lab(images.float())
    features = torch.cat([colour, place.expand(batch, -1, -1, -1)], dim=1)  # (B, 5, H, W)
    # A sixth channel of ones counts the pixels.
    features = F.pad((UNITS * features).round().flatten(2), (0, 0, 0, 1), value=1)  # (B, 6, HW)

    # The order in memory: the first pixel of each cell, the second of each, ..., P in the largest
    # cell. Places that a smaller one lacks hold zeros and count as no pixel. Centres then lie side
    # by side just as pixels do, and sums of different segments grow in turn: quick on a CPU.
    tall, wide = math.ceil(height / rows), math.ceil(width / columns)  # P = tall x wide
    cell = (down * rows // height)[:, None] * columns + across * columns // width  # (H, W)
    within = (down * rows % height // rows)[:, None] * wide + across * columns % width // columns
    slot = within * cells + cell  # (H, W)
    whole = features.new_zeros(batch, 6, tall * wide * cells)
    whole.scatter_(2, slot.flatten().expand_as(features), features)
    features = (whole[:, :5] / UNITS).unflatten(2, (-1, cells))  # (B, 5, P, cells)
    whole = whole.long()

    home = torch.arange(cells, device=images.device)
    labels, centres = home.repeat(batch, tall * wide, 1), 0.0  # (B, P, cells)
    # From a cell's id to the nine around it, in rising order; less `far`, all are negative.
    far = 3 * columns
    steps = [dy * columns + dx - far for dy, dx in product((-1, 0, 1), repeat=2)]
    steps = torch.tensor(steps, dtype=torch.float, device=images.device)[:, None, None]
    # A few pixels of each cell at a time: their distances fit a CPU's caches, or keep a GPU busy.
    few = max((2**14 if images.device.type == "cpu" else 2**20) // (batch * cells), 1)
    for _ in range(iterations):
        sums = whole.new_zeros(batch, 6, cells)
        sums.scatter_add_(2, labels.flatten(1)[:, None].expand_as(whole), whole)
        sums, sizes = sums.split((5, 1), dim=1)
        means = sums / (UNITS * sizes.clamp(min=1))
        centres = torch.where(sizes > 0, means, centres)  # an empty segment keeps its own

        # Beyond the grid's border the centres are infinitely far away.
        around = F.pad(centres.unflatten(2, (rows, columns)), (1, 1, 1, 1), value=torch.inf)
        around = F.unfold(around, 3).view(batch, 5, 9, 1, cells)
        for label, feature in zip(labels.split(few, 1), features.split(few, 2), strict=True):
            distance, *others = (feature[:, :, None] - around).square_().unbind(1)
            for other in others:
                distance += other  # (B, 9, few, cells)
            # The first of the nearest; in place and in floats, for masks of bools are slower.
            nearest = distance.eq_(distance.amin(dim=1, keepdim=True))
            label.copy_(nearest.mul_(steps).amin(dim=1)).add_(home + far)
    return labels.flatten(1)[:, slot]


def to_lab(images: Tensor) -> Tensor:
    """CIE L*a*b* (B, 3, H, W) of sRGB images (B, 3, H, W) in [0, 1]; white is D65.

    By IEC 61966-2-1, which makes the values linear, and CIE 15.
    """
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(1)
    f = []
    for r, g, b in RGB_TO_XYZ:
        # White is the matrix's own, so that greys have a = b = 0.
        t = (r * red + g * green + b * blue) / (r + g + b)
        f.append(torch.where(t > (6 / 29) ** 3, t ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29))
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], dim=1)
