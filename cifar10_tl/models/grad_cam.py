"""Grad-CAM: which parts of an image support a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10_tl.models.network import TransferResNet


def grad_cam(network: TransferResNet, images: Tensor, classes: Tensor, batch_size: int = 64) -> Tensor:
    """Return the map of the last stage for each image, float32 [N, h, w] between 0 and 1, on the CPU.

    Source: https://arxiv.org/abs/1610.02391, equations 1 and 2. Each map is divided by its maximum; it is 0 if no part
    supports the class. The network runs without dropout, not compiled, and is left as it was.

    Args:
        network: Network on any device.
        images: uint8 [N, 3, H, W] of at least one image.
        classes: Class that is explained for each image, int64 [N].
        batch_size: Images per call of the network.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for module in network.head.modules():
        module.training = isinstance(module, nn.RNNBase)  # cuDNN computes its gradient in train mode only
    try:
        with torch.inference_mode(False):
            batches = zip(torch.split(images, batch_size), torch.split(classes, batch_size), strict=True)
            return torch.cat([_maps(network, *(x.to(network.scale.device) for x in batch)).cpu() for batch in batches])
    finally:
        for module, mode in modes.items():
            module.training = mode


def _maps(network: TransferResNet, images: Tensor, classes: Tensor) -> Tensor:
    with torch.no_grad():
        feature_map = network.features(images)
    with torch.enable_grad():
        logits = network.head(feature_map.requires_grad_())
        (gradient,) = torch.autograd.grad(logits, feature_map, F.one_hot(classes, logits.shape[1]).to(logits.dtype))
    maps = (gradient.float().mean((2, 3), keepdim=True) * feature_map.detach().float()).sum(1).relu()
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
