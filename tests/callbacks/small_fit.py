"""Fit of a few steps with a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cifar10_tl.data.batch import BatchLoader, BatchSampler, Split
from cifar10_tl.models.lit_classifier import LitClassifier

_GENERATOR = torch.Generator().manual_seed(0)
SPLIT = Split(torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=_GENERATOR), torch.arange(12) % 3)


def loader(split: Split = SPLIT) -> BatchLoader:
    """Return three batches of four images."""
    return BatchLoader(split, BatchSampler(len(split), 4, shuffle=False))


def small_fit(
    folder: Path, *callbacks: Callback, split: Split = SPLIT, optimizer: dict[str, Any] | None = None, **options: Any
) -> tuple[pl.Trainer, LitClassifier]:
    """Train and validate; ``options`` are those of the Trainer."""
    torch.manual_seed(0)
    module = LitClassifier(["a", "b", "c"], backbone="resnet18", image_size=32, optimizer=optimizer)
    defaults: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "max_epochs": 1, "accelerator": "cpu"}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(
        **(defaults | options),
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=saves,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(split), loader())
    return trainer, module
