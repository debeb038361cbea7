"""Sources of images: CIFAR-10, a folder of images, and the built-in shapes.

To add a source, write a class with the members of :class:`Source` and add it to ``SOURCES``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.download import download, file_lock
from cifar10_tl.data.images import IMAGE_SUFFIXES, BadImageError, decode_image, list_files
from cifar10_tl.data.shapes import CLASS_NAMES as SHAPE_NAMES
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.io import atomic_write

log = logging.getLogger(__name__)


CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class ImageSet(NamedTuple):
    """Images in memory, uint8 [N, 3, H, W], and their labels, int64 [N]."""

    images: Tensor
    labels: Tensor


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

    class_names = CIFAR10_NAMES

    def __init__(self, root: str, mirrors: Sequence[str] = (), md5: str = "", stall_seconds: float = 20.0) -> None:
        self.root, self.mirrors, self.md5, self.stall_seconds = root, mirrors, md5, stall_seconds

    def prepare(self) -> None:
        """Download and extract the archive."""
        prepare_cifar10(self.root, self.mirrors, self.md5, self.stall_seconds)

    def load(self) -> dict[str, ImageSet]:
        """Return 50,000 training and 10,000 test images of 32 x 32 pixels, in the official order."""
        splits = {}
        for name in ("train", "test"):
            # torchvision verifies the checksum of each file before unpickling it.
            dataset = CIFAR10(self.root, train=name == "train", download=False)
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            splits[name] = ImageSet(images, torch.tensor(dataset.targets))
        return splits


def prepare_cifar10(root: str, mirrors: Sequence[str], md5: str, stall_seconds: float) -> Path:
    """Download and extract CIFAR-10 unless it is complete, and return its folder.

    Raises:
        UserError: No mirror delivers the archive, or the archive is not CIFAR-10.
    """
    folder, archive = Path(root, CIFAR10.base_folder), Path(root, CIFAR10.filename)
    if _is_complete(root):
        return folder
    Path(root).mkdir(parents=True, exist_ok=True)
    with file_lock(Path(root, ".cifar-10.lock")):
        if _is_complete(root):  # another process downloaded it while this one was waiting
            return folder
        hint = ", or use data=shapes, which needs no download, or data=folder for your own images"
        download(mirrors, archive, md5=md5, timeout=stall_seconds, hint=hint)
        extract_archive(str(archive), root)
        if not _is_complete(root):
            raise UserError(f"{archive} does not contain CIFAR-10; delete it and try again")
    return folder


def _is_complete(root: str) -> bool:
    try:
        CIFAR10(root, train=False, download=False)
    except RuntimeError:  # a file is missing or has another checksum
        return False
    return True


class Folder:
    """Images in ``root/train/<class>/``, ``root/test/<class>/`` and optionally ``root/val/<class>/``.

    Each split is decoded once to a cache file, whose name depends on the location, sizes and times of the images.

    Args:
        root: Folder of the splits.
        native_size: Height and width of the decoded images in pixels.
        skip_bad: Leave out files that cannot be used, instead of raising an error.
        cache_dir: Folder of the cache files.
    """

    def __init__(self, root: str, native_size: int = 32, skip_bad: bool = False, cache_dir: str = "data/cache") -> None:
        self.root, self.native_size, self.skip_bad = Path(root), native_size, skip_bad
        self.cache_dir = Path(cache_dir)
        for split in ("train", "test"):
            if not (self.root / split).is_dir():
                raise UserError(
                    f"data.root={root}: there is no folder {split}; data=folder needs train/<class>/ and test/<class>/"
                )
        splits = [s for s in ("train", "val", "test") if (self.root / s).is_dir()]
        self.folders = {split: _class_folders(self.root / split) for split in splits}
        self.class_names = tuple(sorted(self.folders["train"]))
        self._check_classes()

    def _check_classes(self) -> None:
        if len(self.class_names) < 2:
            raise UserError(
                f"data.root={self.root}: train needs at least 2 class folders, but has {len(self.class_names)}"
            )
        for split, found in self.folders.items():
            if odd := sorted(set(found) ^ set(self.class_names)):
                raise UserError(f"data.root={self.root}: the classes of train and {split} differ: {', '.join(odd)}")

    def prepare(self) -> None:
        """Decode each split without a valid cache file.

        Raises:
            UserError: A file cannot be used (unless ``skip_bad``), or a class has no images.
        """
        for split in self.folders:
            self._cached(split)

    def load(self) -> dict[str, ImageSet]:
        """Return the splits, each sorted by class and then by file name."""
        splits = {}
        for split in self.folders:
            images, labels, bad = self._cached(split)
            self._report_bad(bad, split)
            splits[split] = ImageSet(images, labels)
        return splits

    def _cached(self, split: str) -> _Decoded:
        files, bad = self._list(split)
        cache = self.cache_dir / f"{self.root.name}-{split}-{self._checksum(files, bad)}.npz"
        found = _read_cache(cache)
        if found is None:
            found = self._decode(split, files, bad)
            with atomic_write(cache) as file:
                images, labels, bad = found
                np.savez(file, images=images.numpy(), labels=labels.numpy(), bad=np.array(bad, dtype=np.str_))
        return found

    def _list(self, split: str) -> tuple[list[tuple[Path, int]], list[str]]:
        """Return the files of a split with their labels, and a message for each path that cannot be used."""
        files, bad = [], []
        for path in sorted((self.root / split).iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
                bad.append(f"{printable(path)} (not in a class folder)")
        for label, name in enumerate(self.class_names):
            paths, errors = list_files(self.folders[split][name])
            files += [(path, label) for path in paths]
            bad += [f"{printable(error.filename)} ({error.strerror})" for error in errors]
        return files, bad

    def _checksum(self, files: Sequence[tuple[Path, int]], bad: Sequence[str]) -> str:
        stats = [(str(p), p.stat() if p.exists() else None) for p, _ in files]
        listing = [[path, s and s.st_size, s and s.st_mtime_ns, s and s.st_ctime_ns] for path, s in stats]
        key = json.dumps([4, self.native_size, os.path.realpath(self.root), listing, bad])  # 4: version of the format
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def _decode(self, split: str, files: Sequence[tuple[Path, int]], unusable: Sequence[str]) -> _Decoded:
        images, labels, bad = [], [], [*unusable]
        for path, label in tqdm(files, desc=f"decoding {split}", unit=" images", disable=None, leave=False):
            try:
                images.append(decode_image(path, self.native_size))
                labels.append(label)
            except BadImageError as error:
                bad.append(f"{printable(path)} ({error})")
        if not self.skip_bad:
            self._report_bad(bad, split)
        if empty := [name for label, name in enumerate(self.class_names) if label not in labels]:
            raise UserError(f"{self.root / split}: no images of {', '.join(empty)}")
        return _Decoded(torch.from_numpy(np.stack(images)), torch.tensor(labels), bad)

    def _report_bad(self, bad: Sequence[str], split: str) -> None:
        if not bad:
            return
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        count = "1 path" if len(bad) == 1 else f"{len(bad)} paths"
        if not self.skip_bad:
            raise UserError(f"{count} in {split} cannot be used: {shown}; data.skip_bad=true leaves them out")
        log.warning("%s in %s cannot be used and were left out: %s", count, split, shown)


class _Decoded(NamedTuple):
    images: Tensor
    labels: Tensor
    bad: list[str]  # a message for each path that cannot be used


def printable(path: Path | str) -> str:
    """Return a path as text that can be encoded as UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders by name, in Unicode normal form C: macOS and Linux write "é" in different ways."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if printable(path.name) != path.name:
            raise UserError(f"{printable(path)}: the name of a class folder must be valid UTF-8; rename the folder")
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise UserError(f"{folder}: two class folders are named {name} in different Unicode forms; merge them")
        found[name] = path
    return found


def _read_cache(path: Path) -> _Decoded | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip files contain checksums
            images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
            return _Decoded(images, labels, arrays["bad"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log.warning("%s is damaged; decoding the images again", path)
        return None


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
