"""Reading checkpoint files, without running code that they name."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cifar10_tl.errors import UserError
from cifar10_tl.files import atomic_write

log = logging.getLogger(__name__)


def load_safely(path: Path) -> Any:
    """The tensors and plain values in a file of ``torch.save``, on the CPU; code that the file names is not run.

    Raises:
        UserError: the file is missing, cut off, of another kind, or names code.
    """
    try:
        if zipfile.is_zipfile(path):  # torch would not notice a flipped bit
            with zipfile.ZipFile(path) as archive:
                if spoiled := archive.testzip():
                    raise UserError(f"{path} is broken: the checksum of {spoiled} in it is another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles; whether it can be read is all that matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read safely: it is broken, of another kind, or names code to be run"
        ) from error
    except Exception as error:  # a file cut off fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]  # torch adds advice
        raise UserError(f"{path} is broken or of another kind: {reason}") from error


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


def best_checkpoint(run_dir: Path) -> Path | None:
    """The best epoch's checkpoint, or the last one where nothing was validated; None where there is no good one."""
    for path in (run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")):
        if path.is_file():
            try:
                read_checkpoint(path)
            except UserError as error:
                log.warning("%s", error)
            else:
                return path
    return None
