"""SBD's masks beside PASCAL VOC's own: python -m common.sbd SBD_FOLDER VOC2012_FOLDER

Fills SegmentationClassAug/, of which --dataset voc then takes its training pictures: VOC's masks of
train.txt, and SBD's of the pictures that VOC has no mask of, 10,582 in all. No picture of val.txt
is among them. SBD is benchmark.tgz as unpacked; to read it takes SciPy.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.bars import tqdm
from common.flags import InputError, Parser, one_line
from common.layouts import VOC_CLASSES, VOID, read_lines, read_mask, voc_root, walk, write_mask


def segmentation(path: Path, load: Callable[[str], dict]) -> np.ndarray:
    """The classes (H, W) uint8 in a file of cls/."""
    try:
        mask = np.asarray(load(str(path))["GTcls"]["Segmentation"][0, 0])
        if mask.ndim != 2 or not ((mask < len(VOC_CLASSES)) | (mask == VOID)).all():
            raise ValueError("no mask of 21 classes")
        return mask.astype(np.uint8)
    except Exception as error:  # SciPy raises a dozen kinds for a file it cannot read
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not one of SBD's masks ({reason}); unpack it again") from error


def convert(sbd: Path, voc: Path, load: Callable[[str], dict]) -> Path:
    """Write the masks that are not there yet; their folder. load: what a .mat file holds."""
    found = [path for path in walk(sbd) if path.suffix == ".mat"]
    found = [path for path in found if path.parent.name == "cls" or path.parent == sbd]
    if not found:
        raise InputError(f"{sbd}: holds no cls/*.mat; name the folder of benchmark.tgz")
    root = voc_root(voc)
    own, lists = root / "SegmentationClass", root / "ImageSets" / "Segmentation"
    sources = {name: own / f"{name}.png" for name in read_lines(lists / "train.txt")}
    val = set(read_lines(lists / "val.txt"))
    for path in found:
        if path.stem not in val and not (own / f"{path.stem}.png").is_file():
            sources[path.stem] = path
    # Filled under another name: with a part of the masks, --dataset voc would train on that part.
    folder = root / "SegmentationClassAug"
    work = folder if folder.is_dir() else folder.with_suffix(".part")
    try:
        work.mkdir(exist_ok=True)
        for name, path in tqdm(sources.items(), "masks", disable=None):
            if not (work / f"{name}.png").is_file():
                mask = segmentation(path, load) if path.suffix == ".mat" else read_mask(str(path))
                write_mask(work / f"{name}.png", mask)
        if work != folder:
            work.rename(folder)
    except OSError as error:
        raise InputError(f"{work}: cannot be written ({error})") from error
    print(f"{folder}: {len(sources)} training masks")
    return folder


def main(words: list[str]) -> None:
    with one_line("common.sbd"):
        parser = Parser("python -m common.sbd", None, __doc__.split("\n\n", 1)[1])
        parser.add_argument("sbd", type=Path, help="the unpacked benchmark.tgz")
        parser.add_argument("voc", type=Path, help="VOCdevkit, or its VOC2012")
        folders = parser.parse_args(words)
        try:
            from scipy.io import loadmat  # here alone, for no run needs it
        except ImportError as error:
            raise InputError("SBD's .mat files take SciPy: python -m pip install scipy") from error
        convert(folders.sbd, folders.voc, loadmat)


if __name__ == "__main__":
    main(sys.argv[1:])
