"""Lists, the check at start, reading, the embedded dataset and the loaders."""

import hashlib
import os
import re
import shutil
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from common import shapes
from common.augment import train_view, whole_view
from common.data import _choose_labeled, check, describe, load
from common.deeplab import dilated_resnet
from common.flags import InputError, LoneError, RunConfig
from common.layouts import Data, count_values, read_image, read_mask, upright_rgb
from common.loaders import Draws, draws_loader, read_pair, training_loader, val_loader
from common.outputs import choose_folder


@pytest.fixture
def root(tmp_path):
    return trees.folder_tree(tmp_path / "set")


@pytest.fixture
def listed(tmp_path):
    """listed(content): a list file."""

    def write(content):
        path = tmp_path / "list.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def loaded(root, labeled="all", unlabeled="", dataset="folder"):
    """The lists, checked as a run checks them at its start."""
    data = load(dataset, str(root), str(labeled), str(unlabeled), 0)
    check(data)
    return data


def names(pairs):
    return [Path(image).stem for image, _ in pairs]


def folders(pairs):
    return {Path(mask).parent.name for _, mask in pairs}


def message(*args, **kwargs):
    """What the user reads when this input is refused: always one line."""
    with pytest.raises(InputError) as caught:
        loaded(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- layouts ---


def test_folder_layout(root):
    data = loaded(root, "1/2")
    assert names(data.labeled) == ["000", "002", "004"]
    assert names(data.unlabeled) == ["001", "003", "005"]
    assert names(data.val) == ["000", "001", "002"]
    assert all("/val/" in image and "/val/" in mask for image, mask in data.val)
    assert data.classes == list(trees.CLASSES) and len(data.colors) == 3


def test_folder_layout_takes_subfolders_and_any_suffix_case_but_no_hidden_file(root):
    for kind, name in (("images", "000.jpg"), ("masks", "000.png")):
        (root / kind / "train/day").mkdir()
        shutil.move(root / kind / "train" / name, root / kind / "train/day" / name)
    shutil.move(root / "images/train/day/000.jpg", root / "images/train/day/000.JPG")
    (root / "images/train/._001.jpg").write_bytes(b"\x00\x05\x16\x07")
    data = loaded(root)
    assert len(data.labeled) == 6 and data.labeled[-1][0].endswith("day/000.JPG")


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_layout_without_the_augmented_masks(tmp_path, below):
    trees.voc_tree(tmp_path, aug=False)
    data = loaded(tmp_path / below, dataset="voc")
    assert names(data.labeled) == list(trees.VOC_TRAIN)
    assert names(data.val) == list(trees.VOC_VAL)
    assert folders(data.labeled + data.val) == {"SegmentationClass"}
    assert len(data.classes) == 21 and data.classes[15] == "person"
    colors = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128)}
    assert {k: data.colors[k] for k in colors} == colors


def test_voc_augmented_masks_never_bring_validation_pictures_into_training(tmp_path):
    data = loaded(trees.voc_tree(tmp_path, aug=True), "1/2", dataset="voc")
    train = sorted(trees.VOC_TRAIN + trees.VOC_EXTRA)
    assert names(data.labeled) == train[::2] and names(data.unlabeled) == train[1::2]
    assert names(data.val) == list(trees.VOC_VAL)
    assert folders(data.labeled) == {"SegmentationClassAug"}
    assert folders(data.val) == {"SegmentationClass"}


def test_cityscapes_layout_and_label_ids(tmp_path):
    data = loaded(trees.cityscapes_tree(tmp_path), "1/2", dataset="cityscapes")
    assert [Path(i).name[:13] for i, _ in data.labeled] == ["aachen_000000", "zurich_000000"]
    assert len(data.unlabeled) == 2 and len(data.val) == 2
    assert [data.classes[k] for k in (0, 13, 18)] == ["road", "car", "bicycle"]
    # The official table (cityscapesScripts, labels.py): labelId -> trainId.
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [ids.index(k) if k in ids else 255 for k in range(34)] + [255]
    _, label = next(iter(val_loader(data, whole_view)))
    assert label[0, 0, :35].tolist() == expected


def test_cityscapes_reads_label_ids_where_a_list_names_train_ids(tmp_path, listed):
    """Their values are legal label ids, but stand for other classes."""
    root = trees.cityscapes_tree(tmp_path)
    start, name = "gtFine/{}/{}/", "{}_000001_000019_gtFine_label{}Ids.png"
    for split, city in (("train", "aachen"), ("val", "lindau")):
        folder = root / start.format(split, city)
        shutil.copy(folder / name.format(city, ""), folder / name.format(city, "Train"))
    train, val = (
        f"leftImg8bit/{split}/{city}/{city}_000001_000019_leftImg8bit.png "
        f"{(start + name).format(split, city, city, 'Train')}\n"
        for split, city in (("train", "aachen"), ("val", "lindau"))
    )
    data = loaded(root, listed(train), dataset="cityscapes")
    assert data.labeled == [data.train["aachen/aachen_000001_000019"]]
    # No mask is known for a picture that is none of the training pictures.
    assert "has trainIds, labelIds are read; list the picture alone" in message(
        root, listed(val), dataset="cityscapes"
    )


def rename(root, old, new):
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / old, root / new)


@pytest.mark.parametrize(
    "kind, name",
    [("masks", f"000{end}") for end in (".PNG", "_mask.png", "_label.png", "_gt.PNG")]
    + [("images", name) for name in ("000.gif", "000.JFIF", "000.jpg")],
)
def test_what_can_be_meant_is_found(root, tmp_path, kind, name):
    """Other names of masks, other kinds of pictures, and links to either."""
    old = f"{kind}/train/000.{dict(masks='png', images='jpg')[kind]}"
    if name.endswith(".gif"):
        frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
        frames[0].save(root / "images/train" / name, save_all=True, append_images=frames[1:])
        (root / old).unlink()
        assert read_image(str(root / "images/train" / name))[0, 0].tolist() == [255, 0, 0]
    elif name == "000.jpg":
        rename(root, old, "../elsewhere.jpg")
        (root / old).symlink_to(tmp_path / "elsewhere.jpg")
    else:
        rename(root, old, f"{kind}/train/{name}")
    data = loaded(root)
    assert len(data.labeled) == 6 and data.labeled[0][kind == "masks"].endswith(name)
    assert data.notes == []


