from __future__ import annotations

import math

import pytest
import torch

from cifar10_tl.metrics.evaluation import Evaluation


@pytest.fixture
def evaluation() -> Evaluation:
    # of images 0 to 4: right, wrong (sure), right, wrong (less sure), right; given out of order
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]]
    )
    labels = torch.tensor([0, 2, 1, 1, 2])
    order = torch.tensor([3, 0, 4, 1, 2])
    return Evaluation.of(probabilities.log()[order], labels[order], order, ["a", "b", "c"])


def test_it_is_in_the_order_of_the_images(evaluation: Evaluation) -> None:
    assert evaluation.indices.tolist() == [0, 1, 2, 3, 4]
    assert evaluation.labels.tolist() == [0, 2, 1, 1, 2]
    assert evaluation.predictions.tolist() == [0, 1, 1, 0, 2]
    assert torch.allclose(evaluation.probabilities.sum(1), torch.ones(5))


def test_its_metrics_are_those_of_the_definition(evaluation: Evaluation) -> None:
    wanted = -sum(map(math.log, (0.7, 0.05, 0.8, 0.1, 0.6))) / 5
    assert evaluation.metrics() == {"acc": pytest.approx(0.6), "loss": pytest.approx(wanted), "count": 5}


def test_rows_of_the_confusion_matrix_are_true_classes(evaluation: Evaluation) -> None:
    assert evaluation.confusion_matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_mistakes_come_most_confident_first(evaluation: Evaluation) -> None:
    assert evaluation.incorrect(10).tolist() == [1, 3]
    assert evaluation.incorrect(1).tolist() == [1]


def test_correct_ones_are_spread_over_the_images(evaluation: Evaluation) -> None:
    assert evaluation.correct(10).tolist() == [0, 2, 4]
    assert evaluation.correct(2).tolist() == [0, 4]


def test_an_image_evaluated_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        Evaluation.of(torch.zeros(2, 3), torch.zeros(2).long(), torch.tensor([4, 4]), ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 logits"):
        Evaluation.of(torch.zeros(2, 3), torch.zeros(1).long(), torch.tensor([4, 5]), ["a", "b", "c"])


def test_no_images_give_no_number() -> None:
    empty = Evaluation.of(torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).long(), ["a", "b", "c"])
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.loss)
    assert empty.incorrect(5).tolist() == empty.correct(5).tolist() == []


# ------------------------------------------------------------------------------------- what the evaluate command adds


def test_scores_by_hand(evaluation: Evaluation) -> None:
    scores = evaluation.scores()
    assert {k: scores[k] for k in ("acc", "loss", "count")} == evaluation.metrics()
    assert scores["nll"] == scores["loss"]
    assert scores["top2_acc"] == pytest.approx(0.6)  # of the two mistakes, neither true class comes second
    # a: 1 right of 2 named and 1 true; b: 1 of 2 and 2; c: 1 of 1 and 2
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert scores["acc_interval"] == [pytest.approx(0.2307, abs=1e-4), pytest.approx(0.8824, abs=1e-4)]
    distances = (
        0.3**2 + 0.2**2 + 0.1**2,
        0.05**2 + 0.9**2 + 0.95**2,
        0.1**2 + 0.2**2 + 0.1**2,
        0.36 + 0.81 + 0.09,
        0.24,
    )
    assert scores["brier"] == pytest.approx(sum(distances) / 5)
    # each image in a bin of its own but 0.6 and 0.6: |1 - 0.7| + |0 - 0.9| + |1 - 0.8| + 2 |0.5 - 0.6|, over 5
    assert scores["ece"] == pytest.approx((0.3 + 0.9 + 0.2 + 0.2) / 5, abs=1e-6)


def test_per_class_by_hand(evaluation: Evaluation) -> None:
    rows = evaluation.per_class()
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert [row["count"] for row in rows] == [1, 2, 2]
    assert [row["precision"] for row in rows] == [0.5, 0.5, 1.0]
    assert [row["recall"] for row in rows] == [1.0, 0.5, 0.5]
    assert [row["f1"] for row in rows] == [pytest.approx(2 / 3), 0.5, pytest.approx(2 / 3)]


def test_confused_pairs_and_confident_errors(evaluation: Evaluation) -> None:
    assert evaluation.confused_pairs() == [
        {"true": "b", "predicted": "a", "count": 1, "share": 0.5},
        {"true": "c", "predicted": "b", "count": 1, "share": 0.5},
    ]
    assert evaluation.confused_pairs(1)[0]["true"] == "b"
    assert evaluation.confident_errors(1) == [{"index": 1, "true": "c", "predicted": "b", "probability": 0.9}]


def test_scores_against_formulas_of_our_own() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    of = Evaluation.of(logits, labels, torch.arange(500), [str(k) for k in range(7)])
    scores, rows = of.scores(), of.per_class()
    second = logits.argsort(1)[:, -2]
    top2 = ((logits.argmax(1) == labels) | (second == labels)).double().mean()
    assert scores["top2_acc"] == pytest.approx(float(top2))
    for k, row in enumerate(rows):
        hits = int(((of.predictions == k) & (labels == k)).sum())
        assert row["precision"] == pytest.approx(hits / int((of.predictions == k).sum()))
        assert row["recall"] == pytest.approx(hits / row["count"])
    f1 = [2 * row["precision"] * row["recall"] / (row["precision"] + row["recall"]) for row in rows]
    assert scores["macro_f1"] == pytest.approx(sum(f1) / 7)


def test_a_temperature_changes_no_prediction(evaluation: Evaluation) -> None:
    cooler = evaluation.scaled(0.5)
    assert cooler.predictions.equal(evaluation.predictions)
    assert torch.allclose(cooler.probabilities[0], torch.tensor([0.49, 0.04, 0.01]) / 0.54)


def test_the_mean_of_views_averages_probabilities(evaluation: Evaluation) -> None:
    other = Evaluation.of(evaluation.logits.flip(1), evaluation.labels, evaluation.indices, evaluation.class_names)
    mean = Evaluation.mean_of([evaluation, other])
    assert torch.allclose(mean.probabilities, (evaluation.probabilities + other.probabilities) / 2)
    alone = Evaluation.mean_of([evaluation])
    assert torch.allclose(alone.probabilities, evaluation.probabilities)
    with pytest.raises(ValueError, match="not of the same images"):
        Evaluation.mean_of(
            [evaluation, Evaluation.of(other.logits, other.labels, other.indices + 1, other.class_names)]
        )


def test_the_mean_of_views_loses_no_small_probability() -> None:
    sure = Evaluation.of(torch.tensor([[0.0, 500.0]]), torch.tensor([0]), torch.tensor([3]), ["a", "b"])
    assert Evaluation.mean_of([sure, sure]).loss == pytest.approx(500)
