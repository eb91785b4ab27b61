"""Tags of training pictures: drawn, from masks, tags.txt and VOC's XML; merging into background."""

import os
import shutil

import numpy as np
import pytest
import torch
import trees

from common import shapes
from common.colors import DISTINCT
from common.data import check, describe
from common.layouts import BAD, CITYSCAPES, VOID
from common.run import InputError
from common.tags import load_tagged

CLASSES = ("background", "cat", "sea lion")
SHOWN = ("1", "2", "12", "", "1", "12")  # of each training picture; 003 shows nothing


def tagged_tree(root, shown=SHOWN, classes=CLASSES, height=37, width=45):
    """A folder tree of odd sizes whose training masks hold these classes and void, side by side."""
    rng = np.random.default_rng(0)
    everything = "".join(map(str, range(len(classes))))
    for split, pictures in (("train", shown), ("val", [everything] * 2)):
        for index, digits in enumerate(pictures):
            mask = np.zeros((height, width), np.uint8)
            for kind in map(int, digits):
                mask[5 + kind : 25 + kind, kind * 11 : kind * 11 + 10] = kind
            mask[0] = VOID
            trees.save_picture(root / "images" / split / f"{index:03d}.png", rng, height, width)
            trees.save_mask(root / "masks" / split / f"{index:03d}.png", mask)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def shown(data):
    """The classes of each picture by name."""
    assert data.tags.dtype == torch.bool
    assert data.tags.shape == (len(data.train), len(data.classes) - 1)
    assert data.labeled == list(data.train.values())
    return {
        name: {data.classes[int(index) + 1] for index in row.nonzero()}
        for name, row in zip(data.train, data.tags, strict=True)
    }


# --- where tags come from ---


def test_tags_of_drawn_pictures_are_those_of_the_drawing(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 3})
    data = load_tagged("shapes", "")
    assert list(data.train) == shapes.names("train") and len(data.val) == 3
    assert data.classes == shapes.CLASSES and data.unlabeled == []
    for name, row, (image, _) in zip(data.train, data.tags, data.labeled, strict=True):
        drawn = np.unique(shapes.draw(name)[1])
        assert [0, *(row.nonzero()[:, 0] + 1).tolist()] == drawn.tolist() and image.endswith(name)


def test_tags_of_masks_leave_out_pictures_of_background_alone(tmp_path):
    data = load_tagged("folder", str(tagged_tree(tmp_path)))
    cat, lion = {"cat"}, {"sea lion"}
    expected = {"000": cat, "001": lion, "002": cat | lion, "004": cat, "005": cat | lion}
    assert list(shown(data).items()) == list(expected.items())
    for name, (image, mask) in data.train.items():
        assert image == str(tmp_path / "images/train" / f"{name}.png")
        assert mask == str(tmp_path / "masks/train" / f"{name}.png")
    check(data)


@pytest.mark.parametrize(
    "text",
    [
        "001, sea lion, cat\n000, cat\n",
        "001.png,sea lion,cat\n000.png , cat",
        "\ufeff001\tcat\tsea lion\r\n\r\n  000\tcat  \r\n",
        "000 cat\n001 cat\n001\tsea lion",
        "# by hand, in May\n000 cat\n#\n001, cat, sea lion\n  # the end",
    ],
    ids=["commas", "files", "tabs-crlf", "twice", "comments"],
)
def test_tags_txt_goes_before_masks_which_need_not_be_there(text, tmp_path):
    """The pictures that it does not list are not used."""
    root = tagged_tree(tmp_path)
    (root / "tags.txt").write_bytes(text.encode())
    expected = {"000": {"cat"}, "001": {"cat", "sea lion"}}
    data = load_tagged("folder", str(root))
    assert shown(data) == expected and all(mask for _, mask in data.labeled)
    shutil.rmtree(root / "masks" / "train")
    data = load_tagged("folder", str(root))
    assert shown(data) == expected and not any(mask for _, mask in data.labeled)
    check(data)


def test_what_no_tag_is_given_to_is_named(tmp_path):
    root = tagged_tree(tmp_path)
    note = "training pictures without a tag are not used: 1 (003)"
    assert load_tagged("folder", str(root)).notes == [note]
    (root / "tags.txt").write_text("000 cat\n001\tsea lion\n")
    note = "training pictures without a tag are not used: 4 (002, 003, 004, 005)"
    assert load_tagged("folder", str(root)).notes == [note]


@pytest.mark.parametrize("gone", ["masks", "masks/val", "images/val"])
def test_validation_masks_may_be_missing(gone, tmp_path):
    root = tagged_tree(tmp_path)
    lines = [f"{k:03d}\tcat\tsea lion\n" for k in range(6)]
    (root / "tags.txt").write_text("".join(lines))
    shutil.rmtree(root / gone)
    data = load_tagged("folder", str(root))
    assert data.val == [] and len(data.labeled) == 6
    assert "no validation masks: no mIoU, no best.pt" in data.notes
    describe(data, check(data))


