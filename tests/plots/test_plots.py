"""The figures: what they say, that no text is cut off or overlaps, and that they leave no trace."""

import re
import warnings
from collections.abc import Callable, Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from cifar10_tl.plots import confusion_matrix, curves, legible, prediction_grid, sample_grid

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ODD = ["$x_1$ & $", "a_b^c", r"$\alpha {$", "naïve λ", "猫", "two\nlines", "%", "", "W" * 60, "<b>&amp;"]


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """No warning, no pyplot figure and no changed setting in any test of this file."""
    figures, settings = plt.get_fignums(), dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert plt.get_fignums() == figures
    assert dict(mpl.rcParams) == settings


def pictures(n: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def long_names(k: int) -> list[str]:
    return [f"folder_{'WmXo'[i % 4] * 10}_{i:02d}" for i in range(k)]


def random_counts(k: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 12, (k, k)) * (rng.random((k, k)) < 0.4)
    counts[np.diag_indices(k)] = 1000
    counts[k // 2] = 0  # a class without images
    return counts


def predictions(n: int, names: list[str]) -> Figure:
    rng = np.random.default_rng(2)
    table = rng.dirichlet(np.full(len(names), 0.2), n).astype(np.float32)
    return prediction_grid(
        pictures(n), rng.integers(0, len(names), n), table.argmax(1), table, names, heading="Predictions"
    )


def history(n: int) -> list[dict[str, float | None]]:
    rows: list[dict[str, float | None]] = []
    for epoch in range(n):
        up = 1 - 1 / (epoch + 2)
        rows.append({"epoch": epoch, "train/acc": up, "val/acc": 0.9 * up, "train/loss": 1 - up, "val/loss": 1})
    return rows


def axes_texts(axes: Axes) -> list[Text]:
    texts = list(axes.texts)
    if legend := axes.get_legend():
        texts += legend.get_texts()
    if axes.axison:
        texts += [axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            places = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for place, label in places if min(limits) <= place <= max(limits)]
    return texts


def shown(fig: Figure) -> list[Text]:
    """Every text that is to be drawn."""
    texts = [*fig.texts, *(text for axes in fig.axes for text in axes_texts(axes))]
    return [text for text in texts if text.get_visible() and text.get_text()]


def strings(fig: Figure) -> list[str]:
    return [text.get_text() for text in shown(fig)]


def check_layout(fig: Figure) -> None:
    """No text leaves the page or touches another one."""
    if len(fig.axes) > 1:
        FigureCanvasAgg(fig).draw()  # legends and axis labels find their place when drawn
    texts = shown(fig)
    assert texts
    boxes = np.array([text.get_window_extent().extents for text in texts])
    low, high = boxes[:, :2], boxes[:, 2:]
    outside = (low < 0).any(1) | (high > fig.bbox.size).any(1)
    assert not outside.any(), [texts[i].get_text() for i in np.flatnonzero(outside)]
    overlap = ((low[:, None] < high[None] - 0.1) & (low[None] < high[:, None] - 0.1)).all(-1)
    pairs = np.argwhere(np.triu(overlap, 1))
    assert not len(pairs), [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs[:5]]


HEADING = "A heading that is a good deal longer than one picture is wide, so that it has to be wrapped"
LAYOUTS: dict[str, Callable[[], Figure]] = {
    **{
        f"samples {n}": lambda n=n: sample_grid(pictures(n), (CIFAR10 * 7)[:n], heading=HEADING)
        for n in (0, 1, 7, 25, 64)
    },
    "samples odd": lambda: sample_grid(pictures(10), ODD, heading=ODD[0], columns=3),
    "samples long": lambda: sample_grid(pictures(9, 20, 40), long_names(9), heading="W" * 90),
    "samples 224": lambda: sample_grid(pictures(3, 224, 200), CIFAR10[:3], heading="Large"),
    "samples 1 px": lambda: sample_grid(pictures(3, 1, 1), CIFAR10[:3], heading="Tiny"),
    **{f"predictions {n}": lambda n=n: predictions(n, CIFAR10) for n in (0, 1, 7, 25, 64)},
    "predictions 2 classes": lambda: predictions(7, ["cat", "dog"]),
    "predictions odd": lambda: predictions(25, ODD),
    "predictions 100 long": lambda: predictions(25, long_names(100)),
    "matrix 1": lambda: confusion_matrix(np.array([[3]]), ["cat"], heading=HEADING),
    "matrix 2": lambda: confusion_matrix(random_counts(2), ["cat", "dog"], heading=HEADING),
    "matrix 10": lambda: confusion_matrix(random_counts(10), CIFAR10, heading="Test set"),
    "matrix 10 odd": lambda: confusion_matrix(random_counts(10), ODD, heading="Test set"),
    "matrix 16 long": lambda: confusion_matrix(random_counts(16) * 10**6, long_names(16), heading="Test set"),
    "matrix 17 long": lambda: confusion_matrix(random_counts(17) * 10**6, long_names(17), heading="Test set"),
    "matrix 40": lambda: confusion_matrix(random_counts(40), CIFAR10 * 4, heading="Test set"),
    "matrix 100 long": lambda: confusion_matrix(random_counts(100), long_names(100), heading="Test set"),
    "matrix 250": lambda: confusion_matrix(random_counts(250), CIFAR10 * 25, heading="Test set"),
    **{f"curves {n}": lambda n=n: curves(history(n), heading=HEADING) for n in (0, 1, 2, 8, 200)},
    "curves extreme": lambda: curves(
        {"epoch": [998, 999], "train/loss": [1e-7, 2.5e9], "val/acc": [0.99991, 1.0]}, heading="Extreme"
    ),
    "curves without values": lambda: curves([{"epoch": 0, "val/acc": float("nan")}], heading="None"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_text_is_cut_off_or_overlaps(name: str) -> None:
    fig = LAYOUTS[name]()
    FigureCanvasAgg(fig).draw()  # a character that the font has not would be warned about here
    check_layout(fig)
    fig.set_dpi(120)  # the widths of hinted letters depend on it
    check_layout(fig)


def test_sample_grid_shows_each_picture_once_above_its_title() -> None:
    images = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(10)])
    fig = sample_grid(images, CIFAR10, heading="Inputs", columns=4)
    assert strings(fig) == ["Inputs", *CIFAR10]
    mosaic = np.asarray(fig.axes[0].images[0].get_array())
    values, times = np.unique(mosaic, return_counts=True)
    assert dict(zip(values.tolist(), times.tolist(), strict=True)) == {
        **dict.fromkeys(range(10), 32 * 32 * 3),
        255: mosaic.size - 10 * 32 * 32 * 3,
    }


def test_sample_grid_keeps_small_pictures_pixel_for_pixel() -> None:
    images = pictures(1)
    fig = sample_grid(images, ["cat"], heading="Inputs")
    image = fig.axes[0].images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array())[:32, :32], images[0])
    assert image.get_interpolation() == "nearest"
    drawn = FigureCanvasAgg(fig)
    drawn.draw()
    # Three dots a pixel at the figure's own dpi: the picture stands in the drawing, enlarged, untouched.
    rows = np.asarray(drawn.buffer_rgba())[..., :3]
    left, top = (round(v) for v in fig.axes[0].transData.transform((image.get_extent()[0], 0)))
    top = rows.shape[0] - top
    np.testing.assert_array_equal(rows[top : top + 96 : 3, left : left + 96 : 3], images[0])


