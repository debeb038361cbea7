from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar10_tl.callbacks import ConfusionMatrix, IncorrectPredictions, RunCheckpoint, SampleInputs
from cifar10_tl.callbacks.training_figures import _title
from cifar10_tl.data.batch import Batch, Split
from cifar10_tl.metrics.evaluation import Evaluation

IMAGES = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 2])


@pytest.fixture
def module() -> Any:
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    evaluation = Evaluation.of(logits, LABELS, torch.arange(4), ["a", "b", "c"])
    return SimpleNamespace(evaluation=evaluation, restored_epoch=None, class_names=["a", "b", "c"])


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """A function that builds as much of a Trainer as these callbacks read."""

    def build(**state: Any) -> Any:
        defaults: dict[str, Any] = {
            "default_root_dir": str(tmp_path),
            "is_global_zero": True,
            "is_last_batch": True,
            "sanity_checking": False,
            "fast_dev_run": False,
            "loggers": [],
            "checkpoint_callback": None,
            "callback_metrics": {},
            "current_epoch": 0,
            "global_step": 0,
            "datamodule": SimpleNamespace(
                splits=dict.fromkeys(("val", "test"), Split(IMAGES, LABELS, torch.arange(4)))
            ),
        }
        return SimpleNamespace(**(defaults | state))

    return build


@pytest.mark.parametrize(
    ("monitor", "score", "drawn"),
    [("val/acc", 0.6, True), ("val/acc", 0.5, False), ("val/loss", 0.4, True), ("val/loss", 0.6, False)],
)
def test_the_validation_is_drawn_when_the_best_changes(
    tmp_path: Path, module: Any, make_trainer: Callable[..., Any], monitor: str, score: float, drawn: bool
) -> None:
    checkpoint = RunCheckpoint("best", monitor=monitor, save_top_k=3)
    checkpoint.best_model_score = torch.tensor(0.5)
    trainer = make_trainer(checkpoint_callback=checkpoint, callback_metrics={monitor: torch.tensor(score)})
    ConfusionMatrix().on_validation_end(trainer, module)
    assert (tmp_path / "figures" / "confusion_matrix_val.png").exists() == drawn


def test_the_test_is_drawn_at_the_epoch_of_its_checkpoint(
    tmp_path: Path, module: Any, make_trainer: Callable[..., Any]
) -> None:
    images: list[tuple[str, tuple[int, ...], int]] = []
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    logger._experiment = SimpleNamespace(
        add_image=lambda tag, pixels, step, dataformats: images.append((tag, pixels.shape, step))
    )
    module.restored_epoch = 7
    IncorrectPredictions(num_images=1).on_test_end(make_trainer(loggers=[logger], current_epoch=9), module)
    file = np.asarray(Image.open(tmp_path / "figures" / "incorrect_test.png"))
    assert images == [("incorrect/test", (*file.shape[:2], 3), 7)]


@pytest.mark.parametrize("state", [{"sanity_checking": True}, {"fast_dev_run": True}, {"is_global_zero": False}])
def test_nothing_is_drawn_on_other_ranks_or_in_rehearsals(
    tmp_path: Path, module: Any, make_trainer: Callable[..., Any], state: dict[str, bool]
) -> None:
    ConfusionMatrix().on_validation_end(make_trainer(**state), module)
    SampleInputs().on_train_batch_start(make_trainer(**state), module, Batch(IMAGES, LABELS, torch.arange(4)), 0)
    assert not list(tmp_path.iterdir())


def test_mixed_inputs_are_titled_with_both_weights() -> None:
    names = ["a", "b", "c"]
    assert _title(torch.tensor(2), names) == [("c", "")]
    assert _title(torch.tensor([0.3, 0.7, 0.0]), names) == [("b", " 70%"), ("a", " 30%")]
    assert _title(torch.tensor([0.0, 1.0, 0.0]), names) == [("b", "")]
