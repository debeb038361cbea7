from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import StepLosses, compose_train
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.feature_cache import CHUNK, FeatureCache, Processes, tensors_checksum
from cifar10_tl.evaluate import evaluate
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

Small = Callable[..., DictConfig]
IMAGES = torch.randint(0, 256, (2 * CHUNK + 40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Extractor:
    """Features that are easy to tell, and a count of the images they were computed for."""

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
def test_features_come_back_to_the_last_bit_and_are_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = Extractor(dtype), Extractor(dtype)
    (built,) = views(tmp_path, first)
    (found,) = views(tmp_path, second)
    expected = IMAGES.flatten(1)[:, :5].to(dtype)
    assert built.dtype == dtype
    assert torch.equal(built, expected)
    assert torch.equal(found, expected)
    assert first.seen == len(IMAGES) + 1, "one image tells shape and type"
    assert second.seen == 1


def test_the_mirrored_view_is_that_of_the_mirror_images(tmp_path: Path) -> None:
    plain, mirrored = views(tmp_path, Extractor(), mirrored=True)
    assert torch.equal(plain, IMAGES.flatten(1)[:, :5].bfloat16())
    assert torch.equal(mirrored, IMAGES.flip(-1).flatten(1)[:, :5].bfloat16())
    again = Extractor()
    views(tmp_path, again)
    assert again.seen == 1, "the plain view is there already"


def test_other_weights_settings_or_images_make_another_file(tmp_path: Path) -> None:
    views(tmp_path, Extractor(), weights="a", image_size=32)
    for other in ({"weights": "b", "image_size": 32}, {"weights": "a", "image_size": 64}):
        extract = Extractor()
        views(tmp_path, extract, **other)
        assert extract.seen == len(IMAGES) + 1
    extract = Extractor()
    cache = FeatureCache(tmp_path, extract, lambda: {"weights": "a", "image_size": 32})
    other_images = IMAGES.clone()
    other_images[-1, 0, 0, 0] ^= 1
    cache.views("train", other_images, mirrored=False)
    assert extract.seen == len(IMAGES) + 1
    assert len(list(tmp_path.glob("*.bin"))) == 4
    described = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert described["shape"] == [len(IMAGES), 5]
    assert described["dtype"] == "bfloat16"


def test_a_build_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt):
        views(tmp_path, Extractor(stop_after=CHUNK))
    extract = Extractor()
    (features,) = views(tmp_path, extract)
    assert torch.equal(features, IMAGES.flatten(1)[:, :5].bfloat16())
    assert extract.seen == 1 + len(IMAGES) - CHUNK
    assert "1 of 3 chunks are there already" in caplog.text


@pytest.mark.parametrize("harm", ["bit", "cut", "journal", "no journal"])
def test_what_a_disk_has_spoiled_is_computed_anew(tmp_path: Path, harm: str) -> None:
    views(tmp_path, Extractor())
    (file,), (journal,) = tmp_path.glob("*.bin"), tmp_path.glob("*.journal")
    if harm == "bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif harm == "journal":
        journal.write_bytes(journal.read_bytes()[:20])
    else:
        journal.unlink()
    extract = Extractor()
    (features,) = views(tmp_path, extract)
    assert torch.equal(features, IMAGES.flatten(1)[:, :5].bfloat16())
    assert extract.seen == 1 + (len(IMAGES) if harm == "no journal" else 40), "only the last chunk is spoiled"


def test_processes_share_the_chunks(tmp_path: Path) -> None:
    extracts = [Extractor(), Extractor()]
    for rank, extract in enumerate(extracts):
        cache = FeatureCache(tmp_path, extract, dict, Processes(rank, 2))
        (features,) = cache.views("train", IMAGES, mirrored=False)
    assert [e.seen - 1 for e in extracts] == [CHUNK + 40, CHUNK]
    assert torch.equal(features, IMAGES.flatten(1)[:, :5].bfloat16())


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need 0\.00 GB.*0\.00 GB free.*paths\.cache_dir.*data\.image_limit"):
        views(tmp_path, Extractor())
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_tells_tensors_names_and_types_apart() -> None:
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


# ------------------------------------------------------------------------------------------------------ in a whole run


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
    """A function that runs a probe, cached or not; the losses of its steps, and its folder."""

    def run(name: str, *overrides: str) -> tuple[list[float], Path]:
        cfg = small_cfg(*PROBE, *overrides, f"paths.cache_dir={tmp_path / 'cache'}", run=name)
        StepLosses.seen.clear()
        train(cfg)
        return list(StepLosses.seen), Path(cfg.paths.output_dir)

    return run


@pytest.mark.parametrize(
    ("head", "flip"), [("model/head=dense", "true"), ("model/head=lstm", "false"), ("model/head=lstm", "true")]
)
def test_a_probe_learns_and_predicts_the_same_with_and_without_cache(
    probe: Callable[..., tuple[list[float], Path]], tmp_path: Path, head: str, flip: str
) -> None:
    options = ("data.train_size=280", "trainer.max_epochs=2", f"data.augment.horizontal_flip={flip}", head)
    options += ("model.head.hidden=[32]", "model.head.dropout=0.5")  # drawn by the batch: the same for both
    plain, uncached_run = probe("uncached", *options)
    cached, cached_run = probe("cached", *options, "data.cache_features=true")
    assert cached == pytest.approx(plain, rel=1e-4)
    assert len(list((tmp_path / "cache" / "features").glob("*.bin"))) == 3 + (flip == "true"), "train, val and test"

    uncached, from_cache = predictions(uncached_run), predictions(cached_run)
    assert [row["predicted_label"] for row in from_cache] == [row["predicted_label"] for row in uncached]

    # the checkpoint is a whole network: evaluated from the images, it says the same
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

    from cifar10_tl.config.run_dir import CONFIG_DIR

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("evaluate", overrides=[f"checkpoint={checkpoint}", f"paths.output_dir={folder}"])


def test_a_second_run_finds_the_features(
    probe: Callable[..., tuple[list[float], Path]], caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = probe("first", "data.cache_features=true", "data.augment.horizontal_flip=false")
    caplog.clear()
    caplog.set_level("INFO")
    second, _ = probe("second", "data.cache_features=true", "data.augment.horizontal_flip=false", "optimizer.lr=0.01")
    assert [f"features of {name}: found" in caplog.text for name in ("train", "val", "test")] == [True] * 3
    assert second[0] == pytest.approx(first[0], rel=1e-6)
    assert second[-1] != first[-1], "another rate"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.cache_features=true"], r"add model\.freeze=backbone"),
        (["experiment=probe", "data.augment.random_crop_padding=4"], r"add data\.augment\.random_crop_padding=0"),
        (["experiment=probe", "data.augment.mix=mixup"], r"add data\.augment\.mix=none"),
        (["experiment=probe", "data.augment.random_erasing=0.5"], r"add data\.augment\.random_erasing=0"),
        (["experiment=probe", "data.augment.color_jitter=0.5"], r"add data\.augment\.color_jitter=0"),
    ],
)
def test_settings_that_contradict_a_cache(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose_train(*overrides)
