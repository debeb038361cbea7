from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.download import download

CONTENT = bytes(range(256)) * 800
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Handler of mirrors that are named by the way they behave."""

    requests: list[str]
    released: threading.Event

    def do_GET(self) -> None:
        """Answer a request."""
        name = self.path.strip("/")
        self.requests.append(name)
        body = {"wrong": b"please log in", "truncated": CONTENT[:-7]}.get(name, CONTENT)
        self.send_response(404 if name == "missing" else 200)
        self.send_header("Content-Length", str(len(CONTENT) if name == "truncated" else len(body)))
        self.end_headers()
        if name == "silent":
            self.released.wait(20)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Return a function from the behavior of a mirror to its address."""
    monkeypatch.setenv("no_proxy", "*")
    Handler.requests, Handler.released = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
    Handler.released.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("bad", ["missing", "wrong", "truncated", "silent"])
def test_next_mirror_is_used_after_a_failure(mirror: Callable[[str], str], bad: str, tmp_path: Path) -> None:
    path = tmp_path / "data.tar.gz"
    path.write_bytes(b"damaged")
    download([mirror(bad), mirror("good"), mirror("unused")], path, md5=MD5, timeout=0.3)
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]
    assert "unused" not in Handler.requests


def test_error_names_file_checksum_destination_and_alternatives(mirror: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "data.tar.gz"
    path.write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        download([mirror("missing"), mirror("wrong"), tmp_path.as_uri()], path, md5=MD5)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("404", "corrupted", "is not an http or https address", str(path), MD5, "data=shapes", "data=folder"):
        assert part in message
    assert path.read_bytes() == b"damaged"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="no mirrors given"):
        download([], path, md5=MD5)


def test_existing_file_is_not_downloaded_again(mirror: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "data.tar.gz"
    path.write_bytes(CONTENT)
    download([mirror("good")], path, md5=MD5)
    assert Handler.requests == []


def test_interrupted_download_leaves_nothing(
    mirror: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(url: str, folder: str, name: str, md5: str) -> None:
        Path(folder, name).write_bytes(CONTENT[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("cifar10_tl.data.download.download_url", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download([mirror("good")], tmp_path / "data.tar.gz", md5=MD5)
    assert list(tmp_path.iterdir()) == []
