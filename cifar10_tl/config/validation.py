"""Checks of the settings. Each message names the key, its value and what it must be.

Only values that a library would accept silently, refuse with a traceback or refuse after minutes of work have a rule.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError, walk

_DURATION = r"(\d+(?:\.\d+)?)(s|m|min|h)"


class Rule(NamedTuple):
    """Condition on the value of a setting, with a description of valid values."""

    wanted: str
    is_valid: Callable[[Any], bool]


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
        return low <= value <= high and not (above and value == low) and not (below and value == high)

    return Rule(wanted, is_valid)


def one_of(*choices: Any) -> Rule:
    """Return the rule for a set of values. 1 and True are different."""
    wanted = f"one of {', '.join(map(str, choices))}"
    return Rule(wanted, lambda value: any(type(value) is type(c) and value == c for c in choices))


def list_of(item: Rule, shortest: int = 0) -> Rule:
    """Return the rule for lists of at least ``shortest`` items."""
    wanted = f"a list of {f'at least {shortest} ' if shortest else ''}values, each {item.wanted}"
    return Rule(wanted, lambda v: isinstance(v, list) and len(v) >= shortest and all(map(item.is_valid, v)))


def either(first: Rule, second: Rule) -> Rule:
    """Return the rule for values that are valid under at least one of two rules."""
    return Rule(f"{first.wanted} or {second.wanted}", lambda value: first.is_valid(value) or second.is_valid(value))


def seconds_of(value: str) -> float:
    """Return the seconds of a time such as 90s, 10min or 1.5h."""
    count, unit = re.fullmatch(_DURATION, value).groups()  # type: ignore[union-attr]
    return float(count) * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit]


def _is_folder(value: Any) -> bool:
    if not text.is_valid(value):
        return False
    path = Path(value).expanduser()
    return next((p for p in (path, *path.parents) if p.exists()), Path()).is_dir()


def _is_size_schedule(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(phase, list) and len(phase) == 2 for phase in value):
        return False
    starts, sizes = [start for start, _ in value], [size for _, size in value]
    if not all(map(number(0, 1, below=True).is_valid, starts)) or not all(map(side.is_valid, sizes)):
        return False
    return starts[:1] == [0] and starts == sorted(set(starts))


null = Rule("null", lambda value: value is None)
text = Rule("a string", lambda value: isinstance(value, str) and bool(value) and "\0" not in value)
duration = Rule("a time such as 90s, 10min or 1.5h", lambda v: isinstance(v, str) and bool(re.fullmatch(_DURATION, v)))
folder = Rule("a folder that exists or can be created", _is_folder)
inside = number(0, 1, above=True, below=True)
side = whole(8, 4096)
side_schedule = Rule("a list such as [[0, 128], [0.5, 160]] with starts ascending from 0 to below 1", _is_size_schedule)
fractions = list_of(number(0.01, 1), 2)
fraction_range = Rule(
    "a range of fractions from 0.01 to 1, such as [0.6, 1]",
    lambda value: fractions.is_valid(value) and len(value) == 2 and value[0] <= value[1],
)
limit = either(whole(1), number(0, 1, above=True))
strategy = Rule(  # after a fit in forked processes, the first one has no metrics
    "auto, ddp or another strategy that does not spawn or fork",
    lambda v: not re.search("spawn|fork|notebook", str(v), re.I),
)
has_target = Rule("the _target_ of a profiler", lambda value: isinstance(value, dict) and "_target_" in value)

#: The keys of each rule. A key with ? may also be null.
_KEYS: list[tuple[Rule, str]] = [
    (one_of(True, False), "test trust data.on_device data.cache_features data.skip_bad model.head.bidirectional"),
    (one_of(True, False), "optimizer.nesterov trainer.sync_batchnorm trainer.benchmark?"),
    (one_of(True, False, "alternating"), "data.augment.horizontal_flip"),
    (one_of(True, False), "data.augment.trivial_augment data.cache gradient_flow logistic_regression"),
    (one_of(True, False), "trainer.enable_progress_bar trainer.enable_model_summary trainer.detect_anomaly"),
    (folder, "paths.output_dir paths.data_dir paths.cache_dir data.root data.cache_dir"),
    (text, "data.source model.backbone model.weights? model.head.name optimizer.name scheduler.name"),
    (text, "resume? init_from? checkpoint? output? compare_on? human_labels? doubtful_labels? data.labels?"),
    (text, "callbacks.best_checkpoint.filename callbacks.best_checkpoint.dirpath trainer.max_time?"),
    (text, "callbacks.last_checkpoint.filename callbacks.last_checkpoint.dirpath"),
    (duration, "budget?"),
    (list_of(text), "data.mirrors"),
    (list_of(text, 2), "compare?"),
    (either(text, list_of(text, 1)), "images"),
    (either(text, list_of(text)), "imports"),
    (Rule("a group of objects by name", lambda value: isinstance(value, dict)), "callbacks? logger?"),
    (whole(0, 2**32 - 1), "seed data.split_seed data.drawing_seed"),
    (whole(0), "data.augment.random_crop_padding trainer.num_sanity_val_steps scheduler.head_only_epochs"),
    (whole(0), "pruner.startup_trials pruner.warmup_epochs ema_bn_batches data.augment.cutout"),
    (whole(1), "data.batch_size batch_size top_k data.image_limit? checkpoint_every_n_steps? model.head.lstm_size"),
    (whole(1), "trainer.num_nodes trainer.check_val_every_n_epoch trainer.accumulate_grad_batches"),
    (whole(1), "callbacks.sample_inputs.num_images callbacks.correct_predictions.num_images"),
    (whole(1), "callbacks.incorrect_predictions.num_images data.train_size"),
    (either(one_of(-1), whole(1)), "trainer.max_steps"),
    (whole(1, 1_000_000), "trainer.max_epochs trials"),
    (list_of(whole(1)), "model.head.hidden"),
    (either(one_of("auto"), side), "data.native_size"),
    (either(side, side_schedule), "model.image_size data.image_size"),
    (either(whole(1), inside), "data.val_size data.test_size"),
    (one_of("crop", "pad", "squeeze"), "data.fit"),
    (limit, "trainer.limit_train_batches? trainer.limit_val_batches? trainer.limit_test_batches?"),
    (number(0, above=True), "data.stall_seconds optimizer.lr optimizer.bias_lr_scale"),
    (number(0), "optimizer.backbone_lr_scale optimizer.weight_decay callbacks.progress_bar.refresh_seconds"),
    (number(0), "trainer.gradient_clip_val?"),
    (number(0, 1), "data.augment.mix_off_last"),
    (fraction_range, "data.augment.random_resized_crop?"),
    (number(0, 1), "data.augment.random_erasing data.augment.color_jitter scheduler.warmup scheduler.final"),
    (number(0, 1, below=True), "model.label_smoothing model.head.dropout optimizer.momentum"),
    (inside, "ema_decay?"),
    (number(0, 1, above=True), "optimizer.layer_decay?"),
    (number(0.01, 100), "data.augment.mix_alpha"),
    (either(text, has_target), "trainer.profiler?"),
    (strategy, "trainer.strategy"),
    (one_of(True, False, "warn"), "trainer.deterministic"),
    (one_of("auto", True, False), "compile"),
    (one_of("none", "mixup", "cutmix"), "data.augment.mix"),
    (one_of("none", "loss", "sampler"), "data.balance"),
    (one_of("bicubic", "bilinear"), "model.interpolation"),
    (one_of("none", "stem", "layer1", "layer2", "layer3", "backbone"), "model.freeze"),
    (one_of("imagenet", "cifar"), "model.stem"),
    (one_of("median", "none"), "pruner.name"),
    (one_of("val/acc", "val/balanced_acc", "val/macro_f1", "val/loss"), "callbacks.best_checkpoint.monitor"),
    (one_of("auto", "cpu", "cuda", "mps"), "device"),
    (one_of("onnx", "torch_export"), "format"),
    (one_of("test", "val", "train"), "split"),
    (one_of("short", "full", "none"), "report"),
    (one_of("none", "flip", "flip_shift"), "tta"),
]
RULES = {
    key.rstrip("?"): either(null, rule) if key.endswith("?") else rule for rule, keys in _KEYS for key in keys.split()
}

#: Keys of the train command that ``~key`` or an edited config may have removed, and that no library reports in time.
_NEEDED = (
    *("test", "data.augment.mix", "data.cache_features", "model.head.name", "optimizer.name", "scheduler.name"),
    *("trainer.accelerator", "trainer.precision", "trainer.strategy", "trainer.devices", "trainer.deterministic"),
    *("trainer.max_epochs", "optimizer.lr"),
)


def check_config(cfg: DictConfig) -> None:
    """Expand ``~`` in the paths of ``cfg`` and check every setting, then those that depend on each other."""
    expand_home(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    found = dict(walk(plain))
    if "optimizer" in found and (missing := [key for key in _NEEDED if key not in found]):
        raise UserError(f"{missing[0]} is missing; set {missing[0]}=...")
    for key, value in found.items():
        if key not in RULES or RULES[key].is_valid(value) or (value == "as_trained" and "compare" in found):
            continue
        raise UserError(f"{key}={'null' if value is None else value}: must be {RULES[key].wanted}")
    _check_together(found)


def expand_home(cfg: DictConfig) -> None:
    """Expand a leading ``~`` in every string of ``cfg``."""
    for key, value in walk(OmegaConf.to_container(cfg, resolve=True)):
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, os.path.expanduser(value))


def _check_together(config: Mapping[str, Any]) -> None:
    if "checkpoint" in config and bool(config["checkpoint"]) == bool(config.get("compare")):
        raise UserError("set checkpoint=FILE, or for evaluate compare=RUN,RUN (folders of tested runs), not both")
    start = config.get("init_from")
    if start and not config.get("resume") and not Path(start).is_file():  # a resumed run has its own weights
        raise UserError(f"init_from={start}: no such file")
    weights = config.get("model.weights")
    is_missing = weights is not None and not config.get("resume") and not Path(weights).is_file()
    if config.get("model.stem") == "cifar" and is_missing:
        raise UserError(
            "model.stem=cifar has no published weights: use model.weights=null, a FILE, or model.stem=imagenet"
        )
    if config.get("report") == "full":
        if "optimizer.name" in config:
            raise UserError("report=full is a setting of the evaluate command: use report=short or report=none")
        if config["split"] == "train":
            raise UserError("report=full compares images with those of training: use split=test or split=val")
    if config.get("data.skip_bad") is True and config.get("data.cache") is False:
        raise UserError("data.skip_bad=true: data.cache=false does not check the images; use data.cache=true")
    if config.get("data.cache_features") is True:
        _check_cached_features(config)
    elif config.get("logistic_regression") is True:
        raise UserError("logistic_regression=true needs cached features: add data.cache_features=true")
    if config.get("data.source") == "shapes" and isinstance(test_size := config.get("data.test_size"), float):
        raise UserError(f"data.test_size={test_size}: must be a whole number for data=shapes")
    if config.get("data.source") == "shapes" and config.get("data.native_size") == "auto":
        raise UserError("data.native_size=auto: must be a whole number for data=shapes")
    if config.get("ema_bn_batches") and not config.get("ema_decay"):
        raise UserError(f"ema_bn_batches={config['ema_bn_batches']}: needs averaged weights; add ema_decay=0.999")
    if budget := config.get("budget"):
        for key, unlimited in {"trainer.max_steps": -1, "trainer.max_time": None}.items():
            if config.get(key, unlimited) != unlimited:
                raise UserError(f"{key}={config[key]}: cannot be combined with budget={budget}; remove one of them")
    if config.get("trainer.max_time") and (every := config.get("trainer.check_val_every_n_epoch", 1)) > 1:
        raise UserError(
            f"trainer.max_time={config['trainer.max_time']}: would end without a validation of the last epochs; add "
            f"trainer.check_val_every_n_epoch=1 instead of {every}, or use budget="
        )
    alternatives = {"overfit_batches": "debug=overfit", "val_check_interval": "trainer.check_val_every_n_epoch"}
    for key, alternative in alternatives.items():
        if f"trainer.{key}" in config:
            raise UserError(f"trainer.{key} is not supported; use {alternative}")


def _check_cached_features(config: Mapping[str, Any]) -> None:
    if config.get("model.freeze") != "backbone":
        raise UserError("data.cache_features=true needs a frozen backbone: add model.freeze=backbone")
    if config.get("data.cache") is False:
        raise UserError("data.cache=false: decodes images in each epoch even with cached features; use data.cache=true")
    if isinstance(sizes := config.get("model.image_size"), list):
        raise UserError(f"model.image_size={sizes}: data.cache_features=true computes features at one size; choose one")
    pixels = ("random_crop_padding", "cutout", "random_erasing", "color_jitter")
    others = {"trivial_augment": False, "random_resized_crop": None, "mix": "none"}
    for name, none in {**dict.fromkeys(pixels, 0), **others}.items():
        key = f"data.augment.{name}"
        if config.get(key, none) != none:
            raise UserError(
                f"{key}={config[key]} changes images in each epoch, but data.cache_features=true computes features "
                f"once: add {key}={'null' if none is None else str(none).lower()} (horizontal_flip may be true)"
            )
