"""TensorBoard logger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoardLogger with one event file per start of a run, and one point per test.

    A test is logged by ``log_hyperparams`` alone, when its results are complete: a run that is killed before that
    tests again when it is resumed.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, except those that :meth:`log_hyperparams` logs."""
        super().log_metrics({k: v for k, v in metrics.items() if k not in ("test/acc", "test/loss")}, step)

    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Log settings and the metrics of a test."""
        super().log_hyperparams(params, metrics, step)
        super().log_metrics(metrics or {}, step)

    def finalize(self, status: str) -> None:
        """Flush the event file; Lightning would close it after ``fit`` and start another one for ``test``."""
        if self._experiment is not None:
            self.save()
