from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.mark.slow
def test_a_row_is_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = (sys.executable, SCRIPTS / "benchmark.py", "--quick", "--only", "help", "--json", file)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text()).values()
    assert found["ratio"] == pytest.approx(found["a"] / found["b"])
    assert "train --help" in done.stdout


@pytest.mark.slow
def test_the_bare_loop_of_the_memory_row_prints_its_peak_memory() -> None:
    output = subprocess.check_output((sys.executable, SCRIPTS / "bare_loop.py", "32-true"), text=True)
    assert 100 < float(output) < 100_000
