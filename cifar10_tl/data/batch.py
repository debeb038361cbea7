"""Batches, and the sampler and loader that produce them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar10_tl.data.keyed_rng import hash32


class Batch(NamedTuple):
    """Batch of images.

    Attributes:
        images: uint8 [N, 3, H, W].
        targets: Labels, int64 [N], or class probabilities, float32 [N, K], after mixing.
        indices: Index of each image in its source, int64 [N].
        features: Cached features of a frozen backbone, float [N, ...], or [N, V, ...] with V views from a loader.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    features: Tensor | None = None


class Split(Dataset[Batch]):
    """Images of one split in memory, indexed by a whole batch at once.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].
        indices: Index of each image in its source, int64 [N]; 0 to N - 1 by default.
        views: Cached features of each view of the images, [N, ...] each.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, views: Sequence[Tensor] = ()
    ) -> None:
        self.images, self.labels, self.views = images, labels, views
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Tensor) -> Batch:
        positions = positions.to(self.images.device, non_blocking=True)
        # Indexing with brackets copies byte by byte: 400 us for 128 images instead of 15.
        images, labels, indices, *views = (
            tensor.index_select(0, positions) for tensor in (self.images, self.labels, self.indices, *self.views)
        )
        return Batch(images, labels, indices, torch.stack(views, 1) if views else None)

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on ``device``."""
        views = [view.to(device) for view in self.views]
        return Split(self.images.to(device), self.labels.to(device), self.indices.to(device), views)

    def subset(self, positions: Tensor) -> Split:
        """Return the images at ``positions`` (int64 [n]), with the same indices."""
        return Split(self.images[positions], self.labels[positions], self.indices[positions])

    def by_index(self, indices: Tensor) -> Tensor:
        """Return the images with these indices (int64 [n]) as uint8 [n, 3, H, W]."""
        return self.images[torch.searchsorted(self.indices, indices)]


class BatchSampler(Sampler[Tensor]):
    """Sampler of whole batches that yields the positions of this process's images (int64 [n]) for each step.

    The order of an epoch is a function of (seed, epoch). Rank r takes every ``world_size``-th position of a global
    batch, so that the global batches are the same for any number of processes.

    Training (``shuffle=True``) uses a new order in each epoch and full batches only. Evaluation visits every image
    exactly once, without padding; all ranks yield the same number of batches, and the last one may be empty.

    Args:
        num_images: Number of images in the split.
        batch_size: Number of images per global batch.
        shuffle: Shuffle in each epoch and drop the last incomplete batch.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
        mixed: Evaluate in a random order that is the same in each epoch, for evaluation of the first batches only.
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
        mixed: bool = False,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} cannot be divided over {world_size} processes")
        self.num_images, self.batch_size, self.shuffle, self.seed = num_images, batch_size, shuffle, seed
        self.rank, self.world_size, self.mixed = rank, world_size, mixed
        self.epoch = 0
        self._position = {"epoch": 0, "batches_done": 0}
        self._resume_from: dict[str, int] | None = None

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest > 0 and not self.shuffle)

    def __iter__(self) -> Iterator[Tensor]:
        # As a generator, this runs at the first batch, after Lightning called set_epoch.
        order = self.order()
        resume_from, self._resume_from = self._resume_from, None
        start = resume_from["batches_done"] if resume_from and resume_from["epoch"] == self.epoch else 0
        for step in range(start, len(self)):
            self._position = {"epoch": self.epoch, "batches_done": step + 1}
            yield order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]

    def order(self) -> Tensor:
        """Return the positions of all images in the order of this epoch, int64 [num_images]."""
        if not self.shuffle and not self.mixed:
            return torch.arange(self.num_images)
        generator = torch.Generator().manual_seed(int(hash32(self.seed, self.epoch if self.shuffle else 0)))
        return torch.randperm(self.num_images, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were yielded."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume inside an epoch, if that epoch is iterated next."""
        self._position = dict(state)
        self._resume_from = dict(state)


class BatchLoader(DataLoader[Batch]):
    """DataLoader that fetches a whole batch by one index operation and can be resumed inside an epoch.

    There are no workers, because indexing takes less time than sending the result to another process.

    Args:
        dataset: Split to load.
        sampler: Sampler of whole batches.
        pin_memory: Copy batches to pinned memory.
    """

    sampler: BatchSampler

    def __init__(self, dataset: Dataset[Batch], sampler: BatchSampler, *, pin_memory: bool = False) -> None:
        # batch_size=None: the items of the sampler are batches already.
        super().__init__(dataset, sampler=sampler, batch_size=None, collate_fn=_identity, pin_memory=pin_memory)

    def state_dict(self) -> dict[str, int]:
        """Return the state of the sampler."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state of the sampler."""
        self.sampler.load_state_dict(state)


def _identity(batch: Any) -> Any:
    return batch
