"""Loaders whose batches depend on seed and step alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.flags import InputError, LoneError
from common.layouts import Data, Pair, read_header, read_image, read_mask
from common.losses import VOID
from common.signals import outlive_signals

View = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (3, H, W) uint8, (H, W) -> one draw


class Draws(Dataset):
    """An endless random stream over a list of pictures: item d is draw d of the run.

    `read(item)` gives a picture's tensors, `view(*tensors)` one random draw of them. Draws run
    through all pictures in a new order each epoch. Within a global batch no picture comes twice,
    as long as the list is no shorter than the batch.

    spare: an item that cannot be read is marked in `broken` (N,), in the memory of all loader
    processes, and gives way to another one; otherwise it is a LoneError.
    """

    def __init__(
        self,
        items: Sequence,
        read: Callable,
        view: View,
        seed: Sequence[int],
        batch: int,
        spare: bool = False,
    ):
        self.items, self.read, self.view, self.seed = items, read, view, list(seed)
        self.batch = batch
        self.broken = torch.zeros(len(items), dtype=torch.bool).share_memory_() if spare else None
        # Like `drop_last`: what does not fill a batch is left to the next order.
        self.epoch = len(items) // batch * batch or len(items)
        self.order = None, None  # of an epoch: its number and a permutation of the pictures

    def index(self, draw: int) -> int:
        """Which item a draw takes."""
        epoch, position = divmod(draw, self.epoch)
        if self.order[0] != epoch:
            rng = np.random.default_rng([*self.seed, 0, epoch])
            self.order = epoch, rng.permutation(len(self.items))
        return int(self.order[1][position])

    def choices(self, draw: int) -> Iterator[int]:
        """A draw's item, and what to take instead: items that the global batch has not."""
        batch, place = divmod(draw, self.batch)
        index = self.index(draw)
        yield index
        taken = {self.index(batch * self.batch + position) for position in range(self.batch)}
        order = np.random.default_rng([*self.seed, 2, batch]).permutation(len(self.items)).tolist()
        free = [item for item in order if item not in taken] or [i for i in order if i != index]
        # The first choices of a batch's draws differ. Where so many fail, the disk is gone.
        yield from (free[place :: self.batch] + free)[:100]

    def tensors(self, draw: int) -> tuple[Tensor, ...]:
        """What `read` gives of the first of the choices that can be read."""
        first = None
        for index in self.choices(draw):
            try:
                return self.read(self.items[index])
            except InputError as error:
                if self.broken is None:
                    raise LoneError(error) from error
                self.broken[index] = True
                first = first or error
        raise LoneError(f"{first}, and so with all that were tried instead") from first

    def __getitem__(self, draw: int) -> tuple[Tensor, ...]:
        tensors = self.tensors(draw)
        seed = np.random.SeedSequence([*self.seed, 1, draw]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs as well.
            torch.default_generator.manual_seed(int(seed))
            return self.view(*tensors)


class Pictures(Dataset):
    """A list of pictures in order, each as the view shows it."""

    def __init__(self, pairs: Sequence[Pair], lookup: np.ndarray, view: View):
        self.pairs, self.lookup, self.view = pairs, lookup, view

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.view(*read_pair(self.pairs[index], self.lookup))


def read_pair(pair: Pair, lookup: np.ndarray) -> tuple[Tensor, Tensor]:
    """Picture (3, H, W) uint8 and label (H, W) uint8 in class indices.

    An unlabelled picture's label is void throughout; no file is opened for it.
    """
    image = torch.from_numpy(read_image(pair[0])).permute(2, 0, 1)
    if pair[1] is None:
        return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)
    return image, torch.from_numpy(lookup[read_mask(pair[1])])


def training_loader(
    data: Data,
    split: str,
    view: View,
    batch_size: int,
    numbers: range,
    seed: int = 0,
    world: int = 1,
    **loading: int,
) -> DataLoader:
    """The batches of views of these numbers; split is "labeled" or "unlabeled".

    What a batch holds depends on seed, number and the position in the global batch of
    world x batch_size pictures alone: not on the number of workers or processes, nor on where
    `numbers` begin, so that a resumed run sees what an uninterrupted one sees. loading: rank,
    workers, pin_memory.
    """
    read = partial(read_pair, lookup=data.lookup)
    spare = split == "unlabeled"  # not decoded before they are drawn; a broken one is skipped
    draws = Draws(getattr(data, split), read, view, (seed, int(spare)), batch_size * world, spare)
    return draws_loader(draws, batch_size, numbers, world=world, **loading)


def draws_loader(
    draws: Draws, batch_size: int, numbers: range, rank: int = 0, world: int = 1, **loading: int
) -> DataLoader:
    """This process's share of the draws, in the batches of these numbers."""
    starts = [(number * world + rank) * batch_size for number in numbers]
    batches = [range(start, start + batch_size) for start in starts]
    return batch_loader(draws, batches, **loading)


def val_loader(
    data: Data, view: View, rank: int = 0, world: int = 1, pixels: int = 2**16, **loading: int
) -> DataLoader:
    """The validation pictures; each process has every world-th, none comes twice.

    Batches are `of_one_size`, of at most `pixels` pixels.
    """
    pairs = data.val[rank::world]
    sizes = {index: read_header(mask) for index, (_, mask) in enumerate(pairs)}
    pictures = Pictures(pairs, data.lookup, view)
    return batch_loader(pictures, of_one_size(sizes, pixels), **loading)


def batch_loader(
    dataset: Dataset, batches: Sequence, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """A loader of these batches, each a list of a dataset's indices."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader's own draws leave torch's generator alone
        worker_init_fn=outlive_signals,
    )


def of_one_size(sizes: dict[int, tuple[int, int]], pixels: int) -> list[list[int]]:
    """Batches of pictures of one size, of at most so many pixels, or of a single picture.

    sizes: by a picture's index, its height and width.
    """
    groups, batches = {}, []
    for index, size in sizes.items():
        groups.setdefault(size, []).append(index)
    for (height, width), group in groups.items():
        count = max(pixels // (height * width), 1)
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches
