"""Metrics of a classifier, computed from the logits of a whole split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from cifar10_tl.metrics.calibration import (
    ReliabilityBins,
    brier_score,
    expected_calibration_error,
    reliability_bins,
)
from cifar10_tl.metrics.intervals import wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """Logits and labels of N images and K classes, sorted by index, with the metrics computed from them.

    Attributes:
        logits: float32 [N, K].
        labels: True classes, int64 [N].
        indices: Index of each image in its source, int64 [N], in ascending order.
        class_names: Names of the K classes.
        features: Features before the head, averaged over space, float32 [N, C]; None if they were not collected.
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor
    class_names: tuple[str, ...]
    features: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        indices: Tensor,
        class_names: Sequence[str],
        features: Tensor | None = None,
    ) -> Evaluation:
        """Create an evaluation from outputs in any order; an index that occurs twice raises ValueError."""
        order = indices.argsort()
        if (indices[order].diff() == 0).any():
            raise ValueError("an image was evaluated twice")
        features = None if features is None else features[order].float()
        return cls(logits[order], labels[order], indices[order], tuple(class_names), features)

    @classmethod
    def mean_of(cls, views: Sequence[Evaluation]) -> Evaluation:
        """Average the probabilities of several views of the same images."""
        # The softmax of log-probabilities returns the probabilities; log space avoids underflow of small ones.
        logs = reduce(torch.logaddexp, (view.logits.double().log_softmax(1) for view in views))
        return replace(views[0], logits=(logs - math.log(len(views))).float())

    def scaled(self, temperature: float) -> Evaluation:
        """Return a copy with the logits divided by ``temperature``."""
        return replace(self, logits=self.logits / temperature)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @cached_property
    def probabilities(self) -> Tensor:
        """Class probabilities, float32 [N, K]."""
        return self.logits.softmax(1)

    @cached_property
    def predictions(self) -> Tensor:
        """Predicted classes, int64 [N]."""
        return self.logits.argmax(1)

    @cached_property
    def accuracy(self) -> float:
        """Fraction of correct predictions; NaN without images."""
        return float((self.predictions == self.labels).double().mean())

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy in nats; NaN without images."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @cached_property
    def confusion_matrix(self) -> Tensor:
        """Number of images of class i predicted as class j in entry (i, j), int64 [K, K]."""
        pairs = self.labels * self.num_classes + self.predictions
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, -1)

    @cached_property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that occur, equal to the accuracy if these have equally many images."""
        return float((self.confusion_matrix.diag() / self.confusion_matrix.sum(1).double()).nanmean())

    @cached_property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur or are predicted; NaN without images."""
        counts = self.confusion_matrix.sum(0) + self.confusion_matrix.sum(1).double()
        return float((2 * self.confusion_matrix.diag() / counts).nanmean())

    def metrics(self) -> dict[str, float]:
        """Return accuracy, balanced accuracy, macro F1, loss and number of images."""
        means = {"acc": self.accuracy, "balanced_acc": self.balanced_accuracy, "macro_f1": self.macro_f1}
        return {**means, "loss": self.loss, "count": len(self)}

    def scores(self) -> dict[str, Any]:
        """Return :meth:`metrics` and all other scalar metrics of at least one image; ``nll`` is the loss.

        Two classes have no top-2 accuracy, which would always be 1.
        """
        top2: dict[str, float] = {}
        if self.num_classes > 2:
            acc = multiclass_accuracy(self.probabilities, self.labels, self.num_classes, average="micro", top_k=2)
            top2["top2_acc"] = _rounded(acc)
        num_correct = int((self.predictions == self.labels).sum())
        return {
            **self.metrics(),
            "acc_interval": list(wilson_interval(num_correct, len(self))),
            **top2,
            "nll": self.loss,
            **self.calibration(),
        }

    def calibration(self) -> dict[str, float]:
        """Return the Brier score and the expected calibration error."""
        ece = expected_calibration_error(self.reliability_bins())
        return {"brier": brier_score(self.probabilities, self.labels), "ece": ece}

    def reliability_bins(self) -> ReliabilityBins:
        """Return the bins of a reliability diagram."""
        return reliability_bins(self.probabilities, self.labels)

    def per_class(self) -> list[dict[str, Any]]:
        """Return name, precision, recall, F1 and number of images of each class.

        The precision is 0 without predictions of the class, the recall NaN without images of it, F1 NaN without both.
        """
        hits, predicted = self.confusion_matrix.diag().double(), self.confusion_matrix.sum(0)
        count = self.confusion_matrix.sum(1)
        scores = ((hits / predicted).nan_to_num(), hits / count, 2 * hits / (predicted + count))
        keys = ("class", "precision", "recall", "f1", "count")
        columns = (self.class_names, *(column.tolist() for column in (*scores, count)))
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]

    def confused_pairs(self, limit: int = 10) -> list[dict[str, Any]]:
        """Return the most frequent confusions, with their number and their fraction of the true class."""
        counts, sizes = self.confusion_matrix.clone().fill_diagonal_(0), self.confusion_matrix.sum(1)
        pairs = []
        for position in counts.flatten().argsort(descending=True, stable=True)[:limit].tolist():
            i, j = divmod(position, self.num_classes)
            if count := int(counts[i, j]):
                names = {"true": self.class_names[i], "predicted": self.class_names[j]}
                pairs.append({**names, "count": count, "share": count / int(sizes[i])})
        return pairs

    def rows(self, positions: Tensor, paths: Sequence[str | None]) -> list[dict[str, Any]]:
        """Return index, path, classes and probability of the images at ``positions`` (int64 [n]), given their paths."""
        return [
            {
                "index": int(self.indices[position]),
                "path": path,
                "true": self.class_names[self.labels[position]],
                "predicted": self.class_names[self.predictions[position]],
                "probability": _rounded(self.probabilities[position].max()),
            }
            for position, path in zip(positions.tolist(), paths, strict=True)
        ]

    def correct(self, limit: int) -> Tensor:
        """Return the positions of up to ``limit`` correct predictions, evenly spaced, int64."""
        positions = (self.predictions == self.labels).nonzero().flatten()
        if len(positions) <= limit:
            return positions
        return positions[torch.linspace(0, len(positions) - 1, limit).round().long()]

    def incorrect(self, limit: int) -> Tensor:
        """Return the positions of up to ``limit`` errors in order of decreasing confidence, int64."""
        positions = (self.predictions != self.labels).nonzero().flatten()
        confidence = self.probabilities.max(1).values[positions]
        return positions[confidence.argsort(descending=True, stable=True)][:limit]


def _rounded(value: Tensor | float) -> float:
    """Convert to a Python float with the 7 significant digits of float32."""
    return float(f"{float(value):.7g}")
