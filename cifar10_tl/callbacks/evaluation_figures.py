"""Callbacks that draw the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from cifar10_tl import plots
from cifar10_tl.callbacks.checkpoint import is_best
from cifar10_tl.callbacks.training_figures import publish, wants_figures


class EvaluationFigure(Callback):
    """Callback that draws the validation of the best epoch as ``<tag>/val`` and the test as ``<tag>/test``.

    Args:
        tag: Name of the figure in TensorBoard.
        draw: Function of the Evaluation, its Split, and the text that ends the heading.
    """

    def __init__(self, tag: str, draw: Callable[[Any, Any, str], Figure]) -> None:
        self.tag, self.draw = tag, draw

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

    def __init__(self) -> None:
        super().__init__(
            "confusion_matrix", lambda evaluation, _, where: plots.confusion_matrix_figure(evaluation, where)
        )


class CorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` correct predictions, spread evenly over the split."""

    def __init__(self, num_images: int = 25) -> None:
        super().__init__("correct", partial(plots.correct_figure, num_images=num_images))


class IncorrectPredictions(EvaluationFigure):
    """Callback that draws up to ``num_images`` incorrect predictions, the most confident first."""

    def __init__(self, num_images: int = 25) -> None:
        super().__init__("incorrect", partial(plots.incorrect_figure, num_images=num_images))
