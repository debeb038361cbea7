from __future__ import annotations

import ast
import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
(SCRIPT,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pl.Trainer(" in block)
SIZES = {"val_size=1000": "train_size=128, val_size=32, test_size=32, batch_size=32", "max_epochs=3": "max_epochs=1"}


@pytest.mark.slow
def test_the_script_in_the_readme_logs_each_metric_once_per_epoch(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    script = SCRIPT
    for shown, small in SIZES.items():
        assert shown in script
        script = script.replace(shown, small)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert 0 <= results["test/acc"] <= 1
    assert math.isfinite(results["test/loss"])

    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    for stage in ("train", "val", "test"):
        for name in ("loss", "acc"):
            points = [(row["step"], float(row[f"{stage}/{name}"])) for row in rows if row[f"{stage}/{name}"]]
            assert [step for step, _ in points] == ["0"], f"{stage}/{name}"
    assert float(rows[-1]["test/acc"]) == pytest.approx(results["test/acc"])
