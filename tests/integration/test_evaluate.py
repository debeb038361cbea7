"""Evaluation of a checkpoint: the numbers of the run's own test on the same data, and of other data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, compose_command, write_png, write_shapes
from torch.nn.functional import one_hot

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.batch import Split
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.engine.evaluator import (
    build_datamodule,
    build_trainer,
    check_same_split,
    data_options,
    recorded_precision,
)
from cifar10_tl.engine.processes import SignalHandler, Stopped
from cifar10_tl.evaluate import evaluate, main, quote_list
from cifar10_tl.io import read_csv
from cifar10_tl.metrics.calibration import fit_temperature
from cifar10_tl.metrics.tta import additional_views
from cifar10_tl.models.lit_classifier import LitClassifier

pytestmark = pytest.mark.slow

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
def run_evaluate(tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """A function that evaluates the checkpoint of the small run, without figures."""
    monkeypatch.setattr("cifar10_tl.engine.evaluator.evaluation_figures", lambda *_: {})

    def run(*overrides: str, checkpoint: Path = best) -> dict[str, Any]:
        usual = (f"paths.output_dir={tmp_path / 'evaluation'}", "trainer.accelerator=cpu", "report=none")
        return evaluate(compose_command("evaluate", f"checkpoint={checkpoint}", *usual, *overrides))

    return run


def test_a_signal_ends_an_evaluation_with_its_status(
    run_evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LitClassifier, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        run_evaluate()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / "evaluation" / "results.json").exists()


@pytest.fixture(scope="session")
def full_evaluation(best: Path, data: CIFAR10DataModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation with all options."""
    folder = tmp_path_factory.mktemp("evaluations") / "full"
    people, doubtful = folder.parent / "people.npy", folder.parent / "doubtful.json"
    np.save(people, 0.5 * one_hot(data.splits["test"].labels, 10).double().numpy() + 0.05)
    doubtful.write_text("[0, 5]")
    files = (f"human_labels={people}", f"doubtful_labels={doubtful}", f"paths.output_dir={folder}")
    evaluate(compose_command("evaluate", f"checkpoint={best}", *files, "trainer.accelerator=cpu", "tta=flip_shift"))
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
    figures = {f"figures/{name}_test.png" for name in FIGURES}
    assert files == {"results.json", "predictions.csv", "report.html"} | figures


def test_predictions_have_a_row_per_image(full_evaluation: Path) -> None:
    results = results_of(full_evaluation)
    names = results["class_names"]
    rows = read_csv(full_evaluation / "predictions.csv")
    assert list(rows[0]) == ["index", "true_label", "predicted_label", "probability", *names, "path"]
    assert {row["path"] for row in rows} == {""}  # the built-in images are not files
    assert [int(row["index"]) for row in rows] == list(range(100))
    assert sum(row["true_label"] == row["predicted_label"] for row in rows) / 100 == results["test"]["acc"]
    for row in rows:
        probabilities = {name: float(row[name]) for name in names}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert max(probabilities.values()) == probabilities[row["predicted_label"]] == float(row["probability"])


