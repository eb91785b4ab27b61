"""Curves: which ones there are, where they go in the picture, what its axes say."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from common import curves
from common.curves import COLORS, HEIGHT, WIDTH, charts, draw, log_ticks, ticks, wrap
from common.outputs import read_log

LOG = [
    dict(step=10, loss_sup=2.0, loss_unsup=0.0, lam=0.5, seconds=1.0),
    dict(step=20, loss_sup=1.0, loss_unsup=0.0, miou=0.25, iou=dict(sky=0.25), teacher=0.5),
    dict(step=20, stage="a stage", val=0.75),
    dict(step=40, loss_sup=0.5, loss_unsup=0.0, miou=0.5, iou=dict(sky=0.5), teacher=0.75),
]
OTHER = [dict(step=10, loss_sup=4.0, loss_own=1.0), dict(step=20, miou=0.125, iou=dict(sky=0.125))]


def places(image, color):
    """Rows and columns (N,), (N,) of the pixels of a colour."""
    return np.nonzero((np.asarray(image) == color).all(axis=-1))


def test_of_one_run_losses_and_every_miou():
    assert charts({"run": LOG}) == {
        "loss": {"loss_sup": [(10, 2.0), (20, 1.0), (40, 0.5)]},  # the other is 0 throughout
        "mIoU in %": {"mIoU": [(20, 25), (40, 50)], "mIoU, teacher": [(20, 50), (40, 75)]},
    }
    assert charts({"run": []}) == {} and charts({"run": LOG[:1]}).keys() == {"loss"}


def test_of_several_runs_the_miou_and_the_losses_that_two_have():
    assert charts({"a": LOG, "b": OTHER, "c": LOG[1:2]}) == {
        "mIoU in %": {"a": [(20, 25), (40, 50)], "b": [(20, 12.5)], "c": [(20, 25)]},
        "loss_sup": {"a": [(10, 2.0), (20, 1.0), (40, 0.5)], "b": [(10, 4.0)], "c": [(20, 1.0)]},
    }


def test_a_curve_is_parted_where_other_losses_are_logged():
    log = [{"step": s, f"loss_{'a' if s in (1, 2, 5, 6) else 'b'}": 1.0} for s in range(1, 7)]
    found = [value for _, value in charts({"run": log})["loss"]["loss_a"]]
    assert [math.isnan(value) for value in found] == [False, False, True, True, False, False]
    rows, columns = places(draw(charts({"run": log}), ""), COLORS[0])
    plot = columns[rows > HEIGHT // 4]  # below the legend
    left, right = plot.min(), plot.max()
    assert ((plot > left + 0.3 * (right - left)) & (plot < left + 0.7 * (right - left))).sum() == 0


def test_points_are_where_the_axes_say():
    image = draw({"mIoU in %": {"run": [(0, 0.0), (50, 40.0), (100, 100.0)]}}, "")
    assert image.size == (WIDTH, HEIGHT) and WIDTH >= 1600
    rows, columns = places(image, COLORS[0])
    inside = rows > HEIGHT // 8
    rows, columns = rows[inside], columns[inside]
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    # The dots around the ends reach as far beyond the axes on every side.
    middle = rows[abs(columns - (left + right) / 2) < 2].mean()
    assert (bottom - middle) / (bottom - top) == pytest.approx(0.4, abs=0.01)


def test_noise_of_many_points_is_pale_behind_the_mean():
    noisy = [(step, 1.0 + (step % 2)) for step in range(400)]
    rows, _ = places(draw({"loss": {"loss": noisy}}, ""), COLORS[0])
    rows = rows[rows > HEIGHT // 8]
    assert np.ptp(np.percentile(rows, (5, 95))) < HEIGHT / 4


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (17.2, 21.4, [17, 18, 19, 20, 21, 22]),
        (0.0, 0.0, [0, 0.2]),
        (50.0, 50.0, [50, 60]),
        (0.031, 0.034, [0.031, 0.032, 0.033, 0.034]),
    ],
)
def test_ticks_are_round_and_around_the_range(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and found[-1] > found[0]
    assert found == pytest.approx(expected)


def test_a_log_scale_has_few_ticks():
    assert log_ticks(0.02, 1.0) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert log_ticks(0.013, 4.0) == [0.01, 0.1, 1.0, 10.0]
    assert log_ticks(3e-5, 4.0) == [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]


def test_a_legend_is_wrapped_to_the_width():
    font = ImageFont.load_default(20)
    found = wrap(["name"] * 7, 400, font, beside=80)
    assert [row for _, row in found] == [0, 0, 0, 1, 1, 1, 2] and found[3][0] == 0


NO_LINES = (  # what stands in a log that was damaged
    *(b"", b"7", b"[1]", b'"step"', b"{", b'{"st', b"\xff\x00", b"[" * 10**5, b'{"a":' * 10**5),
    *(b'{"loss": 1.0}', b'{"step": 0}', b'{"step": 1.5}', b'{"step": "1"}', b'{"step": null}'),
    *(
        b'{"step": 3, "loss": %s}' % v
        for v in (b"NaN", b"Infinity", b"null", b'"x"', b"[]", b"1e99")
    ),
    *(b'{"step": 3, "loss": %s}' % (b"9" * n) for n in (400, 10_000)),
    *(b'{"step": 3, "miou": %s}' % v for v in (b"0.5", b'"x", "iou": {"sky": 1}')),
    *(b'{"step": 3, "miou": 0.5, "iou": %s}' % v for v in (b"{}", b"[]", b'{"sky": "x"}')),
    *(b'{"step": 3, "skipped": %s}' % v for v in (b"7", b"[7]", b'"x"')),
    *(b'{"step": 3, "stage": 7}', b'{"step": %s}' % (b"9" * 30)),
)


@pytest.mark.parametrize("line", NO_LINES, ids=range(len(NO_LINES)))
def test_lines_that_no_run_writes_are_left_out(line, tmp_path):
    lines = [json.dumps(entry).encode() for entry in LOG]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    assert read_log(tmp_path / "log.jsonl") == LOG


def test_the_smallest_of_losses_have_an_axis():
    draw(charts({"run": [dict(step=1, loss=5e-324), dict(step=2, loss=1.0)]}), "")


def test_several_runs_are_overlaid_by_folder_name(tmp_path, capsys):
    for folder, log in (("a/run", LOG), ("b/run", OTHER), ("other", LOG)):
        (tmp_path / folder).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in log)
        (tmp_path / folder / "log.jsonl").write_text(text)
    where = tmp_path / "x.png"
    curves.main([str(tmp_path / "a/run"), str(tmp_path / "other"), "--output", str(where)])
    with Image.open(where) as image:
        assert len(places(image.convert("RGB"), COLORS[1])[0]) > 500
    curves.main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--output", str(where)])
    capsys.readouterr()
    for words, wrong in (([tmp_path], f"{tmp_path / 'log.jsonl'}: missing"), ([], "the following")):
        with pytest.raises(SystemExit) as end:
            curves.main([*map(str, words), "--output", str(where)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1
        assert err.startswith(f"common.curves: {wrong}")
