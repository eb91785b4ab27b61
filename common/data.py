"""Datasets as three lists of files, and loaders whose batches depend on seed and step alone.

A dataset is its class names, their colours, and sorted lists of (picture, mask) paths: labelled,
unlabelled, validation. Supported: `shapes` (drawn, no files), `folder`, `voc`, `cityscapes`.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import shapes
from common.run import InputError, in_all_processes

VOID = 255
BAD = 254  # in a lookup: a mask value that stands for nothing
DRAWN = "shapes:"  # before the id of a picture that is drawn, not read
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
Pair = tuple[str, str | None]  # picture, mask

CITYSCAPES = {  # labelId of the 19 training classes: name, colour
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


@dataclass
class Data:
    """A dataset; paths begin with `root`, and `lookup` (256,) turns mask values into classes."""

    classes: list[str]
    colors: list[tuple[int, int, int]]
    labeled: list[Pair]
    unlabeled: list[Pair]
    val: list[Pair]
    root: str
    lookup: np.ndarray

    def summary(self) -> str:
        """Counts, a hash of the labelled list that is equal on every machine, and the classes."""
        files = [image.removeprefix(self.root).replace("\\", "/") for image, _ in self.labeled]
        digest = hashlib.sha256("\n".join(files).encode()).hexdigest()[:12]
        return (
            f"{len(self.labeled)} labelled, {len(self.unlabeled)} unlabelled, {len(self.val)} "
            f"validation pictures; labelled list {digest}\n"
            f"{len(self.classes)} classes: {', '.join(self.classes)}"
        )


# --- the lists ---


def load(dataset: str, data_path: str, labeled: str, unlabeled: str, seed: int) -> Data:
    """List a dataset's files by the flags of the same names; no picture is opened.

    labeled: "1/r" (every r-th of the sorted training pictures), a count (drawn by seed), a list
    file, or "all" (every training picture with a mask). unlabeled: "" (the training pictures that
    are not labelled, or all of them when all are), a list file or a folder.
    Raises InputError that names the file or flag.
    """
    if dataset != "shapes" and not (data_path and Path(data_path).is_dir()):
        raise InputError(f"--data-path {data_path!r}: no such folder; name the dataset's root")
    layouts = dict(shapes=_shapes, folder=_folder, voc=_voc, cityscapes=_cityscapes)
    root, classes, colors, train, val, lookup = layouts[dataset](Path(data_path))
    if not train:
        raise InputError(f"{root}: holds no training picture in the layout of --dataset {dataset}")
    if not val:
        raise InputError(
            f"{root}: holds no validation picture in the layout of --dataset {dataset}"
        )
    for image, mask in val.values():
        if mask is None:
            raise InputError(f"{image}: validation picture without a mask; add the mask")
    chosen = _choose_labeled(labeled, train, root, seed)
    return Data(
        classes=classes,
        colors=colors,
        labeled=chosen,
        unlabeled=_choose_unlabeled(unlabeled, train, root, chosen),
        val=[val[name] for name in sorted(val)],
        root=str(root),
        lookup=lookup,
    )


def _choose_labeled(labeled: str, train: dict[str, Pair], root: Path, seed: int) -> list[Pair]:
    names = sorted(train)
    if labeled == "all":
        pairs = [train[name] for name in names if train[name][1] is not None]
        if not pairs:
            raise InputError(f"{root}: no training picture has a mask")
        return pairs
    if re.fullmatch(r"1/\d+", labeled):
        every = int(labeled[2:])
        if not 1 <= every <= len(names):
            raise InputError(
                f"--labeled {labeled}: r must be 1 to {len(names)}, the number of training pictures"
            )
        pairs = [train[name] for name in names[::every]]
    elif re.fullmatch(r"\d+", labeled):
        count = int(labeled)
        if not 1 <= count <= len(names):
            raise InputError(
                f"--labeled {labeled}: must be 1 to {len(names)}, the number of training pictures"
            )
        order = np.random.default_rng(seed).permutation(len(names))
        pairs = [train[names[index]] for index in sorted(order[:count])]
    elif Path(labeled).is_file():
        pairs = _read_list("--labeled", labeled, train, root)
    else:
        raise InputError(
            f"--labeled {labeled}: neither 1/r, a count, all, nor an existing list file"
        )
    for image, mask in pairs:
        if mask is None:
            raise InputError(f"{image}: chosen by --labeled {labeled} but has no mask")
    return pairs


def _choose_unlabeled(
    unlabeled: str, train: dict[str, Pair], root: Path, labeled: list[Pair]
) -> list[Pair]:
    if not unlabeled:
        known = {image for image, _ in labeled}
        images = [train[name][0] for name in sorted(train)]
        images = [image for image in images if image not in known] or images
    elif Path(unlabeled).is_dir():
        images = [str(path) for path in _pictures(Path(unlabeled)).values()]
        if not images:
            raise InputError(f"--unlabeled {unlabeled}: holds no picture")
    elif Path(unlabeled).is_file():
        images = [image for image, _ in _read_list("--unlabeled", unlabeled, train, root)]
    else:
        raise InputError(f"--unlabeled {unlabeled}: no such list file or folder")
    return [(image, None) for image in images]


def _read_list(flag: str, path: str, train: dict[str, Pair], root: Path) -> list[Pair]:
    """The pairs that a file lists: a training id, a picture, or a picture and its mask a line."""
    pairs = set()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        if line in train:
            pairs.add(train[line])
            continue
        # A path may hold spaces: a tab separates first, any space only without one.
        files = line.split("\t") if "\t" in line else line.split()
        files = [root / name.strip().lstrip("/") for name in files]
        missing = [str(file) for file in files if not file.is_file()]
        if missing or len(files) > 2:
            raise InputError(
                f"{flag} {path}, line {number}: {line!r} is no training id, and "
                + (f"{missing[0]} does not exist" if missing else "not one or two paths")
            )
        pairs.add((str(files[0]), str(files[1]) if len(files) == 2 else None))
    if not pairs:
        raise InputError(f"{flag} {path}: lists no picture")
    return sorted(pairs, key=lambda pair: pair[0])


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures below a folder by id, the path without suffix relative to the folder; sorted."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise InputError(f"{path}: has the same name as {found[name]}; rename one of them")
            found[name] = path
    return found


# --- the layouts ---


class Layout(NamedTuple):
    """What a dataset's folders hold: pairs by id, and the lookup of `Data`."""

    root: Path
    classes: list[str]
    colors: list[tuple[int, int, int]]
    train: dict[str, Pair]
    val: dict[str, Pair]
    lookup: np.ndarray


