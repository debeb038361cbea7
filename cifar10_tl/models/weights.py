"""Pretrained weights, from torchvision or a file."""

from __future__ import annotations

import hashlib
import pickle
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import _LEFT_OUT, Backbone

# the same for all of torchvision's ResNet weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalisation(name: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and standard deviations, in [0, 1], that the weights were trained with.

    Files do not contain them, so files and random weights use those of ImageNet.
    """
    if is_published(name, weights):
        transforms = _published(name, weights).transforms()
        return tuple(transforms.mean), tuple(transforms.std)
    return IMAGENET_MEAN, IMAGENET_STD


def is_published(name: str, weights: str | None) -> bool:
    """Return whether ``weights`` is a name in torchvision, not a file or None."""
    # DEFAULT changes between releases
    return weights in get_model_weights(name).__members__ and weights != "DEFAULT"


def _published(name: str, weights: str | None) -> WeightsEnum:
    return get_model_weights(name)[str(weights)]


def check_weights(name: str, weights: str | None) -> None:
    """Check that ``weights`` can be loaded.

    Raises:
        UserError: ``weights`` is neither a name in torchvision nor a file.
    """
    if weights is None or is_published(name, weights) or Path(weights).is_file():
        return
    names = ", ".join(w for w in get_model_weights(name).__members__ if w != "DEFAULT")
    raise UserError(f"model.weights={weights}: neither a file nor one of {names}; null starts from random weights")


def fetch_weights(name: str, weights: str | None) -> None:
    """Download weights to the cache of torchvision; call it once per machine.

    Raises:
        UserError: The download failed, or the file has an incorrect checksum.
    """
    if is_published(name, weights):
        _published_state(name, weights)


def load_weights(backbone: Backbone, name: str, weights: str | None) -> None:
    """Load torchvision's weights or a file into ``backbone``; None keeps its weights.

    Raises:
        UserError: The weights cannot be downloaded or read, or do not fit the backbone.
    """
    if weights is None:
        return
    state = _published_state(name, weights) if is_published(name, weights) else read_state_dict(Path(weights))
    load_backbone_state(backbone, state, str(weights))


def _published_state(name: str, weights: str | None) -> Mapping[str, Tensor]:
    entry = _published(name, weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if file.is_file():
        _check_digest(file)
    try:
        state: Mapping[str, Tensor] = entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except OSError as error:  # includes URLError, HTTPError and timeouts
        raise UserError(
            f"cannot download {entry.url} ({error}): bring that file from a machine with a network and put it at "
            f"{file}, or start from random weights with model.weights=null"
        ) from error
    except RuntimeError as error:  # raised by torch.hub for an incorrect checksum
        raise UserError(f"{entry.url} gave another file than torchvision published: {error}") from error
    return state


def _check_digest(file: Path) -> None:
    """Verify a cached file, because torch.hub only verifies downloads."""
    expected = file.stem.rsplit("-", 1)[-1]
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(expected):
        raise UserError(f"{file} is not the file that torchvision published: delete it and start again")


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or PyTorch file without running code from the file.

    Raises:
        UserError: The file is broken or does not contain a state dict.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path} is broken or not a safetensors file: {error}") from error
    return state_dict_of(load_safely(path), path)


def state_dict_of(content: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in the content of a PyTorch file.

    Raises:
        UserError: There is none.
    """
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} does not contain a state dict")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def load_backbone_state(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the state dict of a backbone or a whole ResNet into ``backbone``.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape.
    """
    own = backbone.state_dict()
    given = {k: v for k, v in state.items() if k.split(".")[0] not in _LEFT_OUT}
    faults = {
        "missing": [k for k in own if k not in given and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in given if k not in own],
        "of another shape": [
            f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
            for k, v in given.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    if found := [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys]:
        raise UserError(f"{origin} does not fit this backbone; {'; '.join(found)}")
    backbone.load_state_dict(given, strict=False)  # files older than 2018 lack num_batches_tracked


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def load_safely(path: Path) -> Any:
    """Load the tensors and plain values of a PyTorch file on the CPU, without running code from the file.

    Raises:
        UserError: The file is missing, broken or of another kind, or it refers to code.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not verify checksums
            with zipfile.ZipFile(path) as archive:
                if spoiled := archive.testzip():
                    raise UserError(f"{path} is broken: the checksum of {spoiled} in it is another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read safely: it is broken, of another kind, or names code to be run"
        ) from error
    except Exception as error:  # truncated files raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]  # torch appends advice
        raise UserError(f"{path} is broken or of another kind: {reason}") from error
