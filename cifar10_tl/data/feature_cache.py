"""Cache of the features of a frozen backbone, one memory-mapped safetensors file per split and view."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cifar10_tl.config.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 128  # images per call of the backbone
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Processes:
    """Processes of one machine that fill a cache together.

    Attributes:
        rank: Rank of this process on the machine.
        count: Number of processes on the machine.
        wait: Barrier of all processes.
        broadcast: Return the argument of the first process.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], Any] = lambda: None
    broadcast: Callable[[str], str] = lambda text: text


class FeatureCache:
    """Cache that computes the features of images once and reads them from disk afterwards.

    Args:
        folder: Folder of the cache files.
        extract: Function from uint8 images [n, 3, H, W] to features [n, ...] on the CPU.
        describe: Function that returns everything ``extract`` depends on, as plain values.
        processes: Processes that share the work.
    """

    def __init__(
        self,
        folder: Path,
        extract: Callable[[Tensor], Tensor],
        describe: Callable[[], Mapping[str, Any]],
        processes: Processes | None = None,
    ) -> None:
        self.folder, self.extract, self.describe = folder, extract, describe
        self.processes = processes or Processes()

    def views(self, name: str, images: Tensor, *, mirrored: bool) -> list[Tensor]:
        """Return the memory-mapped features [N, ...] of ``images`` and, if ``mirrored``, of their mirror images.

        Raises:
            UserError: If the disk has too little free space.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sample = self.extract(images[:1])
        shape = [len(images), *sample.shape[1:]]
        description = {**self.describe(), "images": _checksum([images]), "shape": shape, "dtype": str(sample.dtype)}
        views = ("plain", "mirrored") if mirrored else ("plain",)
        paths = [self._path({**description, "view": view}) for view in views]
        num_bytes = math.prod(shape) * sample.element_size()
        self._check_space(name, num_bytes * sum(not _is_valid(path) for path in paths))
        for view, path in zip(views, paths, strict=True):
            self._fill(path, f"{name} ({view})", images, view == "mirrored", _header(shape, sample.dtype, num_bytes))
        return [_read(path) for path in paths]

    def _path(self, description: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / f"{key}.safetensors"

    def _check_space(self, name: str, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"data.cache_features=true: the features of {name} need {needed / 1e9:.2f} GB, but {self.folder} has "
                f"{free / 1e9:.2f} GB free; free some space, choose another paths.cache_dir, or lower "
                "data.image_limit or model.image_size"
            )

    def _fill(self, path: Path, title: str, images: Tensor, mirrored: bool, header: bytes) -> None:
        """Write the features to a temporary file, each process every ``count``-th chunk, and rename it."""
        # The first process alone decides whether to compute, so that all processes meet at the same barriers.
        run = self.processes.broadcast(uuid.uuid4().hex)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{run}.tmp")
        first = self.processes.rank == 0
        try:
            if first and not _is_valid(path):
                temporary.write_bytes(header)
            self.processes.wait()
            if temporary.exists():
                self._compute(temporary, title, images, mirrored, len(header))
            self.processes.wait()
            if first and temporary.exists():
                os.replace(temporary, path)
            self.processes.wait()
        finally:
            if first:
                temporary.unlink(missing_ok=True)

    def _compute(self, path: Path, title: str, images: Tensor, mirrored: bool, offset: int) -> None:
        starts = range(self.processes.rank * CHUNK, len(images), self.processes.count * CHUNK)
        hidden = None if self.processes.rank == 0 else True  # None: hidden unless stderr is a terminal
        with path.open("r+b") as file:
            for start in tqdm(starts, desc=f"features of {title}", unit=" batches", disable=hidden):
                chunk = images[start : start + CHUNK]
                data = _bytes(self.extract(chunk.flip(-1) if mirrored else chunk))
                file.seek(offset + start * (len(data) // len(chunk)))
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        log.info("computed the features of %s: %d images", title, len(images))


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the names, shapes, types and values of a state dict."""
    names = json.dumps([(name, list(t.shape), str(t.dtype)) for name, t in tensors.items()])
    return _checksum(tensors.values(), names)


def _header(shape: list[int], dtype: torch.dtype, num_bytes: int) -> bytes:
    """Return the header of a safetensors file, written by hand because the library writes whole tensors only."""
    entry = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [0, num_bytes]}
    text = json.dumps({"features": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features")


def _is_valid(path: Path) -> bool:
    try:
        return path.is_file() and _read(path) is not None
    except SafetensorError:
        log.warning("%s is damaged; computing the features again", path)
        return False


def _checksum(tensors: Iterable[Tensor], names: str = "") -> str:
    digest = hashlib.sha256(names.encode())
    for tensor in tensors:
        digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
