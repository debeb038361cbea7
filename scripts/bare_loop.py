"""Plain PyTorch training loop, the baseline of the benchmark. As a script, print its peak memory in MB."""

import sys
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


def peak_mb() -> float:
    """Return the peak resident memory in 10^6 bytes on Linux, where ru_maxrss starts at the parent's value."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    resnet = torchvision.models.resnet50(num_classes=10).to(memory_format=torch.channels_last)
    images, labels = torch.randint(0, 256, (4000, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (4000,))
    normalized = (((images[i].float() / 255 - 0.45) / 0.225, labels[i]) for i in torch.randint(0, 4000, (6, 128)))
    batches = ((x.contiguous(memory_format=torch.channels_last), y) for x, y in normalized)
    for _ in bare_steps(resnet, batches, precision=sys.argv[1]):
        pass
    print(peak_mb())
