"""Whole training runs: what they write, that they repeat, and what resuming a finished run does."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import SMALL, TINY, StepLosses, compose_train, resume, rows, saved_step
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.models import resnet18

from cifar10_tl.config.errors import UserError, explain
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.results import read_results
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.network import TransferResNet
from cifar10_tl.train import own_wandb_run, train

Small = Callable[..., DictConfig]
FIGURES = {"inputs_train", "curves"} | {
    f"{kind}_{stage}" for kind in ("confusion_matrix", "correct", "incorrect") for stage in ("val", "test")
}
#: Without figures, logger and report.
PLAIN = ("callbacks=minimal", "logger=none", "report=none")
#: One epoch of three steps.
QUICK = (*TINY, *PLAIN, "data.train_size=80", "data.batch_size=16", "trainer.max_epochs=1")
EARLY_STOPPING = "_target_: lightning.pytorch.callbacks.EarlyStopping"


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def read_events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"images": 0}).Reload()


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- the run folder


def test_run_folder_is_complete(finished_run: Path) -> None:
    files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    expected = {RUN_CONFIG, "metrics.csv", "results.json", "predictions.csv", "report.html"}
    expected |= {"checkpoints/best.ckpt", "checkpoints/last.ckpt", *(f"figures/{name}.png" for name in FIGURES)}
    assert files >= expected
    assert not [name for name in files if name.endswith(".tmp")]


def test_results_agree_with_metrics_csv(finished_run: Path) -> None:
    results, table = read_results(finished_run), rows(finished_run)
    assert [(row["epoch"], row["step"]) for row in table] == [("0", "5"), ("1", "10")]  # 320 images, batches of 64
    assert all(0 <= float(row["train/acc"]) <= 1 and float(row["val/loss"]) > 0 for row in table)
    assert (results["test"]["count"], results["val"]["count"], results["epochs"]) == (100, 80, 2)
    matrix = torch.tensor(results["confusion_matrix"])
    assert matrix.sum(1).tolist() == [10] * 10
    assert results["test"]["acc"] == pytest.approx(float(matrix.trace()) / 100)
    best = max(table, key=lambda row: float(row["val/acc"]))
    assert (results["best_epoch"], results["val"]["acc"]) == (int(best["epoch"]), float(best["val/acc"]))
    assert results["class_names"][0] == "circle"
    same = {name: float(best[f"val/{name}"]) for name in ("loss", "acc", "balanced_acc", "macro_f1", "count")}
    assert results["val"] == same
    assert results["test"]["balanced_acc"] == pytest.approx(results["test"]["acc"]), "classes of equal size"
    assert results["config"]["model"]["backbone"] == "resnet10"
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["seconds"]["fit"] > results["seconds"]["first_step"] > 0
    seconds = [float(row["seconds"]) for row in table]
    images = sum(float(row["images_per_second"]) * s for row, s in zip(table, seconds, strict=True))
    assert results["images_per_second"] == pytest.approx(images / sum(seconds), rel=0.01), "mean over all epochs"


def test_tensorboard_agrees_with_metrics_csv(finished_run: Path) -> None:
    events, results = read_events(finished_run), read_results(finished_run)
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "val/balanced_acc", "val/macro_f1"):
        expected = [(int(row["epoch"]), pytest.approx(float(row[tag]))) for row in rows(finished_run)]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    for tag in ("test/acc", "test/loss", "test/balanced_acc", "test/macro_f1"):
        expected = [(results["best_epoch"], pytest.approx(results["test"][tag[5:]]))]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    assert {"/".join(name.rsplit("_", 1)) for name in FIGURES - {"curves"}} <= set(events.Tags()["images"])
    png = events.Images("confusion_matrix/test")[-1].encoded_image_string
    with Image.open(io.BytesIO(png)) as logged, Image.open(finished_run / "figures/confusion_matrix_test.png") as file:
        assert logged.tobytes() == file.convert("RGB").tobytes()
    assert "custom_scalars__config__" in events.summary_metadata


def test_settings_are_in_hparams_yaml(finished_run: Path) -> None:
    assert len(list(finished_run.rglob("events.out.tfevents*"))) == 1, "one event file per start of a run"
    settings = yaml.safe_load((finished_run / "hparams.yaml").read_text())
    assert (settings["optimizer.lr"], settings["model.backbone"], settings["seed"]) == (0.001, "resnet10", 0)


def test_checkpoint_loads_without_the_run(finished_run: Path) -> None:
    path, results = finished_run / "checkpoints" / "best.ckpt", read_results(finished_run)
    content = torch.load(path, weights_only=True)
    assert content["datamodule_hyper_parameters"]["source"] == "shapes"
    module = LitClassifier.load_from_checkpoint(path).eval()
    assert list(module.class_names) == results["class_names"]
    data = CIFAR10DataModule(**content["datamodule_hyper_parameters"])
    data.setup()
    test = data.splits["test"]
    with torch.inference_mode():
        accuracy = (module(test.images).argmax(1) == test.labels).double().mean()
    assert float(accuracy) == results["test"]["acc"]


@pytest.mark.parametrize("ema_decay", ["null", "0.9"])
def test_a_fit_starts_from_the_weights_of_a_file(small_cfg: Small, tmp_path: Path, ema_decay: str) -> None:
    state = Backbone("resnet10").state_dict()
    expected = {name: value if value.ndim > 1 else value + 1 for name, value in state.items()}
    torch.save(expected, tmp_path / "weights.pth")
    options = ("model.freeze=backbone", f"model.weights={tmp_path / 'weights.pth'}", f"ema_decay={ema_decay}")
    train(small_cfg(*QUICK, *options, "test=false"))
    found = weights(tmp_path / "run")
    for name, value in expected.items():
        assert torch.equal(found[f"network.backbone.{name}"], value), name


def test_new_run_does_not_touch_an_existing_run(finished_run: Path) -> None:
    before = modified(finished_run)
    with pytest.raises(UserError, match="resume="):
        train(compose_train(*SMALL, f"paths.output_dir={finished_run}"))
    assert modified(finished_run) == before


# ------------------------------------------------------------------------------------------------ resuming an ended run


def test_finished_run_keeps_its_results_and_is_read_once(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    reads: Counter[str] = Counter()
    load = torch.load

    def count(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("mmap"):  # which does not read tensors
            reads[Path(getattr(path, "name", path)).name] += 1
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", count)
    before, files = read_results(finished_run), modified(finished_run)
    run = shutil.copytree(finished_run, tmp_path / "moved")
    results = resume(run)
    assert modified(finished_run) == files, "the original folder should not be touched"
    for key in ("test", "val", "best_epoch", "epochs", "confusion_matrix", "images_per_second"):
        assert results[key] == read_results(run)[key] == before[key], key
    assert rows(run) == rows(finished_run)
    assert caplog.text.count("nothing left to train") == 1
    assert f"report       {run / 'report.html'}" in caplog.text
    assert reads == {"last.ckpt": 1}
    events = read_events(run)
    counts = {"test/acc": 1, "test/loss": 1, "train/loss": 2, "images/s": 2, "train/loss_step": 10, "lr/head": 10}
    assert {tag: len(events.Scalars(tag)) for tag in counts} == counts
    assert len(list(run.glob("events.out.tfevents*"))) == 2, "one event file per start of the run"


def test_finished_run_gets_the_report_that_it_lacks(finished_run: Path, tmp_path: Path) -> None:
    before, run = read_results(finished_run), shutil.copytree(finished_run, tmp_path / "moved")
    (run / "report.html").unlink()  # killed between results.json and report.html
    resume(run)
    after = read_results(run)
    assert "Most frequent confusions" in (run / "report.html").read_text()
    for key in ("test", "val", "best_epoch", "epochs", "confusion_matrix", "images_per_second"):
        assert after[key] == before[key], key
    assert read_events(run).Scalars("test/acc")[0].value == pytest.approx(before["test"]["acc"])


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((f"+callbacks.stop={{{EARLY_STOPPING}, monitor: val/loss, stopping_threshold: 1000}}",), [3]),
        (("trainer.max_time='00:00:00:01'", "+callbacks.slow={_target_: helpers.SlowStep}"), range(1, 60)),
        (("trainer.max_steps=2",), [2]),
    ],
    ids=["early stopping", "max_time", "max_steps"],
)
def test_ended_run_is_not_trained_further(
    overrides: tuple[str, ...], steps: Sequence[int], small_cfg: Small, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cfg = small_cfg(*QUICK, "trainer.max_epochs=20", *overrides)
    run = Path(cfg.paths.output_dir)
    before = train(cfg)
    assert before is not None
    step, state = saved_step(run), weights(run)
    assert step in steps
    assert len(steps) > 1 or (before["val"]["count"] is None) == (step < 3), "an incomplete epoch is not validated"
    (run / "results.json").unlink()
    caplog.clear()
    after = resume(run)
    assert caplog.text.count("nothing left to train") == 1
    assert after["seconds"]["fit"] > after["seconds"]["first_step"] == before["seconds"]["first_step"]
    assert saved_step(run) == step
    assert all(torch.equal(value, state[name]) for name, value in weights(run).items())
    assert after["test"] == read_results(run)["test"] == before["test"]


# -------------------------------------------------------------------------------------------------------- repeated runs


#: Losses of the first five steps, and tolerances: one and two threads differ by up to 2e-4 after the second step.
GOLDEN_LOSSES = ((2.37358, 1e-5), (2.3289, 1e-3), (2.2248, 2e-3), (2.2615, 5e-3), (2.2508, 5e-3))


def step_losses(run: Path, *overrides: str) -> list[float]:
    StepLosses.seen.clear()
    quick = ("callbacks.best_checkpoint=null", "trainer.max_epochs=1", "trainer.limit_val_batches=1", "test=false")
    recorded = ("+callbacks.losses={_target_: helpers.StepLosses}", "trainer.deterministic=true")
    train(compose_train(*SMALL, *PLAIN, *quick, *recorded, f"paths.output_dir={run}", *overrides))
    return list(StepLosses.seen)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return step_losses(tmp_path_factory.mktemp("losses"))


def assert_golden(losses: list[float]) -> None:
    assert len(losses) == 5
    for step, (loss, (golden, tolerance)) in enumerate(zip(losses, GOLDEN_LOSSES, strict=True)):
        assert loss == pytest.approx(golden, rel=tolerance), f"step {step} of {losses}"


def test_losses_are_the_recorded_ones(losses: list[float]) -> None:
    """A change of data, order, augmentation, network or optimizer fails here."""
    assert_golden(losses)


def test_losses_repeat_with_images_on_the_device_and_depend_on_the_seed(losses: list[float], tmp_path: Path) -> None:
    two = "trainer.limit_train_batches=2"
    assert step_losses(tmp_path / "device", "data.on_device=true", two) == losses[:2]
    assert step_losses(tmp_path / "seed", "seed=1", two)[0] != losses[0]


@pytest.mark.slow
def test_compiled_network_trains_the_same(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend aot_eager skips the C++ compiler, which takes a minute."""
    compiled: list[nn.Module] = []

    def compile_graphs(network: nn.Module, dynamic: bool | None) -> None:
        assert dynamic is None
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager")  # as Module.compile does

    monkeypatch.setattr(TransferResNet, "compile", compile_graphs)
    monkeypatch.setattr("cifar10_tl.engine.hardware.shutil.which", lambda name: f"/usr/bin/{name}")
    assert_golden(step_losses(tmp_path, "compile=true"))
    assert len(compiled) == 1
    assert weights(tmp_path).keys() == weights(finished_run).keys()


