"""Batches, and the sampler and loader that produce them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.keyed_rng import copied_to, hash32

CHUNK = 128  # images that are in memory at once when a whole split is read


class Batch(NamedTuple):
    """Batch of images.

    Attributes:
        images: uint8 [N, 3, H, W].
        targets: Labels, int64 [N], or class probabilities, float32 [N, K], after mixing.
        indices: Index of each image in its source, int64 [N], on the CPU.
        features: Cached features of a frozen backbone, float [N, ...], or from a loader [N, V, ...] of V views.
        boxes: Top, left, height and width in whole pixels, float32 [N, 4], of the part that the network sees.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    features: Tensor | None = None
    boxes: Tensor | None = None


class ImageStore(Protocol):
    """Images that are read when they are needed, in the workers of a loader if an attribute ``slow`` is true."""

    @property
    def shape(self) -> Sequence[int]:
        """Return (M, 3, H, W)."""

    def take(self, rows: Tensor) -> Tensor:
        """Return the images in these rows (int64 [n]) as uint8 [n, 3, H, W] on the CPU."""


class ImageSet(NamedTuple):
    """Images, uint8 [N, 3, H, W], their labels, int64 [N], and their paths relative to ``root`` if they are files."""

    images: Tensor | ImageStore
    labels: Tensor
    paths: Sequence[str] | None = None


