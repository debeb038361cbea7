"""Norms of the gradients of a run."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from cifar10_tl import plots
from cifar10_tl.callbacks.figures import publish, wants_figures
from cifar10_tl.models.heads import LSTMHead


class GradientFlow(Callback):
    """Callback that measures the norm of the gradient in each stage of the network, and for an LSTM at each time step.

    About ``points`` optimizer steps per epoch are measured, before clipping, without waiting for the device. The mean
    of each epoch is logged as ``gradient_norm/<stage>``, and a figure is drawn when the fit ends. The norm of a stage
    is over its trainable parameters. The norm of a time step is that of the gradient with respect to the LSTM's input
    at this step, over all images of the batch (https://arxiv.org/abs/1211.5063, section 2).
    """

    def __init__(self, points: int = 20) -> None:
        self.points = points
        self.rows: list[dict[str, Any]] = []  # epoch, norm of each stage by name, norms of the time steps
        self._measured: list[list[float]] = []  # in this epoch: norms of stages, then of time steps
        self._on_device: list[Tensor] = []  # not yet read
        self._measuring = False
        self._strategy: Any = None
        self._time_steps: Tensor | None = None  # norms over the batches of this step, [T]

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"rows": self.rows, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._measured = list(state_dict["rows"]), list(state_dict["measured"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        network, self._strategy = pl_module.network, trainer.strategy
        parts = {**network.backbone.stages(), "head": network.head}
        trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        self._stages = {name: parameters for name, parameters in trainable.items() if parameters}
        if isinstance(network.head, LSTMHead):  # before the network is compiled at its first call
            network.head.lstm.register_forward_pre_hook(self._watch)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Select the steps to measure, by their number in the epoch, so that a resumed run measures the same ones."""
        size = trainer.accumulate_grad_batches
        every = math.ceil(trainer.num_training_batches / size / self.points)
        self._measuring = batch_idx // size % every == 0

    def _watch(self, lstm: nn.Module, inputs: tuple[Any]) -> None:
        if self._measuring and torch.is_grad_enabled():
            inputs[0].requires_grad_().register_hook(self._add_time_steps)

    def _add_time_steps(self, gradient: Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient, dim=(0, 2), dtype=torch.float32)
        self._time_steps = norms if self._time_steps is None else torch.hypot(self._time_steps, norms)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Measure complete gradients: averaged over processes, accumulated, not yet clipped."""
        if not self._measuring:
            return
        self._measuring = False
        gradients = ([p.grad for p in stage if p.grad is not None] for stage in self._stages.values())
        norms = torch.stack([get_total_norm(stage) for stage in gradients])
        time_steps, self._time_steps = norms[:0] if self._time_steps is None else self._time_steps, None
        if trainer.scaler is not None:  # fp16
            scale = trainer.scaler.scale(norms.new_ones(()))
            time_steps = time_steps / scale
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: has its own unscaling, in step()
                norms = norms / scale
        self._on_device.append(torch.cat([norms, time_steps]))

    def _read(self) -> None:
        """Wait for the device, and combine the time steps of all processes, each of which has its own images."""
        if not self._on_device:
            return
        norms, self._on_device = torch.stack(self._on_device), []
        if self._strategy.world_size > 1:
            squares = self._strategy.reduce(norms.double().square(), None, "sum")
            norms[:, len(self._stages) :] = squares[:, len(self._stages) :].sqrt() / self._strategy.world_size
        self._measured += norms.tolist()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means of the epoch, without steps that overflowed in fp16, which the optimizer skips."""
        self._read()
        finite = [norms for norms in self._measured if all(map(math.isfinite, norms))]
        self._measured = []
        if not finite:
            return
        means = [sum(column) / len(finite) for column in zip(*finite, strict=True)]
        by_stage = dict(zip(self._stages, means, strict=False))
        time_steps = means[len(by_stage) :]
        self.rows.append({"epoch": trainer.current_epoch, "stages": by_stage, "time_steps": time_steps})
        scalars = {f"gradient_norm/{stage}": norm for stage, norm in by_stage.items()}
        scalars |= {f"gradient_norm_lstm/step_{t:02d}": norm for t, norm in enumerate(time_steps, 1)}
        pl_module.log_dict({**scalars, "step": float(trainer.current_epoch)}, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Draw the figure, also after an exception."""
        if self.rows and wants_figures(trainer):
            figure = plots.gradient_flow(self.rows, heading="Gradient flow")
            publish(trainer, "gradient_flow", figure, step=self.rows[-1]["epoch"])

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":  # a test has restored the rows of the best checkpoint
            self.on_fit_end(trainer)
