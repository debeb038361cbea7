"""A bar for each pass over images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from cifar10_tl.data.augment import Batch


class EvaluationProgress(Callback):
    """Images done of all images of a test; there is no bar where stderr is no terminal.

    Attributes:
        description: what the next pass is for.
    """

    def __init__(self) -> None:
        self.description = ""
        self._bar: tqdm[Any] | None = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        loader: Any = trainer.test_dataloaders
        self._bar = tqdm(
            total=len(loader.dataset),
            desc=self.description,
            unit=" images",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the images."""
        if self._bar is not None:
            self._bar.update(len(batch.images))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