class Split(Dataset[Batch]):
    """Images of one split, indexed by a whole batch at once.

    Args:
        images: Images, uint8 [M, 3, H, W], of which the split refers to N.
        labels: Label of each image of the split, int64 [N].
        indices: Index of each in the source, int64 [N], ascending; 0 to N - 1 by default.
        features: Cached features of V views of the images, float [N, V, ...].
        paths: Paths of the image files relative to ``data.root``, None for each image that is not a file.
        rows: Row of each in ``images``, int64 [N]; 0 to N - 1 by default.
    """

    def __init__(
        self,
        images: Tensor | ImageStore,
        labels: Tensor,
        indices: Tensor | None = None,
        features: Tensor | None = None,
        paths: Sequence[str | None] | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.store, self.labels, self.features = images, labels, features
        self.paths = (None,) * len(labels) if paths is None else tuple(paths)
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
        self.shape, self.slow = (len(labels), *images.shape[1:]), getattr(images, "slow", False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Tensor) -> Batch:
        # Indexing with brackets copies byte by byte: 400 us for 128 images instead of 15.
        indices, positions = self.indices.index_select(0, positions), copied_to(self.labels.device, positions)
        labels = self.labels.index_select(0, positions)
        features = None if self.features is None else self.features.index_select(0, positions)
        return Batch(self.take(positions), labels, indices, features)

    def take(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` (int64 [n]) as uint8 [n, 3, H, W]."""
        rows = self.rows.index_select(0, positions.to(self.rows.device))
        return self.store.index_select(0, rows) if isinstance(self.store, Tensor) else self.store.take(rows)

    def image(self, position: int) -> Tensor:
        """Return the image at ``position`` as uint8 [3, H, W]."""
        return self.take(torch.tensor([position]))[0]

    def chunks(self) -> Iterator[Tensor]:
        """Yield all images in order, ``CHUNK`` at a time."""
        return map(self.take, torch.split(torch.arange(len(self)), CHUNK))

    @property
    def images(self) -> Tensor:
        """All images as one tensor, uint8 [N, 3, H, W]; for few of them only."""
        return self.take(torch.arange(len(self)))

    def to(self, device: torch.device) -> Split:
        """Return the split with copies of its images, labels and features on ``device``."""
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        for target, chunk in zip(torch.split(images, CHUNK), self.chunks(), strict=True):
            target.copy_(chunk)
        features = None if self.features is None else self.features.to(device)
        return Split(images, self.labels.to(device), self.indices, features, self.paths)

    def subset(self, positions: Tensor) -> Split:
        """Return the images at ``positions`` (int64 [n]), with the same indices."""
        paths = [self.paths[position] for position in positions.tolist()]
        return Split(self.store, self.labels[positions], self.indices[positions], None, paths, self.rows[positions])

    def positions_of(self, indices: Tensor) -> Tensor:
        """Return the positions of the images with these indices (int64 [n])."""
        return torch.searchsorted(self.indices, indices)

    def by_index(self, indices: Tensor) -> Tensor:
        """Return the images with these indices (int64 [n]) as uint8 [n, 3, H, W]."""
        return self.take(self.positions_of(indices))

    def paths_of(self, indices: Tensor) -> list[str | None]:
        """Return the paths of the images with these indices (int64 [n])."""
        return [self.paths[position] for position in self.positions_of(indices).tolist()]


class BatchSampler(Sampler[Tensor]):
    """Sampler of whole batches that yields the positions of this process's images (int64 [n]) for each step.

    The order of an epoch is a function of (seed, epoch). Rank r takes every ``world_size``-th position of a global
    batch, so that the global batches are the same for any number of processes.

    Training (``shuffle=True``) uses a new order in each epoch and full batches only. Evaluation visits every image
    exactly once, without padding; all ranks yield the same number of batches, and the last one may be empty. It is in
    order, or in a random order that is the same in each epoch (``mixed=True``).

    ``draw`` returns a random order, given the number of images and a generator.
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
        draw: Callable[..., Tensor] = torch.randperm,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} cannot be divided over {world_size} processes")
        self.num_images, self.batch_size, self.shuffle, self.seed = num_images, batch_size, shuffle, seed
        self.rank, self.world_size, self.mixed, self.draw = rank, world_size, mixed, draw
        self.epoch = 0
        self._position = {"epoch": 0, "batches_done": 0}
        self._resuming = False

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest > 0 and not self.shuffle)

    def __iter__(self) -> Iterator[Tensor]:
        # As a generator, this runs at the first batch, after Lightning called set_epoch.
        if self.shuffle or self.mixed:
            generator = torch.Generator().manual_seed(int(hash32(self.seed, self.epoch if self.shuffle else 0)))
            order = self.draw(self.num_images, generator=generator)
        else:
            order = torch.arange(self.num_images)
        start = self._position["batches_done"] if self._resuming and self._position["epoch"] == self.epoch else 0
        self.start, self._resuming = start, False
        for step in range(start, len(self)):
            self.set_position(step + 1)
            yield order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def set_position(self, batches_done: int) -> None:
        """Set the number of batches of this epoch that a resumed run skips."""
        self._position = {"epoch": self.epoch, "batches_done": batches_done}

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were yielded."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume inside an epoch, if that epoch is iterated next."""
        self._position = dict(state)
        self._resuming = True


class BatchLoader(DataLoader[Batch]):
    """DataLoader that fetches a whole batch by one index operation and can be resumed inside an epoch.

    There are no workers, because indexing is faster than sending the result to another process. Slow images have one
    worker per thread of this process (by default, the cores divided by the processes).

    Attributes:
        requested_at: Time when the latest batch was requested.
        is_of_datamodule: Whether a data module is to augment the batches.
        limit: Maximum number of batches of an epoch.
    """

    sampler: BatchSampler
    is_of_datamodule, limit = False, sys.maxsize

    def __init__(self, dataset: Dataset[Batch], sampler: BatchSampler, *, pin_memory: bool = False) -> None:
        num_workers = torch.get_num_threads() if getattr(dataset, "slow", False) else 0
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,  # the items of the sampler are batches already
            pin_memory=pin_memory,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_group,
        )
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def __len__(self) -> int:
        return min(super().__len__(), self.limit)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.requested_at = time.perf_counter()
        try:
            for count, batch in enumerate(super().__iter__(), 1):
                self.sampler.set_position(self.sampler.start + count)  # workers read the sampler ahead
                yield batch
                self.requested_at = time.perf_counter()
        except UserError as error:  # of a worker, with its traceback in the message
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[-1].strip()) from None


def leave_group(worker: int) -> None:
    """Keep Ctrl-C from ending a worker: the run stops after its step, or after validation."""
    os.setpgrp()
    if sys.platform == "linux":  # it inherits the lock of the run folder, which would outlive a killed run
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
