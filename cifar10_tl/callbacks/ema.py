"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    """Callback that keeps an exponential moving average of weights and BatchNorm statistics.

    Validation and test use the average, and a checkpoint holds it as ``state_dict``; the weights that are trained are
    saved next to it as ``current_model_state``, so that a resumed run continues with both.

    One step keeps a fraction ``decay`` of the average; after n steps it is min(decay, (1 + n) / (10 + n)), so that the
    random start is soon forgotten (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to the device; its step count stays on the CPU, where reading it costs nothing."""
        average: Any = self._average_model
        average.to(pl_module.device)
        average.n_averaged = average.n_averaged.cpu()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights for a fit; a test keeps the average, where Lightning would undo it."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _average(self, averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        """Update tensors of one dtype and device; AveragedModel itself copies the weights of the first step."""
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            torch._foreach_copy_(averages, weights)
            return
        n = int(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + n) / (10 + n)))
