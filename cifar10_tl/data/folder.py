"""Source of images in class folders or listed in a table."""

from __future__ import annotations

import csv
import errno
import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from cifar10_tl.config.errors import UserError, one_line
from cifar10_tl.data.batch import ImageSet
from cifar10_tl.data.files import FileImages
from cifar10_tl.data.image_cache import CACHE_TAG, Entry, ImageCache, MappedImages
from cifar10_tl.data.images import IMAGE_SUFFIXES, list_files
from cifar10_tl.data.inspection import dark_images, inspect_images
from cifar10_tl.io import printable

log = logging.getLogger(__name__)

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SMALL = 64  # pixels: images of this size are never reduced
SAMPLE = 256  # files whose size is read to choose native_size
_TEMPORARY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: Ends of messages about files that may be readable later, so that leaving them out would change the splits.
TEMPORARY = (*(f"({os.strerror(number)})" for number in _TEMPORARY), "(MemoryError)")


def largest(image_size: int | Sequence[Sequence[float]]) -> int:
    """Return the image size, or the largest one of a schedule of sizes."""
    return image_size if isinstance(image_size, int) else max(int(size) for _, size in image_size)


#: Path relative to the root, and name of the class, of each file of each split.
Files: TypeAlias = dict[str, list[tuple[str, str]]]


