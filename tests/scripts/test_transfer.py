from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, write_shapes
from torchvision.models import resnet18


@pytest.mark.slow
def test_a_backbone_of_other_classes_is_compared_with_random_weights(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 4, train=20, test=4)
    out = tmp_path / "out"
    command = [sys.executable, str(REPOSITORY / "scripts" / "transfer.py"), "--data-root", str(tmp_path / "data")]
    command += ["--out", str(out), "--images", "8", "--seeds", "2", "--steps", "2", "--backbone-epochs", "1"]
    command += ["model.image_size=32", "trainer.accelerator=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert {path.name for path in (out / "backbone" / "data" / "train").iterdir()} == {"class 0", "class 2"}
    backbone, network = torch.load(out / "backbone.pth", weights_only=True), resnet18()
    assert network.load_state_dict(backbone, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    runs = {run.name: json.loads((run / "test" / "results.json").read_text()) for run in (out / "other").glob("8_*")}
    assert set(runs) == {f"8_{weights}_{seed}" for weights in ("null", "backbone") for seed in (0, 1)}
    assert {results["test"]["count"] for results in runs.values()} == {8}, "all test images of two classes"
    accuracies = {name: 100 * results["test"]["acc"] for name, results in runs.items()}
    means = [(accuracies[f"8_{weights}_0"] + accuracies[f"8_{weights}_1"]) / 2 for weights in ("null", "backbone")]
    table = (out / "transfer.md").read_text()
    assert [float(x) for x in re.findall(r"\| (-?[\d.]+) \[", table)] == [*means, means[1] - means[0]]

    times = {run: (out / "other" / run / "test" / "results.json").stat().st_mtime_ns for run in runs}
    assert subprocess.check_output(command, text=True).strip() == table.strip()
    assert times == {run: (out / "other" / run / "test" / "results.json").stat().st_mtime_ns for run in runs}

    other = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True)
    assert other.returncode == 2
    assert f"{out}: has results of other arguments" in other.stderr
    wrong = subprocess.run([*command, "--data-root", str(out)], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count(f"{out}: has no folder train")) == (2, 1)
