"""What several test files share: composed configs, small real data, and a finished run."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

#: Test processes side by side share the cores: more threads than cores stand in each other's way.
_SIDE_BY_SIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, torch.get_num_threads() // _SIDE_BY_SIDE))))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_IMAGES = Path(os.environ.get("CIFAR10_TL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
#: The smallest run that has everything: ResNet18 at 32 px on a few built-in images.
SMALL = (
    "experiment=quickstart",
    "model.backbone=resnet18",
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


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def compose_train(*overrides: str) -> DictConfig:
    """The config of the train command with these overrides, as Hydra composes it, checked."""
    from hydra import compose, initialize_config_dir

    from cifar10_tl.checks import check_config
    from cifar10_tl.config import CONFIG_DIR, register_resolvers

    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    check_config(cfg)
    return cfg


@pytest.fixture
def small_cfg(tmp_path: Path) -> Callable[..., DictConfig]:
    """A function that composes the small run in a folder of the test's own, with more overrides on top."""

    def build(*overrides: str, run: str = "run") -> DictConfig:
        return compose_train(*SMALL, f"paths.output_dir={tmp_path / run}", *overrides)

    return build


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small run, trained and tested."""
    from cifar10_tl.train import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(compose_train(*SMALL, f"paths.output_dir={folder}"))
    return folder


class StepLosses(Callback):
    """Keeps the loss of each training step of the latest run."""

    seen: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["loss"].item())


@pytest.fixture(scope="session")
def real_images() -> dict[str, np.ndarray]:
    """6,102 original CIFAR-10 images: x_train uint8 [5085, 3, 32, 32], y_train, x_test, y_test."""
    file = REAL_IMAGES / "cifar10-original-6k.npz"
    if not file.is_file():
        pytest.skip(f"the real images are not there: {file} (set CIFAR10_TL_TEST_DATA to their folder)")
    with np.load(file) as arrays:
        return dict(arrays)
