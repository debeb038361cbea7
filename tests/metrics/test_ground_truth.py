from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Split
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.ground_truth import (
    accuracy_without,
    compare_with_people,
    read_doubtful_labels,
    read_human_labels,
)

LABELS = torch.tensor([0, 1, 1, 1])


@pytest.fixture
def evaluation() -> Evaluation:
    probabilities = torch.tensor([[0.5, 0.5 - 1e-6], [0.8, 0.2], [0.25, 0.75], [0.1, 0.9]])
    return Evaluation.of(probabilities.log(), LABELS, torch.arange(4), ["a", "b"])


def split_of(labels: torch.Tensor, indices: torch.Tensor | None = None) -> Split:
    return Split(torch.empty(len(labels), 3, 1, 1, dtype=torch.uint8), labels, indices)


def read(path: Path, labels: torch.Tensor = LABELS, indices: torch.Tensor | None = None) -> torch.Tensor:
    people = read_human_labels(str(path), split_of(labels, indices), 2)
    assert people is not None
    return people


def read_people(folder: Path, table: object, labels: torch.Tensor = LABELS) -> torch.Tensor:
    np.save(folder / "people.npy", np.asarray(table))
    return read(folder / "people.npy", labels)


def read_doubtful(path: Path) -> torch.Tensor:
    doubtful = read_doubtful_labels(str(path), split_of(LABELS), ["a", "b"])
    assert doubtful is not None
    return doubtful


def test_agreement_with_people(evaluation: Evaluation, tmp_path: Path) -> None:
    people = read_people(tmp_path, [[1, 0], [0.4, 0.6], [0.4, 0.6], [0, 1.0]])
    second, third = (0.4 * math.log(p) + 0.6 * math.log(1 - p) for p in (0.8, 0.25))
    found = compare_with_people(evaluation, people)
    assert found["cross_entropy"] == pytest.approx(-(math.log(0.5) + second + third + math.log(0.9)) / 4, rel=1e-5)
    assert found["lowest_possible"] == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / 2)
    assert found["agreement"] == 0.75


def test_rows_of_a_limited_test_set_are_selected(tmp_path: Path) -> None:
    np.save(tmp_path / "people.npy", np.eye(2)[[0, 1, 0, 1, 1]])
    people = read(tmp_path / "people.npy", torch.tensor([1, 0]), torch.tensor([1, 2]))
    assert people.tolist() == [[0, 1], [1, 0]]


def test_human_labels_in_another_order_than_the_images_are_refused(tmp_path: Path) -> None:
    labels = torch.arange(1000) % 2
    in_order = np.eye(2)[labels]
    assert read_people(tmp_path, 0.8 * in_order + 0.1, labels).shape == (1000, 2)
    shuffled = in_order[np.random.default_rng(0).permutation(1000)]
    for table in (shuffled, in_order[labels.argsort(stable=True)], in_order[:, ::-1], np.full((1000, 2), 0.5)):
        with pytest.raises(UserError, match=r"agrees with only \d+% of the labels; rows must be in the order"):
            read_people(tmp_path, table, labels)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((4, 3)) / 3, r"expected shape \[4, 2\], got \[4"),
        (np.ones(4), r"expected shape \[4, 2\], got \[4"),
        (np.array([["x", "y"]] * 4), "cannot be read as a NumPy array of numbers"),
        (np.ones((5, 2)) / 2, r"expected shape \[4, 2\], got \[5"),
        (np.ones((3, 2)) / 2, r"expected shape \[4, 2\], got \[3"),
        (np.ones((4, 2)), "probabilities that sum to 1"),
        (np.full((4, 2), np.nan), "probabilities that sum to 1"),
        (np.array([[2.0, -1.0]] * 4), "probabilities that sum to 1"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, table: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_people(tmp_path, table)


def test_files_other_than_an_array_are_refused_and_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    path = tmp_path / "people.npy"
    for content in (None, b"", b"not an array", b"\x93NUMPY\x01\x00"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a NumPy array"):
            read(path)
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a NumPy array"):
        read(path)
    assert not (tmp_path / "executed").exists()
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))
    with pytest.raises(UserError, match="cannot be read as a NumPy array"):
        read(path)


@pytest.mark.parametrize("text", ["1\n3\n", "3 b\n 1  b \n3", json.dumps([1, 3])])
def test_accuracy_with_and_without_doubtful_labels(evaluation: Evaluation, tmp_path: Path, text: str) -> None:
    (tmp_path / "doubtful").write_text(text)
    found = accuracy_without(evaluation, read_doubtful(tmp_path / "doubtful"))
    assert found == {"count": 2, "acc_with": 0.75, "acc_without": 1.0, "acc_on_doubtful": 0.5}


def test_there_is_no_accuracy_without_all_images(evaluation: Evaluation) -> None:
    found = accuracy_without(evaluation, torch.tensor([0, 1, 2, 3, 999]))
    assert (found["count"], found["acc_without"]) == (4, None)


def test_doubtful_labels_that_do_not_match_the_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "doubtful"
    with pytest.raises(UserError, match="No such file"):
        read_doubtful(path)
    for text, message in (
        ("17", "none of the images, which have indices 0 to 3"),
        ("1 b\n0 b", "image 0 of the data is a, not b"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_doubtful(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"one", b"1.5", b"-1", b"[true]", b'["1"]', b"[1", b'{"a": 1}', b"\xff\xfe\x00", b"9" * 30]
)
def test_files_without_indices_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "doubtful").write_bytes(content)
    with pytest.raises(UserError, match="expected image indices"):
        read_doubtful(tmp_path / "doubtful")
