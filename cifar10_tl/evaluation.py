"""Everything that is read from the logits of a pass over val or test. Knows no Lightning and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


@dataclass(frozen=True)
class Evaluation:
    """The outcome for N images and K classes, in the order of the images' indices.

    Attributes:
        logits: float32 [N, K].
        labels: int64 [N], the true classes.
        indices: int64 [N], rising: the place of each image in its source.
        class_names: of the K classes.
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, indices: Tensor, class_names: Sequence[str]) -> Evaluation:
        """From outputs in any order.

        Raises:
            ValueError: an image is there twice, or the lengths differ.
        """
        if not len(logits) == len(labels) == len(indices):
            raise ValueError(f"{len(logits)} logits, {len(labels)} labels and {len(indices)} indices")
        order = indices.argsort()
        if (indices[order].diff() == 0).any():
            raise ValueError("an image was evaluated twice")
        return cls(logits[order], labels[order], indices[order], tuple(class_names))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def probabilities(self) -> Tensor:
        """float32 [N, K], rows sum to one."""
        return self.logits.softmax(1)

    @cached_property
    def predictions(self) -> Tensor:
        """int64 [N], the class of the largest logit."""
        return self.logits.argmax(1)

    @cached_property
    def accuracy(self) -> float:
        """Share of images whose prediction is right; NaN without images."""
        return float((self.predictions == self.labels).double().mean())

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy in nats; NaN without images."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @cached_property
    def confusion_matrix(self) -> Tensor:
        """int64 [K, K]: entry (i, j) counts images of class i that were predicted as j."""
        return multiclass_confusion_matrix(self.logits, self.labels, num_classes=len(self.class_names))

    def metrics(self) -> dict[str, float]:
        """Accuracy, loss and the number of images."""
        return {"acc": self.accuracy, "loss": self.loss, "count": len(self)}

    def correct(self, most: int) -> Tensor:
        """Places of up to ``most`` images predicted rightly, spread evenly over the images (int64)."""
        places = (self.predictions == self.labels).nonzero().flatten()
        if len(places) <= most:
            return places
        return places[torch.linspace(0, len(places) - 1, most).round().long()]

    def mistakes(self, most: int) -> Tensor:
        """Places of up to ``most`` images predicted wrongly, the most confident mistakes first (int64)."""
        places = (self.predictions != self.labels).nonzero().flatten()
        confidence = self.probabilities.max(1).values[places]
        return places[confidence.argsort(descending=True, stable=True)][:most]
