from __future__ import annotations

import csv
import json
import logging
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from omegaconf import DictConfig
from PIL import Image

from cifar10_tl import load_classifier
from cifar10_tl.config import run_dir
from cifar10_tl.config.errors import UserError, explain
from cifar10_tl.data.images import BadImageError, decode_image
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.inference import Classifier, Prediction
from cifar10_tl.predict import find_files, predict


@pytest.fixture(scope="session")
def checkpoint(finished_run: Path) -> Path:
    return finished_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def classify(checkpoint: Path) -> Classifier:
    return load_classifier(checkpoint, device="cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder of ten built-in images as PNG, two of them further down, and their pixels in the order of the paths."""
    images, _ = draw_shapes(10, seed=5, image_size=32)
    folder = tmp_path / "pictures"
    (folder / "z").mkdir(parents=True)
    for i, image in enumerate(images):
        name = f"{i}.png" if i < 8 else f"z/{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return folder, images


def compose_command(*overrides: str, command: str = "predict") -> DictConfig:
    from hydra import compose, initialize_config_dir

    from cifar10_tl.config.validation import check_config

    run_dir.register_resolvers()
    with initialize_config_dir(str(run_dir.CONFIG_DIR), version_base="1.3"):
        cfg = compose(command, overrides=list(overrides))
    check_config(cfg)
    return cfg


def table(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mistake(*overrides: str) -> str:
    """The line that a prediction with these settings ends in."""
    with pytest.raises(UserError) as caught:
        predict(compose_command(*overrides))
    line = explain(caught.value, "predict")
    assert line is not None
    return line


# ------------------------------------------------------------------------------------------------------- the command


def test_the_table_holds_what_the_network_says(checkpoint: Path, pictures, tmp_path: Path) -> None:
    folder, images = pictures
    run = tmp_path / "run"
    cfg = compose_command(f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={run}", "device=cpu")
    assert predict(cfg) == []
    module = restore(checkpoint)
    with torch.inference_mode():
        wanted = module(images).softmax(1)
    rows = table(run)
    assert list(rows[0]) == ["path", "label", "probability", *module.class_names, "error"]
    assert [row["path"] for row in rows] == [str(folder / (f"{i}.png" if i < 8 else f"z/{i}.png")) for i in range(10)]
    found = [[float(row[name]) for name in module.class_names] for row in rows]
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-6, rtol=1e-5)
    assert [row["label"] for row in rows] == [module.class_names[i] for i in wanted.argmax(1)]
    assert all(row["probability"] == row[row["label"]] for row in rows)
    assert {row["error"] for row in rows} == {""}
    with Image.open(run / "predictions.png") as grid:
        assert grid.format == "PNG"
    assert not list(run.glob("*.tmp"))


def test_top_k_names_further_classes_behind_those_of_the_contract(checkpoint: Path, pictures, tmp_path: Path) -> None:
    cfg = compose_command(
        f"checkpoint={checkpoint}", f"images={pictures[0]}", f"paths.output_dir={tmp_path}", "top_k=3", "batch_size=3"
    )
    predict(cfg)
    names = restore(checkpoint).class_names
    for row in table(tmp_path):
        assert list(row)[3 + len(names) :] == ["label_2", "probability_2", "label_3", "probability_3", "error"]
        ranked = sorted(names, key=lambda name: -float(row[name]))
        assert [row["label"], row["label_2"], row["label_3"]] == ranked[:3]
        assert row["probability_3"] == row[ranked[2]]
    line = mistake(f"checkpoint={checkpoint}", f"images={pictures[0]}", "top_k=11", f"paths.output_dir={tmp_path}")
    assert "top_k=11" in line
    assert "knows 10 classes" in line


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(
    checkpoint: Path, pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cifar10_tl.predict as entry

    folder, _ = pictures
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3.txt").write_text("no image")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    cfg = compose_command(
        f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={tmp_path}", "batch_size=2"
    )
    with caplog.at_level(logging.INFO):
        unreadable = predict(cfg)
    assert [Path(str(p.path)).name for p in unreadable] == ["1.png", "3.txt", "gone.png"]
    rows = {Path(row.pop("path")).name: row for row in table(tmp_path)}
    wanted = ["0.png", "1.png", "2.png", "3.png", "3.txt", "4.png", "5.png", "6.png", "7.png", "gone.png"]
    assert list(rows) == [*wanted, "8.png", "9.png"]  # the last two lie in the folder z
    bad = {name: row for name, row in rows.items() if row["error"]}
    assert set(bad) == {"1.png", "3.txt", "gone.png"}
    assert all(value == "" for row in bad.values() for column, value in row.items() if column != "error")
    assert "truncated" in bad["1.png"]["error"]
    assert bad["3.txt"]["error"] == "no image of a kind that Pillow reads"
    assert bad["gone.png"]["error"] == "No such file or directory"
    assert "3 of 12 files could not be read" in caplog.text
    assert f"{folder}/3.txt: no image" in caplog.text

    with pytest.raises(SystemExit) as ended:
        entry._predict_and_exit(cfg)
    assert ended.value.code == 3
    monkeypatch.setattr(entry, "predict", lambda cfg: [])
    entry._predict_and_exit(cfg)


def test_where_nothing_can_be_read_one_line_says_so_and_an_older_table_stays(checkpoint: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "texts", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    (run / "predictions.csv").write_text("older")
    settings = (f"checkpoint={checkpoint}", f"paths.output_dir={run}")
    assert mistake(*settings, f"images={folder}").endswith("the folder holds no files")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("no image")
    line = mistake(*settings, f"images={folder}")
    assert f"images={folder}: none of the 2 files can be read as an image; the first: {folder}/a.txt" in line
    assert mistake(*settings, f"images={folder}/a.txt").endswith(
        "a.txt: cannot be read: no image of a kind that Pillow reads"
    )
    assert mistake(*settings, f"images={folder}/*.png").endswith("no file matches the pattern")
    assert mistake(*settings, f"images={folder}/c.png").endswith("there is no such file or folder")
    assert [p.name for p in run.iterdir()] == ["predictions.csv"]
    assert (run / "predictions.csv").read_text() == "older"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["images=x"], "checkpoint=null: should be the file of a trained network"),
        (["checkpoint=nowhere.ckpt", "images=x"], "checkpoint=nowhere.ckpt: there is no such file"),
        (["checkpoint={file}"], "images=null: should be a file, a folder, a pattern"),
        (["checkpoint={file}", "images=[]"], "images=[]: should be a file"),
        (["checkpoint={file}", "images=x", "batch_size=0"], "batch_size=0: should be a whole number from 1 on"),
        (["checkpoint={file}", "images=x", "top_k=0"], "top_k=0"),
        (["checkpoint={file}", "images=x", "device=gpu"], "device=gpu: should be one of auto, cpu, cuda, mps"),
    ],
)
def test_settings_are_checked_first(overrides: list[str], part: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert part in mistake(*(o.format(file=tmp_path / "file") for o in overrides))


# ------------------------------------------------------------------------------------------------------ finding files


def test_files_come_sorted_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png", "10/c.png", "9/c.png", ".git/d.png", "[x]/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(images: str | list[str]) -> list[str]:
        return [str(Path(f).relative_to(tmp_path)) for f in find_files(images, tmp_path / "run")]

    everything = ["10/c.png", "9/c.png", "[x]/e.png", "a.jpg", "b.png"]
    assert found(str(tmp_path)) == everything
    assert found(f"{tmp_path}/*.*") == ["a.jpg", "b.png"]
    assert found(f"{tmp_path}/**/c.png") == ["10/c.png", "9/c.png"]
    assert found(f"{tmp_path}/*") == everything  # the folders that match with all they hold
    assert found(f"{tmp_path}/[x]") == ["[x]/e.png"]  # what is there is no pattern
    assert found([f"{tmp_path}/b.png", f"{tmp_path}/10", f"{tmp_path}/a.jpg"]) == ["b.png", "10/c.png", "a.jpg"]
    with pytest.raises(UserError, match=r"images=.*nowhere: there is no such file or folder"):
        find_files([f"{tmp_path}/a.jpg", f"{tmp_path}/nowhere"], tmp_path)


def test_the_commands_own_files_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "predictions.csv", "predictions.png", "predict.log"):
        (tmp_path / name).touch()
    assert find_files(str(tmp_path), tmp_path) == [str(tmp_path / "a.png")]
    assert len(find_files(str(tmp_path), tmp_path / "run")) == 4


