"""Fits that scripts/benchmark.py times: this project's, a common project template's, and a plain loop."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from bare_loop import bare_steps
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms

from cifar10_tl.config.launcher import compose_command
from cifar10_tl.engine.builder import build_datamodule, build_module, build_trainer, speed_up
from cifar10_tl.engine.hardware import quiet_libraries
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.models.network import TransferResNet

BATCH = 128


def build(*overrides: str, train_size: int = 5000) -> tuple[Any, Any, Any]:
    """Return config, module and data of the defaults with random weights, built-in images and 32 px."""
    quiet_libraries()
    cfg = compose_command(
        *("train", "data=shapes", f"data.train_size={train_size}", "data.val_size=1000", "data.test_size=10"),
        *("model.weights=null", "model.image_size=32", "model.label_smoothing=0", "optimizer.backbone_lr_scale=1"),
        *("trainer.max_epochs=1", "trainer.devices=1", "trainer.limit_val_batches=1"),
        *("trainer.enable_progress_bar=false", f"paths.output_dir={tempfile.mkdtemp()}", *overrides),
    )
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    datamodule.setup()
    return cfg, module, datamodule


def ready_batches(datamodule: Any, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first augmented uint8 batches of an epoch with their targets."""
    batches = (datamodule.augmented(batch, 0) for batch in datamodule.train_dataloader())
    return [(batch.images, batch.targets) for _, batch in zip(range(steps), batches, strict=False)]


class Clock(pl.Callback):
    """Callback that records the time at the end of each training step, without the time spent in ``between``."""

    def __init__(self, steps: int, between: Callable[[], Any] = lambda: None) -> None:
        self.times: list[float] = []
        self.synchronized, self.between, self.paused = (warm_up(steps), steps - 1), between, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.times) in self.synchronized and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.paused)
        self.between()
        self.paused += time.perf_counter() - now


def our_fit(cfg: Any, module: Any, datamodule: Any, steps: int, between: Any = lambda: None) -> list[float]:
    """Return the step times of Trainer.fit as the train command sets it up; see :class:`Clock`."""
    assert steps <= len(datamodule.splits["train"]) // cfg.data.batch_size, "the end of an epoch would be timed"
    cfg.trainer.limit_train_batches = steps
    with SignalHandler() as handler:
        trainer = build_trainer(cfg, handler=handler)
        if isinstance(module.network, TransferResNet):
            speed_up(cfg, module, trainer)
        trainer.callbacks.append(clock := Clock(steps, between))
        trainer.fit(module, datamodule=datamodule)
    return clock.times


def template_fit(module: Any, batches: Any, steps: int) -> list[float]:
    """Return the step times of a Trainer with a logger and a checkpoint per epoch."""
    folder, clock = tempfile.mkdtemp(), Clock(steps)
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": steps, "devices": 1, "default_root_dir": folder}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**options, logger=pl.loggers.TensorBoardLogger(folder), callbacks=[clock])
    trainer.fit(module, DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches)
    return clock.times


def bare_fit(network: nn.Module, batches: Iterable[Any], steps: int, precision: str) -> list[float]:
    """Return the step times of a plain PyTorch loop."""
    clock = Clock(steps)
    for _ in bare_steps(network, batches, precision):
        clock.on_train_batch_end()
    return clock.times


class TemplateModule(pl.LightningModule):
    """LightningModule that updates metric objects and calls ``self.log`` in each step."""

    def __init__(self, network: nn.Module, fused: bool | None = None) -> None:
        super().__init__()
        self.network, self.fused = network, fused
        self.train_acc, self.train_loss = MulticlassAccuracy(10), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch[0], batch[1]
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.train_loss(loss)
        self.train_acc(logits.argmax(1), labels)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=self.fused)


class TinyNetwork(nn.Module):
    """Network from uint8 images to ten logits that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Identity(), nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.float().mean((2, 3)) / 255)


def transform_and_collate(samples: Sequence[tuple[Any, int]], transform: Any) -> tuple[Tensor, Tensor]:
    """Transform one PIL image at a time, as torchvision's datasets do."""
    images = torch.stack([transform(Image.fromarray(pixels)) for pixels, _ in samples])
    return images, torch.tensor([label for _, label in samples])


def per_image_loaders(datamodule: Any, size: int) -> list[DataLoader[Any]]:
    """Return a loader with per-image transforms to ``size`` pixels without workers, and one with two workers."""
    train = datamodule.splits["train"]
    samples: Any = list(zip(train.images.permute(0, 2, 3, 1).contiguous().numpy(), train.labels.tolist(), strict=True))
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.Resize(size)]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([*steps[: 3 if size != 32 else 2], transforms.ToTensor(), normalize])
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
    options["collate_fn"] = partial(transform_and_collate, transform=transform)
    return [DataLoader(samples, **options), DataLoader(samples, **options, num_workers=2, persistent_workers=True)]


def warm_up(steps: int) -> int:
    """Return the number of first steps to discard: a fifth, at most ten."""
    return min(10, max(1, steps // 5))


def images_per_second(times: Sequence[float], batch: int = BATCH) -> float:
    """Return the speed of the steps that ended at ``times``, after the warm-up."""
    first = warm_up(len(times))
    return batch * (len(times) - 1 - first) / (times[-1] - times[first])


def microseconds(times: Sequence[float]) -> float:
    """Return the median duration of the steps that ended at ``times``, after the warm-up."""
    return 1e6 * statistics.median(b - a for a, b in pairwise(times[warm_up(len(times)) :]))
