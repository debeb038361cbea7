from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Watcher, compose_train
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.builder import (
    STEP_HOOKS,
    build_datamodule,
    build_loggers,
    build_module,
    build_trainer,
    check_batch_size,
    describe,
    next_epoch,
    seen_splits,
    skip_idle_hooks,
    speed_up,
)
from cifar10_tl.models.lit_classifier import LitClassifier


@pytest.mark.parametrize(
    ("module", "called"),
    [("helpers", list(STEP_HOOKS)), ("cifar10_tl.callbacks", ["on_after_backward", "on_train_batch_end"])],
    ids=["other", "ours"],
)
def test_only_idle_step_hooks_of_our_callbacks_are_skipped(
    module: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watcher, "__module__", module)
    watcher = Watcher()
    skip_idle_hooks(watcher)
    assert [name for name in STEP_HOOKS if callable(getattr(watcher, name))] == called


@pytest.mark.parametrize(
    ("batch_size", "world_size", "nearest"), [(128, 3, "126 or 129"), (100, 8, "96 or 104"), (2, 4, "4")]
)
def test_indivisible_batch_is_refused(batch_size: int, world_size: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size={batch_size}.*{world_size}.* {nearest}$"):
        check_batch_size(batch_size, world_size)
    check_batch_size(128, 4)


def test_tensorboard_discards_epochs_after_the_checkpoint(small_cfg: Callable[..., DictConfig]) -> None:
    first_epoch = next_epoch({"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 2}}}}})
    assert build_loggers(small_cfg(), first_epoch)[0]._kwargs["purge_step"] == 2


def test_the_header_of_a_run_says_what_is_trained_on_what(
    small_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def header(*overrides: str) -> str:
        cfg = small_cfg("model.head.hidden=[]", *overrides)
        datamodule = build_datamodule(cfg)
        datamodule.setup()
        module = build_module(cfg, datamodule)
        strategy: Any = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(datamodule=datamodule, world_size=2, max_epochs=7, precision="x", strategy=strategy)
        return describe(cfg, trainer, module)

    monkeypatch.setattr("cifar10_tl.engine.builder.device_name", lambda device: f"fast {device.type}")
    backbone, head = 4_905_792, 5_130  # of torchvision's ResNet without fc; 512 x 10 + 10
    total = backbone + head
    assert header().splitlines() == [
        "",
        "  data         shapes: 320 train, 80 val, 100 test images of 10 classes",
        f"  network      resnet10, random weights, 32 px, dense head: {total:,} trainable and 0 frozen parameters",
        "  training     epochs: 7, 64 images per step, Adam, lr 0.001",
        "  device       2 x fast cpu, x",
    ]
    other = header("model.freeze=backbone", "model.image_size=[[0,32],[0.5,48]]", "budget=10min", "optimizer=sgd")
    assert f"32 -> 48 px, dense head: {head:,} trainable and {backbone:,} frozen parameters" in other
    assert "as many epochs as fit in 10min, 64 images per step, SGD, lr 0.01" in other


@pytest.mark.parametrize(
    ("before", "now", "seen"),
    [
        ({}, {}, []),
        ({}, {"split_seed": 1}, ["val"]),
        ({}, {"val_size": 40}, ["val"]),
        ({"image_limit": 30}, {}, []),
        ({"image_limit": 30}, {"split_seed": 1}, ["val"]),
        ({"drawing_seed": 3}, {"split_seed": 1}, []),
    ],
)
def test_images_that_initial_weights_were_trained_on_are_noticed(
    before: dict[str, int], now: dict[str, int], seen: list[str], tmp_path: Path
) -> None:
    first, second = (
        CIFAR10DataModule(source="shapes", train_size=100, test_size=20, **{"val_size": 20, **options})
        for options in (before, now)
    )
    for data in (first, second):
        data.setup()
    content = {"datamodule_hyper_parameters": dict(first.hparams), "CIFAR10DataModule": first.state_dict()}
    torch.save({"state_dict": {}, "hyper_parameters": {}, **content}, tmp_path / "a.ckpt")
    assert seen_splits(tmp_path / "a.ckpt", second) == seen


def test_validation_and_test_have_the_same_grad_mode(small_cfg: Callable[..., DictConfig]) -> None:
    trainer = build_trainer(small_cfg())
    assert not trainer.test_loop.inference_mode, "else the test would compile graphs of its own"
    assert not trainer.fit_loop.epoch_loop.val_loop.inference_mode


@torch._dynamo.config.patch(recompile_limit=3)  # one graph of training, two of evaluation
def test_network_is_compiled_once_per_training_size(
    small_cfg: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        compiled.append([x for x in inputs if not isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("cifar10_tl.engine.hardware.shutil.which", lambda name: f"/usr/bin/{name}")
    torch.compiler.reset()
    sizes = [[0, 16], [0.2, 20], [0.4, 24], [0.6, 32]]
    module = LitClassifier(["a", "b"], "resnet18", image_size=sizes, stem="cifar")
    module.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False)
    speed_up(small_cfg("compile=true"), module, trainer)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for i, (_, size) in enumerate(sizes):
        module.network.training_size = size
        for _ in range(2):
            module.train()(images)
        assert len(compiled) == i + 1 + 2 * (i > 0)
        for trainer.testing in (False, True):  # validation and test share their graphs
            for num_images in (4, 3):
                batch = Batch(images[:num_images], torch.zeros(num_images).long(), torch.arange(num_images))
                module.eval().validation_step(batch, 0)
        logits, *_, features = module._eval_outputs[-1]
        expected = module.network._call_impl(images[:3], with_features=True)
        assert torch.equal(logits, expected[0])
        assert torch.equal(features, expected[1])
    assert not any(compiled)  # no graph takes a size that varies


def test_training_on_cached_features_is_not_compiled(small_cfg: Callable[..., DictConfig]) -> None:
    module = LitClassifier(["a", "b"], "resnet10", image_size=32)
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    cached = ("data.cache_features=true", "model.freeze=backbone", "data.augment.random_crop_padding=0")
    speed_up(small_cfg("compile=true", *cached), module, trainer)
    assert module.network._compiled_call_impl is None


def test_double_precision_is_set_before_a_checkpoint_is_restored(small_cfg: Callable[..., DictConfig]) -> None:
    module = LitClassifier(["a", "b"], "resnet18", image_size=32)
    module.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, precision="64-true")
    speed_up(small_cfg("compile=false"), module, trainer)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


SLURM = {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID", "JOB_ID")}


@pytest.mark.parametrize(
    ("variables", "devices", "started"),
    [
        ({**SLURM, "SLURM_NTASKS": "1"}, 2, 1),
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_TASKS": "4"}, 1, 4),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, 1, 2),
    ],
)
def test_each_device_needs_one_process(
    variables: dict[str, str], devices: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise devices are idle, or each process trains alone in the same folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = "trainer=ddp_cpu" if devices > 1 else "trainer.accelerator=cpu"
    message = rf"devices={devices}, trainer.num_nodes=1: {started} processes were started instead of {devices};"
    with pytest.raises(UserError, match=message):
        build_trainer(compose_train(trainer, f"trainer.devices={devices}"))
