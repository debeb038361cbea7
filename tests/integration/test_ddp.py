"""Runs of several processes, compared with one process; how they start, and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    REPOSITORY,
    SMALL,
    TINY,
    compose_train,
    free_port,
    in_processes,
    on_unequal_classes,
    resume,
    rows,
    scalars,
    start_python,
    train_in_two_processes,
    write_shapes,
)
from torch import Tensor

from cifar10_tl.data.batch import Batch
from cifar10_tl.engine.builder import build_datamodule, build_module, build_trainer
from cifar10_tl.engine.results import read_results
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

pytestmark = pytest.mark.slow

#: Without dropout, whose masks differ between processes. The numbers of test and validation images are odd.
PLAIN = (
    *(*SMALL, *TINY, "model.head.dropout=0", "trainer.deterministic=true", "data.val_size=33", "data.test_size=35"),
    "report=none",
)
#: Without figures and TensorBoard.
METRICS = ("callbacks=minimal", "logger=none")
#: With BatchNorm in eval mode, whose statistics differ between processes.
FIXED = (
    *(*PLAIN, "model.freeze=layer2", "scheduler=linear", "scheduler.head_only_epochs=2", "data.augment.mix=cutmix"),
    "model.image_size=[[0,24],[0.5,32]]",
)
CROPS = ("data.augment.random_resized_crop=[0.5,1]", "data.augment.trivial_augment=true")
TWO = ("trainer=ddp_cpu", "trainer.devices=2")
TRAIN = ("-m", "cifar10_tl.train")


def finish(*arguments: str, cwd: Path, status: int = 0, **variables: str) -> str:
    """Run a command to its end and return its output."""
    process = start_python(*arguments, cwd=cwd, **variables)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def epochs(run: Path) -> int:
    return len(rows(run)) if (run / "metrics.csv").exists() else 0


def wait_for_an_epoch(process: subprocess.Popen[str], run: Path) -> None:
    before = epochs(run)
    while epochs(run) == before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def child_of(process: subprocess.Popen[str]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def assert_same_metrics(run: Path, other: Path, rel: float) -> None:
    for row, expected in zip(rows(run), rows(other), strict=True):
        for key in ("train/loss", "train/acc", "val/loss", "val/acc"):
            assert float(row[key]) == pytest.approx(float(expected[key]), rel=rel), key


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of one run on one process, on two started by Lightning, and on two started by torchrun.

    They train on a folder of images, with one cache.
    """
    folder = tmp_path_factory.mktemp("ddp")
    write_shapes(folder / "images", 10, train=13, test=4)
    for name in sorted((folder / "images" / "test").glob("*/03.png"))[:5]:
        name.unlink()
    data = (
        f"data.root={folder / 'images'}",
        f"paths.cache_dir={folder / 'cache'}",
        "data=folder",
        "data.batch_size=32",
    )
    settings = [o for o in (*FIXED, *CROPS) if "train_size" not in o and "test_size" not in o and o != "data=shapes"]
    run = (*TRAIN, *settings, *data, "report=short")
    finish(*run, "paths.output_dir=one", cwd=folder)
    finish(*run, *TWO, "paths.output_dir=two", cwd=folder)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    finish(*torchrun, *run, *TWO, cwd=folder)
    (torchrun_folder,) = (folder / "outputs" / "runs").iterdir()
    return {"one": folder / "one", "two": folder / "two", "torchrun": torchrun_folder, "cache": folder / "cache"}