def test_a_single_validation_mask_that_is_missing_is_refused(tmp_path):
    root = tagged_tree(tmp_path)
    (root / "masks/val/001.png").unlink()
    assert "001.png: validation picture without a mask" in refusal("folder", str(root))


def test_pictures_of_one_name_in_two_folders_and_names_with_blanks(tmp_path):
    root = tagged_tree(tmp_path)
    for kind in ("images", "masks"):
        path = root / kind / "train" / "000.png"
        (path.parent / "sub").mkdir()
        shutil.copy(path, path.parent / "sub" / "000.png")
        shutil.copy(path, path.parent / "my cat.png")
    lines = "000.png, cat, sea lion\nsub/000.png, sea lion\nmy cat.png, cat\n001\tcat\n"
    (root / "tags.txt").write_text(lines)
    expected = {"000": {"cat", "sea lion"}, "001": {"cat"}, "my cat": {"cat"}}
    assert shown(load_tagged("folder", str(root))) == expected | {"sub/000": {"sea lion"}}


def test_a_resumed_run_must_have_the_same_tags(tmp_path):
    """Their hash is part of what the checkpoint compares."""
    root = tagged_tree(tmp_path)
    first = load_tagged("folder", str(root)).summary()
    assert first.startswith("5 pictures with tags, 2 validation pictures; tags ")
    assert load_tagged("folder", str(root)).summary() == first
    (root / "tags.txt").write_text("000 cat\n001 cat\n002 cat\n004 cat\n005\tcat\tsea lion\n")
    assert load_tagged("folder", str(root)).summary() != first


def write_xml(root, name, *classes):
    folder = root / "VOC2012" / "Annotations"
    folder.mkdir(exist_ok=True)
    part = "<part><name>dog</name></part>"
    objects = "".join(f"<object><name>{c}</name>{part}</object>" for c in classes)
    (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")


def test_tags_of_voc_come_from_its_annotations(tmp_path):
    """Old ones write some names with blanks; parts of an object, and other objects, are no tags."""
    root = trees.voc_tree(tmp_path, aug=False)
    assert all(len(tags) == 20 for tags in shown(load_tagged("voc", str(root))).values())
    classes = load_tagged("voc", str(root)).classes
    first, second, third = trees.VOC_TRAIN
    write_xml(root, first, "cat", "potted plant", "hand", "cat")
    write_xml(root, second, *classes[1:])
    write_xml(root, third, "tvmonitor")
    tags = shown(load_tagged("voc", str(root)))
    assert tags[first] == {"cat", "pottedplant"} and tags[third] == {"tvmonitor"}
    assert tags[second] == set(classes[1:])
    (root / "VOC2012" / "tags.txt").write_text(f"{first}.jpg {' '.join(classes[1:])}\n")
    assert list(shown(load_tagged("voc", str(root)))) == [first]


def test_tags_of_coco_come_from_its_instances(tmp_path, monkeypatch):
    """Those under others and of crowds too; no mask is opened."""
    root = trees.coco_tree(tmp_path)
    monkeypatch.setattr("common.tags.read_mask", None)
    tags = shown(load_tagged("coco", str(root)))
    expected = {9: {"person", "car"}, 25: {"person", "dog"}, 30: {"dog"}, 36: {"person"}}
    assert tags == {f"{number:012d}": classes for number, classes in expected.items()}
    tags = shown(load_tagged("coco", str(root), "background, person"))
    expected = {9: {"car"}, 25: {"dog"}, 30: {"dog"}}
    assert tags == {f"{number:012d}": classes for number, classes in expected.items()}


# --- background ---

ROADS = ("road", "cat", "sky", "sea lion")


def test_merged_classes_become_class_0(tmp_path):
    root = tagged_tree(tmp_path, ("012", "23", "02", "3"), ROADS)
    data = load_tagged("folder", str(root), " sky,road ")
    assert shown(data) == {"000": {"cat"}, "001": {"sea lion"}, "003": {"sea lion"}}
    assert data.classes == ["background", "cat", "sea lion"]
    assert data.colors == [(0, 0, 0), DISTINCT[1], DISTINCT[3]]
    assert data.lookup.dtype == np.uint8 and data.lookup[:4].tolist() == [0, 1, 0, 2]
    assert data.lookup[VOID] == VOID and (data.lookup[4:VOID] == BAD).all()
    check(data)
    trees.save_mask(root / "masks/train/003.png", np.full((37, 45), 4))
    with pytest.raises(InputError, match=r"003.png: holds the values 4; allowed are 0 to 3"):
        check(data)


def test_tags_txt_knows_the_classes_that_are_left(tmp_path):
    root = tagged_tree(tmp_path, ("1", "3"), ROADS)
    (root / "tags.txt").write_text("000 cat\n001\tsea lion\n")
    expected = {"000": {"cat"}, "001": {"sea lion"}}
    assert shown(load_tagged("folder", str(root), "road,sky")) == expected


def test_ids_of_cityscapes_are_merged(tmp_path):
    root = trees.cityscapes_tree(tmp_path)
    things = [name for name, _ in CITYSCAPES.values()][11:]
    stuff = [name for name, _ in CITYSCAPES.values()][:11]
    data = load_tagged("cityscapes", str(root), ", ".join(stuff))
    assert data.classes == ["background", *things] and len(data.train) == 4
    assert data.tags.all()  # each mask has a row of all ids
    for value in range(256):
        known = CITYSCAPES[value][0] if value in CITYSCAPES else None
        expected = VOID if value < 34 or value == 255 else BAD
        if known:
            expected = data.classes.index(known) if known in things else 0
        assert data.lookup[value] == expected
    assert data.colors[1] == CITYSCAPES[24][1]  # a person
    check(data)


# --- bad input ---


def refusal(*args):
    with pytest.raises(InputError) as caught:
        load_tagged(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("000 cat\n\n001\n", "line 3: 001 has no tag"),
        ("#\n000 cat\n001 sea lion\n", "line 3: sea is no tag; cat, sea lion are"),
        ("000 cat dog\n", "line 1: dog is no tag"),
        ("000, background, cat\n", "line 1: background is no tag"),
        (", cat\n", "line 1:  is no training picture"),
        ("000 cat\n777 cat\n", "line 2: 777 is no training picture"),
        ("000, cat\n777.jpg, cat\n", "line 2: 777.jpg is no"),
        ("000 cat # left\n", "line 1: # is no tag"),
        ("000 sea lion, cat\n", "sea lion is no training picture; write PICTURE, CLASS"),
        ("\xff\xfe000", ""),  # no text
    ],
)
def test_lines_of_tags_txt_that_cannot_be_are_refused(text, said, tmp_path):
    (tagged_tree(tmp_path) / "tags.txt").write_bytes(text.encode("latin1"))
    message = refusal("folder", str(tmp_path))
    assert message.startswith(str(tmp_path / "tags.txt")) and said in message


