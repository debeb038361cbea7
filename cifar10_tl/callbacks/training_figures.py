"""From a figure to a PNG file in the run folder and the same picture in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from cifar10_tl import plots
from cifar10_tl.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl.callbacks.metrics_logger import MetricsLogger
from cifar10_tl.data.batch import Batch


def publish(trainer: pl.Trainer, tag: str, figure: Figure, step: int) -> None:
    """Write ``figure`` to ``<run folder>/figures/<tag>.png`` ("/" becomes "_") and to TensorBoard under ``tag``.

    The figure is rendered once: TensorBoard is given the PNG as it is. To be called on rank zero alone.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    png = buffer.getvalue()
    with atomic_write(Path(trainer.default_root_dir) / "figures" / f"{tag.replace('/', '_')}.png") as file:
        file.write(png)
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
    for writer in tensorboard_writers(trainer):
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def tensorboard_writers(trainer: pl.Trainer) -> list[Any]:
    """The event file writers of the trainer's TensorBoard loggers; none under ``fast_dev_run``."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment._get_file_writer() for logger in loggers]


class SampleInputs(Callback):
    """The first images of the first training batch, as augmentation left them, with their labels."""

    def __init__(self, num_images: int = 40) -> None:
        self.num_images = num_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw once a run, at its very first step."""
        if trainer.global_step or batch_idx or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        images = batch.images[: self.num_images].permute(0, 2, 3, 1).cpu().numpy()
        names = plots.legible(pl_module.class_names)  # type: ignore[arg-type]
        titles = [_lines(target, names) for target in batch.targets[: self.num_images].cpu()]
        figure = plots.sample_grid(images, titles, heading="Training images as the network gets them")
        publish(trainer, "inputs/train", figure, step=0)


def _lines(target: Tensor, class_names: list[str]) -> list[tuple[str, str]]:
    """A class name, or where images were mixed the two with the larger shares, and these."""
    if target.ndim == 0:
        return [(class_names[int(target)], "")]
    shares, labels = target.topk(2)
    if shares[1] <= 0.005:
        return [(class_names[int(labels[0])], "")]
    return [(class_names[i], f" {100 * p:.0f} %") for p, i in zip(shares.tolist(), labels.tolist(), strict=True)]


class Curves(Callback):
    """Draws the rows of :class:`MetricsLogger` when the fit ends, for whatever reason."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        history = next((c for c in trainer.callbacks if isinstance(c, MetricsLogger)), None)  # type: ignore[attr-defined]
        if history and history.rows and trainer.is_global_zero:
            figure = plots.curves(history.rows, heading="Training and validation")
            publish(trainer, "curves", figure, step=int(history.rows[-1]["epoch"] or 0))
