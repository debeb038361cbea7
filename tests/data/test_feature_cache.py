from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import StepLosses, compose_train
from omegaconf import DictConfig
from safetensors.torch import load_file

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.validation import check_config
from cifar10_tl.data.batch import CHUNK, Split
from cifar10_tl.data.feature_cache import FeatureCache, tensors_checksum
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.io import read_csv
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

IMAGES = torch.randint(0, 256, (2 * CHUNK + 40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HOST = socket.gethostname()
PLAIN, MIRRORED = (view.flatten(1)[:, :5].bfloat16() for view in (IMAGES, IMAGES.flip(-1)))


class Extractor:
    """Function with simple features that counts its images."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, stop_after: int | None = None) -> None:
        self.dtype, self.stop_after, self.seen = dtype, stop_after, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.flatten(1)[:, :5].to(self.dtype)


def trainer(rank: int = 0, count: int = 1, barrier: Callable[[], Any] = lambda: None) -> Any:
    strategy = SimpleNamespace(barrier=barrier, broadcast=lambda value: value if count == 1 else "run")
    return SimpleNamespace(local_rank=rank, num_devices=count, world_size=count, strategy=strategy)


def cached(
    folder: Path, extract: Extractor, images: torch.Tensor = IMAGES, mirrored: bool = False, **description: Any
) -> torch.Tensor:
    split = Split(images, torch.zeros(len(images)).long())
    return FeatureCache(folder, extract, lambda: description, trainer()).features("train", split, mirrored=mirrored)


def test_files_of_killed_processes_are_removed_after_a_day(tmp_path: Path) -> None:
    abandoned, recent, other = (
        tmp_path / f".a.safetensors.{host}.tmp" for host in (f"{HOST}.1", f"{HOST}.2", "other.1")
    )
    for file, age in ((abandoned, 25), (recent, 23), (other, 25)):
        file.touch()
        os.utime(file, (time.time() - 3600 * age,) * 2)
    cached(tmp_path, Extractor())
    assert [file.exists() for file in (abandoned, recent, other)] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_exact_and_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = Extractor(dtype), Extractor(dtype)
    for extract in (first, second):
        features = cached(tmp_path, extract)
        assert features.dtype == dtype
        assert torch.equal(features[:, 0], IMAGES.flatten(1)[:, :5].to(dtype))
    assert first.seen == len(IMAGES) + 1, "one image determines shape and type"
    assert second.seen == 1
    (file,) = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(file)["features"], features)


def test_mirrored_view_has_the_features_of_the_mirror_images(tmp_path: Path) -> None:
    assert torch.equal(cached(tmp_path, Extractor(), mirrored=True), torch.stack([PLAIN, MIRRORED], 1))


def test_each_set_of_weights_settings_and_images_has_its_own_file(tmp_path: Path) -> None:
    changed = IMAGES.clone()
    changed[-1, 0, 0, 0] ^= 1
    for images, weights in ((IMAGES, "a"), (IMAGES, "b"), (changed, "a")):
        extract = Extractor()
        cached(tmp_path, extract, images, weights=weights)
        assert extract.seen == len(IMAGES) + 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_file_name_stays_the_same_between_versions(tmp_path: Path) -> None:
    cached(tmp_path, Extractor(), torch.arange(3 * 300 * 16).view(300, 3, 4, 4).byte(), mirrored=True, weights="a")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["e3f64decfc84ff8d8f276525823f96ab.safetensors"]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_an_interrupted_computation_is_continued(tmp_path: Path, seconds: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("cifar10_tl.data.feature_cache.SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, Extractor(stop_after=CHUNK))
    assert not list(tmp_path.glob("*.safetensors"))
    rest = Extractor()
    assert torch.equal(cached(tmp_path, rest)[:, 0], PLAIN)
    assert rest.seen == 1 + CHUNK + 40, "without the first chunk"
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_chunk_that_may_not_be_on_disk_is_computed_again(tmp_path: Path, monkeypatch: Any) -> None:
    def failing_once(descriptor: int) -> None:  # the kernel reports an error once
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cifar10_tl.data.feature_cache.SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(OSError, match="No space left"):
        cached(tmp_path, Extractor())
    again = Extractor()
    assert torch.equal(cached(tmp_path, again)[:, 0], PLAIN)
    assert again.seen == 1 + len(IMAGES)


def test_truncated_files_are_computed_again(tmp_path: Path) -> None:
    cached(tmp_path, Extractor())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(cached(tmp_path, Extractor())[:, 0], PLAIN)


def test_runs_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=20)

    class Slow(Extractor):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if self.seen == 1:  # both have started to compute
                barrier.wait()
            return super().__call__(images)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(partial(cached, tmp_path), [Slow(), Slow()])
    assert torch.equal(first[:, 0], PLAIN)
    assert torch.equal(second[:, 0], PLAIN)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_processes_share_the_work(tmp_path: Path) -> None:
    extracts, found, barrier = [Extractor(), Extractor()], {}, threading.Barrier(2, timeout=20)

    def build(rank: int) -> None:
        cache = FeatureCache(tmp_path, extracts[rank], dict, trainer(rank, 2, barrier.wait))
        found[rank] = cache.features("train", Split(IMAGES, torch.zeros(len(IMAGES))), mirrored=False)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.seen - 1 for e in extracts] == [CHUNK + 40, CHUNK]
    for rank in (0, 1):
        assert torch.equal(found[rank][:, 0], PLAIN)


def test_too_little_disk_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need 0\.00 GB.*0\.00 GB free.*paths\.cache_dir.*data\.image_limit"):
        cached(tmp_path, Extractor())
    assert not list(tmp_path.glob("*.tmp"))


def test_checksum_depends_on_names_shapes_types_and_values() -> None:
    zeros = torch.zeros(4)
    states: list[Mapping[str, torch.Tensor]] = [
        *({"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 2)}, {"a": zeros.half()}, {"a": zeros + 1})
    ]
    assert len({tensors_checksum(state) for state in states}) == len(states)
    assert tensors_checksum({"a": torch.zeros(4)}) == tensors_checksum(states[0])


def test_run_is_the_same_with_and_without_cache(small_cfg: Callable[..., DictConfig], tmp_path: Path) -> None:
    options = (
        *("model.freeze=backbone", "model.image_size=64", "model/head=lstm", "model.head.hidden=[32]"),
        *("model.head.dropout=0.5", "data.augment.random_crop_padding=0", "data.augment.horizontal_flip=alternating"),
        *("data.train_size=96", "data.val_size=32", "data.test_size=32", "data.batch_size=32", "trainer.max_epochs=1"),
        *("callbacks=minimal", "logger=none", "report=none", "+callbacks.losses={_target_: helpers.StepLosses}"),
        f"paths.cache_dir={tmp_path / 'cache'}",
    )
    losses: list[list[float]] = []
    probabilities: list[list[float]] = []
    for cache in ("false", "true"):
        StepLosses.seen.clear()
        train(small_cfg(*options, f"data.cache_features={cache}", run=cache))
        losses.append(list(StepLosses.seen))
        probabilities.append([float(row["probability"]) for row in read_csv(tmp_path / cache / "predictions.csv")])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert probabilities[1] == pytest.approx(probabilities[0], abs=1e-4)
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 3, "train, val and test"
    # The checkpoint contains the backbone, which was not run on the test images.
    checkpoint = tmp_path / "true" / "checkpoints" / "best.ckpt"
    module = LitClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    confidence = module(draw_shapes(32, seed=1)[0]).softmax(1).amax(1)
    assert confidence.tolist() == pytest.approx(probabilities[0], abs=1e-4)


def test_augmentation_that_changes_features_is_rejected() -> None:
    probe = compose_train("experiment=probe")
    changes = {"random_crop_padding": (4, 0), "random_erasing": (0.5, 0), "color_jitter": (0.5, 0), "cutout": (8, 0)}
    others = {"random_resized_crop": ([0.6, 1], "null"), "mix": ("mixup", "none")}
    for key, (value, none) in {**changes, "trivial_augment": (True, "false"), **others}.items():
        cfg = probe.copy()
        cfg.data.augment[key] = value
        with pytest.raises(UserError, match=rf"add data\.augment\.{key}={none} "):
            check_config(cfg)


def test_a_complete_cache_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, Extractor())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("unlink", "write_bytes", "touch"):
        monkeypatch.setattr(Path, name, refuse)
    assert torch.equal(cached(tmp_path, Extractor())[:, 0], PLAIN)
