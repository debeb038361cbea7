"""Sources of images: CIFAR-10, a folder of images, and the built-in shapes.

To add a source, write a class with the members of :class:`Source` and add it to ``SOURCES`` (CONTRIBUTING.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.download import download
from cifar10_tl.data.images import IMAGE_SUFFIXES, BadImageError, decode_image, list_files
from cifar10_tl.data.shapes import CLASS_NAMES as SHAPE_NAMES
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.io import atomic_write

log = logging.getLogger(__name__)


class ImageSet(NamedTuple):
    """Images in memory, uint8 [N, 3, H, W], their labels, int64 [N], and their paths relative to ``root`` if files."""

    images: Tensor
    labels: Tensor
    paths: Sequence[str] | None = None


class Source(Protocol):
    """Source of the images of :class:`~cifar10_tl.data.datamodule.CIFAR10DataModule`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    def prepare(self) -> None:
        """Download or decode the images if necessary; called in one process per machine."""

    def load(self) -> dict[str, ImageSet]:
        """Return the splits "train" and "test", and "val" if the source defines one."""


class Cifar10:
    """CIFAR-10, downloaded from the first working mirror and read by torchvision."""

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root: str, mirrors: Sequence[str] = (), md5: str = "", stall_seconds: float = 20.0) -> None:
        self.root, self.mirrors, self.md5, self.stall_seconds = root, mirrors, md5, stall_seconds

    def prepare(self) -> None:
        """Download and extract the archive, unless all files of CIFAR-10 are in ``root``."""
        if self._is_complete():
            return
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(self.root, ".cifar-10.lock")):
            if self._is_complete():  # another process downloaded it while this one was waiting
                return
            archive = Path(self.root, CIFAR10.filename)
            download(self.mirrors, archive, md5=self.md5, timeout=self.stall_seconds)
            extract_archive(str(archive), self.root)
            if not self._is_complete():
                raise UserError(f"{archive} does not contain CIFAR-10; delete it and try again")

    def _is_complete(self) -> bool:
        try:
            CIFAR10(self.root, train=False, download=False)
        except RuntimeError:  # a file is missing or has another checksum
            return False
        return True

    def load(self) -> dict[str, ImageSet]:
        """Return 50,000 training and 10,000 test images of 32 x 32 pixels, in the official order."""
        splits = {}
        for name in ("train", "test"):
            # torchvision verifies the checksum of each file before unpickling it.
            dataset = CIFAR10(self.root, train=name == "train", download=False)
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            splits[name] = ImageSet(images, torch.tensor(dataset.targets))
        return splits


