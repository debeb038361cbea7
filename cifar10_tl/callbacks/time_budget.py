"""Number of epochs of a run that has to end within a given time.

Before the first step, a few training steps are timed on the run's own weights and optimizer, whose state is restored
afterwards. The number of epochs is the largest one with which training, validation and the test end within the budget;
the last epoch may have fewer steps. After each epoch, measured times replace the estimates, and the plan changes if it
needs more time than is left, or leaves 6% of it unused. The schedule of the learning rate, a function of step / all
steps, then continues from the fraction that is now done. Training stops inside an epoch only if nothing but the test
fits into the budget any more; one validation follows. A resumed run continues with the plan of its checkpoint and with
the time that was left then, so that the time between two starts does not count.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
from bisect import bisect_right
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.config.validation import seconds_of
from cifar10_tl.io import atomic_write_text

log = logging.getLogger(__name__)

#: Seconds to start Python and Hydra, to write report.html, and to exit.
PROCESS_SECONDS = 5.5
#: Estimate of the seconds per epoch for figures and checkpoints before the first epoch.
FILES_SECONDS = 2.0
#: Fraction of the time that a new plan leaves unused; the plan is kept until that is used, too.
RESERVE = 0.03
#: Smallest fraction of an epoch that the last one has; the first epoch is always complete.
SHORTEST = 0.05
LIMIT = 1_000_000  # epochs
_PLAN = ("epochs", "last_batches", "total_steps", "done")
_STATE = (*_PLAN, "phases", "slowdown", "validation_seconds", "other_seconds", "is_over")


class TimeBudget(Callback):
    """Callback that sets the number of epochs and steps such that the run ends within ``budget``, such as "10min".

    Args:
        budget: Time of the whole command.
        started: ``time.perf_counter()`` at the start of the run.
        test: Whether the run ends with a test.
    """

    def __init__(self, budget: str, started: float, test: bool) -> None:
        self.budget, self.started, self.test = budget, started, test
        self.epochs: int | None = None  # None before the first plan
        self.last_batches = self.done = 0  # batches of the last epoch (0: as many as the others), complete epochs
        self.total_steps: int | None = None  # if the last epoch is shorter
        self.phases: list[tuple[float, float]] = []  # first fraction of the epochs, estimated seconds per step
        self.slowdown = 1.0  # measured / estimated seconds per step
        self.validation_seconds = self.other_seconds = 0.0  # of an epoch; other: everything except training steps
        self.is_over = False
        self._epoch_start, self._step_ends = 0.0, list[float]()
        self._every: int | None = None  # epochs between validations

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE} | {"spent": time.perf_counter() - self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.started -= state_dict["spent"]
        for name in _STATE:
            setattr(self, name, state_dict[name])

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Set the number of epochs and steps of a resumed run before its loader and schedule are created."""
        if trainer.state.fn == "fit":
            state = checkpoint["callbacks"][self.state_key]
            trainer.fit_loop.max_epochs, pl_module.total_steps = state["epochs"], state["total_steps"]
            if state["last_batches"] and state["done"] + 1 == state["epochs"]:
                trainer.limit_train_batches = state["last_batches"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Skip the training of a resumed run whose budget is spent."""
        trainer.should_stop = trainer.should_stop or self.is_over
        self._every = trainer.check_val_every_n_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Time a step and plan the epochs of a new run, and shorten the last epoch if the plan says so."""
        if self.epochs is None:
            if self.test:
                trainer.datamodule.with_features("test")  # type: ignore[attr-defined]  # fills a cache
            self.phases = [(start, step_seconds(trainer, pl_module, size)) for start, size in pl_module.image_sizes]
            loader: Any = trainer.train_dataloader
            num_batches = _num_images(trainer, "val") / loader.sampler.batch_size
            self.validation_seconds = num_batches * self.phases[-1][1] / 3  # a step without the backward pass
            self.other_seconds = self.validation_seconds / (trainer.check_val_every_n_epoch or 1) + FILES_SECONDS
            self._plan(trainer, pl_module, done=0)
        if trainer.current_epoch + 1 == self.epochs and self.last_batches:
            trainer.train_dataloader.limit = self.last_batches  # type: ignore[union-attr]
            trainer.fit_loop.max_batches = trainer.val_check_batch = self.last_batches
        self._epoch_start = self._epoch_start or time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop inside an epoch if only the test still fits into the budget; validate an epoch that may be the last."""
        self._step_ends.append(time.perf_counter())
        if trainer.is_last_batch and self._every is not None and trainer.current_epoch + 1 != self.epochs:
            trainer.check_val_every_n_epoch = 1 if self._may_end(trainer) else self._every
        every = trainer.accumulate_grad_batches * (1 if trainer.world_size == 1 else 10)  # processes have to agree
        if trainer.is_last_batch or (batch_idx + 1) % every:
            return
        if trainer.strategy.broadcast(self._left(trainer) < 0):
            self.is_over = trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1
            log.info("budget=%s: no time is left, stopping inside epoch %d", self.budget, trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step_ends:  # else a sanity check
            self.validation_seconds = time.perf_counter() - self._step_ends[-1]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Update the estimates, from an epoch that this process trained entirely, and then the plan."""
        now, ends = time.perf_counter(), self._step_ends
        if len(ends) == trainer.num_training_batches:
            slowdown = self._measured(trainer)
            other = now - self._epoch_start - slowdown * self._estimate(trainer.current_epoch, self.epochs) * len(ends)
            weight = max(0.2, 1 / (trainer.current_epoch + 2))  # a mean first, later a moving average
            self.slowdown += weight * (slowdown - self.slowdown)
            self.other_seconds += weight * (other - self.other_seconds)
        self._epoch_start, self._step_ends, self.done = now, [], trainer.current_epoch + 1
        if not trainer.should_stop:
            self._plan(trainer, pl_module, self.done)

    def _may_end(self, trainer: pl.Trainer) -> bool:
        """Return whether there may be no time for another epoch after this one; the same in all processes."""
        done = trainer.current_epoch + 1
        needed = self._seconds(_shortest(trainer), done, done + 1) * max(1, self._measured(trainer) / self.slowdown)
        left = self._left(trainer) - self.validation_seconds
        return bool(trainer.strategy.broadcast(left < 1.2 * needed))  # the estimates may still change

    def _measured(self, trainer: pl.Trainer) -> float:
        """Return the measured / estimated seconds per step of this epoch."""
        ends = self._step_ends  # without the first step, which may draw a figure
        if len(ends) == 1:
            return self.slowdown
        return (ends[-1] - ends[0]) / (len(ends) - 1) / self._estimate(trainer.current_epoch, self.epochs)

    def _estimate(self, epoch: int, epochs: int | None) -> float:
        """Return the estimated seconds per step of an epoch of a run of ``epochs`` epochs."""
        assert epochs is not None
        return next(seconds for start, seconds in reversed(self.phases) if round(start * epochs) <= epoch)

    def _left(self, trainer: pl.Trainer) -> float:
        """Return the seconds that are left until the last checkpoint is saved and the test starts."""
        tests = _num_images(trainer, "test") / max(1, _num_images(trainer, "val")) if self.test else 0
        tests *= 1 + trainer.datamodule.splits["test"].slow  # type: ignore[attr-defined]  # also read for the checksum
        # other_seconds contains 1 / every validations of an epoch; the last epoch is always validated
        validations = tests + 1 - 2 / (self._every or 1)
        closing = PROCESS_SECONDS + self.other_seconds + validations * self.validation_seconds
        return seconds_of(self.budget) - (time.perf_counter() - self.started) - closing

    def _seconds(self, num_batches: int, done: int, epochs: int, last_batches: int = 0) -> float:
        """Return the estimated seconds until all epochs are trained and validated if ``done`` are.

        The last epoch has ``last_batches`` batches, 0: as many as the others.
        """
        starts = [max(done, round(start * epochs)) for start, _ in self.phases]
        counts = (end - start for start, end in pairwise([*starts, epochs]))
        steps = num_batches * sum(count * seconds for count, (_, seconds) in zip(counts, self.phases, strict=True))
        if last_batches:
            steps -= (num_batches - last_batches) * self._estimate(epochs - 1, epochs)
        return steps * self.slowdown + (epochs - done) * self.other_seconds

    def _plan(self, trainer: pl.Trainer, pl_module: Any, done: int) -> None:
        """Plan the epochs at the start, and again if the plan does not fit the remaining time."""
        if self.epochs is not None and done >= self.epochs:
            return
        left, num_batches = self._left(trainer), int(trainer.num_training_batches)
        needed, goal = partial(self._seconds, num_batches, done), left / (1 + RESERVE)
        epochs, last_batches = self.epochs or 0, self.last_batches
        if not epochs or not goal / (1 + RESERVE) <= needed(epochs, last_batches) <= left:
            whole = bisect_right(range(LIMIT), goal, lo=done + 1, key=needed) - 1
            whole = whole or int(needed(1) <= left)
            excess = (needed(whole + 1) - goal) / self._estimate(whole, whole + 1) / self.slowdown
            epochs, last_batches = whole + 1, num_batches - math.ceil(excess)
            if not whole or last_batches < _shortest(trainer):
                epochs, last_batches = whole, 0
        epochs, last_batches = trainer.strategy.broadcast((epochs, last_batches))
        if epochs == 0:
            total = seconds_of(self.budget) - left + needed(1)
            raise UserError(
                f"budget={self.budget}: an epoch and the test take about {total:.0f} s on this machine; use "
                f"budget={1.1 * total:.0f}s or more, a lower data.image_limit or a smaller model"
            )
        if (epochs, last_batches) != (self.epochs, self.last_batches):
            self._set_epochs(trainer, pl_module, epochs, last_batches)
            trained = epochs - (1 - last_batches / num_batches if last_batches else 0)
            log.info("budget=%s: %.4g epochs in all, %.0f s left for %.4g", self.budget, trained, left, trained - done)

    def _set_epochs(self, trainer: pl.Trainer, pl_module: Any, epochs: int, last_batches: int) -> None:
        is_changed = epochs != self.epochs
        self.epochs = trainer.fit_loop.max_epochs = epochs
        self.last_batches, self.total_steps = last_batches, None
        if last_batches:
            batches = [int(trainer.num_training_batches)] * (epochs - 1) + [last_batches]
            self.total_steps = sum(math.ceil(number / trainer.accumulate_grad_batches) for number in batches)
        pl_module.total_steps = self.total_steps
        pl_module.reschedule()
        path = Path(trainer.default_root_dir) / RUN_CONFIG
        if is_changed and trainer.is_global_zero and path.exists():
            config = OmegaConf.load(path)
            config.trainer.max_epochs = epochs
            atomic_write_text(path, OmegaConf.to_yaml(config))


def step_seconds(trainer: pl.Trainer, pl_module: Any, image_size: int) -> float:
    """Return the median time of a training step at this size, and leave the state of the run as it was."""
    loader: Any = trainer.train_dataloader
    positions = next(iter(copy.copy(loader.sampler)))
    optimizer, times = trainer.optimizers[0], list[float]()
    pl_module.network.training_size = image_size
    weights, optimizer_state = copy.deepcopy((pl_module.state_dict(), optimizer.state_dict()))
    for _ in range(4):  # each training batch seeds the random numbers again
        batch = trainer.strategy.batch_to_device(loader.dataset[positions])
        trainer.strategy.training_step(batch, 0).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    pl_module.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    return statistics.median(end - start for start, end in pairwise(times))  # without the first, which may compile


def _shortest(trainer: pl.Trainer) -> int:
    """Return the smallest number of batches that the last epoch may have."""
    return max(1, round(SHORTEST * trainer.num_training_batches))


def _num_images(trainer: pl.Trainer, name: str) -> float:
    """Return the number of images of val or test that are evaluated."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    limit, count = getattr(trainer, f"limit_{name}_batches"), len(data.splits[name])
    return limit * count if isinstance(limit, float) else min(limit * data.hparams["batch_size"], count)
