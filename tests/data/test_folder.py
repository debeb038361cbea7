from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import lock
from PIL import Image

from cifar10_tl.config.errors import UserError
from cifar10_tl.data import image_cache, images
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.folder import Folder


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


def folder_of(root: Path, **options: Any) -> Folder:
    return Folder(str(root), **{"cache_dir": str(root.parent / "cache"), "native_size": 32, **options})


def pixels(source: Folder, split: str = "train") -> torch.Tensor:
    images = source.load()[split].images
    return images.take(torch.arange(images.shape[0]))


def write(path: Path, color: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_a_folder_is_read_by_class_and_file_name(pictures: Path) -> None:
    source = folder_of(pictures)
    assert source.class_names == ("ant", "bee", "wasp")
    splits = source.load()
    assert set(splits) == {"train", "test"}
    train = splits["train"]
    images = pixels(source)
    assert images.shape == train.images.shape == (14, 3, 32, 32)
    assert train.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 5
    assert images[1, :, 0, 0].tolist() == [60, 10, 0]  # ant/1.png
    assert (images[4, 0].int() - 250).abs().max() <= 3  # ant/large.jpg, resized
    assert (images[13] == 77).all()  # wasp/gray.webp as three equal channels
    paths = [f"train/{name}/{i}.png" for name in ("ant", "bee", "wasp") for i in range(4)]
    assert train.paths == [*paths[:4], "train/ant/large.jpg", *paths[4:], "train/wasp/gray.webp"]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from now on."""
    names: list[str] = []
    decode = image_cache.decode_sized
    monkeypatch.setattr(
        image_cache,
        "decode_sized",
        lambda path, size, fit: names.append(os.path.basename(path)) or decode(path, size, fit),
    )
    return names


def test_only_files_that_changed_are_decoded_again(pictures: Path, decoded: list[str]) -> None:
    first = pixels(folder_of(pictures))
    assert len(decoded) == 14 + 6
    assert torch.equal(pixels(folder_of(pictures)), first)
    write(pictures / "train" / "ant" / "new.png", (1, 2, 3))
    write(pictures / "train" / "bee" / "0.png", (9, 9, 9))
    (pictures / "train" / "wasp" / "3.png").unlink()
    changed = pixels(folder_of(pictures))
    assert sorted(decoded[20:]) == ["0.png", "new.png"]
    assert changed[5, :, 0, 0].tolist() == [1, 2, 3]  # after ant/large.jpg
    assert changed[6, :, 0, 0].tolist() == [9, 9, 9]
    assert torch.equal(changed[[*range(5), 7, 8, 9, 10, 11, 12, 13]], first[[*range(5), 6, 7, 8, 9, 10, 11, 13]])
    size = folder_of(pictures).cache.pixels.stat().st_size
    assert size == (14 + 6 + 2) * 3 * 32 * 32


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
        assert caplog.text.count("left out 2 paths: ") == 1
        with pytest.raises(UserError, match=r"use 2 paths: .*notes\.txt \(not an image.*cut\.png \(.*skip_bad=true"):
            folder_of(pictures).load()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_image_that_may_be_readable_later_is_not_left_out(
    pictures: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(images, "to_pixels", Mock(side_effect=error))
        with pytest.raises(UserError, match=r"0\.png \((Input/output error|MemoryError)\); try again"):
            folder_of(pictures, skip_bad=True).prepare()
    source = folder_of(pictures, skip_bad=True)
    source.prepare()
    assert len(source.load()["train"].labels) == 14


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
    with pytest.raises(UserError, match=r"1 path: .*gone\.png \(No such file"):
        folder_of(pictures).load()


def test_paths_are_text_even_if_a_file_name_is_not(pictures: Path) -> None:
    os.rename(pictures / "test" / "ant" / "0.png", os.fsencode(pictures / "test" / "ant") + b"/\xe9,\n.png")
    for _ in range(2):  # decoded, and from the cache
        assert (folder_of(pictures).load()["test"].paths or ())[1] == "test/ant/\\udce9,\n.png"


def test_validation_folder_is_used(pictures: Path) -> None:
    shutil.copytree(pictures / "test", pictures / "val")
    assert set(folder_of(pictures).load()) == {"train", "val", "test"}


def test_other_data_without_splits_are_a_test_split_as_a_whole(pictures: Path, tmp_path: Path) -> None:
    def sizes(root: Path, **options: Any) -> dict[str, int]:
        source = folder_of(root, test_only=True, **options)
        source.prepare()
        return {split: len(images.labels) for split, images in source.load().items()}

    assert sizes(pictures) == {"train": 14, "test": 6}
    assert sizes(pictures / "train") == {"test": 14}
    shutil.move(pictures / "train", tmp_path)
    assert sizes(pictures) == {"test": 6}
    (tmp_path / "labels.csv").write_text("path,label\ntest/bee/0.png,bee\ntest/ant/0.png,ant\n")
    assert sizes(pictures, labels=str(tmp_path / "labels.csv")) == {"test": 2}
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(UserError, match="at least 2 classes, but has 0"):
        sizes(pictures, labels=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train").rename(root / "trains"), r"has no training images \(splits: test\)"),
        (lambda root: shutil.copytree(root / "test", root / "Testing"), "Testing and test are the same split"),
        (lambda root: shutil.rmtree(root), "there is no such folder"),
        (lambda root: (root / "test/ant").rename(root / "test/fly"), "no images in train of class fly"),
        (lambda root: [f.unlink() for f in (root / "test/ant").iterdir()], "no images in test of class ant"),
        (lambda root: [shutil.rmtree(f) for f in [*root.glob("*/ant"), *root.glob("*/bee")]], "2 classes, but has 1"),
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
        images = pixels(folder_of(tmp_path / parent / "images", cache_dir=cache))
        assert (images[:, 0] == value).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_unreadable_folders_and_images_outside_of_class_folders_are_reported(
    pictures: Path, split: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (32, 32)).save(pictures / split / "stray.png")
    locked = pictures / split / "bee" / "locked"
    locked.mkdir()
    lock(monkeypatch, locked)
    with pytest.raises(UserError, match=r"2 paths: .*stray\.png \(not in a class.*bee/locked \(Permission denied\)"):
        folder_of(pictures).load()
    source = folder_of(pictures, skip_bad=True)
    source.prepare()
    assert len(source.load()["train"].labels) == 14
    assert "stray.png" in caplog.text
    with pytest.raises(UserError, match=r"Permission denied\); remove them$"):  # skip_bad needs a cache
        folder_of(pictures, cache=False).load()


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


def test_classes_without_splits_are_split_by_the_datamodule(tmp_path: Path) -> None:
    for label, name in enumerate(("ant", "bee")):
        for i in range(50):
            write(tmp_path / "pets" / name / f"{i}.png", (label, i, 0))
    options = {"source": "folder", "root": str(tmp_path / "pets"), "cache_dir": str(tmp_path / "cache")}
    data = CIFAR10DataModule(**options, native_size=32, val_size=0.1, test_size=20)
    data.prepare_data()
    data.setup()
    assert {name: torch.bincount(split.labels).tolist() for name, split in data.splits.items()} == {
        "train": [36, 36],
        "val": [4, 4],
        "test": [10, 10],
    }
    paths = [path for split in data.splits.values() for path in split.paths]
    assert len({*paths}) == 100
    for split in data.splits.values():
        assert [f"{'ab'[label]}{i}" for label, i, _ in split.images[:, :, 0, 0].tolist()] == [
            f"{path[0]}{Path(path).stem}" for path in split.paths if path
        ]


def test_val_without_test_is_the_test_split(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "train").rename(pictures / "Training")
    (pictures / "test").rename(pictures / "valid")
    write(pictures / "test" / "unlabeled.png")
    splits = folder_of(pictures).load()
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 14, "test": 6}
    assert "ignored folders, which are not train, val or test, or have no folders of classes: test\n" in caplog.text


def test_a_locked_folder_beside_the_splits_is_not_used(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "lost+found").mkdir()
    lock(monkeypatch, pictures / "lost+found")
    assert set(folder_of(pictures).load()) == {"train", "test"}
    assert "or have no folders of classes: lost+found" in caplog.text


def test_splits_with_other_names_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("training_set/cat/1.png", "test_set/cat/1.png", "classes/cat/tabby/1.png", "classes/dog/1.png"):
        write(tmp_path / name)
    shutil.copytree(tmp_path / "training_set", tmp_path / "pets" / "training_set")
    shutil.copytree(tmp_path / "test_set", tmp_path / "pets" / "test_set")
    assert folder_of(tmp_path / "classes").class_names == ("cat", "dog")
    assert not caplog.text
    assert folder_of(tmp_path / "pets").class_names == ("test_set", "training_set")
    assert "if the classes (test_set, training_set) are splits, name them train, val and test" in caplog.text


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    for name in ("train", "bus", "test"):
        write(tmp_path / "vehicles" / name / "a.png")
    source = folder_of(tmp_path / "vehicles")
    assert source.class_names == ("bus", "test", "train")
    assert set(source.load()) == {"train"}


def test_a_table_lists_images_of_any_folder(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / "pictures" / f"{i}.png", (i, 0, 0))
    write(tmp_path / "elsewhere.png", (7, 0, 0))
    table = tmp_path / "labels.csv"
    rows = ["3.png,bee,", "0.png,ant,Training", f'"{tmp_path / "elsewhere.png"}",bee,test', "1.png,ant,test"]
    table.write_text("\n".join(["\ufeffpath,label,split", *rows]))
    source = folder_of(tmp_path / "pictures", labels=str(table))
    splits = source.load()
    assert {name: split.labels.tolist() for name, split in splits.items()} == {"train": [1, 0], "test": [1, 0]}
    assert pixels(source)[:, 0, 0, 0].tolist() == [3, 0]
    assert pixels(source, "test")[:, 0, 0, 0].tolist() == [7, 1]
    table.write_text("path,label\n0.png,ant\n1.png,bee\n")
    assert set(folder_of(tmp_path / "pictures", labels=str(table)).load()) == {"train"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,class\na.png,ant\n", "labels.csv: has no column label"),
        (b"path,label\na.png,ant\nb.png,\n", "labels.csv, line 3: needs a path, a label"),
        (b"path,label,split\na.png,ant,tset\n", "labels.csv, line 2: needs .* train, val or test"),
        (b"path,label,split\na.png,ant,test\n", r"labels.csv: has no training images \(splits: test\)"),
        (b"path,label\n", r"labels.csv: has no training images \(splits: none\)"),
        (b"path,label\n\xff.png,ant\n", "labels.csv: 'utf-8' codec"),
        (b"path,label\na.png,ant\nb.png,bee\n", r"cannot use 2 paths: .*a.png \(No such file or directory\)"),
        (None, "labels.csv: No such file"),
    ],
)
def test_unsuitable_tables_are_reported(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        folder_of(tmp_path, labels=str(tmp_path / "labels.csv")).load()


@pytest.mark.parametrize(
    ("sizes", "image_size", "chosen"),
    [
        ([(32, 32)], 224, 32),  # CIFAR-like: as they are
        ([(64, 64)], 32, 64),
        ([(200, 200)], 224, 200),
        ([(300, 300)], 224, 224),
        ([(32, 48)], 224, 224),
        ([(32, 32), (33, 33)], 224, 224),
        ([(32, 32), (33, 33)], [[0, 96], [0.5, 128]], 128),
    ],
)
def test_native_size_is_chosen(tmp_path: Path, sizes: list[tuple[int, int]], image_size: Any, chosen: int) -> None:
    for name in ("ant", "bee"):
        for i, size in enumerate(sizes):
            write(tmp_path / "pets" / name / f"{i}.png", size=size)
    source = folder_of(tmp_path / "pets", native_size="auto", image_size=image_size)
    assert source.native_size == source.load()["train"].images.shape[-1] == chosen


def test_random_resized_crops_get_a_margin(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write(tmp_path / "pets" / name / "a.png", size=(400, 300))
    options = {"source": "folder", "root": str(tmp_path / "pets"), "cache_dir": str(tmp_path / "cache")}
    sizes = [
        CIFAR10DataModule(**options, image_size=224, augment={"random_resized_crop": crop}).source.native_size  # type: ignore[attr-defined]
        for crop in (None, [0.35, 1])
    ]
    assert sizes == [224, 256]


def test_everything_unusual_is_reported_at_once(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(pictures / "train" / "ant" / "0.png", pictures / "test" / "ant" / "copy.png")
    (pictures / "train" / "bee" / "cut.png").write_bytes(b"")
    source = folder_of(pictures)
    with pytest.raises(UserError, match=r"cannot use 1 path: .*cut\.png"):
        source.prepare()
    assert "test: 7 images are also in train" in caplog.text
    assert "train: fewer than 10 images of ant (5)" in caplog.text


def test_a_cache_or_runs_inside_the_folder_are_no_classes(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write(tmp_path / "data" / name / "a.png")
    for _ in range(2):
        assert folder_of(tmp_path / "data", cache_dir=str(tmp_path / "data" / "cache")).class_names == ("ant", "bee")
        pixels(folder_of(tmp_path / "data", cache_dir=str(tmp_path / "data" / "cache")))
        (tmp_path / "data" / "outputs" / "runs" / "a" / ".hydra").mkdir(parents=True, exist_ok=True)


def test_splits_without_class_folders_are_reported(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "flat" / split / "0.jpg")
    with pytest.raises(UserError, match=r"flat: needs folders of classes, or .*data\.labels=FILE"):
        folder_of(tmp_path / "flat")


def test_padding_is_compared_with_the_chosen_size(pictures: Path) -> None:
    options = {"source": "folder", "root": str(pictures), "augment": {"random_crop_padding": 32}}
    with pytest.raises(UserError, match=r"random_crop_padding=32: must be below the image size of 32 pixels"):
        CIFAR10DataModule(**options, native_size=32)
