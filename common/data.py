"""Datasets as three lists of files, and loaders whose batches depend on seed and step alone.

A dataset is its class names, their colours, and sorted lists of (picture, mask) paths: labelled,
unlabelled, validation. There are `shapes` (drawn, no files), `folder`, `voc`, `coco`,
`cityscapes`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.bars import tqdm
from common.flags import InputError, LoneError
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
from common.signals import outlive_signals

# --- the lists ---


def load(dataset: str, data_path: str, labeled: str, unlabeled: str, seed: int) -> Data:
    """List a dataset's files by the flags of the same names; no picture is opened.

    labeled: "1/r" (every r-th of the sorted training pictures), a count (drawn by seed), a list
    file, or "all" (every training picture with a mask). unlabeled: "" (the training pictures that
    are not labelled, or all of them when all are), a list file or a folder.
    Raises InputError that names the file or flag.
    """
    data = layout(dataset, data_path)
    labeled, unlabeled = os.path.expanduser(labeled), os.path.expanduser(unlabeled)
    unique = dataset not in ("shapes", "folder")
    if not os.path.isfile(labeled) and not any(mask for _, mask in data.train.values()):
        if dataset == "folder":
            need_folder(data.root / "masks" / "train")
        reasons = "".join(f"; {note}" for note in data.notes)
        raise InputError(f"{data.root}: no training picture has a mask; add some{reasons}")
    chosen = _choose_labeled(labeled, data.train, data.root, seed, unique)
    for image in sorted(same_files(data.val, chosen).values()):
        raise InputError(f"--labeled {labeled}: names the validation picture {image}; leave it out")
    others = _choose_unlabeled(unlabeled, data.train, data.root, chosen, unique)
    for flag, path, pairs in (("--labeled", labeled, chosen), ("--unlabeled", unlabeled, others)):
        files = [file for pair in pairs for file in pair if file] if os.path.isfile(path) else []
        top = os.path.abspath(data.root)
        files = [file for file in files if not Path(os.path.abspath(file)).is_relative_to(top)]
        if files:
            also = f" and {len(files) - 1} more" * (len(files) > 1)
            data.notes.append(f"{flag} {path}: names files outside {data.root}: {files[0]}{also}")
    seen = same_files(data.val, others)
    if seen:
        (image, _), other = others[min(seen)], seen[min(seen)]
        if not os.path.isdir(unlabeled):
            raise InputError(
                f"--unlabeled {unlabeled}: names the validation picture {other}"
                + f", as {image}" * (image != other)
                + "; leave it out"
            )
        # Of a folder of all pictures the others are meant.
        others = [pair for index, pair in enumerate(others) if index not in seen]
        if not others:
            raise InputError(
                f"--unlabeled {unlabeled}: holds validation pictures alone; name others"
            )
        data.notes.append(
            f"--unlabeled {unlabeled}: {len(seen)} validation pictures left out, such as {image}"
        )
    return replace(data, labeled=chosen, unlabeled=others)


def same_files(first: Sequence[Pair], second: Sequence[Pair]) -> dict[int, str]:
    """Which of the second list's pictures, by index, are files of the first; links are followed."""

    def file(path: str) -> object:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # drawn, missing, or no name of a file
            return path
        return status.st_dev, status.st_ino

    known = {file(image): image for image, _ in first}
    found = ((index, known.get(file(image))) for index, (image, _) in enumerate(second))
    return {index: image for index, image in found if image is not None}


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
            raise InputError(
                f"{found.root}: holds no {kind} picture in the layout of --dataset {dataset}"
            )
    train = list(found.train.values())
    for index, val in same_files(found.val, train).items():
        raise InputError(f"{train[index][0]}: is the validation picture {val}; remove one of them")
    for image, mask in found.val:
        if mask is None:
            raise InputError(f"{image}: validation picture without a mask; add the mask")
    return found


