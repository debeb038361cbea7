from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documented import Python
from helpers import REPOSITORY, write_shapes
from torchvision.models import resnet18

sys.path.insert(0, str(REPOSITORY / "scripts"))

import transfer


@pytest.mark.slow
def test_a_backbone_of_other_classes_is_compared_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path / "data", 4, train=20, test=4)
    out, ran = tmp_path / "out", list[Sequence[str]]()
    arguments = ["--data-root", str(tmp_path / "data"), "--out", str(out), "--images", "8", "--seeds", "2"]
    arguments += ["--data-name", "drawn shapes"]
    arguments += ["--steps", "2", "--backbone-epochs", "1", "model.image_size=32", "trainer.accelerator=cpu"]

    def compare(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["transfer.py", *arguments, *more])
        transfer.main()
        return capsys.readouterr().out

    with Python(tmp_path) as python:  # starts faster than a process for each command

        def run(command: Sequence[str], *, check: bool, stdout: int) -> None:
            assert (command[0], check) == (sys.executable, True)
            ran.append(command)
            status, printed = python(command[1:])
            assert status == 0, printed

        monkeypatch.setattr(transfer, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
        page = compare()

    assert len(ran) == 9
    assert {path.name for path in (out / "backbone" / "data" / "train").iterdir()} == {"class 0", "class 2"}
    backbone, network = torch.load(out / "backbone.pth", weights_only=True), resnet18()
    assert network.load_state_dict(backbone, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    runs = {run.name: json.loads((run / "test" / "results.json").read_text()) for run in (out / "other").glob("8_*")}
    assert set(runs) == {f"8_{weights}_{seed}" for weights in ("null", "backbone") for seed in (0, 1)}
    assert {results["test"]["count"] for results in runs.values()} == {8}, "all test images of two classes"
    accuracies = {name: 100 * results["test"]["acc"] for name, results in runs.items()}
    means = [(accuracies[f"8_{weights}_0"] + accuracies[f"8_{weights}_1"]) / 2 for weights in ("null", "backbone")]
    assert (out / "transfer.md").read_text().strip() == page.strip()
    assert [float(x) for x in re.findall(r"\| (-?[\d.]+) \[", page)] == [*means, means[1] - means[0]]
    backbone_accuracy = json.loads((out / "backbone" / "run" / "results.json").read_text())["test"]["acc"]
    text = " ".join(page.split())
    for part in (
        f"classes class 0, class 2 (epochs: 1, test accuracy {backbone_accuracy:.2%} on these classes)",
        "classes class 1, class 3, with 2 steps of 50 images for both",
        "over 2 seeds on 8 images and its 95% interval",
        "drawn shapes, 32 px, cpu (",
        "--data-root data --data-name 'drawn shapes' --out DIR model.image_size=32",
    ):
        assert part in text

    assert compare() == page
    assert len(ran) == 9, "nothing is trained again"
    for changed, message in (
        ("--steps=3", "has results of other arguments"),
        (f"--data-root={out}", "has no folder train"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compare(changed)
        assert capsys.readouterr().err.count(f"{out}: {message}") == 1
