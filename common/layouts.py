"""What datasets look like on disk: where pictures and masks are, how they are read."""

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from torch import Tensor

from common import coco, shapes
from common.colors import DISTINCT, Color, palette, voc_colors
from common.flags import InputError
from common.losses import VOID

BAD = 254  # in a lookup: a mask value that stands for nothing
DRAWN = "shapes:"  # before the id of a picture that is drawn, not read
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow has a program decode others
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MASK_END = "_(mask|label|gt)$"  # what a mask's name may have besides its picture's
FOLDER = "classes.txt, images/{train,val}/NAME.jpg, masks/{train,val}/NAME.png"
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
TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF -> Image.Transpose
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


@dataclass
class Data:
    """A dataset: what its folders hold, and which training pictures a run takes with labels.

    Paths begin with `root`. `lookup` (256,) uint8 turns a mask's values into classes.
    """

    root: Path
    classes: list[str]
    colors: list[Color]
    train: dict[str, Pair]  # by id, sorted
    val: list[Pair]
    lookup: np.ndarray
    labeled: list[Pair] = field(default_factory=list)
    unlabeled: list[Pair] = field(default_factory=list)
    tags: Tensor | None = None  # (N, K - 1) bool: the classes but 0 that the training pictures show
    notes: list[str] = field(default_factory=list)  # what the user should know of the lists
    files: dict[str, str] = field(default_factory=dict)  # what `common.data.check` read, hashed

    def summary(self) -> str:
        """Counts, a hash of what teaches that is equal on every machine, and the classes."""
        if self.tags is None:
            used = [Path(os.path.relpath(image, self.root)).as_posix() for image, _ in self.labeled]
            counts = f"{len(used)} labelled, {len(self.unlabeled)} unlabelled"
            what = "labelled list"
        else:
            rows = zip(self.train, self.tags.int().tolist(), strict=True)
            used = [f"{name} {row}" for name, row in rows]
            counts, what = f"{len(used)} pictures with tags", "tags"
        digest = hashlib.sha256("\n".join(used).encode()).hexdigest()[:12]
        return (
            f"{counts}, {len(self.val)} validation pictures; {what} {digest}\n"
            f"{len(self.classes)} classes: {', '.join(self.classes)}"
        )


def shapes_layout(_: Path) -> Data:
    """The embedded dataset: a path is DRAWN and the picture's id."""
    splits = [{name: (DRAWN + name,) * 2 for name in shapes.names(s)} for s in ("train", "val")]
    return _data(Path(), shapes.CLASSES, shapes.COLORS, splits)


def folder_layout(root: Path, train: str = "train", val: str = "val") -> Data:
    """images/{train,val}/, masks/{train,val}/ with PNG masks, classes.txt; notes what is left."""
    names = _read_classes(root / "classes.txt")
    splits, used = [], set()
    need_folder(root / "images" / train)  # without the other, there may be training on tags
    for split in (train, val):
        images = find_pictures(root / "images" / split)
        masks = _match_masks(images, find_pictures(root / "masks" / split, {".png"}))
        splits.append({n: (str(p), masks.get(n)) for n, p in images.items()})
        used.update(map(str, images.values()), masks.values())
    data = _data(root, names, _read_colors(root / "colors.txt", names), splits)
    data.notes += _left_over(root, used)
    return data


def need_folder(path: Path) -> None:
    """Raise InputError where a folder dataset lacks a part."""
    if not path.is_dir():
        raise InputError(f"{path}: missing; the layout is {FOLDER}")


def _read_classes(path: Path) -> list[str]:
    """The class names of a classes.txt: line n is index n, from 0."""
    if not path.is_file():
        raise InputError(f"{path}: missing; write one class name per line, in index order")
    names = []
    for number, name in read_numbered(path):
        if number > len(names) + 1:
            raise InputError(f"{path}: line {number - 1} is blank; line n names class n, from 0")
        if name in names:
            raise InputError(f"{path}: line {number} repeats {name}; give each class another name")
        names.append(name)
    if not 2 <= len(names) <= 254:
        raise InputError(f"{path}: lists {len(names)} classes, must be 2 to 254")
    return names


def _read_colors(path: Path, classes: list[str]) -> list[Color]:
    """Those of a colors.txt, R G B a line, where it is there; else colours that differ visibly."""
    if not path.is_file():
        count = len(classes)
        return DISTINCT[:count] if count <= len(DISTINCT) else voc_colors(count)
    colors = []
    for number, line in read_numbered(path):
        words = line.replace(",", " ").split()
        if len(words) != 3 or not all(re.fullmatch(r"\d{1,3}", w) and int(w) < 256 for w in words):
            raise InputError(f"{path}, line {number}: {line!r} must be R G B, each from 0 to 255")
        colors.append(tuple(map(int, words)))
    if len(colors) != len(classes):
        raise InputError(f"{path}: has {len(colors)} colours for {len(classes)} classes")
    return colors


