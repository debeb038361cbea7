"""Find and decode image files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

T = TypeVar("T")
R = TypeVar("R")

with suppress(ImportError):  # pip install 'cifar10_tl[heic]'
    from pillow_heif import register_heif_opener

    register_heif_opener()

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".heic"}

#: Color around a padded picture: the mean of ImageNet, which is about zero in the network.
PAD_COLOR = (124, 116, 104)

_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")

#: How to turn a picture upright, by its EXIF orientation; those from 5 on are on their side.
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}


class BadImageError(ValueError):
    """Error for a file that is unreadable, truncated, not an image, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``."""


class Decoded(NamedTuple):
    """Pixels of an image file, uint8 [3, S, S], and the size of the upright picture in the file."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode_image(path: Path | str, size: int, fit: str = "crop") -> NDArray[np.uint8]:
    """Return the pixels of :func:`decode_sized`."""
    return decode_sized(path, size, fit).pixels


def decode_sized(path: Path | str, size: int, fit: str = "crop") -> Decoded:
    """Decode an image file to uint8 [3, size, size] as :func:`to_pixels` does, or raise :class:`BadImageError`.

    A large JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, which is faster, if at least twice the pixels that are
    needed remain in both directions: with this margin, the result is "very close to fair resampling" (``reducing_gap``
    in https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image.thumbnail).
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            (columns, rows), _ = _placement(width, height, size, fit)
            reduced = picture.draft(None, (2 * columns, 2 * rows))
            limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns up to twice this limit
            if limit and picture.width * picture.height > limit:
                raise BadImageError(f"Image size ({width * height} pixels) exceeds limit of {limit} pixels")
            pixels = to_pixels(picture, size, fit, reduced and reduced[1][2:])  # reads the EXIF data after the pixels
            return Decoded(pixels, *((height, width) if _orientation(picture) >= 5 else (width, height)))
    except UnidentifiedImageError as error:
        hint = "; to read HEIC, run pip install 'cifar10_tl[heic]'" if Path(path).suffix.lower() == ".heic" else ""
        raise BadImageError(f"not an image format that Pillow can read{hint}") from error
    except MemoryError as error:
        raise BadImageError("MemoryError") from error
    except Exception as error:  # Pillow raises many types of errors for broken files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImageError(" ".join(reason.split())) from error


def to_pixels(
    picture: Image.Image, size: int, fit: str = "crop", extent: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Convert a picture to RGB, uint8 [3, size, size], as in training.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grayscale is scaled to 8 bits, and
    floating-point pixels are expected in [0, 1]. Color profiles are ignored, and only the first frame is used.

    Args:
        picture: Picture of any size. It is resized with antialiased bicubic interpolation unless it has this size.
        size: Width and height of the result in pixels.
        fit: "crop" scales the shorter side to ``size`` and takes the center, "pad" scales the longer side to ``size``
            and fills the rest with ``PAD_COLOR``, "squeeze" changes the aspect ratio.
        extent: Width and height of the content in pixels, if it ends inside the last column or row.
    """
    picture.load()
    width, height = extent or picture.size
    content, box = _placement(width, height, size, fit)
    rgb = _rgb(_eight_bit(picture))
    rgb = rgb if rgb.size == content else rgb.resize(content, Image.Resampling.BICUBIC, box)
    turn = TURNS.get(_orientation(picture))
    upright = rgb if turn is None else rgb.transpose(turn)
    if upright.size != (size, size):
        page = Image.new("RGB", (size, size), PAD_COLOR)
        page.paste(upright, ((size - upright.width) // 2, (size - upright.height) // 2))
        upright = page
    return np.asarray(upright).transpose(2, 0, 1)


def _placement(
    width: float, height: float, size: int, fit: str
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Return width and height of the content of the square, and the part of the picture (x0, y0, x1, y1) it shows."""
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (size, size), (left, top, left + side, top + side)
    scale = size / max(width, height)
    padded = (max(1, round(scale * width)), max(1, round(scale * height)))
    return {"pad": padded, "squeeze": (size, size)}[fit], (0, 0, width, height)


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in TURNS else 1
    except Exception:  # broken EXIF raises many types of errors, and the pixels are still usable
        return 1


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and floating-point pixels to 8 bits, where Pillow would clip them."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    highest = 1.0 if picture.mode == "F" else 65535.0  # Pillow reads 16-bit files as "I;16" or "I"
    fractions = np.nan_to_num((np.asarray(picture, dtype=np.float32) / highest).clip(0, 1))
    return Image.fromarray((255 * fractions).round().astype(np.uint8))


def _rgb(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    rgba = picture.convert("RGBA")
    page = Image.new("RGB", picture.size, "white")
    page.paste(rgba, mask=rgba.getchannel("A"))
    return page


def list_files(folder: Path) -> tuple[list[str], list[OSError]]:
    """Return the files below a folder, sorted, and an error for each folder that cannot be read.

    Hidden files and folders are skipped. Links are followed, each folder once; a broken link counts as a file.
    """
    files: list[str] = []
    errors: list[OSError] = []
    seen = set[str]()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if f[0] != ".")
        paths = (os.path.join(parent, name) for name in names if name[0] != ".")
        files += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    return sorted(files, key=lambda path: path.split(os.sep)), errors


def available_cores() -> int:
    """Return the number of cores that this process may use, also in a container with a CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return min(cores, max(1, quota // period))
    return cores


def in_threads(function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R, None, None]:
    """Yield the results of ``function`` in the order of ``items``, computed by one thread per available core.

    An exception is raised in place of the result. Close the iterator to stop early: it waits for running calls only.

    Args:
        function: Function that releases the GIL most of the time, such as :func:`decode_image`.
        items: Arguments, read in the thread of the consumer.
        window: Maximum number of results that wait for the consumer.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(available_cores())
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
