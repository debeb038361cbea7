"""The page report.html of a comparison: tables, curves, and the images that only one of two runs gets correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch

from cifar10_tl.data.batch import Split
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.comparison import COLUMNS, SETTINGS_COLUMNS, Run, format_rows
from cifar10_tl.engine.report import GALLERY, Sprite, curves, render, training_dir
from cifar10_tl.engine.results import REPORT, images_checksum
from cifar10_tl.io import atomic_write_text


def write_comparison(
    run_dir: Path, runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page of ``runs``, given their rows of ``COLUMNS`` and those of ``SETTINGS_COLUMNS``."""
    named = dict(zip([*ascii_uppercase, *map(str, range(27, len(runs) + 1))], runs, strict=False))
    first, *others = named
    (split, problem), sprite, limit = load_images(runs), Sprite(), max(6, GALLERY // len(others))
    sections = []
    for a, b in [pair for other in others for pair in ((first, other), (other, first))]:
        found = only_correct(named[a], named[b])
        cards = [card(index, named[a], named[b], split, sprite) for index in found[:limit]]
        sections.append({"correct": a, "incorrect": b, "count": len(found), "cards": cards})
    files = {name: training_dir(run.folder, run.results) / "metrics.csv" for name, run in named.items()}
    page = {
        "columns": [*COLUMNS],
        "runs": dict(zip(named, format_rows(rows), strict=True)),
        "settings_columns": [*SETTINGS_COLUMNS],
        "settings": format_rows(settings, SETTINGS_COLUMNS),
        "charts": curves({name: (file, "val") for name, file in files.items()}),
        "sections": sections,
        "problem": problem,
        "sprites": {"t": sprite},
        "folder": run_dir,
    }
    atomic_write_text(run_dir / REPORT, render("comparison.html.jinja", page))


def load_images(runs: Sequence[Run]) -> tuple[Split | None, str]:
    """Return the test images, from the data of the first run that still has them, or None and the reason."""
    problem = ""
    for run in runs:
        try:
            options = dict(run.results.get("data") or run.results["config"]["data"])
            options.pop("cache_features", None)  # see build_feature_cache
            datamodule = CIFAR10DataModule(**options)
            datamodule.setup()
            split = datamodule.splits["test"]
            if images_checksum(split) == run.results.get("test_images"):
                return split, ""
            problem = "the images are not those of the test"
        except Exception as error:  # a missing folder, file or setting
            problem = " ".join(f"{type(error).__name__}: {error}".split())
    return None, problem


def only_correct(run: Run, other: Run) -> list[int]:
    """Return the images that ``other`` alone classifies incorrectly, its most confident errors first."""
    confidence = {i: float(other.predictions[i].get("probability", 0)) for i in run.correct - other.correct}
    return sorted(confidence, key=lambda index: (-confidence[index], index))


def card(index: int, run: Run, other: Run, split: Split | None, sprite: Sprite) -> dict[str, Any]:
    """Return the template's entry for an image that ``other`` classifies incorrectly."""
    place = None if split is None else sprite.place(index, split.by_index(torch.tensor([index]))[0])
    predictions = [of.predictions[index] for of in (run, other)]
    return {"index": index, "place": place, "path": predictions[1].get("path"), "predictions": predictions}
