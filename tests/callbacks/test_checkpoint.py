from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TINY, compose_train, resume, rows, scalars
from omegaconf import DictConfig

from cifar10_tl.callbacks import RunCheckpoint
from cifar10_tl.train import train

Small = Callable[..., DictConfig]
FROZEN = (*TINY, "callbacks=minimal", "report=none", "model.freeze=backbone", "optimizer=sgd", "scheduler=constant")


def epoch_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


def test_the_best_of_the_validated_epochs_is_tested_and_reported(
    small_cfg: Small, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"callbacks.best_checkpoint.{o}" for o in ("monitor=val/loss", "save_top_k=-1", "filename=lowest")]
    cfg = small_cfg(*FROZEN, "trainer.max_epochs=5", "trainer.check_val_every_n_epoch=2", *options)
    caplog.set_level("INFO")
    results: Any = train(cfg)
    run = Path(cfg.paths.output_dir)
    assert [row["val/loss"] != "" for row in rows(run)] == [False, True, False, True, True], "the last epoch, too"
    losses = {int(row["epoch"]): float(row["val/loss"]) for row in rows(run) if row["val/loss"]}
    best = min(losses, key=losses.__getitem__)
    files = {"lowest.ckpt", "lowest-1.ckpt", "lowest-3.ckpt", "lowest-4.ckpt", "last.ckpt"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == files
    assert (results["best_epoch"], results["val"]["loss"]) == (best, losses[best])
    (line,) = [line for line in caplog.text.splitlines() if "  checkpoint " in line]
    assert epoch_of(Path(line.split()[-1])) == epoch_of(run / "checkpoints" / "lowest.ckpt") == best
    assert epoch_of(run / "checkpoints" / "last.ckpt") == 4
    assert [step for step, _ in scalars(run, "val/loss")] == [1, 3, 4]


@pytest.mark.parametrize(("stop", "limit"), [(4, -1), (4, 6), (3, 6)])
def test_a_run_stopped_by_max_steps_resumes_exactly(small_cfg: Small, stop: int, limit: int) -> None:
    """It stops inside an epoch, or at its end: https://github.com/Lightning-AI/pytorch-lightning/issues/19617."""
    options = (*FROZEN, "model.head.dropout=0.5", "trainer.max_epochs=2")
    uninterrupted, stopped = small_cfg(*options, run="a"), small_cfg(*options, f"trainer.max_steps={stop}", run="b")
    train(uninterrupted)
    train(stopped)
    a, b = Path(uninterrupted.paths.output_dir), Path(stopped.paths.output_dir)
    written = [(row["epoch"], row["step"], row["val/acc"] != "") for row in rows(b)]
    assert written == [("0", "3", True), ("1", "4", False)][: stop - 2]
    resume(b, f"trainer.max_steps={limit}")
    for row, same in zip(rows(a), rows(b), strict=True):
        assert list(row.values())[:10] == list(same.values())[:10]
    results, same = (json.loads((run / "results.json").read_text()) for run in (a, b))
    assert (results["val"], results["best_epoch"]) == (same["val"], same["best_epoch"])
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (a, b)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for tag in ("train/loss", "val/acc"):
        assert scalars(a, tag) == scalars(b, tag)


def test_the_last_epoch_is_saved_and_names_have_the_step(small_cfg: Small) -> None:
    several = ("callbacks.last_checkpoint.every_n_epochs=2", "callbacks.best_checkpoint.filename='best-{epoch}-{step}'")
    cfg = small_cfg(*FROZEN, *several, "callbacks.best_checkpoint.save_top_k=-1")
    cfg.trainer.update(max_epochs=5, max_steps=9)
    assert train(cfg)["epochs"] == 3
    run = Path(cfg.paths.output_dir)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *("best-0-3.ckpt", "best-1-6.ckpt", "best-2-9.ckpt", "last.ckpt")
    }
    assert epoch_of(run / "checkpoints" / "last.ckpt") == 2
    (run / "results.json").unlink()
    assert resume(run)["epochs"] == 3, "nothing was left to train"


def test_the_best_of_several_is_copied_after_a_kill_before_the_copy(small_cfg: Small) -> None:
    several = "callbacks.best_checkpoint.save_top_k=-1"
    cfg = small_cfg(*FROZEN, several, "callbacks.best_checkpoint.monitor=val/loss", "trainer.max_epochs=1")
    train(cfg)
    copy = Path(cfg.paths.output_dir) / "checkpoints" / "best.ckpt"
    copy.unlink()
    resume(Path(cfg.paths.output_dir), "trainer.max_epochs=2")
    losses = [float(row["val/loss"]) for row in rows(Path(cfg.paths.output_dir))]
    assert epoch_of(copy) == losses.index(min(losses))


@pytest.mark.parametrize("name", ["acc", "balanced_acc", "macro_f1", "loss"])
def test_the_highest_accuracy_and_the_lowest_loss_are_the_best(name: str) -> None:
    monitor = compose_train(f"callbacks.best_checkpoint.monitor=val/{name}").callbacks.best_checkpoint.monitor
    assert RunCheckpoint("best", monitor=monitor).mode == ("min" if name == "loss" else "max")


def test_max_time_stops_after_an_optimizer_step(tmp_path: Path) -> None:
    saved: list[int] = []
    module: Any = None
    trainer: Any = SimpleNamespace(accumulate_grad_batches=3, global_step=7, max_steps=-1, should_stop=True)
    trainer.callback_metrics, trainer.current_epoch, trainer.fast_dev_run = {}, 0, False
    callback = RunCheckpoint("last", dirpath=tmp_path)
    for batch_idx in range(3):
        trainer.is_last_batch = False
        trainer.save_checkpoint = lambda *_, batch_idx=batch_idx, **__: saved.append(batch_idx)
        callback.on_train_batch_end(trainer, module, None, None, batch_idx)
        assert trainer.should_stop == (batch_idx == 2)
    assert saved == [2]
    trainer.should_stop, trainer.is_last_batch = True, True
    callback.on_train_batch_end(trainer, module, None, None, 4)
    assert trainer.should_stop, "the last batches of an epoch are a group of their own"
    assert saved == [2], "saved after validation"


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
    assert (list(callback.best_k_models), callback.kth_best_model_path) == ([""], "")
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
