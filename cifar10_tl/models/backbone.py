"""torchvision's ResNet up to its last feature map, and where its weights come from."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn

from cifar10_tl.config.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


_LEFT_OUT = ("avgpool", "fc")  # what torchvision's ResNet does behind the feature map


class Backbone(nn.Sequential):
    """A torchvision ResNet without pooling and classifier: float [N, 3, H, W] -> feature map [N, C, h, w].

    The parameters keep torchvision's names (``conv1.weight``, ``layer1.0.bn1.bias``, ...). Weights start at random;
    :func:`load_weights` brings others.

    Args:
        name: one of ``BACKBONES``.
        stem: "imagenet" (7x7 convolution of stride 2, max pooling; stride 32 in all), or "cifar" (3x3 convolution, no
            pooling; stride 8 in all), as in section 4.2 of https://arxiv.org/abs/1512.03385.
        frozen: neither parameters nor BatchNorm statistics ever change: it stays in eval mode, and no graph is built.
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
        """Float [N, 3, H, W] -> [N, num_features, ceil(H / stride), ceil(W / stride)]."""
        if not self.frozen:
            return super().forward(images)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return super().forward(images)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, unless frozen: in training mode BatchNorm's statistics would drift."""
        return super().train(mode and not self.frozen)
