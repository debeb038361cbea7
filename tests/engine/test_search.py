from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import REPOSITORY, SMALL, TINY, compose_command, compose_train, start_python

from cifar10_tl.config import launcher
from cifar10_tl.config.errors import UserError
from cifar10_tl.engine import search as search_module
from cifar10_tl.engine.processes import SignalHandler, Stopped
from cifar10_tl.engine.search import Search, propose
from cifar10_tl.engine.search_report import describe, summary, write_report
from cifar10_tl.engine.search_space import read_space
from cifar10_tl.io import claim, read_csv
from cifar10_tl.tune import tune

#: Val accuracies by epoch of made-up runs, None: the run fails.
CURVES = ([0.5, 0.6], [0.4, 0.7], None, [0.1, 0.9], [0.6, 0.65])


class FakeRuns:
    """Training runs without training: each writes the files of a run that the search reads."""

    def __init__(self, curves: Sequence[Sequence[float] | None]) -> None:
        self.curves, self.error = curves, "error: seed=x: bad"
        self.started: list[list[str]] = []
        self.dies_in: int | None = None  # trial whose run ends together with the search

    def __call__(self, overrides: list[str], run_dir: Path, handler: Any, is_poor: Callable[[Path], bool]) -> int:
        self.started.append(overrides)
        number = int(run_dir.name)
        (run_dir / "config.yaml").write_text("seed: 0\n")
        if self.dies_in == number:
            self.dies_in = None
            raise Stopped(143)
        if (curve := self.curves[number]) is None:
            (run_dir / "output.log").write_text(f"text\n{self.error.format(run_dir)}\n")
            return 2
        rows = [f"{epoch},{accuracy},1.5" for epoch, accuracy in enumerate(curve)]
        (run_dir / "metrics.csv").write_text("\n".join(["epoch,val/acc,seconds", *rows, f"{len(rows)},,1"]))
        (run_dir / "checkpoints").mkdir()
        if not is_poor(run_dir):
            (run_dir / "results.json").write_text(json.dumps({"val": {"acc": max(curve)}}))
        return 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    monkeypatch.setattr(search_module, "train", fake := FakeRuns(CURVES))
    return fake


OVERRIDES = ("data=shapes", "pruner.startup_trials=2", "pruner.warmup_epochs=0")


def search_in(folder: Path, *overrides: str, trials: int = 5) -> Search:
    given = [*OVERRIDES, *overrides]
    cfg = compose_command("tune", *given, f"paths.output_dir={folder}")
    folder.mkdir(exist_ok=True)
    search = Search(cfg, given)
    search.run(trials, SignalHandler())
    return search


def outcome(search: Search) -> list[tuple[Any, ...]]:
    return [(t.state.name, t.value, t.params, t.intermediate_values) for t in search.study.trials]


