"""Photographs in a folder, from decoding to the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import compose_train
from PIL import Image

from cifar10_tl.train import train

pytestmark = pytest.mark.slow

CLASSES = ("rows", "columns", "checks")


def photograph(rng: np.random.Generator, name: str, width: int, height: int) -> Image.Image:
    """Return a picture of soft colors with a texture of the class, 4 pixels wide, somewhere in its center."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, colors = rng.uniform(0, 6.3), rng.uniform(60, 190, (2, 3))
    blend = (0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) / 80 + rng.uniform(0, 6)))[..., None]
    stripes = {"rows": y // 4 % 2, "columns": x // 4 % 2, "checks": (x // 4 + y // 4) % 2}[name]
    left, top = (rng.uniform(0.35, 0.65) * side for side in (width, height))
    inside = np.hypot(x - left, y - top) < 90
    image = colors[0] * blend + colors[1] * (1 - blend) + ((80 * stripes - 40) * inside)[..., None]
    return Image.fromarray((image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Landscape and portrait photographs of three classes, without splits."""
    root, rng = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(70):
            picture = photograph(rng, name, *((400, 300) if i % 2 else (300, 400)))
            picture.save(root / name / f"{i}.jpg", quality=90)
    return root


def run(photos: Path, tmp_path: Path, *overrides: str) -> float:
    results = train(
        compose_train(
            *("data=folder", f"data.root={photos}", "data.test_size=45", "data.batch_size=16", "trainer.max_epochs=4"),
            *("model.backbone=resnet10", "model.weights=null", "model.image_size=112", "optimizer.backbone_lr_scale=1"),
            *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "callbacks=minimal", "report=none"),
            *(f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={photos.parent / 'cache'}", *overrides),
        )
    )
    assert results is not None
    return float(results["test"]["acc"])


def test_fine_detail_is_seen(photos: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    assert run(photos, tmp_path) >= 0.95
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before, "writes nothing beside the pictures"


def test_fine_detail_is_lost_at_32_pixels(photos: Path, tmp_path: Path) -> None:
    assert run(photos, tmp_path, "data.native_size=32", "trainer.max_epochs=1") < 0.5  # chance: 0.33
