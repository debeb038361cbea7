"""Loss and learning rates within the epochs, for TensorBoard."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl.callbacks.metrics_logger import MetricsLogger, tensorboard_loggers


class StepLogger(Callback):
    """Callback that logs ``train/loss_step`` and ``lr/<group>`` over the number of optimizer steps.

    ``train/loss_step`` is the mean loss over the images since the previous point of the epoch, and ``lr/<group>`` the
    learning rate of the next step. An epoch has ``points`` to ``2 * points`` points, or one per step if it has fewer
    steps. The losses stay on the device until the end of the epoch.

    The points are saved in checkpoints. A resumed run logs them again, because TensorBoard discards all points
    whose x is at least the first resumed epoch, and x counts steps here.
    """

    def __init__(self, points: int = 20) -> None:
        self.points = points
        self.tags: list[str] = []
        self.rows: list[list[float]] = []  # step, and the values of the tags
        self._num_logged = 0  # rows that are in TensorBoard
        self._pending: list[list[float]] = []  # step and learning rates of the points on the device
        self._on_device: list[Tensor] = []  # loss, hits and images of this epoch at these points
        self._totals = torch.zeros(1, 3, dtype=torch.float64)  # at the latest point of this epoch that has been read
        self._strategy: Any = None

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"tags": self.tags, "rows": self.rows, "totals": self._totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tags, self.rows, self._totals = state_dict["tags"], list(state_dict["rows"]), state_dict["totals"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the points that TensorBoard discarded, and those of a partial epoch; without TensorBoard, skip all."""
        self._strategy = trainer.strategy
        if not tensorboard_loggers(trainer):
            self.on_train_batch_end = None  # type: ignore[method-assign, assignment]
        loggers = (c for c in trainer.callbacks if isinstance(c, MetricsLogger))  # type: ignore[attr-defined]
        epochs = next((len(c.rows) for c in loggers), 0)
        self._num_logged = sum(step < epochs for step, *_ in self.rows)
        self._log(trainer)

    def on_train_epoch_start(self, *_: Any) -> None:
        self._totals = torch.zeros(1, 3, dtype=torch.float64)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Select the points by the number of the batch, so that a resumed run has the same ones."""
        size, num_batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        every = max(1, math.ceil(num_batches / size) // self.points) * size
        if (batch_idx + 1) % every and batch_idx + 1 < num_batches:
            return
        rates = {f"lr/{g['name'].split(' ')[0]}": float(g["lr"]) for g in trainer.optimizers[0].param_groups}
        self.tags = ["train/loss_step", *rates]
        self._pending.append([trainer.global_step, *rates.values()])
        self._on_device.append(pl_module.train_totals())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()
        self._log(trainer)

    def _read(self) -> None:
        """Wait for the device, and sum over all processes."""
        if not self._on_device:
            return
        totals = self._strategy.reduce(torch.stack(self._on_device), reduce_op="sum").cpu()
        losses, _, counts = torch.cat([self._totals, totals]).diff(dim=0).unbind(1)
        self.rows += [[s, loss, *lr] for (s, *lr), loss in zip(self._pending, (losses / counts).tolist(), strict=True)]
        self._totals, self._pending, self._on_device = totals[-1:], [], []

    def _log(self, trainer: pl.Trainer) -> None:
        for logger in tensorboard_loggers(trainer):
            for step, *values in self.rows[self._num_logged :]:
                logger.log_metrics(dict(zip(self.tags, values, strict=True)), int(step))
        self._num_logged = len(self.rows)
