from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from cifar10_tl.models.resize import Resize


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 16), (40, 24, 96), (48, 32, 20)])
def test_matrices_give_the_same_as_interpolation(mode: str, height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows = interpolate(images, (size, width), mode=mode, antialias=size < height)
    expected = interpolate(rows, (size, size), mode=mode, antialias=size < width)
    resize = Resize(32, size, mode)
    assert torch.allclose(resize(images), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert resize(images).dtype == torch.float32
        assert torch.allclose(resize(images), expected, atol=1e-5)
