"""Maps of a run's training pictures: files that each stage of IAL leaves for the next."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.augment import normalise
from common.bars import tqdm
from common.colors import colorize, palette
from common.flags import InputError, LoneError
from common.layouts import Data, shortened
from common.loaders import Draws, batch_loader, draws_loader, of_one_size, read_pair
from common.losses import VOID
from common.metrics import confusion_matrix, mean_iou
from common.outputs import explained
from common.panels import CELL, MARK, picture_name, sheet
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

    def truth(self, index: int) -> Tensor:
        """A picture's mask (H, W), void throughout where it has none."""
        return read_pair(self.pairs[index], self.data.lookup)[1]

    def write_batch(self, kind: str, indices: list[int], values: Tensor) -> None:
        """`write` for a batch of pictures, whose files are compressed in threads."""
        values = values.cpu()  # once
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self.write, kind), indices, values))

    def write(self, kind: str, index: int, value: Tensor) -> None:
        """Replace a picture's map of a kind: int64 labels (H, W) or probabilities (C, h, w)."""
        path, value = self.folder / kind / self.names[index], value.cpu().numpy()
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if value.dtype.kind == "f":
                np.save(f"{path}.npy", value[self.possible[index].numpy()].astype(np.float16))
                return
            if value.max() >= 2**16:
                raise LoneError(f"{path}: over 65,536 superpixels; take a larger --segment-size")
            image = Image.fromarray(value.astype(np.uint8 if value.max() < 256 else np.uint16))
            if image.mode == "L":  # colours for who looks at it; what is stored are the indices
                image.putpalette(palette(self.data.colors).tobytes())
            # The fastest level: files up to half as large again, in about half the time.
            image.save(f"{path}.png", compress_level=1)

    def read(self, kind: str, index: int) -> Tensor:
        """A picture's map, int64 or float32. Raises LoneError where it is lost or damaged."""
        path = self.folder / kind / self.names[index]
        try:
            if Path(f"{path}.png").is_file():
                with Image.open(f"{path}.png", formats=["PNG"]) as png:
                    labels = torch.from_numpy(np.array(png, np.int64))
                if labels.ndim != 2:
                    raise ValueError("no indices")
                return labels
            if not Path(f"{path}.npy").is_file():  # a pipe would be waited for
                raise OSError("no such file")
            # Mapped, for a damaged header may name any size: then the file is too short.
            stored = torch.from_numpy(np.load(f"{path}.npy", mmap_mode="r").astype(np.float32))
            probs = stored.new_zeros(self.num_classes, *stored.shape[1:])
            probs[self.possible[index]] = stored
            return probs
        except Exception as error:  # Pillow and numpy raise a dozen kinds
            reason = " ".join(str(error).split())
            raise LoneError(f"{path}: lost or damaged ({reason}); start the run afresh") from error

    def draw(self, index: int, kinds: Sequence[str]) -> list[Tensor]:
        """A picture's maps of these kinds; also "image", its "tags", and its mask, the "truth"."""
        other = dict(image=self.image, tags=self.tags.__getitem__, truth=self.truth)
        parts = [other[kind](index) if kind in other else self.read(kind, index) for kind in kinds]
        cells = {part.shape[-2:] for part in parts if part.is_floating_point()}
        sizes = {p.shape[-2:] for p in parts if p.ndim > 1 and not p.is_floating_point()}
        cells |= {torch.Size(-(-side // self.stride) for side in size) for size in sizes}
        if len(sizes) > 1 or len(cells) > 1:
            raise LoneError(
                f"{self.pairs[index][0]}: has another size than its files in {self.folder}; start "
                "the run afresh"
            )
        return parts

    @cached_property
    def count(self) -> int:
        """S: more than any superpixel's id in any picture."""
        return 1 + max(largest for _, largest in self._superpixels)

    @cached_property
    def _superpixels(self) -> list[tuple[torch.Size, int]]:
        """A picture's height and width, and the largest id of its superpixels."""
        every = (self.read("superpixels", index) for index in range(len(self.names)))
        return [(segments.shape, int(segments.max())) for segments in every]

    def loader(self, run: Run, steps: range, view: Callable, *kinds: str) -> DataLoader:
        """--accum batches a step, of those left: view(picture, its maps) of random pictures."""
        batch_size, seed = run.cfg.batch_size, (run.cfg.seed, 2, steps.start)
        read = partial(self.draw, kinds=("image", *kinds))
        draws = Draws(range(len(self.names)), read, view, seed, batch_size * run.world)
        begin = max(run.first, steps.start) - steps.start  # of a stage that was resumed
        batches = range(begin * run.cfg.accum, len(steps) * run.cfg.accum)
        run.draws["labeled"], run.begins["labeled"] = draws, steps.start
        return draws_loader(draws, batch_size, batches, **run.loading)

    def share(self, run: Run, title: str = "") -> Iterable[int]:
        """This process's share of the pictures; with a title there is a bar."""
        indices = range(run.rank, len(self.names), run.world)
        return bar(run, indices, title, len(indices)) if title else indices

    def each(self, run: Run, *kinds: str) -> Iterator[tuple[list[int], Tensor, ...]]:
        """This process's share of the pictures, then a wait for the other processes.

        Batches of one size: their indices, the pictures (B, 3, H', W'), normalised and padded to
        multiples of the stride, their tags (B, K), and their maps of these kinds. All superpixels,
        which tell the sizes, must be there.
        """
        batches = self._read_ahead(run, self.share(run), "image", "tags", *kinds)
        for indices, images, *others in batches:
            yield indices, normalise(pad(images, self.stride).float() / 255), *others
        run.barrier()

    def _read_ahead(
        self, run: Run, indices: Iterable[int], *kinds: str
    ) -> Iterator[tuple[list[int], Tensor, ...]]:
        """Batches of one size: indices, and what `draw` gives, on the device, by loaders."""
        sizes = {index: self._superpixels[index][0] for index in indices}
        batches = of_one_size(sizes, run.pixels)
        workers = run.cfg.workers if batches else 0
        loader = batch_loader(Stored(self, kinds), batches, workers, run.loading["pin_memory"])
        draws = zip(batches, loader, strict=True)
        for batch, tensors in bar(run, draws, "all pictures", len(batches)):
            yield batch, *(tensor.to(run.device, non_blocking=True) for tensor in tensors)

    def tell_absent(self, run: Run, kind: str, cure: str) -> None:
        """Print which classes no map of a kind shows: what learns from them never learns these."""
        counts = torch.zeros(1, 256, dtype=torch.int64, device=run.device)
        for _, labels in self._read_ahead(run, self.share(run), kind):
            counts += labels.flatten().bincount(minlength=256)
        counts = run.gather(counts).sum(dim=0)[: self.num_classes].tolist()
        absent = [name for name, n in zip(self.data.classes, counts, strict=True) if not n]
        if absent:
            run.print(f"{kind}: no pixel of {shortened(absent, 20)}; {cure}")

    def quality(self, run: Run, name: str, kind: str) -> dict[str, float]:
        """How the labels of a kind, 255 unknown, compare with the masks; NaN without masks.

        `name` is the mIoU where labels are known. Precision: the share of pixels given to
        foreground (fg), to background (bg), that are right; coverage: of their true pixels the
        share that is labelled; area: of pixels that are labelled, those given to foreground for
        each that is true foreground.
        """
        (counts,) = self._confusions(run, kind, lambda stored, size: [self.labels(stored, size)])
        known, total = counts[:, :-1], counts.sum(dim=1)  # (C, C), (C,)
        hits = known.diagonal()
        return {
            name: mean_iou(known),
            f"{name}_fg_precision": (hits[1:].sum() / known[:, 1:].sum()).item(),
            f"{name}_bg_precision": (hits[0] / known[:, 0].sum()).item(),
            f"{name}_fg_coverage": (known[1:].sum() / total[1:].sum()).item(),
            f"{name}_bg_coverage": (known[0].sum() / total[0]).item(),
            f"{name}_fg_area": (known[:, 1:].sum() / known[1:].sum()).item(),
        }

    def best_threshold(self, run: Run, kind: str, levels: Sequence[float] = LEVELS) -> float:
        """The mIoU of activation maps at the level for background that the masks choose, or NaN."""

        def cut(cams: Tensor, size: Sequence[int]) -> list[Tensor]:
            cams = at_pixels(cams[:, 1:], self.stride)[..., : size[0], : size[1]]
            score, best = cams.max(dim=1)  # (B, H, W) each
            return [torch.where(score > level, best + 1, 0) for level in levels]

        return max(mean_iou(c[:, :-1]) for c in self._confusions(run, kind, cut, len(levels)))

    def labels(self, stored: Tensor, size: Sequence[int]) -> Tensor:
        """The labels (B, H, W) of a batch of maps; of probabilities, those of the likeliest."""
        if stored.ndim == 3:
            return stored
        return at_pixels(stored, self.stride)[..., : size[0], : size[1]].argmax(dim=1)

    def _confusions(self, run: Run, kind: str, labels_of: Callable, count: int = 1) -> Tensor:
        """Pixels (count, C, C + 1) in `count` labellings: rows truth, the last column unknown."""
        classes = self.num_classes + 1
        counts = torch.zeros(count, classes, classes, dtype=torch.int64, device=run.device)
        known = (index for index in self.share(run) if self.pairs[index][1] is not None)
        for _, stored, truth in self._read_ahead(run, known, kind, "truth"):
            labellings = labels_of(stored, truth.shape[1:])
            for confusion, labels in zip(counts, labellings, strict=True):
                labels = labels.masked_fill(labels == VOID, classes - 1)
                confusion += confusion_matrix(labels, truth, classes)
        return run.gather(counts[None]).sum(dim=0)[:, :-1].cpu().double()

    def panels(self, path: Path, kinds: Sequence[str], rows: int = 6) -> None:
        """Write one PNG of some pictures, those of `kinds` that were made, and their masks."""
        kinds = [kind for kind in kinds if (self.folder / kind).is_dir()]
        strips, notes, masked = [], [], any(mask for _, mask in self.pairs)
        for index in sorted({round(i) for i in np.linspace(0, len(self.names) - 1, rows)}):
            image, ids = self.image(index), self.read("superpixels", index)
            heat = (255 * self.read("cam", index).amax(dim=0)).byte().expand(3, -1, -1)
            sums = torch.zeros(3, self.count).index_add(1, ids.flatten(), image.flatten(1).float())
            regions = (sums / ids.flatten().bincount(minlength=self.count))[:, ids].byte()
            row = [cell.permute(1, 2, 0).numpy() for cell in (image, heat, regions)]
            fine = max(CELL // ids.shape[1], 1)  # thin borders on small pictures, too
            large, row[2] = (x.repeat(fine, 0).repeat(fine, 1) for x in (ids.numpy(), row[2]))
            row[2][:-1][large[:-1] != large[1:]] = MARK
            row[2][:, :-1][large[:, :-1] != large[:, 1:]] = MARK
            labels = [self.labels(self.read(k, index)[None], ids.shape)[0] for k in kinds]
            labels += [self.truth(index)] * masked
            row += [colorize(label.byte().numpy(), self.data.colors) for label in labels]
            strips.append(row)
            notes.append(picture_name(self.data, self.pairs[index][0]))
        titles = ["image", "activation", "superpixels", *kinds, *["truth"] * masked]
        sheet(path, titles, strips, notes, self.data)


class Stored(Dataset):
    """Pictures with their maps of some kinds, by index."""

    def __init__(self, maps: Maps, kinds: Sequence[str]):
        self.maps, self.kinds = maps, kinds

    def __getitem__(self, index: int) -> list[Tensor]:
        try:
            return self.maps.draw(index, self.kinds)
        except InputError as error:  # a picture that is there no more
            raise LoneError(error) from error


def bar(run: Run, items: Iterable, title: str, total: int) -> Iterable:
    """The items, with a bar on a terminal or in a notebook."""
    return tqdm(items, title, total, leave=False, disable=run.rank > 0 or None)


# --- pixels and cells ---


def pad(maps: Tensor, stride: int) -> Tensor:
    """(..., H, W) with the last row and column repeated up to multiples of the stride."""
    if all(side % stride == 0 for side in maps.shape[-2:]):
        return maps
    rows, columns = (
        torch.arange(-(-side // stride) * stride).clamp(max=side - 1) for side in maps.shape[-2:]
    )
    return maps[..., rows, :][..., columns]


def at_pixels(cells: Tensor, stride: int) -> Tensor:
    """Maps (B, C, h, w) -> (B, C, stride h, stride w), bilinear."""
    return F.interpolate(cells, scale_factor=stride, mode="bilinear", align_corners=False)