def test_a_file_name_that_is_no_text_is_written_as_it_is(checkpoint: Path, pictures, tmp_path: Path) -> None:
    strange = os.fsencode(pictures[0]) + b"/\xff, \n.png"
    os.rename(pictures[0] / "0.png", strange)
    (pictures[0] / "bad\udcff.png").touch()
    predict(compose_command(f"checkpoint={checkpoint}", f"images={pictures[0]}", f"paths.output_dir={tmp_path}"))
    with (tmp_path / "predictions.csv").open(newline="", errors="surrogateescape") as file:
        assert os.fsdecode(strange) in [row["path"] for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------ pictures of any kind


def wave(height: int = 20, width: int = 30) -> np.ndarray:
    """uint8 [H, W, 3]: a smooth picture that is not the same upside down, mirrored or turned."""
    y, x = np.mgrid[:height, :width]
    return np.stack([3 * y + 5 * x, 250 - 4 * y, 40 + 6 * x], axis=-1).clip(0, 255).astype(np.uint8)


def by_hand(rgb: np.ndarray, size: int) -> np.ndarray:
    """What training sees of an RGB picture: Pillow's bicubic to the square."""
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_a_picture_is_squeezed_to_the_square_as_in_training(tmp_path: Path) -> None:
    Image.fromarray(wave()).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), by_hand(wave(), 32))
    Image.fromarray(wave(32, 32)).save(tmp_path / "b.png")
    assert np.array_equal(decode_image(tmp_path / "b.png", 32), wave(32, 32).transpose(2, 0, 1))


