from __future__ import annotations

import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import compose_train

from cifar10_tl.config import launcher, run_dir
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import STAMP_VARIABLE, check_launch_variables, check_owner, process_rank

TORCHRUN = {"TORCHELASTIC_RUN_ID": "night", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2"}
VARIABLES = {*TORCHRUN, *SLURM, *run_dir._NUMBERS, STAMP_VARIABLE, "SLURM_JOB_NAME"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that a value set by a test is removed after it
        monkeypatch.delenv(name)


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "stamp", "rank"),
    [
        ({}, r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_SELF", 0),
        (TORCHRUN, "torchrun-night", 3),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "../a b"}, r"torchrun-\.\._a_b", 3),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, r"\d{4}-.*_PARENT", 3),
        (SLURM, "slurm-77-2", 3),
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, r"\d{4}-.*_SELF", 0),
        # started by Lightning in an interactive shell of SLURM
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, r"\d{4}-.*", 1),
        ({"MASTER_ADDR": "a", "NODE_RANK": "1"}, r"\d{4}-.*", 1),
        ({"MASTER_ADDR": "a", "RANK": "0", "LOCAL_RANK": "1"}, r"\d{4}-.*", 1),  # in a pod of Kubernetes
        ({"MASTER_ADDR": "a", "NODE_RANK": "0", "LOCAL_RANK": "1"}, r"\d{4}-.*", 1),
    ],
)
def test_processes_of_a_job_share_a_stamp_and_have_ranks(
    variables: dict[str, str], stamp: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, variables)
    stamp = stamp.replace("SELF", str(os.getpid())).replace("PARENT", str(os.getppid()))
    assert re.fullmatch(stamp, run_dir.run_stamp())
    assert run_dir.run_stamp() == os.environ[STAMP_VARIABLE]
    assert process_rank() == rank


def test_containers_that_start_in_the_same_second_have_their_own_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("platform.node", lambda: "3f2a")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_1_3f2a", run_dir.run_stamp())


@pytest.mark.parametrize(
    ("file", "owner", "content"),
    [
        ("config.yaml", "train", "a training run"),
        ("study.journal", "tune", "a search"),
        ("predictions.png", "predict", "predictions"),
        ("results.json", "evaluate", "an evaluation"),
    ],
)
def test_a_folder_belongs_to_one_command(file: str, owner: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    (tmp_path / file).touch()
    for command in ("train", "tune", "predict", "evaluate"):
        if command == owner:
            check_owner(tmp_path, command)
        else:
            with pytest.raises(UserError, match=f"paths.output_dir={tmp_path}: contains {content}; choose another"):
                check_owner(tmp_path, command)


def test_processes_of_torchrun_share_a_stamp_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29501"})
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) != "/proc")
    assert run_dir.run_stamp() == f"torchrun-29501-{os.getppid()}"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 .*unset RANK"),
        ({"RANK": "1", "MASTER_ADDR": "a"}, "RANK=1 .*unset RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 .*unset LOCAL_RANK"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 .*unset NODE_RANK"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1 .*unset SLURM_PROCID"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 .*1 to 65535"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 .*below WORLD_SIZE=4"),
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 .*below SLURM_NTASKS=4"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "but RANK, LOCAL_RANK, .*torchrun"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS .*but SLURM_PROCID.*srun"),
    ],
)
def test_stray_launch_variables_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        check_launch_variables()


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SLURM, {"RANK": "0"}, {"NODE_RANK": "1", "MASTER_ADDR": "a"}])
def test_complete_launch_variables_are_accepted(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, variables)
    check_launch_variables()


@pytest.mark.parametrize("base", [{}, TORCHRUN, SLURM])
def test_any_launch_variable_is_accepted_or_refused(base: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sorted(VARIABLES - {STAMP_VARIABLE}):
        for value in ("", " ", "x", "-1", "0", "1", "1.5", "99999999999", "²", "٣", "none", "../x", "a=b,c"):
            malformed = name in run_dir._NUMBERS and not re.fullmatch("[0-9]+", value)
            with monkeypatch.context() as patch:
                set_environment(patch, base | {name: value})
                patch.delenv(STAMP_VARIABLE, raising=False)
                with pytest.raises(UserError, match=r"must be a whole") if malformed else suppress(UserError):
                    check_launch_variables()
                    assert process_rank() >= 0
                    assert "/" not in run_dir.run_stamp()


def test_each_composed_config_has_its_own_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "_composed", itertools.count(1))
    first, second = compose_train(), compose_train()
    assert first.paths.output_dir == f"outputs/runs/{run_dir.run_stamp()}"
    assert second.paths.output_dir == f"{first.paths.output_dir}_2"
    assert first.paths.output_dir == first.copy().paths.output_dir == f"outputs/runs/{run_dir.run_stamp()}"


def test_nodes_need_a_common_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, shared = compose_train("trainer.num_nodes=2"), compose_train("trainer.num_nodes=2", "paths.output_dir=shared")
    launcher.check_nodes(shared)
    with pytest.raises(UserError, match=r"same paths\.output_dir="):
        launcher.check_nodes(cfg)
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match=r"NODE_RANK .*trainer\.num_nodes above 1"):
        launcher.check_nodes(compose_train())
    monkeypatch.setenv(STAMP_VARIABLE, "torchrun-night")
    launcher.check_nodes(cfg)


def test_jobs_of_a_sweep_know_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers such as joblib and submitit start processes that compose the config again."""
    (tmp_path / "multirun.yaml").touch()
    monkeypatch.setenv(run_dir.SWEEP_VARIABLE, "another")
    with pytest.raises(UserError, match="this folder holds a sweep"):
        run_dir._sweep_dir(tmp_path)
    monkeypatch.setenv(run_dir.SWEEP_VARIABLE, str(tmp_path))
    assert run_dir._sweep_dir(tmp_path) == str(tmp_path)
