"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel


class WeightEMA(WeightAveraging):
    """Callback that keeps an exponential moving average of weights and BatchNorm statistics.

    Validation and test use the average, and a checkpoint holds it as ``state_dict``; the weights that are trained are
    saved next to it as ``current_model_state``, so that a resumed run continues with both.

    The decay after n steps is min(``decay``, (1 + n) / (10 + n)), so that the initial weights are soon forgotten
    (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).

    With ``bn_batches``, each validation is preceded by a new estimate of the statistics of BatchNorm for the averaged
    weights (section 3.2 of https://arxiv.org/abs/1803.05407): their mean over the first batches of the epoch, augmented
    as in training. Each process averages over its own images, then over the processes, which omits the variance between
    the processes' parts of a batch. Frozen layers keep their statistics.
    """

    def __init__(self, decay: float, bn_batches: int = 0) -> None:
        super().__init__()
        self.decay, self.bn_batches = decay, bn_batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to the device; its step count stays on the CPU, where reading it costs nothing.

        ``AveragedModel.update_parameters`` would copy the count to the device and back in each step. The average has at
        least fp32, because in bf16 a step that changes it by less than 0.4% would be lost.
        """
        average: Any = self._average_model
        average.to(pl_module.device, torch.promote_types(torch.float32, next(pl_module.parameters()).dtype))
        average.n_averaged = average.n_averaged.cpu()
        average.update_parameters = partial(self._update, average)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights for a fit; a test keeps the average, which Lightning would replace."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Put the average into the network, and estimate its statistics."""
        super().on_validation_epoch_start(trainer, pl_module)
        if self.bn_batches and trainer.state.fn == "fit" and not trainer.sanity_checking:
            estimate_statistics(trainer, pl_module, self.bn_batches)

    def _update(self, average: AveragedModel, model: nn.Module) -> None:
        """Update the average of weights and buffers with those of ``model``; the first step copies them."""
        n = int(average.n_averaged)
        kept = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        tensors = [[x.detach() for x in chain(m.parameters(), m.buffers())] for m in (average.module, model)]
        floats: list[tuple[Tensor, ...]] = []
        counts: list[tuple[Tensor, ...]] = []  # of batches, in BatchNorm
        for pair in zip(*tensors, strict=True):
            (floats if pair[0].is_floating_point() else counts).append(pair)
        averages, weights = map(list, zip(*((a, w.to(a.dtype)) for a, w in floats), strict=True))
        torch._foreach_lerp_(averages, weights, 1 - kept)
        if counts:
            averages, weights = map(list, zip(*counts, strict=True))
            torch._foreach_copy_(averages, weights)
        average.n_averaged += 1


def estimate_statistics(trainer: pl.Trainer, pl_module: Any, num_batches: int) -> None:
    """Set the statistics of each BatchNorm that is not frozen to their mean over training batches of this epoch.

    ``torch.optim.swa_utils.update_bn`` would also reset those of frozen layers.
    """
    pl_module.train()  # except frozen layers
    norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training]
    pl_module.eval()  # the image size of validation
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # cumulative mean
    loader: Any = trainer.train_dataloader
    # compiling for this mix of modes would take longer than the few batches
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for positions in islice(copy.copy(loader.sampler), num_batches if norms else 0):
            batch = trainer.strategy.batch_to_device(loader.dataset[positions])
            batch = trainer.datamodule.augmented(batch, trainer.current_epoch)  # type: ignore[attr-defined]
            with trainer.precision_plugin.forward_context():
                pl_module._logits(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))
