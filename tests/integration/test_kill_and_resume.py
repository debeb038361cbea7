"""What happens to long runs: signals, kills, full disks, losses that are no numbers, folders of strangers."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, SMALL, Accident, compose_train
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(REPOSITORY / "scripts"))

import soak

from cifar10_tl.callbacks.graceful_stop import requeue
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.resume import is_trusted, resume_command, resumed_config
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.engine.builder import build_loggers, next_epoch
from cifar10_tl.engine.checkpoints import RunCheckpointIO, best_checkpoint, find_resumable
from cifar10_tl.engine.processes import SignalHandler, Stopped
from cifar10_tl.io import claim
from cifar10_tl.train import train, was_requeued

Small = Callable[..., DictConfig]
#: Two epochs of five steps, with all that has a state: augmentation, dropout, an average of the weights.
RUN = ("trainer.deterministic=true", "model.head.dropout=0.2", "data.augment.random_crop_padding=4", "ema_decay=0.9")


WITH_ACCIDENT = "+callbacks.accident={_target_: helpers.Accident}"


def accident(happens: Callable[[], Any], place: str, number: int) -> None:
    Accident.happens, Accident.at = happens, (place, number)


def send(signum: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def power_cut() -> None:
    raise RuntimeError("the power is gone")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train(compose_train(*SMALL, *RUN, WITH_ACCIDENT, f"paths.output_dir={folder}"))
    return folder


def resume(folder: Path, *overrides: str) -> Any:
    given = [f"resume={folder}", "trust=true", *overrides]  # of the accident
    return train(resumed_config(compose_train(*given), given))


@pytest.mark.parametrize(
    ("signum", "place", "number"),
    [
        (signal.SIGTERM, "step", 2),
        (signal.SIGINT, "step", 0),
        (signal.SIGTERM, "step", 4),  # an epoch's last
        (signal.SIGINT, "step", 7),
        (signal.SIGTERM, "validation", 0),
        (signal.SIGTERM, "step", 9),  # the last of all
        (signal.SIGINT, "test", 0),
    ],
)
def test_a_run_that_got_a_signal_ends_as_if_it_had_not(
    small_cfg: Small,
    whole: Path,
    caplog: pytest.LogCaptureFixture,
    signum: signal.Signals,
    place: str,
    number: int,
) -> None:
    caplog.set_level("INFO")
    cfg = small_cfg(*RUN, WITH_ACCIDENT)
    folder = Path(cfg.paths.output_dir)
    accident(send(signum), place, number)
    with pytest.raises(Stopped) as stopped:
        train(cfg)
    assert stopped.value.code == 128 + signum
    assert f"resume with: python -m cifar10_tl.train resume={folder}" in caplog.text
    if (place, number) == ("step", 2):
        assert f"stopped by {signum.name} at epoch 0, step 3" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are as they were"
    resume(folder)
    assert soak.differences(folder, whole) == []


@pytest.mark.parametrize("step", [1, 3, 6, 9])
def test_a_run_that_was_killed_ends_as_if_it_had_not(small_cfg: Small, whole: Path, step: int) -> None:
    """Whether by kill -9 or otherwise, what is left is the files; soak.py does it to processes."""
    cfg = small_cfg(*RUN, WITH_ACCIDENT, "checkpoint_every_n_steps=2")
    folder = Path(cfg.paths.output_dir)
    accident(power_cut, "step", step)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(cfg)
    found = find_resumable(folder, RunCheckpointIO())
    if step == 1:
        assert found is None
    else:
        assert found is not None
        saved = found[1]["global_step"]
        assert saved == {3: 2, 6: 6, 9: 8}[step], "every second step inside an epoch, and at its end"
    resume(folder)
    assert soak.differences(folder, whole) == []


def test_the_newest_good_checkpoint_is_found(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    content = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content | {"global_step": 5}, checkpoints / "last.ckpt")
    torch.save(content | {"global_step": 10}, checkpoints / "best.ckpt")
    assert find_resumable(tmp_path, RunCheckpointIO())[0] == checkpoints / "best.ckpt", (
        "killed between the two writes of an epoch"
    )
    (checkpoints / "best.ckpt").write_bytes(b"PK half")
    assert find_resumable(tmp_path, RunCheckpointIO())[0] == checkpoints / "last.ckpt"
    assert "best.ckpt cannot be read safely: it is broken" in caplog.text
    assert "going on from" in caplog.text


def test_a_run_killed_between_the_two_checkpoints_of_its_last_epoch_has_both_in_the_end(
    small_cfg: Small, whole: Path
) -> None:
    cfg = small_cfg(*RUN, WITH_ACCIDENT, "checkpoint_every_n_steps=2")
    folder = Path(cfg.paths.output_dir)
    accident(power_cut, "step", 9)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(cfg)
    content = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    resume(folder)
    assert soak.state(folder) == soak.state(whole)


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_no_checkpoint_is_written_between_the_batches_of_one_update(small_cfg: Small, ema: str) -> None:
    """Its gradients would be lost. Two cuts: Lightning would save at the first batch behind a resume."""
    run = (*RUN, WITH_ACCIDENT, "trainer.accumulate_grad_batches=2", "checkpoint_every_n_steps=1", f"ema_decay={ema}")
    uncut, cut = small_cfg(*run, "test=false", run="uncut"), small_cfg(*run, "test=false", run="cut")
    train(uncut)
    folder = Path(cut.paths.output_dir)
    accident(power_cut, "batch", 2)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(cut)
    accident(power_cut, "batch", 3)
    with pytest.raises(RuntimeError, match="the power is gone"):
        resume(folder)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    resume(folder)
    assert soak.state(folder) == soak.state(Path(uncut.paths.output_dir))


def test_a_finished_run_that_is_made_longer_and_stopped_goes_on_by_itself(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    left_over = run / "checkpoints" / ".last.ckpt.abc.tmp"
    left_over.write_bytes(b"half")
    accident(power_cut, "step", 12)
    with pytest.raises(RuntimeError, match="the power is gone"):
        resume(run, "trainer.max_epochs=4")
    assert not left_over.exists()
    assert not (run / "results.json").exists(), "it would look finished"
    assert OmegaConf.load(run / RUN_CONFIG).trainer.max_epochs == 4
    assert resume(run)["epochs"] == 4


def test_a_flipped_bit_in_a_checkpoint_is_noticed(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    last, best = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    spoil(last)
    assert find_resumable(tmp_path, RunCheckpointIO())[0] == best
    assert "last.ckpt is broken: the checksum of" in caplog.text
    spoil(best)
    trainer: Any = SimpleNamespace(
        checkpoint_callback=SimpleNamespace(best_model_path=str(tmp_path / "checkpoints" / "best.ckpt")),
        default_root_dir=str(tmp_path),
        strategy=SimpleNamespace(checkpoint_io=RunCheckpointIO()),
    )
    assert best_checkpoint(trainer) is None
    shutil.copy(whole / "checkpoints" / "last.ckpt", last)
    assert best_checkpoint(trainer) == (last, torch.load(last, weights_only=True)["epoch"])


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_settings_that_no_longer_fit_the_checkpoint_are_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    config = OmegaConf.load(tmp_path / "run" / RUN_CONFIG)
    config.optimizer.lr = 0.5
    OmegaConf.save(config, tmp_path / "run" / RUN_CONFIG)
    with pytest.raises(UserError, match=r"was made with optimizer=.*'lr': 0\.001.* now say .*'lr': 0\.5"):
        resume(tmp_path / "run")


def test_two_runs_never_write_into_one_folder(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with claim(tmp_path / "run") as claimed:
        assert claimed
        with pytest.raises(UserError, match="another process is at work in this folder"):
            resume(tmp_path / "run")
    resume(tmp_path / "run")


@pytest.mark.parametrize("name", ["run", "a b", "a=b", "a,b", "outputs/runs/2026-01-01_00-00-00_1"])
def test_what_to_type_to_go_on_is_taken_by_shell_and_hydra(name: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = shlex.split(resume_command(Path(name)))
    assert typed[:3] == ["python", "-m", "cifar10_tl.train"]
    (override,) = OverridesParser.create().parse_overrides(typed[3:])
    assert override.key_or_group == "resume"
    assert override.value() == name


def test_tensorboard_discards_what_was_logged_after_the_checkpoint(small_cfg: Small) -> None:
    cfg = small_cfg(*RUN)
    rows = {"MetricsLogger": {"rows": [{"epoch": 0}, {"epoch": 1}]}}
    assert next_epoch({"callbacks": rows}) == 2
    assert build_loggers(cfg, {"callbacks": rows})[0]._kwargs["purge_step"] == 2
    assert "purge_step" not in build_loggers(cfg, None)[0]._kwargs
    Path(cfg.paths.output_dir).mkdir(parents=True)
    (Path(cfg.paths.output_dir) / RUN_CONFIG).touch()
    assert build_loggers(cfg, None)[0]._kwargs["purge_step"] == 0, "killed before its first checkpoint"


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_second_interrupt_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with SignalHandler() as handler:
        handler.deferred = True
        send(signal.SIGINT)()
        assert handler.received == signal.SIGINT
        assert ends == []
        send(signal.SIGTERM)()
        assert ends == [], "only an impatient person"
        send(signal.SIGINT)()
        assert ends == [130]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_got_a_signal_says_how_to_go_on(tmp_path: Path, signum: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "cifar10_tl.train", *SMALL, "trainer.max_epochs=200", "paths.output_dir=run")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert "resume with: python -m cifar10_tl.train resume=run" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert find_resumable(tmp_path / "run", RunCheckpointIO())[0] == tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_a_job_that_slurm_starts_again_goes_on_in_its_folder(
    small_cfg: Small, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_cfg(*RUN, WITH_ACCIDENT)
    folder = Path(cfg.paths.output_dir)
    accident(send(signal.SIGTERM), "step", 6)
    with pytest.raises(Stopped):
        train(cfg)
    assert not was_requeued(folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert was_requeued(folder)
    train(small_cfg(*RUN, WITH_ACCIDENT))  # the very same command
    assert soak.differences(folder, whole) == []


def test_a_preempted_job_is_put_back_into_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    requeue()
    assert (tmp_path / "told").read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue()
    assert (tmp_path / "told").read_text() == "requeue 15_2\n"


# ------------------------------------------------------------------------------------------------- disks, and numbers


def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(
    small_cfg: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_cfg(*RUN, WITH_ACCIDENT)
    folder = Path(cfg.paths.output_dir)

    def fill_the_disk() -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("cifar10_tl.io.os.fsync", full)

    accident(fill_the_disk, "step", 7)
    with pytest.raises((UserError, OSError), match="No space left on device"):
        train(cfg)
    monkeypatch.undo()
    assert not list(folder.rglob("*.tmp"))
    found = find_resumable(folder, RunCheckpointIO())
    assert found is not None
    assert found[1]["global_step"] == 5


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_disk_has_room_for(tmp_path: Path) -> None:
    """A write that really fails, in the middle of a file: the process may write no file of more than 20 MB."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000,) * 2); "
        "from cifar10_tl.train import main; main()"
    )
    command = (sys.executable, "-c", code, *SMALL, "trainer.max_epochs=1", "paths.output_dir=run")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert "cannot be written: [Errno 27] File too large" in line
    assert f"Make room on the disk, then go on with resume={tmp_path / 'run'}" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run" / "results.json").exists()


