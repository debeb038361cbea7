"""Choices that depend on the hardware, and the warnings of libraries that do not apply."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import warnings
from pathlib import Path

import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import is_started_by_srun
from cifar10_tl.data.images import available_cores
from cifar10_tl.models.network import TransferResNet

#: Warnings about deliberate choices of this project.
_WARNINGS = (
    "does not have many workers",  # a batch is one index operation
    "in eval mode at the start of training",  # a frozen backbone
    "Checkpoint directory .* exists and is not empty",  # of a resumed run
    "is smaller than the logging interval",  # nothing is logged per step
    "sync_dist=True",  # metrics are computed from all processes' logits
    "Grad strides do not match bucket view strides",  # channels_last
    "LeafSpec",  # a deprecated name in Lightning itself
)

_THREADS = torch.get_num_threads()  # by default; the previous job of a sweep may use fewer

#: Loggers of tips, advertisements and lists of the available hardware.
_VERBOSE_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.distributed",
)


def quiet_libraries() -> None:
    """Suppress Lightning's tips, Pillow's warnings about odd files, and the warnings that do not apply."""
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{pattern}")
    warnings.filterwarnings("ignore", module="PIL")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{device.type} ({found[1] if found else platform.processor()})"


def choose_precision(accelerator: str) -> tuple[str, str]:
    """Return the precision for ``trainer.precision=auto`` and the reason, for an accelerator as Lightning names it."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        name = "this CPU"
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        return "32-true", "bfloat16 is untested on this accelerator"
    if has_bf16:
        return "bf16-mixed", f"{name} supports bfloat16"
    hint = "" if name == "this CPU" else "; trainer.precision=16-mixed may be faster"
    return "32-true", f"{name} has no native bfloat16{hint}"


def choose_compile(setting: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile the network for ``compile`` (True, False or "auto") on ``device``, and the reason.

    On a CPU, compilation delays the first step by about a minute; see docs/performance.md.
    """
    if device.type == "cuda":
        needed = "Triton, a GPU that it supports, a C compiler (gcc) and Python's headers (python3-dev)"
        is_possible = bool(importlib.util.find_spec("triton")) and torch.cuda.get_device_capability(device) >= (7, 0)
        # Triton compiles a C extension when it is first used
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        is_possible = is_possible and bool(compiler) and (_python_headers() / "Python.h").is_file()
        if not os.access(Path("~").expanduser(), os.W_OK):  # Triton would fail in the first step
            os.environ.setdefault("TRITON_CACHE_DIR", f"{tempfile.gettempdir()}/triton_{os.getuid()}")
    else:
        needed = "a C++ compiler (g++)"
        is_possible = bool(shutil.which("g++") or shutil.which("clang++"))
    if setting == "auto":
        if device.type != "cuda":
            return False, "faster only on GPUs"
        return is_possible, "a GPU with Triton" if is_possible else f"needs {needed}"
    if setting and not is_possible:
        raise UserError(f"compile=true needs {needed}; use compile=false")
    return bool(setting), "as set"


def _python_headers() -> Path:
    """Return the folder of Python's headers, as Triton finds it."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # of Debian
    return Path(sysconfig.get_path("include", scheme))


def tune_for(device: torch.device, network: TransferResNet, processes: int = 1) -> None:
    """Choose the layout of the weights, TensorFloat-32 matrix products, the memory allocator and the number of threads.

    Args:
        device: Device of this process.
        network: Network that will run on it.
        processes: Number of processes of this run on this machine.
    """
    network.lay_out_for(device)
    limit_threads(processes)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_freed_memory()


def limit_threads(processes: int = 1) -> None:
    """Divide the available cores among the ``processes`` of this machine, unless ``OMP_NUM_THREADS`` is set.

    torch and Lightning ignore the CPU limit of a container, where more threads than cores slow each other down. The
    cores of a SLURM task belong to one process, but Lightning divides them by the number of processes.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        of_task = os.environ.get("SLURM_CPUS_PER_TASK") if is_started_by_srun() else None
        cores = int(of_task or available_cores() // processes)
        torch.set_num_threads(max(1, min(_THREADS, cores)))


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in this process, on Linux with glibc.

    By default, glibc returns every freed buffer of 32 MiB or more to the system, which later has to clear it again: a
    step of ResNet50 in fp32 at 128 px takes 1.7 times as long (docs/performance.md). Source: mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold, largest = ctypes.CDLL(None).mallopt, -1, -3, 2**31 - 1
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, largest)
