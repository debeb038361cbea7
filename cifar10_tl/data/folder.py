"""Source of images in class folders or listed in a table."""

from __future__ import annotations

import csv
import logging
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from cifar10_tl.config.errors import UserError, one_line
from cifar10_tl.data.batch import ImageSet
from cifar10_tl.data.files import FileImages
from cifar10_tl.data.image_cache import CACHE_TAG, Entry, ImageCache, MappedImages
from cifar10_tl.data.images import IMAGE_SUFFIXES, list_files
from cifar10_tl.data.inspection import inspect_images
from cifar10_tl.io import printable

log = logging.getLogger(__name__)

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SMALL = 64  # pixels: images of this size are never reduced
SAMPLE = 256  # files whose size is read to choose native_size


def largest(image_size: int | Sequence[Sequence[float]]) -> int:
    """Return the image size, or the largest one of a schedule of sizes."""
    return image_size if isinstance(image_size, int) else max(int(size) for _, size in image_size)


class Listing(NamedTuple):
    """Files of a split: paths relative to the root, their class names, and messages about unusable paths."""

    paths: list[str]
    classes: list[str]
    bad: list[str]


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
    ) -> None:
        self.root, self.fit, self.test_size, self.skip_bad = Path(root), fit, test_size, skip_bad
        self.cached, self.cache_dir = cache, Path(cache_dir)
        self.listings = _read_table(Path(labels), self.root) if labels else _list_splits(self.root)
        if "test" not in self.listings and "val" in self.listings:
            self.listings["test"] = self.listings.pop("val")
        self.class_names = tuple(sorted({*self.listings["train"].classes}))
        self._check_classes()
        self.native_size = self._choose_size(largest(image_size)) if native_size == "auto" else int(native_size)

    def _check_classes(self) -> None:
        if len(self.class_names) < 2:
            raise UserError(
                f"data.root={self.root}: training needs images of at least 2 classes, but has {len(self.class_names)}"
            )
        for split, listing in self.listings.items():
            if odd := sorted({*listing.classes} ^ {*self.class_names}):
                raise UserError(f"data.root={self.root}: the classes of train and {split} differ: {', '.join(odd)}")

    def _choose_size(self, image_size: int) -> int:
        """Return the side of the images if a sample of them are small squares of one size, otherwise ``image_size``."""
        paths, sizes = [path for listing in self.listings.values() for path in listing.paths], set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is reported when it is decoded
            for path in paths[:: max(1, len(paths) // SAMPLE)]:
                with suppress(Exception), Image.open(self.root / path) as image:
                    sizes.add(image.size)
        width, height = sizes.pop() if len(sizes) == 1 else (image_size, image_size)
        return width if width == height <= max(SMALL, image_size) else image_size

    @cached_property
    def cache(self) -> ImageCache:
        """Cache of the decoded images."""
        return ImageCache(self.cache_dir, self.root, self.native_size, self.fit)

    def prepare(self) -> None:
        """Decode the images that are not in the cache, and log everything that is unusual about them."""
        log.info("data.root=%s: images are used at %d pixels (fit: %s)", self.root, self.native_size, self.fit)
        usable, bad = self._read(retry=True)
        notes = [f"left out {_summary(bad)}"] if bad and self.skip_bad else []
        if notes := [*notes, *(inspect_images(usable, self.native_size, self.fit) if self.cached else [])]:
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
                if self.cached
                else FileImages(self.root, paths, size, self.fit)
            )
            splits[split] = ImageSet(
                store, torch.tensor([labels[name] for _, name in images]), [*map(printable, paths)]
            )
        return splits

    def _read(self, *, retry: bool = False) -> tuple[dict[str, list[tuple[Entry, str]]], list[str]]:
        """Return the images of each split with the names of their classes, and a message for each unusable path."""
        paths = [path for listing in self.listings.values() for path in listing.paths]
        entries = (
            self.cache.update({path: _version(self.root / path) for path in paths}, retry=retry)
            if self.cached
            else {path: Entry(path, [], None) for path in paths}
        )
        bad = [message for listing in self.listings.values() for message in listing.bad]
        bad += [f"{self.root / path} ({entry.error})" for path, entry in entries.items() if entry.error]
        usable = {
            split: [
                (entries[path], name)
                for path, name in zip(listing.paths, listing.classes, strict=True)
                if not entries[path].error
            ]
            for split, listing in self.listings.items()
        }
        return usable, bad

    def _check(self, usable: Mapping[str, Sequence[tuple[Entry, str]]], bad: Sequence[str]) -> None:
        if bad and not self.skip_bad:
            raise UserError(f"cannot use {_summary(bad)}; data.skip_bad=true leaves them out")
        for split, images in usable.items():
            if empty := sorted({*self.class_names} - {name for _, name in images}):
                raise UserError(f"data.root={self.root}: no images of {', '.join(empty)} in {split}")


def _summary(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} path{'s' * (len(bad) > 1)}: {printable(', '.join(bad[:5]))}{more}"


def _version(path: Path) -> list[int]:
    """Return the size and the times of a file, which change with its content."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a broken link or an odd name, reported when it is decoded
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _list_splits(root: Path) -> dict[str, Listing]:
    """Return the files in ``root/<class>/`` as train, or those of each split in ``root/<split>/<class>/``."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    folders = _folders(root)
    # a class may be named like a split, but has no folders of classes in it
    outer = [path for path in folders if any(child.is_dir() for child in path.iterdir())]
    found = {split: [f for f in outer if f.name.casefold() in names] for split, names in SPLITS.items()}
    if twice := next((f for f in found.values() if len(f) > 1), None):
        raise UserError(f"data.root={root}: {twice[0].name} and {twice[1].name} are the same split; merge them")
    splits = {split: matches[0] for split, matches in found.items() if matches}
    if folders and not splits and all(any(f.name.casefold() in names for names in SPLITS.values()) for f in folders):
        raise UserError(f"data.root={root}: needs folders of classes, or a table of the labels: data.labels=FILE")
    if splits and "train" not in splits:
        raise UserError(f"data.root={root}: there is a folder {min(splits)}, but no folder train")
    if splits and (others := [f.name for f in folders if f not in splits.values()]):
        log.warning("data.root=%s: folders that are not train, val or test are not used: %s", root, ", ".join(others))
    return {split: _list_classes(folder, root) for split, folder in (splits or {"train": root}).items()}


def _folders(parent: Path) -> list[Path]:
    """Return the visible folders in ``parent``, sorted, except those of caches."""
    folders = (path for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in folders if not (path / CACHE_TAG).exists()]


def _list_classes(folder: Path, root: Path) -> Listing:
    """Return the files in ``folder/<class>/``, sorted by class and then by path."""
    listing = Listing([], [], [])
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
            listing.bad.append(f"{path} (not in a class folder)")
    for name, class_folder in sorted(_class_folders(folder).items()):
        files, errors = list_files(class_folder)
        listing.paths.extend(path.relative_to(root).as_posix() for path in files)
        listing.classes.extend([name] * len(files))
        listing.bad.extend(f"{error.filename} ({error.strerror})" for error in errors)
        if not files and not errors:
            listing.bad.append(f"{class_folder} (no images)")
    return listing


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


def _read_table(table: Path, root: Path) -> dict[str, Listing]:
    """Return the files of a CSV table with the columns path, label and optionally split (train, if empty)."""
    splits = {name: split for split, names in SPLITS.items() for name in names}
    listings: dict[str, Listing] = {}
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
                listing = listings.setdefault(name, Listing([], [], []))
                listing.paths.append(path)
                listing.classes.append(unicodedata.normalize("NFC", label))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.labels={table}: {getattr(error, 'strerror', None) or error}") from error
    if "train" not in listings:
        raise UserError(f"data.labels={table}: has no training images")
    return listings
