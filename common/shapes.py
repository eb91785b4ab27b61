"""The embedded dataset: small labelled pictures drawn from a seed, no download and no file.

Six classes of objects lie on textured ground, one to three to a picture, turned, scaled, and
overlapping. Each class has an outline, a badge in its own colour and pattern, and a body whose
colour leans only a little towards the class: a classifier of tags can live on the badge alone,
as real classifiers live on the head of a dog, while a segmenter has to find the whole body.
"""

import functools

import numpy as np

SIZE = 64  # pixels, height and width of a picture
COUNTS = {"train": 400, "val": 150}
CLASSES = ["ground", "fish", "leaf", "mushroom", "house", "star", "butterfly"]
COLORS = [
    (52, 56, 64),
    (66, 135, 245),
    (70, 180, 90),
    (225, 70, 70),
    (60, 205, 195),
    (240, 225, 90),
    (190, 95, 215),
]
HUES = [0.62, 0.33, 0.0, 0.48, 0.16, 0.82]  # of the six classes, as a share of the colour wheel


def names(split: str) -> list[str]:
    """The ids of a split's pictures, "train/000" to "train/399" or "val/000" to "val/149"."""
    return [f"{split}/{index:03d}" for index in range(COUNTS[split])]


@functools.cache
def draw(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Picture (64, 64, 3) uint8 RGB and mask (64, 64) uint8 of an id, the same on every machine."""
    split, index = name.split("/")
    rng = np.random.default_rng([list(COUNTS).index(split), int(index)])
    picture = _ground(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 4)):
        kind = int(rng.integers(1, len(CLASSES)))
        color, cover = _object(rng, kind)
        inside = cover > 0.5
        # A later object may hide part of an earlier one, never most of it.
        hidden = [
            (inside & (mask == k)).sum() / (mask == k).sum() for k in np.unique(mask[mask > 0])
        ]
        if max(hidden, default=0) > 0.4:
            continue
        picture = picture + cover[..., None] * (color - picture)
        mask[inside] = kind
    picture = picture + rng.normal(0, 0.035, picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), mask


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of three scales between two random muted colours, (64, 64, 3) in [0, 1]."""
    noise = np.zeros((SIZE, SIZE))
    for cells in (2, 5, 13):
        grid = rng.random((cells + 1, cells + 1))
        at = np.linspace(0, cells, SIZE, endpoint=False)
        low, frac = at.astype(int), at % 1
        rows = grid[low] * (1 - frac)[:, None] + grid[low + 1] * frac[:, None]
        noise += (rows[:, low] * (1 - frac) + rows[:, low + 1] * frac) / 3
    dark, light = (
        _rgb(rng.random(), rng.uniform(0.1, 0.4), value)
        for value in rng.uniform([0.2, 0.5], [0.5, 0.9])
    )
    return dark + noise[..., None] * (light - dark)


def _object(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """One object's colour (64, 64, 3) and its coverage (64, 64) in [0, 1], soft at the edge."""
    radius = rng.uniform(11, 19)  # pixels
    y0, x0 = rng.uniform(radius * 0.7, SIZE - radius * 0.7, 2)
    turn = rng.uniform(-0.6, 0.6)
    flip = rng.choice([-1, 1])
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    u = flip * ((x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)) / radius
    v = ((y - y0) * np.cos(turn) - (x - x0) * np.sin(turn)) / radius

    outline, (badge_u, badge_v, badge_radius) = _outline(kind, u, v)
    hue = HUES[kind - 1]
    body_hue = hue + rng.uniform(-0.12, 0.12)
    shade = 1 - 0.25 * (u + v)[..., None].clip(-1, 1)
    color = shade * _rgb(body_hue, rng.uniform(0.25, 0.55), rng.uniform(0.55, 0.8))
    p, q = (u - badge_u) / badge_radius, (v - badge_v) / badge_radius
    ink = (_pattern(kind, p, q) > 0)[..., None]
    bright = rng.uniform(0.85, 1.0)
    badge = np.where(ink, _rgb(hue + rng.uniform(-0.02, 0.02), 0.95, bright), bright)
    on_badge = ((1 - np.hypot(p, q)) * badge_radius * radius + 0.5).clip(0, 1)[..., None]
    color = color + on_badge * (badge - color)
    return color, (0.5 - outline * radius).clip(0, 1)


def _outline(kind: int, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, tuple]:
    """Distance to the outline (negative inside), in radii, and the badge's centre and radius."""
    if CLASSES[kind] == "fish":
        body = _ellipse(u - 0.2, v, 0.78, 0.46)
        tail = np.maximum(abs(v) + u * 0.75 + 0.22, -1.0 - u)
        return np.minimum(body, tail), (0.5, 0.0, 0.36)
    if CLASSES[kind] == "leaf":
        blade = np.maximum(np.hypot(u, v - 0.72), np.hypot(u, v + 0.72)) - 1.15
        stem = np.maximum(abs(v) - 0.07, np.maximum(-1.15 - u, u + 0.5))
        return np.minimum(blade, stem), (-0.3, 0.0, 0.36)
    if CLASSES[kind] == "mushroom":
        cap = np.maximum(_ellipse(u, v - 0.05, 0.95, 0.9), v - 0.05)
        stem = np.maximum(abs(u) - 0.28, np.maximum(-v, v - 0.85))
        return np.minimum(cap, stem), (0.0, -0.35, 0.38)
    if CLASSES[kind] == "house":
        walls = np.maximum(abs(u) - 0.68, np.maximum(-0.15 - v, v - 0.8))
        roof = np.maximum(abs(u) * 0.7 - v - 0.85, v + 0.15) / 1.2
        return np.minimum(walls, roof), (0.0, 0.35, 0.38)
    if CLASSES[kind] == "star":
        angle = np.arctan2(u, -v)
        spoke = abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2  # 0 between two tips, 1 at a tip
        return (np.hypot(u, v) - 0.42 - 0.58 * spoke**1.5) * 0.7, (0.0, 0.0, 0.36)
    wings = np.minimum(
        _ellipse(abs(u) - 0.52, v + 0.35, 0.46, 0.5), _ellipse(abs(u) - 0.42, v - 0.42, 0.38, 0.36)
    )
    return np.minimum(wings, _ellipse(u, v, 0.14, 0.75)), (0.5, -0.35, 0.36)


def _pattern(kind: int, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The badge's ink where positive; (p, q) are badge coordinates, the unit disc."""
    wave = [
        lambda: np.cos(np.hypot(p, q) * 7),  # fish: rings
        lambda: np.cos(p * 7),  # leaf: bars
        lambda: 0.45 - np.hypot((p + 0.5) % 1 - 0.5, (q + 0.5) % 1 - 0.5) * 1.6,  # mushroom: dots
        lambda: np.sin(p * 4.7) * np.sin(q * 4.7),  # house: a checker of panes
        lambda: 0.3 - np.minimum(abs(p), abs(q)),  # star: a cross
        lambda: np.hypot(p, q) - 0.55,  # butterfly: an eye
    ]
    return wave[kind - 1]()


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    return (np.hypot(u / a, v / b) - 1) * min(a, b)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour (3,) in [0, 1] from hue, saturation and value."""
    wheel = (abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1).clip(0, 1)
    return value * (1 - saturation * (1 - wheel))
