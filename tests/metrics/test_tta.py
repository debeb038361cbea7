from __future__ import annotations

import pytest
import torch

from cifar10_tl.metrics.tta import VIEWS, further_views


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_flip_adds_the_mirror_image() -> None:
    (mirror,) = further_views(images(), "flip")
    assert torch.equal(mirror, images().flip(3))


def test_flip_shift_has_six_different_views_with_the_images_themselves() -> None:
    views = [images(), *further_views(images(), "flip_shift")]
    assert len(views) == 6
    assert all(view.dtype == torch.uint8 and view.shape == images().shape for view in views)
    assert not any(torch.equal(views[i], views[j]) for i in range(6) for j in range(i))
    up_left, down_right = views[2], views[4]
    assert torch.equal(up_left[..., :-1, :-1], images()[..., 1:, 1:])
    assert torch.equal(down_right[..., 1:, 1:], images()[..., :-1, :-1])
    assert torch.equal(up_left[..., -1, :-1], images()[..., -2, 1:])  # the border mirrors


def test_none_adds_nothing_and_another_name_is_an_error() -> None:
    assert list(further_views(images(), "none")) == []
    with pytest.raises(ValueError, match=", ".join(VIEWS)):
        list(further_views(images(), "rotate"))
