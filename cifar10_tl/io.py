"""Atomic writes, folder locks and CSV files."""

from __future__ import annotations

import codecs
import csv
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_UMASK = os.umask(0)  # can be read only by setting it; read once because threads write files at the same time
os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a temporary file for reading and writing bytes that replaces ``path`` only if no error occurs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with suppress(OSError):  # some mounts of Windows folders refuse it
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp creates private files
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on disk before it is renamed
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder`` and below."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Lock ``folder`` and yield whether no other process of this machine holds the lock.

    Yield True if the file system has no locks. The lock ends with the process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    claimed = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other error: a file system without locks
        claimed = not isinstance(error, BlockingIOError)
    try:
        yield claimed
    finally:
        os.close(descriptor)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table with a header line with :func:`atomic_write`. None is an empty cell."""
    with atomic_write(path) as file:
        table = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def printable(path: Path | str) -> str:
    """Return a path as text that can be encoded as UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()
