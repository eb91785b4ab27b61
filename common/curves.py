"""Curves over the steps of one run, or of several: python -m common.curves RUN [RUN ...]

Losses, and mIoU on the validation pictures, from log.jsonl in each RUN, a run's folder; written to
curves.png (--output). A chart whose losses differ by more than a factor of 20 has a log scale; of
more than 100 points the running mean is drawn over them.
"""

import math
import sys
from itertools import cycle, groupby
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

from common.colors import from_hex
from common.flags import InputError, Parser, one_line
from common.outputs import evaluation, read_log, replace_file

Points = list[tuple[float, float]]  # step, value
Font = ImageFont.FreeTypeFont
WIDTH, HEIGHT, FONT = 1920, 1080, 30  # pixels
LOSS, MIOU = "loss", "mIoU in %"
FINE = 2  # drawn so many times as large, for Pillow has no smooth lines
# Okabe and Ito's, which colour-blind people tell apart, without the yellow.
COLORS = from_hex("0072b2 d55e00 009e73 cc79a7 e69f00 56b4e9 5a5a5a 783c14")


def charts(runs: dict[str, list[dict]]) -> dict[str, dict[str, Points]]:
    """By title, the curves of a chart by name; runs: log lines by name.

    Of one run, its losses in one chart and every mIoU in another; of several, the model's mIoU and
    each loss that two of them have, a curve for each run.
    """
    lines = [line for log in runs.values() for line in log]
    losses = dict.fromkeys(name for line in lines for name in line if name.startswith(LOSS))
    if len(runs) == 1:
        scored = dict.fromkeys(key for line in lines if "miou" in line for key in evaluation(line))
        beside = [name for name in scored if name not in ("step", "miou", "iou")]
        found = {LOSS: {name: losses_of(lines, name) for name in losses}}
        found[MIOU] = {"mIoU": mious_of(lines)}
        found[MIOU] |= {f"mIoU, {name}": mious_of(lines, name) for name in beside}
    else:
        found = {MIOU: {run: mious_of(log) for run, log in runs.items()}}
        found |= {name: {run: losses_of(log, name) for run, log in runs.items()} for name in losses}
    found = {title: {n: c for n, c in curves.items() if c} for title, curves in found.items()}
    least = {title: 1 if len(runs) == 1 or title == MIOU else 2 for title in found}
    return {title: curves for title, curves in found.items() if len(curves) >= least[title]}


def losses_of(log: list[dict], name: str) -> Points:
    """A loss, if it is not 0 throughout; NaN parts the curve where others are logged without it."""
    lines = [line for line in log if any(key.startswith(LOSS) for key in line)]
    points = [(line["step"], line.get(name, math.nan)) for line in lines]
    return points if any(line.get(name) for line in lines) else []


def mious_of(log: list[dict], name: str = "miou") -> Points:
    scored = [line for line in log if line.get("miou") is not None and name in line]
    return [(line["step"], 100 * line[name]) for line in scored]


