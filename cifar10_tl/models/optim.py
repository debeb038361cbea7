"""Optimizers, parameter groups and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cifar10_tl.config.errors import UserError


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the optimizer class ``name`` of ``torch.optim``.

    Raises:
        UserError: There is no such optimizer.
    """
    found = getattr(torch.optim, str(name), None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)) or found is Optimizer:
        raise UserError(f"optimizer.name={name}: torch.optim has no such optimizer; Adam, AdamW and SGD are some")
    return found


def parameter_groups(
    name: str, module: nn.Module, lr: float, decayed: Collection[nn.Parameter]
) -> list[dict[str, Any]]:
    """Return the trainable parameters as two groups, with weight decay only for those in ``decayed``."""

    def group(suffix: str, parameters: Iterable[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
        members = [p for p in parameters if p.requires_grad]
        return [{"params": members, "lr": lr, "name": f"{name}{suffix}", **options}] if members else []

    parameters = list(module.parameters())
    with_decay = group("", (p for p in parameters if p in decayed))
    return with_decay + group(" without decay", (p for p in parameters if p not in decayed), weight_decay=0.0)


def schedule_factor(settings: Mapping[str, Any], num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the optimizer step.

    "cosine" rises linearly to 1 over the fraction ``warmup`` of the steps, then decays to ``final`` along half a cosine
    (https://arxiv.org/abs/1608.03983).

    Raises:
        UserError: The schedule or one of its settings does not exist.
    """
    if settings["name"] not in ("constant", "cosine"):
        raise UserError(f"scheduler.name={settings['name']}: there are constant, cosine")
    known = {"constant": {"name"}, "cosine": {"name", "warmup", "final"}}[settings["name"]]
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"scheduler.{unknown[0]}: scheduler={settings['name']} has {', '.join(sorted(known))}")
    if settings["name"] == "constant":
        return lambda step: 1.0
    warmup, final = round(settings.get("warmup", 0.0) * num_steps), settings.get("final", 0.0)

    # A function, because LambdaLR saves the attributes of a callable object, and a resumed run may have more steps.
    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return float(final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return cosine
