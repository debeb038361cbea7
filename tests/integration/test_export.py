"""Exported files give the checkpoint's own logits on real images, tell where they came from, or are not there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from omegaconf import DictConfig
from PIL import Image

from cifar10_tl import __version__
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import CONFIG_DIR, register_resolvers
from cifar10_tl.config.validation import RULES, check_config
from cifar10_tl.data.shapes import CLASS_NAMES as SHAPE_NAMES
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.export import BATCH_SIZES, FORMATS, compare, comparison_images, export, write_torch_export
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.resize import Resize

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'cifar10_tl[export]'")
NAMES = ["ant", "bee", "wasp", "hornet"]
COUNT = sum(BATCH_SIZES)
#: Each with a head, a kind of resize, and something else that could be lost on the way.
NETWORKS = {
    "linear, smaller": {"head": {"name": "linear"}, "image_size": 24, "interpolation": "bicubic", "stem": "cifar"},
    "dense, equal": {"head": {"name": "dense", "hidden": [16]}, "image_size": 32, "freeze": "backbone"},
    "lstm, larger": {"head": {"name": "lstm", "lstm_size": 12, "hidden": [8], "dropout": 0.5}, "image_size": 64},
    "lstm one way, smaller": {
        "head": {"name": "lstm", "lstm_size": 12, "bidirectional": False, "hidden": []},
        "image_size": 40,
        "native_size": 48,
        "interpolation": "bilinear",
    },
}


def compose_export(*overrides: str) -> DictConfig:
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("export", overrides=list(overrides))
    check_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def pictures(real_images: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real images as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(real_images["x_test"][:COUNT]):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoints(real_images: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a checkpoint of one of the ``NETWORKS``, its BatchNorm used to real images."""
    folder = tmp_path_factory.mktemp("checkpoints")
    images = torch.from_numpy(real_images["x_train"][:64])

    def build(name: str) -> Path:
        path = folder / f"{name}.ckpt"
        if not path.is_file():
            torch.manual_seed(0)
            module = LitClassifier(NAMES, backbone="resnet18", **NETWORKS[name])
            module.network.backbone.frozen = False  # frozen BatchNorm would not get used to anything
            for layer in module.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.momentum = None  # the statistics of what it sees, not a tenth of the way there
            module.train()(enlarged(images, module.hparams["native_size"]))
            content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 3}
            torch.save(content, path)
        return path

    return build


def enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images.float(), size=(size, size), mode="nearest").to(torch.uint8)


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_torch_export(path: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images)


RUNNERS = {"onnx": run_onnx, "torch_export": run_torch_export}


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_gives_the_logits_of_the_checkpoint(
    name: str, format_name: str, checkpoints: Callable, pictures: Path, real_images: dict, tmp_path: Path
) -> None:
    checkpoint, output = checkpoints(name), tmp_path / f"new/model{FORMATS[format_name].suffix}"
    parity = export(
        compose_export(
            f"checkpoint='{checkpoint}'", f"format={format_name}", f"output={output}", f"compare_on={pictures}"
        )
    )
    assert parity.good
    assert parity.largest_difference < 1e-5
    assert parity.agreeing == parity.count == COUNT
    assert files_of(output.parent) == [output.name]

    module = restore(checkpoint)
    images = enlarged(torch.from_numpy(real_images["x_test"][-7:]), module.hparams["native_size"])
    with torch.no_grad():
        expected = module(images)
    assert expected.std(0).min() > 0.01, "images that all get the same logits would prove nothing"
    for count in (1, 7):
        logits = RUNNERS[format_name](output, images[:count])
        assert logits.dtype == torch.float32
        assert logits.shape == (count, len(NAMES))
        assert torch.allclose(logits, expected[:count], atol=1e-5, rtol=0)


