from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Watcher
from omegaconf import DictConfig

from cifar10_tl.callbacks import ConfusionMatrix, SampleInputs, Throughput
from cifar10_tl.callbacks.training_figures import _title
from cifar10_tl.data.batch import Batch
from cifar10_tl.engine.builder import STEP_HOOKS, skip_idle_hooks
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.train import train


def fake_trainer(root: Path, **state: Any) -> Any:
    """As much of a Trainer as a callback looks at."""
    defaults: dict[str, Any] = {
        "default_root_dir": str(root),
        "is_global_zero": True,
        "sanity_checking": False,
        "fast_dev_run": False,
        "loggers": [],
        "callbacks": [],
        "checkpoint_callback": None,
        "state": SimpleNamespace(fn="fit"),
        "current_epoch": 0,
        "global_step": 0,
        "world_size": 1,
        "is_last_batch": False,
        "accumulate_grad_batches": 1,
        "datamodule": SimpleNamespace(splits={"val": None, "test": None}),
    }
    return SimpleNamespace(**(defaults | state))


@pytest.fixture
def module() -> Any:
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    evaluation = Evaluation.of(logits, torch.tensor([0, 1, 2, 2]), torch.arange(4), ["a", "b", "c"])
    return SimpleNamespace(
        evaluation=evaluation, restored_epoch=None, device=torch.device("cpu"), class_names=["a", "b", "c"]
    )


@pytest.mark.parametrize("state", [{"sanity_checking": True}, {"fast_dev_run": True}, {"is_global_zero": False}])
def test_nothing_is_drawn_where_it_should_not_be(tmp_path: Path, module: Any, state: dict) -> None:
    trainer = fake_trainer(tmp_path, **state)
    ConfusionMatrix().on_validation_end(trainer, module)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    if "sanity_checking" not in state:
        SampleInputs().on_train_batch_start(trainer, module, Batch(images, torch.zeros(4).long(), torch.arange(4)), 0)
    assert not list(tmp_path.iterdir())


def test_mixed_inputs_are_titled_with_both_shares() -> None:
    names = ["a", "b", "c"]
    assert _title(torch.tensor(2), names) == [("c", "")]
    assert _title(torch.tensor([0.3, 0.7, 0.0]), names) == [("b", " 70%"), ("a", " 30%")]
    assert _title(torch.tensor([0.0, 1.0, 0.0]), names) == [("b", "")]


def steps(callback: Throughput, trainer: Any, module: Any, count: int) -> None:
    batch = Batch(torch.zeros(8, 3, 1, 1), torch.zeros(8).long(), torch.arange(8))
    for _ in range(count):
        callback.on_train_batch_end(trainer, module, None, batch, 0)


@pytest.mark.parametrize(("step_seconds", "device", "told"), [(7.0, "cpu", 1), (0.3, "cpu", 0), (7.0, "cuda", 0)])
def test_a_long_run_on_a_cpu_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step_seconds: float, device: str, told: int
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("cifar10_tl.callbacks.throughput.time.perf_counter", lambda: next(clock) * step_seconds)
    caplog.set_level(logging.INFO)
    trainer = fake_trainer(Path(), estimated_stepping_batches=10_000)
    callback = Throughput()
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    callback.on_train_epoch_start(trainer, None)  # type: ignore[arg-type]
    steps(callback, trainer, SimpleNamespace(device=torch.device(device)), 40)
    lines = [r.getMessage() for r in caplog.records if "experiment=quickstart" in r.getMessage()]
    assert len(lines) == told
    if told:
        assert "about 19:26:40" in lines[0], "ten thousand steps of 7 seconds"


def test_images_per_second_leave_out_what_is_between_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cifar10_tl.callbacks.throughput.time.perf_counter", lambda: now[0])
    callback, module = Throughput(), SimpleNamespace(device=torch.device("cpu"))
    trainer = fake_trainer(Path(), estimated_stepping_batches=10, world_size=2)
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    for _ in range(2):
        now[0] += 100.0  # validation, figures, checkpoints
        callback.on_train_epoch_start(trainer, None)  # type: ignore[arg-type]
        now[0] += 4.0
        steps(callback, trainer, module, 3)
        callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert callback.epoch_seconds == 4.0
    assert callback.images_per_second == 3 * 8 * 2 / 4.0
    assert callback.first_step_seconds == 104.0


def test_the_row_tells_the_step_and_how_much_of_it_was_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cifar10_tl.callbacks.throughput.time.perf_counter", lambda: now[0])
    callback, module = Throughput(), SimpleNamespace(device=torch.device("cpu"))
    trainer = fake_trainer(Path(), estimated_stepping_batches=10)
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    callback.on_train_epoch_start(trainer, None)  # type: ignore[arg-type]
    for _ in range(3):
        now[0] += 1.0  # fetching the batch
        callback.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]
        now[0] += 3.0  # the step
        steps(callback, trainer, module, 1)
    row = callback.row(torch.device("cpu"))
    assert (row["seconds"], row["images_per_second"], row["step_ms"], row["data_wait"]) == (12.0, 2.0, 4000.0, 0.25)
    assert 0.1 < row["peak_memory_gb"] < 1000  # type: ignore[operator]


def test_hooks_that_do_something_are_called_and_idle_ones_are_not(small_cfg: Callable[..., DictConfig]) -> None:
    watcher = Watcher()
    skip_idle_hooks(watcher)
    assert [name for name in STEP_HOOKS if callable(getattr(watcher, name))] == [
        "on_after_backward",
        "on_train_batch_end",
    ]
    seen: list[Watcher] = []
    cfg = small_cfg("+callbacks.watcher={_target_: helpers.Watcher}", "trainer.limit_train_batches=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watcher, "on_fit_start", lambda self, *_: seen.append(self))
        train(cfg)
    assert seen[0].called == ["after backward", "batch end"] * 6
