"""The one kind of error that is shown to a user as a line rather than a traceback."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


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
