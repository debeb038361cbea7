"""Checks of the settings. Each message names the key, its value and what it should be."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError

#: Function that returns None for a valid value, else a description of valid values.
Rule = Callable[[Any], str | None]


def rule(wanted: str, is_valid: Callable[[Any], bool]) -> Rule:
    """Return the rule that values satisfy ``is_valid``."""
    return lambda value: None if is_valid(value) else wanted


def whole(low: int, high: float = math.inf) -> Rule:
    """Return the rule for integers from ``low`` to ``high``."""
    wanted = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    return rule(wanted, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Return the rule for finite numbers from ``low`` to ``high``, without ``low`` (above) or ``high`` (below)."""
    wanted = f"a number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        wanted += f" and {'below' if below else 'at most'} {high:g}"

    def is_valid(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return rule(wanted, is_valid)


def one_of(*choices: Any) -> Rule:
    """Return the rule for a set of values. 1 and True are different."""
    wanted = f"one of {', '.join('null' if choice is None else str(choice) for choice in choices)}"
    return rule(wanted, lambda value: any(type(value) is type(c) and value == c for c in choices))


def either(*rules: Rule) -> Rule:
    """Return the rule that any of ``rules`` holds."""

    def check(value: Any) -> str | None:
        answers = [r(value) for r in rules]
        return None if None in answers else " or ".join(a for a in answers if a)

    return check


def list_of(wanted: str, item: Rule, shortest: int = 0) -> Rule:
    """Return the rule for lists of items with at least ``shortest`` of them."""
    return rule(wanted, lambda v: isinstance(v, list) and len(v) >= shortest and not any(item(x) for x in v))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_devices(value: Any) -> bool:
    many = value.split(",") if isinstance(value, str) else value
    is_list = isinstance(many, list) and bool(many) and all(re.fullmatch(r"\d+", str(v).strip()) for v in many)
    return value in ("auto", "-1", -1) or whole(1)(value) is None or is_list


def folder(value: Any) -> str | None:
    """Return None for the path of a folder that exists or can be created."""
    if not _is_text(value):
        return "a folder"
    path = Path(value).expanduser()
    existing = next((p for p in (path, *path.parents) if p.exists()), None)
    return None if existing is None or existing.is_dir() else f"a folder, but {existing} is a file"


text = rule("a string", _is_text)
flag = one_of(True, False)
null = one_of(None)
fraction = number(0, 1)
limit = either(null, whole(1), number(0, 1, above=True))
devices = rule("auto, a number of devices, or a list of device numbers such as [0,1]", _is_devices)
duration = rule("days:hours:minutes:seconds", lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d+(:\d\d){3}", v)))
checksum = rule("an md5 of 32 hexadecimal digits", lambda v: bool(re.fullmatch(r"[0-9a-fA-F]{32}", str(v))))
profiler = either(rule("a class", lambda v: isinstance(v, dict)), one_of(None, "simple", "advanced", "pytorch"))
hidden_sizes = list_of("a list of whole numbers of at least 1, such as [512]", whole(1, 10**9))
trained_file = rule("a checkpoint file, such as outputs/runs/<time>/checkpoints/best.ckpt", _is_text)
image_names = rule(
    "a file, a folder, a pattern such as 'photos/*.jpg', or a list of these",
    lambda v: _is_text(v) or (isinstance(v, list) and bool(v) and all(map(_is_text, v))),
)
run_folders = list_of("two or more run folders, such as outputs/runs/a,outputs/runs/b", text, 2)
precisions = one_of(
    *("auto", 32, 16, 64, "32", "16", "64", "32-true", "64-true"),
    *("bf16-mixed", "16-mixed", "bf16-true", "16-true", "bf16"),
)
strings = list_of("a list of strings, such as [a,b]", text)

RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32 - 1),
    "test": flag,
    "compile": one_of("auto", True, False),
    "checkpoint_every_n_steps": either(null, whole(1)),
    "ema_decay": either(null, number(0, 1, above=True, below=True)),
    "trust": flag,
    "resume": either(null, text),
    "init_from": either(null, text),
    "paths.output_dir": folder,
    "paths.data_dir": folder,
    "paths.cache_dir": folder,
    "data.source": text,
    "data.root": folder,
    "data.batch_size": whole(1),
    "data.val_size": either(whole(1), number(0, 1, above=True, below=True)),
    "data.split_seed": whole(0),
    "data.image_limit": either(null, whole(1)),
    "data.on_device": flag,
    "data.cache_features": flag,
    "data.native_size": whole(8, 1024),
    "data.skip_bad": flag,
    "data.cache_dir": folder,
    "data.mirrors": strings,
    "data.md5": checksum,
    "data.stall_seconds": number(0, above=True),
    "data.train_size": whole(1, 10**9),
    "data.test_size": whole(1, 10**9),
    "data.drawing_seed": whole(0),
    "data.augment.horizontal_flip": flag,
    "data.augment.random_crop_padding": whole(0),
    "data.augment.random_erasing": fraction,
    "data.augment.color_jitter": fraction,
    "data.augment.mix": one_of("none", "mixup", "cutmix"),
    "data.augment.mix_alpha": number(0.01, 100),
    "model.backbone": text,
    "model.weights": either(null, text),
    "model.image_size": whole(8, 4096),
    "model.interpolation": one_of("bicubic", "bilinear"),
    "model.freeze": one_of("none", "backbone"),
    "model.stem": one_of("imagenet", "cifar"),
    "model.label_smoothing": number(0, 1, below=True),
    "model.head.name": text,
    "model.head.dropout": number(0, 1, below=True),
    "model.head.hidden": hidden_sizes,
    "model.head.lstm_size": whole(1),
    "model.head.bidirectional": flag,
    "optimizer.name": text,
    "optimizer.lr": number(0, above=True),
    "optimizer.backbone_lr_scale": number(0),
    "optimizer.weight_decay": number(0),
    "optimizer.momentum": number(0, 1, below=True),
    "optimizer.nesterov": flag,
    "scheduler.name": text,
    "scheduler.warmup": fraction,
    "scheduler.final": fraction,
    "trainer.accelerator": text,
    "trainer.devices": devices,
    "trainer.num_nodes": whole(1),
    "trainer.precision": precisions,
    "trainer.max_epochs": whole(1, 1_000_000),
    "trainer.max_steps": either(one_of(-1), whole(1)),
    "trainer.max_time": either(null, duration),
    "trainer.limit_train_batches": limit,
    "trainer.limit_val_batches": limit,
    "trainer.limit_test_batches": limit,
    "trainer.check_val_every_n_epoch": whole(1),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.gradient_clip_val": either(null, number(0)),
    "trainer.deterministic": one_of(True, False, "warn"),
    "trainer.benchmark": either(null, flag),
    "trainer.sync_batchnorm": flag,
    "trainer.detect_anomaly": flag,
    "trainer.fast_dev_run": either(flag, whole(1)),
    "trainer.enable_progress_bar": flag,
    "trainer.enable_model_summary": flag,
    "trainer.num_sanity_val_steps": whole(-1),
    "trainer.profiler": profiler,
    **{
        f"callbacks.{name}.num_images": whole(1)
        for name in ("sample_inputs", "correct_predictions", "incorrect_predictions")
    },
    "callbacks.best_checkpoint.monitor": one_of("val/acc", "val/loss"),
    "callbacks.best_checkpoint.filename": text,
    "callbacks.progress_bar.refresh_seconds": number(0),
    # predict
    "checkpoint": trained_file,
    "images": image_names,
    "batch_size": whole(1),
    "top_k": whole(1),
    "device": one_of("auto", "cpu", "cuda", "mps"),
    # export
    "format": one_of("onnx", "torch_export"),
    "output": either(null, text),
    "compare_on": either(null, text),
    # evaluate
    "split": one_of("test", "val", "train"),
    "tta": one_of("none", "flip", "flip_shift"),
    "corrupt": one_of("none", "noise", "blur", "contrast", "jpeg", "brightness", "all"),
    "human_labels": either(null, text),
    "doubtful_labels": either(null, text),
    "compare": either(null, run_folders),
}


