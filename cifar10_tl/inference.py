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
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.images import BadImageError, decode_image, in_threads, to_pixels

#: Path of a file, Pillow image, or array accepted by ``PIL.Image.fromarray``, such as uint8 [H, W, 3].
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"

#: Input of the network for one image, uint8 [3, S, S].
Pixels: TypeAlias = NDArray[np.uint8]


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

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the ``k`` most probable classes and their probabilities, in descending order."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:k]


class Classifier:
    """Classifier of images of any mode and size, as returned by :func:`load_classifier`.

    Attributes:
        class_names: Names of the K classes, in the order of the logits.
        native_size: Height and width S in pixels to which :func:`~cifar10_tl.data.images.to_pixels` resizes images.
        fit: How images are made square: "crop", "pad" or "squeeze", as in training.
    """

    def __init__(
        self, network: Callable[[Pixels], NDArray[Any]], class_names: Iterable[str], native_size: int, fit: str
    ) -> None:
        self._network, self.class_names, self.native_size, self.fit = network, tuple(class_names), native_size, fit

    def __call__(self, images: Picture | Iterable[Picture], batch_size: int = 256) -> list[Prediction]:
        """Return the predictions for one or more images, in order; unreadable files have ``error`` set."""
        is_one_array = isinstance(images, np.ndarray) and images.ndim < 4
        is_one = is_one_array or isinstance(images, (str, os.PathLike, Image.Image))
        several: Any = [images] if is_one else images
        return [prediction for prediction, _ in self.stream(several, batch_size)]

    def stream(
        self, images: Iterable[Picture], batch_size: int = 256
    ) -> Generator[tuple[Prediction, Pixels | None], None, None]:
        """Yield each prediction with its input pixels.

        Files are decoded on all cores while the network computes, at most ``batch_size`` of them ahead of it.
        """
        with closing(in_threads(self._decode, map(self._prepare, images), batch_size)) as decoded:
            while batch := list(islice(decoded, batch_size)):
                readable = [pixels for _, pixels in batch if not isinstance(pixels, BadImageError)]
                rows = iter(self.probabilities(np.stack(readable)).tolist() if readable else ())
                for path, pixels in batch:
                    if isinstance(pixels, BadImageError):
                        yield Prediction(path, error=str(pixels)), None
                    else:
                        probabilities = dict(zip(self.class_names, next(rows), strict=True))
                        label = max(probabilities, key=probabilities.__getitem__)
                        yield Prediction(path, label, probabilities[label], probabilities), pixels

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return probabilities [N, K] for images, uint8 [N, 3, S, S]."""
        return torch.from_numpy(self._network(pixels)).double().softmax(1).numpy()

    def _prepare(self, image: Picture) -> str | Pixels:
        """Return the path of a file, or the pixels of an image that the caller may change or close next."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return to_pixels(image, self.native_size, self.fit)
        return os.fspath(image)

    def _decode(self, image: str | Pixels) -> tuple[str | None, Pixels | BadImageError]:
        if not isinstance(image, str):
            return None, image
        try:
            return image, decode_image(image, self.native_size, self.fit)
        except BadImageError as error:
            return image, error


def load_classifier(path: str | os.PathLike[str], device: str = "auto") -> Classifier:
    """Load a classifier from a checkpoint or an exported model, without executing code from the file.

    A file, device or library that cannot be used raises :class:`~cifar10_tl.config.errors.UserError`.

    Args:
        path: Path of a checkpoint, or of an ``.onnx`` file, which requires ``onnxruntime``.
        device: "cpu", "cuda", "mps", or "auto" for the fastest available device.
    """
    path = Path(path)
    return _from_onnx(path, device) if path.suffix.lower() == ".onnx" else _from_checkpoint(path, device)


def _from_checkpoint(path: Path, device: str) -> Classifier:
    from cifar10_tl.engine.checkpoints import restore  # importing Lightning takes seconds, and ONNX does not need it

    module = restore(path)
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        target = torch.device(fastest if device == "auto" else device)
        module.to(target).network.lay_out_for(target)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def network(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return module(torch.from_numpy(images).to(target)).cpu().numpy()

    return Classifier(network, module.class_names, module.hparams["native_size"], module.hparams["fit"])


def _from_onnx(path: Path, device: str) -> Classifier:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: ONNX Runtime is needed to run it: pip install onnxruntime") from error
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    wanted = {"auto": [gpu, cpu], "cuda": [gpu], "cpu": [cpu]}.get(device, [])
    providers = [provider for provider in wanted if provider in onnxruntime.get_available_providers()]
    if not providers:
        raise UserError(f"device={device}: this ONNX Runtime has no such device; use device=cpu or install another one")
    try:
        session = onnxruntime.InferenceSession(path, providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map
        class_names, native_size = json.loads(metadata["class_names"]), int(metadata["native_size"])
        fit = metadata.get("fit", "squeeze")  # as models without it were trained
    except KeyError as error:
        raise UserError(f"{path} was not exported by this project: its metadata has no {error}") from error
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        raise UserError(f"{path} is missing, damaged or not an ONNX model: {str(error).splitlines()[0]}") from error

    def network(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return session.run(["logits"], {"images": images})[0]

    return Classifier(network, class_names, native_size, fit)