# ------------------------------------------------------------------------------------------------------------- variants


def test_frozen_backbone_keeps_the_weights_of_another_run(small_cfg: Small, finished_run: Path) -> None:
    init = [f"init_from={finished_run / 'checkpoints' / 'best.ckpt'}", "model.weights=IMAGENET1K_V1"]  # not downloaded
    cfg = small_cfg(*QUICK, *init, "model.freeze=backbone", "optimizer.lr=1e-5", "test=false")
    train(cfg)
    start, end = weights(finished_run, "best"), weights(Path(cfg.paths.output_dir))
    assert all(torch.allclose(value, start[name], atol=1e-4) for name, value in end.items())
    changed = {name for name, value in end.items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if name.startswith("network.head.")}


def test_a_resumed_run_needs_no_pretrained_weights(small_cfg: Small, tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "trunk.pth")
    cfg = small_cfg(*QUICK, "model.backbone=resnet18", f"model.weights={tmp_path / 'trunk.pth'}", "test=false")
    train(cfg)
    (tmp_path / "trunk.pth").unlink()
    resume(Path(cfg.paths.output_dir), "trainer.max_epochs=2")
    assert len(rows(Path(cfg.paths.output_dir))) == 2


@pytest.mark.parametrize(("head", "mix"), [("linear", "cutmix"), ("lstm", "mixup")])
def test_other_heads_train_with_all_augmentations(tmp_path: Path, head: str, mix: str) -> None:
    small = (override for override in (*SMALL, *QUICK) if "head" not in override)
    augment = (f"mix={mix}", "random_erasing=0.3", "color_jitter=0.2", "trivial_augment=true", "cutout=8")
    augment = (*augment, "random_resized_crop=[0.5,1]")
    overrides = (f"model/head={head}", "model.image_size=33", *(f"data.augment.{option}" for option in augment))
    results = train(compose_train(*small, *overrides, f"paths.output_dir={tmp_path}"))
    assert results is not None
    assert results["test"]["count"] == 32


