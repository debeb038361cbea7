from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY

from cifar10_tl.engine.processes import SignalHandler, Stopped


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    command = [sys.executable, "-c", f"import subprocess, threading\nfrom cifar10_tl.engine import processes\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_first_signal_stops_and_reaches_the_children() -> None:
    sent: list[int] = []
    children: Any = [SimpleNamespace(send_signal=sent.append)]
    before = signal.getsignal(signal.SIGTERM)
    with SignalHandler() as handler:
        handler.children = children
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert sent == [signal.SIGTERM]
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_interrupt_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with SignalHandler() as handler:
        handler.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handler.received == signal.SIGINT
        assert exits == []
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [130]


def test_works_without_sighup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    with SignalHandler() as handler:
        assert handler.signals == [signal.SIGTERM, signal.SIGINT]


def test_private_parts_of_lightning_exist() -> None:
    """We replace two private functions: the broadcast of PL #21487 and the process observer of PL #18218."""
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.strategies.launchers import subprocess_script

    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert "_launch_process_observer(self.procs)" in inspect.getsource(subprocess_script)


@pytest.mark.slow
def test_child_ends_when_its_parent_is_killed() -> None:
    imports = "import time; from cifar10_tl.engine.processes import SignalHandler, own_processes"
    child = f"{imports}\nwith own_processes(SignalHandler()): print('in', flush=True); time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")}
    environment |= {"LOCAL_RANK": "1", "PYTHONPATH": str(REPOSITORY)}
    started = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "in\n"
    killed_at = time.monotonic()
    started.send_signal(signal.SIGKILL)
    _, errors = started.communicate(timeout=60)  # returns when the child has closed the pipes, too
    assert time.monotonic() - killed_at < 30
    assert f"error: process 1: its parent process ({started.pid}) was killed; resume the run with resume=" in errors


@pytest.mark.slow
def test_child_ends_when_its_parent_was_killed_before() -> None:
    done = run_python("processes.end_with_parent(1, threading.Event(), grace=0.1)", LOCAL_RANK="1")
    assert done.returncode == 1
    assert "error: process 1: its parent process (1) was killed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("send_signal(2)", 130), ("terminate()", 143), ("kill()", 1)])
def test_parent_ends_with_its_children(how: str, status: int) -> None:
    code = f"children = [subprocess.Popen(['sleep', '300']) for _ in range(2)]\nchildren[1].{how}\n"
    done = run_python(f"{code}processes.end_with_children(children, grace=0.1)")
    assert done.returncode == status
    assert "process 2 of this run" in done.stderr
    assert done.stderr.count("error: another process of this run has ended or") == (status == 1)
