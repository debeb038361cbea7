"""Checkpoints of a run whose folder may be moved."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from cifar10_tl.config import moved


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which on its own forgets the best score when its folder has another name."""

    @cached_property
    def state_key(self) -> str:
        """As Lightning has it, which asks for it at each of the six hooks of each step, and makes it anew each time."""
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint, its paths led to where the run lies now."""
        super().load_state_dict(moved(state_dict, state_dict["dirpath"], str(self.dirpath)))

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Save inside an epoch, but not at its last step: a run resumed from there would not validate that epoch."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *arguments)
