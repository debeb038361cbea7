from __future__ import annotations

import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plots.figures import CIFAR10, pictures, shown, strings

from cifar10_tl.plots.image_grid import prediction_grid, sample_grid


def test_each_picture_is_shown_once_above_its_title() -> None:
    images = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(10)])
    fig = sample_grid(images, [[(name, "")] for name in CIFAR10], heading="Inputs", columns=4)
    assert strings(fig) == ["Inputs", *CIFAR10]
    mosaic = np.asarray(fig.axes[0].images[0].get_array())
    values, pixels = np.unique(mosaic, return_counts=True)
    assert values.tolist() == [*range(10), 255]
    assert pixels.tolist() == [32 * 32 * 3] * 10 + [mosaic.size - 10 * 32 * 32 * 3]


def test_small_pictures_are_drawn_pixel_for_pixel() -> None:
    images = pictures(1)
    fig = sample_grid(images, [[("cat", "")]], heading="Inputs")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    rows = np.asarray(canvas.buffer_rgba())[..., :3]
    left, top = (round(v) for v in fig.axes[0].transData.transform((fig.axes[0].images[0].get_extent()[0], 0)))
    top = rows.shape[0] - top
    np.testing.assert_array_equal(rows[top : top + 96 : 3, left : left + 96 : 3], images[0])  # 3 dots per pixel


def test_predictions_are_marked_and_incorrect_ones_have_the_true_class() -> None:
    table = np.array([[1.0, 0.0, 0.0], [0.004, 0.996, 0.0], [0.1, 0.0003, 0.8997], [np.nan] * 3])
    labels, predicted, names = np.array([0, 0, 1, 0]), np.array([0, 1, 2, 0]), ["cat", "$dog$", "frog"]
    fig = prediction_grid(pictures(4), labels, predicted, table, names, heading="Predictions")
    note, *captions = strings(fig)[1:]
    assert note == "✓ correct    ✗ incorrect    % = probability of that class"
    assert captions[:3] == ["✓ cat 100%", "✗ $dog$ 99.6%", "true: cat 0.4%"]
    assert captions[3:] == ["✗ frog 90.0%", "true: $dog$ <0.1%", "✓ cat n/a"]
    colors = {text.get_text()[0]: text.get_color() for text in shown(fig)[2:]}
    assert colors["✓"] != colors["✗"]
    nothing = (pictures(0), labels[:0], labels[:0], table[:0], names)
    assert "no such predictions" in strings(prediction_grid(*nothing, heading="Incorrect"))


def test_a_long_name_keeps_both_ends_and_its_percentage() -> None:
    names = [f"golden_retriever_of_the_north_{i}" for i in range(2)]
    table = np.array([[0.75, 0.25]])
    incorrect, true = strings(prediction_grid(pictures(1), np.array([1]), np.array([0]), table, names, heading="h"))[2:]
    assert re.fullmatch(r"✗ golden_\w*…\w+_0 75\.0%", incorrect)
    assert re.fullmatch(r"true: golden_\w*…\w+_1 25\.0%", true)
    mixed = [[("Rhododendron " * 4, " 81%"), ("hexagon", " 19%")]]
    long, short = strings(sample_grid(pictures(1), mixed, heading="h"))[1:]
    assert re.fullmatch(r"Rhodo.*….* 81%", long)
    assert short == "hexagon 19%"
