"""A guard against losses that are no numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch


class NaNGuard(Callback):
    """Stops a run whose loss is NaN or infinite, before such weights are saved.

    The losses of the latest steps stay on the device, and are looked at together: at every ``every_n_steps``-th step,
    at an epoch's end, and whenever a checkpoint is about to be written. The others cost nothing.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the loss; look at those kept, if it is time."""
        self._losses.append(outputs["loss"].detach())
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            self._check(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss of the validation: the last step of an epoch may have spoiled the weights."""
        evaluation: Any = pl_module.evaluation
        if len(evaluation) and not math.isfinite(evaluation.loss):  # the same in all processes
            what = f"the validation loss is {evaluation.loss} at epoch {trainer.current_epoch}"
            raise UserError(f"{what}; {_advice(trainer)}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the losses kept: a checkpoint of bad weights would take the place of a good one."""
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        losses, self._losses = self._losses, []
        if not losses:
            return
        values = torch.stack(losses).float()
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        ago = len(losses) - bad[0] if bad else 0  # steps since the first bad one, that one included
        if trainer.world_size > 1:  # each process sees the losses of its own images
            ago = int(trainer.strategy.reduce(torch.tensor(float(ago), device=values.device), reduce_op="max"))
        if ago:
            batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - ago
            what = f"the loss is {float(values[-ago])} at epoch {trainer.current_epoch}, batch {batch}"
            raise UserError(f"{what}; {_advice(trainer)}")


def _advice(trainer: pl.Trainer) -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    good = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
    return (
        f"{good}. Try a lower optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true; "
        "trainer.detect_anomaly=true names the operation"
    )
