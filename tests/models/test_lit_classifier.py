from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.optim import parameter_groups, schedule_factor

NAMES = ["ant", "bee", "wasp"]


def module(**options) -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(NAMES, backbone="resnet18", image_size=32, **options)


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(8) % 3, torch.arange(8))


def test_loss_is_smoothed_cross_entropy_and_the_report_is_plain(batch: Batch) -> None:
    net = module(label_smoothing=0.2).train()
    logits = net(batch.images)  # BatchNorm in training mode does not depend on its running statistics
    loss = net.training_step(batch, 0)
    assert torch.allclose(loss, F.cross_entropy(logits, batch.targets, label_smoothing=0.2), atol=1e-6)
    net.training_step(batch, 1)
    report = net.training_metrics()
    assert report["train/loss"] == pytest.approx(float(F.cross_entropy(logits, batch.targets)), abs=1e-5)
    assert report["train/acc"] == pytest.approx(float((logits.argmax(1) == batch.targets).float().mean()))
    net.on_train_epoch_start()
    assert net.training_metrics() == {"train/loss": 0.0, "train/acc": 0.0}


def test_mixed_targets_count_the_larger_share(batch: Batch) -> None:
    net = module().eval()
    predictions = net(batch.images).argmax(1)
    shares = torch.lerp(F.one_hot(predictions, 3).float(), torch.full((8, 3), 1 / 3), 0.5)
    net.training_step(batch._replace(targets=shares), 0)
    assert net.training_metrics()["train/acc"] == 1.0


def test_groups_hold_every_parameter_once_with_its_rate_and_decay() -> None:
    net = module(
        optimizer={"name": "SGD", "lr": 0.1, "backbone_lr_scale": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        head={"name": "dense", "hidden": [8]},
        scheduler={"name": "cosine"},
    )
    net._trainer = SimpleNamespace(estimated_stepping_batches=10, gradient_clip_val=None)  # type: ignore[assignment]
    optimizer = net.configure_optimizers()["optimizer"]
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {n: (g["initial_lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "backbone": (pytest.approx(0.01), 0.01),
        "backbone without decay": (pytest.approx(0.01), 0.0),
        "head": (0.1, 0.01),
        "head without decay": (0.1, 0.0),
    }
    members = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in net.parameters())
    assert all(p.ndim > 1 for n in ("backbone", "head") for p in groups[n]["params"])
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.9


def test_a_frozen_backbone_is_not_optimized() -> None:
    net = module(freeze="backbone")
    assert parameter_groups("backbone", net.network.backbone, 0.1, set()) == []


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "Adamm", "lr": 0.1}, "torch.optim has no such optimizer"),
        ({"name": "Optimizer", "lr": 0.1}, "torch.optim has no such optimizer"),
        ({"name": "lr_scheduler", "lr": 0.1}, "torch.optim has no such optimizer"),
        ({"name": "Adam", "lr": 0.1, "momentum": 0.9}, "momentum"),
        ({"name": "Adam", "lr": 0.1, "betas": [0.9, 1.5]}, "beta"),
    ],
)
def test_a_wrong_optimizer_is_explained(optimizer: dict, message: str) -> None:
    net = module(optimizer=optimizer)
    net._trainer = SimpleNamespace(estimated_stepping_batches=10, gradient_clip_val=None)  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        net.configure_optimizers()


def test_cosine_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    factor = schedule_factor({"name": "cosine", "warmup": 0.1, "final": 0.2}, 100)
    assert [factor(i) for i in range(10)] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert factor(100) == pytest.approx(0.2)
    assert factor(1000) == pytest.approx(0.2)
    assert schedule_factor({"name": "constant"}, 100)(57) == 1.0
    with pytest.raises(UserError, match="there are constant, cosine"):
        schedule_factor({"name": "step"}, 100)


def test_init_from_loads_the_head_only_for_the_same_classes_and_shapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source, path = module(), tmp_path / "source.ckpt"
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": dict(source.hparams)}, path)

    same = LitClassifier(NAMES, backbone="resnet18", image_size=64, weights="IMAGENET1K_V1")
    same.load_weights_from(path)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in source.state_dict().items())
    assert "loaded backbone and head" in caplog.text

    for names, options, reason in (
        (["ant", "bee", "cat"], {}, "its classes differ"),
        (NAMES[::-1], {}, "its classes differ"),
        (["a", "b"], {}, "its classes differ"),
        (NAMES, {"head": {"name": "linear"}}, "its head has other layers"),
    ):
        other = LitClassifier(names, backbone="resnet18", image_size=32, **options)
        head = other.network.head.layers[-1].weight.clone()
        other.load_weights_from(path)
        assert torch.equal(other.network.backbone.conv1.weight, source.network.backbone.conv1.weight)
        assert torch.equal(other.network.head.layers[-1].weight, head)
        assert reason in caplog.records[-1].message

    with pytest.raises(UserError, match="init_from="):
        LitClassifier(NAMES, backbone="resnet34", image_size=32).load_weights_from(path)


@pytest.mark.parametrize("names", [[], ["ant", "bee", "ant"]])
def test_class_names_must_be_present_and_unique(names: list[str]) -> None:
    with pytest.raises(UserError, match="class_names"):
        LitClassifier(names, backbone="resnet18", image_size=32)


def fitted(batch_size: int, **trainer_options: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a frozen-backbone model after an epoch of SGD on 24 images."""
    torch.manual_seed(0)
    data = CIFAR10DataModule(source="shapes", batch_size=batch_size, train_size=34, val_size=10, test_size=10)
    optimizer = trainer_options.pop("optimizer", {"name": "SGD", "lr": 0.1})
    net = LitClassifier(
        data.class_names, "resnet18", image_size=32, freeze="backbone", head={"name": "linear"}, optimizer=optimizer
    )
    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(**options, **quiet, **trainer_options).fit(net, data)
    return net.network.head.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_last_group_of_accumulated_batches_is_a_mean() -> None:
    # a single group of two batches: Lightning alone divides both losses by 8
    accumulated, whole = fitted(12, accumulate_grad_batches=8), fitted(24)
    for name, value in whole.items():
        assert torch.allclose(accumulated[name], value, atol=1e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_gradients_are_clipped_in_every_precision(precision: str, settings: dict[str, Any]) -> None:
    optimizer = {"name": "Adam", "lr": 0.001, **settings}
    weights = fitted(12, precision=precision, gradient_clip_val=1, optimizer=optimizer)
    assert all(value.isfinite().all() for value in weights.values())


def test_a_checkpoint_is_restored_from_its_file_alone(finished_run: Path) -> None:
    restored = restore(finished_run / "checkpoints" / "best.ckpt")
    again = LitClassifier.load_from_checkpoint(finished_run / "checkpoints" / "best.ckpt")
    assert not restored.training
    assert restored.restored_epoch in (0, 1)
    for key, value in again.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key])


def test_files_that_are_no_checkpoint_are_told(finished_run: Path, tmp_path: Path) -> None:
    good = (finished_run / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.ckpt").write_text("a text")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    content = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["colour"] = "red"
    torch.save(content, tmp_path / "newer.ckpt")
    for name, reason in {
        "cut": "is broken",
        "text": "cannot be read safely|is broken or of another kind",
        "other": "is not a checkpoint of this project",
        "newer": "does not fit this version",
        "missing": "there is no such file",
    }.items():
        with pytest.raises(UserError, match=reason):
            restore(tmp_path / f"{name}.ckpt")
