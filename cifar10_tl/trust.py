"""Which code a run folder may name: it may come from somebody else, and resuming it builds what its config says."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from cifar10_tl.errors import UserError

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
