"""User errors, and the one line that explains an exception."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar10_tl.config import CONFIG_DIR

#: The new name of each old key or option; None if it was removed.
RENAMED: dict[str, str | None] = {
    "data.augment.flip": "data.augment.horizontal_flip",
    "data.augment.crop_padding": "data.augment.random_crop_padding",
    "data.augment.erase": "data.augment.random_erasing",
    "data.augment.jitter": "data.augment.color_jitter",
    "callbacks.history": "callbacks.metrics_logger",
    "callbacks.progress": "callbacks.progress_bar",
    "experiment/seed": "experiment=original",
    "trainer/fsdp": "trainer=ddp",
    "corrupt": None,
    "data.md5": None,
}
_LOST_PROCESS = r"Connection (closed|reset) by peer|Broken pipe|TCPStore|NCCL|gloo"
#: What errors of torch mean, by a pattern of "TypeName: message".
_MEANINGS = {
    "^OutOfMemoryError": (
        "out of device memory; reduce data.batch_size (predict: batch_size) or model.image_size, or set "
        "trainer.precision=bf16-mixed or data.on_device=false"
    ),
    r"CUDA error: (out of memory|.*busy or unavailable)|CUBLAS_STATUS_ALLOC_FAILED": (
        "the GPU cannot be used, perhaps because another process uses it (see nvidia-smi)"
    ),
    "^MemoryError|can't allocate memory|Storage size calculation overflowed|Overflow when unpacking": (
        "this machine does not have enough memory; reduce the sizes in the settings"
    ),
    "Expected more than 1 value per channel": (
        "data.batch_size is one image per device, too few for BatchNorm; choose at least 2 per device"
    ),
    "DataLoader worker .*(killed by signal|exited unexpectedly)|Too many open files": (
        "a process that decodes images has ended, probably because memory, shared memory (docker run --shm-size=8g) or "
        "open files (ulimit -n) ran out; start on fewer cores (taskset), with OMP_NUM_THREADS set to their number"
    ),
    "NVIDIA driver on your system is too old|no kernel image is available": (
        "this PyTorch does not support the GPU or the driver of this machine; install another build "
        "(https://pytorch.org/get-started/locally), or use trainer.accelerator=cpu"
    ),
    "shared memory segment": (
        "NCCL has too little shared memory; start the container with more, such as docker run --shm-size=8g"
    ),
    _LOST_PROCESS: "another process of this run has ended or cannot be reached; resume the run with resume=RUN_DIR",
}
_UNKNOWN_KEY = r"Could not override '([^']+)'\.\s+To append|Could not delete from config\. '([^']+)' does not exist"


class UserError(Exception):
    """Error that the user can fix: printed as one ``error:`` line, exit status 2, without a traceback."""


class OneProcessError(UserError):
    """UserError that other processes of the run may not have; each process prints its own."""


def known_arguments(
    function: Callable[..., Any], settings: Mapping[str, Any], group: str, taken: Collection[str] = ()
) -> Mapping[str, Any]:
    """Return the ``settings`` of a config ``group`` if all are arguments of ``function`` that are not ``taken``."""
    known = [name for name in inspect.signature(function).parameters if name not in taken]
    if unknown := [f"{group}.{name}" for name in settings if name not in known]:
        advice = f"choose from {', '.join(known)}" if known else f"{group} has none"
        raise UserError(_renamed(unknown[0]) or f"{unknown[0]}: no such setting; {advice}")
    return settings


def explain(error: BaseException, config_name: str) -> str | None:
    """Return the line that explains ``error`` to a user, or None if it is a bug."""
    text = str(error)
    if isinstance(error, (MemoryError, RuntimeError, ValueError)):
        for pattern, meaning in _MEANINGS.items():
            if re.search(pattern, f"{type(error).__name__}: {text}"):
                message = one_line(text.split("Exception raised from")[0]).replace("error: ", "")[-300:]
                return f"{meaning} ({message})" if pattern == _LOST_PROCESS else meaning
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return one_line(str(cause))
        if isinstance(cause, OSError) and not isinstance(cause, HydraException):  # some are both
            prefix = "paths.output_dir: " if _raised_by(error, "hydra", "logging") else ""
            return one_line(f"{prefix}{cause}")
        cause = cause.__cause__
    if unknown := re.search(_UNKNOWN_KEY, text):
        return _explain_unknown_key(unknown[1] or unknown[2], config_name)
    if (missing := re.search(r"Could not find '([^']+)'", text)) and (renamed := _renamed(missing[1])):
        return renamed
    if isinstance(error, OverrideParseException):
        return one_line(f"{error.override}: {text} (quote a value with special characters: 'key=\"a=b\"')")
    hydra_type_error = isinstance(error, TypeError) and _raised_by(error, "hydra")
    if hydra_type_error or "Config group override must be a string" in text:
        return "a config group takes a name, such as logger=none or callbacks=minimal; --help lists them"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return one_line(f"{text} {error.__cause__ or ''}")
    refused = isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OverflowError))
    if refused and _raised_by(error, "hydra", "logging", "lightning"):
        return one_line(f"{text} (HYDRA_FULL_ERROR=1 shows where)")
    return one_line(text) if type(error).__name__ == "MisconfigurationException" else None


def is_connection_loss(error: BaseException) -> bool:
    """Return whether ``error`` says that another process of the job cannot be reached."""
    return isinstance(error, RuntimeError) and bool(re.search(_LOST_PROCESS, str(error)))


def is_of_one_process(error: BaseException) -> bool:
    """Return whether ``error`` is one that other processes of the job may not have."""
    pattern = "MemoryError|allocate memory|DataLoader worker|Too many open files"
    return isinstance(error, OneProcessError) or bool(re.search(pattern, f"{type(error).__name__}: {error}"))


def _raised_by(error: BaseException, *libraries: str) -> bool:
    """Return whether a library raised ``error``: Hydra and Lightning raise plain ValueErrors for invalid settings."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1].split(".")[0] in ("os", "pathlib"):  # pathlib._local in Python 3.13
        modules.pop()
    return bool(modules) and modules[-1].split(".")[0] in libraries


