"""A training loop in plain PyTorch: the least that a framework's time can be compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def torchvision_resnet50(num_classes: int = 10) -> nn.Module:
    """The ResNet50 of torchvision with another last layer."""
    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    return network


def bare_loop(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: str,
    warm_up: int = 0,
    synchronize: Callable[[], Any] = lambda: None,
) -> list[float]:
    """A plain PyTorch training loop, see :func:`bare_steps`.

    Returns:
        The time at the end of each step; at step ``warm_up`` and at the last one the device has done its work, too.
    """
    times = []
    for step, _ in enumerate(bare_steps(network, batches, precision=precision)):
        if step == warm_up:
            synchronize()
        times.append(time.perf_counter())
    synchronize()
    times[-1] = time.perf_counter()
    return times


def bare_steps(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, precision: str) -> Iterator[None]:
    """The steps of plain PyTorch, one an item: fused Adam, autocast where the precision is bf16-mixed, nothing else."""
    network.train()
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def bare_loop_from_memory(num_images: int, steps: int, batch: int, *, precision: str) -> list[float]:
    """:func:`bare_loop` on a ResNet50 in channels_last and uint8 32x32 images in memory, normalised batch by batch."""
    network = torchvision_resnet50().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (num_images,))

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            places = torch.randint(0, num_images, (batch,))
            x = (images[places].float() / 255 - 0.45) / 0.225
            yield x.contiguous(memory_format=torch.channels_last), labels[places]

    return bare_loop(network, batches(), precision=precision)
