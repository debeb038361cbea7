"""Additional ground truth: the labels that people chose, and images whose labels are doubtful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation


def read_human_labels(path: Path, indices: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Read the distribution of human labels, such as CIFAR-10H's cifar10h-probs.npy (https://arxiv.org/abs/1908.07086).

    Args:
        path: ``.npy`` file, [test images, K] probabilities.
        indices: int64 [n], indices in the test set of the images to evaluate.
        labels: int64 [n], classes of these images.
        num_classes: K.

    Returns:
        float64 [n, K].

    Raises:
        UserError: The file cannot be read, or its rows do not match the images.
    """
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"human_labels={path}: cannot be read as a NumPy array: {error}") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiu" or table.shape[1:] != (num_classes,):
        raise UserError(f"human_labels={path}: expected an array of numbers [test images, {num_classes}]")
    needed = int(indices.max()) + 1
    is_limited = needed > len(indices)  # by data.image_limit: the size of the whole test set is not known here
    if len(table) < needed or (len(table) > needed and not is_limited):
        raise UserError(f"human_labels={path}: has {len(table)} rows for {needed} test images")
    if not ((table >= 0).all() and np.allclose(table.sum(1), 1, atol=1e-3)):
        raise UserError(f"human_labels={path}: each row must hold probabilities that sum to 1")
    people = torch.from_numpy(table.astype(np.float64))[indices]
    majority = people.argmax(1)
    agreement = float((majority == labels).double().mean())
    counts = [torch.bincount(values, minlength=num_classes).double() for values in (majority, labels)]
    chance = float((counts[0] * counts[1]).sum()) / len(labels) ** 2
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


def read_doubtful_labels(path: Path, indices: Tensor, labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """Read the indices of doubtful images: ``INDEX`` or ``INDEX LABEL`` in each line, or a JSON list of indices.

    Args:
        path: File to read.
        indices: int64 [N], indices of the images to evaluate.
        labels: int64 [N], classes of these images; labels in the file must be the same.
        class_names: Names of the classes.

    Returns:
        int64 [n].

    Raises:
        UserError: The file cannot be read, or does not match the images.
    """
    try:
        listed = _parse(path.read_text())
    except OSError as error:
        raise UserError(f"doubtful_labels={path}: {error.strerror}") from error
    except ValueError as error:  # includes text that is not UTF-8
        raise UserError(f"doubtful_labels={path}: expected image indices, one per line, or a JSON list") from error
    names = {index: class_names[label] for index, label in zip(indices.tolist(), labels.tolist(), strict=True)}
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
        rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        found = [(int(row[0]), " ".join(row[1:]).strip()) for row in rows]
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
