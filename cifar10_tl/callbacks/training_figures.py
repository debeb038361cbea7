"""Callbacks that draw the training inputs and the curves, and the function that publishes a figure."""

from __future__ import annotations

import io
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cifar10_tl import plots
from cifar10_tl.callbacks.metrics_logger import MetricsLogger
from cifar10_tl.data.batch import Batch
from cifar10_tl.io import atomic_write


def wants_figures(trainer: pl.Trainer) -> bool:
    """Return whether this process should draw: rank zero, outside of sanity checks and ``fast_dev_run``."""
    return trainer.is_global_zero and not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]


def publish(trainer: pl.Trainer, tag: str, figure: Figure, step: int) -> None:
    """Write ``figure`` to ``<run folder>/figures/<tag>.png`` ("/" becomes "_") and to TensorBoard under ``tag``."""
    png = plots.to_png(figure)
    with atomic_write(Path(trainer.default_root_dir) / "figures" / f"{tag.replace('/', '_')}.png") as file:
        file.write(png)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels, step, dataformats="HWC")


class SampleInputs(Callback):
    """Callback that draws the first images of the first training batch, after augmentation, with their labels."""

    def __init__(self, num_images: int = 40) -> None:
        self.num_images = num_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw at the first step of the run."""
        if trainer.global_step or batch_idx or not wants_figures(trainer):
            return
        images = batch.images[: self.num_images].permute(0, 2, 3, 1).cpu().numpy()
        names = plots.legible(pl_module.class_names)  # type: ignore[arg-type]
        titles = [_title(target, names) for target in batch.targets[: self.num_images].cpu()]
        publish(trainer, "inputs/train", plots.sample_grid(images, titles, heading="Training images"), step=0)


def _title(target: Tensor, class_names: list[str]) -> list[tuple[str, str]]:
    """Return one line with the class name, or one per class with its weight where two images were mixed."""
    if target.ndim == 0:
        return [(class_names[int(target)], "")]
    weights, labels = target.topk(2)
    if weights[1] <= 0.005:
        return [(class_names[int(labels[0])], "")]
    return [(class_names[i], f" {100 * w:.0f}%") for w, i in zip(weights.tolist(), labels.tolist(), strict=True)]


class Curves(Callback):
    """Callback that draws the rows of :class:`MetricsLogger` when the fit ends, also after an exception."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MetricsLogger) and callback.rows and wants_figures(trainer):
                figure = plots.curves(callback.rows, heading="Training and validation")
                publish(trainer, "curves", figure, step=int(callback.rows[-1]["epoch"] or 0))
