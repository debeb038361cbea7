"""Where images come from: torchvision's CIFAR-10, a folder of pictures, or shapes drawn by code.

A source knows its class names at once, makes its images ready once a machine (:meth:`Source.prepare`), and hands them
over as tensors in memory (:meth:`Source.load`). To add one, write a class with these three and name it in ``SOURCES``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.download import exclusive, extract_tar, fetch
from cifar10_tl.data.images import BadImageError, decode_image
from cifar10_tl.data.shapes import CLASS_NAMES as SHAPE_NAMES
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.io import atomic_write

log = logging.getLogger(__name__)


CIFAR10_NAMES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class ImageSet(NamedTuple):
    """Images in memory: uint8 [N, 3, H, W], and their classes: int64 [N]."""

    images: Tensor
    labels: Tensor


class Source(Protocol):
    """What the DataModule asks of a source of images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    def prepare(self) -> None:
        """Download or decode, where that is not done yet. Called in one process a machine."""

    def load(self) -> dict[str, ImageSet]:
        """The splits "train" and "test", and "val" if the source has one of its own."""


class Cifar10:
    """The official archive, as torchvision reads it, its checksums checked, fetched from the first good mirror."""

    class_names = CIFAR10_NAMES

    def __init__(self, root: str, mirrors: Sequence[str] = (), md5: str = "", stall_seconds: float = 20.0) -> None:
        self.root, self.mirrors, self.md5, self.stall_seconds = root, mirrors, md5, stall_seconds

    def prepare(self) -> None:
        """Fetch and unpack the archive.

        Raises:
            UserError: no mirror delivered it.
        """
        prepare_cifar10(self.root, self.mirrors, self.md5, self.stall_seconds)

    def load(self) -> dict[str, ImageSet]:
        """50,000 training and 10,000 test images of 32x32 pixels, in the official order."""
        splits = {}
        for name in ("train", "test"):
            # torchvision unpickles the files only after it checked the md5 of each
            dataset = CIFAR10(self.root, train=name == "train", download=False)
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            splits[name] = ImageSet(images, torch.tensor(dataset.targets))
        return splits


def prepare_cifar10(root: str, mirrors: Sequence[str], md5: str, stall_seconds: float) -> Path:
    """Make ``root/cifar-10-batches-py`` a whole copy of CIFAR-10, downloading only what is missing.

    Raises:
        UserError: no mirror delivered the archive.
    """
    folder = Path(root) / CIFAR10.base_folder
    if _is_whole(root):
        return folder
    with exclusive(Path(root) / ".cifar-10.lock"):
        if _is_whole(root):  # another job fetched it in the meantime
            return folder
        archive = fetch(
            mirrors,
            Path(root) / CIFAR10.filename,
            md5=md5,
            stall_seconds=stall_seconds,
            hint="Or go on without it: data=shapes needs no download, data=folder takes your own pictures",
        )
        extract_tar(archive, Path(root))
        if not _is_whole(root):
            raise UserError(f"{archive} holds no CIFAR-10: delete it and start again")
    return folder


def _is_whole(root: str) -> bool:
    try:
        CIFAR10(root, train=False, download=False)
    except RuntimeError:  # torchvision's word for a missing or changed file
        return False
    return True


