"""Fetch one file from a list of mirrors and unpack it, so that nothing half done is ever taken for whole."""

import hashlib
import logging
import queue
import sys
import tarfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib import error as url_error
from urllib import request

from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.io import atomic_write

if sys.platform != "win32":
    import fcntl


log = logging.getLogger(__name__)


MAX_BYTES = 1 << 30  # six times CIFAR-10


BRISK_RATE = 100_000  # bytes/s below which another mirror is tried first: CIFAR-10 in half an hour


PATIENT_RATE = 4_000  # bytes/s below which even the last mirror is given up; CIFAR-10's home gives 70 000


_Piece = tuple[bytes, int | None]  # bytes of a body, and its whole size if announced


class DownloadError(UserError):
    """Nothing could be fetched or unpacked; the message says in one line why and what to do."""


class _MirrorError(Exception):
    """One mirror failed; the message is short."""


class _SlowMirrorError(_MirrorError):
    """The mirror delivers, but below the floor: worth another go when no other mirror does better."""


@dataclass(frozen=True)
class _Wanted:
    """The file to bring; the fields are those of `fetch`."""

    destination: Path
    md5: str
    stall_seconds: float
    max_bytes: int
    progress: bool


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    md5: str,
    stall_seconds: float = 20.0,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
    hint: str = "",
) -> Path:
    """The first of urls that delivers a file whose md5 matches, at destination.

    A mirror is left for the next one on any error, a wrong md5 or a stall. A stall is `stall_seconds` in
    which nothing arrives, whatever hangs (name look-up, connection, headers, body), or an average over as
    long below `BRISK_RATE`; for the last url, below `PATIENT_RATE`. A mirror left for being slow gets a
    second go, at `PATIENT_RATE`, when the later ones fail.

    Args:
        urls: http or https addresses of the same file, best first.
        destination: Where the file goes. One with this md5 is returned without network; one with another md5
            stays until the new file is whole.
        md5: Hexadecimal md5 of the file.
        stall_seconds: Patience with a silent or slow mirror, in seconds, above 0.
        max_bytes: Size in bytes above which a download is refused.
        progress: Draw a progress bar on stderr where that is a terminal.
        hint: A sentence on other ways out, for the end of the message when every mirror fails.

    Raises:
        DownloadError: An address is not http(s), every mirror failed, or the disk refuses the file.
    """
    wanted = _Wanted(destination, md5.lower(), stall_seconds, max_bytes, progress)
    try:
        if not _is_there(wanted):
            for url in urls:
                if not url.lower().startswith(("http://", "https://")):
                    raise DownloadError(f"a mirror must be an http or https address, not {url!r}")
            with exclusive(destination.with_name(f".{destination.name}.lock")):
                if not _is_there(wanted):  # whoever held the lock may have fetched this very file
                    _fetch_any(urls, wanted, hint)
    except OSError as error:
        raise DownloadError(f"cannot write {destination.absolute()}: {_reason(error)}") from error
    return destination