class Folder:
    """Images in ``root/train/<class>/``, ``root/test/<class>/`` and optionally ``root/val/<class>/``.

    Each split is decoded once to a file in ``cache_dir``, whose name depends on the location, sizes and times of the
    images. Files that cannot be used are an error, or with ``skip_bad`` a warning.
    """

    def __init__(self, root: str, native_size: int = 32, skip_bad: bool = False, cache_dir: str = "data/cache") -> None:
        self.root, self.native_size, self.skip_bad = Path(root), native_size, skip_bad
        self.cache_dir = Path(cache_dir)
        splits = ["train", "val", "test"] if (self.root / "val").is_dir() else ["train", "test"]
        self.folders = {split: _class_folders(self.root / split) for split in splits}
        self.class_names = tuple(sorted(self.folders["train"]))
        if len(self.class_names) < 2:
            raise UserError(f"{self.root / 'train'} needs at least 2 class folders, but has {len(self.class_names)}")
        for split, found in self.folders.items():
            if odd := sorted(set(found) ^ set(self.class_names)):
                raise UserError(f"data.root={self.root}: the classes of train and {split} differ: {', '.join(odd)}")

    def prepare(self) -> None:
        """Decode each split without a valid cache file, and report the files that were left out."""
        for split in self.folders:
            _, bad = self._read(split)
            if bad:
                log.warning("left out %s", _summary(split, bad))

    def load(self) -> dict[str, ImageSet]:
        """Return the splits, each sorted by class and then by file name."""
        return {split: self._read(split)[0] for split in self.folders}

    def _read(self, split: str) -> tuple[ImageSet, list[str]]:
        """Return a split, and a message for each path that cannot be used."""
        files, bad = self._list(split)
        stats = [(path, path.stat() if path.exists() else path.lstat()) for path, _ in files]
        listing = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
        key = json.dumps([6, os.path.realpath(self.root), self.native_size, self.skip_bad, listing, bad])  # 6: version
        cache = self.cache_dir / f"{self.root.name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        try:
            with np.load(cache) as arrays:
                images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
                return ImageSet(images, labels, arrays["paths"].tolist()), arrays["bad"].tolist()
        except Exception:  # missing, or damaged, which raises many types of errors
            decoded = self._decode(split, files, bad)
        paths, errors = (np.array(texts, dtype=np.str_) for texts in (decoded.paths, bad))
        with atomic_write(cache) as file:
            np.savez(file, images=decoded.images.numpy(), labels=decoded.labels.numpy(), paths=paths, bad=errors)
        return decoded, bad

    def _list(self, split: str) -> tuple[list[tuple[Path, int]], list[str]]:
        """Return the files of a split with their labels, and a message for each path that cannot be used."""
        files, bad = [], []
        for path in sorted((self.root / split).iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
                bad.append(f"{_printable(path)} (not in a class folder)")
        for label, name in enumerate(self.class_names):
            paths, errors = list_files(self.folders[split][name])
            files += [(path, label) for path in paths]
            bad += [f"{_printable(error.filename)} ({error.strerror})" for error in errors]
        return files, bad

    def _decode(self, split: str, files: Sequence[tuple[Path, int]], bad: list[str]) -> ImageSet:
        """Decode the images of a split, and add a message to ``bad`` for each file that is not an image."""
        images, labels, paths = [], [], []
        for path, label in tqdm(files, desc=f"decoding {split}", unit=" images", disable=None, leave=False):
            try:
                images.append(decode_image(path, self.native_size))
                labels.append(label)
                paths.append(_printable(path.relative_to(self.root).as_posix()))
            except BadImageError as error:
                bad.append(f"{_printable(path)} ({error})")
        if bad and not self.skip_bad:
            raise UserError(f"cannot use {_summary(split, bad)}; data.skip_bad=true leaves them out")
        if empty := [name for label, name in enumerate(self.class_names) if label not in labels]:
            raise UserError(f"{self.root / split}: no images of {', '.join(empty)}")
        return ImageSet(torch.from_numpy(np.stack(images)), torch.tensor(labels), paths)


def _summary(split: str, bad: Sequence[str]) -> str:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} paths in {split}: {', '.join(bad[:5])}{more}"


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders by name, in Unicode normal form C: macOS and Linux write "é" in different ways."""
    if not folder.is_dir():
        raise UserError(f"data.root={folder.parent}: there is no folder {folder.name} with a folder for each class")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if _printable(path.name) != path.name:
            raise UserError(f"{_printable(path)}: the name of a class folder must be valid UTF-8; rename the folder")
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise UserError(f"{folder}: two class folders are named {name} in different Unicode forms; merge them")
        found[name] = path
    return found


def _printable(path: Path | str) -> str:
    """Return a path as text that can be encoded as UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class Shapes:
    """Built-in dataset of :mod:`cifar10_tl.data.shapes`; train and test are drawn with different seeds."""

    class_names = SHAPE_NAMES

    def __init__(
        self, train_size: int = 8000, test_size: int = 2000, native_size: int = 32, drawing_seed: int = 0
    ) -> None:
        self.sizes = {"train": train_size, "test": test_size}
        self.native_size, self.drawing_seed = native_size, drawing_seed

    def prepare(self) -> None:
        """Do nothing, because drawing takes only seconds."""

    def load(self) -> dict[str, ImageSet]:
        """Return ``train_size`` and ``test_size`` images with balanced classes."""
        return {
            split: ImageSet(*draw_shapes(size, seed=2 * self.drawing_seed + offset, image_size=self.native_size))
            for offset, (split, size) in enumerate(self.sizes.items())
        }


SOURCES: dict[str, Callable[..., Source]] = {"cifar10": Cifar10, "folder": Folder, "shapes": Shapes}
