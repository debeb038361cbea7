"""How fast the run is, and how long it will take."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from cifar10_tl.data.batch import Batch

log = logging.getLogger(__name__)


LONG_RUN_SECONDS = 3600


class Throughput(Callback):
    """Times training, validation and figures left out, without waiting for the device more than once an epoch.

    Attributes:
        epoch_seconds: of the latest epoch's training steps.
        epoch_images_per_second: of all processes.
        epoch_data_wait: share of the epoch's time from the end of a step to the start of the next: fetching a batch,
            bringing it to the device and augmenting it (on a GPU: handing these over to it).
        first_step_seconds: from the start of the fit to the end of its first step.
        earlier_seconds: of the fit before this run was resumed, up to the checkpoint that it goes on from.
    """

    def __init__(self) -> None:
        self.first_step_seconds: float | None = None
        self.earlier_seconds = 0.0
        self._seconds, self._images = 0.0, 0
        self._epoch_images, self._epoch_start, self._epoch_end = 0, 0.0, 0.0
        self._fit_start = 0.0
        self._epoch_steps, self._epoch_wait, self._step_end = 0, 0.0, 0.0
        self._steps, self._second_step_end = 0, 0.0
        self._told = False

    @property
    def epoch_seconds(self) -> float:
        """Seconds of the latest epoch's training steps."""
        return self._epoch_end - self._epoch_start

    @property
    def epoch_images_per_second(self) -> float:
        """Images a second over the latest epoch, of all processes."""
        return self._epoch_images / max(self.epoch_seconds, 1e-9)

    @property
    def epoch_step_ms(self) -> float:
        """Milliseconds of the latest epoch's mean step, waiting for its batch included."""
        return 1000 * self.epoch_seconds / max(self._epoch_steps, 1)

    @property
    def epoch_data_wait(self) -> float:
        """Share of the latest epoch's time in which the next batch was made ready."""
        return self._epoch_wait / max(self.epoch_seconds, 1e-9)

    @property
    def images_per_second(self) -> float | None:
        """Images a second over all epochs of the run, of all processes; None before the first."""
        return self._images / self._seconds if self._seconds else None

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far: a resumed run goes on from it."""
        return {
            "seconds": self._seconds,
            "images": self._images,
            "first_step_seconds": self.first_step_seconds,
            "fit_seconds": self.earlier_seconds + time.perf_counter() - self._fit_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was measured before the run stopped."""
        self._seconds, self._images = state_dict["seconds"], state_dict["images"]
        self.first_step_seconds = state_dict["first_step_seconds"]
        self.earlier_seconds = state_dict.get("fit_seconds", 0.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._fit_start = time.perf_counter()
        self._start_epoch()  # for an epoch resumed in its middle

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._epoch_start = self._step_end = time.perf_counter()
        self._epoch_images, self._epoch_steps, self._epoch_wait = 0, 0, 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add up the time that the batch took to come."""
        self._epoch_wait += time.perf_counter() - self._step_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the step; the epoch's last one waits until the device has done them all."""
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._epoch_end = self._step_end = time.perf_counter()
        self._epoch_steps += 1
        self._epoch_images += len(batch.images) * trainer.world_size
        self._steps += 1
        if self._steps == 1:
            self.first_step_seconds = self._epoch_end - self._fit_start
        elif self._steps == 2:
            self._second_step_end = self._epoch_end
        elif not self._told and pl_module.device.type == "cpu":
            self._tell_of_a_long_run(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch to the run."""
        self._seconds += self.epoch_seconds
        self._images += self._epoch_images

    def row(self, device: torch.device) -> dict[str, float | None]:
        """The latest epoch's numbers, as they stand in metrics.csv."""
        return {
            "seconds": round(self.epoch_seconds, 3),
            "images_per_second": round(self.epoch_images_per_second, 1),
            "step_ms": round(self.epoch_step_ms, 3),
            "data_wait": round(self.epoch_data_wait, 4),
            "peak_memory_gb": peak_memory_gb(device),
        }

    def _tell_of_a_long_run(self, trainer: pl.Trainer) -> None:
        """Once, when the steps so far allow to tell: after ten of them, or half a minute."""
        measured = self._epoch_end - self._second_step_end
        if self._steps < 12 and measured < 30:
            return
        self._told = True
        left = (trainer.estimated_stepping_batches - trainer.global_step) * trainer.accumulate_grad_batches
        seconds = measured / (self._steps - 2) * left
        if seconds > LONG_RUN_SECONDS and trainer.is_global_zero:
            log.info(
                "At this rate the run will take about %s on this CPU. What suits a CPU: experiment=quickstart "
                "(minutes), experiment=probe (one pass through the network), a smaller model.image_size, or fewer "
                "images (data.image_limit).",
                timedelta(seconds=round(seconds)),
            )


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory (10^9 bytes) held so far: tensors on a GPU, elsewhere the process; None where it is not known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)
