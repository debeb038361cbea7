"""Runs with a budget, under a clock that the run itself advances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, TINY, Accident, compose_train, resume, rows, saved_step
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from cifar10_tl.callbacks import time_budget
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.engine import builder
from cifar10_tl.train import train

pytestmark = pytest.mark.slow

#: Three steps per epoch.
RUN = (*SMALL, *TINY, "callbacks=minimal", "logger=none", "report=none", "model.head.dropout=0.2", "ema_decay=0.9")
STEP, VALIDATION = 2.0, 4.0
EPOCH = 3 * STEP + VALIDATION
#: After the last epoch: the test has as many images as val.
CLOSING = time_budget.PROCESS_SECONDS + VALIDATION


class Clock(Callback):
    """Clock that advances by ``STEP`` per training step and by ``VALIDATION`` per validation and test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow: dict[int, float] = {}  # factor for some steps

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.now += STEP * self.slow.get(trainer.global_step, 1)

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.now += VALIDATION

    def on_test_epoch_start(self, *_: Any) -> None:
        self.now += VALIDATION


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, real, build = Clock(), time_budget.step_seconds, builder.build_callbacks

    def timed_step(trainer: Any, module: Any, size: int) -> float:
        seen: list[int] = []
        hook = module.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
        assert real(trainer, module, size) == 0
        assert set(seen) == {size}
        hook.remove()
        return STEP

    monkeypatch.setattr(time_budget, "step_seconds", timed_step)
    monkeypatch.setattr(time_budget, "FILES_SECONDS", VALIDATION - STEP / 3)
    monkeypatch.setattr(builder, "build_callbacks", lambda *arguments: [clock, *build(*arguments)])
    for module in ("callbacks.time_budget", "train"):
        monkeypatch.setattr(f"cifar10_tl.{module}.time", clock)
    return clock


def start(run: Path, *overrides: str) -> Any:
    return train(compose_train(*RUN, f"paths.output_dir={run}", *overrides))


def state(run: Path) -> dict[str, Any]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = content["optimizer_states"]
    rates = [group["lr"] for group in optimizer["param_groups"]]
    weights = {name: content[name] for name in ("state_dict", "current_model_state")}
    return weights | {"optimizer": optimizer["state"], "rates": rates, "step": content["global_step"]}


def budget(epochs: float) -> str:
    return f"budget={CLOSING + epochs * EPOCH}s"


def test_run_is_the_one_of_as_many_epochs(clock: Clock, tmp_path: Path) -> None:
    sizes = "model.image_size=[[0,24],[0.5,32]]"
    results = start(tmp_path / "budget", budget(3.5), sizes)
    assert clock.now == CLOSING - time_budget.PROCESS_SECONDS + 3 * EPOCH
    assert results["epochs"] == results["config"]["trainer"]["max_epochs"] == 3
    assert OmegaConf.load(tmp_path / "budget" / RUN_CONFIG).trainer.max_epochs == 3
    start(tmp_path / "epochs", "trainer.max_epochs=3", sizes)
    torch.testing.assert_close(state(tmp_path / "budget"), state(tmp_path / "epochs"), rtol=0, atol=0)


def kill() -> None:
    raise RuntimeError("power cut")


def test_last_epoch_may_have_fewer_steps(clock: Clock, tmp_path: Path) -> None:
    """Two of three, for which weights and learning rates are those of a run of as many steps."""
    settings = ("model.image_size=[[0,24],[0.5,32]]", "optimizer=sgd")
    results = start(tmp_path / "budget", budget(3.99), *settings)
    assert clock.now == CLOSING - time_budget.PROCESS_SECONDS + 4 * EPOCH - STEP
    assert (results["epochs"], results["steps"]) == (4, 11)
    assert [row["step"] for row in rows(tmp_path / "budget") if row["val/acc"]] == ["3", "6", "9", "11"]
    start(tmp_path / "steps", "trainer.max_epochs=4", "trainer.max_steps=11", *settings)
    torch.testing.assert_close(state(tmp_path / "budget"), state(tmp_path / "steps"), rtol=0, atol=0)


