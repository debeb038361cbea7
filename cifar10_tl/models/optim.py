"""The system around the network: loss, steps, optimizer, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cifar10_tl.config.errors import UserError


def find_optimizer(name: str) -> type[Optimizer]:
    """A class of ``torch.optim`` by its name.

    Raises:
        UserError: there is none.
    """
    found = getattr(torch.optim, str(name), None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)) or found is Optimizer:
        raise UserError(f"optimizer.name={name}: torch.optim has no such optimizer; Adam, AdamW and SGD are some")
    return found


def parameter_groups(
    name: str, module: nn.Module, lr: float, decayed: Collection[nn.Parameter]
) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups: those among ``decayed``, and norms and biases, without decay."""

    def group(suffix: str, parameters: Iterable[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
        members = [p for p in parameters if p.requires_grad]
        return [{"params": members, "lr": lr, "name": f"{name}{suffix}", **options}] if members else []

    parameters = list(module.parameters())
    with_decay = group("", (p for p in parameters if p in decayed))
    return with_decay + group(" without decay", (p for p in parameters if p not in decayed), weight_decay=0.0)


def schedule_factor(settings: Mapping[str, Any], num_steps: int) -> Callable[[int], float]:
    """What a schedule multiplies the rate with, as a function of the optimizer's step (from 0 on).

    Constant: 1. Cosine: from 0 up to 1 in a line over the ``warmup`` share of the steps, then down to ``final`` along
    half a cosine (https://arxiv.org/abs/1608.03983).

    Raises:
        UserError: there is no schedule of that name, or it has no such setting.
    """
    if settings["name"] not in ("constant", "cosine"):
        raise UserError(f"scheduler.name={settings['name']}: there are constant, cosine")
    known = {"constant": {"name"}, "cosine": {"name", "warmup", "final"}}[settings["name"]]
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"scheduler.{unknown[0]}: scheduler={settings['name']} has {', '.join(sorted(known))}")
    if settings["name"] == "constant":
        return lambda step: 1.0
    warmup, final = round(settings.get("warmup", 0.0) * num_steps), settings.get("final", 0.0)

    # A function: LambdaLR would save the attributes of an object, and a resumed run keep an outdated number of steps.
    def cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return float(final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return cosine
