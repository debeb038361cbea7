"""An average of the weights over the latest steps, which often classifies better than the weights themselves."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    """Exponential moving average of weights and BatchNorm statistics, updated at each optimizer step.

    Validation and test use the average, and it is what a checkpoint holds as ``state_dict``; the weights that learn
    travel beside it (``current_model_state``), so that a resumed run goes on with both.

    After n steps the average is kept by the factor min(decay, (1 + n) / (10 + n)), so that the random start is soon
    forgotten (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).

    Args:
        decay: share of the average that a step leaves as it is, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the network to its device; but not the count of updates, which each step asks for."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take both to go on with; a test keeps the average (Lightning would test the weights that learn)."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _average(self, averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        """Bring tensors of one type and device nearer to the weights; the first update copies, and is not done here."""
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            torch._foreach_copy_(averages, weights)
            return
        steps = self._latest_update_step
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + steps) / (10 + steps)))
