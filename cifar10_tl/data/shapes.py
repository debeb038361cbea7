"""Built-in dataset of ten classes of textured shapes on cluttered backgrounds.

Each class has an outline and a texture, which is replaced by a random one in some images. An outline is a function of
plane coordinates that returns a signed distance, negative inside. The distance at its center determines the coverage
of a pixel, so edges are antialiased without supersampling. Coordinates are -1 to 1, x to the right and y upwards.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

PlaneFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]

BLOCK_SIZE = 100  # images drawn together: a multiple of ten whose tensors fit into the CPU cache


def draw_shapes(num_images: int, seed: int, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw RGB images, uint8 [N, 3, S, S], and labels, int64 [N], in random order with balanced classes.

    Image i depends only on ``seed``, i and ``image_size``.
    """
    images = torch.empty(num_images, 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.empty(num_images, dtype=torch.int64)
    for start in range(0, num_images, BLOCK_SIZE):
        # Whole blocks with one seed each make the images independent of num_images.
        block_images, block_labels = _draw_block(np.random.default_rng([seed, start]), image_size)
        images[start : start + BLOCK_SIZE] = block_images[: num_images - start]
        labels[start : start + BLOCK_SIZE] = block_labels[: num_images - start]
    return images, labels


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.45, y))


def _star(x: Tensor, y: Tensor) -> Tensor:
    along, across = _fold(x, -y, 5)  # half of one of the five points
    return 0.33 * along + 0.945 * across - 0.31


def _cross(x: Tensor, y: Tensor) -> Tensor:
    longer, shorter = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(longer - 0.85, shorter - 0.27)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y + 0.95  # a square on its corner, at the origin, below two discs
    square = torch.maximum(x - y, x + y - 1.7) * 0.71
    return torch.minimum(square, torch.hypot(x - 0.425, y - 1.275) - 0.6)


def _fold(x: Tensor, y: Tensor, sectors: int) -> tuple[Tensor, Tensor]:
    """Return coordinates along and (absolute) across the axis of the nearest sector, the first one downwards."""
    width = 2 * math.pi / sectors
    angle = torch.remainder(torch.atan2(x, -y) + width / 2, width) - width / 2
    radius = torch.hypot(x, y)
    return radius * angle.cos(), radius * angle.sin().abs()


_PATTERNS: dict[str, PlaneFunction] = {
    "stripes": lambda x, y: x.sin(),
    "checks": lambda x, y: (4 * x.sin() * y.sin()).tanh(),
    "blotches": lambda x, y: (x + 2 * (0.7 * y).sin()).sin() * (y + 2 * (0.6 * x).sin()).sin(),
}
#: Pattern, tint (the sign of the pattern in red, green and blue) and outline of each class. The mean color of an image
#: hardly depends on its class.
_SHAPES: dict[str, tuple[str, tuple[int, int, int], PlaneFunction]] = {
    "circle": ("blotches", (1, -1, 0), lambda x, y: torch.hypot(x, y) - 0.8),
    "ring": ("stripes", (1, -1, 0), lambda x, y: (torch.hypot(x, y) - 0.64).abs() - 0.24),
    "crescent": ("stripes", (1, 1, 1), _crescent),
    "triangle": ("checks", (1, 0, -1), lambda x, y: _fold(x, y, 3)[0] - 0.5),
    "square": ("checks", (1, 1, 1), lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.72),
    "diamond": ("checks", (1, -1, 0), lambda x, y: 0.85 * x.abs() + 0.53 * y.abs() - 0.53),
    "hexagon": ("blotches", (0, 1, -1), lambda x, y: _fold(x, y, 6)[0] - 0.78),
    "star": ("stripes", (1, 0, -1), _star),
    "cross": ("stripes", (0, 1, -1), _cross),
    "heart": ("blotches", (1, 1, 1), _heart),
}
CLASS_NAMES = tuple(_SHAPES)
_CLASS_PATTERNS = [_PATTERNS[pattern] for pattern, _, _ in _SHAPES.values()]
_TINTS = torch.tensor([tint for _, tint, _ in _SHAPES.values()])
_OUTLINES = [outline for *_, outline in _SHAPES.values()]


