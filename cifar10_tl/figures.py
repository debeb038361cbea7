"""Figures for TensorBoard and the output folder: arrays in, `matplotlib.figure.Figure` out.

Nothing here opens a pyplot figure, writes a file or changes rcParams, so it is safe inside a training loop.
The pages are laid out by hand: one axes whose unit is the inch, texts measured before they are placed,
pictures composed into one image. No text is cut off, and it draws several times faster than subplots with
a layout engine.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Labels = Sequence[int] | NDArray[np.integer[Any]]
History = Mapping[str, Sequence[float | None]] | Sequence[Mapping[str, float | None]]

_FONT = "DejaVu Sans"  # comes with matplotlib: ✓, ✗ and … exist, and every machine draws the same figure
_DPI = 100  # what TensorBoard renders at; pictures of 32 pixels get a whole number of dots a pixel
_INK, _MUTED, _LINE = "#1a1a1a", "#666666", "#d0d0d0"
_BLUE, _ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito: told apart with every kind of colour blindness
_HEADING, _BODY, _SMALL, _TINY = 12.0, 9.0, 8.0, 6.0  # points
_PAD, _GAP, _CAPTION = 0.15, 0.12, 0.155  # inches: page margin, between cells, height of a caption line
_MIN_WIDTH = 5.0  # inches: a heading has room even over a single picture
_NUMBERED_UP_TO = 16  # classes; with more, the cells of a confusion matrix are too small for numbers
_LISTED_PAIRS, _LIST_WIDTH = 25, 3.8
_MARKERS_UP_TO = 30  # points in a curve


def sample_grid(
    images: NDArray[np.uint8], titles: Sequence[str], *, heading: str, columns: int = 8
) -> Figure:
    """Show pictures in a grid, each with its title below.

    Args:
        images: Pictures as the network sees them, uint8 ``[N, H, W, 3]``; with N = 0 the page says so.
        titles: N titles; one too wide for its cell is shortened with an ellipsis.
        heading: Text above the grid.
        columns: Pictures in a row, at least 1.

    Raises:
        ValueError: If the images have another shape or type, or there is not one title a picture.
    """
    _same_length(len(images), titles=titles)
    if not len(images):
        return _page(_MIN_WIDTH, 0, heading, "no images to show")[0]
    captions = [[_Line(title)] for title in titles]
    return _grid(images, captions, None, picture=0.96, columns=columns, heading=heading)


def prediction_grid(
    images: NDArray[np.uint8],
    true_labels: Labels,
    predicted_labels: Labels,
    probabilities: NDArray[np.floating[Any]],
    class_names: Sequence[str],
    *,
    heading: str,
    columns: int = 5,
    empty_text: str = "no images to show",
) -> Figure:
    """Show pictures with the predicted class and, where that is wrong, the true one.

    Args:
        images: uint8 ``[N, H, W, 3]``; N may be 0.
        true_labels: N class indices in ``[0, K)``.
        predicted_labels: N class indices in ``[0, K)``.
        probabilities: Probability of every class, in [0, 1] or NaN, ``[N, K]``.
        class_names: K names; one too wide for its cell is shortened with an ellipsis.
        heading: Text above the grid.
        columns: Pictures in a row, at least 1.
        empty_text: What the page says when N is 0.

    Raises:
        ValueError: If lengths or shapes do not match, or a label or probability is out of range.
    """
    true, predicted, table = np.asarray(true_labels), np.asarray(predicted_labels), np.asarray(probabilities)
    _same_length(len(images), true_labels=true, predicted_labels=predicted, probabilities=table)
    if not len(images):
        return _page(_MIN_WIDTH, 0, heading, empty_text)[0]
    _check_predictions(true, predicted, table, len(class_names))
    rows = zip(true, predicted, table, strict=True)
    captions = [_prediction_lines(int(t), int(p), row, class_names) for t, p, row in rows]
    frames = [_BLUE if right else _ORANGE for right in true == predicted]
    note = "✓ right    ✗ wrong    % = probability given to that class"
    return _grid(images, captions, frames, picture=1.28, columns=columns, heading=heading, note=note)


def confusion_matrix(counts: NDArray[np.integer[Any]], class_names: Sequence[str], *, heading: str) -> Figure:
    """Draw a confusion matrix coloured by row percentage, with the overall accuracy under the heading.

    Up to 16 classes every cell shows its count and row percentage; with more, the most confused pairs are
    listed beside the matrix.

    Args:
        counts: int ``[K, K]``, ``counts[i][j]`` images of true class i predicted as class j; K >= 1.
        class_names: K names; a long one is shortened with an ellipsis.
        heading: Text above the matrix.

    Raises:
        ValueError: If counts is not a square matrix of non-negative integers with one name a class.
    """
    counts = np.asarray(counts)
    _check_counts(counts, len(class_names))
    # An empty row is divided by 1, not by 0: its shares are 0 and numpy has nothing to warn about.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    plan = _plan_matrix(class_names)
    page_width = plan.x + plan.side + 0.75 + (0 if plan.numbered else _LIST_WIDTH + _PAD)
    fig, page = _page(page_width, plan.title_y + 0.2, heading, _accuracy_note(counts))
    _draw_cells(page, shares, plan)
    _draw_class_labels(page, class_names, plan)
    if plan.numbered:
        _write_cells(page, counts, shares, plan)
    else:
        _list_confused_pairs(page, counts, shares, class_names, plan)
    return fig


def curves(history: History, *, heading: str) -> Figure:
    """Plot accuracy and loss against the epoch, training and validation together.

    Args:
        history: One mapping an epoch, or one mapping of columns, with the keys ``epoch`` (0-based, as in
            TensorBoard), ``train/acc``, ``val/acc`` (in [0, 1]), ``train/loss`` and ``val/loss``. All but
            ``epoch`` may be missing, None, NaN or infinite; such points are left out.
        heading: Text above the panels.

    Raises:
        ValueError: If a row has no epoch or the columns differ in length.
    """
    epochs = _column(history, "epoch")
    if not np.isfinite(epochs).all():
        raise ValueError("every row of the history needs an 'epoch'")
    if not len(epochs):
        return _page(_MIN_WIDTH, 0, heading, "no epochs yet")[0]
    at, accuracies = _points(history, "val/acc")
    best = float(at[accuracies.argmax()]) if len(at) else None
    note = "" if best is None else f"☆ best val accuracy {accuracies.max():.2%} at epoch {best:g}"
    fig, page = _page(10, 3.5, heading, note)
    for left, metric, title in ((0.75, "acc", "accuracy"), (5.8, "loss", "loss")):
        _write(page, left, 0.1, title, _BODY + 1, weight="bold")
        panel = fig.add_axes((left / 10, 0.55 / fig.get_figheight(), 0.4, 2.7 / fig.get_figheight()))
        _style_panel(panel, epochs, metric)
        _draw_series(panel, history, metric, best)
    return fig


# --- page and text ---------------------------------------------------------------------------------------


def _page(width: float, height: float, heading: str, note: str = "") -> tuple[Figure, Axes]:
    """A white page with its heading; x is in inches from the left, y in inches down from the heading."""
    width = math.ceil(100 * max(width, _MIN_WIDTH) - 1e-6) / 100  # whole dots, so that pictures stay sharp
    room = width - 2 * _PAD
    lines = [(line, _HEADING, "bold", _INK) for line in _wrap(heading, room, _HEADING, "bold")]
    lines += [(line, _BODY, "normal", _MUTED) for line in _wrap(note, room, _BODY, "normal")]
    steps = [round(size / 48, 2) for _, size, _, _ in lines]  # 1.5 times the size, in inches
    top = _PAD + sum(steps) + _GAP
    height = math.ceil(100 * (top + height) - 1e-6) / 100
    fig = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    page = fig.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height - top, -top))
    page.set_axis_off()
    y = _PAD - top
    for (line, size, weight, colour), step in zip(lines, steps, strict=True):
        _write(page, _PAD, y + step / 2, line, size, weight=weight, color=colour)
        y += step
    return fig, page


def _write(ax: Axes, x: float, y: float, text: str, size: float = _SMALL, **style: Any) -> None:
    """Place a text as it is: a ``$`` or ``_`` in a class name must not start mathematics."""
    default = {"family": _FONT, "color": _INK, "va": "center", "parse_math": False, "usetex": False}
    ax.text(x, y, text, **{**default, "fontsize": size, **style})


@lru_cache(maxsize=8192)
def _width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in inches: the widest at usual resolutions, which differ by up to a tenth."""
    font = FontProperties(family=_FONT, size=size, weight=weight)
    widths = [r.get_text_width_height_descent(text, font, ismath=False)[0] / r.dpi for r in _renderers()]
    return float(max(widths))


