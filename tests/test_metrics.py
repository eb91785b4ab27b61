"""Confusion matrix, IoU, sliding windows and evaluation."""

import itertools
import math

import pytest
import torch
from torch import nn

from common.deeplab import Together
from common.metrics import confusion_matrix, evaluate, iou, mean_iou, slide, window_starts, windows

K = 4


def test_confusion_matrix_counts_pixels():
    truth, seen = torch.randint(K, (3, 5, 7)), torch.randint(K, (3, 5, 7))
    truth[torch.rand(truth.shape) < 0.3] = 255
    expected = torch.zeros(K, K, dtype=torch.int64)
    for t, p in zip(truth.flatten().tolist(), seen.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    counted = confusion_matrix(seen, truth, K)
    assert counted.dtype == torch.int64 and torch.equal(counted, expected)


def test_small_integer_types_do_not_wrap():
    truth = torch.full((2, 2), 20, dtype=torch.uint8)
    assert confusion_matrix(truth, truth, 21)[20, 20] == 4


@pytest.mark.parametrize("seen, truth", [(0, K), (K, 0), (0, -1), (-1, 0), (0, 254)])
def test_values_outside_the_classes_are_errors(seen, truth):
    with pytest.raises(ValueError, match="1 pixels"):
        confusion_matrix(torch.tensor([seen, 0]), torch.tensor([truth, 0]), K)


def test_a_prediction_on_void_does_not_matter():
    assert confusion_matrix(torch.tensor([99]), torch.tensor([255]), K).sum() == 0


def test_iou_and_its_mean():
    matrix = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])  # the last class occurs nowhere
    assert iou(matrix).dtype == torch.float64
    assert iou(matrix).tolist() == pytest.approx([3 / 6, 4 / 7, math.nan], nan_ok=True)
    assert mean_iou(matrix) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert mean_iou(torch.eye(3, dtype=torch.int64)) == 1.0
    assert mean_iou(torch.tensor([[2, 1], [0, 0]])) == pytest.approx(1 / 3)  # predicted only


@pytest.mark.parametrize("side", [-5, 16])
def test_windows_that_cannot_be_are_refused(side):
    with pytest.raises(ValueError, match=f"32 pixels and more, not {side}"):
        windows(side)


def test_windows_are_the_published_ones():
    starts = {1024: [0, 224], 2048: [0, 534, 1068, 1248], 500: [0], 800: [0]}
    assert {length: window_starts(length, 800, 534) for length in starts} == starts


class Pixelwise(nn.Module):
    """Logits that depend on the pixel alone, and notes on how it was called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 1)
        self.norm = nn.BatchNorm2d(K)
        self.sizes, self.modes = [], []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        self.modes.append(self.training or self.norm.training)
        return self.norm(self.conv(images))


@pytest.mark.parametrize(
    "stride, tops, lefts",
    [(11, (0, 4), (0, 11, 17)), (3, (0, 3, 4), (0, 3, 6, 9, 12, 15, 17))],
)
def test_slide_sums_the_windows_logits(stride, tops, lefts):
    model, images = Pixelwise().eval(), torch.randn(1, 3, 20, 33)
    with torch.no_grad():
        bands, logits = [*slide(model, images, 16, stride)], model(images)
    assert set(model.sizes[:-1]) == {(16, 16)} and len(model.sizes) == len(tops) * len(lefts) + 1
    cover = torch.zeros(20, 33)
    for top, left in itertools.product(tops, lefts):
        cover[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(torch.cat(bands, dim=-2), logits * cover)


def test_slide_gives_rows_away_before_it_sees_those_below():
    model = Pixelwise().eval()
    for number, band in enumerate(slide(model, torch.randn(1, 3, 70, 20), 16, 11), start=1):
        assert len(model.sizes) == 2 * number
        assert band.shape == (1, K, {5: 10, 6: 16}.get(number, 11), 20)


def pictures():
    sizes = [(20, 33), (40, 17), (16, 16)]
    return [(torch.randn(1, 3, *s), torch.randint(K, (1, *s))) for s in sizes]


@pytest.mark.parametrize("window", [None, (16, 11)])
def test_evaluate_sums_over_pictures_of_any_size(window):
    model, loader = Pixelwise(), pictures()
    ours = evaluate(model, loader, K, "cpu", window)
    model.eval()
    with torch.no_grad():
        expected = sum(confusion_matrix(model(x).argmax(1), y, K) for x, y in loader)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("window", [None, (16, 11)])
def test_several_models_are_scored_at_once(window):
    models, loader = [Pixelwise(), Pixelwise()], pictures()
    ours = evaluate(Together(models), loader, K, "cpu", window, several=2)
    expected = torch.stack([evaluate(model, loader, K, "cpu", window) for model in models])
    assert torch.equal(ours, expected) and not torch.equal(*ours)
    nothing = evaluate(Together(models), [], K, "cpu", window, several=2)  # of a process
    assert nothing.shape == (2, K, K) and not nothing.any()
    assert torch.equal(iou(ours).nan_to_num(2), torch.stack([*map(iou, ours)]).nan_to_num(2))


def test_evaluate_leaves_every_module_in_its_mode_and_its_statistics_alone():
    model = Pixelwise()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    evaluate(model, pictures(), K, "cpu")
    assert model.training and model.conv.training and not model.norm.training
    assert not any(model.modes) and torch.equal(model.norm.running_mean, before)

    def broken():
        yield pictures()[0]
        raise RuntimeError("disk")

    model.modes.clear()
    with pytest.raises(RuntimeError, match="disk"):
        evaluate(model, broken(), K, "cpu")
    assert model.training and not model.norm.training


def test_evaluate_refuses_labels_that_are_no_class():
    with pytest.raises(ValueError, match="outside"):
        evaluate(Pixelwise(), [(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), K))], K, "cpu")
