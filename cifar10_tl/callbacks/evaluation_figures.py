"""What the figures of an evaluation have in common: when they are drawn, and where they go."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from matplotlib.figure import Figure
from torch import Tensor

from cifar10_tl import plots
from cifar10_tl.callbacks.training_figures import publish
from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation


class EvaluationFigure(Callback):
    """A figure of the best epoch's validation, and one of the test.

    "Best" is what the run's first ModelCheckpoint saves as best, so that figure and checkpoint belong together. A
    figure is drawn when the best changes, but at most every ``every_n_seconds``, so that short epochs are not slowed
    down; what was put off is drawn when the fit ends, for whatever reason.
    """

    tag: str  # in TensorBoard, before "/val" or "/test"
    title: str  # of the figure

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        if not isinstance(every_n_seconds, (int, float)):
            raise UserError(f"every_n_seconds={every_n_seconds}: should be a number of seconds")
        self.every_n_seconds = every_n_seconds
        self._drawn_at = float("-inf")
        self._put_off: tuple[Evaluation, int] | None = None

    @abstractmethod
    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """The figure; ``split`` is the :class:`~cifar10_tl.data.datamodule.Split` that was evaluated."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the new best, or put it off."""
        if trainer.sanity_checking or trainer.fast_dev_run or not _is_best(trainer):  # type: ignore[attr-defined]
            return
        evaluation: Any = pl_module.evaluation
        self._put_off = (evaluation, trainer.current_epoch)
        if trainer.state.fn != "fit" or time.monotonic() - self._drawn_at >= self.every_n_seconds:
            self._draw_what_was_put_off(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was put off."""
        self._draw_what_was_put_off(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what was put off."""
        self._draw_what_was_put_off(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the test."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            evaluation: Any = pl_module.evaluation
            epoch: Any = pl_module.restored_epoch
            self._publish(trainer, evaluation, "test", trainer.current_epoch if epoch is None else epoch)

    def _draw_what_was_put_off(self, trainer: pl.Trainer) -> None:
        if self._put_off is not None:
            self._publish(trainer, self._put_off[0], "val", self._put_off[1])
            self._put_off, self._drawn_at = None, time.monotonic()

    def _publish(self, trainer: pl.Trainer, evaluation: Evaluation, stage: str, epoch: int) -> None:
        if trainer.is_global_zero and len(evaluation):
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            name = {"val": "validation", "test": "test"}[stage]
            heading = f"{self.title}, {name}, epoch {epoch}"
            figure = self.draw(evaluation, datamodule.splits[stage], heading)
            publish(trainer, f"{self.tag}/{stage}", figure, step=epoch)


def _is_best(trainer: pl.Trainer) -> bool:
    """Whether this validation will be saved as the best; the same answer on every process."""
    checkpoint = trainer.checkpoint_callback
    if trainer.state.fn != "fit" or not isinstance(checkpoint, ModelCheckpoint) or checkpoint.monitor is None:
        return True
    return checkpoint.check_monitor_top_k(trainer, trainer.callback_metrics.get(checkpoint.monitor))


def prediction_grid(evaluation: Evaluation, places: Tensor, split: Any, heading: str) -> Figure:
    """The images at these places of an evaluation, each with what was predicted and what is true."""
    return plots.prediction_grid(
        split.by_index(evaluation.indices[places]).permute(0, 2, 3, 1).numpy(),
        evaluation.labels[places].numpy(),
        evaluation.predictions[places].numpy(),
        evaluation.probabilities[places].numpy(),
        evaluation.class_names,
        heading=heading,
        empty_text="no such prediction among these images",
    )


class ConfusionMatrix(EvaluationFigure):
    """Counts and row percentages of true against predicted classes."""

    tag, title = "confusion_matrix", "Confusion matrix"

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.plots.confusion_matrix`."""
        return plots.confusion_matrix(evaluation.confusion_matrix.numpy(), evaluation.class_names, heading=heading)


class CorrectPredictions(EvaluationFigure):
    """Up to ``num_images`` right predictions, spread evenly over the data, with their probabilities."""

    tag, title = "correct", "Correct predictions"

    def __init__(self, num_images: int = 25, every_n_seconds: float = 30.0) -> None:
        super().__init__(every_n_seconds)
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.plots.prediction_grid`."""
        return prediction_grid(evaluation, evaluation.correct(self.num_images), split, heading)


class IncorrectPredictions(EvaluationFigure):
    """Up to ``num_images`` wrong predictions with their true labels, the most confident mistakes first."""

    tag, title = "incorrect", "Incorrect predictions, the most confident first"

    def __init__(self, num_images: int = 25, every_n_seconds: float = 30.0) -> None:
        super().__init__(every_n_seconds)
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Any, heading: str) -> Figure:
        """See :func:`cifar10_tl.plots.prediction_grid`."""
        return prediction_grid(evaluation, evaluation.mistakes(self.num_images), split, heading)
