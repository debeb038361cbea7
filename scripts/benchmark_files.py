"""Rows of scripts/benchmark.py that read image files, compared with torchvision's ImageFolder and a Pillow loop."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_fits import BATCH
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize, ToTensor

from cifar10_tl.data.datamodule import CIFAR10DataModule

WIDTH, HEIGHT = 4032, 3024  # 12 megapixels
SIDE = 224  # of the squares that become of them
TILE = 64  # side of the small pictures, cut out of the large ones
PICTURES = {"large": 300, "small": 20_000}
QUICK_PICTURES = {"large": 8, "small": 400}


def draw_photo(seed: int) -> Image.Image:
    """Return noise of all scales, coarse in color, which compresses like a photograph."""
    generator, photo = torch.Generator().manual_seed(seed), torch.full((3, HEIGHT, WIDTH), 128.0)
    for octave in range(1, 12):
        noise = torch.randn(1, 3 if octave < 7 else 1, 2**octave, 2**octave, generator=generator)
        photo += 50 * 0.8**octave * F.interpolate(noise, (HEIGHT, WIDTH), mode="bilinear")[0]
    return Image.fromarray(photo.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_pictures(kind: str, quick: bool) -> Path:
    """Write JPEG files into class folders: small ones, or links to a few large ones. Return their root."""
    root, count = Path(tempfile.mkdtemp()), (QUICK_PICTURES if quick else PICTURES)[kind]
    paths = [root / f"class {i % 4}" / f"{i}.jpg" for i in range(count)]
    for folder in {path.parent for path in paths}:
        folder.mkdir()
    if kind == "large":
        distinct = 4
        for seed in range(distinct):
            draw_photo(seed).save(paths[seed], quality=90)
        for i in range(distinct, count):
            os.link(paths[i % distinct], paths[i])
        return root
    corners = [(x, y) for y in range(0, HEIGHT - TILE, TILE) for x in range(0, WIDTH, TILE)]
    for first in range(0, count, len(corners)):
        photo = draw_photo(first)
        for path, (x, y) in zip(paths[first:], corners, strict=False):
            photo.crop((x, y, x + TILE, y + TILE)).save(path, quality=90)
    return root


def usual_loader(root: Path, size: int) -> DataLoader[Any]:
    pictures = ImageFolder(root, Compose([Resize(size), CenterCrop(size), ToTensor()]))
    return DataLoader(pictures, batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)


def folder_data(root: Path, size: int) -> CIFAR10DataModule:
    """Return the data of a folder with an empty cache."""
    logging.getLogger("cifar10_tl").setLevel(logging.ERROR)  # it would report the copies
    return CIFAR10DataModule(
        "folder", BATCH, val_size=0.1, root=str(root), native_size=size, fit="crop", cache_dir=tempfile.mkdtemp()
    )


def predict_plainly(network: Callable[[Tensor], Tensor], files: list[str], size: int, batch_size: int) -> list[int]:
    """Return the class of each file, reading and classifying one batch at a time."""
    transform, classes = Compose([Resize(size), CenterCrop(size), PILToTensor()]), []
    for first in range(0, len(files), batch_size):
        pictures = [transform(Image.open(file).convert("RGB")) for file in files[first : first + batch_size]]
        with torch.inference_mode():
            classes += network(torch.stack(pictures)).argmax(1).tolist()
    return classes