def extract_tar(archive: Path, into: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Unpack archive into a folder: each top-level entry appears there whole, by a rename, or not at all.

    An entry of that name already there is replaced. The work is done in a hidden folder inside `into`: on the
    same file system, and writable if anything is. Links are refused with devices and paths that lead outside:
    data sets need none, and Python's own filter has let crafted ones escape (CVE-2025-4517).

    Args:
        archive: A tar file, plain or gzipped.
        into: The folder to unpack into, made if missing.
        max_bytes: The most bytes the unpacked files may have in all.

    Raises:
        DownloadError: The archive is damaged, unsafe or too large, or the disk refuses the files.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError("this Python cannot unpack archives safely: use 3.10.12, 3.11.4, 3.12 or later")
    try:
        into.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{archive.name}.", suffix=".part", dir=into) as folder:
            new, old = Path(folder, "new"), Path(folder, "old")
            new.mkdir()
            old.mkdir()
            _unpack(archive, new, max_bytes)
            for entry in sorted(new.iterdir()):
                _swap(entry, into / entry.name, old / entry.name)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DownloadError(f"cannot unpack {archive.absolute()}: {_reason(error)}") from error


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Run the body when no other process of this machine is inside, by `flock` on a file that stays, empty.

    Best effort: where the platform or the file system has no locks the body runs at once. That only does work
    twice, since files and folders are renamed into place whole. Not reentrant.
    """
    with ExitStack() as stack:
        if sys.platform != "win32":
            with suppress(OSError):
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(lock.open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.warning("waiting for another process that prepares the same data (%s)", lock)
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_any(urls: Sequence[str], wanted: _Wanted, hint: str) -> None:
    failed: dict[str, str] = {}
    pending = deque(urls)
    while pending:
        url = pending.popleft()
        patient = url in failed or url == urls[-1]
        try:
            return _fetch_one(url, wanted, PATIENT_RATE if patient else BRISK_RATE)
        except _MirrorError as error:
            failed[url] = str(error)
            if isinstance(error, _SlowMirrorError) and not patient:
                pending.append(url)
        if pending:
            log.warning("%s failed: %s; trying %s", _host(url), failed[url], _host(pending[0]))
    reasons = "; ".join(f"{_host(url)}: {reason}" for url, reason in failed.items()) or "no mirror given"
    name, place = wanted.destination.name, wanted.destination.absolute()
    message = f"could not download {name} ({reasons}); bring {name} with md5 {wanted.md5} and put it at {place}"
    if wanted.destination.is_file():
        message += ", where a file with another md5 lies now"
    raise DownloadError(f"{message}. {hint}" if hint else message)


def _fetch_one(url: str, wanted: _Wanted, floor: int) -> None:
    """Bring url to its destination, or raise `_MirrorError`; floor is the slowest rate allowed, bytes/s."""
    log.info("downloading %s from %s", wanted.destination.name, _host(url))
    received, digest = 0, hashlib.md5(usedforsecurity=False)
    hidden = None if wanted.progress else True  # None: where stderr is no terminal
    with (
        atomic_write(wanted.destination) as file,
        tqdm(desc=wanted.destination.name, unit="B", unit_scale=True, leave=False, disable=hidden) as bar,
        closing(_pieces(url, wanted.stall_seconds, floor)) as pieces,
    ):
        for piece, length in pieces:
            received += len(piece)
            if max(received, length or 0) > wanted.max_bytes:
                raise _MirrorError(f"larger than {wanted.max_bytes} bytes")
            file.write(piece)
            digest.update(piece)
            bar.total = length
            bar.update(len(piece))
        if digest.hexdigest() != wanted.md5:
            raise _MirrorError(f"wrong md5, {received} bytes")
    log.info("downloaded %s", wanted.destination)


def _pieces(url: str, stall_seconds: float, floor: int) -> Generator[_Piece, None, None]:
    """The bytes of url as they come; `_MirrorError` when it fails, falls silent or is slower than floor.

    They are read in a thread of its own, so that what hangs there hangs nobody else. A socket's timeout would
    not do: it starts anew with each byte of the headers and each address of the host, and leaves out the name
    look-up. An abandoned thread ends by that timeout, or with the process.
    """
    items: queue.Queue[_Piece | Exception] = queue.Queue(maxsize=64)
    abandoned = threading.Event()
    arguments = (url, 2 * stall_seconds, items, abandoned)
    threading.Thread(target=_read, args=arguments, name="download", daemon=True).start()
    waited, arrived = 0.0, 0  # in this window; only time spent waiting for the mirror counts
    try:
        while True:
            start = time.monotonic()
            item = items.get(timeout=stall_seconds)
            if isinstance(item, Exception):
                raise _MirrorError(_reason(item)) from item
            if not item[0]:
                return
            waited, arrived = waited + time.monotonic() - start, arrived + len(item[0])
            if waited >= stall_seconds:
                if arrived < floor * waited:
                    raise _SlowMirrorError(f"slow, {arrived / waited / 1000:.1f} kB/s")
                waited, arrived = 0.0, 0
            yield item
    except queue.Empty:
        raise _MirrorError(f"stalled, nothing for {stall_seconds:g} s") from None
    finally:
        abandoned.set()


def _read(url: str, timeout: float, items: "queue.Queue[_Piece | Exception]", abandoned: threading.Event) -> None:
    """Put the pieces of url, then an empty one or the exception that ended them."""

    def put(item: _Piece | Exception) -> None:
        while not abandoned.is_set():
            with suppress(queue.Full):
                return items.put(item, timeout=0.2)
        return None

    try:
        with _opener().open(url, timeout=timeout) as response:
            length = response.length
            # read1, because read would wait for a full piece, however slowly it trickles in.
            while not abandoned.is_set() and (piece := response.read1(1 << 16)):
                put((piece, length))
            left = response.length  # it counts down
        put(_MirrorError(f"truncated, {left} of {length} bytes missing") if left else (b"", length))
    except Exception as error:
        put(error)


def _opener() -> request.OpenerDirector:
    """Knows http and https only, for redirects and proxies too; the usual opener knows file: and ftp:."""
    opener = request.OpenerDirector()
    opener.addheaders = [("User-Agent", "cifar10_tl")]
    for handler in (
        *(request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler),
        *(request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor),
    ):
        opener.add_handler(handler())
    return opener


def _unpack(archive: Path, into: Path, max_bytes: int) -> None:
    total = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            # The data filter would make an absolute path relative; no honest archive has one.
            if not (member.isfile() or member.isdir()) or PurePosixPath(member.name).is_absolute():
                raise DownloadError(f"{archive.absolute()} holds an unsafe entry: {member.name!r}")
            total += member.size
            if total > max_bytes:
                raise DownloadError(f"{archive.absolute()} unpacks to more than {max_bytes} bytes")
            tar.extract(member, into, filter="data")


def _swap(entry: Path, target: Path, aside: Path) -> None:
    with suppress(FileNotFoundError):
        target.rename(aside)
    try:
        entry.rename(target)
    except OSError:
        if not target.exists():  # if it does, another process has just put its own whole copy there
            raise


def _is_there(wanted: _Wanted) -> bool:
    if not wanted.destination.is_file():
        return False
    digest = hashlib.md5(usedforsecurity=False)
    with wanted.destination.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == wanted.md5


def _host(url: str) -> str:
    return url.split("/")[2]


def _reason(error: Exception) -> str:
    if isinstance(error, url_error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    text = getattr(error, "strerror", None) or str(error).strip("<>") or type(error).__name__
    return " ".join(text[:120].split())
