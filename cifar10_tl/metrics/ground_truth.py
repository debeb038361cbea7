"""Additional ground truth: the labels that people chose, and images whose labels are doubtful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation

if TYPE_CHECKING:
    from cifar10_tl.data.batch import Split


def read_human_labels(path: str | None, split: Split, num_classes: int) -> Tensor | None:
    """Read the fraction of people who chose each class, such as CIFAR-10H's cifar10h-probs.npy (arXiv:1908.07086).

    Args:
        path: ``.npy`` file with a row per image of the test set; None to read nothing.
        split: Test images, all or some of them.
        num_classes: K.

    Returns:
        float64 [N, K], the rows of ``split``.

    Raises:
        UserError: The file cannot be read, or its rows do not match the images.
    """
    if path is None:
        return None
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False)).double()
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(f"human_labels={path}: cannot be read as a NumPy array of numbers: {error}") from error
    needed = int(split.indices.max()) + 1
    is_limited = needed > len(split)  # by data.image_limit: the size of the whole test set is not known here
    if table.shape[1:] != (num_classes,) or len(table) < needed or (len(table) > needed and not is_limited):
        raise UserError(f"human_labels={path}: expected shape [{needed}, {num_classes}], got {list(table.shape)}")
    if not ((table >= 0).all() and torch.allclose(table.sum(1), torch.ones(()).double(), atol=1e-3)):
        raise UserError(f"human_labels={path}: each row must hold probabilities that sum to 1")
    people = table[split.indices]
    own, majority = (F.one_hot(labels, num_classes).double() for labels in (split.labels, people.argmax(1)))
    agreement, chance = float((own * majority).sum(1).mean()), float(own.mean(0) @ majority.mean(0))
    if agreement - chance < 0.5 * (1 - chance):  # Cohen's kappa below 0.5; it is about 0 in an unrelated order
        raise UserError(
            f"human_labels={path}: the majority agrees with only {agreement:.0%} of the labels; rows must be in the "
            "order of the test images, and columns in the order of the classes"
        )
    return people


def compare_with_people(evaluation: Evaluation, people: Tensor) -> dict[str, float]:
    """Compare probabilities with the human labels of the same images, float64 [N, K].

    Returns:
        ``cross_entropy`` of the network in nats, the ``lowest_possible`` one (the entropy of the human labels), and
        ``agreement``, the fraction of images for which the network predicts the majority label.
    """
    log_probabilities = evaluation.logits.double().log_softmax(1)
    return {
        "cross_entropy": float(-(people * log_probabilities).sum(1).mean()),
        "lowest_possible": float(torch.special.entr(people).sum(1).mean()),
        "agreement": float((people.argmax(1) == evaluation.predictions).double().mean()),
    }


def read_doubtful_labels(path: str | None, split: Split, class_names: Sequence[str]) -> Tensor | None:
    """Read the indices of doubtful images, int64 [n]: lines of ``INDEX`` or ``INDEX LABEL``, or a JSON list of indices.

    Raises:
        UserError: The file cannot be read, or its indices or labels do not match the images of ``split``.
    """
    if path is None:
        return None
    try:
        listed = _parse(Path(path).read_text())
    except OSError as error:
        raise UserError(f"doubtful_labels={path}: {error.strerror}") from error
    except ValueError as error:  # includes text that is not UTF-8
        raise UserError(f"doubtful_labels={path}: expected image indices, one per line, or a JSON list") from error
    labels = zip(split.indices.tolist(), split.labels.tolist(), strict=True)
    names = {index: class_names[label] for index, label in labels}
    for index, label in listed:
        if label and names.get(index, label) != label:
            raise UserError(f"doubtful_labels={path}: image {index} of the data is {names[index]}, not {label}")
    if names.keys().isdisjoint(index for index, _ in listed):
        raise UserError(f"doubtful_labels={path}: none of the images, which have indices {min(names)} to {max(names)}")
    return torch.tensor([index for index, _ in listed])


def _parse(text: str) -> list[tuple[int, str]]:
    """Return pairs of an index and a label, which is empty if the file has none."""
    if text.lstrip().startswith("["):
        found = [(index, "") for index in json.loads(text)]
    else:
        found = [(int(row[0]), " ".join(row[1:])) for row in map(str.split, text.splitlines()) if row]
    if not found or not all(type(index) is int and 0 <= index < 2**63 for index, _ in found):
        raise ValueError
    return found


def accuracy_without(evaluation: Evaluation, doubtful: Tensor) -> dict[str, Any]:
    """Return accuracies with doubtful images (int64 [n] indices), without them (None if all are), and on them alone."""
    chosen = torch.isin(evaluation.indices, doubtful)
    correct = (evaluation.predictions == evaluation.labels).double()
    return {
        "count": int(chosen.sum()),
        "acc_with": evaluation.accuracy,
        "acc_without": None if chosen.all() else float(correct[~chosen].mean()),
        "acc_on_doubtful": float(correct[chosen].mean()),
    }
