from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.ground_truth import DoubtfulLabels, HumanLabels


@pytest.fixture
def evaluation() -> Evaluation:
    probabilities = torch.tensor([[0.5, 0.5 - 1e-6], [0.8, 0.2], [0.25, 0.75], [0.1, 0.9]])
    return Evaluation.of(probabilities.log(), torch.tensor([0, 1, 1, 1]), torch.arange(4), ["a", "b"])


def human(tmp_path: Path, table: object, indices: int = 4) -> HumanLabels:
    np.save(tmp_path / "people.npy", np.asarray(table))
    return HumanLabels.read(tmp_path / "people.npy", 2, torch.arange(indices))


def test_agreement_with_people_by_hand(evaluation: Evaluation, tmp_path: Path) -> None:
    people = human(tmp_path, [[1, 0], [0.4, 0.6], [0.5, 0.5], [0, 1.0]])
    found = people.judge(evaluation)
    second = 0.4 * math.log(0.8) + 0.6 * math.log(0.2)
    third = 0.5 * math.log(0.25) + 0.5 * math.log(0.75)
    wanted = -(math.log(0.5) + second + third + math.log(0.9)) / 4
    assert found["cross_entropy"] == pytest.approx(wanted, rel=1e-5)
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6) + math.log(0.5)) / 4
    assert found["lowest_possible"] == pytest.approx(entropy)
    assert found["agreement"] == 0.5  # of a tie among people the first class counts


def test_a_limited_test_set_takes_its_rows_of_the_whole_table(tmp_path: Path) -> None:
    table = np.eye(2)[[0, 1, 0, 1, 1]]
    np.save(tmp_path / "people.npy", table)
    limited = torch.tensor([1, 4])
    people = HumanLabels.read(tmp_path / "people.npy", 2, limited)
    sure = Evaluation.of(torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([1, 1]), limited, ["a", "b"])
    assert people.judge(sure)["agreement"] == 1.0


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (np.ones((4, 3)) / 3, r"should be \[test images, 2\], and is \[4, 3\]"),
        (np.ones(4), r"should be \[test images, 2\], and is \[4\]"),
        (np.ones((5, 2)) / 2, "has 5 rows for 4 test images"),
        (np.ones((3, 2)) / 2, "has 3 rows for 4 test images"),
        (np.ones((4, 2)), "each row should sum to 1"),
        (np.full((4, 2), np.nan), "shares from 0 to 1"),
        (np.array([[2.0, -1.0]] * 4), "shares from 0 to 1"),
        (np.array([["x", "y"]] * 4), "shares from 0 to 1"),
    ],
)
def test_a_table_of_something_else_is_one_line(tmp_path: Path, table: np.ndarray, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        human(tmp_path, table)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_array_is_one_line_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "people.npy"
    with pytest.raises(UserError, match="no such file"):
        HumanLabels.read(path, 2, torch.arange(4))
    for content in (b"", b"not an array", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no NumPy array of numbers"):
            HumanLabels.read(path, 2, torch.arange(4))

    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is no NumPy array of numbers"):
        HumanLabels.read(path, 2, torch.arange(4))
    assert not (tmp_path / "sprung").exists()
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))
    with pytest.raises(UserError, match="several arrays"):
        HumanLabels.read(path, 2, torch.arange(4))


@pytest.mark.parametrize("text", ["1\n3\n", "3 1 3", json.dumps([1, 3])])
def test_accuracy_with_and_without_doubtful_labels(evaluation: Evaluation, tmp_path: Path, text: str) -> None:
    (tmp_path / "doubtful").write_text(text)
    labels = DoubtfulLabels.read(tmp_path / "doubtful", evaluation.indices)
    # images 0, 2 and 3 are right
    assert labels.judge(evaluation) == {"count": 2, "acc_with": 0.75, "acc_without": 1.0, "acc_on_doubtful": 0.5}


def test_where_all_are_doubtful_nothing_is_left(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "doubtful").write_text("0 1 2 3 999")
    found = DoubtfulLabels.read(tmp_path / "doubtful", evaluation.indices).judge(evaluation)
    assert (found["count"], found["acc_without"]) == (4, None)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"one", b"1.5", b"-1", b"[true]", b'["1"]', b"[1", b'{"a": 1}', b"\xff\xfe\x00", b"9" * 30]
)
def test_a_file_of_something_else_than_indices_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "doubtful").write_bytes(content)
    with pytest.raises(UserError, match="should hold indices"):
        DoubtfulLabels.read(tmp_path / "doubtful", torch.arange(4))


def test_indices_of_other_images_are_told(tmp_path: Path) -> None:
    (tmp_path / "doubtful").write_text("17")
    with pytest.raises(UserError, match=r"none of its indices .* 0 to 3"):
        DoubtfulLabels.read(tmp_path / "doubtful", torch.arange(4))
    with pytest.raises(UserError, match="no such file"):
        DoubtfulLabels.read(tmp_path / "nowhere", torch.arange(4))