def _shapes(root: Path) -> Layout:
    train, val = (
        {name: (DRAWN + name, DRAWN + name) for name in shapes.names(split)}
        for split in ("train", "val")
    )
    return Layout(root, shapes.CLASSES, shapes.COLORS, train, val, _lookup(len(shapes.CLASSES)))


def _folder(root: Path) -> Layout:
    """images/{train,val}/, masks/{train,val}/ with PNG masks of the same names, classes.txt."""
    classes = root / "classes.txt"
    if not classes.is_file():
        raise InputError(f"{classes}: missing; write one class name per line, in index order")
    names = [line.strip() for line in classes.read_text("utf-8-sig").splitlines() if line.strip()]
    if not 2 <= len(names) <= 254:
        raise InputError(f"{classes}: lists {len(names)} classes, must be 2 to 254")
    splits = []
    for split in ("train", "val"):
        if not (root / "images" / split).is_dir():
            raise InputError(f"{root / 'images' / split}: missing; put the {split} pictures there")
        masks = root / "masks" / split
        images = _pictures(root / "images" / split)
        splits.append({name: _pair(path, masks / f"{name}.png") for name, path in images.items()})
    return Layout(root, names, voc_colors(len(names)), *splits, _lookup(len(names)))


def _voc(root: Path) -> Layout:
    """A VOCdevkit as unpacked, at its top or at VOC2012/."""
    for below in ("VOC2012", "VOCdevkit/VOC2012"):
        if (root / below / "JPEGImages").is_dir():
            root = root / below
    lists = root / "ImageSets" / "Segmentation"
    for needed in (root / "JPEGImages", lists / "train.txt", lists / "val.txt"):
        if not needed.exists():
            raise InputError(f"{needed}: missing; --data-path must hold VOC2012 as unpacked")
    val = (lists / "val.txt").read_text().split()
    augmented = root / "SegmentationClassAug"
    if augmented.is_dir():
        masks, train = augmented, sorted({p.stem for p in augmented.glob("*.png")} - set(val))
    else:
        masks, train = root / "SegmentationClass", (lists / "train.txt").read_text().split()
    splits = [
        {name: _pair(root / "JPEGImages" / f"{name}.jpg", folder / f"{name}.png") for name in names}
        for names, folder in ((train, masks), (val, root / "SegmentationClass"))
    ]
    return Layout(root, VOC_CLASSES, voc_colors(21), *splits, _lookup(21))


