"""Datasets as three lists of files, and the check that these can be right.

A dataset is its class names, their colours, and sorted lists of (picture, mask) paths: labelled,
unlabelled, validation. There are `shapes` (drawn, no files), `folder`, `voc`, `coco`,
`cityscapes`.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.bars import tqdm
from common.flags import InputError
from common.layouts import (
    BAD,
    DRAWN,
    LAYOUTS,
    Data,
    Pair,
    count_values,
    find_pictures,
    need_folder,
    read_header,
    read_image,
    read_mask,
    read_numbered,
    short_name,
    shortened,
)
from common.losses import VOID
from common.machine import gather_sum, in_all_processes

# --- the lists ---


def load(dataset: str, data_path: str, labeled: str, unlabeled: str, seed: int) -> Data:
    """List a dataset's files by the flags of the same names; no picture is opened.

    labeled: "1/r" (every r-th of the sorted training pictures), a count (drawn by seed), a list
    file, or "all" (every training picture with a mask). unlabeled: "" (the training pictures that
    are not labelled, or all of them when all are), a list file or a folder. Raises InputError that
    names the file or flag.
    """
    data = layout(dataset, data_path)
    labeled, unlabeled = os.path.expanduser(labeled), os.path.expanduser(unlabeled)
    unique = dataset not in ("shapes", "folder")
    if not os.path.isfile(labeled) and not any(mask for _, mask in data.train.values()):
        if dataset == "folder":
            need_folder(data.root / "masks" / "train")
        problem = f"{data.root}: no training picture has a mask; add some"
        raise InputError("; ".join([problem, *data.notes]))
    chosen = _choose_labeled(labeled, data, seed, unique)
    others = _choose_unlabeled(unlabeled, data, chosen, unique)
    for flag, path, pairs in (("--labeled", labeled, chosen), ("--unlabeled", unlabeled, others)):
        seen = same_files(data.val, pairs)
        if seen and os.path.isdir(path):  # of a folder of all pictures the others are meant
            others = [pair for pair in others if pair[0] not in seen]
            left_out = shortened(list(seen), 1)
            data.notes.append(f"{flag} {path}: validation pictures left out: {left_out}")
        elif seen:
            first = next(iter(seen))
            raise InputError(f"{flag} {path}: names the validation picture {first}; leave it out")
    if not others:
        raise InputError(f"--unlabeled {unlabeled}: no picture, or validation's alone; name others")
    return replace(data, labeled=chosen, unlabeled=others)


def same_files(first: Iterable[Pair], second: Iterable[Pair]) -> dict[str, str]:
    """Which of the second list's pictures are which files of the first; links are followed."""

    def file(path: str) -> object:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # drawn, missing, or no name of a file
            return path
        return status.st_dev, status.st_ino

    known = {file(image): image for image, _ in first}
    found = {image: known.get(file(image)) for image, _ in second}
    return {image: same for image, same in found.items() if same is not None}


def layout(dataset: str, data_path: str, scored: bool = True) -> Data:
    """What the dataset's folder holds: training and validation pictures, all of these with masks.

    Raises InputError where there are none, and where a picture is in both. Unless `scored`, there
    may be no validation pictures, or none with a mask: then there are none.
    """
    data_path = os.path.expanduser(data_path)
    if dataset != "shapes" and not (data_path and os.path.isdir(data_path)):
        raise InputError(f"--data-path {data_path!r}: no such folder; name the dataset's root")
    found = LAYOUTS[dataset](Path(data_path))
    if not scored and not any(mask for _, mask in found.val):
        found.notes.append("no validation masks: no mIoU, no best.pt")
        found.val.clear()
    elif dataset == "folder":
        need_folder(found.root / "images" / "val")
        need_folder(found.root / "masks" / "val")
    for pairs, kind in ((found.train, "training"), (found.val, "validation")):
        if not pairs and (scored or kind == "training"):
            problem = f"{found.root}: no {kind} picture where --dataset {dataset} has them"
            raise InputError("; ".join([problem, *found.notes]))
    for image, val in same_files(found.val, found.train.values()).items():
        raise InputError(f"{image}: is the validation picture {val}; remove one of them")
    for image, mask in found.val:
        if mask is None:
            problem = f"{image}: validation picture without a mask; add the mask"
            raise InputError("; ".join([problem, *found.notes]))
    return found


def _choose_labeled(labeled: str, data: Data, seed: int, unique: bool) -> list[Pair]:
    train = list(data.train.values())
    if labeled == "all":
        return [pair for pair in train if pair[1] is not None]
    if found := re.fullmatch(r"(1/)?(\d{1,9})", labeled):
        number, count = int(found[2]), len(train)
        if not 1 <= number <= count:
            number = "r" * bool(found[1]) or "a count"
            limits = f"1 to {count}, the number of training pictures"
            raise InputError(f"--labeled {labeled}: {number} must be {limits}")
        order = np.random.default_rng(seed).permutation(count)
        indices = range(0, count, number) if found[1] else sorted(order[:number])
        pairs = [train[index] for index in indices]
    elif os.path.isfile(labeled):
        pairs = _read_list("--labeled", labeled, data, unique)
    else:
        raise InputError(f"--labeled {labeled}: neither 1/r, a count, all, nor a list file")
    for image, mask in pairs:
        if mask is None:
            raise InputError(
                f"{image}: chosen by --labeled {labeled} but has no mask; add it, or take "
                "--labeled all, every picture with a mask, or a list"
            )
    return pairs


