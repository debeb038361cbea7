"""Metrics of a classifier, computed from the logits of a whole split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

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
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, indices: Tensor, class_names: Sequence[str]) -> Evaluation:
        """Create an evaluation from outputs in any order.

        Raises:
            ValueError: An index occurs twice, or the lengths differ.
        """
        if not len(logits) == len(labels) == len(indices):
            raise ValueError(f"{len(logits)} logits, {len(labels)} labels and {len(indices)} indices")
        order = indices.argsort()
        if (indices[order].diff() == 0).any():
            raise ValueError("an image was evaluated twice")
        return cls(logits[order], labels[order], indices[order], tuple(class_names))

    @classmethod
    def mean_of(cls, views: Sequence[Evaluation]) -> Evaluation:
        """Average the probabilities of several views of the same images.

        Raises:
            ValueError: The views differ in images, labels or classes.
        """
        first = views[0]
        for view in views[1:]:
            same = torch.equal(view.indices, first.indices) and torch.equal(view.labels, first.labels)
            if not same or view.class_names != first.class_names:
                raise ValueError("the views are not of the same images")
        # The softmax of log-probabilities returns the probabilities; log space avoids underflow of small ones.
        logs = torch.stack([view.logits.double().log_softmax(1) for view in views]).logsumexp(0)
        return cls((logs - math.log(len(views))).float(), first.labels, first.indices, first.class_names)

    def scaled(self, temperature: float) -> Evaluation:
        """Return a copy with the logits divided by ``temperature``."""
        return replace(self, logits=self.logits / temperature)

    def __len__(self) -> int:
        return len(self.labels)

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
        return multiclass_confusion_matrix(self.logits, self.labels, num_classes=self.num_classes)

    def metrics(self) -> dict[str, float]:
        """Return accuracy, loss and number of images."""
        return {"acc": self.accuracy, "loss": self.loss, "count": len(self)}

    def scores(self) -> dict[str, Any]:
        """Return :meth:`metrics` and all other scalar metrics of at least one image.

        ``acc_interval`` is the 95 % Wilson interval. ``nll`` is the loss.
        """
        top2 = multiclass_accuracy(self.probabilities, self.labels, self.num_classes, average="micro", top_k=2)
        right = int((self.predictions == self.labels).sum())
        return {
            **self.metrics(),
            "acc_interval": list(wilson_interval(right, len(self))),
            "top2_acc": _rounded(top2),
            "macro_f1": _rounded(multiclass_f1_score(self.predictions, self.labels, self.num_classes, "macro")),
            "nll": self.loss,
            **self.calibration(),
        }

    def calibration(self) -> dict[str, float]:
        """Return the Brier score and the expected calibration error."""
        return {
            "brier": brier_score(self.probabilities, self.labels),
            "ece": _rounded(expected_calibration_error(self.probabilities, self.labels)),
        }

    def reliability_bins(self) -> ReliabilityBins:
        """Return the bins of a reliability diagram."""
        return reliability_bins(self.probabilities, self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def per_class(self) -> list[dict[str, Any]]:
        """Return name, precision, recall, F1 and number of images of each class; 0 for division by zero."""
        scores = [
            metric(self.predictions, self.labels, self.num_classes, average="none")
            for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
        ]
        counts = self.confusion_matrix.sum(1).tolist()
        rows = zip(self.class_names, *scores, counts, strict=True)
        return [
            {"class": name, "precision": _rounded(p), "recall": _rounded(r), "f1": _rounded(f), "count": count}
            for name, p, r, f, count in rows
        ]

    def confused_pairs(self, most: int = 10) -> list[dict[str, Any]]:
        """Return the most frequent confusions, with their number and their fraction of the true class."""
        wrong = self.confusion_matrix.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
        pairs = [divmod(place, self.num_classes) for place in order]
        return [
            {
                "true": self.class_names[i],
                "predicted": self.class_names[j],
                "count": int(wrong[i, j]),
                "share": int(wrong[i, j]) / int(self.confusion_matrix[i].sum()),
            }
            for i, j in pairs
            if wrong[i, j]
        ]

    def confident_errors(self, most: int = 10) -> list[dict[str, Any]]:
        """Return the errors with the highest confidence; ``index`` is the index of the image in its source."""
        return [
            {
                "index": int(self.indices[place]),
                "true": self.class_names[self.labels[place]],
                "predicted": self.class_names[self.predictions[place]],
                "probability": _rounded(self.probabilities[place].max()),
            }
            for place in self.incorrect(most).tolist()
        ]

    def correct(self, most: int) -> Tensor:
        """Return the positions of up to ``most`` correct predictions, evenly spaced, int64."""
        places = (self.predictions == self.labels).nonzero().flatten()
        if len(places) <= most:
            return places
        return places[torch.linspace(0, len(places) - 1, most).round().long()]

    def incorrect(self, most: int) -> Tensor:
        """Return the positions of up to ``most`` errors in order of decreasing confidence, int64."""
        places = (self.predictions != self.labels).nonzero().flatten()
        confidence = self.probabilities.max(1).values[places]
        return places[confidence.argsort(descending=True, stable=True)][:most]


def _rounded(value: Tensor | float) -> float:
    """Convert to a Python float with the 7 significant digits of float32."""
    return float(f"{float(value):.7g}")