def _cityscapes(root: Path) -> Layout:
    """leftImg8bit/ and gtFine/ as unpacked, labelIds; an id is city/city_sequence_frame."""
    splits = []
    for split in ("train", "val"):
        folder, end = root / "leftImg8bit" / split, "_leftImg8bit.png"
        if not folder.is_dir():
            raise InputError(f"{folder}: missing; --data-path must hold leftImg8bit/ and gtFine/")
        names = [p.relative_to(folder).as_posix()[: -len(end)] for p in folder.glob(f"*/*{end}")]
        masks = root / "gtFine" / split
        images = {name: folder / f"{name}{end}" for name in names}
        splits.append(
            {n: _pair(path, masks / f"{n}_gtFine_labelIds.png") for n, path in images.items()}
        )
    # Ids 0 to 33 exist; those outside the 19 classes are void, and so is the licence plate (-1),
    # which is stored as 255.
    lookup = np.full(256, BAD, np.uint8)
    lookup[[*range(34), 255]] = VOID
    lookup[list(CITYSCAPES)] = range(19)
    names, colors = zip(*CITYSCAPES.values(), strict=True)
    return Layout(root, list(names), list(colors), *splits, lookup)


def _pair(image: Path, mask: Path) -> Pair:
    return str(image), str(mask) if mask.is_file() else None


def _lookup(num_classes: int) -> np.ndarray:
    lookup = np.full(256, BAD, np.uint8)
    lookup[:num_classes] = range(num_classes)
    lookup[VOID] = VOID
    return lookup


def voc_colors(count: int) -> list[tuple[int, int, int]]:
    """PASCAL VOC's palette: the index's bits dealt out to red, green, blue from the top down."""
    bits = [[(index >> 3 * place) & 7 for place in range(8)] for index in range(count)]
    return [
        tuple(sum(((b >> c) & 1) << (7 - place) for place, b in enumerate(row)) for c in range(3))
        for row in bits
    ]


# --- reading and checking ---


