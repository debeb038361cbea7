from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cifar10_tl.callbacks import TimeBudget
from cifar10_tl.callbacks.time_budget import PROCESS_SECONDS
from cifar10_tl.config.errors import UserError

#: One step takes 1 s, and 5 s per epoch go to validation and files.
STEPS, OTHER = 10, 5


class Images(list[None]):
    """As many images as a split has."""

    slow = False

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Plan:
    """A callback at a given time, with the parts of a trainer that it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, test: bool = True) -> None:
        monkeypatch.setattr("cifar10_tl.callbacks.time_budget.time", self)
        self.now, self.schedules, self.total_steps = 0.0, 0, 0
        self.callback = TimeBudget(f"{PROCESS_SECONDS + seconds}s", started=0.0, test=test)
        self.callback.phases, self.callback.other_seconds, self.callback.validation_seconds = [(0.0, 1.0)], OTHER, 3.0
        self.trainer: Any = SimpleNamespace(
            num_training_batches=STEPS,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(broadcast=lambda value: value),
            fit_loop=SimpleNamespace(max_epochs=40),
            datamodule=SimpleNamespace(splits={"val": Images(100), "test": Images(200)}, hparams={"batch_size": 8}),
            limit_val_batches=1.0,
            limit_test_batches=1.0,
            default_root_dir="nowhere",
            is_global_zero=True,
        )

    def perf_counter(self) -> float:
        return self.now

    def reschedule(self) -> None:
        self.schedules += 1

    def after(self, done: int, seconds: float) -> float:
        """Return the number of epochs planned when ``done`` are trained, ``seconds`` after the start."""
        self.now = seconds
        self.callback._plan(self.trainer, self, done)
        epochs, last = self.callback.epochs, self.callback.last_batches
        assert self.trainer.fit_loop.max_epochs == epochs is not None
        assert self.total_steps == ((epochs - 1) * STEPS + last if last else None)
        return epochs - (STEPS - last) / STEPS if last else epochs


@pytest.mark.parametrize(
    ("seconds", "test", "epochs"),
    [
        (8 + 4 * 15, True, 3.8),  # 8 s: the rest of the last epoch and a test of twice the images
        (8 + 4.2 * 15, True, 4),  # 3% of the time are left unused
        (2 + 4.2 * 15, False, 4),
        (2 + 4.1 * 15, False, 3.9),
        (8 + 1.03 * (15 + 5.9), True, 1),  # no time for a step in addition to a validation
        (8 + 1.03 * (15 + 6.1), True, 1.1),
        (8 + 15, True, 1),  # the only epoch needs no reserve
        (3600, True, 232.2),
    ],
)
def test_as_many_epochs_as_fit(seconds: float, test: bool, epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Plan(monkeypatch, seconds, test).after(0, 0) == epochs


def test_the_last_epoch_is_validated_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, epochs in ((0.0, 4), (0.3, 3.9)):  # OTHER has a quarter of a validation
        plan = Plan(monkeypatch, OTHER + 2.5 * 3 + 4.13 * 15 - missing, test=True)
        plan.callback._every = 4
        assert plan.after(0, 0) == epochs


def test_limits_of_validation_and_test_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, OTHER + 20 * 3 - 3 + 4.2 * 15)  # a tenth of val, all of test: 20 times a validation
    plan.trainer.limit_val_batches = 0.1
    assert plan.after(0, 0) == 4
    plan = Plan(monkeypatch, OTHER + 0.5 * 3 - 3 + 4.2 * 15)
    plan.trainer.limit_test_batches = 6  # of 8 images
    plan.trainer.limit_val_batches = 12
    assert plan.after(0, 0) == 4


def test_plan_changes_only_if_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 10 + 8 + 10.5 * 15)
    assert plan.after(0, seconds=10) == 10
    assert plan.after(1, seconds=10 + 15 + 6) == 10, "uses the reserve"
    assert plan.after(2, seconds=10 + 30 + 8) == 9.6, "116 of 119.5 s for seven epochs of 15 s and one of 11"
    assert plan.after(3, seconds=10 + 45 + 6) == 9.6, "5% more time than needed"
    assert plan.after(4, seconds=10 + 60 + 2) == 10
    assert plan.schedules == 3
    plan.callback.slowdown = 1.5
    assert plan.after(8, seconds=10 + 8 * 15) == 9.7
    assert plan.after(9, seconds=10 + 8 * 15 + 33) == 9, "no time for 5% of an epoch"
    assert plan.after(9, seconds=10 + 60) == 9, "a schedule that has ended is not continued"


def test_measured_times_replace_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten steps of 3 s, a validation of 7 s and 4 s for files."""
    plan = Plan(monkeypatch, 41 + 8 + 7 + 1.03 * 8 * (10 * 2 + 8))  # the means of estimated and measured times
    plan.trainer.current_epoch, plan.trainer.should_stop = 0, False
    assert plan.after(0, seconds=0) == 18
    plan.callback._step_ends = [3.0 * step for step in range(1, STEPS + 1)]
    plan.now = 37
    plan.callback.on_validation_epoch_end(plan.trainer, plan)  # type: ignore[arg-type]
    plan.now = 41
    plan.callback.on_train_epoch_end(plan.trainer, plan)
    assert plan.trainer.fit_loop.max_epochs == 9