def test_images_are_decoded_once(runs: dict[str, Path]) -> None:
    (pixels,), (index,) = (list(runs["cache"].glob(f"*.{kind}")) for kind in ("pixels", "index"))
    assert pixels.stat().st_size == (130 + 35) * 3 * 32 * 32
    assert len(index.read_text().splitlines()) == 130 + 35


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_two_processes_train_like_one(runs: dict[str, Path], name: str) -> None:
    one, two = runs["one"], runs[name]
    assert_same_metrics(two, one, rel=1e-4)
    for tag in ("train/loss_step", "lr/head"):
        points, others = scalars(one, tag), scalars(two, tag)
        assert [step for step, _ in points] == list(range(1, int(rows(one)[-1]["step"]) + 1))
        assert others == [(step, pytest.approx(value, rel=1e-4)) for step, value in points]
    expected, actual = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)
    )
    assert all(torch.allclose(value, actual[key], atol=1e-4) for key, value in expected.items())
    expected, actual = read_results(one), read_results(two)
    counts = (actual["val"]["count"], actual["test"]["count"], actual["environment"]["devices"])
    assert counts == (33, 35, 2), "each image is counted once"
    assert actual["confusion_matrix"] == expected["confusion_matrix"]
    assert actual["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_two_processes_write_the_files_of_one(runs: dict[str, Path], name: str) -> None:
    one, two = (
        {str(path.relative_to(runs[key])) for path in runs[key].rglob("*") if not path.name.startswith("events")}
        for key in ("one", name)
    )
    assert one == two
    assert len(list(runs[name].glob("events*"))) == 1
    assert (runs[name] / "train.log").read_text().count("test acc") == 1


def evaluate(overrides: tuple[str, ...], file: Path) -> None:
    """Test an untrained network; the last process writes its evaluation."""
    cfg = compose_train(*overrides)
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    module, trainer = build_module(cfg, datamodule), build_trainer(cfg)
    trainer.test(module, datamodule=datamodule, verbose=False)
    found = module.evaluation
    assert found is not None
    if trainer.global_rank == trainer.world_size - 1:
        exact, close = (found.indices, found.labels, found.confusion_matrix), (found.logits, found.features)
        torch.save((*exact, close, found.metrics()), file)


@pytest.mark.parametrize("images", [2, 35])
def test_evaluation_does_not_depend_on_the_number_of_processes(images: int, tmp_path: Path) -> None:
    overrides = (*PLAIN, "callbacks=minimal", "logger=none", "data.batch_size=12", f"data.image_limit={images}")
    for world_size in (1, 2, 3):
        given = (*overrides, "trainer=ddp_cpu", f"trainer.devices={world_size}")
        in_processes(world_size, partial(evaluate, given, tmp_path / str(world_size)))
    *expected, outputs, metrics = torch.load(tmp_path / "1", weights_only=True)
    assert expected[0].unique().numel() == len(expected[0]) == images
    for world_size in (2, 3):
        *exact, other_outputs, other_metrics = torch.load(tmp_path / str(world_size), weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))
        torch.testing.assert_close(other_outputs, outputs, rtol=1e-5, atol=1e-5)  # logits and features
        assert other_metrics == pytest.approx(metrics, rel=1e-5)


class HalfBatchNorm(LitClassifier):
    """Classifier that normalizes each half of a batch by its own statistics and keeps those of the first half."""

    def _logits(self, batch: Batch) -> Tensor:
        first = self.network(batch.images[0::2])
        copies = {name: value.clone() for name, value in self.network.named_buffers()}
        second = torch.func.functional_call(self.network, copies, (batch.images[1::2],))
        return torch.stack((first, second), 1).flatten(0, 1).float()


def test_trainable_batchnorm_is_the_only_difference_of_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the two processes: the order of sums depends on it
    run = (*PLAIN, *METRICS, "optimizer=sgd", "optimizer.lr=0.001")
    train_in_two_processes(*run, f"paths.output_dir={tmp_path / 'two'}")
    train(compose_train(*run, f"paths.output_dir={tmp_path / 'one'}"))
    monkeypatch.setattr("cifar10_tl.engine.builder.LitClassifier", HalfBatchNorm)
    train(compose_train(*run, f"paths.output_dir={tmp_path / 'halves'}"))
    torch.set_num_threads(threads)
    one, two, halves = (rows(tmp_path / name) for name in ("one", "two", "halves"))
    for key in ("train/loss", "val/loss"):
        for actual, same, close in zip(two, halves, one, strict=True):
            assert float(actual[key]) == pytest.approx(float(same[key]), rel=1e-5)
            assert float(actual[key]) == pytest.approx(float(close[key]), rel=0.05)


