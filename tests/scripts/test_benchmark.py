from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY

from cifar10_tl.data.images import decode_image

SCRIPTS = REPOSITORY / "scripts"


@pytest.mark.slow
def test_rows_are_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = (sys.executable, SCRIPTS / "benchmark.py", "--quick", "--only", "folder_epoch", "--json", file)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert [*found] == ["folder_epoch"]
    assert all(row["a"] > 0 and row["ratio"] == pytest.approx(row["a"] / row["b"]) for row in found.values())
    assert "second epoch" in done.stdout


@pytest.mark.slow
def test_the_bare_loop_of_the_memory_row_prints_its_peak_memory() -> None:
    output = subprocess.check_output((sys.executable, SCRIPTS / "bare_loop.py", "32-true"), text=True)
    assert 100 < float(output) < 100_000


@pytest.mark.slow
def test_both_sides_of_a_row_that_decodes_get_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    import benchmark_files as files

    pictures = files.usual_loader(files.write_pictures("small", quick=True), files.TILE).dataset
    assert len(pictures) == files.QUICK_PICTURES["small"]
    for number in range(0, len(pictures), len(pictures) // 4):
        theirs = (255 * pictures[number][0]).round().byte().numpy()
        assert np.array_equal(decode_image(pictures.samples[number][0], files.TILE), theirs)