def test_folders_behind_links_are_entered_and_circles_are_not(root, tmp_path):
    for kind in ("images", "masks"):
        shutil.move(root / kind / "train", tmp_path / kind)
        (root / kind / "train").mkdir()
        (root / kind / "train" / "day").symlink_to(tmp_path / kind, target_is_directory=True)
        (tmp_path / kind / "again").symlink_to(tmp_path / kind, target_is_directory=True)
        (tmp_path / kind / "up").symlink_to(root / kind / "train", target_is_directory=True)
    assert list(load("folder", str(root), "all", "", 0).train) == [f"day/00{k}" for k in range(6)]


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    """Root may list any, so that the system has to be played."""
    closed, scan = root / "images" / "train", os.scandir

    def refuse(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert message(root).startswith(f"{closed}: cannot be listed ([Errno 13] Permission denied")


def test_masks_that_two_pictures_or_none_may_have(root):
    shutil.copy(root / MASK, root / "masks/train/000_mask.png")
    both = f"has two masks, {root / MASK} and {root / 'masks/train/000_mask.png'}; remove one"
    assert f"{root / IMAGE}: {both}" in message(root)
    shutil.copy(root / IMAGE, root / "images/train/000_mask.jpg")  # it is that picture's
    assert [Path(mask).stem for _, mask in loaded(root).labeled][:2] == ["000", "000_mask"]
    shutil.copy(root / MASK, root / "images/train/001_mask.png")
    text = message(root)
    assert text.startswith(f"{root / 'images/train/001_mask.png'}: a mask among the pictures")


def test_what_is_left_over_is_named(root):
    assert loaded(root, "1/2").notes == []
    (root / "images/train/a.txt").touch()
    (root / "masks/train/b.jpg").write_bytes((root / IMAGE).read_bytes())
    (root / "images/val/gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "images/val/self.jpg").symlink_to(root / "images/val/self.jpg")
    rename(root, "images/val/002.jpg", "images/other/002.jpg")
    for name in (".hidden", "test/c.txt"):
        (root / "images" / name).parent.mkdir(exist_ok=True)
        (root / "images" / name).touch()
    (note,) = loaded(root, "1/2").notes
    assert note == (
        "files left over: 6 (images/other/002.jpg, images/train/a.txt, images/val/gone.jpg, "
        "images/val/self.jpg, masks/train/b.jpg and 1 more); no pictures, in neither train/ nor "
        "val/, or masks without their picture or not .png"
    )
    for path in list((root / "masks/train").iterdir()):
        path.rename(path.with_suffix(".bmp"))
    text = message(root)
    assert "no training picture has a mask; add some; files left over: 12 (images/" in text
    assert "masks without their picture or not .png" in text


@pytest.mark.parametrize("missing", ["images/train", "images/val", "masks/train", "masks/val"])
def test_a_folder_that_is_missing_is_named_with_the_layout(root, missing):
    shutil.rmtree(root / missing)
    assert message(root) == (
        f"{root / missing}: missing; the layout is classes.txt, images/{{train,val}}/NAME.jpg, "
        "masks/{train,val}/NAME.png"
    )


def test_masks_that_a_list_names_need_no_folder(root, listed):
    rename(root, "masks/train", "truth")
    path = listed("images/train/000.jpg truth/000.png\n")
    assert loaded(root, path).labeled == [(str(root / IMAGE), str(root / "truth/000.png"))]


def test_a_validation_picture_is_not_trained_on_behind_a_link(root, tmp_path, listed):
    (root / "images/train/000.jpg").unlink()
    (root / "images/train/000.jpg").symlink_to(root / VAL)
    assert (
        message(root, "1/2")
        == message(root, "5")
        == (f"{root / IMAGE}: is the validation picture {root / VAL}; remove one of them")
    )


def test_validation_pictures_are_no_unlabelled_ones(root, tmp_path, listed):
    """Of a folder of everything the others are taken; who writes a list is told."""
    rng, everything = np.random.default_rng(0), tmp_path / "all"
    for name in ("a.jpg", "b.jpg"):
        trees.save_picture(everything / name, rng)
    for name in ("000.jpg", "001.jpg"):
        (everything / name).symlink_to(root / "images/val" / name)
    data = loaded(root, "1/2", everything)
    assert names(data.unlabeled) == ["a", "b"]
    note = f"validation pictures left out: {everything / '000.jpg'} and 1 more"
    assert data.notes == [f"--unlabeled {everything}: {note}"]
    text = message(root, "1/2", root / "images/val")
    flag = f"--unlabeled {root / 'images/val'}"
    assert text == f"{flag}: no picture, or validation's alone; name others"
    path = listed(f"001\n{VAL}\n")
    text = f"--unlabeled {path}: names the validation picture {root / VAL}; leave it out"
    assert message(root, "1/2", path) == text


def test_palette_masks_keep_indices_and_void(tmp_path):
    values = np.arange(48 * 64).reshape(48, 64) % 4
    values[5] = 255
    trees.save_mask(tmp_path / "m.png", values)
    assert Image.open(tmp_path / "m.png").mode == "P"  # or this test would test nothing
    assert (read_mask(str(tmp_path / "m.png")) == values).all()


# --- what is labelled, what is not ---


def fake_train(count):
    return {f"{k:05d}": (f"r/images/{k:05d}.jpg", f"r/masks/{k:05d}.png") for k in range(count)}


def chosen(labeled, count, seed=0):
    data = Data(Path("r"), [], [], fake_train(count), [], np.arange(256))
    return names(_choose_labeled(labeled, data, seed, unique=False))


@pytest.mark.parametrize(
    "count, sizes",
    [
        (10582, {16: 662, 8: 1323, 4: 2646, 2: 5291}),  # VOC's published splits
        (2975, {16: 186, 8: 372, 4: 744, 2: 1488}),  # those of Cityscapes
    ],
)
def test_fractions(count, sizes):
    picks = {r: chosen(f"1/{r}", count) for r in sizes}
    assert {r: len(pick) for r, pick in picks.items()} == sizes
    assert picks[8] == sorted(fake_train(count))[::8]
    assert set(picks[16]) < set(picks[8]) < set(picks[4]) < set(picks[2])
    assert chosen("1/16", count, seed=5) == picks[16]  # fractions leave nothing to chance
    assert len(chosen("1/1", count)) == count and chosen(f"1/{count}", count) == ["00000"]


def test_counts_are_drawn_by_seed():
    pick = chosen("20", 200, seed=1)
    assert len(set(pick)) == 20 and pick == sorted(pick)
    assert pick == chosen("20", 200, seed=1)
    assert pick != chosen("20", 200, seed=2)
    assert pick != chosen("20", 200)
    # Pinned: who reports results for a count and a seed means this list.
    assert chosen("4", 100) == ["00005", "00020", "00036", "00082"]


LIST_LINES = {
    "ids": "003\n001\n",
    "pairs": "images/train/003.jpg masks/train/003.png\nimages/train/001.jpg masks/train/001.png",
    "leading slash": "/images/train/001.jpg /masks/train/001.png\n003\n",
    "tab": "images/train/001.jpg\tmasks/train/001.png\nimages/train/003.jpg\tmasks/train/003.png",
    "CRLF, blank lines": "\r\n001\r\n\r\n  \r\n003  \r\n\r\n",
    "byte order mark": "\ufeff001\n003\n",
    "repeated": "001\n003\n001\n",
}


@pytest.mark.parametrize("text", LIST_LINES.values(), ids=LIST_LINES)
def test_list_files(root, listed, text):
    data = loaded(root, listed(text))
    assert names(data.labeled) == ["001", "003"]
    assert [Path(mask).name for _, mask in data.labeled] == ["001.png", "003.png"]
    # Pictures named by path are known for labelled too, and leave the unlabelled ones.
    assert names(data.unlabeled) == ["000", "002", "004", "005"]


def test_lists_may_name_files_elsewhere_and_with_a_space(root, listed):
    shutil.move(root / "images/train/005.jpg", root / "images/my cat.jpg")
    assert names(loaded(root, "1/2", listed("images/my cat.jpg\n")).unlabeled) == ["my cat"]
    shutil.move(root / "masks/train/000.png", root / "extra mask.png")
    data = loaded(root, listed("/images/train/000.jpg\t/extra mask.png\n"))
    assert data.labeled == [(str(root / "images/train/000.jpg"), str(root / "extra mask.png"))]


def test_a_list_that_leaves_the_root_is_told_once(root, tmp_path, listed):
    """A list from elsewhere may name any file of the machine by ..; absolute paths begin below."""
    shutil.move(root / "images/train/005.jpg", tmp_path / "far.jpg")
    shutil.copy(root / "masks/train/001.png", tmp_path / "far.png")
    path = listed(
        "001\n../far.jpg ../far.png\nimages/../images/train/002.jpg masks/train/002.png\n"
    )
    told = f"{path}: names files outside {root}: {root / '../far.jpg'}"
    data = loaded(root, path)
    assert [note for note in data.notes if "outside" in note] == [f"--labeled {told} and 1 more"]
    data = loaded(root, "1/2", path)
    assert [note for note in data.notes if "outside" in note] == [f"--unlabeled {told}"]
    (tmp_path / "photos").mkdir()
    shutil.move(tmp_path / "far.jpg", tmp_path / "photos")  # a folder is named knowingly
    assert not any("outside" in n for n in loaded(root, "1/2", tmp_path / "photos").notes)
    text = message(root, listed(f"{tmp_path / 'photos/far.jpg'}\n"))
    assert f"{root}{tmp_path / 'photos/far.jpg'} does not exist" in text


# A line of each kind that the lists of released code have, with the picture it stands for.
RELEASED = {
    "voc": {
        "TorchSemiSeg, U2PL": ("2008_000002", "2008_000002"),
        "PS-MT, CAC": (
            "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png",
            "2008_000002",
        ),
        "PS-MT, 1464 labels": (
            "/JPEGImages/2007_000039.jpg /SegmentationClass/2007_000039.png",
            "2007_000039",
        ),
        "UniMatch": (
            "JPEGImages/2008_000002.jpg SegmentationClass/2008_000002.png",
            "2008_000002",
        ),
    },
    "cityscapes": {
        "TorchSemiSeg": (
            "/images/train/aachen_000001_000019.png\t"
            "/segmentation/train/aachen_000001_000019_gtFine.png",
            "aachen/aachen_000001_000019",
        ),
        "PS-MT": (
            "/images/city_gt_fine/train/aachen_000001_000019_leftImg8bit.png "
            "/annotation/city_gt_fine/train/aachen_000001_000019_gtFine.png",
            "aachen/aachen_000001_000019",
        ),
        "U2PL": (
            "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png",
            "aachen/aachen_000001_000019",
        ),
        "CAC, UniMatch": (
            "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png "
            "gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png",
            "aachen/aachen_000001_000019",
        ),
    },
    "coco": {
        "UniMatch": ("train2017/000000000030.jpg masks/000000000030.png", "000000000030"),
    },
}
TREE = dict(
    voc=lambda path: trees.voc_tree(path, aug=True) / "VOC2012",
    coco=trees.coco_tree,
    cityscapes=trees.cityscapes_tree,
)


@pytest.mark.parametrize("dataset, whose", [(d, whose) for d in RELEASED for whose in RELEASED[d]])
def test_lists_of_released_code_are_read(tmp_path, listed, dataset, whose):
    """Whatever their folders: they were written for data that was arranged anew."""
    root, (line, name) = TREE[dataset](tmp_path / "set"), RELEASED[dataset][whose]
    path = listed(line + "\r\n")
    data = loaded(root, path, dataset=dataset)
    image, mask = data.train[name]
    if "1464" in whose:  # a mask that is there is taken
        mask = mask.replace("SegmentationClassAug", "SegmentationClass")
    assert data.labeled == [(image, mask)] and len(data.unlabeled) == len(data.train) - 1
    data = loaded(root, "1/2", path, dataset=dataset)
    assert data.unlabeled == [(image, None)]


def test_without_augmented_masks_lists_take_vocs_own(tmp_path, listed):
    root = trees.voc_tree(tmp_path, aug=False) / "VOC2012"
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    data = loaded(root, listed(line.format("2007_000039")), dataset="voc")
    assert data.labeled == [data.train["2007_000039"]]
    path = listed("2007_000039\n\n" + line.format("2008_000002"))
    text = message(root, path, dataset="voc")  # its picture is there, its mask is not
    assert f"{path}: line 3: '/JPEGImages/2008_000002.jpg " in text
    assert f"{root / 'SegmentationClassAug/2008_000002.png'} does not exist" in text
    assert "there are 3, such as 2007_000032" in text
    data = loaded(root, "1/2", path, dataset="voc")
    assert names(data.unlabeled) == ["2007_000039", "2008_000002"]


def test_a_mask_of_ones_own_is_never_replaced(tmp_path, listed):
    """Only those of released lists are: pseudo labels that are missing are no truth."""
    root = trees.voc_tree(tmp_path, aug=True) / "VOC2012"
    for mask in ("pseudo/2008_000002.png", "SegmentationClass/2008_000003.png"):
        path = listed(f"JPEGImages/2008_000002.jpg {mask}")
        assert f"{root / mask} does not exist" in message(root, path, dataset="voc")


def test_names_find_no_picture_of_a_folder_and_none_where_there_are_two(root, tmp_path, listed):
    assert "extra/003.jpg does not exist" in message(root, "1/2", listed("extra/003.jpg"))
    root = trees.cityscapes_tree(tmp_path / "cities")
    frame = "aachen_000000_000019_leftImg8bit.png"
    assert loaded(root, listed(f"images/{frame}"), dataset="cityscapes").labeled
    (root / "leftImg8bit/train/copy").mkdir()
    shutil.copy(root / "leftImg8bit/train/aachen" / frame, root / "leftImg8bit/train/copy" / frame)
    text = message(root, "1/5", listed(f"images/{frame}"), dataset="cityscapes")
    assert f"images/{frame} does not exist" in text


def test_all_means_every_training_picture_with_a_mask(root):
    """When all are labelled, the same pictures serve as unlabelled."""
    data = loaded(root, "all")
    assert names(data.unlabeled) == names(data.labeled) and len(data.unlabeled) == 6
    assert {mask for _, mask in data.unlabeled} == {None}
    (root / "masks/train/002.png").unlink()
    data = loaded(root, "all")
    assert names(data.labeled) == ["000", "001", "003", "004", "005"]
    assert names(data.unlabeled) == ["002"]


def test_unlabelled_list_and_folder(root, tmp_path, listed):
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "deep/c.bmp"):
        trees.save_picture(tmp_path / "web" / name, rng)
    (tmp_path / "web" / "notes.txt").write_text("no picture")
    data = loaded(root, "1/3", tmp_path / "web")
    assert names(data.labeled) == ["000", "003"] and names(data.unlabeled) == ["a", "b", "c"]

    # A list may name a picture that is labelled too, by id or by path.
    data = loaded(root, "1/3", listed("/images/train/004.jpg\n000\n"))
    assert names(data.unlabeled) == ["000", "004"]
    assert {mask for _, mask in data.unlabeled} == {None}

    # The papers' unlabelled lists have a mask column; those who have no masks use them too.
    (root / "masks/train/005.png").unlink()
    data = loaded(root, "1/3", listed("/images/train/005.jpg /masks/train/005.png\n"))
    assert names(data.unlabeled) == ["005"]


@pytest.mark.parametrize("unlabeled", ["", "list"])
def test_no_mask_of_an_unlabelled_picture_is_ever_opened(root, listed, monkeypatch, unlabeled):
    """Their masks are broken or gone; neither the check nor the loader may notice."""
    for name in ("001", "002", "004"):
        (root / f"masks/train/{name}.png").write_bytes(b"broken")
    (root / "masks/train/005.png").unlink()
    if unlabeled:
        unlabeled = str(listed("001\n002\n004\n005\n"))
    opened, real = Counter(), Image.open

    def spy(path, *args, **kwargs):
        opened[Path(path).relative_to(root).as_posix()] += 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", spy)
    data = load("folder", str(root), "1/3", unlabeled, 0)
    assert not opened  # listing opens nothing
    check(data)
    assert opened["masks/train/000.png"] == opened["masks/train/003.png"] == 1
    assert names(data.unlabeled) == ["001", "002", "004", "005"]
    opened.clear()
    for _, label in training_loader(data, "unlabeled", whole_view, 2, range(4)):
        assert (label == 255).all()
    assert sum(opened.values()) == 8 and all(path.startswith("images/") for path in opened)


def test_the_summary_names_the_same_list_wherever_the_root_is(root, tmp_path, monkeypatch):
    text = loaded(root, "1/2").summary()
    digest = text.split("labelled list ")[1].split()[0]
    assert text == (
        f"3 labelled, 3 unlabelled, 3 validation pictures; labelled list {digest}\n"
        "3 classes: ground, cat, dog"
    )
    moved = shutil.copytree(root, tmp_path / "other place" / "set")
    assert loaded(moved, "1/2").summary() == text
    monkeypatch.chdir(root)
    assert loaded(".", "1/2").summary() == text
    assert digest not in loaded(root, "1/3").summary()


# --- refusals ---


IMAGE, MASK = "images/train/000.jpg", "masks/train/000.png"
VAL, VAL_MASK = "images/val/000.jpg", "masks/val/000.png"
PNG, ODD = "images/train/000.png", np.pad([[2, 7, 255]], ((0, 47), (0, 61)))  # of 3 classes
LIST, GONE = "ImageSets/Segmentation/val.txt", "JPEGImages/2007_000039.jpg"
IDS = "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def deepen(path):
    path.unlink()
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(path.with_suffix(".png"))


def pipe(path):
    """It would be waited for, for ever."""
    path.unlink()
    os.mkfifo(path)


def strange(path):
    """A file that Pillow hands to another program, Ghostscript, whatever its name."""
    Image.new("RGB", (64, 48)).save(path, "EPS")


def claim(path):
    """100,000 x 100,000 pixels, in 70 bytes."""
    content = bytearray(Image.new("L", (1, 1))._repr_png_())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def convert(mode):
    return lambda path: Image.open(path).convert(mode).save(path)


def paint(values):
    return partial(trees.save_mask, values=values, palette=False)


def draw(*size):
    return lambda path: trees.save_picture(path, np.random.default_rng(0), *size)


# What is damaged, and how (None: it goes); the file that the message names, and a pattern in it.
FOLDER = {
    "root missing": ("", None, "", "no such folder"),
    "root empty": ("", empty, "classes.txt", "missing"),
    "classes missing": ("classes.txt", None, "classes.txt", "missing"),
    "one class": ("classes.txt", b"cat\n\n", "classes.txt", "lists 1 classes, must be 2 to 254"),
    "classes not UTF-8": ("classes.txt", b"caf\xe9\nbar\n", "classes.txt", "UTF-8"),
    "a class twice": ("classes.txt", b"a\nb\nc\nb\n", "classes.txt", "line 4 repeats b;"),
    "a blank class": ("classes.txt", b"a\n\nb\nc\n", "classes.txt", "line 2 is blank; line n"),
    "no train folder": ("images/train", None, "images/train", "missing"),
    "no train picture": ("images/train", empty, "", "no training picture"),
    "no val picture": ("images/val", empty, "", "no validation picture"),
    "picture is text": (IMAGE, b"hello", IMAGE, "not a readable picture"),
    "picture empty": (IMAGE, b"", IMAGE, "not a readable picture"),
    "picture is PostScript": (IMAGE, strange, IMAGE, "not a readable picture .*cannot identify"),
    "picture of gigapixels": (IMAGE, claim, IMAGE, "not a readable picture .*decompression bomb"),
    "classes are a pipe": ("classes.txt", pipe, "classes.txt", "missing"),
    "picture cut short": (IMAGE, cut, IMAGE, "not a readable picture .*truncated"),
    "val picture cut short": (VAL, cut, VAL, "not a readable picture"),
    "picture of 16 bits": (IMAGE, deepen, PNG, "has Pillow mode I.*8-bit RGB"),
    "mask is text": (MASK, b"hello", MASK, "not a readable mask"),
    "mask cut short": (MASK, cut, MASK, "not a readable mask"),
    "mask value": (MASK, paint(ODD), MASK, "values 0, 2, 7, 255; .* 0 to 2, and 255 .*3 classes"),
    "val mask value": (VAL_MASK, paint(ODD), VAL_MASK, "values 0, 2, 7, 255;"),
    "mask RGB": (MASK, convert("RGB"), MASK, "mode RGB; a mask must be a PNG of class indices"),
    "mask RGBA": (MASK, convert("RGBA"), MASK, "mode RGBA; a mask must be a PNG of class indices"),
    "mask of 16 bits": (MASK, deepen, MASK, "has Pillow mode I.*class indices, 8-bit"),
    "mask turned": (MASK, paint(ODD.T), MASK, f"is 48 x 64 pixels, .*{IMAGE} 64 x 48"),
    "no mask at all": ("masks/train", empty, "", "no training picture has a mask"),
    "val picture without mask": (VAL_MASK, None, VAL, "without a mask"),
    "small val picture": (VAL, draw(24, 64), VAL, "32 x 32"),
    "two of one stem": (PNG, draw(), PNG, f"has the same name as .*{IMAGE}"),
}
VOC = {
    "picture is a pipe": (GONE, pipe, GONE, "no such picture"),
    "list is a pipe": (LIST, pipe, LIST, "no such file"),
    "an id with a NUL": (LIST, b"2007\0\n", "JPEGImages/2007", "without a mask"),
    "an id of 10,000 letters": (LIST, b"x" * 10_000, "JPEGImages/xxx", "without a mask"),
    "an id that leads out": (LIST, b"../../other/7\n", LIST[:-8], "id ../../other/7 leads out"),
    "an absolute id": (LIST, b"/tmp/7\n", LIST[:-8], "id /tmp/7 leads out"),
    "no pictures": ("JPEGImages", None, "JPEGImages", "missing"),
    "no list": (LIST, None, LIST, "missing"),
    "picture missing": (GONE, None, GONE, "no such picture"),
}
CITYSCAPES = {
    "no train": ("leftImg8bit/train", None, "leftImg8bit/train", "missing"),
    "no val": ("leftImg8bit/val", None, "leftImg8bit/val", "missing"),
    "no masks": ("gtFine", None, "leftImg8bit/val/lindau/lindau_000000", "without a mask"),
    "unknown id": (IDS, paint(np.full((48, 64), 40)), IDS, "values 40; allowed are 0 to 33"),
}
TREES = dict(
    folder=(trees.folder_tree, FOLDER),
    voc=(lambda path: trees.voc_tree(path, aug=False) / "VOC2012", VOC),
    cityscapes=(trees.cityscapes_tree, CITYSCAPES),
)


@pytest.mark.parametrize(
    "dataset, name", [(dataset, name) for dataset in TREES for name in TREES[dataset][1]]
)
def test_a_broken_tree_is_refused_by_the_file(tmp_path, dataset, name):
    tree, table = TREES[dataset]
    damaged, how, named, words = table[name]
    root = tree(tmp_path / "set")
    loaded(root, dataset=dataset)  # whole before, so that it is the damage
    path = root / damaged
    if how is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(how, bytes):
        path.write_bytes(how)
    else:
        how(path)
    text = message(root, dataset=dataset)
    assert str(root / named) in text and re.search(words, text), text


def test_files_are_hashed_by_content_each_in_one_process(root):
    data = loaded(root, "1/2")
    whole, parts = data.files, []
    for rank in range(2):
        check(data, rank, 2)
        parts.append({name: int(value or "0", 16) for name, value in data.files.items()})
    assert len(whole) == 3 * 2 + 3 + 3 * 2 and [n for n in whole if not whole[n]] == [
        f"images/train/{name}.jpg" for name in ("001", "003", "005")
    ]
    for name, value in whole.items():
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        assert value in ("", content[:16])
        assert sorted(part[name] for part in parts) == [0, int(value or "0", 16)]


@pytest.mark.parametrize("error", [MemoryError(), struct.error("unpack"), RuntimeError("a\nb")])
def test_whatever_a_decoder_raises_is_one_line(root, monkeypatch, error):
    def fail(*_):
        raise error

    for name in ("load", "convert", "transpose"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, name, fail)
            patch.setattr(JpegImageFile, name, fail)
            if name != "load":
                image = Image.new("L", (40, 40))
                image.getexif()[0x0112] = 6
                with pytest.raises(InputError, match="^image: not a readable picture \\("):
                    upright_rgb(image, "image")
            else:
                assert f"{root / IMAGE}: not a readable picture (" in message(root)


def test_masks_take_little_more_memory_than_their_pixels(root):
    """Of a bomb of 170 million pixels numpy's bincount and take would each make a gigabyte."""
    mask = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)
    assert (count_values(mask) == np.bincount(mask.ravel(), minlength=256)).all()
    trees.save_mask(root / MASK, mask)
    lookup = np.arange(256, dtype=np.uint8)
    tracemalloc.start()
    count_values(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    read_pair((str(root / IMAGE), str(root / MASK)), lookup)
    peaks = peak, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(peaks) < 4 * mask.size


def test_first_of_several_bad_files_is_the_one_named(root):
    """Files are checked in parallel, and still the message does not depend on chance."""
    for name in ("005", "001", "003"):
        (root / f"images/train/{name}.jpg").write_text("hello")
    assert str(root / "images/train/001.jpg") in message(root)


@pytest.mark.parametrize("labeled", ["1/2", "6", "list"])
def test_labelled_picture_without_mask(root, listed, labeled):
    (root / "masks/train/004.png").unlink()
    labeled = listed("003\n004\n") if labeled == "list" else labeled
    text = message(root, labeled)
    assert str(root / "images/train/004.jpg") in text and "no mask" in text
    assert f"--labeled {labeled}" in text


def test_a_listed_validation_picture_is_refused(root, listed):
    for mask in ("masks/val/001.png", "masks/val/000.png"):
        text = message(root, listed(f"000\nimages/val/001.jpg {mask}\n"))
        assert f"names the validation picture {root / 'images/val/001.jpg'}" in text


BAD_LABELED = ["1/999", "1/7", "1/0", "2/3", "1/x", "1/-2", "0.5", "-3", "0", "7", "1e2", "no.txt"]


@pytest.mark.parametrize("labeled", BAD_LABELED)
def test_bad_labelled_flag(root, labeled):
    text = message(root, labeled)
    assert text.startswith(f"--labeled {labeled}: ")
    too_large = labeled in ("1/999", "1/7", "1/0", "0", "7")
    assert ("1 to 6" if too_large else "neither 1/r, a count, all") in text


BAD_LISTS = {
    "a NUL": ("images/train/0\0.jpg\n", "images/train/0\0.jpg", "does not exist"),
    "a name of 10,000 letters": ("x" * 10_000, "x" * 10_000, "does not exist"),
    "missing picture": ("003\nimages/train/099.jpg\n", "images/train/099.jpg", "does not exist"),
    "missing id": ("003\n099\n", "099", "is no training id"),
    "missing mask": ("/images/train/003.jpg /masks/nil.png", "masks/nil.png", "does not exist"),
    "two masks": (f"000\n{IMAGE} masks/train/001.png", IMAGE, "two masks"),
    "three columns": (f"{IMAGE} {MASK} {MASK}", IMAGE, "not one or two paths"),
    "empty": ("", "", "lists no picture"),
    "blank lines": ("\n \r\n", "", "lists no picture"),
    "not UTF-8": (b"\xff\xfe0\x000\x001\x00", "", "UTF-8"),
}


@pytest.mark.parametrize("content, file, words", BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_list(root, listed, content, file, words):
    path = listed(content)
    flags = [dict(labeled=path)]
    if "mask" not in words + file:  # an unlabelled picture needs none
        flags.append(dict(labeled="1/2", unlabeled=path))
    for flag in flags:
        text = message(root, **flag)
        assert str(path) in text and file in text and words in text


def test_bad_unlabelled_flag(root, tmp_path):
    assert "--unlabeled no.txt: no such" in message(root, "1/2", "no.txt")
    (tmp_path / "bare").mkdir()
    assert f"--unlabeled {tmp_path / 'bare'}: no pic" in message(root, "1/2", tmp_path / "bare")


def test_a_tilde_is_the_home_folder(root, tmp_path, monkeypatch):
    """Of every path that a flag takes, for no shell expands it behind an =."""
    monkeypatch.setenv("HOME", str(root.parent))
    (root.parent / "one.txt").write_text("000\n")
    shutil.copytree(root / "images/train", root.parent / "more")
    data = load("folder", f"~/{root.name}", "~/one.txt", "~/more", 0)
    assert data.root == root and len(data.labeled) == 1
    assert data.unlabeled[0][0].startswith(str(root.parent / "more"))
    folder = choose_folder("cps", RunConfig(output_dir="~/runs/a"))
    assert folder == root.parent / "runs/a"
    with pytest.raises(InputError, match=f"--weights {root.parent / 'start.pt'}: neither a PyT"):
        dilated_resnet("resnet18", "~/start.pt")


def test_no_data_path():
    for dataset in ("folder", "voc", "coco", "cityscapes"):
        assert "--data-path ''" in message("", dataset=dataset)


def test_an_unlabelled_picture_that_is_missing_is_named(tmp_path):
    root = trees.voc_tree(tmp_path, aug=False) / "VOC2012"
    (root / GONE).unlink()
    assert f"{root / GONE}: no such picture" in message(root, "1/2", dataset="voc")


def test_headers_of_unlabelled_pictures_are_read(root):
    """A deep picture's is enough to refuse it; one that is cut short shows when it is decoded."""
    for name in ("001", "003"):
        cut(root / f"images/train/{name}.jpg")
    data = loaded(root, "1/2")
    with pytest.raises(InputError) as caught:
        check(data, unlabeled="full")
    assert str(caught.value).startswith(f"{root / 'images/train/001.jpg'}: not a readable picture")
    more = f"(1 more unlabelled pictures cannot be read: {root / 'images/train/003.jpg'})"
    assert str(caught.value).endswith(more)
    (root / "images/train/005.jpg").write_bytes(b"")
    assert f"{root / 'images/train/005.jpg'}: not a readable picture" in message(root, "1/2")
    deepen(root / "images/train/005.jpg")
    assert f"{root / 'images/train/005.png'}: has Pillow mode I" in message(root, "1/2")
    check(load("folder", str(root), "1/2", "", 0), unlabeled="unused")


# --- reading pictures ---


def test_exif_orientation_is_applied(root):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red comes to the top
    Image.fromarray(pixels).save(root / IMAGE, exif=exif)
    image = read_image(str(root / IMAGE))
    assert image.shape == (40, 24, 3)
    red = image[..., 0].astype(float)
    assert red[:18].min() > 200 and red[22:].max() < 50
    trees.save_mask(root / MASK, np.zeros((40, 24)))  # drawn on what people see
    loaded(root)


# EXIF blocks: no TIFF header at all; and one that asks to be turned (0x0112 is 6) beside a width
# (0x0100) stored as a float, which Pillow reads but cannot write back.
NO_HEADER = b"Exif\0\0garbage"
FLOAT_WIDTH = b"Exif\0\0II*\0\x08\0\0\0\2\0" + struct.pack(
    "<HHIfHHIHHI", 0x0100, 11, 1, 72.0, 0x0112, 3, 1, 6, 0, 0
)


@pytest.mark.parametrize(
    "suffix, exif", [("png", NO_HEADER), ("jpg", FLOAT_WIDTH)], ids=["header", "float"]
)
def test_damaged_exif_is_no_traceback(tmp_path, suffix, exif):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (40, 24)).save(path, exif=exif)
    try:
        read_image(str(path))  # the pixels are fine, so that either way will do
    except InputError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "mode, suffix, pixel, rgb",
    [
        ("1", "png", 1, (255, 255, 255)),
        ("L", "png", 90, (90, 90, 90)),
        ("L", "jpg", 180, (180, 180, 180)),
        ("LA", "png", (90, 128), (90, 90, 90)),
        ("P", "png", 1, (200, 100, 50)),
        ("RGB", "bmp", (200, 100, 50), (200, 100, 50)),
        ("RGBA", "png", (200, 100, 50, 128), (200, 100, 50)),
        ("CMYK", "tif", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "jpg", (75, 75, 75, 0), (180, 180, 180)),
    ],
)
def test_every_8_bit_picture_becomes_rgb(tmp_path, mode, suffix, pixel, rgb):
    image, path = Image.new(mode, (24, 16)), str(tmp_path / f"picture.{suffix}")
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(pixel, (0, 8, 24, 16))
    image.save(path)
    assert Image.open(path).mode == mode
    read = read_image(path).astype(int)
    assert read.shape == (16, 24, 3) and abs(read[8:] - rgb).max() <= 3 < abs(read[:8] - rgb).max()


