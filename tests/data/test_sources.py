from __future__ import annotations

import hashlib
import io
import pickle
import runpy
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from PIL import Image
from torchvision.datasets import CIFAR10

from cifar10_tl.config.errors import UserError
from cifar10_tl.data import sources
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.sources import Cifar10, Shapes

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
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()))
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
    assert " ".join(source.class_names) == "airplane automobile bird cat deer dog frog horse ship truck"
    path.unlink()  # a second call needs neither the network nor the archive
    (tmp_path / "data" / path.name).unlink()
    source.prepare()


def test_partial_copy_is_completed_from_the_archive(archive: Archive) -> None:
    path, *_ = archive
    (path.parent / "cifar-10-batches-py").mkdir()
    (path.parent / "cifar-10-batches-py" / "test_batch").write_bytes(b"partial")
    source = Cifar10(str(path.parent), [])
    source.prepare()
    assert len(source.load()["train"].labels) == 20


def test_the_download_script_writes_jpeg_files_in_the_official_order(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images, labels = archive
    Cifar10(str(path.parent), []).prepare()
    monkeypatch.setattr(sys, "argv", ["download.py", "--root", str(path.parent), "--jpeg", str(tmp_path / "jpeg")])
    runpy.run_path(str(REPOSITORY / "scripts" / "download.py"), run_name="__main__")
    for split, originals, own in (("train", images[:5], labels[:5].flatten()), ("test", images[5], labels[5])):
        candidates = originals.reshape(-1, 3, 32, 32).astype(float)
        for label, name in enumerate(Cifar10.class_names):
            files = sorted((tmp_path / "jpeg" / split / name).iterdir())
            pixels = [np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]
            nearest = [int(((candidates - image) ** 2).sum((1, 2, 3)).argmin()) for image in pixels]
            assert nearest == np.flatnonzero(own == label).tolist()
    assert Image.open(tmp_path / "jpeg" / "train" / "deer" / "0000.jpg").quantization[0][0] == 8, "quality 75"


def test_archive_without_cifar10_is_rejected(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = archive
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with pytest.raises(UserError, match="does not contain CIFAR-10"):
        Cifar10(str(path.parent), []).prepare()


def test_another_archive_is_never_extracted(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a checkpoint says: those of earlier versions hold a checksum."""
    path, *_ = archive
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    options: dict[str, Any] = {"root": str(path.parent), "mirrors": [], "md5": md5(path.read_bytes())}
    with pytest.raises(UserError, match=r"save it as .* \(md5 0000"):
        CIFAR10DataModule(source="cifar10", **options).prepare_data()
    assert not (path.parent / "cifar-10-batches-py").exists()


def test_shapes_of_train_and_test_differ() -> None:
    splits = Shapes(train_size=50, test_size=20).load()
    assert splits["train"].images.shape == (50, 3, 32, 32)
    assert splits["test"].images.shape == (20, 3, 32, 32)
    assert not torch.equal(splits["train"].images[:20], splits["test"].images)
    assert not torch.equal(Shapes(50, 20, drawing_seed=1).load()["train"].images, splits["train"].images)
