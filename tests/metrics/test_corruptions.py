from __future__ import annotations

import pytest
import torch

from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.metrics.corruptions import CORRUPTIONS, corrupt


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_changes_grow_with_severity_and_are_deterministic(kind: str) -> None:
    images = draw_shapes(60, seed=5)[0]
    original, state = images.clone(), torch.get_rng_state()
    corrupted = [corrupt(images, kind, severity) for severity in range(1, 6)]
    changes = [float((result.float() - images.float()).abs().mean()) for result in corrupted]
    assert 0.5 < changes[0] < changes[1] < changes[2] < changes[3] < changes[4]
    assert all(result.dtype == torch.uint8 and result.shape == images.shape for result in corrupted)
    assert torch.equal(corrupt(images, kind, 3), corrupted[2])
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_normal_and_differs_between_images_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar10_tl.metrics.corruptions._CHUNK_SIZE", 15)
    gray = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    noise = (corrupt(gray, "noise", 4).float() - 128) / 255
    assert float(noise.mean()) == pytest.approx(0, abs=0.001)
    assert float(noise.std()) == pytest.approx(0.11, rel=0.02)
    assert float((noise.abs() < 0.11).float().mean()) == pytest.approx(0.6827, abs=0.01)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert float(correlation.abs().max()) < 0.09  # 5 standard deviations of independent images
