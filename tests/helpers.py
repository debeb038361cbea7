"""Constants and functions that several test files share."""

from __future__ import annotations

import csv
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar10_tl.config.launcher import compose_command
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.io import read_csv

REPOSITORY = Path(__file__).resolve().parents[1]
#: Folder of cifar10-original-6k.npz; the tests that need it are skipped if the variable is not set.
REAL_IMAGES = os.environ.get("CIFAR10_TL_TEST_DATA")
#: The smallest run that has everything: ResNet10 at 32 px on a few built-in images.
SMALL = (
    "experiment=quickstart",
    "model.backbone=resnet10",
    "model.head.hidden=[32]",
    "data.train_size=400",
    "data.test_size=100",
    "data.val_size=80",
    "data.batch_size=64",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
)
#: Labels of the eight images that :func:`make_run` tests.
LABELS = ("cat", "dog", "cat", "dog", "cat", "dog", "cat", "dog")
#: On top of SMALL: three steps per epoch.
TINY = ("data.train_size=128", "data.val_size=32", "data.test_size=32", "data.batch_size=32")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start_python(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start Python in a process group of its own, whose output goes to one pipe."""
    ours = ("PL_GLOBAL_SEED", "HYDRA_FULL_ERROR", "LOCAL_RANK", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("CIFAR10_TL_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, **options)


def _call_as(rank: int, number: int, port: int, task: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    task()


def in_processes(number: int, task: Callable[[], Any]) -> None:
    """Call ``task`` in forked processes that have the variables of torchrun; they start faster than commands."""
    given = (number, free_port(), task)
    context = torch.multiprocessing.start_processes(_call_as, given, nprocs=number, join=False, start_method="fork")
    try:
        while not context.join(timeout=10):
            pass
    finally:  # else a process that waits forever would keep pytest from ending
        for process in context.processes:
            process.kill()


def train_in_two_processes(*overrides: str) -> None:
    """Train and test in two forked processes."""
    from cifar10_tl.train import train

    in_processes(2, lambda: train(compose_train(*overrides, "trainer=ddp_cpu", "trainer.devices=2")))


def compose_train(*overrides: str) -> DictConfig:
    """Return the checked config of the train command with these overrides."""
    return compose_command("train", *overrides)


def resume(run: Path, *overrides: str) -> Any:
    """Resume a run with the train command and return its results."""
    from cifar10_tl.config.resume import resumed_config
    from cifar10_tl.train import train

    given = [f"resume={run}", "trust=true", *overrides]  # trust the callbacks of this file
    return train(resumed_config(compose_train(*given), given))


def rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    found = read_csv(run / "metrics.csv")
    assert found
    return found


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return the steps and values of a tag in TensorBoard."""
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(tag)]


def saved_step(run: Path) -> int:
    """Return the step of last.ckpt."""
    return int(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, mmap=True)["global_step"])


def write_png(folder: Path, images: torch.Tensor) -> None:
    """Write images, uint8 [N, 3, S, S], as 00.png, 01.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")


def write_shapes(root: Path, num_classes: int, **counts: int) -> None:
    """Write built-in images to ``root/<split>/class <n>``, given the number of images per class of each split."""
    for split, count in counts.items():
        images, labels = draw_shapes(10 * count, seed=0, image_size=32)
        for label in range(num_classes):
            write_png(root / split / f"class {label}", images[labels == label])


def on_unequal_classes(overrides: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Write classes of 36, 12 and 4 training images, and return ``overrides`` with this data instead of theirs."""
    write_shapes(folder, num_classes=3, train=36, test=5)
    for label, count in enumerate((36, 12, 4)):
        for path in sorted((folder / "train" / f"class {label}").iterdir())[count:]:
            path.unlink()
    kept = [o for o in overrides if not o.startswith("data.") or o.startswith("data.augment.")]
    return (*kept, "data=folder", f"data.root={folder}", "data.val_size=0.2", "data.batch_size=8")


def make_run(
    folder: Path, correct: str, labels: Sequence[str] = LABELS, more: tuple[str, ...] = (), **results: object
) -> Path:
    """Write a run whose predictions are correct where ``correct`` has a 1, with ``more`` columns."""
    folder.mkdir(parents=True)
    rows = [[i, label, label if correct[i] == "1" else "frog", *more] for i, label in enumerate(labels)]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["index", "true_label", "predicted_label", *more], *rows])
    defaults = {
        "test": {"acc": correct.count("1") / len(correct), "loss": 0.5, "count": len(correct)},
        "val": {"acc": 0.75},
        "epochs": 3,
        "seconds": {"fit": 12.3},
        "config": {"seed": 0, "optimizer": {"lr": 0.001, "betas": [0.9]}, "paths": {"output_dir": str(folder)}},
    }
    (folder / "results.json").write_text(json.dumps({**defaults, **results}))
    return folder


def lock(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make listing a folder fail, also for root."""

    def refuse(listing: Callable[..., Any], path: Any = ".") -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))


class StepLosses(Callback):
    """Callback that keeps the loss of each training step."""

    seen: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["loss"].item())


class Accident(Callback):
    """Callback that calls ``happens`` once, at a given place and number, such as step 3."""

    happens: ClassVar[Callable[[], Any] | None] = None
    at: ClassVar[tuple[str, int]] = ("step", 0)

    def _now(self, place: str, number: int) -> None:
        action = Accident.happens
        if action is not None and Accident.at == (place, number):
            Accident.happens = None
            action()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._now("step", trainer.global_step)
        self._now("batch", batch_idx)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._now("validation", trainer.current_epoch)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._now("test end", 0)


class Watcher(Callback):
    """A user's callback with one hook of a step, and one set on the object alone."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.on_after_backward = lambda trainer, module: self.called.append("after backward")  # type: ignore[method-assign]

    def on_train_batch_end(self, *_: Any) -> None:
        self.called.append("batch end")


class Weights(Callback):
    """Keeps the network's state after each step."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})


class SlowStep(Callback):
    """Takes its time after each step, before the next batch is fetched."""

    seconds: ClassVar[float] = 0.3

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)
