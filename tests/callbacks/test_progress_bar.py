from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from helpers import TINY
from omegaconf import DictConfig

from cifar10_tl.callbacks import RunProgressBar
from cifar10_tl.train import train


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_has_one_bar_and_its_test_another(
    small_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    overrides = ("trainer.enable_progress_bar=true", "callbacks=minimal", "callbacks.progress_bar.refresh_seconds=0")
    train(small_cfg(*TINY, *overrides, "trainer.max_epochs=1"))
    drawn = stderr.getvalue()
    for text in ("epoch 1 of 1: ", "epoch 1 of 1, validation: ", "3/3 [", " images/s", "test:   0%|          | 0/32 ["):
        assert text in drawn


def test_no_bar_is_drawn_outside_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    bar = RunProgressBar()
    bar.on_test_start(SimpleNamespace(test_dataloaders=SimpleNamespace(dataset=[0])), None)  # type: ignore[arg-type]
    bar.teardown(None, None, "test")  # type: ignore[arg-type]
    assert stderr.getvalue() == ""
