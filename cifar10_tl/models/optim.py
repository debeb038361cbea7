"""Optimizers, parameter groups and learning rate schedules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cifar10_tl.config.errors import UserError, known_arguments


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the optimizer class ``name`` of ``torch.optim``."""
    found = getattr(torch.optim, str(name), None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)) or found is Optimizer:
        raise UserError(f"optimizer.name={name}: torch.optim has no such optimizer; Adam, AdamW and SGD are some")
    return found


def build_optimizer(settings: Mapping[str, Any], backbone: nn.Module, head: nn.Module, can_fuse: bool) -> Optimizer:
    """Build the optimizer ``settings["name"]`` with the other settings as its arguments, fused if possible.

    ``lr`` is the learning rate of the head, and ``lr * backbone_lr_scale`` that of the backbone.
    """
    options = dict(settings)
    name, backbone_lr_scale = options.pop("name"), options.pop("backbone_lr_scale", 1.0)
    optimizer_class = find_optimizer(name)
    groups = [
        *parameter_groups("backbone", backbone, options["lr"] * backbone_lr_scale),
        *parameter_groups("head", head, options["lr"]),
    ]
    if "fused" in inspect.signature(optimizer_class).parameters and not options.get("foreach"):
        options["fused"] = can_fuse and options.get("fused", True)
    try:
        return optimizer_class(groups, **options)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"optimizer.name={name}: {error} (~optimizer.KEY removes a setting)") from error


def parameter_groups(name: str, module: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as two groups, with weight decay only for weights, not for norms and biases."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    weights, others = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups = [
        {"params": weights, "lr": lr, "name": name},
        {"params": others, "lr": lr, "name": f"{name} without decay", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def constant(num_steps: int) -> Callable[[int], float]:
    """Return the factor 1 for every step."""
    return lambda step: 1.0


def cosine(num_steps: int, warmup: float = 0.0, final: float = 0.0) -> Callable[[int], float]:
    """Return a factor that rises linearly to 1 over the fraction ``warmup`` of the steps, then decays to ``final``.

    The decay is half a cosine (https://arxiv.org/abs/1608.03983).
    """
    warmup_steps = round(warmup * num_steps)

    # A function, because LambdaLR saves the attributes of a callable object, and a resumed run may have more steps.
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return float(final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    return factor


SCHEDULES: dict[str, Callable[..., Callable[[int], float]]] = {"constant": constant, "cosine": cosine}


def schedule_factor(settings: Mapping[str, Any], num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate, by ``settings["name"]``, as a function of the optimizer step."""
    options = dict(settings)
    name = options.pop("name", None)
    if name not in SCHEDULES:
        raise UserError(f"scheduler.name={name}: choose from {', '.join(SCHEDULES)}")
    known_arguments(SCHEDULES[name], options, "scheduler", taken=("num_steps",))
    return SCHEDULES[name](num_steps, **options)
