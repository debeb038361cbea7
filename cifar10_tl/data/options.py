"""Settings of the data where a checkpoint has some already."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.sources import SOURCES
from cifar10_tl.errors import UserError


def data_options(given: Mapping[str, Any], trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the DataModule: ``given`` as a whole where it names a source, else on top of ``trained_with``.

    Raises:
        UserError: a source has no such setting, or there is none.
    """
    overrides = {key: value for key, value in given.items() if value is not None}
    options = overrides if "source" in overrides else {**trained_with, **overrides}
    source = options.get("source")
    if source is None:
        raise UserError(
            "the checkpoint does not say what data it was trained with: give data=cifar10, folder or shapes"
        )
    if source not in SOURCES:
        raise UserError(f"data.source={source}: there are {', '.join(SOURCES)}")
    known = {*inspect.signature(SOURCES[source]).parameters, *inspect.signature(CIFAR10DataModule).parameters}
    for key in options:
        if key not in known:
            raise UserError(f"data.{key}: data={source} has no such setting; data=... replaces the data set as a whole")
    return options
