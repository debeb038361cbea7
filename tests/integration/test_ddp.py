"""Two processes on the CPU, started the way a user starts them, against one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, SMALL, free_port

from cifar10_tl.config.run_dir import STAMP_VARIABLE

pytestmark = pytest.mark.slow


def start(*arguments: str, cwd: Path, launcher: tuple[str, ...] = ("-m", "cifar10_tl.train")) -> str:
    """Run the train command to its end; what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in (STAMP_VARIABLE, "PL_GLOBAL_SEED")}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


FROZEN = (
    *SMALL,
    "model.freeze=backbone",
    "model.head.dropout=0",
    "data.augment.mix=cutmix",
    "trainer.deterministic=true",
)

TWO = ("trainer=ddp_cpu", "trainer.devices=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on one process, on two that Lightning started, and on two that torchrun started."""
    folder = tmp_path_factory.mktemp("ddp")
    start(*FROZEN, "paths.output_dir=one", cwd=folder)
    start(*FROZEN, *TWO, "paths.output_dir=two", cwd=folder)
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "-m",
        "cifar10_tl.train",
    )
    start(*FROZEN, *TWO, cwd=folder, launcher=torchrun)
    found = list((folder / "outputs" / "runs").iterdir())
    assert len(found) == 1, "torchrun's processes must share one run folder"
    return {"one": folder / "one", "two": folder / "two", "torchrun": found[0]}


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_two_processes_train_as_one(runs: dict[str, Path], name: str) -> None:
    for alone, shared in zip(rows(runs["one"]), rows(runs[name]), strict=True):
        for key in ("train/loss", "train/acc", "val/loss", "val/acc"):
            assert float(shared[key]) == pytest.approx(float(alone[key]), rel=1e-4), key
    weights = [
        torch.load(runs[n] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for n in ("one", name)
    ]
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], atol=1e-4), key


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_the_test_counts_every_image_once(runs: dict[str, Path], name: str) -> None:
    alone, shared = (json.loads((runs[n] / "results.json").read_text()) for n in ("one", name))
    assert shared["test"]["count"] == alone["test"]["count"] == 100
    assert shared["confusion_matrix"] == alone["confusion_matrix"]
    assert shared["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)
    assert shared["environment"]["devices"] == 2


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_one_folder_one_log_one_set_of_figures(runs: dict[str, Path], name: str) -> None:
    def names(run: Path) -> set[str]:
        found = (str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
        return {n for n in found if not n.startswith("events")}

    assert names(runs[name]) == names(runs["one"])
    assert (runs[name] / "train.log").read_text().count("test acc") == 1


def test_a_sweep_of_two_process_runs_leaves_a_folder_a_job_and_nothing_else(tmp_path: Path) -> None:
    start(*FROZEN, *TWO, "trainer.max_epochs=1", "-m", "seed=1,2", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "outputs").iterdir()} == {"sweeps"}
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {p.name for p in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    seeds = [json.loads((sweep / job / "results.json").read_text())["config"]["seed"] for job in ("0", "1")]
    assert seeds == [1, 2]


def test_uneven_validation_over_two_processes_is_complete(tmp_path: Path) -> None:
    start(
        *FROZEN,
        "trainer=ddp_cpu",
        "data.image_limit=67",
        "trainer.max_epochs=1",
        "paths.output_dir=run",
        cwd=tmp_path,
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["count"] == results["val"]["count"] == 67


def test_a_batch_that_two_processes_cannot_share_is_told_once(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "cifar10_tl.train", *FROZEN, *TWO, "data.batch_size=63"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "choose 62 or 64" in done.stderr


def test_two_processes_share_one_feature_cache_and_learn_as_one(tmp_path: Path) -> None:
    cached = (*FROZEN, "data.cache_features=true", "data.augment.mix=none", "data.augment.random_crop_padding=0")
    start(*cached, *TWO, "paths.output_dir=two", "paths.cache_dir=shared", cwd=tmp_path)
    assert len(list((tmp_path / "shared" / "features").glob("*.safetensors"))) == 4, "train in two views, val and test"
    start(*cached, "paths.output_dir=one", "paths.cache_dir=own", cwd=tmp_path)
    for alone, shared in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("train/loss", "train/acc", "val/loss", "val/acc"):
            assert float(shared[key]) == pytest.approx(float(alone[key]), rel=1e-4), key
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["test"]["count"] == 100


def test_when_a_process_is_killed_the_job_ends_and_can_be_resumed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "cifar10_tl.train", *FROZEN, *TWO, "trainer.max_epochs=100")
    job = subprocess.Popen(
        [*command, "paths.output_dir=run"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    (child,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "another process of this run has ended" in output or "terminated with code -9" in output
    done = len(rows(tmp_path / "run"))
    start("resume=run", f"trainer.max_epochs={done + 1}", cwd=tmp_path)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [str(epoch) for epoch in range(done + 1)]


def epochs_done(run: Path) -> int:
    return len(rows(run)) if (run / "metrics.csv").exists() else 0


def test_two_processes_stop_together_and_go_on_together(tmp_path: Path) -> None:
    """By a signal to the one that the user started, and by a Ctrl-C, which a terminal sends to both."""
    run = (*FROZEN, *TWO, "data.train_size=2080", "trainer.max_epochs=3")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def stop(how: Callable[[int], None], status: int, *arguments: str) -> None:
        job = subprocess.Popen(
            [sys.executable, "-m", "cifar10_tl.train", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        done = epochs_done(tmp_path / "run")
        while epochs_done(tmp_path / "run") == done:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        how(job.pid)
        output, _ = job.communicate(timeout=60)
        assert job.returncode == status, output
        assert output.count("resume with: python -m cifar10_tl.train resume=run") == 1
        assert "Traceback" not in output

    stop(lambda pid: os.kill(pid, signal.SIGTERM), 143, *run, "paths.output_dir=run")
    stop(lambda pid: os.killpg(pid, signal.SIGINT), 130, "resume=run")
    start("resume=run", cwd=tmp_path)
    start(*run, "paths.output_dir=whole", cwd=tmp_path)
    for resumed, whole in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        for key in ("train/loss", "train/acc", "val/loss", "val/acc"):
            assert float(resumed[key]) == pytest.approx(float(whole[key]), rel=1e-5), key


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_two_machines_with_addresses_of_their_own_learn_as_one_process(tmp_path: Path) -> None:
    probe = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.decode().strip()}")
    subprocess.run(["ip", "netns", "del", f"probe-{os.getpid()}"], check=True)
    script = REPOSITORY / "scripts" / "two_machines.sh"
    done = subprocess.run(
        [script, tmp_path], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes on two addresses, 101 test images" in done.stdout
    assert "confusion matrix the same" in done.stdout
