from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, compose_train
from omegaconf import DictConfig

from cifar10_tl.callbacks import RunCheckpoint
from cifar10_tl.config.resume import resumed_config
from cifar10_tl.train import train

Small = Callable[..., DictConfig]


def epoch_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_best_checkpoint_is_the_one_that_is_tested_and_reported(
    small_cfg: Small, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"callbacks.best_checkpoint.{o}" for o in ("monitor=val/loss", "save_top_k=3", "filename=lowest")]
    # a learning rate under which the loss rises: neither the first epoch nor the last must be the best by chance
    cfg = small_cfg(*TINY, "trainer.max_epochs=3", "optimizer.lr=0.003", "scheduler=constant", *options)
    caplog.set_level("INFO")
    results: Any = train(cfg)
    run = Path(cfg.paths.output_dir)
    losses = [float(row["val/loss"]) for row in rows(run)]
    best = losses.index(min(losses))
    assert losses.index(max(losses)) != best
    files = {"lowest.ckpt", "lowest-0.ckpt", "lowest-1.ckpt", "lowest-2.ckpt", "last.ckpt"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == files
    assert results["best_epoch"] == best
    assert results["val"]["loss"] == min(losses)
    (line,) = [line for line in caplog.text.splitlines() if "  checkpoint " in line]
    assert epoch_of(Path(line.split()[-1])) == best
    assert epoch_of(run / "checkpoints" / "lowest.ckpt") == best


def resume(run: Path, *overrides: str) -> Any:
    given = [f"resume={run}", *overrides]
    return train(resumed_config(compose_train(*given), given))


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_stopped_by_max_steps_inside_an_epoch_resumes_in_the_middle(small_cfg: Small) -> None:
    options = (*TINY, "scheduler=constant", "model.head.dropout=0.5", "callbacks=minimal", "trainer.max_epochs=2")
    uninterrupted, stopped = small_cfg(*options, run="a"), small_cfg(*options, "trainer.max_steps=4", run="b")
    train(uninterrupted)
    train(stopped)
    a, b = Path(uninterrupted.paths.output_dir), Path(stopped.paths.output_dir)
    written = [(row["epoch"], row["step"], row["val/acc"] != "") for row in rows(b)]
    assert written == [("0", "3", True), ("1", "4", False)]
    resume(b, "trainer.max_steps=-1")
    for row, same in zip(rows(a), rows(b), strict=True):
        assert list(row.values())[:8] == list(same.values())[:8]
    results, same = (json.loads((run / "results.json").read_text()) for run in (a, b))
    assert (results["val"], results["best_epoch"]) == (same["val"], same["best_epoch"])
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (a, b)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert scalars(a, "train/loss") == scalars(b, "train/loss")
    assert scalars(a, "val/acc") == scalars(b, "val/acc")


def test_only_validated_epochs_compete_for_the_best(small_cfg: Small) -> None:
    options = ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3", "callbacks.best_checkpoint.save_top_k=-1")
    cfg = small_cfg(*TINY, "callbacks=minimal", *options)
    results: Any = train(cfg)
    run = Path(cfg.paths.output_dir)
    assert [row["val/acc"] != "" for row in rows(run)] == [False, True, False]
    assert results["best_epoch"] == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "best-1.ckpt", "last.ckpt"}
    assert epoch_of(run / "checkpoints" / "last.ckpt") == 2
    assert [step for step, _ in scalars(run, "val/loss")] == [1]


def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """Lightning deletes the previous best when a better one comes."""
    callback = RunCheckpoint("best", monitor="val/acc", dirpath=tmp_path)
    state = callback.state_dict() | {
        "dirpath": "elsewhere",
        "best_k_models": {f"{tmp_path}/../victim.txt": torch.tensor(0.0)},
        "kth_best_model_path": f"{tmp_path}/..",
        "best_model_path": "/other/place/best.ckpt",
    }
    callback.load_state_dict(state)
    assert list(callback.best_k_models) == [""]
    assert callback.kth_best_model_path == ""
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