class Folder:
    """Images in class folders, with or without folders for the splits, or in a table.

    ``root/<class>/`` is split by the DataModule. Besides ``root/train/<class>/`` there may be ``root/test/<class>/``
    and ``root/val/<class>/``, also in capitals or named "training", "valid", "validation" or "testing". With train and
    val alone, val is the test split, and a new val is split off train.

    Args:
        root: Folder of the images.
        native_size: Side of the decoded images in pixels. "auto": the images' own size if they are squares of one size
            of at most ``image_size`` or 64 pixels, otherwise ``image_size``.
        fit: How other shapes become a square, "crop", "pad" or "squeeze", see
            :func:`~cifar10_tl.data.images.to_pixels`.
        labels: CSV file with the columns path (relative to ``root``), label and optionally split, instead of folders.
        test_size: Number or fraction of the images for the test split, if the folder has none.
        skip_bad: Leave out files that cannot be used, instead of raising an error.
        cache: Decode each image once to a file in ``cache_dir``, see :class:`ImageCache`; otherwise in each epoch.
        cache_dir: Folder of the decoded images.
        image_size: Side in pixels, or schedule of sides, to which the network resizes images.
        test_only: Without folders for the splits, or a column split, use all images as the test split.
    """

    def __init__(
        self,
        root: str,
        native_size: int | str = "auto",
        fit: str = "squeeze",
        labels: str | None = None,
        test_size: float = 0.1,
        skip_bad: bool = False,
        cache: bool = True,
        cache_dir: str = "data/cache",
        image_size: int | Sequence[Sequence[float]] = 224,
        test_only: bool = False,
    ) -> None:
        self.root, self.fit, self.test_size, self.skip_bad = Path(root), fit, test_size, skip_bad
        self.files, self.bad = (_read_table(Path(labels)), []) if labels else _list_splits(self.root)
        if "train" not in self.files and not test_only:
            given, found = f"data.labels={labels}" if labels else f"data.root={root}", ", ".join(self.files)
            raise UserError(f"{given}: has no training images (splits: {found or 'none'})")
        for other in ("val", "train")[: 1 + test_only]:
            if "test" not in self.files and other in self.files:
                self.files["test"] = self.files.pop(other)
        self.paths = [path for files in self.files.values() for path, _ in files]
        self.class_names = tuple(sorted({name for files in self.files.values() for _, name in files}))
        if len(self.class_names) < 2:
            raise UserError(f"data.root={root}: needs images of at least 2 classes, but has {len(self.class_names)}")
        self._check_classes(self.files)
        self.native_size = self._choose_size(largest(image_size)) if native_size == "auto" else int(native_size)
        self.cache = ImageCache(Path(cache_dir), self.root, self.native_size, fit) if cache else None

    def _check_classes(self, splits: Mapping[str, Sequence[tuple[object, str]]]) -> None:
        for split, images in splits.items():
            if empty := sorted({*self.class_names} - {name for _, name in images}):
                raise UserError(f"data.root={self.root}: there are no images in {split} of class {', '.join(empty)}")

    def _choose_size(self, image_size: int) -> int:
        """Return the side of the images if a sample of them are small squares of one size, otherwise ``image_size``."""
        sizes = set()
        for path in self.paths[:: max(1, len(self.paths) // SAMPLE)]:
            with suppress(Exception), Image.open(self.root / path) as image:  # reported when it is decoded
                sizes.add(image.size)
        width, height = sizes.pop() if len(sizes) == 1 else (image_size, image_size)
        return width if width == height <= max(SMALL, image_size) else image_size

    def prepare(self) -> None:
        """Decode the images that are not in the cache, and log everything that is unusual about them."""
        log.info("data.root=%s: images are used at %d pixels (fit: %s)", self.root, self.native_size, self.fit)
        usable, bad = self._read(retry=True)
        notes = [f"left out {_summary(bad)}"] if bad and self.skip_bad else []
        notes += dark_images(self.root, self.paths)
        if notes := [*notes, *(inspect_images(usable, self.native_size, self.fit) if self.cache else [])]:
            log.warning("data.root=%s:%s", self.root, "".join(f"\n  {printable(one_line(note))}" for note in notes))
        self._check(usable, bad)

    def load(self) -> dict[str, ImageSet]:
        """Return the splits, each sorted by class and then by file name, or in the order of the table."""
        labels = {name: label for label, name in enumerate(self.class_names)}
        usable, bad = self._read()
        self._check(usable, bad)
        splits = {}
        for split, images in usable.items():
            paths, size = [image.path for image, _ in images], self.native_size
            store = (
                MappedImages(self.cache.pixels, torch.tensor([image.row for image, _ in images]), size)
                if self.cache
                else FileImages(self.root, paths, size, self.fit)
            )
            splits[split] = ImageSet(
                store, torch.tensor([labels[name] for _, name in images]), [*map(printable, paths)]
            )
        return splits

    def _read(self, *, retry: bool = False) -> tuple[dict[str, list[tuple[Entry, str]]], list[str]]:
        """Return the images of each split with the names of their classes, and a message for each unusable path."""
        entries = (
            self.cache.update({path: _version(os.path.join(self.root, path)) for path in self.paths}, retry=retry)
            if self.cache
            else {path: Entry(path, [], None) for path in self.paths}
        )
        bad = [*self.bad, *(f"{self.root / path} ({entry.error})" for path, entry in entries.items() if entry.error)]
        usable = {
            split: [(entries[path], name) for path, name in files if not entries[path].error]
            for split, files in self.files.items()
        }
        return usable, bad

    def _check(self, usable: Mapping[str, Sequence[tuple[Entry, str]]], bad: Sequence[str]) -> None:
        if failed := next((text for text in bad if text.endswith(TEMPORARY)), None):
            raise UserError(f"cannot read {printable(failed)}; try again")
        if bad and not self.skip_bad:
            advice = "restore them, or start a new run with data.skip_bad=true" if self.cache else "remove them"
            raise UserError(f"cannot use {_summary(bad)}; {advice}")
        self._check_classes(usable)


def _summary(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} path{'s' * (len(bad) > 1)}: {printable(', '.join(bad[:5]))}{more}"


def _version(path: str) -> list[int]:
    """Return the size and the times of a file, which change with its content."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # a broken link or an odd name, reported when it is decoded
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _list_splits(root: Path) -> tuple[Files, list[str]]:
    """Return the files in ``root/<class>/`` as train, or in ``root/<split>/<class>/``, and why paths are unusable."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    folders = _folders(root)
    # a class may be named like a split, but has no folders of classes in it
    outer = [path for path in folders if next(os.walk(path), ("", [], []))[1]]  # none in a locked folder
    found = {split: [f for f in outer if f.name.casefold() in names] for split, names in SPLITS.items()}
    if twice := next((f for f in found.values() if len(f) > 1), None):
        raise UserError(f"data.root={root}: {twice[0].name} and {twice[1].name} are the same split; merge them")
    splits = {split: matches[0] for split, matches in found.items() if matches}
    if folders and not splits and all(any(f.name.casefold() in names for names in SPLITS.values()) for f in folders):
        raise UserError(f"data.root={root}: needs folders of classes, or a table of the labels: data.labels=FILE")
    if not splits and folders and outer == folders and not any(map(_has_images, folders)):
        names = ", ".join(path.name for path in folders[:5])
        log.warning("data.root=%s: if the classes (%s) are splits, name them train, val and test", root, names)
    if splits and (others := [f.name for f in folders if f not in splits.values()]):
        unused = ", ".join(others)
        reason = "which are not train, val or test, or have no folders of classes"
        log.warning("data.root=%s: ignored folders, %s: %s", root, reason, unused)
    bad: list[str] = []
    return {split: _list_classes(folder, root, bad) for split, folder in (splits or {"train": root}).items()}, bad


def _folders(parent: Path) -> list[Path]:
    """Return the visible folders in ``parent``, sorted, except those of caches and of this project's runs."""
    folders = (path for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith("."))
    own = (CACHE_TAG, f"cache/{CACHE_TAG}", "runs/*/.hydra", "sweeps/*/*/.hydra")
    return [path for path in folders if not any(next(path.glob(pattern), None) for pattern in own)]


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _list_classes(folder: Path, root: Path, bad: list[str]) -> list[tuple[str, str]]:
    """Return the files in ``folder/<class>/``, sorted by class and path; add to ``bad`` why paths are unusable."""
    found: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
            bad.append(f"{path} (not in a class folder)")
    for name, class_folder in sorted(_class_folders(folder).items()):
        files, errors = list_files(class_folder)
        inside, start = class_folder.relative_to(root).as_posix(), len(str(class_folder))
        found += [(f"{inside}{path[start:]}", name) for path in files]
        bad += [f"{error.filename} ({error.strerror})" for error in errors]
        if not files and not errors:
            bad.append(f"{class_folder} (no images)")
    return found


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders by name, in Unicode normal form C: macOS and Linux write "é" in different ways."""
    found: dict[str, Path] = {}
    for path in _folders(folder):
        if printable(path.name) != path.name:
            raise UserError(f"{printable(path)}: the name of a class folder must be valid UTF-8; rename the folder")
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise UserError(f"{folder}: two class folders are named {name} in different Unicode forms; merge them")
        found[name] = path
    return found


def _read_table(table: Path) -> Files:
    """Return the files of a CSV table with the columns path, label and optionally split (train, if empty)."""
    splits = {name: split for split, names in SPLITS.items() for name in names}
    files: Files = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := {"path", "label"} - {*(rows.fieldnames or ())}:
                raise UserError(f"data.labels={table}: has no column {' and no column '.join(sorted(missing))}")
            for row in rows:
                path, label, split = ((row.get(key) or "").strip() for key in ("path", "label", "split"))
                name = splits.get(split.casefold() or "train")
                if not path or not label or name is None:
                    raise UserError(
                        f"data.labels={table}, line {rows.line_num}: needs a path, a label, and train, val or test "
                        "as the split"
                    )
                files.setdefault(name, []).append((path, unicodedata.normalize("NFC", label)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.labels={table}: {getattr(error, 'strerror', None) or error}") from error
    return files
