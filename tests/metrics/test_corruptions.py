from __future__ import annotations

import pytest
import torch

from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.metrics.corruptions import CORRUPTIONS, corrupted

KINDS = list(CORRUPTIONS)


def some_images(real_images: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    images = draw_shapes(60, seed=5)[0] if real_images is None else torch.from_numpy(real_images["x_test"][:60])
    return images, torch.arange(60) + 7


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def check_that_strength_grows(images: torch.Tensor, indices: torch.Tensor, kind: str) -> None:
    changes = [change(corrupted(images, indices, kind, severity), images) for severity in range(1, 6)]
    assert changes[0] > 0.5
    assert changes == sorted(changes)
    assert len(set(changes)) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_change_more_with_each_severity(kind: str) -> None:
    check_that_strength_grows(*some_images(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_so_they_do_on_real_images(kind: str, real_images: dict) -> None:
    check_that_strength_grows(*some_images(real_images), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_image_becomes_depends_on_nothing_around_it(kind: str) -> None:
    images, indices = some_images()
    before = images.clone()
    whole = corrupted(images, indices, kind, 3)
    assert torch.equal(images, before)
    assert (whole.dtype, whole.shape) == (torch.uint8, images.shape)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(corrupted(images[order], indices[order], kind, 3), whole[order])


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    images, indices = some_images()
    whole = corrupted(images, indices, "noise", 2)
    monkeypatch.setattr("cifar10_tl.metrics.corruptions._CHUNK", 7)
    assert torch.equal(corrupted(images, indices, "noise", 2), whole)


def test_noise_is_normal_with_its_deviation_and_its_own_for_each_index() -> None:
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    noise = (corrupted(grey, torch.arange(40), "noise", 4).float() - 128) / 255
    assert float(noise.mean()) == pytest.approx(0, abs=0.001)
    assert float(noise.std()) == pytest.approx(0.11, rel=0.02)
    within = float((noise.abs() < 0.11).float().mean())
    assert within == pytest.approx(0.6827, abs=0.01)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert float(correlation.abs().max()) < 0.09  # 5 standard deviations of independent ones


def test_contrast_and_brightness_by_hand() -> None:
    image = torch.tensor([0, 100, 200, 100], dtype=torch.uint8).expand(1, 3, 1, 4)  # mean grey is 99.99
    assert corrupted(image, torch.tensor([0]), "contrast", 3)[0, 0, 0].tolist() == [55, 100, 145, 100]
    assert corrupted(image, torch.tensor([0]), "brightness", 5)[0, 0, 0].tolist() == [128, 228, 255, 228]


def test_what_is_not_there_is_an_error() -> None:
    images, indices = some_images()
    for kind, severity in (("fog", 1), ("blur", 0), ("blur", 6)):
        with pytest.raises(ValueError, match=f"{kind} at severity {severity}"):
            corrupted(images, indices, kind, severity)
