"""Download a file from a list of mirrors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from torchvision.datasets.utils import check_integrity, download_url

from cifar10_tl.config.errors import UserError

log = logging.getLogger(__name__)


def download(urls: Sequence[str], path: Path, *, md5: str, timeout: float = 20.0) -> None:
    """Download ``path`` from the first mirror that delivers a file with this checksum, unless ``path`` has it already.

    The file is written under a temporary name and renamed once its checksum is verified. ``timeout`` is the number of
    seconds without data after which the next mirror is tried.
    """
    if check_integrity(path, md5):
        return
    failures = []
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(timeout)
        for url in urls:
            host = urlsplit(url).netloc
            log.info("downloading %s from %s", path.name, host)
            try:
                if urlsplit(url).scheme not in ("http", "https"):  # torchvision reads no other addresses
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
    raise UserError(
        f"cannot download {path.name} ({reasons}); save it as {path.absolute()} (md5 {md5}), or use data=shapes, which "
        "needs no download, or data=folder for your own images"
    )
