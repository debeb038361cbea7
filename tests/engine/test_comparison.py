from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers import LABELS, compose_command, make_run

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.comparison import (
    SETTINGS_COLUMNS,
    Run,
    compare_runs,
    compare_settings,
    describe_sweep,
    format_rows,
    mcnemar_p_value,
    read_run,
    settings_of,
)
from cifar10_tl.evaluate import evaluate, quote_list


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


def test_settings_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    def run(lr: float, seed: int, num_correct: int, budget: str | None = None, epochs: int = 3) -> Run:
        config = {"seed": seed, "optimizer": {"lr": lr}, "budget": budget, "trainer": {"max_epochs": epochs}}
        correct = "1" * num_correct + "0" * (8 - num_correct)
        return read_run(make_run(tmp_path / f"{lr}-{seed}-{budget}", correct, config=config))

    runs = [run(0.1, 0, 4), run(0.1, 1, 5), run(0.2, 1, 6), run(0.2, 0, 6), run(0.2, 2, 4)]
    runs += [run(0.3, 0, 8), run(0.3, 1, 2, "5min", 7), run(0.3, 2, 3, "5min", 8)]
    rows = compare_settings(runs)
    columns = {name: [row[name] for row in rows] for name in SETTINGS_COLUMNS}
    assert columns["settings"] == ["the first", "optimizer.lr=0.2", "optimizer.lr=0.3", "optimizer.lr=0.3 budget=5min"]
    assert columns["seeds"] == [2, 3, 1, 2]
    assert columns["mean test acc"] == pytest.approx([4.5 / 8, 16 / 24, 1, 2.5 / 8])
    deviations = [0.5**0.5 / 8, (4 / 3) ** 0.5 / 8, math.nan, 0.5**0.5 / 8]
    assert [row["standard deviation"] or math.nan for row in rows] == pytest.approx(deviations, nan_ok=True)
    assert columns["pairs"] == [None, 2, 1, 1]
    assert columns["vs. first"] == [None, 1.5 / 8, 0.5, -3 / 8]  # of 2 and 1 images; of 4; of -3
    half = 12.7062 * 0.5**0.5 / 8 / 2**0.5
    assert columns["95% low"] == [None, pytest.approx(1.5 / 8 - half, rel=1e-5), None, None]
    assert columns["95% high"] == [None, pytest.approx(1.5 / 8 + half, rel=1e-5), None, None]
    assert columns["further seeds"] == [None, 2, None, None]  # 2.8016^2 (0.7071 / 1.5)^2 + 1.92 = 3.67
    assert format_rows(rows, SETTINGS_COLUMNS)[1][:6] == ["optimizer.lr=0.2", "3", "66.67%", "14.43%", "2", "+18.75%"]
    assert compare_settings(runs[1:3]) == [], "no setting has several seeds"


def test_the_metric_of_the_best_checkpoint_is_a_setting_and_no_run_is_counted_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, seed: int, monitor: str, correct: str) -> Run:
        callbacks = {"best_checkpoint": {"monitor": monitor}, "curves": {"name": name}}
        return read_run(make_run(tmp_path / name, correct, config={"seed": seed, "callbacks": callbacks}))

    runs = [run("a", 0, "val/acc", "11110000"), run("b", 1, "val/acc", "11100000")]
    runs += [run("c", 0, "val/loss", "10000000"), run("d", 1, "val/acc", "11111111")]
    first, other = compare_settings(runs)
    assert (first["seeds"], first["mean test acc"]) == (2, 3.5 / 8)
    assert other["settings"] == "callbacks.best_checkpoint.monitor=val/loss"
    assert f"omitted from the table of seeds (same settings and seed as another run): {tmp_path / 'd'}\n" in caplog.text


def test_an_evaluation_has_the_settings_of_its_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"run{seed}", "11110000", config={"seed": seed, "optimizer": {"lr": 0.1}})
    checkpoints = ("run0/checkpoints/best.ckpt", "run1/checkpoints/best.ckpt", "run0/checkpoints/last.ckpt")
    evaluations = [
        read_run(make_run(tmp_path / f"evaluation{i}", "11110000", checkpoint=str(tmp_path / checkpoint)))
        for i, checkpoint in enumerate(checkpoints)
    ]
    rows = compare_runs([*evaluations, read_run(tmp_path / "run1")])
    assert [row["different settings"] for row in rows] == [None, "seed=1", "checkpoint=last.ckpt", "seed=1"]
    assert [row["settings"] for row in compare_settings(evaluations)] == ["the first", "checkpoint=last.ckpt"]


