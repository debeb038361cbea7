"""torchvision's ResNets up to the last feature map."""

from __future__ import annotations

from collections import OrderedDict

import torchvision
from torch import nn

from cifar10_tl.config.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CLASSIFIER_LAYERS = ("avgpool", "fc")  # after the feature map


class Backbone(nn.Sequential):
    """A torchvision ResNet with random weights, without pooling and classifier.

    It maps images [N, 3, H, W] to features [N, num_features, ceil(H / stride), ceil(W / stride)]. Parameters keep
    torchvision's names, such as ``layer1.0.bn1.bias``.

    Args:
        name: One of ``BACKBONES``.
        stem: "imagenet" (7x7 convolution and max pooling, total stride 32) or "cifar" (3x3 convolution, total stride 8)
            as in section 4.2 of https://arxiv.org/abs/1512.03385.
        frozen: Keep parameters and BatchNorm statistics fixed.
    """

    def __init__(self, name: str = "resnet50", stem: str = "imagenet", frozen: bool = False) -> None:
        if name not in BACKBONES:
            raise UserError(f"model.backbone={name}: choose from {', '.join(BACKBONES)}")
        resnet = torchvision.models.get_model(name, weights=None)
        layers = OrderedDict((n, layer) for n, layer in resnet.named_children() if n not in CLASSIFIER_LAYERS)
        if stem == "cifar":
            layers["conv1"] = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(layers["conv1"].weight, mode="fan_out", nonlinearity="relu")
            del layers["maxpool"]
        super().__init__(layers)
        self.stride = 8 if stem == "cifar" else 32
        self.num_features = int(resnet.fc.in_features)
        self.frozen = frozen
        self.requires_grad_(not frozen).train()

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode, but keep a frozen backbone in eval mode so that its BatchNorm statistics do not drift."""
        return super().train(mode and not self.frozen)
