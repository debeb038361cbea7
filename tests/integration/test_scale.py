"""Many processes and machines: what they count, what they learn, how they are started, and how they end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import REPOSITORY, SMALL, compose_train, free_port
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from cifar10_tl.config import launcher
from cifar10_tl.config.errors import UserError, explain
from cifar10_tl.config.run_dir import STAMP_VARIABLE, process_rank
from cifar10_tl.data.batch import Batch
from cifar10_tl.engine.builder import build_datamodule, build_module
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

#: No dropout, whose masks are each process's own.
PLAIN = (*SMALL, "model.head.dropout=0", "callbacks=minimal", "logger=none", "trainer.deterministic=true")


def rows(run: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader((run / "metrics.csv").open())]


def _as_torchrun_would(rank: int, work: Callable[..., None], world_size: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    work(*arguments)


def in_processes(world_size: int, work: Callable[..., None], *arguments: Any, method: str = "spawn") -> None:
    """Call ``work(*arguments)`` in so many processes, each with its rank in the environment."""
    torch.multiprocessing.start_processes(
        _as_torchrun_would, (work, world_size, free_port(), arguments), nprocs=world_size, start_method=method
    )


# ------------------------------------------------------------------------------------------------------- evaluation


def test_network(overrides: tuple[str, ...], world_size: int, file: Path) -> None:
    """In each process: test the network of these overrides, and keep what the last rank has."""
    cfg = compose_train(*overrides)
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=file.parent,
    )
    trainer.test(module, datamodule=datamodule, verbose=False)
    assert module.evaluation is not None
    if trainer.global_rank == world_size - 1:  # it has what rank zero has
        found = module.evaluation
        torch.save((found.logits, found.labels, found.indices, found.confusion_matrix), file)
        (file.parent / f"{file.stem}.json").write_text(json.dumps(found.metrics()))


test_network.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("images", [2, 7, 100])
def test_any_number_of_processes_counts_each_image_once_and_measures_the_same(images: int, tmp_path: Path) -> None:
    overrides = (*PLAIN, "data.batch_size=12", f"data.image_limit={images}", "data.train_size=200")
    for world_size in (1, 2, 3):
        in_processes(world_size, test_network, overrides, world_size, tmp_path / f"{world_size}.pt", method="fork")
    logits, labels, indices, confusion = torch.load(tmp_path / "1.pt", weights_only=True)
    metrics = json.loads((tmp_path / "1.json").read_text())
    assert len(indices) == indices.unique().numel() == images
    for world_size in (2, 3):
        shared = torch.load(tmp_path / f"{world_size}.pt", weights_only=True)
        assert torch.equal(shared[2], indices)
        assert torch.equal(shared[1], labels)
        assert torch.equal(shared[3], confusion)
        torch.testing.assert_close(shared[0], logits, rtol=1e-5, atol=1e-5)
        assert json.loads((tmp_path / f"{world_size}.json").read_text()) == pytest.approx(metrics, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- training


class SharesOfTwo(LitClassifier):
    """One process that computes BatchNorm as two do: each half's batch by its own statistics, rank zero's kept."""

    def _logits(self, batch: Batch) -> Tensor:
        if not self.training:
            return super()._logits(batch)
        first = self.network(batch.images[0::2])
        kept = {module: dict(module._buffers) for module in self.network.modules()}
        for module, buffers in kept.items():
            module._buffers.update({name: value if value is None else value.clone() for name, value in buffers.items()})
        second = self.network(batch.images[1::2])
        for module, buffers in kept.items():
            module._buffers.update(buffers)
        return torch.stack((first, second), 1).flatten(0, 1).float()


def train_in_process(overrides: tuple[str, ...]) -> None:
    train(compose_train(*overrides))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of several processes has: on two threads sums round otherwise, and each step amplifies that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_where_batchnorm_learns_two_processes_differ_by_its_statistics_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients averaged over two processes are those of the whole batch, but for each half's own BatchNorm."""
    run = (*PLAIN, "optimizer=sgd", "optimizer.lr=0.001")
    two = (*run, "trainer=ddp_cpu", "trainer.devices=2", f"paths.output_dir={tmp_path / 'two'}")
    in_processes(2, train_in_process, two)
    train_in_process((*run, f"paths.output_dir={tmp_path / 'one'}"))
    monkeypatch.setattr("cifar10_tl.engine.builder.LitClassifier", SharesOfTwo)
    train_in_process((*run, f"paths.output_dir={tmp_path / 'halves'}"))
    one, two_, halves = (rows(tmp_path / name) for name in ("one", "two", "halves"))
    for key in ("train/loss", "val/loss"):
        for shared, alike, alone in zip(two_, halves, one, strict=True):
            assert shared[key] == pytest.approx(alike[key], rel=1e-5), "BatchNorm is the whole difference"
            assert shared[key] == pytest.approx(alone[key], rel=0.05), "and it is small"


