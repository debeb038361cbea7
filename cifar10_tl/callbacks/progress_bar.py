"""Progress bar of a run and of evaluations."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import planned_steps


class RunProgressBar(ProgressBar):
    """Progress bar over all steps of a run, and over the images of a test.

    It shows the time left, images/s, and the loss and accuracy of the epoch so far, which it reads every
    ``refresh_seconds`` because each read waits for the device. No bar is shown where stderr is not a terminal.
    ``description`` is the text in front of the bar of the next test.
    """

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        super().__init__()
        self.refresh_seconds, self.description = refresh_seconds, "test"
        self._bar, self._stack = tqdm(disable=True), ExitStack()
        self._disabled: bool | None = None  # tqdm decides by stderr
        self._refreshed_at, self._images = 0.0, 0

    def disable(self) -> None:
        self._disabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(
            total=_num_batches(trainer),
            initial=trainer.global_step * trainer.accumulate_grad_batches,
            unit=" steps",
            smoothing=0.02,  # the time left includes validation
            mininterval=self.refresh_seconds / 2,
        )
        self._refreshed_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refreshed_at, self._images = time.perf_counter(), 0
        self._bar.set_description_str(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")
        self._bar.total = _num_batches(trainer)  # a time budget changes it

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        if self._bar.disable:
            return
        self._images += len(batch.images) * trainer.world_size
        now = time.perf_counter()
        if now - self._refreshed_at >= self.refresh_seconds:
            epoch = pl_module.running_metrics()
            speed = self._images / (now - self._refreshed_at)
            self._bar.set_postfix_str(f"loss {epoch['loss']:.3f} acc {epoch['acc']:.1%} {speed:.0f} images/s", False)
            self._refreshed_at, self._images = now, 0
        self._bar.update()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.set_description_str(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.test_dataloaders
        self._open(total=len(loader.dataset), desc=self.description, unit=" images", leave=False)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        self._bar.update(len(batch.images) * trainer.world_size)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stack.close()

    def on_exception(self, *_: Any) -> None:
        self._stack.close()

    def _open(self, **options: Any) -> None:
        self._bar = self._stack.enter_context(tqdm(disable=self._disabled, dynamic_ncols=True, **options))
        if not self._bar.disable:
            self._stack.enter_context(logging_redirect_tqdm())


def _num_batches(trainer: pl.Trainer) -> int | None:
    steps = planned_steps(trainer)
    return None if steps == float("inf") else int(steps) * trainer.accumulate_grad_batches
