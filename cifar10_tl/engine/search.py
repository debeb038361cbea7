"""Search: training runs as the trials of an Optuna study.

The study is a journal in the folder of the search. It holds only trials that have ended, each added by one write. The
values of the next trial are a function of the seed and of these trials, and are saved before its run starts. A search
that was killed at any moment therefore continues with the same trial, and resumes its run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from cifar10_tl.config.errors import UserError, walk
from cifar10_tl.config.resume import foreign_code, quoted
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.engine.processes import PARENT_VARIABLE, SignalHandler
from cifar10_tl.engine.search_report import best_trial, describe
from cifar10_tl.engine.search_space import Space, as_overrides, read_space, shared_overrides
from cifar10_tl.engine.settings import flat
from cifar10_tl.io import atomic_write_text, claim, read_csv

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Search:
    """Search in a folder, new or continued.

    Args:
        cfg: Config of the tune command.
        overrides: Overrides that ``cfg`` was composed with.
    """

    def __init__(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        self.folder = Path(cfg.paths.output_dir)
        self.seed, self.trust = cfg.seed, cfg.trust
        settings: Any = OmegaConf.to_container(cfg)  # keeps interpolations, because the folder may be moved
        if not cfg.trust and (code := foreign_code(settings)):
            raise UserError(f"{code}: add trust=true, because a search resumes interrupted runs")
        del settings["trials"], settings["paths"]["output_dir"]
        self.space = read_space(settings.get("search") or {}, dict(walk(settings)))
        self.overrides = shared_overrides(overrides, self.space)
        # Optuna's warm-up ends before the step of this number, and epochs count from 0
        median = MedianPruner(cfg.pruner.startup_trials, max(0, cfg.pruner.warmup_epochs - 1))
        # the epochs of schedules of different lengths cannot be compared
        lengths = {"budget", "trainer.max_epochs", "trainer.max_steps"}
        can_prune = not cfg.budget and not lengths & self.space.keys()
        self.pruner: BasePruner = median if cfg.pruner.name == "median" and can_prune else NopPruner()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # absolute: Optuna's lock is a symbolic link to this path, and a relative target would be broken
        journal = self.folder.resolve() / "study.journal"
        remove_incomplete_line(journal)
        # of a killed search, because no other one runs in this folder
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        self.study = optuna.create_study(
            storage=storage, study_name="search", direction="maximize", load_if_exists=True
        )
        if "settings" not in self.study.user_attrs and (self.folder / "trials").exists():
            raise UserError(
                f"{self.folder / 'trials'}: contains trials of another search; set another paths.output_dir"
            )
        if saved := self.study.user_attrs.get("settings"):
            check_same_settings(self.folder, saved, settings)
        else:
            self.study.set_user_attr("settings", settings)

    def run(self, trials: int, handler: SignalHandler) -> None:
        """Run those of ``trials`` training runs that are missing; ``handler`` stops a run together with the search."""
        for number in range(len(self.study.trials), trials):
            run_dir = self.folder / "trials" / str(number)
            params = self.params_of(run_dir)
            log.info("trial %d (%d of %d): %s", number, number + 1, trials, " ".join(as_overrides(params)))
            status, is_resumed = 0, (run_dir / RUN_CONFIG).is_file()
            if not (run_dir / "results.json").is_file():
                status = train(self.train_overrides(run_dir, params), run_dir, handler, lambda d: self.judge(d)[1])
            trial = self.ended_trial(run_dir, params, status)
            if trial.state == TrialState.FAIL:
                self.check_cause(run_dir, trial.user_attrs["error"], is_resumed)
            self.study.add_trial(trial)
            self.remove_checkpoints()
            log.info("trial %d: %s", number, describe(self.study.trials[number]))

    def check_cause(self, run_dir: Path, error: str, is_resumed: bool) -> None:
        """Raise :class:`UserError` if the cause of a failure may be outside the trial, such as missing data.

        This is assumed if the run was resumed, or if three trials in a row have the same error. If the same error
        returns in the next start of the search, the trial itself is the cause.
        """
        file, texts = run_dir / "failed.txt", [*(t.user_attrs["error"] for t in self.study.trials[-2:]), error]
        known = file.is_file() and file.read_text() == error
        causes = [re.sub(r"\btrials/\d+", "trials/N", text or "") for text in texts]
        if not known and (is_resumed or causes == 3 * [causes[-1]]):
            atomic_write_text(file, error)
            raise UserError(
                f"trial {run_dir.name}: {error.removeprefix('error: ')}; repeat the command to retry this trial, which "
                "is recorded as failed if the same error recurs"
            )

    def params_of(self, run_dir: Path) -> dict[str, Any]:
        """Return the values of the next trial: those in its folder if it was started before."""
        path = run_dir / "params.json"
        if not path.is_file():
            atomic_write_text(path, json.dumps(propose(self.study.trials, self.space, self.seed)))
        return json.loads(path.read_text())

    def train_overrides(self, run_dir: Path, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides that start the run of a trial, or resume it."""
        if (run_dir / RUN_CONFIG).is_file():
            return [f"resume={quoted(run_dir)}", f"trust={self.trust}"]
        return [*self.overrides, *as_overrides(params), "test=false", f"paths.output_dir={quoted(run_dir)}"]

    def judge(self, run_dir: Path) -> tuple[dict[int, float], bool]:
        """Return val accuracies by epoch, up to the epoch after which the pruner ends the run, and whether it does.

        The result depends on the accuracies alone, not on the time at which they are read.
        """
        seen: dict[int, float] = {}
        for row in read_csv(run_dir / "metrics.csv"):
            if not row["val/acc"]:
                continue
            seen[int(row["epoch"])] = float(row["val/acc"])
            if self.pruner.prune(self.study, create_trial(state=TrialState.RUNNING, intermediate_values=dict(seen))):
                return seen, True
        return seen, False

    def ended_trial(self, run_dir: Path, params: dict[str, Any], status: int) -> FrozenTrial:
        """Return the trial of a run that has ended with this exit status."""
        seen, is_pruned = self.judge(run_dir)
        seconds = sum(float(row["seconds"] or 0) for row in read_csv(run_dir / "metrics.csv"))
        state, value, error = TrialState.COMPLETE, val_accuracy(run_dir), None
        if is_pruned:
            state, value = TrialState.PRUNED, max(seen.values())
        elif value is None:
            state, error = TrialState.FAIL, error_line(run_dir) or f"no val accuracy, exit status {status}"
        return create_trial(
            state=state,
            value=value,
            params=params,
            distributions=self.space,
            intermediate_values=seen,
            user_attrs={"error": error, "seconds": seconds},
        )

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of all trials that have ended, except those of the best one."""
        best = best_trial(self.study.trials)
        for number in range(len(self.study.trials)):
            if best is None or number != best.number:
                shutil.rmtree(self.folder / "trials" / str(number) / "checkpoints", ignore_errors=True)


def remove_incomplete_line(journal: Path) -> None:
    """Remove an incomplete last line, which a full disk may have left; Optuna would append to it."""
    data = journal.read_bytes() if journal.is_file() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(journal, data.rfind(b"\n") + 1)


def check_same_settings(folder: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if the search in ``folder`` was started with other settings."""
    old, new = flat(saved), flat(settings)
    if changed := [key for key in {**old, **new} if old.get(key) != new.get(key) and key != "trust"]:
        key = changed[0]
        raise UserError(
            f"{key}={new.get(key)}: the search in {folder} has {key}={old.get(key)}; use its settings to continue it, "
            "or set another paths.output_dir"
        )


