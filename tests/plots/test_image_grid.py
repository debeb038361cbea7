from __future__ import annotations

import re

import numpy as np
import pytest
from plots.figures import CIFAR10, pictures, rendered, shown, strings

from cifar10_tl.plots.image_grid import sample_grid


def test_each_picture_is_shown_once_above_its_title() -> None:
    images = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(10)])
    fig = sample_grid(images, [[(name, "")] for name in CIFAR10], heading="Inputs", columns=4)
    assert strings(fig) == ["Inputs", *CIFAR10]
    mosaic = np.asarray(fig.axes[0].images[0].get_array())
    values, pixels = np.unique(mosaic, return_counts=True)
    assert values.tolist() == [*range(10), 255]
    assert pixels.tolist() == [32 * 32 * 3] * 10 + [mosaic.size - 10 * 32 * 32 * 3]
    left, right, *_ = fig.axes[0].images[0].get_extent()
    pixel = (right - left) / mosaic.shape[1]
    for i, title in enumerate(shown(fig)[1:]):
        rows, columns = (mosaic[..., 0] == i).nonzero()
        x, y = title.get_position()
        assert x == pytest.approx(left + columns.min() * pixel)
        assert 0 < y - (rows.max() + 1) * pixel < 0.2


def test_small_pictures_are_drawn_pixel_for_pixel() -> None:
    images = pictures(1)
    fig = sample_grid(images, [[("cat", "")]], heading="Inputs")
    rows = rendered(fig)
    left, top = (round(v) for v in fig.axes[0].transData.transform((fig.axes[0].images[0].get_extent()[0], 0)))
    top = rows.shape[0] - top
    np.testing.assert_array_equal(rows[top : top + 96 : 3, left : left + 96 : 3], images[0])  # 3 dots per pixel


def test_a_long_name_keeps_both_ends_and_its_percentage() -> None:
    mixed = [[("Rhododendron " * 4, " 81%"), ("hexagon", " 19%")]]
    long, short = strings(sample_grid(pictures(1), mixed, heading="h"))[1:]
    assert re.fullmatch(r"Rhodo.*….* 81%", long)
    assert short == "hexagon 19%"
