"""The network in plain PyTorch, from uint8 images to logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.heads import LSTMHead, PoolingHead
from cifar10_tl.models.resize import Resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TransferResNet(nn.Module):
    """A classifier of uint8 images: normalization, resizing, backbone and head.

    Args:
        backbone: Network from images to the feature map.
        head: Network from the feature map to logits.
        native_size: Side of the input images in pixels. Other sizes work but are slower.
        image_size: Side in pixels to which images are resized for the backbone.
        interpolation: "bicubic" or "bilinear".
        training_sizes: Other sides that images may have in train mode, see ``training_size``.

    Attributes:
        training_size: Side in pixels in train mode, ``image_size`` or one of ``training_sizes``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        *,
        native_size: int,
        image_size: int,
        interpolation: str,
        training_sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        smallest = min((image_size, *training_sizes))
        if isinstance(head, LSTMHead) and smallest <= backbone.stride:
            needed = backbone.stride + 1  # 2 x 2 cells; a single one is no sequence
            raise UserError(f"model.image_size={smallest}: too small for model/head=lstm; choose {needed} or more")
        self.backbone, self.head = backbone, head
        self.resize, self.training_size = Resize(native_size, image_size, interpolation), image_size
        others = sorted({*training_sizes} - {image_size})
        self.other_sizes = nn.ModuleDict({str(size): Resize(native_size, size, interpolation) for size in others})
        # (x / 255 - mean) / std as one multiplication and one addition
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def lay_out_for(self, device: torch.device) -> None:
        """Convert the weights to channels_last on a GPU.

        On a CPU, oneDNN reorders weights anyway, and channels_last weights make the optimizer step slower.
        """
        if device.type == "cuda":
            self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, boxes: Tensor | None = None, *, with_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits [N, K] of uint8 images [N, 3, H, W] or of their ``boxes``, see :meth:`Resize.forward`.

        ``with_features`` adds the features averaged over space [N, C].
        """
        feature_map = self.features(images, boxes)
        logits = self.head(feature_map)
        return (logits, feature_map.mean((2, 3))) if with_features else logits

    def features(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return the feature map [N, C, h, w] of uint8 images [N, 3, H, W]."""
        return self.backbone(self.preprocess(images, boxes))

    def head_input(self, images: Tensor) -> Tensor:
        """Return the feature map, averaged to one cell if the head pools it."""
        feature_map = self.features(images)
        return feature_map.mean((2, 3), keepdim=True) if isinstance(self.head, PoolingHead) else feature_map

    def preprocess(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Normalize uint8 images [N, 3, H, W] and resize them to [N, 3, S, S].

        Resizing is linear with weights that sum to one, so normalizing the small images first is equivalent and faster.
        """
        x = images.to(self.scale.dtype) * self.scale + self.shift
        is_other = self.training and self.training_size != self.resize.size
        resize = self.other_sizes[str(self.training_size)] if is_other else self.resize
        return resize(x, boxes).contiguous(memory_format=torch.channels_last)
