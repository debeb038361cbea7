from __future__ import annotations

import logging.config
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, SMALL, TINY, compose_train
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import OmegaConf

from cifar10_tl.config import errors, launcher, run_dir, validation
from cifar10_tl.config.errors import OneProcessError, UserError, explain
from cifar10_tl.io import claim


def test_bugs_are_not_explained_as_user_errors() -> None:
    assert explain(ZeroDivisionError(), "train") is None
    assert explain(RuntimeError("shapes differ"), "train") is None
    busy = RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for ...")
    assert explain(busy, "train") == "the GPU cannot be used, perhaps because another process uses it (see nvidia-smi)"
    for text in ("worker (pid(s) 7) exited unexpectedly", "worker (pid 7) is killed by signal: Bus error. "):
        assert "docker run --shm-size" in str(explain(RuntimeError(f"DataLoader {text}"), "train"))
    lost = explain(RuntimeError("[gloo/transport/pair.cc:144] Connection refused [127.0.1.1]"), "train")
    assert "another process of this run has ended" in str(lost)
    assert "Connection refused [127.0.1.1]" in str(lost), "the cause may be another one"
    text = "NCCL error: unhandled system error\nError while creating shared memory segment /dev/shm/nccl-x"
    assert "--shm-size" in str(explain(RuntimeError(text), "train"))
    assert explain(OSError(28, "No space left on device"), "train") == "[Errno 28] No space left on device"


def test_jupyters_backend_of_matplotlib_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set for the commands that a notebook starts, whose environment may not have it."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored after the test
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    launcher.run_command("train", lambda cfg: None)
    assert os.environ["MPLBACKEND"] == "agg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import gone_too", "No module named 'gone_too' in the current folder or on PYTHONPATH"),
        ("def", "SyntaxError: .*broken_heads.py, line 1"),
        ("from cifar10_tl.models.heads import GONE", "ImportError: cannot import name 'GONE'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_imported_modules_name_the_setting(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_heads.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^imports=broken_heads: {message}"):
        launcher.import_modules("broken_heads")


def test_every_rule_names_an_existing_setting() -> None:
    known: set[str] = set()
    for choice in (["data=folder"], ["data=shapes", "model/head=lstm"], ["data=cifar10", "optimizer=sgd"]):
        cfg = OmegaConf.to_container(compose_train(*choice))
        known |= {key for key, _ in errors.walk(cfg)}
    for command in ("predict", "export", "evaluate", "tune"):
        known |= set(errors.config_keys(command))
    assert set(validation.RULES) <= known


def test_every_experiment_and_debug_choice_composes() -> None:
    for group in ("experiment", "debug"):
        for file in sorted((REPOSITORY / "conf" / group).glob("*.yaml")):
            assert compose_train(f"{group}={file.stem}").model.backbone in ("resnet10", "resnet18", "resnet50"), file


ORIGINAL = {"model.backbone": "resnet50", "model.weights": "IMAGENET1K_V1", "model.image_size": 32}
ORIGINAL |= {"optimizer.name": "Adam", "optimizer.lr": 0.001, "optimizer.backbone_lr_scale": 1.0}
ORIGINAL |= {"data.batch_size": 128, "trainer.max_epochs": 40, "model.head.name": "dense"}
ORIGINAL |= {"scheduler.name": "constant", "model.label_smoothing": 0.0, "data.augment.mix": "none"}
ORIGINAL |= {f"data.augment.{name}": 0 for name in ("horizontal_flip", "random_crop_padding", "random_erasing")}


SGD = {"optimizer.name": "SGD", "optimizer.momentum": 0.9, "optimizer.nesterov": True, "data.batch_size": 256}
SGD |= {"optimizer.backbone_lr_scale": 1.0, "scheduler.name": "cosine", "scheduler.warmup": 0.05}
IMAGENET = {"model.backbone": "resnet50", "model.weights": "IMAGENET1K_V2", "model.label_smoothing": 0.1}
FAST = {**SGD, **IMAGENET, "optimizer.lr": 0.01, "optimizer.weight_decay": 1e-4, "model.head.dropout": 0.0}
ACCURATE = {**FAST, "model.image_size": [[0, 128], [0.5, 160], [0.75, 224]], "trainer.max_epochs": 24}
ACCURATE |= {"scheduler.head_only_epochs": 1, "ema_decay": 0.998, "data.augment.horizontal_flip": True}
ACCURATE |= {"data.augment.random_crop_padding": 0, "data.augment.random_resized_crop": [0.6, 1]}
ACCURATE |= {"data.augment.mix": "cutmix", "data.augment.mix_off_last": 0.2}
FAST |= {"model.image_size": [[0, 96], [0.5, 128], [0.75, 192]], "trainer.max_epochs": 8}
PARTIAL = {**IMAGENET, "model.freeze": "layer3", "model.image_size": 224, "trainer.max_epochs": 15}
SCRATCH = {**SGD, "model.backbone": "resnet18", "model.weights": None, "model.stem": "cifar", "model.image_size": 32}
SCRATCH |= {"model.head.name": "linear", "optimizer.lr": 0.2, "optimizer.weight_decay": 5e-4, "trainer.max_epochs": 200}
SCRATCH |= {"data.augment.trivial_augment": True, "data.augment.cutout": 16}
SCRATCH |= {"data.augment.horizontal_flip": True, "data.augment.random_crop_padding": 4}
RECIPES = {"original": ORIGINAL, "accurate": ACCURATE, "fast": FAST, "partial": PARTIAL, "scratch": SCRATCH}


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_has_the_values_of_its_recipe(name: str) -> None:
    cfg, recipe = compose_train(f"experiment={name}"), RECIPES[name]
    assert {key: OmegaConf.select(cfg, key) for key in recipe} == recipe


