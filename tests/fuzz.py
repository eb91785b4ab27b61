"""Damaged and hostile files through every public door: nothing but an InputError may come out.

    python tests/fuzz.py --cases 10000 --seed 0
    python tests/fuzz.py --again runs/fuzz/resume-0-17    # a case that was kept, with its traceback

A case is a valid tree of files of which some are damaged, and a door that reads it, in a process of
its own: with 1 GiB of memory beside what is loaded before, some seconds, no other program, no
network, and no file written elsewhere. What crosses that is an escape; its files are kept.
"""

import argparse
import ctypes
import faulthandler
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import few_shapes
import numpy as np
import torch
import torchvision  # noqa: F401  (now, not in every case)
import trees
from PIL import Image

from common import curves, deeplab, predict
from common.data import check, describe, load
from common.deeplab import DeepLabV3Plus, load_backbone
from common.flags import InputError, SemiConfig
from common.layouts import VOC_CLASSES, read_image
from common.loaders import training_loader
from common.maps import Maps
from common.run import Run
from common.tags import load_tagged

MEMORY, SECONDS = 2**30, 60.0  # beside what the program has when a case starts; on a busy machine

# --- damage: bytes, and what stands in their place ---


def damage_bytes(path: Path, rng: Random) -> None:
    """Some bytes changed, cut, doubled, or all of them at random; near the head more often."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 10, 100))):
        end = len(content) if rng.random() < 0.5 else min(len(content), 300)
        at, size = rng.randrange(end + 1), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind < 3:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 3:
            content[at : at + size] = rng.choice((b"\0", b"\xff")) * size
        elif kind == 4:
            del content[at : at + size]
        elif kind == 5:
            content[at:at] = content[at : at + size] * rng.choice((1, 50))
        elif at < len(content):
            content[at] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        del content[rng.randrange(len(content) + 1) :]
    if rng.random() < 0.05:
        content = rng.randbytes(rng.choice((0, 1, 10, 1000)))
    path.write_bytes(content)


def damage_place(path: Path, rng: Random) -> None:
    """Something in the file's place that is none, or none that ends."""
    path.unlink()
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.touch()
    elif kind < 7:
        path.symlink_to((path.name, "/dev/zero", "nowhere", "..")[kind - 3])


# --- damage: text ---

TOKENS = (
    *("\0", "\ufeff", "\r\n", "\r", "\u2028", "\x85", "\x0c", "\t", " ", ",", "#", "\x1b[2J"),
    *("9" * 10_000, "-1", "255", "256", "1e999", "NaN", "٣", "²", "../../../../etc/hostname"),
    *("/etc/hostname", "~", "%s%n", "{0.__class__}", "x" * 10_000, "é", "\\", "'", '"', "a/b", "."),
)


def damage_text(path: Path, rng: Random) -> None:
    """Lines moved, doubled and lost; odd words, ends of lines, encodings."""
    lines = path.read_text().splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(lines) + 1), rng.randrange(6)
        if kind == 0:
            lines.insert(at, rng.choice(TOKENS) + rng.choice(("\n", "")))
        elif kind == 1:
            lines[at : at + 1] *= rng.choice((0, 2, 300))
        elif kind == 2:
            rng.shuffle(lines)
        elif at < len(lines):
            place = rng.randrange(len(lines[at]))
            cut = rng.choice((0, 0, 1, 3))
            lines[at] = lines[at][:place] + rng.choice(TOKENS) + lines[at][place + cut :]
    text = "".join(lines)
    codes = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "cp037")
    code = rng.choice(codes) if rng.random() < 0.2 else codes[0]
    path.write_bytes(text.encode(code, errors="replace"))


