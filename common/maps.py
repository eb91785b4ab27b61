"""Maps of a run's training pictures: files that each stage of IAL leaves for the next."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common.augment import normalise
from common.data import Draws, draws_loader, read_pair
from common.flags import LoneError
from common.layouts import Data
from common.losses import VOID
from common.metrics import confusion_matrix, mean_iou
from common.panels import colorize, sheet
from common.run import Run

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class Maps:
    """Training pictures by index, and files `kind/name` in a folder, one a picture.

    Labels (H, W) are stored as PNG at the picture's pixels. Probabilities (C, h, w), of cells of
    stride x stride pixels, are stored as float16, and only those of the classes that the picture
    may show: the others are 0. Only `quality` and what follows it open masks.
    """

    def __init__(self, folder: Path, data: Data, stride: int):
        self.folder, self.data, self.stride = folder, data, stride
        self.names, self.pairs, self.tags = list(data.train), data.labeled, data.tags
        self.num_classes = len(data.classes)
        self.possible = F.pad(data.tags, (1, 0), value=True)  # (N, C) bool, background included

    def image(self, index: int) -> Tensor:
        """A picture (3, H, W) uint8."""
        return read_pair((self.pairs[index][0], None), self.data.lookup)[0]

    def write(self, kind: str, index: int, value: Tensor) -> None:
        """Replace a picture's map of a kind: int64 labels (H, W) or probabilities (C, h, w)."""
        path = self.folder / kind / self.names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        value = value.cpu()
        if value.is_floating_point():
            np.save(f"{path}.npy", value[self.possible[index]].to(torch.float16).numpy())
            return
        if value.max() >= 2**16:
            raise LoneError(f"{path}: over 65,536 superpixels; take a larger --segment-size")
        bits = torch.uint8 if value.max() < 256 else torch.uint16
        Image.fromarray(value.to(bits).numpy()).save(f"{path}.png")

    def read(self, kind: str, index: int) -> Tensor:
        """A picture's map, int64 or float32. Raises LoneError where it is lost or damaged."""
        path = self.folder / kind / self.names[index]
        try:
            if Path(f"{path}.png").is_file():
                with Image.open(f"{path}.png") as png:
                    return torch.from_numpy(np.array(png).astype(np.int64))
            stored = torch.from_numpy(np.load(f"{path}.npy").astype(np.float32))
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
        return stored if stored.ndim == 2 else self._at_pixels(stored, index).argmax(dim=0)

    def _at_pixels(self, probs: Tensor, index: int) -> Tensor:
        height, width = self.image(index).shape[1:]
        return at_pixels(probs[None], self.stride)[0, :, :height, :width]

    @cached_property
    def count(self) -> int:
        """S: more than any superpixel's id in any picture."""
        return 1 + max(int(self.read("superpixels", i).max()) for i in range(len(self.names)))

    def loader(self, run: Run, steps: range, view: Callable, *kinds: str) -> DataLoader:
        """A batch for each step: view(picture, its maps of these kinds) of random pictures."""
        batch_size, seed = run.cfg.batch_size, (run.cfg.seed, 2, steps.start)
        read = partial(self.draw, kinds=kinds)
        draws = Draws(range(len(self.names)), read, view, seed, batch_size * run.world)
        return draws_loader(draws, batch_size, range(len(steps)), **run.loading)

    def share(self, run: Run) -> range:
        """This process's share of the pictures."""
        return range(run.rank, len(self.names), run.world)

    def each(self, run: Run, *kinds: str) -> Iterator[tuple[int, Tensor, ...]]:
        """This process's share of the pictures, then a wait for the other processes.

        Each is its index, the picture (1, 3, H', W'), normalised and padded to multiples of the
        stride, its tags (1, K), and its maps of these kinds.
        """
        for index in self.share(run):
            image, *others = (t[None].to(run.device) for t in self.draw(index, ("tags", *kinds)))
            yield index, normalise(pad(image, self.stride).float() / 255), *others
        run.barrier()

    def quality(self, run: Run, name: str, kind: str) -> dict[str, float]:
        """How the labels of a kind, 255 unknown, compare with the masks; NaN without masks.

        `name` is the mIoU where labels are known. Precision: the share of pixels given to
        foreground (fg), to background (bg), that are right; coverage: of their true pixels the
        share that is labelled.
        """
        (counts,) = self._confusions(run, lambda index: [self.labels(kind, index)])
        known, total = counts[:, :-1], counts.sum(dim=1)  # (C, C), (C,)
        hits = known.diagonal()
        return {
            name: mean_iou(known),
            f"{name}_fg_precision": (hits[1:].sum() / known[:, 1:].sum()).item(),
            f"{name}_bg_precision": (hits[0] / known[:, 0].sum()).item(),
            f"{name}_fg_coverage": (known[1:].sum() / total[1:].sum()).item(),
            f"{name}_bg_coverage": (known[0].sum() / total[0]).item(),
        }

    def best_threshold(self, run: Run, kind: str, levels: Sequence[float] = LEVELS) -> float:
        """The mIoU of activation maps where the level that suits them best parts off background.

        An upper bound: it is the masks that choose the level. NaN without masks.
        """

        def cut(index: int) -> list[Tensor]:
            score, best = self._at_pixels(self.read(kind, index)[1:], index).max(dim=0)
            return [torch.where(score > level, best + 1, 0) for level in levels]

        return max(mean_iou(c[:, :-1]) for c in self._confusions(run, cut, len(levels)))

    def _confusions(self, run: Run, labels_of: Callable, count: int = 1) -> Tensor:
        """Pixels (count, C, C + 1) in `count` labellings: rows truth, the last column unknown."""
        size = self.num_classes + 1
        counts = torch.zeros(count, size, size, dtype=torch.int64)
        for index in self.share(run):
            if self.pairs[index][1] is not None:
                truth = read_pair(self.pairs[index], self.data.lookup)[1]
                for confusion, labels in zip(counts, labels_of(index), strict=True):
                    labels = labels.masked_fill(labels == VOID, size - 1)
                    confusion += confusion_matrix(labels, truth, size)
        return run.gather(counts[None].to(run.device)).sum(dim=0)[:, :-1].cpu().double()

    def panels(self, path: Path, kinds: Sequence[str], rows: int = 6) -> None:
        """Write one PNG of some pictures, with those of `kinds` that were made, and the truth."""
        kinds, strips = [kind for kind in kinds if (self.folder / kind).is_dir()], []
        for index in sorted({round(i) for i in np.linspace(0, len(self.names) - 1, rows)}):
            image, ids = self.image(index), self.read("superpixels", index)
            heat = (255 * self.read("cam", index).amax(dim=0)).byte().expand(3, -1, -1)
            sums = torch.zeros(3, self.count).index_add(1, ids.flatten(), image.flatten(1).float())
            regions = (sums / ids.flatten().bincount(minlength=self.count))[:, ids].byte()
            labels = [self.labels(kind, index) for kind in kinds]
            labels.append(read_pair(self.pairs[index], self.data.lookup)[1])
            row = [cell.permute(1, 2, 0).numpy() for cell in (image, heat, regions)]
            row += [colorize(label.byte().numpy(), self.data.colors) for label in labels]
            strips.append(row)
        sheet(path, ["image", "activation", "superpixels", *kinds, "truth"], strips, self.data)


# --- pixels and cells ---


def pad(maps: Tensor, stride: int) -> Tensor:
    """(..., H, W) with the last row and column repeated up to multiples of the stride."""
    rows, columns = (
        torch.arange(-(-side // stride) * stride).clamp(max=side - 1) for side in maps.shape[-2:]
    )
    return maps[..., rows, :][..., columns]


def at_pixels(cells: Tensor, stride: int) -> Tensor:
    """Maps (B, C, h, w) -> (B, C, stride h, stride w), bilinear."""
    return F.interpolate(cells, scale_factor=stride, mode="bilinear", align_corners=False)
