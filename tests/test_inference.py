from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import compose_command, write_png
from PIL import Image

from cifar10_tl import load_classifier
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.inference import Classifier, Prediction


@pytest.fixture(scope="session")
def checkpoint(finished_run: Path) -> Path:
    return finished_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder of ten built-in images as PNG, and their pixels in the order of the paths."""
    images, _ = draw_shapes(10, seed=5, image_size=32)
    folder = tmp_path_factory.mktemp("pictures")
    write_png(folder, images)
    return folder, images


@pytest.fixture(scope="session")
def classify(checkpoint: Path) -> Classifier:
    return load_classifier(checkpoint, device="cpu")


def test_classifier_labels_files(checkpoint: Path, pictures) -> None:
    classify = load_classifier(checkpoint)
    predictions = classify([pictures[0] / "00.png", str(pictures[0] / "nowhere.png")])
    first, missing = predictions
    assert (first.path, first.error) == (str(pictures[0] / "00.png"), None)
    assert tuple(first.probabilities) == classify.class_names
    assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert (first.label, first.probability) == first.top(1)[0]
    assert first.probability == max(first.probabilities.values())
    assert missing == Prediction(str(pictures[0] / "nowhere.png"), error="No such file or directory")
    assert missing.top(3) == []


def test_images_may_be_files_or_arrays_one_or_many(classify: Classifier, pictures) -> None:
    file = pictures[0] / "03.png"
    array = pictures[1][3].permute(1, 2, 0).numpy()
    wanted = classify([file])[0].probabilities
    for one in (file, str(file), Image.open(file), array):
        (prediction,) = classify(one)
        assert prediction.probabilities == wanted
        assert classify([one]) == [prediction]
    stack = pictures[1].permute(0, 2, 3, 1).numpy()
    assert len(classify(stack)) == 10
    assert classify(stack)[3].probabilities == pytest.approx(dict(wanted), abs=1e-6)
    assert classify(array[..., 0])[0].path is None  # grey
    assert classify([]) == []
    with pytest.raises(TypeError):
        classify([3])  # type: ignore[list-item]


def test_batch_size_does_not_change_predictions(classify: Classifier, pictures) -> None:
    files = [*sorted(pictures[0].rglob("*.png")), pictures[0] / "nowhere.png"]
    wanted = classify(files)
    for batch_size in (1, 4, 11):
        found = classify(files, batch_size=batch_size)
        assert [p.path for p in found] == [p.path for p in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-6)


def test_stream_reads_one_batch_at_a_time(classify: Classifier) -> None:
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield np.zeros((8, 8, 3), np.uint8)

    stream = classify.stream(endless(), batch_size=5)
    for i in range(12):
        _, pixels = next(stream)
        assert pixels is not None
        assert pixels.shape == (3, 32, 32)
        assert drawn == 5 * (i // 5 + 1)


class Runs:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "plain", "torch"])
def test_files_other_than_a_checkpoint_are_refused_and_run_no_code(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    file, made = tmp_path / "some.ckpt", tmp_path / "made"
    content = checkpoint.read_bytes()
    if kind == "torch":
        torch.save({"state_dict": {}, "hyper_parameters": Runs(made)}, file)
    else:
        simple = {
            "cut": content[: len(content) // 2],
            "text": b"hello",
            "empty": b"",
            "plain": pickle.dumps(Runs(made)),
        }
        file.write_bytes(simple[kind])
    with pytest.raises(UserError, match=r"some\.ckpt .*broken") as error:
        load_classifier(file)
    assert "\n" not in str(error.value)
    assert not made.exists()


def test_missing_device_is_refused(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
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
    model = helper.make_model(
        helper.make_graph(nodes, "means", [images], [logits]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, {"class_names": json.dumps(["red", "green", "blue"]), "native_size": "16"})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_onnx_model_predicts(onnx_file: Path, tmp_path: Path) -> None:
    for i, color in enumerate([(3, 1, 2), (1, 3, 2), (2, 1, 3)]):
        Image.new("RGB", (40, 20), color).save(tmp_path / f"{i}.png")
    classify = load_classifier(onnx_file)
    predictions = classify(sorted(tmp_path.glob("*.png")))
    assert classify.native_size == 16
    assert [prediction.label for prediction in predictions] == ["red", "green", "blue"]
    wanted = torch.tensor([3.0, 1.0, 2.0]).softmax(0).tolist()
    assert list(predictions[0].probabilities.values()) == pytest.approx(wanted, abs=1e-6)


def test_exported_checkpoint_predicts_the_same(
    checkpoint: Path, classify: Classifier, pictures, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from cifar10_tl.export import export

    export(compose_command("export", f"checkpoint={checkpoint}", f"output={tmp_path}/model.onnx"))
    files = sorted(pictures[0].glob("*.png"))
    for one, other in zip(load_classifier(tmp_path / "model.onnx")(files), classify(files), strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-5)


def test_unusable_onnx_models_are_refused(onnx_file: Path, tmp_path: Path, monkeypatch) -> None:
    import onnx

    with pytest.raises(UserError, match=r"none\.onnx: .*no such file"):
        load_classifier(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="device=mps: "):
        load_classifier(onnx_file, device="mps")
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=r"foreign\.onnx .*class_names"):
        load_classifier(tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.onnx is broken"):
        load_classifier(tmp_path / "cut.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_classifier(onnx_file)