BOMB = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
XML = (
    f'<!DOCTYPE a [<!ENTITY a0 "cat">{BOMB}]><a><object><name>&a9;</name></object></a>',
    f'<!DOCTYPE a [<!ENTITY b "{"b" * 60_000}">]><a><name>{"&b;" * 60_000}</name></a>',
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a><object><name>&b;</name></object></a>',
    '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><a><object><name>cat</name></object></a>',
    '<!DOCTYPE a [<!ENTITY % b SYSTEM "/etc/passwd">%b;]><a/>',
    "<a>" * 200_000,
    "<a>" * 100_000 + "</a>" * 100_000,
    "<a " + "".join(f'b{n}="" ' for n in range(20_000)) + "/>",
    f"<a><object><name>{'dog' * 10**6}</name></object></a>",
    "<a><object><name/></object></a>",
    "<?xml version='1.0' encoding='utf-7'?><a/>",
)


def damage_xml(path: Path, rng: Random) -> None:
    if rng.random() < 0.5:
        return damage_text(path, rng)
    code = rng.choice(("utf-8", "utf-8", "utf-16"))
    path.write_bytes(rng.choice(XML).encode(code))


# --- damage: values in a structure ---

ODD = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
    *(
        "",
        "x" * 10_000,
        "\0",
        "\u2028",
        "../../x",
        "/etc/passwd",
        "é",
        "\ud800",
        "1",
        "IMAGENET1K_V1",
    ),
    *([], {}, [[]], [None], [-1], [0, 0], {"a": 1}, list(range(1000)), {"": ""}, [1e400]),
)


def children(value: object) -> list:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def change(value: object, rng: Random, odd: tuple) -> object:
    """A structure of dicts and lists with one part replaced, lost, moved or renamed."""
    if not isinstance(value, dict | list | tuple) or not value or rng.random() < 0.1:
        return rng.choice(odd)
    key, kind = rng.choice(children(value)), rng.random()
    value = dict(value) if isinstance(value, dict) else list(value)
    if kind < 0.1:
        del value[key]
    elif kind < 0.15 and isinstance(value, dict):
        value[rng.choice(("", "x" * 1000, "step", "miou", 7))] = value.pop(key)
    elif kind < 0.25:
        other = rng.choice(children(value))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = change(value[key], rng, odd)
    return value


NESTED = (
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000,
    "9" * 10_000,
    "[1" * 9999,
)


def damage_json(path: Path, rng: Random) -> None:
    """JSON, or JSON of lines; text that no file of the project's has, and values likewise."""
    kind = rng.random()
    if kind < 0.15:
        return damage_text(path, rng)
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        if kind < 0.25:
            lines[at] = rng.choice(NESTED)
            continue
        try:
            value = change(json.loads(lines[at]), rng, ODD)
        except ValueError:  # what was changed before
            continue
        lines[at] = json.dumps(value).replace('"\\u2028"', "9" * 10_000)
    path.write_text("\n".join(lines) + "\n")


# --- damage: pictures ---


def png(width: int, height: int, depth: int, color: int, data: bytes, *more: bytes) -> bytes:
    """A PNG of this header and this compressed content; more: whole chunks in between."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def zeros(megabytes: int) -> bytes:
    """So many MB of zeros, compressed."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def as_file(mode: str, kind: str, **how: object) -> bytes:
    target = io.BytesIO()
    Image.new(mode, (64, 48)).save(target, kind, **how)
    return target.getvalue()