def command(*arguments: str, cwd: Path, name: str = "train", **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in (run_dir.STAMP_VARIABLE, "HYDRA_FULL_ERROR")}
    env |= {"PYTHONPATH": str(REPOSITORY), **environment}
    program = [sys.executable, "-m", f"cifar10_tl.{name}", *arguments]
    return subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_user_error_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
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
def test_a_sweep_runs_its_other_jobs_after_an_error(tmp_path: Path) -> None:
    given = (*SMALL, *TINY, "callbacks=minimal", "logger=none", "report=none", "trainer.max_epochs=1", "test=false")
    done = command(*given, "-m", "model.head.hidden=[0],[8]", "paths.output_dir=sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: model.head.hidden=\[0\].*\n", done.stderr), done.stderr
    assert [path.parent.name for path in tmp_path.glob("sweep/*/results.json")] == ["1"]


@pytest.mark.slow
def test_a_failed_command_removes_its_folder_unless_another_process_has_started_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with claim(tmp_path / "run"):
        assert command("data.batch_size=abc", "paths.output_dir=run", cwd=tmp_path).returncode == 2
    assert (tmp_path / "run" / "train.log").is_file()
    assert command("data.batch_size=abc", "paths.output_dir=run", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_command_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    task = "lambda cfg: [logging.getLogger('a').info('b'), Path('done').touch()]"
    code = "import logging; from pathlib import Path; from cifar10_tl.config.launcher import run_command"
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", f"{code}; run_command('evaluate', {task})", "checkpoint=a"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(program, cwd=tmp_path, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (tmp_path / "done").exists()
    assert "Logging error" not in done.stderr


@pytest.mark.slow
def test_help_and_cfg_do_not_import_torch(tmp_path: Path) -> None:
    cases = [("train", "--cfg", "job"), ("train", "data.batch_size=abc")]
    for name, *flags in (*cases, *((name, "--help") for name in ("train", "tune", "evaluate", "predict", "export"))):
        done = command(*flags, cwd=tmp_path, name=name, PYTHONPROFILEIMPORTTIME="1")
        imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M))
        assert "hydra" in imported
        assert not imported & {"torch", "lightning", "matplotlib", "torchvision"}
    assert "python -m cifar10_tl.train experiment=quickstart" in command("--help", cwd=tmp_path).stdout


def test_paths_expand_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").touch()
    given = {"paths.data_dir": "~/d", "paths.output_dir": "~/x", "model.weights": "~/w.pth", "init_from": "~/w.pth"}
    cfg = compose_train("data=folder", *(f"{key}='{value}'" for key, value in given.items()))
    paths = [cfg.paths.output_dir, cfg.data.root, cfg.data.cache_dir, cfg.model.weights, cfg.init_from]
    assert paths == [f"{tmp_path}/{name}" for name in ("x", "d", "d/cache", "w.pth", "w.pth")]
    images: Any = OmegaConf.create({"images": ["~/a.png", "b.png"], "output": "~/m.onnx", "compare": ["~/r", "s"]})
    validation.expand_home(images)
    assert images.images == [f"{tmp_path}/a.png", "b.png"]
    assert (images.output, images.compare) == (f"{tmp_path}/m.onnx", [f"{tmp_path}/r", "s"])
    assert launcher._prepared(["seed=1", "data.root=~/d", "-m"]) == ["-m", "seed=1", f'data.root="{tmp_path}/d"']


def test_flags_may_stand_anywhere_between_the_settings() -> None:
    """Python's argparse refuses settings on both sides of a flag."""
    given = ["seed=1", "--config-dir", "own", "data=shapes", "-c", "job", "--resolve"]
    assert launcher._prepared(given) == ["--config-dir=own", "-c=job", "--resolve", "seed=1", "data=shapes"]


def test_one_run_is_resumed_per_command() -> None:
    with pytest.raises(UserError, match=r"resume=a,b: a command resumes one run; leave -m out"):
        launcher._prepared(["resume=a,b", "-m"])


def test_settings_of_a_folder_are_accepted_when_its_run_is_resumed() -> None:
    assert launcher._prepared(["data.labels=a.csv", "resume=run"]) == ["++data.labels=a.csv", "resume=run"]
    assert launcher._prepared(["data.labels=a.csv"]) == ["data.labels=a.csv"]


def test_an_unwritable_run_folder_is_one_line() -> None:
    handlers = {"file": {"class": "logging.FileHandler", "filename": "/proc/train.log"}}
    with pytest.raises(ValueError, match="file") as raised:
        logging.config.dictConfig({"version": 1, "handlers": handlers})
    line = explain(raised.value, "train")
    assert line == "paths.output_dir: [Errno 2] No such file or directory: '/proc/train.log'"


LOST = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("variables", "error", "printed"),
    [
        ({}, UserError("x"), True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, UserError("x"), False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, UserError("x"), True),  # first process of another node
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, UserError("x"), False),
        ({"RANK": "1", "LOCAL_RANK": "1"}, torch.OutOfMemoryError("x"), True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, OneProcessError("x"), True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, RuntimeError("can't allocate memory"), True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, LOST, True),
        ({"RANK": "2", "LOCAL_RANK": "2"}, LOST, False),
    ],
)
def test_one_process_per_node_prints_an_error(
    variables: dict[str, str], error: Exception, printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_LOCALID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.should_print(error) is printed


@pytest.mark.parametrize("environment", [TorchElasticEnvironment, SLURMEnvironment])
def test_a_different_number_of_processes_is_explained(environment: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    with pytest.raises(ValueError, match="You set") as raised:
        environment.validate_settings(object.__new__(environment), num_devices=2, num_nodes=1)
    assert "You set" in str(explain(raised.value, "train"))
