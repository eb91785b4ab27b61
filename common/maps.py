"""The training pictures of a run in stages, and the maps that each stage leaves for the next."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common.augment import normalise, random_flip
from common.data import VOID, Draws, draws_loader, read_pair
from common.flags import InputError
from common.metrics import confusion_matrix, mean_iou
from common.run import Run
from common.tags import Tagged


class Maps:
    """Training pictures by index, and files `maps/kind/name` of the run's folder, one a picture.

    Labels (H, W) are stored as PNG at the picture's pixels. Probabilities (C, h, w), of cells of
    stride x stride pixels, are stored as float16, and only those of the classes that the picture
    may show: the others are 0.
    """

    def __init__(self, run: Run, tagged: Tagged, stride: int):
        self.run, self.stride, self.names = run, stride, tagged.names
        self.pairs, self.lookup = tagged.data.labeled, tagged.data.lookup
        self.num_classes = len(tagged.data.classes)
        self.tags = tagged.tags  # (N, K) bool
        self.possible = F.pad(tagged.tags, (1, 0), value=True)  # (N, C) bool, background included

    # --- one picture ---

    def image(self, index: int) -> Tensor:
        """A picture (3, H, W) uint8. Its mask stays closed."""
        return read_pair((self.pairs[index][0], None), self.lookup)[0]

    def write(self, kind: str, index: int, value: Tensor) -> None:
        """Replace a picture's map of a kind: int64 labels (H, W) or probabilities (C, h, w)."""
        path = self.run.folder / "maps" / kind / self.names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        value = value.cpu()
        if value.is_floating_point():
            np.save(_end(path, ".npy"), value[self.possible[index]].to(torch.float16).numpy())
        else:
            bits = torch.uint8 if value.max() < 256 else torch.uint16
            Image.fromarray(value.to(bits).numpy()).save(_end(path, ".png"))

    def read(self, kind: str, index: int) -> Tensor:
        """A picture's map, int64 or float32. Raises InputError where it is lost or damaged."""
        path = self.run.folder / "maps" / kind / self.names[index]
        try:
            if _end(path, ".png").is_file():
                with Image.open(_end(path, ".png")) as png:
                    return torch.from_numpy(np.array(png).astype(np.int64))
            stored = torch.from_numpy(np.load(_end(path, ".npy")).astype(np.float32))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: lost or damaged ({error}); start the run afresh") from error
        probs = stored.new_zeros(self.num_classes, *stored.shape[1:])
        probs[self.possible[index]] = stored
        return probs

    def labels(self, kind: str, index: int, background: float | None = None) -> Tensor:
        """The likeliest classes (H, W) of a map of probabilities; background: that of class 0."""
        probs = self.read(kind, index)
        if background is not None:
            probs[0] = background
        height, width = self.image(index).shape[1:]
        return at_pixels(probs[None], self.stride).argmax(dim=1)[0, :height, :width]

    @functools.cached_property
    def count(self) -> int:
        """S: more than any superpixel's id in any picture."""
        return 1 + max(int(self.read("superpixels", i).max()) for i in range(len(self.names)))

    # --- many pictures ---

    def loader(self, steps: range, read: Callable, view: Callable, batch_size: int) -> DataLoader:
        """A batch for each step of a stage: random pictures' `read(index)`, seen by `view`."""
        run = self.run
        seed = run.cfg.seed, 2, steps.start
        draws = Draws(range(len(self.names)), read, view, seed, batch_size * run.world)
        return draws_loader(draws, batch_size, range(len(steps)), **run.loading)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """This process's share of the pictures: index, and (1, 3, H', W') on the device.

        Pictures are normalised; H' and W' are the sides filled up to multiples of the stride.
        """
        for index in range(self.run.rank, len(self.names), self.run.world):
            image = filled(self.image(index), self.stride)
            yield index, normalise(image.to(self.run.device).float() / 255)[None]

    def quality(self, predict: Callable[[int], Tensor]) -> dict[str, float]:
        """How labels predict(index) (H, W), 255 unknown, compare with the pictures' masks.

        Precision: the share of pixels given to foreground (fg), to background (bg), that are
        right; coverage: the share of their true pixels that are labelled. NaN without masks.
        """
        size, device = self.num_classes, self.run.device
        known, total = (torch.zeros(size, size, dtype=torch.int64) for _ in range(2))
        for index in range(self.run.rank, len(self.names), self.run.world):
            if self.pairs[index][1] is not None:
                truth, labels = read_pair(self.pairs[index], self.lookup)[1].long(), predict(index)
                total += confusion_matrix(torch.zeros_like(truth), truth, size)
                truth[labels == VOID] = VOID
                known += confusion_matrix(labels.masked_fill(labels == VOID, 0), truth, size)
        both = self.run.gather(torch.stack([known, total])[None].to(device)).sum(dim=0)
        known, total = both.double().cpu()
        hits = known.diagonal()
        return dict(
            miou=mean_iou(known),
            fg_precision=(hits[1:].sum() / known[:, 1:].sum()).item(),
            bg_precision=(hits[0] / known[:, 0].sum()).item(),
            fg_coverage=(known[1:].sum() / total[1:].sum()).item(),
            bg_coverage=(known[0].sum() / total[0].sum()).item(),
        )


