from __future__ import annotations

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


def read_people(path: Path, labels: torch.Tensor = LABELS, indices: torch.Tensor | None = None) -> torch.Tensor:
    people = read_human_labels(str(path), split_of(labels, indices), 2)
    assert people is not None
    return people


def read_doubtful(path: Path) -> torch.Tensor:
    doubtful = read_doubtful_labels(str(path), split_of(LABELS), ["a", "b"])
    assert doubtful is not None
    return doubtful


def test_agreement_with_people(evaluation: Evaluation, tmp_path: Path) -> None:
    np.save(tmp_path / "people.npy", [[1, 0], [0.4, 0.6], [0.4, 0.6], [0, 1.0]])
    second, third = (0.4 * math.log(p) + 0.6 * math.log(1 - p) for p in (0.8, 0.25))
    found = compare_with_people(evaluation, read_people(tmp_path / "people.npy"))
    assert found["cross_entropy"] == pytest.approx(-(math.log(0.5) + second + third + math.log(0.9)) / 4, rel=1e-5)
    assert found["lowest_possible"] == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / 2)
    assert found["agreement"] == 0.75
    others = torch.tensor([[1, 0], [0.4, 0.6], [0.4, 0.6], [0.9, 0.1]])
    assert compare_with_people(evaluation, others)["agreement"] == 0.5, "with people, not with the labels"


def test_rows_of_a_limited_test_set_are_selected(tmp_path: Path) -> None:
    np.save(tmp_path / "people.npy", np.eye(2)[[0, 1, 0, 1, 1]])
    people = read_people(tmp_path / "people.npy", torch.tensor([1, 0]), torch.tensor([1, 2]))
    assert people.tolist() == [[0, 1], [1, 0]]


def test_human_labels_in_another_order_than_the_images_are_refused(tmp_path: Path) -> None:
    path, labels = tmp_path / "people.npy", torch.arange(1000) % 2
    in_order = np.eye(2)[labels]
    np.save(path, 0.8 * in_order + 0.1)
    assert read_people(path, labels).shape == (1000, 2)
    shuffled = in_order[np.random.default_rng(0).permutation(1000)]
    for table in (shuffled, in_order[labels.argsort(stable=True)], in_order[:, ::-1], np.full((1000, 2), 0.5)):
        np.save(path, table)
        with pytest.raises(UserError, match=r"the majority disagrees with the labels .*; rows must be in the order"):
            read_people(path, labels)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((4, 3)) / 3, r"expected shape \[4, 2\], got \[4"),
        (np.ones(4), r"expected shape \[4, 2\], got \[4"),
        (np.array(1), r"expected shape \[4, 2\], got \[\]"),
        (np.ones((5, 2)) / 2, r"expected shape \[4, 2\], got \[5"),
        (np.ones((3, 2)) / 2, r"expected shape \[4, 2\], got \[3"),
        (np.array([["x", "y"]] * 4), "cannot be read as a NumPy array of numbers"),
        (np.ones((4, 2)), "probabilities that sum to 1"),
        (np.full((4, 2), np.nan), "probabilities that sum to 1"),
        (np.array([[2.0, -1.0]] * 4), "probabilities that sum to 1"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, table: np.ndarray, message: str) -> None:
    np.save(tmp_path / "people.npy", table)
    with pytest.raises(UserError, match=message):
        read_people(tmp_path / "people.npy")


def test_files_other_than_an_array_are_refused_and_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    for name, content in {"empty": b"", "text": b"not an array", "cut": b"\x93NUMPY\x01\x00"}.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for name in ("nowhere", "empty", "text", "cut", "several.npz", "trap.npy"):
        with pytest.raises(UserError, match="cannot be read as a NumPy array"):
            read_people(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["1\n\n3\n", "3 b\n 1  b \n3", "\n[1, 3, 999]"])
def test_accuracy_with_and_without_doubtful_labels(evaluation: Evaluation, tmp_path: Path, text: str) -> None:
    (tmp_path / "doubtful").write_text(text)
    found = accuracy_without(evaluation, read_doubtful(tmp_path / "doubtful"))
    assert found == {"count": 2, "acc_with": 0.75, "acc_without": 1.0, "acc_on_doubtful": 0.5}


def test_there_is_no_accuracy_without_all_images(evaluation: Evaluation) -> None:
    found = accuracy_without(evaluation, torch.arange(4))
    assert (found["count"], found["acc_without"]) == (4, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, "lists none of the images, whose indices are 0 to 3") for text in ("17", "", "[]", "-1", "9" * 30)),
        ("1 b\n0 b", "image 0 of the data is a, not b"),
        *((text, "expected one image index per line") for text in ("one", "1.5", "[true]", "[1", '{"a": 1}', "\udcff")),
        (None, "No such file"),
    ],
)
def test_doubtful_labels_that_do_not_match_the_images_are_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "doubtful").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=f"^doubtful_labels=.*{message}"):
        read_doubtful(tmp_path / "doubtful")
