from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks.small_fit import small_fit
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import BatchNorm2d
from torch.utils.data import DataLoader

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.feature_cache import tensors_checksum
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.models.lit_classifier import LitClassifier, weighted_targets

NAMES = ["ant", "bee", "wasp"]
IMAGES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.arange(8) % 3, torch.arange(8))


def trainer(**options: Any) -> pl.Trainer:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**defaults, **quiet, **options})


def module(**options: Any) -> LitClassifier:
    torch.manual_seed(0)
    net = LitClassifier(NAMES, **{"backbone": "resnet18", "image_size": 32, **options})
    net.trainer = trainer()
    return net


def test_loss_is_smoothed_cross_entropy_and_the_report_is_plain() -> None:
    net = module(label_smoothing=0.2).train()
    logits = net(IMAGES).detach()  # BatchNorm in training mode does not depend on its running statistics
    loss = net.training_step(BATCH, 0)
    assert torch.allclose(loss, F.cross_entropy(logits, BATCH.targets, label_smoothing=0.2), atol=1e-6)
    net.training_step(BATCH, 1)
    report = net.training_metrics()
    assert report["train/loss"] == pytest.approx(float(F.cross_entropy(logits, BATCH.targets)), abs=1e-5)
    assert report["train/acc"] == pytest.approx(float((logits.argmax(1) == BATCH.targets).float().mean()))
    net.on_train_epoch_start()
    assert net.training_metrics() == {"train/loss": 0.0, "train/acc": 0.0}


WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_change_the_minimized_loss_only_and_not_with_the_number_of_processes(
    smoothing: float, mixed: bool
) -> None:
    net = module(label_smoothing=smoothing).eval()
    logits, targets = net(IMAGES).detach(), BATCH.targets
    if mixed:
        targets = torch.lerp(F.one_hot(targets, 3).float(), F.one_hot(targets.roll(1), 3).float(), 0.25)
    net._class_weights = WEIGHTS
    batch = BATCH._replace(targets=targets)
    loss = net.training_step(batch, 0)
    probabilities = targets if mixed else F.one_hot(targets, 3).float()
    per_image = torch.stack(
        [
            F.cross_entropy(logits, torch.full((8,), c), label_smoothing=smoothing, reduction="none") * WEIGHTS[c]
            for c in range(3)
        ],
        1,
    )
    assert loss.item() == pytest.approx(float((probabilities * per_image).sum() / 8), rel=1e-5)
    if not smoothing:
        summed = F.cross_entropy(logits, targets, weight=WEIGHTS, reduction="sum") / 8
        assert torch.allclose(loss, summed)
    assert net.training_metrics()["train/loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    halves = [net.training_step(batch._replace(images=IMAGES[rank::2], targets=targets[rank::2]), 1) for rank in (0, 1)]
    assert torch.allclose(sum(halves) / 2, loss, rtol=1e-5)


def test_smoothing_does_not_favor_a_small_class() -> None:
    """The loss of an image is lowest at its own smoothed probabilities, whatever the weights."""
    targets = weighted_targets(torch.tensor([0, 2]), WEIGHTS, label_smoothing=0.3)
    assert targets.sum(1).tolist() == pytest.approx([0.5, 4.0])
    expected = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    assert torch.allclose(targets / targets.sum(1, keepdim=True), expected)


@pytest.mark.filterwarnings("ignore")
def test_class_weights_are_those_of_the_data_of_the_fit(tmp_path: Path) -> None:
    class Unequal(CIFAR10DataModule):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            split = self.splits["train"]
            kept = torch.ones(len(split), dtype=torch.bool)
            kept[(split.labels == 1).nonzero().flatten()[1:]] = False  # all but one of class 1
            self.splits["train"] = split.subset(kept.nonzero().flatten())

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
            with torch.no_grad():
                losses = F.cross_entropy(pl_module._logits(batch), batch.targets, reduction="none")
            counts = torch.bincount(trainer.datamodule.splits["train"].labels)
            weights = counts.sum() / len(counts) / counts
            self.weighted = (float(outputs["loss"]), float((weights[batch.targets] * losses).mean()))
            self.plain = (pl_module.running_metrics()["loss"], float(losses.mean()))

    rate_of_zero = {"optimizer": {"name": "SGD", "lr": 1e-12}, "freeze": "backbone", "head": {"name": "linear"}}
    file = tmp_path / "a.ckpt"
    for balance in ("loss", "none"):
        data = Unequal("shapes", batch_size=24, train_size=60, val_size=10, test_size=10, balance=balance)
        net, seen = LitClassifier(data.class_names, backbone="resnet18", image_size=32, **rate_of_zero), Losses()
        used = trainer(callbacks=[seen], max_steps=1)
        used.fit(net, data)
        used.save_checkpoint(file)
        assert seen.plain[0] == pytest.approx(seen.plain[1], rel=1e-5)
        assert seen.weighted[0] == pytest.approx(seen.weighted[1] if balance == "loss" else seen.plain[1], rel=1e-5)
        assert (abs(seen.weighted[0] - seen.plain[0]) > 1e-3) == (balance == "loss")
        assert not [name for name in torch.load(file, weights_only=True)["state_dict"] if "class_weights" in name]


def test_a_batch_with_boxes_trains_on_the_crops() -> None:
    net = module().train()
    boxes = torch.tensor([[4.0, 8.0, 16.0, 20.0]]).expand(8, -1)
    loss = net.training_step(BATCH._replace(boxes=boxes), 0)
    crops = IMAGES[:, :, 4:20, 8:28]
    assert torch.allclose(loss, net.training_step(BATCH._replace(images=crops), 1), atol=1e-5)
    assert abs(loss - net.training_step(BATCH, 2)) > 1e-4


def test_mixed_targets_count_the_larger_fraction() -> None:
    net = module().eval()
    predictions = net(IMAGES).argmax(1)
    fractions = torch.lerp(F.one_hot(predictions, 3).float(), torch.full((8, 3), 1 / 3), 0.5)
    net.training_step(BATCH._replace(targets=fractions), 0)
    assert net.training_metrics()["train/acc"] == 1.0


@pytest.mark.parametrize("head", ["linear", "lstm"])
def test_a_test_keeps_the_features_of_its_images_and_validation_does_not(head: str) -> None:
    net = module(head={"name": head}, stem="cifar").eval()
    net.trainer = trainer(limit_val_batches=2)
    with torch.inference_mode():  # an LSTM computes with other kernels than in training
        logits, pooled, cached = net(IMAGES), net.network.features(IMAGES).mean((2, 3)), net.network.head_input(IMAGES)
    for features in (None, cached):
        batch = BATCH._replace(indices=7 - BATCH.indices, features=features)
        loader = DataLoader([batch, Batch(*(x[:0] for x in batch[:3]))], batch_size=None)
        net.trainer.validate(net, loader, verbose=False)
        assert net.evaluation is not None
        assert net.evaluation.features is None
        net.trainer.test(net, loader, verbose=False)
        assert torch.equal(net.evaluation.features.flip(0), pooled)
        assert torch.equal(net.evaluation.logits.flip(0), logits)


def test_cached_features_of_another_network_are_not_used() -> None:
    used = module().features_description()
    assert module(label_smoothing=0.1, head={"name": "linear"}).features_description() == used
    others = {"image_size": module(image_size=40), "interpolation": module(interpolation="bilinear")}
    others |= {"precision": module(), "weights": module()}
    others["precision"].trainer = trainer(precision="bf16-mixed")
    others["weights"].network.backbone.bn1.running_mean[3] += 1
    for name, other in others.items():
        found = other.features_description()
        assert [key for key in used if found[key] != used[key]] == [name]


@pytest.mark.parametrize("names", [[], ["ant", "bee", "ant"]])
def test_class_names_must_be_present_and_unique(names: list[str]) -> None:
    with pytest.raises(UserError, match="class_names"):
        LitClassifier(names, backbone="resnet18", image_size=32)


def fitted(batch_size: int, net_options: dict[str, Any], ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    """Return the trainer of a frozen-backbone model after an epoch of 24 images."""
    torch.manual_seed(0)
    data = CIFAR10DataModule(source="shapes", batch_size=batch_size, train_size=34, val_size=10, test_size=10)
    small = {"backbone": "resnet18", "image_size": 32, "freeze": "backbone", "head": {"name": "linear"}}
    used = trainer(**options)
    used.fit(LitClassifier(data.class_names, **{**small, **net_options}), data, ckpt_path=ckpt_path, weights_only=True)
    return used


@pytest.mark.filterwarnings("ignore")
def test_last_group_of_accumulated_batches_is_a_mean() -> None:
    # a single group of two batches: Lightning alone divides both losses by 8
    sgd = {"optimizer": {"name": "SGD", "lr": 0.1}}
    runs = fitted(12, sgd, accumulate_grad_batches=8), fitted(24, sgd)
    accumulated, whole = (run.lightning_module.network.head.state_dict() for run in runs)
    for name, value in whole.items():
        assert torch.allclose(accumulated[name], value, atol=1e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "settings", "fused"),
    [("32-true", {}, True), ("bf16-mixed", {}, None), ("bf16-mixed", {"fused": True}, None)],
)
def test_gradients_are_clipped_in_every_precision(precision: Any, settings: dict[str, Any], fused: bool | None) -> None:
    adam = {"optimizer": {"name": "Adam", "lr": 0.001, **settings}}
    run = fitted(12, adam, precision=precision, gradient_clip_val=1)
    assert run.optimizers[0].defaults["fused"] == fused
    assert all(value.isfinite().all() for value in run.lightning_module.state_dict().values())


def test_optimizers_are_not_fused_in_fp16() -> None:
    """Fused SGD keeps uninitialized memory as momentum if the scaler skips the first step."""
    net = module()
    for precision, fused in (("16-mixed", None), ("bf16-mixed", True)):
        plugin = MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu") if fused is None else None)
        net.trainer = SimpleNamespace(precision_plugin=plugin, gradient_clip_val=None)
        net.hparams["scheduler"] = {"name": "constant"}
        assert net.configure_optimizers().defaults["fused"] is fused


@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_of_a_gpu_continues_on_a_cpu(tmp_path: Path) -> None:
    """On a GPU, weights and moments of convolutions are in channels_last memory format."""
    path, options = tmp_path / "a.ckpt", {"freeze": "none", "optimizer": {"name": "Adam", "lr": 0.01}}
    whole, resumed = Recorder(path), Recorder()
    fitted(8, options, callbacks=[whole])
    content = torch.load(path, weights_only=True)
    for state in content["optimizer_states"][0]["state"].values():
        for name, value in state.items():
            state[name] = value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
    torch.save(content, path)
    fitted(8, options, ckpt_path=path, callbacks=[resumed])
    assert resumed.backbones == whole.backbones[1:]


class Recorder(Callback):
    """Callback that records the images and weights of each step, and saves a checkpoint after a step of a run."""

    def __init__(self, path: Path | None = None, step: int = 1) -> None:
        self.path, self.step, self.seen, self.backbones, self.heads, self.sizes = path, step, [], [], [], []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.network.backbone.register_forward_pre_hook(
            lambda backbone, inputs: self.sizes.append((pl_module.training, inputs[0].shape[-1]))
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen.append(batch.indices.tolist())
        self.backbones.append(tensors_checksum(pl_module.network.backbone.state_dict()))
        self.heads.append(tensors_checksum(pl_module.network.head.state_dict()))
        if self.path and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_epoch_continues_with_its_next_batch_despite_lightning_issue_20550(tmp_path: Path) -> None:
    """A schedule reads estimated_stepping_batches, after which Lightning alone starts the epoch with its first batch.

    See https://github.com/Lightning-AI/pytorch-lightning/issues/20550. ``LitClassifier.on_train_start`` works around it
    by a private method of Lightning. If a new version renames the method, or fixes the issue, look there.
    """
    whole, resumed, options = Recorder(tmp_path / "a.ckpt"), Recorder(), {"scheduler": {"name": "cosine"}}
    fitted(8, options, callbacks=[whole])
    fitted(8, options, ckpt_path=tmp_path / "a.ckpt", callbacks=[resumed])
    assert len(whole.seen) == 3
    assert resumed.seen == whole.seen[1:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 6, 7])
def test_training_images_grow_also_in_a_resumed_run(tmp_path: Path, step: int) -> None:
    """Two steps per epoch; resumed within the first phase, between the others and within the last."""
    sizes: Any = [[0, 16], [0.3, 24], [0.7, 32]]  # from epochs 0, 1.2 and 2.8 of four
    options: dict[str, Any] = {"freeze": "none", "stem": "cifar", "image_size": sizes}
    fit: dict[str, Any] = {"max_epochs": 4, "limit_val_batches": 1}
    whole, resumed = Recorder(tmp_path / "a.ckpt", step), Recorder()
    fitted(12, options, callbacks=[whole], **fit)
    fitted(12, options, ckpt_path=tmp_path / "a.ckpt", callbacks=[resumed], **fit)
    epochs = [[(True, size), (True, size), (False, 32)] for size in (16, 24, 24, 32)]
    assert whole.sizes == [entry for epoch in epochs for entry in epoch]
    assert resumed.backbones == whole.backbones[step:]
    assert resumed.heads == whole.heads[step:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_the_backbone_waits_for_the_head_also_in_a_resumed_run(tmp_path: Path, step: int, scheduler: str) -> None:
    """Three steps per epoch; resumed within the first epoch, at its end and within the second."""
    options: dict[str, Any] = {"freeze": "none", "scheduler": {"name": scheduler, "head_only_epochs": 1}}
    whole, resumed = Recorder(tmp_path / "a.ckpt", step), Recorder()
    run = fitted(8, options, max_epochs=2, callbacks=[whole])
    fitted(8, options, max_epochs=2, ckpt_path=tmp_path / "a.ckpt", callbacks=[resumed])
    assert len(set(whole.backbones[:3])) == 1
    assert len(set(whole.backbones)) == 4
    assert len(set(whole.heads)) == 6
    assert resumed.backbones == whole.backbones[step:]
    assert resumed.heads == whole.heads[step:]
    backbone = run.lightning_module.network.backbone
    assert all(module.training for module in backbone.modules())
    assert {int(layer.num_batches_tracked) for layer in backbone.modules() if isinstance(layer, BatchNorm2d)} == {3}


def test_the_backbone_waits_for_an_epoch_of_accumulated_batches() -> None:
    """Three batches and two optimizer steps per epoch."""
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    options: dict[str, Any] = {"freeze": "none", "scheduler": {"name": "constant", "head_only_epochs": 1}}
    run = fitted(8, options, max_epochs=2, accumulate_grad_batches=2, callbacks=[Rates()])
    assert rates == [0, 0, *[run.optimizers[0].param_groups[0]["initial_lr"]] * 2]
    assert rates[-1] > 0


def test_a_checkpoint_is_restored_from_its_file_alone(tmp_path: Path) -> None:
    net, path = module(head={"name": "linear"}), tmp_path / "a.ckpt"
    content = {"state_dict": net.state_dict(), "hyper_parameters": dict(net.hparams), "epoch": 3}
    torch.save({**content, "pytorch-lightning_version": pl.__version__}, path)
    restored = restore(path)
    assert not restored.training
    assert restored.restored_epoch == 3
    for key, value in LitClassifier.load_from_checkpoint(path).state_dict().items():
        assert torch.equal(value, restored.state_dict()[key])
        assert torch.equal(value, net.state_dict()[key])

    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    torch.save({**content, "hyper_parameters": {**net.hparams, "color": "red"}}, tmp_path / "newer.ckpt")
    for name, reason in {
        "other": "is not a checkpoint of this project",
        "newer": "does not fit this version",
        "missing": "no such file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.ckpt.*{reason}"):
            restore(tmp_path / f"{name}.ckpt")


def test_the_last_complete_epoch_is_validated_before_max_steps_end_the_run(tmp_path: Path) -> None:
    class Validations(Callback):
        epochs: ClassVar[list[int]] = []

        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.epochs.append(trainer.current_epoch)

    limits = {"max_epochs": -1, "max_steps": 8, "check_val_every_n_epoch": 4, "num_sanity_val_steps": 0}
    small_fit(tmp_path, Validations(), **limits)  # three steps per epoch
    assert Validations.epochs == [1]


def test_the_scheduler_of_a_subclass_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def configure_optimizers(self: LitClassifier) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    monkeypatch.setattr(LitClassifier, "configure_optimizers", configure_optimizers)
    trainer, _ = small_fit(tmp_path, max_epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(("options", "name"), [({"native_size": 40}, "native_size"), ({"fit": "crop"}, "fit")])
def test_predictions_resize_images_as_the_data_module_does(options: dict[str, Any], name: str) -> None:
    data = SimpleNamespace(source=SimpleNamespace(native_size=32, fit="squeeze"))
    net = LitClassifier(["a", "b"], backbone="resnet18", image_size=32, **options)
    net._trainer = SimpleNamespace(datamodule=data, state=SimpleNamespace(fn="fit"))
    with pytest.raises(UserError, match=rf"LitClassifier\({name}={options[name]!r}\): the data module has {name}="):
        net.setup("fit")


def test_loaders_without_their_data_module_are_refused() -> None:
    """They would be neither augmented nor divided over the processes."""
    data = CIFAR10DataModule(source="shapes", train_size=40, test_size=10, val_size=10, batch_size=10)
    data.setup()
    with pytest.raises(UserError, match="pass the data module to fit"):
        trainer().fit(module(), data.train_dataloader())
