"""What runs and evaluations leave for programs to read, and where a result came from."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch.utils.tensorboard.summary import hparams

from cifar10_tl import __version__
from cifar10_tl.callbacks import MetricsLogger, Throughput
from cifar10_tl.callbacks.training_figures import tensorboard_writers
from cifar10_tl.config.run_dir import PACKAGE_DIR
from cifar10_tl.engine.builder import plain
from cifar10_tl.engine.checkpoints import read_checkpoint
from cifar10_tl.io import atomic_write_text, csv_text
from cifar10_tl.metrics.calibration import NUM_BINS
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.lit_classifier import LitClassifier


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as standard JSON: what is no finite number becomes null."""
    atomic_write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Write a row an image: its index, true and predicted label, the probability of that, and one column a class."""
    names = evaluation.class_names
    columns = (evaluation.indices, evaluation.labels, evaluation.predictions, evaluation.probabilities)
    rows = (
        [index, names[true], names[predicted], f"{row[predicted]:.6g}", *(f"{p:.6g}" for p in row)]
        for index, true, predicted, row in zip(*(column.tolist() for column in columns), strict=True)
    )
    atomic_write_text(path, csv_text(["index", "true_label", "predicted_label", "probability", *names], rows))


def environment(device: torch.device, num_devices: int, precision: str) -> dict[str, Any]:
    """Versions, hardware and commit that a result came from."""
    packages = ("torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
    return {
        "versions": {
            "cifar10_tl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{p: version(p) for p in packages},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(device),
        "devices": num_devices,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git": _git_commit(),
    }


def _processor(device: torch.device) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().split("model name")[1:2] if cpuinfo.is_file() else []
    name = names[0].split("\n")[0].lstrip("\t :") if names else platform.processor()
    return f"{device.type} ({name})"


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from, with "-dirty" where files differ; None outside of one."""
    if not (PACKAGE_DIR.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            cwd=PACKAGE_DIR.parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float | int]:
    """A nested config as one level of dotted names, of values that TensorBoard's HPARAMS takes."""
    found: dict[str, bool | str | float | int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else str(value)
    return found


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
        _mistakes(scores["confident_errors"]),
    ]
    parts += [_corruption(results["corruption"])] if "corruption" in results else []
    parts += [_human(results["human_labels"])] if "human_labels" in results else []
    parts += [_doubtful(results["doubtful_labels"])] if "doubtful_labels" in results else []
    parts.append(
        f"  figures      {run_dir / 'figures'}\n"
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'predictions.csv'}"
    )
    return "\n\n".join(["", *(part for part in parts if part)])


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


def results_of_fit(
    cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, best: Path | None, seconds: float
) -> dict[str, Any]:
    """What a fit comes to. To be called right behind it: a test restores the callbacks' state of the best epoch.

    Args:
        cfg: of the train command.
        module: that learned.
        trainer: that fitted it.
        best: the best checkpoint.
        seconds: that the fit took, in this start of the run.
    """
    history = next((c for c in trainer.callbacks if isinstance(c, MetricsLogger)), MetricsLogger())  # type: ignore[attr-defined]
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), Throughput())  # type: ignore[attr-defined]
    best_epoch = read_checkpoint(best)["epoch"] if best else None
    best_row = next((row for row in history.rows if row["epoch"] == best_epoch), {})
    return {
        "val": {key: best_row.get(f"val/{key}") for key in ("acc", "loss", "count")},
        "best_epoch": best_epoch,
        "epochs": trainer.current_epoch,
        "seconds": {"fit": throughput.earlier_seconds + seconds, "first_step": throughput.first_step_seconds},
        "images_per_second": throughput.images_per_second,
        "class_names": list(module.class_names),
        "config": plain(cfg),
        "environment": environment(
            trainer.strategy.root_device, trainer.world_size, str(trainer.precision_plugin.precision)
        ),
    }


def results_of_test(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> dict[str, Any]:
    """What a test comes to.

    Raises:
        RuntimeError: it left out images, or counted some twice; that must not pass for a result.
    """
    assert module.evaluation is not None
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    count, expected = len(module.evaluation), len(datamodule.splits["test"])
    if cfg.trainer.limit_test_batches is None and count != expected:
        raise RuntimeError(f"the test saw {count} of {expected} images")
    return {"test": module.evaluation.metrics(), "confusion_matrix": module.evaluation.confusion_matrix.tolist()}


def write_results(run_dir: Path, results: Mapping[str, Any], module: LitClassifier, trainer: pl.Trainer) -> None:
    """Write results.json, predictions.csv and the HPARAMS. To be called on rank zero alone."""
    log_hparams(trainer, results)
    write_json(run_dir / "results.json", results)
    if "test" in results:
        assert module.evaluation is not None
        write_predictions(run_dir / "predictions.csv", module.evaluation)


def log_hparams(trainer: pl.Trainer, results: Mapping[str, Any]) -> None:
    """Write TensorBoard's HPARAMS: the settings of the run and its test metrics."""
    metrics = {f"test/{k}": v for k, v in results.get("test", {}).items() if k in ("acc", "loss")}
    groups = ("seed", "data", "model", "optimizer", "scheduler", "trainer", "init_from")
    settings = flat({k: v for k, v in results["config"].items() if k in groups})
    for writer in tensorboard_writers(trainer):
        for part in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            writer.add_summary(part)


def summary(results: Mapping[str, Any], run_dir: Path, best: Path | None) -> str:
    """The closing words of a run."""
    val, test = results["val"], results.get("test")
    validated = f"best epoch {results['best_epoch']}, val acc {val['acc']:.2%}" if val["acc"] is not None else None
    lines = ["", f"  {validated or 'nothing was validated'}"]
    if test:
        lines.append(f"  test acc {test['acc']:.2%}, loss {test['loss']:.4f}, on {test['count']} images")
    lines += [
        f"  figures      {run_dir / 'figures'}",
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'metrics.csv'}",
        f"  checkpoint   {best or 'none'}",
        f"  TensorBoard  tensorboard --host localhost --logdir {run_dir}",
    ]
    return "\n".join(lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Columns of equal width, the first aligned to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(indent + "  ".join(cells).rstrip() for cells in aligned)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As GitHub reads it, the first column aligned to the left, the others to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
