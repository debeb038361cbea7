"""User errors, and the one line that explains an exception."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

#: The new name of each old key or option; None if it was removed.
RENAMED: dict[str, str | None] = {
    "data.augment.flip": "data.augment.horizontal_flip",
    "data.augment.crop_padding": "data.augment.random_crop_padding",
    "data.augment.erase": "data.augment.random_erasing",
    "data.augment.jitter": "data.augment.color_jitter",
    "callbacks.history": "callbacks.metrics_logger",
    "callbacks.progress": "callbacks.progress_bar",
    "experiment/seed": "experiment=original",
    "trainer/fsdp": "trainer.strategy=fsdp",
    "corrupt": None,
}
_NO_MEMORY = "MemoryError|can't allocate memory|Storage size calculation overflowed|Overflow when unpacking"
_UNKNOWN_KEY = r"Could not override '([^']+)'\.\s+To append|Could not delete from config\. '([^']+)' does not exist"


class UserError(Exception):
    """Error that the user can fix: printed as one ``error:`` line, exit status 2, without a traceback."""


def known_arguments(
    function: Callable[..., Any], settings: Mapping[str, Any], group: str, taken: Collection[str] = ()
) -> Mapping[str, Any]:
    """Return ``settings``, which belong to the config group ``group``, if each is an argument of ``function``.

    Raises:
        UserError: A setting is not an argument, or it is one of ``taken``, which come from elsewhere.
    """
    known = [name for name in inspect.signature(function).parameters if name not in taken]
    if unknown := [f"{group}.{name}" for name in settings if name not in known]:
        raise UserError(_renamed(unknown[0]) or f"{unknown[0]}: no such setting; choose from {', '.join(known)}")
    return settings


def explain(error: BaseException, config_name: str) -> str | None:
    """Return the line that explains ``error`` to a user, or None if it is a bug."""
    text, kind = str(error), type(error).__name__
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return one_line(str(cause))
        if isinstance(cause, HydraException):  # one of them is an OSError, too
            continue
        if isinstance(cause, OSError) and cause.filename and _raised_by(("hydra", "logging"), error):
            return f"paths.output_dir: cannot write {cause.filename}: {cause.strerror}; choose another folder"
        if isinstance(cause, OSError):
            return one_line(str(cause))
    if unknown := re.search(_UNKNOWN_KEY, text):
        return _explain_unknown_key(unknown[1] or unknown[2], config_name)
    if (missing := re.search(r"Could not find '([^']+)'", text)) and (renamed := _renamed(missing[1])):
        return renamed
    if isinstance(error, OverrideParseException):
        return one_line(f"{error.override}: {text} (quote a value with special characters: 'key=\"a=b\"')")
    if "Config group override must be a string" in text or (kind == "TypeError" and _raised_by(("hydra",), error)):
        return "a config group takes a name, such as logger=none or callbacks=minimal; --help lists them"
    if isinstance(error, (HydraException, OmegaConfBaseException)) or kind == "MisconfigurationException":
        reason = str(error.__cause__ or "")
        return one_line(text if reason in text else f"{text} {reason}")
    if text.startswith("You set `"):
        return one_line(
            f"trainer.devices, trainer.num_nodes: torchrun or SLURM started a different number of processes. {text} "
            "Set trainer.devices=PROCESSES_PER_NODE trainer.num_nodes=NODES"
        )
    if kind == "OutOfMemoryError":
        return "out of device memory; reduce data.batch_size or model.image_size, or set trainer.precision=bf16-mixed"
    if isinstance(error, (MemoryError, RuntimeError)) and re.search(_NO_MEMORY, f"{kind} {text}"):
        return "this machine does not have enough memory; reduce the sizes in the settings"
    if "Expected more than 1 value per channel" in text:
        return "data.batch_size is one image per device, too few for BatchNorm; choose at least 2 per device"
    if is_connection_loss(error):
        return (
            "another process of this run ended or cannot be reached (its own message may stand above); "
            "resume with resume=RUN_DIR"
        )
    if isinstance(error, ValueError) and _raised_by(("hydra", "logging"), error):
        return one_line(text)
    if isinstance(error, (ValueError, TypeError)) and _raised_by(("lightning",), error):
        return one_line(f"trainer: {text} (HYDRA_FULL_ERROR=1 shows where)")
    return None


def is_connection_loss(error: BaseException) -> bool:
    """Return whether ``error`` says that another process of the job cannot be reached."""
    lost = r"Connection (closed|reset) by peer|Broken pipe|TCPStore|NCCL|gloo"
    return isinstance(error, RuntimeError) and bool(re.search(lost, str(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_by(libraries: Collection[str], error: BaseException) -> bool:
    """Return whether a library raised ``error``: Hydra and Lightning raise plain ValueErrors for wrong settings."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1] in ("os", "pathlib"):
        modules.pop()
    return bool(modules) and modules[-1].split(".")[0] in libraries


def one_line(text: str) -> str:
    """Return ``text`` on one line, without Hydra's list of its search path."""
    return " ".join(text.split("Config search path:")[0].split())


def _renamed(key: str) -> str | None:
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            advice = f"renamed: use {new}{key[len(old) :]}" if new else "removed: leave it out"
            return f"{key.replace('/', '=')} was {advice}"
    return None


def _explain_unknown_key(key: str, config_name: str) -> str:
    if renamed := _renamed(key):
        return renamed
    known = config_keys(config_name)
    if key in known:
        return f"{key}: the chosen groups have no such setting (data=, model/head=, scheduler= ...)"
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    similar = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    if similar := similar or [k for k in known if k.rpartition(".")[2] == name]:
        advice = f"did you mean {' or '.join(similar)}?"
    else:
        advice = f"choose from {', '.join(siblings)};" if section and siblings else ""
    return one_line(f"{key}: no such setting; {advice} --cfg job shows all settings")


def config_keys(config_name: str) -> list[str]:
    """Return every key of a command's default config, such as ``trainer`` and ``trainer.max_epochs``."""
    from hydra import compose, initialize_config_dir

    from cifar10_tl.config import CONFIG_DIR

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return [key for key, _ in walk(OmegaConf.to_container(compose(config_name)))]


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every node below ``node``."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield f"{prefix}{key}", child
        yield from walk(child, f"{prefix}{key}.")
