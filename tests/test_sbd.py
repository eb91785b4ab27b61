"""SBD's masks beside VOC's: which pictures, whose masks, and what is refused."""

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import trees

from common import sbd
from common.data import check, load
from common.flags import InputError
from common.layouts import read_mask


def structure(mask):
    """What SciPy makes of MATLAB's structure: an array (1, 1) of records of objects."""
    record = np.empty((1, 1), dtype=[("Boundaries", object), ("Segmentation", object)])
    record["Segmentation"][0, 0] = mask
    return record


def save(path, content):
    """A stand-in for scipy.io.savemat."""
    with open(path, "wb") as file:
        np.save(file, content["GTcls"]["Segmentation"])


def load_saved(path):
    """And for scipy.io.loadmat."""
    return {"GTcls": structure(np.load(path))}


@pytest.fixture
def voc(tmp_path):
    return trees.voc_tree(tmp_path, aug=False) / "VOC2012"


@pytest.fixture
def source(tmp_path):
    return trees.sbd_tree(tmp_path / "sbd", save)


def test_masks_are_those_of_sbd_only_where_voc_has_none(voc, source):
    """And the pictures of VOC's validation set are not among them."""
    assert sbd.convert(source, voc, load_saved) == voc / "SegmentationClassAug"
    names = sorted((*trees.VOC_TRAIN, *trees.SBD_ONLY))
    assert sorted(os.listdir(voc / "SegmentationClassAug")) == [f"{name}.png" for name in names]
    assert not (voc / "SegmentationClassAug.part").exists()
    for name in names:
        mask = read_mask(str(voc / "SegmentationClassAug" / f"{name}.png"))
        if name in trees.SBD_ONLY:
            assert set(np.unique(mask)) == {0, 5} and (mask == 5).sum() == 15 * 23
        else:
            assert (mask == read_mask(str(voc / "SegmentationClass" / f"{name}.png"))).all()
    data = load("voc", str(voc), "all", "", 0)
    check(data)
    assert list(data.train) == names


@pytest.mark.parametrize("sbd_below", ["", "benchmark_RELEASE", "benchmark_RELEASE/dataset/cls"])
@pytest.mark.parametrize("voc_above", [".", ".."])
def test_folders_are_found_from_above(voc, source, sbd_below, voc_above):
    sbd.convert(source / sbd_below, voc / voc_above, load_saved)
    assert len(os.listdir(voc / "SegmentationClassAug")) == 5


def test_folders_behind_links_are_entered(voc, source, tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "dataset").symlink_to(source / "benchmark_RELEASE" / "dataset")
    sbd.convert(tmp_path / "above", voc, load_saved)
    assert len(os.listdir(voc / "SegmentationClassAug")) == 5


def test_a_stopped_conversion_goes_on_and_is_no_dataset_before(voc, source):
    """With half of the masks in its folder, --dataset voc would train on half of the pictures."""
    broken = source / "benchmark_RELEASE/dataset/cls" / f"{trees.SBD_ONLY[1]}.mat"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        sbd.convert(source, voc, load_saved)
    assert str(caught.value).startswith(f"{broken}: not one of SBD's masks (")
    assert not (voc / "SegmentationClassAug").exists()
    assert load("voc", str(voc), "all", "", 0).summary().startswith("3 labelled")
    broken.write_bytes(content)
    read = []
    sbd.convert(source, voc, lambda path: read.append(path) or load_saved(path))
    assert read == [str(broken)]
    # A folder that is there already, as one downloads it, gets what it lacks.
    (voc / "SegmentationClassAug" / f"{trees.SBD_ONLY[1]}.png").unlink()
    sbd.convert(source, voc, lambda path: read.append(path) or load_saved(path))
    assert read == [str(broken)] * 2


@pytest.mark.parametrize(
    "mask", [np.full((48, 64), 21), np.full(64, 1), np.zeros((2, 2, 3)), None], ids=str
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(InputError, match="^a.mat: not one of SBD's masks"):
        sbd.segmentation(Path("a.mat"), lambda _: {"GTcls": structure(mask)})


def test_void_is_kept():
    mask = np.array([[0, 20, 255]], np.uint8)
    assert (sbd.segmentation(Path("a.mat"), lambda _: {"GTcls": structure(mask)}) == mask).all()


def test_missing_folders_are_named(voc, source, tmp_path):
    with pytest.raises(InputError, match="holds no cls/"):
        sbd.convert(voc, voc, load_saved)
    with pytest.raises(InputError, match="JPEGImages: missing; name the folder of VOC2012"):
        sbd.convert(source, tmp_path / "sbd", load_saved)


def command(*words):
    """The status with which the program ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sbd.py", *map(str, words)])
        try:
            runpy.run_path(sbd.__file__, run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


def test_the_command_without_scipy_says_what_to_install(voc, source, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)  # as if there were none
    for words, said in (
        ((source, voc), "python -m pip install scipy"),
        ((source,), "required: voc"),
    ):
        assert command(*words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_the_command_reads_what_scipy_reads(voc, tmp_path, capsys):
    scipy = pytest.importorskip("scipy.io")
    source = trees.sbd_tree(tmp_path / "real", scipy.savemat)
    assert command(source, voc) == 0
    said = f"{voc / 'SegmentationClassAug'}: 5 training masks\n"
    assert capsys.readouterr() == (said, "")
    mask = read_mask(str(voc / "SegmentationClassAug" / f"{trees.SBD_ONLY[0]}.png"))
    assert (mask == 5).sum() == 15 * 23