def test_results_contain_all_metrics(full_evaluation: Path) -> None:
    results = results_of(full_evaluation)
    test = results["test"]
    assert test["acc_interval"][0] < test["acc"] < test["acc_interval"][1]
    assert test["acc"] <= test["top2_acc"] <= 1
    assert {"temperature", "nll", "brier", "ece"} <= test["calibrated"].keys()
    assert [row["class"] for row in test["per_class"]] == results["class_names"]
    off_diagonal = np.array(results["confusion_matrix"]) * (1 - np.eye(10))
    assert test["confused_pairs"][0]["count"] == off_diagonal.max()
    probabilities = [error["probability"] for error in test["confident_errors"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {error["path"] for error in test["confident_errors"]} == {None}
    assert results["data"]["source"] == "shapes"
    assert results["doubtful_labels"]["count"] == 2
    assert results["human_labels"]["agreement"] == test["acc"]
    assert results["human_labels"]["cross_entropy"] > results["human_labels"]["lowest_possible"] > 0


def test_views_match_a_plain_loop(full_evaluation: Path, best: Path, data: CIFAR10DataModule) -> None:
    results, module, test = results_of(full_evaluation), restore(best), data.splits["test"]
    with torch.inference_mode():
        views = [test.images, *(view(test.images) for view in additional_views("flip_shift"))]
        mean = torch.stack([module(view).softmax(1) for view in views]).mean(0)
    assert (results["tta"]["name"], results["tta"]["views"]) == ("flip_shift", 6)
    assert results["tta"]["acc"] == float((mean.argmax(1) == test.labels).double().mean())
    assert results["tta"]["loss"] == pytest.approx(float(-mean[torch.arange(100), test.labels].log().mean()), rel=1e-5)


def test_val_equals_the_best_epoch_and_its_temperature_is_used_for_the_test(
    run_evaluate: Evaluate,
    finished_run: Path,
    full_evaluation: Path,
    best: Path,
    data: CIFAR10DataModule,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        results = run_evaluate("split=val", "tta=flip")
    in_training = results_of(finished_run)["val"]
    assert {key: results["val"][key] for key in in_training} == in_training
    with torch.inference_mode():
        temperature = fit_temperature(restore(best)(data.splits["val"].images), data.splits["val"].labels)
    assert results_of(full_evaluation)["test"]["calibrated"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert "calibrated" not in results["val"], "on the images that it was fitted to, it is too good"
    assert "precision 32-true: as in the run" in caplog.text
    accuracy = next(line for line in caplog.text.splitlines() if line.startswith("  accuracy"))
    assert accuracy.split() == ["accuracy", f"{results['val']['acc']:.2%}", f"{results['tta']['acc']:.2%}"]


def test_train_is_evaluated_without_augmentation(
    run_evaluate: Evaluate, best: Path, data: CIFAR10DataModule, tmp_path: Path
) -> None:
    content = torch.load(best, weights_only=True)
    content["datamodule_hyper_parameters"]["image_limit"] = 20
    del content["CIFAR10DataModule"]  # of all images
    content["hyper_parameters"]["weights"] = "IMAGENET1K_V1"  # must not be downloaded
    torch.save(content, tmp_path / "limited.ckpt")
    assert run_evaluate("split=train", checkpoint=tmp_path / "limited.ckpt")["train"]["count"] == 20
    settings = ("split=train", "data.image_limit=null", "trainer.precision=32-true")
    results = run_evaluate(*settings, checkpoint=tmp_path / "limited.ckpt")
    with torch.inference_mode():
        correct = restore(best)(data.splits["train"].images).argmax(1) == data.splits["train"].labels
    assert results["train"]["count"] == 320  # an explicit null replaces the limit in the checkpoint
    assert results["train"]["acc"] == float(correct.double().mean())
    assert results["data"]["batch_size"] == 64  # as in the checkpoint


def test_the_report_has_grad_cam_of_each_image_that_it_shows(
    run_evaluate: Evaluate, best: Path, tmp_path: Path
) -> None:
    content = torch.load(best, weights_only=True)
    content["hyper_parameters"]["image_size"] = 64  # 2 x 2 cells
    torch.save(content, tmp_path / "larger.ckpt")
    run_evaluate("data.image_limit=20", "report=short", checkpoint=tmp_path / "larger.ckpt")
    assert (tmp_path / "evaluation" / "report.html").read_text().count('<i class="g"') == 20


def test_another_split_of_the_training_images_is_refused(run_evaluate: Evaluate, tmp_path: Path) -> None:
    message = r"data\.split_seed=1: the run used data\.split_seed=0; another split would put training images into val"
    with pytest.raises(UserError, match=message):
        run_evaluate("data.split_seed=1")
    assert not (tmp_path / "evaluation").exists()


def test_images_of_training_are_not_tested_after_they_were_moved_or_more_were_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shapes(tmp_path, num_classes=3, pictures=20)
    folder, checkpoint = tmp_path / "pictures", tmp_path / "best.ckpt"
    sizes: Any = {"val_size": 0.2, "test_size": 0.2}
    caplog.set_level("INFO", "cifar10_tl.engine.evaluator")
    data = CIFAR10DataModule(source="folder", root=str(folder), cache_dir=str(tmp_path / "cache"), **sizes)
    data.setup()
    content = {"state_dict": {}, "hyper_parameters": {}, "epoch": 0, "datamodule_hyper_parameters": dict(data.hparams)}
    torch.save({**content, "CIFAR10DataModule": data.state_dict()}, checkpoint)
    module: Any = SimpleNamespace(class_names=data.class_names, hparams={"native_size": 32, "fit": "squeeze"})

    def test_of(*overrides: str) -> Split:
        cfg = compose_command("evaluate", f"checkpoint={checkpoint}", *overrides)
        return build_datamodule(cfg, module).splits["test"]

    moved = f"data.root={shutil.copytree(folder, tmp_path / 'moved')}"
    assert test_of().paths == test_of(moved).paths == data.splits["test"].paths
    assert len(test_of("data.image_limit=6")) == 6
    for root in (folder, tmp_path / "moved"):
        shutil.copy(root / "class 0" / "00.png", root / "class 0" / "000.png")
    assert "all images are tested" not in caplog.text
    assert len(test_of(moved)) == 61, "other images are tested as a whole"
    assert "all images are tested; none of them should be from the training set" in caplog.text
    for overrides in ((), ("data.image_limit=6",)):
        with pytest.raises(UserError, match=r"^the images of train, val, test have changed .*data\.root=DIR"):
            test_of(*overrides)


def test_other_pictures_are_decoded_as_in_training(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_png(tmp_path / "images" / name, torch.zeros(1, 3, 20, 40).byte())
    torch.save({"state_dict": {}, "hyper_parameters": {}, "epoch": 0}, tmp_path / "best.ckpt")
    module: Any = SimpleNamespace(class_names=["cat", "dog"], hparams={"native_size": 24, "fit": "pad"})
    folder = ("data=folder", f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}")
    cfg = compose_command("evaluate", f"checkpoint={tmp_path / 'best.ckpt'}", *folder)
    images = build_datamodule(cfg, module).splits["test"].by_index(torch.arange(2))
    assert images.shape == (2, 3, 24, 24)
    is_border = (images != 0).all(1)
    assert torch.equal(is_border.all(2), is_border.any(2))
    assert is_border.any(2).sum(1).tolist() == [12, 12], "the longer side was scaled to 24 pixels"


SHAPES = {"source": "shapes", "drawing_seed": 0, "val_size": 80, "split_seed": 0, "train_size": 400}
FOLDER = {"source": "folder", "root": "/a", "val_size": 0.1, "split_seed": 0}
CIFAR10 = {"source": "cifar10", "root": "/a", "val_size": 10, "split_seed": 0}


def test_other_images_may_be_split_in_another_way() -> None:
    check_same_split({**SHAPES, "drawing_seed": 1, "val_size": 10}, SHAPES)
    check_same_split({**FOLDER, "root": "/b", "split_seed": 2}, FOLDER)
    custom = {**FOLDER, "source": "arrays"}
    check_same_split({**custom, "root": "/b", "split_seed": 2}, custom)


@pytest.mark.parametrize(
    ("trained_with", "changed"),
    [
        (SHAPES, {"val_size": 100}),
        (SHAPES, {"train_size": 500}),
        (FOLDER, {"root": "/x/../a", "split_seed": 2}),
        (CIFAR10, {"root": "/b", "val_size": 20}),
    ],
)
def test_the_same_images_must_be_split_in_the_same_way(trained_with: dict, changed: dict) -> None:
    with pytest.raises(UserError, match="another split would put training images into val"):
        check_same_split({**trained_with, **changed}, trained_with)


def test_other_data_with_ground_truth(
    run_evaluate: Evaluate, best: Path, full_evaluation: Path, tmp_path: Path
) -> None:
    names = list(restore(best).class_names)
    images, labels = draw_shapes(60, seed=11)
    order = torch.tensor([sorted(names).index(names[label]) for label in labels]).argsort(stable=True)
    for i in order.tolist():  # as in class folders
        for split in ("train", "test"):
            write_png(tmp_path / "images" / split / names[labels[i]] / f"{i:02d}", images[i : i + 1])
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
    with pytest.raises(UserError, match="gone: there is no such folder"):
        run_evaluate(checkpoint=tmp_path / "sorted.ckpt")

    sorted_labels = torch.tensor([sorted(names).index(names[label]) for label in labels])
    with torch.inference_mode():
        correct = restore(best)(images[order]).argmax(1) == sorted_labels[order]
    incorrect = (~correct).nonzero().flatten().tolist()
    (tmp_path / "doubtful").write_text("\n".join(f"{i} {sorted(names)[sorted_labels[order][i]]}" for i in incorrect))
    for name, people in (("people", sorted_labels[order]), ("official", sorted_labels)):
        np.save(tmp_path / f"{name}.npy", 0.9 * one_hot(people, 10).double().numpy() + 0.01)
    options = (*folder, "data.val_size=20", f"doubtful_labels={tmp_path / 'doubtful'}", "report=full")
    results = run_evaluate(*options, f"human_labels={tmp_path / 'people.npy'}", checkpoint=tmp_path / "sorted.ckpt")
    rows = read_csv(tmp_path / "evaluation" / "predictions.csv")
    assert [row["path"] for row in rows] == [f"test/{names[labels[i]]}/{i:02d}/00.png" for i in order.tolist()]
    assert all(error["path"] == rows[error["index"]]["path"] for error in results["test"]["confident_errors"])
    accuracy = float(correct.double().mean())
    assert (results["test"]["acc"], results["test"]["count"]) == (accuracy, 60)
    assert results["test_images"] != results_of(full_evaluation)["test_images"]
    assert results["human_labels"]["agreement"] == accuracy
    parts = {"acc_with": accuracy, "acc_without": 1.0, "acc_on_doubtful": 0.0}
    assert results["doubtful_labels"] == {"count": len(incorrect), **parts}
    assert results["near_duplicates"]["count"] == 40, "those of the 60 images that are in train, not in val"
    for row in results["near_duplicates"]["images"]:
        assert (row["nearest_path"], row["similarity"]) == (row["path"].replace("test/", "train/"), 1.0)
    assert 'id="near_duplicates"' in (tmp_path / "evaluation" / "report.html").read_text()
    with pytest.raises(UserError, match="rows must be in the order of the test images"):
        run_evaluate(*options, f"human_labels={tmp_path / 'official.npy'}", checkpoint=tmp_path / "sorted.ckpt")

    whole = (*folder[::2], f"data.root={tmp_path / 'images' / 'test'}")  # without splits
    results = run_evaluate(*whole, "report=short", checkpoint=tmp_path / "sorted.ckpt")
    assert (results["test"]["acc"], results["test"]["count"]) == (accuracy, 60)
    assert "calibrated" not in results["test"], "there are no validation images"
    assert "temperature scaling" not in (tmp_path / "evaluation" / "report.html").read_text()
    for option, kind in (("split=val", "validation"), ("report=full", "training")):
        with pytest.raises(UserError, match=f"^{option}: there are no {kind} images in .*test$"):
            run_evaluate(*whole, option, checkpoint=tmp_path / "sorted.ckpt")


def test_data_settings_update_those_of_the_checkpoint() -> None:
    trained = {"source": "folder", "root": "a", "val_size": 10, "image_limit": 5}
    open_settings = dict.fromkeys(trained, "as_trained")
    changes = {"root": "b", "image_limit": None}
    assert data_options(open_settings, trained) == trained
    assert data_options({**open_settings, **changes}, trained) == {**trained, **changes}
    assert data_options({"source": "shapes", "val_size": 5}, trained) == {"source": "shapes", "val_size": 5}
    with pytest.raises(UserError, match="does not name its data"):
        data_options(open_settings, {})


def test_precision_is_that_of_the_run(best: Path, tmp_path: Path) -> None:
    assert recorded_precision(best) == "32-true"
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(best, checkpoint)
    assert recorded_precision(checkpoint) is None
    for text in ("{", "[]"):
        (tmp_path / "run" / "results.json").write_text(text)
        assert recorded_precision(checkpoint) is None
    (tmp_path / "run" / "results.json").write_text('{"environment": {"precision": "bf16-mixed"}}')
    for given, used in ((), "bf16-mixed"), (("trainer.precision=32-true",), "32-true"):
        cfg = compose_command("evaluate", f"checkpoint={checkpoint}", *given)
        trainer = build_trainer(cfg, SignalHandler())
        assert trainer.precision == used


def test_runs_and_evaluations_are_compared(finished_run: Path, full_evaluation: Path, tmp_path: Path) -> None:
    folders = quote_list(f"compare={finished_run},{full_evaluation}")
    first, second = evaluate(compose_command("evaluate", folders, f"paths.output_dir={tmp_path}"))["runs"]
    assert first["test acc"] == second["test acc"] == results_of(finished_run)["test"]["acc"]
    assert (second["only first correct"], second["only this correct"], second["McNemar p"]) == (0, 0, 1.0)
    assert second["different settings"] is None
    table = read_csv(tmp_path / "comparison.csv")
    assert [float(row["test acc"]) for row in table] == [first["test acc"]] * 2
    assert (tmp_path / "comparison.md").read_text().count("\n") == 4
    assert {p.name for p in tmp_path.iterdir()} == {"comparison.csv", "comparison.md", "report.html"}


def test_a_comparison_does_not_overwrite_a_compared_evaluation(tmp_path: Path) -> None:
    cfg = compose_command("evaluate", f"compare=[{tmp_path}/a,{tmp_path}/b]", f"paths.output_dir={tmp_path}/b")
    with pytest.raises(UserError, match="is one of the compared runs"):
        evaluate(cfg)


def test_runs_to_compare_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quote_list("compare=a/b,it's c") == """compare=["a/b","it's c"]"""
    for unchanged in ("compare=[a,b]", "compare='a,b'", "images=a,b"):
        assert quote_list(unchanged) == unchanged
    monkeypatch.setattr("sys.argv", ["evaluate", "compare=a,b", "split=val"])
    monkeypatch.setattr("cifar10_tl.evaluate.run_command", lambda name, task: None)
    main()
    assert sys.argv == ["evaluate", 'compare=["a","b"]', "split=val"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", "checkpoint=FILE"),
        ("checkpoint=nowhere.ckpt", "nowhere.ckpt: no such file"),
        ("checkpoint=pyproject.toml compare=[a,b]", "checkpoint=FILE"),
        ("compare=[a]", "compare=['a']"),
        ("checkpoint=pyproject.toml split=all", "split=all"),
        ("checkpoint=pyproject.toml tta=rotate", "tta=rotate"),
        ("checkpoint=pyproject.toml data.batch_size=null", "data.batch_size=null"),
        ("checkpoint=pyproject.toml human_labels=3", "human_labels=3"),
        ("checkpoint=pyproject.toml", "pyproject.toml "),
    ],
)
def test_invalid_settings_are_refused(overrides: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(compose_command("evaluate", *overrides.split(), f"paths.output_dir={tmp_path}"))


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


def test_command(best: Path, tmp_path: Path) -> None:
    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        line = [sys.executable, "-m", "cifar10_tl.evaluate", *arguments]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.startswith("usage: python -m cifar10_tl.evaluate checkpoint=FILE")
    assert not set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M)) & {"torch", "lightning", "matplotlib"}

    done = command(f"checkpoint={best}", "data=cifar10", "data.root=empty")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: the classes of the checkpoint (circle, ")
