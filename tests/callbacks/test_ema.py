from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.small_fit import SPLIT, loader, small_fit
from helpers import SMALL, TINY, Weights, compose_train, train_in_two_processes
from torch import Tensor, nn

from cifar10_tl.callbacks import RunCheckpoint, WeightEMA
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train


def test_validation_test_and_checkpoint_use_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"max_epochs": 2, "optimizer": {"name": "SGD", "lr": 0.01, "backbone_lr_scale": 1.0}}
    monkeypatch.setattr(Weights, "seen", plain := [])
    small_fit(tmp_path, Weights(), **options)
    monkeypatch.setattr(Weights, "seen", steps := [])
    trainer, module = small_fit(tmp_path, Weights(), WeightEMA(0.3), RunCheckpoint("last", dirpath=tmp_path), **options)
    assert len(steps) == 6
    for name, value in steps[-1].items():
        torch.testing.assert_close(value, plain[-1][name], msg=f"{name}: the average changed the training")

    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    expected = dict(steps[0])
    for n, weights in enumerate(steps[1:], 1):
        decay = min(0.3, (1 + n) / (10 + n))  # 0.3 from the fourth update on
        for name, value in weights.items():
            average = decay * expected[name] + (1 - decay) * value
            expected[name] = average if value.is_floating_point() else value
    assert checkpoint["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(checkpoint["current_model_state"][name], steps[-1][name]), name
    weight = "network.head.layers.0.weight"
    assert not torch.allclose(checkpoint["state_dict"][weight], steps[-1][weight])

    with torch.inference_mode():
        logits = LitClassifier.load_from_checkpoint(path, weights_only=True).eval()(SPLIT.images)
    torch.testing.assert_close(module.evaluation.logits, logits, rtol=1e-4, atol=1e-5)
    trainer.test(module, loader(), ckpt_path=path, weights_only=True, verbose=False)
    torch.testing.assert_close(module.evaluation.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_the_average_has_at_least_single_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # Lightning (pull request 20545) offers no public way to move the average to the device or to another precision.
    average = WeightEMA(0.999)
    _, module = small_fit(tmp_path, average, precision=precision, max_epochs=2)
    assert {p.dtype for p in average._average_model.module.parameters()} == {dtype}
    assert {p.dtype for p in module.parameters()} == {dtype if dtype == torch.float64 else torch.bfloat16}


def statistics(run: Path, processes: int = 1) -> dict[str, Tensor]:
    """Return the means of BatchNorm's statistics over the first two batches of the second epoch and the processes."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    data = CIFAR10DataModule(**content["datamodule_hyper_parameters"])
    data.setup()
    network = restore(run / "checkpoints" / "last.ckpt").train().network
    totals: dict[str, Tensor] = defaultdict(lambda: torch.tensor(0.0))

    def add(name: str, x: Tensor) -> None:
        for statistic, value in {"mean": x.mean((0, 2, 3)), "var": x.var((0, 2, 3))}.items():
            key = f"network.backbone.{name}.running_{statistic}"
            totals[key] = totals[key] + value

    for name, norm in network.backbone.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda norm, inputs, name=name: add(name, inputs[0]))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    for positions in list(loader.sampler)[:2]:
        for rank in range(processes):
            with torch.no_grad():
                batch = data.augmented(loader.dataset[positions[rank::processes]], epoch=1)
                network(batch.images, batch.boxes)
    return {name: total / (2 * processes) for name, total in totals.items()}


def assert_estimated(run: Path, processes: int = 1) -> None:
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    expected = statistics(run, processes)
    assert len(expected) == 24
    for name, value in expected.items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(saved["current_model_state"][name], value, rtol=0.01)


ESTIMATED = (*SMALL, *TINY, "callbacks=minimal", "logger=none", "ema_decay=0.9", "ema_bn_batches=2", "test=false")


def test_statistics_of_the_average_are_estimated_at_the_last_size_without_a_change_of_training(tmp_path: Path) -> None:
    options = ["data.augment.random_crop_padding=4", "data.augment.random_resized_crop=[0.5,1]"]
    options += ["model.image_size=[[0,24],[0.9,32]]", "model.head.dropout=0.5"]
    train(compose_train(*ESTIMATED, *options, f"paths.output_dir={tmp_path / 'estimated'}"))
    assert_estimated(tmp_path / "estimated")
    train(compose_train(*ESTIMATED, *options, "ema_bn_batches=0", f"paths.output_dir={tmp_path / 'averaged'}"))
    files = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("estimated", "averaged")]
    trained, expected = (torch.load(file, weights_only=True)["current_model_state"] for file in files)
    for name, value in expected.items():
        assert torch.equal(trained[name], value), name


@pytest.mark.slow
def test_statistics_are_averaged_over_processes(tmp_path: Path) -> None:
    train_in_two_processes(*ESTIMATED, f"paths.output_dir={tmp_path}")
    assert_estimated(tmp_path, processes=2)


def test_frozen_statistics_are_kept(tmp_path: Path) -> None:
    train(compose_train(*ESTIMATED, "model.freeze=layer3", "trainer.max_epochs=1", f"paths.output_dir={tmp_path}"))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    means = {name: value for name, value in saved.items() if name.endswith("running_mean")}
    assert {name.split(".")[2] for name, value in means.items() if value.any()} == {"layer4"}
