"""torchvision's ResNets up to the last feature map."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn

from cifar10_tl.config.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

_LEFT_OUT = ("avgpool", "fc")  # layers after the feature map


class Backbone(nn.Sequential):
    """A torchvision ResNet with random weights, without pooling and classifier.

    Parameters keep torchvision's names, such as ``layer1.0.bn1.bias``.

    Args:
        name: One of ``BACKBONES``.
        stem: "imagenet" (7x7 convolution and max pooling, total stride 32) or "cifar" (3x3 convolution, total stride 8)
            as in section 4.2 of https://arxiv.org/abs/1512.03385.
        frozen: Keep parameters and BatchNorm statistics fixed.
    """

    def __init__(self, name: str = "resnet50", stem: str = "imagenet", frozen: bool = False) -> None:
        if name not in BACKBONES:
            raise UserError(f"model.backbone={name}: there are {', '.join(BACKBONES)}")
        resnet = torchvision.models.get_model(name, weights=None)
        parts = OrderedDict((n, part) for n, part in resnet.named_children() if n not in _LEFT_OUT)
        self.stride = 32
        if stem == "cifar":
            parts["conv1"] = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(parts["conv1"].weight, mode="fan_out", nonlinearity="relu")
            del parts["maxpool"]
            self.stride = 8
        super().__init__(parts)
        self.num_features = int(resnet.fc.in_features)
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to features [N, num_features, ceil(H / stride), ceil(W / stride)]."""
        if not self.frozen:
            return super().forward(images)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return super().forward(images)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode, but keep a frozen backbone in eval mode so that its BatchNorm statistics do not drift."""
        return super().train(mode and not self.frozen)
