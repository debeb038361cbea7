"""The data of a run: splits, loaders, and the augmentation that a batch gets on its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from cifar10_tl.config.errors import UserError, known_arguments
from cifar10_tl.data.augment import Augment, augment, choose_view
from cifar10_tl.data.batch import Batch, BatchLoader, BatchSampler, Split
from cifar10_tl.data.feature_cache import FeatureCache
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.data.sources import SOURCES


class CIFAR10DataModule(pl.LightningDataModule):
    """CIFAR-10, or a data set in its place, as Lightning wants it.

    The test images are never used to choose anything: validation images are split off the training images, as many
    of each class, by ``split_seed``.

    Args:
        source: "cifar10", "folder" or "shapes".
        batch_size: images a step over all processes together.
        val_size: training images held out for validation, a number or (float) a share; unused where the source has a
            "val" of its own.
        split_seed: which ones.
        image_limit: at most so many images in each of train, val and test (after the split), classes in proportion.
        augment: arguments of :class:`~cifar10_tl.data.augment.Augment`, for training images only.
        on_device: keep the images in the accelerator's memory, so that no step waits for a copy (N * 3 * H * W bytes).
        seed: of the order and the augmentation.
        **source_options: arguments of the source, such as ``root``; see :mod:`cifar10_tl.data.sources`.

    Attributes:
        splits: "train", "val" and "test", from :meth:`setup` on.
        feature_cache: where set, batches bring the features of their images.

    Raises:
        UserError: the source finds a fault with its options, or (later) the batch or val_size does not fit the data.
    """

    def __init__(
        self,
        source: str = "cifar10",
        batch_size: int = 128,
        val_size: float = 5000,
        split_seed: int = 0,
        image_limit: int | None = None,
        augment: Mapping[str, Any] | None = None,
        on_device: bool = False,
        seed: int = 0,
        **source_options: Any,
    ) -> None:
        super().__init__()
        self.augment = Augment(**known_arguments(Augment, augment or {}, "data.augment"))
        self.save_hyperparameters({**self._plain(locals()), "augment": asdict(self.augment)}, logger=False)
        if source not in SOURCES:
            raise UserError(f"data.source={source}: there are {', '.join(SOURCES)}")
        self.source = SOURCES[source](**known_arguments(SOURCES[source], source_options, "data"))
        self.class_names = self.source.class_names
        self.splits: dict[str, Split] = {}
        self.feature_cache: FeatureCache | None = None

    @staticmethod
    def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
        names = ("source", "batch_size", "val_size", "split_seed", "image_limit", "on_device", "seed")
        return {**{n: arguments[n] for n in names}, **arguments["source_options"]}

    # ------------------------------------------------------------------------------------------------------- set-up

    def prepare_data(self) -> None:
        """Download or decode; Lightning calls this in one process a machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load all splits; the second call finds them there."""
        if self.splits:
            return
        splits = {name: Split(*image_set) for name, image_set in self.source.load().items()}
        if "val" not in splits:
            splits["train"], splits["val"] = self._split(splits["train"])
        self.splits = {name: self._limited(split) for name, split in splits.items()}

    def _split(self, train: Split) -> tuple[Split, Split]:
        size, classes = self.hparams["val_size"], len(self.class_names)
        if isinstance(size, float):
            size = max(classes, round(size * len(train)))
        if len(train) < 2 * classes:
            raise UserError(f"{len(train)} training images of {classes} classes: too few to train and validate with")
        if not classes <= size <= len(train) - classes:
            raise UserError(
                f"data.val_size={self.hparams['val_size']} of {len(train)} training images: "
                f"choose {classes} to {len(train) - classes}"
            )
        held_out = stratified(train.labels, size, self.hparams["split_seed"])
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[held_out] = False
        return train.subset(rest.nonzero().flatten()), train.subset(held_out)

    def _limited(self, split: Split) -> Split:
        limit = self.hparams["image_limit"]
        if limit is None or limit >= len(split):
            return split
        return split.subset(stratified(split.labels, limit, self.hparams["split_seed"]))

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> BatchLoader:
        """Shuffled full batches; one smaller batch where there are fewer training images than ``batch_size``."""
        split, world_size = self.splits["train"], self._world_size
        if len(split) < world_size:
            raise UserError(f"{len(split)} training images cannot be shared by {world_size} processes")
        batch_size = min(self.hparams["batch_size"], len(split) - len(split) % world_size)
        return self._loader("train", batch_size, shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        """Every validation image once, in order."""
        return self._loader("val", self.hparams["batch_size"], shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        """Every test image once, in order."""
        return self._loader("test", self.hparams["batch_size"], shuffle=False)

    def _loader(self, name: str, batch_size: int, *, shuffle: bool) -> BatchLoader:
        split = self._with_features(name)
        rank = self.trainer.global_rank if self.trainer else 0
        order = BatchSampler(
            len(split),
            batch_size,
            shuffle=shuffle,
            seed=self.hparams["seed"],
            rank=rank,
            world_size=self._world_size,
        )
        if self.hparams["on_device"]:
            return BatchLoader(split.to(self._device), order)
        return BatchLoader(split, order, pin_memory=self._device.type == "cuda")

    def _with_features(self, name: str) -> Split:
        split = self.splits[name]
        if self.feature_cache is None:
            return split
        mirrored = name == "train" and self.augment.horizontal_flip
        views = self.feature_cache.views(name, split.images, mirrored=mirrored)
        return Split(split.images, split.labels, split.indices, views)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    # ------------------------------------------------------------------------------------------------- augmentation

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch, on the device where it now lies."""
        if self.trainer is not None and self.trainer.training:
            return self.augmented(batch, self.trainer.current_epoch)
        return batch if batch.features is None else batch._replace(features=batch.features[:, 0])

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """``batch`` as the network sees it in this epoch."""
        if batch.features is not None:
            return choose_view(batch, flip=self.augment.horizontal_flip, seed=self.hparams["seed"], epoch=epoch)
        return augment(batch, self.augment, seed=self.hparams["seed"], epoch=epoch, num_classes=len(self.class_names))


def stratified(labels: Tensor, size: int, seed: int) -> Tensor:
    """Places of ``size`` of the ``labels`` (int64 [N]), each class in proportion, chosen by ``seed``; sorted.

    What does not divide evenly goes to the classes with the largest remainders, the first classes first.
    """
    counts = torch.bincount(labels)
    quota = counts * size / len(labels)
    take = quota.floor().long()
    for label in (take - quota).argsort(stable=True)[: size - int(take.sum())].tolist():
        take[label] += 1
    generator = torch.Generator().manual_seed(int(hash32(seed, 0x5711)))
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = [shuffled[labels[shuffled] == label][:n] for label, n in enumerate(take.tolist())]
    return torch.cat(chosen).sort().values
