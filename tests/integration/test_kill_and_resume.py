"""Runs that are stopped by signals, killed, or out of disk space, and then resumed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    REPOSITORY,
    SMALL,
    TINY,
    Accident,
    compose_train,
    on_unequal_classes,
    resume,
    rows,
    saved_step,
    scalars,
    start_python,
)
from omegaconf import OmegaConf

sys.path.insert(0, str(REPOSITORY / "scripts"))

import soak

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.resume import resumed_config
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.processes import Stopped
from cifar10_tl.io import claim
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

pytestmark = pytest.mark.slow

#: Two epochs of five batches and three steps, with everything that has a state.
RUN = (
    *(*SMALL, *TINY, "data.train_size=112", "data.batch_size=16", "trainer.accumulate_grad_batches=2"),
    *("trainer.deterministic=true", "callbacks=minimal", "report=none", "model.head.dropout=0.2"),
    *("ema_decay=0.9", "ema_bn_batches=2"),
    *("data.augment.random_crop_padding=4", "data.augment.trivial_augment=true", "data.augment.mix=cutmix"),
    *("data.augment.random_resized_crop=[0.6,1]", "data.augment.mix_off_last=0.5"),
    "+callbacks.accident={_target_: helpers.Accident}",
)


def accident(happens: Callable[[], Any], place: str, number: int) -> None:
    Accident.happens, Accident.at = happens, (place, number)


def power_cut() -> None:
    raise RuntimeError("power cut")


def start(run: Path, *overrides: str) -> Any:
    return train(compose_train(*RUN, f"paths.output_dir={run}", *overrides))


def killed(place: str, number: int, task: Callable[..., Any], *arguments: Any) -> None:
    accident(power_cut, place, number)
    with pytest.raises(RuntimeError, match="power cut"):
        task(*arguments)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    start(run := tmp_path_factory.mktemp("whole") / "run")
    return run


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Any]:
    """Return what the uninterrupted run came to, except its speed."""
    return soak.outcome(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the uninterrupted run."""
    return shutil.copytree(whole, tmp_path / "run")


def assert_same(run: Path, expected: dict[str, Any]) -> None:
    assert [name for name, value in soak.outcome(run).items() if value != expected[name]] == []