def _choose_unlabeled(unlabeled: str, data: Data, labeled: list[Pair], unique: bool) -> list[Pair]:
    if not unlabeled:
        known = {image for image, _ in labeled}
        images = [image for image, _ in data.train.values()]
        images = [image for image in images if image not in known] or images
    elif os.path.isdir(unlabeled):
        images = [str(path) for path in find_pictures(Path(unlabeled)).values()]
    elif os.path.isfile(unlabeled):
        images = [image for image, _ in _read_list("--unlabeled", unlabeled, data, unique)]
    else:
        raise InputError(f"--unlabeled {unlabeled}: no such list file or folder")
    return [(image, None) for image in images]


# Folders of masks in the lists that papers came with, which a user may have elsewhere or not at
# all; and the endings of masks that hold Cityscapes' trainIds.
RELEASED = "SegmentationClass SegmentationClassAug gtFine segmentation annotation masks".split()
TRAIN_IDS = ("_labelTrainIds.png", "_gtFine.png")


def _read_list(flag: str, path: str, data: Data, unique: bool) -> list[Pair]:
    """The pairs that a file lists: a line is a training id, a picture, or a picture and its mask.

    Paths are relative to the root; a picture alone has the mask that the dataset has for it.
    unique: a training picture's name tells it from all others. Then it is found by its name where
    the path leads nowhere, and has the dataset's own mask where that of a released list is missing
    or holds trainIds.
    """
    root, train = data.root, data.train
    known, pairs = dict(train.values()), {}  # masks by picture
    times = Counter(map(short_name, train))  # a name that two pictures have finds neither
    pictures = {short_name(name): image for name, (image, _) in train.items()}
    named = {name: image for name, image in pictures.items() if unique and times[name] == 1}
    for number, line in read_numbered(Path(path)):
        if line in train:
            pairs.update([train[line]])
            continue
        where = f"{flag} {path}: line {number}: {line!r}"
        # A name may hold spaces: they part picture and mask only where the line is no picture.
        whole = os.path.isfile(root / line.lstrip("/"))
        words = [line] if whole else line.split("\t") if "\t" in line else line.split()
        words = [word.strip().lstrip("/") for word in words]
        image, *masks = (str(root / word) for word in words)
        masks = masks if flag == "--labeled" else []  # no mask of an unlabelled picture is needed
        image = image if os.path.isfile(image) else named.get(short_name(image), image)
        mask = masks[0] if masks else known.get(image)
        if unique and masks:
            gone = words[1].split("/")[0] in RELEASED and not os.path.isfile(mask)
            own = image in known and short_name(mask) == short_name(image)
            if own and (gone or mask.endswith(TRAIN_IDS)):
                mask = known[image]
            elif mask.endswith(TRAIN_IDS):
                raise InputError(f"{where} has trainIds, labelIds are read; list the picture alone")
        missing = [file for file in (image, mask) if file and not os.path.isfile(file)]
        if missing or len(words) > 2:
            raise InputError(
                f"{where} is no training id (there are {len(train)}, such as {next(iter(train))}), "
                "and " + (f"{missing[0]} does not exist" if missing else "not one or two paths")
            )
        if pairs.setdefault(image, mask) != mask:
            raise InputError(f"{where} gives {image} two masks, {pairs[image]} and {mask}")
    if not pairs:
        raise InputError(f"{flag} {path}: lists no picture")
    files = [file for pair in pairs.items() for file in pair if file]
    top = os.path.abspath(root)
    out = [file for file in files if not Path(os.path.abspath(file)).is_relative_to(top)]
    if out:
        data.notes.append(f"{flag} {path}: names files outside {root}: {shortened(out, 1)}")
    return sorted(pairs.items())


# --- the check ---


