from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from cifar10_tl.data.image_cache import Entry
from cifar10_tl.data.inspection import dark_images, inspect_images

numbers = count()


def images(name: str, number: int, size: tuple[int, int] = (100, 100), digest: str = "") -> list[tuple[Entry, str]]:
    """Return images of a class that differ from all others, unless they are given a digest."""
    found = []
    for _ in range(number):
        unique = f"{name}{next(numbers)}"
        found.append((Entry(f"{unique}.png", [], 0, *size, digest or unique), name))
    return found


def test_nothing_is_said_about_ordinary_images() -> None:
    train = [*images("ant", 10), *images("bee", 49)]
    assert inspect_images({"train": train, "test": [*images("ant", 10), *images("bee", 10)]}, 200) == []


def test_16_bit_images_of_small_values_are_reported(tmp_path: Path) -> None:
    for i, peak in enumerate((4095, 3000)):
        Image.fromarray(np.full((8, 8), peak, np.uint16)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    names = ["0.png", "1.png", "2.png", "missing.png"]
    assert dark_images(tmp_path, names) == ["16-bit images are almost black: values up to 4095 of 65535; rescale them"]
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(tmp_path / "1.png")
    assert dark_images(tmp_path, names) == dark_images(tmp_path, names[2:]) == []


def test_unequal_classes() -> None:
    assert inspect_images({"train": [*images("ant", 9), *images("bee", 45)]}, 100) == [
        "train: fewer than 10 images of ant (9)",
        "train: 45 images of bee and 9 of ant; see data.balance and val/balanced_acc",
    ]


def test_copies_within_a_split_and_of_training_images() -> None:
    original, *copies = images("ant", 5, digest="x")
    other = images("bee", 1, digest="x")
    train = [original, *copies, *other, *images("ant", 10), *images("bee", 10)]
    test = [*images("ant", 10), *images("bee", 9), *images("bee", 1, digest="x")]
    names = [image.path for image, _ in (original, *copies, *other, test[-1])]
    assert inspect_images({"train": train, "test": test}, 100) == [
        f"train: 4 images are identical to another image: {', '.join(f'{n} = {names[0]}' for n in names[1:4])}, ...",
        f"train: 1 image is identical to an image with a different label: {names[5]} = {names[0]}",
        f"test: 1 image is also in train, which inflates the accuracy: {names[6]} = {names[5]}",
    ]


def test_small_and_long_images() -> None:
    usual = [*images("ant", 10), *images("bee", 10)]
    small, fine = images("bee", 1, (300, 49)), images("bee", 1, (50, 150))
    assert inspect_images({"train": [*usual, *small, *fine]}, 100) == [
        f"train: 1 image is upscaled by more than 2x, to 100 pixels: {small[0][0].path} (300 x 49)",
        "train: 1 image is more than 3 times as long as wide (data.fit=pad keeps everything, crop does not): "
        f"{small[0][0].path} (300 x 49)",
    ]


def test_an_image_listed_twice_is_a_copy() -> None:
    usual = [*images("ant", 10), *images("bee", 10)]
    path = usual[0][0].path
    assert inspect_images({"train": [*usual, usual[0]]}, 100) == [
        f"train: 1 image is identical to another image, perhaps in the test split: {path} = {path}"
    ]


def test_the_longer_side_of_padded_images_counts() -> None:
    train = [*images("ant", 10, (100, 350)), *images("bee", 10)]
    assert inspect_images({"train": train, "test": train[9:]}, 224, "pad")[:1] == [
        "train: 10 images are upscaled by more than 2x, to 224 pixels: "
        + ", ".join(f"{image.path} (100 x 100)" for image, _ in train[10:13])
        + ", ..."
    ]
