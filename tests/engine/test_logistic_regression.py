from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, compose_command, compose_train, on_unequal_classes, resume

from cifar10_tl import load_classifier
from cifar10_tl.callbacks import TimeBudget
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine import logistic_regression
from cifar10_tl.engine.checkpoints import RunCheckpointIO, find_resumable
from cifar10_tl.engine.evaluator import evaluate_checkpoint
from cifar10_tl.engine.logistic_regression import CHECKPOINT, PENALTIES, solutions
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.engine.results import read_results
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

PROBE = (
    *("model.freeze=backbone", "data.cache_features=true", "logistic_regression=true", "optimizer.lr=1e-3"),
    *("data.augment.random_crop_padding=0", "data.augment.horizontal_flip=true", "callbacks=minimal", "logger=none"),
    *("data.train_size=240", "data.val_size=80", "data.test_size=90", "trainer.max_epochs=1"),
)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 60 points of three overlapping classes in dimensions of different scale, and a constant one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    x[:, 0] += labels
    return x * torch.tensor([1.0, 10.0, 0.01, 3.0, 0.0]) + 7.0, labels


@pytest.mark.parametrize("class_weight", [None, [0.5, 0.25, 2.25]])
def test_solutions_are_optimal_for_each_penalty(class_weight: list[float] | None) -> None:
    x, labels = problem()
    std, mean = torch.std_mean(x[:, :4], 0)
    weights = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
    found = list(solutions(x, labels, 3, weights))
    assert [l2 for l2, _, _ in found] == list(PENALTIES)
    for l2, weight, bias in found:
        assert weight[:, 4].abs().max() == 0, "a constant feature has no weight"
        scaled = (weight[:, :4] * std).requires_grad_()  # of standardized features
        shifted = (bias + weight @ torch.cat([mean, x[0, 4:]])).requires_grad_()
        standard = (x[:, :4] - mean) / std
        losses = F.cross_entropy(standard @ scaled.T + shifted, labels, reduction="none")
        loss = (losses if weights is None else weights[labels] * losses).mean() + l2 * scaled.square().sum()
        gradients = torch.autograd.grad(loss, (scaled, shifted))
        assert max(float(g.abs().max()) for g in gradients) < 1e-6, l2


def test_solution_is_that_of_gradient_descent() -> None:
    x, labels = problem()
    std, mean = torch.std_mean(x[:, :4], 0)
    standard, one_hot = (x[:, :4] - mean) / std, F.one_hot(labels).double()
    weight, bias = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    l2 = PENALTIES[4]
    for _ in range(5000):
        residual = ((standard @ weight.T + bias).softmax(1) - one_hot) / len(labels)
        weight, bias = weight - 0.5 * (residual.T @ standard + 2 * l2 * weight), bias - 0.5 * residual.sum(0)
    _, found, found_bias = next(solution for solution in solutions(x, labels, 3) if solution[0] == l2)
    torch.testing.assert_close(x @ found.T + found_bias, standard @ weight.T + bias, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with logistic regression."""
    folder = tmp_path_factory.mktemp("probe")
    paths = (f"paths.output_dir={folder / 'run'}", f"paths.cache_dir={folder / 'cache'}")
    train(compose_train(*SMALL, *PROBE, *paths))
    return folder / "run"


def evaluated(run: Path, split: str, output: Path) -> dict[str, Any]:
    paths = (f"checkpoint={run / CHECKPOINT}", f"split={split}", f"paths.output_dir={output / split}")
    cfg = compose_command("evaluate", *paths, "trainer.enable_progress_bar=false")
    return evaluate_checkpoint(cfg, SignalHandler())


def test_checkpoint_repeats_the_results(run: Path, tmp_path: Path) -> None:
    results = read_results(run)["logistic_regression"]
    assert results["l2"] in PENALTIES
    assert (results["val"]["count"], results["test"]["count"]) == (80, 90)
    for split in ("val", "test"):
        scores = evaluated(run, split, tmp_path)[split]
        assert scores["acc"] == results[split]["acc"]
        assert scores["loss"] == pytest.approx(results[split]["loss"], rel=1e-4)
    module = LitClassifier.load_from_checkpoint(run / CHECKPOINT, weights_only=True).eval()
    assert module.hparams["head"] == {"name": "linear"}
    assert load_classifier(run / CHECKPOINT, "cpu").class_names == tuple(module.class_names)


def test_unequal_classes_are_weighted(tmp_path: Path) -> None:
    data = (*on_unequal_classes((*SMALL, *PROBE), tmp_path / "images"), "data.cache_features=true")
    found = {}
    for balance in ("none", "loss", "sampler"):
        paths = (f"paths.output_dir={tmp_path / balance}", f"paths.cache_dir={tmp_path / 'cache'}")
        results: Any = train(compose_train(*data, *paths, f"data.balance={balance}", "report=none"))
        found[balance] = results["logistic_regression"] | {"seconds": None}
    assert found["loss"] == found["sampler"]
    assert found["loss"]["test"]["loss"] != found["none"]["test"]["loss"]


def test_the_penalty_has_the_best_validation_accuracy(run: Path) -> None:
    """All solutions are computed again from the images."""
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    data = CIFAR10DataModule(**checkpoint["datamodule_hyper_parameters"])
    data.setup()
    network = LitClassifier.load_from_checkpoint(run / CHECKPOINT, weights_only=True).eval().network
    with torch.no_grad():
        train_x, val_x = (network.head_input(data.splits[s].images).flatten(1).double() for s in ("train", "val"))
    labels, scores = data.splits["val"].labels, {}
    for l2, weight, bias in solutions(train_x, data.splits["train"].labels, 10):
        logits = val_x @ weight.T + bias
        scores[l2] = (float((logits.argmax(1) == labels).double().mean()), -float(F.cross_entropy(logits, labels)))
    results = read_results(run)["logistic_regression"]
    assert results["l2"] == max(PENALTIES, key=scores.__getitem__)
    assert scores[results["l2"]] == pytest.approx((results["val"]["acc"], -results["val"]["loss"]), rel=1e-4)
    assert len({accuracy for accuracy, _ in scores.values()}) > 1, "the choice matters"


@pytest.mark.parametrize("is_fitted", [True, False])
def test_a_time_budget_counts_the_fit_and_the_features_of_all_splits(
    is_fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any, **__: Any) -> None:
        assert (tmp_path / "run" / CHECKPOINT).is_file() == is_fitted
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
        raise InterruptedError

    monkeypatch.setattr(TimeBudget, "_plan", plan)
    settings = (*PROBE, f"logistic_regression={is_fitted}", "budget=1h", "trainer.enable_progress_bar=false")
    paths = (f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}")
    with pytest.raises(InterruptedError):
        train(compose_train(*SMALL, *settings, *paths))


def test_a_run_killed_before_its_first_checkpoint_starts_again(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("best.ckpt", "last.ckpt"):
        (copy / "checkpoints" / name).unlink()
    assert (copy / CHECKPOINT).is_file()
    assert find_resumable(copy, RunCheckpointIO()) is None


def test_finished_run_does_not_fit_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(logistic_regression, "solutions", lambda *_: pytest.fail("fitted again"))
    assert resume(copy)["logistic_regression"] == read_results(run)["logistic_regression"]
