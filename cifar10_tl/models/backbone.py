"""torchvision's ResNets, and ResNet10, up to the last feature map."""

from __future__ import annotations

from collections import OrderedDict

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from cifar10_tl.config.errors import UserError

#: ResNets, ResNeXts and Wide ResNets for which torchvision may have weights.
PUBLISHED = torchvision.models.list_models(torchvision.models, include="*resne*")
#: All backbones, shortest names first.
BACKBONES = sorted(("resnet10", *PUBLISHED), key=lambda name: (len(name), name))
CLASSIFIER_LAYERS = ("avgpool", "fc")  # after the feature map
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
FREEZE = ("none", *STAGES[:-1], "backbone")  # the last frozen stage; layer4 is the end of the backbone


class Backbone(nn.Sequential):
    """A torchvision ResNet with random weights, without pooling and classifier.

    ResNet10, which torchvision does not provide, is ResNet18 with one block per stage.

    The backbone maps images [N, 3, H, W] to features [N, num_features, ceil(H / stride), ceil(W / stride)]. Parameters
    keep torchvision's names, such as ``layer1.0.bn1.bias``.

    Args:
        name: One of ``BACKBONES``.
        stem: "imagenet" (7x7 convolution and max pooling, total stride 32) or "cifar" (3x3 convolution, total stride 8)
            as in section 4.2 of https://arxiv.org/abs/1512.03385.
        freeze: One of ``FREEZE``. Parameters and BatchNorm statistics are fixed up to and including this stage.

    Attributes:
        num_frozen: Number of frozen stages.
        head_only: Keep BatchNorm of the other stages in eval mode, too, from the next call of :meth:`train` on.
    """

    def __init__(self, name: str = "resnet50", stem: str = "imagenet", freeze: str = "none") -> None:
        if name not in BACKBONES:
            raise UserError(f"model.backbone={name}: choose from {', '.join(BACKBONES)}")
        resnet = torchvision.models.get_model(name) if name in PUBLISHED else ResNet(BasicBlock, [1, 1, 1, 1])
        layers = OrderedDict((n, layer) for n, layer in resnet.named_children() if n not in CLASSIFIER_LAYERS)
        if stem == "cifar":
            layers["conv1"] = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(layers["conv1"].weight, mode="fan_out", nonlinearity="relu")
            del layers["maxpool"]
        super().__init__(layers)
        self.stride = 8 if stem == "cifar" else 32
        self.num_features = int(resnet.fc.in_features)
        self.num_frozen, self.head_only = FREEZE.index(freeze), False
        for stage in list(self.stages().values())[: self.num_frozen]:
            stage.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map of images [N, 3, H, W].

        On a CPU, layer4 of ResNet10, 18 and 34 reads contiguous maps: with bf16 and 512 channels, oneDNN's 3x3
        convolutions take 1.4 times as long in channels_last. All other layers are faster in channels_last.
        """
        *layers, layer4 = self
        for layer in layers:
            x = layer(x)
        return layer4(x.contiguous() if x.device.type == "cpu" and self.num_features == 512 else x)

    def stages(self) -> dict[str, nn.Module]:
        """Return the parts of the network by the names in ``STAGES``."""
        *stem, layer1, layer2, layer3, layer4 = self.children()
        return dict(zip(STAGES, (nn.Sequential(*stem), layer1, layer2, layer3, layer4), strict=True))

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode, but keep frozen stages in eval mode so that their BatchNorm statistics do not drift."""
        num_fixed = len(STAGES) if self.head_only else self.num_frozen
        super().train(mode and num_fixed < len(STAGES))
        for stage in list(self.stages().values())[:num_fixed]:
            stage.eval()
        return self
