"""Report of a search: table, trials.csv, results.json and figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.search_space import as_overrides, plain_values
from cifar10_tl.io import atomic_write, write_csv

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def num_epochs(trial: FrozenTrial) -> int:
    """Return the number of epochs up to the last validation."""
    return 1 + max(trial.intermediate_values, default=-1)


def describe(trial: FrozenTrial) -> str:
    """Return one line on a trial that has ended."""
    if trial.value is None:
        return f"failed: {trial.user_attrs['error']}"
    epochs = num_epochs(trial)
    return f"{STATES[trial.state]} after {epochs} epoch{'s' * (epochs != 1)}, val acc {trial.value:.2%}"


def best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the first finished trial with the highest val accuracy, None if there is none."""
    values = {t.number: t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None}
    return trials[max(values, key=values.__getitem__)] if values else None


def write_report(folder: Path, study: optuna.Study, overrides: Sequence[str]) -> dict[str, Any]:
    """Write trials.csv, results.json and figures, and return the content of results.json.

    ``overrides`` of the train command are shared by all trials.
    """
    from cifar10_tl import plots  # slow to import, needed after hours
    from cifar10_tl.engine.results import write_results

    trials = study.get_trials(deepcopy=False)
    rows = [_row(trial) for trial in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "trials.csv", names, ([row.get(name) for name in names] for row in rows))
    best = best_trial(trials)
    if best is None:
        raise UserError(f"all {len(rows)} trials failed; the first one: {trials[0].user_attrs['error']}")
    command = shlex.join(["python", "-m", "cifar10_tl.train", *overrides, *as_overrides(best.params)])
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    importance = optuna.importance.get_param_importances(study) if len(finished) > 1 else {}
    results = {"best": rows[best.number] | {"command": command}, "importance": importance, "trials": rows}
    write_results(folder, results)
    accuracies = {trial.number: trial.value for trial in trials if trial.value is not None}
    pruned = [trial.number for trial in trials if trial.state == TrialState.PRUNED]
    figures = {"history": plots.search_history(accuracies, pruned, heading="Search: val accuracy of the trials")}
    if importance:
        note = f"PED-ANOVA of {len(finished)} finished trials: unreliable for few trials"
        figures["importance"] = plots.importance_bars(importance, heading="Importance of the settings", note=note)
    for name, figure in figures.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(plots.to_png(figure))
    return results


def _row(trial: FrozenTrial) -> dict[str, Any]:
    """Return a row of trials.csv."""
    numbers = {"trial": trial.number, "state": STATES[trial.state], "val_acc": trial.value}
    numbers |= {"epochs": num_epochs(trial), "seconds": round(trial.user_attrs["seconds"], 1)}
    return {**numbers, **plain_values(trial.params), "error": trial.user_attrs["error"]}


def summary(results: Mapping[str, Any], folder: Path) -> str:
    """Return a text with the ten best trials and the command that repeats the best one."""
    from cifar10_tl.engine.results import text_table

    rows = [row for row in results["trials"] if row["val_acc"] is not None]
    best = sorted(rows, key=lambda row: (row["state"] != "finished", -row["val_acc"]))[:10]
    names = [name for name in rows[0] if name != "error"]
    table = text_table(names, ([_cell(name, row[name]) for name in names] for row in best))
    states = [row["state"] for row in results["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES.values())
    importance = ", importance.png" * bool(results["importance"])
    return (
        f"\n\n{table}\n\n  {len(states)} trials: {counts}\n  numbers      {folder / 'trials.csv'}, results.json\n"
        f"  figures      {folder / 'history.png'}{importance}\n"
        f"  checkpoint   {folder / 'trials' / str(best[0]['trial']) / 'checkpoints' / 'best.ckpt'}\n"
        f"  train the best trial again:\n  {results['best']['command']}"
    )


def _cell(name: str, value: Any) -> str:
    form = {"val_acc": ".2%", "seconds": ".0f"}.get(name, ".4g")
    return format(value, form) if isinstance(value, float) else str(value)