def test_grey_of_16_bits_is_scaled_not_cut_off(tmp_path: Path) -> None:
    grey = wave()[..., 0]
    for name, picture in {
        "a.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "b.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "c.tif": Image.fromarray(grey.astype(np.int32) * 257),
        "d.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "e.png": Image.fromarray(grey),
    }.items():
        picture.save(tmp_path / name)
        assert np.array_equal(decode_image(tmp_path / name, 32), by_hand(np.stack([grey] * 3, -1), 32)), name
    Image.fromarray(np.array([[np.nan, np.inf], [-1, 2]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert decode_image(tmp_path / "f.tif", 2)[0].tolist() == [[0, 255], [0, 255]]


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    rgb, alpha = wave(), np.zeros((20, 30), np.uint8)
    alpha[:10] = 255
    wanted = by_hand(np.where(alpha[..., None] > 0, rgb, 255).astype(np.uint8), 32)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), wanted)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.gif", transparency=1)
    assert decode_image(tmp_path / "b.gif", 2)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    half = Image.new("LA", (4, 4), (0, 51))
    half.save(tmp_path / "c.png")
    assert (decode_image(tmp_path / "c.png", 4) == 204).all()


def test_other_kinds_are_read(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert decode_image(tmp_path / "a.jpg", 8)[:, 0, 0] == pytest.approx([255, 0, 0], abs=4)
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert (decode_image(tmp_path / "b.png", 32) == 255).all()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "c.bmp")
    pixel = decode_image(tmp_path / "c.bmp", 32)
    assert pixel.shape == (3, 32, 32)
    assert (pixel == np.array([7, 8, 9])[:, None, None]).all()


@pytest.mark.parametrize(
    ("orientation", "quarter_turns", "mirrored"), [(1, 0, 0), (3, 2, 0), (6, -1, 0), (8, 1, 0), (2, 0, 1), (5, -1, 1)]
)
def test_a_picture_is_turned_upright(orientation: int, quarter_turns: int, mirrored: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(wave()).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(wave(), quarter_turns)
    upright = upright[:, ::-1] if mirrored else upright
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), by_hand(np.ascontiguousarray(upright), 32))


def test_broken_exif_does_not_matter(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name, exif in (("a.png", b"garbage"), ("b.png", b"MM\0*\0\0"), ("c.jpg", b"Exif\0\0II*\0\x08\0\0\0")):
        Image.fromarray(wave()).save(tmp_path / name, exif=exif)
        assert decode_image(tmp_path / name, 32) == pytest.approx(by_hand(wave(), 32), abs=20)
    assert not [w for w in recwarn if "EXIF" in str(w.message)]


def png_bomb(path: Path, side: int = 20_000) -> None:
    """A whole PNG of a bit a pixel: a few kilobytes that unfold to 400 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [20_000, 10_000])  # above twice Pillow's limit, and where Pillow only warns
def test_a_bomb_is_not_decoded(
    side: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    png_bomb(tmp_path / "bomb.png", side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(
        BadImageError, match=rf"^too large, not decoded: Image size \({side**2} pixels\) exceeds limit of \d+"
    ):
        decode_image(tmp_path / "bomb.png", 32)
    line = mistake(f"checkpoint={checkpoint}", f"images={tmp_path}/bomb.png", f"paths.output_dir={tmp_path}/run")
    assert line.startswith(f"images={tmp_path}/bomb.png: cannot be read: too large, not decoded")
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


# -------------------------------------------------------------------------------------------------------- from Python


def test_three_lines_of_python(checkpoint: Path, pictures) -> None:
    classify = load_classifier(checkpoint)
    predictions = classify([pictures[0] / "0.png", str(pictures[0] / "nowhere.png")])
    first, missing = predictions
    assert (first.path, first.error) == (str(pictures[0] / "0.png"), None)
    assert tuple(first.probabilities) == classify.class_names
    assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert (first.label, first.probability) == first.top(1)[0]
    assert first.probability == max(first.probabilities.values())
    assert missing == Prediction(str(pictures[0] / "nowhere.png"), error="No such file or directory")
    assert missing.top(3) == []


def test_pictures_come_as_files_or_from_memory_one_or_many(classify: Classifier, pictures) -> None:
    file = pictures[0] / "3.png"
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


def test_the_size_of_batches_does_not_matter(classify: Classifier, pictures) -> None:
    files = [*sorted(pictures[0].rglob("*.png")), pictures[0] / "nowhere.png"]
    wanted = classify(files)
    for batch_size in (1, 4, 11):
        found = classify(files, batch_size=batch_size)
        assert [p.path for p in found] == [p.path for p in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-6)


def test_no_more_than_a_batch_is_in_memory(classify: Classifier) -> None:
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


# ----------------------------------------------------------------------------------------------- files of the network


class Runs:
    """Unpickling one of these makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "plain", "torch"])
