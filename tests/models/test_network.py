from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights
from torchvision.transforms.functional import normalize

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import PUBLISHED, Backbone
from cifar10_tl.models.heads import LinearHead, LSTMHead
from cifar10_tl.models.network import IMAGENET_MEAN, IMAGENET_STD, TransferResNet

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(
    image_size: int, head: nn.Module | None = None, stem: str = "imagenet", training_sizes: tuple[int, ...] = ()
) -> TransferResNet:
    sizes = {"native_size": 32, "image_size": image_size, "interpolation": "bicubic", "training_sizes": training_sizes}
    return TransferResNet(Backbone("resnet18", stem=stem), head or LinearHead(512, 10), **sizes).eval()


@pytest.mark.parametrize("image_size", [32, 224])
def test_preprocessing_is_resizing_and_normalization(image_size: int) -> None:
    resized = nn.functional.interpolate(IMAGES.float() / 255, size=(image_size, image_size), mode="bicubic")
    processed = network(image_size).preprocess(IMAGES)
    assert processed.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(processed, normalize(resized, IMAGENET_MEAN, IMAGENET_STD), atol=2e-5)


def test_boxes_are_cropped_and_resized_at_once() -> None:
    boxes = torch.tensor([[0, 0, 32, 32], [3, 5, 20, 24], [0, 1, 31, 31], [8, 8, 24, 24]])
    crops = [image[None, :, y : y + h, x : x + w] / 255 for image, (y, x, h, w) in zip(IMAGES, boxes, strict=True)]
    expected = [nn.functional.interpolate(crop, (48, 48), mode="bicubic") for crop in crops]
    processed = network(48).preprocess(IMAGES, boxes.float())
    assert processed.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(processed, normalize(torch.cat(expected), IMAGENET_MEAN, IMAGENET_STD), atol=2e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_weights_use_the_normalization_of_imagenet(name: str) -> None:
    for weights in get_model_weights(name):
        transforms = weights.transforms()
        assert (tuple(transforms.mean), tuple(transforms.std)) == (IMAGENET_MEAN, IMAGENET_STD)


def test_making_images_smaller_uses_antialiasing() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = network(16).preprocess(stripes)
    middle = (0.5 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert (small - middle.view(1, 3, 1, 1)).abs().max() < 0.25


def test_weights_are_laid_out_as_the_device_reads_them() -> None:
    for device, dense in (("cpu", torch.contiguous_format), ("cuda", torch.channels_last)):
        made = network(32)
        before = {name: value.clone() for name, value in made.state_dict().items()}
        made.lay_out_for(torch.device(device))
        kernels = [p for p in made.parameters() if p.ndim == 4 and min(p.shape) > 1]  # those of 1x1 are both
        assert all(p.is_contiguous(memory_format=dense) for p in kernels)
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_the_head_may_take_its_input_from_a_cache() -> None:
    for head, cells in ((LinearHead(512, 10), 1), (LSTMHead(512, 10), 2)):
        net = network(64, head)
        cached = net.head_input(IMAGES)
        assert cached.shape == (4, 512, cells, cells)
        assert torch.allclose(head(cached), net(IMAGES), atol=1e-5)


def test_an_lstm_on_one_cell_is_refused_with_a_size_that_works() -> None:
    for sizes in ((32, ()), (64, (32, 48))):
        with pytest.raises(UserError, match=r"model\.image_size=32.* choose 33 or more"):
            network(sizes[0], head=LSTMHead(512, 10), training_sizes=sizes[1])
    network(33, head=LSTMHead(512, 10))
    network(32, head=LSTMHead(512, 10), stem="cifar")


def test_training_images_have_a_size_of_their_own() -> None:
    net, plain = network(32, training_sizes=(16, 24)), network(32)
    assert net.state_dict().keys() == plain.state_dict().keys()
    for size in (16, 24, 32):
        net.training_size = size
        assert torch.equal(net.train().preprocess(IMAGES), network(size).preprocess(IMAGES))
        assert torch.equal(net.eval().preprocess(IMAGES), plain.preprocess(IMAGES))
