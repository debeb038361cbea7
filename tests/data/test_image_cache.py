from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import start_python
from PIL import Image

from cifar10_tl.config.errors import UserError
from cifar10_tl.data import image_cache
from cifar10_tl.data.image_cache import ImageCache, MappedImages

FILES = {f"{i}.png": [i] for i in range(20)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageCache:
    """Cache of 20 images of 8 x 8 pixels whose value is their number, decoded one by one by this process."""
    monkeypatch.setattr(image_cache, "FILES", 1)
    monkeypatch.setattr(image_cache, "available_cores", lambda: 0)
    root = tmp_path / "images"
    root.mkdir()
    for i, name in enumerate(FILES):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / name)
    return ImageCache(tmp_path / "cache", root, 8, "crop")


def values(cache: ImageCache, files: dict[str, list[int]] = FILES) -> dict[str, int]:
    """Return the value of each image in the cache, which must be the same for all of its pixels."""
    rows = [entry.row for entry in cache.update(files).values()]
    images = MappedImages(cache.pixels, torch.tensor(rows), 8).take(torch.arange(len(rows))).flatten(1)
    assert (images == images[:, :1]).all()
    return dict(zip(files, images[:, 0].tolist(), strict=True))


WANTED = {f"{i}.png": i for i in range(20)}


class Killed(BaseException):
    """Stand-in for the end of the process at this point."""


