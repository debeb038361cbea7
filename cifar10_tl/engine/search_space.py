"""Search space: settings of the train command with their ranges, and values of a trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.resume import as_override, override_key

Space = dict[str, BaseDistribution]

_FORMS = "{low: 1e-4, high: 1e-2, log: true} or {choices: [a, b]}"


def read_space(search: Mapping[str, Any], known: Mapping[str, Any]) -> Space:
    """Return the distribution of each setting to search.

    Args:
        search: Nested groups of settings, each ``{low, high}`` with ``log`` or ``step``, or ``{choices}``.
        known: Settings of the train command by dotted key.
    """
    space = {key: _distribution(key, entry) for key, entry in _entries(search)}
    if not space:
        raise UserError("search: has no settings; choose a file of conf/search, such as search=default")
    if unknown := [key for key in space if key not in known and "/" not in key]:
        raise UserError(
            f"search.{unknown[0]}: no such setting; python -m cifar10_tl.train --cfg job shows all settings"
        )
    return space


def _entries(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in node.items():
        if not isinstance(child, dict):
            raise UserError(f"search.{prefix}{name}={child}: must be {_FORMS}")
        if child.keys() & {"low", "high", "choices"}:
            yield f"{prefix}{name}", child
        else:
            yield from _entries(child, f"{prefix}{name}.")


def _distribution(key: str, entry: dict[str, Any]) -> BaseDistribution:
    try:
        if isinstance(entry.get("choices"), list) and len(entry) == 1:
            return CategoricalDistribution([json.dumps(choice) for choice in entry["choices"]])  # 1 and True differ
        is_whole = all(type(value) is int for name, value in entry.items() if name != "log")
        return IntDistribution(**entry) if is_whole else FloatDistribution(**entry)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"search.{key}={json.dumps(entry)}: must be {_FORMS} ({error})") from error


def plain_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a trial by setting; Optuna holds choices as JSON."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in params.items()}


def as_overrides(params: Mapping[str, Any]) -> list[str]:
    """Return the values of a trial as overrides of the train command."""
    return [as_override(key, value) for key, value in plain_values(params).items()]


def shared_overrides(overrides: Sequence[str], space: Space) -> list[str]:
    """Return those ``overrides`` of a search that its training runs take."""
    shared = []
    for override in overrides:
        key = override_key(override)
        if key in space:
            raise UserError(f"{override}: this setting is searched; leave it out, or remove it with ~search.{key}")
        if key != "paths.output_dir" and key.split(".")[0] not in ("search", "trials", "pruner"):
            shared.append(override)
    return shared
