from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import Watcher
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.builder import STEP_HOOKS, build_loggers, check_batch_size, next_epoch, skip_idle_hooks


@pytest.mark.parametrize(
    ("module", "called"),
    [("helpers", list(STEP_HOOKS)), ("cifar10_tl.callbacks", ["on_after_backward", "on_train_batch_end"])],
    ids=["other", "ours"],
)
def test_only_idle_step_hooks_of_our_callbacks_are_skipped(
    module: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watcher, "__module__", module)
    watcher = Watcher()
    skip_idle_hooks(watcher)
    assert [name for name in STEP_HOOKS if callable(getattr(watcher, name))] == called


@pytest.mark.parametrize(
    ("batch_size", "world_size", "nearest"), [(128, 3, "126 or 129"), (100, 8, "96 or 104"), (2, 4, "4")]
)
def test_indivisible_batch_is_refused(batch_size: int, world_size: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size={batch_size}.*{world_size}.* {nearest}$"):
        check_batch_size(batch_size, world_size)
    check_batch_size(128, 4)


def test_tensorboard_discards_epochs_after_the_checkpoint(small_cfg: Callable[..., DictConfig]) -> None:
    first_epoch = next_epoch({"callbacks": {"MetricsLogger": {"rows": [{"epoch": 0}, {"epoch": 1}]}}})
    assert build_loggers(small_cfg(), first_epoch)[0]._kwargs["purge_step"] == 2
