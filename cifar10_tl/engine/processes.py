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

from cifar10_tl.config.run_dir import is_started_by_srun, process_rank

log = logging.getLogger(__name__)

PARENT_VARIABLE = "CIFAR10_TL_PARENT"


class Stopped(SystemExit):
    """Exception that ends the process after a signal, with exit status 128 + signal number."""


class SignalHandler:
    """Context manager that handles SIGTERM, SIGINT, SIGHUP (unless ``nohup`` ignores it) and, under SLURM, SIGUSR1.

    The first signal raises :class:`Stopped`. While :attr:`deferred` is set, it is only recorded, and
    :class:`~cifar10_tl.callbacks.GracefulStop` ends the run after the current step. A second SIGINT ends the process
    immediately.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first one
        self.deferred = False
        self.children: Sequence[subprocess.Popen[bytes]] = ()  # stopped together with this process
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            return self
        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signals.append(signal.SIGHUP)
        if "SLURM_JOB_ID" in os.environ:
            signals.append(signal.SIGUSR1)
        self._previous = {signum: signal.getsignal(signum) for signum in signals}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Install the handlers, also after another library has replaced them."""
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT:
                os._exit(128 + signum)
            return
        self.received = signal.Signals(signum)
        for child in self.children:
            child.terminate()  # not SIGINT, which it receives from the terminal, too
        if not self.deferred:
            self.stop()
        log.info("%s: stopping after the current step; press Ctrl-C again to stop immediately", self.received.name)

    def stop(self) -> NoReturn:
        """Raise :class:`Stopped` for the received signal (SIGTERM if another process received it)."""
        if process_rank() > 0 and _is_managed():
            raise Stopped(0)  # torchrun and SLURM kill the other processes after any other status
        raise Stopped(128 + (self.received or signal.SIGTERM))

    def watch(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Stop ``children`` together with this process, and this process if one of them fails."""
        self.children = children
        threading.Thread(target=self.end_with_children, daemon=True).start()

    def end_with_children(self, grace: float = 15) -> None:
        """Wait for the children; if one fails, end the others and this process after ``grace`` seconds.

        Usually this process ends by itself first: its next collective operation fails, or it received the same
        signal. But it can wait forever in a rendezvous or an NCCL operation.
        """
        while not any(statuses := [child.poll() for child in self.children]):
            if None not in statuses:
                return
            time.sleep(1)
        time.sleep(grace)
        self.log_killed()
        for child in self.children:
            child.kill()
        status = next(filter(None, statuses))
        signum = -status if status < 0 else status - 128
        if signum in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + signum)
        _fail("another process of this run has ended or cannot be reached")

    def log_killed(self) -> None:
        """Log which children were killed by a signal."""
        if self.children:
            time.sleep(0.5)  # the connections of a process close shortly before it ends
        for rank, child in enumerate(self.children, 1):
            status = child.poll()
            if status is not None and status < 0:
                name = signal.Signals(-status).name
                log.warning("process %d of this run (%d) was killed by %s", rank, child.pid, name)


@contextmanager
def own_processes(handler: SignalHandler) -> Iterator[None]:
    """Make the processes that Lightning starts end together.

    On exit, the environment is restored and the process group is destroyed, so that the next run of a sweep starts its
    own processes. Processes started by ``torchrun`` or SLURM are managed by those.
    """
    import torch
    from lightning.pytorch.strategies.launchers import subprocess_script

    previous = dict(os.environ)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if PARENT_VARIABLE in os.environ if is_first else not _is_managed():  # the first one if started by a search
        parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        threading.Thread(target=end_with_parent, args=(parent, 0 if is_first else 10), daemon=True).start()
    if is_first:
        os.environ[PARENT_VARIABLE] = str(os.getpid())  # the parent may have ended before a child asks for its id
    # Lightning's observer kills this process up to 5 s after a child has ended, before it can report why (PL #18218)
    launcher: Any = subprocess_script
    observer, launcher._launch_process_observer = launcher._launch_process_observer, handler.watch
    try:
        yield
        if "LOCAL_RANK" not in previous and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        launcher._launch_process_observer = observer
        os.environ.clear()
        os.environ.update(previous)


def end_with_parent(parent: int, grace: float = 10) -> None:
    """End this process ``grace`` seconds after its ``parent`` (process id) has ended.

    Lightning does not check this: on GPUs, the process would wait in a collective operation and keep its memory.
    """
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(grace)
    _fail(f"process {os.environ.get('LOCAL_RANK', 0)}: its parent process ({parent}) has ended")


def requeue() -> None:
    """Put this SLURM job back into the queue after SIGUSR1, see scripts/slurm.sh."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)  # noqa: S603, S607
        log.info("job %s is requeued", job)
    except (OSError, subprocess.CalledProcessError):
        log.warning("scontrol requeue %s failed: submit the job again with resume=RUN_DIR", job)


def _is_managed() -> bool:
    """Return whether torchrun or srun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or is_started_by_srun()


def _fail(reason: str) -> NoReturn:
    print(f"error: {reason}; resume the run with resume=RUN_DIR", file=sys.stderr, flush=True)
    os._exit(1)
