"""Settings of a resumed run: its own, plus the overrides that are allowed."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar10_tl.config.errors import UserError, walk
from cifar10_tl.config.run_dir import RUN_CONFIG

log = logging.getLogger(__name__)
#: Settings of a run that an override may change.
ALLOWED = (
    *("trainer.", "data.root", "data.labels", "data.cache_dir", "data.on_device", "paths.cache_dir", "compile", "test"),
    *("checkpoint_every_n_steps", "resume", "trust"),
)
#: Settings that change the number of steps per epoch, and with it the position in the schedule.
STEPS = ("trainer.accumulate_grad_batches", "trainer.limit_train_batches")
#: Classes that a run's config may name. Their packages export nothing else, but modules inside them do:
#: ``lightning.pytorch.callbacks.model_checkpoint.os`` is a module that can do harm.
_LIGHTNING = r"lightning\.pytorch\.(callbacks|loggers|strategies|profilers)"
TRUSTED = rf"(cifar10_tl\.(callbacks|engine\.tensorboard)|torch\.optim|{_LIGHTNING})\.[A-Z]\w*"
TRUSTED += r"|torch\.profiler\.schedule"  # of debug=profile


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config of the run in ``cfg.resume``, updated with those ``overrides`` that are allowed."""
    run_dir = Path(str(cfg.resume)).expanduser()
    saved = _read_run_config(run_dir)
    if "trust=true" not in (override.lower() for override in overrides) and (code := foreign_code(saved)):
        raise UserError(
            f"{run_dir / RUN_CONFIG} refers to code outside this project and Lightning: {code}; read it, and add "
            "trust=true if you trust it"
        )
    own = OmegaConf.create(_moved(saved, str(saved["paths"]["output_dir"]), str(run_dir)))
    for override in overrides:
        key = override_key(override)
        if not key.startswith(ALLOWED) or key in STEPS:
            raise UserError(
                f"{override}: a resumed run keeps its own settings, except trainer.* (other than "
                "accumulate_grad_batches and limit_train_batches), test, data.root, data.labels, data.on_device, "
                "data.cache_dir, paths.cache_dir, compile and checkpoint_every_n_steps; use init_from= to start a new "
                "run from its weights"
            )
        if key == "trainer.max_epochs" and own.get("budget"):
            raise UserError(f"{override}: budget={own.budget} sets it; use init_from= to train these weights further")
        before, after = OmegaConf.select(own, key), OmegaConf.select(cfg, key)
        if key not in ("resume", "trust") and before != after:
            log.info("%s: %s -> %s", key, before, after)
        OmegaConf.update(own, key, after, force_add=True)
        if key == "paths.cache_dir" and own.data.get("cache_dir") == before:
            own.data.cache_dir = after
    own.resume = str(run_dir)
    return own


def _read_run_config(run_dir: Path) -> dict[str, Any]:
    """Return the settings in a run folder as plain values, without running any code that they name."""
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"resume={run_dir}: contains no run ({RUN_CONFIG} is missing); set the folder of a run")
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path))
        Path(saved["paths"]["output_dir"])
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore a copy, or start a new run") from error
    # runs write resolved values; an interpolation could create what no check has seen
    if key := next((key for key, value in walk(saved) if isinstance(value, str) and "${" in value), None):
        raise UserError(f"{path}: {key} holds ${{...}}, which is not allowed here; replace it by its value")
    return saved


def quoted(text: object) -> str:
    """Return ``text`` as a quoted value of a Hydra override."""
    return QuotedString(text=str(text), quote=Quote.double).with_quotes()


def override_key(override: str) -> str:
    """Return the setting that a Hydra override sets, adds or removes."""
    return override.lstrip("+~").split("=")[0]


def as_override(key: str, value: Any) -> str:
    """Return the Hydra override that sets ``key`` to a plain value, with quotes only where they are needed."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"
    is_word = re.fullmatch(r"(?!(null|true|false|nan|inf)$)[a-z_./][\w./-]*", value, re.ASCII | re.I)
    return f"{key}={value if is_word else quoted(value)}"


def resume_command(run_dir: Path) -> str:
    """Return the shell command that resumes the run in this folder."""
    folder = f".{os.sep}{run_dir}" if str(run_dir).startswith("~") else str(run_dir)
    return f"python -m cifar10_tl.train {shlex.quote(as_override('resume', folder))}"


def _moved(node: Any, old: str, new: str) -> Any:
    """Return plain containers in which paths in the folder ``old`` are replaced by paths in ``new``."""
    if isinstance(node, dict):
        return {k: new if v == old and k.endswith(("dir", "path")) else _moved(v, old, new) for k, v in node.items()}
    if isinstance(node, list):
        return [_moved(child, old, new) for child in node]
    return new + node[len(old) :] if isinstance(node, str) and node.startswith(f"{old}/") else node


def foreign_code(config: Any) -> str | None:
    """Return the first ``key=value`` of a config that names code outside this project and Lightning, None if none."""
    for key, value in walk(config):
        if (f".{key}".endswith("._target_") and not is_trusted(value)) or (key == "imports" and value):
            return f"{key}={value}"
    return None


def is_trusted(target: Any) -> bool:
    """Return whether a run's config may name ``target`` without being read by a person first."""
    return isinstance(target, str) and bool(re.fullmatch(TRUSTED, target))
