"""Random numbers that are a function of (seed, epoch, image index), with no state to save."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hash32(*keys: int | Tensor) -> Tensor | int:
    """Return a 32-bit hash of integers or int64 tensors, which are broadcast, by "lowbias32" of each key in turn.

    Source: https://nullprogram.com/blog/2018/07/31/. Products overflow 63 bits, but their low 32 bits are exact.
    """
    state: int | Tensor = 0x9E3779B9
    for key in keys:
        state = (state ^ key) & _MASK
        state = ((state ^ (state >> 16)) * 0x7FEB352D) & _MASK
        state = ((state ^ (state >> 15)) * 0x846CA68B) & _MASK
        state = state ^ (state >> 16)
    return state


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a CPU tensor to ``device`` without waiting for pending work on a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")  # unsafe on Apple GPUs (pytorch #189690)


class KeyedRNG:
    """Generator of random numbers on the CPU for each image of a batch, one independent stream per name.

    The numbers of all names are drawn at once. On a GPU, hashing three names took 104 kernels; the pixels take four.
    """

    # The position of a name is part of the key: append new names at the end.
    _NAMES = (
        *("flip", "top", "left", "brightness", "contrast", "saturation"),
        *("erase", "area", "aspect", "y", "x", "mix"),
        *("operation", "level", "sign", "cutout_y", "cutout_x"),
        *("crop_area", "crop_aspect", "crop_y", "crop_x", "erase_y", "erase_x"),
    )

    def __init__(self, seed: int, epoch: int, indices: Tensor) -> None:
        self.seed, self.epoch, self.indices = seed, epoch, indices.cpu()

    @cached_property
    def _numbers(self) -> Tensor:
        """Float32 numbers in [0, 1), one row per name."""
        keys = hash32(hash32(self.seed, self.epoch), self.indices)
        bits = hash32(keys, torch.arange(len(self._NAMES))[:, None])
        assert isinstance(bits, Tensor)
        return (bits >> 8).float() * 2.0**-24  # float32 holds 24 bits exactly

    def uniform(self, name: str) -> Tensor:
        """Return float32 numbers [N] in [0, 1)."""
        return self._numbers[self._NAMES.index(name)]

    def integer(self, name: str, end: int) -> Tensor:
        """Return int64 numbers [N] in [0, end)."""
        return (self.uniform(name) * end).long()