def test_prediction_grid_says_right_and_wrong_in_words_and_marks() -> None:
    table = np.array([[1.0, 0.0, 0.0], [0.004, 0.996, 0.0], [0.1, 0.0003, 0.8997], [np.nan] * 3])
    fig = prediction_grid(
        pictures(4), [0, 0, 1, 0], [0, 1, 2, 0], table, ["cat", "$dog$", "frog"], heading="Predictions"
    )
    assert strings(fig)[2:] == [
        "✓ cat 100%",
        "✗ $dog$ 99.6%",
        "true: cat 0.4%",
        "✗ frog 90.0%",
        "true: $dog$ <0.1%",
        "✓ cat n/a",
    ]
    colours = {text.get_text()[0]: text.get_color() for text in shown(fig)[2:]}
    assert colours["✓"] != colours["✗"]


def test_almost_certain_is_not_100_percent() -> None:
    fig = prediction_grid(pictures(1), [0], [0], np.array([[0.99996, 4e-5]]), ["a", "b"], heading="h")
    assert "✓ a >99.9%" in strings(fig)


def test_a_long_name_keeps_both_ends_and_the_probability() -> None:
    names = [f"golden_retriever_of_the_north_{i}" for i in range(2)]
    fig = prediction_grid(pictures(1), [1], [0], np.array([[0.75, 0.25]]), names, heading="h")
    wrong, true = strings(fig)[2:]
    assert re.fullmatch(r"✗ golden_\w*…\w+_0 75\.0%", wrong)
    assert re.fullmatch(r"true: golden_\w*…\w+_1 25\.0%", true)


