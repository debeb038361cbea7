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
from cifar10_tl.models.backbone import Backbone


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the optimizer class ``name`` of ``torch.optim``."""
    found = getattr(torch.optim, str(name), None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)) or found is Optimizer:
        raise UserError(f"optimizer.name={name}: torch.optim has no such optimizer; choose Adam, AdamW, SGD or another")
    return found


def build_optimizer(settings: Mapping[str, Any], backbone: Backbone, head: nn.Module, can_fuse: bool) -> Optimizer:
    """Build the optimizer ``settings["name"]`` with the other settings as its arguments, fused if possible.

    ``lr`` is the learning rate of the head, and ``lr * backbone_lr_scale`` that of the backbone. ``layer_decay`` also
    multiplies the rate once for layer4, twice for layer3 and so on, five times for the stem
    (https://arxiv.org/abs/1801.06146). ``bias_lr_scale`` multiplies the rate of the backbone's biases, by 64 in
    https://arxiv.org/abs/2404.00498.
    """
    options = dict(settings)
    name, backbone_lr_scale = options.pop("name"), options.pop("backbone_lr_scale", 1.0)
    layer_decay, bias_lr_scale = (options.pop(key, None) or 1 for key in ("layer_decay", "bias_lr_scale"))
    optimizer_class = find_optimizer(name)
    parts: Mapping[str, nn.Module] = {"backbone": backbone} if layer_decay == 1 else backbone.stages()
    groups = []
    for i, (part, module) in enumerate(parts.items()):
        lr = options["lr"] * backbone_lr_scale * layer_decay ** (len(parts) - i)
        groups += parameter_groups(part, module, lr, bias_lr_scale)
    groups += parameter_groups("head", head, options["lr"])
    if "fused" in inspect.signature(optimizer_class).parameters and not options.get("foreach"):
        options["fused"] = options.get("fused", True) if can_fuse else None  # None: torch's choice without fusion
    try:
        return optimizer_class(groups, **options)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"optimizer.name={name}: {error} (~optimizer.KEY removes a setting)") from error


def parameter_groups(name: str, module: nn.Module, lr: float, bias_lr_scale: float = 1) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters, with weight decay only for weights, not for norms and biases.

    Biases are a group of their own if ``bias_lr_scale`` is not 1.
    """
    trainable = {key: p for key, p in module.named_parameters() if p.requires_grad}
    weights, others = ([p for p in trainable.values() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    if others and not weights:
        raise UserError("this trainer.strategy flattens weights, so they look like biases; use trainer=ddp")
    biases = [p for key, p in trainable.items() if key.endswith("bias")] if bias_lr_scale != 1 else []
    others = [p for p in others if not any(p is bias for bias in biases)]
    groups = [
        {"params": weights, "lr": lr, "name": name},
        {"params": others, "lr": lr, "name": f"{name} without decay", "weight_decay": 0.0},
        {"params": biases, "lr": lr * bias_lr_scale, "name": f"{name} biases", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def constant(num_steps: int) -> Callable[[int], float]:
    """Return the factor 1 for every step."""
    return lambda step: 1.0


def linear(num_steps: int, warmup: float = 0.0, final: float = 0.0) -> Callable[[int], float]:
    """Return a factor that rises linearly to 1 over the fraction ``warmup`` of the steps, then falls to ``final``.

    Source: https://github.com/KellerJordan/cifar10-airbench.
    """
    return _rise_and_fall(num_steps, warmup, final, lambda done: 1 - done)


def cosine(num_steps: int, warmup: float = 0.0, final: float = 0.0) -> Callable[[int], float]:
    """Return a factor that rises like :func:`linear`, then decays to ``final`` along half a cosine.

    Source: https://arxiv.org/abs/1608.03983.
    """
    return _rise_and_fall(num_steps, warmup, final, lambda done: (1 + math.cos(math.pi * done)) / 2)


def _rise_and_fall(
    num_steps: int, warmup: float, final: float, curve: Callable[[float], float]
) -> Callable[[int], float]:
    """Return the factor that follows ``curve`` from 1 at 0 to 0 at 1, scaled to end at ``final``, after the warmup."""
    warmup_steps = round(warmup * num_steps)

    # A function, because LambdaLR saves the attributes of a callable object, and a resumed run may have more steps.
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return float(final + (1 - final) * curve(done))

    return factor


SCHEDULES: dict[str, Callable[..., Callable[[int], float]]] = {"constant": constant, "cosine": cosine, "linear": linear}


def schedule_factor(settings: Mapping[str, Any], num_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate, by ``settings["name"]``, as a function of the optimizer step."""
    options = dict(settings)
    name = options.pop("name", None)
    options.pop("head_only_epochs", None)  # see group_factors
    if name not in SCHEDULES:
        raise UserError(f"scheduler.name={name}: choose from {', '.join(SCHEDULES)}")
    known_arguments(SCHEDULES[name], options, "scheduler", taken=("num_steps",))
    return SCHEDULES[name](num_steps, **options)


def group_factors(
    optimizer: Optimizer, factor: Callable[[int], float], head_only_steps: int
) -> list[Callable[[int], float]]:
    """Return the factor of each parameter group, which is zero for the backbone in the first ``head_only_steps``.

    The optimizer's averages (momentum, Adam's moments) follow the backbone's gradients meanwhile, so that its first
    steps have their usual size.
    """

    def delayed(step: int) -> float:
        return factor(step) if step >= head_only_steps else 0.0

    return [factor if group["name"].startswith("head") else delayed for group in optimizer.param_groups]
