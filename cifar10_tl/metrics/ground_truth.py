"""Additional ground truth: the labels that people chose, and images whose labels are doubtful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_cohen_kappa

from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation

if TYPE_CHECKING:
    from cifar10_tl.data.batch import Split


def read_human_labels(path: str | None, split: Split, num_classes: int) -> Tensor | None:
    """Read the fraction of people who chose each class for each image of ``split``, float64 [N, K].

    ``path`` is a ``.npy`` file with one row per test image, such as CIFAR-10H's cifar10h-probs.npy (arXiv:1908.07086).
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
    kappa = multiclass_cohen_kappa(people.argmax(1), split.labels, num_classes)
    if kappa < 0.5:  # it is about 0 in an unrelated order
        raise UserError(
            f"human_labels={path}: the majority disagrees with the labels (Cohen's kappa {kappa:.2f}); rows must be "
            "in the order of the test images, and columns in the order of the classes"
        )
    return people


def compare_with_people(evaluation: Evaluation, people: Tensor) -> dict[str, float]:
    """Compare probabilities with the human labels of the same images, float64 [N, K].

    ``lowest_possible`` is the entropy of the human labels, ``agreement`` the fraction of images for which the network
    predicts the majority label.
    """
    log_probabilities = evaluation.logits.double().log_softmax(1)
    return {
        "cross_entropy": float(-(people * log_probabilities).sum(1).mean()),
        "lowest_possible": float(torch.special.entr(people).sum(1).mean()),
        "agreement": float((people.argmax(1) == evaluation.predictions).double().mean()),
    }


def read_doubtful_labels(path: str | None, split: Split, class_names: Sequence[str]) -> Tensor | None:
    """Read the indices of doubtful images, int64 [n]: lines of ``INDEX`` or ``INDEX LABEL``, or a JSON list of indices.

    Labels in the file must be those of the images, and at least one image must be in ``split``.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text()
        lines = map(str, json.loads(text)) if text.lstrip().startswith("[") else text.splitlines()
        listed = {int(index): " ".join(label) for index, *label in filter(None, map(str.split, lines))}
    except (OSError, ValueError) as error:  # ValueError includes text that is not UTF-8
        raise UserError(f"doubtful_labels={path}: expected one image index per line or a JSON list: {error}") from error
    labels = zip(split.indices.tolist(), split.labels.tolist(), strict=True)
    names = {index: class_names[label] for index, label in labels}
    found = [index for index in listed if index in names]
    for index in found:
        if listed[index] not in ("", names[index]):
            raise UserError(f"doubtful_labels={path}: image {index} of the data is {names[index]}, not {listed[index]}")
    if not found:
        raise UserError(
            f"doubtful_labels={path}: lists none of the images, whose indices are {min(names)} to {max(names)}"
        )
    return torch.tensor(found)


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