# --- loaders ---

VIEW = partial(train_view, crop=32, scales=(0.5, 1.0, 1.5))


def shape_data(count, seed=0):
    """Drawn pictures: no files, and quickly there."""
    data = load("shapes", "", "400", "", seed)
    return replace(data, labeled=data.labeled[:count], unlabeled=data.unlabeled[:count])


def mean_view(image, label):
    """Tells pictures apart and draws nothing."""
    return (image.double().mean(),)


def batches(steps, batch=4, split="labeled", view=VIEW, count=11, **arguments):
    loader = training_loader(shape_data(count), split, view, batch, steps, **arguments)
    return [list(batch) for batch in loader]


def same(first, second):
    assert len(first) == len(second) > 0
    return all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_batches_do_not_depend_on_workers_processes_and_beginning():
    whole = batches(range(7))  # past the end of the first order, at step 2
    assert same(whole, batches(range(7), workers=2))
    assert same(whole[3:], batches(range(3, 7))) and not same(whole[3:], batches(range(4)))
    ranks = [batches(range(7), batch=2, rank=rank, world=2) for rank in range(2)]
    joined = [list(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*ranks, strict=True)]
    assert same(whole, joined) and not same(*ranks)


def test_seed_and_split_change_the_stream_and_torchs_seed_does_not():
    steps = range(3)
    first = batches(steps)
    assert not same(batches(steps, seed=1), first)
    torch.manual_seed(1)
    assert same(batches(steps), first)
    # The same pictures serve as labelled and unlabelled: not in the same order and crops.
    orders = [batches(steps, split=split, view=mean_view) for split in ("labeled", "unlabeled")]
    assert not same(*orders)


