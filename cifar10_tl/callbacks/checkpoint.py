"""Checkpoints of a run whose folder may be moved."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which on its own forgets the best score when its folder has another name."""

    @cached_property
    def state_key(self) -> str:
        """As Lightning has it, which asks for it at each of the six hooks of each step, and makes it anew each time."""
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint, its paths led to where the run lies now.

        Each is taken for the name of a checkpoint in our own folder, whatever it says: Lightning deletes what was
        best, and a checkpoint from somebody else could name any file.
        """
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {
            "dirpath": str(self.dirpath),
            "best_k_models": {self._own(path): score for path, score in state_dict["best_k_models"].items()},
            **{key: self._own(state_dict[key]) for key in paths},
        }
        super().load_state_dict(state_dict | here)

    def _own(self, path: str) -> str:
        name = Path(path).name
        return str(Path(str(self.dirpath)) / name) if name.endswith(".ckpt") else ""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Save inside an epoch, but only where a run can go on as if it had not stopped.

        Not between the batches of one update, whose gradients no checkpoint holds; and not at the epoch's last step:
        a run resumed from there would not validate that epoch.
        """
        updated = (arguments[-1] + 1) % trainer.accumulate_grad_batches == 0
        if updated and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *arguments)


def is_best(trainer: pl.Trainer) -> bool:
    """Return whether the validation that has just ended is better than the best checkpoint of ``trainer``."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.monitor is None or checkpoint.best_model_score is None:
        return True
    score, best = trainer.callback_metrics[checkpoint.monitor], checkpoint.best_model_score
    return bool(score < best if checkpoint.mode == "min" else score > best)
