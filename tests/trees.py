"""Tiny datasets on disk in the layouts that users have, for tests of anything that reads files.

Each function fills a folder and returns what `--data-path` would be. Contents are drawn from a
seed, so that two trees of the same arguments hold the same pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.colors import VOC

HEIGHT, WIDTH = 48, 64
CLASSES = ("ground", "cat", "dog")
VOC_TRAIN = ("2007_000032", "2007_000039", "2007_000063")
VOC_VAL = ("2007_000033", "2007_000042")
VOC_EXTRA = ("2008_000002", "2009_000001", "2010_000005")  # masks in SegmentationClassAug alone
CITIES = {"train": ("aachen", "zurich"), "val": ("lindau",)}


def save_picture(path: Path, rng: np.random.Generator, height=HEIGHT, width=WIDTH) -> None:
    """Smooth colours: a few random cells, enlarged, so that JPEG keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR).save(path)


def save_mask(path: Path, values: np.ndarray, palette: bool = True) -> None:
    """A PNG of these values (H, W): a palette's indices as VOC has them, or 8-bit grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(values.astype(np.uint8))
    if palette:
        mask.putpalette([channel for color in VOC for channel in color])
    mask.save(path)


def blobs(rng: np.random.Generator, classes: int, height=HEIGHT, width=WIDTH) -> np.ndarray:
    """Class 0 with one rectangle of every other class, side by side, and a void frame."""
    mask = np.zeros((height, width), np.uint8)
    for kind, columns in enumerate(np.array_split(np.arange(1, width - 1), classes - 1), start=1):
        top = rng.integers(1, height // 2)
        mask[top : top + height // 3, columns[:-1]] = kind
    mask[[0, -1]] = mask[:, [0, -1]] = 255
    return mask


def folder_tree(
    root: Path, train: int = 6, val: int = 3, classes: Sequence[str] = CLASSES, seed: int = 0
) -> Path:
    """images/{train,val}/000.jpg ..., masks/{train,val}/000.png ... (palette), classes.txt."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            save_picture(root / "images" / split / f"{index:03d}.jpg", rng)
            save_mask(root / "masks" / split / f"{index:03d}.png", blobs(rng, len(classes)))
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def voc_tree(root: Path, aug: bool, seed: int = 0) -> Path:
    """VOCdevkit/ as unpacked; with `aug`, SegmentationClassAug/ as people download it.

    The latter holds grey masks of all pictures, those of validation included; they are all 1
    here, so that a test sees which folder a mask came from.
    """
    rng = np.random.default_rng(seed)
    top = root / "VOCdevkit" / "VOC2012"
    for name in VOC_TRAIN + VOC_VAL + VOC_EXTRA:
        save_picture(top / "JPEGImages" / f"{name}.jpg", rng)
        if name not in VOC_EXTRA:
            save_mask(top / "SegmentationClass" / f"{name}.png", blobs(rng, 21))
        if aug:
            ones = np.ones((HEIGHT, WIDTH))
            save_mask(top / "SegmentationClassAug" / f"{name}.png", ones, palette=False)
    lists = top / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(VOC_TRAIN) + "\n")
    (lists / "val.txt").write_text("\n".join(VOC_VAL) + "\n")
    return root / "VOCdevkit"


def cityscapes_tree(root: Path, frames: int = 2, seed: int = 0) -> Path:
    """leftImg8bit/ and gtFine/ with `frames` pictures a city; row 0 of a mask has all its ids.

    Columns 0 to 33 of that row are the ids 0 to 33, column 34 is 255 (the licence plate).
    """
    rng = np.random.default_rng(seed)
    for split, cities in CITIES.items():
        for city in cities:
            for frame in range(frames):
                name = f"{city}_{frame:06d}_000019"
                save_picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", rng)
                ids = rng.choice([0, 3, 7, 11, 26, 33], (HEIGHT, WIDTH))
                ids[0, :35] = [*range(34), 255]
                masks = root / "gtFine" / split / city
                save_mask(masks / f"{name}_gtFine_labelIds.png", ids, palette=False)
                # Its neighbours in the real archive, which nobody should read.
                save_picture(masks / f"{name}_gtFine_color.png", rng)
                save_mask(masks / f"{name}_gtFine_instanceIds.png", ids * 0 + 7, palette=False)
    return root


