"""Evaluate a checkpoint, or compare tested runs.

python -m cifar10_tl.evaluate checkpoint=outputs/runs/<time>/checkpoints/best.ckpt
python -m cifar10_tl.evaluate checkpoint=best.ckpt data=folder data.root=DIR tta=flip
python -m cifar10_tl.evaluate compare=outputs/runs/<one>,outputs/runs/<other>
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.resume import quoted
from cifar10_tl.config.run_dir import check_owner
from cifar10_tl.io import atomic_write_text, write_csv

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate ``cfg.checkpoint``, or compare the runs of ``cfg.compare``, and return the results."""
    check_owner(Path(cfg.paths.output_dir), "evaluate")
    if cfg.human_labels and cfg.split != "test":
        raise UserError(f"human_labels={cfg.human_labels}: contains labels of the test images; use split=test")
    if cfg.compare:
        for key, default in {"split": "test", "tta": "none", "human_labels": None, "doubtful_labels": None}.items():
            if cfg[key] != default:
                raise UserError(f"{key}={cfg[key]}: compare= uses the test results of finished runs; remove {key}")
        if Path(cfg.paths.output_dir).resolve() in [Path(folder).resolve() for folder in cfg.compare]:
            raise UserError(
                f"paths.output_dir={cfg.paths.output_dir}: is one of the compared runs; choose another folder"
            )
        return compare(cfg)
    from cifar10_tl.engine.evaluator import evaluate_checkpoint  # imports torch
    from cifar10_tl.engine.processes import SignalHandler

    with SignalHandler() as handler:
        return evaluate_checkpoint(cfg, handler)


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Compare runs on the terminal and in files, and return one row per run, and per setting with several seeds."""
    from cifar10_tl.engine import comparison
    from cifar10_tl.engine.comparison_report import write_comparison
    from cifar10_tl.engine.results import REPORT, markdown_table, text_table

    runs, run_dir = [comparison.read_run(Path(folder)) for folder in cfg.compare], Path(cfg.paths.output_dir)
    rows, settings = comparison.compare_runs(runs), comparison.compare_settings(runs)
    header, cells = [*comparison.COLUMNS], comparison.format_rows(rows)
    seeds = [*comparison.SETTINGS_COLUMNS], comparison.format_rows(settings, comparison.SETTINGS_COLUMNS)
    markdown = markdown_table(header, cells) + (f"\n{markdown_table(*seeds)}" if settings else "")
    write_csv(run_dir / "comparison.csv", header, (list(row.values()) for row in rows))
    atomic_write_text(run_dir / "comparison.md", markdown)
    if cfg.report != "none":
        write_comparison(run_dir, runs, rows, settings)
    parts = [text_table(header[:-1], [row[:-1] for row in cells])]
    parts.append("\n".join(f"  {run}: {changed}" for run, *_, changed in cells if changed))  # too long for the table
    if settings:
        parts.append(text_table(seeds[0], [[str(number), *row[1:]] for number, row in enumerate(seeds[1], 1)]))
        parts.append("\n".join(f"  {number}: {row[0]}" for number, row in enumerate(seeds[1], 1)))
        parts.append("  differences: mean over the seeds of both settings")
    report = f"  report       {run_dir / REPORT}\n" * (cfg.report != "none")
    parts.append(f"{report}  numbers      {run_dir / 'comparison.csv'}, comparison.md")
    log.info("\n\n%s", "\n\n".join(filter(None, parts)))
    return {"runs": rows, "settings": settings}


def quote_list(argument: str) -> str:
    """Return ``compare=A,B`` as Hydra's list ``compare=["A","B"]``; to Hydra, the bare comma means a sweep."""
    key, _, value = argument.partition("=")
    if key != "compare" or value.startswith(("[", "'", '"')):
        return argument
    return f"compare=[{','.join(quoted(folder) for folder in value.split(',') if folder)}]"


def main() -> None:
    """Run ``python -m cifar10_tl.evaluate``."""
    sys.argv[1:] = map(quote_list, sys.argv[1:])
    run_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
