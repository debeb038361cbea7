from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.optim import build_optimizer, group_factors, parameter_groups, schedule_factor

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


def test_layer_decay_lowers_the_rate_from_stage_to_stage() -> None:
    backbone = Backbone("resnet18", freeze="layer1")
    settings = {"name": "SGD", "lr": 0.1, "backbone_lr_scale": 0.5, "layer_decay": 0.7}
    groups = build_optimizer(settings, backbone, HEAD, can_fuse=True).param_groups
    rates = {"layer2": 0.05 * 0.7**3, "layer3": 0.05 * 0.7**2, "layer4": 0.05 * 0.7, "head": 0.1}
    expected = [
        (f"{name}{suffix}", pytest.approx(lr)) for name, lr in rates.items() for suffix in ("", " without decay")
    ]
    assert [(g["name"], g["lr"]) for g in groups] == expected  # the stem and layer1 are frozen
    stem = build_optimizer(settings, Backbone("resnet18"), HEAD, can_fuse=True).param_groups[0]
    assert (stem["name"], stem["lr"]) == ("stem", pytest.approx(0.05 * 0.7**5))
    members = [id(p) for g in groups for p in g["params"]]
    trained = [p for p in (*backbone.parameters(), *HEAD.parameters()) if p.requires_grad]
    assert sorted(members) == sorted(id(p) for p in trained)


def test_biases_of_the_backbone_have_their_own_rate() -> None:
    settings = {"name": "SGD", "lr": 0.1, "bias_lr_scale": 64, "layer_decay": 0.5, "weight_decay": 0.01}
    backbone = Backbone("resnet10", freeze="layer3")
    groups = {g["name"]: g for g in build_optimizer(settings, backbone, HEAD, can_fuse=True).param_groups}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "layer4": (0.05, 0.01),
        "layer4 without decay": (0.05, 0.0),
        "layer4 biases": (0.05 * 64, 0.0),
        "head": (0.1, 0.01),
        "head without decay": (0.1, 0.0),
    }
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    parameters = dict(backbone.layer4.named_parameters())
    assert members["layer4 biases"] == {id(p) for key, p in parameters.items() if key.endswith("bias")}
    assert members["layer4 without decay"] == {
        id(p) for key, p in parameters.items() if "bias" not in key and p.ndim == 1
    }
    assert sum(map(len, members.values())) == len(parameters) + 2


@pytest.mark.parametrize("layer_decay", [1, 1.0, None])
def test_without_layer_decay_the_groups_are_those_of_earlier_checkpoints(layer_decay: float | None) -> None:
    settings = {"name": "SGD", "lr": 0.1, "backbone_lr_scale": 0.3}
    backbone = Backbone("resnet18")
    plain, off = (
        build_optimizer(options, backbone, HEAD, can_fuse=True).state_dict()
        for options in (settings, {**settings, "layer_decay": layer_decay})
    )
    assert plain == off
    assert [group["name"] for group in off["param_groups"]][:2] == ["backbone", "backbone without decay"]
    assert off["param_groups"][0]["lr"] == 0.1 * 0.3


@pytest.mark.parametrize(
    "own", [{"name": "SGD", "momentum": 0.9}, {"name": "Adam"}, {"name": "AdamW"}, {"name": "SGD", "layer_decay": 0.5}]
)
def test_the_backbone_rests_bit_for_bit_in_the_first_steps_and_then_moves(own: dict) -> None:
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)
    backbone.stages = lambda: dict(zip(("stem", "layer1"), backbone, strict=True))
    settings = {"lr": 0.1, "weight_decay": 0.1, **own}
    optimizer = build_optimizer(settings, backbone, head, can_fuse=True)
    factors = group_factors(optimizer, schedule_factor({"name": "constant"}, 5), head_only_steps=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    start = [p.clone() for p in backbone.parameters()]
    for step in range(4):
        before = head.weight.clone()
        optimizer.zero_grad()
        head(backbone(torch.ones(2, 4))).square().sum().backward()
        optimizer.step()
        scheduler.step()
        assert not torch.equal(head.weight, before)
        moved = [not torch.equal(p, q) for p, q in zip(backbone.parameters(), start, strict=True)]
        assert moved == [step == 3] * 4


def test_weights_that_a_strategy_has_flattened_are_refused() -> None:
    module = nn.ParameterList([nn.Parameter(p.detach().flatten()) for p in nn.Linear(2, 2).parameters()])
    with pytest.raises(UserError, match="flattens weights"):
        parameter_groups("head", module, 0.1)


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


def test_linear_rises_and_falls_in_a_line() -> None:
    factor = schedule_factor({"name": "linear", "warmup": 0.2, "final": 0.1, "head_only_epochs": 1}, 50)
    assert [factor(i) for i in range(11)] == pytest.approx([(i + 1) / 11 for i in range(11)])
    assert [factor(i) for i in (20, 30, 50, 60)] == pytest.approx([0.775, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "step"}, "scheduler.name=step: choose from constant, cosine, linear"),
        ({"name": "cosine", "gamma": 0.1}, "scheduler.gamma: no such setting; choose from warmup, final"),
        ({"name": "constant", "warmup": 0.1}, "scheduler.warmup: no such setting; scheduler has none"),
    ],
)
def test_an_invalid_schedule_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule_factor(settings, 100)
