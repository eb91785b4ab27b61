"""COCO 2017: masks of classes, drawn once from the outlines of its instances, and image-level tags.

They lie beside the pictures: for each split a folder of masks, and a file of what pictures show.
"""

import json
import math
import os
import random
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image, ImageDraw

from common.bars import tqdm
from common.flags import InputError
from common.losses import VOID
from common.machine import in_all_processes

MADE = "SegmentationClass2017"  # the folder of masks below the dataset's root
LARGEST = 2**27  # pixels of a picture: a mask of more is not begun
FINE = 5  # outlines are drawn so many times as large: Pillow puts their corners on whole pixels


class Thing(NamedTuple):
    """An instance: its shape is outlines (x, y, x, y, ...) in pixels, or a run-length encoding."""

    picture: int
    label: int  # its class; while a file is read, the category's id
    crowd: bool
    area: float
    shape: list[array] | dict[str, Any]


def make_masks(
    root: Path, split: str, names: list[str], write: Callable[[Path, np.ndarray], None]
) -> list[str]:
    """Have a mask of each of these pictures, by write(path, mask); the classes' names.

    Those that are there stay, so that a stopped run goes on. Processes draw different pictures.
    """

    def make() -> list[str]:
        try:
            return _make_masks(root, split, names, write)
        except OSError as error:
            raise InputError(
                f"{root / MADE}: cannot be written ({error}); make a folder of your own with links "
                "to train2017, val2017 and annotations, and name that as --data-path"
            ) from error

    return in_all_processes(make)


def _make_masks(root: Path, split: str, names: list[str], write: Callable) -> list[str]:
    source, folder, known = _source(root, split), root / MADE / split, _summary(root, split)
    done = set(os.listdir(folder)) if folder.is_dir() else set()
    left = [name for name in names if f"{name}.png" not in done]
    if known and not left:
        return known["classes"]
    classes, sizes, things = read_instances(source)
    for name in left:
        if name not in sizes:
            raise InputError(f"{root / split / name}: {source} knows no such picture")
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: sorted({thing.label for thing in things[name]}) for name in things}
    summary = dict(bytes=source.stat().st_size, classes=classes, shown=shown)
    temporary = folder / f".{uuid4().hex}"
    temporary.write_text(json.dumps(summary), encoding="utf-8")
    os.replace(temporary, folder.with_suffix(".json"))

    def draw_one(name: str) -> None:
        path = folder / f"{name}.png"
        if path.exists():  # another process was first
            return
        try:
            mask = draw(sizes[name], things.get(name, []))
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{source}: picture {name} has no shape ({reason})") from error
        write(path, mask)

    hidden = int(os.environ.get("RANK", 0)) > 0 or None
    if left and not hidden:
        print(f"{folder}: {len(left)} masks are drawn, once", file=sys.stderr)
    random.Random().shuffle(left)  # in each process an order of its own
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(draw_one, left), "drawing masks", len(left), disable=hidden))
    return classes


def read_tags(root: Path) -> dict[str, list[int]]:
    """The classes that training pictures show, crowds included; known once their masks are made."""
    return _summary(root, "train2017")["shown"]


