from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.comparison import compare_runs, describe_sweep, format_rows, mcnemar_p_value, read_run

LABELS = ["cat", "dog"] * 4


def make_run(
    folder: Path, correct: str, labels: list[str] = LABELS, more: tuple[str, ...] = (), **results: object
) -> Path:
    """Write a run whose predictions are correct where ``correct`` has a 1, with ``more`` columns."""
    folder.mkdir(parents=True)
    rows = [[i, label, label if correct[i] == "1" else "frog", *more] for i, label in enumerate(labels)]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["index", "true_label", "predicted_label", *more], *rows])
    defaults = {
        "test": {"acc": correct.count("1") / len(correct), "loss": 0.5, "count": len(correct)},
        "val": {"acc": 0.75},
        "epochs": 3,
        "seconds": {"fit": 12.3},
        "config": {"seed": 0, "optimizer": {"lr": 0.001, "betas": [0.9]}, "paths": {"output_dir": str(folder)}},
    }
    (folder / "results.json").write_text(json.dumps({**defaults, **results}))
    return folder


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 0.03125),  # 2 / 2**6
        (10, 2, 158 / 4096),  # 2 (1 + 12 + 66) / 2**12
        (4, 14, 0.0308838),  # binom.test(4, 18) of R
        (930, 1070, float(Fraction(2 * sum(math.comb(2000, k) for k in range(931)), 2**2000))),
    ],
)
def test_mcnemar_matches_known_values(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(p_value, rel=1e-5)


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "11110000")
    other = make_run(tmp_path / "b", "01111110", config={"seed": 0, "optimizer": {"lr": 0.01, "betas": [0.9]}})
    third = make_run(tmp_path / "c", "11110000")
    rows = compare_runs([read_run(run) for run in (first, other, third)])
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert columns["run"] == [str(first), str(other), str(third)]
    assert columns["test acc"] == [0.5, 0.75, 0.5]
    assert columns["95% low"][0] == pytest.approx(0.2152, abs=1e-4)
    assert columns["fit seconds"] == [12.3] * 3
    assert columns["vs. first"] == [None, 0.25, 0.0]
    assert columns["only first correct"] == [None, 1, 0]
    assert columns["only this correct"] == [None, 3, 0]
    assert columns["McNemar p"] == [None, 0.625, 1.0]  # 2 (1 + 4) / 2**4
    assert columns["different settings"] == [None, "optimizer.lr=0.01", None]
    assert format_rows(rows)[1][1:] == (
        ["75.00%", "40.93%", "92.85%", "0.5000", "75.00%", "3", "12", "+25.00%", "1", "3", "0.625", "optimizer.lr=0.01"]
    )


def test_runs_on_different_images_are_refused(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "a", "11110000", test_images="1234"))
    for name, labels, images in (
        ("fewer", LABELS[:4], "1234"),
        ("labels", LABELS[::-1], "1234"),
        ("images", LABELS, "5678"),
    ):
        other = read_run(make_run(tmp_path / name, "1" * len(labels), labels, test_images=images))
        with pytest.raises(UserError, match="cannot be compared: they were tested on different images"):
            compare_runs([first, other])
    compare_runs([first, read_run(make_run(tmp_path / "older", "11110000"))])


def test_runs_with_and_without_paths_and_with_classes_named_like_columns_are_compared(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "a", "11110000"))
    other = read_run(make_run(tmp_path / "b", "11111000", more=("probability", "index", "path", "true_label", "path")))
    assert (other.labels, other.correct) == (first.labels, {0, 1, 2, 3, 4})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions.csv", "", "not the folder of a tested run or an evaluation"),
        ("predictions.csv", "index,true_label\n0\n", "not the folder of a tested run or an evaluation"),
        ("results.json", "{", "not the folder of a tested run or an evaluation"),
        ("predictions.csv", None, r"not the folder .*predictions\.csv"),
        ("results.json", None, r"not the folder .*results\.json"),
        ("results.json", '{"val": {}}', "has no test results"),
    ],
)
def test_folders_without_a_tested_run_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    file = make_run(tmp_path / "a", "11110000") / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=f"^compare=.*{message}"):
        read_run(tmp_path / "a")


def test_a_sweep_is_described_by_mean_deviation_and_interval(tmp_path: Path) -> None:
    for job, correct in enumerate(("11110000", "11111000", "11111100")):
        make_run(tmp_path / "sweep" / str(job), correct, config={"seed": job})
    text = describe_sweep(tmp_path / "sweep")
    assert "3 runs: mean test acc 62.50%, standard deviation 12.50 points, 95% interval 31.45 to 93.55%" in text
    make_run(tmp_path / "alone" / "0", "11110000")
    assert describe_sweep(tmp_path / "alone").endswith("1 run: mean test acc 50.00%")
    with pytest.raises(UserError, match="no run with a test result"):
        describe_sweep(tmp_path)