def draw(found: dict[str, dict[str, Points]], title: str) -> Image.Image:
    """The charts of `charts` as one picture, with a title and a legend of the curves' names."""
    line = int(1.4 * FONT * FINE)
    columns = 1 if len(found) < 3 else 2
    rows = -(-len(found) // columns)
    width, height = WIDTH * FINE, max(HEIGHT, HEIGHT * rows // 2) * FINE
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT * FINE)
    names = dict.fromkeys(name for curves in found.values() for name in curves)
    colors = dict(zip(names, cycle(COLORS), strict=False))
    legend = wrap(list(names), width - line, font, 2 * line)
    pen.text((line // 2, line // 4), title, "black", font)
    top = line * 3 // 2 if title else line // 4
    for (left, row), (name, color) in zip(legend, colors.items(), strict=True):
        y = top + row * line + line // 2
        pen.line((left + line // 2, y, left + line * 5 // 4, y), color, 5 * FINE)
        pen.text((left + line * 3 // 2, y), name, "black", font, anchor="lm")
    top += line * (legend[-1][1] + 1 if legend else 0)
    margin = line + int(font.getlength("0.00001"))
    last = max((s for curves in found.values() for c in curves.values() for s, _ in c), default=1)
    for number, (name, curves) in enumerate(found.items()):
        row, column = divmod(number, columns)
        area = (
            column * width // columns + margin,
            top + row * (height - top) // rows + line * 3 // 2,
            (column + 1) * width // columns - line * 3 // 2,
            top + (row + 1) * (height - top) // rows - line * 3 // 2,
        )
        _chart(pen, area, name, curves, colors, last, font)
    return canvas.reduce(FINE)


def _chart(pen, area, title, curves, colors, last, font) -> None:
    """A chart's axes with their marks, and its curves; area: left, top, right, bottom."""
    (left, top, right, bottom), line = area, font.size
    values = [v for curve in curves.values() for _, v in curve if not math.isnan(v)]
    logarithmic = title.startswith(LOSS) and 1e-99 < 20 * min(values) < max(values)
    marks = (log_ticks if logarithmic else ticks)(min(values), max(values))
    scale = math.log10 if logarithmic else float
    low, high = scale(marks[0]), scale(marks[-1])

    def x_of(step):
        return left + (right - left) * step / last

    def y_of(value):
        return bottom - (bottom - top) * (scale(value) - low) / (high - low)

    title = f"{title}, log scale" if logarithmic else title
    pen.text((left, top - line // 2), title, "black", font, anchor="ls")
    for mark in marks:
        pen.line((left, y_of(mark), right, y_of(mark)), (225, 225, 225), FINE)
        pen.text((left - line // 3, y_of(mark)), f"{mark:.6g}", "black", font, anchor="rm")
    pen.text((left - line // 2, bottom + line // 3), "step", "black", font, anchor="ra")
    for mark in (mark for mark in ticks(0, last) if mark <= last):
        pen.line((x_of(mark), bottom, x_of(mark), bottom + line // 4), "black", 2 * FINE)
        pen.text((x_of(mark), bottom + line // 3), f"{mark:.10g}", "black", font, anchor="ma")
    pen.line((left, top, left, bottom, right, bottom), "black", 2 * FINE)
    for name, curve in curves.items():
        for gap, part in groupby(curve, key=lambda point: math.isnan(point[1])):
            if gap:
                continue
            places = [(x_of(step), y_of(value)) for step, value in part]
            if len(places) > 100:
                pale = tuple(255 - (255 - channel) * 3 // 10 for channel in colors[name])
                pen.line(places, pale, 2 * FINE)
                places = smoothed(places, len(places) // 100)
            pen.line(places, colors[name], 4 * FINE, joint="curve")
            if len(curve) <= 60 or len(places) == 1:
                for x, y in places:
                    dot = 5 * FINE
                    pen.ellipse((x - dot, y - dot, x + dot, y + dot), colors[name])


def smoothed(places: Points, reach: int) -> Points:
    """Each y is the mean of those of `reach` points on either side, fewer towards the ends."""
    found = []
    for n, (x, _) in enumerate(places):
        near = min(reach, n, len(places) - 1 - n)
        found.append((x, fmean(y for _, y in places[n - near : n + near + 1])))
    return found


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, evenly apart, around a range."""
    apart = (high - low or abs(high) or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(apart))
    apart = next(m * power for m in (1, 2, 5, 10) if m * power >= apart * 0.999)
    numbers = range(math.floor(low / apart), math.ceil(high / apart) + 1)
    return [number * apart for number in numbers] + [high + apart] * (len(numbers) < 2)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of the powers of ten, or the powers alone where these are many, around a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        marks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        first = max(n for n, mark in enumerate(marks) if mark <= low)
        marks = marks[first : next(n for n, mark in enumerate(marks) if mark >= high) + 1]
        if len(marks) <= 8:
            break
    return marks


def wrap(names: list[str], width: int, font: Font, beside: int) -> list[tuple[int, int]]:
    """Where each name of a legend, with so many pixels beside it, begins: (left, row)."""
    places, left, row = [], 0, 0
    for name in names:
        needed = beside + int(font.getlength(name))
        if left and left + needed > width:
            left, row = 0, row + 1
        places.append((left, row))
        left += needed
    return places


def write(path: Path, runs: dict[str, list[dict]]) -> None:
    """Draw the runs' logs, by name, to a PNG."""
    image = draw(charts(runs), next(iter(runs)) if len(runs) == 1 else "")
    replace_file(path, lambda file: image.save(file, "PNG"))


def main(words: list[str]) -> None:
    parser = Parser(prog="common.curves", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="a PNG to write")
    with one_line("common.curves"):
        args = parser.parse_args(words)
        logs = [read_log(run / "log.jsonl") for run in args.runs]
        for run, log in zip(args.runs, logs, strict=True):
            if not log:
                raise InputError(f"{run / 'log.jsonl'}: missing or empty; name a run's folder")
        names = [run.resolve().name for run in args.runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in args.runs]
        write(args.output, dict(zip(names, logs, strict=True)))
        print(args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
