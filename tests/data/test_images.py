from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import lock
from PIL import Image

from cifar10_tl.data.images import BadImageError, decode_image, list_files


def wave(height: int = 20, width: int = 30) -> np.ndarray:
    """Return a smooth image without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([3 * y + 5 * x, 250 - 4 * y, 40 + 6 * x], axis=-1).clip(0, 255).astype(np.uint8)


def resized(rgb: np.ndarray, size: int) -> np.ndarray:
    """Return the RGB image resized by Pillow's bicubic, uint8 [3, size, size]."""
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_images_are_resized_to_the_square(tmp_path: Path) -> None:
    Image.fromarray(wave()).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), resized(wave(), 32))
    Image.fromarray(wave(32, 32)).save(tmp_path / "b.png")
    assert np.array_equal(decode_image(tmp_path / "b.png", 32), wave(32, 32).transpose(2, 0, 1))


def test_16_bit_gray_is_scaled(tmp_path: Path) -> None:
    gray = wave()[..., 0]
    for name, image in {
        "a.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "b.tif": Image.fromarray(gray.astype(np.uint16) * 257),
        "c.tif": Image.fromarray(gray.astype(np.int32) * 257),
        "d.tif": Image.fromarray(gray.astype(np.float32) / 255),
        "e.png": Image.fromarray(gray),
    }.items():
        image.save(tmp_path / name)
        assert np.array_equal(decode_image(tmp_path / name, 32), resized(np.stack([gray] * 3, -1), 32)), name
    Image.fromarray(np.array([[np.nan, np.inf], [-1, 2]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert decode_image(tmp_path / "f.tif", 2)[0].tolist() == [[0, 255], [0, 255]]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgb, alpha = wave(), np.zeros((20, 30), np.uint8)
    alpha[:10] = 255
    wanted = resized(np.where(alpha[..., None] > 0, rgb, 255).astype(np.uint8), 32)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), wanted)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.gif", transparency=1)
    assert decode_image(tmp_path / "b.gif", 2)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    half = Image.new("LA", (4, 4), (0, 51))
    half.save(tmp_path / "c.png")
    assert (decode_image(tmp_path / "c.png", 4) == 204).all()


def test_other_modes_are_read(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert decode_image(tmp_path / "a.jpg", 8)[:, 0, 0] == pytest.approx([255, 0, 0], abs=4)
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert (decode_image(tmp_path / "b.png", 32) == 255).all()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "c.bmp")
    pixel = decode_image(tmp_path / "c.bmp", 32)
    assert pixel.shape == (3, 32, 32)
    assert (pixel == np.array([7, 8, 9])[:, None, None]).all()


@pytest.mark.parametrize(
    ("orientation", "quarter_turns", "mirrored"), [(1, 0, 0), (3, 2, 0), (6, -1, 0), (8, 1, 0), (2, 0, 1), (5, -1, 1)]
)
def test_exif_orientation_is_applied(orientation: int, quarter_turns: int, mirrored: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(wave()).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(wave(), quarter_turns)
    upright = upright[:, ::-1] if mirrored else upright
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), resized(np.ascontiguousarray(upright), 32))


def test_broken_exif_is_ignored(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name, exif in (("a.png", b"garbage"), ("b.png", b"MM\0*\0\0"), ("c.jpg", b"Exif\0\0II*\0\x08\0\0\0")):
        Image.fromarray(wave()).save(tmp_path / name, exif=exif)
        assert decode_image(tmp_path / name, 32) == pytest.approx(resized(wave(), 32), abs=20)
    assert not [w for w in recwarn if "EXIF" in str(w.message)]


def png_bomb(path: Path, side: int = 20_000) -> None:
    """Write a PNG of a few kilobytes that decodes to side * side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [20_000, 10_000])  # above twice Pillow's limit, and where Pillow only warns
def test_decompression_bombs_are_not_decoded(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    png_bomb(tmp_path / "bomb.png", side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
    with pytest.raises(BadImageError, match=rf"Image size \({side**2} pixels\) exceeds limit of \d+"):
        decode_image(tmp_path / "bomb.png", 32)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_files_are_listed_with_the_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png", "z/c.png", ".git/d.png", "locked/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z" / "loop").symlink_to(tmp_path)
    (tmp_path / "z" / "broken.png").symlink_to(tmp_path / "nowhere")
    lock(monkeypatch, tmp_path / "locked")
    files, errors = list_files(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.jpg", "b.png", "z/broken.png", "z/c.png"]
    assert [(error.filename, error.strerror) for error in errors] == [(f"{tmp_path}/locked", "Permission denied")]
