"""What the rows of scripts/benchmark.py are made of: our fit, a template's, the clock, and processes of their own."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # for a checkout that is not installed

Pairs = list[tuple[float, float]]
BATCH = 128


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        a: our side.
        b: the other.
        unit: of both.
        goal: a bound of the ratio a / b.
        at_least: whether the goal is a lower bound.
        measure: repeats and --quick -> a pair a repeat.
    """

    a: str
    b: str
    unit: str
    goal: float | None
    at_least: bool
    measure: Callable[[int, bool], Pairs]


# ----------------------------------------------------------------------------------------------------------- both sides


def compose(*overrides: str, name: str = "train") -> Any:
    """The config of a command."""
    import hydra

    from cifar10_tl.config.run_dir import CONFIG_DIR, register_resolvers
    from cifar10_tl.config.validation import check_config

    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(name, overrides=list(overrides))
    check_config(cfg)
    return cfg


def run(cfg: Any) -> None:
    """The train command."""
    from cifar10_tl.train import train

    train(cfg)


def small_run(folder: str, *overrides: str) -> Any:
    """The config of a run of one step, for its checkpoint."""
    sizes = ("data.train_size=60", "data.val_size=20", "data.test_size=20", "data.batch_size=20")
    return compose(
        "experiment=quickstart",
        *sizes,
        "trainer.max_epochs=1",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "trainer.limit_train_batches=1",
        f"paths.output_dir={folder}/run",
        "test=false",
        *overrides,
    )


def parts(*overrides: str) -> tuple[Any, Any, Any]:
    """Config, module and data of our defaults, but for random weights and 32 px, with the images drawn."""
    from cifar10_tl.engine.builder import build_datamodule, build_module
    from cifar10_tl.engine.hardware import quiet_libraries

    quiet_libraries()
    folder = tempfile.mkdtemp(dir=os.environ["BENCHMARK_FOLDER"])
    size = next((o.split("=")[1] for o in overrides if o.startswith("data.train_size")), "5000")
    cfg = compose(
        "data=shapes",
        "data.val_size=1000",
        "data.test_size=10",
        "model.weights=null",
        "model.image_size=32",
        "model.label_smoothing=0",
        "optimizer.backbone_lr_scale=1",
        "trainer.max_epochs=1",
        "trainer.devices=1",
        "trainer.limit_val_batches=1",
        "trainer.enable_progress_bar=false",
        f"data.train_size={size}",
        f"paths.output_dir={folder}",
        *(o for o in overrides if not o.startswith("data.train_size")),
    )
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    datamodule.setup()
    return cfg, module, datamodule


def precision() -> str:
    """What trainer.precision=auto stands for here."""
    from cifar10_tl.engine.hardware import choose_precision

    return choose_precision("auto")[0]


def numpy_images(datamodule: Any) -> tuple[Any, list[int]]:
    """The training images as torchvision's data sets keep them: uint8 [N, H, W, 3], and a list of labels."""
    train = datamodule.splits["train"]
    return train.images.permute(0, 2, 3, 1).contiguous().numpy(), train.labels.tolist()


def ready_batches(datamodule: Any, steps: int) -> list[tuple[Any, Any]]:
    """Augmented uint8 batches and their labels, for ``steps`` steps."""
    found: list[tuple[Any, Any]] = []
    epoch = 0
    while len(found) < steps:
        for batch in datamodule.train_dataloader():
            augmented = datamodule.augmented(batch, epoch)
            found.append((augmented.images, augmented.targets))
        epoch += 1
    return found[:steps]


def our_fit(
    cfg: Any, module: Any, datamodule: Any, steps: int, between: Callable[[], Any] = lambda: None
) -> list[float]:
    """The time at the end of each step of Trainer.fit, with all that the train command puts around it.

    ``between`` is called after each step, and takes no time.
    """
    from cifar10_tl.engine.builder import build_trainer, speed_up
    from cifar10_tl.engine.processes import SignalHandler
    from cifar10_tl.models.network import TransferResNet

    if steps > len(datamodule.splits["train"]) // cfg.data.batch_size:
        raise ValueError(f"{steps} steps are more than an epoch: its end would be timed, too")
    cfg.trainer.limit_train_batches = steps
    with SignalHandler() as interruption:
        trainer = build_trainer(cfg, interruption=interruption)
        if isinstance(module.network, TransferResNet):
            speed_up(cfg, module, trainer)
        return clocked(trainer, steps, lambda: trainer.fit(module, datamodule=datamodule), between)


def template_fit(module: Any, batches: Any, steps: int) -> list[float]:
    """As :func:`our_fit`, with a Trainer as a template sets it up: a logger, a checkpoint an epoch; no progress bar."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    folder = tempfile.mkdtemp(dir=os.environ["BENCHMARK_FOLDER"])
    loader = DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        logger=pl.loggers.TensorBoardLogger(folder),
    )
    return clocked(trainer, steps, lambda: trainer.fit(module, loader))


def clocked(trainer: Any, steps: int, fit: Callable[[], Any], between: Callable[[], Any] = lambda: None) -> list[float]:
    """The time at the end of each training step of ``fit``; where the clock starts and stops, the device is done.

    The clock stands still while ``between`` is called, after each step.
    """
    import lightning.pytorch as pl

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.between = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if len(self.times) in (warm_up(steps), steps - 1):
                synchronize(pl_module.device)
            now = time.perf_counter()
            self.times.append(now - self.between)
            between()
            self.between += time.perf_counter() - now

    clock = Clock()
    trainer.callbacks.append(clock)
    fit()
    return clock.times


def synchronize(device: Any) -> None:
    """Wait until a GPU has done its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tiny_network() -> Any:
    """uint8 images to logits, in as few operations as can learn."""
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Identity()
            self.head = nn.Linear(3, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(images.float().mean((2, 3)) / 255)

    return Tiny()


# -------------------------------------------------------------------------------------------------------------- numbers


def in_turn(number: int, a: Callable[[], float], b: Callable[[], float]) -> tuple[float, float]:
    """Both sides, every other time the second one first: what drifts, drifts for both."""
    if number % 2:
        second = b()
        return a(), second
    return a(), b()


def warm_up(steps: int) -> int:
    """Steps to leave out at the start: a fifth, at most ten."""
    return min(10, max(1, steps // 5))


def images_per_second(times: Sequence[float], batch: int) -> float:
    """Of steps that ended at ``times``, the first ones left out."""
    first = warm_up(len(times))
    return batch * (len(times) - 1 - first) / (times[-1] - times[first])


def microseconds(times: Sequence[float]) -> float:
    """A step, the median of those that ended at ``times``, the first ones left out."""
    kept = times[warm_up(len(times)) :]
    return 1e6 * statistics.median(b - a for a, b in pairwise(kept))


def seconds_of(action: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def per_second(action: Callable[[], int]) -> float:
    """What it counts, a second."""
    start = time.perf_counter()
    count = action()
    return count / (time.perf_counter() - start)


def peak_mb() -> float:
    """Peak resident memory of this process so far, in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux lets ru_maxrss begin with the parent's
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def child(*arguments: str) -> Any:
    """What scripts/benchmark.py, started anew with these arguments, printed as its last line."""
    command = (sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