def test_an_onnx_file_tells_its_inputs_classes_and_origin(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = finished_run / "checkpoints" / "best.ckpt"
    parity = export(compose_export(f"checkpoint={checkpoint}", f"paths.output_dir={tmp_path}"))
    assert parity.agreeing == COUNT
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", 10])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(SHAPE_NAMES)
    assert (metadata["native_size"], metadata["checkpoint"]) == ("32", str(checkpoint))
    assert metadata["epoch"] == str(restore(checkpoint).restored_epoch)
    assert (metadata["cifar10_tl"], metadata["torch"]) == (__version__, torch.__version__)


def test_a_torch_export_file_tells_its_classes_and_origin(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = finished_run / "checkpoints" / "best.ckpt"
    export(compose_export(f"checkpoint={checkpoint}", "format=torch_export", f"paths.output_dir={tmp_path}"))
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == {
        "class_names": list(SHAPE_NAMES),
        "native_size": 32,
        "checkpoint": str(checkpoint),
        "epoch": restore(checkpoint).restored_epoch,
        "cifar10_tl": __version__,
        "torch": torch.__version__,
    }
    assert program.graph_signature.user_inputs == ("images",)
    assert not program.example_inputs[0][0].any(), "a picture that was compared on would travel in the file"


def test_logits_are_compared_and_a_tie_may_fall_either_way() -> None:
    expected = torch.tensor([[5.0, 1.0, 0.0], [2.0, 2.0005, -1.0], [0.0, 1.0, 3.0]])
    change = torch.tensor([[0.0, 0.0, 0.0], [1e-3, 0.0, 0.0], [0.0, 0.0, 0.0]])
    tied = compare(expected, expected + change)
    assert tied.largest_difference == pytest.approx(1e-3, rel=1e-3)
    assert tied.allowed == pytest.approx(1.5e-3)  # 1e-3, and 1e-4 of the largest logit
    assert (tied.count, tied.agreeing, tied.contradicted, tied.good) == (3, 2, 0, True)
    other = compare(expected, expected.flip(1))
    assert (other.agreeing, other.contradicted, other.good) == (1, 2, False)
    assert not compare(expected, expected + 2 * change).good
    assert not compare(expected, expected * torch.nan).good


# ------------------------------------------------------------------------------------------------- images to compare on


@pytest.mark.parametrize("settings", [{}, {"source": "cifar10", "root": "nowhere"}, {"source": "folder", "root": "no"}])
def test_without_the_training_data_built_in_images_are_compared(
    settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"state_dict": {}, "hyper_parameters": {}, "epoch": 0, "datamodule_hyper_parameters": settings}
    torch.save(content, tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO, "cifar10_tl"):
        images, origin = comparison_images(None, tmp_path / "a.ckpt", 40)
    assert (images.shape, images.dtype, origin) == ((COUNT, 3, 40, 40), torch.uint8, "of the built-in shapes")
    assert f"({settings.get('source', 'unknown')}) is not here; compare_on=FOLDER" in caplog.text


def test_a_folder_that_was_trained_on_is_compared_on_and_nothing_is_written_for_it(
    checkpoints: Callable, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "pets"
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
    for file in sorted(pictures.iterdir())[:5]:  # fewer than are compared: some come twice
        (root / "test" / "cat" / file.name).write_bytes(file.read_bytes())
    content = torch.load(checkpoints("dense, equal"), weights_only=True)
    settings = {"source": "folder", "root": str(root), "cache_dir": str(tmp_path / "cache")}
    torch.save(content | {"datamodule_hyper_parameters": settings}, tmp_path / "pets.ckpt")
    with caplog.at_level(logging.INFO, "cifar10_tl"):
        parity = export(
            compose_export(f"checkpoint={tmp_path}/pets.ckpt", "format=torch_export", f"output={tmp_path}/a.pt2")
        )
    assert parity.agreeing == COUNT
    assert "images of the data it was trained on (folder)" in caplog.text
    assert files_of(tmp_path) == ["a.pt2", "pets", "pets.ckpt"]


# ------------------------------------------------------------------------------------------------------------ mistakes


def refuse(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        export(compose_export(*overrides))
    return str(caught.value)


def test_a_file_that_resizes_otherwise_is_refused_and_the_older_one_stays(
    checkpoints: Callable, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_with_another_resize(network, *rest) -> None:
        network.resize = Resize(32, network.resize.size, "bilinear")
        write_torch_export(network, *rest)

    chosen = FORMATS["torch_export"]._replace(write=write_with_another_resize)
    monkeypatch.setitem(FORMATS, "torch_export", chosen)
    (tmp_path / "model.pt2").write_bytes(b"an older good one")
    overrides = (f"compare_on={pictures}", f"paths.output_dir={tmp_path}")
    error = refuse(f"checkpoint='{checkpoints('lstm, larger')}'", "format=torch_export", *overrides)
    assert "was not written: it gives other logits than the checkpoint; largest difference of a logit" in error
    assert files_of(tmp_path) == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"an older good one"


def test_a_file_of_another_model_is_not_left(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = FORMATS["onnx"]._replace(
        write=lambda network, example, metadata, file: file.write(b"a model"),
        read=lambda file: lambda images: torch.eye(10)[:1].expand(len(images), 10),
    )
    monkeypatch.setitem(FORMATS, "onnx", chosen)
    error = refuse(f"checkpoint={finished_run}/checkpoints/best.ckpt", f"paths.output_dir={tmp_path}")
    assert f"{tmp_path}/model.onnx was not written" in error
    assert files_of(tmp_path) == []


def test_a_network_that_cannot_be_exported_is_told_in_a_line(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_) -> None:
        raise NotImplementedError("no such operator: mirror\nin a graph of\nmany lines")

    monkeypatch.setitem(FORMATS, "torch_export", FORMATS["torch_export"]._replace(write=fail))
    checkpoint = finished_run / "checkpoints" / "best.ckpt"
    error = refuse(f"checkpoint={checkpoint}", "format=torch_export", f"paths.output_dir={tmp_path}")
    assert error == (
        "this network cannot be exported as format=torch_export: NotImplementedError: no such operator: mirror"
    )
    assert files_of(tmp_path) == []


def test_a_checkpoint_that_is_cut_off_or_none_is_told(finished_run: Path, tmp_path: Path) -> None:
    whole = (finished_run / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name in ("cut", "text"):
        assert f"{name}.ckpt" in refuse(f"checkpoint={tmp_path}/{name}.ckpt", f"paths.output_dir={tmp_path}")
    assert files_of(tmp_path) == ["cut.ckpt", "text.ckpt"]


def test_bad_settings_are_told(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={finished_run}/checkpoints/best.ckpt"
    assert refuse() == (
        "checkpoint=null: should be the file of a trained network, such as outputs/runs/<time>/checkpoints/best.ckpt"
    )
    assert "no such file" in refuse("checkpoint=nowhere.ckpt")
    assert refuse(checkpoint, "format=tflite") == "format=tflite: should be one of onnx, torch_export"
    assert "ends in .onnx" in refuse(checkpoint, f"output={finished_run}/checkpoints/best.ckpt")
    (tmp_path / "a.pt2").mkdir()
    assert "a file that ends in .pt2" in refuse(checkpoint, "format=torch_export", f"output={tmp_path}/a.pt2")
    (tmp_path / "broken.png").write_text("no image")
    assert "broken.png" in refuse(checkpoint, f"compare_on={tmp_path}")
    assert "no picture" in refuse(checkpoint, f"compare_on={tmp_path}/a.pt2")
    assert all(RULES["format"](name) is None for name in FORMATS)


def test_a_missing_extra_is_told_before_any_work(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("cifar10_tl.engine.checkpoints.restore", lambda _: pytest.fail("it began to work"))
    error = refuse(f"checkpoint={finished_run}/checkpoints/best.ckpt")
    assert error.startswith("format=onnx needs onnxscript: pip install 'cifar10_tl[export]'")


# ------------------------------------------------------------------------------------------------------------- process


@pytest.mark.slow
def test_the_command_says_what_matters_and_nothing_else(checkpoints: Callable, tmp_path: Path) -> None:
    arguments = [f"checkpoint='{checkpoints('lstm, larger')}'", f"paths.output_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "cifar10_tl.export", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == ["model", "input", "output", "parity"]
    assert len(done.stdout.splitlines()) == 6, done.stdout
    assert files_of(tmp_path / "run") == [".hydra", "export.log", "model.onnx"]
