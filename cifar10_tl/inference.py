"""A trained network as a function from pictures to labels.

    from cifar10_tl import load_classifier
    classify = load_classifier("best.ckpt")
    for prediction in classify(["cat.jpg", "dog.png"]):
        print(prediction.path, prediction.label, prediction.probability)

The file is a checkpoint of a run, or a ``.onnx`` model exported from one, which ONNX Runtime then runs.
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

#: A file's path, a picture of Pillow's, or an array as ``PIL.Image.fromarray`` takes it, such as uint8 [H, W, 3].
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"


#: uint8 [3, S, S]: a picture as the network is given it.
Pixels: TypeAlias = NDArray[np.uint8]


#: From uint8 [N, 3, S, S] to logits float32 [N, K].
Network: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture, or why it could not be read.

    Attributes:
        path: the file as it was named; None for a picture that came from memory.
        label: the most probable class; None where there is an error.
        probability: of ``label``, in [0, 1]; None where there is an error.
        probabilities: of each class by name, in the order of the classes; empty where there is an error.
        error: why the file could not be read, in a line; None where it was.
    """

    path: str | None
    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict, repr=False)
    error: str | None = None

    @classmethod
    def of(cls, path: str | None, probabilities: Mapping[str, float]) -> Prediction:
        """For the most probable class, the first of them where several are."""
        label = max(probabilities, key=probabilities.__getitem__)
        return cls(path, label, probabilities[label], probabilities)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable classes and their probabilities, the most probable first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:k]


class Classifier:
    """Labels pictures of any kind and size, brought to the network's size as its training pictures were.

    Made by :func:`load_classifier`.

    Attributes:
        class_names: of the K classes, in the order of the logits.
        native_size: S, the side in pixels that pictures are brought to, see
            :func:`cifar10_tl.data.sources.to_pixels`.
    """

    def __init__(self, network: Network, class_names: Iterable[str], native_size: int) -> None:
        self._network, self.class_names, self.native_size = network, tuple(class_names), native_size

    def __call__(self, images: Picture | Iterable[Picture], batch_size: int = 256) -> list[Prediction]:
        """The predictions for pictures, or for a single one, in their order; a file that is no picture has an error.

        Raises:
            TypeError: something in ``images`` is neither a path, nor a picture, nor an array that is one.
        """
        return [prediction for prediction, _ in self.stream(_several(images), batch_size)]

    def stream(self, images: Iterable[Picture], batch_size: int = 256) -> Iterator[tuple[Prediction, Pixels | None]]:
        """Each prediction, and the pixels that it was made from; no more than ``batch_size`` pictures are in memory."""
        waiting = iter(images)
        while batch := list(islice(waiting, batch_size)):
            yield from self._classify_batch(batch)

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities [N, K], whose rows sum to one, for uint8 [N, 3, S, S]."""
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
    """One picture as a list: a text or an array can be iterated over too, but not to any good."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return images


def load_classifier(path: str | os.PathLike[str], device: str = "auto") -> Classifier:
    """The classifier in a checkpoint (``best.ckpt``) or in an exported model (``model.onnx``), from that file alone.

    No code that the file names is run. On a CPU under Linux,
    :func:`~cifar10_tl.memory.keep_freed_memory`, which changes the whole process, makes large networks faster.

    Args:
        path: of the file; one whose name ends in ``.onnx`` is run by ONNX Runtime (``pip install onnxruntime``).
        device: "cpu", "cuda", "mps" or "auto": the fastest that is there.

    Raises:
        UserError: the file is missing, broken or of another kind; or the device, or ONNX Runtime, is not there.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return _from_onnx(path, device)
    return _from_checkpoint(path, device)


def _from_checkpoint(path: Path, device: str) -> Classifier:
    from cifar10_tl.engine.checkpoints import restore  # Lightning takes seconds to import, and ONNX does without

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
    except Exception as error:  # ONNX Runtime has an error class for each reason, and no base class for them
        raise UserError(f"{path} is broken or of another kind: {str(error).splitlines()[0]}") from error
