"""Stop a run whose loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl.config.errors import UserError


class NaNGuard(Callback):
    """Callback that stops a run with a NaN or infinite loss before its weights are saved.

    The losses stay on the device and are checked together every ``every_n_steps`` steps, at the end of an epoch and
    before a checkpoint is saved, so that a step does not wait for its loss.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].detach())
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            self.on_save_checkpoint(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the validation loss, because the last update of an epoch may have made the weights NaN."""
        evaluation: Any = pl_module.evaluation
        if len(evaluation) and not math.isfinite(evaluation.loss):  # equal in all processes
            _stop(trainer, f"the validation loss is {evaluation.loss} at epoch {trainer.current_epoch}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any = None, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        """Check the losses since the last check, and the weights, from which no loss has been computed yet."""
        if self._losses:
            self._check_losses(trainer)
        weights = (checkpoint or {}).get("state_dict", {}).values()
        if not all(weight.isfinite().all() for weight in weights if weight.is_floating_point()):
            _stop(trainer, f"the weights are not finite at epoch {trainer.current_epoch}")

    def _check_losses(self, trainer: pl.Trainer) -> None:
        losses, self._losses = torch.stack(self._losses).float(), []
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        steps_ago = len(losses) - bad[0] if bad else 0
        if trainer.world_size > 1:  # each process has the losses of its own images
            steps_ago = int(trainer.strategy.reduce(torch.tensor(float(steps_ago), device=losses.device), None, "max"))
        if steps_ago:
            batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready - steps_ago
            loss: Any = float(losses[-steps_ago])
            loss = "not finite" if math.isfinite(loss) else loss  # in another process
            _stop(trainer, f"the loss is {loss} at epoch {trainer.current_epoch}, batch {batch}")


def _stop(trainer: pl.Trainer, problem: str) -> None:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    good = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
    raise UserError(
        f"{problem}; {good}. Try a lower optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true; "
        "trainer.detect_anomaly=true names the operation"
    )