def check(
    data: Data,
    rank: int = 0,
    world: int = 1,
    unlabeled: str = "headers",
    fits: Callable[[str, int, int], None] = lambda *_: None,
) -> np.ndarray:
    """Decode every labelled and validation picture, and its mask, once, before the first step.

    Returns pixel counts (2, K + 1) int64: of the labelled pictures' classes and of the validation
    pictures', void last. Raises InputError, in all processes, for what cannot be trained on or
    scored. Fills `data.files`, by path below the root: a hash of each such file's content, and ""
    for an unlabelled picture.

    unlabeled: "headers" reads of unlabelled pictures no more than that, "full" decodes them,
    "unused" reads nothing. fits(path, height, width) may refuse a training picture.
    """
    splits = [set(data.labeled), set(data.val)]
    every = sorted(splits[0] | splits[1])
    pairs = every[rank::world]
    classes = len(data.classes)

    def check_pair(pair: Pair) -> tuple[np.ndarray, list[int]]:
        image = read_image(pair[0])
        if pair in splits[0]:
            fits(pair[0], *image.shape[:2])
        whole = pair in splits[1] or data.tags is not None
        if whole and min(image.shape[:2]) < 32:
            raise InputError(f"{pair[0]}: is under 32 x 32 pixels, too small to be predicted")
        if pair[1] is None:
            return np.zeros(classes + 1, np.int64), [_hash(pair[0]), 0]
        mask = read_mask(pair[1])
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"{pair[1]}: is {mask.shape[1]} x {mask.shape[0]} pixels, its picture {pair[0]} "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        counts = count_values(mask)
        values = np.flatnonzero(counts)
        if (data.lookup[values] == BAD).any():
            known = np.flatnonzero(data.lookup != BAD)
            raise InputError(
                f"{pair[1]}: holds the values {', '.join(map(str, values))}; allowed are "
                f"{known[0]} to {known[-2]}, and 255 for void ({classes} classes)"
            )
        by_class = np.bincount(data.lookup, counts, minlength=256).astype(np.int64)
        counts = np.append(by_class[:classes], by_class[VOID])
        return counts, [_hash(path) for path in pair]  # just read, they are in memory

    def check_unlabeled(image: str) -> InputError | None:
        try:
            size = read_header(image) if unlabeled == "headers" else read_image(image).shape[:2]
        except InputError as error:
            return error
        fits(image, *size)

    others = [] if unlabeled == "unused" else [image for image, _ in data.unlabeled]

    def check_share() -> tuple[np.ndarray, np.ndarray]:
        known = {image for image, _ in pairs}
        images = [image for image in others[rank::world] if image not in known]
        totals = np.zeros((2, classes + 1), np.int64)
        hashes = np.zeros((len(every), 2), np.uint64)
        # Decoding releases the interpreter's lock, so that threads suffice.
        with ThreadPoolExecutor() as pool:
            count, hidden = len(pairs) + len(images), rank > 0 or None
            with tqdm(None, "checking pictures", count, leave=False, disable=hidden) as bar:
                for number, (counts, own) in enumerate(pool.map(check_pair, pairs)):
                    totals[[pairs[number] in split for split in splits]] += counts
                    hashes[rank + number * world] = own
                    bar.update()
                broken = {}
                for image, error in zip(images, pool.map(check_unlabeled, images), strict=True):
                    broken |= {image: error} if error else {}
                    bar.update()
        if broken:
            first, *rest = broken
            more = f" ({len(rest)} more unlabelled pictures cannot be read: {shortened(rest)})"
            raise InputError(f"{broken[first]}{more * bool(rest)}")
        return totals, hashes

    totals, hashes = map(gather_sum, in_all_processes(check_share))
    listed = [(image, "") for image in others]
    for pair, row in zip(every, hashes.tolist(), strict=True):
        listed += [(path, f"{value:016x}") for path, value in zip(pair, row, strict=True) if path]
    start = f"{data.root}{os.sep}"
    data.files = {
        Path(path.removeprefix(start)).as_posix(): value
        for path, value in listed
        if not path.startswith(DRAWN)
    }
    return totals


def _hash(path: str) -> int:
    """64 bits of a file's SHA-256; 0 of a picture that is drawn."""
    if path.startswith(DRAWN):
        return 0
    return int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:8], "big")


def describe(data: Data, counts: np.ndarray) -> str:
    """A table of the pixels that `check` counted, and the classes that no mask shows.

    Raises InputError where training or evaluation would have nothing to go by.
    """
    learns = data.tags is None  # of tags: the masks of training pictures are for scores alone
    rows = (
        ("labelled", learns, "never learned"),
        ("validation", bool(data.val), "IoU 0 where predicted, else none"),
    )
    absent = []
    for (kind, needed, so), (*known, void) in zip(rows, counts, strict=True):
        shown = np.flatnonzero(known)
        if not needed:
            continue
        if not len(shown):
            raise InputError(f"{data.root}: no {kind} pixel has a class, all are void (255)")
        advice = "; 255 is void: write 1 where the object is" * bool(void)
        # A small validation set may show one class.
        if len(shown) == 1 and (kind == "labelled" or (void and shown[0] == 0)):
            only = f"{data.root}: the {kind} masks show class {shown[0]} alone"
            raise InputError(f"{only} of {len(data.classes)}{advice}")
        unseen = [name for name, count in zip(data.classes, known, strict=True) if not count]
        if unseen:
            absent.append(f"no {kind} pixel shows {', '.join(unseen)}: {so}")
    if not counts.any():
        return "no masks: nothing is scored"
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    width = max(map(len, [*data.classes, "void"]))
    lines = [f"{'% of pixels':{width}}  labelled  validation"]
    for name, (labeled, val) in zip([*data.classes, "void"], shares.T, strict=True):
        lines.append(f"{name:{width}}  {labeled:8.2f}  {val:10.2f}")
    return "\n".join(lines + absent)