def strange(rng: Random) -> bytes:
    """A file that is another kind of picture, or claims to be a large one."""
    small = zlib.compress(bytes(48 * 65))
    bombs = (
        lambda: png(100_000, 100_000, 8, 0, small),
        lambda: png(2**31 - 1, 1, 8, 2, small),
        lambda: png(12_000, 14_000, 8, rng.choice((0, 3)), zeros(161)),
        lambda: png(9_400, 9_500, 8, 2, zeros(256)),
        lambda: png(13_300, 13_300, 1, 0, zeros(22)),
        lambda: png(12_000, 14_000, 8, 2, small),
        lambda: png(64, 48, 8, 0, zeros(200)),
    )
    kinds = (
        lambda: png(64, 48, rng.choice((1, 2, 4, 8, 16, 7)), rng.choice((0, 2, 3, 4, 6)), small),
        lambda: png(64, 48, 8, 0, small, chunk(b"zTXt", b"a\0\0" + zeros(100))),
        lambda: png(64, 48, 8, 0, small, chunk(b"iCCP", b"a\0\0" + zeros(100))),
        lambda: png(64, 48, 8, 0, small, chunk(b"eXIf", rng.randbytes(60))),
        lambda: png(64, 48, 8, 3, small, chunk(b"PLTE", bytes(rng.choice((0, 3, 5, 768))))),
        lambda: png(64, 48, 8, 0, small, chunk(b"acTL", struct.pack(">II", 2**31, 0))),
        lambda: as_file("I;16", "PNG"),
        lambda: as_file(rng.choice(("P", "L")), "GIF"),
        lambda: as_file("RGB", "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        lambda: as_file(rng.choice(("RGB", "I;16", "F", "1", "CMYK", "LAB")), "TIFF"),
        lambda: as_file("RGB", "TIFF", compression=rng.choice(("tiff_lzw", "jpeg", "packbits"))),
        lambda: as_file(rng.choice(("RGB", "P", "1")), "BMP"),
        lambda: as_file("RGBA", "WEBP", lossless=True),
        lambda: as_file(rng.choice(("CMYK", "L", "RGB")), "JPEG", progressive=True),
        lambda: as_file("RGB", "PPM"),
        lambda: as_file("RGB", "EPS"),
        lambda: as_file("RGB", "PDF"),
        lambda: as_file("RGB", "ICO", sizes=[(48, 48)]),
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"/>',
    )
    return rng.choice(bombs if rng.random() < 0.05 else kinds)()


def damage_picture(path: Path, rng: Random) -> None:
    kind = rng.random()
    if kind < 0.5:
        path.write_bytes(strange(rng))
        if kind < 0.25:
            damage_bytes(path, rng)
        return
    content = bytearray(path.read_bytes())
    if content[:2] == b"\xff\xd8":  # a JPEG: other sides
        at = max(content.find(b"\xff\xc0"), 0) + 5
        sides = rng.choice(
            ((65_500, 65_500), (13_300, 13_300), (0, 64), (48, 0), (1, 1), (480, 640))
        )
        content[at : at + 4] = struct.pack(">HH", *sides)
    else:  # a PNG: other chunks, with a right checksum
        at, chunks = 8, []
        while at + 8 <= len(content):
            size = struct.unpack(">I", content[at : at + 4])[0]
            chunks.append(
                (bytes(content[at + 4 : at + 8]), bytearray(content[at + 8 : at + 8 + size]))
            )
            at += size + 12
        name, data = rng.choice(chunks)
        if data:
            data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
        content = content[:8] + b"".join(chunk(n, bytes(d)) for n, d in chunks)
    path.write_bytes(content)


# --- damage: checkpoints ---


class Touch:
    """Unpickled, it runs a program."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def records(path: Path, method: int, **changed: bytes) -> None:
    """A zip file with these records replaced, all of them packed by this method."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in content.items():
            new.writestr(name, changed.get(name.split("/")[-1].split(".")[0], data))


def zip_bomb(path: Path) -> None:
    """A checkpoint whose data.pkl is 4 GB of zeros, in some MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    records(path, zipfile.ZIP_STORED, data=block * 4095 + packer.flush())
    content = bytearray(path.read_bytes())
    for start, method, size in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
        at = content.index(start)
        content[at + method : at + method + 2] = struct.pack("<H", 8)
        content[at + size : at + size + 4] = struct.pack("<I", 4095 * 2**20)
    path.write_bytes(content)


def shared(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def odd_tensors() -> tuple:
    ring: list = []
    ring.append(ring)
    wide = torch.zeros(1).expand(100_000, 100_000)
    tensors = (torch.zeros(0), torch.zeros(3), torch.zeros(3, dtype=torch.complex64), wide)
    tensors += (torch.full((8, 3, 7, 7), math.nan), torch.zeros(8, 3, 7, 7, dtype=torch.float64))
    tensors += (torch.zeros(8, 3, 7, 7).to_sparse(), torch.ones(8, 3, 7, 7, dtype=torch.int64))
    return (*ODD, *tensors, shared(60), ring, {"step": shared(60)}, b"\xff", (), {1}, 1j)


def damage_checkpoint(path: Path, rng: Random) -> None:
    kind = rng.random()
    if kind < 0.6:
        saved = dict(torch.load(path, weights_only=True))
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(saved))
            if key == "state" and isinstance(saved[key], dict):
                # Not deeper: another learning rate there is as good as the right one.
                part = rng.choice(list(saved[key].values()))
                part[rng.choice(list(part))] = rng.choice(odd_tensors())
            else:
                saved[key] = change(saved[key], rng, odd_tensors())
        torch.save(saved, path, _use_new_zipfile_serialization=rng.random() < 0.9)
    elif kind < 0.65:
        records(path, zipfile.ZIP_DEFLATED)
    elif kind < 0.7:
        zip_bomb(path)
    elif kind < 0.75:
        records(path, zipfile.ZIP_STORED, data=pickle.dumps(Touch(), 2))
    elif kind < 0.8:
        path.write_bytes(pickle.dumps(rng.choice((Touch(), {"state": Touch()}, shared(60))), 2))
    elif kind < 0.85:
        target = rng.choice(("constants.pkl", "code/a.py", "version", ".format_version"))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"last/{target}", b"3\n")
    else:  # in the pickle, or the zip's directory, near the file's beginning and end
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.randrange(min(3000, len(content)))
            content[at if rng.random() < 0.6 else -1 - at] = rng.randrange(256)
        path.write_bytes(content)


def damage_npy(path: Path, rng: Random) -> None:
    head = {"descr": "<f2", "fortran_order": False, "shape": (2, 6, 8)}
    odd = ((10**6, 10**6), (), (-1,), (2, 6), (0, 6, 8), (3, 6, 8), (2, 60, 80), "x")
    head["shape"] = rng.choice(odd)
    head["descr"] = rng.choice(("<f2", "<f2", "|O", "<f8", "<U9", "<c8", "x", "<M8[s]"))
    text = str(head).encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(192))


OWN = {
    ".jpg": damage_picture,
    ".png": damage_picture,
    ".txt": damage_text,
    ".xml": damage_xml,
    ".json": damage_json,
    ".jsonl": damage_json,
    ".pt": damage_checkpoint,
    ".npy": damage_npy,
}


def damage(path: Path, rng: Random) -> None:
    """Damage a file, most often in a way of its own kind."""
    kind = rng.random()
    if kind < 0.1:
        damage_place(path, rng)
    elif kind < 0.35:
        damage_bytes(path, rng)
    else:
        OWN[path.suffix](path, rng)


# --- the doors ---


def corner(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A view that takes no memory, as crops take little."""
    return image[:, :32, :32], label[:32, :32]


def look(dataset: str, root: Path, labeled: str, unlabeled: str = "") -> None:
    """What a script does with a dataset before its first step, and a draw of each split."""
    data = load(dataset, str(root), labeled, unlabeled, 0)
    counts = check(data, unlabeled=("full", "headers")[len(root.name) % 2])
    data.summary(), describe(data, counts)
    for split in ("labeled", "unlabeled"):
        next(iter(training_loader(data, split, corner, 1, range(1))))


def open_folder(root: Path) -> None:
    for labeled, unlabeled in (("1/2", ""), (str(root / "list.txt"), str(root / "others.txt"))):
        look("folder", root, labeled, unlabeled)


def open_voc(root: Path) -> None:
    look("voc", root, "1/2")
    load_tagged("voc", str(root)).summary()


def open_tags(root: Path) -> None:
    data = load_tagged("folder", str(root))
    describe(data, check(data)), data.summary()


def open_cityscapes(root: Path) -> None:
    look("cityscapes", root, "1/2")


def open_coco(root: Path) -> None:
    look("coco", root, "1/2")
    load_tagged("coco", str(root)).summary()
    look("coco", root, "1/2")


def of_folder(root: Path, **flags: object) -> Run:
    flags = few_shapes.SEMI | dict(dataset="folder", data_path=str(root / "data"), iters=4) | flags
    run = Run("any", SemiConfig(output_dir=str(root / "run"), **flags))
    network = DeepLabV3Plus(3, "resnet18", width=8)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    run.start(run.load(), [network], network=network, optimizer=optimizer)
    return run


def steps(run: Run, last: int) -> None:
    for step in run.loop(range(run.first, last)):
        network = run.networks[0].train()
        loss = network(torch.ones(2, 3, 32, 32)).square().mean()
        loss.backward()
        run.state["optimizer"].step()
        run.log(step, loss=loss)
        run.evaluate(step)


def resume(root: Path) -> None:
    run = of_folder(root, resume=(True, "changed")[len(root.name) % 2])
    steps(run, 4)
    run.finish()


def command(root: Path) -> None:
    """python -m common.predict"""
    program(
        predict.main, [str(root / "last.pt"), str(root / "pictures"), "--output", str(root / "o")]
    )


def program(main: object, words: list[str]) -> None:
    try:
        main(words)
    except SystemExit as end:
        assert end.code in (0, 1, 2), end.code
        if end.code == 2:
            raise InputError("said in a line") from end


def segment(root: Path) -> None:
    """A notebook. Networks may take more memory than there is for a large picture that is whole."""
    model = predict.load(root / "last.pt", "cpu")
    for path in sorted((root / "pictures").iterdir()):
        size = math.inf
        with suppress(InputError):
            size = read_image(str(path)).size
        ctypes.CDLL(None).malloc_trim(0)  # what a large one took
        if size < 10**6:
            predict.overlay(path, predict.segment(model, path), model.colors)


def weights(root: Path) -> None:
    load_backbone(few_shapes.light_resnet("resnet18", None), "resnet18", str(root / "weights.pt"))


def draw_curves(root: Path) -> None:
    output = ["--output", str(root / "curves.png")]
    program(curves.main, [str(root / "a"), *output])
    program(curves.main, [str(root / "a"), str(root / "b"), *output])


def read_maps(root: Path) -> None:
    maps = Maps(root / "maps", load_tagged("folder", str(root)), 8)
    for index in range(len(maps.names)):
        maps.draw(index, ("image", "superpixels", "seeds", "cam"))
    maps.count  # noqa: B018


# --- the trees ---


def folder_tree(root: Path) -> None:
    trees.folder_tree(root, train=4, val=2)
    (root / "colors.txt").write_text("0 0 0\n255,0,0\n0 0 255\n")
    (root / "list.txt").write_text("000\nimages/train/002.jpg\tmasks/train/002.png\n")
    (root / "others.txt").write_text("001\nimages/train/003.jpg\n")


def tags_tree(root: Path) -> None:
    trees.folder_tree(root, train=4, val=2, classes=("background", "cat", "sea lion"))
    (root / "tags.txt").write_text("000 cat\n001.jpg\tcat\tsea lion\n002, cat, sea lion\n# two\n")


def voc_tree(root: Path) -> None:
    trees.voc_tree(root, aug=False)
    folder = root / "VOCdevkit" / "VOC2012" / "Annotations"
    folder.mkdir()
    named = [trees.VOC_TRAIN[n % 3] for n in range(20)]  # each class once
    for name in trees.VOC_TRAIN:
        classes = [c for c, at in zip(VOC_CLASSES[1:], named, strict=True) if at == name]
        objects = "".join(f"<object>\n<name>{c}</name>\n</object>\n" for c in classes)
        (folder / f"{name}.xml").write_text(f"<annotation>\n{objects}</annotation>\n")


def coco_tree(root: Path) -> None:
    trees.coco_tree(root)
    load("coco", str(root), "1/2", "", 0)  # draws the masks


def cityscapes_tree(root: Path) -> None:
    trees.cityscapes_tree(root, frames=1)


def run_tree(root: Path) -> None:
    trees.folder_tree(root / "data", train=6, val=2)
    steps(of_folder(root), 2)
    for name in ("curves.png", "best.pt", "iou.txt"):
        (root / "run" / name).unlink()


def predict_tree(root: Path) -> None:
    run_tree(root / "made")
    shutil.copy(root / "made" / "run" / "last.pt", root / "last.pt")
    shutil.rmtree(root / "made")
    rng = np.random.default_rng(0)
    trees.save_picture(root / "pictures" / "a.jpg", rng)
    trees.save_picture(root / "pictures" / "b.png", rng)


def weights_tree(root: Path) -> None:
    torch.save(few_shapes.light_resnet("resnet18", None).state_dict(), root / "weights.pt")


def curves_tree(root: Path) -> None:
    for name in ("a", "b"):
        (root / name).mkdir()
        lines = [dict(step=n + 1, loss=1 / (n + 1), loss_u=0.1, seconds=0.5) for n in range(8)]
        for line in lines[3::4]:
            line |= dict(miou=0.5, iou={"ground": 0.5, "cat": None}, teacher=0.25)
        lines.insert(5, dict(step=6, stage="seeds", figure=None, seconds=1.0))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / name / "log.jsonl").write_text(text)


