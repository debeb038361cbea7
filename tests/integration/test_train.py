"""The run as a whole, in this process: what it leaves, that it repeats itself, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import REAL_IMAGES, SMALL, StepLosses, compose_train
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from cifar10_tl.callbacks.metrics_logger import SPEED
from cifar10_tl.config.errors import UserError, explain
from cifar10_tl.config.resume import resumed_config
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.builder import check_batch_size
from cifar10_tl.engine.checkpoints import RunCheckpointIO, find_resumable
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.network import TransferResNet
from cifar10_tl.train import train

Small = Callable[..., DictConfig]
FIGURES = {"inputs_train", "curves"} | {
    f"{kind}_{stage}" for kind in ("confusion_matrix", "correct", "incorrect") for stage in ("val", "test")
}


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


# ------------------------------------------------------------------------------------------------------ the run folder


def test_the_run_folder_holds_everything(finished_run: Path) -> None:
    files = {str(p.relative_to(finished_run)) for p in finished_run.rglob("*") if p.is_file()}
    wanted = {RUN_CONFIG, "metrics.csv", "results.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert files >= wanted | {f"figures/{name}.png" for name in FIGURES}
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.endswith(".tmp")]


def test_results_are_those_of_the_contract(finished_run: Path) -> None:
    results = json.loads((finished_run / "results.json").read_text())
    assert results["test"]["count"] == 100
    assert results["val"]["count"] == 80
    matrix = torch.tensor(results["confusion_matrix"])
    assert matrix.shape == (10, 10)
    assert matrix.sum() == 100
    assert matrix.sum(1).tolist() == [10] * 10
    assert results["test"]["acc"] == pytest.approx(float(matrix.trace()) / 100)
    assert results["epochs"] == 2
    best = max(rows(finished_run), key=lambda row: float(row["val/acc"]))
    assert results["best_epoch"] == int(best["epoch"])
    assert results["val"]["acc"] == float(best["val/acc"])
    assert results["class_names"][0] == "circle"
    assert results["config"]["model"]["backbone"] == "resnet18"
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["seconds"]["fit"] > results["seconds"]["first_step"] > 0
    epochs = [
        (float(row["images_per_second"]) * float(row["seconds"]), float(row["seconds"])) for row in rows(finished_run)
    ]
    images, seconds = (sum(column) for column in zip(*epochs, strict=True))
    assert results["images_per_second"] == pytest.approx(images / seconds, rel=0.01), (
        "of all epochs, not up to the best"
    )


def test_metrics_csv_has_a_row_an_epoch(finished_run: Path) -> None:
    table = rows(finished_run)
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert [row["step"] for row in table] == ["5", "10"]  # 320 training images in batches of 64
    for row in table:
        assert 0 <= float(row["train/acc"]) <= 1
        assert float(row["val/loss"]) > 0


def test_tensorboard_has_the_tags_on_the_epoch_axis(finished_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run), size_guidance={"images": 0})
    events.Reload()
    scalars = {f"{s}/{q}" for s in ("train", "val", "test") for q in ("loss", "acc")}
    assert set(events.Tags()["scalars"]) >= scalars
    table = rows(finished_run)
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] == [
            (int(row["epoch"]), float(row[tag])) for row in table
        ]
    results = json.loads((finished_run / "results.json").read_text())
    assert [(e.step, e.value) for e in events.Scalars("test/acc")] == [
        (results["best_epoch"], pytest.approx(results["test"]["acc"]))
    ]
    assert {name.rsplit("_", 1)[0] + "/" + name.rsplit("_", 1)[1] for name in FIGURES - {"curves"}} <= set(
        events.Tags()["images"]
    )
    png = events.Images("confusion_matrix/test")[-1].encoded_image_string
    with Image.open(io.BytesIO(png)) as logged, Image.open(finished_run / "figures/confusion_matrix_test.png") as file:
        assert logged.tobytes() == file.convert("RGB").tobytes()
    plugins = events.summary_metadata
    assert "custom_scalars__config__" in plugins
    assert "_hparams_/session_start_info" in plugins


def test_a_checkpoint_loads_safely_and_by_itself(finished_run: Path) -> None:
    path = finished_run / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["datamodule_hyper_parameters"]["source"] == "shapes"
    module = LitClassifier.load_from_checkpoint(path).eval()
    assert module.class_names[9] == json.loads((finished_run / "results.json").read_text())["class_names"][9]
    data = CIFAR10DataModule(**content["datamodule_hyper_parameters"])
    data.setup()
    test = data.splits["test"]
    with torch.inference_mode():
        accuracy = (module(test.images).argmax(1) == test.labels).double().mean()
    assert float(accuracy) == json.loads((finished_run / "results.json").read_text())["test"]["acc"]


# ------------------------------------------------------------------------------------------------- the same run again


def test_losses_of_five_steps_repeat(small_cfg: Small) -> None:
    """The golden losses: whoever changes them must mean to."""
    recorded = "+callbacks.losses={_target_: helpers.StepLosses}"
    runs = []
    for run in ("a", "b"):
        StepLosses.seen.clear()
        train(small_cfg("trainer.max_epochs=1", "test=false", "trainer.deterministic=true", recorded, run=run))
        runs.append(list(StepLosses.seen))
    assert runs[0] == runs[1]
    check_golden(runs[0])


def check_golden(losses: list[float]) -> None:
    for step, (loss, (golden, tolerance)) in enumerate(zip(losses, GOLDEN_LOSSES, strict=True)):
        assert loss == pytest.approx(golden, rel=tolerance), f"step {step} of {losses}"


#: Of the five steps above, and how far apart one thread and two were (rounded up): each step amplifies the rounding.
#: Whoever changes data, order, augmentation, network or optimizer sees it here.
GOLDEN_LOSSES = ((2.32348, 1e-5), (2.3035, 1e-3), (2.219, 1e-2), (2.296, 1e-2), (2.148, 2e-2))


def test_a_compiled_network_learns_the_same_and_its_checkpoint_has_the_same_names(
    small_cfg: Small, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are those of torch.compile; only its last stage, a minute in a C++ compiler, is left out."""
    compiled: list[nn.Module] = []

    def compile_graphs(network: nn.Module) -> None:
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager")  # as Module.compile does

    monkeypatch.setattr(TransferResNet, "compile", compile_graphs)
    monkeypatch.setattr("cifar10_tl.engine.hardware.shutil.which", lambda name: f"/usr/bin/{name}")
    StepLosses.seen.clear()
    recorded = "+callbacks.losses={_target_: helpers.StepLosses}"
    results = train(small_cfg("trainer.max_epochs=1", "compile=true", "trainer.deterministic=true", recorded))
    assert len(compiled) == 1
    check_golden(StepLosses.seen)
    assert results is not None
    assert results["test"]["count"] == 100
    assert weights(Path(results["config"]["paths"]["output_dir"])).keys() == weights(finished_run).keys()


