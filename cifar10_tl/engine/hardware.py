"""The machine and the libraries under a run: precision, how files are written, which messages are kept back."""

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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors it has freed, for those that come next; False where it cannot.

    Otherwise glibc asks the system for each buffer of 32 MiB or more anew, which fills it with zeros, page by page: a
    step of ResNet50 in fp32 at 128 px takes 1.7 times as long for it (see docs/performance.md). For a process that is
    about tensors on a CPU: its memory stays at its peak to its end.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD. Other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
