from __future__ import annotations

import torch

from cifar10_tl.metrics.tta import additional_views

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_flip_adds_the_mirror_image() -> None:
    (mirror,) = additional_views(IMAGES, "flip")
    assert torch.equal(mirror, IMAGES.flip(3))


def test_flip_shift_has_six_different_views_with_a_reflected_border() -> None:
    views = [IMAGES, *additional_views(IMAGES, "flip_shift")]
    assert len(views) == 6
    assert all(view.dtype == torch.uint8 and view.shape == IMAGES.shape for view in views)
    assert not any(torch.equal(views[i], views[j]) for i in range(6) for j in range(i))
    up_left, down_right = views[2], views[4]
    assert torch.equal(up_left[..., :-1, :-1], IMAGES[..., 1:, 1:])
    assert torch.equal(down_right[..., 1:, 1:], IMAGES[..., :-1, :-1])
    assert torch.equal(up_left[..., -1, :-1], IMAGES[..., -2, 1:])
