"""What a trained network makes of other pictures.

    python -m common.predict runs/cps-shapes-1_40-s0/last.pt photos --output masks --overlay
    python -m common.predict last.pt my_data --test-split
    python -m common.predict last.pt --export model.pt2

In a notebook: `load`, `segment`, `overlay`.
"""

import argparse
import math
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import machine
from common.augment import IMAGENET
from common.bars import tqdm
from common.checkpoints import read_checkpoint
from common.colors import palette, tinted
from common.data import check
from common.deeplab import DeepLabV3Plus, DilatedConv, Ensemble
from common.flags import InputError, Parser, one_line
from common.layouts import (
    SUFFIXES,
    find_pictures,
    folder_layout,
    read_image,
    shortened,
    upright_rgb,
    walk,
)
from common.loaders import val_loader
from common.metrics import classify, evaluate, evaluating, iou, windows
from common.outputs import iou_table, replace_file

Picture = str | Path | Image.Image | np.ndarray | Tensor

# --- in a notebook ---


class Segmenter(nn.Module):
    """A model for pictures as files have them: uint8 RGB, of any size from one pixel on.

    saved: what a checkpoint says of the model, `mean` and `std` at least.
    """

    def __init__(self, model: nn.Module, saved: dict):
        super().__init__()
        self.model, self.window = model, saved.get("window", 0)
        self.classes, self.colors = saved.get("classes"), saved.get("colors")
        for name in ("mean", "std"):
            value = torch.tensor(saved[name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) uint8 -> logits (B, K, H, W)."""
        images = (images.float() * (1 / 255) - self.mean) / self.std
        height, width = images.shape[-2:]
        if min(height, width) < 32:  # too few for the networks; zeros are the mean colour by now
            images = F.pad(images, (0, max(32 - width, 0), 0, max(32 - height, 0)))
        return self.model(images)[..., :height, :width]


def load(checkpoint: str | Path, device: str = "auto") -> Segmenter:
    """The model of a last.pt or best.pt, in eval mode, with its `classes` and `colors`.

    Raises InputError for another file.
    """
    where = machine.find_device(device)
    try:
        saved = read_checkpoint(checkpoint)
        networks = []
        for arguments, state in zip(saved["arguments"], saved["networks"], strict=True):
            with torch.device("meta"):  # arguments of a damaged file may ask for any size
                networks.append(DeepLabV3Plus(**arguments | {"weights": None}))
            networks[-1].load_state_dict(state, assign=True)
        model = networks[0] if len(networks) == 1 else Ensemble(networks)
        model, evaluated = Segmenter(model, saved), not math.isnan(saved["miou"])
        count, colors, window = len(model.classes), np.array(model.colors), model.window
        if not (
            all(network.arguments["num_classes"] == count <= 254 for network in networks)
            and all(isinstance(name, str) for name in model.classes)
            and (colors.shape == (count, 3) and colors.dtype.kind == "i")
            and (0 <= colors.min() and colors.max() <= 255)
            and (isinstance(window, int) and (window == 0 or window >= 32))
        ):
            raise ValueError
    except Exception as error:  # as many kinds as there are ways to be another file
        missing = isinstance(error, FileNotFoundError)
        other = f"holds no network of these scripts ({type(error).__name__})"
        reason = "no such file" if missing else other
        raise InputError(f"{checkpoint}: {reason}; give the last.pt or best.pt of a run") from error
    if not evaluated:
        print(f"{checkpoint}: never evaluated; its network may be untrained", file=sys.stderr)
    return machine.place(model, where).eval()


@torch.no_grad()
def segment(
    model: nn.Module, image: Picture, window: int | None = None, amp: str = "auto"
) -> np.ndarray | Tensor:
    """The classes of a picture's pixels, (H, W) uint8: an array, or a tensor for a tensor.

    model: what `load` gives, or a result's. image: a path, a Pillow image, or uint8 RGB, an array
    (H, W, 3) or a tensor (3, H, W); the first two are turned as their EXIF orientation says.
    window: the side of sliding windows, for pictures beyond memory; 0: the whole picture; None: as
    its run evaluates. amp: auto, none, bf16 or fp16. Raises InputError for what is no picture.
    """
    picture, device = _picture(image), next(model.parameters()).device
    model = model if isinstance(model, Segmenter) else Segmenter(model, IMAGENET).to(device)
    sides = windows(model.window if window is None else window)
    with evaluating(model), machine.autocast(device, machine.precision(device, amp)):
        mask = classify(model, picture[None].to(device), sides)[0]
    return mask.to(image.device) if isinstance(image, Tensor) else mask.cpu().numpy()


def overlay(image: Picture, mask: np.ndarray, colors: list[list[int]]) -> np.ndarray:
    """(H, W, 3) uint8: a picture `tinted` by its classes (H, W), with white borders."""
    picture, mask = _picture(image).permute(1, 2, 0).numpy(), np.asarray(mask)
    shown = tinted(picture, mask, colors)
    shown[1:][mask[1:] != mask[:-1]] = 255
    shown[:, 1:][mask[:, 1:] != mask[:, :-1]] = 255
    return shown


def _picture(image: Picture) -> Tensor:
    """(3, H, W) uint8."""
    if isinstance(image, str | Path):
        image = read_image(str(image))
    elif isinstance(image, Image.Image):
        image = upright_rgb(image, "image")
    picture = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        # A copy, for torch knows neither arrays that are read-only nor steps backwards.
        picture = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    bytes_given = isinstance(picture, Tensor) and picture.dtype == torch.uint8
    if not (bytes_given and picture.ndim == 3 and len(picture) == 3 and picture.numel()):
        kind, shape = type(image).__name__, tuple(getattr(image, "shape", ()))
        raise InputError(
            "image: must be a path, a Pillow image, or RGB of type uint8, an array (H, W, 3) or a "
            f"tensor (3, H, W), not {kind} {shape} {getattr(image, 'dtype', '')}"
        )
    return picture


# --- the command ---


def predict(model: Segmenter, options: argparse.Namespace) -> int:
    """Write the masks of all pictures; return how many had to be skipped."""
    pictures, skipped = find(options.pictures, options.output), 0
    for name, path in tqdm(pictures.items(), "predicting", disable=None):
        try:
            picture = read_image(str(path))
            mask = segment(model, picture, amp=options.amp)
            write(options.output / name, picture, mask, model.colors, options.overlay)
            continue
        except InputError as error:
            problem = error
        except (MemoryError, RuntimeError) as error:
            if not machine.lacks_memory(error):
                raise
            problem = f"{path}: does not fit into memory; give --window 512, or less"
        skipped += 1
        tqdm.write(f"predict.py: {problem}", file=sys.stderr)
    count = f"{len(pictures)} picture" + "s" * (len(pictures) != 1)
    print(count + f", {skipped} of them skipped" * bool(skipped) + f": {options.output}")
    return skipped


def find(pictures: Path, output: Path) -> dict[str, Path]:
    """A picture, or those of a folder and its subfolders, by where below output their masks go."""
    found = {pictures.stem: pictures} if pictures.is_file() else find_pictures(pictures)
    inside, out = pictures.resolve(), output.resolve()
    if out == inside:
        raise InputError(f"--output {output}: holds the pictures; name another folder")

    def made(path: Path) -> bool:  # by an earlier call
        return out.is_relative_to(inside) and out in path.resolve().parents

    found = {name: path for name, path in found.items() if not made(path)}
    if not found:
        empty = f"holds no picture ({', '.join(sorted(SUFFIXES))})"
        problem = empty if pictures.is_dir() else "no such picture or folder"
        raise InputError(f"{pictures}: {problem}")
    taken = set(found.values())
    others = [str(path) for path in walk(pictures) if path not in taken and not made(path)]
    if others:
        print(f"left out, no pictures: {shortened(others, 1)}", file=sys.stderr)
    sources = {path.resolve() for path in found.values()}
    for name in found:
        if (mask := output / f"{name}.png").resolve() in sources:
            raise InputError(f"--output {output}: would replace the picture {mask}; name another")
    return found


def write(
    target: Path, picture: np.ndarray, mask: np.ndarray, colors: list[list[int]], overlaid: bool
) -> None:
    """target.png, class indices with the classes' colours for a palette; target_overlay.jpg."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(palette(colors).tobytes())
    replace_file(target.with_name(f"{target.name}.png"), partial(image.save, format="PNG"))
    if overlaid:
        image = Image.fromarray(overlay(picture, mask, colors))
        kind, suffix = ("JPEG", "jpg") if max(mask.shape) <= 65_500 else ("PNG", "png")  # its limit
        save = partial(image.save, format=kind, quality=92, subsampling=0)  # sharp borders
        replace_file(target.with_name(f"{target.name}_overlay.{suffix}"), save)


def score(model: Segmenter, options: argparse.Namespace) -> str:
    """A table: IoU by class, and the mean, on images/test of a folder dataset."""
    root = options.pictures
    data = folder_layout(root, "test", "test")
    if data.classes != model.classes:
        raise InputError(
            f"{root / 'classes.txt'}: lists {', '.join(data.classes)}; the checkpoint's classes "
            f"are {', '.join(model.classes)}"
        )
    if not data.val:
        raise InputError(f"{root / 'images' / 'test'}: holds no picture")
    for image, mask in data.val:
        if mask is None:
            raise InputError(f"{image}: has no mask in {root / 'masks' / 'test'}; add the mask")
    check(replace(data, labeled=data.val, val=[]))  # as labelled ones: these may be small
    loader = val_loader(data, lambda image, label: (image, label), pixels=2**18)
    device, sides = next(model.parameters()).device, windows(model.window)
    with machine.autocast(device, machine.precision(device, options.amp)):
        ious = iou(evaluate(model, loader, len(model.classes), device, sides))
    values = [None if math.isnan(value) else value for value in ious.tolist()]
    return iou_table(dict(zip(model.classes, values, strict=True)), ious.nanmean().item())


def export(model: Segmenter, path: Path) -> None:
    """Write a program that runs without this code: uint8 (B, 3, H, W), 32 pixels on, to logits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = deepcopy(model).requires_grad_(False)
    model.to("cpu", memory_format=torch.contiguous_format)
    for module in model.modules():
        if isinstance(module, DilatedConv):  # whose shortcut for small maps would fix their size
            module.__class__ = nn.Conv2d
        elif isinstance(module, nn.MaxPool2d):
            module.forward = _max_pool
    dim = partial(torch.export.Dim, min=32, max=2**16)
    sizes = {0: torch.export.Dim("batch"), 2: dim("height"), 3: dim("width")}
    pictures = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    program = torch.export.export(model, (pictures,), dynamic_shapes=(sizes,), strict=False)
    program = program.run_decompositions({})  # into operators that PyTorch 2.6 can save
    replace_file(path, partial(torch.export.save, program))


def _max_pool(x: Tensor) -> Tensor:
    """A ResNet's max pooling; PyTorch 2.6 exports its own for odd sizes alone or even ones."""
    x = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    x = x[..., :-2:2, :].maximum(x[..., 1:-1:2, :]).maximum(x[..., 2::2, :])
    return x[..., :-2:2].maximum(x[..., 1:-1:2]).maximum(x[..., 2::2])


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; an InputError where it cannot be right."""
    about, examples, _ = __doc__.split("\n\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser("predict.py", None, about, examples, formatter_class=shape, allow_abbrev=False)
    add, task = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    add("checkpoint", type=Path, help="last.pt or best.pt of a run of any script")
    add("pictures", type=Path, nargs="?", help="a picture, or a folder with subfolders")
    task("--output", type=Path, help="folder for the masks: PNGs of class indices")
    task("--test-split", action="store_true", help="score images/test of a folder dataset")
    task("--export", type=Path, help="file for torch.export.load, such as model.pt2")
    add("--overlay", action="store_true", help="with --output: also name_overlay.jpg")
    add("--window", type=int, help="side of sliding windows, 0: none [as its run evaluates]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add("--amp", choices="auto none bf16 fp16".split(), default="auto", help="see training [auto]")
    options = parser.parse_args(words)
    if options.window is not None and (options.window < 0 or 0 < options.window < 32):
        raise InputError(f"--window {options.window}: must be 0, or 32 pixels and more")
    if (options.pictures is None) == (options.export is None):
        raise InputError("PICTURES: goes with --output and --test-split, not with --export")
    if options.overlay and options.output is None:
        raise InputError("--overlay: goes with --output")
    if options.output and options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output}: is a file; name a folder")
    return options


def main(words: list[str]) -> None:
    with one_line("predict.py"):
        options, skipped = parse(words), 0
        machine.keep_memory()
        # Pillow refuses pictures of twice the size from which on it warns.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        model = load(options.checkpoint, options.device)
        model.window = model.window if options.window is None else options.window
        machine.precision(model.mean.device, options.amp)  # refuses what there is not
        if options.output:
            skipped = predict(model, options)
        elif options.test_split:
            print(score(model, options), end="")
        else:
            export(model, options.export)
            print(f"{options.export}: takes uint8 RGB (B, 3, H, W) from 32 pixels on, gives logits")
        sys.exit(min(skipped, 1))


if __name__ == "__main__":
    main(sys.argv[1:])
