"""Metrics of a run, one row per epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from cifar10_tl.callbacks.throughput import Throughput
from cifar10_tl.io import write_csv
from cifar10_tl.metrics.evaluation import Evaluation

log = logging.getLogger(__name__)

SPEED = ("seconds", "images_per_second", "step_ms", "data_wait", "peak_memory_gb")
VALIDATED = ("val/loss", "val/acc", "val/balanced_acc", "val/macro_f1", "val/count")
COLUMNS = ("epoch", "step", "lr", "train/loss", "train/acc", *VALIDATED, *SPEED)


def tensorboard_loggers(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Return the loggers of a trainer that write to TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class MetricsLogger(Callback):
    """Callback that writes one row per epoch to metrics.csv and to the log.

    The rows are saved in checkpoints, and metrics.csv is written as a whole, so that a resumed run has each epoch once.
    A row is a dict with the keys ``COLUMNS``; None where a value was not measured.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int | None]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out TensorBoard's custom scalars."""
        if not trainer.is_global_zero:
            return
        charts = {n: ["Multiline", [f"train/{n}$", f"val/{n}$"]] for n in ("loss", "acc")}  # not train/loss_step
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_custom_scalars({"train and val": charts})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row of the epoch, after validation and before checkpoints are saved."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        row = self._row(trainer, pl_module)
        if row["images_per_second"] is not None:
            epoch = float(trainer.current_epoch)  # the x axis
            pl_module.log_dict({"images/s": row["images_per_second"], "step": epoch}, batch_size=1)
        self.rows.append(row)
        if trainer.is_global_zero:
            lines = ([row.get(column) for column in COLUMNS] for row in self.rows)  # older versions had fewer
            write_csv(Path(trainer.default_root_dir) / "metrics.csv", COLUMNS, lines)
            log.info("%s", _summary(row, trainer.max_epochs))

    def _row(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float | int | None]:
        evaluation: Evaluation | None = pl_module.evaluation  # callback_metrics has float32 only
        validated = evaluation.metrics() if evaluation is not None else {}
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[-1]["lr"],
            **pl_module.training_metrics(),
            **{name: validated.get(name.removeprefix("val/")) for name in VALIDATED},
            **(throughput.row(pl_module.device) if throughput else dict.fromkeys(SPEED)),
        }


def _summary(row: dict[str, Any], max_epochs: int | None) -> str:
    parts = [f"epoch {row['epoch']} ({row['epoch'] + 1} of {max_epochs})"]
    for split in ("train", "val"):
        if row[f"{split}/acc"] is not None:
            parts.append(f"{split} loss {row[f'{split}/loss']:.4f} acc {row[f'{split}/acc']:.2%}")
    if row["images_per_second"]:
        parts.append(f"{row['images_per_second']:.0f} images/s")
        parts.append(f"{row['step_ms']:.0f} ms/step, {row['data_wait']:.1%} waiting for data")
    if row["peak_memory_gb"]:
        parts.append(f"{row['peak_memory_gb']:.1f} GB")
    return "  ".join(parts)
