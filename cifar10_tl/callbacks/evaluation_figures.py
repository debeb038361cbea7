"""Callbacks that draw the figures of an evaluation."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from cifar10_tl import plots
from cifar10_tl.callbacks.checkpoint import is_best
from cifar10_tl.callbacks.training_figures import publish, wants_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cifar10_tl.data.batch import Split
    from cifar10_tl.metrics.evaluation import Evaluation


class EvaluationFigure(Callback):
    """Callback that draws the validation of the best epoch as ``<tag>/val`` and the test as ``<tag>/test``."""

    tag: str

    @abstractmethod
    def draw(self, evaluation: Evaluation, split: Split, where: str) -> Figure:
        """Draw ``evaluation`` of the images in ``split``; ``where`` ends the heading."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if wants_figures(trainer) and is_best(trainer):
            self._publish(trainer, pl_module, "val", trainer.current_epoch)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if wants_figures(trainer):
            restored: Any = pl_module.restored_epoch
            self._publish(trainer, pl_module, "test", trainer.current_epoch if restored is None else restored)

    def _publish(self, trainer: pl.Trainer, pl_module: Any, stage: str, epoch: int) -> None:
        split = trainer.datamodule.splits[stage]  # type: ignore[attr-defined]
        where = f"{'validation' if stage == 'val' else stage}, epoch {epoch}"
        publish(trainer, f"{self.tag}/{stage}", self.draw(pl_module.evaluation, split, where), step=epoch)


class ConfusionMatrix(EvaluationFigure):
    """Callback that draws the confusion matrix."""

    tag = "confusion_matrix"

    def draw(self, evaluation: Evaluation, split: Split, where: str) -> Figure:
        return plots.confusion_matrix_figure(evaluation, where)


class CorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` correct predictions, spread evenly over the split."""

    tag = "correct"

    def __init__(self, num_images: int = 25) -> None:
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Split, where: str) -> Figure:
        return plots.correct_figure(evaluation, split, where, self.num_images)


class IncorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` incorrect predictions, the most confident first."""

    tag = "incorrect"

    def __init__(self, num_images: int = 25) -> None:
        self.num_images = num_images

    def draw(self, evaluation: Evaluation, split: Split, where: str) -> Figure:
        return plots.incorrect_figure(evaluation, split, where, self.num_images)