def propose(trials: Sequence[FrozenTrial], space: Space, seed: int) -> dict[str, Any]:
    """Return the values of the trial after ``trials``."""
    seed = int(np.random.SeedSequence((seed, len(trials))).generate_state(1)[0])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.add_trials(trials)
    return study.ask(space).params


def train(overrides: Sequence[str], run_dir: Path, handler: SignalHandler, is_poor: Callable[[Path], bool]) -> int:
    """Train in a process that ends with this one, stop it as soon as ``is_poor``, and return its exit status."""
    while not is_free(run_dir):  # a run whose search was killed ends within seconds
        time.sleep(1)
    command = [sys.executable, "-m", "cifar10_tl.train", *overrides]
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
    with (
        (run_dir / "output.log").open("wb") as output,  # an earlier error would count as that of this start
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,  # noqa: S603
    ):
        try:
            handler.children = [process]
            while process.poll() is None and not is_poor(run_dir):
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()
    return process.returncode


def is_free(run_dir: Path) -> bool:
    """Return whether no process is running in this folder."""
    with claim(run_dir) as claimed:
        return claimed


def val_accuracy(run_dir: Path) -> float | None:
    """Return the val accuracy in the results of a run, None if there is none."""
    path = run_dir / "results.json"
    return json.loads(path.read_text())["val"]["acc"] if path.is_file() else None


def error_line(run_dir: Path) -> str | None:
    """Return the last error that the run has printed, None if there is none."""
    path = run_dir / "output.log"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line for line in reversed(lines) if line.startswith("error:")), None)
