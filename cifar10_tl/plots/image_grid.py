"""Grids of pictures with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar10_tl.plots import style

Images = NDArray[np.uint8]
Captions = Sequence[Sequence[tuple[str, str, str, str]]]  # lines: before, name, after, color


def sample_grid(
    images: Images, titles: Sequence[Sequence[tuple[str, str]]], *, heading: str, columns: int = 8
) -> Figure:
    """Draw pictures ``[N, H, W, 3]`` in a grid.

    The title of a picture is one or two lines of (name, suffix); a wide name is shortened, its suffix is not.
    """
    captions = [[("", name, suffix, style.INK) for name, suffix in title] for title in titles]
    return caption_grid(images, captions, heading=heading, columns=columns)


@style.default_style
def caption_grid(
    images: Images,
    captions: Captions,
    *,
    heading: str,
    note: str = "",
    columns: int = 5,
    side: float = 0.96,
    frame: float = 0,
) -> Figure:
    """Draw pictures of about ``side`` inches with captions below, and frames in the color of the first line."""
    (height, width), dots = images.shape[1:3], round(side * style.DPI)
    longest = max(height, width)
    size = tuple(max(1, length * min(longest, dots) // longest) for length in (width, height))
    # Inches per pixel: a whole number of dots, or some columns of a picture would be wider than others.
    pixel = round(dots / max(size)) / style.DPI
    border = max(1, round(frame / pixel)) if frame else 0
    # A caption may widen the cells by half a picture before its name is shortened.
    texts = (before + style.clean(name) + after for lines in captions for before, name, after, _ in lines)
    caption_width = min(max(side, *map(style.text_width, texts)), 1.5 * side)
    caption_height = style.CAPTION * max(len(lines) for lines in captions)
    step_x = max(size[0] + 2 * border, math.ceil(caption_width / pixel)) + math.ceil(style.GAP / pixel)
    step_y = size[1] + 2 * border + math.ceil((caption_height + 1.5 * style.GAP) / pixel)
    columns = min(columns, len(images))
    mosaic = Image.new("RGB", (columns * step_x, math.ceil(len(images) / columns) * step_y), "white")
    page_width, page_height = mosaic.width * pixel, mosaic.height * pixel
    fig, page = style.new_page(page_width + 2 * style.PAD - style.GAP, page_height, heading, note)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * step_x, i // columns * step_y
        picture = Image.fromarray(image).resize(size, Image.Resampling.BOX)
        picture = ImageOps.expand(picture, border, fill=lines[0][-1])
        mosaic.paste(picture, (left, top))
        for j, (before, name, after, color) in enumerate(lines):
            name = style.fit(name, caption_width - style.text_width(before + after))
            y = (top + picture.height) * pixel + 0.03 + (j + 0.5) * style.CAPTION
            style.write(page, style.PAD + left * pixel, y, before + name + after, color=color)
    extent = (style.PAD, style.PAD + page_width, page_height, 0)
    page.imshow(mosaic, extent=extent, aspect="auto", interpolation="nearest")
    return fig
