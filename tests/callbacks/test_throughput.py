from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.small_fit import SPLIT, small_fit
from helpers import SlowStep

from cifar10_tl.callbacks import Throughput
from cifar10_tl.data.batch import Batch, Split

BATCH = Batch(torch.zeros(8, 3, 1, 1), torch.zeros(8).long(), torch.arange(8))
ON_CPU: Any = (None, SimpleNamespace(device=torch.device("cpu")))  # trainer and module


class Clock:
    """Stands in for ``time`` in the module under test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("cifar10_tl.callbacks.throughput.time", clock)
    return clock


def epoch(
    callback: Throughput,
    clock: Clock,
    steps: int,
    seconds: float,
    fetch: float,
    device: str = "cpu",
    sizes: int = 1,
    is_resumed: bool = False,
) -> None:
    """Run an epoch of two processes with batches of 8, ``seconds`` per step and ``fetch`` seconds per batch."""
    loader = SimpleNamespace(requested_at=0.0)
    trainer: Any = SimpleNamespace(
        world_size=2,
        is_last_batch=False,
        is_global_zero=True,
        train_dataloader=loader,
        global_step=0,
        estimated_stepping_batches=10_000,
        lightning_module=None,
        accumulate_grad_batches=1,
    )
    module: Any = SimpleNamespace(device=torch.device(device), image_sizes=[(0, 32)] * sizes)
    if not is_resumed:
        callback.on_train_epoch_start(trainer, module)
    for _ in range(steps):
        loader.requested_at = clock.now
        clock.now += fetch
        callback.on_train_batch_start(trainer, module, BATCH, 0)
        clock.now += seconds - fetch
        callback.on_train_batch_end(trainer, module, None, BATCH, 0)
    callback.on_train_epoch_end(trainer, module)


def test_speed_leaves_out_what_is_between_epochs(clock: Clock) -> None:
    callback = Throughput()
    for _ in range(2):
        clock.now += 100.0  # validation, figures, checkpoints
        epoch(callback, clock, steps=3, seconds=4.0, fetch=1.0)
    row = callback.row(torch.device("cpu"))
    assert (row["seconds"], row["images_per_second"], row["step_ms"], row["data_wait"]) == (12.0, 4.0, 4000.0, 0.25)
    assert 0.1 < row["peak_memory_gb"] < 1000  # type: ignore[operator]
    assert callback.images_per_second == 4.0
    assert callback.first_step_seconds == 104.0


def test_an_epoch_resumed_in_the_middle_begins_with_its_first_batch(clock: Clock) -> None:
    callback = Throughput()
    callback.on_fit_start(*ON_CPU)
    clock.now += 100.0  # features, logistic regression
    epoch(callback, clock, steps=3, seconds=4.0, fetch=1.0, is_resumed=True)
    assert [callback.row(torch.device("cpu"))[key] for key in ("seconds", "step_ms", "data_wait")] == [12, 4000, 0.25]


class SlowSplit(Split):
    def __getitem__(self, positions: torch.Tensor) -> Batch:
        time.sleep(0.05)
        return super().__getitem__(positions)


def test_only_waiting_for_a_batch_counts_as_waiting_for_data(tmp_path: Path) -> None:
    """Checkpoints are written, and other callbacks work, between the end of a step and the next batch."""
    callback = Throughput()
    small_fit(tmp_path, callback, SlowStep(), split=SlowSplit(SPLIT.images, SPLIT.labels))
    row = callback.row(torch.device("cpu"))
    assert 0.15 <= row["data_wait"] * row["seconds"] < 0.15 + SlowStep.seconds  # type: ignore[operator]


@pytest.mark.parametrize(
    ("seconds", "device", "sizes", "logged"),
    [(7.0, "cpu", 1, ["about"]), (7.0, "cpu", 2, ["more than"]), (0.3, "cpu", 1, []), (7.0, "meta", 1, [])],
)
def test_a_long_run_on_a_cpu_is_announced_once(
    clock: Clock, caplog: pytest.LogCaptureFixture, seconds: float, device: str, sizes: int, logged: list[str]
) -> None:
    caplog.set_level("INFO")
    epoch(Throughput(), clock, steps=40, seconds=seconds, fetch=0.0, device=device, sizes=sizes)
    found = [record.getMessage().partition(" on this CPU")[0] for record in caplog.records]
    assert found == [f"This run will take {word} 19:26:40" for word in logged]  # 10,000 steps of 7 seconds


def test_a_resumed_run_continues_its_measurements() -> None:
    first = Throughput()
    first.load_state_dict({"seconds": 10.0, "images": 50, "first_step_seconds": 2.0, "fit_seconds": 20.0})
    first.on_fit_start(*ON_CPU)
    time.sleep(0.01)
    second = Throughput()
    second.load_state_dict(first.state_dict())
    assert second.earlier_seconds > 20.0
    assert (second.images_per_second, second.first_step_seconds) == (5.0, 2.0)