def read_image(path: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 RGB, turned as its EXIF orientation says."""
    if path.startswith(DRAWN):
        return shapes.draw(path.removeprefix(DRAWN))[0]
    image = _open(path, "picture")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
        raise InputError(f"{path}: has Pillow mode {image.mode}; convert it to 8-bit RGB")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_mask(path: str) -> np.ndarray:
    """A mask's values (H, W) uint8 as stored: a palette's indices, not its colours."""
    if path.startswith(DRAWN):
        return shapes.draw(path.removeprefix(DRAWN))[1]
    mask = _open(path, "mask")
    if mask.mode not in ("1", "L", "P"):
        raise InputError(
            f"{path}: has Pillow mode {mask.mode}; a mask must be a PNG of class indices, "
            "8-bit grey or palette, with 255 for void"
        )
    return np.array(mask).astype(np.uint8)


def _open(path: str, kind: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {kind}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable {kind} ({reason}); replace it") from error
    return image


def check(data: Data, rank: int = 0, world: int = 1) -> None:
    """Decode every labelled and validation picture and mask once, before the first step.

    Raises InputError for an unreadable file, a mask of another size than its picture, a mask
    value that is no class, a validation picture under 32 pixels, a missing unlabelled picture.
    The files are shared out over the processes, and all of them raise.
    """
    pairs = sorted(set(data.labeled + data.val))[rank::world]
    small = {image for image, _ in data.val}

    def check_pair(pair: Pair) -> None:
        image, mask = read_image(pair[0]), read_mask(pair[1])
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"{pair[1]}: is {mask.shape[1]} x {mask.shape[0]} pixels, its picture {pair[0]} "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        if (data.lookup[values] == BAD).any():
            known = np.flatnonzero(data.lookup != BAD)
            raise InputError(
                f"{pair[1]}: holds the values {', '.join(map(str, values))}; allowed are "
                f"{known[0]} to {known[-2]}, and 255 for void ({len(data.classes)} classes)"
            )
        if pair[0] in small and min(mask.shape) < 32:
            raise InputError(f"{pair[0]}: validation pictures need at least 32 x 32 pixels")

    def check_share() -> None:
        for image, _ in data.unlabeled[rank::world]:
            if not image.startswith(DRAWN) and not Path(image).is_file():
                raise InputError(f"{image}: no such picture")
        # Decoding releases the interpreter's lock, so that threads suffice.
        with ThreadPoolExecutor() as pool:
            hidden = rank > 0 or not sys.stderr.isatty()
            checks = pool.map(check_pair, pairs)
            for _ in tqdm(checks, "checking pictures", len(pairs), leave=False, disable=hidden):
                pass

    in_all_processes(check_share)


# --- the loaders ---

View = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (3, H, W) uint8, (H, W) -> one draw


class Draws(Dataset):
    """An endless random stream over a list of pictures: item d is draw d of the run.

    Draws run through all pictures in a new order each epoch. Within a global batch no picture
    comes twice, as long as the list is no shorter than the batch. An unlabelled picture's label
    is void throughout; no file is opened for it.
    """

    def __init__(
        self, pairs: Sequence[Pair], lookup: np.ndarray, view: View, seed: Sequence[int], batch: int
    ):
        self.pairs, self.lookup, self.view, self.seed = pairs, lookup, view, list(seed)
        # Like `drop_last`: what does not fill a batch waits for the next order.
        self.epoch = len(pairs) // batch * batch or len(pairs)

    def __getitem__(self, draw: int) -> tuple[Tensor, ...]:
        epoch, position = divmod(draw, self.epoch)
        image, label = _read(self.pairs[self._order(epoch)[position]], self.lookup)
        seed = np.random.SeedSequence([*self.seed, draw]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return self.view(image, label)

    @lru_cache(maxsize=2)  # noqa: B019  a dataset lives as long as its run
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, epoch]).permutation(len(self.pairs))


class Pictures(Dataset):
    """A list of pictures in order, each as the view shows it."""

    def __init__(self, pairs: Sequence[Pair], lookup: np.ndarray, view: View):
        self.pairs, self.lookup, self.view = pairs, lookup, view

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.view(*_read(self.pairs[index], self.lookup))


def _read(pair: Pair, lookup: np.ndarray) -> tuple[Tensor, Tensor]:
    """Picture (3, H, W) uint8 and label (H, W) uint8 in class indices."""
    image = read_image(pair[0])
    label = np.full(image.shape[:2], VOID, np.uint8) if pair[1] is None else read_mask(pair[1])
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(lookup[label])


def training_loader(
    data: Data,
    split: str,
    view: View,
    batch_size: int,
    steps: range,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """One batch of views for each step of `steps`; split is "labeled" or "unlabeled".

    What a batch holds depends on seed, step and the position in the global batch of
    world x batch_size pictures alone: not on the number of workers or processes, nor on where
    `steps` begins, so that a resumed run sees what an uninterrupted one sees.
    """
    whole = batch_size * world
    stream = ("labeled", "unlabeled").index(split)
    draws = Draws(getattr(data, split), data.lookup, view, (seed, stream), whole)
    batches = [
        [step * whole + rank * batch_size + position for position in range(batch_size)]
        for step in steps
    ]
    return DataLoader(draws, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)


def val_loader(
    data: Data,
    view: View,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """The validation pictures one by one; each process has every world-th, none comes twice."""
    share = Pictures(data.val[rank::world], data.lookup, view)
    return DataLoader(share, num_workers=workers, pin_memory=pin_memory)
