"""TensorBoard logger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoardLogger with one event file per start of a run, and one point per test of an epoch.

    Args:
        tested_epoch: Epoch whose test was logged before the run was resumed.
        options: Arguments of TensorBoardLogger.
    """

    def __init__(self, *, tested_epoch: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._logged = {("test/acc", tested_epoch), ("test/loss", tested_epoch)}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, without a second test of the same epoch (as from ``log_hyperparams``)."""
        new = {name: value for name, value in metrics.items() if (name, step) not in self._logged}
        self._logged |= {(name, step) for name in new if name.startswith("test/")}
        super().log_metrics(new, step)

    def finalize(self, status: str) -> None:
        """Flush the event file; Lightning would close it after ``fit`` and start another one for ``test``."""
        if self._experiment is not None:
            self.save()
