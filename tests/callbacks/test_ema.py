from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Weights, compose_train
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.train import train

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """The folder of a run with an average, and the weights behind each of its steps."""
    from helpers import SMALL

    folder = tmp_path_factory.mktemp("ema") / "run"
    Weights.seen.clear()
    recorded = "+callbacks.weights={_target_: helpers.Weights}"
    train(compose_train(*SMALL, "callbacks=minimal", "ema_decay=0.6", recorded, f"paths.output_dir={folder}"))
    return folder, list(Weights.seen)


def test_the_checkpoint_holds_the_average_and_beside_it_the_weights(averaged: tuple[Path, list[State]]) -> None:
    folder, steps = averaged
    assert len(steps) == 10
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    expected = dict(steps[0])
    for number, weights in enumerate(steps[1:], 1):
        keep = min(0.6, (1 + number) / (10 + number))
        for name, value in weights.items():
            blend = keep * expected[name] + (1 - keep) * value if value.is_floating_point() else value
            expected[name] = blend
    assert checkpoint["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(checkpoint["current_model_state"][name], steps[-1][name]), name
    assert not torch.allclose(
        checkpoint["state_dict"]["network.head.layers.0.weight"], steps[-1]["network.head.layers.0.weight"]
    )


def test_it_is_the_average_that_was_validated_and_tested(averaged: tuple[Path, list[State]]) -> None:
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


def test_training_itself_is_as_without_an_average(
    small_cfg: Callable[..., DictConfig], averaged: tuple[Path, list[State]]
) -> None:
    cfg = small_cfg("callbacks=minimal", "test=false")
    train(cfg)
    plain = torch.load(Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    assert "current_model_state" not in plain
    for name, value in averaged[1][-1].items():
        torch.testing.assert_close(plain["state_dict"][name], value, msg=name)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["ema_decay=1"], "ema_decay=1: should be one of null or a number above 0 and below 1"),
        (["ema_decay=0"], "ema_decay=0"),
    ],
)
def test_averages_that_cannot_be(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose_train(*overrides)
