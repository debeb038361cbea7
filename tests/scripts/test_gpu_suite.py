"""The driver of the GPU checks, with tiny steps on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documented import Python
from helpers import REPOSITORY, write_shapes

sys.path.insert(0, str(REPOSITORY / "scripts"))

import gpu_suite

SCRIPT = REPOSITORY / "scripts" / "gpu_suite.py"


def suite(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--cpu-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def state(out: Path) -> dict[str, Any]:
    return json.loads((out / "state.json").read_text())["steps"]


@pytest.mark.slow
def test_steps_are_measured_once_and_continue_in_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path / "data", 2, train=24, test=8)
    out, images_of = tmp_path / "out", ("--data-root", str(tmp_path / "data"))
    stopped = suite(out, *images_of, "--minutes", "0.01")
    assert stopped.returncode == 3, stopped.stderr
    assert "run the same command again" in stopped.stdout
    assert not (out / "state.json").exists()

    def measure(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(out), "--cpu-check", *arguments])
        return gpu_suite.main()

    path = f"{REPOSITORY}{os.pathsep}{SCRIPT.parent}"
    with Python(tmp_path, PYTHONPATH=path) as python:  # starts faster than a process for each command

        def run(suite: object, *command: str) -> str:
            status, printed = python(command)
            assert status == 0, printed
            return printed

        monkeypatch.setattr(gpu_suite.Suite, "python", run)
        assert measure(*images_of, "--steps", "losses", "speed", "scratch", "benchmark") == 0
    found = state(out)
    assert list(found) == ["losses gpu", "losses ddp", "speed scratch 32", "scratch", "benchmark help"]
    assert found["losses gpu"]["largest relative difference"] == 0, "both runs were on the CPU"
    assert found["losses ddp"]["largest relative difference"] <= 1e-5
    speed = found["speed scratch 32"]
    assert speed["45,000 images (s)"] == pytest.approx(45_000 / speed["images/s"])
    assert 0 <= found["scratch"]["95% low"] <= found["scratch"]["test acc"] <= found["scratch"]["95% high"] <= 1
    assert found["scratch"]["96% val (s)"] == "not reached"
    page = (out / "gpu.md").read_text()
    assert page.startswith("# cpu (")
    assert f"| speed scratch 32 | 16 | {speed['images/s']:.4g} |" in page

    capsys.readouterr()
    assert measure(*images_of, "--steps", "losses", "speed") == 0
    assert capsys.readouterr().out.startswith("complete"), "nothing is measured twice"

    kept = json.loads((out / "state.json").read_text())
    kept["environment"]["git"] = "another"
    (out / "state.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match=f"^error: {out} has results of another commit or machine; choose another"):
        measure("--steps", "losses")


@pytest.mark.slow
def test_killed_runs_are_compared(tmp_path: Path) -> None:
    done = suite(tmp_path, "--steps", "resume")
    assert done.returncode == 0, done.stdout
    assert state(tmp_path) == {"resume": {"result": "1 of 1 rounds identical"}}


@pytest.mark.slow
def test_a_failed_step_is_reported_and_repeated_only_if_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    failing = ("--data-root", str(tmp_path / "empty"))
    done = suite(tmp_path / "out", *failing, "--steps", "scratch")
    assert done.returncode == 1
    assert "failed: scratch" in done.stdout
    assert "needs images of at least 2 classes" in state(tmp_path / "out")["scratch"]["failed"]
    assert "scratch ..." in suite(tmp_path / "out", *failing, "--steps", "scratch").stdout
