"""Features of a frozen backbone, computed once for each image and kept in memory-mapped files.

A frozen backbone in eval mode gives an image the same features in every epoch: only the first needs to compute them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.io import atomic_write_text

log = logging.getLogger(__name__)


CHUNK = 128  # images that are computed, checked and, if need be, mended together


VIEWS = ("plain", "mirrored")


@dataclass(frozen=True)
class Processes:
    """The processes of this machine that build a cache together, each every ``count``-th chunk from ``rank`` on.

    Attributes:
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], Any] = lambda: None


class FeatureCache:
    """Gives the features of images: from its files as far as they are there, and whole; the rest is computed now.

    A file holds the features of one list of images in one view, in order, raw, as the network gave them. Its name is a
    checksum of all that they depend on, told in the ``.json`` beside it. The journal beside it holds a checksum of each
    chunk: what a killed process left half done, or a disk has spoiled, is found out and computed anew. Any number of
    processes may work on a file at once; what two of them write to the same place is the same.

    Args:
        folder: for the files; it may be deleted whenever no run uses it.
        extract: uint8 [n, 3, H, W] -> features [n, ...] on the CPU.
        describe: what ``extract`` depends on, plain values; called when the first features are wanted.
        processes: that share the work.
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
        """The features of ``images`` (uint8 [N, 3, H, W]), and where wanted those of their mirror images.

        Args:
            name: of the images, for the log.
            images: whose features are wanted.
            mirrored: whether those of their mirror images are, too.

        Returns:
            One or two tensors [N, ...], mapped from their files: only what is used is read.

        Raises:
            UserError: the disk has no room for them.
        """
        one = self.extract(images[:1])
        description = {**self.describe(), "images": _checksum([images])}
        files = [
            _FeatureFile(self.folder, {**description, "view": view}, len(images), one) for view in VIEWS[: 1 + mirrored]
        ]
        self._check_room(name, files)
        for view, file in zip(VIEWS, files, strict=False):
            title = name if view == "plain" else f"{name}, mirrored"
            self._complete(file, title, images if view == "plain" else images.flip(-1))
        self.processes.wait()
        return [file.read() for file in files]

    def _check_room(self, name: str, files: Sequence[_FeatureFile]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(file.num_bytes - file.bytes_on_disk() for file in files)
        free = shutil.disk_usage(self.folder).free
        if needed > 0:
            log.info("features of %s: %.3f GB for %s, %.0f GB free", name, needed / 1e9, self.folder, free / 1e9)
        if needed > free:
            raise UserError(
                f"data.cache_features: the features of {name} need {needed / 1e9:.2f} GB, and {self.folder} has "
                f"{free / 1e9:.2f} GB free; free some, choose another paths.cache_dir, or lower data.image_limit or "
                "model.image_size"
            )
        self.processes.wait()  # until all have looked: what the others write counts as room taken

    def _complete(self, file: _FeatureFile, title: str, images: Tensor) -> None:
        file.create()
        own = range(self.processes.rank, file.num_chunks, self.processes.count)
        missing = [chunk for chunk in own if not file.is_whole(chunk)]
        if not missing:
            log.info("features of %s: found", title)
            return
        if len(missing) < len(own):
            log.info("features of %s: %d of %d chunks are there already", title, len(own) - len(missing), len(own))
        num_images = sum(len(images[file.places(chunk)]) for chunk in missing)
        start = time.perf_counter()
        hidden = None if self.processes.rank == 0 else True  # None: where stderr is no terminal
        with tqdm(total=num_images, desc=f"features of {title}", unit=" images", disable=hidden) as bar:
            for chunk in missing:
                features = self.extract(images[file.places(chunk)])
                file.write(chunk, features)
                bar.update(len(features))
        speed = num_images * self.processes.count / (time.perf_counter() - start)
        log.info("features of %s: %d images, %.0f images/s", title, len(images), speed)


class _FeatureFile:
    """The features of ``num_images`` images, and the journal of its chunks.

    Args:
        folder: to lie in.
        description: of what is in it.
        num_images: N.
        one: features of one image [1, ...]: shape and type.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], num_images: int, one: Tensor) -> None:
        self.shape, self.dtype = (num_images, *one.shape[1:]), one.dtype
        self.description = {**description, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}
        text = json.dumps(self.description, sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.bin"
        self.journal = self.path.with_suffix(".journal")
        self.num_chunks = math.ceil(num_images / CHUNK)
        self.num_bytes = math.prod(self.shape) * one.element_size()
        self._bytes_an_image = self.num_bytes // num_images

    def bytes_on_disk(self) -> int:
        """What the file takes of the disk already: it is laid out in its whole length, but filled bit by bit."""
        try:
            return min(self.path.stat().st_blocks * 512, self.num_bytes)
        except FileNotFoundError:
            return 0

    def create(self) -> None:
        """Lay out what is not there, or has another length."""
        for path, length in ((self.path, self.num_bytes), (self.journal, 8 * self.num_chunks)):
            with path.open("ab") as file:
                if os.fstat(file.fileno()).st_size != length:
                    file.truncate(length)
        atomic_write_text(self.path.with_suffix(".json"), json.dumps(self.description, indent=1))

    def places(self, chunk: int) -> slice:
        """The images of a chunk."""
        return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.shape[0]))

    def is_whole(self, chunk: int) -> bool:
        """Whether the chunk is what was once written there."""
        with self.journal.open("rb") as file:
            file.seek(8 * chunk)
            entry = int.from_bytes(file.read(8), "little")
        if not entry:
            return False
        part = self.places(chunk)
        with self.path.open("rb") as file:
            file.seek(part.start * self._bytes_an_image)
            data = file.read((part.stop - part.start) * self._bytes_an_image)
        return entry == _entry(data)

    def write(self, chunk: int, features: Tensor) -> None:
        """Write a chunk, and behind it its entry in the journal."""
        data = _bytes(features)
        with self.path.open("r+b") as file:
            file.seek(chunk * CHUNK * self._bytes_an_image)
            file.write(data)
        with self.journal.open("r+b") as file:
            file.seek(8 * chunk)
            file.write(_entry(data).to_bytes(8, "little"))

    def read(self) -> Tensor:
        """The features [N, ...], memory-mapped; writing to them would not reach the file."""
        mapped = torch.from_file(str(self.path), shared=False, size=math.prod(self.shape), dtype=self.dtype)
        return mapped.view(self.shape)


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of a state dict: names, shapes, types and values."""
    names = json.dumps([(name, list(t.shape), str(t.dtype)) for name, t in tensors.items()])
    return _checksum(tensors.values(), names)


def _checksum(tensors: Any, names: str = "") -> str:
    digest = hashlib.sha256(names.encode())
    for tensor in tensors:
        digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _entry(data: Any) -> int:
    """Never 0, which stands for a chunk that was not written."""
    return 1 << 32 | zlib.crc32(data)
