"""What the network is given to learn from."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl import figures
from cifar10_tl.callbacks.publish import publish
from cifar10_tl.data.augment import Batch


class SampleInputs(Callback):
    """The first images of the first training batch, as augmentation left them, with their labels."""

    def __init__(self, num_images: int = 40) -> None:
        self.num_images = num_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw once a run, at its very first step."""
        if trainer.global_step or batch_idx or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        images = batch.images[: self.num_images].permute(0, 2, 3, 1).cpu().numpy()
        names = figures.legible(pl_module.class_names)  # type: ignore[arg-type]
        titles = [_lines(target, names) for target in batch.targets[: self.num_images].cpu()]
        figure = figures.sample_grid(images, titles, heading="Training images as the network gets them")
        publish(trainer, "inputs/train", figure, step=0)


def _lines(target: Tensor, class_names: list[str]) -> list[tuple[str, str]]:
    """A class name, or where images were mixed the two with the larger shares, and these."""
    if target.ndim == 0:
        return [(class_names[int(target)], "")]
    shares, labels = target.topk(2)
    if shares[1] <= 0.005:
        return [(class_names[int(labels[0])], "")]
    return [(class_names[i], f" {100 * p:.0f} %") for p, i in zip(shares.tolist(), labels.tolist(), strict=True)]