def _match_masks(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, str]:
    """The masks of pictures: of the same name, or of that and an ending no other picture has."""
    found = {}
    for name, mask in masks.items():
        of = name if name in images else re.sub(MASK_END, "", name)
        if of in found:
            raise InputError(f"{images[of]}: has two masks, {found[of]} and {mask}; remove one")
        if of in images:
            found[of] = str(mask)
    for name, path in images.items():
        of = images.get(re.sub(MASK_END, "", name), path)
        if of != path and path.suffix.lower() == ".png" and name not in found:
            raise InputError(f"{path}: a mask among the pictures, of {of}; move it")
    return found


def _left_over(root: Path, used: set[str]) -> list[str]:
    """What images/ and masks/ hold besides pictures and their masks; their test/ is left alone."""
    paths = [path for kind in ("images", "masks") for path in walk(root / kind)]
    names = [path.relative_to(root).as_posix() for path in paths if str(path) not in used]
    names = [name for name in names if not name.startswith(("images/test/", "masks/test/"))]
    what = "no pictures, in neither train/ nor val/, or masks without their picture or not .png"
    return [f"files left over: {len(names)} ({shortened(names)}); {what}"] if names else []


def shortened(names: list[str], most: int = 5) -> str:
    """Names with commas between; of many the first ones."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def voc_root(root: Path) -> Path:
    """VOC2012/ of a VOCdevkit as unpacked, by the path of either."""
    for below in ("VOC2012", "VOCdevkit/VOC2012"):
        if (root / below / "JPEGImages").is_dir():
            root = root / below
    for needed in ("JPEGImages", *(f"ImageSets/Segmentation/{s}.txt" for s in ("train", "val"))):
        if not (root / needed).exists():
            raise InputError(f"{root / needed}: missing; name the folder of VOC2012 as unpacked")
    return root


def voc_layout(root: Path) -> Data:
    """PASCAL VOC 2012; SegmentationClassAug/, where it is there, has the training masks."""
    root = voc_root(root)
    lists = root / "ImageSets" / "Segmentation"
    val = read_lines(lists / "val.txt")
    augmented = root / "SegmentationClassAug"
    if augmented.is_dir():
        masks, train = augmented, sorted(set(find_pictures(augmented)) - set(val))
    else:
        masks, train = root / "SegmentationClass", read_lines(lists / "train.txt")
    for name in (*train, *val):  # files of the run are called by ids, too
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{lists}: the id {name} leads out of JPEGImages; remove it")
    splits = [
        {name: _pair(root / "JPEGImages" / f"{name}.jpg", folder / f"{name}.png") for name in names}
        for names, folder in ((train, masks), (val, root / "SegmentationClass"))
    ]
    return _data(root, VOC_CLASSES, voc_colors(21), splits)


def cityscapes_layout(root: Path) -> Data:
    """leftImg8bit/ and gtFine/ as unpacked, labelIds; an id is city/city_sequence_frame."""
    splits = []
    for split in ("train", "val"):
        folder, end = root / "leftImg8bit" / split, "_leftImg8bit"
        if not folder.is_dir():
            raise InputError(f"{folder}: missing; --data-path must hold leftImg8bit/ and gtFine/")
        masks, found = root / "gtFine" / split, find_pictures(folder)
        images = {name.removesuffix(end): found[name] for name in found if name.endswith(end)}
        splits.append(
            {n: _pair(path, masks / f"{n}_gtFine_labelIds.png") for n, path in images.items()}
        )
    # Ids 0 to 33 exist; those outside the 19 classes are void, and so is the licence plate (-1),
    # which is stored as 255.
    lookup = np.full(256, BAD, np.uint8)
    lookup[[*range(34), 255]] = VOID
    lookup[list(CITYSCAPES)] = range(19)
    names, colors = zip(*CITYSCAPES.values(), strict=True)
    return _data(root, list(names), list(colors), splits, lookup)


def coco_layout(root: Path) -> Data:
    """COCO 2017 as unpacked: background and 80 kinds of objects; an id is a picture's number."""
    splits, classes = [], []
    for split in ("train2017", "val2017"):
        if not (root / split).is_dir():
            raise InputError(f"{root / split}: missing; COCO is train2017/, val2017/, annotations/")
        masks, images = root / coco.MADE / split, find_pictures(root / split)
        classes.append(coco.make_masks(root, split, list(images), write_mask))
        splits.append({n: (str(path), str(masks / f"{n}.png")) for n, path in images.items()})
    if classes[0] != classes[1]:
        raise InputError(f"{root / 'annotations'}: training and validation have other categories")
    return _data(root, classes[0], voc_colors(len(classes[0])), splits)


def _pair(image: Path, mask: Path) -> Pair:
    return str(image), str(mask) if os.path.isfile(mask) else None


