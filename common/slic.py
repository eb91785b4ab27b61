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
def slic(
    images: Tensor,
    segments: int,
    compactness: float = 10.0,
    iterations: int = 10,
    color: str = "lab",
) -> Tensor:
    """Superpixel ids (B, H, W) int64 of images (B, 3, H, W), RGB in [0, 1].

    k-means on colour and place, from a regular grid of `grid_shape(segments, H, W)` cells, row by
    row; each pixel joins the nearest of the nine centres around its own cell. The squared distance
    is d_colour^2 + (compactness d_place / side)^2, with `side` that of a cell. color: "lab"
    (CIE Lab) or "rgb" (times 100). Ids are below rows x columns; a segment may be empty, or in
    several pieces: neither connectivity nor a start at low gradients is enforced.
    """
    if color not in ("lab", "rgb"):
        raise ValueError(f'color is "lab" or "rgb", not {color!r}')
    batch, _, height, width = images.shape
    rows, columns = grid_shape(segments, height, width)
    down, across = (torch.arange(length, device=images.device) for length in (height, width))
    row, column = down * rows // height, across * columns // width  # (H,), (W,)  a pixel's cell
    home = row[:, None] * columns + column  # (H, W)

    scale = compactness * (rows * columns / (height * width)) ** 0.5
    place = scale * torch.stack(torch.meshgrid(down, across, indexing="ij"))  # (2, H, W)
    colour = to_lab(images.float()) if color == "lab" else 100 * images.float()
    features = torch.cat([colour, place.expand(batch, -1, -1, -1)], dim=1)  # (B, 5, H, W)
    whole = (UNITS * features).round()
    features = whole / UNITS
    # A sixth channel of ones counts the pixels.
    whole = F.pad(whole.long().flatten(2), (0, 0, 0, 1), value=1)  # (B, 6, HW)

    labels, centres = home.repeat(batch, 1, 1), 0.0
    for _ in range(iterations):
        sums = whole.new_zeros(batch, 6, rows * columns)
        sums.scatter_add_(2, labels.flatten(1)[:, None].expand_as(whole), whole)
        sums, sizes = sums.split((5, 1), dim=1)
        means = sums / (UNITS * sizes.clamp(min=1))
        centres = torch.where(sizes > 0, means, centres)  # an empty segment keeps its own

        # Beyond the grid's border the centres are infinitely far away.
        around = F.pad(centres.unflatten(2, (rows, columns)), (1, 1, 1, 1), value=torch.inf)
        nearest = torch.full((batch, height, width), torch.inf, device=images.device)
        choice = torch.zeros_like(nearest, dtype=torch.uint8)
        # One candidate at a time, in place: nine maps of distances would be nine times the memory.
        for index, (dy, dx) in enumerate(product(range(3), repeat=2)):
            candidate = around[:, :, dy : dy + rows, dx : dx + columns]
            offsets = candidate.index_select(3, column).index_select(2, row)  # (B, 5, H, W)
            distance, *others = offsets.sub_(features).square_().unbind(1)
            for other in others:
                distance += other
            choice.masked_fill_(distance < nearest, index)
            torch.minimum(nearest, distance, out=nearest)
        choice = choice.long()
        labels = home + (choice // 3 - 1) * columns + choice % 3 - 1
    return labels


def to_lab(images: Tensor) -> Tensor:
    """CIE L*a*b* (B, 3, H, W) of sRGB images (B, 3, H, W) in [0, 1]; white is D65.

    IEC 61966-2-1: C = ((C' + 0.055) / 1.055)^2.4, or C' / 12.92 where C' <= 0.04045; then XYZ.
    CIE 15: L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)), b = 200 (f(Y) - f(Z)), relative to white;
    f(t) = t^(1/3), or t / (3 d^2) + 4/29 where t <= d^3, d = 6/29.
    """
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(1)
    f = []
    for r, g, b in RGB_TO_XYZ:
        # White is the matrix's own, R = G = B = 1, so that greys have a = b = 0.
        t = (r * red + g * green + b * blue) / (r + g + b)
        f.append(torch.where(t > (6 / 29) ** 3, t ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29))
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], dim=1)
