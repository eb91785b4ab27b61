"""COCO's instances as masks and tags: shapes, what is drawn once, what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from common import coco
from common.colors import voc_colors
from common.data import check, load
from common.flags import InputError
from common.layouts import read_mask, write_mask

TRAIN, VAL = (f"annotations/instances_{split}2017.json" for split in ("train", "val"))


@pytest.fixture
def root(tmp_path):
    return trees.coco_tree(tmp_path / "coco")


def loaded(root):
    data = load("coco", str(root), "all", "", 0)
    check(data)
    return data


def test_masks_show_the_instances(root, capsys):
    """Outlines and runs, the smaller object on top whatever the order, crowds void."""
    data = loaded(root)
    assert data.classes == ["background", "person", "car", "dog"]  # by id: 1, 3, 18
    assert data.colors == voc_colors(4)
    expected = trees.coco_masks()
    assert list(data.train) == list(expected) and len(data.val) == 2
    for name, (image, mask) in data.train.items():
        assert Path(image) == root / "train2017" / f"{name}.jpg"
        assert Path(mask) == root / "SegmentationClass2017" / "train2017" / f"{name}.png"
        assert (read_mask(mask) == expected[name]).all(), name
    with Image.open(mask) as stored:
        assert stored.mode == "P" and tuple(stored.getpalette()[9:12]) == voc_colors(4)[3]
    # Where they are said to go, with how many.
    assert f"{root / 'SegmentationClass2017/train2017'}: 5 masks" in capsys.readouterr().err


def test_masks_are_drawn_once(root, monkeypatch, capsys):
    first = loaded(root)
    gone, kept = (Path(first.train[f"{number:012d}"][1]) for number in (25, 30))
    write_mask(kept, np.ones((48, 64), np.uint8))  # to be known again
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(coco, "read_instances", None)
        assert loaded(root).train == first.train
        assert capsys.readouterr().err == ""
    gone.unlink()  # as if the program had been stopped before it
    loaded(root)
    assert (read_mask(str(gone)) == trees.coco_masks()[gone.stem]).all()
    assert (read_mask(str(kept)) == 1).all()
    assert "train2017: 1 masks" in capsys.readouterr().err
    assert not [path for path in root.rglob(".*")]  # no temporary file stays


def test_what_another_process_draws_is_left_to_it(root):
    names, written = list(trees.coco_masks()), []

    def write(path, mask):
        written.append(path)
        for name in names:
            write_mask(path.with_name(f"{name}.png"), np.full((48, 64), 7, np.uint8))

    coco.ThreadPoolExecutor, pool = OneAtATime, coco.ThreadPoolExecutor
    try:
        coco.make_masks(root, "train2017", names, write)
    finally:
        coco.ThreadPoolExecutor = pool
    assert len(written) == 1


class OneAtATime:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


def test_a_folder_of_links_serves_where_the_data_cannot_be_written(root, tmp_path):
    links = tmp_path / "mine"
    links.mkdir()
    for name in ("train2017", "val2017", "annotations"):
        (links / name).symlink_to(root / name, target_is_directory=True)
    assert len(loaded(links).train) == 5 and not (root / coco.MADE).exists()


# --- shapes ---


def pack(runs):
    """The inverse of `coco.unpack`, from its description."""
    text = ""
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        while True:
            bits, number = number & 31, number >> 5
            last = number == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if last else 32))
            if last:
                break
    return text


def test_compressed_runs():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4, 200):
        runs = np.exp(rng.uniform(0, 12, count)).astype(int).tolist()
        assert coco.unpack(pack(runs)) == runs
    # What COCO's tool writes for row 5 to 399 of columns 30 to 499 of 480 x 640 begins so.
    assert coco.unpack("UR>[<e2000")[:5] == [30 * 480 + 5, 395, 85, 395, 85]
    assert pack([30 * 480 + 5, 395, 85, 395, 85]) == "UR>[<e200"


def test_an_outline_holds_the_pixels_whose_centres_are_inside():
    """But for those nearer to a side than a third of a pixel: outlines are drawn on a grid."""
    rng, (height, width) = np.random.default_rng(0), (40, 60)
    ys, xs = np.mgrid[:height, :width] + 0.5
    near = total = 0
    for _ in range(60):
        corners = rng.uniform([-8, -8], [width + 8, height + 8], (3, 2))
        thing = coco.Thing(0, 4, False, 1.0, [corners.ravel()])
        mask = coco.draw((height, width), [thing])
        (a, b), (c, d) = corners[1] - corners[0], corners[2] - corners[0]
        turned = np.sign(a * d - b * c)
        depth = np.full((height, width), np.inf)  # inside: distance to the nearest side
        for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            along = (end - start) / np.linalg.norm(end - start)
            distance = turned * (along[0] * (ys - start[1]) - along[1] * (xs - start[0]))
            depth = np.minimum(depth, distance)
        assert (mask[depth > 0.34] == 4).all()
        # Beyond a sharp corner lines are no sides: only what is a pixel off is surely outside.
        assert (mask[depth < -1] == 0).all()
        near += ((mask == 4) != (depth > 0)).sum()
        total += (mask == 4).sum()
    assert near < 0.03 * total  # drawn at a picture's own size, 0.09


def test_outlines_of_no_area_and_out_of_the_picture_are_nothing():
    shapes = [[], [[1, 1, 5, 5]], [[70, 2, 90, 2, 80, 20]], [[-9, -9, -2, -9, -5, -3]]]
    for shape in shapes:
        assert not coco.draw((40, 60), [coco.Thing(0, 1, False, 1.0, shape)]).any()


# --- bad input ---


def edit(change):
    """Damage that rewrites an annotation file's content."""

    def apply(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def runs_of(size):
    return edit(lambda content: content["annotations"][4]["segmentation"].update(size=size))


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


DAMAGES = {  # the file, what is done to it, what the message says
    "no train": ("train2017", shutil.rmtree, "missing; COCO is train2017/, val2017/"),
    "no val": ("val2017", shutil.rmtree, "missing; COCO is"),
    "no annotations": (TRAIN, Path.unlink, "missing; unpack annotations_trainval2017.zip"),
    "no val annotations": (VAL, Path.unlink, "missing; unpack annotations_trainval2017.zip"),
    "cut short": (TRAIN, cut, "not COCO's instances .*unpack it again"),
    "captions": (TRAIN, edit(lambda content: content.pop("categories")), "not COCO's instances"),
    "category": (VAL, edit(lambda c: c["annotations"][0].update(category_id=2)), "instances .*2"),
    "no outline": (TRAIN, edit(lambda c: c["annotations"][0].update(segmentation=7)), "instances"),
    "odd outline": (
        TRAIN,
        edit(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]])),
        "picture 000000000009 has no shape",
    ),
    "a picture of terabytes": (
        TRAIN,
        edit(lambda c: [picture.update(height=10**6, width=10**6) for picture in c["images"]]),
        "has no shape .*too large",
    ),
    "runs of gigabytes": (
        TRAIN,
        edit(lambda c: c["annotations"][2]["segmentation"].update(counts=[0, 10**10])),
        "000000000025 has no shape .*its runs",
    ),
    "negative runs": (
        TRAIN,
        edit(lambda c: c["annotations"][2]["segmentation"].update(counts=[-1, 48 * 64 + 1])),
        "000000000025 has no shape .*its runs",
    ),
    "no number": (TRAIN, edit(lambda c: c["annotations"][0].update(area=10**400)), "instances"),
    "deep": (TRAIN, b"[" * 10**5, "not COCO's instances"),
    "a name that is none": (VAL, edit(lambda c: c["categories"][0].update(name=7)), "categories"),
    "a name twice": (VAL, edit(lambda c: c["categories"][1].update(name="dog")), "categories must"),
    "300 categories": (
        TRAIN,
        edit(lambda c: c["categories"].extend(dict(id=n, name=str(n)) for n in range(100, 400))),
        "categories must be 1 to 253",
    ),
    "size of runs": (TRAIN, runs_of([64, 48]), r"000000000030 has no shape \(of size \[64, 48\]"),
    "unknown picture": ("train2017/extra.jpg", "000000000009.jpg", "knows no such picture"),
    "not writable": ("SegmentationClass2017", b"", "cannot be written .*make a folder of your own"),
    "categories": (VAL, edit(lambda c: c["categories"][0].update(name="wolf")), "categories"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_tree_is_refused_by_the_file(root, name):
    damaged, how, words = DAMAGES[name]
    path = root / damaged
    if isinstance(how, bytes):
        path.write_bytes(how)
    elif isinstance(how, str):
        shutil.copy(path.with_name(how), path)
    else:
        how(path)
    with pytest.raises(InputError) as caught:
        loaded(root)
    text = str(caught.value)
    named = {"categories": "annotations", "unknown picture": "train2017/extra"}.get(name, damaged)
    assert str(root / named) in text and re.search(words, text) and "\n" not in text, text


def test_a_damaged_summary_is_refused(root):
    loaded(root)
    path = root / coco.MADE / "train2017.json"
    whole = json.loads(path.read_text())
    for content in (b"", b"[]", b"{}", b"7", b"\xff", b"[" * 10**5, b"9" * 10**4):
        path.write_bytes(content)
        with pytest.raises(InputError, match="train2017.json: is of another .*to draw anew"):
            loaded(root)
    bad = [("shown", {"000000000036": row}) for row in (1, [1.0], [True], [300])]
    for name, value in (("classes", [1, 2]), ("classes", "ab"), ("shown", []), *bad):
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(InputError, match="train2017.json: is of another"):
            loaded(root)


def test_masks_of_another_annotation_file_are_refused(root):
    loaded(root)
    edit(lambda content: content["annotations"].pop())(root / TRAIN)
    with pytest.raises(InputError, match="is of another instances_train2017.json; remove .*2017 "):
        loaded(root)
    shutil.rmtree(root / coco.MADE)
    loaded(root)
    assert sorted(os.listdir(root / coco.MADE)) == [
        "train2017",
        "train2017.json",
        "val2017",
        "val2017.json",
    ]