def test_a_killed_process_leaves_a_valid_cache(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded = image_cache.decode_sized, []

    def count(path: str, size: int, fit: str) -> Any:
        decoded.append(path)
        return decode(path, size, fit)

    monkeypatch.setattr(image_cache, "decode_sized", count)
    monkeypatch.setattr(image_cache, "FLUSH_SECONDS", 0.0)
    flush, flushes = image_cache._flush, []

    def killed_between(pixels: Any, index: Any, lines: list[bytes]) -> None:
        """Write everything but the last lines of the seventh flush, of which the last one is cut off."""
        flushes.append(len(lines))
        if len(flushes) < 7:
            flush(pixels, index, lines)
        elif len(flushes) == 7:
            pixels.flush()
            index.write(lines[0][:-5])
            index.flush()
            raise Killed

    monkeypatch.setattr(image_cache, "_flush", killed_between)
    with pytest.raises(Killed):
        cache.update(FILES)
    monkeypatch.setattr(image_cache, "_flush", flush)
    decoded.clear()
    assert values(cache) == WANTED
    assert len(decoded) == 20 - 6  # those of the six complete flushes are kept
    assert values(cache) == WANTED
    assert len(decoded) == 20 - 6


@pytest.mark.parametrize("damage", ["no pixels", "fewer pixels", "no index", "changed index", "empty index"])
def test_damaged_files_are_not_used(cache: ImageCache, damage: str) -> None:
    assert values(cache) == WANTED
    if damage == "no pixels":
        cache.pixels.unlink()
    elif damage == "fewer pixels":
        os.truncate(cache.pixels, 10 * 8 * 8 * 3 + 5)
    elif damage == "no index":
        cache.index.unlink()
    elif damage == "changed index":
        cache.index.write_bytes(cache.index.read_bytes().replace(b'"3.png", [3], 3', b'"3.png", [3], 4'))
    else:
        cache.index.write_bytes(b"")
    assert values(cache, {name: FILES[name] for name in ("3.png", "0.png")}) == {"3.png": 3, "0.png": 0}
    assert values(cache) == WANTED


def test_rows_in_use_are_never_overwritten(cache: ImageCache) -> None:
    rows = torch.tensor([entry.row for entry in cache.update(FILES).values()])
    images = MappedImages(cache.pixels, rows, 8)
    Image.new("RGB", (8, 8), (99, 99, 99)).save(cache.root / "4.png")
    assert values(cache, {**FILES, "4.png": [0, 0]}) == {**WANTED, "4.png": 99}
    (cache.root / "5.png").write_bytes(b"")
    assert cache.update({"5.png": [0]})["5.png"].error == "not an image format that Pillow can read"
    cache.index.unlink()
    assert values(cache, {"7.png": FILES["7.png"]}) == {"7.png": 7}
    assert images.take(torch.arange(20))[:, 0, 0, 0].tolist() == [*range(20)]


def test_many_files_are_decoded_by_several_processes(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, pids = image_cache.decode_sized, cache.root.parent / "pids"

    def logged(path: str, size: int, fit: str) -> Any:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.01)
        return decode(path, size, fit)

    monkeypatch.setattr(image_cache, "decode_sized", logged)
    monkeypatch.setattr(image_cache, "available_cores", lambda: 2)
    monkeypatch.setattr(image_cache, "FILES", 5)
    (cache.root / "bad.png").write_bytes(b"?")
    state = torch.get_rng_state()
    entry = cache.update({**FILES, "bad.png": [1]})["bad.png"]
    assert (entry.row, entry.error) == (None, "not an image format that Pillow can read")
    assert torch.equal(torch.get_rng_state(), state)
    used = pids.read_text().split()
    assert (len(used), len({*used}), str(os.getpid()) in used) == (21, 2, False)
    assert values(cache) == WANTED


def test_an_error_of_another_process_is_reported(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "available_cores", lambda: 2)
    init, limits = image_cache._init_worker, (10 * cache.row_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    monkeypatch.setattr(image_cache, "_init_worker", lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    with pytest.raises(UserError, match=r"cache: File too large; choose another data\.cache_dir"):
        cache.update(FILES)
    monkeypatch.setattr(image_cache, "_init_worker", init)
    assert values(cache) == WANTED


def test_two_processes_decode_each_file_once(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded = image_cache.decode_sized, []
    monkeypatch.setattr(
        image_cache,
        "decode_sized",
        lambda path, size, fit: decoded.append(os.path.basename(path)) or decode(path, size, fit),
    )
    other = ImageCache(cache.folder, cache.root, 8, "crop")
    threads = [threading.Thread(target=x.update, args=(FILES,)) for x in (cache, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decoded) == sorted(FILES)
    assert values(other) == WANTED


def test_too_little_room_is_reported_before_decoding(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3800))
    with pytest.raises(UserError, match=r"20 decoded images need 0\.00 GB, but 0\.00 GB are free; choose"):
        cache.update(FILES)
    assert not cache.pixels.exists()


@pytest.mark.parametrize("is_reported_once", [False, True])  # by the kernel
def test_a_full_disk_is_reported_and_what_is_written_is_kept(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch, is_reported_once: bool
) -> None:
    monkeypatch.setattr(image_cache, "FLUSH_SECONDS", 0.0)
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 9 or (len(calls) > 9 and not is_reported_once):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cache: No space left on device; choose another data\.cache_dir"):
        cache.update(FILES)
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(cache._entries(FILES)) == 4, "those whose pixels are on disk"
    assert values(cache) == WANTED


def test_pages_are_released_after_use(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "RELEASE_BYTES", 0)
    assert values(cache) == WANTED
    rows = torch.tensor([entry.row for entry in cache.update(FILES).values()])
    images = pickle.loads(pickle.dumps(MappedImages(cache.pixels, rows, 8)))
    for _ in range(2):
        assert images.take(torch.tensor([3, 19]))[:, 0, 0, 0].tolist() == [3, 19]
    assert images.shape == (20, 3, 8, 8)


def resident_file_pages() -> int:
    """Return the bytes of mapped files in memory."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    with (tmp_path / "pixels").open("wb") as file:
        file.truncate(1000 * 3 * 256**2)  # 197 MB
    images, before = MappedImages(tmp_path / "pixels", torch.arange(1000), 256), resident_file_pages()
    for positions in torch.arange(1000).split(50):
        assert images.take(positions).shape == (50, 3, 256, 256)
    assert resident_file_pages() - before < 2 * image_cache.RELEASE_BYTES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the memory is read as on Linux")
def test_images_may_need_more_space_than_the_memory_has(tmp_path: Path) -> None:
    row, memory = 3 * 1024**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "pixels").open("wb") as file:
        file.truncate(2 * memory // row * row)  # sparse
    images = MappedImages(tmp_path / "pixels", torch.tensor([2 * memory // row - 1]), 1024)
    assert images.take(torch.tensor([0])).sum() == 0


def test_files_that_cannot_be_decoded_take_no_space(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"notes.txt": [0], "readme.txt": [0]}
    for name in bad:
        (cache.root / name).write_text("no image")
    for _ in range(2):
        entries = cache.update({**FILES, **bad}, retry=True)
        assert [name for name, entry in entries.items() if entry.error] == [*bad]
        assert cache.pixels.stat().st_size == 20 * cache.row_bytes
    monkeypatch.setattr(image_cache, "FileLock", None)  # fails if it is used
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache.update({**FILES, **bad}, retry=True) == entries, "a read-only cache is used as it is"


@pytest.mark.slow
def test_kill_9_while_decoding(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "from pathlib import Path; import time; from cifar10_tl.data import image_cache as c; c.FLUSH_SECONDS = 0;"
        "c.FILES, c.available_cores = 1, lambda: 0;"
        "decode = c.decode_sized; c.decode_sized = lambda *a: (time.sleep(0.2), decode(*a))[1];"
        f"c.ImageCache(Path({str(cache.folder)!r}), Path({str(cache.root)!r}), 8, 'crop').update({FILES!r})"
    )
    process = start_python("-c", script)
    while not cache.index.exists() or cache.index.stat().st_size < 100:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(cache.index.read_bytes().splitlines())
    decode, decoded = image_cache.decode_sized, []
    monkeypatch.setattr(
        image_cache,
        "decode_sized",
        lambda path, size, fit: decoded.append(os.path.basename(path)) or decode(path, size, fit),
    )
    assert values(cache) == WANTED
    assert 20 - kept <= len(decoded) <= 20 - kept + 1 < 20  # the last line may have been cut off


def test_machines_share_a_cache_of_their_copies_of_the_files(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = {path: [*version, 1] for path, version in FILES.items()}
    assert values(cache) == values(cache, copies) == WANTED
    monkeypatch.setattr(image_cache, "decode_sized", None)  # fails if it is called
    assert values(cache) == values(cache, copies) == WANTED


def test_a_cache_of_eight_outdated_versions_starts_over(cache: ImageCache) -> None:
    for i in range(9):
        assert values(cache, {path: [*version, i] for path, version in FILES.items()}) == WANTED
        assert cache.pixels.stat().st_size == (i % 8 + 1) * 20 * cache.row_bytes


def test_an_old_cache_of_which_nothing_is_current_starts_over(cache: ImageCache) -> None:
    values(cache)
    size = cache.pixels.stat().st_size
    os.utime(cache.index, (0, time.time() - 8 * 24 * 3600))
    assert values(cache, {path: [*version, 1] for path, version in FILES.items()}) == WANTED
    assert cache.pixels.stat().st_size == size
