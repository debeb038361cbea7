from __future__ import annotations

import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "cells"), [(32, 1), (33, 2), (96, 3), (224, 7)])
def test_the_feature_map_has_a_cell_for_32_pixels(size: int, cells: int) -> None:
    with torch.inference_mode():
        assert Backbone("resnet18").eval()(torch.rand(1, 3, size, size)).shape == (1, 512, cells, cells)


def test_the_cifar_stem_keeps_four_times_the_resolution() -> None:
    backbone = Backbone("resnet18", stem="cifar")
    assert backbone(IMAGES).shape == (2, 512, 4, 4)
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)


def test_an_unknown_backbone_is_explained() -> None:
    with pytest.raises(UserError, match="choose from resnet18, resnet34, resnet50, resnet101, resnet152"):
        Backbone("vgg16")


def test_a_frozen_backbone_stays_in_eval_mode_and_builds_no_graph() -> None:
    net = torch.nn.Sequential(Backbone("resnet18", frozen=True), torch.nn.Dropout()).train()
    assert net[1].training
    assert not any(module.training for module in net[0].modules())
    assert not net(IMAGES).requires_grad
    assert Backbone("resnet18")(IMAGES).requires_grad