def test_the_lock_of_a_relative_folder_is_no_broken_link(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna waits forever for a broken link that a killed search left."""
    monkeypatch.chdir(tmp_path)
    targets: list[str] = []
    symlink = os.symlink

    def recorded(target: str, link: str) -> None:
        targets.append(target)
        symlink(target, link)

    monkeypatch.setattr(os, "symlink", recorded)
    search_in(Path("search"))
    assert {*targets} == {str(tmp_path / "search" / "study.journal")}


def test_trials_are_recorded_with_their_end(runs: FakeRuns, tmp_path: Path) -> None:
    search = search_in(tmp_path)
    trials = search.study.trials
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", "COMPLETE"]
    assert [t.value for t in trials] == [0.6, 0.7, None, 0.1, 0.65]
    assert trials[3].intermediate_values == {0: 0.1}, "0.1 is below 0.45, the median of the first epochs"
    assert trials[2].user_attrs["error"] == "error: seed=x: bad"
    assert [t.user_attrs["seconds"] for t in trials] == [4.0, 4.0, 0, 4.0, 4.0]
    assert len({json.dumps(t.params) for t in trials}) == 5
    kept = [path.parent.name for path in sorted(tmp_path.glob("trials/*/checkpoints"))]
    assert kept == ["1"], "only the best trial keeps its checkpoints"


def test_runs_get_the_settings_of_their_trial(runs: FakeRuns, tmp_path: Path) -> None:
    search = search_in(tmp_path, trials=1)
    (command,) = runs.started
    params = search.study.trials[0].params
    assert command[0] == "data=shapes"
    assert command[-2:] == ["test=false", f'paths.output_dir="{tmp_path}/trials/0"']
    cfg = compose_train(*command)
    assert cfg.optimizer.lr == params["optimizer.lr"]
    assert cfg.model.label_smoothing == float(params["model.label_smoothing"])
    assert not cfg.test


@pytest.mark.parametrize("killed", range(5))
def test_stopped_search_continues_as_if_it_had_not_been(killed: int, tmp_path: Path, runs: FakeRuns) -> None:
    expected = outcome(search_in(tmp_path / "whole"))
    runs.started, runs.dies_in = [], killed
    with pytest.raises(Stopped):
        search_in(tmp_path / "stopped")
    fails = CURVES[killed] is None
    if fails:  # perhaps because the data is missing now
        with pytest.raises(UserError, match="trial 2: seed=x: bad; repeat the command to retry this trial"):
            search_in(tmp_path / "stopped")
    continued = search_in(tmp_path / "stopped")
    assert outcome(continued) == expected
    assert runs.started[killed + 1] == [f'resume="{tmp_path}/stopped/trials/{killed}"', "trust=False"]
    assert len(runs.started) == 6 + fails


def test_a_search_stops_at_the_third_trial_in_a_row_with_the_same_error(runs: FakeRuns, tmp_path: Path) -> None:
    runs.curves, runs.error = [[0.5], None, None, None, [0.6]], "error: cannot write {}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"trial 3: cannot write .*/trials/3/checkpoints/last\.ckpt; repeat"):
        search_in(tmp_path)
    runs.curves = [*runs.curves[:3], [0.7], [0.6]]  # the cause has been removed
    assert [name for name, *_ in outcome(search_in(tmp_path))] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_code_that_a_resumed_run_would_refuse_is_refused_at_once(runs: FakeRuns, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imports=\['my_heads'\]: add trust=true"):
        search_in(tmp_path, "imports=[my_heads]")
    search_in(tmp_path, "imports=[my_heads]", "trust=true", trials=1)
    assert len(runs.started) == 1


def test_every_run_takes_the_epochs_of_the_warmup(runs: FakeRuns, tmp_path: Path) -> None:
    runs.curves = [[0.5, 0.6, 0.7], [0.5, 0.6, 0.7], [0.1, 0.2, 0.3]]
    for epochs in (1, 2):
        search = search_in(tmp_path / str(epochs), f"pruner.warmup_epochs={epochs}", trials=3)
        assert len(search.study.trials[2].intermediate_values) == epochs


def test_schedules_of_different_lengths_are_not_compared(runs: FakeRuns, tmp_path: Path) -> None:
    runs.curves = [[0.5, 0.6], [0.5, 0.6], [0.1, 0.2]]
    for name, override in (("budget", "budget=1h"), ("epochs", "+search.trainer.max_epochs={low: 5, high: 9}")):
        search = search_in(tmp_path / name, override, trials=3)
        assert [trial.state.name for trial in search.study.trials] == 3 * ["COMPLETE"]


def test_a_journal_that_a_full_disk_has_cut_off_is_continued(runs: FakeRuns, tmp_path: Path) -> None:
    expected = outcome(search_in(tmp_path / "whole"))
    search_in(tmp_path / "cut", trials=2)
    with (tmp_path / "cut" / "study.journal").open("a") as journal:
        journal.write('{"op_code": 8, "wor')
    for _ in range(2):
        assert outcome(search_in(tmp_path / "cut")) == expected


def test_run_that_finished_before_it_was_recorded_is_not_started_again(tmp_path: Path, runs: FakeRuns) -> None:
    expected = outcome(search_in(tmp_path / "whole"))
    search_in(tmp_path / "killed", trials=0)
    journal = tmp_path / "killed" / "study.journal"
    content = journal.read_bytes()
    search_in(tmp_path / "killed", trials=1)
    journal.write_bytes(content)
    assert outcome(search_in(tmp_path / "killed")) == expected
    assert len(runs.started) == 5 + 5
    journal.unlink()
    with pytest.raises(UserError, match="contains trials of another search"):
        search_in(tmp_path / "killed")


def test_search_can_be_made_longer(tmp_path: Path, runs: FakeRuns) -> None:
    short = outcome(search_in(tmp_path, trials=2))
    assert outcome(search_in(tmp_path, trials=5))[:2] == short
    assert len(runs.started) == 5
    search_in(tmp_path, trials=1)
    assert len(runs.started) == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["seed=1"], r"seed=1: the search in .* has seed=0; "),
        (["search.optimizer.lr.high=0.1"], r"search\.optimizer\.lr\.high=0\.1: the search in .*\.high=0\.01; "),
        (["~search.model"], r"search\.model\.label_smoothing\.choices=None: the search in .*=\[0\.0, 0"),
        (["ema_decay=0.9"], r"ema_decay=0\.9: the search in .* has ema_decay=None; "),
        (["pruner.warmup_epochs=3"], r"pruner\.warmup_epochs=3: the search in .*warmup_epochs=0; "),
    ],
)
def test_other_settings_are_refused(changed: list[str], message: str, tmp_path: Path, runs: FakeRuns) -> None:
    search_in(tmp_path, trials=1)
    with pytest.raises(UserError, match=message):
        search_in(tmp_path, *changed)
    assert len(runs.started) == 1


def test_moved_search_continues(tmp_path: Path, runs: FakeRuns) -> None:
    search_in(tmp_path / "old", trials=2)
    (tmp_path / "old" / "study.journal.lock").symlink_to(tmp_path / "old" / "study.journal")  # of a killed search
    (tmp_path / "old").rename(tmp_path / "new")
    assert len(search_in(tmp_path / "new", trials=3).study.trials) == 3


def test_proposals_depend_on_seed_and_trials_only() -> None:
    space = read_space({"seed": {"low": 0.0, "high": 1.0}}, {"seed": 0})
    ended: list[optuna.trial.FrozenTrial] = []
    for _ in range(30):
        params = propose(ended, space, 0)
        assert propose(ended, space, 0) == params
        assert propose(ended, space, 1) != params
        value = -abs(params["seed"] - 0.7)
        ended.append(optuna.trial.create_trial(value=value, params=params, distributions=space))
    assert len({t.params["seed"] for t in ended}) == 30
    late = [abs(t.params["seed"] - 0.7) for t in ended[10:]]
    assert sum(late) / 20 < 0.2, "after ten random trials, proposals should be closer to the best value than 0.29"


def test_pruning_does_not_depend_on_when_the_metrics_are_read(tmp_path: Path, runs: FakeRuns) -> None:
    search = search_in(tmp_path, trials=2)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert search.judge(run_dir) == ({}, False)
    for accuracies, expected in (
        ([0.46], ({0: 0.46}, False)),  # median 0.45
        ([0.46, 0.64], ({0: 0.46, 1: 0.64}, True)),  # median 0.65
        ([0.46, 0.64, 0.99], ({0: 0.46, 1: 0.64}, True)),
    ):
        rows = [f"{epoch},{accuracy}" for epoch, accuracy in enumerate(accuracies)]
        (run_dir / "metrics.csv").write_text("\n".join(["epoch,val/acc", *rows]))
        assert search.judge(run_dir) == expected
    without = search_in(tmp_path / "without", "pruner.name=none", trials=2)
    assert without.judge(run_dir)[1] is False


def test_report_names_the_best_trial_and_its_command(runs: FakeRuns, tmp_path: Path) -> None:
    search = search_in(tmp_path)
    results = write_report(tmp_path, search.study, search.overrides)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    best = results["best"]
    assert (best["trial"], best["val_acc"], best["epochs"], best["state"]) == (1, 0.7, 2, "finished")
    assert best["command"].startswith("python -m cifar10_tl.train data=shapes optimizer.lr=")
    assert "test=false" not in best["command"]
    assert sum(results["importance"].values()) == pytest.approx(1)
    rows = read_csv(tmp_path / "trials.csv")
    assert [row["state"] for row in rows] == ["finished", "finished", "failed", "pruned", "finished"]
    assert float(rows[1]["optimizer.lr"]) == search.study.trials[1].params["optimizer.lr"]
    assert rows[2]["error"] == "error: seed=x: bad"
    for name in ("history", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = summary(results, tmp_path)
    assert re.findall(r"^  ([0134]) +\w+ +([\d.]+)%", text, re.M) == [
        ("1", "70.00"),
        ("4", "65.00"),
        ("0", "60.00"),
        ("3", "10.00"),
    ]
    assert "5 trials: 3 finished, 1 pruned, 1 failed" in text
    assert text.endswith(best["command"])
    assert "history.png, importance.png\n" in text
    assert "history.png\n" in summary(results | {"importance": {}}, tmp_path)


def test_search_without_a_finished_trial_is_an_error(runs: FakeRuns, tmp_path: Path) -> None:
    runs.curves = [None] * 2
    search = search_in(tmp_path, trials=2)
    with pytest.raises(UserError, match="all 2 trials failed; the first one: error: seed=x: bad"):
        write_report(tmp_path, search.study, search.overrides)


# ---------------------------------------------------------------------------------------------------------- the command


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    cfg = compose_command("tune", "data=shapes", f"paths.output_dir={tmp_path}")
    with claim(tmp_path), pytest.raises(UserError, match="another process is running in this folder"):
        tune(cfg)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="contains a training run"):
        tune(cfg)


def test_missing_optuna_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar10_tl.tune.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cifar10_tl\[tune\]'"):
        tune(compose_command("tune", "data=shapes", f"paths.output_dir={tmp_path}"))


def test_sweeps_and_sweepers_point_to_the_search() -> None:
    with pytest.raises(UserError, match=r"hydra/sweeper=optuna: not supported; .* cifar10_tl\.tune"):
        launcher._prepared(["-m", "hydra/sweeper=optuna"])
    with pytest.raises(UserError, match="resume=x: a search is continued by its own command"):
        launcher._prepared(["resume=x"], "tune")
    for flag in ("-m", "--multirun"):
        with pytest.raises(UserError, match=f"{flag}: a search is one run"):
            launcher._prepared([flag, "seed=1,2"], "tune")
    assert launcher._prepared(["-m", "hydra/sweeper=basic"]) == ["-m", "hydra/sweeper=basic"]


@pytest.mark.slow
def test_run_waits_for_an_earlier_run_and_is_stopped_when_it_is_poor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.sh").write_text("#!/bin/sh\nexec sleep 60")
    (tmp_path / "program.sh").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program.sh"))
    monkeypatch.setattr(search_module.time, "sleep", lambda seconds: waits.append(seconds))
    waits: list[float] = []
    answers = iter([False, True])
    monkeypatch.setattr(search_module, "is_free", lambda run_dir: next(answers))
    polls = iter([False, True])
    started = time.monotonic()
    status = search_module.train(["seed=1"], tmp_path, SignalHandler(), lambda run_dir: next(polls))
    assert (status, waits) == (-signal.SIGTERM, [1, search_module.POLL_SECONDS])
    assert time.monotonic() - started < 30


RUN = (
    *SMALL,
    *TINY,
    "callbacks=minimal",
    "logger=none",
    "report=none",
    "+callbacks.slow={_target_: helpers.SlowStep}",
    "trust=true",
)


def start_search(folder: Path, *overrides: str) -> Any:
    program = ("-m", "cifar10_tl.tune", *RUN, "trials=2", "pruner.name=none", f"paths.output_dir={folder}", *overrides)
    return start_python(*program, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")


def processes_of(folder: Path) -> list[int]:
    """Return the processes whose command line names ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended
            found += [int(path.parent.name)] if str(folder) in path.read_bytes().decode() else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_killed_search_leaves_no_process_and_loses_no_trial(tmp_path: Path) -> None:
    search = start_search(tmp_path / "search")
    deadline = time.monotonic() + 200
    while not (tmp_path / "search/trials/1/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    search.kill()
    search.communicate()
    first = json.loads((tmp_path / "search/trials/0/results.json").read_text())
    while processes_of(tmp_path / "search") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(tmp_path / "search") == []
    continued = start_search(tmp_path / "search")
    output, _ = continued.communicate(timeout=400)
    assert continued.returncode == 0, output
    assert "trial 0" not in output.split("trial 1")[0]
    results = json.loads((tmp_path / "search/results.json").read_text())
    assert [row["trial"] for row in results["trials"]] == [0, 1]
    assert [row["state"] for row in results["trials"]] == ["finished"] * 2
    assert results["trials"][0]["val_acc"] == first["val"]["acc"]
    assert "resuming from" in (tmp_path / "search/trials/1/train.log").read_text()


def test_epochs_without_validation_are_counted() -> None:
    values = {3: 0.5, 7: 0.6}
    trial = optuna.trial.create_trial(value=0.6, intermediate_values=values, user_attrs={"error": None, "seconds": 1.0})
    assert describe(trial) == "finished after 8 epochs, val acc 60.00%"