def test_a_class_without_a_picture_is_refused(tmp_path):
    root = tagged_tree(tmp_path / "masks", ("1", "1"))
    assert "no training picture shows the class sea lion" in refusal("folder", str(root))
    root = tagged_tree(tmp_path / "listed")
    (root / "tags.txt").write_text("001, sea lion\n")
    message = refusal("folder", str(root))
    assert str(root) in message and "the class cat" in message
    root = tagged_tree(tmp_path / "nothing", ("", ""))
    assert str(root) in refusal("folder", str(root))


def test_a_picture_with_neither_mask_nor_tags_is_refused(tmp_path):
    (tagged_tree(tmp_path) / "masks/train/002.png").unlink()
    message = refusal("folder", str(tmp_path))
    assert message.startswith(str(tmp_path / "images/train/002.png")) and "tags.txt" in message


def test_annotations_that_cannot_be_read_are_refused(tmp_path):
    root = trees.voc_tree(tmp_path, aug=False)
    write_xml(root, trees.VOC_TRAIN[0], "cat")
    for _ in range(2):
        message = refusal("voc", str(root))  # first missing, then damaged
        path = root / "VOC2012/Annotations" / f"{trees.VOC_TRAIN[1]}.xml"
        assert message.startswith(str(path)) and "tags.txt" in message
        path.write_text("<annotation><object>")


ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
OUTSIDE = '<!DOCTYPE a [<!ENTITY e SYSTEM "{}">]><a><object><name>&e;</name></object></a>'
HOSTILE = {
    "a bomb": f'<!DOCTYPE a [<!ENTITY e0 "cat">{ENTITIES}]><a>&e9;</a>',
    "a small one": '<!DOCTYPE a [<!ENTITY e "cat">]><a><object><name>&e;</name></object></a>',
    "another file": OUTSIDE.format("tags.txt"),
    "a server": OUTSIDE.format("http://127.0.0.1:9/"),
}


@pytest.mark.parametrize("code", ["utf-8", "utf-16"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_annotations_that_declare_entities_are_refused(content, code, tmp_path):
    root = trees.voc_tree(tmp_path, aug=False)
    write_xml(root, trees.VOC_TRAIN[0], "cat")
    path = root / "VOC2012/Annotations" / f"{trees.VOC_TRAIN[0]}.xml"
    path.write_bytes(content.encode(code))
    assert refusal("voc", str(root)).startswith(f"{path}: unreadable (it declares entities")
    path.unlink()
    os.mkfifo(path)  # would be waited for
    assert refusal("voc", str(root)).startswith(f"{path}: unreadable (no such file)")


@pytest.mark.parametrize(
    "background, said",
    [
        ("", "--background: class 0 is road"),
        ("rood", "--background rood: no class; road, cat, sky, sea lion are"),
        ("road,,rood", "--background rood"),
        ("road,cat,sky,sea lion", "leaves no class to learn"),
    ],
)
def test_background_that_cannot_be_is_refused(background, said, tmp_path):
    root = tagged_tree(tmp_path, ("13",), ROADS)
    message = refusal("folder", str(root), background)
    assert message.startswith("--background") and said in message
    if not background:
        message = refusal("cityscapes", str(trees.cityscapes_tree(tmp_path / "cities")))
        assert message.startswith("--background: class 0 is road")
