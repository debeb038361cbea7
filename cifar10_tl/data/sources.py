"""Sources of images: CIFAR-10, a folder of images, and the built-in shapes.

To add a source, write a class with the members of :class:`Source` and add it to ``SOURCES`` (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import ImageSet
from cifar10_tl.data.download import download
from cifar10_tl.data.folder import Folder
from cifar10_tl.data.shapes import CLASS_NAMES as SHAPE_NAMES
from cifar10_tl.data.shapes import draw_shapes


class Source(Protocol):
    """Source of the images of :class:`~cifar10_tl.data.datamodule.CIFAR10DataModule`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    def prepare(self) -> None:
        """Download or decode the images if necessary; called in one process per machine."""

    def load(self) -> dict[str, ImageSet]:
        """Return the split "train", and "val" and "test" if the source defines them."""


class Cifar10:
    """CIFAR-10, downloaded from the first working mirror and read by torchvision."""

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root: str, mirrors: Sequence[str] = (CIFAR10.url,), stall_seconds: float = 20.0) -> None:
        self.root, self.mirrors, self.stall_seconds = root, mirrors, stall_seconds

    def prepare(self) -> None:
        """Download and extract the archive, unless all files of CIFAR-10 are in ``root``."""
        if self._is_complete():
            return
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(self.root, ".cifar-10.lock")):
            if self._is_complete():  # another process downloaded it while this one was waiting
                return
            archive = Path(self.root, CIFAR10.filename)
            download(self.mirrors, archive, md5=CIFAR10.tgz_md5, timeout=self.stall_seconds)
            extract_archive(str(archive), self.root)
            if not self._is_complete():
                raise UserError(f"{archive} does not contain CIFAR-10; delete it and try again")

    def _is_complete(self) -> bool:
        try:
            CIFAR10(self.root, train=False, download=False)
        except RuntimeError:  # a file is missing or has another checksum
            return False
        return True

    def load(self) -> dict[str, ImageSet]:
        """Return 50,000 training and 10,000 test images of 32 x 32 pixels, in the official order."""
        splits = {}
        for name in ("train", "test"):
            # torchvision verifies the checksum of each file before unpickling it.
            dataset = CIFAR10(self.root, train=name == "train", download=False)
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            splits[name] = ImageSet(images, torch.tensor(dataset.targets))
        return splits


class Shapes:
    """Built-in dataset of :mod:`cifar10_tl.data.shapes`; train and test are drawn with different seeds."""

    class_names = SHAPE_NAMES

    def __init__(
        self, train_size: int = 8000, test_size: int = 2000, native_size: int = 32, drawing_seed: int = 0
    ) -> None:
        self.sizes = {"train": train_size, "test": test_size}
        self.native_size, self.drawing_seed = native_size, drawing_seed

    def prepare(self) -> None:
        """Do nothing, because drawing takes only seconds."""

    def load(self) -> dict[str, ImageSet]:
        """Return ``train_size`` and ``test_size`` images with balanced classes."""
        return {
            split: ImageSet(*draw_shapes(size, seed=2 * self.drawing_seed + offset, image_size=self.native_size))
            for offset, (split, size) in enumerate(self.sizes.items())
        }


SOURCES: dict[str, Callable[..., Source]] = {"cifar10": Cifar10, "folder": Folder, "shapes": Shapes}