def test_a_picture_is_augmented_afresh_each_time():
    """What `itertools.cycle` on a loader gets wrong: it replays the first epoch's crops."""
    crops = [batch[0] for batch in batches(range(6), batch=1, count=1)]
    assert all(not torch.equal(crops[i], crops[j]) for i in range(6) for j in range(i))


def test_no_picture_comes_twice_in_a_global_batch():
    stream = [batch[0].tolist() for batch in batches(range(40), view=mean_view)]
    assert all(len(set(batch)) == 4 for batch in stream)
    counts = Counter(value for batch in stream for value in batch)
    assert len(counts) == 11  # nor is any picture left out for good
    assert len({tuple(batch) for batch in stream}) > 30  # each epoch has its own order


def test_an_epoch_that_divides_by_the_batch_shows_each_picture_once():
    stream = [batch[0].tolist() for batch in batches(range(6), view=mean_view, count=12)]
    epochs = [sum(stream[:3], []), sum(stream[3:], [])]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_fewer_pictures_than_a_batch():
    for (values,) in batches(range(3), batch=8, view=mean_view, count=3):
        assert sorted(Counter(values.tolist()).values()) == [2, 3, 3]
    (images, *_), *_ = batches(range(1), batch=8, count=3)
    assert len({image.numpy().tobytes() for image in images}) == 8  # yet eight different crops


