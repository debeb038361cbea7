"""The built-in dataset: ten classes of textured shapes on cluttered backgrounds, drawn with numpy.

Every shape is a function of plane coordinates that returns a signed distance: negative inside, positive
outside. Coverage of a pixel follows from the distance at its centre, so edges are smooth without drawing at a
higher resolution. Coordinates run from -1 to 1 over the image, x to the right and y upwards.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray: TypeAlias = NDArray[np.float32]
PlaneFunction: TypeAlias = Callable[[FloatArray, FloatArray], FloatArray]

MIN_IMAGE_SIZE = 8
BLOCK_SIZE = 100  # images drawn together: a multiple of ten whose arrays stay within the processor's cache


def draw_shapes(num_images: int, seed: int, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw a labelled set of shape images.

    Image and label i depend on the seed, i and the image size alone: a longer set starts with a shorter one.

    Args:
        num_images: Number of images N, zero or more.
        seed: Zero or more; another seed draws other images.
        image_size: Height and width S in pixels, at least 8.

    Returns:
        Images, uint8 [N, 3, S, S] (RGB, 0 to 255), and labels, int64 [N] (indices into `CLASS_NAMES`). The
        order is shuffled and the class counts differ by at most one.

    Raises:
        ValueError: If an argument is out of range.
    """
    if num_images < 0:
        raise ValueError(f"num_images must be zero or more, got {num_images}")
    if seed < 0:
        raise ValueError(f"seed must be zero or more, got {seed}")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {image_size}")
    images = np.empty((num_images, 3, image_size, image_size), np.uint8)
    labels = np.empty(num_images, np.int64)
    for start in range(0, num_images, BLOCK_SIZE):
        block = slice(start, min(start + BLOCK_SIZE, num_images))
        # A block has its own random stream and is always drawn whole: what follows cannot change it.
        block_images, block_labels = _draw_block(np.random.default_rng([seed, start]), image_size)
        images[block] = block_images[: block.stop - start]
        labels[block] = block_labels[: block.stop - start]
    return torch.from_numpy(images), torch.from_numpy(labels)


