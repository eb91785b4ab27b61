"""Image-level tags: which classes a training picture shows, and nothing about where."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from common import coco
from common.data import Data, layout
from common.flags import InputError
from common.layouts import BAD, count_values, read_mask, read_numbered, shortened
from common.losses import VOID

BACKGROUNDS = ("background", "_background_", "ground")  # names of a class 0 that is no tag


def load_tagged(dataset: str, data_path: str, background: str = "") -> Data:
    """List a dataset's files and the tags of its training pictures; class 0 is background.

    background: class names, separated by commas, that are merged into class 0; needed where class
    0 has no name that says so. Tags come from `tags.txt` at the dataset's root (a picture's id,
    with or without suffix, and its class names, a line each; commas or tabs where names hold
    blanks; "# " begins a line of comment), else from VOC's Annotations/ or COCO's instances, else
    from the classes in the masks. Pictures that show background alone are left out; the masks of
    the others, `labeled`, are for scoring alone. There may be no validation masks: then `val` is
    empty. Raises InputError that names the file or flag.
    """
    found = merge_background(layout(dataset, data_path, scored=False), background)
    names, listed = list(found.train), found.root / "tags.txt"
    if dataset != "shapes" and listed.is_file():
        shown = _read_tags(listed, found)
    elif dataset == "voc" and (found.root / "Annotations").is_dir():
        shown = {name: _read_xml(found, name) for name in names}
    elif dataset == "coco":
        read = coco.read_tags(found.root)
        shown = {name: {int(found.lookup[k]) for k in read.get(name, [])} - {0} for name in names}
    else:
        with ThreadPoolExecutor() as pool:
            sets = pool.map(lambda name: _classes_in_mask(found, name), names)
        shown = dict(zip(names, sets, strict=True))
    shown = {name: classes for name, classes in shown.items() if classes}
    for index, name in enumerate(found.classes[1:], 1):
        if not any(index in classes for classes in shown.values()):
            raise InputError(f"{found.root}: no training picture shows the class {name}")
    unused = [name for name in names if name not in shown]
    if unused:
        found.notes.append(
            f"training pictures without a tag are not used: {len(unused)} ({shortened(unused)})"
        )
    train = {name: found.train[name] for name in sorted(shown)}
    tags = torch.zeros(len(train), len(found.classes), dtype=torch.bool)
    for row, name in zip(tags, train, strict=True):
        row[list(shown[name])] = True
    return replace(found, train=train, labeled=list(train.values()), tags=tags[:, 1:])


def merge_background(found: Data, background: str) -> Data:
    """The dataset with the named classes merged into a class 0 of the name "background"."""
    names = [name.strip() for name in background.split(",") if name.strip()]
    if not names:
        if found.classes[0] not in BACKGROUNDS:
            raise InputError(
                f"--background: class 0 is {found.classes[0]}, not background; name the classes "
                "that no tag stands for, separated by commas"
            )
        return found
    for name in names:
        if name not in found.classes:
            raise InputError(f"--background {name}: no class; {', '.join(found.classes)} are")
    kept = [index for index, name in enumerate(found.classes) if name not in names]
    if not kept:
        raise InputError(f"--background {background}: leaves no class to learn")
    merged = np.zeros(256, np.uint8)
    merged[[BAD, VOID]] = BAD, VOID
    merged[kept] = range(1, len(kept) + 1)
    return replace(
        found,
        classes=["background", *(found.classes[index] for index in kept)],
        colors=[(0, 0, 0), *(found.colors[index] for index in kept)],
        lookup=merged[found.lookup],
    )


def _read_tags(path: Path, found: Data) -> dict[str, set[int]]:
    """The classes of the pictures that a tags.txt lists; the others are not used."""
    files = {name + Path(image).suffix: name for name, (image, _) in found.train.items()}
    shown = {}
    for number, line in read_numbered(path):
        if line == "#" or line.startswith("# "):
            continue
        where = f"{path}: line {number}"
        separator = "\t" if "\t" in line else "," if "," in line else None
        first, *classes = (word.strip() for word in line.split(separator))
        name = files.get(first, first)
        if name not in found.train:
            raise InputError(f"{where}: {first} is no training picture; write PICTURE, CLASS, ...")
        if not classes:
            raise InputError(f"{where}: {first} has no tag; name its classes or leave it out")
        for tag in classes:
            if tag not in found.classes[1:]:
                raise InputError(f"{where}: {tag} is no tag; {', '.join(found.classes[1:])} are")
        shown.setdefault(name, set()).update(map(found.classes.index, classes))
    return shown


def _read_xml(found: Data, name: str) -> set[int]:
    """The classes of the objects in VOC's annotation of a picture."""
    path = found.root / "Annotations" / f"{name}.xml"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no such file")
        text = path.read_bytes()
        if b"<!DOCTYPE" in text.replace(b"\0", b""):  # in UTF-16, too
            raise ValueError("it declares entities, which may grow to gigabytes")
        objects = ElementTree.fromstring(text).iterfind("object/name")
        classes = {re.sub(r"\s", "", item.text or "") for item in objects}
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: unreadable ({error}); write a tags.txt instead") from error
    return {found.classes.index(tag) for tag in classes if tag in found.classes}


def _classes_in_mask(found: Data, name: str) -> set[int]:
    image, mask = found.train[name]
    if mask is None:
        raise InputError(f"{image}: has neither mask nor tags; write {found.root / 'tags.txt'}")
    values = found.lookup[np.flatnonzero(count_values(read_mask(mask)))]
    return {int(value) for value in values if value not in (0, BAD, VOID)}