def test_batch_of_one_image_is_explained(small_cfg: Small) -> None:
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        train(small_cfg(*QUICK, "data.batch_size=1"))
    assert "data.batch_size" in str(explain(caught.value, "train"))


def test_fast_dev_run_writes_nothing(small_cfg: Small) -> None:
    cfg = small_cfg(*TINY, "debug=fast_dev_run", "callbacks.last_checkpoint.every_n_epochs=2")
    assert train(cfg) is None
    assert not [path for path in Path(cfg.paths.output_dir).rglob("*") if path.is_file()]


def test_profile_and_figures_are_written_without_a_logger(small_cfg: Small, caplog: pytest.LogCaptureFixture) -> None:
    import matplotlib.pyplot as plt

    caplog.set_level("INFO")
    once = ("trainer.max_epochs=1", "test=true")
    cfg = small_cfg(*TINY, "data.batch_size=8", "data.train_size=112", "logger=none", "debug=profile", *once)
    train(cfg)
    run = Path(cfg.paths.output_dir)
    assert {path.stem for path in (run / "figures").iterdir()} == FIGURES
    assert plt.get_fignums() == []
    assert not list(run.glob("events*"))
    assert "aten::convolution" in (run / "fit-profile.txt").read_text()
    (trace,) = run.glob("*training_step*.json")
    assert f"trace        {trace}" in caplog.text
    names = Counter(event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event)
    assert sum(names[name] for name in names if name.endswith("run_training_batch")) >= 2
    assert names["aten::convolution"] >= 3 * 12, "three steps of ResNet10"


@pytest.mark.slow
def test_network_can_overfit(small_cfg: Small) -> None:
    unsaved = ("callbacks.best_checkpoint=null", "callbacks.last_checkpoint=null", "trainer.check_val_every_n_epoch=30")
    cfg = small_cfg(*PLAIN, *unsaved, "debug=overfit", "data.image_limit=128", "trainer.max_epochs=30")
    train(cfg)
    assert max(float(row["train/acc"]) for row in rows(Path(cfg.paths.output_dir))) > 0.99


def test_a_wandb_run_ends_with_the_job_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    wandb = SimpleNamespace(run=None, finish=lambda exit_code: statuses.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def fail() -> None:
        wandb.run = "ours"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), own_wandb_run():
        fail()
    with own_wandb_run():
        assert wandb.run, "of the caller, as it was running before"
    wandb.run = None
    with own_wandb_run():
        wandb.run = "ours"
    assert statuses == [1, 0]
