"""Checkpoint files: read without running code, written atomically."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.logistic_regression import CHECKPOINT
from cifar10_tl.io import atomic_write
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.weights import load_safely

log = logging.getLogger(__name__)


class RunCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes files atomically and reuses the content that :meth:`read` has loaded."""

    def __init__(self) -> None:
        self._content: dict[Path, Mapping[str, Any]] = {}

    def read(self, path: Path) -> Mapping[str, Any]:
        """Return the content of a checkpoint, see :func:`read_checkpoint`, and keep it for the next load."""
        self._content = {path: read_checkpoint(path)}
        return self._content[path]

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint for Lightning."""
        return self._content.pop(Path(path), None) or super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. If that fails, an existing file is unchanged."""
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if it cannot complete the file
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"cannot write the checkpoint {path}: {cause}; an earlier one is unchanged. Free some disk space, then "
                f"continue with resume={Path(path).parent.parent}"
            ) from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return the content of a checkpoint of this project."""
    content = load_safely(path)
    if not isinstance(content, Mapping) or not {"state_dict", "hyper_parameters", "epoch"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project: no state_dict, hyper_parameters and epoch")
    return content


def find_resumable(run_dir: Path, checkpoint_io: RunCheckpointIO) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the latest intact checkpoint of a run and its content, None if there is no checkpoint.

    A run killed while it saved an epoch has a best checkpoint that is newer than the last one.
    """
    paths = [path for path in (run_dir / "checkpoints").glob("*.ckpt") if path.name != CHECKPOINT.name]
    for path in sorted(paths, key=lambda path: (_step(path), path.name == "last.ckpt"), reverse=True):
        try:
            content = checkpoint_io.read(path)
            if missing := {"global_step", "optimizer_states", "loops", "callbacks"} - content.keys():
                raise UserError(f"{path} cannot be resumed: no {', '.join(sorted(missing))}")
            return path, content
        except UserError as error:
            log.warning("%s", error)
    if paths:
        raise UserError(f"{run_dir}: all checkpoints are broken; start a new run, or restore a copy of {paths[0]}")
    return None


def _step(path: Path) -> int:
    """Return the step of a checkpoint without reading its tensors, -1 if it is broken."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # a truncated file fails in many ways
        return -1


def best_checkpoint(trainer: pl.Trainer) -> tuple[Path, int] | None:
    """Return the best checkpoint of the first checkpoint callback, else last.ckpt, and its epoch; None if broken."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    checkpoint_io: Any = trainer.strategy.checkpoint_io
    for path in (Path(best), last):
        if path.is_file():
            try:
                return path, checkpoint_io.read(path)["epoch"]
            except UserError as error:
                log.warning("%s", error)
    return None


def restore(checkpoint: Path) -> LitClassifier:
    """Return the classifier of a checkpoint, in eval mode on the CPU."""
    content = read_checkpoint(checkpoint)
    try:
        module = LitClassifier(**content["hyper_parameters"])
        module.load_state_dict(content["state_dict"])
    except (TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{checkpoint} does not fit this version of cifar10_tl: {error}") from error
    module.on_load_checkpoint(dict(content))
    return module.eval()
