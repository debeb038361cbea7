"""The settings of a run that is resumed: its own, read as data, and on them what may be given anew."""

from __future__ import annotations

import importlib
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import RUN_CONFIG

log = logging.getLogger(__name__)


#: What a resumed run may be given anew; everything else comes from its own config.
RESUMABLE = (
    "resume",
    "trust",
    "test",
    "trainer.",
    "data.root",
    "data.on_device",
    "compile",
    "checkpoint_every_n_steps",
)


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config that the run in ``cfg.resume`` was started with, and on it the overrides given now.

    Raises:
        UserError: the folder holds no run, its config is damaged or names code that is not trusted, or an override
            would change what the run is (only ``RESUMABLE`` ones may be given).
    """
    if not isinstance(cfg.resume, str):
        raise UserError(f"resume={cfg.resume}: should be the folder of a run, such as outputs/runs/<time>")
    run_dir = Path(cfg.resume)
    saved = read_run_config(run_dir)
    if "trust=true" not in (override.lower() for override in overrides):
        check_targets(saved, str(run_dir / RUN_CONFIG))
    own = OmegaConf.create(moved(saved, str(saved["paths"]["output_dir"]), str(run_dir)))
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if not key.startswith(RESUMABLE):
            raise UserError(
                f"{override}: a resumed run keeps its own settings; only trainer.*, test, data.root and what makes it "
                "faster or safer may be given. To start a new run from its weights use init_from="
            )
        before, after = OmegaConf.select(own, key), OmegaConf.select(cfg, key)
        if key not in ("resume", "trust") and before != after:
            log.info("%s: %s -> %s", key, before, after)
        OmegaConf.update(own, key, after, force_add=True)
    own.resume = str(run_dir)
    return own


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The settings in a run's folder, plain values: nothing that they name is looked up or run.

    Raises:
        UserError: there are none, or they are not as this project writes them.
    """
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"resume={run_dir}: no run lies there ({RUN_CONFIG} is missing); give the folder of a run")
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path))
        whole = isinstance(saved["paths"]["output_dir"], str)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, TypeError, KeyError, OSError) as error:
        whole, reason = False, (str(error).splitlines() or [""])[0]
    else:
        reason = "paths.output_dir is not a text"
    if not whole:
        raise UserError(f"{path} is damaged ({reason}); bring a good copy, or start a new run")
    # it was written with all of them resolved; an interpolation can make up what no check has seen
    if key := next((key for key, text in _texts(saved) if "${" in text), None):
        raise UserError(f"{path}: {key} holds ${{...}}, which no run of this project writes; give it a plain value")
    return saved


def resume_command(run_dir: Path) -> str:
    """What to type to go on with the run in this folder."""
    setting = f"resume={run_dir}"
    if not re.fullmatch(r"[\w./-]+", str(run_dir)):  # quotes for Hydra, and others for the shell
        setting = shlex.quote(f'resume="{run_dir}"')
    return f"python -m cifar10_tl.train {setting}"


def moved(node: Any, old: str, new: str) -> Any:
    """Plain containers with every path in the folder ``old`` led to ``new``, where a run lies now."""
    if isinstance(node, dict):
        return {moved(key, old, new): moved(child, old, new) for key, child in node.items()}
    if isinstance(node, list):
        return [moved(child, old, new) for child in node]
    inside = isinstance(node, str) and (node == old or node.startswith(f"{old}/"))
    return new + node[len(old) :] if inside else node


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _texts(child, f"{path}.{key}" if path else str(key))


#: Where the classes that a config of this project builds come from.
TRUSTED = (
    "cifar10_tl.",
    "torch.optim.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.profilers.",
)


def check_targets(config: Any, origin: str) -> None:
    """Refuse plain containers in which a ``_target_`` is anything but a class of :data:`TRUSTED`.

    That a name begins right is not enough: ``lightning.pytorch.callbacks.x.os.system`` would, too. It must be a class,
    found in a module by its own name, and written in one of the trusted packages.

    Args:
        config: to be looked through.
        origin: where it came from, for the message.

    Raises:
        UserError: naming the first such target, and its key.
    """
    for key, target in _targets(config):
        if not is_trusted(target):
            raise UserError(
                f"{origin} names code that is neither this project's nor Lightning's: {key}={target}; look at it, and "
                "if you trust it add trust=true"
            )


def is_trusted(target: Any) -> bool:
    """Whether ``target`` is the dotted name of a class of a trusted package."""
    if not isinstance(target, str) or not target.startswith(TRUSTED):
        return False
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)  # a real module of a trusted package, or this fails
    except ImportError:
        return False
    found = getattr(module, name, None)
    return isinstance(found, type) and f"{found.__module__}.".startswith(TRUSTED)


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            place = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield place, child
            else:
                yield from _targets(child, place)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from _targets(child, f"{path}[{number}]")