def test_unequal_classes_are_balanced_by_two_processes_as_by_one(tmp_path: Path) -> None:
    data = on_unequal_classes(FIXED, tmp_path / "images")
    given = (*data, *CROPS, *METRICS, "data.balance=sampler", "callbacks.best_checkpoint.monitor=val/balanced_acc")
    given += (f"paths.cache_dir={tmp_path / 'cache'}",)
    train(compose_train(*given, f"paths.output_dir={tmp_path / 'one'}"))
    train_in_two_processes(*given, f"paths.output_dir={tmp_path / 'two'}")
    assert_same_metrics(tmp_path / "two", tmp_path / "one", rel=1e-4)
    weights = [torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("one", "two")]
    one, two = (content["state_dict"] for content in weights)
    assert all(torch.allclose(value, two[name], atol=1e-4) for name, value in one.items())
    results = read_results(tmp_path / "two")
    best = max(rows(tmp_path / "two"), key=lambda row: float(row["val/balanced_acc"]))
    assert (results["best_epoch"], results["test"]["count"]) == (int(best["epoch"]), 15)
    assert results["val"]["balanced_acc"] == float(best["val/balanced_acc"])


def test_two_processes_share_a_feature_cache(tmp_path: Path) -> None:
    cached = (*FIXED, "data.cache_features=true", "data.augment.mix=none", "data.augment.random_crop_padding=0")
    cached += (*METRICS, "logistic_regression=true", "model.freeze=backbone", "model.image_size=32")
    train_in_two_processes(*cached, f"paths.output_dir={tmp_path / 'two'}", f"paths.cache_dir={tmp_path / 'shared'}")
    assert len(list((tmp_path / "shared" / "features").glob("*.safetensors"))) == 3, "train, val and test"
    train(compose_train(*cached, f"paths.output_dir={tmp_path / 'one'}", f"paths.cache_dir={tmp_path / 'own'}"))
    assert_same_metrics(tmp_path / "two", tmp_path / "one", rel=1e-4)
    assert read_results(tmp_path / "two")["test"]["count"] == 35
    one, two = (read_results(tmp_path / name)["logistic_regression"] for name in ("one", "two"))
    assert two | {"seconds": None} == one | {"seconds": None}
    assert (tmp_path / "two" / "checkpoints" / "logistic_regression.ckpt").is_file()


# ---------------------------------------------------------------------------------------------------------------- start


def test_sweep_has_one_folder_per_job(tmp_path: Path) -> None:
    overrides = (*FIXED, *TWO, "callbacks=minimal", "trainer.max_epochs=1")
    (tmp_path / "own" / "scheduler").mkdir(parents=True)
    (tmp_path / "own" / "scheduler" / "mine.yaml").write_text("defaults: [cosine]\nwarmup: 0.25\n")
    finish(*TRAIN, *overrides, "--config-dir", "own", "scheduler=mine", "-m", "seed=1,2", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"sweeps"}
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    configs = [read_results(sweep / job)["config"] for job in ("0", "1")]
    assert [(config["seed"], config["scheduler"]["warmup"]) for config in configs] == [(1, 0.25), (2, 0.25)]


def test_indivisible_batch_is_reported_once(tmp_path: Path) -> None:
    output = finish(*TRAIN, *FIXED, *TWO, "data.batch_size=63", cwd=tmp_path, status=2)
    assert output.count("error:") == 1
    assert "62 or 64" in output


