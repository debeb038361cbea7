from __future__ import annotations

import numpy as np
import pytest
from plots.figures import rendered, shown, strings

from cifar10_tl.plots.confusion_matrix import confusion_matrix


def test_cells_have_counts_and_row_percentages() -> None:
    counts = np.array([[8, 2, 0], [1, 2999, 0], [0, 0, 0]])
    fig = confusion_matrix(counts, ["cat", "dog", "frog"], heading="Test set")
    texts = strings(fig)
    assert texts[:2] == ["Test set", "accuracy 99.90% (3,007 of 3,010 images)"]
    cells = texts[-18:]
    assert cells[0::2] == ["8", "2", "0", "1", "2999", "0", "0", "0", "0"]
    assert cells[1::2] == ["80.0%", "20.0%", "0%", "<0.1%", ">99.9%", "0%", "n/a", "n/a", "n/a"]
    assert {"true class", "predicted class"} <= set(texts)
    colored = np.asarray(fig.axes[0].images[0].get_array())
    np.testing.assert_allclose(colored, [[0.8, 0.2, 0], [1 / 3000, 2999 / 3000, 0], [0, 0, 0]])
    assert "no images" in strings(confusion_matrix(np.zeros((2, 2), dtype=int), ["cat", "dog"], heading="h"))


def test_rows_are_true_and_columns_are_predicted_classes() -> None:
    fig = confusion_matrix(np.array([[50, 7], [0, 49]]), ["cat", "dog"], heading="h")
    texts = [(text.get_text(), *text.get_position()) for text in shown(fig)]
    (cell,) = [text for text in texts if text[0] == "7"]
    row_of_cat = min((text for text in texts if text[0] == "cat"), key=lambda text: text[1])
    column_of_dog = max((text for text in texts if text[0] == "dog"), key=lambda text: text[1])
    assert cell[1] == pytest.approx(column_of_dog[1])
    assert abs(cell[2] - row_of_cat[2]) < 0.2
    pixels, light = rendered(fig), {}
    for count, x, y in (text for text in texts if text[0].isdecimal()):
        column, row = fig.axes[0].transData.transform((x + 0.4, y))  # beside the number
        light[count] = int(pixels[len(pixels) - round(row), round(column)].sum())
    assert sorted(light, key=light.__getitem__) == ["49", "50", "7", "0"], "the darkest has all images of its row"


def test_a_large_matrix_lists_the_most_confused_pairs() -> None:
    counts = np.eye(100, dtype=np.int64) * 90
    counts[3, 7], counts[50, 2] = 10, 4
    names = [f"class {i}" for i in range(100)]
    texts = strings(confusion_matrix(counts, names, heading="h"))
    listed = [text for text in texts if "→" in text]
    assert listed == ["Most confused: true → predicted", "class 3 → class 7", "class 50 → class 2"]
    assert {"10 (10.0%)", "4 (4.3%)"} <= set(texts)
    assert "90" not in texts
    perfect = strings(confusion_matrix(np.eye(20, dtype=np.int64), names[:20], heading="h"))
    assert "No class is confused with another" in perfect