def one_line(text: str) -> str:
    """Return ``text`` on one line, without Hydra's list of its search path."""
    return " ".join(text.split("Config search path:")[0].split())


def _renamed(key: str) -> str | None:
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            advice = f"renamed: use {new}{key[len(old) :]}" if new else "removed: leave it out"
            return f"{key.replace('/', '=')} was {advice}"
    return None


def _explain_unknown_key(key: str, config_name: str) -> str:
    if renamed := _renamed(key):
        return renamed
    known = config_keys(config_name)
    section, _, name = key.rpartition(".")
    if key.startswith("search.") and f"{section}.low" not in known:
        remove = f"'~{key}' " * (key in known)
        return f"{key}: add it with {remove}'+{key}={{choices: [a, b]}}' or a range (docs/search.md)"
    if key in known:
        return f"{key}: the chosen groups have no such setting (data=, model/head=, scheduler= ...)"
    similar = difflib.get_close_matches(key, known, n=1, cutoff=0.8) or [k for k in known if k.endswith(f".{name}")]
    if similar:
        return f"{key}: no such setting; did you mean {' or '.join(similar)}? --cfg job shows all settings"
    siblings = [k for k in known if section and k.rpartition(".")[0] == section]
    return f"{key}: no such setting; choose from {', '.join(siblings) or 'those of --cfg job'}"


def config_keys(config_name: str) -> list[str]:
    """Return every key of a command's default config, such as ``trainer`` and ``trainer.max_epochs``."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return [key for key, _ in walk(OmegaConf.to_container(compose(config_name)))]


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every node below ``node``."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield f"{prefix}{key}", child
        yield from walk(child, f"{prefix}{key}.")
