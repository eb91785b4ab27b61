"""Pictures of a run: what a network makes of some pictures, in the dataset's colours."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common.augment import whole_view
from common.colors import GREY, colorize, tinted
from common.curves import wrap
from common.layouts import DRAWN, Data
from common.loaders import read_pair
from common.losses import VOID
from common.metrics import classify, evaluating
from common.outputs import replace_file

CELL, GAP, LINE = 256, 8, 26  # pixels: width of a picture, space between two, height of a text line
WRONG, MARK = (255, 40, 40), (255, 230, 0)
MARKS = np.array([(0, 0, 0), MARK, (30, 110, 255), (0, 190, 60)])  # of a map's numbers, 0 is none
Show = Callable[[Tensor], dict[str, Tensor]]  # of a picture (1, 3, H, W) titles and maps (1, H, W)
TITLES = ["image", "truth", "prediction", "overlay", "errors in red"]


@torch.no_grad()
def panels(
    model: nn.Module,
    data: Data,
    path: Path,
    device: torch.device | str,
    window: tuple[int, int] | None = None,
    rows: int = 6,
    show: Show | None = None,
) -> None:
    """Write one PNG of some validation pictures, with what TITLES says side by side.

    The rows are spread evenly over the sorted validation list; void is grey; below each is its
    file's name and the share of its labelled pixels that is wrong, below all a legend of the
    classes. window: as `evaluate` has it. show: maps for further columns: bool, or numbers 0 to 3,
    drawn in MARKS on the photograph, or float in [0, 1], from black to white.
    """
    strips, notes, titles = [], [], TITLES
    for index in sorted({round(i) for i in np.linspace(0, len(data.val) - 1, rows)}):
        image, label = read_pair(data.val[index], data.lookup)
        view = whole_view(image, label)[0][None].to(device)
        with evaluating(model):
            prediction = classify(model, view, window)[0].cpu().numpy()
        truth, known = label.numpy(), (label != VOID).numpy()
        share = 100 * (known & (truth != prediction)).sum() / max(known.sum(), 1)
        notes.append(f"{picture_name(data, data.val[index][0])}: {share:.1f} % wrong")
        photo = image.permute(1, 2, 0).numpy()
        size = CELL, _height(photo)
        photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))
        truth, prediction = _nearest(truth, size), _nearest(prediction, size)
        strip = [photo, *(colorize(labels, data.colors) for labels in (truth, prediction))]
        strip += [tinted(photo, prediction, data.colors), errors(photo, truth, prediction)]
        others = show(view) if show else {}
        strips.append(strip + [_map(values[0].cpu(), photo) for values in others.values()])
        titles = [*TITLES, *others]
    sheet(path, titles, strips, notes, data)


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 at another size, width first."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _map(values: Tensor, photo: np.ndarray) -> np.ndarray:
    """A map (H, W) as a picture at the photograph's size; see `panels`."""
    grey = values.is_floating_point()
    levels = (255 * values.float() if grey else values).byte().numpy()
    levels = _nearest(levels, photo.shape[1::-1])[..., None]
    if grey:
        return np.repeat(levels, 3, axis=2)
    marked = MARKS[levels[..., 0]] // 2 + photo.mean(axis=2, keepdims=True) // 2
    return np.where(levels > 0, marked.astype(np.uint8), _dim(photo))


def _dim(photo: np.ndarray) -> np.ndarray:
    """The photograph (H, W, 3), dark and without colours."""
    return np.repeat(photo.mean(axis=2, keepdims=True) * 0.4, 3, axis=2).astype(np.uint8)


def errors(photo: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Where the prediction is wrong, red on the darkened photograph (H, W, 3); void is grey."""
    shown = _dim(photo)
    shown[truth != prediction] = WRONG
    shown[truth == VOID] = GREY
    return shown


def picture_name(data: Data, path: str) -> str:
    """A picture's path below the dataset's folder."""
    if path.startswith(DRAWN):
        return path.removeprefix(DRAWN)
    return Path(os.path.relpath(path, data.root)).as_posix()


def sheet(
    path: Path, titles: list[str], strips: list[list[np.ndarray]], notes: list[str], data: Data
) -> None:
    """Write rows of pictures (H, W, 3) uint8, a photograph and maps of any size, as one PNG.

    Titles are above, a row's note is below it, below all a legend of the classes.
    """
    font, width = ImageFont.load_default(LINE * 2 // 3), len(titles) * (CELL + GAP) + GAP
    classes = {**dict(zip(data.classes, data.colors, strict=True)), "void": GREY}
    legend = wrap(list(classes), width - GAP, font, beside=LINE + 2 * GAP)
    heights = [_height(row[0]) for row in strips]
    lines, gaps = 2 + len(strips) + legend[-1][1], len(strips) + 2
    height = LINE * lines + sum(heights) + GAP * gaps
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (CELL + GAP), LINE // 2), title, "black", font, anchor="lm")
    top = LINE
    for row, row_height, note in zip(strips, heights, notes, strict=True):
        for column, cell in enumerate(row):
            how = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            cell = Image.fromarray(cell).resize((CELL, row_height), how)
            canvas.paste(cell, (GAP + column * (CELL + GAP), top))
        top += row_height + LINE
        draw.text((GAP, top - LINE // 2), note, "black", font, anchor="lm")
        top += GAP
    for (left, line), (name, color) in zip(legend, classes.items(), strict=True):
        x, y = GAP + left, top + GAP + line * LINE
        draw.rectangle((x, y + 3, x + LINE - 8, y + LINE - 5), tuple(color), "black")
        draw.text((x + LINE, y + LINE // 2), name, "black", font, anchor="lm")
    # The usual level 6 takes more than twice as long for a seventh less.
    replace_file(path, lambda file: canvas.save(file, "PNG", compress_level=3))


def _height(picture: np.ndarray) -> int:
    """The height of a picture (H, W, 3) that is CELL wide."""
    return max(round(CELL * picture.shape[0] / picture.shape[1]), 1)