# ------------------------------------------------------------------------------------------------- how they are started


@pytest.mark.slow
def test_the_slurm_script_starts_processes_that_share_a_run(tmp_path: Path) -> None:
    """A `srun` that starts two, with the variables that SLURM gives them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "srun": """
while [[ $1 == --* ]]; do echo "$1" >> srun-options; shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_ID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done""",
    }
    for name, lines in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tools / name).chmod(0o755)
    slurm = {"JOB_ID": "4242", "JOB_NAME": "cifar10_tl", "JOB_NUM_NODES": "1", "NNODES": "1", "NODELIST": "127.0.0.1"}
    slurm |= {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NODEID": "0", "CPUS_PER_TASK": "8", "SUBMIT_DIR": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if k not in (STAMP_VARIABLE, "PL_GLOBAL_SEED", "MASTER_PORT")}
    environment |= {f"SLURM_{k}": v for k, v in slurm.items()}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    overrides = [o for o in SMALL if not o.startswith("trainer.devices")] + ["callbacks=minimal", "data.train_size=200"]
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / "slurm.sh"), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert run.name == "slurm-4242"
    results = json.loads((run / "results.json").read_text())
    assert results["environment"]["devices"] == 2, "Lightning took the two processes for one job"
    assert results["test"]["count"] == 100
    assert (run / "train.log").read_text().count("test acc") == 1
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} == set((tmp_path / "srun-options").read_text().split())


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1"}, 3),
        ({"SLURM_PROCID": "5", "LOCAL_RANK": "1"}, 5),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, 1),
        ({"NODE_RANK": "1"}, 1),  # started by hand on the second machine
        ({"NODE_RANK": "0"}, 0),
    ],
)
def test_only_the_first_process_of_a_job_is_the_first(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int
) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == rank


def test_processes_other_than_those_started_are_a_mistake_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        with pytest.raises(ValueError, match="You set") as raised:
            environment.validate_settings(object.__new__(environment), num_devices=2, num_nodes=1)
        line = explain(raised.value, "train")
        assert line
        assert line.startswith("trainer.devices, trainer.num_nodes: ")
        assert "trainer.num_nodes=MACHINES" in line


def test_machines_without_a_common_name_for_their_folder_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_train("trainer.num_nodes=2")
    with pytest.raises(UserError, match=r"same paths\.output_dir="):
        launcher.check_nodes(cfg)
    launcher.check_nodes(compose_train("trainer.num_nodes=2", "paths.output_dir=shared"))
    monkeypatch.setenv(STAMP_VARIABLE, "torchrun-night")
    launcher.check_nodes(compose_train("trainer.num_nodes=2"))


# --------------------------------------------------------------------------------------------------------- how they end


@pytest.mark.parametrize(
    ("environment", "error", "tells"),
    [
        ({}, UserError("x"), True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, UserError("x"), False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, UserError("x"), True),  # another machine, and perhaps another screen
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, UserError("x"), False),
        ({"RANK": "1", "LOCAL_RANK": "1"}, torch.OutOfMemoryError("x"), True),  # its own
        ({"RANK": "1", "LOCAL_RANK": "1"}, RuntimeError("Connection closed by peer"), True),  # the first may be gone
        ({"RANK": "2", "LOCAL_RANK": "2"}, RuntimeError("Connection closed by peer"), False),
    ],
)
def test_an_error_is_told_once_a_machine(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], error: Exception, tells: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_LOCALID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.should_print(error) is tells


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the one that was started", "the one that started it"])
def test_of_a_killed_process_the_other_tells_in_a_line(tmp_path: Path, victim: str) -> None:
    """And not by a traceback, in the process that Lightning started neither."""
    names = (STAMP_VARIABLE, "PL_GLOBAL_SEED", "HYDRA_FULL_ERROR", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    two = ("trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=100", "model.freeze=backbone")
    job = subprocess.Popen(
        [sys.executable, "-m", "cifar10_tl.train", *PLAIN, *two, f"paths.output_dir={tmp_path / 'run'}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    (child,) = map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(child if victim == "the one that was started" else job.pid, signal.SIGKILL)
    said, _ = job.communicate(timeout=60)  # ends when both have let go of the pipe
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert "another process of this run has ended" in said
    if victim == "the one that was started":
        assert f"process 1 of this run ({child}) was killed by SIGKILL" in said