def _data(
    root: Path,
    classes: list[str],
    colors: list[Color],
    splits: list[dict[str, Pair]],
    lookup: np.ndarray | None = None,
) -> Data:
    """The dataset with its pictures sorted by id; without a lookup, masks hold classes and void."""
    if lookup is None:
        lookup = np.full(256, BAD, np.uint8)
        lookup[[*range(len(classes)), VOID]] = [*range(len(classes)), VOID]
    train, val = (dict(sorted(split.items())) for split in splits)
    return Data(root, classes, colors, train, list(val.values()), lookup)


def walk(folder: Path) -> list[Path]:
    """The files below a folder, sorted, also behind links; without hidden ones.

    Hidden are the "._name" files of macOS, too. A link to a folder that it lies in is not followed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error}); move it") from error

    found = []
    if not folder.is_dir():
        return found
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place)
        above = {os.path.realpath(part) for part in (here, *here.parents)}
        below[:] = [n for n in below if n[0] != "." and os.path.realpath(here / n) not in above]
        found += [here / name for name in names if name[0] != "."]
    return sorted(found)


def find_pictures(folder: Path, suffixes: Collection[str] = SUFFIXES) -> dict[str, Path]:
    """The pictures below a folder by id, the path without suffix relative to the folder; sorted."""
    found = {}
    for path in walk(folder):
        if path.suffix.lower() in suffixes and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise InputError(f"{path}: has the same name as {found[name]}; rename one of them")
            found[name] = path
    return found


def short_name(path: str) -> str:
    """What a picture's path, id or mask has in common: its name without the dataset's endings."""
    return re.sub(r"_(leftImg8bit|gtFine(_label(Train)?Ids)?)$", "", Path(path).stem)


LAYOUTS = dict(
    shapes=shapes_layout,
    folder=folder_layout,
    voc=voc_layout,
    coco=coco_layout,
    cityscapes=cityscapes_layout,
)


# --- reading ---


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped; CRLF and a byte order mark allowed."""
    return [line for _, line in read_numbered(path)]


def read_numbered(path: Path) -> list[tuple[int, str]]:
    """The same lines with their numbers in the file, from 1."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no such file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_image(path: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 RGB, turned as its EXIF orientation says."""
    if path.startswith(DRAWN):
        return shapes.draw(path.removeprefix(DRAWN))[0].copy()
    return upright_rgb(_open(path, "picture"), path)


def upright_rgb(image: Image.Image, name: str) -> np.ndarray:
    """The same of an opened picture; the name is for the InputError of one that has no 8 bits."""
    _check_mode(name, image.mode)
    # By hand, for ImageOps.exif_transpose also writes the EXIF data back, and damaged ones fail.
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # whatever Pillow's parser met
        turn = None
    with decoding(name, "picture"):
        image = image if turn is None else image.transpose(turn)
        return np.array(image.convert("RGB"))


def _check_mode(path: str, mode: str) -> None:
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
        raise InputError(f"{path}: has Pillow mode {mode}; convert it to 8-bit RGB")


def read_header(path: str) -> tuple[int, int]:
    """Height and width of a picture or mask, which may still be cut short after its header."""
    if path.startswith(DRAWN):
        return shapes.SIZE, shapes.SIZE
    with _open(path, "picture", decode=False) as image:
        _check_mode(path, image.mode)
        return image.size[::-1]


def read_mask(path: str) -> np.ndarray:
    """A mask's values (H, W) uint8 as stored: a palette's indices, not its colours."""
    if path.startswith(DRAWN):
        return shapes.draw(path.removeprefix(DRAWN))[1].copy()
    mask = _open(path, "mask")
    if mask.mode not in ("1", "L", "P"):
        raise InputError(
            f"{path}: has Pillow mode {mask.mode}; a mask must be a PNG of class indices, "
            "8-bit grey or palette, with 255 for void"
        )
    with decoding(path, "mask"):
        return np.array(mask, np.uint8)


def count_values(mask: np.ndarray) -> np.ndarray:
    """How often a mask (H, W) uint8 has each value, (256,); bincount takes 8 bytes a pixel."""
    return np.array(Image.fromarray(mask).histogram())


def write_mask(path: Path, values: np.ndarray) -> None:
    """A mask (H, W) uint8 as a PNG of indices in VOC's colours, whole or not there."""
    image = Image.fromarray(values)
    image.putpalette(palette([]).tobytes())
    # A name of its own: another process may write the same mask.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    image.save(temporary, "PNG")
    os.replace(temporary, path)


def _open(path: str, kind: str, decode: bool = True) -> Image.Image:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: no such {kind}")
    with decoding(path, kind):
        image = Image.open(path, formats=FORMATS)
        if decode:
            image.load()
    return image


@contextmanager
def decoding(path: str, kind: str) -> Iterator[None]:
    """Whatever a decoder raises is an InputError: for damaged files Pillow has a dozen kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable {kind} ({reason}); replace it") from error
