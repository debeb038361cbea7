"""The page of a figure and the text on it: laid out by hand, in inches."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

FONT = "DejaVu Sans"  # comes with matplotlib: ✓, ✗ and … exist, and every machine draws the same figure


DPI = 100  # what TensorBoard renders at; pictures of 32 pixels get a whole number of dots a pixel


INK, MUTED, LINE = "#1a1a1a", "#666666", "#d0d0d0"


BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito: told apart with every kind of colour blindness


HEADING, BODY, SMALL, TINY = 12.0, 9.0, 8.0, 6.0  # points


PAD, GAP, CAPTION = 0.15, 0.12, 0.155  # inches: page margin, between cells, height of a caption line


MIN_WIDTH = 5.0  # inches: a heading has room even over a single picture


@contextmanager
def default_style() -> Iterator[None]:
    """Draw by matplotlib's defaults, whatever the user's matplotlibrc says; also a decorator."""
    with mpl.rc_context(mpl.rcParamsDefault):
        yield


@default_style()
def to_png(figure: Figure) -> bytes:
    """Render ``figure`` as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def new_page(width: float, height: float, heading: str, note: str = "") -> tuple[Figure, Axes]:
    """A white page with its heading; x is in inches from the left, y in inches down from the heading."""
    width = math.ceil(100 * max(width, MIN_WIDTH) - 1e-6) / 100  # whole dots, so that pictures stay sharp
    room = width - 2 * PAD
    lines = [(line, HEADING, "bold", INK) for line in wrap(heading, room, HEADING, "bold")]
    lines += [(line, BODY, "normal", MUTED) for line in wrap(note, room, BODY, "normal")]
    steps = [round(size / 48, 2) for _, size, _, _ in lines]  # 1.5 times the size, in inches
    top = PAD + sum(steps) + GAP
    height = math.ceil(100 * (top + height) - 1e-6) / 100
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    page = fig.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height - top, -top))
    page.set_axis_off()
    y = PAD - top
    for (line, size, weight, colour), step in zip(lines, steps, strict=True):
        write(page, PAD, y + step / 2, line, size, weight=weight, color=colour)
        y += step
    return fig, page


def write(ax: Axes, x: float, y: float, text: str, size: float = SMALL, **style: Any) -> None:
    """Place a text as it is: a ``$`` or ``_`` in a class name must not start mathematics."""
    default = {"family": FONT, "color": INK, "va": "center", "parse_math": False, "usetex": False}
    ax.text(x, y, text, **{**default, "fontsize": size, **style})


def add_panel(fig: Figure, page: Axes, x: float, y: float, width: float, height: float) -> Axes:
    """Axes of their own on a page, the top left corner of the frame at (x, y); everything in inches of the page."""
    (page_width, page_height), bottom = fig.get_size_inches(), page.get_ylim()[0]
    left, up = x / page_width, (bottom - y - height) / page_height
    panel = fig.add_axes((left, up, width / page_width, height / page_height))
    panel.tick_params(labelsize=SMALL, labelfontfamily=FONT, color=LINE, labelcolor=INK)
    panel.set_facecolor("white")
    panel.grid(color=LINE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(LINE)
    return panel


def label_axes(panel: Axes, x: str = "", y: str = "") -> None:
    """Say below and left of a panel what its axes are."""
    panel.set_xlabel(x, family=FONT, fontsize=BODY, color=INK)
    panel.set_ylabel(y, family=FONT, fontsize=BODY, color=INK)


def in_percent(value: float, position: float = 0) -> str:
    """A share as the label of a tick."""
    return f"{100 * value:g}%"


@lru_cache(maxsize=8192)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in inches: the widest at usual resolutions, which differ by up to a tenth."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    widths = [r.get_text_width_height_descent(text, font, ismath=False)[0] / r.dpi for r in _renderers()]
    return float(max(widths))


@lru_cache(maxsize=1)
def _renderers() -> list[Any]:
    agg: Any = RendererAgg  # not typed in matplotlib
    return [agg(1, 1, dpi) for dpi in (DPI, 120, 150, 200)]


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """One line of characters that the font has: the others would draw as a box too, with a warning each."""
    font = get_font(findfont(FONT))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in " ".join(text.split()))


def legible(names: Sequence[str]) -> list[str]:
    """Class names as they are, but for those of which the font has no letter: ``class 3`` can be told apart."""
    return [f"class {i}" if not clean(name).strip("□_- .") and name.strip() else name for i, name in enumerate(names)]


@lru_cache(maxsize=8192)
def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Shorten a text to a width in inches; its end is kept too, since names often differ only there."""
    text = clean(text)
    if text_width(text, size, weight) <= width:
        return text
    n = bisect_right(range(1, len(text)), width, key=lambda n: text_width(elide(text, n), size, weight))
    return elide(text, n)


def elide(text: str, n: int) -> str:
    """The first two thirds and the last third of the ``n`` characters kept of a text."""
    return f"{text[: n - n // 3]}…{text[len(text) - n // 3 :]}"


def wrap(text: str, width: float, size: float, weight: str) -> list[str]:
    """Break a text into lines no wider than ``width`` inches; runs of spaces are kept inside a line."""
    lines: list[str] = []
    for word in map(clean, text.split(" ")):
        if lines and text_width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fit(word, width, size, weight))
    return [line for line in lines if line.strip()]


def as_percent(share: float) -> str:
    """A share as a percentage that says 0% and 100% of exactly 0 and 1 only."""
    if math.isnan(share):
        return "n/a"
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.0005 else ">99.9%" if share >= 0.9995 else f"{share:.1%}"