def _draw_block(rng: np.random.Generator, image_size: int) -> tuple[Tensor, Tensor]:
    """Draw ``BLOCK_SIZE`` images and their labels, with every class once in each ten."""
    tens = np.tile(np.arange(len(CLASS_NAMES)), (BLOCK_SIZE // len(CLASS_NAMES), 1))
    labels = torch.from_numpy(rng.permuted(tens, axis=1)).flatten()
    background = _draw_pattern(rng, _any_class(rng), image_size)
    canvas = _uniform(rng, 0, 0.3, channels=3) + background * _uniform(rng, -0.15, 0.15, channels=3)
    for _ in range(3):
        _paint_stroke(canvas, rng, longest=0.8, thickest=0.18)
    _paint_shapes(canvas, labels, rng)
    _paint_stroke(canvas, rng, longest=1.5, thickest=0.1)  # occludes many shapes in part
    return _photograph(canvas, rng), labels


def _draw_pattern(rng: np.random.Generator, classes: Tensor, image_size: int) -> Tensor:
    """Draw patterns of the given classes with random direction, period and phase, [B, 1, S, S]."""
    x, y = _rotate(*_grid(image_size), _uniform(rng, 0, 2 * math.pi))
    frequency = _uniform(rng, 7, 12)
    x, y = frequency * x + _uniform(rng, 0, 9), frequency * y + _uniform(rng, 0, 9)
    return _by_class(_CLASS_PATTERNS, classes, x, y).unsqueeze(1)


def _paint_stroke(canvas: Tensor, rng: np.random.Generator, longest: float, thickest: float) -> None:
    """Paint one round-ended stroke of random position, length and width on every image."""
    x, y = _grid(canvas.shape[-1])
    x, y = x - _uniform(rng, -1, 1), y - _uniform(rng, -1, 1)
    x, y = _rotate(x, y, _uniform(rng, 0, 2 * math.pi))
    beyond_end = (x.abs() - _uniform(rng, 0, longest / 2)).clamp(min=0)
    distance = torch.hypot(beyond_end, y) - _uniform(rng, 0.02, thickest)
    _paint(canvas, distance, _uniform(rng, 0, 1, channels=3))


def _paint_shapes(canvas: Tensor, labels: Tensor, rng: np.random.Generator) -> None:
    """Paint one shape of the labeled class on every image."""
    x, y = _grid(canvas.shape[-1])
    scale, stretch = _uniform(rng, 0.55, 0.9), _uniform(rng, -0.2, 0.2).exp()
    x, y = x - _uniform(rng, -0.3, 0.3), y - _uniform(rng, -0.3, 0.3)
    x, y = _rotate(x, y, _uniform(rng, -0.35, 0.35))  # larger angles would turn squares into diamonds
    distance = scale * _by_class(_OUTLINES, labels, x / (scale * stretch), y * stretch / scale)
    # One shape in ten has a random texture, so that only the outline determines the class.
    wears = torch.where(torch.from_numpy(rng.random(BLOCK_SIZE)) < 0.9, labels, _any_class(rng))
    texture = _draw_pattern(rng, wears, canvas.shape[-1]) * _TINTS[wears, :, None, None]
    color = _uniform(rng, 0.5, 0.9, channels=3) + texture * _uniform(rng, 0.35, 0.5, channels=1)
    _paint(canvas, distance, color)


def _paint(canvas: Tensor, distance: Tensor, color: Tensor) -> None:
    """Paint the inside of a signed distance, with an edge one pixel wide."""
    pixel = 2 / canvas.shape[-1]
    coverage = (0.5 - distance / pixel).clamp(0, 1)
    canvas += coverage.unsqueeze(1) * (color - canvas)


def _photograph(canvas: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply uneven light, blur and sensor noise, and convert to uint8."""
    x, y = _grid(canvas.shape[-1])
    light = 1 + _uniform(rng, -0.3, 0.3) * x + _uniform(rng, -0.3, 0.3) * y
    lit = canvas.clamp(0, 1) * light.unsqueeze(1)
    blurred = lit + _uniform(rng, 0, 1, channels=1) * (_blur(lit) - lit)
    noise = torch.from_numpy(rng.standard_normal(canvas.shape, np.float32))
    photo = blurred + _uniform(rng, 0, 0.06, channels=1) * noise
    return (255 * photo.clamp(0, 1)).round().to(torch.uint8)


def _blur(canvas: Tensor) -> Tensor:
    """Blur with weights 1, 2, 1 along both axes."""
    padded = torch.nn.functional.pad(canvas, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


def _grid(image_size: int) -> tuple[Tensor, Tensor]:
    """Return coordinates of the pixel centers, x [1, 1, S] and y [1, S, 1]."""
    centers = (torch.arange(image_size, dtype=torch.float32) + 0.5) * (2 / image_size) - 1
    return centers[None, None, :], -centers[None, :, None]


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates in a frame rotated counterclockwise by an angle in radians."""
    cos, sin = angle.cos(), angle.sin()
    return cos * x + sin * y, cos * y - sin * x


def _by_class(functions: Sequence[PlaneFunction], classes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Apply to each image the function of its class."""
    values = torch.empty_like(x)
    for label, function in enumerate(functions):
        members = classes == label
        values[members] = function(x[members], y[members])
    return values


def _any_class(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(len(CLASS_NAMES), size=BLOCK_SIZE))


def _uniform(rng: np.random.Generator, low: float, high: float, channels: int | None = None) -> Tensor:
    """Draw one number per image, [B, 1, 1], or per image and channel, [B, channels, 1, 1]."""
    shape = (BLOCK_SIZE, 1, 1) if channels is None else (BLOCK_SIZE, channels, 1, 1)
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
