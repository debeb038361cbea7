"""Extra ground truth that a person may have: what other people saw in the images, and which labels are doubtful."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar10_tl.config.errors import UserError
from cifar10_tl.metrics.evaluation import Evaluation


@dataclass(frozen=True)
class HumanLabels:
    """What people saw in the test images.

    Attributes:
        shares: float64 [N, K], the share of people who chose each class, a row an image in the test set's order.
    """

    shares: Tensor

    @classmethod
    def read(cls, path: Path, num_classes: int, indices: Tensor) -> HumanLabels:
        """From a ``.npy`` file, such as CIFAR-10H's ``cifar10h-probs.npy`` (https://arxiv.org/abs/1908.07086).

        Args:
            path: of the file; it is read without pickle, so that no code in it is run.
            num_classes: K.
            indices: int64, of the test images that will be evaluated.

        Raises:
            UserError: the file is missing, no array of numbers, of another shape, or its rows are no shares.
        """
        table = _read_array(path)
        if table.ndim != 2 or table.shape[1] != num_classes:
            raise UserError(f"human_labels={path}: should be [test images, {num_classes}], and is {list(table.shape)}")
        needed = int(indices.max()) + 1
        limited = needed > len(indices)  # by data.image_limit: how many test images there are is not known
        if len(table) < needed or (len(table) > needed and not limited):
            raise UserError(f"human_labels={path}: has {len(table)} rows for {needed} test images")
        if table.dtype.kind not in "fiu" or not np.isfinite(table).all() or (table < 0).any():
            raise UserError(f"human_labels={path}: should hold shares from 0 to 1")
        if not np.allclose(table.sum(1), 1, atol=1e-3):
            raise UserError(f"human_labels={path}: each row should sum to 1 (shares, not counts)")
        return cls(torch.from_numpy(table.astype(np.float64)))

    def judge(self, evaluation: Evaluation) -> dict[str, float]:
        """How the network's probabilities fit the shares.

        Returns:
            ``cross_entropy`` of the network against people in nats, the ``lowest_possible`` (people's own entropy),
            and ``agreement``: the share of images where the network predicts what most people chose.
        """
        people = self.shares[evaluation.indices]
        log_probabilities = evaluation.logits.double().log_softmax(1)
        return {
            "cross_entropy": float(-(people * log_probabilities).sum(1).mean()),
            "lowest_possible": float(torch.special.entr(people).sum(1).mean()),
            "agreement": float((people.argmax(1) == evaluation.predictions).double().mean()),
        }


def _read_array(path: Path) -> NDArray[Any]:
    try:
        table = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"human_labels={path}: there is no such file") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"human_labels={path}: is no NumPy array of numbers (.npy)") from error
    if not isinstance(table, np.ndarray):
        raise UserError(f"human_labels={path}: holds several arrays; a .npy file holds one")
    return table


@dataclass(frozen=True)
class DoubtfulLabels:
    """Images whose labels are in doubt.

    Attributes:
        indices: int64 [n], the places of the images in their source.
    """

    indices: Tensor

    @classmethod
    def read(cls, path: Path, indices: Tensor) -> DoubtfulLabels:
        """From a file of indices, one a line (or apart by blanks), or a JSON list.

        Args:
            path: of the file.
            indices: int64, of the images that will be evaluated.

        Raises:
            UserError: the file is missing, holds something else, or none of the images.
        """
        try:
            listed = _parse_indices(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"doubtful_labels={path}: there is no such file") from error
        except ValueError as error:  # among them, that it is no text
            raise UserError(
                f"doubtful_labels={path}: should hold indices of images, one a line, or a JSON list of them"
            ) from error
        doubtful = torch.tensor(listed)
        if not torch.isin(indices, doubtful).any():
            raise UserError(
                f"doubtful_labels={path}: none of its indices is among the images, "
                f"which are {int(indices.min())} to {int(indices.max())}"
            )
        return cls(doubtful)

    def judge(self, evaluation: Evaluation) -> dict[str, Any]:
        """Accuracy with and without these images, and on them alone; None of no images. ``count`` is theirs."""
        chosen = torch.isin(evaluation.indices, self.indices)
        right = (evaluation.predictions == evaluation.labels).double()
        return {
            "count": int(chosen.sum()),
            "acc_with": evaluation.accuracy,
            "acc_without": float(right[~chosen].mean()) if not chosen.all() else None,
            "acc_on_doubtful": float(right[chosen].mean()),
        }


def _parse_indices(text: str) -> list[int]:
    found: Any = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    if not found or not all(type(index) is int and 0 <= index < 2**63 for index in found):
        raise ValueError
    return found
