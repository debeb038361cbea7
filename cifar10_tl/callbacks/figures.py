"""Callbacks that draw figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from cifar10_tl import plots
from cifar10_tl.callbacks.metrics_logger import MetricsLogger, tensorboard_loggers
from cifar10_tl.data.batch import Batch
from cifar10_tl.io import atomic_write


def wants_figures(trainer: pl.Trainer) -> bool:
    """Return whether this process should draw: rank zero, outside of sanity checks and ``fast_dev_run``."""
    return trainer.is_global_zero and not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]


def publish(trainer: pl.Trainer, tag: str, figure: Figure, step: int, to_file: bool = True) -> None:
    """Write ``figure`` to ``<run folder>/figures/<tag>.png`` ("/" becomes "_") and to TensorBoard under ``tag``."""
    png = plots.to_png(figure)
    if to_file:
        with atomic_write(Path(trainer.default_root_dir) / "figures" / f"{tag.replace('/', '_')}.png") as file:
            file.write(png)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_image(tag, pixels, step, dataformats="HWC")


class SampleInputs(Callback):
    """Callback that draws the first images of the first training batch, after augmentation, with their labels."""

    def __init__(self, num_images: int = 40) -> None:
        self.num_images = num_images

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or not wants_figures(trainer):
            return
        images = _visible(batch, self.num_images).permute(0, 2, 3, 1).cpu().numpy()
        names = plots.legible(pl_module.class_names)
        titles = [_title(target, names) for target in batch.targets[: self.num_images].cpu()]
        publish(trainer, "inputs/train", plots.sample_grid(images, titles, heading="Training images"), step=0)


def _visible(batch: Batch, num_images: int) -> Tensor:
    """Return the first images, uint8 [n, 3, H, W], or their boxes enlarged to the same size."""
    images = batch.images[:num_images]
    if batch.boxes is None:
        return images
    boxes = batch.boxes[:num_images].long().tolist()
    return torch.stack([resized_crop(x, *box, size=list(x.shape[1:])) for x, box in zip(images, boxes, strict=True)])


def _title(target: Tensor, class_names: list[str]) -> list[tuple[str, str]]:
    """Return one line with the class name, or one per class with its weight where two images were mixed."""
    if target.ndim == 0:
        return [(class_names[int(target)], "")]
    weights, labels = (values.tolist() for values in target.topk(2))
    if weights[1] <= 0.005:
        return [(class_names[labels[0]], "")]
    return [(class_names[i], f" {100 * weight:.0f}%") for weight, i in zip(weights, labels, strict=True)]


class Curves(Callback):
    """Callback that draws the rows of :class:`MetricsLogger` when the fit ends, also after an exception."""

    def on_fit_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MetricsLogger) and callback.rows and wants_figures(trainer):
                figure = plots.curves(callback.rows, heading="Training and validation", **_best(trainer, callback.rows))
                publish(trainer, "curves", figure, step=int(callback.rows[-1]["epoch"] or 0))

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":  # a test has restored the rows of the best checkpoint
            self.on_fit_end(trainer)


def _best(trainer: pl.Trainer, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the epoch of the best checkpoint and its metric; empty if there is none."""
    checkpoint: Any = trainer.checkpoint_callback
    monitor, score = (getattr(checkpoint, name, None) for name in ("monitor", "best_model_score"))
    if monitor is None or score is None:
        return {}
    values = {row["epoch"]: row.get(monitor) for row in rows}
    found = (epoch for epoch, value in values.items() if value is not None and abs(value - float(score)) < 1e-6)
    return {"best": next(found, None), "monitor": monitor}


class EvaluationFigure(Callback):
    """Callback that draws the validation of the best epoch as ``<tag>/val`` and the test as ``<tag>/test``.

    TensorBoard shows every epoch that improved on the best so far (the first always does), and the last epoch.
    ``draw`` is a function of the Evaluation, its Split, and the text that ends the heading.
    """

    def __init__(self, tag: str, draw: Callable[[Any, Any, str], Figure]) -> None:
        self.tag, self.draw = tag, draw
        self._drawn_epoch: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if wants_figures(trainer) and _is_best(trainer):
            self._publish(trainer, pl_module, "val", trainer.current_epoch)
            self._drawn_epoch = trainer.current_epoch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Add the last epoch to TensorBoard; the file keeps the best one."""
        last = None if pl_module.evaluation is None else pl_module.restored_epoch
        if last not in (None, self._drawn_epoch) and tensorboard_loggers(trainer) and wants_figures(trainer):
            self._publish(trainer, pl_module, "val", last, to_file=False)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if wants_figures(trainer):
            restored = pl_module.restored_epoch
            self._publish(trainer, pl_module, "test", trainer.current_epoch if restored is None else restored)

    def _publish(self, trainer: pl.Trainer, pl_module: Any, stage: str, epoch: int, to_file: bool = True) -> None:
        split = trainer.datamodule.splits[stage]  # type: ignore[attr-defined]
        where = f"{'validation' if stage == 'val' else stage}, epoch {epoch}"
        publish(trainer, f"{self.tag}/{stage}", self.draw(pl_module.evaluation, split, where), epoch, to_file)


def _is_best(trainer: pl.Trainer) -> bool:
    """Return whether the validation that has just ended is better than the best checkpoint of ``trainer``."""
    checkpoint: Any = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_score", None)
    if best is None:
        return True
    score = trainer.callback_metrics[checkpoint.monitor]
    return trainer.is_last_batch and bool(score < best if checkpoint.mode == "min" else score > best)


class ConfusionMatrix(EvaluationFigure):
    """Callback that draws the confusion matrix."""

    def __init__(self) -> None:
        super().__init__("confusion_matrix", lambda result, _, where: plots.confusion_matrix_figure(result, where))


class CorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` correct predictions, spread evenly over the split."""

    def __init__(self, num_images: int = 25) -> None:
        super().__init__("correct", partial(plots.correct_figure, num_images=num_images))


class IncorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` incorrect predictions, the most confident first."""

    def __init__(self, num_images: int = 25) -> None:
        super().__init__("incorrect", partial(plots.incorrect_figure, num_images=num_images))
