"""One bar for the whole run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch


class RunProgressBar(ProgressBar):
    """Steps done of all steps, time left of the whole run, images a second, and the epoch's loss and accuracy so far.

    The numbers are fetched from the device at most every ``refresh_seconds``: each time, the step waits for it. There
    is no bar where stderr is no terminal; the log has a line an epoch.
    """

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        super().__init__()
        if not isinstance(refresh_seconds, (int, float)):
            raise UserError(f"refresh_seconds={refresh_seconds}: should be a number of seconds")
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm[Any] | None = None
        self._refreshed_at, self._images = 0.0, 0
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on ranks other than zero."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        self._bar = tqdm(
            total=None if steps == float("inf") else int(steps),
            initial=trainer.global_step * trainer.accumulate_grad_batches,
            unit=" steps",
            dynamic_ncols=True,
            disable=None if self._enabled and trainer.is_global_zero else True,
            smoothing=0.02,  # the time left should know of the pauses for validation
            mininterval=self.refresh_seconds / 2,
        )
        self._redirect = logging_redirect_tqdm()
        if not self._bar.disable:
            self._redirect.__enter__()
        self._refreshed_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which epoch it is, and measure its speed by itself."""
        self._refreshed_at, self._images = time.perf_counter(), 0
        self._describe(trainer, "")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the step, and now and then show the numbers."""
        if self._bar is None or self._bar.disable:
            return
        self._images += len(batch.images) * trainer.world_size
        now = time.perf_counter()
        if now - self._refreshed_at >= self.refresh_seconds:
            so_far = pl_module.running_metrics()
            speed = self._images / (now - self._refreshed_at)
            self._bar.set_postfix_str(f"loss {so_far['loss']:.3f} acc {so_far['acc']:.1%} {speed:.0f} images/s", False)
            self._refreshed_at, self._images = now, 0
        self._bar.update()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why the steps pause."""
        self._describe(trainer, ", validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _describe(self, trainer: pl.Trainer, doing: str) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{doing}")

    def _close(self) -> None:
        if self._bar is not None:
            if not self._bar.disable:
                self._redirect.__exit__(None, None, None)
            self._bar.close()
            self._bar = None


class EvaluationProgressBar(Callback):
    """Images done of all images of a test; there is no bar where stderr is no terminal.

    Attributes:
        description: what the next pass is for.
    """

    def __init__(self) -> None:
        self.description = ""
        self._bar: tqdm[Any] | None = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        loader: Any = trainer.test_dataloaders
        self._bar = tqdm(
            total=len(loader.dataset),
            desc=self.description,
            unit=" images",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the images."""
        if self._bar is not None:
            self._bar.update(len(batch.images))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
