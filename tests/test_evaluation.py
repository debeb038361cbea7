from __future__ import annotations

import math

import pytest
import torch

from cifar10_tl.evaluation import Evaluation


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
    assert evaluation.mistakes(10).tolist() == [1, 3]
    assert evaluation.mistakes(1).tolist() == [1]


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
    assert empty.mistakes(5).tolist() == empty.correct(5).tolist() == []
