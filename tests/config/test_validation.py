"""Invalid settings. Each ends the command with status 2 and one line that names the key and what to do."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, TINY, compose_command, compose_train
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from cifar10_tl.config import errors, run_dir
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.validation import RULES, check_config, seconds_of

NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[str, list[Any], str]] = [
    ("data.batch_size", ["abc", "", 0, 12.5, True, None, [1], {}], "a whole number of at least 1"),
    ("data.val_size", [-1, 0, 1.0, True], "a whole number of at least 1 or a number above 0 and below 1"),
    ("data.root", [[1], "", None, "pyproject.toml/x", "a\0b"], "a folder that exists or can be created"),
    ("data.mirrors", ["http://x", None, [1]], "a list"),
    ("data.augment.random_erasing", [1.5, -0.1, NAN, True], "a number of at least 0 and at most 1"),
    ("data.augment.random_resized_crop", [[1, 0.6], [0.6], 0.6, [0, 1], [0.6, 1.5], [0.6, 0.8, 1]], "a range of"),
    ("data.on_device", ["gpu", 1, 0], "True, False"),
    ("model.backbone", [3, "", None], "a string"),
    ("model.head.hidden", [512, [0], None], "a list"),
    ("model.image_size", [7, 32.0, None, [], [[0.1, 32]], [[0, 32], [0, 64]], [[0, 32], [1, 64]]], "a list such as"),
    ("model.image_size", [[0, 32], [[0]], [[0, 4]], [[0, 32], [0.5, 64.5]], [["a", 32]], [32, 64], {}], "below 1"),
    ("model.label_smoothing", [1, -0.1], "below 1"),
    ("optimizer.bias_lr_scale", [0, -1, "x", None], "a number above 0"),
    ("optimizer.layer_decay", [0, 1.5, "x"], "null or a number above 0 and at most 1"),
    ("optimizer.lr", ["fast", -0.1, 0, NAN, INF], "a number above 0"),
    ("trainer.limit_val_batches", [0, 1.5, -1], "null or a whole number"),
    ("trainer.profiler", [5, True, {"a": 1}], "a profiler"),
    ("callbacks.best_checkpoint.monitor", ["train/loss", "val/foo"], "val/acc, val/balanced_acc"),
    ("data.balance", ["weights", True, None], "one of none, loss, sampler"),
    ("callbacks.last_checkpoint.dirpath", [[], None, 1], "a string"),
    ("budget", [60, "60", "soon", "-1s", "1d", "1 h", ""], "90s, 10min or 1.5h"),
    ("compare", [["a"], "a"], "null or a list of at least 2"),
    ("images", [[], "", 3, [1]], "a string or a list"),
]
#: A small run on the CPU, for what is found when data, network or trainer are created.
CPU = "experiment=quickstart model.backbone=resnet18 data.batch_size=20 trainer.max_epochs=1 trainer.devices=1 "
SHAPES = "data.train_size=60 data.val_size=20 data.test_size=20 "
COMPOSED = [
    ("data.batchsize=64", ["data.batchsize", "did you mean data.batch_size?", "--cfg job"]),
    ("optimizer.learning_rate=1", ["optimizer.learning_rate", "lr", "weight_decay"]),
    ("modle=resnet", ["modle", "did you mean", "model"]),
    ("data=imagenet", ["data/imagenet", "cifar10", "folder", "shapes"]),
    ("data=folder data.root=. data.skip_bad=true data.cache=false", ["data.skip_bad=true", "use data.cache=true"]),
    ("data=shapes data.native_size=auto", ["data.native_size=auto", "a whole number"]),
    ("data.augment.random_crop_padding=32", ["data.augment.random_crop_padding=32", "below the image size of 32"]),
    ("data.augment.cutout=32", ["data.augment.cutout=32", "below the image size of 32"]),
    ("model.stem=cifar", ["model.stem=cifar", "model.weights=null"]),
    ("data.augment=null", ["data.augment.mix is missing"]),
    ("budget=1h trainer.max_steps=9", ["trainer.max_steps=9", "budget=1h"]),
    ("experiment=cpu trainer.max_time=00:01:00:00", ["trainer.check_val_every_n_epoch=1 instead of 4", "budget="]),
    ("budget=1h trainer.max_time=00:01:00:00", ["trainer.max_time=00:01:00:00", "budget=1h"]),
    ("ema_bn_batches=9", ["ema_bn_batches=9", "add ema_decay"]),
    ("+trainer.overfit_batches=4", ["trainer.overfit_batches", "debug=overfit"]),
    ("paths=[1,2]", ["a config group takes a name"]),
    ("report=full", ["report=full", "evaluate command"]),
    ("init_from=nowhere.ckpt", ["init_from=nowhere.ckpt", "no such file"]),
    ("data.root=${nowhere}", ["nowhere", "not found"]),
    ("data.root=a=b", ["mismatched input", "data.root=a=b"]),
    ("data.cache_features=true", ["data.cache_features=true", "add model.freeze=backbone"]),
    ("logistic_regression=true", ["logistic_regression=true", "add data.cache_features=true"]),
    ("experiment=probe data.augment.mix=cutmix", ["data.augment.mix=cutmix", "data.augment.mix=none"]),
    ("experiment=probe model.image_size=[[0,24],[0.5,32]]", ["[[0, 24], [0.5, 32]]", "at one size"]),
    ("experiment=photos_probe data.root=x data.cache=false", ["data.cache=false", "in each epoch"]),
    ("paths.output_dir=pyproject.toml", ["paths.output_dir: ", "File exists: 'pyproject.toml'"]),
    ("resume=nowhere", ["resume=nowhere", "set the folder of a run"]),
    ("--lr 0.1", ["--lr", "key=value"]),
    ("logger=null", ["logger=none"]),
    ("data=shapes data.root=x", ["data.root", "the chosen groups have no such setting"]),
    ("~trainer.precision", ["trainer.precision is missing", "trainer.precision=..."]),
    ("~trainer.max_epochs", ["trainer.max_epochs is missing"]),
    ("~optimizer.lr", ["optimizer.lr is missing"]),
    ("+data.augment.erase=0.5", ["data.augment.erase was renamed: use data.augment.random_erasing"]),
    ("callbacks.progress.refresh_seconds=1", ["use callbacks.progress_bar.refresh_seconds"]),
    ("experiment=seed", ["experiment=seed was renamed: use experiment=original"]),
    ("+trainer.val_check_interval=0.5", ["trainer.val_check_interval is not supported", "check_val_every_n_epoch"]),
    ("hydra.run.dir=taken", ["hydra.run.dir=taken: set paths.output_dir instead"]),
    ("-m seed=1,2 paths.output_dir=swept", ["paths.output_dir=swept: this folder holds a sweep"]),
]
#: Found when data, network or trainer are created.
MADE = [
    ("model.backbone=vgg16", ["model.backbone=vgg16", "resnet50"]),
    ("model.weights=nowhere.pth", ["nowhere.pth"]),
    ("model.weights=IMAGENET1K_V9", ["IMAGENET1K_V9", "IMAGENET1K_V1"]),
    ("model.backbone=resnet51 model.weights=IMAGENET1K_V2", ["model.backbone=resnet51", "resnet50"]),
    ("model/head=lstm", ["model.image_size=32", "model/head=lstm", "33"]),
    ("optimizer.name=Adamm", ["optimizer.name=Adamm", "Adam, AdamW, SGD"]),
    ("optimizer.betas=[2,0.9]", ["optimizer.name=Adam", "beta"]),
    ("scheduler.name=step", ["scheduler.name=step", "constant, cosine"]),
    ("model.head.name=conv", ["model.head.name=conv", "linear, dense, lstm"]),
    ("+model.head.depth=3", ["model.head.depth", "hidden, dropout"]),
    ("trainer.strategy=telepathy", ["strategy", "telepathy"]),
    ("trainer.strategy=DDP_Spawn", ["trainer.strategy=DDP_Spawn"]),
    ("trainer.strategy=ddp_fork", ["trainer.strategy=ddp_fork", "must be auto, ddp or"]),
    ("trainer.precision=half", ["Precision 'half' is invalid", "bf16-mixed"]),
    ("trainer.max_time=soon", ["DD:HH:MM:SS"]),
    ("data.source=cifar9", ["data.source=cifar9", "cifar10, folder, shapes"]),
    ("data=folder data.root=nowhere", ["nowhere", "no such folder"]),
    ("data=folder data.root=one_class", ["one_class", "2"]),
    ("data=folder data.root=no_image", ["no_image", "data.skip_bad=true"]),
    ("data=folder data.root=other_test", ["no images in train of class fox"]),
    ("init_from=notes.txt", ["notes.txt"]),
    ("paths.output_dir=taken", ["paths.output_dir=taken", "resume=taken"]),
    ("callbacks.curves._target_=cifar10_tl.callbacks.Curve", ["Curve"]),
    ("+data.num_workers=4", ["data.num_workers", "no such setting", "train_size"]),
    ("+model.num_classes=10", ["model.num_classes", "image_size"]),
    ("+scheduler.gamma=0.1", ["scheduler.gamma", "warmup"]),
    ("+callbacks.mine={_target_:os.getcwd}", ["callbacks.mine", "must be a Callback"]),
    ("+callbacks.progress_bar.refresh_seconds=abc", ["refresh_seconds=abc", "seconds"]),
    ("trainer.sync_batchnorm=true", ["trainer.sync_batchnorm=true", "GPUs"]),
    ("model.head.hidden=[1000000000]", ["not have enough memory"]),
]
OTHERS = [
    ("evaluate", "", ["checkpoint=FILE", "compare"]),
    ("evaluate", "checkpoint=nowhere.ckpt", ["nowhere.ckpt: no such file"]),
    ("evaluate", "checkpoint=notes.txt", ["notes.txt"]),
    ("evaluate", "checkpoint=notes.txt report=full split=train", ["report=full", "split=test"]),
    ("evaluate", "checkpoint=notes.txt corrupt=all", ["corrupt was removed: leave it out"]),
    ("predict", "checkpoint=nowhere.ckpt images=other_test", ["nowhere.ckpt: no such file"]),
    ("predict", "checkpoint=notes.txt images=empty", ["empty"]),
    ("export", "checkpoint=nowhere.ckpt", ["nowhere.ckpt: no such file"]),
    ("export", "checkpoint=notes.txt", ["notes.txt"]),
    ("tune", "data=shapes ~search", ["search: has no settings"]),
    (
        "tune",
        "data=shapes search.optimizer.lr={choices:[1]}",
        ["'~search.optimizer.lr' '+search.optimizer.lr={choices"],
    ),
    ("tune", "search.data.batch_size={low:1,high:9}", ["add it with '+search.data.batch_size="]),
    ("tune", "search.optimizer.lr.hi=1", ["did you mean search.optimizer.lr.high"]),
]
CASES = [
    *(("train", overrides, parts) for overrides, parts in COMPOSED),
    *(("train", CPU + SHAPES * ("folder" not in overrides) + overrides, parts) for overrides, parts in MADE),
    *OTHERS,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with invalid files and folders."""
    folder = tmp_path_factory.mktemp("wrong")
    images = ["one_class/train/cat", "one_class/test/cat"]
    images += [f"no_image/{split}/{name}" for split in ("train", "test") for name in ("cat", "dog")]
    images += [f"other_test/{name}" for name in ("train/cat", "train/dog", "test/cat", "test/fox")]
    for name in ("swept", "taken", "empty", *images):
        (folder / name).mkdir(parents=True)
    for name in images:
        Image.new("RGB", (32, 32)).save(folder / name / "1.png")
    for file in ("pyproject.toml", "notes.txt", "swept/multirun.yaml", "no_image/train/cat/2.png"):
        (folder / file).write_text("neither a checkpoint nor an image")
    (folder / "taken" / run_dir.RUN_CONFIG).write_text("seed: 0")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("command", "overrides", "parts"), CASES, ids=lambda value: str(value)[-40:])