def _choose_labeled(
    labeled: str, train: dict[str, Pair], root: Path, seed: int, unique: bool = False
) -> list[Pair]:
    names = list(train)
    if labeled == "all":
        return [train[name] for name in names if train[name][1] is not None]
    if found := re.fullmatch(r"(1/)?(\d{1,9})", labeled):
        share, number = "r " * bool(found[1]), int(found[2])
        if not 1 <= number <= len(names):
            limits = f"1 to {len(names)}, the number of training pictures"
            raise InputError(f"--labeled {labeled}: {share}must be {limits}")
        order = np.random.default_rng(seed).permutation(len(names))
        indices = range(0, len(names), number) if share else sorted(order[:number])
        pairs = [train[names[index]] for index in indices]
    elif os.path.isfile(labeled):
        pairs = _read_list("--labeled", labeled, train, root, unique)
    else:
        raise InputError(
            f"--labeled {labeled}: neither 1/r, a count, all, nor an existing list file"
        )
    for image, mask in pairs:
        if mask is None:
            raise InputError(f"{image}: chosen by --labeled {labeled} but has no mask")
    return pairs


def _choose_unlabeled(
    unlabeled: str, train: dict[str, Pair], root: Path, labeled: list[Pair], unique: bool
) -> list[Pair]:
    if not unlabeled:
        known = {image for image, _ in labeled}
        images = [image for image, _ in train.values()]
        images = [image for image in images if image not in known] or images
    elif os.path.isdir(unlabeled):
        images = [str(path) for path in find_pictures(Path(unlabeled)).values()]
        if not images:
            raise InputError(f"--unlabeled {unlabeled}: holds no picture")
    elif os.path.isfile(unlabeled):
        pairs = _read_list("--unlabeled", unlabeled, train, root, unique)
        images = [image for image, _ in pairs]
    else:
        raise InputError(f"--unlabeled {unlabeled}: no such list file or folder")
    return [(image, None) for image in images]


# Folders of masks in the lists that papers came with, which a user may have elsewhere or not at
# all; and the endings of masks that hold Cityscapes' trainIds.
RELEASED = "SegmentationClass SegmentationClassAug gtFine segmentation annotation masks".split()
TRAIN_IDS = ("_labelTrainIds.png", "_gtFine.png")


