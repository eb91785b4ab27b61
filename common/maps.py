"""The training pictures of a run in stages, and the maps that each stage leaves for the next."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.augment import normalise, random_flip, train_view
from common.data import VOID, Data, Draws, draws_loader, read_pair
from common.flags import LoneError
from common.metrics import confusion_matrix, evaluating, mean_iou
from common.predict import colorize, sheet
from common.run import Run
from common.slic import project
from common.tags import Tagged


class Maps:
    """Training pictures by index, and files `kind/name` in a folder, one a picture.

    Labels (H, W) are stored as PNG at the picture's pixels. Probabilities (C, h, w), of cells of
    stride x stride pixels, are stored as float16, and only those of the classes that the picture
    may show: the others are 0.
    """

    def __init__(self, folder: Path, tagged: Tagged, stride: int):
        self.folder, self.stride, self.names = folder, stride, tagged.names
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
        path = self.folder / kind / self.names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        value = value.cpu()
        if value.is_floating_point():
            np.save(_end(path, ".npy"), value[self.possible[index]].to(torch.float16).numpy())
        else:
            if value.max() >= 2**16:
                raise LoneError(f"{path}: over 65,536 superpixels; take a larger --segment-size")
            bits = torch.uint8 if value.max() < 256 else torch.uint16
            Image.fromarray(value.to(bits).numpy()).save(_end(path, ".png"))

    def read(self, kind: str, index: int) -> Tensor:
        """A picture's map, int64 or float32. Raises LoneError where it is lost or damaged."""
        path = self.folder / kind / self.names[index]
        try:
            if _end(path, ".png").is_file():
                with Image.open(_end(path, ".png")) as png:
                    return torch.from_numpy(np.array(png).astype(np.int64))
            stored = torch.from_numpy(np.load(_end(path, ".npy")).astype(np.float32))
        except (OSError, EOFError, ValueError) as error:
            raise LoneError(f"{path}: lost or damaged ({error}); start the run afresh") from error
        probs = stored.new_zeros(self.num_classes, *stored.shape[1:])
        probs[self.possible[index]] = stored
        return probs

    def draw(self, index: int, kinds: Sequence[str]) -> list[Tensor]:
        """A picture, and its maps of these kinds; "tags" stands for its tags."""
        maps = [self.tags[index] if kind == "tags" else self.read(kind, index) for kind in kinds]
        return [self.image(index), *maps]

    def labels(self, kind: str, index: int) -> Tensor:
        """A map's labels (H, W), of probabilities the likeliest."""
        stored = self.read(kind, index)
        if stored.ndim == 2:
            return stored
        height, width = self.image(index).shape[1:]
        return at_pixels(stored[None], self.stride).argmax(dim=1)[0, :height, :width]

    @functools.cached_property
    def count(self) -> int:
        """S: more than any superpixel's id in any picture."""
        return 1 + max(int(self.read("superpixels", i).max()) for i in range(len(self.names)))

    # --- many pictures ---

    def loader(self, run: Run, steps: range, view: Callable, *kinds: str) -> DataLoader:
        """A batch for each step of a stage: view(picture, its maps of these kinds) of random ones.

        The kind "tags" stands for a picture's tags.
        """
        batch_size, seed = run.cfg.batch_size, (run.cfg.seed, 2, steps.start)
        read = functools.partial(self.draw, kinds=kinds)
        draws = Draws(range(len(self.names)), read, view, seed, batch_size * run.world)
        return draws_loader(draws, batch_size, range(len(steps)), **run.loading)

    def share(self, run: Run) -> range:
        """This process's share of the pictures."""
        return range(run.rank, len(self.names), run.world)

    def each(self, run: Run) -> Iterator[tuple[int, Tensor]]:
        """This process's share of the pictures: index, and (1, 3, H', W') on the device.

        Pictures are normalised; H' and W' are the sides padded to multiples of the stride.
        """
        for index in self.share(run):
            image = pad(self.image(index), self.stride)
            yield index, normalise(image.to(run.device).float() / 255)[None]

    def quality(self, run: Run, name: str, kind: str) -> dict[str, float]:
        """How the labels of a kind, 255 unknown, compare with the pictures' masks.

        `name` is the mIoU where labels are known. Precision: the share of pixels given to
        foreground (fg), to background (bg), that are right; coverage: the share of their true
        pixels that are labelled. NaN without masks.
        """
        size = self.num_classes
        known, total = (torch.zeros(size, size, dtype=torch.int64) for _ in range(2))
        for index in self.share(run):
            if self.pairs[index][1] is not None:
                truth = read_pair(self.pairs[index], self.lookup)[1].long()
                total += confusion_matrix(torch.zeros_like(truth), truth, size)
                labels = self.labels(kind, index)
                truth[labels == VOID] = VOID
                known += confusion_matrix(labels.masked_fill(labels == VOID, 0), truth, size)
        both = run.gather(torch.stack([known, total])[None].to(run.device)).sum(dim=0)
        known, total = both.cpu().double()
        hits = known.diagonal()
        return {
            name: mean_iou(known),
            f"{name}_fg_precision": (hits[1:].sum() / known[:, 1:].sum()).item(),
            f"{name}_bg_precision": (hits[0] / known[:, 0].sum()).item(),
            f"{name}_fg_coverage": (known[1:].sum() / total[1:].sum()).item(),
            f"{name}_bg_coverage": (known[0].sum() / total[0].sum()).item(),
        }

    def best_threshold(self, run: Run, kind: str, levels: Sequence[float]) -> float:
        """The mIoU of activation maps where the level that suits them best parts off background.

        An upper bound: it is the masks that choose the level. NaN without masks.
        """
        size = self.num_classes
        counts = torch.zeros(len(levels), size, size, dtype=torch.int64)
        for index in self.share(run):
            if self.pairs[index][1] is not None:
                truth = read_pair(self.pairs[index], self.lookup)[1].long()
                height, width = truth.shape
                maps = at_pixels(self.read(kind, index)[None, 1:], self.stride)
                score, best = maps[0, :, :height, :width].max(dim=0)
                for level, confusion in zip(levels, counts, strict=True):
                    labels = torch.where(score > level, best + 1, 0)
                    confusion += confusion_matrix(labels, truth, size)
        counts = run.gather(counts[None].to(run.device)).sum(dim=0).cpu()
        return max(mean_iou(confusion) for confusion in counts)


