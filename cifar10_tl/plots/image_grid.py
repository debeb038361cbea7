"""Grids of pictures: training images and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar10_tl.plots import style

Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Captions = Sequence[Sequence[tuple[str, str, str, str]]]  # lines: before, name, after, color


@style.default_style()
def sample_grid(
    images: Images, titles: Sequence[Sequence[tuple[str, str]]], *, heading: str, columns: int = 8
) -> Figure:
    """Draw pictures ``[N, H, W, 3]`` in a grid.

    The title of a picture is one or two lines of (name, suffix); a wide name is shortened, its suffix is not.
    """
    captions = [[("", name, suffix, style.INK) for name, suffix in title] for title in titles]
    return _grid(images, captions, [], 0.96, columns, heading)


@style.default_style()
def prediction_grid(
    images: Images,
    labels: Labels,
    predictions: Labels,
    probabilities: NDArray[np.floating[Any]],
    class_names: Sequence[str],
    *,
    heading: str,
) -> Figure:
    """Draw pictures ``[N, H, W, 3]`` with the predicted class and, where it is incorrect, the true class.

    ``probabilities`` is ``[N, K]`` for K classes, and N may be 0.
    """
    if not len(images):
        return style.new_page(style.MIN_WIDTH, 0, heading, "no such predictions")[0]
    names, captions, frames = style.legible(class_names), [], []
    for label, predicted, row in zip(labels, predictions, probabilities, strict=True):
        mark, color = ("✓ ", style.BLUE) if label == predicted else ("✗ ", style.ORANGE)
        lines = [(mark, names[predicted], f" {style.as_percent(float(row[predicted]))}", color)]
        if label != predicted:
            lines.append(("true: ", names[label], f" {style.as_percent(float(row[label]))}", style.INK))
        captions.append(lines)
        frames.append(color)
    return _grid(
        images, captions, frames, 1.28, 5, heading, "✓ correct    ✗ incorrect    % = probability of that class"
    )


def _grid(
    images: Images,
    captions: Captions,
    frames: Sequence[str],
    picture: float,
    columns: int,
    heading: str,
    note: str = "",
) -> Figure:
    """Compose pictures of about ``picture`` inches into one image and write the captions below them."""
    dots = round(picture * style.DPI)
    images = _shrink(images, dots)
    # Inches per pixel: a whole number of dots, or some columns of a picture would be wider than others.
    pixel = round(dots / max(images.shape[1:3])) / style.DPI
    if frames:
        images = _framed(images, frames, max(1, round(0.04 / pixel)))
    n, h, w, _ = images.shape
    widths = (_width(before + style.clean(name) + after) for lines in captions for before, name, after, _ in lines)
    # A caption may widen the cells by half a picture before its name is shortened.
    caption_width = min(max(picture, *widths), 1.5 * picture)
    caption_height = style.CAPTION * max(len(lines) for lines in captions)
    columns = min(columns, n)
    cell_h = h + math.ceil((caption_height + 1.5 * style.GAP) / pixel)
    cell_w = max(w, math.ceil(caption_width / pixel)) + math.ceil(style.GAP / pixel)
    rows = -(-n // columns)
    cells = np.full((rows * columns, cell_h, cell_w, 3), 255, np.uint8)
    cells[:n, :h, :w] = images
    mosaic = cells.reshape(rows, columns, cell_h, cell_w, 3).swapaxes(1, 2).reshape(rows * cell_h, columns * cell_w, 3)
    height, width = mosaic.shape[0] * pixel, mosaic.shape[1] * pixel
    fig, page = style.new_page(width + 2 * style.PAD - style.GAP, height, heading, note)
    extent = (style.PAD, style.PAD + width, height, 0)
    page.imshow(mosaic, extent=extent, aspect="auto", interpolation="nearest")
    for i, lines in enumerate(captions):
        x, y = style.PAD + i % columns * cell_w * pixel, (i // columns * cell_h + h) * pixel + 0.03
        for j, (before, name, after, color) in enumerate(lines):
            name = style.fit(name, caption_width - _width(before + after), style.SMALL)
            style.write(page, x, y + (j + 0.5) * style.CAPTION, before + name + after, color=color)
    return fig


def _width(text: str) -> float:
    return style.text_width(text, style.SMALL)


def _shrink(images: Images, dots: int) -> Images:
    """Scale pictures down to at most ``dots`` pixels per side."""
    h, w = images.shape[1:3]
    if max(h, w) <= dots:
        return images
    size = (max(1, w * dots // max(h, w)), max(1, h * dots // max(h, w)))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


def _framed(images: Images, colors: Sequence[str], border: int) -> Images:
    """Return pictures with a frame of ``border`` pixels, each in its color."""
    n, h, w, _ = images.shape
    framed = np.empty((n, h + 2 * border, w + 2 * border, 3), np.uint8)
    framed[:] = np.multiply([to_rgb(color) for color in colors], 255).astype(np.uint8)[:, None, None]
    framed[:, border:-border, border:-border] = images
    return framed