def _read_list(
    flag: str, path: str, train: dict[str, Pair], root: Path, unique: bool
) -> list[Pair]:
    """The pairs that a file lists: a line is a training id, a picture, or a picture and its mask.

    Paths are relative to the root; a picture alone has the mask that the dataset has for it.
    unique: a training picture's name tells it from all others. Then it is found by its name where
    the path leads nowhere, and has the dataset's own mask where that of a released list is missing
    or holds trainIds.
    """
    known, pairs = dict(train.values()), {}  # masks by picture
    named: dict[str, list[str]] = {}  # training ids by name
    for name in train if unique else ():
        named.setdefault(short_name(name), []).append(name)
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
        ids = [] if os.path.isfile(image) else named.get(short_name(image), [])
        if len(ids) > 1:
            raise InputError(f"{where} may be {' or '.join(ids)}; write the id")
        if ids:
            image = train[ids[0]][0]
        mask = masks[0] if masks else known.get(image)
        if unique and masks:
            released = words[1].split("/")[0] in RELEASED
            if image in known and short_name(mask) == short_name(image):
                if mask.endswith(TRAIN_IDS) or (released and not os.path.isfile(mask)):
                    mask = known[image]
            elif mask.endswith(TRAIN_IDS):
                raise InputError(
                    f"{where} names a mask of trainIds, but labelIds are read; list the picture "
                    "alone"
                )
        needed = [image, mask] if masks and mask else [image]
        missing = [file for file in needed if not os.path.isfile(file)]
        if missing or len(words) > 2:
            raise InputError(
                f"{where} is no training id (there are {len(train)}, such as {next(iter(train))}), "
                "and " + (f"{missing[0]} does not exist" if missing else "not one or two paths")
            )
        if pairs.setdefault(image, mask) != mask:
            raise InputError(f"{where} gives {image} two masks, {pairs[image]} and {mask}")
    if not pairs:
        raise InputError(f"{flag} {path}: lists no picture")
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
    pictures', void last. Raises InputError for an unreadable file, a mask of another size than its
    picture, a mask value that is no class, and a picture under 32 pixels that is predicted whole:
    in validation, and in training where there are tags. The files are shared out over the
    processes, and all of them raise. Fills `data.files`, by path below the root: a hash of each
    such file's content, and "" for an unlabelled picture.

    unlabeled: "headers" reads of unlabelled pictures no more than that, "full" decodes them,
    "unused" reads nothing. fits(path, height, width) may refuse a training picture.
    """
    splits = [set(data.labeled), set(data.val)]
    every = sorted(splits[0] | splits[1])
    pairs = every[rank::world]
    predicted = {image for image, _ in (data.val if data.tags is None else data.val + data.labeled)}
    classes = len(data.classes)

    def check_pair(pair: Pair) -> tuple[np.ndarray, list[int]]:
        image = read_image(pair[0])
        if pair in splits[0]:
            fits(pair[0], *image.shape[:2])
        if pair[0] in predicted and min(image.shape[:2]) < 32:
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
    *_, void = counts.T
    known = counts[:, :-1]
    learns = data.tags is None  # of tags: the masks of training pictures are for scores alone
    for row, name in ((0, "labelled"), (1, "validation")):
        shown = np.flatnonzero(known[row])
        if (not learns and (row == 0 or not data.val)) or len(shown) > 1 or len(data.classes) == 1:
            continue
        if not len(shown):
            raise InputError(
                f"{data.root}: no {name} pixel has a class, all masks are void (255 throughout)"
            )
        advice = "; 255 is void: write 1 where the object is" * bool(void[row])
        if row == 0 or (advice and shown[0] == 0):  # a small validation set may show one class
            only = f"{data.root}: the {name} masks show class {shown[0]} alone"
            raise InputError(f"{only} of {len(data.classes)}{advice}")
    if not counts.any():
        return "no masks: nothing is scored"
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    width = max(map(len, [*data.classes, "void"]))
    lines = [f"{'% of pixels':{width}}  labelled  validation"]
    for name, (labeled, val) in zip([*data.classes, "void"], shares.T, strict=True):
        lines.append(f"{name:{width}}  {labeled:8.2f}  {val:10.2f}")
    rows = ("labelled", "never learned"), ("validation", "IoU 0 where predicted, else none")
    for (kind, so), row, told in zip(rows, known, (learns, bool(data.val)), strict=True):
        unseen = [name for name, count in zip(data.classes, row, strict=True) if not count]
        if told and unseen:
            lines.append(f"no {kind} pixel shows {', '.join(unseen)}: {so}")
    return "\n".join(lines)


# --- the loaders ---

View = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (3, H, W) uint8, (H, W) -> one draw


class Draws(Dataset):
    """An endless random stream over a list of pictures: item d is draw d of the run.

    `read(item)` gives a picture's tensors, `view(*tensors)` one random draw of them. Draws run
    through all pictures in a new order each epoch. Within a global batch no picture comes twice,
    as long as the list is no shorter than the batch.

    spare: an item that cannot be read is marked in `broken` (N,), in the memory of all loader
    processes, and gives way to another one, which depends on the draw and the items alone. If not,
    it is a LoneError.
    """

    def __init__(
        self,
        items: Sequence,
        read: Callable,
        view: View,
        seed: Sequence[int],
        batch: int,
        spare: bool = False,
    ):
        self.items, self.read, self.view, self.seed = items, read, view, list(seed)
        self.batch = batch
        self.broken = torch.zeros(len(items), dtype=torch.bool).share_memory_() if spare else None
        # Like `drop_last`: what does not fill a batch is left to the next order.
        self.epoch = len(items) // batch * batch or len(items)
        self.order = None, None  # of an epoch: its number and a permutation of the pictures

    def index(self, draw: int) -> int:
        """Which item a draw takes."""
        epoch, position = divmod(draw, self.epoch)
        if self.order[0] != epoch:
            rng = np.random.default_rng([*self.seed, 0, epoch])
            self.order = epoch, rng.permutation(len(self.items))
        return int(self.order[1][position])

    def others(self, draw: int) -> list[int]:
        """What to take instead, first choice first: items that the global batch has not."""
        batch, place = divmod(draw, self.batch)
        start, index = batch * self.batch, self.index(draw)
        taken = {self.index(start + position) for position in range(self.batch)}
        order = np.random.default_rng([*self.seed, 2, batch]).permutation(len(self.items)).tolist()
        free = [item for item in order if item not in taken] or [i for i in order if i != index]
        # The first choices of a batch's draws differ. Where so many fail, the disk is gone.
        return (free[place :: self.batch] + free)[:100]

    def tensors(self, draw: int) -> tuple[Tensor, ...]:
        """What `read` gives of the draw's item, or of another one."""
        index = self.index(draw)
        try:
            return self.read(self.items[index])
        except InputError as error:
            if self.broken is None:
                raise LoneError(error) from error
            self.broken[index] = True
            for other in self.others(draw):
                try:
                    return self.read(self.items[other])
                except InputError:
                    self.broken[other] = True
            raise LoneError(f"{error}, and so with all that were tried instead") from error

    def __getitem__(self, draw: int) -> tuple[Tensor, ...]:
        tensors = self.tensors(draw)
        seed = np.random.SeedSequence([*self.seed, 1, draw]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs as well.
            torch.default_generator.manual_seed(int(seed))
            return self.view(*tensors)


class Pictures(Dataset):
    """A list of pictures in order, each as the view shows it."""

    def __init__(self, pairs: Sequence[Pair], lookup: np.ndarray, view: View):
        self.pairs, self.lookup, self.view = pairs, lookup, view

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.view(*read_pair(self.pairs[index], self.lookup))


def read_pair(pair: Pair, lookup: np.ndarray) -> tuple[Tensor, Tensor]:
    """Picture (3, H, W) uint8 and label (H, W) uint8 in class indices.

    An unlabelled picture's label is void throughout; no file is opened for it.
    """
    image = torch.from_numpy(read_image(pair[0])).permute(2, 0, 1)
    if pair[1] is None:
        return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)
    return image, torch.from_numpy(lookup[read_mask(pair[1])])


