from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks.small_fit import SPLIT, loader, small_fit
from helpers import Accident, StepLosses, compose_train, resume, train_in_two_processes
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar10_tl.callbacks import GradientFlow
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
SGD: dict[str, Any] = {"name": "SGD", "lr": 0.01}
LSTM: dict[str, Any] = {"name": "lstm", "lstm_size": 8, "hidden": [8]}


def classifier(**options: Any) -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(["a", "b", "c"], backbone="resnet18", image_size=33, optimizer=SGD, **options)


def fit(folder: Path, module: LitClassifier, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """Train one epoch of three batches."""
    defaults = {"max_epochs": 1, "limit_val_batches": 0, "accelerator": "cpu", "logger": False, "deterministic": True}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(**(defaults | quiet | options), callbacks=list(callbacks), default_root_dir=folder)
    trainer.fit(module, loader(), loader())
    return trainer


def norm(gradients: list[Tensor | None]) -> float:
    return float(sum(g.double().square().sum() for g in gradients if g is not None).sqrt())  # type: ignore[union-attr]


def by_hand(module: LitClassifier, *batches: slice) -> tuple[dict[str, float], list[float]]:
    """Return the norms of the gradient of the mean loss of the batches, in the stages and at the LSTM's time steps."""
    module.train()
    inputs: list[Tensor] = []
    for batch in batches:
        inputs.append(module.network.features(SPLIT.images[batch]))
        inputs[-1].retain_grad()
        (F.cross_entropy(module.network.head(inputs[-1]), SPLIT.labels[batch]) / len(batches)).backward()
    found: dict[str, list[Tensor | None]] = {stage: [] for stage in STAGES}
    for name, parameter in module.network.backbone.named_parameters():
        found[{"conv1": "stem", "bn1": "stem"}.get(name.split(".")[0], name.split(".")[0])].append(parameter.grad)
    found["head"] = [parameter.grad for parameter in module.network.head.parameters()]
    gradient = torch.cat([x.grad.flatten(2) for x in inputs])  # type: ignore[union-attr]
    return {stage: norm(g) for stage, g in found.items()}, [norm([cell]) for cell in gradient.unbind(2)]


@pytest.mark.parametrize(("size", "freeze"), [(1, "none"), (2, "none"), (1, "backbone")])
def test_norms_are_those_of_the_whole_gradient_before_clipping(tmp_path: Path, size: int, freeze: str) -> None:
    module, callback = classifier(head=LSTM, freeze=freeze), GradientFlow()
    stages, time_steps = by_hand(classifier(head=LSTM), *(slice(4 * i, 4 * i + 4) for i in range(size)))
    options = {"accumulate_grad_batches": size, "limit_train_batches": size, "gradient_clip_val": 1e-3}
    fit(tmp_path, module, callback, **options)
    (row,) = callback.rows
    assert row["epoch"] == 0
    assert len(row["time_steps"]) == 4
    if freeze == "backbone":  # its BatchNorm is in eval mode: other values than by hand
        assert list(row["stages"]) == ["head"]
        assert all(value > 0 for value in row["time_steps"])
        return
    assert list(row["stages"]) == STAGES
    assert row["stages"] == pytest.approx(stages, rel=1e-4)
    assert row["time_steps"] == pytest.approx(time_steps, rel=1e-4)


class HeadNorms(Callback):
    """Callback that keeps the norm of the head's gradient of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(norm([p.grad for p in pl_module.network.head.parameters()]))


@pytest.mark.parametrize(("points", "measured"), [(20, [0, 1, 2]), (2, [0, 2]), (1, [0])])
def test_an_epoch_has_the_mean_of_the_measured_steps(tmp_path: Path, points: int, measured: list[int]) -> None:
    callback, expected = GradientFlow(points), HeadNorms()
    trainer, _ = small_fit(tmp_path, callback, expected, optimizer=SGD)
    (row,) = callback.rows
    assert row["stages"]["head"] == pytest.approx(sum(expected.seen[i] for i in measured) / len(measured), rel=1e-5)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "gradient_norm" in name}
    assert logged == pytest.approx({f"gradient_norm/{stage}": value for stage, value in row["stages"].items()})
    assert (tmp_path / "figures" / "gradient_flow.png").is_file()


@pytest.mark.parametrize("fused", [False, True])
def test_norms_in_fp16_are_unscaled_and_steps_that_overflow_are_left_out(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    head = torch.nn.Linear(2, 1, bias=False)
    network = SimpleNamespace(backbone=SimpleNamespace(stages=dict), head=head)
    module: Any = SimpleNamespace(network=network, log_dict=lambda *_, **__: None)
    strategy = SimpleNamespace(world_size=1)
    trainer: Any = SimpleNamespace(
        strategy=strategy, scaler=scaler, accumulate_grad_batches=1, num_training_batches=2, current_epoch=0
    )
    optimizer: Any = SimpleNamespace(_step_supports_amp_scaling=fused)
    callback = GradientFlow()
    callback.on_fit_start(trainer, module)
    for batch_idx, gradient in enumerate(([3.0, 4.0], [float("inf"), 0.0])):
        head.weight.grad = torch.tensor([gradient]) * (1024.0 if fused else 1.0)
        callback.on_train_batch_start(trainer, module, None, batch_idx)
        callback._add_time_steps(torch.tensor([[[6.0], [0.0]], [[8.0], [1.0]]]) * 1024)
        callback.on_before_optimizer_step(trainer, module, optimizer)
    callback.on_train_epoch_end(trainer, module)
    assert callback.rows == [{"epoch": 0, "stages": {"head": 5.0}, "time_steps": [10.0, 1.0]}]


TINY_LSTM = (
    *("experiment=quickstart", "model.backbone=resnet10", "model/head=lstm", "model.image_size=33"),
    *("data.train_size=112", "data.val_size=32", "data.test_size=32", "data.batch_size=16", "trainer.max_epochs=2"),
    *("trainer.accumulate_grad_batches=2", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.devices=1"),
    *("trainer.deterministic=true", "trainer.enable_progress_bar=false", "callbacks=minimal", "logger=none"),
    *("report=none", "test=false"),
)


def norms(run: Path) -> list[dict[str, Any]]:
    """Return the norms in the last checkpoint of a run."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["GradientFlow"]
    assert state["measured"] == []
    return state["rows"]


@pytest.mark.slow
def test_norms_are_the_same_after_a_kill_and_do_not_change_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str, *overrides: str) -> list[float]:
        monkeypatch.setattr(StepLosses, "seen", losses := [])
        recorded = "+callbacks.losses={_target_: helpers.StepLosses}"
        train(compose_train(*TINY_LSTM, recorded, f"paths.output_dir={tmp_path / name}", *overrides))
        return losses

    assert start("with", "gradient_flow=true") == start("without")

    def kill() -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(Accident, "happens", kill)
    monkeypatch.setattr(Accident, "at", ("step", 5))
    accident = ("checkpoint_every_n_steps=1", "+callbacks.accident={_target_: helpers.Accident}")
    with pytest.raises(RuntimeError, match="killed"):
        start("killed", "gradient_flow=true", *accident)
    resume(tmp_path / "killed")
    assert norms(tmp_path / "killed") == norms(tmp_path / "with")
    assert [len(row["time_steps"]) for row in norms(tmp_path / "with")] == [4, 4]


@pytest.mark.slow
def test_two_processes_have_the_norms_of_one(tmp_path: Path) -> None:
    """The backbone is frozen, because the statistics of trainable BatchNorm differ between processes."""
    options = (*TINY_LSTM, "gradient_flow=true", "model.freeze=backbone", "model.head.dropout=0")
    train(compose_train(*options, f"paths.output_dir={tmp_path / 'one'}"))
    train_in_two_processes(*options, f"paths.output_dir={tmp_path / 'two'}")
    one, two = norms(tmp_path / "one"), norms(tmp_path / "two")
    for row, expected in zip(two, one, strict=True):
        assert row["stages"] == pytest.approx(expected["stages"], rel=1e-4)
        assert row["time_steps"] == pytest.approx(expected["time_steps"], rel=1e-4)
