"""Cache of the features of a frozen backbone, one memory-mapped safetensors file per split.

While the features are computed, the file has another name and ends with one byte per chunk of images, which is 1 once
the features of the chunk are on disk. After an interruption, a single process computes only the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import CHUNK, Split
from cifar10_tl.data.image_cache import mapped

log = logging.getLogger(__name__)

DAY = 24 * 3600  # seconds
SECONDS = 5.0  # between two updates of the list of finished chunks
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass
class FeatureCache:
    """Cache that computes the features of images once and reads them from disk afterwards.

    Attributes:
        folder: Folder of the cache files.
        extract: Function from uint8 images [n, 3, H, W] to features [n, ...] on the CPU.
        describe: Function that returns everything ``extract`` depends on, as plain values.
        trainer: Trainer whose processes share the work on each machine.
    """

    folder: Path
    extract: Callable[[Tensor], Tensor]
    describe: Callable[[], Mapping[str, Any]]
    trainer: pl.Trainer

    def features(self, name: str, split: Split, *, mirrored: bool) -> Tensor:
        """Return memory-mapped features [N, V, ...] of all images and, if ``mirrored``, of their mirror images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sample = self._views(split.take(torch.arange(1)), mirrored)
        shape = [len(split), *sample.shape[1:]]
        num_bytes = math.prod(shape) * sample.element_size()
        entry = {"dtype": _DTYPES[sample.dtype], "shape": shape, "data_offsets": [0, num_bytes]}
        images = json.dumps([("", split.shape, "torch.uint8")])
        content = {**self.describe(), **entry, "images": checksum(images.encode(), split.chunks())}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"{key}.safetensors"
        header = _header(entry)
        self._fill(path, len(header) + num_bytes, name, split, mirrored, header)
        _, data = mapped(path)
        return data[len(header) :].view(sample.dtype).view(shape)

    def _views(self, images: Tensor, mirrored: bool) -> Tensor:
        return torch.stack([self.extract(view) for view in (images, images.flip(-1))[: 1 + mirrored]], 1)

    def _fill(self, path: Path, size: int, name: str, split: Split, mirrored: bool, header: bytes) -> None:
        """Write the features to an incomplete file, to which each process adds its chunks, and rename it.

        If a single process is interrupted, its file is kept, and the next process continues it.
        """
        strategy, first = self.trainer.strategy, self.trainer.local_rank == 0
        # The first process alone decides whether to compute, so that all processes meet at the same barriers.
        is_missing, is_kept = first and not _is_whole(path, size), False
        run, host = strategy.broadcast(uuid.uuid4().hex), socket.gethostname()
        with ExitStack() as stack:
            if is_missing and self.trainer.world_size == 1:
                lock = FileLock(path.with_name(f".{path.name}.{host}.{os.getuid()}.lock"))
                with suppress(Timeout):  # else another run of this user computes the same
                    stack.enter_context(lock.acquire(blocking=False))
                    run, is_kept = str(os.getuid()), True
            incomplete = path.with_name(f".{path.name}.{host}.{run}.tmp")
            try:
                if is_missing:
                    self._prepare(incomplete, name, header, size, math.ceil(len(split) / CHUNK))
                strategy.barrier()
                if incomplete.exists():
                    self._compute(incomplete, size, name, split, mirrored, len(header))
                strategy.barrier()
                if is_missing:
                    os.truncate(incomplete, size)
                    os.replace(incomplete, path)
                strategy.barrier()
            finally:
                if is_missing and not is_kept:
                    incomplete.unlink(missing_ok=True)

    def _prepare(self, incomplete: Path, name: str, header: bytes, size: int, num_chunks: int) -> None:
        """Create the incomplete file unless an interrupted run has left it, and remove those older than a day."""
        for other in self.folder.glob(".*.tmp"):
            with suppress(OSError):  # renamed meanwhile, or another user's
                if other != incomplete and time.time() - other.stat().st_mtime > DAY:
                    other.unlink()
        if _is_whole(incomplete, size + num_chunks):
            return
        incomplete.unlink(missing_ok=True)
        if size > (free := shutil.disk_usage(self.folder).free):
            raise UserError(
                f"data.cache_features=true: the features of {name} need {size / 1e9:.2f} GB, but {self.folder} "
                f"has {free / 1e9:.2f} GB free; choose another paths.cache_dir, or lower data.image_limit"
            )
        incomplete.write_bytes(header)
        os.truncate(incomplete, size + num_chunks)

    def _compute(self, path: Path, size: int, name: str, split: Split, mirrored: bool, offset: int) -> None:
        """Compute the features of the unfinished chunks of this process, and write them after ``offset`` bytes."""
        rank, count, finished = self.trainer.local_rank, self.trainer.num_devices, list[int]()
        hidden = None if rank == 0 else True  # None: hidden unless stderr is a terminal
        log.info("computing the features of %s: %d images", name, len(split))
        with path.open("r+b") as file:

            def record() -> None:
                written = [*finished]
                finished.clear()  # a failed fsync may have lost them, and a second one would not fail
                file.flush()
                os.fsync(file.fileno())
                for chunk in written:
                    file.seek(size + chunk)
                    file.write(b"\1")

            file.seek(size)
            chunks = [chunk for chunk, done in enumerate(file.read()) if not done and chunk % count == rank]
            recorded = time.monotonic()
            try:
                for chunk in tqdm(chunks, desc=f"features of {name}", unit=" batches", disable=hidden):
                    start = chunk * CHUNK
                    images = split.take(torch.arange(start, min(start + CHUNK, len(split))))
                    data = _bytes(self._views(images, mirrored))
                    file.seek(offset + start * (len(data) // len(images)))
                    file.write(data)
                    finished.append(chunk)
                    if time.monotonic() - recorded > SECONDS:
                        record()
                        recorded = time.monotonic()
            finally:
                record()
        log.info("computed the features of %s: %d images", name, len(split))


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the names, shapes, types and values of a state dict."""
    names = json.dumps([(name, list(t.shape), str(t.dtype)) for name, t in tensors.items()])
    return checksum(names.encode(), (tensor.detach().cpu() for tensor in tensors.values()))


def checksum(start: bytes, tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of ``start`` and of the values of tensors, one after the other."""
    digest = hashlib.sha256(start)
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _header(entry: Mapping[str, Any]) -> bytes:
    """Return the header of a safetensors file, written by hand because the library writes whole tensors only."""
    text = json.dumps({"features": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