def test_loaders_leave_torchs_global_generator_alone():
    before, data = torch.get_rng_state(), shape_data(4)
    assert len(list(training_loader(data, "labeled", VIEW, 2, range(3)))) == 3
    list(val_loader(replace(data, val=data.val[:2]), whole_view))
    assert torch.equal(torch.get_rng_state(), before)


def spared(count, bad, batch=4, steps=range(12), **how):
    """The numbers that draws take where these cannot be read, and those that were found bad."""

    def read(number):
        if number in bad:
            raise InputError(f"{number}: is broken")
        return (torch.tensor(number),)

    draws = Draws(range(count), read, lambda number: (number,), (0, 1), batch, spare=True)
    loader = draws_loader(draws, batch // how.get("world", 1), steps, **how)
    return [numbers.tolist() for (numbers,) in loader], draws.broken.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("count, bad", [(11, {3}), (11, {0, 5, 7}), (3, {1})])
def test_what_cannot_be_read_gives_way_to_another(count, bad):
    """The same one whatever the workers and the beginning; no good draw moves."""
    (whole, _), (stream, found) = spared(count, set()), spared(count, bad)
    assert found == sorted(bad)
    for before, after in zip(whole, stream, strict=True):
        assert not set(after) & bad
        assert all(b == a for b, a in zip(before, after, strict=True) if b not in bad)
        assert count < 4 or len(set(after)) == 4  # no picture is its own partner
    assert spared(count, bad, workers=2) == (stream, found)
    shares = [spared(count, bad, rank=rank, world=2)[0] for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == stream
    assert spared(count, bad, steps=range(5, 12))[0] == stream[5:]


def test_where_nothing_can_be_read_it_ends():
    with pytest.raises(LoneError, match="is broken, and so with all that were tried"):
        spared(5, set(range(5)))
    with pytest.raises(LoneError, match="is broken"):
        spared(1, {0})


def test_views_do_not_spoil_the_drawn_pictures():
    """Drawn pictures are cached; were they handed out, a view could change them for good."""
    name = shapes.names("train")[0]
    before = [array.copy() for array in shapes.draw(name)]
    batches(range(3), batch=2, count=2, view=lambda image, label: (image.zero_(), label.zero_()))
    assert all((a == b).all() for a, b in zip(before, shapes.draw(name), strict=True))


def test_training_batches_have_the_shapes_that_scripts_expect(root):
    data = loaded(root, "1/2")
    view = partial(VIEW, strong=lambda image: 1 - image)
    image, label, valid, strong = next(iter(training_loader(data, "labeled", view, 2, range(1))))
    assert image.shape == strong.shape == (2, 3, 32, 32) and image.dtype == torch.float32
    assert label.shape == valid.shape == (2, 32, 32)
    assert label.dtype == torch.int64 and valid.dtype == torch.bool
    assert set(label.unique().tolist()) <= {0, 1, 2, 255}


def test_validation_shares_cover_each_picture_once():
    data = shape_data(2)
    data.val = data.val[:7]

    def means(*share, **how):
        return [mean for (means,) in val_loader(data, mean_view, *share, **how) for mean in means]

    shares = [means(rank, 3) for rank in range(3)]
    whole = means()
    assert [len(share) for share in shares] == [3, 2, 2] and len(set(whole)) == 7
    assert sorted(sum(shares, [])) == sorted(whole)
    assert means(workers=1) == whole
    assert len(next(iter(val_loader(data, whole_view)))[0]) == 7
    data.val = data.val[:2]  # fewer pictures than processes: the last has nothing to do
    assert means(2, 3) == []


def test_validation_sees_whole_pictures(root):
    trees.save_picture(root / "images/val/001.jpg", np.random.default_rng(1), 40, 56)
    mask = trees.blobs(np.random.default_rng(1), 3, 40, 56)
    trees.save_mask(root / "masks/val/001.png", mask)
    (others, _), (image, label) = val_loader(loaded(root), whole_view)
    assert image.shape == (1, 3, 40, 56) and others.shape == (2, 3, 48, 64)
    assert [len(b) for b, _ in val_loader(loaded(root), whole_view, pixels=6143)] == [1, 1, 1]
    assert label.dtype == torch.int64 and (label[0].numpy() == mask).all()


# --- the embedded dataset ---


def test_drawn_pictures_and_masks():
    shapes.draw.cache_clear()
    start, sets = time.process_time(), [shapes.names(split) for split in shapes.COUNTS]
    pictures = {name: shapes.draw(name) for name in sum(sets, [])}
    assert len(pictures) == sum(shapes.COUNTS.values()) >= 300
    assert time.process_time() - start < 10  # 1.7 s here
    for name, (picture, mask) in pictures.items():
        assert picture.shape == (*mask.shape, 3) and picture.dtype == mask.dtype == np.uint8
        assert mask.any() and mask.max() < len(shapes.CLASSES), name
    assert len({picture.tobytes() for picture, _ in pictures.values()}) == len(pictures)


def test_drawn_pictures_are_the_same_on_every_machine():
    """Results in the README hold for these pixels; who changes them has to measure again."""
    expected = {
        "train/000": "4f19750d29637afc",
        "train/217": "29294b3f3d12d59c",
        "val/149": "1661674332bb0c31",
    }
    for name, digest in expected.items():
        picture, mask = shapes.draw.__wrapped__(name)
        found = hashlib.sha256(picture.tobytes() + mask.tobytes()).hexdigest()[:16]
        assert found == digest, name


def test_classes_of_the_embedded_set():
    everything = set(range(1, len(shapes.CLASSES)))
    assert len(everything) >= 5 and len(shapes.COLORS) == len(shapes.CLASSES)
    labeled = [f"train/{name}" for name in names(loaded("", "1/20", dataset="shapes").labeled)]
    assert len(labeled) == 20
    for pictures in (shapes.names("train"), shapes.names("val"), labeled):
        masks = np.array([shapes.draw(name)[1] for name in pictures])
        assert set(np.unique(masks)) - {0} == everything


def test_the_embedded_set_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = loaded("", "1/20", dataset="shapes")
    assert data.summary().startswith("20 labelled, 380 unlabelled, 150 validation pictures; ")
    assert os.listdir(tmp_path) == []
    assert not {i for i, _ in data.labeled + data.unlabeled} & {i for i, _ in data.val}


# --- what the masks show ---


def overwrite(root, split, change):
    """Every mask of a split, changed."""
    for path in (root / "masks" / split).iterdir():
        Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)


def counted(root):
    data = load("folder", str(root), "all", "", 0)
    return describe(data, check(data))


def test_the_start_tells_the_share_of_every_class(root):
    masks = [np.array(Image.open(path)) for path in (root / "masks" / "train").iterdir()]
    lines = [line.split() for line in counted(root).splitlines()]
    shares = {line[0]: float(line[1]) for line in lines[1:]}
    for value, name in ((0, "ground"), (1, "cat"), (2, "dog"), (255, "void")):
        name = name if name in shares else list(shares)[min(value, len(shares) - 1)]
        assert shares[name] == pytest.approx(100 * (np.array(masks) == value).mean(), abs=0.006)


def test_a_class_that_no_label_shows_is_named(root):
    overwrite(root, "train", lambda mask: np.where(mask == 2, 0, mask))
    name = (root / "classes.txt").read_text().split()[2]
    told = f"no labelled pixel shows {name}: never learned"
    assert counted(root).splitlines()[-1] == told
    overwrite(root, "val", lambda mask: np.where(mask == 2, 255, mask))
    also = f"no validation pixel shows {name}: IoU 0 where predicted, else none"
    assert counted(root).splitlines()[-2:] == [told, also]


@pytest.mark.parametrize(
    "split, change, words",
    [
        (
            "train",
            lambda m: np.where(m > 0, 255, 0),
            "labelled masks show class 0 alone .* write 1",
        ),
        ("train", lambda m: m * 0, "labelled masks show class 0 alone of 3"),
        ("train", lambda m: m * 0 + 255, "no labelled pixel has a class"),
        ("val", lambda m: m * 0 + 255, "no validation pixel has a class"),
        (
            "val",
            lambda m: np.where(m > 0, 255, 0),
            "validation masks show class 0 alone .* write 1",
        ),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(root, split, change, words):
    overwrite(root, split, change)
    with pytest.raises(InputError, match=words):
        counted(root)