def maps_tree(root: Path) -> None:
    tags_tree(root)
    maps = Maps(root / "maps", load_tagged("folder", str(root)), 8)
    for index in range(len(maps.names)):
        maps.write("superpixels", index, torch.arange(48 * 64).view(48, 64) // 10)
        maps.write("seeds", index, torch.ones(48, 64, dtype=torch.int64))
        maps.write("cam", index, torch.rand(3, 6, 8))


class Door(NamedTuple):
    make: object  # a folder -> its files, valid ones
    enter: object  # a folder -> what a user's program reads of it
    files: tuple[str, ...]  # patterns of what may be damaged
    share: int = 1  # of the cases


DOORS = {
    "folder": Door(folder_tree, open_folder, ("**/*.*",), 6),
    "voc": Door(voc_tree, open_voc, ("**/*.txt", "**/Annotations/*", "**/*.*"), 4),
    "tags": Door(tags_tree, open_tags, ("*.txt", "**/*.*"), 2),
    "cityscapes": Door(cityscapes_tree, open_cityscapes, ("**/*.*",), 1),
    "coco": Door(coco_tree, open_coco, ("**/*.json", "**/*.json", "**/*.*"), 4),
    "resume": Door(run_tree, resume, ("run/*",), 6),
    "command": Door(predict_tree, command, ("last.pt", "pictures/*"), 3),
    "segment": Door(predict_tree, segment, ("last.pt", "pictures/*"), 3),
    "weights": Door(weights_tree, weights, ("*.pt",), 2),
    "curves": Door(curves_tree, draw_curves, ("**/*.jsonl",), 2),
    "maps": Door(maps_tree, read_maps, ("maps/**/*.*",), 2),
}


# --- a case ---

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def guard(root: Path) -> None:
    """End this process at what no input may cause: a program, a connection, a file elsewhere."""

    def hook(event: str, args: tuple) -> None:
        bad = event in FORBIDDEN
        if event == "open" and isinstance(args[0], str | bytes):
            path, flags = os.path.realpath(os.fsdecode(args[0])), args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            bad = path == "/etc/passwd" or (writes and not Path(path).is_relative_to(root))
            bad = bad and path not in ("/dev/null", "/dev/tty")
        if bad:
            print(f"forbidden: {event} {args}", file=sys.__stderr__, flush=True)
            traceback.print_stack(file=sys.__stderr__)
            os._exit(3)

    sys.addaudithook(hook)


def enter(door: Door, root: Path) -> int:
    """Through the door: 0 when the input is taken, 1 when it is refused, else an exception."""
    try:
        door.enter(root)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 100_000, f"not one line: {error}"
        return 1
    return 0


def child(door: Door, root: Path) -> None:
    """The new process: limits, then the door; ends with its status, 2 for an escape."""
    try:
        for number in (1, 2):
            os.dup2(os.open(root / "said.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's, of a crash
        guard(root)
        os._exit(enter(door, root))
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
        os._exit(2)


def escape_of(door: Door, root: Path) -> tuple[int, str]:
    """The case's status in a process of its own, and what escaped."""
    pid, until = os.fork(), time.monotonic() + SECONDS
    if pid == 0:
        child(door, root)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1, f"hangs, over {SECONDS:.0f} s"
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status in (0, 1):
        return status, ""
    if status < 0:
        return status, f"killed by {signal.Signals(-status).name}"
    lines = (root / "said.log").read_text(errors="replace").strip().splitlines()
    frames = [line.strip() for line in lines if "/common/" in line and line.strip()[:4] == "File"]
    return status, f"{lines[-1][:200]} at {frames[-1] if frames else '?'}"


@contextmanager
def light():
    """Small networks, one thread and one arena of memory, whatever pytest has."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
    small = mock.patch.object(deeplab, "dilated_resnet", few_shapes.light_resnet)
    undrawn = mock.patch("common.run.panels")  # of pictures that are never damaged
    with small, undrawn, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fuzz(cases: int, seed: int, folder: Path, only: str = "", shown: bool = False) -> list[str]:
    """What escaped in so many cases; their files are in the folder."""
    names = [name for name in DOORS for _ in range(DOORS[name].share) if only in ("", name)]
    escapes, counts, reasons = [], Counter(), Counter()
    with light(), tempfile.TemporaryDirectory() as place:
        for number in range(cases):
            rng = Random(f"{seed} {number}")
            name = rng.choice(names)
            door, template = DOORS[name], Path(place) / name
            if not template.exists():
                template.mkdir()
                with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                    door.make(template)
                assert enter_quietly(door, template, Path(place)) == 0, f"{name}: undamaged"
            root = Path(place) / ("case" + "x" * rng.randrange(2))
            shutil.copytree(template, root, symlinks=True)
            files = sorted(p for p in root.glob(rng.choice(door.files)) if p.is_file())
            for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2, 3)))):
                damage(path, rng)
            status, escape = escape_of(door, root)
            counts[name, status] += 1
            if escape:
                kept = folder / f"{name}-{seed}-{number}"
                escapes.append(f"{kept}: {escape}")
                reasons[name, escape] += 1
                if reasons[name, escape] <= 3:
                    keep(root, kept)
                if shown:
                    print(escapes[-1], flush=True)
            shutil.rmtree(root)
            if shown and (number + 1) % 500 == 0:
                print(f"{number + 1} cases, {len(escapes)} escapes", file=sys.stderr, flush=True)
    if shown:
        for name in DOORS:
            taken, refused = counts[name, 0], counts[name, 1]
            total = sum(count for key, count in counts.items() if key[0] == name)
            print(f"{name:10}  {total:5} cases, {taken:5} taken, {refused:5} refused")
        for (name, escape), count in reasons.most_common():
            print(f"{count:5}  {name}: {escape}")
    return escapes


def enter_quietly(door: Door, template: Path, place: Path) -> int:
    root = place / "undamaged"
    shutil.copytree(template, root)
    status, escape = escape_of(door, root)
    if status:
        print((root / "said.log").read_text(), escape)
    shutil.rmtree(root)
    return status


def keep(root: Path, target: Path) -> None:
    """Copy a case's files; what is none is left where it leads."""
    shutil.rmtree(target, ignore_errors=True)

    def copy(source: str, to: str) -> None:
        if Path(source).is_file() or Path(source).is_symlink():
            shutil.copy2(source, to, follow_symlinks=False)
        elif Path(source).is_fifo():
            os.mkfifo(to)

    shutil.copytree(root, target, symlinks=True, copy_function=copy)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("", *DOORS), default="", help="one door")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), help="folder of escapes' files"
    )
    parser.add_argument("--again", type=Path, help="a case that was kept")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.again:
        with light():
            door = DOORS[args.again.name.split("-")[0]]
            copy = Path(tempfile.mkdtemp()) / "case"
            keep(args.again, copy)
            print(("taken", "refused")[enter(door, copy)])
        return
    started = time.time()
    escapes = fuzz(args.cases, args.seed, args.keep, args.only, shown=True)
    print(f"{args.cases} cases, {len(escapes)} escapes, {time.time() - started:.0f} s")
    sys.exit(bool(escapes))


if __name__ == "__main__":
    main(sys.argv[1:])
