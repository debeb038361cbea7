"""Settings of a run: those that differ from the defaults, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.config.resume import as_override, override_key

#: Settings of a start or of its folder, not of what is run; data.md5 is one of earlier runs.
OF_THE_START = ("paths.output_dir", "resume", "trust", "data.md5")
#: Metric that selects the checkpoint for the test; without it, the last one is tested.
MONITOR = "callbacks.best_checkpoint.monitor"
_CHOICES = {"data": "data.source", "optimizer": "optimizer.name", "scheduler": "scheduler.name"}
_CHOICES["model/head"] = "model.head.name"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as one dict with dotted keys."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return settings


def changed_settings(config: Mapping[str, Any], command: str = "train") -> dict[str, Any]:
    """Return the settings in the ``config`` of a run that differ from the defaults, with dotted keys.

    Those of its experiment are included, and those that other settings imply, such as the epochs of a time budget.
    """
    return _differences(config, _composed(config, command))


def changed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a short form of :func:`changed_settings` for display.

    These are the options of config groups, such as ``{"optimizer": "sgd"}``, and what differs from the settings of
    these options.
    """
    choices = _choices(config, "train")
    return dict(choice.split("=") for choice in choices) | _differences(config, _composed(config, "train", choices))


def repeat_command(config: Mapping[str, Any], run_dir: Path, command: str = "train") -> str:
    """Return the shell command that repeats a run in another folder.

    If its overrides cannot be composed any more, the reason is returned as a comment.
    """
    try:
        overrides = final_overrides(config, run_dir, command)
    except HydraException as error:  # such as an experiment that exists no more
        return f"# {command} cannot be repeated: {str(error).splitlines()[0]}"
    options = [f"--config-dir={folder}" for folder in _config_dirs(run_dir)]
    return f"python -m cifar10_tl.{command} {shlex.join([*options, *overrides])}".rstrip()


def final_overrides(config: Mapping[str, Any], run_dir: Path, command: str = "train") -> list[str]:
    """Return the overrides of the first start of a run, updated by the settings that changed when it was resumed."""
    given = [o for o in given_overrides(run_dir) or _choices(config, command) if override_key(o) not in OF_THE_START]
    searched = as_override("hydra.searchpath", [f"file://{folder}" for folder in _config_dirs(run_dir)])
    known = _composed(config, command, [*given, searched])
    changed = _differences(config, known)
    if config.get("budget"):
        changed.pop("trainer.max_epochs", None)  # chosen by the budget
    kept = [o for o in given if override_key(o) not in changed]
    return kept + [as_override(key if key in known else f"++{key}", value) for key, value in changed.items()]


def given_overrides(run_dir: Path) -> list[str]:
    """Return the overrides on the command line of the first start of a run, none if it was not started by one."""
    records = run_dir / ".hydra" / "overrides.yaml"
    return (yaml.safe_load(records.read_text()) or []) if records.is_file() else []


def _config_dirs(run_dir: Path) -> list[str]:
    """Return the ``--config-dir`` of the first start of a run, in a list, which is empty if there was none."""
    records = run_dir / ".hydra" / "hydra.yaml"
    recorded = yaml.safe_load(records.read_text()) if records.is_file() else {}
    sources = recorded.get("hydra", {}).get("runtime", {}).get("config_sources", [])
    return [source["path"] for source in sources if source["provider"] == "command-line"]


def experiment_name(run_dir: Path) -> str:
    """Return the name of a run's experiment, "default" if it has none, "" if it was not started by a command line."""
    if not (run_dir / ".hydra" / "overrides.yaml").is_file():
        return ""
    chosen = [o.partition("=")[2] for o in given_overrides(run_dir) if override_key(o) == "experiment"]
    return "default" if chosen[-1:] in ([], ["null"]) else chosen[-1]


def _choices(config: Mapping[str, Any], command: str) -> list[str]:
    """Return the options of the config groups that differ from the defaults."""
    changed = changed_settings(config, command)
    options = {group: str(changed[key]).lower() for group, key in _CHOICES.items() if key in changed}
    return [f"{group}={name}" for group, name in options.items() if (CONFIG_DIR / group / f"{name}.yaml").is_file()]


def _composed(config: Mapping[str, Any], command: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a command with these overrides, in the folder of ``config``."""
    folder = as_override("paths.output_dir", config.get("paths", {}).get("output_dir", ""))
    is_in_command = GlobalHydra.instance().is_initialized()
    with nullcontext() if is_in_command else initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose(command, [*overrides, folder]), resolve=True)
    return flat(composed)


def _differences(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in flat(config).items() if key not in usual or value != usual[key]}
    return {key: value for key, value in found.items() if key not in OF_THE_START}