@lru_cache(maxsize=1)
def _renderers() -> list[Any]:
    agg: Any = RendererAgg  # not typed in matplotlib
    return [agg(1, 1, dpi) for dpi in (_DPI, 120, 150, 200)]


@lru_cache(maxsize=8192)
def _clean(text: str) -> str:
    """One line of characters that the font has: the others would draw as a box too, with a warning each."""
    font = get_font(findfont(_FONT))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in " ".join(text.split()))


@lru_cache(maxsize=8192)
def _fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Shorten a text to a width in inches; its end is kept too, since names often differ only there."""
    text = _clean(text)
    if _width(text, size, weight) <= width:
        return text
    n = bisect_right(range(1, len(text)), width, key=lambda n: _width(_elide(text, n), size, weight))
    return _elide(text, n)


def _elide(text: str, n: int) -> str:
    """The first two thirds and the last third of the ``n`` characters kept of a text."""
    return f"{text[: n - n // 3]}…{text[len(text) - n // 3 :]}"


def _wrap(text: str, width: float, size: float, weight: str) -> list[str]:
    """Break a text into lines no wider than ``width`` inches; runs of spaces are kept inside a line."""
    lines: list[str] = []
    for word in map(_clean, text.split(" ")):
        if lines and _width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_fit(word, width, size, weight))
    return [line for line in lines if line.strip()]


def _percent(share: float) -> str:
    """A share as a percentage that says 0% and 100% of exactly 0 and 1 only."""
    if math.isnan(share):
        return "n/a"
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.0005 else ">99.9%" if share >= 0.9995 else f"{share:.1%}"


# --- grids of pictures -----------------------------------------------------------------------------------


class _Line(NamedTuple):
    """One line of a caption, of which only the name is shortened when it is too wide."""

    name: str
    before: str = ""
    after: str = ""
    colour: str = _INK

    def fitted(self, width: float) -> str:
        room = width - _width(self.before + self.after, _SMALL)
        return self.before + _fit(self.name, room, _SMALL) + self.after


def _same_length(n: int, **lists: Sequence[Any] | NDArray[Any]) -> None:
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{name} has {len(values)} entries for {n} images")


def _check_predictions(
    true: NDArray[Any], predicted: NDArray[Any], table: NDArray[Any], n_classes: int
) -> None:
    if table.shape != (len(true), n_classes):
        raise ValueError(f"probabilities has shape {table.shape}, expected {(len(true), n_classes)}")
    for name, labels in (("true_labels", true), ("predicted_labels", predicted)):
        if labels.ndim != 1 or labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"{name} must be class indices from 0 to {n_classes - 1}")
    if (table < -1e-3).any() or (table > 1 + 1e-3).any():
        raise ValueError("probabilities must lie in [0, 1]: are these logits?")


def _prediction_lines(true: int, predicted: int, row: NDArray[Any], names: Sequence[str]) -> list[_Line]:
    mark, colour = ("✓ ", _BLUE) if true == predicted else ("✗ ", _ORANGE)
    lines = [_Line(names[predicted], mark, f" {_percent(float(row[predicted]))}", colour)]
    if true != predicted:
        lines.append(_Line(names[true], "true: ", f" {_percent(float(row[true]))}"))
    return lines


def _grid(
    images: NDArray[np.uint8],
    captions: Sequence[Sequence[_Line]],
    frames: Sequence[str] | None,
    *,
    picture: float,
    columns: int,
    heading: str,
    note: str = "",
) -> Figure:
    """Compose pictures of about ``picture`` inches into one image and write the captions below them."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    dots = round(picture * _DPI)
    images = _shrink(images, dots)
    # Inches that a pixel takes: a whole number of dots, else some columns of a picture come out wider.
    pixel = round(dots / max(images.shape[1:3])) / _DPI
    border = 0 if frames is None else max(1, round(0.04 / pixel))
    h, w = images.shape[1] + 2 * border, images.shape[2] + 2 * border
    # A caption may widen the cells by half a picture before its name is shortened.
    widest = max(_width(ln.before + _clean(ln.name) + ln.after, _SMALL) for lines in captions for ln in lines)
    text_width = min(max(picture, widest), 1.5 * picture)
    text_height = _CAPTION * max(len(lines) for lines in captions)
    columns = min(columns, len(images))
    cell_h = h + math.ceil((text_height + 1.5 * _GAP) / pixel)
    cell_w = max(w, math.ceil(text_width / pixel)) + math.ceil(_GAP / pixel)
    mosaic = _mosaic(images, frames, border, columns, cell_h, cell_w)
    height, width = mosaic.shape[0] * pixel, mosaic.shape[1] * pixel
    fig, page = _page(width + 2 * _PAD - _GAP, height, heading, note)
    page.imshow(mosaic, extent=(_PAD, _PAD + width, height, 0), aspect="auto", interpolation="nearest")
    for i, lines in enumerate(captions):
        x, y = i % columns * cell_w * pixel, (i // columns * cell_h + h) * pixel + 0.03
        for j, line in enumerate(lines):
            text = line.fitted(text_width)
            _write(page, _PAD + x, y + (j + 0.5) * _CAPTION, text, color=line.colour)
    return fig


def _shrink(images: NDArray[np.uint8], dots: int) -> NDArray[np.uint8]:
    """Scale pictures down to at most ``dots`` pixels a side; smaller ones stay as they are."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    h, w = images.shape[1:3]
    if max(h, w) <= dots:
        return images
    size = (max(1, w * dots // max(h, w)), max(1, h * dots // max(h, w)))
    small = [Image.fromarray(image).resize(size, Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.uint8) for image in small])


def _mosaic(
    images: NDArray[np.uint8],
    frames: Sequence[str] | None,
    border: int,
    columns: int,
    cell_h: int,
    cell_w: int,
) -> NDArray[np.uint8]:
    """One white image with every picture, in its frame, at the top left of its cell."""
    n, h, w, _ = images.shape
    mosaic = np.full((-(-n // columns) * cell_h, columns * cell_w, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * cell_h, i % columns * cell_w
        if frames is not None:
            colour = np.multiply(to_rgb(frames[i]), 255).astype(np.uint8)
            mosaic[y : y + h + 2 * border, x : x + w + 2 * border] = colour
        mosaic[y + border : y + border + h, x + border : x + border + w] = image
    return mosaic


# --- confusion matrix ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Where the parts of a confusion matrix lie on the page, in inches; its top edge is at 0."""

    n: int
    x: float
    side: float
    cell: float
    label_size: float  # points
    label_room: float
    rotated: bool  # the labels below the matrix

    @property
    def numbered(self) -> bool:
        return self.n <= _NUMBERED_UP_TO

    @property
    def title_y(self) -> float:
        """Middle of the title below the column labels."""
        return self.side + 0.2 + (self.label_room if self.rotated else 0.15)


def _plan_matrix(names: Sequence[str]) -> _Plan:
    n = len(names)
    widest = max(_width(_clean(name), _BODY) for name in names)
    if n <= _NUMBERED_UP_TO:  # cells as wide as the labels where the page allows it
        cell, size = max(0.6, 2.4 / n, min(widest + 0.1, 8.5 / n)), _BODY
    else:  # a matrix of 6 inches with 20 classes, of 10 with 100 or more
        cell = min(0.3, max(8 / n, min(0.1, 10 / n)))
        size = max(_TINY, min(_SMALL, 60 * cell))
    room = min(widest * size / _BODY, 1.6) + 0.02
    return _Plan(n, _PAD + 0.25 + room, n * cell, cell, size, room, rotated=room + 0.05 > cell)


def _check_counts(counts: NDArray[Any], n_names: int) -> None:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts must be a square matrix, not of shape {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError("counts must be integers of at least 0")
    if n_names != len(counts):
        raise ValueError(f"class_names has {n_names} entries for {len(counts)} classes")


def _accuracy_note(counts: NDArray[Any]) -> str:
    total, right = int(counts.sum()), int(np.trace(counts))
    return f"accuracy {right / total:.2%} ({right:,} of {total:,} images)" if total else "no images counted"


def _draw_cells(page: Axes, shares: NDArray[Any], plan: _Plan) -> None:
    """Colour the cells, and a bar beside them; the square root makes 1 % wrong visible beside 99 % right."""
    style: dict[str, Any] = {"cmap": "Blues", "aspect": "auto", "interpolation": "nearest"}
    style["norm"] = PowerNorm(0.5, 0, 1)
    end, bar = plan.x + plan.side, plan.x + plan.side + 0.15
    page.imshow(shares, extent=(plan.x, end, plan.side, 0), **style)
    page.imshow(np.linspace(1, 0, 256)[:, None] ** 2, extent=(bar, bar + 0.12, plan.side, 0), **style)
    lines = np.array([*range(0, plan.n, 1 if plan.numbered else 10), plan.n]) * plan.cell
    page.hlines(lines, plan.x, end, color=_LINE, linewidth=0.6)
    page.vlines(plan.x + lines, 0, plan.side, color=_LINE, linewidth=0.6)
    for percent in (0, 1, 5, 10, 25, 50, 75, 100):
        y = plan.side * (1 - math.sqrt(percent / 100))
        _write(page, bar + 0.17, y, f"{percent}%", 7, color=_MUTED)
    _write(page, bar, plan.side + 0.17, "of row", 7, color=_MUTED)


def _draw_class_labels(page: Axes, names: Sequence[str], plan: _Plan) -> None:
    size, turn = plan.label_size, 90 if plan.rotated else 0
    step = math.ceil(1.2 * size / 72 / plan.cell - 0.01)  # not every label where the lines would touch
    for i in range(0, plan.n, step):
        name, middle = _fit(names[i], plan.label_room, size), (i + 0.5) * plan.cell
        _write(page, plan.x - 0.06, middle, name, size, ha="right")
        _write(page, plan.x + middle, plan.side + 0.06, name, size, ha="center", va="top", rotation=turn)
    title: dict[str, Any] = {"ha": "center", "weight": "bold"}
    _write(page, plan.x + plan.side / 2, plan.title_y, "predicted class", _BODY, **title)
    _write(page, _PAD + 0.07, plan.side / 2, "true class", _BODY, rotation=90, **title)


def _write_cells(page: Axes, counts: NDArray[Any], shares: NDArray[Any], plan: _Plan) -> None:
    """Write the count and the share of each cell, the count smaller where it has too many digits."""
    size = _BODY * min(1, (plan.cell - 0.04) / _width(str(counts.max()), _BODY, "bold"))
    for (i, j), count in np.ndenumerate(counts):
        x, y = plan.x + (j + 0.5) * plan.cell, (i + 0.5) * plan.cell
        share = _percent(float(shares[i, j])) if counts[i].any() else "n/a"
        ink = "white" if shares[i, j] > 0.45 else _INK if count else _MUTED
        weight = "bold" if i == j and count else "normal"
        _write(page, x, y - 0.09, str(count), size, ha="center", color=ink, weight=weight)
        _write(page, x, y + 0.09, share, 7, ha="center", color=ink)


def _list_confused_pairs(
    page: Axes, counts: NDArray[Any], shares: NDArray[Any], names: Sequence[str], plan: _Plan
) -> None:
    """List the largest cells off the diagonal, to the right of the colour bar."""
    wrong = counts * ~np.eye(plan.n, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED_PAIRS]
    pairs = [(i, j) for i, j in (divmod(int(k), plan.n) for k in order) if wrong[i, j]]
    left = plan.x + plan.side + 0.75
    title = "Most confused: true → predicted" if pairs else "No class is taken for another"
    _write(page, left, 0.08, title, _BODY, weight="bold")
    for k, (i, j) in enumerate(pairs):
        y, pair = 0.3 + 0.2 * k, f"{_fit(names[i], 1.25, _SMALL)} → {_fit(names[j], 1.25, _SMALL)}"
        _write(page, left + 0.95, y, pair)
        _write(page, left + 0.85, y, f"{wrong[i, j]} ({_percent(float(shares[i, j]))})", ha="right")


# --- curves ----------------------------------------------------------------------------------------------


def _column(history: History, key: str) -> NDArray[np.float64]:
    """One column of the history, NaN where a value is missing."""
    values = history.get(key, ()) if isinstance(history, Mapping) else [row.get(key) for row in history]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _points(history: History, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs and values of one curve; epochs without a value are left out, so the line runs across them."""
    epochs, values = _column(history, "epoch"), _column(history, key)
    if isinstance(history, Mapping) and key not in history:
        return values, values
    if len(values) != len(epochs):
        raise ValueError(f"{key!r} has {len(values)} values for {len(epochs)} epochs")
    finite = np.isfinite(values)
    return epochs[finite], values[finite]


def _draw_series(panel: Axes, history: History, metric: str, best: float | None) -> None:
    """Draw both curves, apart by colour, dashes and markers, with a star at the best validation epoch."""
    styles = (("train", _BLUE, "--", "o", 6), ("val", _ORANGE, "-", "s", 4))  # equal values: both are seen
    for split, colour, dashes, marker, size in styles:
        x, y = _points(history, f"{split}/{metric}")
        if len(x):
            shape = marker if len(x) <= _MARKERS_UP_TO else ""
            panel.plot(x, y, dashes, color=colour, marker=shape, markersize=size, linewidth=1.6, label=split)
        if split == "val" and best is not None and best in x:
            panel.plot(best, y[x == best][0], "*", color=_INK, fillstyle="none", markersize=14, zorder=5)
    if not panel.lines:
        panel.set_yticks([])
        panel.grid(visible=False)
        _write(panel, 0.5, 0.5, "no values", _BODY, ha="center", color=_MUTED, transform=panel.transAxes)
        return
    if metric == "acc":  # no ticks beyond 100 %, none a thousandth of a percent apart
        low, high = panel.get_ylim()
        spare = max(0.0, 0.01 - (high - low)) / 2
        margin = 0.04 * (high - low + 2 * spare)
        panel.set_ylim(max(low - spare, -margin), min(high + spare, 1 + margin))
    style: dict[str, Any] = {"prop": FontProperties(family=_FONT, size=_SMALL), "labelcolor": _INK}
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0, **style)


def _style_panel(panel: Axes, epochs: NDArray[np.float64], metric: str) -> None:
    margin = max(0.3, 0.02 * float(np.ptp(epochs)))  # a single epoch stands in the middle
    panel.set_xlim(float(epochs.min()) - margin, float(epochs.max()) + margin)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%" if metric == "acc" else f"{y:g}")
    panel.set_xlabel("epoch", family=_FONT, fontsize=_BODY, color=_INK)
    panel.tick_params(labelsize=_SMALL, labelfontfamily=_FONT, color=_LINE, labelcolor=_INK)
    panel.set_facecolor("white")
    panel.grid(color=_LINE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_LINE)