class Folder:
    """``root/train/<class>/*`` and ``root/test/<class>/*``, and ``root/val/<class>/*`` if there.

    Pictures (PNG, JPEG, WebP) are decoded once and kept as a cache file whose name is a checksum of the folder's
    listing (paths, sizes, times), so that a changed folder is decoded anew.
    """

    def __init__(self, root: str, native_size: int = 32, skip_bad: bool = False, cache_dir: str = "data/cache") -> None:
        self.root, self.native_size, self.skip_bad = Path(root), native_size, skip_bad
        self.cache_dir = Path(cache_dir)
        self.class_names = self._find_classes()

    def _find_classes(self) -> tuple[str, ...]:
        for split in ("train", "test"):
            if not (self.root / split).is_dir():
                raise UserError(
                    f"data.root={self.root}: there is no folder {split}; "
                    "data=folder wants train/<class>/* and test/<class>/* in it"
                )
        names = {s: _subfolders(self.root / s) for s in ("train", "test", "val") if (self.root / s).is_dir()}
        if len(names["train"]) < 2:
            raise UserError(f"data.root={self.root}: train holds {len(names['train'])} class folders, 2 are needed")
        for split, found in names.items():
            if found != names["train"]:
                odd = ", ".join(sorted(set(found) ^ set(names["train"])))
                raise UserError(f"data.root={self.root}: train and {split} differ in their classes: {odd}")
        return names["train"]

    def prepare(self) -> None:
        """Decode each split that has no whole cache file.

        Raises:
            UserError: a file is no image (unless ``skip_bad``), or a split holds no image.
        """
        for split in self._splits():
            self._cached(split)

    def load(self) -> dict[str, ImageSet]:
        """The splits that the folder has, each sorted by class and then by file name."""
        splits = {}
        for split in self._splits():
            images, labels, bad = self._cached(split)
            self._report_bad(bad, split)
            splits[split] = ImageSet(images, labels)
        return splits

    def _splits(self) -> list[str]:
        return [s for s in ("train", "val", "test") if (self.root / s).is_dir()]

    def _cached(self, split: str) -> _Decoded:
        files = self._files(split)
        cache = self.cache_dir / f"{self.root.name}-{split}-{self._checksum(files)}.npz"
        found = _read_cache(cache)
        if found is None:
            found = self._decode(split, files)
            with atomic_write(cache) as file:
                images, labels, bad = found
                np.savez(file, images=images.numpy(), labels=labels.numpy(), bad=np.array(bad, dtype=np.str_))
        return found

    def _files(self, split: str) -> list[tuple[Path, int]]:
        found = []
        for label, name in enumerate(self.class_names):
            found += [(path, label) for path in sorted(_visible_files(self.root / split / name))]
        return found

    def _checksum(self, files: Sequence[tuple[Path, int]]) -> str:
        stats = [(p.relative_to(self.root), p.stat() if p.exists() else None) for p, _ in files]
        listing = [[str(path), stat and stat.st_size, stat and stat.st_mtime_ns] for path, stat in stats]
        key = json.dumps([3, self.native_size, listing])  # 3: the version of the decoding below
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def _decode(self, split: str, files: Sequence[tuple[Path, int]]) -> _Decoded:
        images, labels, bad = [], [], []
        for path, label in tqdm(files, desc=f"decoding {split}", unit=" images", disable=None, leave=False):
            try:
                images.append(decode_image(path, self.native_size))
                labels.append(label)
            except BadImageError as error:
                bad.append(f"{path} ({error})")
        if not self.skip_bad:
            self._report_bad(bad, split)
        if len(set(labels)) < len(self.class_names):
            empty = [n for i, n in enumerate(self.class_names) if i not in set(labels)]
            raise UserError(f"{self.root / split}: no image of {', '.join(empty)}")
        return _Decoded(torch.from_numpy(np.stack(images)), torch.tensor(labels), bad)

    def _report_bad(self, bad: Sequence[str], split: str) -> None:
        if not bad:
            return
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        count = "1 file" if len(bad) == 1 else f"{len(bad)} files"
        if not self.skip_bad:
            raise UserError(f"{count} of {split} cannot be used: {shown}. data.skip_bad=true leaves out such files")
        log.warning("%s of %s cannot be used and left out: %s", count, split, shown)


class _Decoded(NamedTuple):
    """A split's images and labels, and a word on each file that is no good."""

    images: Tensor
    labels: Tensor
    bad: list[str]


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _visible_files(folder: Path) -> Iterator[Path]:
    """Every file below ``folder`` but those with a hidden folder or name; links are followed, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(place, f)) not in seen]
        paths = (Path(place) / name for name in files if name[0] != ".")
        yield from (path for path in paths if path.is_file() or not path.exists())  # a broken link is told as any other


def _read_cache(path: Path) -> _Decoded | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a zip file: each array's checksum is checked
            images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
            return _Decoded(images, labels, arrays["bad"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log.warning("%s is broken; decoding the pictures again", path)
        return None


class Shapes:
    """The built-in data set of :mod:`cifar10_tl.data.shapes`; train and test are drawn from seeds of their own."""

    class_names = SHAPE_NAMES

    def __init__(
        self, train_size: int = 8000, test_size: int = 2000, native_size: int = 32, drawing_seed: int = 0
    ) -> None:
        self.sizes = {"train": train_size, "test": test_size}
        self.native_size, self.drawing_seed = native_size, drawing_seed

    def prepare(self) -> None:
        """Nothing to make ready: drawing takes seconds."""

    def load(self) -> dict[str, ImageSet]:
        """``train_size`` and ``test_size`` images, all classes equally often."""
        return {
            split: ImageSet(*draw_shapes(size, seed=2 * self.drawing_seed + offset, image_size=self.native_size))
            for offset, (split, size) in enumerate(self.sizes.items())
        }


SOURCES: dict[str, Callable[..., Source]] = {"cifar10": Cifar10, "folder": Folder, "shapes": Shapes}