def test_no_predictions_are_said_in_words() -> None:
    nothing = (pictures(0), [], [], np.zeros((0, 10)), CIFAR10)
    words = "no incorrect predictions among these images"
    assert words in strings(prediction_grid(*nothing, heading="Incorrect", empty_text=words))
    assert "no images to show" in strings(prediction_grid(*nothing, heading="Incorrect"))
    assert "no images to show" in strings(sample_grid(pictures(0), [], heading="Inputs"))


def test_confusion_matrix_numbers() -> None:
    counts = np.array([[8, 2, 0], [1, 2999, 0], [0, 0, 0]])
    texts = strings(confusion_matrix(counts, ["cat", "dog", "frog"], heading="Test set"))
    assert texts[:2] == ["Test set", "accuracy 99.90% (3,007 of 3,010 images)"]
    cells = texts[-18:]
    assert cells[0::2] == ["8", "2", "0", "1", "2999", "0", "0", "0", "0"]
    assert cells[1::2] == ["80.0%", "20.0%", "0%", "<0.1%", ">99.9%", "0%", "n/a", "n/a", "n/a"]
    for name in ("cat", "dog", "frog"):
        assert texts.count(name) == 2
    assert {"true class", "predicted class"} <= set(texts)


def test_confusion_matrix_is_coloured_by_row_share() -> None:
    fig = confusion_matrix(np.array([[30, 10], [0, 5]]), ["cat", "dog"], heading="h")
    np.testing.assert_allclose(np.asarray(fig.axes[0].images[0].get_array()), [[0.75, 0.25], [0, 1]])


def test_confusion_matrix_cells_stand_in_row_of_truth_and_column_of_prediction() -> None:
    fig = confusion_matrix(np.array([[50, 7], [0, 50]]), ["cat", "dog"], heading="h")
    place = {text.get_text(): text.get_position() for text in shown(fig)}
    names = [(text.get_text(), *text.get_position()) for text in shown(fig) if text.get_text() in ("cat", "dog")]
    row_of_cat = min((n for n in names if n[0] == "cat"), key=lambda n: n[1])
    column_of_dog = max((n for n in names if n[0] == "dog"), key=lambda n: n[1])
    assert place["7"][0] == pytest.approx(column_of_dog[1])
    assert abs(place["7"][1] - row_of_cat[2]) < 0.2


def test_large_confusion_matrix_lists_the_most_confused_pairs() -> None:
    counts = np.eye(100, dtype=np.int64) * 90
    counts[3, 7], counts[50, 2] = 10, 4
    names = [f"class {i}" for i in range(100)]
    texts = strings(confusion_matrix(counts, names, heading="h"))
    listed = [text for text in texts if "→" in text]
    assert listed == ["Most confused: true → predicted", "class 3 → class 7", "class 50 → class 2"]
    assert {"10 (10.0%)", "4 (4.3%)"} <= set(texts)
    assert "90" not in texts
    perfect = strings(confusion_matrix(np.eye(20, dtype=np.int64), names[:20], heading="h"))
    assert "No class is taken for another" in perfect


def test_confusion_matrix_without_images() -> None:
    fig = confusion_matrix(np.zeros((2, 2), dtype=np.int64), ["cat", "dog"], heading="h")
    assert "no images counted" in strings(fig)


def lines(fig: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    plotted = fig.axes[1 + panel].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in plotted}


def test_curves_from_rows_and_from_columns_are_the_same() -> None:
    rows = history(8)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for panel in (0, 1):
        assert lines(curves(rows, heading="h"), panel) == lines(curves(columns, heading="h"), panel)


def test_curves_mark_the_best_epoch_in_both_panels() -> None:
    rows = history(5)
    rows[2]["val/acc"] = 0.95
    fig = curves(rows, heading="Run")
    assert "☆ best val accuracy 95.00% at epoch 2" in strings(fig)
    for panel, value in ((1, 0.95), (2, 1.0)):
        (star,) = [line for line in fig.axes[panel].get_lines() if line.get_marker() == "*"]
        assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [value])


def test_curves_run_across_missing_values() -> None:
    rows = history(6)
    for epoch in (0, 2, 4):
        rows[epoch]["val/acc"] = None
        rows[epoch]["val/loss"] = float("nan")
    rows[5]["val/loss"] = float("inf")
    fig = curves(rows, heading="h")
    assert lines(fig, 0)["val"][0] == [1, 3, 5]
    assert lines(fig, 1)["val"][0] == [1, 3]
    assert lines(fig, 0)["train"][0] == [0, 1, 2, 3, 4, 5]


