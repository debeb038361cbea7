"""A checkpoint measured: the same numbers as the run's own test, on the same and on other data."""

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
from helpers import REPOSITORY
from omegaconf import DictConfig
from PIL import Image

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule, data_options
from cifar10_tl.data.sources import CIFAR10_NAMES
from cifar10_tl.engine.checkpoints import recorded_precision, restore
from cifar10_tl.evaluate import as_list, evaluate, main

FIGURES = {"confusion_matrix", "correct", "incorrect", "reliability", "per_class", "confidence"}
Evaluate = Callable[..., dict[str, Any]]


def compose_evaluate(*overrides: str) -> DictConfig:
    from hydra import compose, initialize_config_dir

    from cifar10_tl.config.run_dir import CONFIG_DIR, register_resolvers
    from cifar10_tl.config.validation import check_config

    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("evaluate", overrides=[as_list(override) for override in overrides])
    check_config(cfg)
    return cfg


@pytest.fixture
def best(finished_run: Path) -> Path:
    return finished_run / "checkpoints" / "best.ckpt"


@pytest.fixture
def measure(tmp_path: Path, best: Path) -> Evaluate:
    """A function that evaluates the small run's checkpoint in a folder of the test's own."""

    def run(*overrides: str, checkpoint: Path = best) -> dict[str, Any]:
        cfg = compose_evaluate(
            f"checkpoint={checkpoint}",
            f"paths.output_dir={tmp_path / 'evaluation'}",
            "trainer.accelerator=cpu",
            *overrides,
        )
        return evaluate(cfg)

    return run


