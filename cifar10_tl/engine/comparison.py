"""Finished runs side by side, read from their folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.results import markdown_table, text_table
from cifar10_tl.io import csv_text
from cifar10_tl.metrics.intervals import spread, wilson_interval

#: Of no interest in a comparison of settings: where things lie, and what is drawn and logged.
_LEFT_OUT = ("paths", "callbacks", "logger", "resume", "test")


@dataclass(frozen=True)
class Run:
    """What a run left of its test.

    Attributes:
        folder: of the run.
        results: its results.json.
        predictions: for each image's index its true and its predicted label.
    """

    folder: Path
    results: Mapping[str, Any]
    predictions: Mapping[int, tuple[str, str]]

    @property
    def right(self) -> set[int]:
        """The indices of the images that were predicted rightly."""
        return {index for index, (true, predicted) in self.predictions.items() if true == predicted}

    @property
    def labels(self) -> dict[int, str]:
        """For each image's index its true label."""
        return {index: true for index, (true, _) in self.predictions.items()}


def read_run(folder: Path) -> Run:
    """The run in ``folder``, of the train or the evaluate command.

    Raises:
        UserError: no run lies there, or it was not tested, or its files are broken.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        with (folder / "predictions.csv").open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        predictions = {int(row[0]): (row[1], row[2]) for row in rows}
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: {Path(error.filename).name} is missing; give the folder of a tested run or of an evaluation"
        ) from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{folder}: results.json or predictions.csv is broken: {error}") from error
    if not predictions or not isinstance(results, dict) or not isinstance(results.get("test"), dict):
        raise UserError(f"{folder}: holds no result of test images")
    return Run(folder, results, predictions)


class McNemar:
    """McNemar's exact test of two classifiers on the same images, two-sided.

    Only images on which one is right and the other is not can tell the two apart; were both equally good, each of
    these would be a toss of a coin. Source: Q. McNemar, Psychometrika 12 (1947); T. Dietterich, "Approximate
    statistical tests for comparing supervised classification learning algorithms" (1998), section 3.1.

    Attributes:
        only_first: images that only the first has right.
        only_second: images that only the second has right.
        p_value: the chance of so uneven a split, or a more uneven one, among equals.
    """

    def __init__(self, only_first: int, only_second: int) -> None:
        self.only_first, self.only_second = only_first, only_second
        n, fewer = only_first + only_second, min(only_first, only_second)
        tail = term = 1  # binomial coefficients, as whole numbers: exact for any n
        for k in range(1, fewer + 1):
            term = term * (n - k + 1) // k
            tail += term
        self.p_value = min(1.0, 2 * tail / 2**n)


HEADER = (
    "run",
    "test acc",
    "95 % interval",
    "test loss",
    "val acc",
    "epochs",
    "fit seconds",
    "to the first",
    "only first right",
    "only this right",
    "McNemar p",
    "settings unlike the first",
)


@dataclass(frozen=True)
class Comparison:
    """Runs on the same test images, each against the first.

    Raises:
        UserError: the runs were tested on other images, or with other labels.
    """

    runs: Sequence[Run]

    def __post_init__(self) -> None:
        first = self.runs[0]
        for run in self.runs[1:]:
            if run.labels != first.labels:
                raise UserError(
                    f"{first.folder} and {run.folder} were tested on different images "
                    f"({len(first.labels)} and {len(run.labels)}): they cannot be compared"
                )

    def rows(self) -> list[list[Any]]:
        """The values under ``HEADER``, a row a run; None where there is none."""
        return [self._row(run) for run in self.runs]

    def _row(self, run: Run) -> list[Any]:
        first, results = self.runs[0], run.results
        count, right = len(run.predictions), len(run.right)
        row = [
            str(run.folder),
            right / count,
            wilson_interval(right, count),
            results["test"].get("loss"),
            results.get("val", {}).get("acc"),
            results.get("epochs"),
            results.get("seconds", {}).get("fit"),
        ]
        if run is first:
            return [*row, None, None, None, None, ""]
        test = McNemar(len(first.right - run.right), len(run.right - first.right))
        return [
            *row,
            (right - len(first.right)) / count,
            test.only_first,
            test.only_second,
            test.p_value,
            _unlike(results, first.results),
        ]

    def csv(self) -> str:
        """The table with all digits; the interval as two columns."""
        header = [*HEADER[:2], "interval low", "interval high", *HEADER[3:]]
        return csv_text(header, ([*row[:2], *row[2], *row[3:]] for row in self.rows()))

    def markdown(self) -> str:
        """The table to put into a report."""
        return markdown_table(HEADER, map(_readable, self.rows()))

    def text(self) -> str:
        """The table for the terminal; the settings, which may be long, below it."""
        rows = [_readable(row) for row in self.rows()]
        notes = [f"  {row[0]}: {row[-1]}" for row in rows if row[-1]]
        table = text_table(HEADER[:-1], [row[:-1] for row in rows])
        return "\n".join([table, *(["", "  settings unlike the first:", *notes] if notes else [])])


def _readable(row: Sequence[Any]) -> list[str]:
    folder, acc, (low, high), loss, val_acc, epochs, seconds, gain, only_first, only_this, p_value, unlike = row
    return [
        folder,
        f"{acc:.2%}",
        f"{100 * low:.2f} to {high:.2%}",
        _shown(loss, ".4f"),
        _shown(val_acc, ".2%"),
        _shown(epochs, "d"),
        _shown(seconds, ".0f"),
        _shown(gain, "+.2%"),
        _shown(only_first, "d"),
        _shown(only_this, "d"),
        "<0.0001" if p_value is not None and p_value < 0.0001 else _shown(p_value, ".4f"),
        unlike,
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _unlike(results: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The settings in which two runs differ, as this one has them."""
    own, other = _settings(results), _settings(first)
    return " ".join(f"{key}={value}" for key, value in own.items() if key not in other or other[key] != value)


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    from cifar10_tl.engine.results import flat  # here, for it brings torch along, and a sweep is described without

    if "checkpoint" in results:  # an evaluation: what it was trained with stands in its run
        return {"checkpoint": results["checkpoint"]}
    return flat({key: value for key, value in results.get("config", {}).items() if key not in _LEFT_OUT})


def describe_sweep(folder: Path) -> str:
    """Test accuracies of the runs in a sweep's folder, their mean, deviation and interval, as lines of text.

    Raises:
        UserError: none of its folders holds a tested run.
    """
    files = sorted(folder.glob("*/results.json"), key=lambda file: (len(file.parent.name), file.parent.name))
    results = [json.loads(file.read_text()) for file in files]
    tested = [(file.parent, r) for file, r in zip(files, results, strict=True) if "test" in r]
    if not tested:
        raise UserError(f"{folder}: no run with a test result lies there")
    rows = [[str(run), str(r["config"]["seed"]), f"{r['test']['acc']:.2%}"] for run, r in tested]
    of = spread([r["test"]["acc"] for _, r in tested])
    interval = "" if math.isnan(of.low) else f", 95 % interval {100 * of.low:.2f} to {of.high:.2%} (Student's t)"
    deviation = "" if math.isnan(of.deviation) else f", standard deviation {100 * of.deviation:.2f} points"
    table = text_table(["run", "seed", "test acc"], rows)
    runs = "run" if of.n == 1 else "runs"
    return f"{table}\n\n  {of.n} {runs}: mean test acc {of.mean:.2%}{deviation}{interval}"