def test_a_setting_that_only_the_first_run_has_is_a_difference(tmp_path: Path) -> None:
    optimizers = ({"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.1})
    runs = [
        read_run(make_run(tmp_path / str(i), "11110000", config={"seed": seed, "optimizer": optimizer}))
        for i, (seed, optimizer) in enumerate(zip((0, 1, 1), optimizers, strict=True))
    ]
    changes = [row["different settings"] for row in compare_runs(runs)]
    assert changes == [None, "seed=1", "seed=1 ~optimizer.weight_decay"]
    rows = compare_settings(runs)
    assert [(row["settings"], row["seeds"]) for row in rows] == [("the first", 2), ("~optimizer.weight_decay", 1)]


def test_the_command_shows_and_writes_both_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def config(lr: float, seed: int) -> dict[str, object]:
        return {"seed": seed, "optimizer": {"lr": lr}}

    corrects = {(0.1, 0): "11100000", (0.1, 1): "11110000", (0.2, 0): "11111000", (0.2, 1): "11111110"}
    runs = [make_run(tmp_path / f"{lr}-{seed}", c, config=config(lr, seed)) for (lr, seed), c in corrects.items()]
    folders = quote_list(f"compare={','.join(map(str, runs))}")
    with caplog.at_level("INFO", "cifar10_tl"):
        found = evaluate(compose_command("evaluate", folders, f"paths.output_dir={tmp_path / 'out'}"))
    assert [row["vs. first"] for row in found["settings"]] == [None, 2.5 / 8]
    row = ["optimizer.lr=0.2", "2", "75.00%", "17.68%", "2", "+31.25%", "-48.16%", "+110.66%", "1"]
    text = " ".join(caplog.text.split())
    assert " ".join(["2", *row[1:]]) in text
    assert "1: the first 2: optimizer.lr=0.2" in text
    assert f"| {' | '.join(row)} |" in (tmp_path / "out" / "comparison.md").read_text()


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


def test_runs_that_decoded_the_same_files_at_another_size_are_compared(tmp_path: Path) -> None:
    def run(name: str, root: str, path: str = "x.jpg", fit: str = "pad", **results: Any) -> Run:
        config = {"data": {"root": root, "fit": fit}}
        folder = make_run(tmp_path / name, "11110000", config=config, test_images=name, **results)
        lines = (folder / "predictions.csv").read_text().splitlines()
        named = [f"{lines[0]},path", *(f"{line},{i}{path}" for i, line in enumerate(lines[1:]))]
        (folder / "predictions.csv").write_text("\n".join(named))
        return read_run(folder)

    first, edited = run("a", "pets", fit="crop"), run("b", "pets", fit="crop")
    assert compare_runs([first, run("c", "pets")])[1]["vs. first"] == 0
    evaluated = run("d", "pets", data={"root": "dogs", "fit": "pad"})
    for other in (edited, evaluated, run("e", "dogs"), run("f", "pets", "y.jpg"), run("g", "pets", "")):
        with pytest.raises(UserError, match="tested on different images"):
            compare_runs([first, other])


def test_runs_with_and_without_paths_and_with_classes_named_like_columns_are_compared(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "a", "11110000"))
    run = make_run(tmp_path / "b", "11111000", more=("probability", "index", "path", "true_label", "path"))
    header, *rows = (run / "predictions.csv").read_text().splitlines()
    rows = [row.removesuffix("path") + "cat.png" for row in rows]
    (run / "predictions.csv").write_text("\n".join([header, *rows]))
    other = read_run(run)
    assert (other.labels, other.correct) == (first.labels, {0, 1, 2, 3, 4})
    assert [first.predictions[0]["path"], other.predictions[0]["path"]] == ["", "cat.png"]


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
    make_run(tmp_path / "sweep" / "3", "11110000", config={"seed": 3, "optimizer": {"lr": 0.1}})
    with pytest.raises(UserError, match=r"its runs differ in more than the seed \(optimizer\.lr=0\.1\); use evaluate"):
        describe_sweep(tmp_path / "sweep")


def test_settings_without_effect_do_not_separate_seeds() -> None:
    config = {"seed": 1, "trust": True, "checkpoint_every_n_steps": 5, "optimizer": {"lr": 0.1}}
    config |= {"data": {"cache_dir": "c"}, "trainer": {"enable_progress_bar": False, "max_epochs": 2}}
    config |= {"callbacks": {"curves": None, "throughput": {"a": 1}, "stop": {"patience": 3}}, "ema_decay": 0.9}
    kept = {"callbacks.stop.patience": 3, "ema_decay": 0.9, "optimizer.lr": 0.1, "trainer.max_epochs": 2}
    assert settings_of({"config": config}) == {"seed": 1, **kept}


def test_predictions_beside_a_test_time_augmentation_are_the_plain_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_run(make_run(tmp_path / "a", "11110000", tta={"name": "flip", "acc": 0.75}))
    assert "a: compared without its test-time augmentation" in caplog.text


@pytest.mark.parametrize("given", ["split=val", "tta=flip", "doubtful_labels=a.csv"])
def test_settings_of_an_evaluation_are_refused_in_a_comparison(given: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "11110000") for name in "ab"]
    with pytest.raises(UserError, match=r"compare= uses the test results of finished runs; remove"):
        evaluate(compose_command("evaluate", f"compare={[str(run) for run in runs]}", given))
