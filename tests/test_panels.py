"""Panels: one row a picture, in the dataset's colours."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torch import nn

from common.colors import DISTINCT, GREY, colorize
from common.data import VOID, load
from common.flags import InputError
from common.panels import CELL, GAP, LINE, MARKS, TITLES, WRONG, errors, panels


class Bands(nn.Module):
    """Predicts class 1 in the left half of any picture and class 2 in the right."""

    def forward(self, images):
        logits = torch.zeros(len(images), 7, *images.shape[-2:])
        half = images.shape[-1] // 2
        logits[:, 1, :, :half] = logits[:, 2, :, half:] = 1
        return logits


def five():
    data = load("shapes", "", "1/40", "", 0)
    return replace(data, val=data.val[:5])


def cell(sheet, row, title):
    """A picture of a sheet whose pictures are square."""
    top, left = LINE + row * (CELL + LINE + GAP), GAP + TITLES.index(title) * (CELL + GAP)
    return sheet[top : top + CELL, left : left + CELL]


def test_colorize_uses_the_palette_and_grey_for_void():
    shown = colorize(np.array([[0, 1, 255]], np.uint8), [(1, 2, 3), (4, 5, 6)])
    assert shown.tolist() == [[[1, 2, 3], [4, 5, 6], list(GREY)]]


def test_errors_are_red_void_is_grey_and_the_rest_is_dim():
    photo = np.full((1, 4, 3), (200, 100, 150), np.uint8)
    truth, prediction = np.array([[0, 1, VOID, 1]]), np.array([[0, 0, 0, 1]])
    right = [60, 60, 60]
    assert errors(photo, truth, prediction).tolist() == [[right, list(WRONG), list(GREY), right]]


def test_panels_show_what_their_titles_say(tmp_path):
    data, model = five(), Bands()
    data.colors = [*data.colors]
    data.colors[2] = (0, 0, 0)
    panels(model, data, tmp_path / "panels.png", "cpu", rows=3)
    assert model.training and [p.name for p in tmp_path.iterdir()] == ["panels.png"]
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    assert sheet.shape[1] == len(TITLES) * (CELL + GAP) + GAP
    assert sheet.shape[0] > 3 * (CELL + LINE + GAP) + LINE
    predicted = np.full((CELL, CELL, 3), data.colors[1])
    predicted[:, CELL // 2 :] = data.colors[2]
    for row in range(3):
        image, truth = cell(sheet, row, "image"), cell(sheet, row, "truth")
        assert (cell(sheet, row, "prediction") == predicted).all()
        assert {tuple(c) for c in truth.reshape(-1, 3).tolist()} <= set(data.colors)
        overlay = cell(sheet, row, "overlay").astype(int)
        mixed = abs(2 * overlay - image.astype(int) - predicted)[:, : CELL // 2]
        assert mixed.max() <= 2 and (overlay[:, CELL // 2 :] == image[:, CELL // 2 :]).all()
        wrong = (cell(sheet, row, "errors in red") == WRONG).all(axis=-1)
        assert (wrong == (truth != predicted).any(axis=-1)).all() and 0 < wrong.sum() < wrong.size
        name = sheet[LINE + CELL + row * (CELL + LINE + GAP) :][:LINE]
        assert (name < 128).any() and (name[:, CELL:] == 255).all()


def test_panels_are_of_windows_where_the_evaluation_is(tmp_path):
    """Of each window of 32 the left half is class 1: stripes, where a whole picture has halves."""
    data = five()
    panels(Bands(), data, tmp_path / "x.png", "cpu", window=(32, 32), rows=1)
    shown = cell(np.asarray(Image.open(tmp_path / "x.png")), 0, "prediction")
    quarters = [shown[0, CELL * n // 4 + 9].tolist() for n in range(4)]
    assert quarters == [list(data.colors[kind]) for kind in (1, 2, 1, 2)]


def test_a_method_adds_maps_of_its_own(tmp_path):
    def show(images):
        upper = torch.zeros(1, *images.shape[-2:])
        upper[:, : images.shape[-2] // 2] = 0.5
        assert images.shape == (1, 3, 64, 64) and not torch.is_grad_enabled()
        numbers = torch.arange(4).view(1, 1, 4).expand(1, 64, 4).repeat_interleave(16, 2)
        return {"share": upper, "where": upper > 0, "numbers": numbers}

    panels(Bands(), five(), tmp_path / "x.png", "cpu", rows=2, show=show)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert sheet.shape[1] == (len(TITLES) + 3) * (CELL + GAP) + GAP
    share, where, numbers = (
        sheet[LINE:, (CELL + GAP) * n + GAP :][:CELL, :CELL] for n in (5, 6, 7)
    )
    assert (share[: CELL // 2] == 127).all() and (share[CELL // 2 :] == 0).all()
    yellow = where.astype(int) @ (1, 0, -1) > 50
    assert yellow[: CELL // 2].all() and not yellow[CELL // 2 :].any()
    for number, color in enumerate(MARKS):
        part = numbers[:, CELL // 4 * number :][:, : CELL // 4].astype(int)
        grey = 2 * part - color if number else part  # the photograph without its colours
        assert (np.ptp(grey, axis=2) <= 2).all() and np.ptp(grey) > 9


def test_more_rows_than_pictures_and_wide_legends(tmp_path):
    data = five()
    names = [f"a class with quite a long name {k}" for k in range(7)]
    panels(Bands(), replace(data, val=data.val[:1], classes=names), tmp_path / "panels.png", "cpu")
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    assert len(sheet) > LINE + CELL + LINE + GAP + 2 * LINE
    legend = sheet[LINE + CELL + LINE + GAP :]
    for color in (*data.colors, GREY):  # void is among the classes
        assert (legend == color).all(axis=-1).sum() > 100


# --- a folder's colours ---


def lab(color):
    """CIELAB, in which distances are about as large as they look."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color / 255]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.array(linear) / (0.9505, 1.0, 1.089), 0.0011))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_of_twenty_classes_differ_visibly():
    assert len(DISTINCT) == 20
    distances = [
        np.linalg.norm(lab(np.array(a)) - lab(np.array(b)))
        for a, b in combinations([*DISTINCT, GREY], 2)
    ]
    assert min(distances) > 30


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 0 0\n\n1,2,3\n255 255 255\n", ""),
        ("0 0 0\n\n1 2\n3 4 5\n", "colors.txt, line 3: '1 2' must be R G B, each from 0 to 255"),
        ("0 0 0\n1 2 256\n3 4 5\n", "colors.txt, line 2: "),
        ("0 0 0\n1 2 x\n3 4 5\n", "colors.txt, line 2: "),
        ("0 0 0\n1 2 3\n", "colors.txt: has 2 colours for 3 classes"),
    ],
)
def test_a_folder_may_have_colours_of_its_own(text, message, tmp_path):
    root = trees.folder_tree(tmp_path)
    assert load("folder", str(root), "all", "", 0).colors == DISTINCT[:3]
    (root / "colors.txt").write_text(text)
    if message:
        with pytest.raises(InputError) as caught:
            load("folder", str(root), "all", "", 0)
        assert message in str(caught.value) and str(caught.value).startswith(str(root))
    else:
        colors = load("folder", str(root), "all", "", 0).colors
        assert colors == [(0, 0, 0), (1, 2, 3), (255, 255, 255)]


def test_many_classes_have_the_palette_of_voc(tmp_path):
    root = trees.folder_tree(tmp_path)
    (root / "classes.txt").write_text("".join(f"class {n}\n" for n in range(21)))
    assert len(set(load("folder", str(root), "all", "", 0).colors)) == 21
