from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from helpers import REPOSITORY

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.comparison import HEADER, Comparison, McNemar, describe_sweep, read_run

LABELS = ["cat", "dog", "cat", "dog", "cat", "dog", "cat", "dog"]


def make_run(folder: Path, right: str, labels: list[str] = LABELS, **config: object) -> Path:
    """A run whose predictions are right where ``right`` has a 1."""
    folder.mkdir(parents=True)
    rows = [
        [i, label, label if hit == "1" else "frog", 0.9, 0.9, 0.1]
        for i, (label, hit) in enumerate(zip(labels, right, strict=True))
    ]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["index", "true_label", "predicted_label", "probability", "cat", "dog"], *rows])
    results = {
        "test": {"acc": right.count("1") / len(right), "loss": 0.5, "count": len(right)},
        "val": {"acc": 0.75},
        "epochs": 3,
        "seconds": {"fit": 12.3},
        "config": {"seed": 0, "optimizer": {"lr": 0.001}, "paths": {"output_dir": str(folder)}, **config},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 0.03125),  # 2 / 2**6
        (1, 9, 22 / 1024),  # 2 (1 + 10) / 2**10
        (10, 2, 158 / 4096),  # 2 (1 + 12 + 66) / 2**12
        (4, 14, 0.0308838),  # binom.test(4, 18) of R
    ],
)
def test_mcnemar_against_known_values(only_first: int, only_second: int, p_value: float) -> None:
    assert McNemar(only_first, only_second).p_value == pytest.approx(p_value, rel=1e-5)


def test_mcnemar_is_exact_for_many_images_too() -> None:
    tail = sum(math.comb(2000, k) for k in range(931))
    assert McNemar(930, 1070).p_value == float(Fraction(2 * tail, 2**2000))
    assert 0 < McNemar(4800, 5200).p_value < 1e-4


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "11110000")
    other = make_run(tmp_path / "b", "01111110", optimizer={"lr": 0.01})
    third = make_run(tmp_path / "c", "11110000")
    comparison = Comparison([read_run(run) for run in (first, other, third)])
    rows = [dict(zip(HEADER, row, strict=True)) for row in comparison.rows()]
    assert [row["test acc"] for row in rows] == [0.5, 0.75, 0.5]
    assert [row["to the first"] for row in rows] == [None, 0.25, 0.0]
    assert [row["only first right"] for row in rows] == [None, 1, 0]
    assert [row["only this right"] for row in rows] == [None, 3, 0]
    assert [row["McNemar p"] for row in rows] == [None, 0.625, 1.0]  # 2 (1 + 4) / 2**4
    assert [row["settings unlike the first"] for row in rows] == ["", "optimizer.lr=0.01", ""]

    table = list(csv.DictReader(comparison.csv().splitlines()))
    assert [row["run"] for row in table] == [str(first), str(other), str(third)]
    assert float(table[1]["McNemar p"]) == 0.625
    assert float(table[0]["interval low"]) == pytest.approx(0.2152, abs=1e-4)
    assert table[0]["fit seconds"] == "12.3"
    markdown = comparison.markdown().splitlines()
    assert len(markdown) == 5
    assert len({line.count("|") for line in markdown}) == 1
    assert "75.00%" in markdown[3]
    assert "+25.00%" in comparison.text()
    assert f"{other}: optimizer.lr=0.01" in comparison.text()


def test_runs_on_other_images_are_not_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "11110000")
    for name, labels in (("fewer", LABELS[:4]), ("other", LABELS[::-1])):
        other = make_run(tmp_path / name, "1" * len(labels), labels)
        with pytest.raises(UserError, match=r"different images .*cannot be compared"):
            Comparison([read_run(first), read_run(other)])


def test_what_is_no_tested_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json is missing"):
        read_run(tmp_path)
    run = make_run(tmp_path / "a", "11110000")
    (run / "predictions.csv").write_text("index,true_label\n0\n")
    with pytest.raises(UserError, match="is broken"):
        read_run(run)
    (run / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"predictions\.csv is missing"):
        read_run(run)
    untested = make_run(tmp_path / "b", "11110000")
    (untested / "results.json").write_text('{"val": {}}')
    with pytest.raises(UserError, match="no result of test images"):
        read_run(untested)
    (untested / "results.json").write_text("{")
    with pytest.raises(UserError, match="is broken"):
        read_run(untested)


# ------------------------------------------------------------------------------------------------------- seeds.sh


def test_a_sweep_is_described_by_mean_deviation_and_interval(tmp_path: Path) -> None:
    for job, right in enumerate(("11110000", "11111000", "11111100")):
        make_run(tmp_path / "sweep" / str(job), right, seed=job)
    text = describe_sweep(tmp_path / "sweep")
    assert "3 runs: mean test acc 62.50%, standard deviation 12.50 points, 95 % interval 31.45 to 93.55%" in text
    make_run(tmp_path / "alone" / "0", "11110000")
    assert describe_sweep(tmp_path / "alone").endswith("1 run: mean test acc 50.00%")
    with pytest.raises(UserError, match="no run with a test result"):
        describe_sweep(tmp_path)


@pytest.mark.slow
def test_seeds_starts_one_sweep_and_tells_its_outcome(tmp_path: Path) -> None:
    """With a stand-in for Python that writes results instead of training."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
if sys.argv[1] == "-":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
print(sys.argv[1:])
folder = next(a.split("=")[1] for a in sys.argv if a.startswith("paths.output_dir="))
for job, acc in enumerate((0.9, 0.92, 0.94)):
    run = pathlib.Path(folder, str(job))
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({{"test": {{"acc": acc}}, "config": {{"seed": job}}}}))
"""
    )
    stand_in.chmod(0o755)

    def seeds(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(REPOSITORY / "scripts" / "seeds.sh"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(stand_in), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )

    done = seeds("3", "optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr
    assert (
        "'-m', 'cifar10_tl.train', '--multirun', 'optimizer.lr=1e-3', 'seed=0,1,2', 'paths.output_dir=" in done.stdout
    )
    assert "3 runs: mean test acc 92.00%, standard deviation 2.00 points, 95 % interval 87.03 to 96.97%" in done.stdout
    assert (tmp_path / "outputs" / "sweeps").is_dir()
    assert seeds("3", "paths.output_dir=mine").returncode == 0
    assert (tmp_path / "mine" / "2").is_dir()
    for arguments, complaint in (
        ((), "whole number"),
        (("0",), "whole number"),
        (("2", "seed=4"), "chooses the seeds"),
    ):
        done = seeds(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert complaint in done.stderr