def _end(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


# --- pixels and cells ---


def window(crop: int, stride: int, image: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """One random crop, flipped or not, of a picture (3, H, W) uint8 and of maps of it.

    Maps (H, W) are at its pixels, maps (C, h, w) at its cells. Returns the picture normalised. A
    picture smaller than the crop is continued by its last pixels.
    """
    top, left = (
        stride * int(torch.randint(max(side - crop, 0) // stride + 1, ()))
        for side in image.shape[1:]
    )

    def cut(values: Tensor, size: int, top: int, left: int) -> Tensor:
        rows = (top + torch.arange(size)).clamp(max=values.shape[-2] - 1)
        columns = (left + torch.arange(size)).clamp(max=values.shape[-1] - 1)
        return values[..., rows, :][..., columns]

    views = [normalise(cut(image, crop, top, left).float() / 255)]
    for values in maps:
        cell = stride if values.ndim == 3 else 1
        views.append(cut(values, crop // cell, top // cell, left // cell))
    return random_flip(*views)


def filled(maps: Tensor, stride: int) -> Tensor:
    """(..., H, W) with the last row and column repeated up to multiples of the stride."""
    rows, columns = (
        torch.arange(-(-side // stride) * stride).clamp(max=side - 1) for side in maps.shape[-2:]
    )
    return maps[..., rows, :][..., columns]


def at_cells(labels: Tensor, stride: int) -> Tensor:
    """Labels (B, H, W) -> (B, h, w), those at one pixel of each cell: labels have no mean."""
    return labels[..., stride // 2 :: stride, stride // 2 :: stride]


def at_pixels(cells: Tensor, stride: int) -> Tensor:
    """Maps (B, C, h, w) -> (B, C, stride h, stride w), bilinear."""
    return F.interpolate(cells, scale_factor=stride, mode="bilinear", align_corners=False)


# --- pixels and superpixels ---


def paint(labels: Tensor, segments: Tensor) -> Tensor:
    """Labels of superpixels (B, S) -> of their pixels (B, H, W)."""
    return labels.gather(1, segments.flatten(1)).view_as(segments)


def of_segments(painted: Tensor, segments: Tensor, count: int) -> Tensor:
    """The inverse of `paint`: (B, H, W) -> (B, S), void for a superpixel without pixels."""
    labels = torch.full((len(painted), count), VOID, device=painted.device)
    return labels.scatter(1, segments.flatten(1), painted.flatten(1))


def clamped(unary: Tensor, mined: Tensor, stride: int) -> Tensor:
    """--clamp (ours): α^u at the cells, but where regions were mined, their labels."""
    known = mined != VOID
    onehot = F.one_hot(mined.masked_fill(~known, 0), unary.shape[1]).permute(0, 3, 1, 2)
    pixels = unary.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    return F.avg_pool2d(torch.where(known[:, None], onehot.to(unary), pixels), stride)
