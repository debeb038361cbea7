"""Grids of pictures: training images and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar10_tl.plots import style

Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]


@style.default_style()
def sample_grid(
    images: Images, titles: Sequence[Sequence[tuple[str, str]]], *, heading: str, columns: int = 8
) -> Figure:
    """Draw pictures ``[N, H, W, 3]`` in a grid.

    The title of a picture is one or two lines of (name, suffix); a wide name is shortened, its suffix is not.
    """
    captions = [[_Line(name, after=after) for name, after in title] for title in titles]
    return _grid(images, captions, None, picture=0.96, columns=columns, heading=heading)


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
    class_names = style.legible(class_names)
    rows = zip(labels, predictions, probabilities, strict=True)
    captions = [_prediction_lines(label, predicted, row, class_names) for label, predicted, row in rows]
    frames = [style.BLUE if correct else style.ORANGE for correct in np.equal(labels, predictions)]
    note = "✓ correct    ✗ incorrect    % = probability of that class"
    return _grid(images, captions, frames, picture=1.28, columns=5, heading=heading, note=note)


class _Line(NamedTuple):
    """Line of a caption, of which only the name is shortened if it is too wide."""

    name: str
    before: str = ""
    after: str = ""
    color: str = style.INK

    def width(self) -> float:
        return style.text_width(self.before + style.clean(self.name) + self.after, style.SMALL)

    def fitted(self, width: float) -> str:
        left = width - style.text_width(self.before + self.after, style.SMALL)
        return self.before + style.fit(self.name, left, style.SMALL) + self.after


def _prediction_lines(label: int, predicted: int, row: NDArray[Any], names: Sequence[str]) -> list[_Line]:
    mark, color = ("✓ ", style.BLUE) if label == predicted else ("✗ ", style.ORANGE)
    lines = [_Line(names[predicted], mark, f" {style.as_percent(float(row[predicted]))}", color)]
    if label != predicted:
        lines.append(_Line(names[label], "true: ", f" {style.as_percent(float(row[label]))}"))
    return lines


def _grid(
    images: Images,
    captions: Sequence[Sequence[_Line]],
    frames: Sequence[str] | None,
    *,
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
    border = 0 if frames is None else max(1, round(0.04 / pixel))
    h, w = images.shape[1] + 2 * border, images.shape[2] + 2 * border
    # A caption may widen the cells by half a picture before its name is shortened.
    caption_width = min(max(picture, *(line.width() for lines in captions for line in lines)), 1.5 * picture)
    caption_height = style.CAPTION * max(len(lines) for lines in captions)
    columns = min(columns, len(images))
    cell_h = h + math.ceil((caption_height + 1.5 * style.GAP) / pixel)
    cell_w = max(w, math.ceil(caption_width / pixel)) + math.ceil(style.GAP / pixel)
    mosaic = _mosaic(images, frames, border, columns, cell_h, cell_w)
    height, width = mosaic.shape[0] * pixel, mosaic.shape[1] * pixel
    fig, page = style.new_page(width + 2 * style.PAD - style.GAP, height, heading, note)
    extent = (style.PAD, style.PAD + width, height, 0)
    page.imshow(mosaic, extent=extent, aspect="auto", interpolation="nearest")
    for i, lines in enumerate(captions):
        x, y = style.PAD + i % columns * cell_w * pixel, (i // columns * cell_h + h) * pixel + 0.03
        for j, line in enumerate(lines):
            style.write(page, x, y + (j + 0.5) * style.CAPTION, line.fitted(caption_width), color=line.color)
    return fig


def _shrink(images: Images, dots: int) -> Images:
    """Scale pictures down to at most ``dots`` pixels per side."""
    h, w = images.shape[1:3]
    if max(h, w) <= dots:
        return images
    size = (max(1, w * dots // max(h, w)), max(1, h * dots // max(h, w)))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


def _mosaic(
    images: Images, frames: Sequence[str] | None, border: int, columns: int, cell_h: int, cell_w: int
) -> Images:
    """Return one white image with every picture, in its frame, at the top left of its cell."""
    n, h, w, _ = images.shape
    mosaic = np.full((-(-n // columns) * cell_h, columns * cell_w, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * cell_h, i % columns * cell_w
        if frames is not None:
            color = np.multiply(to_rgb(frames[i]), 255).astype(np.uint8)
            mosaic[y : y + h + 2 * border, x : x + w + 2 * border] = color
        mosaic[y + border : y + border + h, x + border : x + border + w] = image
    return mosaic
