"""What a setting may be. Every check names the key, what it was given, and what would be right; torch is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError

#: A rule gives None where the value is right, else what it should be.
Rule = Callable[[Any], str | None]


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number from ``low`` (to ``high``)."""
    wanted = f"a whole number from {low} on" if high is None else f"a whole number from {low} to {high}"

    def rule(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value
        return None if good and (high is None or value <= high) else wanted

    return rule


def number(low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Rule:
    """A number from ``low`` to ``high``, or strictly ``above`` the one and ``below`` the other."""
    parts = [f"above {low:g}" if above else f"of at least {low:g}"]
    if high is not None:
        parts.append(f"below {high:g}" if below else f"at most {high:g}")

    def rule(value: Any) -> str | None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        good = good and (value > low if above else value >= low)
        good = good and (high is None or (value < high if below else value <= high)) and abs(value) != float("inf")
        return None if good else f"a number {' and '.join(parts)}"

    return rule


def one_of(*choices: Any) -> Rule:
    """One of some values."""
    wanted = f"one of {', '.join('null' if c is None else str(c) for c in choices)}"
    return lambda value: None if any(value is c or (type(value) is type(c) and value == c) for c in choices) else wanted


def either(*rules: Rule) -> Rule:
    """What any of the rules allows."""

    def rule(value: Any) -> str | None:
        answers = [r(value) for r in rules]
        return None if None in answers else " or ".join(a for a in answers if a)

    return rule


def text(value: Any) -> str | None:
    """Any text that is not empty."""
    return None if isinstance(value, str) and value else "a text"


def widths(value: Any) -> str | None:
    """A list of layer widths."""
    good = isinstance(value, list) and all(whole(1, 10**9)(v) is None for v in value)
    return None if good else "a list of whole numbers from 1 on, such as [512]"


def devices(value: Any) -> str | None:
    """What Lightning takes for devices."""
    if value in ("auto", "-1", -1) or whole(1)(value) is None:
        return None
    many = value.split(",") if isinstance(value, str) else value
    if isinstance(many, list) and many and all(re.fullmatch(r"\d+", str(v).strip()) for v in many):
        return None
    return "auto, a number of devices, or a list of device numbers such as [0,1]"


def duration(value: Any) -> str | None:
    """A time span as Lightning writes it."""
    return None if isinstance(value, str) and re.fullmatch(r"\d+(:\d\d){3}", value) else "days:hours:minutes:seconds"


def folder_name(value: Any) -> str | None:
    """A path to a folder that is there, or can be made."""
    if not isinstance(value, str) or not value:
        return "a folder"
    taken = next((p for p in (Path(value), *Path(value).parents) if p.exists()), None)
    return None if taken is None or taken.is_dir() else f"a folder, but {taken} is a file"


def trained_file(value: Any) -> str | None:
    """The path of a trained network; whether it is there is looked at later."""
    return text(value) and "the file of a trained network, such as outputs/runs/<time>/checkpoints/best.ckpt"


def texts(value: Any) -> str | None:
    """A list of texts."""
    return None if isinstance(value, list) and not any(text(v) for v in value) else "a list of texts, such as [a,b]"


def checksum(value: Any) -> str | None:
    """An md5 in hexadecimal."""
    good = isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{32}", value)
    return None if good else "an md5 of 32 hexadecimal digits"


def profiler(value: Any) -> str | None:
    """What Lightning takes for a profiler, or a class of one."""
    return None if isinstance(value, dict) else one_of(None, "simple", "advanced", "pytorch")(value)


def image_names(value: Any) -> str | None:
    """Where the pictures are to be found."""
    names = value if isinstance(value, list) else [value]
    good = names and not any(text(name) for name in names)
    return None if good else "a file, a folder, a pattern such as 'photos/*.jpg', or a list of these"


def run_folders(value: Any) -> str | None:
    """Two or more folders of runs."""
    good = isinstance(value, list) and len(value) > 1 and not any(text(folder) for folder in value)
    return None if good else "two or more folders of runs, such as outputs/runs/a,outputs/runs/b"


flag = one_of(True, False)


null = one_of(None)


share = number(0, 1)


limit = either(null, whole(1), number(0, 1, above=True))


RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32 - 1),
    "test": flag,
    "compile": one_of("auto", True, False),
    "checkpoint_every_n_steps": either(null, whole(1)),
    "ema_decay": either(null, number(0, 1, above=True, below=True)),
    "trust": flag,
    "resume": either(null, text),
    "init_from": either(null, text),
    "paths.output_dir": folder_name,
    "paths.data_dir": folder_name,
    "paths.cache_dir": folder_name,
    "data.source": text,
    "data.root": folder_name,
    "data.batch_size": whole(1),
    "data.val_size": either(whole(1), number(0, 1, above=True, below=True)),
    "data.split_seed": whole(0),
    "data.image_limit": either(null, whole(1)),
    "data.on_device": flag,
    "data.cache_features": flag,
    "data.native_size": whole(8, 1024),
    "data.skip_bad": flag,
    "data.cache_dir": folder_name,
    "data.mirrors": texts,
    "data.md5": checksum,
    "data.stall_seconds": number(0, above=True),
    "data.train_size": whole(1, 10**9),
    "data.test_size": whole(1, 10**9),
    "data.drawing_seed": whole(0),
    "data.augment.horizontal_flip": flag,
    "data.augment.random_crop_padding": whole(0),
    "data.augment.random_erasing": share,
    "data.augment.color_jitter": share,
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
    "model.head.hidden": widths,
    "model.head.lstm_size": whole(1),
    "model.head.bidirectional": flag,
    "optimizer.name": text,
    "optimizer.lr": number(0, above=True),
    "optimizer.backbone_lr_scale": number(0),
    "optimizer.weight_decay": number(0),
    "optimizer.momentum": number(0, 1, below=True),
    "optimizer.nesterov": flag,
    "scheduler.name": text,
    "scheduler.warmup": share,
    "scheduler.final": share,
    "trainer.accelerator": text,
    "trainer.devices": devices,
    "trainer.num_nodes": whole(1),
    "trainer.precision": one_of(
        "auto",
        32,
        16,
        64,
        "32",
        "16",
        "64",
        "32-true",
        "64-true",
        "bf16-mixed",
        "16-mixed",
        "bf16-true",
        "16-true",
        "bf16",
    ),
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


#: What the train command cannot do without; ``~`` and an edited config may have taken it away.
NEEDED = (
    *("seed", "test", "compile", "checkpoint_every_n_steps", "init_from", "resume", "paths.output_dir"),
    *("paths.cache_dir", "data.source", "data.batch_size", "data.cache_features", "model.backbone", "model.weights"),
    *("model.image_size", "model.head.name", "optimizer.name", "optimizer.lr", "scheduler.name", "trainer.strategy"),
    *("trainer.accelerator", "trainer.devices", "trainer.precision", "trainer.benchmark", "trainer.deterministic"),
    *("trainer.fast_dev_run", "trainer.enable_progress_bar", "trainer.max_epochs", "trainer.limit_test_batches"),
)


#: Groups that must be there, for a command that has no such thing at all would fail far from here.
SECTIONS = ("data", "data.augment", "model", "model.head", "optimizer", "scheduler", "trainer", "paths")


def check_config(cfg: DictConfig) -> None:
    """Look at each setting by itself, then at those that must fit together.

    Raises:
        UserError: the first fault found.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for section in SECTIONS:
        found, value = _lookup(plain, section)
        if found and not isinstance(value, dict):
            raise UserError(f"{section}={_shown(value)}: this is a group of settings; {section}.KEY=VALUE sets one")
    for key, rule in RULES.items():
        found, value = _lookup(plain, key)
        if found and not _left_open(plain, key, value) and (wanted := rule(value)):
            raise UserError(f"{key}={_shown(value)}: should be {wanted}")
    if {"trainer", "optimizer"} <= plain.keys():
        for key in NEEDED:
            if not _lookup(plain, key)[0]:
                raise UserError(f"{key} is missing, and nothing works without it; give it a value: {key}=...")
    _check_together(plain)


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


def _check_together(config: Mapping[str, Any]) -> None:
    for key in ("init_from", "checkpoint"):
        needed = config.get(key) and not config.get("resume")  # a resumed run has its own weights
        if needed and not Path(config[key]).is_file():
            raise UserError(f"{key}={config[key]}: there is no such file")
    if "compare" in config and bool(config["checkpoint"]) == bool(config["compare"]):
        raise UserError("give one of checkpoint=FILE, and compare=RUN,RUN (the folders of tested runs)")
    data, model, trainer = config.get("data", {}), config.get("model", {}), config.get("trainer", {})
    if model.get("stem") == "cifar" and model.get("weights") is not None:
        raise UserError(
            "model.stem=cifar has no pretrained weights: add model.weights=null, or use model.stem=imagenet"
        )
    padding, size = data.get("augment", {}).get("random_crop_padding", 0), data.get("native_size", 32)
    if padding >= size:
        raise UserError(f"data.augment.random_crop_padding={padding}: should be below the images' {size} pixels")
    if data.get("cache_features"):
        _check_cached_features(data, model)
    every, epochs = trainer.get("check_val_every_n_epoch", 1), trainer.get("max_epochs", 1)
    if every > epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every}: no validation in {epochs} epochs to choose the best by"
        )
    if "overfit_batches" in trainer:
        raise UserError("trainer.overfit_batches does not fit this project's loaders; use debug=overfit")


def _check_cached_features(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if model["freeze"] != "backbone":
        raise UserError(
            "data.cache_features=true is for a backbone that does not change: add model.freeze=backbone, or use "
            "data.cache_features=false"
        )
    for key, none in {"random_crop_padding": 0, "random_erasing": 0, "color_jitter": 0, "mix": "none"}.items():
        if data["augment"][key] != none:
            raise UserError(
                f"data.augment.{key}={data['augment'][key]} changes images in each epoch, and data.cache_features=true "
                f"keeps their features: add data.augment.{key}={none} (horizontal_flip may be true), or use "
                "data.cache_features=false"
            )
