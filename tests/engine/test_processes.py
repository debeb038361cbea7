from __future__ import annotations

import inspect
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import compose_train, start_python

from cifar10_tl import train
from cifar10_tl.engine.processes import SignalHandler, Stopped, requeue


def start(code: str) -> subprocess.Popen[str]:
    """Start a process of local rank 1 that runs ``code``."""
    imports = "import subprocess, sys, time\nfrom cifar10_tl.engine.processes import *\n"
    return start_python("-c", imports + code, LOCAL_RANK="1")


def test_first_signal_stops_and_reaches_the_children() -> None:
    stopped_children: list[str] = []
    children: Any = [SimpleNamespace(terminate=lambda: stopped_children.append("child"))]
    before = signal.getsignal(signal.SIGTERM)
    with SignalHandler() as handler:
        handler.children = children
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped_children == ["child"]
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


@pytest.mark.parametrize(
    ("array", "job"), [({}, "17"), ({"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}, "15_2")]
)
def test_job_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: dict[str, str], job: str) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    scontrol.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "17", **array, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert (tmp_path / "arguments").read_text() == f"requeue {job}\n"


def test_failed_requeue_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "scontrol requeue 17 failed" in caplog.text


def test_a_signal_before_or_after_training_requeues_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requeued: list[bool] = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(train, "_train", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(train, "requeue", lambda: requeued.append(True))
    with pytest.raises(Stopped) as stopped:
        train.train(compose_train(f"paths.output_dir={tmp_path}"))
    assert (stopped.value.code, requeued) == (128 + signal.SIGUSR1, [True])


def test_private_parts_of_lightning_exist() -> None:
    """We replace two private functions: the broadcast of PL #21487 and the process observer of PL #18218."""
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.strategies.launchers import subprocess_script

    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert "_launch_process_observer(self.procs)" in inspect.getsource(subprocess_script)


@pytest.mark.slow
def test_child_ends_when_its_parent_is_killed() -> None:
    child = "from cifar10_tl.engine.processes import *\nwith own_processes(SignalHandler()): print('in', flush=True); "
    parent = start(f"subprocess.run([sys.executable, '-c', {child + 'time.sleep(300)'!r}])")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "in\n"
    killed_at = time.monotonic()
    parent.send_signal(signal.SIGKILL)
    errors, _ = parent.communicate(timeout=60)  # returns when the child has closed the pipes, too
    assert time.monotonic() - killed_at < 30
    assert f"error: process 1: its parent process ({parent.pid}) has ended; resume the run with resume=" in errors


@pytest.mark.slow
def test_run_of_a_search_ends_at_once_when_the_search_is_killed() -> None:
    child = "from cifar10_tl.engine.processes import *\nwith own_processes(SignalHandler()): print('in', flush=True); "
    child += "assert os.environ[PARENT_VARIABLE] == str(os.getpid()); time.sleep(300)"
    variables = "{**os.environ, 'LOCAL_RANK': '0', PARENT_VARIABLE: str(os.getpid())}"
    search = start(f"subprocess.run([sys.executable, '-c', {child!r}], env={variables})")
    assert search.stdout is not None
    assert search.stdout.readline() == "in\n"
    killed_at = time.monotonic()
    search.send_signal(signal.SIGKILL)
    errors, _ = search.communicate(timeout=60)
    assert time.monotonic() - killed_at < 8
    assert f"error: process 0: its parent process ({search.pid}) has ended; resume the run with resume=" in errors


@pytest.mark.slow
def test_child_ends_when_its_parent_was_killed_before() -> None:
    process = start("end_with_parent(1, grace=0.1)")
    errors, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: process 1: its parent process (1) has ended" in errors


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("send_signal(2)", 130), ("terminate()", 143), ("kill()", 1)])
def test_parent_ends_with_its_children(how: str, status: int) -> None:
    code = "handler = SignalHandler()\nhandler.children = [subprocess.Popen(['sleep', '300']) for _ in range(2)]\n"
    process = start(f"{code}handler.children[1].{how}\nhandler.end_with_children(grace=0.1)")
    errors, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "process 2 of this run" in errors
    assert errors.count("error: another process of this run has ended or") == (status == 1)
