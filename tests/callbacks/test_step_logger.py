from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.small_fit import small_fit
from helpers import StepLosses, scalars
from lightning.pytorch.loggers import TensorBoardLogger

from cifar10_tl.callbacks import StepLogger


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values by tag, without those on the axis of the epochs."""
    return {tag: scalars(folder, tag) for tag in ("train/loss_step", "lr/backbone", "lr/head")}


def test_losses_and_rates_of_all_steps_are_logged_if_there_are_few(tmp_path: Path) -> None:
    StepLosses.seen.clear()
    optimizer = {"name": "SGD", "lr": 0.1, "backbone_lr_scale": 0.5}
    logger = TensorBoardLogger(tmp_path, name="", version="")
    small_fit(tmp_path, StepLosses(), StepLogger(), optimizer=optimizer, max_epochs=2, logger=logger)
    logger.finalize("success")
    found = logged(tmp_path)
    assert [step for step, _ in found["train/loss_step"]] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in found["train/loss_step"]] == pytest.approx(StepLosses.seen, rel=1e-6)
    assert found["lr/backbone"] == [(step, pytest.approx(0.05)) for step in range(1, 7)]
    assert found["lr/head"] == [(step, pytest.approx(0.1)) for step in range(1, 7)]


def test_a_point_is_the_mean_since_the_previous_one(tmp_path: Path) -> None:
    callback = StepLogger(points=1)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer, _ = small_fit(tmp_path, callback, max_epochs=1, logger=logger)
    ((step, loss, *_),) = callback.rows
    assert (step, loss) == (3, pytest.approx(float(trainer.callback_metrics["train/loss"]), rel=1e-6))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("num_batches", [1, 19, 39, 40, 351, 1000])
def test_an_epoch_has_20_to_40_points_and_is_not_read_before_its_end(num_batches: int, accumulate: int) -> None:
    """A tensor on the device "meta" has no values to read."""
    groups = [{"name": "head", "lr": 0.1}, {"name": "head without decay", "lr": 0.1}]
    state: dict[str, Any] = {"accumulate_grad_batches": accumulate, "num_training_batches": num_batches}
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=groups)], **state)
    module = SimpleNamespace(train_totals=lambda: torch.zeros(3, device="meta"))
    callback = StepLogger()
    for batch_idx in range(num_batches):
        trainer.global_step = -(-(batch_idx + 1) // accumulate)
        callback.on_train_batch_end(trainer, module, None, None, batch_idx)
    num_steps = -(-num_batches // accumulate)
    steps = [int(step) for step, *_ in callback._pending]
    assert len(steps) == num_steps if num_steps < 20 else 20 <= len(steps) <= 40
    assert steps[-1] == num_steps
    assert steps == sorted(set(steps)), "one point per optimizer step"
    assert callback.tags == ["train/loss_step", "lr/head"]


def test_nothing_is_done_in_the_steps_without_tensorboard(tmp_path: Path) -> None:
    callback = StepLogger()
    small_fit(tmp_path, callback)
    assert callback.on_train_batch_end is None
    assert callback.rows == []