# -------------------------------------------------------------------------------------------------- strangers' folders


@pytest.mark.parametrize(
    ("target", "trusted"),
    [
        ("cifar10_tl.callbacks.Curves", True),
        ("lightning.pytorch.callbacks.LearningRateMonitor", True),
        ("lightning.pytorch.loggers.CSVLogger", True),
        ("lightning.pytorch.strategies.DDPStrategy", True),
        ("torch.optim.SGD", True),
        ("os.system", False),
        ("torch.hub.load", False),
        ("torch.load", False),
        ("lightning.pytorch.callbacks.model_checkpoint.os.system", False),
        ("lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree", False),
        ("cifar10_tl.io.atomic_write_text", False),
        ("cifar10_tl.io.Path", False),
        ("cifar10_tlx.Thing", False),
        ("hydra.utils.get_method", False),
        (["os.system"], False),
    ],
)
def test_which_code_a_run_folder_may_name(target: Any, trusted: bool) -> None:
    assert is_trusted(target) is trusted


def test_a_folder_that_names_other_code_is_not_resumed_unless_trusted(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = OmegaConf.load(whole / RUN_CONFIG)
    del config.callbacks.accident
    config.callbacks.curves = {"_target_": "os.system", "command": f"touch {tmp_path / 'harm'}"}
    OmegaConf.save(config, run / RUN_CONFIG)
    given = [f"resume={run}"]
    with pytest.raises(UserError, match=r"callbacks\.curves\._target_=os\.system; read it, and add trust=true"):
        resumed_config(compose_train(*given), given)
    assert resumed_config(compose_train(*given), [*given, "trust=true"]).callbacks.curves["_target_"] == "os.system"
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("x: ${oc.create:{_target_:shutil.rmtree,path:/nowhere}}", r"config\.yaml: x holds \$\{\.\.\.\}"),
        ("x: ${oc.env:HOME}", "holds"),
        ("x: !!python/object/apply:os.system [ls]", "is damaged"),
        ("x: [1, 2", "is damaged"),
        ("x: 1\nx: 2", "is damaged"),
        ("paths: null", "is damaged"),
        ("paths: {output_dir: 7}", "is damaged .paths.output_dir is not a string."),
        ("\0\x81", "is damaged"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_or_dressed_up_config_is_told_in_a_line(
    whole: Path, tmp_path: Path, harm: str | None, told: str
) -> None:
    lines = (whole / RUN_CONFIG).read_text()
    if harm is None:
        lines = ""
    else:
        lines = "".join(part for part in lines.splitlines(True) if "accident" not in part and "Accident" not in part)
        lines = harm if harm.startswith("paths") else f"{lines}{harm}\n"
    (tmp_path / RUN_CONFIG).write_text(lines)
    given = [f"resume={tmp_path}"]
    with pytest.raises(UserError, match=told):
        resumed_config(compose_train(*given), given)


def test_a_longer_run_is_shown_as_a_difference(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    given = [f"resume={whole}", "trust=true", "trainer.max_epochs=5"]
    cfg = resumed_config(compose_train(*given), given)
    assert cfg.trainer.max_epochs == 5
    assert "trainer.max_epochs: 2 -> 5" in caplog.text
