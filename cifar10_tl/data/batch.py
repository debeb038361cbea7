"""Random changes of training images, a whole uint8 batch at once, on whatever device it lies.

Randomness is keyed, not streamed: what happens to an image is a pure function of (seed, epoch, image index), by an
integer hash. So a run draws the same on one process or many, and after any stop and resume, with no state to save.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar10_tl.data.keyed_rng import hash32


class Batch(NamedTuple):
    """What a step gets.

    Attributes:
        images: uint8 [N, 3, H, W].
        targets: int64 [N] classes, or float32 [N, K] class probabilities where images were mixed.
        indices: int64 [N], the place of each image in its source.
        features: of a frozen backbone, where they are cached: float [N, ...], from a loader [N, V, ...] of V views.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    features: Tensor | None = None


class Split(Dataset[Batch]):
    """Images of one split in memory, fetched a whole batch at once.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].
        indices: int64 [N], the place of each image in its source: its name in augmentation, figures and tables.
        views: of the images' features, where they are cached: tensors [N, ...].
    """

    def __init__(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, views: Sequence[Tensor] = ()
    ) -> None:
        self.images, self.labels, self.views = images, labels, views
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: Tensor) -> Batch:
        places = places.to(self.images.device, non_blocking=True)
        # not images[places], which copies byte by byte: 400 us for 128 images, rather than 15
        images, labels, indices, *views = (
            tensor.index_select(0, places) for tensor in (self.images, self.labels, self.indices, *self.views)
        )
        return Batch(images, labels, indices, torch.stack(views, 1) if views else None)

    def to(self, device: torch.device) -> Split:
        """The split with its tensors on ``device``."""
        views = [view.to(device) for view in self.views]
        return Split(self.images.to(device), self.labels.to(device), self.indices.to(device), views)

    def subset(self, places: Tensor) -> Split:
        """The images at ``places`` (int64 [n]), their indices kept."""
        return Split(self.images[places], self.labels[places], self.indices[places])

    def by_index(self, indices: Tensor) -> Tensor:
        """The images with these ``indices`` (int64 [n], sorted or not): uint8 [n, 3, H, W]."""
        return self.images[torch.searchsorted(self.indices, indices)]


class BatchSampler(Sampler[Tensor]):
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

    Attributes:
        requested_at: Time (``time.perf_counter``) at which the latest batch was asked for.
    """

    def __init__(self, dataset: Dataset[Batch], order: BatchSampler, *, pin_memory: bool = False) -> None:
        super().__init__(dataset, sampler=order, batch_size=None, collate_fn=_as_it_is, pin_memory=pin_memory)
        self.order = order
        self.requested_at = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches."""
        batches = super().__iter__()
        while True:
            self.requested_at = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        """See :meth:`BatchSampler.state_dict`."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See :meth:`BatchSampler.load_state_dict`."""
        self.order.load_state_dict(state)


def _as_it_is(batch: Any) -> Any:
    return batch
