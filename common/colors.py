"""What colour a class has in pictures."""

import numpy as np

Color = tuple[int, int, int]  # red, green, blue, from 0 to 255
GREY = (220, 220, 220)  # of void


def from_hex(words: str) -> list[Color]:
    """Colours written as rrggbb, with spaces between."""
    return [tuple(bytes.fromhex(word)) for word in words.split()]


# Black, for what is often background, and colours as far apart as nineteen can be.
DISTINCT = from_hex("""
    000000 d2002d 691ea5 ffe13c 00ffb4 0096ff ff78c3 69003c 783c0f 003c00
    00f0ff f08700 002d69 ff9687 b4ff69 00962d 0f9678 96962d e1ffb4 d2b4ff
""")


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


def tinted(picture: np.ndarray, labels: np.ndarray, colors: list[Color]) -> np.ndarray:
    """A picture (H, W, 3) half in the colours of its labels; as it is where these are black."""
    tint = colorize(labels, colors)
    return np.where(tint.any(axis=2, keepdims=True), picture // 2 + tint // 2, picture)