def training_loader(
    data: Data,
    split: str,
    view: View,
    batch_size: int,
    numbers: range,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """The batches of views of these numbers; split is "labeled" or "unlabeled".

    What a batch holds depends on seed, number and the position in the global batch of
    world x batch_size pictures alone: not on the number of workers or processes, nor on where
    `numbers` begin, so that a resumed run sees what an uninterrupted one sees.
    """
    stream = ("labeled", "unlabeled").index(split)
    read = partial(read_pair, lookup=data.lookup)
    # An unlabelled picture is not decoded before it is drawn; one that is broken is skipped.
    pairs, spare = getattr(data, split), split == "unlabeled"
    draws = Draws(pairs, read, view, (seed, stream), batch_size * world, spare)
    return draws_loader(draws, batch_size, numbers, rank, world, workers, pin_memory)


def draws_loader(
    draws: Draws,
    batch_size: int,
    numbers: range,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """This process's share of the draws, in the batches of these numbers."""
    whole = batch_size * world
    batches = [
        [number * whole + rank * batch_size + position for position in range(batch_size)]
        for number in numbers
    ]
    return DataLoader(
        draws,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader's own draws leave torch's generator alone
        worker_init_fn=outlive_signals,
    )


def val_loader(
    data: Data,
    view: View,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    pixels: int = 2**16,
) -> DataLoader:
    """The validation pictures; each process has every world-th, none comes twice.

    Batches are `of_one_size`, of at most `pixels` pixels.
    """
    pairs = data.val[rank::world]
    sizes = {index: read_header(mask) for index, (_, mask) in enumerate(pairs)}
    return DataLoader(
        Pictures(pairs, data.lookup, view),
        batch_sampler=of_one_size(sizes, pixels),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=outlive_signals,
    )


def of_one_size(sizes: dict[int, tuple[int, int]], pixels: int) -> list[list[int]]:
    """Batches of pictures of one size, of at most so many pixels, or of a single picture.

    sizes: by a picture's index, its height and width.
    """
    groups, batches = {}, []
    for index, size in sizes.items():
        groups.setdefault(size, []).append(index)
    for (height, width), group in groups.items():
        count = max(pixels // (height * width), 1)
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches
