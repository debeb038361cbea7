"""Checks of the images of a folder before they are trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from cifar10_tl.data.image_cache import Entry

FEW_IMAGES = 10  # of a class
UNEQUAL = 5  # ratio of the images of the largest and of the smallest class
LONG = 3  # ratio of the sides of an image
SAMPLE = 32  # images that are read to find dark ones
DARK = 2**14  # of 65,535


def inspect_images(splits: Mapping[str, Sequence[tuple[Entry, str]]], size: int, fit: str = "crop") -> list[str]:
    """Return a warning for each property of the images that may harm training or make the test misleading.

    Args:
        splits: Images of each split, with the name of their class.
        size: Side in pixels to which they were decoded.
        fit: How they became squares, see :func:`~cifar10_tl.data.images.to_pixels`.
    """
    notes = []
    for split, images in ((split, images) for split, images in splits.items() if images):
        found = *_unequal_classes(images), *_copies(images, len(splits) == 1), *_odd_sizes(images, size, fit)
        notes += [f"{split}: {note}" for note in found]
    train = {image.digest: image for image, _ in splits.get("train", ())}
    for split in splits.keys() - {"train"}:
        pairs = [(image, train[image.digest]) for image, _ in splits[split] if image.digest in train]
        shared = [f"{image.path} = {other.path}" for image, other in pairs]
        notes += [f"{split}: {note}" for note in _note("also in train, which inflates the accuracy", shared)]
    return notes


def dark_images(root: Path, paths: Sequence[str]) -> list[str]:
    """Return a warning if a sample of 16-bit images uses only a small part of the 65,536 values."""
    peaks = []
    for path in paths[:: max(1, len(paths) // SAMPLE)]:
        with suppress(Exception), Image.open(root / path) as image:  # reported when it is decoded
            if image.mode.startswith("I") and image.width * image.height <= (Image.MAX_IMAGE_PIXELS or math.inf):
                peaks.append(int(np.asarray(image).max()))
    is_dark = peaks and max(peaks) < DARK
    return [f"16-bit images are almost black: values up to {max(peaks)} of 65535; rescale them"] if is_dark else []


def _unequal_classes(images: Sequence[tuple[Entry, str]]) -> Iterator[str]:
    counts = Counter(name for _, name in images).most_common()
    if few := [f"{name} ({count})" for name, count in counts if count < FEW_IMAGES]:
        yield f"fewer than {FEW_IMAGES} images of {', '.join(few)}"
    (largest, most), (smallest, least) = counts[0], counts[-1]
    if most >= UNEQUAL * least:
        yield f"{most:,} images of {largest} and {least:,} of {smallest}; see data.balance and val/balanced_acc"


def _copies(images: Sequence[tuple[Entry, str]], are_split_later: bool) -> Iterator[str]:
    first: dict[str, tuple[Entry, str]] = {}
    same: list[str] = []
    contrary: list[str] = []
    for image, name in images:
        if image.digest not in first:
            first[image.digest] = image, name
            continue
        original, label = first[image.digest]
        (same if label == name else contrary).append(f"{image.path} = {original.path}")
    yield from _note(f"identical to another image{', perhaps in the test split' * are_split_later}", same)
    yield from _note("identical to an image with a different label", contrary)


def _odd_sizes(images: Sequence[tuple[Entry, str]], size: int, fit: str) -> Iterator[str]:
    sides = [(min(i.width, i.height), max(i.width, i.height), f"{i.path} ({i.width} x {i.height})") for i, _ in images]
    small = [text for short, side, text in sides if 2 * (side if fit == "pad" else short) < size]
    long = [text for short, side, text in sides if side > LONG * short and fit == "crop"]
    yield from _note(f"upscaled by more than 2x, to {size} pixels", small)
    yield from _note(f"more than {LONG} times as long as wide (data.fit=pad keeps everything, crop does not)", long)


def _note(what: str, cases: Sequence[str]) -> list[str]:
    if not cases:
        return []
    number = f"{len(cases):,} images are" if len(cases) > 1 else "1 image is"
    return [f"{number} {what}: {', '.join(cases[:3])}{', ...' if len(cases) > 3 else ''}"]
