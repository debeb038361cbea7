from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import rows

from cifar10_tl.callbacks import MetricsLogger, Throughput
from cifar10_tl.callbacks.metrics_logger import COLUMNS
from cifar10_tl.metrics.evaluation import Evaluation


def test_each_epoch_has_one_row_also_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    module: Any = SimpleNamespace(
        training_metrics=lambda: {"train/loss": 0.5, "train/acc": 0.75},
        evaluation=Evaluation.of(logits, labels, torch.arange(2), ["a", "b"]),
        device=torch.device("cpu"),
        log_dict=Mock(),
    )
    speed = {"seconds": 12.0, "images_per_second": 4.0, "step_ms": 4000.0, "data_wait": 0.25, "peak_memory_gb": 1.5}
    trainer: Any = SimpleNamespace(
        default_root_dir=str(tmp_path),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.2}])],
        fast_dev_run=False,
        is_global_zero=True,
        loggers=[],
        callbacks=[Mock(Throughput, row=lambda device: speed)],
        current_epoch=0,
        global_step=5,
        max_epochs=2,
    )
    caplog.set_level(logging.INFO)
    first = MetricsLogger()
    first.on_train_epoch_end(trainer, module)
    resumed = MetricsLogger()
    resumed.load_state_dict(first.state_dict())
    del resumed.rows[0]["val/count"]  # as in a checkpoint of an older version
    trainer.current_epoch, trainer.global_step, trainer.callbacks, module.evaluation = 1, 10, [], None
    resumed.on_train_epoch_end(trainer, module)
    validated, other = rows(tmp_path)
    assert tuple(validated) == COLUMNS
    names = ("epoch", "step", "lr", "train/acc", "val/acc", "val/balanced_acc", "val/macro_f1")
    assert [validated[name] for name in names[:-1]] == ["0", "5", "0.2", "0.75", "0.5", "0.5"]
    assert float(validated["val/macro_f1"]) == pytest.approx(1 / 3)
    assert [other[name] for name in ("epoch", "train/loss", "val/loss", "val/count")] == ["1", "0.5", "", ""]
    module.log_dict.assert_called_once_with({"images/s": 4.0, "step": 0.0}, batch_size=1)
    assert caplog.messages == [
        "epoch 0 (1 of 2)  train loss 0.5000 acc 75.00%  val loss 1.1269 acc 50.00%  4 images/s  4000 ms/step, 25.0% "
        "waiting for data  1.5 GB",
        "epoch 1 (2 of 2)  train loss 0.5000 acc 75.00%",
    ]
