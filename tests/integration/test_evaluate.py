"""Evaluation of a checkpoint: the numbers of the run's own test on the same data, and of other data."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, compose_command
from PIL import Image
from torch.nn.functional import one_hot

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.engine.evaluator import check_same_split, data_options, recorded_precision
from cifar10_tl.evaluate import evaluate, main, quote_list
from cifar10_tl.metrics.calibration import fit_temperature
from cifar10_tl.metrics.tta import additional_views

FIGURES = {"confusion_matrix", "correct", "incorrect", "reliability", "per_class", "confidence"}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def best(finished_run: Path) -> Path:
    return finished_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def data(best: Path) -> CIFAR10DataModule:
    """The data of the small run."""
    datamodule = CIFAR10DataModule(**torch.load(best, weights_only=True)["datamodule_hyper_parameters"])
    datamodule.setup()
    return datamodule


@pytest.fixture
def run_evaluate(tmp_path: Path, best: Path) -> Evaluate:
    """A function that evaluates the checkpoint of the small run."""

    def run(*overrides: str, checkpoint: Path = best) -> dict[str, Any]:
        folder = f"paths.output_dir={tmp_path / 'evaluation'}"
        cfg = compose_command("evaluate", f"checkpoint={checkpoint}", folder, "trainer.accelerator=cpu", *overrides)
        return evaluate(cfg)

    return run


@pytest.fixture(scope="session")
def full_evaluation(best: Path, data: CIFAR10DataModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation with all options."""
    folder = tmp_path_factory.mktemp("evaluations") / "full"
    people, doubtful = folder.parent / "people.npy", folder.parent / "doubtful.json"
    np.save(people, 0.5 * one_hot(data.splits["test"].labels, 10).double().numpy() + 0.05)
    doubtful.write_text("[0, 5]")
    files = (f"human_labels={people}", f"doubtful_labels={doubtful}", f"paths.output_dir={folder}")
    options = ("trainer.accelerator=cpu", "tta=flip_shift")
    evaluate(compose_command("evaluate", f"checkpoint={best}", *files, *options))
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_numbers_are_those_of_the_run(full_evaluation: Path, finished_run: Path) -> None:
    own, of_run = results_of(full_evaluation), results_of(finished_run)
    assert {key: own["test"][key] for key in of_run["test"]} == of_run["test"]
    assert own["confusion_matrix"] == of_run["confusion_matrix"]
    assert own["class_names"] == of_run["class_names"]
    assert own["epoch"] == of_run["best_epoch"]
    assert own["environment"]["precision"] == of_run["environment"]["precision"] == "32-true"
    assert own["test_images"] == of_run["test_images"]
    for name in ("confusion_matrix", "correct", "incorrect"):
        file = f"figures/{name}_test.png"
        assert (full_evaluation / file).read_bytes() == (finished_run / file).read_bytes()
    assert (full_evaluation / "predictions.csv").read_text() == (finished_run / "predictions.csv").read_text()
    files = {str(p.relative_to(full_evaluation)) for p in full_evaluation.rglob("*") if p.is_file()}
    assert files == {"results.json", "predictions.csv"} | {f"figures/{name}_test.png" for name in FIGURES}


def test_predictions_have_a_row_per_image(full_evaluation: Path) -> None:
    results = results_of(full_evaluation)
    names = results["class_names"]
    rows = list(csv.DictReader((full_evaluation / "predictions.csv").open()))
    assert list(rows[0]) == ["index", "true_label", "predicted_label", "probability", *names]
    assert [int(row["index"]) for row in rows] == list(range(100))
    assert sum(row["true_label"] == row["predicted_label"] for row in rows) / 100 == results["test"]["acc"]
    for row in rows:
        probabilities = {name: float(row[name]) for name in names}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert max(probabilities.values()) == probabilities[row["predicted_label"]] == float(row["probability"])


