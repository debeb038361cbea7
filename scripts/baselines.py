"""Data loading and LightningModule in the style of common project templates, for scripts/benchmark.py."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms


class PerImage(Dataset[Any]):
    """Dataset like torchvision's CIFAR10: one PIL image at a time through transforms, at ``size`` pixels."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        augment = [transforms.RandomCrop(images.shape[-1], padding=4), transforms.RandomHorizontalFlip()]
        resize = [transforms.Resize(size)] if size != images.shape[-1] else []
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.transform = transforms.Compose([*augment, *resize, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def per_image_loaders(images: Tensor, labels: Tensor, size: int, batch: int) -> list[DataLoader[Any]]:
    """Return a shuffling loader without workers and one with two."""
    dataset = PerImage(images, labels, size)
    options: dict[str, Any] = {"batch_size": batch, "shuffle": True, "drop_last": True}
    return [DataLoader(dataset, **options), DataLoader(dataset, **options, num_workers=2, persistent_workers=True)]


class TemplateModule(pl.LightningModule):
    """LightningModule that updates metric objects and calls ``self.log`` in each step."""

    def __init__(self, network: nn.Module, fused: bool | None = None) -> None:
        super().__init__()
        self.network, self.fused = network, fused
        self.train_acc, self.train_loss = MulticlassAccuracy(10), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy and log it with the accuracy."""
        images, labels = batch[0], batch[1]
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.train_loss(loss)
        self.train_acc(logits.argmax(1), labels)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with its defaults."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=self.fused)


class TinyNetwork(nn.Module):
    """Network from uint8 images to ten logits that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Identity(), nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the mean colors."""
        return self.head(images.float().mean((2, 3)) / 255)