@torch.no_grad()
def stage_panels(
    path: Path, maps: Maps, kinds: dict[str, str], model: nn.Module, data: Data, rows: int = 6
) -> None:
    """Write one PNG of some training pictures, each with what the stages made of it.

    A picture, its activation ("cam"), superpixels, the labels of `kinds` (title: kind), the model's
    prediction, and the truth where there is a mask.
    """
    strips = []
    for index in sorted({round(i) for i in np.linspace(0, len(maps.names) - 1, rows)}):
        image, segments = maps.image(index), maps.read("superpixels", index)[None]
        heat = at_pixels(maps.read("cam", index).amax(dim=0)[None, None], maps.stride)[0, 0]
        regions = project(image[None].float(), segments, maps.count)[0]
        labels = [maps.read(kind, index) for kind in kinds.values()]
        with evaluating(model):
            whole = pad(image, maps.stride).to(next(model.parameters()).device)
            predicted = model(normalise(whole.float() / 255)[None]).argmax(dim=1)[0].cpu()
        height, width = image.shape[1:]
        labels += [predicted[:height, :width], read_pair(maps.pairs[index], maps.lookup)[1]]
        strips.append(
            [
                image.permute(1, 2, 0).numpy(),
                (255 * heat[:height, :width, None]).byte().expand(-1, -1, 3).contiguous().numpy(),
                regions.permute(1, 2, 0).byte().contiguous().numpy(),
                *(colorize(label.byte().numpy(), data.colors) for label in labels),
            ]
        )
    titles = ["image", "activation", "superpixels", *kinds, "prediction", "truth"]
    sheet(path, titles, strips, data)


def _end(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


# --- pixels and cells ---


def crop_view(crop: int, stride: int, image: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
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


def pad(maps: Tensor, stride: int) -> Tensor:
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


def clamped(unary: Tensor, mined: Tensor, stride: int) -> Tensor:
    """--clamp (ours): α^u at the cells, but where regions were mined, their labels."""
    known = mined != VOID
    onehot = F.one_hot(mined.masked_fill(~known, 0), unary.shape[1]).permute(0, 3, 1, 2)
    pixels = unary.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    return F.avg_pool2d(torch.where(known[:, None], onehot.to(unary), pixels), stride)


def tag_view(
    image: Tensor, tags: Tensor, crop: int, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A random crop of a picture (3, H, W) uint8, and its tags, all of them."""
    return train_view(image, torch.zeros_like(image[0]), crop, scales)[0], tags
