from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, compose_train
from omegaconf import OmegaConf

from cifar10_tl.config import errors, run_dir
from cifar10_tl.config.errors import UserError, explain
from cifar10_tl.config.resume import resumed_config


def test_a_fault_of_ours_is_no_mistake_of_the_user() -> None:
    assert explain(ZeroDivisionError(), "train") is None
    assert explain(RuntimeError("shapes differ"), "train") is None
    assert explain(OSError(28, "No space left on device"), "train") == "[Errno 28] No space left on device"


def test_every_rule_is_about_a_setting_that_exists() -> None:
    from cifar10_tl.config.validation import RULES

    known: set[str] = set()
    for choice in (["data=folder"], ["data=shapes", "model/head=lstm"], ["data=cifar10", "optimizer=sgd"]):
        cfg = OmegaConf.to_container(compose_train(*choice))
        known |= set(errors._leaves(cfg))
    for command in ("predict", "export", "evaluate"):
        known |= set(errors.config_keys(command))
    assert set(RULES) <= known


def test_every_experiment_and_debug_choice_composes() -> None:
    for group in ("experiment", "debug"):
        for file in sorted((REPOSITORY / "conf" / group).glob("*.yaml")):
            assert compose_train(f"{group}={file.stem}").model.backbone == "resnet50", file


def test_the_seed_experiment_is_the_original_recipe() -> None:
    cfg = compose_train("experiment=original")
    assert (cfg.model.backbone, cfg.model.weights, cfg.model.image_size) == ("resnet50", "IMAGENET1K_V1", 32)
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.backbone_lr_scale) == ("Adam", 0.001, 1.0)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs, cfg.model.head.name) == (128, 40, "dense")
    assert (cfg.scheduler.name, cfg.model.label_smoothing, cfg.data.augment.mix) == ("constant", 0.0, "none")
    assert (
        cfg.data.augment.horizontal_flip,
        cfg.data.augment.random_crop_padding,
        cfg.data.augment.random_erasing,
    ) == (False, 0, 0.0)


def test_the_default_is_what_the_readme_says() -> None:
    cfg = compose_train()
    assert (cfg.model.weights, cfg.model.image_size, cfg.optimizer.backbone_lr_scale) == (
        "IMAGENET1K_V2",
        224,
        0.1,
    )
    assert (cfg.data.batch_size, cfg.data.val_size, cfg.trainer.max_epochs) == (128, 5000, 40)


# ------------------------------------------------------------------------------------------------------------ folders


def test_the_stamp_is_made_once_and_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(run_dir.STAMP_VARIABLE, raising=False)
    stamp = run_dir.run_stamp()
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_{os.getpid()}", stamp)
    assert run_dir.run_stamp() == os.environ[run_dir.STAMP_VARIABLE] == stamp


@pytest.mark.parametrize(
    ("variables", "stamp"),
    [
        ({"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "slurm-77-2"),
        ({"TORCHELASTIC_RUN_ID": "night", "RANK": "1"}, "torchrun-night"),
    ],
)
def test_processes_started_side_by_side_share_a_stamp(variables: dict, stamp: str, monkeypatch) -> None:
    monkeypatch.delenv(run_dir.STAMP_VARIABLE, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert run_dir.run_stamp() == stamp


def test_a_resumed_run_keeps_its_config_but_for_its_length(tmp_path: Path) -> None:
    own = compose_train("optimizer.lr=0.5", "data.batch_size=32", f"paths.output_dir={tmp_path}")
    (tmp_path / run_dir.RUN_CONFIG).write_text(OmegaConf.to_yaml(own, resolve=True))
    given = [f"resume={tmp_path}", "trainer.max_epochs=99", "test=false"]
    cfg = resumed_config(compose_train(*given), given)
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.max_epochs, cfg.test) == (0.5, 32, 99, False)
    assert cfg.paths.output_dir == str(tmp_path)
    assert cfg.resume == str(tmp_path)
    with pytest.raises(UserError, match=r"optimizer\.lr=1: a resumed run keeps its own settings"):
        resumed_config(compose_train(*given), [*given, "optimizer.lr=1"])
    with pytest.raises(UserError, match=r"a resumed run keeps its own settings.*init_from="):
        resumed_config(compose_train(*given), [*given, "init_from=some.ckpt"])
    with pytest.raises(UserError, match="no run lies there"):
        resumed_config(compose_train("resume=nowhere"), ["resume=nowhere"])


# ----------------------------------------------------------------------------------------------------------- processes


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in (run_dir.STAMP_VARIABLE, "HYDRA_FULL_ERROR")}
    env |= {"PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(
        [sys.executable, "-m", "cifar10_tl.train", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_mistake_ends_the_process_with_status_2_and_one_line(tmp_path: Path) -> None:
    for arguments in (
        ["data.batch_size=abc"],
        ["data.batchsize=3"],
        ["seed=1", "--lr", "0.1"],
        ["optimizer.lr=0", "-m", "seed=1,2"],
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr
    full = command("data.batch_size=abc", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert full.returncode == 1
    assert "Traceback" in full.stderr


@pytest.mark.slow
def test_help_and_cfg_do_not_import_torch(tmp_path: Path) -> None:
    for flags in (["--help"], ["--cfg", "job"], ["data.batch_size=abc"]):
        done = command(*flags, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M))
        assert "hydra" in imported
        assert not imported & {"torch", "lightning", "matplotlib", "torchvision"}
    assert "python -m cifar10_tl.train experiment=quickstart" in command("--help", cwd=tmp_path).stdout
