"""Evaluation of a checkpoint on its own or other data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cifar10_tl.callbacks import RunProgressBar
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import BatchLoader, BatchSampler, Split
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.checkpoints import read_checkpoint, recorded_precision
from cifar10_tl.engine.hardware import choose_precision, tune_for
from cifar10_tl.metrics.corruptions import CORRUPTIONS, corrupt
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.tta import additional_views
from cifar10_tl.models.lit_classifier import LitClassifier

log = logging.getLogger(__name__)

#: Value of a data setting that is taken from the checkpoint.
AS_TRAINED = "as_trained"


class Evaluator:
    """Evaluator of images on one device, by the test loop of training, so that the numbers are the same.

    Args:
        module: Classifier to evaluate.
        trainer: See :func:`build_trainer`.
        batch_size: Images per step.
    """

    def __init__(self, module: LitClassifier, trainer: pl.Trainer, batch_size: int) -> None:
        self.module, self.trainer, self.batch_size = module, trainer, batch_size
        self.device: torch.device = trainer.strategy.root_device
        tune_for(self.device, module.network)

    def __call__(self, split: Split, description: str, images: Tensor | None = None) -> Evaluation:
        """Evaluate a split, or other ``images`` of it; the progress bar shows ``description``."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunProgressBar):
                callback.description = description
        if images is not None:
            split = Split(images, split.labels, split.indices)
        sampler = BatchSampler(len(split), self.batch_size, shuffle=False)
        loader = BatchLoader(split, sampler, pin_memory=self.device.type == "cuda")
        self.trainer.test(self.module, dataloaders=loader, verbose=False)
        assert self.module.evaluation is not None
        return self.module.evaluation

    def test_time_augmentation(self, split: Split, evaluation: Evaluation, name: str) -> dict[str, Any]:
        """Return the scores of the mean probabilities of ``evaluation`` and of additional views."""
        views = [evaluation]
        for images in additional_views(split.images, name):
            views.append(self(split, f"view {len(views) + 1}", images))
        return {"name": name, "views": len(views), **Evaluation.mean_of(views).scores()}

    def corruptions(self, split: Split, evaluation: Evaluation, name: str) -> dict[str, list[dict[str, Any]]]:
        """Return metrics at severities 0 (``evaluation``) to 5 of one kind of corruption, or of "all"."""
        results = {}
        for kind in CORRUPTIONS if name == "all" else [name]:
            evaluations = [evaluation]
            for severity in range(1, 6):
                images = corrupt(split.images, kind, severity)
                evaluations.append(self(split, f"{kind}, severity {severity}", images))
            results[kind] = [{"severity": i, **e.metrics()} for i, e in enumerate(evaluations)]
        return results


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Return a Trainer for one device that writes nothing."""
    precision = cfg.trainer.precision
    if precision == "auto":
        recorded = recorded_precision(Path(cfg.checkpoint))
        precision, reason = (recorded, "as in the run") if recorded else choose_precision(cfg.trainer.accelerator)
        log.info("precision %s: %s", precision, reason)
    return pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=cfg.trainer.enable_progress_bar,
        enable_model_summary=False,
        callbacks=[RunProgressBar()] if cfg.trainer.enable_progress_bar else [],
        default_root_dir=cfg.paths.output_dir,
    )


def build_datamodule(cfg: DictConfig, module: LitClassifier) -> CIFAR10DataModule:
    """Return the data of ``cfg.data``, completed by the settings in the checkpoint and loaded.

    Raises:
        UserError: The classes are not those of the checkpoint, or a setting does not fit the data or the checkpoint.
    """
    trained_with = read_checkpoint(Path(cfg.checkpoint)).get("datamodule_hyper_parameters", {})
    settings: Any = OmegaConf.to_container(cfg.data, resolve=True)
    settings.pop("cache_features", None)
    options = data_options(settings, trained_with)
    check_same_split(options, trained_with)
    if "native_size" in options:
        options["native_size"] = module.hparams["native_size"]  # other images are resized to it
    datamodule = CIFAR10DataModule(**options)
    names, found = ", ".join(module.class_names), ", ".join(datamodule.class_names)
    if names != found:
        raise UserError(f"the classes of the checkpoint ({names}) differ from those of the data ({found})")
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def data_options(settings: Mapping[str, Any], trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings if they name a source, else those of training, changed by the given ones.

    Raises:
        UserError: No source is known.
    """
    given = {key: value for key, value in settings.items() if value != AS_TRAINED}
    options = given if "source" in given else {**trained_with, **given}
    if "source" not in options:
        raise UserError("the checkpoint does not name its data: add data=cifar10, data=folder or data=shapes")
    return options


def check_same_split(options: Mapping[str, Any], trained_with: Mapping[str, Any]) -> None:
    """Refuse to split the images of training in another way, which would put training images into val.

    Raises:
        UserError: A setting of the split differs from training.
    """
    if _origin(options) != _origin(trained_with):
        return
    for key in ("val_size", "split_seed", "train_size"):
        if options.get(key) != trained_with.get(key):
            raise UserError(
                f"data.{key}={options.get(key)}: training used data.{key}={trained_with.get(key)}; with another split, "
                "val contains training images"
            )


def _origin(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key of the images that are split; those of CIFAR-10 are the same in each folder."""
    source = options.get("source")
    return source, Path(options["root"]).resolve() if source == "folder" else options.get("drawing_seed")
