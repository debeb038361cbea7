"""Comparison of finished runs, from the files in their folders."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.results import read_results, text_table
from cifar10_tl.engine.settings import MONITOR, OF_THE_START, flat
from cifar10_tl.metrics.intervals import further_pairs, spread, wilson_interval

log = logging.getLogger(__name__)

#: Names, also earlier ones, of the callbacks that draw, measure or save; others may change a result.
OWN_CALLBACKS = (*yaml.safe_load((CONFIG_DIR / "callbacks" / "default.yaml").read_text()), "history", "progress")
#: Beginnings of the keys of settings that do not change a result.
WITHOUT_EFFECT = (
    *(*OF_THE_START, "paths", "logger", "test", "report", "imports", "checkpoint_every_n_steps"),
    *(*(f"callbacks.{name}" for name in OWN_CALLBACKS), "data.cache_dir", "trainer.enable_"),
)
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

#: The same for settings with several seeds. Differences are means over the seeds that both settings have.
SETTINGS_COLUMNS = {
    "settings": "",
    "seeds": "d",
    "mean test acc": ".2%",
    "standard deviation": ".2%",
    "pairs": "d",
    "vs. first": "+.2%",
    "95% low": "+.2%",
    "95% high": "+.2%",
    "further seeds": "d",
}


class Run(NamedTuple):
    """Test results of a run: true labels and rows of predictions.csv by image index, and indices of correct images."""

    folder: Path
    results: Mapping[str, Any]
    labels: Mapping[int, str]
    correct: set[int]
    predictions: Mapping[int, Mapping[str, str]]


#: Settings of an image folder that change the pixels of its images.
DECODING = ("native_size", "fit", "image_size", "augment.random_resized_crop")


def read_run(folder: Path) -> Run:
    """Read a run of the train or the evaluate command."""
    try:
        results = json.loads((folder / "results.json").read_text())
        with (folder / "predictions.csv").open(newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            # the first column of each name, but the last for the path: a class may have the same name
            columns = {name: header.index(name) for name in ("index", "true_label", "predicted_label")}
            columns |= {name: header.index(name) for name in ("probability",) if name in header}
            has_path = header[-1:] == ["path"]
            rows = ({name: row[i] for name, i in columns.items()} | {"path": row[-1] * has_path} for row in reader)
            predictions = {int(row["index"]): row for row in rows}
        labels = {index: row["true_label"] for index, row in predictions.items()}
        correct = {index for index, row in predictions.items() if row["predicted_label"] == labels[index]}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"compare={folder}: not the folder of a tested run or an evaluation: {error}") from error
    if not labels or not isinstance(results, dict) or not isinstance(results.get("test"), dict):
        raise UserError(f"compare={folder}: has no test results")
    if "tta" in results:
        log.warning("%s: compared without its test-time augmentation", folder)
    return Run(folder, results, labels, correct, predictions)


def compare_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the ``COLUMNS`` of each run, compared with the first run; None where there is no value."""
    first = runs[0]
    for run in runs[1:]:
        if run.labels != first.labels or not _have_same_images(run, first):
            raise UserError(f"{first.folder} and {run.folder} cannot be compared: they were tested on different images")
    return [_row(run, first) for run in runs]


def _have_same_images(*runs: Run) -> bool:
    if len({run.results.get("test_images") for run in runs} - {None}) <= 1:
        return True
    # the same files have other pixels if they were decoded at another size or crop
    files = [{index: row["path"] for index, row in run.predictions.items()} for run in runs]
    one, other = (flat(run.results.get("data") or run.results.get("config", {}).get("data", {})) for run in runs)
    same_files = all(files[0].values()) and files[0] == files[1] and one.get("root") == other.get("root")
    return same_files and any(one.get(key) != other.get(key) for key in DECODING)


def _row(run: Run, first: Run) -> dict[str, Any]:
    results, correct, count = run.results, len(run.correct), len(run.labels)
    row = [str(run.folder), correct / count, *wilson_interval(correct, count), results["test"].get("loss")]
    row += [results.get("val", {}).get("acc"), results.get("epochs"), results.get("seconds", {}).get("fit")]
    if run is not first:
        only_first, only_this = len(first.correct - run.correct), len(run.correct - first.correct)
        row += [(only_this - only_first) / count, only_first, only_this, mcnemar_p_value(only_first, only_this)]
        row += [_changes(settings_of(results), settings_of(first.results)) or None]
    return dict(zip_longest(COLUMNS, row))


