"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import REAL_IMAGES, SMALL, compose_train
from omegaconf import DictConfig

SLOWEST = {"test_ddp", "test_documentation", "test_gpu_suite", "test_kill_and_resume"}

if side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # test processes share the cores, and so do the processes that they start: more threads than cores are slow
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // side_by_side)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files, then others with slow tests, so that processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.stem not in SLOWEST, item.path not in slow))


@pytest.fixture
def small_cfg(tmp_path: Path) -> Callable[..., DictConfig]:
    """A function that composes the small run in a folder of the test's own, with more overrides on top."""

    def build(*overrides: str, run: str = "run") -> DictConfig:
        return compose_train(*SMALL, f"paths.output_dir={tmp_path / run}", *overrides)

    return build


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small run, trained and tested, which parallel test processes share."""
    from cifar10_tl.train import train

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if side_by_side else base) / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / "results.json").exists():
            train(compose_train(*SMALL, f"paths.output_dir={folder}"))
    return folder


@pytest.fixture(scope="module")  # no settings of other modules, and no animation that goes on drawing
def browser() -> Iterator[Any]:
    """Headless Chromium; ``browser.get_log("browser")`` returns its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="install selenium: pip install -e '.[dev]'")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("install Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "enable-unsafe-swiftshader")  # WebGL
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture(scope="session")
def real_images() -> dict[str, np.ndarray]:
    """6,102 original CIFAR-10 images: x_train uint8 [5085, 3, 32, 32], y_train, x_test, y_test."""
    if REAL_IMAGES is None:
        pytest.skip("set CIFAR10_TL_TEST_DATA to the folder of cifar10-original-6k.npz")
    with np.load(Path(REAL_IMAGES) / "cifar10-original-6k.npz") as arrays:
        return dict(arrays)
