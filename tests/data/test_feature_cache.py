from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import StepLosses, compose_train
from omegaconf import DictConfig
from safetensors.torch import load_file

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.feature_cache import CHUNK, FeatureCache, Processes, tensors_checksum
from cifar10_tl.evaluate import evaluate
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

Small = Callable[..., DictConfig]
IMAGES = torch.randint(0, 256, (2 * CHUNK + 40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Extractor:
    """Function with simple features that counts its images."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, stop_after: int | None = None) -> None:
        self.dtype, self.stop_after, self.seen = dtype, stop_after, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.flatten(1)[:, :5].to(self.dtype)


def views(folder: Path, extract: Extractor, *, mirrored: bool = False, **description: Any) -> list[torch.Tensor]:
    return FeatureCache(folder, extract, lambda: description).views("train", IMAGES, mirrored=mirrored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_exact_and_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = Extractor(dtype), Extractor(dtype)
    (built,) = views(tmp_path, first)
    (found,) = views(tmp_path, second)
    expected = IMAGES.flatten(1)[:, :5].to(dtype)
    assert built.dtype == dtype
    assert torch.equal(built, expected)
    assert torch.equal(found, expected)
    assert first.seen == len(IMAGES) + 1, "one image determines shape and type"
    assert second.seen == 1


def test_mirrored_view_has_the_features_of_the_mirror_images(tmp_path: Path) -> None:
    plain, mirrored = views(tmp_path, Extractor(), mirrored=True)
    assert torch.equal(plain, IMAGES.flatten(1)[:, :5].bfloat16())
    assert torch.equal(mirrored, IMAGES.flip(-1).flatten(1)[:, :5].bfloat16())


def test_each_set_of_weights_settings_and_images_has_its_own_file(tmp_path: Path) -> None:
    for description in ({"weights": "a"}, {"weights": "b"}):
        extract = Extractor()
        views(tmp_path, extract, **description)
        assert extract.seen == len(IMAGES) + 1
    changed = IMAGES.clone()
    changed[-1, 0, 0, 0] ^= 1
    FeatureCache(tmp_path, Extractor(), lambda: {"weights": "a"}).views("train", changed, mirrored=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_interrupted_build_is_computed_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        views(tmp_path, Extractor(stop_after=CHUNK))
    assert list(tmp_path.iterdir()) == []
    (features,) = views(tmp_path, Extractor())
    assert torch.equal(features, IMAGES.flatten(1)[:, :5].bfloat16())


def test_truncated_file_is_computed_again(tmp_path: Path) -> None:
    views(tmp_path, Extractor())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    (features,) = views(tmp_path, Extractor())
    assert torch.equal(features, IMAGES.flatten(1)[:, :5].bfloat16())


def test_file_is_readable_by_the_safetensors_library(tmp_path: Path) -> None:
    (features,) = views(tmp_path, Extractor())
    (file,) = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(file)["features"], features)


def test_processes_share_the_work(tmp_path: Path) -> None:
    extracts, found, barrier = [Extractor(), Extractor()], {}, threading.Barrier(2, timeout=20)

    def build(rank: int) -> None:
        processes = Processes(rank, 2, barrier.wait, lambda _: "run")
        cache = FeatureCache(tmp_path, extracts[rank], dict, processes)
        (found[rank],) = cache.views("train", IMAGES, mirrored=False)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.seen - 1 for e in extracts] == [CHUNK + 40, CHUNK]
    for rank in (0, 1):
        assert torch.equal(found[rank], IMAGES.flatten(1)[:, :5].bfloat16())


def test_too_little_disk_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need 0\.00 GB.*0\.00 GB free.*paths\.cache_dir.*data\.image_limit"):
        views(tmp_path, Extractor())
    assert list(tmp_path.iterdir()) == []


def test_checksum_depends_on_names_shapes_types_and_values() -> None:
    weight = torch.zeros(4)
    states: list[Mapping[str, torch.Tensor]] = [
        {"a": weight},
        {"b": weight},
        {"a": weight.view(2, 2)},
        {"a": weight.half()},
        {"a": weight + 1},
    ]
    assert len({tensors_checksum(state) for state in states}) == len(states)
    assert tensors_checksum({"a": torch.zeros(4)}) == tensors_checksum(states[0])


PROBE = (
    "model.freeze=backbone",
    "model.image_size=64",
    "model.head.dropout=0",
    "data.augment.random_crop_padding=0",
    "trainer.deterministic=true",
    "+callbacks.losses={_target_: helpers.StepLosses}",
)


@pytest.fixture
def probe(small_cfg: Small, tmp_path: Path) -> Callable[..., tuple[list[float], Path]]:
    """Return a function that trains a probe and returns its losses and run folder."""

    def run(name: str, *overrides: str) -> tuple[list[float], Path]:
        cfg = small_cfg(*PROBE, *overrides, f"paths.cache_dir={tmp_path / 'cache'}", run=name)
        StepLosses.seen.clear()
        train(cfg)
        return list(StepLosses.seen), Path(cfg.paths.output_dir)

    return run


@pytest.mark.parametrize(("head", "flip"), [("model/head=dense", "true"), ("model/head=lstm", "false")])
def test_probe_is_the_same_with_and_without_cache(
    probe: Callable[..., tuple[list[float], Path]], tmp_path: Path, head: str, flip: str
) -> None:
    options = ("data.train_size=280", "trainer.max_epochs=2", f"data.augment.horizontal_flip={flip}", head)
    options += ("model.head.hidden=[32]", "model.head.dropout=0.5")  # the same random numbers with and without cache
    plain, uncached_run = probe("uncached", *options)
    cached, cached_run = probe("cached", *options, "data.cache_features=true")
    assert cached == pytest.approx(plain, rel=1e-4)
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 3 + (flip == "true"), (
        "train, val and test"
    )

    uncached, from_cache = predictions(uncached_run), predictions(cached_run)
    assert [row["predicted_label"] for row in from_cache] == [row["predicted_label"] for row in uncached]

    # The checkpoint contains the backbone and evaluates images.
    checkpoint = cached_run / "checkpoints" / "best.ckpt"
    backbone = LitClassifier.load_from_checkpoint(checkpoint, weights_only=True).network.backbone
    assert sum(p.numel() for p in backbone.parameters()) > 11e6
    evaluate(compose_evaluate(checkpoint, tmp_path / "evaluated"))
    for a, b in zip(predictions(tmp_path / "evaluated"), from_cache, strict=True):
        assert a["predicted_label"] == b["predicted_label"]
        assert float(a["probability"]) == pytest.approx(float(b["probability"]), abs=1e-4)


def predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def compose_evaluate(checkpoint: Path, folder: Path) -> DictConfig:
    from hydra import compose, initialize_config_dir

    from cifar10_tl.config import CONFIG_DIR

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("evaluate", overrides=[f"checkpoint={checkpoint}", f"paths.output_dir={folder}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.cache_features=true"], r"add model\.freeze=backbone"),
        (["experiment=probe", "data.augment.random_crop_padding=4"], r"add data\.augment\.random_crop_padding=0"),
        (["experiment=probe", "data.augment.mix=mixup"], r"add data\.augment\.mix=none"),
        (["experiment=probe", "data.augment.random_erasing=0.5"], r"add data\.augment\.random_erasing=0"),
        (["experiment=probe", "data.augment.color_jitter=0.5"], r"add data\.augment\.color_jitter=0"),
    ],
)
def test_incompatible_settings_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose_train(*overrides)
