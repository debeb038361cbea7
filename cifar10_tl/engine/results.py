"""Results of runs and evaluations: files, and text for the terminal."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cifar10_tl import __version__
from cifar10_tl.callbacks import MetricsLogger, Throughput
from cifar10_tl.callbacks.metrics_logger import VALIDATED
from cifar10_tl.config import PACKAGE_DIR
from cifar10_tl.config.resume import as_override, resume_command
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.batch import Split
from cifar10_tl.data.feature_cache import checksum
from cifar10_tl.engine.builder import plain
from cifar10_tl.engine.hardware import device_name
from cifar10_tl.engine.logistic_regression import CHECKPOINT
from cifar10_tl.engine.settings import MONITOR, flat
from cifar10_tl.io import atomic_write_text, write_csv
from cifar10_tl.metrics.calibration import NUM_BINS
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.plots.style import as_percent

REPORT = "report.html"


def begin(cfg: DictConfig) -> None:
    """Write the config to the run folder, and remove the results of an earlier training."""
    write_config(cfg)
    if not cfg.trainer.fast_dev_run:
        for name in ("results.json", "predictions.csv", REPORT):
            Path(cfg.paths.output_dir, name).unlink(missing_ok=True)


def write_config(cfg: DictConfig) -> None:
    """Write the config to the run folder."""
    if not cfg.trainer.fast_dev_run:
        config = OmegaConf.merge(cfg, {"resume": None, "trust": False})
        atomic_write_text(Path(cfg.paths.output_dir) / RUN_CONFIG, OmegaConf.to_yaml(config, resolve=True))


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return the content of results.json in a run folder, empty if there is none."""
    try:
        results = json.loads((run_dir / "results.json").read_text())
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def write_results(
    run_dir: Path, results: Mapping[str, Any], evaluation: Evaluation | None = None, split: Split | None = None
) -> None:
    """Write results.json, with null for NaN and infinity, and the predictions of an evaluation of ``split``.

    Earlier results and their report are removed first: they must not stand beside predictions of another checkpoint.
    """
    for name in (REPORT, "results.json"):
        (run_dir / name).unlink(missing_ok=True)
    if evaluation is not None and split is not None:
        write_predictions(run_dir / "predictions.csv", evaluation, split.paths_of(evaluation.indices))
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    atomic_write_text(run_dir / "results.json", json.dumps(finite, indent=2) + "\n")


def write_predictions(file: Path, evaluation: Evaluation, paths: Sequence[str | None]) -> None:
    """Write one row per image: index, true and predicted label, its probability, one column per class, and its path."""
    names = evaluation.class_names
    columns = [column.tolist() for column in (evaluation.indices, evaluation.labels, evaluation.predictions)]
    probabilities = map(Tensor.tolist, evaluation.probabilities)
    rows = (
        [index, names[true], names[predicted], f"{row[predicted]:.6g}", *(f"{p:.6g}" for p in row), path]
        for index, true, predicted, row, path in zip(*columns, probabilities, paths, strict=True)
    )
    write_csv(file, ["index", "true_label", "predicted_label", "probability", *names, "path"], rows)