@pytest.fixture(scope="session")
def whole_evaluation(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that was asked for everything there is."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    people, doubtful = folder.parent / "people.npy", folder.parent / "doubtful.json"
    np.save(people, np.full((100, 10), 0.1))
    doubtful.write_text("[0, 5]")
    evaluate(
        compose_evaluate(
            f"checkpoint={finished_run / 'checkpoints' / 'best.ckpt'}",
            f"paths.output_dir={folder}",
            "trainer.accelerator=cpu",
            "tta=flip_shift",
            "corrupt=all",
            f"human_labels={people}",
            f"doubtful_labels={doubtful}",
        )
    )
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------------------------------------------------------------ the same data


def test_its_numbers_are_those_of_the_run_to_the_last_digit(whole_evaluation: Path, finished_run: Path) -> None:
    own, of_run = results_of(whole_evaluation), results_of(finished_run)
    assert {key: own["test"][key] for key in ("acc", "loss", "count")} == {
        key: of_run["test"][key] for key in ("acc", "loss", "count")
    }
    assert own["confusion_matrix"] == of_run["confusion_matrix"]
    assert own["class_names"] == of_run["class_names"]
    assert own["epoch"] == of_run["best_epoch"]
    assert own["environment"]["precision"] == of_run["environment"]["precision"] == "32-true"
    for name in ("confusion_matrix", "correct", "incorrect"):
        file = f"figures/{name}_test.png"
        assert (whole_evaluation / file).read_bytes() == (finished_run / file).read_bytes()
    assert (whole_evaluation / "predictions.csv").read_text() == (finished_run / "predictions.csv").read_text()


def test_the_folder_holds_everything(whole_evaluation: Path) -> None:
    files = {str(p.relative_to(whole_evaluation)) for p in whole_evaluation.rglob("*") if p.is_file()}
    figures = {f"figures/{name}_test.png" for name in FIGURES | {"corruption"}}
    assert files == {"results.json", "predictions.csv", "corruption.csv"} | figures


def test_predictions_have_a_row_an_image(whole_evaluation: Path) -> None:
    results = results_of(whole_evaluation)
    names = results["class_names"]
    rows = list(csv.DictReader((whole_evaluation / "predictions.csv").open()))
    assert list(rows[0]) == ["index", "true_label", "predicted_label", "probability", *names]
    assert [int(row["index"]) for row in rows] == list(range(100))
    right = sum(row["true_label"] == row["predicted_label"] for row in rows)
    assert right / 100 == results["test"]["acc"]
    for row in rows:
        probabilities = {name: float(row[name]) for name in names}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert max(probabilities.values()) == probabilities[row["predicted_label"]] == float(row["probability"])


def test_results_hold_all_metrics(whole_evaluation: Path) -> None:
    results = results_of(whole_evaluation)
    test = results["test"]
    assert test["acc"] <= test["top2_acc"] <= 1
    low, high = test["acc_interval"]
    assert low < test["acc"] < high
    assert test["calibrated"]["temperature"] > 0
    assert test["calibrated"]["nll"] > 0
    assert {"brier", "ece"} <= test["calibrated"].keys()
    assert [row["class"] for row in test["per_class"]] == results["class_names"]
    assert test["confused_pairs"][0]["count"] == max(
        n for i, row in enumerate(results["confusion_matrix"]) for j, n in enumerate(row) if i != j
    )
    surest = [mistake["probability"] for mistake in test["confident_errors"]]
    assert surest == sorted(surest, reverse=True)
    assert results["data"]["source"] == "shapes"
    assert results["doubtful_labels"]["count"] == 2
    assert results["human_labels"]["cross_entropy"] > results["human_labels"]["lowest_possible"]
    assert results["human_labels"]["lowest_possible"] == pytest.approx(np.log(10))


def test_views_and_corruptions_are_what_a_loop_of_our_own_finds(whole_evaluation: Path, best: Path) -> None:
    from cifar10_tl.metrics.corruptions import CORRUPTIONS, corrupted
    from cifar10_tl.metrics.tta import further_views

    results, module = results_of(whole_evaluation), restore(best)
    data = CIFAR10DataModule(**torch.load(best, weights_only=True)["datamodule_hyper_parameters"])
    data.setup()
    test = data.splits["test"]
    with torch.inference_mode():
        views = [test.images, *further_views(test.images, "flip_shift")]
        mean = torch.stack([module(view).softmax(1) for view in views]).mean(0)
        blurred = module(corrupted(test.images, test.indices, "blur", 4)).argmax(1)
    assert (results["tta"]["name"], results["tta"]["views"]) == ("flip_shift", 6)
    assert results["tta"]["acc"] == float((mean.argmax(1) == test.labels).double().mean())
    assert results["tta"]["loss"] == pytest.approx(float(-mean[torch.arange(100), test.labels].log().mean()), rel=1e-5)
    assert results["corruption"].keys() == CORRUPTIONS.keys()
    for outcomes in results["corruption"].values():
        assert [row["severity"] for row in outcomes] == [0, 1, 2, 3, 4, 5]
        assert outcomes[0]["acc"] == results["test"]["acc"]
    assert results["corruption"]["blur"][4]["acc"] == float((blurred == test.labels).double().mean())
    table = list(csv.DictReader((whole_evaluation / "corruption.csv").open()))
    assert len(table) == 30
    assert table[10] == {"corruption": "blur", "severity": "4", **{k: str(v) for k, v in _blur(results).items()}}


def _blur(results: dict[str, Any]) -> dict[str, Any]:
    return {key: results["corruption"]["blur"][4][key] for key in ("acc", "loss", "count")}


def test_val_is_the_best_epochs_and_the_temperature_is_fitted_on_it(
    measure: Evaluate, finished_run: Path, best: Path
) -> None:
    from cifar10_tl.metrics.calibration import fit_temperature

    results, of_run = measure("split=val"), results_of(finished_run)
    assert {key: results["val"][key] for key in ("acc", "loss", "count")} == of_run["val"]
    data = CIFAR10DataModule(**torch.load(best, weights_only=True)["datamodule_hyper_parameters"])
    data.setup()
    with torch.inference_mode():
        logits = restore(best)(data.splits["val"].images)
    temperature = fit_temperature(logits, data.splits["val"].labels)
    assert results["val"]["calibrated"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert results["val"]["calibrated"]["nll"] <= results["val"]["nll"]


def test_train_is_evaluated_as_it_is_and_a_setting_of_the_data_can_be_another(measure: Evaluate, best: Path) -> None:
    results = measure("split=train", "data.image_limit=60", "tta=flip")
    assert results["train"]["count"] == 60
    assert results["data"]["batch_size"] == 64  # as in the checkpoint
    assert results["tta"]["views"] == 2
    data = CIFAR10DataModule(
        **{**torch.load(best, weights_only=True)["datamodule_hyper_parameters"], "image_limit": 60}
    )
    data.setup()
    with torch.inference_mode():
        predicted = restore(best)(data.splits["train"].images).argmax(1)
    assert results["train"]["acc"] == float((predicted == data.splits["train"].labels).double().mean())


def test_the_terminal_shows_what_can_be_read(measure: Evaluate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        results = measure("tta=flip")
    text = caplog.text
    assert "precision 32-true: so was the run tested" in text
    accuracy = next(line for line in text.splitlines() if line.startswith("  accuracy"))
    assert accuracy.split() == ["accuracy", f"{results['test']['acc']:.2%}", f"{results['tta']['acc']:.2%}"]
    for part in ("95 % interval (Wilson)", "calibration error (15 bins)", "flip, 2 views", "most confused", "hexagon"):
        assert part in text


# --------------------------------------------------------------------------------------------------------- other data


def write_pictures(root: Path, names: list[str], images: torch.Tensor, labels: torch.Tensor, num_train: int) -> None:
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = root / ("train" if i < num_train else "test") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")


def test_other_data_of_the_same_classes_takes_the_place_of_the_checkpoints(
    measure: Evaluate, best: Path, tmp_path
) -> None:
    from cifar10_tl.data.shapes import draw_shapes

    names = sorted(restore(best).class_names)  # as a folder has them: another order than the shapes' own
    images, labels = draw_shapes(120, seed=11)
    write_pictures(tmp_path / "pictures", list(restore(best).class_names), images, labels, num_train=60)
    folder = ("data=folder", f"data.root={tmp_path / 'pictures'}", f"data.cache_dir={tmp_path / 'cache'}")
    with pytest.raises(UserError, match="the classes differ") as error:
        measure(*folder, "data.val_size=20")
    assert ", ".join(names) in str(error.value)
    assert ", ".join(restore(best).class_names) in str(error.value)

    ordered = tmp_path / "ordered.ckpt"  # the same network, its classes named in the order of the folders
    content = torch.load(best, weights_only=True)
    content["hyper_parameters"]["class_names"] = names
    content["datamodule_hyper_parameters"] = {"source": "folder", "root": str(tmp_path / "gone"), "seed": 0}
    torch.save(content, ordered)
    results = measure(*folder, "data.val_size=20", checkpoint=ordered)
    assert results["test"]["count"] == 60
    assert results["data"]["root"] == str(tmp_path / "pictures")
    with pytest.raises(UserError, match="gone: there is no folder train"):
        measure(checkpoint=ordered)


def test_real_images_with_people_and_doubts(measure: Evaluate, best: Path, tmp_path: Path, real_images) -> None:
    images = torch.from_numpy(np.concatenate([real_images["x_train"][:100], real_images["x_test"][:120]]))
    labels = torch.from_numpy(np.concatenate([real_images["y_train"][:100], real_images["y_test"][:120]])).long()
    write_pictures(tmp_path / "pictures", list(CIFAR10_NAMES), images, labels, num_train=100)
    content = torch.load(best, weights_only=True)
    content["hyper_parameters"]["class_names"] = list(CIFAR10_NAMES)
    torch.save(content, tmp_path / "cifar.ckpt")
    order = labels[100:].argsort(stable=True)  # a folder's images are sorted by class
    true = labels[100:][order]
    people = torch.nn.functional.one_hot(true, 10).double().numpy()
    np.save(tmp_path / "people.npy", 0.9 * people + 0.01)
    with torch.inference_mode():
        right = restore(best)(images[100:][order]).argmax(1) == true
    wrong = (~right).nonzero().flatten().tolist()
    (tmp_path / "doubtful").write_text("\n".join(map(str, wrong)))
    results = measure(
        "data=folder",
        f"data.root={tmp_path / 'pictures'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.val_size=30",
        f"human_labels={tmp_path / 'people.npy'}",
        f"doubtful_labels={tmp_path / 'doubtful'}",
        checkpoint=tmp_path / "cifar.ckpt",
    )
    assert results["test"]["count"] == 120
    assert results["test"]["acc"] == float(right.double().mean())
    assert results["human_labels"]["agreement"] == results["test"]["acc"]
    assert results["doubtful_labels"] == {
        "count": len(wrong),
        "acc_with": results["test"]["acc"],
        "acc_without": 1.0,
        "acc_on_doubtful": 0.0,
    }


def test_no_weights_are_fetched(measure: Evaluate, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(best, weights_only=True)
    content["hyper_parameters"]["weights"] = "IMAGENET1K_V1"
    torch.save(content, tmp_path / "pretrained.ckpt")
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: pytest.fail("something was fetched"))
    assert measure("data.image_limit=40", checkpoint=tmp_path / "pretrained.ckpt")["test"]["count"] == 40


def test_settings_of_data_are_laid_over_those_of_the_checkpoint() -> None:
    trained = {"source": "folder", "root": "a", "val_size": 10, "seed": 3}
    assert data_options({"source": None, "root": "b", "val_size": None}, trained) == {**trained, "root": "b"}
    assert data_options({"source": "shapes", "val_size": 5}, trained) == {"source": "shapes", "val_size": 5}
    with pytest.raises(UserError, match=r"data\.root: data=shapes has no such setting"):
        data_options({"source": None, "root": "b"}, {"source": "shapes"})
    with pytest.raises(UserError, match="does not say what data"):
        data_options({"source": None}, {})
    with pytest.raises(UserError, match=r"data\.source=mnist: there are cifar10"):
        data_options({"source": "mnist"}, trained)


# ----------------------------------------------------------------------------------------------------------- precision


def test_the_precision_is_that_of_the_runs_test_where_that_is_known(tmp_path: Path, best: Path) -> None:
    assert recorded_precision(best) == "32-true"
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert recorded_precision(checkpoint) is None
    for text, precision in (
        ("{", None),
        ("[]", None),
        ('{"environment": {"precision": "magic"}}', None),
        ('{"environment": {"precision": "bf16-mixed"}}', "bf16-mixed"),
    ):
        (tmp_path / "run" / "results.json").write_text(text)
        assert recorded_precision(checkpoint) == precision


def test_a_run_tested_in_bf16_is_evaluated_in_bf16(measure: Evaluate, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run / "checkpoints", run / "checkpoints")
    (run / "results.json").write_text('{"environment": {"precision": "bf16-mixed"}}')
    checkpoint = run / "checkpoints" / "best.ckpt"
    few = "data.image_limit=20"
    results = measure(few, checkpoint=checkpoint)
    assert results["environment"]["precision"] == "bf16-mixed"
    again = measure(few, "trainer.precision=32-true", checkpoint=checkpoint)
    assert again["environment"]["precision"] == "32-true"
    assert again["test"]["loss"] != results["test"]["loss"]


# ----------------------------------------------------------------------------------------------------------- comparing


def test_runs_and_evaluations_are_compared(finished_run: Path, whole_evaluation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    found = evaluate(compose_evaluate(f"compare={finished_run},{whole_evaluation}", f"paths.output_dir={folder}"))
    first, second = found["runs"]
    assert first["test acc"] == second["test acc"] == results_of(finished_run)["test"]["acc"]
    assert (second["only first right"], second["only this right"], second["McNemar p"]) == (0, 0, 1.0)
    checkpoint = finished_run / "checkpoints" / "best.ckpt"
    assert second["settings unlike the first"] == f"checkpoint={checkpoint}"
    assert {p.name for p in folder.iterdir()} == {"comparison.csv", "comparison.md"}
    assert (folder / "comparison.md").read_text().count("\n") == 4


def test_a_list_of_runs_need_not_be_written_as_hydra_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_list("compare=a/b,c d") == "compare=['a/b','c d']"
    assert as_list("compare=it's,b") == r"compare=['it\'s','b']"
    assert as_list("compare=[a,b]") == "compare=[a,b]"
    assert as_list("compare=") == "compare="
    assert as_list("images=a,b") == "images=a,b"
    started: list[str] = []
    monkeypatch.setattr("sys.argv", ["evaluate", "compare=a,b", "split=val"])
    monkeypatch.setattr("cifar10_tl.evaluate.run_command", lambda name, task: started.append(name))
    main()
    assert (started, sys.argv) == (["evaluate"], ["evaluate", "compare=['a','b']", "split=val"])
    cfg = compose_evaluate("compare=outputs/runs/2026-01-01_10-00-00_7,my runs/it's")
    assert cfg.compare == ["outputs/runs/2026-01-01_10-00-00_7", "my runs/it's"]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ((), "give one of checkpoint=FILE, and compare=RUN,RUN"),
        (("checkpoint=nowhere.ckpt",), "checkpoint=nowhere.ckpt: there is no such file"),
        (("checkpoint=pyproject.toml", "compare=a,b"), "give one of"),
        (("compare=a",), "compare=['a']: should be one of null or two or more folders of runs"),
        (("checkpoint=pyproject.toml", "split=all"), "split=all: should be one of test, val, train"),
        (("checkpoint=pyproject.toml", "tta=rotate"), "tta=rotate"),
        (("checkpoint=pyproject.toml", "corrupt=fog"), "corrupt=fog"),
        (("checkpoint=pyproject.toml", "data.batch_size=0"), "data.batch_size=0"),
        (("checkpoint=pyproject.toml", "trainer.precision=8"), "trainer.precision=8"),
        (("checkpoint=pyproject.toml", "human_labels=3"), "human_labels=3"),
        (("checkpoint=pyproject.toml",), "pyproject.toml cannot be read safely"),
    ],
)
def test_a_mistake_is_told(overrides: tuple[str, ...], part: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=re.escape(part)):
        evaluate(compose_evaluate(*overrides, f"paths.output_dir={tmp_path}"))


def test_broken_checkpoints_are_told(measure: Evaluate, best: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(best.read_bytes()[:10000])
    with pytest.raises(UserError, match="broken or of another kind"):
        measure(checkpoint=cut)
    torch.save({"state_dict": {}}, cut)
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        measure(checkpoint=cut)
    content = torch.load(best, weights_only=True)
    del content["datamodule_hyper_parameters"]
    torch.save(content, cut)
    with pytest.raises(UserError, match="does not say what data"):
        measure(checkpoint=cut)


def test_ground_truth_that_does_not_fit_is_told_before_anything_is_written(measure: Evaluate, tmp_path: Path) -> None:
    np.save(tmp_path / "people.npy", np.full((99, 10), 0.1))
    with pytest.raises(UserError, match="99 rows for 100 test images"):
        measure(f"human_labels={tmp_path / 'people.npy'}")
    with pytest.raises(UserError, match="is about the test images, and split=val"):
        measure(f"human_labels={tmp_path / 'people.npy'}", "split=val")
    (tmp_path / "doubtful").write_text("12, 13")
    with pytest.raises(UserError, match="should hold indices"):
        measure(f"doubtful_labels={tmp_path / 'doubtful'}")
    assert not (tmp_path / "evaluation").exists()


def test_a_training_run_is_not_written_over(finished_run: Path, best: Path) -> None:
    before = (finished_run / "results.json").read_bytes()
    assert (finished_run / RUN_CONFIG).is_file()
    with pytest.raises(UserError, match="a training run lies there"):
        evaluate(compose_evaluate(f"checkpoint={best}", f"paths.output_dir={finished_run}"))
    assert (finished_run / "results.json").read_bytes() == before


@pytest.mark.slow
def test_the_command_itself(best: Path, finished_run: Path, tmp_path: Path) -> None:
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

    wrong = command(f"checkpoint={best}", "data=cifar10", "data.root=empty")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: the classes differ: those of the checkpoint are circle, ")
    assert "airplane" in wrong.stderr

    done = command(f"checkpoint={best}", "trainer.accelerator=cpu", "paths.output_dir=mine")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "mine")["test"]["acc"] == results_of(finished_run)["test"]["acc"]
