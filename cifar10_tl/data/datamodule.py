"""DataModule with the splits, loaders and augmentation of a run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar10_tl.config.errors import UserError, known_arguments
from cifar10_tl.data.augment import Augment, augment
from cifar10_tl.data.balance import RepeatedImages, balanced_order, class_weights
from cifar10_tl.data.batch import Batch, BatchLoader, BatchSampler, Split
from cifar10_tl.data.feature_cache import FeatureCache, checksum, tensors_checksum
from cifar10_tl.data.folder import largest
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.data.sources import SOURCES

log = logging.getLogger(__name__)


class CIFAR10DataModule(pl.LightningDataModule):
    """DataModule for CIFAR-10, a folder of images, or the built-in shapes.

    Validation images are held out from the training images, stratified by class, unless the source has a "val" split.

    Args:
        source: "cifar10", "folder" or "shapes".
        batch_size: Images per step over all processes.
        val_size: Number (int) or fraction (float) of training images held out for validation.
        split_seed: Seed of the choice of validation images.
        image_limit: Maximum number of images in each of train, val and test, stratified by class.
        augment: Arguments of :class:`~cifar10_tl.data.augment.Augment`, for training images only.
        balance: "loss" weights imbalanced classes in the loss, "sampler" draws each class equally often per epoch.
        on_device: Keep the images in the memory of the accelerator.
        seed: Seed of the order and the augmentation.
        **source_options: Arguments of the source, such as ``root``; see :mod:`cifar10_tl.data.sources`.
    """

    def __init__(
        self,
        source: str = "cifar10",
        batch_size: int = 128,
        val_size: float = 5000,
        split_seed: int = 0,
        image_limit: int | None = None,
        augment: Mapping[str, Any] | None = None,
        balance: Literal["none", "loss", "sampler"] = "none",
        on_device: bool = False,
        seed: int = 0,
        **source_options: Any,
    ) -> None:
        super().__init__()
        self.augment = Augment(**known_arguments(Augment, augment or {}, "data.augment"))
        augment = asdict(self.augment)  # with the defaults
        self.save_hyperparameters(logger=False)
        if source not in SOURCES:
            raise UserError(
                f"data.source={source}: choose from {', '.join(SOURCES)}, or first import the module that adds it to "
                "SOURCES (on the command line: imports=MODULE)"
            )
        if source == "folder" and self.augment.random_resized_crop:
            # random crops then have as many pixels as the network sees, such as 256 x 256 for 224 x 224
            source_options["image_size"] = math.ceil(8 / 7 * largest(source_options.get("image_size", 224)))
        if source == "cifar10":
            source_options.pop("md5", None)  # of earlier checkpoints
        self.source = SOURCES[source](**known_arguments(SOURCES[source], source_options, "data"))
        side = getattr(self.source, "native_size", 32)
        for key in ("random_crop_padding", "cutout"):
            if (value := getattr(self.augment, key)) >= side:
                raise UserError(f"data.augment.{key}={value}: must be below the image size of {side} pixels")
        self.class_names = self.source.class_names
        self.splits: dict[str, Split] = {}  # "train", "val" and "test", after setup
        self.feature_cache: FeatureCache | None = None  # adds features to the batches

    def prepare_data(self) -> None:
        """Download or decode the images; called in one process per machine."""
        if not self.splits:
            self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load all splits once; log the sizes of a folder's splits unless ``stage`` is "compare"."""
        if self.splits:
            return
        loaded = self.source.load()
        for name, (images, labels, _) in loaded.items():
            _check_types(f"data.source={self.hparams['source']}: {name}", images, labels)
        splits = {name: Split(x.images, x.labels, paths=x.paths) for name, x in loaded.items()}
        if "test" not in splits:
            test_size = getattr(self.source, "test_size", 0.1)
            splits["train"], splits["test"] = self._split(splits["train"], "test_size", test_size)
        if "val" not in splits and "train" in splits:
            splits["train"], splits["val"] = self._split(splits["train"], "val_size", self.hparams["val_size"])
        self.splits = {name: self._limited(split) for name, split in splits.items()}
        if self.hparams["source"] == "folder" and stage != "compare":
            for name in sorted(self.splits, key=("train", "val", "test").index):
                log.info("  %-5s  %s", name, self._describe(self.splits[name].labels))

    def _describe(self, labels: Tensor) -> str:
        counts = torch.bincount(labels, minlength=len(self.class_names))
        fewest, most = (f"{counts[i]:,} ({self.class_names[i]})" for i in (counts.argmin(), counts.argmax()))
        per_class = f"{counts[0]:,}" if (counts == counts[0]).all() else f"{fewest} to {most}"
        return f"{len(labels):,} images of {int((counts > 0).sum())} classes, {per_class} per class"

    def _split(self, train: Split, key: str, given: float) -> tuple[Split, Split]:
        classes = len(self.class_names)
        counts = torch.bincount(train.labels, minlength=classes)
        if single := [name for name, count in zip(self.class_names, counts, strict=True) if count == 1]:
            log.warning("data.%s: the only image of class %s is used for training", key, ", ".join(single))
        size = max(classes, round(given * len(train))) if isinstance(given, float) else given
        available = (counts[train.labels] > 1).nonzero().flatten()
        held_out = torch.zeros(len(train), dtype=torch.bool)
        held_out[available[stratified(train.labels[available], size, self.hparams["split_seed"])]] = True
        counts = torch.bincount(train.labels[~held_out], minlength=classes)
        missing = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if missing or size < classes:
            raise UserError(
                f"data.{key}={given} does not fit {len(train)} training images: choose at least {classes}, but few "
                "enough to leave an image of each class for training"
                + (f" (missing: {', '.join(missing)})" if missing else "")
            )
        return train.subset((~held_out).nonzero().flatten()), train.subset(held_out.nonzero().flatten())

    def _limited(self, split: Split) -> Split:
        limit = self.hparams["image_limit"]
        if limit is None or limit >= len(split):
            return split
        return split.subset(stratified(split.labels, limit, self.hparams["split_seed"]))

    def state_dict(self) -> dict[str, dict[str, str]]:
        """Return checksums of labels, indices and paths in each split, to detect changed data."""
        splits = self.splits.items()
        return {
            "splits": {name: tensors_checksum({"labels": s.labels, "indices": s.indices}) for name, s in splits},
            "paths": {name: checksum(json.dumps(s.paths).encode(), ()) for name, s in splits},
        }

    def changed_splits(self, state_dict: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Return the names of the splits that differ from an earlier :meth:`state_dict`, in what that contains."""
        pairs = [(state_dict.get(key, {}), now) for key, now in self.state_dict().items()]
        names = ("train", "val", "test")
        return [name for name in names if any(old.get(name, now.get(name)) != now.get(name) for old, now in pairs)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the splits with those of the checkpoint when a training run is resumed."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if changed := self.changed_splits(state_dict):
            raise UserError(
                f"the data has changed since the checkpoint was written ({', '.join(changed)}): restore it, or start a "
                "new run with init_from=CHECKPOINT"
            )

    def class_weights(self) -> Tensor | None:
        """Return the weight of each class in the loss, float32 [K]; None unless ``balance`` is "loss"."""
        if self.hparams["balance"] != "loss":
            return None
        return class_weights(self.splits["train"].labels, len(self.class_names))

    def train_dataloader(self) -> BatchLoader:
        """Return a loader of shuffled full batches, or of one smaller batch if there are too few images."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader:
        """Return a loader that yields every validation image once, in order unless ``limit_val_batches`` is set."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Return a loader that yields every test image once, in order unless ``limit_test_batches`` is set."""
        return self._loader("test")

    def with_features(self, name: str) -> Split:
        """Return a split, with the cached features of its images if there is a cache."""
        split = self.splits[name]
        if self.feature_cache is None:
            return split
        mirrored = name == "train" and bool(self.augment.horizontal_flip)
        features = self.feature_cache.features(name, split, mirrored=mirrored)
        return Split(split.store, split.labels, split.indices, features, split.paths, split.rows)

    def _loader(self, name: str) -> BatchLoader:
        split, batch_size, shuffle = self.with_features(name), self.hparams["batch_size"], name == "train"
        rank, world_size, device = 0, 1, torch.device("cpu")
        balanced = shuffle and self.hparams["balance"] == "sampler"
        if self.trainer:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
        if shuffle:
            if len(split) < world_size:
                raise UserError(f"{len(split)} training images are too few for {world_size} processes")
            batch_size = min(batch_size, len(split) - len(split) % world_size)
        limit = getattr(self.trainer, f"limit_{name}_batches", 1.0)
        sampler = BatchSampler(
            len(split),
            batch_size,
            shuffle=shuffle,
            seed=self.hparams["seed" if shuffle else "split_seed"],
            rank=rank,
            world_size=world_size,
            mixed=not (isinstance(limit, float) and limit == 1.0),  # files are often sorted by class
            draw=partial(balanced_order, labels=split.labels) if balanced else torch.randperm,
        )
        on_device = self.hparams["on_device"]
        split = split.to(device) if on_device else split
        dataset = RepeatedImages(split) if balanced else split
        loader = BatchLoader(dataset, sampler, pin_memory=device.type == "cuda" and not on_device)
        loader.is_of_datamodule = True
        return loader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch, except the indices, from which random numbers are drawn on the CPU."""
        unindexed = batch._replace(indices=None)  # type: ignore[arg-type]
        copied: Batch = super().transfer_batch_to_device(unindexed, device, dataloader_idx)
        return copied._replace(indices=batch.indices)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on its device."""
        if self.trainer is not None and self.trainer.training:
            return self.augmented(batch, self.trainer.current_epoch)
        return batch if batch.features is None else batch._replace(features=batch.features[:, 0])

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """Return ``batch`` augmented for this epoch."""
        settings = self.augment.in_epoch(epoch, -1 if self.trainer is None else planned_epochs(self.trainer))
        return augment(batch, settings, seed=self.hparams["seed"], epoch=epoch, num_classes=len(self.class_names))


def planned_epochs(trainer: pl.Trainer) -> int:
    """Return the number of epochs of a fit, by ``max_epochs`` or ``max_steps``; -1 if it has no limit."""
    return math.ceil(_limit(trainer))


def planned_steps(trainer: pl.Trainer) -> float:
    """Return the number of optimizer steps of a fit, whose last epoch may be shorter than the others."""
    estimated = trainer.estimated_stepping_batches  # also creates the loader
    return getattr(trainer.lightning_module, "total_steps", None) or estimated


def complete_epochs(trainer: pl.Trainer) -> int:
    """Return the number of planned epochs that ``max_steps`` does not cut off."""
    return math.floor(_limit(trainer))


def _limit(trainer: pl.Trainer) -> float:
    limit = trainer.max_epochs or -1
    if trainer.max_steps == -1 or math.isinf(trainer.num_training_batches):
        return limit
    needed = trainer.max_steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return needed if limit == -1 else min(limit, needed)


def stratified(labels: Tensor, size: int, seed: int) -> Tensor:
    """Return sorted positions of ``size`` of the ``labels`` (int64 [N]), each class in proportion, chosen by ``seed``.

    Remaining images go to the classes with the largest remainders, the first classes first.
    """
    counts = torch.bincount(labels)
    quota = counts * size / len(labels)
    take = quota.floor().long()
    take[(take - quota).argsort(stable=True)[: size - int(take.sum())]] += 1
    if size >= len(counts):
        for label in ((take == 0) & (counts > 0)).nonzero().flatten().tolist():  # no class without an image
            take[label] = 1
            take[take.argmax()] -= 1
    generator = torch.Generator().manual_seed(int(hash32(seed, 0x5711)))
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = torch.split(shuffled[labels[shuffled].argsort(stable=True)], counts.tolist())
    return torch.cat([images[:n] for images, n in zip(by_class, take.tolist(), strict=True)]).sort().values


def _check_types(name: str, images: Any, labels: Tensor) -> None:
    """Check what a source returns, because images of another type would be normalized incorrectly without an error."""
    is_valid = not isinstance(images, Tensor) or (images.dtype == torch.uint8 and images.shape[1:2] == (3,))
    if not is_valid or labels.dtype != torch.int64:
        found = f"{getattr(images, 'dtype', 'uint8')} {list(images.shape)} and {labels.dtype}"
        raise UserError(f"{name}: images must be uint8 [N, 3, S, S] and labels int64, but they are {found}")


def origin(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key of the training images of a DataModule with these arguments; CIFAR-10 is the same in each folder."""
    source, root = options.get("source"), options.get("root")
    if source in ("cifar10", "shapes") or root is None:
        return source, options.get("drawing_seed")
    return source, Path(root).resolve()