def environment(device: torch.device, num_devices: int, precision: str) -> dict[str, Any]:
    """Return the versions, hardware and commit that a result was obtained with."""
    packages = ("torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
    return {
        "versions": {
            "cifar10_tl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{p: version(p) for p in packages},
        },
        "device": device_name(device),
        "devices": num_devices,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files were changed; None for an installed package."""
    command = ["git", "--git-dir=.git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=PACKAGE_DIR.parent, check=True, capture_output=True, text=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe(results: Mapping[str, Any], run_dir: Path) -> str:
    """Return the report of an evaluation for the terminal."""
    scores = results[results["split"]]
    parts = [
        f"  {results['checkpoint']}, epoch {results['epoch']}, {scores['count']} {results['split']} images",
        _score_table(scores, results.get("tta")),
        _class_table(scores["per_class"]),
    ]
    if scores["confused_pairs"]:
        rows = [[_confusion(p), str(p["count"]), as_percent(p["share"])] for p in scores["confused_pairs"][:5]]
        parts.append(text_table(["most frequent confusions", "images", "of the class"], rows))
    if scores["confident_errors"]:
        errors = [(e, e["path"] or str(e["index"])) for e in scores["confident_errors"][:5]]
        rows = [[_confusion(error), image, as_percent(error["probability"])] for error, image in errors]
        parts.append(text_table(["most confident errors", "image", "confidence"], rows))
    if people := results.get("human_labels"):
        parts.append(
            f"  human labels: agreement with the majority {people['agreement']:.2%}, cross-entropy "
            f"{people['cross_entropy']:.4f} (minimum {people['lowest_possible']:.4f})"
        )
    for key in ("doubtful_labels", "near_duplicates", "probable_label_errors"):
        if found := results.get(key):
            accuracy = f"accuracy {found['acc_with']:.2%} with these images"
            without = "n/a" if found["acc_without"] is None else f"{found['acc_without']:.2%}"
            alone = f", {found['acc_on_doubtful']:.2%} on them alone" if key == "doubtful_labels" else " (a hint)"
            parts.append(f"  {found['count']} {key.replace('_', ' ')}: {accuracy}, {without} without{alone}")
    page = f"  report       {run_dir / REPORT}\n" if (run_dir / REPORT).is_file() else ""
    parts.append(
        f"{page}  figures      {run_dir / 'figures'}\n"
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'predictions.csv'}"
    )
    return "\n\n".join(["", *parts])


def _score_table(scores: Mapping[str, Any], views: Mapping[str, Any] | None) -> str:
    columns = {"uncalibrated": scores}
    if calibrated := scores.get("calibrated"):
        columns[f"temperature-scaled (val, {calibrated['temperature']:.3f})"] = calibrated
    if views is not None:
        columns[f"{views['name']}, {views['views']} views"] = views
    formats = {
        "accuracy": ("acc", ".2%"),
        "95% interval (Wilson)": ("acc_interval", ""),
        "top-2 accuracy": ("top2_acc", ".2%"),
        "balanced accuracy": ("balanced_acc", ".2%"),
        "macro F1": ("macro_f1", ".2%"),
        "loss (NLL)": ("nll", ".4f"),
        "Brier score": ("brier", ".4f"),
        f"calibration error ({NUM_BINS} bins)": ("ece", ".2%"),
    }
    shown = [(title, key, form) for title, (key, form) in formats.items() if key in scores]
    rows = [[title, *(formatted(column.get(key), form) for column in columns.values())] for title, key, form in shown]
    return text_table(["", *columns], rows)


def formatted(value: Any, form: str) -> str:
    """Return a value in a format such as ``.2%`` (see :func:`as_percent`), an interval for a list, nothing for None."""
    if isinstance(value, list):
        return f"{100 * value[0]:.2f} to {value[1]:.2%}"
    if value is None:
        return ""
    return as_percent(value, int(form[1])) if form.endswith("%") else format(value, form)


def _class_table(per_class: Sequence[Mapping[str, Any]], limit: int = 20) -> str:
    title, per_class = "class", [row for row in per_class if row["count"]]
    if len(per_class) > limit:
        title, per_class = f"{limit} classes with the lowest F1", sorted(per_class, key=lambda row: row["f1"])[:limit]
    scores = ("precision", "recall", "f1")
    rows = [[row["class"], *(as_percent(row[key]) for key in scores), str(row["count"])] for row in per_class]
    return text_table([title, "precision", "recall", "F1", "images"], rows)


def _confusion(error: Mapping[str, Any]) -> str:
    return f"{error['true']} -> {error['predicted']}"


def fit_results(
    cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, best_epoch: int | None, seconds: float
) -> dict[str, Any]:
    """Return the results of a fit that took ``seconds`` since this start of the run.

    Call it before ``trainer.test``, which restores the state of the callbacks.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    logger = next((c for c in callbacks if isinstance(c, MetricsLogger)), MetricsLogger())
    throughput = next((c for c in callbacks if isinstance(c, Throughput)), Throughput())
    best_row = next((row for row in logger.rows if row["epoch"] == best_epoch), {})
    return {
        "val": {name.removeprefix("val/"): best_row.get(name) for name in VALIDATED},
        "best_epoch": best_epoch,
        "epochs": trainer.fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
        "steps": trainer.global_step,
        "seconds": {"fit": throughput.earlier_seconds + seconds, "first_step": throughput.first_step_seconds},
        "images_per_second": throughput.images_per_second,
        "class_names": list(module.class_names),
        "config": plain(cfg),
        "environment": environment(trainer.strategy.root_device, trainer.world_size, trainer.precision),
    }


def test_results(cfg: DictConfig, module: LitClassifier, split: Split) -> dict[str, Any]:
    """Return the results of the test on ``split``, after checking that each of its images was counted once."""
    assert module.evaluation is not None
    count, is_limited = len(module.evaluation), cfg.trainer.limit_test_batches is not None or cfg.trainer.fast_dev_run
    if count != len(split) and not is_limited:
        raise RuntimeError(f"the test counted {count} of {len(split)} images")
    return {
        "test": all_metrics(module.evaluation, split),
        "confusion_matrix": module.evaluation.confusion_matrix.tolist(),
        "test_images": images_checksum(split),
    }


def all_metrics(evaluation: Evaluation, split: Split, temperature: float | None = None) -> dict[str, Any]:
    """Return all metrics of an evaluation of images in ``split``, and its calibration at ``temperature``."""
    errors = evaluation.incorrect(10)
    metrics = {
        **evaluation.scores(),
        "per_class": evaluation.per_class(),
        "confused_pairs": evaluation.confused_pairs(),
        "confident_errors": evaluation.rows(errors, split.paths_of(evaluation.indices[errors])),
    }
    if temperature is not None:
        scaled = evaluation.scaled(temperature)
        metrics["calibrated"] = {"temperature": temperature, "nll": scaled.loss, **scaled.calibration()}
    return metrics


def images_checksum(split: Split) -> str:
    """Return a checksum that distinguishes images with the same labels."""
    return checksum(b"", split.chunks())[:16]


def summary(results: Mapping[str, Any], run_dir: Path, best: Path | None) -> str:
    """Return the closing summary of a run: results, files and next commands."""
    lines, run_dir, best = [""], _relative(run_dir), best and _relative(best)
    if test := results.get("test"):
        interval = formatted(test["acc_interval"], "")
        lines.append(f"  test acc     {as_percent(test['acc'], 2)} (95% interval {interval}), {test['count']:,} images")
        if abs(test["balanced_acc"] - test["acc"]) > 1e-9:  # classes of unequal size
            lines.append(f"  balanced acc {as_percent(test['balanced_acc'], 2)}, the mean recall of the classes")
        for pair in test["confused_pairs"][:1]:
            share = f"{pair['count']} images, {as_percent(pair['share'])} of {pair['true']}"
            lines.append(f"  confusion    {_confusion(pair)} is the most frequent: {share}")
    if (val_acc := results["val"]["acc"]) is not None:
        monitor = flat(results["config"]).get(MONITOR)
        which = {"val/acc": "the best", None: "the last"}.get(monitor, f"the best by {monitor}")
        lines.append(f"  val acc      {as_percent(val_acc, 2)} in epoch {results['best_epoch']}, {which}")
    if probe := results.get("logistic_regression"):
        accuracies = [(split, as_percent(probe[split]["acc"], 2)) for split in ("val", "test") if split in probe]
        scores = ", ".join(f"{split} acc {percent}" for split, percent in accuracies)
        lines.append(f"  logistic regression (l2 {probe['l2']:.2g}): {scores}, in {CHECKPOINT}")
    for name, file in (("report", REPORT), ("figures", "figures"), ("numbers", "results.json")):
        if (run_dir / file).exists():
            lines.append(f"  {name:<12} {run_dir / file}")
    lines += [f"  trace        {path}, for https://ui.perfetto.dev" for path in sorted(run_dir.glob("*.pt.trace.json"))]
    return "\n".join([*lines, f"  checkpoint   {best or 'none'}", *_next_commands(results, run_dir, best)])


def _relative(path: Path) -> Path:
    """Return a path relative to the current folder if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _next_commands(results: Mapping[str, Any], run_dir: Path, best: Path | None) -> list[str]:
    """Return the commands that a person may want to type after a run."""
    commands, logdir, max_epochs = [], shlex.quote(str(run_dir)), results["config"]["trainer"]["max_epochs"]
    if any(run_dir.glob("events.out*")):
        commands.append(f"tensorboard --host localhost --logdir {logdir} --samples_per_plugin=images=1000")
    if best is not None:
        checkpoint = shlex.quote(as_override("checkpoint", str(best)))
        commands.append(f"python -m cifar10_tl.evaluate {checkpoint} report=full  # calibration, label errors")
    if results["epochs"] == max_epochs and not results["config"].get("budget"):  # else something else ended it
        commands.append(f"{resume_command(run_dir)} trainer.max_epochs={2 * max_epochs}  # train further")
    return ["  next commands", *(f"    {command}" for command in commands)] if commands else []


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an indented table with columns of equal width, the first one left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left-aligned, the others right-aligned."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