def test_curves_without_validation_or_values() -> None:
    rows = [{"epoch": 0, "train/acc": 0.5, "train/loss": float("nan")}]
    fig = curves(rows, heading="h")
    assert set(lines(fig, 0)) == {"train"}
    assert strings(fig).count("no values") == 1
    assert not any("best" in text for text in strings(fig))
    assert "no epochs yet" in strings(curves([], heading="h"))
    assert "no epochs yet" in strings(curves({}, heading="h"))


@pytest.mark.parametrize("n", [1, 2, 8, 200])
def test_curves_epoch_ticks_are_integers_from_zero(n: int) -> None:
    fig = curves(history(n), heading="h")
    ticks = [label.get_text() for label in fig.axes[1].get_xticklabels()]
    assert "0" in ticks
    assert all(tick.lstrip("\N{MINUS SIGN}").isdecimal() for tick in ticks)
    assert (fig.axes[1].get_lines()[0].get_marker() == "o") == (n <= 30)


GOOD = (pictures(2), [0, 1], [0, 0], np.array([[0.7, 0.3], [0.6, 0.4]]), ["cat", "dog"])


def bad_predictions(place: int, value: object) -> Callable[[], Figure]:
    return lambda: prediction_grid(*[value if i == place else v for i, v in enumerate(GOOD)], heading="h")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_grid(pictures(2), ["cat"], heading="h"), "titles has 1 entries for 2 images"),
        (lambda: sample_grid(pictures(1) / 255.0, ["cat"], heading="h"), "must be uint8"),
        (lambda: sample_grid(pictures(1)[..., :1], ["cat"], heading="h"), "must be uint8"),
        (lambda: sample_grid(pictures(1), ["cat"], heading="h", columns=0), "columns must be at least 1"),
        (bad_predictions(1, [0]), "true_labels has 1 entries"),
        (bad_predictions(2, [0, 1, 1]), "predicted_labels has 3 entries"),
        (bad_predictions(3, np.full((2, 3), 0.3)), "probabilities has shape"),
        (bad_predictions(3, np.array([[4.0, -2.0], [0.6, 0.4]])), "are these logits"),
        (bad_predictions(1, [0, 2]), "true_labels must be class indices from 0 to 1"),
        (bad_predictions(2, [-1, 0]), "predicted_labels must be class indices"),
        (lambda: confusion_matrix(np.ones((2, 3), int), ["a", "b"], heading="h"), "square"),
        (lambda: confusion_matrix(np.zeros((0, 0), int), [], heading="h"), "square"),
        (lambda: confusion_matrix(np.ones((2, 2)), ["a", "b"], heading="h"), "integers"),
        (lambda: confusion_matrix(-np.ones((2, 2), int), ["a", "b"], heading="h"), "at least 0"),
        (lambda: confusion_matrix(np.ones((2, 2), int), ["a"], heading="h"), "1 entries for 2 classes"),
        (lambda: curves([{"train/loss": 1.0}], heading="h"), "needs an 'epoch'"),
        (lambda: curves({"epoch": [0, 1], "val/acc": [0.5]}, heading="h"), "1 values for 2 epochs"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_inputs_are_not_changed() -> None:
    images, counts = pictures(2), random_counts(20)
    before = images.copy(), counts.copy()
    sample_grid(images, ["a", "b"], heading="h")
    confusion_matrix(counts, long_names(20), heading="h")
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(counts, before[1])


def test_names_that_the_font_cannot_write_are_told_apart_by_number() -> None:
    names = ["猫", "狗", "Katze 猫", "_"]
    assert legible(names) == ["class 0", "class 1", "Katze 猫", "class 3"]
    written = strings(confusion_matrix(np.eye(4, dtype=int), names, heading="h"))
    assert {"class 0", "class 1", "Katze □"} <= set(written)


def test_mixed_pictures_have_a_line_a_class_and_its_share_is_never_shortened() -> None:
    lines = [("Rhododendron " * 4, " 81 %"), ("hexagon", " 19 %")]
    written = strings(sample_grid(pictures(2), [lines, "cat"], heading="h"))
    assert "hexagon 19 %" in written
    assert [text for text in written if text.startswith("Rhodo") and text.endswith("… 81 %".strip("…"))]
    assert "cat" in written
