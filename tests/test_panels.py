"""Panels: one row a picture, in the dataset's colours."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.data import load
from common.panels import CELL, GAP, LINE, colorize, panels


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


def test_colorize_uses_the_palette_and_white_for_void():
    shown = colorize(np.array([[0, 1, 255]], np.uint8), [(1, 2, 3), (4, 5, 6)])
    assert shown.tolist() == [[[1, 2, 3], [4, 5, 6], [255, 255, 255]]]


def test_panels_show_image_truth_and_prediction(tmp_path):
    data, model = five(), Bands()
    panels(model, data, tmp_path / "panels.png", "cpu", rows=3)
    assert model.training and [p.name for p in tmp_path.iterdir()] == ["panels.png"]
    sheet = np.asarray(Image.open(tmp_path / "panels.png"))
    assert sheet.shape[1] == 3 * CELL + 4 * GAP and sheet.shape[0] > 3 * (CELL + GAP) + LINE
    for row in range(3):
        top, left = LINE + row * (CELL + GAP), 3 * GAP + 2 * CELL
        prediction = sheet[top : top + CELL, left : left + CELL]
        assert (prediction[:, : CELL // 2] == data.colors[1]).all()
        assert (prediction[:, CELL // 2 :] == data.colors[2]).all()
        truth = sheet[top : top + CELL, 2 * GAP + CELL : 2 * GAP + 2 * CELL].reshape(-1, 3)
        assert {tuple(c) for c in truth.tolist()} <= set(data.colors)


def test_more_rows_than_pictures_and_wide_legends(tmp_path):
    data = five()
    names = [f"a class with a long name {k}" for k in range(7)]
    panels(Bands(), replace(data, val=data.val[:1], classes=names), tmp_path / "panels.png", "cpu")
    assert Image.open(tmp_path / "panels.png").height > LINE + CELL + GAP + 2 * LINE
