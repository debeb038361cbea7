"""The driver of the GPU checks, with tiny steps on a CPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from documented import Python
from helpers import REPOSITORY, write_shapes

sys.path.insert(0, str(REPOSITORY / "scripts"))

import gpu_suite

SCRIPT = REPOSITORY / "scripts" / "gpu_suite.py"


Measure = Callable[..., int]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """A function that runs the script and returns its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path / "out"), "--cpu-check", *arguments])
        return gpu_suite.main()

    return run


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the script run its commands in forks of one process, which start faster."""
    with Python(tmp_path, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{SCRIPT.parent}") as python:

        def run(suite: object, *command: str) -> str:
            status, printed = python(command)
            if status:
                raise RuntimeError(printed)
            return printed

        monkeypatch.setattr(gpu_suite.Suite, "python", run)
        yield


def state(out: Path) -> dict[str, Any]:
    return json.loads((out / "state.json").read_text())["steps"]


def test_the_first_epoch_that_reaches_an_accuracy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"seconds": "10.5", "val/acc": acc} for acc in ("0.93", "0.94", "0.9", "0.955", "0.95", "0.94")]
    (tmp_path / "results.json").write_text('{"test": {"acc": 0.95, "count": 100}}')
    monkeypatch.setattr(gpu_suite.Suite, "train", lambda *_: (tmp_path, rows))
    found = gpu_suite.Suite(tmp_path, 1, tmp_path, on_cpu=True).scratch()
    assert [found[f"{goal}% val (s)"] for goal in (94, 95, 96)] == [21.0, 42.0, "not reached"]
    assert found["training (s)"] == 63.0


def test_the_speed_of_a_size_is_that_of_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = dict.fromkeys(("step_ms", "peak_memory_gb", "data_wait"), "")
    rows = [{"images_per_second": str(epoch), **rest} for epoch in range(1, 9)]
    monkeypatch.setattr(gpu_suite.Suite, "train", lambda *_: (tmp_path, rows))
    suite, sizes = gpu_suite.Suite(tmp_path, 1, None, on_cpu=True), [[0, 96], [0.5, 128], [0.75, 192]]
    assert [suite.speed("fast", sizes, number, batch=16)["images/s"] for number in range(3)] == [4, 6, 8]
    assert suite.speed("scratch", [[0, 32]], 0, batch=16)["images/s"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_steps_are_measured_once(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shapes(tmp_path / "data", 2, train=24, test=8)
    out, images_of = tmp_path / "out", ("--data-root", str(tmp_path / "data"))
    assert measure(*images_of, "--steps", "losses", "speed", "scratch", "benchmark") == 0, capsys.readouterr().out
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
def test_killed_runs_are_compared_in_the_next_call_if_the_time_is_short(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure("--minutes", "0.01", "--steps", "resume 0") == 3
    assert "run the same command again" in capsys.readouterr().out
    assert not (tmp_path / "out" / "state.json").exists()
    assert measure("--steps", "resume") == 0, capsys.readouterr().out
    assert state(tmp_path / "out") == {"resume 0": {"result": "1 of 1 rounds identical"}}


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_failed_step_is_reported_and_repeated_only_if_it_is_named(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    failing = ("--data-root", str(tmp_path / "empty"), "--steps", "scratch")
    assert measure(*failing) == 1
    assert "failed: scratch" in capsys.readouterr().out
    assert "needs images of at least 2 classes" in state(tmp_path / "out")["scratch"]["failed"]
    assert measure(*failing) == 1
    assert "scratch ..." in capsys.readouterr().out
