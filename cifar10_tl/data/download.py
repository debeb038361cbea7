"""Download a file from a list of mirrors."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from torchvision.datasets.utils import check_integrity, download_url

from cifar10_tl.config.errors import UserError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


def download(urls: Sequence[str], path: Path, *, md5: str, timeout: float = 20.0, hint: str = "") -> None:
    """Download ``path`` from the first mirror that delivers a file with this checksum.

    The file is written under a temporary name and renamed once its checksum is verified. An existing file with this
    checksum is kept, and nothing is downloaded.

    Args:
        urls: Addresses of the same file, in order of preference.
        path: Destination of the file.
        md5: Hexadecimal MD5 checksum of the file.
        timeout: Seconds without data after which the next mirror is tried.
        hint: Sentence appended to the error message.

    Raises:
        UserError: If every mirror fails.
        OSError: If the destination is not writable.
    """
    if check_integrity(path, md5):
        return
    failures = []
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, _socket_timeout(timeout):
        for url in urls:
            host = urlsplit(url).netloc
            log.info("downloading %s from %s", path.name, host)
            try:
                if urlsplit(url).scheme not in ("http", "https"):  # urllib also opens local files
                    raise ValueError(f"{url} is not an http or https address")
                download_url(url, folder, path.name, md5)
            except (OSError, HTTPException, RuntimeError, ValueError) as error:
                log.warning("downloading %s from %s failed: %s", path.name, host, error)
                failures.append(f"{host}: {error}")
                Path(folder, path.name).unlink(missing_ok=True)
            else:
                os.replace(Path(folder, path.name), path)
                return
    reasons = " ".join("; ".join(failures or ["no mirrors given"]).split())
    raise UserError(f"cannot download {path.name} ({reasons}); save it as {path.absolute()} (md5 {md5}){hint}")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` between the processes of this machine, where the file system has locks."""
    with path.open("a") as file:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
