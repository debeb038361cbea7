"""Settings of a resumed run: its own, plus the overrides that are allowed."""

from __future__ import annotations

import importlib
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

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG

log = logging.getLogger(__name__)
#: Settings that may differ from those of the run.
RESUMABLE = (
    "trainer.",
    "data.root",
    "data.on_device",
    "compile",
    "checkpoint_every_n_steps",
    "resume",
    "trust",
    "test",
)
#: Packages that may define the classes named by a run's config.
TRUSTED = (
    "cifar10_tl.",
    "torch.optim.",
    *(f"lightning.pytorch.{name}." for name in ("callbacks", "loggers", "strategies", "profilers")),
)


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config of the run in ``cfg.resume``, updated with ``overrides``.

    Raises:
        UserError: The folder holds no run, its config is damaged or names untrusted code, or an override changes a
            setting that is not in ``RESUMABLE``.
    """
    if not isinstance(cfg.resume, str):
        raise UserError(f"resume={cfg.resume}: should be the folder of a run, such as outputs/runs/<time>")
    run_dir = Path(cfg.resume).expanduser()
    saved = read_run_config(run_dir)
    if "trust=true" not in (override.lower() for override in overrides):
        check_targets(saved, str(run_dir / RUN_CONFIG))
    own = OmegaConf.create(moved(saved, str(saved["paths"]["output_dir"]), str(run_dir)))
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if not key.startswith(RESUMABLE):
            raise UserError(
                f"{override}: a resumed run keeps its own settings, except trainer.*, test, data.root, data.on_device, "
                "compile and checkpoint_every_n_steps; use init_from= to start a new run from its weights"
            )
        before, after = OmegaConf.select(own, key), OmegaConf.select(cfg, key)
        if key not in ("resume", "trust") and before != after:
            log.info("%s: %s -> %s", key, before, after)
        OmegaConf.update(own, key, after, force_add=True)
    own.resume = str(run_dir)
    return own


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Return the settings in a run folder as plain values, without running any code that they name.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"resume={run_dir}: no run lies there ({RUN_CONFIG} is missing); set the folder of a run")
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path))
        reason = "" if isinstance(saved["paths"]["output_dir"], str) else "paths.output_dir is not a string"
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, TypeError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0] or "empty"
    if reason:
        raise UserError(f"{path} is damaged ({reason}); restore a copy, or start a new run")
    # runs write resolved values; an interpolation could create what no check has seen
    if key := next((key for key, value in _walk(saved) if isinstance(value, str) and "${" in value), None):
        raise UserError(f"{path}: {key} holds ${{...}}, which is not allowed here; replace it by its value")
    return saved


def quoted(text: object) -> str:
    """Return ``text`` as a quoted value of a Hydra override."""
    return QuotedString(text=str(text), quote=Quote.double).with_quotes()


def resume_command(run_dir: Path) -> str:
    """Return the shell command that resumes the run in this folder."""
    plain = re.fullmatch(r"(?!(null|true|false|nan|inf)$)[a-z_./][\w./-]*", str(run_dir), re.ASCII | re.I)
    folder = run_dir if plain else quoted(f".{os.sep}{run_dir}" if str(run_dir).startswith("~") else run_dir)
    return f"python -m cifar10_tl.train {shlex.quote(f'resume={folder}')}"


def moved(node: Any, old: str, new: str) -> Any:
    """Return plain containers in which paths in the folder ``old`` are replaced by paths in ``new``."""
    if isinstance(node, dict):
        return {moved(key, old, new): moved(child, old, new) for key, child in node.items()}
    if isinstance(node, list):
        return [moved(child, old, new) for child in node]
    inside = isinstance(node, str) and (node == old or node.startswith(f"{old}/"))
    return new + node[len(old) :] if inside else node


def check_targets(config: Any, origin: str) -> None:
    """Raise :class:`UserError` if a ``_target_`` in ``config``, which comes from ``origin``, is not trusted."""
    for key, target in _walk(config):
        if f".{key}".endswith("._target_") and not is_trusted(target):
            raise UserError(
                f"{origin} names code from outside this project and Lightning: {key}={target}; read it, and add "
                "trust=true if you trust it"
            )


def is_trusted(target: Any) -> bool:
    """Return whether ``target`` is the dotted name of a class that is defined in a trusted package.

    The prefix of the name is not enough: ``lightning.pytorch.callbacks.model_checkpoint.os.system`` has it.
    """
    if not isinstance(target, str) or not target.startswith(TRUSTED):
        return False
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(TRUSTED)


def _walk(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the dotted key and value of every node below ``node``."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    named = [(f"{path}.{key}" if path else str(key), child) for key, child in children]
    return [*named, *(found for key, child in named for found in _walk(child, key))]
