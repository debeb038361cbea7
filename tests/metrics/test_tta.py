from __future__ import annotations

import torch

from cifar10_tl.data.batch import Split
from cifar10_tl.metrics.tta import View, additional_views

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_flip_adds_the_mirror_image() -> None:
    (mirror,) = additional_views("flip")
    assert torch.equal(mirror(IMAGES), IMAGES.flip(3))


def test_flip_shift_has_six_different_views_with_a_reflected_border() -> None:
    views = [IMAGES, *(view(IMAGES) for view in additional_views("flip_shift"))]
    assert len(views) == 6
    assert all(view.dtype == torch.uint8 and view.shape == IMAGES.shape for view in views)
    assert not any(torch.equal(views[i], views[j]) for i in range(6) for j in range(i))
    up_left, down_right = views[2], views[4]
    assert torch.equal(up_left[..., :-1, :-1], IMAGES[..., 1:, 1:])
    assert torch.equal(down_right[..., 1:, 1:], IMAGES[..., :-1, :-1])
    assert torch.equal(up_left[..., -1, :-1], IMAGES[..., -2, 1:])


def test_a_view_of_a_split_is_computed_for_the_images_that_are_read() -> None:
    split = Split(IMAGES, torch.arange(4)).subset(torch.tensor([1, 3]))
    seen = []

    def darker(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images // 2

    view = Split(View(split, darker), split.labels, split.indices)
    assert torch.equal(view[torch.tensor([1])].images, IMAGES[[3]] // 2)
    assert (seen, view.shape) == ([1], (2, 3, 8, 8))