def test_epochs_of_one_batch_leave_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 3600)
    plan.trainer.num_training_batches, plan.trainer.current_epoch, plan.trainer.should_stop = 1, 0, False
    assert plan.after(0, seconds=0) > 500
    plan.callback._step_ends, plan.now = [2.0], 6
    plan.callback.on_train_epoch_end(plan.trainer, plan)  # type: ignore[arg-type]
    assert (plan.callback.slowdown, plan.callback.other_seconds) == (1, OTHER)


def test_epochs_of_several_image_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 2 + 1.03 * (100 * (5 + 10 * 2.25) - 4 * 4), test=False)
    plan.callback.phases = [(0.0, 1.0), (0.5, 3.0), (0.75, 4.0)]
    assert plan.after(0, seconds=0) == 99.6
    left = 25 * (10 * 3 + 5) + 25 * (10 * 4 + 5)
    assert plan.callback._seconds(STEPS, 50, 100) == pytest.approx(left)
    assert plan.callback._seconds(STEPS, 90, 100) == pytest.approx(10 * 45)
    assert plan.callback._seconds(STEPS, 0, 3) == pytest.approx(10 * (1 + 1 + 4) + 3 * OTHER), "whole epochs"
    assert plan.callback._seconds(STEPS, 2, 3) == pytest.approx(10 * 4 + OTHER)
    assert plan.callback._seconds(STEPS, 0, 3, 2) == pytest.approx(10 * (1 + 1) + 2 * 4 + 3 * OTHER)
    assert plan.callback._seconds(STEPS, 0, 1, 2) == pytest.approx(2 * 3 + OTHER), "the last epoch has the second size"


def test_files_of_the_test_are_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 8 + 4.2 * 15)
    plan.trainer.datamodule.splits["test"].slow = True
    assert plan.after(0, 0) == 3.5


def test_budget_for_less_than_an_epoch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"budget=28.4s: .* about 28 s .* budget=31s"):
        Plan(monkeypatch, 8 + 15 - 0.1).after(0, seconds=0)


def test_all_processes_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 3600)
    plan.trainer.strategy.broadcast = lambda value: (7, 3)
    assert plan.after(0, seconds=0) == 6.3


def test_shorter_epochs_accumulate_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(monkeypatch, 8 + 1.03 * (2 * 15 + 5 + 6.1))
    plan.trainer.accumulate_grad_batches = 4
    plan.callback._plan(plan.trainer, plan, 0)
    assert (plan.callback.epochs, plan.callback.last_batches, plan.total_steps) == (3, 6, 3 + 3 + 2)
