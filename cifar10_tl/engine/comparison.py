"""Comparison of finished runs, from the files in their folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.results import flat, text_table
from cifar10_tl.metrics.intervals import spread, wilson_interval

#: Columns of the table and their number formats.
COLUMNS = {
    "run": "",
    "test acc": ".2%",
    "95% low": ".2%",
    "95% high": ".2%",
    "test loss": ".4f",
    "val acc": ".2%",
    "epochs": "d",
    "fit seconds": ".0f",
    "vs. first": "+.2%",
    "only first correct": "d",
    "only this correct": "d",
    "McNemar p": ".3g",
    "different settings": "",
}


class Run(NamedTuple):
    """Test of a run: true labels by image index, and the indices of the images that are classified correctly."""

    folder: Path
    results: Mapping[str, Any]
    labels: Mapping[int, str]
    correct: set[int]


def read_run(folder: Path) -> Run:
    """Read a run of the train or the evaluate command.

    Raises:
        UserError: The folder holds no tested run, or its files are broken.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        with (folder / "predictions.csv").open(newline="") as file:
            rows = [(int(row[0]), row[1], row[2]) for row in list(csv.reader(file))[1:]]
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise UserError(f"compare={folder}: has no {name}; give folders of tested runs or evaluations") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"compare={folder}: results.json or predictions.csv is broken: {error}") from error
    if not rows or not isinstance(results, dict) or not isinstance(results.get("test"), dict):
        raise UserError(f"compare={folder}: has no test results")
    correct = {index for index, true, predicted in rows if true == predicted}
    return Run(folder, results, {index: true for index, true, _ in rows}, correct)


def compare_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run its value in each of the ``COLUMNS`` (None: no value), compared with the first run.

    Raises:
        UserError: The runs were tested on different images.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.labels != first.labels or len({r.results.get("test_images") for r in (first, run)} - {None}) > 1:
            raise UserError(f"{first.folder} and {run.folder} cannot be compared: they were tested on different images")
    return [_row(run, first) for run in runs]


def _row(run: Run, first: Run) -> dict[str, Any]:
    results, correct, count = run.results, len(run.correct), len(run.labels)
    val_acc, fit_seconds = results.get("val", {}).get("acc"), results.get("seconds", {}).get("fit")
    loss, epochs = results["test"].get("loss"), results.get("epochs")
    row = [str(run.folder), correct / count, *wilson_interval(correct, count), loss, val_acc, epochs, fit_seconds]
    if run is first:
        return dict(zip(COLUMNS, [*row, *[None] * 5], strict=True))
    only_first, only_this = len(first.correct - run.correct), len(run.correct - first.correct)
    own, other = _settings(results), _settings(first.results)
    settings = " ".join(f"{key}={value}" for key, value in own.items() if key not in other or other[key] != value)
    p_value = mcnemar_p_value(only_first, only_this)
    row += [(only_this - only_first) / count, only_first, only_this, p_value, settings or None]
    return dict(zip(COLUMNS, row, strict=True))


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    if "checkpoint" in results:  # of the evaluate command
        return {"checkpoint": results["checkpoint"]}
    ignored = ("paths", "callbacks", "logger", "resume", "test")  # they do not change a result
    return flat({key: value for key, value in results.get("config", {}).items() if key not in ignored})


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test of two classifiers on the same images.

    Source: T. Dietterich, "Approximate statistical tests for comparing supervised classification learning algorithms"
    (1998), section 3.1.
    ``only_first`` and ``only_second`` count the images that only one of them classifies correctly.
    """
    n = only_first + only_second
    tail = term = 1  # sums of binomial coefficients, exact as integers
    for k in range(1, min(only_first, only_second) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows as text, with the formats of ``COLUMNS``."""
    return [["" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()] for row in rows]


def describe_sweep(folder: Path) -> str:
    """Return a table of the test accuracies in a sweep, with their mean, standard deviation and interval.

    Raises:
        UserError: The folder holds no tested run.
    """
    files = sorted(folder.glob("*/results.json"), key=lambda file: (len(file.parent.name), file.parent.name))
    tested = {str(file.parent): r for file in files if "test" in (r := json.loads(file.read_text()))}
    if not tested:
        raise UserError(f"{folder}: has no run with a test result")
    rows = [[run, str(r["config"]["seed"]), f"{r['test']['acc']:.2%}"] for run, r in tested.items()]
    found = spread([r["test"]["acc"] for r in tested.values()])
    summary = f"{found.n} run{'s' * (found.n > 1)}: mean test acc {found.mean:.2%}"
    if not math.isnan(found.low):
        summary += f", standard deviation {100 * found.deviation:.2f} points"
        summary += f", 95% interval {100 * found.low:.2f} to {found.high:.2%} (Student's t)"
    return f"{text_table(['run', 'seed', 'test acc'], rows)}\n\n  {summary}"
