"""Writing files so that a reader never finds half of one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl
import csv
import io
from collections.abc import Iterable, Sequence

_UMASK = os.umask(0)  # it can be read only by setting it; once, for threads may write at the same time


os.umask(_UMASK)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` to write bytes and read them back; on success it takes the name ``path``.

    The data is on the disk (fsync) before the name changes hands. On an error ``path`` stays as it was.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes it private; a run's files are as shared as any other
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Remove what :func:`atomic_write` left in ``folder``, or below it, when a process was killed in the middle."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Gives whether ``folder`` is this process's alone: no other one of this machine is inside such a ``with``.

    True, too, where the platform or the file system has no locks. A killed process gives its claim up.
    """
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claimed = True
    except BlockingIOError:
        claimed = False
    except OSError:
        claimed = True
    try:
        yield claimed
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """With a header line, quoted where needed; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
