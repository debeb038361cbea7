"""Callback that stops a run after a signal."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

if TYPE_CHECKING:
    from cifar10_tl.data.batch import Batch
    from cifar10_tl.engine.processes import SignalHandler

log = logging.getLogger(__name__)


class GracefulStop(Callback):
    """Callback that saves ``checkpoints/last.ckpt`` and stops after the step in which a signal was received.

    After the last step of an epoch, validation and the regular checkpoints come first. Signals reach processes
    at different times, so they agree about every ten batches, and stop at the same step.
    """

    def __init__(self, handler: SignalHandler) -> None:
        self.handler = handler

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Skip the training of a resumed run that early stopping has ended."""
        callbacks: Any = trainer.early_stopping_callbacks
        if any(callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED for callback in callbacks):
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers and its broadcast, which synchronizes the device in each step."""
        self.handler.install()
        self.handler.deferred = True
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign] # PL #21487

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        self.handler.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save and stop after an optimizer step inside an epoch."""
        every = trainer.accumulate_grad_batches
        if trainer.world_size > 1:
            every *= math.ceil(10 / every)
        if trainer.is_last_batch or (batch_idx + 1) % every or not self._should_stop(trainer):
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", weights_only=False)
        self._stop(trainer, f"at epoch {trainer.current_epoch}, step {trainer.global_step}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the previous epoch, which has been saved unless ``every_n_epochs`` of last_checkpoint skips it."""
        if self._should_stop(trainer):
            self._stop(trainer, f"after epoch {trainer.current_epoch - 1}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the last epoch; later signals stop the run immediately."""
        self.handler.deferred = False
        if self._should_stop(trainer):
            self._stop(trainer, "after the last epoch")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Log the processes whose end may have caused the exception."""
        self.handler.deferred = False
        self.handler.log_killed()

    def _should_stop(self, trainer: pl.Trainer) -> bool:
        received = self.handler.received is not None
        return received if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(received, all=False)

    def _stop(self, trainer: pl.Trainer, when: str) -> None:
        signum = self.handler.received or signal.SIGTERM  # received by another process
        log.info("stopped by %s %s", signum.name, when)
        self.handler.stop()
