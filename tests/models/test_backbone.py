from __future__ import annotations

import re

import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import BACKBONES, Backbone

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "cells"), [(32, 1), (33, 2), (96, 3), (224, 7)])
def test_the_feature_map_has_a_cell_for_32_pixels(size: int, cells: int) -> None:
    with torch.inference_mode():
        assert Backbone("resnet18").eval()(torch.rand(1, 3, size, size)).shape == (1, 512, cells, cells)


def test_the_cifar_stem_keeps_four_times_the_resolution() -> None:
    backbone = Backbone("resnet18", stem="cifar")
    assert backbone(IMAGES).shape == (2, 512, 4, 4)
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)


@pytest.mark.parametrize(("name", "contiguous"), [("resnet10", True), ("resnet18", True), ("resnet50", False)])
def test_layer4_of_basic_blocks_reads_contiguous_maps_on_a_cpu(name: str, contiguous: bool) -> None:
    backbone = Backbone(name)
    maps = []
    backbone.layer4.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    backbone(torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert maps[0].is_contiguous() == contiguous
    assert maps[0].is_contiguous(memory_format=torch.channels_last) != contiguous


def test_the_backbones_are_resnet10_and_all_resnets_of_torchvision() -> None:
    plain = {f"resnet{depth}": 512 if depth < 50 else 2048 for depth in (10, 18, 34, 50, 101, 152)}
    wide = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
    widths = {}
    with torch.device("meta"):  # without computing anything
        for name in BACKBONES:
            for stem, cells in (("imagenet", 2), ("cifar", 8)):
                features = Backbone(name, stem=stem)(torch.empty(2, 3, 64, 64))
                assert features.shape[2:] == (cells, cells)
            widths[name] = features.shape[1]
    assert widths == plain | dict.fromkeys(wide, 2048)


def test_resnet10_is_resnet18_with_one_block_per_stage() -> None:
    small, large = ({name: p.shape for name, p in Backbone(f"resnet{n}").named_parameters()} for n in (10, 18))
    assert small == {name: shape for name, shape in large.items() if not re.match(r"layer\d\.1\.", name)}
    assert sum(shape.numel() for shape in small.values()) == 4_905_792


def test_an_unknown_backbone_is_explained() -> None:
    with pytest.raises(UserError, match="choose from resnet10, resnet18, resnet34, resnet50, resnet101, resnet152"):
        Backbone("vgg16")


@pytest.mark.parametrize(("freeze", "num_frozen"), [("none", 0), ("stem", 1), ("layer2", 3), ("backbone", 5)])
def test_frozen_stages_keep_weights_and_statistics_and_build_no_graph(freeze: str, num_frozen: int) -> None:
    backbone = Backbone("resnet18", freeze=freeze)
    net = torch.nn.Sequential(backbone, torch.nn.Dropout()).eval().train()
    assert net[1].training
    stages = list(backbone.stages().values())
    for i, stage in enumerate(stages):
        assert {p.requires_grad for p in stage.parameters()} == {i >= num_frozen}
        assert {module.training for module in stage.children()} == {i >= num_frozen}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = net(IMAGES)
    assert features.requires_grad == (num_frozen < 5)
    changed = {name.split(".")[0] for name, value in backbone.state_dict().items() if not value.equal(before[name])}
    assert changed == set(["bn1", "layer1", "layer2", "layer3", "layer4"][num_frozen:])


def test_the_stages_are_the_whole_backbone_in_order() -> None:
    for stem in ("imagenet", "cifar"):
        backbone = Backbone("resnet18", stem=stem).eval()
        features = IMAGES
        for stage in backbone.stages().values():
            features = stage(features)
        assert torch.equal(features, backbone(IMAGES))
        assert list(backbone.stages()) == ["stem", "layer1", "layer2", "layer3", "layer4"]