@pytest.mark.parametrize("place", [("step", 4), ("step", 9), ("step", 10), ("validation", 3)])
def test_resumed_run_has_the_same_last_epoch(place: tuple[str, int], clock: Clock, tmp_path: Path) -> None:
    """Also the BatchNorm statistics of averaged weights, from three batches although the epoch has two."""
    settings = (budget(3.99), "+callbacks.accident={_target_: helpers.Accident}", "checkpoint_every_n_steps=1")
    settings += ("ema_bn_batches=3",)
    start(tmp_path / "whole", *settings)
    Accident.happens, Accident.at = kill, place
    with pytest.raises(RuntimeError, match="power cut"):
        start(tmp_path / "killed", *settings)
    resume(tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed") if row["val/acc"]] == ["3", "6", "9", "11"]
    torch.testing.assert_close(state(tmp_path / "killed"), state(tmp_path / "whole"), rtol=0, atol=0)


def test_last_epoch_may_accumulate_fewer_batches(clock: Clock, tmp_path: Path) -> None:
    start(tmp_path, budget(3.99), "optimizer=sgd", "trainer.accumulate_grad_batches=2")
    assert [row["step"] for row in rows(tmp_path) if row["val/acc"]] == ["2", "4", "6", "7"]
    assert float(rows(tmp_path)[-1]["lr"]) == 0, "the schedule is complete"


def test_slower_machine_trains_fewer_epochs(clock: Clock, tmp_path: Path) -> None:
    clock.slow = dict.fromkeys(range(3, 100), 2.0)  # 10 s for the first epoch, then 16 s
    start(tmp_path, budget(6.5), "optimizer=sgd")
    assert clock.now == CLOSING - time_budget.PROCESS_SECONDS + 10 + 3 * 16
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0, "the schedule is complete"


# part of an epoch is the best only if nothing else is
@pytest.mark.parametrize(("every", "best"), [(1, 0), (2, 1)])
def test_epoch_that_is_too_slow_is_stopped(
    every: int, best: int, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock.slow = {4: 100.0}
    results = start(tmp_path, budget(2.5), f"trainer.check_val_every_n_epoch={every}")
    assert (saved_step(tmp_path), results["best_epoch"], results["test"]["count"]) == (5, best, 32)
    assert caplog.text.count("stopping inside epoch 1") == 1
    assert resume(tmp_path)["test"] == results["test"]
    assert caplog.text.count("nothing left to train") == 1


def test_an_epoch_after_which_no_other_fits_was_validated(clock: Clock, tmp_path: Path) -> None:
    """Four epochs are planned, but the third takes three times as long as expected."""
    clock.slow = dict.fromkeys(range(6, 9), 3.0)
    start(tmp_path, budget(3.5), "trainer.check_val_every_n_epoch=2")
    assert [row["val/acc"] != "" for row in rows(tmp_path)] == [False, True, True]


def test_resumed_run_has_the_time_that_was_left(clock: Clock, tmp_path: Path) -> None:
    accident = ("+callbacks.accident={_target_: helpers.Accident}", "checkpoint_every_n_steps=1")
    clock.slow = dict.fromkeys(range(3, 6), 2.0)
    start(tmp_path / "whole", budget(5.3), *accident)
    seconds, clock.now = clock.now, 0.0

    Accident.happens, Accident.at = kill, ("step", 7)
    with pytest.raises(RuntimeError, match="power cut"):
        start(tmp_path / "killed", budget(5.3), *accident)
    clock.now += 1000 - STEP  # of the step that is repeated
    resume(tmp_path / "killed")
    assert clock.now == seconds + 1000
    assert [row["epoch"] for row in rows(tmp_path / "killed")] == ["0", "1", "2", "3"], "five were planned"
    torch.testing.assert_close(state(tmp_path / "killed"), state(tmp_path / "whole"), rtol=0, atol=0)


def test_requeued_job_resumes_with_the_planned_epochs(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (budget(3.5), "trainer.max_epochs=1", "+callbacks.accident={_target_: helpers.Accident}")

    Accident.happens, Accident.at = kill, ("step", 7)
    with pytest.raises(RuntimeError, match="power cut"):
        start(tmp_path, *command)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(tmp_path, *command)["epochs"] == 3


def test_too_little_time_is_reported_before_training(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"budget=.*about {CLOSING + EPOCH:.0f} s"):
        start(tmp_path, budget(0.9))
    assert not (tmp_path / "checkpoints").exists()
