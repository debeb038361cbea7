"""SIGTERM and Ctrl-C: what ends a run early ends it well."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The process ends because of a signal, with the status that shells expect: 128 and its number.

    Attributes:
        signum: which one.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Interruption:
    """While it is entered, keeps SIGTERM, SIGINT and more for a good moment to stop.

    A signal raises :class:`Stopped` at once, but not while training is under way (:attr:`deferring`): then the step is
    done first, see :class:`~cifar10_tl.callbacks.StopOnSignal`. A second SIGINT ends the process on the spot.

    Processes started by another one may get a single Ctrl-C twice, from the terminal and from that process: to them,
    what comes within a second of the first is the same.

    Attributes:
        received: the signal that came, or None.
        deferring: whether to wait for the step's end.
        forward: called with the signal, to tell processes that this one started.
    """

    def __init__(self, *more: signal.Signals) -> None:
        self.signals = (signal.SIGTERM, signal.SIGINT, *more)
        self.received: signal.Signals | None = None
        self.deferring = False
        self.forward: Callable[[int], Any] = lambda signum: None
        self._before: dict[signal.Signals, Any] = {}
        self._received_at = 0.0

    def __enter__(self) -> Interruption:
        self._before = {signum: signal.getsignal(signum) for signum in self.signals}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _in_main_thread():
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals, also those that something else took meanwhile."""
        if _in_main_thread():  # elsewhere Python allows no handlers
            for signum in self.signals:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT and not self._is_an_echo():
                os._exit(128 + signum)
            return
        self.received, self._received_at = signal.Signals(signum), time.monotonic()
        self.forward(signum)
        if not self.deferring:
            raise Stopped(signum)
        log.info("%s: stopping when this step is done and saved; Ctrl-C stops at once", self.received.name)

    def _is_an_echo(self) -> bool:
        started = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
        return started and time.monotonic() - self._received_at < 1


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
