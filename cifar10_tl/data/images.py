"""Where images come from: torchvision's CIFAR-10, a folder of pictures, or shapes drawn by code.

A source knows its class names at once, makes its images ready once a machine (:meth:`Source.prepare`), and hands them
over as tensors in memory (:meth:`Source.load`). To add one, write a class with these three and name it in ``SOURCES``.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class BadImageError(ValueError):
    """A file that is no picture, cut off, too large or not to be read; the text, of one line, says which."""


def decode_image(path: Path | str, size: int) -> NDArray[np.uint8]:
    """A picture file as uint8 [3, size, size], see :func:`to_pixels`. Training and prediction both read files by it.

    Raises:
        BadImageError: the file is no image, is cut off, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns from its limit on, and refuses from twice the limit on.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of broken EXIF, passed over below
            with Image.open(path) as picture:
                return to_pixels(picture, size)
    except UnidentifiedImageError as error:
        raise BadImageError("no image of a kind that Pillow reads") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"too large, not decoded: {error}") from error
    except Exception as error:  # a broken file fails in many ways, each kind of image in its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImageError(" ".join(reason.split())) from error


def to_pixels(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """A picture as RGB, uint8 [3, size, size], as the network is trained on.

    It is turned upright where its EXIF says so. What is transparent becomes white. 16-bit grey is scaled to 8 bits,
    not cut off; floats are taken to lie in [0, 1]. Colour profiles are not applied, and of several frames the first
    counts. A picture of another size is squeezed to the square with Pillow's bicubic, which averages over the pixels
    that are lost (antialiasing).
    """
    rgb = _rgb(_eight_bit(_upright(picture)))
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow has no one error for broken EXIF, and the picture is none the worse for it
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion would cut off all above 255."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    highest = 1.0 if picture.mode == "F" else 65535.0  # Pillow reads 16-bit files as "I;16" or "I"
    shares = np.nan_to_num((np.asarray(picture, dtype=np.float32) / highest).clip(0, 1))
    return Image.fromarray((255 * shares).round().astype(np.uint8))


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
