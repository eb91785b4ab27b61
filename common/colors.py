"""What colour a class has in pictures."""

import numpy as np

Color = tuple[int, int, int]  # red, green, blue, from 0 to 255
GREY = (220, 220, 220)  # of void
DISTINCT = [  # black, for what is often background, and colours as far apart as nineteen can be
    (0, 0, 0),
    (210, 0, 45),
    (105, 30, 165),
    (255, 225, 60),
    (0, 255, 180),
    (0, 150, 255),
    (255, 120, 195),
    (105, 0, 60),
    (120, 60, 15),
    (0, 60, 0),
    (0, 240, 255),
    (240, 135, 0),
    (0, 45, 105),
    (255, 150, 135),
    (180, 255, 105),
    (0, 150, 45),
    (15, 150, 120),
    (150, 150, 45),
    (225, 255, 180),
    (210, 180, 255),
]


def voc_colors(count: int) -> list[Color]:
    """PASCAL VOC's palette: the index's bits dealt out to red, green, blue from the top down."""
    bits = [[(index >> 3 * place) & 7 for place in range(8)] for index in range(count)]
    return [
        tuple(sum(((b >> c) & 1) << (7 - place) for place, b in enumerate(row)) for c in range(3))
        for row in bits
    ]


VOC = voc_colors(256)


def palette(colors: list[Color]) -> np.ndarray:
    """The colours (256, 3) uint8 of a mask's values: the classes', then VOC's, grey for void."""
    return np.array([*colors, *VOC[len(colors) : -1], GREY], np.uint8)


def colorize(labels: np.ndarray, colors: list[Color]) -> np.ndarray:
    """Labels (H, W) uint8 as colours (H, W, 3) uint8; void is grey."""
    return palette(colors)[labels]
