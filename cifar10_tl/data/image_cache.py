"""Cache of decoded images: a raw uint8 file that is mapped into memory, and an index of the files in it.

Rows in use never change. A line of the index is written after the pixels it refers to are on disk, so a process that
is killed at any moment leaves a valid cache, and others can read it at any time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import mmap
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import leave_group
from cifar10_tl.data.images import BadImageError, available_cores, decode_sized

VERSION = 8  # of the files and of decoding
CACHE_TAG = "CACHEDIR.TAG"  # marks a folder of a cache: https://bford.info/cachedir/
FLUSH_SECONDS = 1.0
WEEK = 7 * 24 * 3600  # seconds
COPIES = 8  # versions of all files, such as those on several machines, before a cache starts over
FILES = 32  # that a process decodes at once
PAGE = 2**16  # bytes that the kernel maps around a page that is read
RELEASE_BYTES = 2**25


class Entry(NamedTuple):
    """File in the cache.

    Attributes:
        path: Path relative to the root, or absolute.
        version: Size in bytes and times of the file when it was decoded; another version is decoded again.
        row: Position of its pixels; None if the file could not be decoded.
        width: Width of the upright image before it was resized.
        height: Height of the upright image before it was resized.
        digest: Checksum of the pixels.
        error: Why the file could not be decoded.
    """

    path: str
    version: list[int]
    row: int | None
    width: int = 0
    height: int = 0
    digest: str = ""
    error: str = ""


class ImageCache:
    """Cache of the images of one root folder at one size.

    Args:
        folder: Folder of the cache files.
        root: Folder that the paths are relative to.
        size: Side of the decoded images in pixels.
        fit: How other shapes become a square, see :func:`~cifar10_tl.data.images.to_pixels`.
    """

    def __init__(self, folder: Path, root: Path, size: int, fit: str) -> None:
        self.folder, self.root, self.size, self.fit = folder, root, size, fit
        self.row_bytes = 3 * size**2
        key = hashlib.sha256(json.dumps([VERSION, os.path.realpath(root), size, fit]).encode()).hexdigest()[:16]
        self.pixels, self.index, self.lock = (
            folder / f"{root.name}-{size}px-{fit}-{key}.{suffix}" for suffix in ("pixels", "index", "lock")
        )

    def update(self, files: Mapping[str, list[int]], *, retry: bool = False) -> dict[str, Entry]:
        """Decode each file whose version is not in the cache, and return the entries of all files.

        Args:
            files: Version of each file by path.
            retry: Decode again the files that could not be decoded, unless the cache is read-only.
        """
        entries, retry = self._entries(files), retry and os.access(self.index, os.W_OK)
        if _outdated(files, entries, retry):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / CACHE_TAG).exists():  # it may be another user's
                    (self.folder / CACHE_TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
                with FileLock(self.lock):
                    entries = self._entries(files)  # with what another process has decoded meanwhile
                    entries |= self._append(_outdated(files, entries, retry), entries)
            except OSError as error:
                raise UserError(f"{self.folder}: {error.strerror}; choose another data.cache_dir") from error
        return {path: entries[path] for path in files}

    def _entries(self, files: Mapping[str, list[int]]) -> dict[str, Entry]:
        """Return one entry per path, for its version in ``files`` or else the latest; none if pixels are missing."""
        if not self.index.exists() or not self.pixels.exists():
            return {}
        lines = [line.partition(b" ") for line in self.index.read_bytes().split(b"\n")]
        # a line that was cut off or damaged does not have its checksum
        found = [Entry(*json.loads(text)) for check, _, text in lines if check == _checksum(text)]
        with self.pixels.open("rb") as file:  # NFS may return an outdated size of a file that is not open
            num_rows = file.seek(0, os.SEEK_END) // self.row_bytes
        is_whole = all(entry.row is None or entry.row < num_rows for entry in found)
        # machines with copies of the same files add one version each
        found.sort(key=lambda entry: files.get(entry.path) == entry.version)
        return {entry.path: entry for entry in found} if is_whole else {}

    def _age(self) -> float:
        return time.time() - self.index.stat().st_mtime

    def _append(self, files: Sequence[tuple[str, list[int]]], entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Decode files on all cores, append them, flushed to disk every second, and return their entries."""
        needed, free = self.row_bytes * len(files), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: {len(files):,} decoded images need {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
                "free; choose another data.cache_dir, a smaller data.native_size, or data.cache=false"
            )
        current = entries.keys() - {path for path, _ in files}
        if not entries or (not current and (self._age() > WEEK or self.pixels.stat().st_size >= COPIES * needed)):
            self.pixels.unlink(missing_ok=True)  # a process that reads it keeps its content
            self.index.unlink(missing_ok=True)
        self.pixels.touch()
        with self.pixels.open("r+b") as pixels, self.index.open("ab") as index:
            index.write(b"\n" * (index.tell() > 0))  # ends a line that was cut off
            first = math.ceil(pixels.seek(0, os.SEEK_END) / self.row_bytes)  # never overwrite what others may read
            # reserved: the workers of a stopped run may still write to its rows
            pixels.truncate((first + len(files)) * self.row_bytes)
            # processes, because the threads of one process decode small files one after another (the GIL of Python)
            loader: DataLoader[Any] = DataLoader(
                [*enumerate(files, first)],  # type: ignore[arg-type] # a list is a map-style dataset
                FILES,
                num_workers=min(available_cores(), len(files) // FILES),
                collate_fn=self._decode,
                worker_init_fn=_init_worker,
                generator=torch.Generator(),  # the global one belongs to the run
            )
            lines: list[bytes] = []
            added: dict[str, Entry] = {}
            flushed = time.monotonic()
            try:
                with tqdm(desc="decoding", total=len(files), unit=" images", disable=None, leave=False) as bar:
                    for entries_or_error in loader:
                        if isinstance(entries_or_error, OSError):
                            raise entries_or_error
                        for entry in entries_or_error:
                            text = json.dumps(entry).encode()
                            lines.append(_checksum(text) + b" " + text + b"\n")
                            added[entry.path] = entry
                        bar.update(len(entries_or_error))
                        if time.monotonic() - flushed > FLUSH_SECONDS:
                            _flush(pixels, index, lines)
                            flushed = time.monotonic()
            finally:  # when interrupted, too
                _flush(pixels, index, lines)
            used = max((entry.row + 1 for entry in added.values() if entry.row is not None), default=first)
            pixels.truncate(used * self.row_bytes)  # all workers have ended
        return added

    def _decode(self, files: Sequence[tuple[int, tuple[str, list[int]]]]) -> list[Entry] | OSError:
        """Write the pixels of files to these successive rows, and return the entries, or an error with its number."""
        entries, images = [], np.zeros((len(files), 3, self.size, self.size), np.uint8)
        for (row, (path, version)), image in zip(files, images, strict=True):
            try:
                image[:], width, height = decode_sized(os.path.join(self.root, path), self.size, self.fit)
            except BadImageError as error:
                entries.append(Entry(path, version, None, error=str(error)))
            else:
                digest = hashlib.sha256(image.data).hexdigest()[:16]
                entries.append(Entry(path, version, row, width, height, digest))
        try:
            with self.pixels.open("r+b") as file:
                file.seek(files[0][0] * self.row_bytes)
                file.write(images.data)
        except OSError as error:
            return error
        return entries


def _init_worker(worker: int) -> None:
    leave_group(worker)
    gc.disable()  # decoding makes no cycles, and a collection would copy the memory of all objects of the parent


def _outdated(files: Mapping[str, list[int]], entries: Mapping[str, Entry], retry: bool) -> list[tuple[str, list[int]]]:
    return [
        (path, version)
        for path, version in files.items()
        if path not in entries or entries[path].version != version or (retry and entries[path].row is None)
    ]


def _flush(pixels: IO[bytes], index: IO[bytes], lines: list[bytes]) -> None:
    """Write the lines to disk after the pixels."""
    text = b"".join(lines)
    lines.clear()  # a failed fsync may have lost their pixels, and a second one would not fail
    for file in (pixels, index):
        file.flush()
        os.fsync(file.fileno())
        if file is pixels:
            index.write(text)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def mapped(path: Path) -> tuple[mmap.mmap, Tensor]:
    """Map a file into memory, and return the map and its content, a uint8 tensor that must not be written to."""
    with path.open("rb") as file:
        # read-only, because Linux refuses writable maps that are larger than the memory of the machine
        file_map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return file_map, torch.frombuffer(file_map, dtype=torch.uint8)


class MappedImages:
    """Images in a raw uint8 file, mapped into memory: one copy for all processes of a machine.

    Pages are released after use, so that the memory of a process does not grow with the number of images.

    Args:
        path: File of uint8 [3, S, S] per row.
        rows: Rows of the images, int64 [M].
        size: Side S of the images in pixels.
    """

    def __init__(self, path: Path, rows: Tensor, size: int) -> None:
        self.path, self.rows, self.shape = path, rows, (len(rows), 3, size, size)
        self._file, content = mapped(path)
        count = len(content) // (3 * size**2)
        self._images, self._touched = content[: count * 3 * size**2].view(count, 3, size, size), 0

    def __reduce__(self) -> tuple[Callable[..., MappedImages], tuple[Path, Tensor, int]]:
        return MappedImages, (self.path, self.rows, self.shape[-1])

    def take(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` (int64 [n]), uint8 [n, 3, S, S]."""
        images = self._images.index_select(0, self.rows[positions])
        self._touched += images.numel() + PAGE * len(images)
        if self._touched > RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return images
