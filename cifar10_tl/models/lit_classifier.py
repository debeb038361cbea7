"""The LightningModule: loss, training and evaluation steps, optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import complete_epochs, planned_epochs, planned_steps
from cifar10_tl.data.feature_cache import tensors_checksum
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.heads import build_head
from cifar10_tl.models.network import TransferResNet
from cifar10_tl.models.optim import build_optimizer, group_factors, schedule_factor
from cifar10_tl.models.weights import load_backbone, load_network, read_weights


class LitClassifier(pl.LightningModule):
    """A :class:`TransferResNet` trained with cross-entropy.

    Pretrained weights are loaded when a fit starts, unless ``has_weights`` is set or ``load_from_checkpoint`` was used.

    The logged losses of train, val and test are comparable: label smoothing and the class weights of the DataModule
    affect only the loss that is minimized.
    Training accuracy counts a mixed image as the class with the larger fraction.

    Args:
        class_names: Names of the K classes, in the order of the logits.
        backbone: One of ``BACKBONES``.
        weights: Name in torchvision (such as IMAGENET1K_V2), file, or None for random weights.
        image_size: Side in pixels to which the network resizes images, or the sides during training with the fraction
            of the epochs at which each starts, rounded to whole epochs: ``[[0, 128], [0.5, 160]]``. Everything except
            training uses the last one. Source: https://arxiv.org/abs/2104.00298, section 4.
        native_size: Side of the input images in pixels.
        fit: How pictures become squares of this side, see :func:`~cifar10_tl.data.images.to_pixels`; "squeeze" in
            checkpoints without it.
        interpolation: "bicubic" or "bilinear".
        freeze: Last frozen stage, "none", or "backbone" for all stages, see :class:`Backbone`.
        stem: "imagenet" or "cifar", see :class:`Backbone`.
        head: ``{"name": "dense", ...}``, see :mod:`cifar10_tl.models.heads`.
        label_smoothing: Fraction of the target probability spread over all classes, in [0, 1).
        optimizer: ``{"name": ..., "lr": ..., ...}``, see :func:`build_optimizer`.
        scheduler: ``{"name": "cosine", ...}``, see :mod:`cifar10_tl.models.optim`. In the first ``head_only_epochs``
            the rate of the backbone is zero and its BatchNorm in eval mode.
        seed: Seed of dropout.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet50",
        weights: str | None = None,
        image_size: int | Sequence[Sequence[float]] = 224,
        native_size: int = 32,
        fit: str = "squeeze",
        interpolation: str = "bicubic",
        freeze: str = "none",
        stem: str = "imagenet",
        head: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        class_names, head = list(class_names), dict(head or {"name": "dense"})
        if not class_names or len(set(class_names)) < len(class_names):
            raise UserError(f"class_names={class_names}: give at least one class, and each name once")
        optimizer = dict(optimizer or {"name": "Adam", "lr": 1e-3, "backbone_lr_scale": 0.1})
        scheduler = dict(scheduler or {"name": "constant"})
        self.save_hyperparameters(logger=False)
        self.class_names, self.label_smoothing = class_names, label_smoothing
        trunk = Backbone(backbone, stem=stem, freeze=freeze)
        classifier = build_head(head, trunk.num_features, len(class_names))
        phases = [(0, image_size)] if isinstance(image_size, int) else image_size
        self.image_sizes = [(start, int(size)) for start, size in phases]
        *training_sizes, last_size = (size for _, size in self.image_sizes)
        self.network = TransferResNet(
            trunk,
            classifier,
            native_size=native_size,
            image_size=last_size,
            interpolation=interpolation,
            training_sizes=training_sizes,
        )
        self.evaluation: Evaluation | None = None  # of the latest validation or test epoch
        self.restored_epoch: int | None = None  # last epoch that trained these weights
        self._eval_outputs: list[tuple[Tensor, ...]] = []
        self._totals = torch.zeros(3, dtype=torch.float64)  # loss, hits and images of this epoch
        self._class_weights: Tensor | None = None  # of the loss, from the DataModule of a fit
        self.has_weights = weights is None
        self.total_steps: int | None = None  # of a fit, if its last epoch is shorter than the others

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of uint8 images [N, 3, H, W]."""
        return self.network(images)

    def _logits(self, batch: Batch) -> Tensor:
        if batch.features is None:
            return self.network(batch.images, batch.boxes).float()
        return self.network.head(batch.features).float()

    def _evaluated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits, float32 [N, K], and the features averaged over space, [N, C]."""
        if len(batch.images) == 0:  # the last batch of a rank may be empty, see BatchSampler
            empty = torch.zeros(0, len(self.class_names), device=self.device)
            return empty, empty.new_zeros(0, self.network.backbone.num_features)
        if batch.features is None:
            logits, features = self.network(batch.images, with_features=True)
        else:
            logits, features = self.network.head(batch.features), batch.features.mean((2, 3))
        return logits.float(), features

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the head for uint8 images [N, 3, H, W], on the CPU in the trainer's precision."""
        self.network.training_size = self.network.resize.size
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.network.head_input(images.to(self.device)).cpu()

    def features_description(self) -> dict[str, Any]:
        """Return plain values that identify everything except the images that :meth:`features` depends on."""
        tensors = {name: value for name, value in self.network.state_dict().items() if not name.startswith("head.")}
        return {
            **{name: self.hparams[name] for name in ("backbone", "interpolation")},
            "image_size": self.network.resize.size,
            "precision": self.trainer.precision,
            "device": self.trainer.strategy.root_device.type,
            "torch": torch.__version__,
            "weights": tensors_checksum(tensors),
        }

    def load_weights_from(self, checkpoint: Path) -> None:
        """Start from the weights of another run's checkpoint, see :func:`load_network`."""
        load_network(self.network, self.class_names, checkpoint)
        self.has_weights = True

    def prepare_data(self) -> None:
        """Download the weights that a fit starts from, once per machine."""
        if self._needs_weights():
            read_weights(self.hparams["backbone"], self.hparams["weights"])

    def setup(self, stage: str) -> None:
        """Load the weights that a fit starts from, and check that predictions resize images as the data module does."""
        data = getattr(self.trainer, "datamodule", None) if self.trainer.state.fn == "fit" else None
        source = getattr(data, "source", None)
        for name in ("native_size", "fit"):
            own = self.hparams[name]
            if (value := getattr(source, name, own)) != own:
                raise UserError(f"LitClassifier({name}={own!r}): the data module has {name}={value!r}; pass the same")
        if self._needs_weights():
            name, weights = self.hparams["backbone"], self.hparams["weights"]
            load_backbone(self.network.backbone, read_weights(name, weights), f"model.weights={weights}")
            self.has_weights = True

    def _needs_weights(self) -> bool:
        return self.trainer.state.fn == "fit" and not self.has_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the running totals of all processes; Lightning calls this in each of them."""
        checkpoint["train_totals"] = self._summed_totals().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running totals of a partial epoch."""
        self.has_weights = True
        self.restored_epoch = checkpoint["epoch"]
        self._totals = checkpoint.get("train_totals", self._totals)

    def on_train_start(self) -> None:
        """Move the totals to the device, and restore the position of the training loader.

        Lightning loses the position of a stateful loader if ``configure_optimizers`` reads
        ``estimated_stepping_batches``: https://github.com/Lightning-AI/pytorch-lightning/issues/20550.
        """
        if getattr(self.trainer.train_dataloader, "is_of_datamodule", False) and self.trainer.datamodule is None:  # type: ignore[attr-defined]
            raise UserError("pass the data module to fit, not its loaders: it augments batches and divides them")
        self.trainer.fit_loop._load_combined_loader_states()
        match_layouts(self.trainer.optimizers)
        self.reschedule()  # a run that is resumed with more epochs has the learning rate of its previous end
        has_float64 = self.device.type != "mps"
        self._totals = self._totals.to(self.device, torch.float64 if has_float64 else torch.float32)
        if not self.trainer.is_global_zero:
            self._totals.zero_()  # a checkpoint has the totals of all processes
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        weights = data.class_weights() if hasattr(data, "class_weights") else None
        self._class_weights = None if weights is None else weights.to(self.device)
        self._prepare_epoch()

    def on_train_epoch_start(self) -> None:
        """Reset the totals; not called when a run resumes within an epoch."""
        self._totals.zero_()
        self.evaluation = None  # of an earlier epoch
        self._prepare_epoch()

    def _prepare_epoch(self) -> None:
        """Apply the settings that depend on the epoch."""
        backbone, head_only_epochs = self.network.backbone, self.hparams["scheduler"].get("head_only_epochs", 0)
        head_only = self.current_epoch < head_only_epochs
        if backbone.head_only != head_only:
            backbone.head_only = head_only
            backbone.train()
        num_epochs = planned_epochs(self.trainer)
        started = [size for start, size in self.image_sizes if round(start * num_epochs) <= self.current_epoch]
        self.network.training_size = started[-1]
        last = {num_epochs, complete_epochs(self.trainer)}  # max_steps may end within an epoch, which is not validated
        if self.current_epoch + 1 in last and self.trainer.check_val_every_n_epoch:
            self.trainer.check_val_every_n_epoch = 1  # else the last epochs could not be the best

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by epoch and batch, so that a resumed run drops the same units as an uninterrupted one."""
        self.restored_epoch = self.current_epoch
        seed = int(hash32(self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank))
        # torch.manual_seed takes 2 ms and leaks a stack trace per call until CUDA is initialized
        own = {"cuda": torch.cuda.manual_seed, "mps": torch.mps.manual_seed}
        own.get(self.device.type, torch.default_generator.manual_seed)(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss to minimize, and add the reported loss and accuracy to totals on the device."""
        logits = self._logits(batch)
        if self._class_weights is None:
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        else:
            loss = F.cross_entropy(logits, weighted_targets(batch.targets, self._class_weights, self.label_smoothing))
        with torch.no_grad():
            is_plain = not self.label_smoothing and self._class_weights is None
            reported = loss if is_plain else F.cross_entropy(logits, batch.targets)
            labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
            loss_total, hits, count = self._totals.unbind()
            loss_total.add_(reported, alpha=len(labels))
            hits.add_((logits.argmax(1) == labels).sum())
            count.add_(len(labels))
        return loss * self._accumulation_scale(batch_idx)

    def _accumulation_scale(self, batch_idx: int) -> float:
        """Return the factor that makes the loss of the last group of accumulated batches a mean.

        Lightning divides by ``accumulate_grad_batches`` even if fewer batches are left in the epoch.
        """
        size, num_batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        remainder = num_batches % size
        return size / remainder if batch_idx >= num_batches - remainder else 1.0

    def on_train_epoch_end(self) -> None:
        """Log the mean loss and accuracy of the epoch."""
        self._log_epoch(self.training_metrics(), self.current_epoch)

    def training_metrics(self) -> dict[str, float]:
        """Return the mean loss and accuracy of this epoch over all processes; call it in each of them."""
        return {f"train/{name}": value for name, value in _means(self._summed_totals()).items()}

    def train_totals(self) -> Tensor:
        """Return loss, hits and images of this epoch in this process, float64 [3], without waiting for the device."""
        return self._totals.clone()

    def running_metrics(self) -> dict[str, float]:
        """Return the mean loss and accuracy of this epoch in this process; synchronizes with the device."""
        return _means(self._totals)

    def _summed_totals(self) -> Tensor:
        return self.trainer.strategy.reduce(self._totals.clone(), reduce_op="sum")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect logits, labels and indices for the end of the epoch, and features in a test."""
        logits, features = self._evaluated(batch)  # in both, so that a network is compiled once for both
        outputs = (logits, batch.targets, batch.indices)
        self._eval_outputs.append((*outputs, features) if self.trainer.testing else outputs)

    def on_validation_epoch_end(self) -> None:
        """Evaluate the logits of all processes into :attr:`evaluation`, and log its metrics."""
        outputs = [torch.cat(parts).cpu() for parts in zip(*self._eval_outputs, strict=True)]
        self._eval_outputs = []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, outputs)  # counts differ between ranks
            outputs = [torch.cat(parts) for parts in zip(*gathered, strict=True)]
        logits, labels, indices, *features = outputs
        self.evaluation = Evaluation.of(logits, labels, indices, self.class_names, *features)
        stage = "test" if self.trainer.testing else "val"
        # no reduction, because every process has all the logits
        metrics = self.evaluation.metrics()
        self._log_epoch({f"{stage}/{name}": metrics[name] for name in metrics if name != "count"}, self.restored_epoch)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def _log_epoch(self, metrics: dict[str, float], epoch: int | None) -> None:
        """Log metrics with the epoch as x axis; Lightning uses the value named ``step`` for it."""
        self.log_dict({**metrics, "step": float(epoch or 0)}, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the schedule of its learning rates."""
        plugin, clips = self.trainer.precision_plugin, self.trainer.gradient_clip_val is not None
        # Lightning cannot clip gradients of a fused optimizer in mixed precision, and if the scaler of fp16 skips the
        # first step, fused SGD keeps uninitialized memory as momentum
        can_fuse = not (isinstance(plugin, MixedPrecision) and (clips or plugin.scaler is not None))
        optimizer = build_optimizer(self.hparams["optimizer"], self.network.backbone, self.network.head, can_fuse)
        settings = self.hparams["scheduler"]
        if settings["name"] == "constant" and not settings.get("head_only_epochs", 0):
            return optimizer
        return [optimizer], [{"scheduler": self._schedule(optimizer), "interval": "step"}]

    def _schedule(self, optimizer: Optimizer, last_step: int = -1) -> Schedule:
        settings = self.hparams["scheduler"]
        factor = schedule_factor(settings, int(planned_steps(self.trainer)))
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        factors = group_factors(optimizer, factor, settings.get("head_only_epochs", 0) * steps_per_epoch)
        return Schedule(optimizer, factors, last_step)

    def reschedule(self) -> None:
        """Adapt the schedule to a changed number of steps, from the next step on."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Schedule):
                config.scheduler = self._schedule(self.trainer.optimizers[0], config.scheduler.last_epoch - 1)


class Schedule(LambdaLR):
    """LambdaLR of the settings, unlike that of a subclass or of Lightning's learning rate finder."""


def match_layouts(optimizers: Sequence[Optimizer]) -> None:
    """Copy the state of each parameter to the parameter's own memory layout, which differs between CPUs and GPUs.

    Fused optimizers on a CPU ignore strides, so that moments saved on a GPU would be applied to other weights.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def weighted_targets(targets: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Return class probabilities, float32 [N, K], multiplied by the ``weights`` [K] of the true classes, then smoothed.

    Their cross-entropy is the mean of weight x loss. ``F.cross_entropy(weight=...)`` instead divides by the weights of
    its batch, which differ between processes, and also weights the smoothed part, in favor of small classes.
    """
    probabilities = targets if targets.ndim == 2 else F.one_hot(targets, len(weights))
    weighted = probabilities * weights
    return weighted.lerp(weighted.mean(1, keepdim=True), label_smoothing)


def _means(totals: Tensor) -> dict[str, float]:
    loss, hits, count = totals.tolist()
    return {"loss": loss / max(count, 1), "acc": hits / max(count, 1)}
