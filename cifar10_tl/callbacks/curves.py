"""Accuracy and loss over the epochs, as a picture."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from cifar10_tl import figures
from cifar10_tl.callbacks.history import History
from cifar10_tl.callbacks.publish import publish


class Curves(Callback):
    """Draws the rows of :class:`History` when the fit ends, for whatever reason (TensorBoard shows them all along)."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        history = next((c for c in trainer.callbacks if isinstance(c, History)), None)  # type: ignore[attr-defined]
        if history and history.rows and trainer.is_global_zero:
            figure = figures.curves(history.rows, heading="Training and validation")
            publish(trainer, "curves", figure, step=int(history.rows[-1]["epoch"] or 0))
