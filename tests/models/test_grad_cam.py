from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.grad_cam import grad_cam
from cifar10_tl.models.heads import DenseHead, LinearHead, LSTMHead
from cifar10_tl.models.network import TransferResNet

IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(head: nn.Module) -> TransferResNet:
    backbone = Backbone("resnet18", stem="cifar", freeze="layer2")
    return TransferResNet(backbone, head, native_size=32, image_size=32, interpolation="bicubic")


class TwoChannels(nn.Module):
    """Backbone whose feature map holds the red and the green pixels of 2 x 2 images."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :2]


def test_map_of_a_linear_head_by_hand() -> None:
    head = LinearHead(2, 2)
    net = TransferResNet(
        TwoChannels(),  # type: ignore[arg-type]
        head,
        native_size=2,
        image_size=2,
        interpolation="bicubic",
    )
    with torch.no_grad():
        net.scale.fill_(1)
        net.shift.zero_()
        head.layers[1].weight.copy_(torch.tensor([[2.0, -1.0], [-1.0, 0.0]]))
    red, green = torch.tensor([[10, 0], [3, 5]]), torch.tensor([[0, 7], [2, 10]])
    images = torch.stack([red, green, torch.zeros(2, 2)])[None].byte()
    # class 0: 2 red - green = [[20, -7], [4, 0]]; class 1: -red, which is nowhere positive
    (first,), (second,) = (grad_cam(net, images, torch.tensor([k])) for k in (0, 1))
    assert torch.allclose(first, torch.tensor([[1, 0], [4 / 20, 0]]), atol=1e-6)
    assert torch.equal(second, torch.zeros(2, 2))


@pytest.mark.parametrize("head", [LinearHead, DenseHead, LSTMHead])
@pytest.mark.parametrize("inference", [False, True])
def test_maps_of_each_head_agree_with_hooks_and_leave_the_network_unchanged(head: type, inference: bool) -> None:
    torch.manual_seed(0)
    net, classes = network(head(512, 3)), torch.tensor([0, 1, 2, 0, 1])
    modes = [module.training for module in net.modules()]
    assert len(set(modes)) == 2, "frozen stages are in eval mode"
    with torch.inference_mode(inference):
        maps = grad_cam(net, IMAGES, classes, batch_size=2)
    assert maps.shape == (5, 4, 4)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()].count(False) == 30
    assert all(p.grad is None for p in net.parameters())

    feature_maps: list[Tensor] = []
    net.eval().backbone.register_forward_hook(lambda *given: feature_maps.append(given[-1]))
    logits = net(IMAGES)
    (gradient,) = torch.autograd.grad(logits[torch.arange(5), classes].sum(), feature_maps)
    expected = torch.einsum("nc,nchw->nhw", gradient.mean((2, 3)), feature_maps[0]).clamp(min=0)
    assert torch.allclose(maps, expected / expected.amax((1, 2), keepdim=True), atol=1e-4)
    assert (maps.amax((1, 2)) == 1).all()
    assert not torch.allclose(maps, grad_cam(net, IMAGES, (classes + 1) % 3), atol=0.1), "each class has its own map"


def test_maps_of_a_compiled_network_in_a_lower_precision() -> None:
    net, classes = network(LinearHead(512, 3)), torch.zeros(5).long()
    expected = grad_cam(net, IMAGES, classes)
    net.compile(backend=lambda *_: pytest.fail("compiled"))
    with torch.autocast("cpu", torch.bfloat16):
        maps = grad_cam(net, IMAGES, classes)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps, expected, atol=0.1)
