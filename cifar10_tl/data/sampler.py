"""Which images each step gets: one sampler for training and evaluation, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar10_tl.data.augment import Batch, hash32


class BatchOrder(Sampler[Tensor]):
    """Yields, for each step, the places of this process's share of the global batch (int64 [n]).

    The order of an epoch is a pure function of (seed, epoch). Of each global batch, rank r takes every
    ``world_size``-th place from r on, so that the global batch holds the same images for any number of processes.

    Training (``shuffle=True``): a new order each epoch, full batches only; the rest waits for another epoch.
    Evaluation: in order, every image exactly once, nothing padded. All ranks yield equally many batches, so that
    none waits for another, and a rank's last batch may be empty.

    Lightning calls :meth:`set_epoch`. :meth:`state_dict` tells the position, for going on inside an epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} cannot be divided over {world_size} processes")
        self.num_images, self.batch_size, self.shuffle, self.seed = num_images, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._position = {"epoch": 0, "batches_done": 0}
        self._resume_from: dict[str, int] | None = None

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest > 0 and not self.shuffle)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator: nothing here runs before the first batch is asked for, by when the epoch is set.
        order = self.order()
        resume_from, self._resume_from = self._resume_from, None
        start = resume_from["batches_done"] if resume_from and resume_from["epoch"] == self.epoch else 0
        for step in range(start, len(self)):
            self._position = {"epoch": self.epoch, "batches_done": step + 1}
            yield order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]

    def order(self) -> Tensor:
        """The places of all images in this epoch's order, int64 [num_images]."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        generator = torch.Generator().manual_seed(int(hash32(self.seed, self.epoch)))
        return torch.randperm(self.num_images, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and how many of its batches are out."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position, if the epoch it is in comes next; any other epoch starts at its first batch."""
        self._position = dict(state)
        self._resume_from = dict(state)


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that fetches a whole batch by one index operation, and can be resumed inside an epoch.

    ``batch_size=None`` is PyTorch's way to say that the sampler's items are batches already. There are no workers:
    indexing a tensor in memory takes less time than handing the result from one process to another.

    With ``pin_memory`` batches lie where a GPU can fetch them while the processor goes on.
    """

    def __init__(self, dataset: Dataset[Batch], order: BatchOrder, *, pin_memory: bool = False) -> None:
        super().__init__(dataset, sampler=order, batch_size=None, collate_fn=_as_it_is, pin_memory=pin_memory)
        self.order = order

    def state_dict(self) -> dict[str, int]:
        """See :meth:`BatchOrder.state_dict`."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See :meth:`BatchOrder.load_state_dict`."""
        self.order.load_state_dict(state)


def _as_it_is(batch: Any) -> Any:
    return batch
