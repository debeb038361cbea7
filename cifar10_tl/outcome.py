"""What a training run comes to: its results, the HPARAMS of TensorBoard, the closing words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig
from torch.utils.tensorboard.summary import hparams

from cifar10_tl.callbacks import History, Throughput
from cifar10_tl.callbacks.publish import tensorboard_writers
from cifar10_tl.checkpoints import read_checkpoint
from cifar10_tl.models.module import LitClassifier
from cifar10_tl.parts import plain
from cifar10_tl.results import environment, flat, write_json, write_predictions


def results_of_fit(
    cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, best: Path | None, seconds: float
) -> dict[str, Any]:
    """What a fit comes to. To be called right behind it: a test restores the callbacks' state of the best epoch.

    Args:
        cfg: of the train command.
        module: that learned.
        trainer: that fitted it.
        best: the best checkpoint.
        seconds: that the fit took, in this start of the run.
    """
    history = next((c for c in trainer.callbacks if isinstance(c, History)), History())  # type: ignore[attr-defined]
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), Throughput())  # type: ignore[attr-defined]
    best_epoch = read_checkpoint(best)["epoch"] if best else None
    best_row = next((row for row in history.rows if row["epoch"] == best_epoch), {})
    return {
        "val": {key: best_row.get(f"val/{key}") for key in ("acc", "loss", "count")},
        "best_epoch": best_epoch,
        "epochs": trainer.current_epoch,
        "seconds": {"fit": throughput.earlier_seconds + seconds, "first_step": throughput.first_step_seconds},
        "images_per_second": throughput.images_per_second,
        "class_names": list(module.class_names),
        "config": plain(cfg),
        "environment": environment(
            trainer.strategy.root_device, trainer.world_size, str(trainer.precision_plugin.precision)
        ),
    }


def results_of_test(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> dict[str, Any]:
    """What a test comes to.

    Raises:
        RuntimeError: it left out images, or counted some twice; that must not pass for a result.
    """
    assert module.evaluation is not None
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    count, expected = len(module.evaluation), len(datamodule.splits["test"])
    if cfg.trainer.limit_test_batches is None and count != expected:
        raise RuntimeError(f"the test saw {count} of {expected} images")
    return {"test": module.evaluation.metrics(), "confusion_matrix": module.evaluation.confusion_matrix.tolist()}


def write_results(run_dir: Path, results: Mapping[str, Any], module: LitClassifier, trainer: pl.Trainer) -> None:
    """Write results.json, predictions.csv and the HPARAMS. To be called on rank zero alone."""
    log_hparams(trainer, results)
    write_json(run_dir / "results.json", results)
    if "test" in results:
        assert module.evaluation is not None
        write_predictions(run_dir / "predictions.csv", module.evaluation)


def log_hparams(trainer: pl.Trainer, results: Mapping[str, Any]) -> None:
    """Write TensorBoard's HPARAMS: the settings of the run and its test metrics."""
    metrics = {f"test/{k}": v for k, v in results.get("test", {}).items() if k in ("acc", "loss")}
    groups = ("seed", "data", "model", "optimizer", "scheduler", "trainer", "init_from")
    settings = flat({k: v for k, v in results["config"].items() if k in groups})
    for writer in tensorboard_writers(trainer):
        for part in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            writer.add_summary(part)


def summary(results: Mapping[str, Any], run_dir: Path, best: Path | None) -> str:
    """The closing words of a run."""
    val, test = results["val"], results.get("test")
    validated = f"best epoch {results['best_epoch']}, val acc {val['acc']:.2%}" if val["acc"] is not None else None
    lines = ["", f"  {validated or 'nothing was validated'}"]
    if test:
        lines.append(f"  test acc {test['acc']:.2%}, loss {test['loss']:.4f}, on {test['count']} images")
    lines += [
        f"  figures      {run_dir / 'figures'}",
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'metrics.csv'}",
        f"  checkpoint   {best or 'none'}",
        f"  TensorBoard  tensorboard --host localhost --logdir {run_dir}",
    ]
    return "\n".join(lines)
