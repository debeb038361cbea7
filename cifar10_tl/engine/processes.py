"""The processes that Lightning starts for a run, and that none of them outlives the others."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from lightning.pytorch.strategies.launchers import subprocess_script

log = logging.getLogger(__name__)


#: What Lightning sets for the processes it starts.
_LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


#: What we set: who started them.
PARENT_VARIABLE = "CIFAR10_TL_PARENT"


def started_by_lightning() -> bool:
    """Whether this process is one that Lightning started from another, rather than a person, torchrun or SLURM."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()


@contextmanager
def own_processes() -> Iterator[None]:
    """Around a run: its processes end together, and are forgotten, so that a sweep's next run starts its own.

    Where something else started them (``torchrun``, SLURM), it looks after them, they serve all runs, and nothing is
    forgotten.
    """
    before = {name: os.environ.get(name) for name in _LAUNCH_VARIABLES}
    done = threading.Event()
    if started_by_lightning():
        parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        threading.Thread(target=_end_with_parent, args=(parent, done), daemon=True).start()
    else:
        os.environ[PARENT_VARIABLE] = str(os.getpid())  # by the time that a child asks for it, this one may be gone
    launcher: Any = subprocess_script
    lightnings_own, launcher._launch_process_observer = launcher._launch_process_observer, _look_after
    try:
        yield
        if before["LOCAL_RANK"] is None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        done.set()
        launcher._launch_process_observer = lightnings_own
        for name in (*_LAUNCH_VARIABLES, PARENT_VARIABLE):
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def name_the_killed(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Log which of the ``processes`` that this one started a signal has ended."""
    if processes:
        time.sleep(0.5)  # a process's connections end a little before itself
    for rank, process in enumerate(processes, 1):
        status = process.poll()
        if status is not None and status < 0:
            log.warning("process %d of this run (%d) was killed by %s", rank, process.pid, signal.Signals(-status).name)


def _look_after(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Watch over the ``processes`` from a thread, in place of Lightning.

    Lightning would kill this process, too, up to five seconds behind the end of another: often before it could tell.
    """
    threading.Thread(target=_end_with_children, args=(processes,), daemon=True).start()


def _end_with_children(
    processes: Sequence[subprocess.Popen[bytes]], grace: float = 20, grace_of_a_signal: float = 10
) -> None:
    """End this process and its ``processes`` if one of these fails, and this one does not end by itself soon after.

    Most often it does: its next collective operation raises an error, which says more; or it got the same signal. But
    where processes meet for the first time, and in NCCL's operations, it may wait for ever.

    Args:
        processes: that this one started.
        grace: seconds.
        grace_of_a_signal: seconds, where the process was asked to end.
    """
    while not any(statuses := [process.poll() for process in processes]):
        if all(status == 0 for status in statuses):
            return
        time.sleep(1)
    stopped = next((status for status in statuses if _is_of_a_signal(status)), None)
    time.sleep(grace if stopped is None else grace_of_a_signal)
    name_the_killed(processes)
    for process in processes:
        process.kill()
    if stopped is not None:
        log.info("stopped by %s", signal.Signals(abs(stopped) % 128).name)
        os._exit(128 + abs(stopped) % 128)
    _give_up("another process of this run has ended")


def _is_of_a_signal(status: int | None) -> bool:
    """Whether a process ended, well or not, because it was asked to."""
    return status in {sign for number in (signal.SIGINT, signal.SIGTERM) for sign in (-number, 128 + number)}


def _end_with_parent(parent: int, done: threading.Event, grace: float = 10) -> None:
    """End this process, which Lightning started, if ``parent`` ends (as by kill -9) and it is not ``done`` soon after.

    Lightning looks after the processes that it started, but not the other way round: on GPUs they would wait for their
    parent in a collective operation for half an hour, and hold the memory.

    Args:
        parent: its process id.
        done: set when this process has ended its run by itself.
        grace: seconds.
    """
    while os.getppid() == parent:
        if done.wait(1):
            return
    if not done.wait(grace):
        _give_up(f"process {os.environ['LOCAL_RANK']}: the process that started this one ({parent}) was killed")


def _give_up(reason: str) -> NoReturn:
    print(f"error: {reason}; go on with resume= and this run's folder", file=sys.stderr, flush=True)
    os._exit(1)


class Stopped(SystemExit):
    """The process ends because of a signal, with the status that shells expect: 128 and its number.

    Attributes:
        signum: which one.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class SignalHandler:
    """While it is entered, keeps SIGTERM, SIGINT and more for a good moment to stop.

    A signal raises :class:`Stopped` at once, but not while training is under way (:attr:`deferring`): then the step is
    done first, see :class:`~cifar10_tl.callbacks.GracefulStop`. A second SIGINT ends the process on the spot.

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

    def __enter__(self) -> SignalHandler:
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
