"""Choices that depend on the hardware, and the warnings of libraries that do not apply."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform
import shutil
import warnings

import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.network import TransferResNet

#: Warnings about deliberate choices of this project.
_WARNINGS = (
    r".*does not have many workers.*",  # a batch is one index operation
    r".*module\(s\) in eval mode at the start of training.*",  # a frozen backbone
    r".*Checkpoint directory .* exists and is not empty.*",  # of a resumed run
    r".*could not find the monitored key.*",  # an epoch without validation
    r".*is smaller than the logging interval.*",  # nothing is logged per step
    r".*recommended to use `self\.log\(.*sync_dist=True\)`.*",  # metrics are computed from all processes' logits
    r".*`_get_pg_default_device`.*",
    r".*Grad strides do not match bucket view strides.*",  # channels_last
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*You passed `deterministic=True` and `benchmark=True`.*",
    r".*The epoch parameter in `scheduler\.step\(\)`.*",
)

#: Loggers of tips, advertisements and lists of the available hardware.
_VERBOSE_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.seed",
)


def quiet_libraries() -> None:
    """Suppress Lightning's tips and the warnings that do not apply."""
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


def choose_precision(accelerator: str) -> tuple[str, str]:
    """Return the precision for ``trainer.precision=auto`` and the reason, for an accelerator as Lightning names it."""
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
    return "32-true", f"bfloat16 is untested on accelerator {accelerator}"


def choose_compile(setting: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile the network for ``compile`` (True, False or "auto") on ``device``, and the reason.

    Compiled networks train more slowly on a CPU; see docs/performance.md.

    Raises:
        UserError: ``compile=true``, but the machine has no compiler.
    """
    has_compiler = _has_triton(device) if device.type == "cuda" else shutil.which("g++") or shutil.which("clang++")
    if setting == "auto":
        if device.type != "cuda":
            return False, f"slower on {device.type}"
        return (True, "a GPU with Triton") if has_compiler else (False, "Triton is not installed")
    if setting and not has_compiler:
        needed = "Triton and a GPU that it supports" if device.type == "cuda" else "a C++ compiler (g++)"
        raise UserError(f"compile=true needs {needed}; use compile=false")
    return bool(setting), "as set"


def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def tune_for(device: torch.device, network: TransferResNet) -> None:
    """Choose the layout of the weights, TensorFloat-32 matrix products and the memory allocator for ``device``."""
    network.lay_out_for(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors in this process, and return whether the C library supports that.

    By default, glibc returns every freed buffer of 32 MiB or more to the system, which later has to clear it again: a
    step of ResNet50 in fp32 at 128 px takes 1.7 times as long (docs/performance.md). Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_threshold, largest = ctypes.CDLL(None).mallopt, -1, -3, 2**31 - 1
    return all([mallopt(mmap_threshold, largest), mallopt(trim_threshold, largest)])