def _draw_block(rng: np.random.Generator, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`BLOCK_SIZE` images and their labels, each run of ten labels holding every class once."""
    tens = np.tile(np.arange(len(CLASS_NAMES)), (BLOCK_SIZE // len(CLASS_NAMES), 1))
    labels = rng.permuted(tens, axis=1).ravel()
    canvas = _draw_background(rng, image_size)
    for _ in range(3):
        _paint_stroke(canvas, rng, longest=0.8, thickest=0.18)
    _paint_shapes(canvas, labels, rng)
    _paint_stroke(canvas, rng, longest=1.5, thickest=0.1)  # hides a part of most shapes
    return _photograph(canvas, rng), labels


# Shapes: signed distances in a unit frame, each with about the same area.


def _circle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.hypot(x, y) - 0.8


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(np.hypot(x, y) - 0.64) - 0.24


def _crescent(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(np.hypot(x, y) - 0.9, 0.72 - np.hypot(x - 0.45, y))


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    along, _ = _fold(x, y, 3)
    return along - 0.5


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.72


def _diamond(x: FloatArray, y: FloatArray) -> FloatArray:
    return 0.85 * np.abs(x) + 0.53 * np.abs(y) - 0.53


def _hexagon(x: FloatArray, y: FloatArray) -> FloatArray:
    along, _ = _fold(x, y, 6)
    return along - 0.78


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    along, across = _fold(x, -y, 5)  # one half of one of five tips
    return 0.33 * along + 0.945 * across - 0.31


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.85, short - 0.27)


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    x, y = np.abs(x), y + 0.95  # the tip at the origin, then a square on its corner below two discs
    square = np.maximum(x - y, x + y - 1.7) * 0.71
    return np.minimum(square, np.hypot(x - 0.425, y - 1.275) - 0.6)


def _fold(x: FloatArray, y: FloatArray, sectors: int) -> tuple[FloatArray, FloatArray]:
    """Coordinates along and across (zero or more) the axis of the nearest of equal sectors, the first downwards."""
    width = np.float32(2 * math.pi / sectors)
    angle = np.abs((np.arctan2(x, -y) + width / 2) % width - width / 2)
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.sin(angle)


# Textures: patterns from -1 to 1 with a period of about 2 pi.


def _stripes(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.sin(x)


def _checks(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.tanh(4 * np.sin(x) * np.sin(y))


def _blotches(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.sin(x + 2 * np.sin(0.7 * y)) * np.sin(y + 2 * np.sin(0.6 * x))


def _gradient(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.tanh(0.2 * x)


TEXTURES: tuple[PlaneFunction, ...] = (_stripes, _checks, _blotches, _gradient)


TEXTURES: tuple[PlaneFunction, ...] = (_stripes, _checks, _blotches, _gradient)


class ShapeClass(NamedTuple):
    """How a class looks: its outline for certain, its texture as a rule."""

    outline: PlaneFunction
    pattern: PlaneFunction
    tint: tuple[float, float, float]


SHAPES: dict[str, ShapeClass] = {
    "circle": ShapeClass(_circle, _blotches, (1, -1, 0)),
    "ring": ShapeClass(_ring, _stripes, (1, -1, 0)),
    "crescent": ShapeClass(_crescent, _stripes, (1, 1, 1)),
    "triangle": ShapeClass(_triangle, _checks, (1, 0, -1)),
    "square": ShapeClass(_square, _checks, (1, 1, 1)),
    "diamond": ShapeClass(_diamond, _checks, (1, -1, 0)),
    "hexagon": ShapeClass(_hexagon, _blotches, (0, 1, -1)),
    "star": ShapeClass(_star, _stripes, (1, 0, -1)),
    "cross": ShapeClass(_cross, _stripes, (0, 1, -1)),
    "heart": ShapeClass(_heart, _blotches, (1, 1, 1)),
}
CLASS_NAMES: tuple[str, ...] = tuple(SHAPES)


# Painting: a canvas is a block of images, float32 [B, 3, S, S] from 0 to 1, and changed in place.


def _draw_background(rng: np.random.Generator, image_size: int) -> FloatArray:
    pattern = _by_group(TEXTURES, rng.integers(len(TEXTURES), size=BLOCK_SIZE), *_pattern_plane(rng, image_size))
    return _uniform(rng, 0, 0.55, 3) + pattern[:, None] * _uniform(rng, -0.2, 0.2, 3)


def _paint_shapes(canvas: FloatArray, labels: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Paint one shape of the labelled class on every image."""
    image_size = canvas.shape[-1]
    x, y = _grid(image_size)
    scale, turn = _uniform(rng, 0.55, 0.9), _uniform(rng, -0.35, 0.35)
    stretch = np.exp(_uniform(rng, -0.2, 0.2))
    x, y = _rotate(x - _uniform(rng, -0.25, 0.25), y - _uniform(rng, -0.25, 0.25), turn)
    distance = scale * _by_group(
        [s.outline for s in SHAPES.values()], labels, x / (scale * stretch), y * stretch / scale
    )
    wears = np.where(rng.random(BLOCK_SIZE) < 0.75, labels, rng.integers(len(SHAPES), size=BLOCK_SIZE))
    pattern = _by_group([s.pattern for s in SHAPES.values()], wears, *_pattern_plane(rng, image_size))
    tint = np.array([s.tint for s in SHAPES.values()], np.float32)[wears, :, None, None]
    colour = _uniform(rng, 0.5, 0.9, 3) + pattern[:, None] * tint * _uniform(rng, 0.2, 0.4, 1)
    _paint(canvas, distance, colour)


def _paint_stroke(canvas: FloatArray, rng: np.random.Generator, longest: float, thickest: float) -> None:
    """Paint one round-ended stroke of random place, length and width on every image: a line or a blob."""
    x, y = _grid(canvas.shape[-1])
    length = _uniform(rng, 0, longest)
    x, y = _rotate(x - _uniform(rng, -1, 1), y - _uniform(rng, -1, 1), _uniform(rng, 0, 2 * math.pi))
    distance = np.hypot(np.maximum(np.abs(x) - length / 2, 0), y) - _uniform(rng, 0.02, thickest)
    _paint(canvas, distance, _uniform(rng, 0, 1, 3))


def _paint(canvas: FloatArray, distance: FloatArray, colour: FloatArray) -> None:
    """Cover what lies within a signed distance of zero, with an edge one pixel wide."""
    pixel = 2 / canvas.shape[-1]
    coverage = np.clip(0.5 - distance / pixel, 0, 1)
    canvas += coverage[:, None] * (colour - canvas)


def _pattern_plane(rng: np.random.Generator, image_size: int) -> tuple[FloatArray, FloatArray]:
    """Coordinates for a pattern, of random direction, period and phase."""
    x, y = _rotate(*_grid(image_size), _uniform(rng, 0, 2 * math.pi))
    frequency = _uniform(rng, 5, 16)
    return frequency * x + _uniform(rng, 0, 9), frequency * y + _uniform(rng, 0, 9)


def _photograph(canvas: FloatArray, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Uneven light, a little blur and sensor noise, then rounding to bytes."""
    x, y = _grid(canvas.shape[-1])
    light = 1 + _uniform(rng, -0.3, 0.3) * x + _uniform(rng, -0.3, 0.3) * y
    canvas = canvas.clip(0, 1) * light[:, None]
    canvas += _uniform(rng, 0, 1, 1) * (_blur(canvas) - canvas)
    canvas += _uniform(rng, 0, 0.07, 1) * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)


def _blur(canvas: FloatArray) -> FloatArray:
    """Every pixel averaged with its neighbours, weights 1 2 1 along both axes."""
    padded = np.pad(canvas, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


# Helpers on blocks: coordinates are [B, S, S] or broadcast to it.


def _grid(image_size: int) -> tuple[FloatArray, FloatArray]:
    """X [1, 1, S] and y [1, S, 1] of the pixel centres."""
    centres = (np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size) - 1
    return centres[None, None, :], -centres[None, :, None]


def _rotate(x: FloatArray, y: FloatArray, angle: FloatArray) -> tuple[FloatArray, FloatArray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _by_group(
    functions: Sequence[PlaneFunction], groups: NDArray[np.int64], x: FloatArray, y: FloatArray
) -> FloatArray:
    """Apply to each image the function its group names."""
    values = np.empty_like(x)
    for group, function in enumerate(functions):
        members = groups == group
        values[members] = function(x[members], y[members])
    return values


def _uniform(rng: np.random.Generator, low: float, high: float, channels: int | None = None) -> FloatArray:
    """One random number per image [B, 1, 1], or per image and channel [B, channels, 1, 1]."""
    shape = (BLOCK_SIZE, 1, 1) if channels is None else (BLOCK_SIZE, channels, 1, 1)
    return rng.uniform(low, high, shape).astype(np.float32)
