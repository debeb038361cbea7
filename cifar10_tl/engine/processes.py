"""Signals and processes of a run: stop after a training step, and never leave a process behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

PARENT_VARIABLE = "CIFAR10_TL_PARENT"

#: Environment variables that Lightning sets for the processes it starts.
_LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Stopped(SystemExit):
    """Exception that ends the process after a signal, with exit status 128 + signal number."""


class SignalHandler:
    """Context manager that handles SIGTERM, SIGINT, SIGHUP (unless ``nohup`` ignores it) and, under SLURM, SIGUSR1.

    The first signal raises :class:`Stopped`. While :attr:`deferred` is set, it is only recorded, and
    :class:`~cifar10_tl.callbacks.GracefulStop` ends the run after the current step. A second SIGINT ends the process
    immediately.

    Attributes:
        received: The first signal received, or None.
        deferred: Whether training is in progress.
        children: Processes started by this one, which receive the same signals.
    """

    def __init__(self) -> None:
        self.signals = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # Windows has no SIGHUP
            self.signals.append(signal.SIGHUP)
        if "SLURM_JOB_ID" in os.environ:
            self.signals.append(signal.SIGUSR1)
        self.received: signal.Signals | None = None
        self.deferred = False
        self.children: Sequence[subprocess.Popen[bytes]] = ()
        self._received_at = 0.0

    def __enter__(self) -> SignalHandler:
        self._previous = {signum: signal.getsignal(signum) for signum in self.signals}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Install the handlers, also after another library has replaced them."""
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
            for signum in self.signals:
                signal.signal(signum, self._handle)

    def watch(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Forward signals to ``children`` and end this process if one of them fails."""
        self.children = children
        threading.Thread(target=end_with_children, args=(children,), daemon=True).start()

    def log_killed(self) -> None:
        """Log which children were killed by a signal."""
        log_killed(self.children)

    def stop(self) -> NoReturn:
        """Raise :class:`Stopped` for the received signal (SIGTERM if another process received it)."""
        raise Stopped(128 + (self.received or signal.SIGTERM))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT and not self._is_repeated():
                os._exit(128 + signum)
            return
        self.received, self._received_at = signal.Signals(signum), time.monotonic()
        for child in self.children:
            child.send_signal(signum)
        if not self.deferred:
            self.stop()
        log.info("%s: stopping after the current step; press Ctrl-C again to stop immediately", self.received.name)

    def _is_repeated(self) -> bool:
        """Return whether a child process receives one Ctrl-C twice: from the terminal and from its parent."""
        is_child = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
        return is_child and time.monotonic() - self._received_at < 1


@contextmanager
def own_processes(handler: SignalHandler) -> Iterator[None]:
    """Context manager in which the processes that Lightning starts end together.

    On exit, the launch variables are restored and the process group is destroyed, so that the next run of a sweep
    starts its own processes. Processes started by ``torchrun`` or SLURM are managed by those.
    """
    import torch
    from lightning.pytorch.strategies.launchers import subprocess_script

    previous = {name: os.environ.get(name) for name in (*_LAUNCH_VARIABLES, PARENT_VARIABLE)}
    done = threading.Event()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[PARENT_VARIABLE] = str(os.getpid())  # the parent may have ended before a child asks for its id
    elif not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        threading.Thread(target=end_with_parent, args=(parent, done), daemon=True).start()
    # Lightning's observer kills this process up to 5 s after a child has ended, before it can report why (PL #18218)
    launcher: Any = subprocess_script
    observer, launcher._launch_process_observer = launcher._launch_process_observer, handler.watch
    try:
        yield
        if previous["LOCAL_RANK"] is None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        done.set()
        launcher._launch_process_observer = observer
        for name, value in previous.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def log_killed(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Log which of ``processes`` were killed by a signal."""
    if processes:
        time.sleep(0.5)  # the connections of a process close shortly before it ends
    for rank, process in enumerate(processes, 1):
        status = process.poll()
        if status is not None and status < 0:
            log.warning("process %d of this run (%d) was killed by %s", rank, process.pid, signal.Signals(-status).name)


def end_with_children(children: Sequence[subprocess.Popen[bytes]], grace: float = 15) -> None:
    """Wait for ``children``; if one fails, end the others and this process after ``grace`` seconds.

    Usually this process ends by itself before: its next collective operation fails, or it received the same signal.
    But it can wait forever in a rendezvous or an NCCL operation.
    """
    while not any(statuses := [child.poll() for child in children]):
        if None not in statuses:
            return
        time.sleep(1)
    time.sleep(grace)
    log_killed(children)
    for child in children:
        child.kill()
    status = next(filter(None, statuses))
    signum = -status if status < 0 else status - 128
    if signum in (signal.SIGINT, signal.SIGTERM):
        os._exit(128 + signum)
    _fail("another process of this run has ended or cannot be reached")


def end_with_parent(parent: int, done: threading.Event, grace: float = 10) -> None:
    """End this process if its ``parent`` (process id) is killed and ``done`` is not set within ``grace`` seconds.

    Lightning does not check this: on GPUs, the process would wait in a collective operation and keep its memory.
    """
    while os.getppid() == parent:
        if done.wait(1):
            return
    if not done.wait(grace):
        _fail(f"process {os.environ['LOCAL_RANK']}: its parent process ({parent}) was killed")


def _fail(reason: str) -> NoReturn:
    print(f"error: {reason}; resume the run with resume=RUN_DIR", file=sys.stderr, flush=True)
    os._exit(1)