def compare_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the ``SETTINGS_COLUMNS`` of each group of runs that differ in the seed alone; empty if there is none."""
    groups: dict[str, dict[Any, float]] = {}  # accuracies by the seed
    repeated: list[str] = []
    for run in runs:
        settings, seed = _without_seed(run.results)
        changes = _changes(settings, _without_seed(runs[0].results)[0]) or "the first"
        group = groups.setdefault(changes, {})
        repeated += [str(run.folder)] if seed in group else []
        group.setdefault(seed, len(run.correct) / len(run.labels))
    has_seeds = max(map(len, groups.values())) > 1
    if has_seeds and repeated:
        log.warning("omitted from the table of seeds (same settings and seed as another run): %s", ", ".join(repeated))
    return [_settings_row(*group, groups) for group in groups.items()] if has_seeds else []


def _settings_row(name: str, group: Mapping[Any, float], groups: Mapping[str, Mapping[Any, float]]) -> dict[str, Any]:
    first, found = groups["the first"], spread(list(group.values()))
    row: list[Any] = [name, found.n, found.mean, found.deviation]
    if group is not first and (pairs := [acc - first[seed] for seed, acc in group.items() if seed in first]):
        difference = spread(pairs)
        row += [difference.n, difference.mean, difference.low, difference.high, further_pairs(difference)]
    return dict(zip_longest(SETTINGS_COLUMNS, [None if value != value else value for value in row]))  # NaN


def _changes(settings: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    texts = {key: f"~{key}" for key in other} | {key: f"{key}={value}" for key, value in settings.items()}
    if settings.get("budget"):  # which chose the epochs
        texts.pop("trainer.max_epochs", None)
    return " ".join(text for key, text in texts.items() if settings.get(key) != other.get(key))


def _without_seed(results: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the settings without the seed, and the seed."""
    settings = settings_of(results)
    return settings, settings.pop("seed", None)


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the content of results.json depends on, with dotted keys.

    An evaluation has the settings of its run, and the name of the checkpoint unless it is the best one.
    """
    if "checkpoint" in results:
        checkpoint = Path(results["checkpoint"])
        training = read_results(checkpoint.resolve().parent.parent)
        if "epochs" not in training:
            return {"checkpoint": results["checkpoint"]}
        return settings_of(training) | ({} if checkpoint.name == "best.ckpt" else {"checkpoint": checkpoint.name})
    settings = flat(results.get("config", {})).items()
    return {key: value for key, value in settings if key == MONITOR or not key.startswith(WITHOUT_EFFECT)}


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, from the images that only one classifier labels correctly.

    Source: T. Dietterich, "Approximate statistical tests for comparing supervised classification learning algorithms"
    (1998), section 3.1.
    """
    n = only_first + only_second
    ks = range(1, min(only_first, only_second) + 1)
    binomials = accumulate(ks, lambda term, k: term * (n - k + 1) // k, initial=1)  # exact as integers
    return min(1.0, 2 * sum(binomials) / 2**n)


def format_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> list[list[str]]:
    """Return the rows as text, with the formats of ``columns``."""
    return [["" if row[name] is None else format(row[name], form) for name, form in columns.items()] for row in rows]


def describe_sweep(folder: Path) -> str:
    """Return a table of the test accuracies in a sweep over seeds, with their mean, standard deviation and interval."""
    results = {str(file.parent): json.loads(file.read_text()) for file in sorted(folder.glob("*/results.json"))}
    tested = sorted((r["config"]["seed"], run, r["test"]["acc"]) for run, r in results.items() if "test" in r)
    if not tested:
        raise UserError(f"{folder}: has no run with a test result")
    first, *others = [_without_seed(r)[0] for r in results.values() if "test" in r]
    if changes := next(filter(None, (_changes(settings, first) for settings in others)), None):
        raise UserError(f"{folder}: its runs differ in more than the seed ({changes}); use evaluate compare=RUN,RUN")
    rows = [[run, str(seed), f"{acc:.2%}"] for seed, run, acc in tested]
    found = spread([acc for _, _, acc in tested])
    summary = f"{found.n} run{'s' * (found.n > 1)}: mean test acc {found.mean:.2%}"
    if found.n > 1:
        summary += f", standard deviation {100 * found.deviation:.2f} points"
        summary += f", 95% interval {100 * found.low:.2f} to {found.high:.2%} (Student's t)"
    return f"{text_table(['run', 'seed', 'test acc'], rows)}\n\n  {summary}"
