"""Page, text and colors of the figures, laid out by hand: no text overlaps, and it is faster than a layout engine."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

FONT = "DejaVu Sans"  # part of matplotlib, has ✓ ✗ …, and makes figures identical on every machine
DPI = 100  # pictures of 32 pixels get a whole number of dots per pixel
INK, MUTED, LINE = "#1a1a1a", "#666666", "#d0d0d0"
BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's colors, safe for color-blind readers
HEADING, BODY, SMALL, TINY = 12.0, 9.0, 8.0, 6.0  # points
PAD, GAP, CAPTION = 0.15, 0.12, 0.155  # inches: page margin, space between cells, height of a caption line
MIN_WIDTH = 5.0  # inches, so that the heading has space
MARKER_LIMIT = 30  # points of a curve that are marked
_RENDERERS: list[Any] = [RendererAgg(1, 1, dpi) for dpi in (DPI, 120, 150, 200)]  # type: ignore[no-untyped-call]
default_style = mpl.rc_context(mpl.rcParamsDefault)  # a decorator: the user's matplotlibrc has no effect


@default_style
def to_png(figure: Figure) -> bytes:
    """Render ``figure`` as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def new_page(width: float, height: float, heading: str, note: str = "") -> tuple[Figure, Axes]:
    """Return a white page with its heading; x and y are in inches, y points down and is 0 below the heading."""
    width = math.ceil(100 * max(width, MIN_WIDTH) - 1e-6) / 100  # whole dots, so that pictures stay sharp
    text_size = width - 2 * PAD
    lines = [(line, 0.25, HEADING, "bold", INK) for line in wrap(heading, text_size, HEADING, "bold")]
    lines += [(line, 0.19, BODY, "normal", MUTED) for line in wrap(note, text_size, BODY, "normal")]
    top = PAD + sum(step for _, step, *_ in lines) + GAP
    height = math.ceil(100 * (top + height) - 1e-6) / 100
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    page = fig.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height - top, -top))
    page.set_axis_off()
    y = PAD - top
    for line, step, size, weight, color in lines:
        write(page, PAD, y + step / 2, line, size, weight=weight, color=color)
        y += step
    return fig, page


def write(ax: Axes, x: float, y: float, text: str, size: float = SMALL, **style: Any) -> None:
    """Write ``text`` literally: ``$`` and ``_`` in a class name do not start mathematics."""
    default = {"family": FONT, "color": INK, "va": "center", "parse_math": False}
    ax.text(x, y, text, **{**default, "fontsize": size, **style})


def add_panel(page: Axes, x: float, y: float, width: float, height: float, labels: tuple[str, ...]) -> Axes:
    """Add axes with labels of x and y, and a title above; (x, y) is the top left corner of their frame in inches."""
    for title in labels[2:]:
        write(page, x, y - 0.15, title, BODY + 1, weight="bold")
    fig: Any = page.figure
    (page_width, page_height), bottom = fig.get_size_inches(), page.get_ylim()[0]
    left, up = x / page_width, (bottom - y - height) / page_height
    panel = fig.add_axes((left, up, width / page_width, height / page_height))
    panel.tick_params(labelsize=SMALL, labelfontfamily=FONT, color=LINE, labelcolor=INK)
    panel.grid(color=LINE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(LINE)
    panel.set_xlabel(labels[0], family=FONT, fontsize=BODY, color=INK)
    panel.set_ylabel(labels[1], family=FONT, fontsize=BODY, color=INK)
    return panel


def scale_accuracy(panel: Axes) -> None:
    """Scale the y axis to its accuracies, at least one percentage point, without ticks above 100%."""
    low, high = panel.get_ylim()
    spare = max(0.0, 0.01 - (high - low)) / 2
    margin = 0.04 * (high - low + 2 * spare)
    panel.set_ylim(max(low - spare, -margin), min(high + spare, 1 + margin))


def add_legend(panel: Axes, **options: Any) -> None:
    """Add a legend in one line above a panel, or elsewhere with ``options`` of matplotlib."""
    columns = len(panel.get_legend_handles_labels()[0])
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": columns} | options
    font = FontProperties(family=FONT, size=SMALL)
    panel.legend(**place, prop=font, labelcolor=INK, frameon=False, borderaxespad=0)


@lru_cache(maxsize=8192)
def text_width(text: str, size: float = SMALL, weight: str = "normal") -> float:
    """Return the width of ``text`` in inches: the largest at common resolutions, which differ by up to a tenth."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    return float(max(r.get_text_width_height_descent(text, font, ismath=False)[0] / r.dpi for r in _RENDERERS))


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """Return ``text`` as one line, with □ for characters that the font lacks and matplotlib would warn about."""
    font = get_font(findfont(FONT))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in " ".join(text.split()))


def legible(names: Sequence[str]) -> list[str]:
    """Return the class names, with "class 3" for a name without a letter in the font."""
    return [f"class {i}" if not clean(name).strip("□_- .") and name.strip() else name for i, name in enumerate(names)]


@lru_cache(maxsize=8192)
def fit(text: str, width: float, size: float = SMALL, weight: str = "normal") -> str:
    """Shorten ``text`` to ``width`` inches in the middle, because names often differ only at their end."""
    text = clean(text)
    if text_width(text, size, weight) <= width:
        return text
    n = bisect_right(range(1, len(text)), width, key=lambda n: text_width(_elide(text, n), size, weight))
    return _elide(text, n)


def _elide(text: str, n: int) -> str:
    return f"{text[: n - n // 3]}…{text[len(text) - n // 3 :]}"


def wrap(text: str, width: float, size: float, weight: str) -> list[str]:
    """Break ``text`` into lines of at most ``width`` inches; runs of spaces inside a line are kept."""
    lines: list[str] = []
    for word in map(clean, text.split(" ")):
        if lines and text_width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fit(word, width, size, weight))
    return [line for line in lines if line.strip()]


def as_percent(fraction: float, digits: int = 1) -> str:
    """Return a percentage that is 0% and 100% for exactly 0 and 1 only."""
    if math.isnan(fraction):
        return "n/a"
    if fraction in (0.0, 1.0):
        return f"{fraction:.0%}"
    text, step = f"{fraction:.{digits}%}", 10.0**-digits
    return {0.0: f"<{step:g}%", 100.0: f">{100 - step:.{digits}f}%"}.get(float(text[:-1]), text)
