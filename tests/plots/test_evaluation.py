"""The figures of an evaluation, from its numbers to what is drawn."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.markers import MarkerStyle
from plots.figures import evaluation, scored, shown, strings

from cifar10_tl.data.batch import Split
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.plots import correct_figure, evaluation_figures, incorrect_figure
from cifar10_tl.plots.evaluation import class_bars, confidence_histogram, reliability_diagram


def test_evaluation_figures() -> None:
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.eye(3)[torch.tensor([0, 1, 2, 1])] * 4
    result = Evaluation.of(logits, labels, torch.tensor([1, 4, 6, 9]), ["a", "b", "c"])
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    split = Split(images, torch.zeros(10, dtype=torch.long), torch.arange(10))
    figures = evaluation_figures(result, result.scaled(2.0), split, "test, epoch 3")
    assert list(figures) == ["confusion_matrix", "correct", "incorrect", "reliability", "per_class", "confidence"]
    assert all(any("test, epoch 3" in text for text in strings(figure)) for figure in figures.values())
    assert "accuracy 75.00% (3 of 4 images)" in strings(figures["confusion_matrix"])
    assert "true: c 1.8%" in strings(figures["incorrect"])
    assert 9 in np.asarray(figures["incorrect"].axes[0].images[0].get_array())
    assert {1, 4, 6} <= set(np.asarray(figures["correct"].axes[0].images[0].get_array()).ravel().tolist())
    ece = (result.calibration()["ece"], result.scaled(2.0).calibration()["ece"])
    titles = {f"uncalibrated: ECE {ece[0]:.2%}", f"temperature-scaled (val): ECE {ece[1]:.2%}"}
    assert titles <= set(strings(figures["reliability"]))
    assert "✗ incorrect: 1 images, mean confidence 96.5%" in strings(figures["confidence"])


def test_predictions_are_marked_and_incorrect_ones_have_the_true_class() -> None:
    names = ["cat", "$dog$", "golden_retriever_of_the_far_north"]
    table = np.array([[1.0, 0, 0], [0.004, 0.996, 0], [0.1, 0.0003, 0.8997]])
    result, split = evaluation(table, np.array([0, 0, 1]), names), Split(torch.zeros(3, 3, 4, 4).byte(), torch.zeros(3))
    correct, incorrect = (shown(draw(result, split, "test")) for draw in (correct_figure, incorrect_figure))
    assert correct[-1].get_text() == "✓ cat 100%"
    note, dog, cat, long, other = (text.get_text() for text in incorrect[-5:])
    assert note == "✓ correct    ✗ incorrect    % = probability of that class"
    assert (dog, cat, other) == ("✗ $dog$ 99.6%", "true: cat 0.4%", "true: $dog$ <0.1%")
    assert re.fullmatch(r"✗ golden_\w*…\w+_north 90\.0%", long)
    assert correct[-1].get_color() != incorrect[-4].get_color()
    assert "no such predictions" in strings(incorrect_figure(result, split, "test", num_images=0))


def test_a_reliability_diagram_has_a_bar_for_each_bin_with_images() -> None:
    counts, middle = np.arange(5), (np.arange(5) + 0.5) / 5
    (_, panel) = reliability_diagram({"a": (counts, middle, middle**2)}, heading="h").axes
    assert [bar.get_height() for bar in panel.patches] == pytest.approx((middle[1:] ** 2).tolist())
    assert [bar.get_x() + bar.get_width() / 2 for bar in panel.patches] == pytest.approx(middle[1:].tolist())
    (marks,) = (c for c in panel.collections if isinstance(c, LineCollection))
    assert [segment[0][1] for segment in marks.get_segments()] == pytest.approx(middle[1:].tolist()), "mean confidence"


def test_histograms_count_correct_and_incorrect_predictions() -> None:
    confidence, correct = np.array([0.1, 0.9, 0.91, 0.5]), np.array([True, True, True, False])
    fig = confidence_histogram(confidence, correct, heading="Confidence", num_bins=2)
    assert [[bar.get_height() for bar in axes.patches] for axes in fig.axes[1:]] == [[1, 2], [0, 1]]
    assert "✓ correct: 3 images, mean confidence 63.7%" in strings(fig)


def test_bars_are_as_long_as_f1() -> None:
    fig = class_bars(scored(["cat", "dog"], [(0.5, 0.5, 0.5), (1.0, 0.8, 0.889)]), heading="Bars")
    short, long = fig.axes[0].patches
    assert long.get_width() / short.get_width() == pytest.approx(0.889 / 0.5)
    assert {"cat", "dog", "50.0%", "88.9%"} <= set(strings(fig))
    points = [c for c in fig.axes[0].collections if isinstance(c, PathCollection)]
    for marks, marker in zip(points, (MarkerStyle("<"), MarkerStyle(">")), strict=True):
        outline = marker.get_path().transformed(marker.get_transform())
        np.testing.assert_array_equal(marks.get_paths()[0].vertices, outline.vertices)
    precision, recall = (marks.get_offsets()[:, 0] for marks in points)
    assert (precision[1] - recall[1]) / (precision[1] - precision[0]) == pytest.approx((1.0 - 0.8) / (1.0 - 0.5))
    absent = scored(["cat", "dog"], [(0.5, 0.5, 0.5), (0.0, math.nan, 0.0)])
    (only,) = class_bars(absent, heading="Bars").axes[0].patches
    assert only.get_width() == pytest.approx(short.get_width()), "a class without images is left out"


def test_the_lowest_of_many_classes_are_drawn() -> None:
    f1 = np.linspace(1, 0.5, 100)
    fig = class_bars(scored([f"class {i}" for i in range(100)], zip(f1, f1, f1, strict=True)), heading="Bars")
    texts, lowest = strings(fig), range(99, 59, -1)
    assert [text for text in texts if text.startswith("class ")] == [f"class {i}" for i in lowest]
    assert texts[texts.index("class 80") + 1] == f"{f1[80]:.1%}"
    bars = fig.axes[0].patches
    assert [bar.get_width() / bars[0].get_width() for bar in bars] == pytest.approx(f1[lowest] / 0.5)
    for marks in (c for c in fig.axes[0].collections if isinstance(c, PathCollection)):
        np.testing.assert_allclose(marks.get_offsets()[:, 0], [bar.get_x() + bar.get_width() for bar in bars])
    assert any("40 classes of 100 with the lowest F1" in text for text in texts)
