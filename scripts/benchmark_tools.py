"""Fits to time and clocks for the rows of scripts/benchmark.py."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import hydra
import lightning.pytorch as pl
import torch
from bare_loop import bare_steps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cifar10_tl.config.run_dir import CONFIG_DIR, register_resolvers
from cifar10_tl.config.validation import check_config
from cifar10_tl.engine.builder import build_datamodule, build_module, build_trainer, speed_up
from cifar10_tl.engine.hardware import quiet_libraries
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.models.network import TransferResNet

BATCH = 128
Pair = tuple[float, float]


class Row(NamedTuple):
    """Comparison: ``measure(quick)`` prepares it and returns a function from the repeat's number to both values."""

    measure: Callable[[bool], Callable[[int], Pair]]
    unit: str
    a: str
    b: str
    goal: float | None = None  # bound of a / b
    at_least: bool = True


def compose(*overrides: str, name: str = "train") -> Any:
    """Return the checked config of a command."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(name, overrides=list(overrides))
    check_config(cfg)
    return cfg


def build(*overrides: str, train_size: int = 5000) -> tuple[Any, Any, Any]:
    """Return config, module and data of the defaults with random weights, built-in images and 32 px."""
    quiet_libraries()
    cfg = compose(
        *("data=shapes", f"data.train_size={train_size}", "data.val_size=1000", "data.test_size=10"),
        *("model.weights=null", "model.image_size=32", "model.label_smoothing=0", "optimizer.backbone_lr_scale=1"),
        *("trainer.max_epochs=1", "trainer.devices=1", "trainer.limit_val_batches=1"),
        *("trainer.enable_progress_bar=false", f"paths.output_dir={new_folder()}"),
        *overrides,
    )
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    datamodule.setup()
    return cfg, module, datamodule


def new_folder() -> str:
    """Create a folder that is deleted at the end of the row."""
    return tempfile.mkdtemp(dir=os.environ["BENCHMARK_FOLDER"])


def ready_batches(datamodule: Any, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first augmented uint8 batches of an epoch with their targets."""
    batches = (datamodule.augmented(batch, 0) for batch in datamodule.train_dataloader())
    return [(batch.images, batch.targets) for _, batch in zip(range(steps), batches, strict=False)]


class Clock(pl.Callback):
    """Callback that records the time at the end of each training step, without the time spent in ``between``."""

    def __init__(self, steps: int, between: Callable[[], Any] = lambda: None) -> None:
        self.times: list[float] = []
        self.synchronized, self.between, self.paused = (warm_up(steps), steps - 1), between, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the time."""
        if len(self.times) in self.synchronized and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.paused)
        self.between()
        self.paused += time.perf_counter() - now


def our_fit(
    cfg: Any, module: Any, datamodule: Any, steps: int, between: Callable[[], Any] = lambda: None
) -> list[float]:
    """Return the step times of Trainer.fit as the train command sets it up; see :class:`Clock`."""
    if steps > len(datamodule.splits["train"]) // cfg.data.batch_size:
        raise ValueError(f"{steps} steps are more than an epoch, whose end would be timed")
    cfg.trainer.limit_train_batches = steps
    with SignalHandler() as interruption:
        trainer = build_trainer(cfg, interruption=interruption)
        if isinstance(module.network, TransferResNet):
            speed_up(cfg, module, trainer)
        trainer.callbacks.append(clock := Clock(steps, between))
        trainer.fit(module, datamodule=datamodule)
    return clock.times


def template_fit(module: Any, batches: Any, steps: int) -> list[float]:
    """Return the step times of a Trainer with a logger and a checkpoint per epoch."""
    folder, clock = new_folder(), Clock(steps)
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": steps, "devices": 1}
    logger = pl.loggers.TensorBoardLogger(folder)
    options |= {"default_root_dir": folder, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**options, logger=logger, callbacks=[clock])
    trainer.fit(module, DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches)
    return clock.times


def bare_fit(network: nn.Module, batches: Iterable[Any], steps: int, precision: str) -> list[float]:
    """Return the step times of a plain PyTorch loop."""
    clock = Clock(steps)
    for _ in bare_steps(network, batches, precision):
        clock.on_train_batch_end()
    return clock.times


def in_turn(number: int, a: Callable[[], float], b: Callable[[], float]) -> Pair:
    """Measure both sides, in odd repeats the second one first, so that drift affects both."""
    if number % 2:
        second = b()
        return a(), second
    return a(), b()


def warm_up(steps: int) -> int:
    """Return the number of first steps to discard: a fifth, at most ten."""
    return min(10, max(1, steps // 5))


def images_per_second(times: Sequence[float], batch: int = BATCH) -> float:
    """Return the speed of the steps that ended at ``times``, after the warm-up."""
    first = warm_up(len(times))
    return batch * (len(times) - 1 - first) / (times[-1] - times[first])


def microseconds(times: Sequence[float]) -> float:
    """Return the median duration of the steps that ended at ``times``, after the warm-up."""
    return 1e6 * statistics.median(b - a for a, b in pairwise(times[warm_up(len(times)) :]))


def seconds_of(action: Callable[[], Any]) -> float:
    """Return the duration of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
