"""Grad-CAM, nearest training images, near-duplicates and probable label errors: reasons for incorrect predictions."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from cifar10_tl.data.batch import Split
from cifar10_tl.engine.report import GALLERY, Gallery, Neighbors
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.metrics.ground_truth import accuracy_without
from cifar10_tl.metrics.neighbors import (
    DUPLICATE_CORRELATION,
    NUM_NEIGHBORS,
    nearest_neighbors,
    pixel_correlations,
    probable_label_errors,
)
from cifar10_tl.models.grad_cam import grad_cam
from cifar10_tl.models.lit_classifier import LitClassifier

TITLES = {
    "near_duplicates": (
        "Near-duplicates of training images",
        f"Pixels of one of the {NUM_NEIGHBORS} nearest training images correlate above {DUPLICATE_CORRELATION}. The "
        "network may have memorized the answer if it was trained on them. Not verified. The most similar first.",
    ),
    "probable_label_errors": (
        "Probable label errors",
        "The probability of the predicted class is at least its mean over the images with that label, "
        f"and all {NUM_NEIGHBORS} nearest training images have that class. Not verified. The most confident first. "
        "All of them count as errors, so accuracy without them can only be higher.",
    ),
}


def heatmaps(module: LitClassifier, trainer: pl.Trainer, images: Tensor, classes: Tensor) -> Tensor:
    """Return Grad-CAM in the precision and on the device of the trainer, see :func:`grad_cam`."""
    module.to(trainer.strategy.root_device)  # after a fit, Lightning moves it to the CPU
    with trainer.precision_plugin.forward_context():
        return grad_cam(module.network, images, classes)


def analyze(
    evaluation: Evaluation, split: Split, trained: Evaluation, train: Split
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare the images of an evaluation with the training images; both evaluations have features.

    Returns:
        Entries of results.json about near-duplicates and label errors, and arguments of ``write_report``.
    """
    assert evaluation.features is not None
    assert trained.features is not None
    positions, similarities = nearest_neighbors(evaluation.features, trained.features)
    evaluated = split.subset(split.positions_of(evaluation.indices))
    correlations, columns = pixel_correlations(evaluated, train, positions).max(1)
    num_copies = int((correlations > DUPLICATE_CORRELATION).sum())
    copies = correlations.argsort(descending=True, stable=True)[:num_copies]
    errors = probable_label_errors(evaluation, train.labels[positions])
    lists = {
        "near_duplicates": (copies, positions.gather(1, columns[:, None])[:, 0], correlations),
        "probable_label_errors": (errors, positions[:, 0], similarities[:, 0]),
    }
    found = {
        name: {
            **accuracy_without(evaluation, evaluation.indices[chosen]),
            "images": _rows(evaluation, split, chosen, train, nearest[chosen], similarity[chosen].tolist()),
        }
        for name, (chosen, nearest, similarity) in lists.items()
    }
    galleries = [Gallery(name, *TITLES[name], chosen[:GALLERY]) for name, (chosen, *_) in lists.items()]
    return found, {"neighbors": Neighbors(train, positions, similarities), "galleries": galleries}


def _rows(
    evaluation: Evaluation, split: Split, chosen: Tensor, train: Split, nearest: Tensor, similarities: list[float]
) -> list[dict[str, Any]]:
    """Return a row for each chosen image, with the training image beside it."""
    rows, nearest_indices = evaluation.rows(chosen, split.paths_of(evaluation.indices[chosen])), train.indices[nearest]
    columns = {
        "nearest_index": nearest_indices.tolist(),
        "nearest_path": train.paths_of(nearest_indices),
        "nearest_true": [evaluation.class_names[label] for label in train.labels[nearest]],
        "similarity": [round(similarity, 4) for similarity in similarities],
    }
    return [row | dict(zip(columns, cells, strict=True)) for row, *cells in zip(rows, *columns.values(), strict=True)]
