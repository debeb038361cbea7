"""Wrong inputs: each ends the command with status 2 and one line that names the key and what would be right."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cifar10_tl.config import launcher, run_dir
from cifar10_tl.config.errors import UserError

#: A small run on the CPU, for what is found out only when data, network or trainer are made.
CPU = "experiment=quickstart model.backbone=resnet18 data.batch_size=20 trainer.max_epochs=1 trainer.devices=1 "
SHAPES = "data.train_size=60 data.val_size=20 data.test_size=20 "
COMPOSED = [
    ("data.batchsize=64", ["data.batchsize", "did you mean data.batch_size?", "--cfg job"]),
    ("optimizer.learning_rate=1", ["optimizer.learning_rate", "lr", "weight_decay"]),
    ("modle=resnet", ["modle", "did you mean", "model"]),
    ("data=imagenet", ["data/imagenet", "cifar10", "folder", "shapes"]),
    ("model/head=conv", ["model/head/conv", "dense", "linear", "lstm"]),
    ("experiment=quick", ["experiment/quick", "quickstart"]),
    ("data.batch_size=abc", ["data.batch_size=abc", "whole number of at least 1"]),
    ("data.batch_size=0", ["data.batch_size=0", "whole number of at least 1"]),
    ("data.batch_size=12.5", ["data.batch_size=12.5"]),
    ("data.batch_size=true", ["data.batch_size=True"]),
    ("data.val_size=-1", ["data.val_size=-1"]),
    ("data.image_limit=0", ["data.image_limit=0", "null or a whole number"]),
    ("data.root=[1]", ["data.root=[1]", "a folder"]),
    ("data.root=pyproject.toml/x", ["data.root=pyproject.toml/x", "pyproject.toml is a file"]),
    ("data.augment.random_erasing=1.5", ["data.augment.random_erasing=1.5", "at most 1"]),
    ("data.augment.mix=blend", ["data.augment.mix=blend", "none, mixup, cutmix"]),
    ("data.augment.random_crop_padding=32", ["data.augment.random_crop_padding=32", "below the image size of 32"]),
    ("model.image_size=0", ["model.image_size=0", "8 to 4096"]),
    ("model.freeze=all", ["model.freeze=all", "none, backbone"]),
    ("model.interpolation=nearest", ["model.interpolation=nearest", "bicubic, bilinear"]),
    ("model.label_smoothing=1", ["model.label_smoothing=1", "below 1"]),
    ("model.head.hidden=512", ["model.head.hidden=512", "[512]"]),
    ("model.head.hidden=[0]", ["model.head.hidden=[0]"]),
    ("model.stem=cifar", ["model.stem=cifar", "model.weights=null"]),
    ("optimizer.lr=fast", ["optimizer.lr=fast", "a number above 0"]),
    ("optimizer.lr=-0.1", ["optimizer.lr=-0.1", "a number above 0"]),
    ("optimizer.lr=nan", ["optimizer.lr=nan"]),
    ("optimizer.lr=inf", ["optimizer.lr=inf"]),
    ("scheduler.warmup=2", ["scheduler.warmup=2", "at most 1"]),
    ("data.augment=null", ["data.augment=null", "data.augment.KEY=VALUE"]),
    ("model.head=null", ["model.head=null", "model.head.KEY=VALUE"]),
    ("trainer.check_val_every_n_epoch=50", ["trainer.check_val_every_n_epoch=50", "40 epochs"]),
    ("trainer.max_epochs=0", ["trainer.max_epochs=0"]),
    ("trainer.max_epochs=-1", ["trainer.max_epochs=-1"]),
    ("trainer.devices=none", ["trainer.devices=none", "auto"]),
    ("trainer.devices=0", ["trainer.devices=0"]),
    ("trainer.precision=8", ["trainer.precision=8", "bf16-mixed"]),
    ("trainer.max_time=soon", ["trainer.max_time=soon", "days:hours:minutes:seconds"]),
    ("trainer.limit_val_batches=0", ["trainer.limit_val_batches=0"]),
    ("+trainer.overfit_batches=4", ["trainer.overfit_batches", "debug=overfit"]),
    ("trainer=4", ["a config group takes a name", "--help"]),
    ("seed=-1", ["seed=-1", "0 to 4294967295"]),
    ("test=maybe", ["test=maybe", "True, False"]),
    ("init_from=nowhere.ckpt", ["init_from=nowhere.ckpt", "no such file"]),
    ("data.root=${nowhere}", ["nowhere", "not found"]),
    ("data.root=a=b", ["mismatched input", "data.root=a=b"]),
    ("compile=maybe", ["compile=maybe", "auto, True, False"]),
    ("checkpoint_every_n_steps=0", ["checkpoint_every_n_steps=0", "null or a whole number"]),
    ("trust=perhaps", ["trust=perhaps", "True, False"]),
    ("data.on_device=gpu", ["data.on_device=gpu", "True, False"]),
    ("data.cache_features=true", ["data.cache_features=true", "add model.freeze=backbone"]),
    ("experiment=probe data.augment.mix=cutmix", ["data.augment.mix=cutmix", "data.augment.mix=none"]),
    ("model.backbone=3", ["model.backbone=3", "a string"]),
    ("data.split_seed=x", ["data.split_seed=x", "whole number"]),
    ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1", "at least 0"]),
    ("model.head.dropout=1", ["model.head.dropout=1", "below 1"]),
    ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches=0", "at least 1"]),
    ("trainer.num_nodes=0", ["trainer.num_nodes=0", "at least 1"]),
    ("trainer.deterministic=3", ["trainer.deterministic=3", "warn"]),
    ("paths.output_dir=pyproject.toml", ["paths.output_dir", "pyproject.toml: File exists; choose another folder"]),
    ("resume=nowhere", ["resume=nowhere", "set the folder of a run"]),
    ("--lr 0.1", ["--lr", "key=value"]),
    ("data.batch_size=", ["data.batch_size"]),
    ("seed=[1,2", ["seed=[1,2"]),
    ("logger=null", ["logger=none"]),
    ("callbacks=null", ["callbacks=minimal"]),
    ("paths.output_dir=/proc/nothing", ["paths.output_dir", "/proc/nothing", "choose another folder"]),
    ("paths.output_dir=null", ["paths.output_dir"]),
    ("paths.cache_dir=5", ["paths.cache_dir=5", "a folder"]),
    ("resume=5", ["resume=5", "the folder of a run"]),
    ("resume=[a]", ["resume=", "the folder of a run"]),
    ("data.mirrors=http://x", ["data.mirrors=http://x", "a list of strings"]),
    ("data.mirrors=null", ["data.mirrors=null", "a list of strings"]),
    ("data.md5=123", ["data.md5=123", "32 hexadecimal digits"]),
    ("data=folder data.cache_dir=null", ["data.cache_dir=null", "a folder"]),
    ("data=shapes data.root=x", ["data.root", "the chosen groups have no such setting"]),
    ("data=shapes data.train_size=10000000000", ["data.train_size=10000000000", "1 to 1000000000"]),
    ("data.augment.mix_alpha=1e-9", ["data.augment.mix_alpha=1e-09", "at least 0.01"]),
    ("model.head.hidden=[1000000000000]", ["model.head.hidden=[1000000000000]"]),
    ("trainer.max_epochs=1000000000000", ["trainer.max_epochs", "1 to 1000000"]),
    ("trainer.num_sanity_val_steps=abc", ["trainer.num_sanity_val_steps=abc", "-1"]),
    ("trainer.profiler=5", ["trainer.profiler=5", "simple, advanced"]),
    ("callbacks.sample_inputs.num_images=abc", ["callbacks.sample_inputs.num_images=abc", "at least 1"]),
    ("callbacks.best_checkpoint.monitor=train/loss", ["callbacks.best_checkpoint.monitor=train/loss", "val/loss"]),
    ("callbacks.best_checkpoint.monitor=val/foo", ["callbacks.best_checkpoint.monitor=val/foo", "val/acc"]),
    ("~trainer.precision", ["trainer.precision is missing", "trainer.precision=..."]),
    ("~data.cache_features", ["data.cache_features is missing"]),
    ("~test", ["test is missing"]),
    ("hydra.job.chdir=true", ["hydra.job.chdir=true"]),
    ("ema_decay=1.5", ["ema_decay=1.5", "below 1"]),
    ("data.augment.flip=false", ["data.augment.flip was renamed: use data.augment.horizontal_flip"]),
    ("+data.augment.erase=0.5", ["data.augment.erase was renamed: use data.augment.random_erasing"]),
    ("callbacks.history=null", ["callbacks.history was renamed: use callbacks.metrics_logger"]),
    ("~callbacks.progress", ["callbacks.progress was renamed: use callbacks.progress_bar"]),
    ("callbacks.progress.refresh_seconds=1", ["use callbacks.progress_bar.refresh_seconds"]),
    ("experiment=seed", ["experiment=seed was renamed: use experiment=original"]),
    ("trainer=fsdp", ["trainer=fsdp was renamed: use trainer.strategy=fsdp"]),
    ("+trainer.val_check_interval=0.5", ["trainer.val_check_interval=0.5: not supported because best.ckpt"]),
    ("+trainer.val_check_interval=1", ["trainer.val_check_interval=1: not supported"]),
    ("hydra.run.dir=taken", ["hydra.run.dir=taken: set paths.output_dir instead"]),
    ("hydra.sweep.dir=taken -m seed=1,2", ["hydra.sweep.dir=taken: set paths.output_dir instead"]),
    ("-m seed=1,2 paths.output_dir=swept", ["paths.output_dir=swept: this folder holds a sweep"]),
]
#: Found when the parts are made.
MADE = [
    ("model.backbone=vgg16", ["model.backbone=vgg16", "resnet50"]),
    ("model.weights=nowhere.pth", ["nowhere.pth"]),
    ("model.weights=IMAGENET1K_V9", ["IMAGENET1K_V9", "IMAGENET1K_V1"]),
    ("model/head=lstm", ["model.image_size=32", "model/head=lstm", "33"]),
    ("optimizer.name=Adamm", ["optimizer.name=Adamm", "Adam, AdamW and SGD"]),
    ("optimizer.name=Adagrad", ["optimizer Adagrad", "betas"]),
    ("optimizer.betas=[2,0.9]", ["optimizer Adam", "beta"]),
    ("scheduler.name=step", ["scheduler.name=step", "constant, cosine"]),
    ("model.head.name=conv", ["model.head.name=conv", "linear, dense, lstm"]),
    ("+model.head.depth=3", ["model.head=dense", "depth"]),
    ("data.val_size=59", ["data.val_size=59", "choose 10 to 50"]),
    ("data.val_size=5", ["data.val_size=5", "choose 10 to 50"]),
    ("trainer.accelerator=gpu", ["accelerator"]),
    ("trainer.accelerator=abacus", ["accelerator"]),
    ("trainer.strategy=telepathy", ["strategy", "telepathy"]),
    ("trainer.devices=[7] trainer.accelerator=cpu", ["devices"]),
    ("trainer.profiler=stopwatch", ["profiler"]),
    ("data.source=cifar9", ["data.source=cifar9", "cifar10, folder, shapes"]),
    ("data=folder data.root=nowhere", ["nowhere", "train"]),
    ("data=folder data.root=empty", ["empty", "train"]),
    ("data=folder data.root=one_class", ["one_class", "2"]),
    ("data=folder data.root=no_image", ["no_image", "data.skip_bad=true"]),
    ("data=folder data.root=other_test", ["class"]),
    ("init_from=notes.txt", ["notes.txt"]),
    ("resume=half", ["half", "config.yaml"]),
    ("paths.output_dir=taken", ["paths.output_dir=taken", "resume=taken"]),
    ("callbacks.curves._target_=cifar10_tl.callbacks.Curve", ["Curve"]),
    ("+data.num_workers=4", ["data.num_workers", "no such setting", "train_size"]),
    ("+data.augment.rotate=4", ["data.augment.rotate", "random_crop_padding"]),
    ("+model.num_classes=10", ["model.num_classes", "image_size"]),
    ("+model.class_names=[a,b]", ["model.class_names", "image_size"]),
    ("+scheduler.gamma=0.1", ["scheduler.gamma", "warmup"]),
    ("optimizer.betas=[0.9]", ["optimizer Adam", "~optimizer.KEY"]),
    ("+callbacks.mine={a:1}", ["callbacks.mine", "no Callback", "_target_"]),
    ("+callbacks.mine={_target_:os.getcwd}", ["callbacks.mine", "no Callback"]),
    ("+callbacks.progress_bar.refresh_seconds=abc", ["refresh_seconds=abc", "seconds"]),
    ("trainer.sync_batchnorm=true", ["trainer.sync_batchnorm=true", "GPUs"]),
    ("model.head.hidden=[1000000000]", ["not have enough memory"]),
]
OTHERS = [
    ("evaluate", "", ["checkpoint=FILE", "compare"]),
    ("evaluate", "checkpoint=nowhere.ckpt", ["checkpoint=nowhere.ckpt", "no such file"]),
    ("evaluate", "checkpoint=empty", ["checkpoint=empty", "no such file"]),
    ("evaluate", "checkpoint=notes.txt", ["notes.txt"]),
    ("evaluate", "checkpoint=notes.txt split=dev", ["split=dev", "test, val, train"]),
    ("evaluate", "checkpoint=notes.txt tta=spin", ["tta=spin", "flip_shift"]),
    ("evaluate", "checkpoint=notes.txt corrupt=rain", ["corrupt=rain", "jpeg"]),
    ("evaluate", "compare=[half]", ["compare=['half']", "two or more"]),
    ("predict", "checkpoint=nowhere.ckpt images=empty", ["checkpoint=nowhere.ckpt"]),
    ("predict", "checkpoint=notes.txt images=empty", ["empty"]),
    ("predict", "checkpoint=notes.txt images=[]", ["images=[]", "a file, a folder"]),
    ("predict", "checkpoint=notes.txt images=empty top_k=0", ["top_k=0"]),
    ("predict", "checkpoint=notes.txt images=empty device=abacus", ["device=abacus", "cuda"]),
    ("export", "checkpoint=nowhere.ckpt", ["checkpoint=nowhere.ckpt", "no such file"]),
    ("export", "checkpoint=notes.txt", ["notes.txt"]),
    ("export", "checkpoint=notes.txt format=pickle", ["format=pickle", "onnx, torch_export"]),
]
CASES = [
    *(("train", overrides, parts) for overrides, parts in COMPOSED),
    *(("train", CPU + SHAPES * ("folder" not in overrides) + overrides, parts) for overrides, parts in MADE),
    *OTHERS,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with things to trip over."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "pyproject.toml").touch()
    (folder / "notes.txt").write_text("no checkpoint")
    (folder / "empty").mkdir()
    (folder / "half").mkdir()
    (folder / "swept").mkdir()
    (folder / "swept" / "multirun.yaml").touch()
    (folder / "taken").mkdir()
    (folder / "taken" / run_dir.RUN_CONFIG).write_text("seed: 0")
    picture = Image.new("RGB", (32, 32))
    for root, train, test in (
        ("one_class", ["cat"], ["cat"]),
        ("no_image", ["cat", "dog"], ["cat", "dog"]),
        ("other_test", ["cat", "dog"], ["cat", "fox"]),
    ):
        for split, classes in (("train", train), ("test", test)):
            for name in classes:
                (folder / root / split / name).mkdir(parents=True)
                picture.save(folder / root / split / name / "1.png")
    (folder / "no_image" / "train" / "cat" / "2.png").write_text("no picture")
    return folder


def run(command: str, overrides: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """What the command's process would end with, and print on stderr; the command runs in this one."""
    module = __import__(f"cifar10_tl.{command}", fromlist=["main"])
    arguments = overrides.split(" ") if overrides else []
    monkeypatch.setattr(sys, "argv", [f"cifar10_tl.{command}", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv(run_dir.STAMP_VARIABLE, raising=False)
    monkeypatch.chdir(folder)
    handlers = logging.root.handlers[:]
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), pytest.raises(SystemExit) as stopped:
            module.main()
    finally:
        logging.root.handlers = handlers
    return stopped.value.code, printed.getvalue()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("command", "overrides", "parts"), CASES, ids=lambda value: str(value)[-40:])
