"""Training loop in plain PyTorch that the benchmark compares with. As a script it prints its peak memory in MB."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def bare_steps(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str) -> Iterator[None]:
    """Train with fused Adam, and autocast if ``precision`` is bf16-mixed. Yield after each step."""
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


def batches_from_memory(num_images: int, steps: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized channels_last batches of random uint8 images."""
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (num_images,))
    for _ in range(steps):
        indices = torch.randint(0, num_images, (batch,))
        x = (images[indices].float() / 255 - 0.45) / 0.225
        yield x.contiguous(memory_format=torch.channels_last), labels[indices]


def peak_mb() -> float:
    """Return the peak resident memory of this process in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux starts ru_maxrss at the parent's value
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


if __name__ == "__main__":
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    resnet = torchvision.models.resnet50(num_classes=10).to(memory_format=torch.channels_last)
    for _ in bare_steps(resnet, batches_from_memory(4000, 6, 128), "bf16-mixed" if native else "32-true"):
        pass
    print(peak_mb())
