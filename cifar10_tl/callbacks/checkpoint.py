"""Checkpoints of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from cifar10_tl.io import atomic_write


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint for a run that can be resumed exactly and whose folder can be moved.

    Only complete, validated epochs compete for the best. A run that stops inside an epoch (``max_steps``, ``max_time``)
    saves its last step, so that a longer resume continues that epoch.

    If several checkpoints are kept (``save_top_k``), the epoch is appended to the name of each, and the best one is
    copied to ``filename``, the name without extension. ``monitor`` is "val/loss", a metric to maximize such as
    "val/acc", or None: save every time.
    """

    def __init__(self, filename: str, monitor: str | None = None, save_top_k: int = 1, **options: Any) -> None:
        keeps_several = monitor is not None and save_top_k not in (0, 1) and "{" not in filename
        self._copy_best_to = f"{filename}.ckpt" if keeps_several else None
        self._stops = False
        self._copied = ""  # not known after a start: the run may have been killed before it copied the best one
        pattern = f"{filename}-{{epoch}}" if keeps_several else filename
        mode = "min" if monitor == "val/loss" else "max"
        super().__init__(filename=pattern, monitor=monitor, mode=mode, save_top_k=save_top_k, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with all paths in the current folder.

        Lightning forgets the best score when the folder has moved, and it deletes the files that it replaces: a
        checkpoint from somebody else must not name a file outside this folder.
        """
        state = state_dict | {"dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = self._moved(state[key])
        state["best_k_models"] = {self._moved(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _moved(self, path: str) -> str:
        return str(Path(str(self.dirpath), Path(path).name)) if path.endswith(".ckpt") else ""

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """Return values for file names, with the global step instead of the metric "step" (TensorBoard's x axis)."""
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def _save_last(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.best_model_path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        trainer.save_checkpoint(self.best_model_path, weights_only=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: Any) -> None:
        """Save inside an epoch, after an optimizer step; the last step of an epoch is saved after validation."""
        accumulates = (step[-1] + 1) % trainer.accumulate_grad_batches > 0 and not trainer.is_last_batch
        if self.monitor is None:  # a request to stop, such as that of max_time, waits for the optimizer step
            self._stops = self._stops or trainer.should_stop
            trainer.should_stop = self._stops and not accumulates
            self._stops = self._stops and accumulates
        if trainer.is_last_batch or accumulates:
            return
        if self.monitor is None and (trainer.should_stop or trainer.global_step == trainer.max_steps):
            self._save_last(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, *step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a complete epoch, the last one in any case; an epoch that was not validated cannot be the best."""
        if not trainer.is_last_batch or (self.monitor is not None and pl_module.evaluation is None):
            return
        super().on_train_epoch_end(trainer, pl_module)
        done, every = trainer.current_epoch + 1, self.every_n_epochs
        ends = trainer.should_stop or done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if self.monitor is None and ends and every and done % every:
            self._save_last(trainer)
        best, is_copied = Path(self.best_model_path), self.best_model_path == self._copied
        if self._copy_best_to and not is_copied and trainer.is_global_zero and best.is_file():
            self._copied = self.best_model_path
            with best.open("rb") as source, atomic_write(best.with_name(self._copy_best_to)) as target:
                shutil.copyfileobj(source, target)
