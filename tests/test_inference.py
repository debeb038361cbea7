from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_png
from PIL import Image

from cifar10_tl import load_classifier
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.images import decode_image
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.inference import Classifier, Prediction
from cifar10_tl.models.lit_classifier import LitClassifier

IMAGES = draw_shapes(10, seed=5, image_size=32)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = LitClassifier(["ant", "bee", "wasp"], "resnet18", image_size=32)
    path = tmp_path_factory.mktemp("checkpoints") / "a.ckpt"
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": dict(net.hparams), "epoch": 0}, path)
    return path


@pytest.fixture(scope="module")
def classify(checkpoint: Path) -> Classifier:
    return load_classifier(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten built-in images as PNG, and a file that does not exist."""
    folder = tmp_path_factory.mktemp("pictures")
    write_png(folder, IMAGES)
    return [*sorted(folder.glob("*.png")), folder / "nowhere.png"]


def test_predictions_have_all_probabilities_or_an_error(classify: Classifier, files: list[Path]) -> None:
    first, missing = classify([files[0], str(files[-1])])
    assert (first.path, first.error) == (str(files[0]), None)
    assert tuple(first.probabilities) == classify.class_names
    assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert (first.label, first.probability) == first.top(1)[0]
    assert first.probability == max(first.probabilities.values())
    assert missing == Prediction(str(files[-1]), error="No such file or directory")
    assert missing.top(3) == []


def test_images_may_be_files_or_arrays_one_or_many(classify: Classifier, files: list[Path]) -> None:
    stack = IMAGES.permute(0, 2, 3, 1).numpy()
    expected = classify([files[3]])[0].probabilities
    for one in (files[3], str(files[3]), Image.open(files[3]), stack[3]):
        (prediction,) = classify(one)
        assert prediction.probabilities == expected
        assert classify([one]) == [prediction]
    assert len(classify(stack)) == 10
    assert classify(stack)[3].probabilities == pytest.approx(dict(expected), abs=1e-6)
    assert classify(stack[3, ..., 0])[0].path is None  # grayscale
    assert classify([]) == []
    with pytest.raises(TypeError):
        classify([3])  # type: ignore[list-item]


def test_batch_size_does_not_change_predictions(classify: Classifier, files: list[Path]) -> None:
    expected = classify(files)
    for batch_size in (1, 4):
        found = classify(files, batch_size=batch_size)
        assert [p.path for p in found] == [p.path for p in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-6)


def test_threads_do_not_change_predictions(classify: Classifier, files: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    several = classify(5 * files, batch_size=11)
    for one, other in zip(several, 5 * [classify(file)[0] for file in files], strict=True):
        assert (one.path, one.error) == (other.path, other.error)
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-6)


def test_images_in_memory_may_be_closed_after_they_are_passed(classify: Classifier, files: list[Path]) -> None:
    def pictures() -> Iterator[Image.Image]:
        for file in files[:10]:
            with Image.open(file) as picture:
                yield picture

    assert [p.label for p in classify(pictures())] == [p.label for p in classify(files[:10])]


@pytest.mark.parametrize("fit", [None, "crop", "pad", "squeeze"])
def test_pictures_become_squares_as_in_training(fit: str | None, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    del content["hyper_parameters"]["fit"]  # as in checkpoints of earlier versions
    content["hyper_parameters"] |= {"fit": fit} if fit else {}
    torch.save(content, tmp_path / "a.ckpt")
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    classify = load_classifier(tmp_path / "a.ckpt", device="cpu")
    assert classify.fit == (fit or "squeeze")
    for picture in (tmp_path / "a.png", rgb):
        ((_, pixels),) = classify.stream([picture])
        assert np.array_equal(pixels, decode_image(tmp_path / "a.png", 32, fit or "squeeze"))


def test_stream_reads_at_most_two_batches(classify: Classifier) -> None:
    waiting = iter([np.zeros((8, 8, 3), np.uint8)] * 20)
    stream = classify.stream(waiting, batch_size=5)
    for _ in range(6):
        _, pixels = next(stream)
        assert pixels is not None
        assert pixels.shape == (3, 32, 32)
    assert len(list(waiting)) == 20 - 10 - 4  # four are decoded while the second batch is used


def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut\.ckpt is damaged"):
        load_classifier(tmp_path / "cut.ckpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"^device=cuda: "):
        load_classifier(checkpoint, device="cuda")


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """Write an ONNX model whose logits of red, green and blue are the channel means."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["means"]),
        helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 16, 16])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "means", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"class_names": json.dumps(["red", "green", "blue"]), "native_size": "16"})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_onnx_model_predicts(onnx_file: Path) -> None:
    classify = load_classifier(onnx_file)
    predictions = classify([Image.new("RGB", (40, 20), color) for color in [(3, 1, 2), (1, 3, 2), (2, 1, 3)]])
    assert (classify.native_size, classify.fit) == (16, "squeeze")  # a file of an earlier version
    assert [prediction.label for prediction in predictions] == ["red", "green", "blue"]
    expected = torch.tensor([3.0, 1.0, 2.0]).softmax(0).tolist()
    assert list(predictions[0].probabilities.values()) == pytest.approx(expected, abs=1e-6)


def test_unusable_onnx_models_are_refused(onnx_file: Path, tmp_path: Path, monkeypatch) -> None:
    import onnx

    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:100])
    for name, reason in {"none": "is missing", "foreign": "class_names", "cut": "damaged"}.items():
        with pytest.raises(UserError, match=rf"{name}\.onnx .*{reason}"):
            load_classifier(tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match="device=mps: "):
        load_classifier(onnx_file, device="mps")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_classifier(onnx_file)
