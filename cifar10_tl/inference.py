"""Classify images with a trained model.

    from cifar10_tl import load_classifier
    classify = load_classifier("best.ckpt")
    for prediction in classify(["cat.jpg", "dog.png"]):
        print(prediction.path, prediction.label, prediction.probability)

The file is a checkpoint or an exported ``.onnx`` model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.images import BadImageError, decode_image, to_pixels

#: Path of a file, Pillow image, or array accepted by ``PIL.Image.fromarray``, such as uint8 [H, W, 3].
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"


#: Input of the network for one image, uint8 [3, S, S].
Pixels: TypeAlias = NDArray[np.uint8]


#: Function from images, uint8 [N, 3, S, S], to logits, float32 [N, K].
Network: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image, or the error if it could not be read.

    Attributes:
        path: Path of the file as passed by the caller; None for an image in memory.
        label: Most probable class; None on error.
        probability: Probability of ``label`` in [0, 1]; None on error.
        probabilities: Probability of each class by name, in the order of the classes; empty on error.
        error: Why the file could not be read, on one line; None on success.
    """

    path: str | None
    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict, repr=False)
    error: str | None = None

    @classmethod
    def of(cls, path: str | None, probabilities: Mapping[str, float]) -> Prediction:
        """Create a prediction of the most probable class, the first one on ties."""
        label = max(probabilities, key=probabilities.__getitem__)
        return cls(path, label, probabilities[label], probabilities)

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the ``k`` most probable classes and their probabilities, in descending order."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:k]


class Classifier:
    """Classifier of images of any mode and size, as returned by :func:`load_classifier`.

    Attributes:
        class_names: Names of the K classes, in the order of the logits.
        native_size: Height and width S in pixels to which :func:`~cifar10_tl.data.images.to_pixels` resizes images.
    """

    def __init__(self, network: Network, class_names: Iterable[str], native_size: int) -> None:
        self._network, self.class_names, self.native_size = network, tuple(class_names), native_size

    def __call__(self, images: Picture | Iterable[Picture], batch_size: int = 256) -> list[Prediction]:
        """Return the predictions for one or more images, in order; unreadable files have ``error`` set.

        Raises:
            TypeError: An item of ``images`` is neither a path, nor a Pillow image, nor an array of pixels.
        """
        return [prediction for prediction, _ in self.stream(_several(images), batch_size)]

    def stream(self, images: Iterable[Picture], batch_size: int = 256) -> Iterator[tuple[Prediction, Pixels | None]]:
        """Yield each prediction with its input pixels, keeping at most ``batch_size`` images in memory."""
        waiting = iter(images)
        while batch := list(islice(waiting, batch_size)):
            yield from self._classify_batch(batch)

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return probabilities [N, K] for images, uint8 [N, 3, S, S]."""
        logits = self._network(pixels).astype(np.float64)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
        return shares

    def _classify_batch(self, batch: list[Picture]) -> Iterator[tuple[Prediction, Pixels | None]]:
        read = [self._read(image) for image in batch]
        good = [pixels for pixels in read if not isinstance(pixels, BadImageError)]
        rows = iter(self.probabilities(np.stack(good)).tolist() if good else ())
        for image, pixels in zip(batch, read, strict=True):
            path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
            if isinstance(pixels, BadImageError):
                yield Prediction(path, error=str(pixels)), None
            else:
                yield Prediction.of(path, dict(zip(self.class_names, next(rows), strict=True))), pixels

    def _read(self, image: Picture) -> Pixels | BadImageError:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return to_pixels(image, self.native_size)
        try:
            return decode_image(os.fspath(image), self.native_size)
        except BadImageError as error:
            return error


def _several(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """Wrap a single image in a list."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return images


def load_classifier(path: str | os.PathLike[str], device: str = "auto") -> Classifier:
    """Load a classifier from a checkpoint or an exported model, without executing code from the file.

    On Linux CPUs, :func:`~cifar10_tl.engine.hardware.keep_freed_memory` speeds up large networks; it affects the whole
    process.

    Args:
        path: Path of a checkpoint, or of an ``.onnx`` file, which requires ``onnxruntime``.
        device: "cpu", "cuda", "mps", or "auto" for the fastest available device.

    Raises:
        UserError: The file is missing or invalid, or the device or ONNX Runtime is not available.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return _from_onnx(path, device)
    return _from_checkpoint(path, device)


def _from_checkpoint(path: Path, device: str) -> Classifier:
    from cifar10_tl.engine.checkpoints import restore  # importing Lightning takes seconds, and ONNX does not need it

    module = restore(path)
    try:
        place = torch.device(_fastest_device() if device == "auto" else device)
        module.to(place)
        module.network.lay_out_for(place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def network(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = module(torch.from_numpy(images).to(place)).cpu().numpy()
        return logits

    return Classifier(network, module.class_names, module.hparams["native_size"])


def _fastest_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _from_onnx(path: Path, device: str) -> Classifier:
    session = _onnx_session(path, device)
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        class_names, native_size = json.loads(metadata["class_names"]), int(metadata["native_size"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} was not exported by this project: its metadata has no class_names and native_size"
        ) from error

    def network(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return logits

    return Classifier(network, class_names, native_size)


def _onnx_session(path: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: ONNX Runtime is needed to run it: pip install onnxruntime") from error
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    has_gpu = gpu in onnxruntime.get_available_providers()
    if device not in ("auto", "cpu") and not (device == "cuda" and has_gpu):
        raise UserError(
            f"device={device}: this ONNX Runtime has no such device; device=cpu, or onnxruntime-gpu for cuda"
        )
    try:
        return onnxruntime.InferenceSession(path, providers=[gpu, cpu] if has_gpu and device != "cpu" else [cpu])
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        raise UserError(f"{path} is broken or of another kind: {str(error).splitlines()[0]}") from error