def test_a_file_that_is_no_checkpoint_is_told_and_runs_nothing(
    kind: str, checkpoint: Path, pictures, tmp_path: Path
) -> None:
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
    line = mistake(f"checkpoint={file}", f"images={pictures[0]}", f"paths.output_dir={tmp_path}/run")
    assert line.startswith(str(file))
    assert "\n" not in line
    assert "broken" in line
    assert not made.exists()
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_told(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"^device=cuda: "):
        load_classifier(checkpoint, device="cuda")


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """A model of the exported kind: the logits of red, green and blue are the means of the channels."""
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


def test_an_exported_model_predicts(onnx_file: Path, tmp_path: Path) -> None:
    for i, colour in enumerate([(3, 1, 2), (1, 3, 2), (2, 1, 3)]):
        Image.new("RGB", (40, 20), colour).save(tmp_path / f"{i}.png")
    assert (
        predict(compose_command(f"checkpoint={onnx_file}", f"images={tmp_path}/*.png", f"paths.output_dir={tmp_path}"))
        == []
    )
    rows = table(tmp_path)
    assert [row["label"] for row in rows] == ["red", "green", "blue"]
    wanted = torch.tensor([3.0, 1.0, 2.0]).softmax(0).tolist()
    assert [float(rows[0][name]) for name in ("red", "green", "blue")] == pytest.approx(wanted, abs=1e-6)
    assert load_classifier(onnx_file).native_size == 16


def test_an_exported_checkpoint_says_what_the_checkpoint_says(
    checkpoint: Path, classify: Classifier, pictures, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from cifar10_tl.export import export

    export(compose_command(f"checkpoint={checkpoint}", f"output={tmp_path}/model.onnx", command="export"))
    files = sorted(pictures[0].glob("*.png"))
    for one, other in zip(load_classifier(tmp_path / "model.onnx")(files), classify(files), strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-5)


def test_an_exported_model_that_does_not_fit_is_told(onnx_file: Path, tmp_path: Path, monkeypatch) -> None:
    import onnx

    with pytest.raises(UserError, match="there is no such file"):
        load_classifier(tmp_path / "none.onnx")
    with pytest.raises(UserError, match=r"device=mps: this ONNX Runtime"):
        load_classifier(onnx_file, device="mps")
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="was not exported by this project"):
        load_classifier(tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.onnx is broken or of another kind"):
        load_classifier(tmp_path / "cut.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"model\.onnx: ONNX Runtime is needed to run it: pip install"):
        load_classifier(onnx_file)


# ----------------------------------------------------------------------------------------------------------- processes


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in (run_dir.STAMP_VARIABLE, "HYDRA_FULL_ERROR")}
    env |= {"PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(
        [sys.executable, "-m", "cifar10_tl.predict", *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_command_leaves_its_run_folder_and_status_3(checkpoint: Path, pictures, tmp_path: Path) -> None:
    (pictures[0] / "notes.txt").write_text("no image")
    done = command(f"checkpoint={checkpoint}", f"images={pictures[0]}", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert {p.name for p in run.iterdir()} == {".hydra", "predict.log", "predictions.csv", "predictions.png"}
    assert len(table(run)) == 11
    assert "notes.txt: no image of a kind that Pillow reads" in (run / "predict.log").read_text()


@pytest.mark.slow
def test_help_does_not_import_torch(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m cifar10_tl.predict checkpoint=FILE")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M))
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "matplotlib", "torchvision", "PIL"}
