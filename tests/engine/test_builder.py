from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY, Watcher
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.engine.builder import STEP_HOOKS, build_loggers, check_batch_size, skip_idle_hooks
from cifar10_tl.train import train


def test_only_idle_step_hooks_are_skipped(
    small_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Watcher()
    skip_idle_hooks(foreign)
    assert all(callable(getattr(foreign, name)) for name in STEP_HOOKS), "not a callback of this project"
    monkeypatch.setattr(Watcher, "__module__", "cifar10_tl.callbacks")
    watcher = Watcher()
    skip_idle_hooks(watcher)
    called = [name for name in STEP_HOOKS if callable(getattr(watcher, name))]
    assert called == ["on_after_backward", "on_train_batch_end"]
    seen: list[Watcher] = []
    monkeypatch.setattr(Watcher, "on_fit_start", lambda self, *_: seen.append(self))
    train(small_cfg(*TINY, "+callbacks.watcher={_target_: helpers.Watcher}", "test=false", "trainer.max_epochs=1"))
    assert seen[0].called == ["after backward", "batch end"] * 3


@pytest.mark.parametrize(
    ("batch_size", "world_size", "nearest"), [(128, 3, "126 or 129"), (100, 8, "96 or 104"), (2, 4, "4")]
)
def test_indivisible_batch_is_refused(batch_size: int, world_size: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size={batch_size}.*{world_size}.* {nearest}$"):
        check_batch_size(batch_size, world_size)
    check_batch_size(128, 4)


def test_tensorboard_discards_epochs_after_the_checkpoint(small_cfg: Callable[..., DictConfig]) -> None:
    cfg = small_cfg()
    rows = {"MetricsLogger": {"rows": [{"epoch": 0}, {"epoch": 1}]}}
    assert build_loggers(cfg, {"callbacks": rows})[0]._kwargs["purge_step"] == 2
    assert "purge_step" not in build_loggers(cfg, None)[0]._kwargs
    Path(cfg.paths.output_dir).mkdir(parents=True)
    (Path(cfg.paths.output_dir) / RUN_CONFIG).touch()  # killed before its first checkpoint
    assert build_loggers(cfg, None)[0]._kwargs["purge_step"] == 0
