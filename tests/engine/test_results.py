from __future__ import annotations

import errno
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10_tl.data.batch import Split
from cifar10_tl.engine.results import (
    all_metrics,
    describe,
    images_checksum,
    markdown_table,
    summary,
    text_table,
    write_results,
)
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.ground_truth import accuracy_without


def test_a_text_table_has_columns_of_equal_width() -> None:
    assert text_table(["run", "acc"], [["a", "9.00%"], ["longer", ""]]) == "  run       acc\n  a       9.00%\n  longer"


def test_markdown_keeps_its_columns_whatever_is_in_a_cell() -> None:
    table = markdown_table(["run", "acc"], [["a|b", "1"]])
    assert table == "| run | acc |\n| --- | ---: |\n| a\\|b | 1 |\n"


def test_checksum_of_images_stays_the_same_between_versions() -> None:
    images = torch.arange(3 * 300 * 16).view(300, 3, 4, 4).byte()
    split = Split(images, torch.zeros(300).long())
    assert images_checksum(split) == hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "b8eaefe0cfdb56bf"
    assert images_checksum(split.subset(torch.arange(1, 300, 2))) == "b85a43ce2a5d5e6b"


def test_calibrated_metrics_by_hand() -> None:
    # logits (2, 0), correct in 3 of 4: at the temperature 2 / log 3, all probabilities are 3 / 4
    labels, temperature = torch.tensor([0, 0, 0, 1]), 2 / math.log(3)
    evaluation = Evaluation.of(torch.tensor([[2.0, 0.0]] * 4), labels, torch.arange(4), ["a", "b"])
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels)
    assert all_metrics(evaluation, split, temperature)["calibrated"] == {
        "temperature": temperature,
        "nll": pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4),
        "brier": pytest.approx((3 * 2 * (1 / 4) ** 2 + 2 * (3 / 4) ** 2) / 4),
        "ece": pytest.approx(0, abs=1e-6),
    }
    assert "calibrated" not in all_metrics(evaluation, split)


def test_old_results_are_not_kept_beside_new_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, text: str) -> None:
        if path.name == "results.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    split = Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]))
    evaluation = Evaluation.of(torch.tensor([[1.0, 0.0]]), split.labels, split.indices, ["a", "b"])
    write_results(tmp_path, {}, evaluation, split)
    monkeypatch.setattr("cifar10_tl.engine.results.atomic_write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, {}, evaluation, split)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_report_of_an_evaluation_names_each_number(tmp_path: Path) -> None:
    split = Split(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 1, 1]))
    evaluation = Evaluation.of(torch.eye(2)[[0, 0, 0, 1, 1]], split.labels, split.indices, ("cat", "dog"))
    results = {"checkpoint": "a.ckpt", "epoch": 3, "split": "test", "test": all_metrics(evaluation, split)}
    results["doubtful_labels"] = accuracy_without(evaluation, torch.tensor([0, 1]))
    lines = [" ".join(line.split()) for line in describe(results, tmp_path).splitlines()]
    assert {
        "a.ckpt, epoch 3, 5 test images",
        "accuracy 60.00%",
        "balanced accuracy 75.00%",
        "macro F1 58.33%",
        "class precision recall F1 images",
        "cat 33.3% 100% 50.0% 1",
        "dog 100% 50.0% 66.7% 4",
        "dog -> cat 2 50.0%",
        "2 doubtful labels: accuracy 60.00% with these images, 66.67% without, 50.00% on them alone",
    } <= set(lines)


def test_the_summary_of_a_run_names_results_files_and_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("my run")
    (run / "figures").mkdir(parents=True)
    for name in ("results.json", "events.out.tfevents.0"):
        (run / name).touch()
    labels = torch.tensor([0, 1, 1, 1])
    evaluation = Evaluation.of(torch.eye(2)[[0, 0, 0, 1]], labels, torch.arange(4), ("cat", "dog"))
    config: dict[str, Any] = {"budget": None, "trainer": {"max_epochs": 5}}
    config["callbacks"] = {"best_checkpoint": {"monitor": "val/acc"}}
    test = evaluation.scores() | {"confused_pairs": evaluation.confused_pairs()}
    results: dict[str, Any] = {"test": test, "val": {"acc": 0.75}, "best_epoch": 3, "epochs": 5, "config": config}
    text = summary(results, run, tmp_path / run / "checkpoints" / "best.ckpt")
    assert text.splitlines() == [
        "",
        "  test acc     50.00% (95% interval 15.00 to 85.00%), 4 images",
        "  balanced acc 66.67%, the mean recall of the classes",
        "  confusion    dog -> cat is the most frequent: 2 images, 66.7% of dog",
        "  val acc      75.00% in epoch 3, the best",
        "  figures      my run/figures",
        "  numbers      my run/results.json",
        "  checkpoint   my run/checkpoints/best.ckpt",
        "  next commands",
        "    tensorboard --host localhost --logdir 'my run' --samples_per_plugin=images=1000",
        "    python -m cifar10_tl.evaluate 'checkpoint=\"my run/checkpoints/best.ckpt\"' report=full"
        "  # calibration, label errors",
        "    python -m cifar10_tl.train 'resume=\"my run\"' trainer.max_epochs=10  # train further",
    ]
    equal = summary(results | {"test": test | {"balanced_acc": test["acc"] + 1e-16}}, run, None)
    assert "balanced" not in equal
    for checkpoint, chosen in (({"monitor": "val/loss"}, "the best by val/loss"), (None, "the last")):
        other = results | {"epochs": 4, "config": config | {"callbacks": {"best_checkpoint": checkpoint}}}
        assert f"  val acc      75.00% in epoch 3, {chosen}\n" in summary(other, run, None)
        assert "train further" not in summary(other, run, None), "early stopping has ended the run"
    untested = {"val": {"acc": None}, "best_epoch": None, "epochs": 5, "config": config | {"budget": "10min"}}
    assert summary(untested, tmp_path / "gone", None).splitlines() == ["", "  checkpoint   none"]
