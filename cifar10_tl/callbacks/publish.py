"""From a figure to a PNG file in the run folder and the same picture in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from cifar10_tl.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
