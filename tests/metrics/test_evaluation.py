from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_recall,
)

from cifar10_tl.metrics.evaluation import Evaluation

NAMES = ["a", "b", "c"]


@pytest.fixture
def evaluation() -> Evaluation:
    # of images 0 to 4: correct, incorrect (sure), correct, incorrect (less sure), correct; given out of order
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]]
    )
    labels, order = torch.tensor([0, 2, 1, 1, 2]), torch.tensor([3, 0, 4, 1, 2])
    return Evaluation.of(probabilities.log()[order], labels[order], order, NAMES)


def test_basic_metrics_are_those_of_the_definition(evaluation: Evaluation) -> None:
    assert evaluation.indices.tolist() == [0, 1, 2, 3, 4]
    assert evaluation.labels.tolist() == [0, 2, 1, 1, 2]
    assert evaluation.predictions.tolist() == [0, 1, 1, 0, 2]
    assert torch.allclose(evaluation.probabilities.sum(1), torch.ones(5))
    assert evaluation.confusion_matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]  # rows are true classes
    loss = -sum(map(math.log, (0.7, 0.05, 0.8, 0.1, 0.6))) / 5
    means = {"acc": 3 / 5, "balanced_acc": (1 + 1 / 2 + 1 / 2) / 3, "macro_f1": (2 / 3 + 1 / 2 + 2 / 3) / 3}
    assert evaluation.metrics() == {**means, "loss": pytest.approx(loss), "count": 5}


def test_errors_are_sorted_by_confidence_and_correct_ones_evenly_spaced(evaluation: Evaluation) -> None:
    assert evaluation.incorrect(10).tolist() == [1, 3]
    assert evaluation.incorrect(1).tolist() == [1]
    assert evaluation.correct(10).tolist() == [0, 2, 4]
    assert evaluation.correct(2).tolist() == [0, 4]


def test_an_image_evaluated_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        Evaluation.of(torch.zeros(2, 3), torch.zeros(2).long(), torch.tensor([4, 4]), NAMES)


def test_no_images_give_no_number() -> None:
    empty = Evaluation.of(torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).long(), NAMES)
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.loss)
    assert math.isnan(empty.balanced_accuracy)
    assert math.isnan(empty.macro_f1)
    assert empty.incorrect(5).tolist() == empty.correct(5).tolist() == []


def test_scores_by_hand(evaluation: Evaluation) -> None:
    scores = evaluation.scores()
    assert {k: scores[k] for k in evaluation.metrics()} == evaluation.metrics()
    assert scores["nll"] == scores["loss"]
    assert scores["top2_acc"] == pytest.approx(0.6)  # of the two errors, neither true class comes second
    # a: 1 correct of 2 predicted and 1 true; b: 1 of 2 and 2; c: 1 of 1 and 2
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert scores["acc_interval"] == [pytest.approx(0.2307, abs=1e-4), pytest.approx(0.8824, abs=1e-4)]
    assert scores["brier"] == pytest.approx((0.14 + 1.715 + 0.06 + 1.26 + 0.24) / 5)
    # each image in a bin of its own but 0.6 and 0.6: |1 - 0.7| + |0 - 0.9| + |1 - 0.8| + 2 |0.5 - 0.6|, over 5
    assert scores["ece"] == pytest.approx((0.3 + 0.9 + 0.2 + 0.2) / 5, abs=1e-6)


def test_balanced_accuracy_and_macro_f1_of_unequal_classes() -> None:
    """Of 8 a, 2 b and no c, all are predicted as a except one b, which is predicted as c."""
    labels, predicted = torch.tensor([0] * 8 + [1] * 2), torch.tensor([0] * 9 + [2])
    of = Evaluation.of(torch.eye(3)[predicted], labels, torch.arange(10), NAMES)
    assert of.accuracy == 0.8
    assert of.balanced_accuracy == 0.5, "a class without images does not count"
    assert of.macro_f1 == pytest.approx((16 / 17 + 0 + 0) / 3), "but it does when it is predicted"
    only = Evaluation.of(torch.zeros(4, 1), torch.zeros(4).long(), torch.arange(4), ["a"])
    assert (only.balanced_accuracy, only.macro_f1, only.confusion_matrix.tolist()) == (1, 1, [[4]])
    assert (only.scores()["acc"], "top2_acc" in only.scores()) == (1, False)
    a, b, c = of.per_class()
    assert (a["recall"], b["precision"], b["recall"], b["f1"]) == (1, 0, 0, 0)
    assert (math.isnan(c["recall"]), c["precision"], c["f1"], c["count"]) == (True, 0, 0, 0)


def test_tables_by_hand(evaluation: Evaluation) -> None:
    assert evaluation.per_class() == [
        {"class": "a", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "count": 1},
        {"class": "b", "precision": 0.5, "recall": 0.5, "f1": 0.5, "count": 2},
        {"class": "c", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "count": 2},
    ]
    assert evaluation.confused_pairs() == [
        {"true": "b", "predicted": "a", "count": 1, "share": 0.5},
        {"true": "c", "predicted": "b", "count": 1, "share": 0.5},
    ]
    assert evaluation.confused_pairs(1)[0]["true"] == "b"
    (error,) = evaluation.rows(evaluation.incorrect(1), ["b/1.png"])
    assert error == {"index": 1, "path": "b/1.png", "true": "c", "predicted": "b", "probability": 0.9}


def test_scores_of_random_logits_agree_with_their_definitions() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    of = Evaluation.of(logits, labels, torch.arange(500), [str(k) for k in range(7)])
    scores = of.scores()
    expected = [float(metric(logits, labels, 7, "macro")) for metric in (multiclass_recall, multiclass_f1_score)]
    assert [scores["balanced_acc"], scores["macro_f1"]] == pytest.approx(expected)
    top2 = (logits.topk(2).indices == labels[:, None]).any(1).double().mean()
    assert scores["top2_acc"] == pytest.approx(float(top2))
    assert "top2_acc" not in Evaluation.of(logits[:, :2], labels % 2, torch.arange(500), ["a", "b"]).scores()
    assert scores["ece"] == pytest.approx(float(multiclass_calibration_error(of.probabilities, labels, 7)), abs=1e-6)


def test_a_temperature_changes_no_prediction(evaluation: Evaluation) -> None:
    cooler = evaluation.scaled(0.5)
    assert cooler.predictions.equal(evaluation.predictions)
    assert torch.allclose(cooler.probabilities[0], torch.tensor([0.49, 0.04, 0.01]) / 0.54)


def test_the_mean_of_views_averages_probabilities(evaluation: Evaluation) -> None:
    other = Evaluation.of(evaluation.logits.flip(1), evaluation.labels, evaluation.indices, NAMES)
    mean = Evaluation.mean_of([evaluation, other])
    assert torch.allclose(mean.probabilities, (evaluation.probabilities + other.probabilities) / 2)
    sure = Evaluation.of(torch.tensor([[0.0, 500.0]]), torch.tensor([0]), torch.tensor([3]), ["a", "b"])
    assert Evaluation.mean_of([sure, sure]).loss == pytest.approx(500)  # small probabilities do not underflow
