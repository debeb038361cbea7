"""Export: the model file returns the checkpoint's logits, contains its origin, or is not written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, compose_command, lock, write_png
from PIL import Image

from cifar10_tl import __version__
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.images import PAD_COLOR
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.export import BATCH_SIZES, SUFFIXES, compare, comparison_images, export, write_model
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.resize import Resize

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'cifar10_tl[export]'")
NAMES = ["ant", "bee", "wasp", "hornet"]
COUNT = sum(BATCH_SIZES)
#: Each network has another head and another kind of resize.
NETWORKS = {
    "linear": {
        "head": {"name": "linear"},
        "image_size": [[0, 16], [0.5, 24]],
        "interpolation": "bicubic",
        "stem": "cifar",
    },
    "dense": {
        "head": {"name": "dense", "hidden": [16]},
        "image_size": 40,
        "native_size": 48,
        "fit": "pad",
        "interpolation": "bilinear",
        "freeze": "backbone",
    },
    "lstm": {"head": {"name": "lstm", "lstm_size": 12, "hidden": [8], "dropout": 0.5}, "image_size": 64},
}


def write_checkpoint(path: Path, name: str) -> LitClassifier:
    """Write a checkpoint of one of the ``NETWORKS``, with BatchNorm statistics of images."""
    torch.manual_seed(0)
    module = LitClassifier(NAMES, backbone="resnet10", **NETWORKS[name])
    module.network.backbone.num_frozen = 0  # a frozen BatchNorm would not update its statistics
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    module.train()(draw_shapes(64, seed=1, image_size=module.hparams["native_size"])[0])
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 3}, path)
    return module.eval()


def read_onnx(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    """Return the function and the metadata of an ONNX file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[0]) == ("images", "tensor(uint8)", "N")
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", len(NAMES)])
    metadata = session.get_modelmeta().custom_metadata_map
    texts = ("fit", "checkpoint", "cifar10_tl", "torch")
    return (
        lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        {key: value if key in texts else json.loads(value) for key, value in metadata.items()},
    )


