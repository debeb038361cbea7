"""The whole network in plain PyTorch: raw images in, logits out, so that it can be exported as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.heads import LSTMHead, pools
from cifar10_tl.models.resize import Resize


class TransferResNet(nn.Module):
    """uint8 images -> normalise -> resize -> backbone -> head -> logits.

    Args:
        backbone: to the feature map.
        head: from the feature map to logits.
        native_size: side in pixels of the images that are given; others are taken, too, but more slowly.
        image_size: side in pixels that images are brought to for the backbone.
        interpolation: "bicubic" or "bilinear".
        mean: of each channel in [0, 1], of the data that the backbone was trained on.
        std: its standard deviation.

    Raises:
        UserError: an LSTM head would have a single cell to read.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        *,
        native_size: int,
        image_size: int,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if isinstance(head, LSTMHead) and image_size <= backbone.stride:
            raise UserError(
                f"model.image_size={image_size}: the feature map has one cell, no sequence for model/head=lstm; "
                f"choose {backbone.stride + 1} or more ({2 * backbone.stride} gives 2x2 cells, 224 gives "
                f"{224 // backbone.stride}x{224 // backbone.stride})"
            )
        self.backbone, self.head = backbone, head
        self.resize = Resize(native_size, image_size, interpolation)
        # (x / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1))
        self.scale: Tensor
        self.shift: Tensor

    def lay_out_for(self, device: torch.device) -> None:
        """Keep the weights as the device's convolutions read them: in channels_last on a GPU, else as they are.

        Activations are in channels_last everywhere. On a CPU, oneDNN brings weights to a form of its own in any case,
        and an optimizer's step over weights in channels_last costs a copy of them, of their gradients and its moments.
        """
        if device.type == "cuda":
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float [N, K] of uint8 images [N, 3, H, W]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Feature map float [N, C, h, w] of uint8 images [N, 3, H, W]."""
        return self.backbone(self.preprocess(images))

    def head_input(self, images: Tensor) -> Tensor:
        """What the head makes use of: the feature map, or for a head that pools it first a map of one cell."""
        feature_map = self.features(images)
        return feature_map.mean((2, 3), keepdim=True) if pools(self.head) else feature_map

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float [N, 3, image_size, image_size], normalised.

        Normalising comes first, on the small image: resizing is linear with weights that sum to one, so that the
        order makes no difference but to the time.
        """
        x = images.to(self.scale.dtype) * self.scale + self.shift
        return self.resize(x).contiguous(memory_format=torch.channels_last)