#: Keys that the train command needs; ``~key`` or an edited config may have removed them.
NEEDED = (
    *("seed", "test", "compile", "checkpoint_every_n_steps", "init_from", "resume", "paths.output_dir"),
    *("paths.cache_dir", "data.source", "data.batch_size", "data.cache_features", "model.backbone", "model.weights"),
    *("model.image_size", "model.head.name", "optimizer.name", "optimizer.lr", "scheduler.name", "trainer.strategy"),
    *("trainer.accelerator", "trainer.devices", "trainer.precision", "trainer.benchmark", "trainer.deterministic"),
    *("trainer.fast_dev_run", "trainer.enable_progress_bar", "trainer.max_epochs", "trainer.limit_test_batches"),
)
SECTIONS = ("data", "data.augment", "model", "model.head", "optimizer", "scheduler", "trainer", "paths")
#: Settings that name files or folders, in which a leading ``~`` is expanded.
PATHS = (
    *("paths.data_dir", "paths.cache_dir", "paths.output_dir", "data.root", "data.cache_dir", "resume", "init_from"),
    *("checkpoint", "images", "output", "compare", "compare_on", "human_labels", "doubtful_labels", "model.weights"),
)


def check_config(cfg: DictConfig) -> None:
    """Expand ``~`` in the paths of ``cfg`` and check every setting, then those that depend on each other.

    Raises:
        UserError: A setting is invalid.
    """
    expand_home(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for section in SECTIONS:
        found, value = _lookup(plain, section)
        if found and not isinstance(value, dict):
            raise UserError(f"{section}={_shown(value)}: this is a group of settings; {section}.KEY=VALUE sets one")
    for key, check in RULES.items():
        found, value = _lookup(plain, key)
        if found and not _left_open(plain, key, value) and (wanted := check(value)):
            raise UserError(f"{key}={_shown(value)}: should be {wanted}")
    if {"trainer", "optimizer"} <= plain.keys():
        for key in NEEDED:
            if not _lookup(plain, key)[0]:
                raise UserError(f"{key} is missing; set {key}=...")
    _check_files(plain)
    _check_together(plain)


def expand_home(cfg: DictConfig) -> None:
    """Expand a leading ``~`` in every path of ``cfg``."""
    for key in PATHS:
        value: Any = OmegaConf.select(cfg, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, os.path.expanduser(value))
        elif OmegaConf.is_list(value):
            OmegaConf.update(cfg, key, [os.path.expanduser(v) if isinstance(v, str) else v for v in value])


def _lookup(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _left_open(config: Mapping[str, Any], key: str, value: Any) -> bool:
    """Return whether evaluate takes this value from the checkpoint, or needs no checkpoint because it compares runs."""
    as_trained = key.startswith("data.") and value == "as_trained"
    return "compare" in config and (as_trained or (key == "checkpoint" and value is None))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _check_files(config: Mapping[str, Any]) -> None:
    for key in ("init_from", "checkpoint"):
        needed = config.get(key) and not config.get("resume")  # a resumed run has its own weights
        if needed and not Path(config[key]).is_file():
            raise UserError(f"{key}={config[key]}: there is no such file")
    if "compare" in config and bool(config["checkpoint"]) == bool(config["compare"]):
        raise UserError("set either checkpoint=FILE or compare=RUN,RUN (the folders of tested runs)")


def _check_together(config: Mapping[str, Any]) -> None:
    data, model, trainer = config.get("data", {}), config.get("model", {}), config.get("trainer", {})
    if model.get("stem") == "cifar" and model.get("weights") is not None:
        raise UserError("model.stem=cifar has no pretrained weights: use model.weights=null or model.stem=imagenet")
    padding, size = data.get("augment", {}).get("random_crop_padding", 0), data.get("native_size", 32)
    if padding >= size:
        raise UserError(f"data.augment.random_crop_padding={padding}: should be below the image size of {size} pixels")
    if data.get("cache_features"):
        _check_cached_features(data, model)
    every, epochs = trainer.get("check_val_every_n_epoch", 1), trainer.get("max_epochs", 1)
    if every > epochs:
        raise UserError(f"trainer.check_val_every_n_epoch={every}: {epochs} epochs would have no validation")
    if "overfit_batches" in trainer:
        raise UserError("trainer.overfit_batches is not supported; use debug=overfit")
    interval = trainer.get("val_check_interval", 1.0)
    if type(interval) is not float or interval != 1.0:
        raise UserError(
            f"trainer.val_check_interval={_shown(interval)}: not supported because best.ckpt and metrics.csv hold one "
            "validation per epoch; use trainer.check_val_every_n_epoch"
        )


def _check_cached_features(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if model["freeze"] != "backbone":
        raise UserError(
            "data.cache_features=true needs a frozen backbone: add model.freeze=backbone, or use "
            "data.cache_features=false"
        )
    for key, none in {"random_crop_padding": 0, "random_erasing": 0, "color_jitter": 0, "mix": "none"}.items():
        if data["augment"][key] != none:
            raise UserError(
                f"data.augment.{key}={data['augment'][key]} changes images in each epoch, but data.cache_features=true "
                f"computes their features once: add data.augment.{key}={none} (horizontal_flip may be true), or use "
                "data.cache_features=false"
            )