def test_slurm_script_starts_one_run(tmp_path: Path) -> None:
    """A stand-in for srun starts two processes with the variables of SLURM."""
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "srun": """
while [[ $1 == --* ]]; do echo "$1" >> srun-options; shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_ID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done""",
    }
    for name, lines in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "4242", "JOB_NAME": "cifar10_tl", "JOB_NUM_NODES": "1", "NNODES": "1", "NODELIST": "127.0.0.1"}
    slurm |= {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NODEID": "0", "CPUS_PER_TASK": "8", "SUBMIT_DIR": str(tmp_path)}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    overrides = [override for override in PLAIN if not override.startswith("trainer.devices")]
    script = str(REPOSITORY / "scripts" / "slurm.sh")
    bash = f"import os; os.execvp('bash', {['bash', script, *overrides, 'callbacks=minimal']})"
    finish("-c", bash, cwd=tmp_path, **environment)
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert run.name == "slurm-4242"
    assert (read_results(run)["environment"]["devices"], read_results(run)["test"]["count"]) == (2, 35)
    assert (run / "train.log").read_text().count("test acc") == 1
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} == set((tmp_path / "srun-options").read_text().split())


@pytest.mark.parametrize("resumed", [False, True])
def test_slurm_script_resumes_in_a_new_job(tmp_path: Path, resumed: bool) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    given = ["seed=1", *["resume=outputs/runs/a"] * resumed]
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = ["bash", str(REPOSITORY / "scripts" / "slurm.sh"), *given]
    printed = subprocess.run(script, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True).stdout
    new = ["trainer=ddp", "paths.output_dir=outputs/runs/slurm-7", "checkpoint_every_n_steps=200"]
    settings = ["trainer.num_nodes=1", "trainer.devices=1", *([] if resumed else new), *given]
    assert printed.split("cifar10_tl.train ")[1].split() == settings


# ------------------------------------------------------------------------------------------------------------------ end


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_killed_process_ends_the_run_with_one_line(tmp_path: Path, victim: str) -> None:
    overrides = (*FIXED, *TWO, "callbacks=minimal", "paths.output_dir=run", "trainer.max_epochs=100")
    job = start_python(*TRAIN, *overrides, cwd=tmp_path)
    wait_for_an_epoch(job, tmp_path / "run")
    child = child_of(job)
    os.kill(child if victim == "child" else job.pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=60)  # until both processes have closed the pipe
    assert job.returncode != 0
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert re.search("another process of this run has ended|its parent process", output)
    if victim == "child":
        assert f"process 1 of this run ({child}) was killed by SIGKILL" in output
        done = epochs(tmp_path / "run")
        in_processes(2, lambda: resume(tmp_path / "run", f"trainer.max_epochs={done + 1}"))
        assert [row["epoch"] for row in rows(tmp_path / "run")] == [str(epoch) for epoch in range(done + 1)]


def test_two_processes_stop_and_resume_together(tmp_path: Path) -> None:
    """SIGTERM is sent to the first process; Ctrl-C in a terminal is sent to both."""
    overrides = (*FIXED, *TWO, "callbacks=minimal", "data.train_size=420", "trainer.max_epochs=3")

    def stop(send: Callable[[int, int], None], signum: signal.Signals, *arguments: str) -> None:
        job = start_python(*TRAIN, *arguments, cwd=tmp_path)
        wait_for_an_epoch(job, tmp_path / "run")
        send(job.pid, signum)
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 128 + signum, output
        assert output.count("resume with: python -m cifar10_tl.train resume=run") == 1
        assert "Traceback" not in output

    stop(os.kill, signal.SIGTERM, *overrides, "paths.output_dir=run")
    stop(os.killpg, signal.SIGINT, "resume=run")
    finish(*TRAIN, "resume=run", cwd=tmp_path)
    train_in_two_processes(*overrides, f"paths.output_dir={tmp_path / 'whole'}")
    assert_same_metrics(tmp_path / "run", tmp_path / "whole", rel=1e-5)
