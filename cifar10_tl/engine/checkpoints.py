"""Reading checkpoint files, without running code that they name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.validation import RULES
from cifar10_tl.io import atomic_write
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.weights import load_safely

log = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint.

    Raises:
        UserError: the file is missing, broken, or no checkpoint of this project.
    """
    content = load_safely(path)
    if not isinstance(content, Mapping) or not {"state_dict", "hyper_parameters", "epoch"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of this project: it has no state_dict, hyper_parameters and epoch")
    return content


def find_resumable(run_dir: Path) -> Path | None:
    """The newest good checkpoint to go on from; None if there is none yet. Broken ones are told and passed over.

    Raises:
        UserError: there are checkpoints, but each is broken.
    """
    found = [p for p in (run_dir / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")) if p.is_file()]
    steps: dict[Path, int] = {}
    for path in found:
        try:
            content = read_checkpoint(path)
            if missing := {"global_step", "optimizer_states", "loops", "callbacks"} - content.keys():
                raise UserError(f"{path} cannot be gone on from: it has no {', '.join(sorted(missing))}")
            steps[path] = content["global_step"]
        except UserError as error:
            log.warning("%s", error)
    if found and not steps:
        raise UserError(f"{run_dir}: its checkpoints are broken; start a new run, or bring a good copy of {found[0]}")
    if len(steps) < len(found):
        log.warning("going on from %s, at step %d", *max(steps.items(), key=lambda item: item[1]))
    return max(steps, key=steps.__getitem__, default=None)


def make_last(path: Path) -> None:
    """Copy the checkpoint that a run goes on from to last.ckpt, which a kill left behind an earlier step, or broken."""
    last = path.with_name("last.ckpt")
    if path != last:
        with path.open("rb") as source, atomic_write(last) as target:
            shutil.copyfileobj(source, target)


def best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return what the run's first checkpoint callback calls its best, else last.ckpt; None if neither can be read."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    for path in (*([Path(best)] if best else []), last):
        if path.is_file():
            try:
                read_checkpoint(path)
            except UserError as error:
                log.warning("%s", error)
            else:
                return path
    return None


def restore(checkpoint: Path) -> LitClassifier:
    """The classifier in a checkpoint, in eval mode on the CPU, from that file alone; no code it names is run.

    Raises:
        UserError: the file is missing, broken, no checkpoint, or does not fit this version of the project.
    """
    content = read_checkpoint(checkpoint)
    try:
        module = LitClassifier(**content["hyper_parameters"])
        module.load_state_dict(content["state_dict"])
    except (TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{checkpoint} does not fit this version of cifar10_tl: {error}") from error
    module.on_load_checkpoint(dict(content))
    return module.eval()


def recorded_precision(checkpoint: Path) -> str | None:
    """The precision a run was tested in, where ``checkpoint`` still lies in its folder with the results; else None."""
    try:
        results = json.loads((checkpoint.resolve().parent.parent / "results.json").read_text())
        precision = results["environment"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return precision if RULES["trainer.precision"](precision) is None else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write checkpoints, but no reader and no power cut ever meets half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, see :func:`cifar10_tl.files.atomic_write`.

        Raises:
            UserError: it cannot be written; what lay there is as it was.
        """
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch could not finish the file
            cause = error if isinstance(error, OSError) else error.__context__ or error
            kept = f"the last good one, {path}, is whole" if Path(path).is_file() else "there was none before"
            raise UserError(
                f"the checkpoint {path} cannot be written: {cause}; {kept}. Make room on the disk, then go on with "
                f"resume={Path(path).parent.parent}"
            ) from error
