from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.heads import DenseHead, LinearHead, LSTMHead, build_head
from cifar10_tl.models.network import TransferResNet
from cifar10_tl.models.resize import Resize
from cifar10_tl.models.weights import IMAGENET_MEAN, IMAGENET_STD


def network(image_size: int = 64, head: nn.Module | None = None, **options) -> TransferResNet:
    backbone = Backbone("resnet18", **options)
    head = head or LinearHead(backbone.num_features, 10)
    sizes = {"native_size": 32, "image_size": image_size, "interpolation": "bicubic"}
    return TransferResNet(backbone, head, **sizes, mean=IMAGENET_MEAN, std=IMAGENET_STD).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_preprocessing_is_resize_and_the_weights_own_normalisation(images: torch.Tensor) -> None:
    resized = torch.nn.functional.interpolate(images.float() / 255, size=(224, 224), mode="bicubic")
    wanted = torchvision.transforms.functional.normalize(resized, IMAGENET_MEAN, IMAGENET_STD)
    got = network(224).preprocess(images)
    assert got.shape == (4, 3, 224, 224)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got, wanted, atol=2e-5)


def test_weights_are_laid_out_as_the_device_reads_them() -> None:
    for device, dense in (("cpu", torch.contiguous_format), ("cuda", torch.channels_last)):
        made = network(32)
        before = {name: value.clone() for name, value in made.state_dict().items()}
        made.lay_out_for(torch.device(device))
        kernels = [p for p in made.parameters() if p.ndim == 4 and min(p.shape) > 1]  # those of 1x1 are both
        assert kernels
        assert all(p.is_contiguous(memory_format=dense) for p in kernels)
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_making_images_smaller_uses_antialiasing() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = network(16).preprocess(stripes)
    middle = (0.5 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert (small - middle.view(1, 3, 1, 1)).abs().max() < 0.25


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 16), (40, 24, 96), (48, 32, 20)])
def test_resizing_by_matrices_is_interpolation(mode: str, height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.interpolate(images, (size, width), mode=mode, antialias=size < height)
    wanted = torch.nn.functional.interpolate(rows, (size, size), mode=mode, antialias=size < width)
    resize = Resize(32, size, mode)
    assert torch.allclose(resize(images), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(images), resize(images).float()), "not rounded"
        assert torch.allclose(resize(images), wanted, atol=1e-5)


def test_images_of_the_right_size_are_only_normalised(images: torch.Tensor) -> None:
    wanted = torchvision.transforms.functional.normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.allclose(network(32).preprocess(images), wanted, atol=1e-5)


@pytest.mark.parametrize(("image_size", "cells"), [(32, 1), (33, 2), (64, 2), (96, 3), (224, 7)])
def test_the_feature_map_has_a_cell_for_32_pixels(images: torch.Tensor, image_size: int, cells: int) -> None:
    assert network(image_size).features(images).shape == (4, 512, cells, cells)


def test_the_cifar_stem_keeps_four_times_the_resolution(images: torch.Tensor) -> None:
    net = network(32, stem="cifar")
    assert net.features(images).shape == (4, 512, 4, 4)
    assert net.backbone.conv1.weight.shape == (64, 3, 3, 3)
    assert not hasattr(net.backbone, "maxpool")


@pytest.mark.parametrize("name", ["linear", "dense", "lstm"])
def test_heads_give_a_logit_a_class_for_any_grid(name: str) -> None:
    for grid in (2, 7):
        assert build_head({"name": name}, 512, 10)(torch.randn(3, 512, grid, grid)).shape == (3, 10)


def test_the_dense_head_is_pooling_relu_layers_and_a_final_layer() -> None:
    head = DenseHead(512, 10, hidden=[64, 32], dropout=0.5)
    kinds = [type(m).__name__ for m in head.layers]
    assert kinds == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    assert [m.out_features for m in head.layers if isinstance(m, nn.Linear)] == [64, 32, 10]
    features = torch.randn(2, 512, 3, 3)
    x = features.mean((2, 3))
    for layer in head.eval().layers:
        x = layer(x)
    assert torch.allclose(head(features), x)


def test_the_lstm_reads_the_cells_in_order() -> None:
    head = LSTMHead(16, 10, lstm_size=8, bidirectional=True, hidden=[4]).eval()
    features = torch.randn(2, 16, 2, 3)
    sequence = torch.stack([features[:, :, y, x] for y in range(2) for x in range(3)], 1)
    outputs, _ = head.lstm(sequence)
    last = torch.cat([outputs[:, -1, :8], outputs[:, 0, 8:]], 1)  # where each direction ends
    assert torch.allclose(head(features), head.layers(last), atol=1e-6)
    assert not torch.allclose(head(features), head(features.flip(3)))


def test_an_lstm_on_one_cell_is_refused_with_sizes_that_work() -> None:
    with pytest.raises(UserError, match=r"model\.image_size=32.* choose 33 or more \(64 gives 2x2"):
        network(32, head=LSTMHead(512, 10))
    network(33, head=LSTMHead(512, 10))
    network(32, head=LSTMHead(512, 10), stem="cifar")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "conv"}, "there are linear, dense, lstm"),
        ({"name": "linear", "hidden": [3]}, "unexpected keyword argument 'hidden'"),
    ],
)
def test_a_wrong_head_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(settings, 512, 10)


def test_an_unknown_backbone_is_explained() -> None:
    with pytest.raises(UserError, match="there are resnet18, resnet34, resnet50, resnet101, resnet152"):
        Backbone("vgg16")


def test_a_frozen_backbone_stays_in_eval_mode_and_builds_no_graph(images: torch.Tensor) -> None:
    net = network(32, frozen=True).train()
    assert net.head.training
    assert not any(m.training for m in net.backbone.modules())
    assert not net.features(images).requires_grad
    assert net(images).requires_grad
