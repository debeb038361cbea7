from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from helpers import REPOSITORY, in_processes

from cifar10_tl.io import read_csv

README = (REPOSITORY / "README.md").read_text()
(SCRIPT,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pl.Trainer(" in block)
SIZES = {"val_size=1000": "train_size=128, val_size=32, test_size=32, batch_size=32", "max_epochs=3": "max_epochs=1"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_script_in_the_readme_logs_each_metric_once_per_epoch(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = SCRIPT
    for shown, small in SIZES.items():
        assert shown in script
        script = script.replace(shown, small)
    script = script.replace("pl.Trainer(", f"pl.Trainer(accelerator='cpu', devices={processes}, strategy='ddp', ")
    monkeypatch.chdir(tmp_path)

    def keep(results: object) -> None:
        Path(f"{os.environ['RANK']}.json").write_text(json.dumps(results))

    in_processes(processes, lambda: exec(script, {"print": keep}))
    results, *others = (json.loads(path.read_text())[0] for path in sorted(tmp_path.glob("*.json")))
    assert others == [results] * (processes - 1)
    assert 0 <= results["test/acc"] <= 1
    assert math.isfinite(results["test/loss"])

    (file,) = tmp_path.rglob("metrics.csv")
    rows = read_csv(file)
    for stage in ("train", "val", "test"):
        for name in ("loss", "acc"):
            points = [(row["step"], float(row[f"{stage}/{name}"])) for row in rows if row[f"{stage}/{name}"]]
            assert [step for step, _ in points] == ["0"], f"{stage}/{name}"
    assert float(rows[-1]["test/acc"]) == pytest.approx(results["test/acc"])