def test_an_invalid_setting_ends_with_one_line(
    command: str,
    overrides: str,
    parts: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(folder)
    monkeypatch.setattr(sys, "argv", [f"cifar10_tl.{command}", *overrides.split()])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv(run_dir.STAMP_VARIABLE, raising=False)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        import_module(f"cifar10_tl.{command}").main()
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    assert "search path" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    left = {name for name in files(folder) - before if Path(name).name not in ("outputs", "runs", "data")}
    left -= {name for name in left if name.startswith("taken/")}  # Hydra's records
    assert not left


def test_tilde_removes_all_loggers_and_callbacks(folder: Path) -> None:
    from cifar10_tl.train import train

    small = (*SMALL, *TINY, "trainer.max_epochs=1", f"paths.output_dir={folder / 'bare'}")
    results = train(compose_train(*small, "~logger", "~callbacks"))
    assert results is not None
    assert results["test"]["count"] == 32


@pytest.mark.parametrize(("key", "values", "wanted"), REFUSED, ids=[key for key, *_ in REFUSED])
def test_rules_refuse_invalid_values(
    key: str, values: list[Any], wanted: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert wanted in RULES[key].wanted
    assert [value for value in values if RULES[key].is_valid(value)] == []


def test_times_have_a_unit() -> None:
    times = {"90s": 90, "10min": 600, "30m": 1800, "1h": 3600, "1.5h": 5400}
    assert {value: seconds_of(value) for value in times if RULES["budget"].is_valid(value)} == times


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "export"])
def test_any_value_of_any_setting_is_accepted_or_explained(command: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    own = [] if command == "train" else [f"checkpoint={tmp_path}/a.ckpt"]
    cfg = compose_command(command, *own, *(["images=x"] if command == "predict" else []))
    unexplained: list[str] = []
    for key in errors.config_keys(command):
        changed = cfg.copy()
        OmegaConf.set_struct(changed, False)
        for value in ("abc", "", "a\0b", "${nowhere}", -1, 0, 1.5, 10**30, NAN, INF, True, None, [], [None], {}, "~"):
            try:
                OmegaConf.update(changed, key, value, merge=False)
                check_config(changed)
            except (UserError, OmegaConfBaseException) as error:
                unexplained += [f"{key}={value}"] if errors.explain(error, command) is None else []
    assert not unexplained