def _source(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _summary(root: Path, split: str) -> dict[str, Any] | None:
    """What was read of a split's annotations when its masks were drawn, None before."""
    source, path = _source(root, split), root / MADE / f"{split}.json"
    if not source.is_file():
        raise InputError(f"{source}: missing; unpack annotations_trainval2017.zip beside {split}/")
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        same = summary["bytes"] == source.stat().st_size and _are_classes(summary["classes"])
        labels = [label for row in summary["shown"].values() for label in row]
        same = same and all(type(label) is int and 0 <= label < 256 for label in labels)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise InputError(f"{path}: is of another {source.name}; remove {path.parent} to draw anew")
    return summary


def _are_classes(names: Any) -> bool:
    """Whether they are names, each of another class that a mask can hold."""
    names_only = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names_only and 2 <= len(set(names)) == len(names) <= 254


def read_instances(path: Path) -> tuple[list[str], dict[str, tuple], dict[str, list[Thing]]]:
    """An annotation file's classes, and by picture its height and width and its instances.

    Of its 450 MB no more is kept than the shapes, four bytes a number.
    """

    def keep(item: dict[str, Any]) -> Any:
        if "segmentation" in item:
            shape = item["segmentation"]
            if not isinstance(shape, dict):
                shape = [array("f", outline) for outline in shape]
            crowd = bool(item.get("iscrowd", 0))
            return Thing(item["image_id"], item["category_id"], crowd, float(item["area"]), shape)
        if "file_name" in item:
            return item["id"], Path(item["file_name"]).stem, (item["height"], item["width"])
        return item

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=keep)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = ["background", *(category["name"] for category in categories)]
        labels = {category["id"]: label for label, category in enumerate(categories, 1)}
        sizes = {name: size for _, name, size in content["images"]}
        names = {number: name for number, name, _ in content["images"]}
        things = defaultdict(list)
        for thing in content["annotations"]:
            things[names[thing.picture]].append(thing._replace(label=labels[thing.label]))
        if not _are_classes(classes):
            raise ValueError("categories must be 1 to 253, each with a name of its own")
    except Exception as error:  # as many kinds as there are ways to be another file
        reason = " ".join(repr(error).split())
        raise InputError(f"{path}: not COCO's instances ({reason}); unpack it again") from error
    return classes, sizes, things


# --- from shapes to a mask ---


def draw(size: tuple[int, int], things: list[Thing]) -> np.ndarray:
    """The mask (H, W) uint8 of a picture's instances, the smaller ones on top; a crowd is void.

    What no instance covers is background.
    """
    if math.prod(size) > LARGEST:
        raise ValueError(f"{size} is too large")
    mask = np.zeros(size, np.uint8)
    for thing in sorted(things, key=lambda thing: -thing.area):
        value = VOID if thing.crowd else thing.label
        if isinstance(thing.shape, dict):
            mask[decode(thing.shape, size)] = value
        else:
            _paint(mask, thing.shape, value)
    return mask


def _paint(mask: np.ndarray, outlines: list[array], value: int) -> None:
    """Set a mask's pixels whose centres are within one of the outlines."""
    parts = [np.reshape(outline, (-1, 2)) for outline in outlines if len(outline) >= 6]
    if not parts:  # two points or fewer enclose nothing
        return
    points, end = np.concatenate(parts), np.array(mask.shape)[::-1]
    first = np.floor(points.min(axis=0)).astype(int).clip(0, end)
    last = np.ceil(points.max(axis=0)).astype(int).clip(0, end)
    if not (first < last).all():  # out of the picture
        return
    width, height = (last - first).tolist()
    fine = FINE if width * height <= LARGEST / 8 else 1  # 400 MB
    canvas = Image.new("L", (width * fine, height * fine))
    for part in parts:
        ImageDraw.Draw(canvas).polygon(((part - first) * fine).ravel().tolist(), fill=1)
    inside = np.asarray(canvas)[fine // 2 :: fine, fine // 2 :: fine] > 0
    mask[first[1] : last[1], first[0] : last[0]][inside] = value


def decode(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """A run-length encoding's pixels (H, W) bool: runs of 0 and 1 in turn, column by column."""
    if tuple(shape["size"]) != tuple(size):
        raise ValueError(f"of size {shape['size']}, not {list(size)}")
    counts = shape["counts"]
    runs = unpack(counts) if isinstance(counts, str) else counts
    if min(runs) < 0 or sum(runs) != math.prod(size):  # before so many pixels are made
        raise ValueError("its runs are not as many pixels as the picture has")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def unpack(text: str) -> list[int]:
    """The runs of COCO's compressed strings.

    A character less 48 has five bits of a number, the lowest ones first, and 32 where more follow;
    the last of them has the sign, 16. From the fourth on, a number is what its run is longer than
    the one before the last.
    """
    runs, number, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return runs
