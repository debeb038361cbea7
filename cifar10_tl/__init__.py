"""Fine-tune an ImageNet ResNet on CIFAR-10 with PyTorch Lightning and Hydra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: Imported on first access (PEP 562), so that ``--help`` does not import torch.
_LAZY = {
    "CIFAR10DataModule": "cifar10_tl.data.datamodule",
    "LitClassifier": "cifar10_tl.models.lit_classifier",
    "TransferResNet": "cifar10_tl.models.network",
    "load_classifier": "cifar10_tl.inference",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
