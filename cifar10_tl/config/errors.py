"""The one kind of error that is shown to a user as a line rather than a traceback."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar10_tl.config.run_dir import CONFIG_DIR


class UserError(Exception):
    """A mistake the user can mend: shown as one ``error:`` line, exit status 2, no traceback."""


def known_arguments(
    function: Callable[..., Any], settings: Mapping[str, Any], group: str, taken: Collection[str] = ()
) -> Mapping[str, Any]:
    """``settings`` as they are, if ``function`` takes each of them.

    Args:
        function: or class.
        settings: its keyword arguments, from the config group ``group``.
        group: for the message.
        taken: arguments that are given otherwise.

    Raises:
        UserError: naming the first setting that it does not take, and those that it does.
    """
    known = [name for name in inspect.signature(function).parameters if name not in taken]
    for name in settings:
        if name not in known:
            raise UserError(f"{group}.{name}: there is no such setting here; there are {', '.join(known)}")
    return settings


_NO_MEMORY = "MemoryError|can't allocate memory|Storage size calculation overflowed|Overflow when unpacking"


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(
        re.search(r"Connection (closed|reset) by peer|Broken pipe|TCPStore|NCCL|gloo", str(error))
    )


def explain(error: BaseException, config_name: str) -> str | None:
    """The line that tells a user of ``error``, or None where it is no mistake of theirs but a fault of ours."""
    if unknown := re.search(r"Could not override '([^']+)'\.\s+To append", str(error)):
        return _explain_unknown_key(unknown[1], config_name)
    if isinstance(error, OverrideParseException):
        return one_line(f"{error.override}: {error} (a value with signs of its own wants quotes: 'key=\"a=b\"')")
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, (UserError, OSError)):
        return explain(cause, config_name)  # raised while Hydra built an object
    if isinstance(error, HydraException) and cause is not None and str(cause) not in str(error):
        return one_line(f"{error} {cause}")
    if isinstance(error, ValueError) and "Config group override must be a string" in str(error):
        return "a group of settings wants a name, such as logger=none or callbacks=minimal; --help lists them"
    if isinstance(error, ValueError) and _raised_by("hydra", error):
        return one_line(str(error))
    if isinstance(error, OSError) and error.filename and _raised_by("hydra", error):
        return f"paths.output_dir={error.filename}: {error.strerror}; choose another folder"
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException, OSError)):
        return one_line(str(error))
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; not imported here, for its 5 seconds
        return one_line(str(error))
    if isinstance(error, (ValueError, RuntimeError)) and str(error).startswith("You set `"):  # of how it was started
        return one_line(
            f"trainer.devices, trainer.num_nodes: these are not the processes that torchrun or SLURM started. {error} "
            "Give trainer.devices=PROCESSES_A_MACHINE trainer.num_nodes=MACHINES"
        )
    if isinstance(error, (MemoryError, RuntimeError)) and re.search(_NO_MEMORY, f"{type(error).__name__} {error}"):
        return "more memory is asked for than this machine has; lower the sizes that were given"
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in str(error):
        return "data.batch_size gives a device one image, too few for BatchNorm: choose 2 or more for each device"
    if isinstance(error, (ValueError, TypeError)) and _raised_by("lightning", error):
        return one_line(f"trainer: {error} (HYDRA_FULL_ERROR=1 shows where)")
    if _is_lost(error):
        return (
            "another process of this run has ended, or cannot be reached any more (it may have said why above); "
            "go on with resume= and this run's folder"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return "out of device memory; lower data.batch_size or model.image_size, or set trainer.precision=bf16-mixed"
    return None


def _raised_by(library: str, error: BaseException) -> bool:
    """Whether a library itself found the fault: some complaints of Hydra and Lightning are plain ValueErrors."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1] in ("os", "pathlib"):  # called by Hydra
        modules.pop()
    return bool(modules) and modules[-1].startswith(f"{library}.")


def one_line(text: str) -> str:
    """``text`` with every run of white space made one blank, and without Hydra's list of its search path."""
    return " ".join(text.split("Config search path:")[0].split())


def _explain_unknown_key(key: str, config_name: str) -> str:
    known = config_keys(config_name)
    section, _, name = key.rpartition(".")
    if key in known:
        return f"{key}: no such setting goes with the groups that were chosen (data=, model/head=, scheduler= ...)"
    beside = {k[len(section) + 1 if section else 0 :].split(".")[0]: None for k in known if k.startswith(section)}
    close = difflib.get_close_matches(name, beside, n=1)
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    if close:
        advice = f"did you mean {section}.{close[0]}?".replace(" .", " ")
    elif elsewhere:
        advice = f"did you mean {' or '.join(elsewhere)}?"
    else:
        advice = f"there are {', '.join(beside)};" if section and beside else ""
    return one_line(f"{key}: there is no such setting; {advice} --cfg job shows them all")


def config_keys(config_name: str) -> list[str]:
    """Every key of a command's default config, dotted, such as ``trainer.max_epochs``."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(config_name)
    return list(_leaves(OmegaConf.to_container(cfg)))


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix] if prefix else []
    return [leaf for key, child in node.items() for leaf in _leaves(child, f"{prefix}.{key}" if prefix else str(key))]