KINDS = {18: "dog", 1: "person", 3: "car"}  # COCO's category ids, in an order of no meaning
PERSON, CAR, DOG = 1, 2, 3  # their classes
# Run lengths of rows 10 to 29 of columns 5 to 24, of rows 33 to 35 of columns 50 to 52, and of the
# last column's first row, 48 x 64, as COCO's own tool writes them.
RUNS = "j7d0l00000000000000000000000000000000000000WV1_OZjN000o=NSB"


def outline(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A rectangle's corners, in the middle of a side one more."""
    return [left, top, (left + right) / 2, top, right, top, right, bottom, left, bottom]


def coco_tree(root: Path, seed: int = 0) -> Path:
    """train2017/, val2017/ and annotations/; `coco_masks` has what its instances show.

    Of the training pictures 9 has a car before a person, 25 a crowd as runs with a dog before it,
    30 a dog as compressed runs, 34 nothing, 36 a person of two parts, partly out of the picture.
    """
    things = {  # by picture: category, shape, area, whether a crowd
        "train2017": {
            9: [(3, [outline(20, 20, 30, 30)], 100, 0), (1, [outline(8, 8, 40, 40)], 1024, 0)],
            25: [
                (1, dict(size=[HEIGHT, WIDTH], counts=[480, 960, 1632]), 960, 1),
                (18, [outline(15, 10, 25, 20)], 100, 0),
            ],
            30: [(18, dict(size=[HEIGHT, WIDTH], counts=RUNS), 410, 0)],
            34: [],
            36: [(1, [outline(-4, 0, 10, 10), outline(50, 40, 70, 60.5)], 400, 0)],
        },
        "val2017": {
            139: [(kind, [outline(at, 4, at + 16, 40)], 576, 0) for at, kind in enumerate(KINDS)],
            285: [(18, [outline(0, 0, 64, 24)], 1536, 0)],
        },
    }
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, pictures in things.items():
        images, instances = [], []
        for number, shapes in pictures.items():
            name = f"{number:012d}.jpg"
            save_picture(root / split / name, rng)
            images.append(dict(id=number, file_name=name, height=HEIGHT, width=WIDTH))
            for kind, shape, area, crowd in shapes:
                instances.append(
                    dict(
                        id=1000 + len(instances),
                        image_id=number,
                        category_id=kind,
                        segmentation=shape,
                        area=area,
                        iscrowd=crowd,
                        bbox=[0, 0, 1, 1],
                    )
                )
        content = dict(
            info=dict(year=2017),
            images=images,
            annotations=instances,
            categories=[dict(id=k, name=name, supercategory="") for k, name in KINDS.items()],
        )
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def coco_masks() -> dict[str, np.ndarray]:
    """The masks of the training pictures of `coco_tree`."""
    masks = {
        f"{number:012d}": np.zeros((HEIGHT, WIDTH), np.uint8) for number in (9, 25, 30, 34, 36)
    }
    cut, crowd, runs, _, parts = masks.values()
    cut[8:40, 8:40] = PERSON
    cut[20:30, 20:30] = CAR
    crowd[:, 10:30] = 255
    crowd[10:20, 15:25] = DOG
    runs[10:30, 5:25] = runs[33:36, 50:53] = runs[0, 63] = DOG
    parts[:10, :10] = parts[40:, 50:] = PERSON
    return masks


SBD_ONLY = VOC_EXTRA[:2]  # the others of SBD's masks are of pictures that VOC has masks of


def sbd_tree(root: Path, save: Callable[[str, dict], None]) -> Path:
    """benchmark_RELEASE/ with masks of class 5: of a VOC training picture, a val one, two others.

    save(path, content): writes a .mat file, as scipy.io.savemat does.
    """
    folder = root / "benchmark_RELEASE" / "dataset" / "cls"
    folder.mkdir(parents=True)
    for name in (VOC_TRAIN[0], VOC_VAL[0], *SBD_ONLY):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[5:20, 7:30] = 5
        save(str(folder / f"{name}.mat"), {"GTcls": {"Boundaries": [], "Segmentation": mask}})
    return root
