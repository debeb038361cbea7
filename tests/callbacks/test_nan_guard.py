from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.train import train

Small = Callable[..., DictConfig]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(small_cfg: Small) -> None:
    cfg = small_cfg(*TINY, "optimizer.lr=1e30", "checkpoint_every_n_steps=1", "scheduler=constant")
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at epoch 0, batch 1; the last good checkpoint is"):
        train(cfg)
    last = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(small_cfg: Small) -> None:
    """The last step of the epoch makes the weights NaN, after its own loss was finite."""
    cfg = small_cfg(*TINY, "trainer.limit_train_batches=1", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant")
    with pytest.raises(UserError, match=r"the validation loss is nan at epoch 0; there is no checkpoint yet. Try a"):
        train(cfg)
    assert not (Path(cfg.paths.output_dir) / "results.json").exists()
