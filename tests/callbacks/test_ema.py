from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.small_fit import SPLIT, loader, small_fit
from helpers import Weights
from lightning.pytorch.callbacks import WeightAveraging

from cifar10_tl.callbacks import RunCheckpoint, WeightEMA
from cifar10_tl.models.lit_classifier import LitClassifier


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


def test_lightning_keeps_the_average_where_we_move_it() -> None:
    """WeightAveraging (Lightning pull request 20545) offers no public way to move the average to the device."""
    assert WeightAveraging()._average_model is None
