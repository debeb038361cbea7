"""The readable part of an evaluation's results, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar10_tl.calibration import NUM_BINS
from cifar10_tl.files import atomic_write_text
from cifar10_tl.tables import csv_text, text_table

Results = Mapping[str, Any]
_MOST_CLASSES = 20  # in the table; all are in results.json


def describe(results: Results, run_dir: Path) -> str:
    """What an evaluation found, and where it lies."""
    scores = results[results["split"]]
    parts = [
        f"  {results['checkpoint']}, epoch {results['epoch']}, on {scores['count']} images of {results['split']}",
        _scores(scores, results.get("tta")),
        _classes(scores["per_class"]),
        _pairs(scores["confused_pairs"]),
        _mistakes(scores["confident_mistakes"]),
    ]
    parts += [_corruption(results["corruption"])] if "corruption" in results else []
    parts += [_human(results["human_labels"])] if "human_labels" in results else []
    parts += [_doubtful(results["doubtful_labels"])] if "doubtful_labels" in results else []
    parts.append(
        f"  figures      {run_dir / 'figures'}\n"
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'predictions.csv'}"
    )
    return "\n\n".join(["", *(part for part in parts if part)])


def write_corruption(path: Path, corruption: Mapping[str, Sequence[Results]]) -> None:
    """Write a row for each kind and severity."""
    columns = ("severity", "acc", "loss", "count")
    rows = [[kind, *(row[key] for key in columns)] for kind, outcomes in corruption.items() for row in outcomes]
    atomic_write_text(path, csv_text(["corruption", *columns], rows))


def _scores(scores: Results, views: Results | None) -> str:
    """The numbers as they are, at the temperature (which changes no prediction), and averaged over views."""
    calibrated = scores["calibrated"]
    header = ["", "as it is", f"temperature {calibrated['temperature']:.3f}"]
    columns: list[Results] = [scores, calibrated]
    if views is not None:
        header.append(f"{views['name']}, {views['views']} views")
        columns.append(views)
    lines = {
        "accuracy": ("acc", ".2%"),
        "95 % interval (Wilson)": ("acc_interval", ""),
        "top-2 accuracy": ("top2_acc", ".2%"),
        "macro F1": ("macro_f1", ".2%"),
        "loss (NLL)": ("nll", ".4f"),
        "Brier score": ("brier", ".4f"),
        f"calibration error ({NUM_BINS} bins)": ("ece", ".2%"),
    }
    rows = [[title, *(_cell(column.get(key), form) for column in columns)] for title, (key, form) in lines.items()]
    return text_table(header, rows)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return f"{100 * value[0]:.2f} to {value[1]:.2%}" if isinstance(value, list) else format(value, form)


def _classes(per_class: Sequence[Results]) -> str:
    shown = (
        sorted(per_class, key=lambda row: row["f1"])[:_MOST_CLASSES] if len(per_class) > _MOST_CLASSES else per_class
    )
    rows = [
        [row["class"], *(f"{row[k]:.1%}" for k in ("precision", "recall", "f1")), str(row["count"])] for row in shown
    ]
    title = f"the {len(shown)} classes with the lowest F1" if len(shown) < len(per_class) else "class"
    return text_table([title, "precision", "recall", "F1", "images"], rows)


def _pairs(pairs: Sequence[Results]) -> str:
    rows = [[f"{p['true']} taken for {p['predicted']}", str(p["count"]), f"{p['share']:.1%}"] for p in pairs[:5]]
    return text_table(["most confused", "images", "of the class"], rows) if rows else ""


def _mistakes(mistakes: Sequence[Results]) -> str:
    rows = [
        [f"{m['true']} taken for {m['predicted']}", str(m["index"]), f"{m['probability']:.2%}"] for m in mistakes[:5]
    ]
    return text_table(["most confident mistakes", "index", "confidence"], rows) if rows else ""


def _corruption(corruption: Mapping[str, Sequence[Results]]) -> str:
    severities = [str(row["severity"]) for row in next(iter(corruption.values()))]
    rows = [[kind, *(f"{row['acc']:.2%}" for row in outcomes)] for kind, outcomes in corruption.items()]
    return text_table(["accuracy at severity", *severities], rows)


def _human(human: Results) -> str:
    return (
        f"  people: the network predicts what most of them chose for {human['agreement']:.2%} of the images; "
        f"cross-entropy {human['cross_entropy']:.4f} (at best {human['lowest_possible']:.4f})"
    )


def _doubtful(doubtful: Results) -> str:
    without = "n/a" if doubtful["acc_without"] is None else f"{doubtful['acc_without']:.2%}"
    return (
        f"  {doubtful['count']} doubtful labels: accuracy {doubtful['acc_with']:.2%} with these images, "
        f"{without} without, {doubtful['acc_on_doubtful']:.2%} on them alone"
    )
