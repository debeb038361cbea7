from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import TINY, Watcher
from omegaconf import DictConfig

from cifar10_tl.engine.builder import STEP_HOOKS, skip_idle_hooks
from cifar10_tl.train import train


def test_only_idle_step_hooks_are_skipped(
    small_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher()
    skip_idle_hooks(watcher)
    called = [name for name in STEP_HOOKS if callable(getattr(watcher, name))]
    assert called == ["on_after_backward", "on_train_batch_end"]
    seen: list[Watcher] = []
    monkeypatch.setattr(Watcher, "on_fit_start", lambda self, *_: seen.append(self))
    train(small_cfg(*TINY, "+callbacks.watcher={_target_: helpers.Watcher}", "test=false", "trainer.max_epochs=1"))
    assert seen[0].called == ["after backward", "batch end"] * 3
