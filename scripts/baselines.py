"""What scripts/benchmark.py compares with: the same jobs as a competent user would write them without this project."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerImage(Dataset[Any]):
    """Images as torchvision's CIFAR10 gives them: one at a time, as PIL images, through transforms.

    Args:
        images: uint8 [N, H, W, 3].
        labels: of the N images.
        size: that images are brought to for the network.
    """

    def __init__(self, images: NDArray[np.uint8], labels: list[int], size: int = 32) -> None:
        self.images, self.labels = images, labels
        resize = [transforms.Resize(size)] if size != images.shape[1] else []
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                *resize,
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def per_image_loader(
    images: NDArray[np.uint8], labels: list[int], size: int, workers: int, batch: int
) -> DataLoader[Any]:
    """The usual loader over :class:`PerImage`."""
    return DataLoader(
        PerImage(images, labels, size),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class TemplateModule(pl.LightningModule):
    """A LightningModule in the style of the well-known templates: metric objects, and ``self.log`` in each step."""

    def __init__(self, network: nn.Module, num_classes: int = 10, lr: float = 1e-3, fused: bool | None = None) -> None:
        super().__init__()
        self.network, self.lr, self.fused = network, lr, fused
        self.train_acc, self.val_acc = MulticlassAccuracy(num_classes), MulticlassAccuracy(num_classes)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As templates have it."""
        images, labels = batch[0], batch[1]
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.train_loss(loss)
        self.train_acc(logits.argmax(1), labels)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as it comes."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=self.fused)