def test_images_kept_on_the_device_are_the_same_images(small_cfg: Small) -> None:
    losses = []
    for run, on_device in (("host", "false"), ("device", "true")):
        StepLosses.seen.clear()
        recorded = "+callbacks.losses={_target_: helpers.StepLosses}"
        overrides = ("trainer.max_epochs=1", "trainer.deterministic=true", f"data.on_device={on_device}", recorded)
        train(small_cfg(*overrides, run=run))
        losses.append(list(StepLosses.seen))
    assert losses[0] == losses[1]


def test_another_seed_is_another_run(small_cfg: Small, finished_run: Path) -> None:
    cfg = small_cfg("seed=1", "trainer.max_epochs=1", "test=false", "callbacks=minimal")
    train(cfg)
    assert rows(Path(cfg.paths.output_dir))[0]["train/loss"] != rows(finished_run)[0]["train/loss"]


def test_a_resumed_run_ends_as_the_uninterrupted_one(small_cfg: Small) -> None:
    whole = small_cfg("trainer.max_epochs=3", "model.head.dropout=0.5", "scheduler=constant", run="whole")
    train(whole)
    part = small_cfg("trainer.max_epochs=1", "model.head.dropout=0.5", "scheduler=constant", run="part")
    train(part)
    folder = Path(part.paths.output_dir)
    given = [f"resume={folder}", "trainer.max_epochs=3"]
    train(resumed_config(compose_train(*given), given))

    uninterrupted = Path(whole.paths.output_dir)
    resumed = weights(folder)
    assert all(torch.equal(v, resumed[k]) for k, v in weights(uninterrupted).items())
    timed = SPEED
    for a, b in zip(rows(uninterrupted), rows(folder), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    assert _scalars(folder) == _scalars(uninterrupted)


def _scalars(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("train/loss")]


def test_a_finished_run_resumed_is_only_tested_again(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"  # moved, too: nothing may go to where it was
    shutil.copytree(finished_run, copy)
    files = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    before = json.loads((copy / "results.json").read_text())
    given = [f"resume={copy}"]
    results = train(resumed_config(compose_train(*given), given))
    assert results is not None
    assert results["test"] == before["test"]
    assert results["val"] == before["val"]
    assert results["images_per_second"] == pytest.approx(before["images_per_second"])
    assert results["seconds"]["first_step"] == pytest.approx(before["seconds"]["first_step"])
    assert results["seconds"]["fit"] > sum(float(row["seconds"]) for row in rows(copy)), "that of before counts"
    assert len(rows(copy)) == 2
    given = [f"resume={copy}", "trainer.max_epochs=3"]
    longer = train(resumed_config(compose_train(*given), given))
    assert longer is not None
    assert longer["val"]["acc"] >= before["val"]["acc"], "the best of before is remembered"
    assert len(rows(copy)) == 3
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == files


def test_a_new_run_does_not_touch_the_folder_of_another(finished_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    with pytest.raises(UserError, match=r"a run lies there; go on with it by resume="):
        train(compose_train(*SMALL, f"paths.output_dir={finished_run}"))
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == before


def test_broken_checkpoints_are_not_a_reason_to_start_anew(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    last, best = (copy / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    last.write_bytes(last.read_bytes()[:1000])
    assert find_resumable(copy, RunCheckpointIO())[0] == best
    best.write_bytes(b"")
    with pytest.raises(UserError, match="its checkpoints are broken"):
        find_resumable(copy, RunCheckpointIO())


def test_without_any_validation_the_last_weights_are_tested(small_cfg: Small) -> None:
    results = train(small_cfg("trainer.max_epochs=1", "trainer.max_steps=2"))
    assert results is not None
    assert results["test"]["count"] == 100
    assert results["val"] == {"acc": None, "loss": None, "count": None}


def test_a_single_image_a_step_is_explained(small_cfg: Small) -> None:
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        train(small_cfg("data.batch_size=1", "trainer.max_epochs=1"))
    assert "data.batch_size" in str(explain(caught.value, "train"))


# ------------------------------------------------------------------------------------------------------------- variants


def test_a_frozen_backbone_is_the_same_to_the_last_bit_after_training(small_cfg: Small) -> None:
    cfg = small_cfg("model.freeze=backbone", "trainer.max_epochs=1", "test=false")
    train(cfg)
    import lightning.pytorch as pl

    from cifar10_tl.engine.builder import build_datamodule, build_module

    pl.seed_everything(cfg.seed, verbose=False)
    start = build_module(cfg, build_datamodule(cfg)).state_dict()
    end = weights(Path(cfg.paths.output_dir))
    assert {k for k, v in end.items() if not torch.equal(v, start[k])} == {
        k for k in start if k.startswith("network.head.")
    }


def test_init_from_starts_with_the_weights_of_another_run(small_cfg: Small, finished_run: Path) -> None:
    checkpoint = finished_run / "checkpoints" / "best.ckpt"
    cfg = small_cfg(
        f"init_from={checkpoint}",
        "optimizer.lr=1e-12",
        "model.freeze=backbone",
        "trainer.max_epochs=1",
        "test=false",
        "model.weights=IMAGENET1K_V1",  # must not be fetched: there is nothing left for it to start
    )
    train(cfg)
    end = weights(Path(cfg.paths.output_dir))
    assert all(torch.allclose(v, end[k], atol=1e-6) for k, v in weights(finished_run, "best").items())


@pytest.mark.parametrize("head", ["linear", "lstm"])
def test_other_heads_train(tmp_path: Path, head: str) -> None:
    cfg = compose_train(
        *(override for override in SMALL if "head" not in override),
        f"paths.output_dir={tmp_path}",
        "trainer.max_epochs=1",
        "model.image_size=33",
        f"model/head={head}",
    )
    results = train(cfg)
    assert results is not None
    assert results["test"]["count"] == 100


def test_mixing_and_all_augmentations_train(small_cfg: Small) -> None:
    augment = ("mix=cutmix", "random_erasing=0.3", "color_jitter=0.2")
    results = train(small_cfg(*(f"data.augment.{a}" for a in augment), "trainer.max_epochs=1", "test=false"))
    assert results is not None
    assert "test" not in results


def test_fast_dev_run_writes_nothing(small_cfg: Small) -> None:
    cfg = small_cfg("debug=fast_dev_run")
    assert train(cfg) is None
    left = {p.name for p in Path(cfg.paths.output_dir).rglob("*") if p.is_file()}
    assert left == set()


def test_profile_leaves_a_table(small_cfg: Small) -> None:
    cfg = small_cfg("debug=profile", "trainer.limit_train_batches=2")
    train(cfg)
    tables = list(Path(cfg.paths.output_dir).glob("*profile*"))
    assert tables
    assert "run_training_epoch" in tables[0].read_text()


def test_no_pyplot_figure_and_no_logger_is_left_open(finished_run: Path) -> None:
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_without_a_logger_the_figures_are_still_there(small_cfg: Small) -> None:
    cfg = small_cfg("logger=none", "trainer.max_epochs=1")
    train(cfg)
    run = Path(cfg.paths.output_dir)
    assert {p.stem for p in (run / "figures").iterdir()} == FIGURES
    assert not list(run.glob("events*"))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "near"), [(128, 3, "126 or 129"), (100, 8, "96 or 104"), (2, 4, "4")]
)
def test_a_batch_that_cannot_be_shared_is_told_with_the_nearest_that_can(batch_size, world_size, near) -> None:
    with pytest.raises(UserError, match=f"data.batch_size={batch_size} .* over {world_size}: choose {near}$"):
        check_batch_size(batch_size, world_size)
    check_batch_size(128, 4)


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.slow
def test_a_network_learns_512_real_images_by_heart(real_images, tmp_path: Path) -> None:
    from PIL import Image

    for split, name in (("train", "x_train"), ("test", "x_test")):
        for i, image in enumerate(real_images[name][:1000]):
            folder = tmp_path / "pictures" / split / str(real_images[name.replace("x", "y")][i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")
    enough = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "train/acc", "mode": "max"}
    enough |= {"stopping_threshold": 0.99, "patience": 30, "check_on_train_epoch_end": "true"}
    cfg = compose_train(
        "debug=overfit",
        "data=folder",
        f"data.root={tmp_path / 'pictures'}",
        "data.val_size=100",
        f"data.cache_dir={tmp_path / 'cache'}",
        "model.weights=null",
        "model.image_size=32",
        "optimizer.backbone_lr_scale=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"paths.output_dir={tmp_path / 'run'}",
        f"+callbacks.enough={{{', '.join(f'{k}: {v}' for k, v in enough.items())}}}",
    )
    train(cfg)
    assert max(float(row["train/acc"]) for row in rows(tmp_path / "run")) > 0.99


def test_the_real_images_are_what_their_page_says(real_images) -> None:
    assert real_images["x_train"].shape == (5085, 3, 32, 32)
    assert real_images["x_test"].shape == (1017, 3, 32, 32)
    assert set(real_images["y_test"].tolist()) == set(range(10))
    assert REAL_IMAGES.is_dir()
