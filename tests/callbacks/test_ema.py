from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SMALL, TINY, Weights, compose_train
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """The folder of a run with an average, and the weights after each of its steps."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    Weights.seen.clear()
    recorded = "+callbacks.weights={_target_: helpers.Weights}"
    train(compose_train(*SMALL, *TINY, "callbacks=minimal", "ema_decay=0.3", recorded, f"paths.output_dir={folder}"))
    return folder, list(Weights.seen)


def test_a_checkpoint_holds_the_average_and_the_trained_weights(averaged: tuple[Path, list[State]]) -> None:
    folder, steps = averaged
    assert len(steps) == 6
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
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


def test_validation_and_test_use_the_average(averaged: tuple[Path, list[State]]) -> None:
    folder, _ = averaged
    results = json.loads((folder / "results.json").read_text())
    path = folder / "checkpoints" / "best.ckpt"
    module = LitClassifier.load_from_checkpoint(path, weights_only=True).eval()
    data = CIFAR10DataModule(**torch.load(path, weights_only=True)["datamodule_hyper_parameters"])
    data.setup()
    for stage in ("val", "test"):
        split = data.splits[stage]
        with torch.inference_mode():
            logits = module(split.images)
        assert results[stage]["acc"] == float((logits.argmax(1) == split.labels).double().mean())
        loss = torch.nn.functional.cross_entropy(logits, split.labels)
        assert results[stage]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_training_is_the_same_without_an_average(
    small_cfg: Callable[..., DictConfig], averaged: tuple[Path, list[State]]
) -> None:
    cfg = small_cfg(*TINY, "callbacks=minimal", "test=false")
    train(cfg)
    plain = torch.load(Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    assert "current_model_state" not in plain
    for name, value in averaged[1][-1].items():
        torch.testing.assert_close(plain["state_dict"][name], value, msg=name)


@pytest.mark.parametrize("decay", ["0", "1", "abc"])
def test_a_decay_outside_of_0_to_1_is_refused(decay: str) -> None:
    with pytest.raises(UserError, match=f"ema_decay={decay}: .* a number above 0 and below 1"):
        compose_train(f"ema_decay={decay}")


def test_lightning_keeps_the_average_where_we_move_it() -> None:
    """WeightAveraging (Lightning pull request 20545) offers no public way to move the average to the device."""
    assert WeightAveraging()._average_model is None
