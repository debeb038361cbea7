"""Weights that a network starts from: of torchvision, of a file, or of another run."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import CLASSIFIER_LAYERS, PUBLISHED, Backbone
from cifar10_tl.models.network import TransferResNet

log = logging.getLogger(__name__)


def published_weights(backbone: str) -> dict[str, WeightsEnum]:
    """Return torchvision's weights of a backbone by name, without DEFAULT, which changes between releases."""
    return {entry.name: entry for entry in get_model_weights(backbone)} if backbone in PUBLISHED else {}


def check_weights(backbone: str, weights: str | None) -> None:
    """Check that ``weights`` is a name in torchvision, a file, or None for random weights."""
    if weights is not None and weights not in (names := published_weights(backbone)) and not Path(weights).is_file():
        raise UserError(f"model.weights={weights}: choose {', '.join((*names, 'a file'))} or null (random weights)")


def read_weights(backbone: str, weights: str) -> Mapping[str, Tensor]:
    """Return the state dict of torchvision's weights, which are downloaded once, or of a file."""
    check_weights(backbone, weights)
    entry = published_weights(backbone).get(weights)
    if entry is None:
        return state_dict_of(load_safely(Path(weights)), f"model.weights={weights}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    expected = file.stem.rsplit("-", 1)[-1]
    if file.is_file() and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(expected):
        raise UserError(f"{file} is not the file that torchvision published: delete it and start again")
    try:
        return entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or torch.hub found an incorrect checksum
        raise UserError(
            f"cannot download {entry.url} ({error}): download it on another machine and save it as "
            f"{file} (TORCH_HOME=DIR selects another folder), or start from random weights with model.weights=null"
        ) from error


def load_backbone(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the state dict of a backbone or a whole ResNet; ``origin`` names it in messages."""
    try:
        backbone.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] not in CLASSIFIER_LAYERS})
    except RuntimeError as error:
        if "conv1.0.weight" in state:
            raise UserError(
                f"{origin}: its stem has several convolutions, like timm's resnet50d; choose weights of a ResNet "
                "with a single one, such as timm's resnet50"
            ) from error
        if "network.backbone.conv1.weight" in state:
            raise UserError(f"{origin} is a checkpoint of this project; start from it with init_from=FILE") from error
        raise UserError(f"{origin} does not fit this backbone: {shorten(str(error), 400)}") from error


def load_network(network: TransferResNet, class_names: Sequence[str], checkpoint: Path) -> None:
    """Load the weights of another run's checkpoint, those of the head only for the same classes and layers."""
    content, origin = load_safely(checkpoint), f"init_from={checkpoint}"
    tensors = state_dict_of(content, origin)
    backbone, head = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in ("network.backbone.", "network.head.")
    )
    if not backbone:
        raise UserError(f"{origin} is not a checkpoint of this project; use model.weights=FILE for a ResNet's weights")
    load_backbone(network.backbone, backbone, origin)
    own_shapes = {key: value.shape for key, value in network.head.state_dict().items()}
    if content.get("hyper_parameters", {}).get("class_names") != class_names:
        log.warning("%s: loaded the backbone only, because its classes differ", origin)
    elif {key: value.shape for key, value in head.items()} != own_shapes:
        log.warning("%s: loaded the backbone only, because its head has other layers", origin)
    else:
        network.head.load_state_dict(head)
        log.info("%s: loaded backbone and head", origin)


def state_dict_of(content: Any, origin: str) -> Mapping[str, Tensor]:
    """Return the state dict in the content of a file."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{origin} does not contain a state dict")
    tensors = {str(k).removeprefix("module."): v for k, v in content.items()}
    for prefix in ("model.", "attacker.model."):  # of https://github.com/MadryLab/robustness, beside other modules
        if own := {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}:
            return own
    return tensors


def load_safely(path: Path) -> Any:
    """Load a PyTorch or ``.safetensors`` file on the CPU, without running code from the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not verify checksums
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f"incorrect checksum of {broken}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # broken files raise many types of errors
        text = str(error).strip() or type(error).__name__
        reason = text.splitlines()[0].split(". ")[0]  # torch appends advice
        if code := re.search(r"Unsupported global: GLOBAL (\S+)", text):
            call = f"torch.save(torch.load({str(path)!r}, weights_only=False)['model'], 'weights.pth')"
            reason = f"{code[1]}. If you trust its source, extract the state dict, for example with {call}"
        raise UserError(f"{path} is damaged, not a checkpoint, or would execute code: {reason}") from error
