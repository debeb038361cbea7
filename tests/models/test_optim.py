from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.optim import build_optimizer, parameter_groups, schedule_factor

BACKBONE, HEAD = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)


def test_groups_hold_every_parameter_once_with_its_rate_and_decay() -> None:
    settings = {"name": "SGD", "lr": 0.1, "backbone_lr_scale": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = build_optimizer(settings, BACKBONE, HEAD, can_fuse=True)
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "backbone": (pytest.approx(0.01), 0.01),
        "backbone without decay": (pytest.approx(0.01), 0.0),
        "head": (0.1, 0.01),
        "head without decay": (0.1, 0.0),
    }
    members = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in (*BACKBONE.parameters(), *HEAD.parameters()))
    assert all(p.ndim > 1 for n in ("backbone", "head") for p in groups[n]["params"])
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["fused"]) == (0.9, True)


def test_a_frozen_backbone_is_not_optimized() -> None:
    assert parameter_groups("backbone", nn.Linear(2, 2).requires_grad_(False), 0.1) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Adamm"}, "optimizer.name=Adamm: torch.optim has no such optimizer"),
        ({"name": "Optimizer"}, "torch.optim has no such optimizer"),
        ({"name": "lr_scheduler"}, "torch.optim has no such optimizer"),
        ({"name": "Adam", "momentum": 0.9}, "momentum"),
        ({"name": "Adam", "betas": [0.9, 1.5]}, "beta"),
    ],
)
def test_an_invalid_optimizer_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer({"lr": 0.1, **settings}, BACKBONE, HEAD, can_fuse=True)


def test_cosine_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    factor = schedule_factor({"name": "cosine", "warmup": 0.1, "final": 0.2}, 100)
    assert [factor(i) for i in range(10)] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert factor(100) == factor(1000) == pytest.approx(0.2)
    assert schedule_factor({"name": "constant"}, 100)(57) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "step"}, "scheduler.name=step: choose from constant, cosine"),
        ({"name": "cosine", "gamma": 0.1}, "scheduler.gamma: no such setting; choose from warmup, final"),
        ({"name": "constant", "warmup": 0.1}, "scheduler.warmup: no such setting; scheduler has none"),
    ],
)
def test_an_invalid_schedule_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule_factor(settings, 100)
