"""The run's numbers, a row an epoch: in TensorBoard, in metrics.csv, in the log, and in the checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from cifar10_tl.callbacks.throughput import Throughput
from cifar10_tl.io import atomic_write_text, csv_text
from cifar10_tl.metrics.evaluation import Evaluation

log = logging.getLogger(__name__)


METRICS = ("train/loss", "train/acc", "val/loss", "val/acc")


SPEED = ("seconds", "images_per_second", "step_ms", "data_wait", "peak_memory_gb")


COLUMNS = ("epoch", "step", "lr", *METRICS, "val/count", *SPEED)


class MetricsLogger(Callback):
    """Keeps the rows, and writes each to every place when its epoch ends.

    The rows travel in the checkpoint, and metrics.csv is written whole each time: a resumed run goes on with the rows
    of its checkpoint, none missing, none twice.

    Attributes:
        rows: a dict for each epoch with the keys ``COLUMNS``; None where something was not measured.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int | None]] = []

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put train and val of a quantity on one chart."""
        charts = {q: ["Multiline", [f"train/{q}", f"val/{q}"]] for q in ("loss", "acc")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars({"train and val": charts})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a finished run goes on, its results are those of a shorter one, and no longer its end."""
        if trainer.is_global_zero:
            for name in ("results.json", "predictions.csv"):
                (Path(trainer.default_root_dir) / name).unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the epoch's row: this runs behind validation, and before the checkpoints are written."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        row = self._row(trainer, pl_module)
        self.rows.append(row)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({k: v for k in METRICS if (v := row[k]) is not None}, step=trainer.current_epoch)
            atomic_write_text(Path(trainer.default_root_dir) / "metrics.csv", self._csv())
            log.info("%s", self._line(trainer, row))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the test at the epoch whose checkpoint was tested."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        epoch: Any = pl_module.restored_epoch
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.current_epoch if epoch is None else epoch)

    def _row(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float | int | None]:
        # not trainer.callback_metrics, which are float32: these are the digits that any later evaluation gives
        evaluation: Evaluation | None = pl_module.evaluation
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[-1]["lr"],
            **pl_module.training_metrics(),
            "val/loss": evaluation.loss if evaluation is not None else None,
            "val/acc": evaluation.accuracy if evaluation is not None else None,
            "val/count": len(evaluation) if evaluation is not None else None,
            **(throughput.row(pl_module.device) if throughput else dict.fromkeys(SPEED)),
        }

    def _csv(self) -> str:
        return csv_text(COLUMNS, ([row[column] for column in COLUMNS] for row in self.rows))

    def _line(self, trainer: pl.Trainer, row: dict[str, Any]) -> str:
        parts = [f"epoch {row['epoch']} ({row['epoch'] + 1} of {trainer.max_epochs})"]
        parts += [
            f"{s} loss {row[f'{s}/loss']:.4f} acc {row[f'{s}/acc']:.2%}"
            for s in ("train", "val")
            if row[f"{s}/acc"] is not None
        ]
        if row["images_per_second"]:
            parts.append(f"{row['images_per_second']:.0f} images/s")
            parts.append(f"{row['step_ms']:.0f} ms a step, {row['data_wait']:.1%} of it for data")
        if row["peak_memory_gb"]:
            parts.append(f"{row['peak_memory_gb']:.1f} GB")
        return "  ".join(parts)
