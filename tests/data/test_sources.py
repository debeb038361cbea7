from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from helpers import lock
from PIL import Image
from torchvision.datasets import CIFAR10

from cifar10_tl.config.errors import UserError
from cifar10_tl.data import sources
from cifar10_tl.data.images import decode_image
from cifar10_tl.data.sources import Cifar10, Folder, Shapes

Archive: TypeAlias = tuple[Path, np.ndarray, np.ndarray]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """A small archive in the layout of CIFAR-10 with checksums that torchvision accepts, its images and labels."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 4, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, (7, 4))
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    files = {n: pickle.dumps({"data": x, "labels": y.tolist()}) for n, x, y in zip(names, images, labels, strict=True)}
    files["batches.meta"] = pickle.dumps({"label_names": list(Cifar10.class_names)})
    path = tmp_path / "served" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    sums = {name: md5(content) for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return path, images.reshape(7, 4, 3, 32, 32), labels


def test_cifar10_is_downloaded_and_read(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images, labels = archive
    monkeypatch.setattr(sources, "download", lambda urls, destination, **_: shutil.copy(path, destination))
    source = Cifar10(str(tmp_path / "data"))
    source.prepare()
    splits = source.load()
    assert torch.equal(splits["train"].images, torch.from_numpy(images[:5].reshape(-1, 3, 32, 32)))
    assert torch.equal(splits["test"].images, torch.from_numpy(images[5]))
    assert splits["train"].labels.tolist() == labels[:5].flatten().tolist()
    assert splits["test"].images.dtype == torch.uint8
    path.unlink()  # a second call needs neither the network nor the archive
    (tmp_path / "data" / path.name).unlink()
    source.prepare()


def test_partial_copy_is_completed_from_the_archive(archive: Archive) -> None:
    path, *_ = archive
    (path.parent / "cifar-10-batches-py").mkdir()
    (path.parent / "cifar-10-batches-py" / "test_batch").write_bytes(b"partial")
    source = Cifar10(str(path.parent), [], md5(path.read_bytes()))
    source.prepare()
    assert len(source.load()["train"].labels) == 20


def test_archive_without_cifar10_is_rejected(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = archive
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with pytest.raises(UserError, match="does not contain CIFAR-10"):
        Cifar10(str(path.parent), [], md5(path.read_bytes())).prepare()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of PNG files with one color each, a larger JPEG and a gray WebP."""
    root = tmp_path / "pictures"
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("bee", "ant", "wasp")):
            for i in range(count):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (60 * label, 10 * i, 0)).save(folder / f"{i}.png")
    Image.new("RGB", (64, 50), (250, 0, 0)).save(root / "train" / "ant" / "large.jpg", quality=95)
    Image.new("L", (32, 32), 77).save(root / "train" / "wasp" / "gray.webp", lossless=True)
    return root


def folder_of(root: Path, **options) -> Folder:
    return Folder(str(root), cache_dir=str(root.parent / "cache"), **options)


def test_a_folder_is_read_by_class_and_file_name(pictures: Path) -> None:
    source = folder_of(pictures)
    assert source.class_names == ("ant", "bee", "wasp")
    splits = source.load()
    assert set(splits) == {"train", "test"}
    train = splits["train"]
    assert train.images.shape == (14, 3, 32, 32)
    assert train.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 5
    assert train.images[1, :, 0, 0].tolist() == [60, 10, 0]  # ant/1.png
    assert (train.images[4, 0].int() - 250).abs().max() <= 3  # ant/large.jpg, resized
    assert (train.images[13] == 77).all()  # wasp/gray.webp as three equal channels
    paths = [f"train/{name}/{i}.png" for name in ("ant", "bee", "wasp") for i in range(4)]
    assert train.paths == [*paths[:4], "train/ant/large.jpg", *paths[4:], "train/wasp/gray.webp"]


