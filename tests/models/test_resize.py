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


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 24, 32, 96])
def test_boxes_give_the_same_as_interpolation_of_the_crops(mode: str, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    starts, ends = (
        torch.randint(0, 17, (20, 2), generator=generator),
        torch.randint(17, 33, (20, 2), generator=generator),
    )
    boxes = torch.cat([starts, ends - starts], 1).float()
    boxes[:3] = torch.tensor([[0, 0, 32, 32], [5, 9, 1, 2], [31, 30, 1, 2]])
    images = torch.rand(20, 3, 32, 32, generator=generator)
    resize = Resize(32, size, mode)
    out = resize(images, boxes)
    blank = torch.rand(20, 3, 32, 32, generator=generator)
    for i, (top, left, height, width) in enumerate(boxes.long().tolist()):
        crop = images[i : i + 1, :, top : top + height, left : left + width]
        blank[i, :, top : top + height, left : left + width] = crop[0]
        rows = interpolate(crop, (size, width), mode=mode, antialias=size < height)
        expected = interpolate(rows, (size, size), mode=mode, antialias=size < width)
        assert torch.allclose(out[i], expected[0], atol=1e-5), (top, left, height, width)
        assert torch.equal(resize(images[i : i + 1], boxes[i : i + 1])[0], out[i]), "depends on the other images"
    assert torch.equal(resize(blank, boxes), out), "depends on pixels outside"
    whole = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(20, -1)
    assert torch.allclose(resize(images, whole), resize(images), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(images, boxes), out)


def test_boxes_are_exact_with_another_default_dtype() -> None:
    resize, images = Resize(256, 224, "bicubic"), torch.rand(2, 3, 256, 256)
    boxes = torch.tensor([[10.0, 20.0, 200.0, 190.0], [0.0, 0.0, 256.0, 256.0]])
    expected = resize(images, boxes)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does in a step with trainer.precision=bf16-true
    try:
        assert torch.equal(resize(images, boxes), expected)
    finally:
        torch.set_default_dtype(torch.float32)
