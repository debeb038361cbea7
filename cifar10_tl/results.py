"""What runs and evaluations leave for programs to read, and where a result came from."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cifar10_tl import __version__
from cifar10_tl.config import PACKAGE_DIR
from cifar10_tl.evaluation import Evaluation
from cifar10_tl.files import atomic_write_text
from cifar10_tl.tables import csv_text


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as standard JSON: what is no finite number becomes null."""
    atomic_write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Write a row an image: its index, true and predicted label, the probability of that, and one column a class."""
    names = evaluation.class_names
    columns = (evaluation.indices, evaluation.labels, evaluation.predictions, evaluation.probabilities)
    rows = (
        [index, names[true], names[predicted], f"{row[predicted]:.6g}", *(f"{p:.6g}" for p in row)]
        for index, true, predicted, row in zip(*(column.tolist() for column in columns), strict=True)
    )
    atomic_write_text(path, csv_text(["index", "true_label", "predicted_label", "probability", *names], rows))


def environment(device: torch.device, num_devices: int, precision: str) -> dict[str, Any]:
    """Versions, hardware and commit that a result came from."""
    packages = ("torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
    return {
        "versions": {
            "cifar10_tl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{p: version(p) for p in packages},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(device),
        "devices": num_devices,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git": _git_commit(),
    }


def _processor(device: torch.device) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().split("model name")[1:2] if cpuinfo.is_file() else []
    name = names[0].split("\n")[0].lstrip("\t :") if names else platform.processor()
    return f"{device.type} ({name})"


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from, with "-dirty" where files differ; None outside of one."""
    if not (PACKAGE_DIR.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            cwd=PACKAGE_DIR.parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float | int]:
    """A nested config as one level of dotted names, of values that TensorBoard's HPARAMS takes."""
    found: dict[str, bool | str | float | int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else str(value)
    return found
