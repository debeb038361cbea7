"""Evaluate a checkpoint, or compare the tests of several runs.

python -m cifar10_tl.evaluate checkpoint=outputs/runs/<stamp>/checkpoints/best.ckpt
python -m cifar10_tl.evaluate checkpoint=best.ckpt data=folder data.root=DIR tta=flip corrupt=all
python -m cifar10_tl.evaluate compare=outputs/runs/<one>,outputs/runs/<other>
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.io import atomic_write, atomic_write_text, csv_text

if TYPE_CHECKING:  # slow to import, therefore imported by the functions that need them
    from torch import Tensor

    from cifar10_tl.data.batch import Split
    from cifar10_tl.metrics.evaluation import Evaluation

log = logging.getLogger(__name__)

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a checkpoint or compare runs, and write the results to ``cfg.paths.output_dir``.

    Returns:
        The content of results.json, or a table of runs under the key "runs".

    Raises:
        UserError: A file is missing or broken, or a setting does not fit the checkpoint or its data.
    """
    if (Path(cfg.paths.output_dir) / RUN_CONFIG).is_file():
        raise UserError(f"paths.output_dir={cfg.paths.output_dir}: contains a training run; choose another folder")
    return compare(cfg) if cfg.compare else evaluate_checkpoint(cfg)


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Compute metrics, figures and predictions of ``cfg.checkpoint``; see :func:`evaluate`."""
    from cifar10_tl.engine.checkpoints import restore
    from cifar10_tl.engine.evaluator import Evaluator, build_datamodule, build_trainer
    from cifar10_tl.engine.hardware import quiet_libraries
    from cifar10_tl.engine.results import describe, environment, write_json, write_predictions
    from cifar10_tl.metrics.calibration import fit_temperature
    from cifar10_tl.metrics.ground_truth import accuracy_without, compare_with_people
    from cifar10_tl.plots import evaluation_figures, to_png

    quiet_libraries()
    start = time.perf_counter()
    module = restore(Path(cfg.checkpoint))
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg, module)
    evaluator = Evaluator(module, trainer, datamodule.hparams["batch_size"])
    split = datamodule.splits[cfg.split]
    people, doubtful = read_ground_truth(cfg, split, module.class_names)

    evaluation = evaluator(split, cfg.split)
    val = evaluation if cfg.split == "val" else evaluator(datamodule.splits["val"], "val, to fit the temperature")
    temperature = fit_temperature(val.logits, val.labels)
    results = {
        "checkpoint": str(cfg.checkpoint),
        "epoch": module.restored_epoch,
        "split": cfg.split,
        cfg.split: all_metrics(evaluation, temperature),
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "class_names": list(module.class_names),
    }
    if cfg.tta != "none":
        results["tta"] = evaluator.test_time_augmentation(split, evaluation, cfg.tta)
    if cfg.corrupt != "none":
        results["corruption"] = evaluator.corruptions(split, evaluation, cfg.corrupt)
    if people is not None:
        results["human_labels"] = compare_with_people(evaluation, people)
    if doubtful is not None:
        results["doubtful_labels"] = accuracy_without(evaluation, doubtful)
    results["data"] = dict(datamodule.hparams)
    results["config"] = OmegaConf.to_container(cfg, resolve=True)
    results["environment"] = environment(evaluator.device, 1, str(trainer.precision_plugin.precision))
    run_dir = Path(cfg.paths.output_dir)
    where = f"{SPLIT_NAMES[cfg.split]}, epoch {module.restored_epoch}"
    for name, figure in evaluation_figures(evaluation, evaluation.scaled(temperature), split, where).items():
        with atomic_write(run_dir / "figures" / f"{name}_{cfg.split}.png") as file:
            file.write(to_png(figure))
    write_predictions(run_dir / "predictions.csv", evaluation)
    results["seconds"] = {"evaluate": time.perf_counter() - start}
    write_json(run_dir / "results.json", results)
    log.info("%s", describe(results, run_dir))
    return results


def all_metrics(evaluation: Evaluation, temperature: float) -> dict[str, Any]:
    """Return all metrics of an evaluation, and its calibration at ``temperature``."""
    calibrated = evaluation.scaled(temperature)
    return {
        **evaluation.scores(),
        "calibrated": {"temperature": temperature, "nll": calibrated.loss, **calibrated.calibration()},
        "per_class": evaluation.per_class(),
        "confused_pairs": evaluation.confused_pairs(),
        "confident_errors": evaluation.confident_errors(),
    }


def read_ground_truth(cfg: DictConfig, split: Split, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """Read the human labels and the indices of doubtful images, if ``cfg`` names such files.

    Raises:
        UserError: A file is missing or broken, or does not match the images.
    """
    from cifar10_tl.metrics.ground_truth import read_doubtful_labels, read_human_labels

    people, doubtful, images = cfg.human_labels, cfg.doubtful_labels, (split.indices, split.labels)
    if people and cfg.split != "test":
        raise UserError(f"human_labels={people}: contains labels of the test images; use split=test")
    return (
        read_human_labels(Path(people), *images, len(names)) if people else None,
        read_doubtful_labels(Path(doubtful), *images, names) if doubtful else None,
    )


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Compare the runs of ``cfg.compare`` on the terminal, in comparison.csv and in comparison.md."""
    from cifar10_tl.engine.comparison import COLUMNS, compare_runs, format_rows, read_run
    from cifar10_tl.engine.results import markdown_table, text_table

    rows = compare_runs([read_run(Path(folder)) for folder in cfg.compare])
    header, cells = list(COLUMNS), format_rows(rows)
    run_dir = Path(cfg.paths.output_dir)
    atomic_write_text(run_dir / "comparison.csv", csv_text(header, (list(row.values()) for row in rows)))
    atomic_write_text(run_dir / "comparison.md", markdown_table(header, cells))
    table = text_table(header[:-1], [row[:-1] for row in cells])
    settings = "\n".join(f"  {run}: {changed}" for run, *_, changed in cells if changed)  # too long for the table
    log.info("\n\n%s\n\n%s\n\n  %s, comparison.md", table, settings, run_dir / "comparison.csv")
    return {"runs": rows}


def quote_list(argument: str) -> str:
    """Return ``compare=A,B`` as Hydra's list ``compare=['A','B']``; to Hydra, the bare comma means a sweep."""
    key, _, value = argument.partition("=")
    if key != "compare" or not value or value[0] in "['\"":
        return argument
    quoted = ["'" + folder.replace("'", "\\'") + "'" for folder in value.split(",") if folder]
    return f"compare=[{','.join(quoted)}]"


def main() -> None:
    """Run ``python -m cifar10_tl.evaluate``."""
    sys.argv[1:] = map(quote_list, sys.argv[1:])
    run_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
