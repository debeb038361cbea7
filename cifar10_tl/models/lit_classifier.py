"""The LightningModule: loss, training and evaluation steps, optimizer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.feature_cache import tensors_checksum
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.heads import build_head, pools
from cifar10_tl.models.network import TransferResNet
from cifar10_tl.models.optim import find_optimizer, parameter_groups, schedule_factor
from cifar10_tl.models.weights import (
    check_weights,
    fetch_weights,
    load_backbone_state,
    load_safely,
    load_weights,
    normalisation,
    state_dict_of,
)

log = logging.getLogger(__name__)


class LitClassifier(pl.LightningModule):
    """A :class:`TransferResNet` trained with cross-entropy.

    Pretrained weights are loaded when a fit starts, never when a checkpoint is restored.

    The logged losses of train, val and test are comparable: label smoothing affects only the loss that is minimized.
    Training accuracy counts a mixed image as the class with the larger fraction.

    Args:
        class_names: Names of the K classes, in the order of the logits.
        backbone: One of ``BACKBONES``.
        weights: Name in torchvision (such as IMAGENET1K_V2), file, or None for random weights.
        image_size: Side in pixels to which the network resizes images.
        native_size: Side of the input images in pixels.
        interpolation: "bicubic" or "bilinear".
        freeze: "none", or "backbone" to train only the head.
        stem: "imagenet" or "cifar", see :class:`Backbone`.
        head: ``{"name": "dense", ...}``, see :mod:`cifar10_tl.models.heads`.
        label_smoothing: Fraction of the target probability spread over all classes, in [0, 1).
        optimizer: ``{"name": ..., "lr": ..., "backbone_lr_scale": ..., ...}`` for a class of ``torch.optim``.
        scheduler: ``{"name": "constant"}`` or ``{"name": "cosine", "warmup": ..., "final": ...}``, see
            :func:`schedule_factor`.
        seed: Seed of dropout.

    Raises:
        UserError: An argument has an invalid value.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: str = "resnet50",
        weights: str | None = None,
        image_size: int = 224,
        native_size: int = 32,
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
        trunk = Backbone(backbone, stem=stem, frozen=freeze == "backbone")
        mean, std = normalisation(backbone, weights)
        self.network = TransferResNet(
            trunk,
            build_head(head, trunk.num_features, len(class_names)),
            native_size=native_size,
            image_size=image_size,
            interpolation=interpolation,
            mean=mean,
            std=std,
        )
        # here, because FSDP flattens parameters before configure_optimizers
        self._decayed = {p for p in self.network.parameters() if p.ndim > 1}
        self.evaluation: Evaluation | None = None  # of the latest validation or test epoch
        self.restored_epoch: int | None = None  # last epoch that trained these weights
        self._eval_outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._totals = torch.zeros(3, dtype=torch.float64)  # loss, hits and images of this epoch
        self._has_weights = weights is None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of uint8 images [N, 3, H, W]."""
        return self.network(images)

    def _logits(self, batch: Batch) -> Tensor:
        if batch.features is None:
            return self.network(batch.images).float()
        return self.network.head(batch.features).float()

    # ------------------------------------------------------------------------------------ features of a frozen backbone

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the head for uint8 images [N, 3, H, W], on the CPU in the trainer's precision."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.network.head_input(images.to(self.device)).cpu()

    def features_description(self) -> dict[str, Any]:
        """Return plain values that identify everything except the images that :meth:`features` depends on."""
        names = ("backbone", "stem", "image_size", "interpolation")
        return {
            **{name: self.hparams[name] for name in names},
            "precision": str(self.trainer.precision_plugin.precision),
            "pooled": pools(self.network.head),
            "weights": tensors_checksum(self.network.backbone.state_dict()),
            "normalisation": tensors_checksum({"scale": self.network.scale, "shift": self.network.shift}),
        }

    # ------------------------------------------------------------------------------------------------ initial weights

    def prepare_data(self) -> None:
        """Download the weights that a fit starts from."""
        if self._wants_weights():
            check_weights(self.hparams["backbone"], self.hparams["weights"])
            fetch_weights(self.hparams["backbone"], self.hparams["weights"])

    def setup(self, stage: str) -> None:
        """Load the weights that a fit starts from."""
        if self._wants_weights():
            load_weights(self.network.backbone, self.hparams["backbone"], self.hparams["weights"])
            self._has_weights = True

    def _wants_weights(self) -> bool:
        return self.trainer.state.fn == "fit" and not self._has_weights and not self.trainer.ckpt_path

    def load_weights_from(self, checkpoint: Path) -> None:
        """Load the weights of another run's checkpoint; load the head only if classes and shapes are the same.

        Raises:
            UserError: The file is not a checkpoint of a network with this backbone.
        """
        content = load_safely(checkpoint)
        tensors = state_dict_of(content, checkpoint)
        if not any(name.startswith("network.") for name in tensors):
            raise UserError(
                f"init_from={checkpoint} is not a checkpoint of this project; use model.weights=FILE to load the "
                "weights of a ResNet"
            )
        state = {k.removeprefix("network."): v for k, v in tensors.items()}
        backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        load_backbone_state(self.network.backbone, backbone, f"init_from={checkpoint}")
        own = self.network.head.state_dict()
        head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
        fits = head.keys() == own.keys() and all(v.shape == own[k].shape for k, v in head.items())
        same_classes = content.get("hyper_parameters", {}).get("class_names") == self.class_names
        if fits and same_classes:
            self.network.head.load_state_dict(head)
            log.info("init_from=%s: loaded backbone and head", checkpoint)
        else:
            reason = "its head has other layers" if same_classes else "its classes differ"
            log.warning("init_from=%s: loaded the backbone only, because %s", checkpoint, reason)
        self._has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running totals of a partial epoch."""
        self._has_weights = True
        self.restored_epoch = checkpoint["epoch"]
        totals = checkpoint.get("train_totals")
        if totals is not None and self._is_rank_zero():
            self._totals = totals.to(self._totals.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the running totals of all processes; Lightning calls this in each of them."""
        checkpoint["train_totals"] = self._summed(self._totals).cpu()

    def _is_rank_zero(self) -> bool:
        return self._trainer is None or self._trainer.is_global_zero

    # ------------------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Move the totals to the device, and restore the position of the training loader.

        Lightning loses the position of a stateful loader if ``configure_optimizers`` reads
        ``estimated_stepping_batches``: https://github.com/Lightning-AI/pytorch-lightning/issues/20550.
        """
        self.trainer.fit_loop._load_combined_loader_states()
        has_float64 = self.device.type != "mps"
        self._totals = self._totals.to(self.device, torch.float64 if has_float64 else torch.float32)

    def on_train_epoch_start(self) -> None:
        """Reset the totals; not called when a run resumes within an epoch."""
        self._totals.zero_()
        self.evaluation = None  # of an earlier epoch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by epoch and batch, so that a resumed run drops the same units as an uninterrupted one."""
        self.restored_epoch = self.current_epoch
        seed = int(hash32(self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank))
        # torch.manual_seed takes 2 ms and leaks a stack trace per call until CUDA is initialized
        (torch.cuda.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed)(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss to minimize, and add the reported loss and accuracy to totals on the device."""
        logits = self._logits(batch)
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            reported = loss if not self.label_smoothing else F.cross_entropy(logits, batch.targets)
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
        if self._trainer is None or self.trainer.accumulate_grad_batches == 1:
            return 1.0
        size = self.trainer.accumulate_grad_batches
        remainder = self.trainer.num_training_batches % size
        is_last_group = batch_idx >= self.trainer.num_training_batches - remainder
        return size / remainder if is_last_group else 1.0

    def on_train_epoch_end(self) -> None:
        """Log the mean loss and accuracy of the epoch."""
        self._log_epoch(self.training_metrics(), self.current_epoch)

    def training_metrics(self) -> dict[str, float]:
        """Return the mean loss and accuracy of this epoch over all processes; call it in each of them."""
        loss, hits, count = self._summed(self._totals).tolist()
        return {"train/loss": loss / max(count, 1), "train/acc": hits / max(count, 1)}

    def running_metrics(self) -> dict[str, float]:
        """Return the mean loss and accuracy of this epoch in this process; synchronizes with the device."""
        loss, hits, count = self._totals.tolist()
        return {"loss": loss / max(count, 1), "acc": hits / max(count, 1)}

    def _summed(self, totals: Tensor) -> Tensor:
        if self._trainer is None or self.trainer.world_size == 1:
            return totals
        summed: Any = self.trainer.strategy.reduce(totals.clone(), reduce_op="sum")
        return summed

    # ----------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect logits, labels and indices for the end of the epoch."""
        if len(batch.images):  # the last batch of a rank may be empty, see BatchSampler
            self._eval_outputs.append((self._logits(batch), batch.targets, batch.indices))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do the same as :meth:`validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Evaluate the logits of all processes into :attr:`evaluation`, and log loss and accuracy."""
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Do the same as :meth:`on_validation_epoch_end`."""
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        logits, labels, indices = self._gathered_outputs()
        self.evaluation = Evaluation.of(logits, labels, indices, self.class_names)
        # no reduction, because every process has all the logits
        metrics = {f"{stage}/loss": self.evaluation.loss, f"{stage}/acc": self.evaluation.accuracy}
        self._log_epoch(metrics, self.restored_epoch)

    def _log_epoch(self, metrics: dict[str, float], epoch: int | None) -> None:
        """Log metrics with the epoch as x axis; Lightning uses the value named ``step`` for it."""
        self.log_dict({**metrics, "step": float(epoch or 0)}, batch_size=1)

    def _gathered_outputs(self) -> list[Tensor]:
        """Return the logits, labels and indices of all images on the CPU."""
        outputs, self._eval_outputs = self._eval_outputs, []
        if outputs:
            own = [torch.cat(parts).cpu() for parts in zip(*outputs, strict=True)]
        else:  # fewer images than processes
            own = [torch.zeros(0, len(self.class_names)), *torch.zeros(2, 0, dtype=torch.long)]
        if self.trainer.world_size == 1:
            return own
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, own)  # counts differ between ranks
        return [torch.cat(parts) for parts in zip(*gathered, strict=True)]

    # --------------------------------------------------------------------------------------------------- optimization

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with groups for backbone and head, with and without decay, and its schedule."""
        settings = dict(self.hparams["optimizer"])
        name, backbone_lr_scale = settings.pop("name"), settings.pop("backbone_lr_scale", 1.0)
        optimizer_class = find_optimizer(name)
        lr = settings["lr"]
        groups = [
            *parameter_groups("backbone", self.network.backbone, lr * backbone_lr_scale, self._decayed),
            *parameter_groups("head", self.network.head, lr, self._decayed),
        ]
        if "fused" in inspect.signature(optimizer_class).parameters and not settings.get("foreach"):
            settings.setdefault("fused", True)
        if settings.get("fused") and self._clips_in_mixed_precision():
            settings["fused"] = False  # Lightning cannot clip gradients of a fused optimizer here
        try:
            optimizer = optimizer_class(groups, **settings)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"optimizer.name={name}: {error} (~optimizer.KEY removes a setting)") from error
        if self.hparams["scheduler"]["name"] == "constant":
            return optimizer
        schedule = schedule_factor(self.hparams["scheduler"], int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }

    def _clips_in_mixed_precision(self) -> bool:
        clips = self.trainer.gradient_clip_val is not None
        return clips and isinstance(self.trainer.precision_plugin, MixedPrecision)
