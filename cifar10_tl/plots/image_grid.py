"""Grids of pictures: training inputs, and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar10_tl.plots.style import (
    BLUE,
    CAPTION,
    DPI,
    GAP,
    INK,
    MIN_WIDTH,
    ORANGE,
    PAD,
    SMALL,
    as_percent,
    clean,
    default_style,
    fit,
    legible,
    new_page,
    text_width,
    write,
)

Labels = Sequence[int] | NDArray[np.integer[Any]]


@default_style()
def sample_grid(
    images: NDArray[np.uint8],
    titles: Sequence[str | Sequence[tuple[str, str]]],
    *,
    heading: str,
    columns: int = 8,
) -> Figure:
    """Show pictures in a grid, each with its title below.

    Args:
        images: Pictures as the network sees them, uint8 ``[N, H, W, 3]``; with N = 0 the page says so.
        titles: N titles, or for each picture several lines of a name and what stands behind it; a name too wide for
            its cell is shortened with an ellipsis.
        heading: Text above the grid.
        columns: Pictures in a row, at least 1.

    Raises:
        ValueError: If the images have another shape or type, or there is not one title a picture.
    """
    _same_length(len(images), titles=titles)
    if not len(images):
        return new_page(MIN_WIDTH, 0, heading, "no images to show")[0]
    captions = [
        [_Line(title)] if isinstance(title, str) else [_Line(name, after=after) for name, after in title]
        for title in titles
    ]
    return _grid(images, captions, None, picture=0.96, columns=columns, heading=heading)


@default_style()
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
        return new_page(MIN_WIDTH, 0, heading, empty_text)[0]
    _check_predictions(true, predicted, table, len(class_names))
    class_names = legible(class_names)
    rows = zip(true, predicted, table, strict=True)
    captions = [_prediction_lines(int(t), int(p), row, class_names) for t, p, row in rows]
    frames = [BLUE if right else ORANGE for right in true == predicted]
    note = "✓ right    ✗ wrong    % = probability given to that class"
    return _grid(images, captions, frames, picture=1.28, columns=columns, heading=heading, note=note)


class _Line(NamedTuple):
    """One line of a caption, of which only the name is shortened when it is too wide."""

    name: str
    before: str = ""
    after: str = ""
    colour: str = INK

    def fitted(self, width: float) -> str:
        room = width - text_width(self.before + self.after, SMALL)
        return self.before + fit(self.name, room, SMALL) + self.after


def _same_length(n: int, **lists: Sequence[Any] | NDArray[Any]) -> None:
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{name} has {len(values)} entries for {n} images")


def _check_predictions(true: NDArray[Any], predicted: NDArray[Any], table: NDArray[Any], n_classes: int) -> None:
    if table.shape != (len(true), n_classes):
        raise ValueError(f"probabilities has shape {table.shape}, expected {(len(true), n_classes)}")
    for name, labels in (("true_labels", true), ("predicted_labels", predicted)):
        if labels.ndim != 1 or labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"{name} must be class indices from 0 to {n_classes - 1}")
    if (table < -1e-3).any() or (table > 1 + 1e-3).any():
        raise ValueError("probabilities must lie in [0, 1]: are these logits?")


def _prediction_lines(true: int, predicted: int, row: NDArray[Any], names: Sequence[str]) -> list[_Line]:
    mark, colour = ("✓ ", BLUE) if true == predicted else ("✗ ", ORANGE)
    lines = [_Line(names[predicted], mark, f" {as_percent(float(row[predicted]))}", colour)]
    if true != predicted:
        lines.append(_Line(names[true], "true: ", f" {as_percent(float(row[true]))}"))
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
    dots = round(picture * DPI)
    images = _shrink(images, dots)
    # Inches that a pixel takes: a whole number of dots, else some columns of a picture come out wider.
    pixel = round(dots / max(images.shape[1:3])) / DPI
    border = 0 if frames is None else max(1, round(0.04 / pixel))
    h, w = images.shape[1] + 2 * border, images.shape[2] + 2 * border
    # A caption may widen the cells by half a picture before its name is shortened.
    widest = max(text_width(ln.before + clean(ln.name) + ln.after, SMALL) for lines in captions for ln in lines)
    caption_width = min(max(picture, widest), 1.5 * picture)
    text_height = CAPTION * max(len(lines) for lines in captions)
    columns = min(columns, len(images))
    cell_h = h + math.ceil((text_height + 1.5 * GAP) / pixel)
    cell_w = max(w, math.ceil(caption_width / pixel)) + math.ceil(GAP / pixel)
    mosaic = _mosaic(images, frames, border, columns, cell_h, cell_w)
    height, width = mosaic.shape[0] * pixel, mosaic.shape[1] * pixel
    fig, page = new_page(width + 2 * PAD - GAP, height, heading, note)
    page.imshow(mosaic, extent=(PAD, PAD + width, height, 0), aspect="auto", interpolation="nearest")
    for i, lines in enumerate(captions):
        x, y = i % columns * cell_w * pixel, (i // columns * cell_h + h) * pixel + 0.03
        for j, line in enumerate(lines):
            text = line.fitted(caption_width)
            write(page, PAD + x, y + (j + 0.5) * CAPTION, text, color=line.colour)
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