def test_a_wrong_input_ends_with_one_line_that_names_the_key_and_the_remedy(
    command: str, overrides: str, parts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    status, printed = run(command, overrides, folder, monkeypatch)
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert status == 2, printed
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    assert "search path" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    left = {name for name in files(folder) - before if Path(name).name not in ("outputs", "runs")}
    left -= {name for name in left if name.startswith("taken/")}  # Hydra's record of the try
    assert not left, "nothing is left that looks like a run"


def test_a_tilde_takes_all_loggers_or_callbacks_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no mistake."""
    from helpers import SMALL, compose_train

    from cifar10_tl.train import train

    for group in ("logger", "callbacks"):
        cfg = compose_train(*SMALL, "trainer.max_epochs=1", f"~{group}", f"paths.output_dir={folder / group}")
        results = train(cfg)
        assert results is not None
        assert results["test"]["count"] == 100


@pytest.mark.parametrize("sweeper", ["hydra_plugins.optuna.OptunaSweeper"])
def test_a_sweeper_that_draws_values_is_for_one_process(sweeper: str) -> None:
    from helpers import compose_train

    launcher.check_sweeper(compose_train("trainer.devices=1"), sweeper)
    launcher.check_sweeper(
        compose_train("trainer.devices=2"), "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    )
    for overrides in (["trainer.devices=2"], ["trainer.devices=1", "trainer.num_nodes=2"], ["trainer.devices=auto"]):
        with pytest.raises(UserError, match=r"OptunaSweeper: each process.*use trainer\.devices=1"):
            launcher.check_sweeper(compose_train(*overrides), sweeper)
