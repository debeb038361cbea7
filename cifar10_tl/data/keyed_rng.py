"""Random changes of training images, a whole uint8 batch at once, on whatever device it lies.

Randomness is keyed, not streamed: what happens to an image is a pure function of (seed, epoch, image index), by an
integer hash. So a run draws the same on one process or many, and after any stop and resume, with no state to save.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

_MASK = 0xFFFFFFFF


def hash32(*keys: int | Tensor) -> Tensor | int:
    """A 32-bit hash of whole numbers or int64 tensors, which are broadcast; "lowbias32" over each key in turn.

    Source: https://nullprogram.com/blog/2018/07/31/. Products overflow 63 bits, but their low 32 bits are right.
    """
    state: int | Tensor = 0x9E3779B9
    for key in keys:
        state = (state ^ key) & _MASK
        state = ((state ^ (state >> 16)) * 0x7FEB352D) & _MASK
        state = ((state ^ (state >> 15)) * 0x846CA68B) & _MASK
        state = (state ^ (state >> 16)) & _MASK
    return state


class KeyedRNG:
    """Numbers for each image of a batch, named by what they are for."""

    _NAMES = (
        "flip",
        "top",
        "left",
        "brightness",
        "contrast",
        "saturation",
        "erase",
        "area",
        "aspect",
        "y",
        "x",
        "mix",
    )

    def __init__(self, seed: int, epoch: int, indices: Tensor) -> None:
        self._seed, self._epoch, self._indices = seed, epoch, indices

    @cached_property
    def _key(self) -> int | Tensor:
        return hash32(hash32(self._seed, self._epoch), self._indices)

    def uniform(self, name: str) -> Tensor:
        """float32 [N] in [0, 1)."""
        bits = hash32(self._key, self._NAMES.index(name))
        assert isinstance(bits, Tensor)
        return (bits >> 8).float() * 2.0**-24  # float32 holds 24 bits exactly

    def integer(self, name: str, end: int) -> Tensor:
        """int64 [N] in [0, end)."""
        return (self.uniform(name) * end).long()