def test_cache_is_used_and_written_again_when_outdated_or_damaged(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    monkeypatch.setattr(sources, "decode_image", lambda path, size: decoded.append(path) or decode_image(path, size))
    first = folder_of(pictures).load()
    assert len(decoded) == 14 + 6
    again = folder_of(pictures).load()
    assert len(decoded) == 20
    assert torch.equal(first["train"].images, again["train"].images)
    assert first["train"].paths == again["train"].paths

    Image.new("RGB", (32, 32), (1, 2, 3)).save(pictures / "train" / "ant" / "new.png")
    assert len(folder_of(pictures).load()["train"].labels) == 15
    assert len(decoded) == 20 + 15

    for cache in (pictures.parent / "cache").iterdir():  # truncated, or one byte changed
        content = bytearray(cache.read_bytes())
        content[len(content) // 2] ^= 1
        cache.write_bytes(content if "test" in cache.name else content[:-500])
    assert len(folder_of(pictures).load()["train"].labels) == 15
    assert len(decoded) == 35 + 15 + 6


def test_files_that_are_not_images_are_reported_or_left_out(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "train" / "ant" / "notes.txt").write_text("no image")
    whole = (pictures / "train" / "bee" / "1.png").read_bytes()
    (pictures / "train" / "bee" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # decoded, and from the cache
        caplog.clear()
        source = folder_of(pictures, skip_bad=True)
        source.prepare()
        assert len(source.load()["train"].labels) == len(source.load()["train"].paths or ()) == 14
        assert not {"train/ant/notes.txt", "train/bee/cut.png"} & set(source.load()["train"].paths or ())
        assert caplog.text.count("left out 2 paths in train") == 1
        with pytest.raises(
            UserError, match=r"use 2 paths in train: .*notes\.txt \(not an image.*cut\.png \(.*skip_bad=true"
        ):
            folder_of(pictures).load()


def test_links_are_followed_and_hidden_files_skipped(pictures: Path, tmp_path: Path) -> None:
    ant = pictures / "train" / "ant"
    (ant / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (32, 32)).save(ant / ".ipynb_checkpoints" / "0-checkpoint.png")
    Image.new("RGB", (32, 32)).save(ant / ".hidden.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "elsewhere" / "a.png")
    (ant / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(ant)
    assert len(folder_of(pictures).load()["train"].labels) == 15
    (ant / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"paths in train: .*gone\.png \(No such file"):
        folder_of(pictures).load()


def test_paths_are_text_even_if_a_file_name_is_not(pictures: Path) -> None:
    os.rename(pictures / "test" / "ant" / "0.png", os.fsencode(pictures / "test" / "ant") + b"/\xe9,\n.png")
    for _ in range(2):  # decoded, and from the cache
        assert (folder_of(pictures).load()["test"].paths or ())[1] == "test/ant/\\udce9,\n.png"


def test_validation_folder_is_used(pictures: Path) -> None:
    shutil.copytree(pictures / "test", pictures / "val")
    assert set(folder_of(pictures).load()) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "test").rename(root / "tests"), "there is no folder test"),
        (lambda root: (root / "test/ant").rename(root / "test/fly"), "classes of train and test differ: ant, fly"),
        (lambda root: [f.unlink() for f in (root / "test/ant").iterdir()], "no images of ant"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in ("ant", "bee")], "at least 2 .* but has 1"),
    ],
)
def test_unsuitable_folder_is_reported(pictures: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(pictures)
    with pytest.raises(UserError, match=message):
        folder_of(pictures).load()


def test_equal_folders_in_two_locations_have_separate_caches(tmp_path: Path) -> None:
    for parent, value in (("a", 10), ("b", 200)):
        for split in ("train", "test"):
            for name in ("ant", "bee"):
                file = tmp_path / parent / "images" / split / name / "0.bmp"
                file.parent.mkdir(parents=True)
                Image.new("RGB", (32, 32), (value, 0, 0)).save(file)
                os.utime(file, (0, 0))
    cache = str(tmp_path / "cache")
    for parent, value in (("a", 10), ("b", 200)):
        images = Folder(str(tmp_path / parent / "images"), cache_dir=cache).load()["train"].images
        assert (images[:, 0] == value).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_unreadable_folders_and_images_outside_of_class_folders_are_reported(
    pictures: Path, split: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (32, 32)).save(pictures / split / "stray.png")
    locked = pictures / split / "bee" / "locked"
    locked.mkdir()
    lock(monkeypatch, locked)
    with pytest.raises(UserError, match=r"use 2 paths .*stray\.png \(not in a class.*bee/locked \(Permission denied\)"):
        folder_of(pictures).load()
    source = folder_of(pictures, skip_bad=True)
    source.prepare()
    assert len(source.load()["train"].labels) == 14
    assert "stray.png" in caplog.text


def test_class_names_that_are_not_utf8_are_rejected(pictures: Path) -> None:
    os.mkdir(os.fsencode(pictures / "train") + b"/caf\xe9")
    with pytest.raises(UserError, match="must be valid UTF-8") as caught:
        folder_of(pictures)
    str(caught.value).encode()


def test_unicode_forms_of_a_class_name_are_the_same_class(pictures: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (pictures / "train" / "wasp").rename(pictures / "train" / composed)
    (pictures / "test" / "wasp").rename(pictures / "test" / decomposed)
    source = folder_of(pictures)
    assert source.class_names == ("ant", "bee", composed)
    assert source.load()["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    (pictures / "train" / decomposed).mkdir()
    with pytest.raises(UserError, match="different Unicode forms"):
        folder_of(pictures)


def test_shapes_of_train_and_test_differ() -> None:
    splits = Shapes(train_size=50, test_size=20).load()
    assert splits["train"].images.shape == (50, 3, 32, 32)
    assert splits["test"].images.shape == (20, 3, 32, 32)
    assert not torch.equal(splits["train"].images[:20], splits["test"].images)
    assert not torch.equal(Shapes(50, 20, drawing_seed=1).load()["train"].images, splits["train"].images)
