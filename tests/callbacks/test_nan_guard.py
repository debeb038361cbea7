from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.small_fit import small_fit
from lightning.pytorch.callbacks import Callback

from cifar10_tl.callbacks import NaNGuard, RunCheckpoint
from cifar10_tl.config.errors import UserError

DIVERGES: Any = {"name": "SGD", "lr": 1e30, "backbone_lr_scale": 1.0}


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    options = {"every_n_train_steps": 1, "enable_version_counter": False}
    checkpoint = RunCheckpoint("last", dirpath=last.parent, **options)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at epoch 0, batch 1; the last good checkpoint is"):
        small_fit(tmp_path, NaNGuard(), checkpoint, optimizer=DIVERGES)
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    """The last step of the epoch makes the weights NaN, after its own loss was finite."""
    checkpoint = RunCheckpoint("last", dirpath=tmp_path)
    with pytest.raises(UserError, match=r"the validation loss is nan at epoch 0; there is no checkpoint yet. Try a"):
        small_fit(tmp_path, NaNGuard(), checkpoint, optimizer=DIVERGES, limit_train_batches=1)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.network.head.layers[0].weight.data.fill_(torch.nan)

    checkpoint = RunCheckpoint("last", dirpath=tmp_path, every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(UserError, match=r"the weights are not finite at epoch 0"):
        small_fit(tmp_path, Break(), NaNGuard(), checkpoint)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
