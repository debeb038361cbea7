from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from cifar10_tl.callbacks import (
    ConfusionMatrix,
    Curves,
    GradientFlow,
    IncorrectPredictions,
    MetricsLogger,
    RunCheckpoint,
    SampleInputs,
    figures,
)
from cifar10_tl.callbacks.figures import _title
from cifar10_tl.data.batch import Batch, Split
from cifar10_tl.metrics.evaluation import Evaluation

IMAGES, LABELS, INDICES = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 2, 2]), torch.arange(4)
EVALUATION = Evaluation.of(torch.eye(3)[torch.tensor([0, 1, 2, 1])], LABELS, INDICES, ["a", "b", "c"])
MODULE: Any = SimpleNamespace(evaluation=EVALUATION, restored_epoch=7, class_names=["a", "b", "c"])


def fake_trainer(folder: Path, **state: Any) -> Any:
    """As much of a Trainer as these callbacks read."""
    flags = {"is_global_zero": True, "is_last_batch": True, "sanity_checking": False, "fast_dev_run": False}
    values = {"default_root_dir": str(folder), "loggers": [], "checkpoint_callback": None, "global_step": 0}
    split = Split(IMAGES, LABELS, INDICES)
    data = SimpleNamespace(splits={"val": split, "test": split})
    return SimpleNamespace(**(flags | values | {"current_epoch": 0, "datamodule": data} | state))


@pytest.mark.parametrize(
    ("monitor", "score", "last_batch", "drawn"),
    [
        ("val/acc", 0.6, True, True),
        ("val/acc", 0.5, True, False),
        ("val/loss", 0.4, True, True),
        ("val/loss", 0.6, True, False),
        ("val/loss", 0.4, False, False),
    ],
)
def test_the_validation_is_drawn_when_the_best_changes(
    tmp_path: Path, monitor: str, score: float, last_batch: bool, drawn: bool
) -> None:
    checkpoint = RunCheckpoint("best", monitor=monitor, save_top_k=3)
    checkpoint.best_model_score = torch.tensor(0.5)
    metrics = {monitor: torch.tensor(score)}
    trainer = fake_trainer(tmp_path, checkpoint_callback=checkpoint, callback_metrics=metrics, is_last_batch=last_batch)
    ConfusionMatrix().on_validation_end(trainer, MODULE)
    assert (tmp_path / "figures" / "confusion_matrix_val.png").exists() == drawn


def test_the_test_is_drawn_at_the_epoch_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[tuple[str, tuple[int, ...], int]] = []
    writer = SimpleNamespace(add_image=lambda tag, pixels, step, dataformats: images.append((tag, pixels.shape, step)))
    monkeypatch.setattr(TensorBoardLogger, "experiment", writer)
    trainer = fake_trainer(tmp_path, loggers=[TensorBoardLogger(tmp_path)], current_epoch=9)
    IncorrectPredictions(num_images=1).on_test_end(trainer, MODULE)
    file = np.asarray(Image.open(tmp_path / "figures" / "incorrect_test.png"))
    assert images == [("incorrect/test", (*file.shape[:2], 3), 7)]


@pytest.mark.parametrize(("last", "steps"), [(8, [5, 8]), (5, [5])])
def test_the_last_epoch_is_added_to_tensorboard_and_the_file_stays(
    last: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    writer = SimpleNamespace(add_image=lambda tag, pixels, step, dataformats: logged.append(step))
    monkeypatch.setattr(TensorBoardLogger, "experiment", writer)
    callback, module = ConfusionMatrix(), SimpleNamespace(**{**vars(MODULE), "restored_epoch": last})
    trainer = fake_trainer(tmp_path, loggers=[TensorBoardLogger(tmp_path)], current_epoch=5)
    callback.on_validation_end(trainer, module)
    file = tmp_path / "figures" / "confusion_matrix_val.png"
    best = file.read_bytes()
    callback.on_fit_end(trainer, module)
    assert logged == steps
    assert file.read_bytes() == best
    module.evaluation = None  # resumed with nothing left to train
    ConfusionMatrix().on_fit_end(trainer, module)
    assert logged == steps


@pytest.mark.parametrize("state", [{"sanity_checking": True}, {"fast_dev_run": True}, {"is_global_zero": False}])
def test_nothing_is_drawn_on_other_ranks_or_in_rehearsals(tmp_path: Path, state: dict[str, bool]) -> None:
    ConfusionMatrix().on_validation_end(fake_trainer(tmp_path, **state), MODULE)
    SampleInputs().on_train_batch_start(fake_trainer(tmp_path, **state), MODULE, Batch(IMAGES, LABELS, INDICES), 0)
    assert not list(tmp_path.iterdir())


def test_sample_inputs_are_what_the_network_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    colors = torch.tensor([[10, 20, 30], [40, 50, 60], [70, 80, 90], [0, 0, 0]]).byte()
    images[:, :, 8:24, 4:20] = colors[:, :, None, None]
    boxes = torch.tensor([[8.0, 4.0, 16.0, 16.0]]).expand(4, -1)
    drawn: list[Any] = []
    draw = figures.plots.sample_grid
    monkeypatch.setattr(
        figures.plots, "sample_grid", lambda *args, **options: drawn.extend(args) or draw(*args, **options)
    )
    batch = Batch(images, LABELS.flip(0), INDICES, boxes=boxes)
    SampleInputs(num_images=3).on_train_batch_start(fake_trainer(tmp_path), MODULE, batch, 0)
    pictures, titles = drawn
    assert np.array_equal(pictures, np.broadcast_to(colors[:3, None, None].numpy(), (3, 32, 32, 3)))
    assert titles == [[("c", "")], [("c", "")], [("b", "")]]
    assert (tmp_path / "figures" / "inputs_train.png").exists()


def test_mixed_inputs_are_titled_with_both_weights() -> None:
    names = ["a", "b", "c"]
    assert _title(torch.tensor(2), names) == [("c", "")]
    assert _title(torch.tensor([0.3, 0.7, 0.0]), names) == [("b", " 70%"), ("a", " 30%")]
    assert _title(torch.tensor([0.0, 1.0, 0.0]), names) == [("b", "")]


@pytest.mark.parametrize(
    ("monitor", "score", "best"),
    [("val/acc", 0.6, 1), ("val/loss", 0.3, 0), ("images/s", 9.0, None), (None, None, None)],
)
def test_curves_mark_the_epoch_of_the_best_checkpoint(
    monitor: str | None, score: float | None, best: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last epoch is incomplete, so its better accuracy does not count."""
    rows = [{"epoch": i, "val/acc": a, "val/loss": x} for i, (a, x) in enumerate([(0.5, 0.3), (0.6, 0.4), (0.7, 0.5)])]
    logger, seen = MetricsLogger(), list[Any]()
    logger.rows = rows
    monkeypatch.setattr(figures.plots, "curves", lambda *_, **options: seen.append(options.get("best")) or Figure())
    checkpoint = SimpleNamespace(monitor=monitor, best_model_score=None if score is None else torch.tensor(score))
    Curves().on_fit_end(fake_trainer(tmp_path, callbacks=[logger], checkpoint_callback=checkpoint))
    assert seen == [best]


@pytest.mark.parametrize("callback", [Curves(), GradientFlow()])
def test_an_interrupted_test_draws_nothing(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test restores the rows of the best checkpoint, which may be fewer."""
    drawn: list[Any] = []
    monkeypatch.setattr(callback, "on_fit_end", drawn.append)
    for fn in ("test", "fit"):
        callback.on_exception(trainer := SimpleNamespace(state=SimpleNamespace(fn=fn)))
    assert drawn == [trainer]
