"""Evaluation of a checkpoint on its own or other data."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from cifar10_tl.callbacks import GracefulStop, RunProgressBar
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import BatchLoader, BatchSampler, Split
from cifar10_tl.data.datamodule import CIFAR10DataModule, origin
from cifar10_tl.engine.analysis import analyze, heatmaps
from cifar10_tl.engine.checkpoints import read_checkpoint, restore
from cifar10_tl.engine.hardware import choose_precision, quiet_libraries, tune_for
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.engine.report import write_report
from cifar10_tl.engine.results import all_metrics, describe, environment, images_checksum, read_results, write_results
from cifar10_tl.io import atomic_write
from cifar10_tl.metrics import ground_truth
from cifar10_tl.metrics.calibration import fit_temperature
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.tta import View, additional_views
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.plots import evaluation_figures, to_png

log = logging.getLogger(__name__)

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def evaluate_checkpoint(cfg: DictConfig, handler: SignalHandler) -> dict[str, Any]:
    """Evaluate ``cfg.checkpoint``, write metrics, figures and predictions, and return the content of results.json."""
    quiet_libraries()
    start = time.perf_counter()
    module = restore(Path(cfg.checkpoint))
    trainer = build_trainer(cfg, handler)
    datamodule = build_datamodule(cfg, module)
    needed = {cfg.split: f"split={cfg.split}"} | ({"train": "report=full"} if cfg.report == "full" else {})
    if missing := needed.keys() - datamodule.splits.keys():
        name = min(missing)
        raise UserError(f"{needed[name]}: there are no {SPLIT_NAMES[name]} images in {datamodule.hparams['root']}")
    split = datamodule.splits[cfg.split]
    people = ground_truth.read_human_labels(cfg.human_labels, split, len(module.class_names))
    doubtful = ground_truth.read_doubtful_labels(cfg.doubtful_labels, split, module.class_names)
    evaluator = Evaluator(module, trainer, datamodule.hparams["batch_size"])
    evaluation = evaluator(split, cfg.split)
    temperature = None
    if "val" in datamodule.splits and cfg.split != "val":
        val = evaluator(datamodule.splits["val"], "val, to fit the temperature")
        temperature = fit_temperature(val.logits, val.labels)
        if temperature is None:
            log.info("no temperature scaling: the loss of the %d validation images has no minimum", len(val))

    results = {
        "checkpoint": str(cfg.checkpoint),
        "epoch": module.restored_epoch,
        "split": cfg.split,
        cfg.split: all_metrics(evaluation, split, temperature),
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "class_names": list(module.class_names),
        "data": dict(datamodule.hparams),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": environment(trainer.strategy.root_device, 1, trainer.precision),
    }
    if cfg.split == "test":
        results["test_images"] = images_checksum(split)
    if cfg.tta != "none":
        results["tta"] = evaluator.test_time_augmentation(split, evaluation, cfg.tta)
    if people is not None:
        results["human_labels"] = ground_truth.compare_with_people(evaluation, people)
    if doubtful is not None:
        results["doubtful_labels"] = ground_truth.accuracy_without(evaluation, doubtful)
    sections: dict[str, Any] = {}
    if cfg.report == "full":
        train = datamodule.splits["train"]
        found, sections = analyze(evaluation, split, evaluator(train, "train, for nearest neighbors"), train)
        results |= found
    run_dir = Path(cfg.paths.output_dir)
    write_figures(run_dir, evaluation, temperature, split, cfg.split, module.restored_epoch)
    results["seconds"] = {"evaluate": time.perf_counter() - start}
    write_results(run_dir, results, evaluation, split)
    if cfg.report != "none":
        write_report(run_dir, evaluation, split, explain=partial(heatmaps, module, trainer), **sections)
    log.info("%s", describe(results, run_dir))
    return results


def write_figures(
    run_dir: Path, evaluation: Evaluation, temperature: float | None, split: Split, name: str, epoch: int | None
) -> None:
    """Write the figures of an evaluation of the ``split`` with this name."""
    scaled = None if temperature is None else evaluation.scaled(temperature)
    where = f"{SPLIT_NAMES[name]}, epoch {epoch}"
    for title, figure in evaluation_figures(evaluation, scaled, split, where).items():
        with atomic_write(run_dir / "figures" / f"{title}_{name}.png") as file:
            file.write(to_png(figure))


class Evaluator:
    """Evaluator that runs the test loop of training on one device.

    The numbers are those of training, up to rounding if the network was compiled then.
    """

    def __init__(self, module: LitClassifier, trainer: pl.Trainer, batch_size: int) -> None:
        self.module, self.trainer, self.batch_size = module, trainer, batch_size
        tune_for(trainer.strategy.root_device, module.network)

    def __call__(self, split: Split, description: str) -> Evaluation:
        """Evaluate a split; the progress bar shows ``description``."""
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, RunProgressBar):
            bar.description = description
        sampler = BatchSampler(len(split), self.batch_size, shuffle=False)
        loader = BatchLoader(split, sampler, pin_memory=self.trainer.strategy.root_device.type == "cuda")
        self.trainer.test(self.module, dataloaders=loader, verbose=False)
        assert self.module.evaluation is not None
        return self.module.evaluation

    def test_time_augmentation(self, split: Split, evaluation: Evaluation, name: str) -> dict[str, Any]:
        """Return the scores of the mean probabilities of ``evaluation`` and of additional views."""
        views = [evaluation]
        for function in additional_views(name):
            view = Split(View(split, function), split.labels, split.indices)
            views.append(self(view, f"view {len(views) + 1}"))
        return {"name": name, "views": len(views), **Evaluation.mean_of(views).scores()}


def recorded_precision(checkpoint: Path) -> str | None:
    """Return the precision of the run of a checkpoint, None if its results.json is not in the folder above."""
    return read_results(checkpoint.resolve().parent.parent).get("environment", {}).get("precision")


def build_trainer(cfg: DictConfig, handler: SignalHandler) -> pl.Trainer:
    """Return a Trainer for one device that writes nothing."""
    precision, show_bar = cfg.trainer.precision, cfg.trainer.enable_progress_bar
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
        enable_progress_bar=show_bar,
        enable_model_summary=False,
        callbacks=[GracefulStop(handler), *([RunProgressBar()] if show_bar else [])],
        default_root_dir=cfg.paths.output_dir,
    )


def build_datamodule(cfg: DictConfig, module: LitClassifier) -> CIFAR10DataModule:
    """Return the data of ``cfg.data``, completed by the settings in the checkpoint and loaded."""
    content = read_checkpoint(Path(cfg.checkpoint))
    trained_with = content.get("datamodule_hyper_parameters", {})
    recorded = content.get(CIFAR10DataModule.__qualname__, {})
    settings: Any = OmegaConf.to_container(cfg.data, resolve=True)
    settings.pop("cache_features", None)
    options = data_options(settings, trained_with)
    for key in ("native_size", "fit"):  # other images are resized as in training
        if key in options:
            options[key] = module.hparams[key]
    is_moved = is_moved_training_data(options, trained_with, recorded)
    moved = {key: trained_with[key] for key in ("root", "labels") if is_moved and key in trained_with}
    check_same_split(options | moved, trained_with)
    is_same = is_moved or origin(options) == origin(trained_with)
    if options["source"] == "folder" and not is_same:
        options["test_only"] = True
    datamodule = CIFAR10DataModule(**options)
    names, found = ", ".join(module.class_names), ", ".join(datamodule.class_names)
    if names != found:
        raise UserError(f"the classes of the checkpoint ({names}) differ from those of the data ({found})")
    datamodule.prepare_data()
    datamodule.setup()
    if options.get("test_only") and [*datamodule.splits] == ["test"]:
        log.info("data.root=%s: all images are tested; none of them should be from the training set", options["root"])
    if is_same:
        limit, as_trained = trained_with.get("image_limit"), datamodule
        if options.get("image_limit") != limit:
            as_trained = CIFAR10DataModule(**{**options, "image_limit": limit})
            as_trained.setup("compare")
        check_same_images(datamodule, as_trained.changed_splits(recorded), cfg.split)
    return datamodule


def is_moved_training_data(
    options: Mapping[str, Any], trained_with: Mapping[str, Any], recorded: Mapping[str, Mapping[str, str]]
) -> bool:
    """Return whether another folder has the images of training, according to their names in a checkpoint."""
    are_folders = options["source"] == trained_with.get("source") == "folder"
    if not are_folders or origin(options) == origin(trained_with) or "paths" not in recorded:
        return False
    keys = ("val_size", "test_size", "split_seed", "image_limit")
    same = {key: trained_with[key] for key in keys if key in trained_with}
    try:
        datamodule = CIFAR10DataModule(**{**options, **same})
        datamodule.setup("compare")
    except UserError:  # no training images, or too few
        return False
    return not datamodule.changed_splits(recorded)


def check_same_images(datamodule: CIFAR10DataModule, changed: Sequence[str], split: str) -> None:
    """Raise an error if ``split`` may contain training images because images have changed; drop val if it may.

    Args:
        datamodule: DataModule of the training data with its current images.
        changed: Names of the splits that differ from those of the checkpoint.
        split: Split to evaluate.
    """
    if "train" not in changed:
        return
    if split in changed and split != "train":
        raise UserError(
            f"the images of {', '.join(changed)} have changed since training, so {split} may contain training images: "
            "restore them, or evaluate a folder of new images with data.root=DIR"
        )
    if "val" in changed:
        del datamodule.splits["val"]
        log.info("the images of train and val have changed since training: no temperature scaling")


def data_options(settings: Mapping[str, Any], trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings if they name a source, else those of training, changed by the given ones."""
    given = {key: value for key, value in settings.items() if value != "as_trained"}
    options = given if "source" in given else {**trained_with, **given}
    if "source" not in options:
        raise UserError("the checkpoint does not name its data: add data=cifar10, data=folder or data=shapes")
    return options


def check_same_split(options: Mapping[str, Any], trained_with: Mapping[str, Any]) -> None:
    """Refuse to split the images of training in another way, which would put training images into val."""
    if origin(options) != origin(trained_with):
        return
    for key in ("val_size", "split_seed", *(("test_size", "labels") if "root" in options else ("train_size",))):
        own, used = options.get(key), trained_with.get(key)
        if key in trained_with and own != used:
            raise UserError(
                f"data.{key}={own}: the run used data.{key}={used}; another split would put training images into val"
            )