def read_torch_export(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    """Return the function and the metadata of a torch.export file."""
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert program.graph_signature.user_inputs == ("images",)
    assert not program.example_inputs[0][0].any()  # no image of the user is stored in the file
    return torch.no_grad()(program.module()), json.loads(extra["metadata.json"])


READERS = {"onnx": read_onnx, "torch_export": read_torch_export}


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        export(compose_command("export", *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["linear", "dense", "lstm"])
@pytest.mark.parametrize("format_name", SUFFIXES)
def test_file_returns_the_logits_of_the_checkpoint_and_contains_metadata(
    name: str, format_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, checkpoint = write_checkpoint(tmp_path / "a.ckpt", name), f"{tmp_path}/a.ckpt"
    options = (f"checkpoint={checkpoint}", f"format={format_name}", f"paths.output_dir={tmp_path}/new")
    with caplog.at_level("INFO"):
        output = export(compose_command("export", *options))
    assert f"same class for {COUNT} of {COUNT} images" in caplog.text
    assert files_in(tmp_path / "new") == [output.name]
    model, metadata = READERS[format_name](output)
    size, fit = module.hparams["native_size"], module.hparams["fit"]
    origin = {"class_names": NAMES, "native_size": size, "fit": fit, "checkpoint": checkpoint, "epoch": 3}
    assert metadata == {**origin, "cifar10_tl": __version__, "torch": torch.__version__}
    images = draw_shapes(7, seed=2, image_size=size)[0]
    with torch.no_grad():
        expected = module(images)
    assert expected.std(0).min() > 0.01  # equal logits would prove nothing
    for count in (1, 7):
        logits = model(images[:count])
        assert (logits.dtype, logits.shape) == (torch.float32, (count, len(NAMES)))
        assert torch.allclose(logits, expected[:count], atol=1e-5, rtol=0)


def test_logits_match_within_a_tolerance() -> None:
    expected = torch.tensor([[5.0, 1.0, 0.0], [2.0, 2.0005, -1.0], [0.0, 1.0, 3.0]])
    change = torch.tensor([[0.0, 0.0, 0.0], [1e-3, 0.0, 0.0], [0.0, 0.0, 0.0]])
    matches, text = compare(expected, expected + change)
    assert matches
    assert text == "largest difference of a logit 1.0e-03 (tolerance 1.5e-03), same class for 2 of 3 images"
    for other in (expected.flip(1), expected + 2 * change, expected * torch.nan):
        assert not compare(expected, other)[0]


def test_comparison_images_come_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_shapes(5, seed=3)[0]
    write_png(tmp_path / "images" / "z", images)
    found = comparison_images(str(tmp_path / "images"), 32, "crop")
    assert (found.dtype, found.shape) == (torch.uint8, (COUNT, 3, 32, 32))
    assert {tuple(image.flatten().tolist()) for image in found} == {tuple(i.flatten().tolist()) for i in images}
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (64, 32), "white").save(tmp_path / "wide" / "a.png")
    padded = comparison_images(str(tmp_path / "wide"), 32, "pad")[0, 0, :, 0].tolist()
    assert padded == [PAD_COLOR[0]] * 8 + [255] * 16 + [PAD_COLOR[0]] * 8
    lock(monkeypatch, tmp_path / "images" / "z")
    with pytest.raises(UserError, match=r"compare_on=.*images/z"):
        comparison_images(str(tmp_path / "images"), 32, "crop")


def test_files_that_differ_or_fail_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_with_another_resize(network, *rest):
        network.resize = Resize(32, network.resize.size, "bilinear")
        return write_model(network, *rest)

    def fail(*_) -> None:
        raise NotImplementedError("no such operator: mirror\nin a graph of\nmany lines")

    write_checkpoint(tmp_path / "a.ckpt", "linear")
    (tmp_path / "model.pt2").write_bytes(b"older")
    for write, message in (
        (write_with_another_resize, f"{tmp_path}/model.pt2 was not written because its logits differ"),
        (fail, "cannot export this network to .pt2: NotImplementedError: no such operator: mirror"),
    ):
        monkeypatch.setattr("cifar10_tl.export.write_model", write)
        options = (f"checkpoint={tmp_path}/a.ckpt", "format=torch_export", f"paths.output_dir={tmp_path}")
        assert error_of(*options).startswith(message)
    assert files_in(tmp_path) == ["a.ckpt", "model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"older"


def test_invalid_settings_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a.ckpt", "linear")
    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:10000])
    (tmp_path / "a.pt2").mkdir()
    given = f"checkpoint={tmp_path}/a.ckpt"
    assert error_of().startswith("set checkpoint=FILE")
    assert error_of("checkpoint=nowhere.ckpt").startswith("nowhere.ckpt: no such file")
    assert error_of(given, "format=tflite").startswith("format=tflite")
    assert "ends in .onnx" in error_of(given, f"output={tmp_path}/a.ckpt")
    assert "ends in .pt2" in error_of(given, "format=torch_export", f"output={tmp_path}/a.pt2")
    assert "no files" in error_of(given, f"compare_on={tmp_path}/a.pt2")
    assert f"compare_on={tmp_path}: {tmp_path}/a.ckpt: not an image" in error_of(given, f"compare_on={tmp_path}")
    assert "broken.ckpt" in error_of(f"checkpoint={tmp_path}/broken.ckpt", f"paths.output_dir={tmp_path}")
    assert files_in(tmp_path) == ["a.ckpt", "a.pt2", "broken.ckpt"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert error_of(given).startswith("format=onnx: run pip install 'cifar10_tl[export]'")


def test_command_prints_a_summary_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "lstm.ckpt", "lstm")
    command = [sys.executable, "-m", "cifar10_tl.export", "checkpoint=lstm.ckpt", "paths.output_dir=run"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == ["model", "input", "output", "parity"]
    assert len(done.stdout.splitlines()) == 7, done.stdout
    assert files_in(tmp_path / "run") == [".hydra", "export.log", "model.onnx"]