def test_a_run_stopped_before_its_first_step_has_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(CIFAR10DataModule, "prepare_data", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        start(tmp_path)
    assert "compile false" in caplog.text
    assert "resume with" not in caplog.text


@pytest.mark.parametrize(
    ("signum", "place", "number", "message"),
    [
        (signal.SIGTERM, "step", 1, "stopped by SIGTERM at epoch 0, step 2"),
        (signal.SIGINT, "validation", 0, "stopped by SIGINT after epoch 0"),
        (signal.SIGTERM, "step", 5, "stopped by SIGTERM after the last epoch"),
        (signal.SIGINT, "test end", 0, ""),
    ],
)
def test_run_stopped_by_a_signal_resumes_exactly(
    signum: int, place: str, number: int, message: str, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    accident(lambda: os.kill(os.getpid(), signum), place, number)
    with pytest.raises(Stopped) as stopped:
        start(tmp_path)
    assert stopped.value.code == 128 + signum
    assert f"resume with: python -m cifar10_tl.train resume={tmp_path}" in caplog.text
    assert message in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "previous handlers should be restored"
    resume(tmp_path)
    assert_same(tmp_path, expected)
    assert len(scalars(tmp_path, "test/acc")) == 1


def test_results_of_a_run_that_is_trained_further_are_removed(tmp_path: Path) -> None:
    start(tmp_path, "callbacks.metrics_logger=null", "trainer.max_epochs=1")
    assert (tmp_path / "results.json").is_file()
    killed("test end", 0, resume, tmp_path, "trainer.max_epochs=2")
    assert not (tmp_path / "results.json").exists()
    assert [step for step, _ in scalars(tmp_path, "val/acc")] == [0, 1]


def test_run_that_is_killed_repeatedly_resumes_exactly(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed("step", 4, start, tmp_path, "checkpoint_every_n_steps=1")
    for path in (tmp_path / "checkpoints").iterdir():  # as if it was killed before the first checkpoint
        path.unlink()
    killed("batch", 2, resume, tmp_path)
    assert saved_step(tmp_path) == 1
    killed("batch", 3, resume, tmp_path)
    assert saved_step(tmp_path) == 1, "a checkpoint between the batches of one step would lose gradients"
    killed("step", 5, resume, tmp_path)
    assert saved_step(tmp_path) == 5
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start(tmp_path)  # torchrun repeats the first command, and so does SLURM
    assert_same(tmp_path, expected)


def test_killed_run_on_unequal_classes_resumes_exactly(tmp_path: Path) -> None:
    data = on_unequal_classes(RUN, tmp_path / "images")
    given = (*data, "data.balance=loss", f"paths.cache_dir={tmp_path / 'cache'}")
    train(compose_train(*given, f"paths.output_dir={tmp_path / 'whole'}"))
    cfg = compose_train(*given, f"paths.output_dir={tmp_path / 'run'}", "checkpoint_every_n_steps=1")
    killed("step", 4, train, cfg)
    assert saved_step(tmp_path / "run") == 4, "inside the second epoch"
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", soak.outcome(tmp_path / "whole"))


def test_run_killed_between_its_two_checkpoints_resumes_from_the_newer(run: Path, expected: dict[str, Any]) -> None:
    last, best = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    shutil.copy(last, best)
    torch.save(torch.load(last, weights_only=True) | {"global_step": 3}, last)
    (run / "results.json").unlink()
    resume(run)
    assert saved_step(run) == 6
    assert_same(run, expected | {"results.json": soak.outcome(run)["results.json"]})  # best.ckpt was the other epoch


def test_finished_run_can_be_made_longer(run: Path) -> None:
    temporary = run / "checkpoints" / ".last.ckpt.abc.tmp"
    temporary.touch()
    killed("step", 7, resume, run, "trainer.max_epochs=3")
    assert not temporary.exists()
    assert not (run / "results.json").exists(), "results of the shorter run should be removed"
    assert OmegaConf.load(run / RUN_CONFIG).trainer.max_epochs == 3
    results = resume(run)
    assert results["epochs"] == len(rows(run)) == 3
    assert results["val"]["acc"] == max(float(row["val/acc"]) for row in rows(run))


def test_longer_run_has_the_learning_rates_of_its_schedule(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(
        LitClassifier, "on_before_optimizer_step", lambda _, optimizer: rates.append(optimizer.param_groups[0]["lr"])
    )
    start(tmp_path / "three", "trainer.max_epochs=3")
    resume(run, "trainer.max_epochs=3")
    assert len(rates) == 9 + 3
    assert rates[9:] == rates[6:9]


def test_settings_of_a_refused_resume_are_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / RUN_CONFIG).read_bytes()
    with pytest.raises(UserError, match=r"trainer\.max_epochs=1: .* already has 2 epochs"):
        resume(run, "trainer.max_epochs=1")
    monkeypatch.setattr(CIFAR10DataModule, "changed_splits", lambda *_: ["train"])
    with pytest.raises(UserError, match="the data has changed"):
        resume(run, "trainer.max_epochs=3")
    assert (run / RUN_CONFIG).read_bytes() == before


# -------------------------------------------------------------------------------------------------- damaged run folders


def test_broken_checkpoints_are_not_resumed(
    run: Path, expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    last, best = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    flip_bit(last)
    resume(run)
    assert "last.ckpt is damaged" in caplog.text
    assert f"from {best}" in caplog.text
    assert_same(run, expected)
    flip_bit(best)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match="checkpoints are broken"):
        resume(run)


def test_last_checkpoint_is_tested_if_the_best_is_broken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_bit(run / "checkpoints" / "best.ckpt")
    (run / "results.json").unlink()
    assert resume(run)["test"]["count"] == 32
    assert "best.ckpt is damaged" in caplog.text


def test_changed_settings_are_refused(run: Path) -> None:
    config = OmegaConf.load(run / RUN_CONFIG)
    config.optimizer.lr = 0.5
    OmegaConf.save(config, run / RUN_CONFIG)
    with pytest.raises(UserError, match=r"optimizer=.*'lr': 0\.001.*'lr': 0\.5"):
        resume(run)


def test_two_processes_cannot_write_to_one_folder(run: Path) -> None:
    with claim(run) as claimed:
        assert claimed
        with pytest.raises(UserError, match="another process is"):
            resume(run)


def test_code_of_others_is_not_run_unless_trusted(run: Path) -> None:
    given = [f"resume={run}"]
    with pytest.raises(UserError, match=r"callbacks\.accident\._target_=helpers\.Accident.* trust=true"):
        resumed_config(compose_train(*given), given)
    assert "accident" in resumed_config(compose_train(*given), [*given, "trust=true"]).callbacks


# ------------------------------------------------------------------------------------------------------------ full disk


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    accident(lambda: monkeypatch.setattr("cifar10_tl.io.os.fsync", fail), "step", 4)
    with pytest.raises((UserError, OSError), match="No space left on device"):
        start(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert saved_step(tmp_path) == 3


def test_checkpoint_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """The operating system refuses files of more than 20 MB."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000,) * 2); "
        "from cifar10_tl.train import main; main()"
    )
    given = (*SMALL, *TINY, "callbacks=minimal", "logger=none", "paths.output_dir=run")
    process = start_python("-c", code, *given, cwd=tmp_path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "[Errno 27] File too large" in line
    assert f"resume={tmp_path / 'run'}" in line
    assert "Traceback" not in output
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run" / "results.json").exists()
