"""The machine and the libraries under a run: precision, how files are written, which messages are kept back."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cifar10_tl.checks import RULES
from cifar10_tl.errors import UserError
from cifar10_tl.files import atomic_write
from cifar10_tl.memory import keep_freed_memory
from cifar10_tl.models.network import TransferResNet

#: Of no use to someone who runs our commands: each is about a choice made here on purpose.
_WARNINGS = (
    r".*does not have many workers.*",  # batches are one index operation; see BatchLoader
    r".*module\(s\) in eval mode at the start of training.*",  # a frozen backbone is
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    r".*could not find the monitored key.*",  # an epoch without validation
    r".*is smaller than the logging interval.*",  # nothing is logged by the step
    r".*recommended to use `self\.log\(.*sync_dist=True\)`.*",  # each process has the numbers of all images
    r".*`_get_pg_default_device`.*",
    r".*Grad strides do not match bucket view strides.*",  # channels_last
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*You passed `deterministic=True` and `benchmark=True`.*",
    r".*The epoch parameter in `scheduler\.step\(\)`.*",
)


#: Tips, adverts, and lists of the hardware that was found.
_CHATTERERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.seed",
)


def quiet_libraries() -> None:
    """Keep back Lightning's tips and a few warnings, by name; what else it says is shown as ever."""
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


def choose_precision(accelerator: str) -> tuple[str, str]:
    """What ``trainer.precision=auto`` stands for on this machine, and why.

    Args:
        accelerator: as Lightning's Trainer takes it.
    """
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", f"{name} computes in bfloat16"
        return "32-true", f"{name} has no native bfloat16"
    if accelerator in ("cpu", "auto") and not torch.backends.mps.is_available():
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16-mixed", "this CPU computes in bfloat16"
        return "32-true", "this CPU has no native bfloat16"
    return "32-true", f"not tried on accelerator {accelerator}"


def choose_compile(setting: bool | str, device: torch.device) -> tuple[bool, str]:
    """What the setting ``compile`` (True, False or "auto") comes to on ``device``, and why.

    On a CPU the compiled network trains more slowly than PyTorch's own kernels; see docs/performance.md.

    Raises:
        UserError: compiling is asked for, but the machine has no compiler for it.
    """
    has_compiler = _has_triton(device) if device.type == "cuda" else shutil.which("g++") or shutil.which("clang++")
    if setting == "auto":
        if device.type != "cuda":
            return False, f"slower on {device.type}"
        return (True, "a GPU with Triton") if has_compiler else (False, "Triton is not there")
    if setting and not has_compiler:
        needed = "Triton, which this machine or GPU lacks" if device.type == "cuda" else "a C++ compiler (g++)"
        raise UserError(f"compile=true needs {needed}; use compile=false")
    return bool(setting), "as set"


def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def tune_for(device: torch.device, network: TransferResNet) -> None:
    """Choose what is faster for ``network`` on ``device``: the layout of its weights, TensorFloat-32, memory kept.

    TensorFloat-32 is for float32 products on a GPU; convolutions use it by PyTorch's own default.
    """
    network.lay_out_for(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_freed_memory()


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
