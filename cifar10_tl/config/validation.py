"""Checks of the settings. Each message names the key, its value and what it should be."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError


@dataclass(frozen=True)
class Rule:
    """Condition on the value of a setting, with a description of valid values."""

    wanted: str
    is_valid: Callable[[Any], bool]

    def __call__(self, value: Any) -> str | None:
        """Return None for a valid value, else the description of valid values."""
        return None if self.is_valid(value) else self.wanted

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.wanted} or {other.wanted}", lambda value: self.is_valid(value) or other.is_valid(value))


def whole(low: int, high: float = math.inf) -> Rule:
    """Return the rule for integers from ``low`` to ``high``."""
    wanted = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    return Rule(wanted, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Return the rule for finite numbers from ``low`` to ``high``, without ``low`` (above) or ``high`` (below)."""
    wanted = f"a number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        wanted += f" and {'below' if below else 'at most'} {high:g}"

    def is_valid(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return Rule(wanted, is_valid)


def one_of(*choices: Any) -> Rule:
    """Return the rule for a set of values. 1 and True are different."""
    wanted = f"one of {', '.join('null' if choice is None else str(choice) for choice in choices)}"
    return Rule(wanted, lambda value: any(type(value) is type(c) and value == c for c in choices))


def list_of(wanted: str, item: Rule, shortest: int = 0) -> Rule:
    """Return the rule for lists of items with at least ``shortest`` of them."""
    return Rule(wanted, lambda v: isinstance(v, list) and len(v) >= shortest and all(map(item.is_valid, v)))


def _is_devices(value: Any) -> bool:
    many = value.split(",") if isinstance(value, str) else value
    is_list = isinstance(many, list) and bool(many) and all(re.fullmatch(r"\d+", str(v).strip()) for v in many)
    return value in ("auto", "-1", -1) or whole(1).is_valid(value) or is_list


def _is_folder(value: Any) -> bool:
    """Return whether ``value`` names a folder that exists or can be created."""
    if not text.is_valid(value):
        return False
    path = Path(value).expanduser()
    return next((p for p in (path, *path.parents) if p.exists()), Path()).is_dir()


null = Rule("null", lambda value: value is None)
flag = one_of(True, False)
text = Rule("a string", lambda value: isinstance(value, str) and bool(value) and "\0" not in value)
folder = Rule("a folder that exists or can be created", _is_folder)
file = Rule("a checkpoint file, such as outputs/runs/<time>/checkpoints/best.ckpt", text.is_valid)
fraction = number(0, 1)
below_one = number(0, 1, below=True)
positive = number(0, above=True)
inside = number(0, 1, above=True, below=True)
devices = Rule("auto, a number of devices, or a list of device numbers such as [0,1]", _is_devices)
duration = Rule("days:hours:minutes:seconds", lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d+(:\d\d){3}", v)))
checksum = Rule("an md5 of 32 hexadecimal digits", lambda v: bool(re.fullmatch(r"[0-9a-fA-F]{32}", str(v))))
profiler = one_of(None, "simple", "advanced", "pytorch") | Rule("a class", lambda v: isinstance(v, dict))
images = Rule("a file, a folder, a pattern such as 'photos/*.jpg'", text.is_valid) | list_of("a list", text, 1)
run_folders = list_of("two or more run folders, such as outputs/runs/a,outputs/runs/b", text, 2)
bits = (32, 16, 64, "32", "16", "64")
precision = one_of("auto", *bits, "32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "bf16")

#: The keys of each rule.
_KEYS: list[tuple[Rule, str]] = [
    (flag, "test trust data.on_device data.cache_features data.skip_bad data.augment.horizontal_flip"),
    (flag, "model.head.bidirectional optimizer.nesterov trainer.sync_batchnorm trainer.detect_anomaly"),
    (flag, "trainer.enable_progress_bar trainer.enable_model_summary"),
    (null | flag, "trainer.benchmark"),
    (flag | whole(1), "trainer.fast_dev_run"),
    (folder, "paths.output_dir paths.data_dir paths.cache_dir data.root data.cache_dir"),
    (text, "data.source model.backbone model.head.name optimizer.name scheduler.name trainer.accelerator"),
    (text, "callbacks.best_checkpoint.filename"),
    (null | text, "resume init_from model.weights output compare_on human_labels doubtful_labels"),
    (file, "checkpoint"),
    (whole(0, 2**32 - 1), "seed data.split_seed data.drawing_seed"),
    (whole(0), "data.augment.random_crop_padding"),
    (whole(1), "data.batch_size batch_size top_k model.head.lstm_size trainer.num_nodes"),
    (whole(1), "trainer.check_val_every_n_epoch trainer.accumulate_grad_batches"),
    (whole(1), "callbacks.sample_inputs.num_images callbacks.correct_predictions.num_images"),
    (whole(1), "callbacks.incorrect_predictions.num_images"),
    (null | whole(1), "checkpoint_every_n_steps data.image_limit"),
    (whole(-1), "trainer.num_sanity_val_steps"),
    (one_of(-1) | whole(1), "trainer.max_steps"),
    (whole(1, 1_000_000), "trainer.max_epochs"),
    (whole(1, 10**9), "data.train_size data.test_size"),
    (whole(8, 1024), "data.native_size"),
    (whole(8, 4096), "model.image_size"),
    (whole(1) | inside, "data.val_size"),
    (null | whole(1) | number(0, 1, above=True), "trainer.limit_train_batches trainer.limit_val_batches"),
    (null | whole(1) | number(0, 1, above=True), "trainer.limit_test_batches"),
    (list_of("a list of whole numbers of at least 1, such as [512]", whole(1, 10**9)), "model.head.hidden"),
    (positive, "data.stall_seconds optimizer.lr"),
    (number(0), "optimizer.backbone_lr_scale optimizer.weight_decay callbacks.progress_bar.refresh_seconds"),
    (null | number(0), "trainer.gradient_clip_val"),
    (fraction, "data.augment.random_erasing data.augment.color_jitter scheduler.warmup scheduler.final"),
    (below_one, "model.label_smoothing model.head.dropout optimizer.momentum"),
    (null | inside, "ema_decay"),
    (number(0.01, 100), "data.augment.mix_alpha"),
    (checksum, "data.md5"),
    (list_of("a list of strings, such as [a,b]", text), "data.mirrors"),
    (devices, "trainer.devices"),
    (precision, "trainer.precision"),
    (null | duration, "trainer.max_time"),
    (profiler, "trainer.profiler"),
    (images, "images"),
    (null | run_folders, "compare"),
    (one_of("auto", True, False), "compile"),
    (one_of(True, False, "warn"), "trainer.deterministic"),
    (one_of("none", "mixup", "cutmix"), "data.augment.mix"),
    (one_of("bicubic", "bilinear"), "model.interpolation"),
    (one_of("none", "backbone"), "model.freeze"),
    (one_of("imagenet", "cifar"), "model.stem"),
    (one_of("val/acc", "val/loss"), "callbacks.best_checkpoint.monitor"),
    (one_of("auto", "cpu", "cuda", "mps"), "device"),
    (one_of("onnx", "torch_export"), "format"),
    (one_of("test", "val", "train"), "split"),
    (one_of("none", "flip", "flip_shift"), "tta"),
]
RULES = {key: rule for rule, keys in _KEYS for key in keys.split()}


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
    for section, value in _found(plain, SECTIONS):
        if not isinstance(value, dict):
            raise UserError(f"{section}={_shown(value)}: this is a group of settings; {section}.KEY=VALUE sets one")
    for key, value in _found(plain, RULES):
        if not _left_open(plain, key, value) and (wanted := RULES[key](value)):
            raise UserError(f"{key}={_shown(value)}: should be {wanted}")
    if {"trainer", "optimizer"} <= plain.keys():
        found = dict(_found(plain, NEEDED))
        if missing := next((key for key in NEEDED if key not in found), None):
            raise UserError(f"{missing} is missing; set {missing}=...")
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


def _found(config: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield those of the dotted ``keys`` that are in ``config``, with their values."""
    for key in keys:
        node: Any = config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                break
            node = node[part]
        else:
            yield key, node


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
