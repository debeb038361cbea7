from __future__ import annotations

import os
from pathlib import Path

import pytest

from cifar10_tl.callbacks.graceful_stop import requeue


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
