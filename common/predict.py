"""Predictions as pictures, in the dataset's colours."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from common.augment import whole_view
from common.data import Data, Pictures, read_image
from common.metrics import evaluating
from common.outputs import replace_file

CELL, GAP, LINE = 224, 8, 22  # pixels: width of a picture, space between two, height of a text line


@torch.no_grad()
def panels(
    model: nn.Module, data: Data, path: Path, device: torch.device | str, rows: int = 6
) -> None:
    """Write one PNG of some validation pictures: image, truth and prediction side by side.

    The rows are spread evenly over the sorted validation list; void is white; a legend of the
    classes is below.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(data.val) - 1, rows)})
    pictures = Pictures([data.val[i] for i in chosen], data.lookup, whole_view)
    strips = []
    for (image_path, _), (image, label) in zip(pictures.pairs, pictures, strict=True):
        with evaluating(model):
            logits = model(image[None].to(device))
        prediction = logits.argmax(dim=1)[0].byte().cpu().numpy()
        cells = (
            read_image(image_path),
            colorize(label.byte().numpy(), data.colors),
            colorize(prediction, data.colors),
        )
        height = max(round(CELL * image.shape[1] / image.shape[2]), 1)
        filters = (Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.NEAREST)
        strips.append(
            [
                Image.fromarray(c).resize((CELL, height), f)
                for c, f in zip(cells, filters, strict=True)
            ]
        )
    width = 3 * CELL + 4 * GAP
    font = ImageFont.load_default(14)
    legend = _legend(data.classes, width, font)
    height = (
        LINE + sum(strip[0].height + GAP for strip in strips) + LINE * (legend[-1][1] + 1) + GAP
    )
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth", "prediction")):
        draw.text((GAP + column * (CELL + GAP), 2), title, "black", font)
    top = LINE
    for strip in strips:
        for column, cell in enumerate(strip):
            sheet.paste(cell, (GAP + column * (CELL + GAP), top))
        top += strip[0].height + GAP
    for (left, line), name, color in zip(legend, data.classes, data.colors, strict=True):
        y = top + line * LINE
        draw.rectangle((left, y + 3, left + 13, y + 16), fill=tuple(color), outline="black")
        draw.text((left + 19, y + 1), name, "black", font)
    replace_file(path, lambda file: sheet.save(file, "PNG"))


def colorize(labels: np.ndarray, colors: list[tuple[int, int, int]]) -> np.ndarray:
    """Labels (H, W) uint8 as colours (H, W, 3) uint8; void is white."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(colors)] = colors
    return palette[labels]


def _legend(
    names: list[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[tuple[int, int]]:
    """Where each name goes, (left in pixels, line), wrapped to the width."""
    places, left, line = [], GAP, 0
    for name in names:
        needed = 19 + int(font.getlength(name)) + 2 * GAP
        if left > GAP and left + needed > width:
            left, line = GAP, line + 1
        places.append((left, line))
        left += needed
    return places
