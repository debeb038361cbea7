"""The end of a run that got a signal."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from cifar10_tl.data.batch import Batch
from cifar10_tl.engine.processes import SignalHandler, Stopped, name_the_killed

log = logging.getLogger(__name__)


class GracefulStop(Callback):
    """Ends the run at the end of the step in which a signal came, with all of it in ``checkpoints/last.ckpt``.

    Where the signal comes in an epoch's last step, or behind it, the epoch is validated and saved first. Several
    processes stop at the same step: they ask each other at about every ``ask_every``-th batch, for a signal reaches
    them at different times. Lightning on its own would ask in every step, and have the device wait for the answer.

    A SLURM job that is told to make room (SIGUSR1, see scripts/slurm.sh) is put back into the queue, too.
    """

    def __init__(self, interruption: SignalHandler, ask_every: int = 10) -> None:
        self.interruption, self.ask_every = interruption, ask_every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals from Lightning, which has just taken them; from here on, they wait for a step's end."""
        self.interruption.install()
        self.interruption.deferring = True
        self.interruption.forward = lambda signum: _tell_children(trainer, signum)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take them again."""
        self.interruption.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save and stop, if it is time."""
        an_update = trainer.accumulate_grad_batches
        every = an_update if trainer.world_size == 1 else an_update * math.ceil(self.ask_every / an_update)
        if trainer.is_last_batch or (batch_idx + 1) % every or not self._agreed(trainer):
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", weights_only=False)
        self._stop(trainer, f"at epoch {trainer.current_epoch}, step {trainer.global_step}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop behind an epoch, which has been saved."""
        if self._agreed(trainer):
            self._stop(trainer, f"after epoch {trainer.current_epoch - 1}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop behind the last epoch; and from here on, a signal does not wait."""
        self.interruption.deferring = False
        if self._agreed(trainer):
            self._stop(trainer, "after the last epoch")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Training is over; perhaps because a process that this one started is."""
        self.interruption.deferring = False
        name_the_killed(_children(trainer))

    def _agreed(self, trainer: pl.Trainer) -> bool:
        told = self.interruption.received is not None
        return told if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(told, all=False)

    def _stop(self, trainer: pl.Trainer, when: str) -> None:
        signum = self.interruption.received or signal.SIGTERM  # another process got it
        log.info("stopped by %s %s", signum.name, when)
        environment = trainer._accelerator_connector.cluster_environment
        if signum == signal.SIGUSR1 and isinstance(environment, SLURMEnvironment) and trainer.is_global_zero:
            _requeue()
        raise Stopped(signum)


def _children(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes that Lightning started from this one."""
    return getattr(trainer.strategy.launcher, "procs", [])


def _tell_children(trainer: pl.Trainer, signum: int) -> None:
    for process in _children(trainer):
        process.send_signal(signum)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = shutil.which("scontrol")
    done = subprocess.run([command, "requeue", job]) if command else None  # noqa: S603
    if done is None or done.returncode:
        log.warning("scontrol requeue %s failed: start the job again by hand, it goes on by itself", job)
    else:
        log.info("job %s is back in the queue, and will go on in this folder", job)
