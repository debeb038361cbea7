"""Speed and memory of a run."""

from __future__ import annotations

import logging
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import planned_steps

log = logging.getLogger(__name__)

LONG_RUN_SECONDS = 3600


class Throughput(Callback):
    """Callback that measures the speed of training, without validation and figures.

    It waits for the device once per epoch. On a CPU it logs if the run is going to take over an hour.
    """

    def __init__(self) -> None:
        self.first_step_seconds: float | None = None  # from the start of the fit
        self.earlier_seconds = 0.0  # of the fit before the checkpoint from which this run was resumed
        self._seconds, self._images, self._steps = 0.0, 0, 0  # of all epochs
        self._epoch_images, self._epoch_steps, self._epoch_wait = 0, 0, 0.0
        self._fit_start = self._epoch_start = self._second_step_end = self._step_end = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Return images/s over all epochs and processes, None before the end of the first epoch."""
        return self._images / self._seconds if self._seconds else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self._seconds,
            "images": self._images,
            "first_step_seconds": self.first_step_seconds,
            "fit_seconds": self.earlier_seconds + time.perf_counter() - self._fit_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._images = state_dict["seconds"], state_dict["images"]
        self.first_step_seconds, self.earlier_seconds = state_dict["first_step_seconds"], state_dict["fit_seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_start = self._epoch_start = self._step_end = time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # of an earlier job of a sweep

    def on_train_epoch_start(self, *_: Any) -> None:
        self._epoch_start = self._step_end = time.perf_counter()
        self._epoch_images, self._epoch_steps, self._epoch_wait = 0, 0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Add the time since this batch was requested: fetch, transfer and augmentation."""
        now = time.perf_counter()
        requested_at = getattr(trainer.train_dataloader, "requested_at", now)
        if self._epoch_start == self._fit_start:  # Lightning omits the start of an epoch that is resumed in the middle
            self.on_train_epoch_start()
            self._epoch_start = requested_at
        self._epoch_wait += now - requested_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        """Count the step; at the last one of an epoch wait for the device."""
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._step_end = time.perf_counter()
        self._epoch_images += len(batch.images) * trainer.world_size
        self._epoch_steps += 1
        self._steps += 1
        if self._steps == 1:
            self.first_step_seconds = self.first_step_seconds or self._step_end - self._fit_start
        elif self._steps == 2:
            self._second_step_end = self._step_end
        elif self._steps == 5 and pl_module.device.type == "cpu" and trainer.is_global_zero:
            self._log_long_run(trainer, len(getattr(pl_module, "image_sizes", ())) > 1)

    def on_train_epoch_end(self, *_: Any) -> None:
        self._seconds += self._step_end - self._epoch_start
        self._images += self._epoch_images

    def row(self, device: torch.device) -> dict[str, float | None]:
        """Return the columns of metrics.csv for the latest epoch."""
        seconds = max(self._step_end - self._epoch_start, 1e-9)
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(self._epoch_images / seconds, 1),
            "step_ms": round(1000 * seconds / max(self._epoch_steps, 1), 3),
            "data_wait": round(self._epoch_wait / seconds, 4),
            "peak_memory_gb": peak_memory_gb(device),
        }

    def _log_long_run(self, trainer: pl.Trainer, images_grow: bool) -> None:
        left = (planned_steps(trainer) - trainer.global_step) * trainer.accumulate_grad_batches
        seconds = (self._step_end - self._second_step_end) / (self._steps - 2) * left
        if seconds > LONG_RUN_SECONDS:
            log.info(
                "This run will take %s %s on this CPU. Faster: experiment=quickstart (minutes), experiment=probe "
                "(one pass through the network), a smaller model.image_size or data.image_limit.",
                "more than" if images_grow else "about",
                timedelta(seconds=round(seconds)),
            )


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB (10^9 bytes): tensors on a GPU, else the whole process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
