from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import lock
from PIL import ExifTags, Image

from cifar10_tl.data.images import (
    PAD_COLOR,
    BadImageError,
    available_cores,
    decode_image,
    decode_sized,
    in_threads,
    list_files,
    to_pixels,
)


def wave(height: int = 20, width: int = 30) -> np.ndarray:
    """Return a smooth image without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([3 * y + 5 * x, 250 - 4 * y, 40 + 6 * x], axis=-1).clip(0, 255).astype(np.uint8)


def resized(rgb: np.ndarray, size: int) -> np.ndarray:
    """Return the RGB image resized by Pillow's bicubic, uint8 [3, size, size]."""
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
def test_an_image_of_the_size_is_unchanged(fit: str, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.fromarray(wave(32, 32)).save(tmp_path / name)
        expected = np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1)
        assert np.array_equal(decode_image(tmp_path / name, 32, fit), expected)


@pytest.mark.parametrize(("height", "width"), [(20, 28), (28, 20), (10, 10_000), (10_000, 10), (1, 1), (8, 5)])
def test_fits_do_what_their_names_say(height: int, width: int, tmp_path: Path) -> None:
    picture = Image.fromarray(wave(height, width))
    picture.save(tmp_path / "a.png")
    size, shorter, longer = 10, min(height, width), max(height, width)

    scaled = picture.resize((width * size // shorter, height * size // shorter), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    cropped = np.asarray(scaled.crop((left, top, left + size, top + size)))
    assert np.array_equal(decode_image(tmp_path / "a.png", size, "crop"), cropped.transpose(2, 0, 1))

    content = [max(1, round(side * size / longer)) for side in (width, height)]
    padded = np.full((size, size, 3), PAD_COLOR, np.uint8)
    x, y = ((size - side) // 2 for side in content)
    padded[y : y + content[1], x : x + content[0]] = picture.resize((content[0], content[1]), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(tmp_path / "a.png", size, "pad"), padded.transpose(2, 0, 1))

    assert np.array_equal(decode_image(tmp_path / "a.png", size, "squeeze"), resized(wave(height, width), size))
    assert decode_sized(tmp_path / "a.png", size)[1:] == (width, height)


def test_the_default_is_to_crop_the_center(tmp_path: Path) -> None:
    Image.fromarray(wave(16, 40)).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 16), wave(16, 40)[:, 12:28].transpose(2, 0, 1))
    assert np.array_equal(to_pixels(Image.fromarray(wave(16, 40)), 16), decode_image(tmp_path / "a.png", 16))


def test_an_unknown_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        to_pixels(Image.fromarray(wave()), 8, "cropped")


def photo(width: int, height: int) -> Image.Image:
    """Return a picture with edges, noise and a slope, as JPEG photographs have."""
    y, x = np.mgrid[:height, :width]
    circles = 60 * np.sign(np.sin(np.hypot(y - 0.4 * height, x - 0.6 * width) / 23))
    noise = np.random.default_rng(0).normal(0, 12, (height, width))
    channels = [110 + circles + 50 * x / width + noise, 120 - circles + noise, 90 + 90 * y / height + noise]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("orientation", [1, 6, 3])
@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (1203, 1597)])
def test_large_jpeg_files_are_decoded_at_a_fraction_of_their_size(
    width: int, height: int, orientation: int, fit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(width, height).save(tmp_path / "a.jpg", quality=90, exif=exif)
    whole = to_pixels(Image.open(tmp_path / "a.jpg"), 100, fit).astype(int)
    loaded: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: loaded.append(self.size) or resize(self, *args))
    decoded = decode_sized(tmp_path / "a.jpg", 100, fit)
    scale = 8 if (width, fit) == (1600, "pad") else 4
    assert loaded == [(-(-width // scale), -(-height // scale))]
    assert np.abs(decoded.pixels - whole).max() <= 8
    assert np.abs(decoded.pixels - whole).mean() <= 1
    assert decoded[1:] == ((height, width) if orientation == 6 else (width, height))


def test_a_jpeg_file_is_decoded_in_full_where_a_fraction_would_lose_detail(tmp_path: Path) -> None:
    photo(1600, 399).save(tmp_path / "a.jpg", quality=90)  # half of 399 is less than twice 100
    whole = to_pixels(Image.open(tmp_path / "a.jpg"), 100)
    assert np.array_equal(decode_image(tmp_path / "a.jpg", 100), whole)
    assert not np.array_equal(
        decode_image(tmp_path / "a.jpg", 100, "pad"), to_pixels(Image.open(tmp_path / "a.jpg"), 100, "pad")
    )


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
        expected = resized(np.stack([gray] * 3, -1), 32)
        assert np.array_equal(decode_image(tmp_path / name, 32, "squeeze"), expected), name
    Image.fromarray(np.array([[np.nan, np.inf], [-1, 2]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert decode_image(tmp_path / "f.tif", 2)[0].tolist() == [[0, 255], [0, 255]]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgb, alpha = wave(), np.zeros((20, 30), np.uint8)
    alpha[:10] = 255
    wanted = resized(np.where(alpha[..., None] > 0, rgb, 255).astype(np.uint8), 32)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32, "squeeze"), wanted)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.gif", transparency=1)
    assert decode_image(tmp_path / "b.gif", 2, "squeeze")[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
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
    upright = np.rot90(wave(), quarter_turns)
    upright = upright[:, ::-1] if mirrored else upright
    for name in ("a.png", "a.tif"):
        Image.fromarray(wave()).save(tmp_path / name, exif=exif)
        decoded = decode_sized(tmp_path / name, 20)
        assert decoded[1:] == (upright.shape[1], upright.shape[0])
        top, left = (upright.shape[0] - 20) // 2, (upright.shape[1] - 20) // 2
        assert np.array_equal(decoded.pixels, upright[top : top + 20, left : left + 20].transpose(2, 0, 1))
        # turning before or after resizing rounds differently
        squeezed = resized(np.ascontiguousarray(upright), 32).astype(int)
        assert np.abs(decode_image(tmp_path / name, 32, "squeeze") - squeezed).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    for name, exif in (("a.png", b"garbage"), ("b.png", b"MM\0*\0\0"), ("c.jpg", b"Exif\0\0II*\0\x08\0\0\0")):
        Image.fromarray(wave()).save(tmp_path / name, exif=exif)
        assert decode_image(tmp_path / name, 32, "squeeze") == pytest.approx(resized(wave(), 32), abs=20)


def png_bomb(path: Path, side: int = 20_000) -> None:
    """Write a PNG of a few kilobytes that decodes to side * side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [20_000, 10_000])  # above twice Pillow's limit, and where Pillow only warns
@pytest.mark.filterwarnings("ignore")
def test_decompression_bombs_are_not_decoded(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png_bomb(tmp_path / "bomb.png", side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
    with pytest.raises(BadImageError, match=rf"Image size \({side**2} pixels\) exceeds limit of \d+"):
        decode_image(tmp_path / "bomb.png", 32)
    with ThreadPoolExecutor(8) as pool:
        errors = [pool.submit(decode_image, tmp_path / "bomb.png", 32).exception() for _ in range(64)]
    assert {type(error) for error in errors} == {BadImageError}


def test_heic_photos_are_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = np.full((60, 100, 3), (250, 10, 10), np.uint8)
    rgb[:, 50:] = (10, 10, 250)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the left side is the top
    Image.fromarray(rgb).save(tmp_path / "a.HEIC", "HEIF", exif=exif.tobytes())
    decoded = decode_sized(tmp_path / "a.HEIC", 32, "squeeze")
    assert decoded[1:] == (60, 100)
    colors = decoded.pixels[:, [4, 27], 16].astype(int)
    assert np.abs(colors - np.array([[250, 10], [10, 10], [10, 250]])).max() < 12
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(BadImageError, match=r"can read; to read HEIC, run pip install 'cifar10_tl\[heic\]'"):
        decode_sized(tmp_path / "a.HEIC", 32)


@pytest.mark.filterwarnings("ignore")  # of Pillow
def test_a_photo_of_108_megapixels_is_decoded_at_a_fraction_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (400, 300), (200, 100, 50)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)
    decoded = decode_sized(tmp_path / "a.jpg", 32)
    assert decoded[1:] == (400, 300)
    assert np.abs(decoded.pixels.mean((1, 2)) - [200, 100, 50]).max() < 3
    with pytest.raises(BadImageError, match="exceeds limit"):
        decode_sized(tmp_path / "a.jpg", 200)  # needs all of its pixels


def test_a_container_may_use_fewer_cores_than_its_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)}, raising=False)
    for limit, cores in (("150000 100000\n", 1), ("400000 100000\n", 4), ("max 100000\n", 64)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=limit: text)
        assert available_cores() == cores


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar10_tl.data.images.available_cores", lambda: 4)


@pytest.mark.usefixtures("four_cores")
def test_threads_keep_the_order_and_compute_at_the_same_time() -> None:
    barrier = threading.Barrier(4)  # passes when four threads wait at it

    def squared(number: int) -> int:
        barrier.wait(timeout=10)
        return number**2

    assert list(in_threads(squared, range(40), 8)) == [n**2 for n in range(40)]
    assert list(in_threads(squared, [], 8)) == []


@pytest.mark.usefixtures("four_cores")
def test_threads_wait_for_the_consumer() -> None:
    read: list[int] = []
    numbers = in_threads(lambda n: n, (read.append(n) or n for n in range(100)), 5)
    assert not read
    for consumed in range(1, 20):
        assert next(numbers) == consumed - 1
        time.sleep(0.001)
        assert len(read) == consumed + 4  # at most the window, including the one that is being consumed


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt])
def test_threads_stop_with_the_consumer(error: type[BaseException]) -> None:
    called: list[int] = []
    numbers = in_threads(lambda n: called.append(n) or time.sleep(0.05), range(100), 90)
    next(numbers)
    with pytest.raises(error):
        numbers.throw(error)
    assert len(called) < 20
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_an_error_in_a_thread_is_raised_in_its_place() -> None:
    results = in_threads(lambda n: 12 // n, [3, 4, 0, 6], 4)
    assert [next(results), next(results)] == [4, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_files_are_listed_with_the_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png", "z/c.png", ".git/d.png", "locked/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z" / "loop").symlink_to(tmp_path)
    (tmp_path / "zz").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "broken.png").symlink_to(tmp_path / "nowhere")
    lock(monkeypatch, tmp_path / "locked")
    files, errors = list_files(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a.jpg", "b.png", "z/broken.png", "z/c.png"]
    assert [(error.filename, error.strerror) for error in errors] == [(f"{tmp_path}/locked", "Permission denied")]
