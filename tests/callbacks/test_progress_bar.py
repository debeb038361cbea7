from __future__ import annotations

import io
from pathlib import Path

import pytest
from callbacks.small_fit import loader, small_fit

from cifar10_tl.callbacks import RunProgressBar


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_has_one_bar_and_its_test_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    trainer, module = small_fit(tmp_path, RunProgressBar(refresh_seconds=0), enable_progress_bar=True)
    trainer.test(module, loader(), verbose=False)
    for text in ("epoch 1 of 1: ", "epoch 1 of 1, validation: ", "3/3 [", " images/s", "test:   0%|          | 0/12 ["):
        assert (text in stderr.getvalue()) == is_terminal
