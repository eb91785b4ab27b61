"""Pictures of a run: what a network makes of some pictures, in the dataset's colours."""

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
        truth = colorize(label.byte().numpy(), data.colors)
        strips.append([read_image(image_path), truth, colorize(prediction, data.colors)])
    sheet(path, ["image", "truth", "prediction"], strips, data)


def sheet(path: Path, titles: list[str], strips: list[list[np.ndarray]], data: Data) -> None:
    """Write rows of pictures (H, W, 3) uint8 as one PNG, with titles and a legend of the classes.

    The first picture of a row is a photograph, the others are maps of it, of any size.
    """
    font, width = ImageFont.load_default(14), len(titles) * (CELL + GAP) + GAP
    heights = [max(round(CELL * row[0].shape[0] / row[0].shape[1]), 1) for row in strips]
    legend = _legend(data.classes, width, font)
    height = LINE + sum(heights) + GAP * len(strips) + LINE * (legend[-1][1] + 1) + GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (CELL + GAP), 2), title, "black", font)
    top = LINE
    for row, row_height in zip(strips, heights, strict=True):
        for column, cell in enumerate(row):
            how = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            cell = Image.fromarray(cell).resize((CELL, row_height), how)
            canvas.paste(cell, (GAP + column * (CELL + GAP), top))
        top += row_height + GAP
    for (left, line), name, color in zip(legend, data.classes, data.colors, strict=True):
        y = top + line * LINE
        draw.rectangle((left, y + 3, left + 13, y + 16), fill=tuple(color), outline="black")
        draw.text((left + 19, y + 1), name, "black", font)
    replace_file(path, lambda file: canvas.save(file, "PNG"))


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
