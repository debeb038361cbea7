"""Find and decode image files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class BadImageError(ValueError):
    """Error for a file that is unreadable, truncated, not an image, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``."""


def decode_image(path: Path | str, size: int) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [3, size, size] by :func:`to_pixels`, or raise :class:`BadImageError`."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about broken EXIF, ignored below
            with Image.open(path) as picture:
                return to_pixels(picture, size)
    except UnidentifiedImageError as error:
        raise BadImageError("not an image format that Pillow can read") from error
    except Exception as error:  # Pillow raises many types of errors for broken files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImageError(" ".join(reason.split())) from error


def to_pixels(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Convert a picture to RGB, uint8 [3, size, size], as in training.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grayscale is scaled to 8 bits, and
    floating-point pixels are expected in [0, 1]. Color profiles are ignored, and only the first frame is used. Other
    sizes are resized to the square with antialiased bicubic interpolation.
    """
    rgb = _rgb(_eight_bit(_upright(picture)))
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # broken EXIF raises many types of errors, and the pixels are still usable
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and floating-point pixels to 8 bits, where Pillow would clip them."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    highest = 1.0 if picture.mode == "F" else 65535.0  # Pillow reads 16-bit files as "I;16" or "I"
    fractions = np.nan_to_num((np.asarray(picture, dtype=np.float32) / highest).clip(0, 1))
    return Image.fromarray((255 * fractions).round().astype(np.uint8))


def _rgb(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    page = Image.new("RGB", picture.size, "white")
    page.paste(rgba, mask=rgba.getchannel("A"))
    return page


def list_files(folder: Path) -> tuple[list[Path], list[OSError]]:
    """Return the files below a folder, sorted, and an error for each folder that cannot be read.

    Hidden files and folders are skipped. Links are followed, each folder once; a broken link counts as a file.
    """
    files: list[Path] = []
    errors: list[OSError] = []
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        seen.add(os.path.realpath(parent))
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(parent, f)) not in seen]
        paths = (Path(parent, name) for name in names if name[0] != ".")
        files += [path for path in paths if path.is_file() or not path.exists()]
    return sorted(files), errors