def test_results_contain_all_metrics(full_evaluation: Path) -> None:
    results = results_of(full_evaluation)
    test = results["test"]
    low, high = test["acc_interval"]
    assert low < test["acc"] < high
    assert test["acc"] <= test["top2_acc"] <= 1
    assert test["calibrated"]["temperature"] > 0
    assert {"nll", "brier", "ece"} <= test["calibrated"].keys()
    assert [row["class"] for row in test["per_class"]] == results["class_names"]
    assert test["confused_pairs"][0]["count"] == max(
        n for i, row in enumerate(results["confusion_matrix"]) for j, n in enumerate(row) if i != j
    )
    probabilities = [error["probability"] for error in test["confident_errors"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert results["data"]["source"] == "shapes"
    assert results["doubtful_labels"]["count"] == 2
    assert results["human_labels"]["agreement"] == test["acc"]
    assert results["human_labels"]["cross_entropy"] > results["human_labels"]["lowest_possible"] > 0


def test_views_match_a_plain_loop(full_evaluation: Path, best: Path, data: CIFAR10DataModule) -> None:
    results, module, test = results_of(full_evaluation), restore(best), data.splits["test"]
    with torch.inference_mode():
        views = [test.images, *additional_views(test.images, "flip_shift")]
        mean = torch.stack([module(view).softmax(1) for view in views]).mean(0)
    assert (results["tta"]["name"], results["tta"]["views"]) == ("flip_shift", 6)
    assert results["tta"]["acc"] == float((mean.argmax(1) == test.labels).double().mean())
    assert results["tta"]["loss"] == pytest.approx(float(-mean[torch.arange(100), test.labels].log().mean()), rel=1e-5)


def test_val_equals_the_best_epoch_and_fits_the_temperature(
    run_evaluate: Evaluate, finished_run: Path, best: Path, data: CIFAR10DataModule, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        results = run_evaluate("split=val", "tta=flip")
    assert {key: results["val"][key] for key in ("acc", "loss", "count")} == results_of(finished_run)["val"]
    with torch.inference_mode():
        temperature = fit_temperature(restore(best)(data.splits["val"].images), data.splits["val"].labels)
    assert results["val"]["calibrated"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert results["val"]["calibrated"]["nll"] <= results["val"]["nll"]
    assert "precision 32-true: as in the run" in caplog.text
    accuracy = next(line for line in caplog.text.splitlines() if line.startswith("  accuracy"))
    assert accuracy.split() == ["accuracy", f"{results['val']['acc']:.2%}", f"{results['tta']['acc']:.2%}"]


def test_train_is_evaluated_without_augmentation(
    run_evaluate: Evaluate, best: Path, data: CIFAR10DataModule, tmp_path: Path
) -> None:
    content = torch.load(best, weights_only=True)
    content["datamodule_hyper_parameters"]["image_limit"] = 20
    content["hyper_parameters"]["weights"] = "IMAGENET1K_V1"  # must not be downloaded
    torch.save(content, tmp_path / "limited.ckpt")
    assert run_evaluate("split=train", checkpoint=tmp_path / "limited.ckpt")["train"]["count"] == 20
    results = run_evaluate("split=train", "data.image_limit=null", checkpoint=tmp_path / "limited.ckpt")
    with torch.inference_mode():
        correct = restore(best)(data.splits["train"].images).argmax(1) == data.splits["train"].labels
    assert results["train"]["count"] == 320  # an explicit null replaces the limit in the checkpoint
    assert results["train"]["acc"] == float(correct.double().mean())
    assert results["data"]["batch_size"] == 64  # as in the checkpoint


@pytest.mark.parametrize("override", ["data.split_seed=1", "data.val_size=100", "data.train_size=500", "data=shapes"])
def test_another_split_of_the_training_images_is_refused(
    override: str, run_evaluate: Evaluate, best: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"data\.\w+=\w+: with another split than data\.\w+=\d+, val contains training images"
    ):
        run_evaluate(override)
    assert not (tmp_path / "evaluation").exists()


def test_other_images_may_be_split_in_another_way(tmp_path: Path) -> None:
    shapes = {"source": "shapes", "drawing_seed": 0, "val_size": 80, "split_seed": 0, "train_size": 400}
    check_same_split({**shapes, "drawing_seed": 1, "val_size": 10}, shapes)
    folder = {"source": "folder", "root": str(tmp_path / "a"), "val_size": 0.1, "split_seed": 0}
    check_same_split({**folder, "root": str(tmp_path / "b"), "split_seed": 2}, folder)
    for other in (
        {**folder, "root": f"{tmp_path}/x/../a", "split_seed": 2},
        {"source": "cifar10", "root": "elsewhere", "val_size": 10, "split_seed": 0},
    ):
        with pytest.raises(UserError, match="with another split"):
            check_same_split(other, folder if "x/.." in other["root"] else {**other, "root": "here", "val_size": 20})


def write_images(root: Path, names: list[str], images: torch.Tensor, labels: torch.Tensor, num_train: int) -> None:
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = root / ("train" if i < num_train else "test") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")


def test_other_data_with_ground_truth(run_evaluate: Evaluate, best: Path, tmp_path: Path) -> None:
    names = list(restore(best).class_names)
    images, labels = draw_shapes(120, seed=11)
    write_images(tmp_path / "images", names, images, labels, num_train=60)
    folder = ("data=folder", f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}")
    with pytest.raises(UserError) as error:
        run_evaluate(*folder, "data.val_size=20")
    assert str(error.value) == (
        f"the classes of the checkpoint ({', '.join(names)}) differ from those of the data ({', '.join(sorted(names))})"
    )

    content = torch.load(best, weights_only=True)  # the same network, its classes in the order of the folders
    content["hyper_parameters"]["class_names"] = sorted(names)
    content["datamodule_hyper_parameters"] = {"source": "folder", "root": str(tmp_path / "gone"), "seed": 0}
    torch.save(content, tmp_path / "sorted.ckpt")
    with pytest.raises(UserError, match="gone: there is no folder train"):
        run_evaluate(checkpoint=tmp_path / "sorted.ckpt")

    images, labels = images[60:], torch.tensor([sorted(names).index(names[label]) for label in labels[60:]])
    order = labels.argsort(stable=True)  # as in class folders
    with torch.inference_mode():
        correct = restore(best)(images[order]).argmax(1) == labels[order]
    incorrect = (~correct).nonzero().flatten().tolist()
    (tmp_path / "doubtful").write_text("\n".join(f"{i} {sorted(names)[labels[order][i]]}" for i in incorrect))
    np.save(tmp_path / "people.npy", 0.9 * one_hot(labels[order], 10).double().numpy() + 0.01)
    np.save(tmp_path / "official.npy", 0.9 * one_hot(labels, 10).double().numpy() + 0.01)
    options = (*folder, "data.val_size=20", f"doubtful_labels={tmp_path / 'doubtful'}")
    results = run_evaluate(*options, f"human_labels={tmp_path / 'people.npy'}", checkpoint=tmp_path / "sorted.ckpt")
    accuracy = float(correct.double().mean())
    assert (results["test"]["acc"], results["test"]["count"]) == (accuracy, 60)
    assert results["human_labels"]["agreement"] == accuracy
    assert results["doubtful_labels"] == {
        "count": len(incorrect),
        "acc_with": accuracy,
        "acc_without": 1.0,
        "acc_on_doubtful": 0.0,
    }
    with pytest.raises(UserError, match="rows must be in the order of the test images"):
        run_evaluate(*options, f"human_labels={tmp_path / 'official.npy'}", checkpoint=tmp_path / "sorted.ckpt")


def test_data_settings_update_those_of_the_checkpoint() -> None:
    trained = {"source": "folder", "root": "a", "val_size": 10, "image_limit": 5}
    open_settings = dict.fromkeys(("source", "root", "val_size", "image_limit"), "as_trained")
    assert data_options(open_settings, trained) == trained
    assert data_options({**open_settings, "root": "b", "image_limit": None}, trained) == {
        **trained,
        "root": "b",
        "image_limit": None,
    }
    assert data_options({"source": "shapes", "val_size": 5}, trained) == {"source": "shapes", "val_size": 5}
    with pytest.raises(UserError, match="does not name its data"):
        data_options(open_settings, {})


def test_precision_is_that_of_the_run(run_evaluate: Evaluate, best: Path, tmp_path: Path) -> None:
    assert recorded_precision(best) == "32-true"
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(best, checkpoint)
    assert recorded_precision(checkpoint) is None
    for text in ("{", "[]"):
        (tmp_path / "run" / "results.json").write_text(text)
        assert recorded_precision(checkpoint) is None
    (tmp_path / "run" / "results.json").write_text('{"environment": {"precision": "bf16-mixed"}}')
    results = run_evaluate("data.image_limit=20", checkpoint=checkpoint)
    assert results["environment"]["precision"] == "bf16-mixed"
    full = run_evaluate("data.image_limit=20", "trainer.precision=32-true", checkpoint=checkpoint)
    assert full["environment"]["precision"] == "32-true"
    assert full["test"]["loss"] != results["test"]["loss"]


def test_runs_and_evaluations_are_compared(finished_run: Path, full_evaluation: Path, tmp_path: Path) -> None:
    folders = quote_list(f"compare={finished_run},{full_evaluation}")
    first, second = evaluate(compose_command("evaluate", folders, f"paths.output_dir={tmp_path}"))["runs"]
    assert first["test acc"] == second["test acc"] == results_of(finished_run)["test"]["acc"]
    assert (second["only first correct"], second["only this correct"], second["McNemar p"]) == (0, 0, 1.0)
    assert second["different settings"] == f"checkpoint={finished_run / 'checkpoints' / 'best.ckpt'}"
    table = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [float(row["test acc"]) for row in table] == [first["test acc"]] * 2
    assert (tmp_path / "comparison.md").read_text().count("\n") == 4
    assert {p.name for p in tmp_path.iterdir()} == {"comparison.csv", "comparison.md"}


def test_evaluations_of_different_images_are_not_compared(
    run_evaluate: Evaluate, finished_run: Path, tmp_path: Path
) -> None:
    run_evaluate("data.drawing_seed=1")
    folders = quote_list(f"compare={finished_run},{tmp_path / 'evaluation'}")
    with pytest.raises(UserError, match="tested on different images"):
        evaluate(compose_command("evaluate", folders, f"paths.output_dir={tmp_path / 'comparison'}"))


def test_runs_to_compare_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quote_list("compare=a/b,c d") == "compare=['a/b','c d']"
    assert quote_list("compare=it's,b") == r"compare=['it\'s','b']"
    for unchanged in ("compare=[a,b]", "compare=", "images=a,b"):
        assert quote_list(unchanged) == unchanged
    monkeypatch.setattr("sys.argv", ["evaluate", "compare=a,b", "split=val"])
    monkeypatch.setattr("cifar10_tl.evaluate.run_command", lambda name, task: None)
    main()
    assert sys.argv == ["evaluate", "compare=['a','b']", "split=val"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "checkpoint=FILE"),
        (("checkpoint=nowhere.ckpt",), "checkpoint=nowhere.ckpt: "),
        (("checkpoint=pyproject.toml", "compare=[a,b]"), "checkpoint=FILE"),
        (("compare=[a]",), "compare=['a']"),
        (("checkpoint=pyproject.toml", "split=all"), "split=all"),
        (("checkpoint=pyproject.toml", "tta=rotate"), "tta=rotate"),
        (("checkpoint=pyproject.toml", "data.batch_size=0"), "data.batch_size=0"),
        (("checkpoint=pyproject.toml", "data.batch_size=null"), "data.batch_size=null"),
        (("checkpoint=pyproject.toml", "human_labels=3"), "human_labels=3"),
        (("checkpoint=pyproject.toml",), "pyproject.toml "),
    ],
)
def test_invalid_settings_are_refused(overrides: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(compose_command("evaluate", *overrides, f"paths.output_dir={tmp_path}"))


def test_unusable_files_are_refused_before_anything_is_written(
    run_evaluate: Evaluate, best: Path, finished_run: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(best.read_bytes()[:10000])
    with pytest.raises(UserError, match=r"broken\.ckpt"):
        run_evaluate(checkpoint=broken)
    content = torch.load(best, weights_only=True)
    del content["datamodule_hyper_parameters"]
    torch.save(content, broken)
    with pytest.raises(UserError, match="does not name its data"):
        run_evaluate(checkpoint=broken)
    np.save(tmp_path / "people.npy", np.full((99, 10), 0.1))
    with pytest.raises(UserError, match=r"expected shape \[100, 10\], got \[99, 10\]"):
        run_evaluate(f"human_labels={tmp_path / 'people.npy'}")
    with pytest.raises(UserError, match="use split=test"):
        run_evaluate(f"human_labels={tmp_path / 'people.npy'}", "split=val")
    assert not (tmp_path / "evaluation").exists()

    before = (finished_run / "results.json").read_bytes()
    assert (finished_run / RUN_CONFIG).is_file()
    with pytest.raises(UserError, match="contains a training run"):
        run_evaluate(f"paths.output_dir={finished_run}")
    assert (finished_run / "results.json").read_bytes() == before


@pytest.mark.slow
def test_command(best: Path, finished_run: Path, tmp_path: Path) -> None:
    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "cifar10_tl.evaluate", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            capture_output=True,
            text=True,
        )

    done = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.startswith("usage: python -m cifar10_tl.evaluate checkpoint=FILE")
    assert not set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M)) & {"torch", "lightning", "matplotlib"}

    done = command(f"checkpoint={best}", "data=cifar10", "data.root=empty")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: the classes of the checkpoint (circle, ")

    done = command(f"checkpoint={best}", "trainer.accelerator=cpu", "paths.output_dir=mine")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "mine")["test"]["acc"] == results_of(finished_run)["test"]["acc"]
