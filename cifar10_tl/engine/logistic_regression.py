"""Multinomial logistic regression on cached features: the optimum that training a linear head approaches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import LBFGS

from cifar10_tl.data.balance import class_weights
from cifar10_tl.data.batch import Split
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.heads import LinearHead, PoolingHead
from cifar10_tl.models.lit_classifier import LitClassifier

log = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints", "logistic_regression.ckpt")
PENALTIES = tuple(10 ** (-k / 2) for k in range(10))  # from strong to weak, so that each solution is near the next


class LogisticRegression(Callback):
    """Callback that fits the heads before the first epoch, within a time budget.

    Args:
        test: Whether the chosen head is tested.
    """

    def __init__(self, test: bool) -> None:
        self.test = test
        self.results: dict[str, Any] | None = None  # entry of results.json, empty in all processes but the first

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fit on the training features, choose the penalty on val, write a checkpoint, then test."""
        self.results = {}
        if not isinstance(pl_module.network.head, PoolingHead):
            log.info("logistic_regression=true has no effect: this head does not pool the feature map")
            return
        pl_module.to(trainer.strategy.root_device)  # after a fit, Lightning moves it to the CPU
        names = ("train", "val", "test") if self.test else ("train", "val")
        datamodule: CIFAR10DataModule = trainer.datamodule  # type: ignore[attr-defined]
        splits = {name: datamodule.with_features(name) for name in names}  # in all processes, which share the cache
        if trainer.is_global_zero:
            self.results = {"logistic_regression": fit(pl_module, trainer, datamodule, splits)}


def results(trainer: pl.Trainer, module: LitClassifier) -> dict[str, Any]:
    """Return the results, empty if it is off; fit now if a resumed run had nothing left to train."""
    found: list[Any] = [c for c in trainer.callbacks if isinstance(c, LogisticRegression)]  # type: ignore[attr-defined]
    for callback in found:
        if callback.results is None:
            callback.on_train_start(trainer, module)
    return found[0].results if found else {}


def fit(
    module: LitClassifier, trainer: pl.Trainer, datamodule: CIFAR10DataModule, splits: dict[str, Split]
) -> dict[str, Any]:
    """Write the checkpoint with the penalty that is best on val, and return the results."""
    start = time.perf_counter()
    log.info("fitting logistic regression with %d penalties on %d images", len(PENALTIES), len(splits["train"]))
    evaluate = partial(evaluate_head, module=module, trainer=trainer, batch_size=datamodule.hparams["batch_size"])
    heads = fit_heads(module, splits["train"], balanced=datamodule.hparams["balance"] != "none")
    candidates = ((evaluate(head, splits["val"]), l2, head) for l2, head in heads)
    val, l2, head = max(candidates, key=lambda candidate: (candidate[0].accuracy, -candidate[0].loss))
    trainer.strategy.checkpoint_io.save_checkpoint(
        checkpoint_content(module, head, datamodule), Path(trainer.default_root_dir) / CHECKPOINT
    )
    scores = {"val": val} | ({"test": evaluate(head, splits["test"])} if "test" in splits else {})
    metrics = {name: evaluation.metrics() for name, evaluation in scores.items()}
    return {"l2": l2, **metrics, "seconds": time.perf_counter() - start}


def fit_heads(module: LitClassifier, train: Split, *, balanced: bool) -> Iterator[tuple[float, nn.Module]]:
    """Yield each penalty and a linear head with the solution, on the device of the module."""
    assert train.features is not None
    has_float64 = module.device.type != "mps"
    features = train.features[:, 0].flatten(1).to(module.device, torch.float64 if has_float64 else torch.float32)
    num_classes = len(module.class_names)
    class_weight = class_weights(train.labels, num_classes).to(features) if balanced else None
    for l2, weight, bias in solutions(features, train.labels.to(module.device), num_classes, class_weight):
        head = LinearHead(weight.shape[1], len(bias))
        head.load_state_dict({"layers.1.weight": weight, "layers.1.bias": bias})
        yield l2, module.trainer.precision_plugin.convert_module(head).to(module.device).eval()


def solutions(
    features: Tensor, labels: Tensor, num_classes: int, class_weight: Tensor | None = None
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield each penalty l2 with the weight [K, C] and the bias [K] that minimize :func:`objective`.

    The penalty applies to the weight of standardized features; the result applies to ``features`` (float [N, C]).
    L-BFGS with a line search (https://doi.org/10.1007/BF01589116) starts from the previous solution.
    """
    std, mean = torch.std_mean(features, 0)
    std = std.clamp(min=1e-6)  # of a constant feature
    x = (features - mean) / std
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    solver: Any = partial(
        LBFGS, max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    for l2 in PENALTIES:
        solver([weight, bias]).step(partial(objective, weight, bias, x, labels, l2, class_weight))
        scaled = weight.detach() / std
        yield l2, scaled, bias.detach() - scaled @ mean


def objective(
    weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor, l2: float, class_weight: Tensor | None
) -> Tensor:
    """Return the mean cross-entropy + l2 * |weight|^2, and set the gradients of weight and bias."""
    loss = F.cross_entropy(F.linear(x, weight, bias), labels, class_weight) + l2 * weight.square().sum()
    weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
    return loss


@torch.inference_mode()
def evaluate_head(
    head: nn.Module, split: Split, *, module: LitClassifier, trainer: pl.Trainer, batch_size: int
) -> Evaluation:
    """Evaluate a head on cached features in the precision and the batches of a test."""
    assert split.features is not None
    with trainer.precision_plugin.forward_context():
        starts = range(0, len(split), batch_size)
        batches = (split.features[i : i + batch_size, 0].to(module.device) for i in starts)
        logits = torch.cat([head(batch).float() for batch in batches]).cpu()
    return Evaluation.of(logits, split.labels, split.indices, module.class_names)


def checkpoint_content(module: LitClassifier, head: nn.Module, datamodule: CIFAR10DataModule) -> dict[str, Any]:
    """Return a checkpoint of the network with another, linear head, without what resuming a run needs."""
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("network.head.")}
    return {
        "epoch": module.current_epoch,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": state | {f"network.head.{name}": value for name, value in head.state_dict().items()},
        "hyper_parameters": {**module.hparams, "head": {"name": "linear"}},
        "datamodule_hyper_parameters": dict(datamodule.hparams),
        type(datamodule).__qualname__: datamodule.state_dict(),
    }
