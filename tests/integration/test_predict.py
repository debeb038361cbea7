"""Prediction: the table, the grid, and what is reported about files that cannot be read."""

from __future__ import annotations

import csv
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, compose_command, lock, write_png
from PIL import Image

from cifar10_tl import plots
from cifar10_tl.config import run_dir
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.inference import Prediction
from cifar10_tl.io import read_csv
from cifar10_tl.predict import find_files, predict


@pytest.fixture(scope="session")
def checkpoint(finished_run: Path) -> Path:
    return finished_run / "checkpoints" / "best.ckpt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of ten built-in images, two of them in a subfolder."""
    images, _ = draw_shapes(10, seed=5)
    write_png(tmp_path / "images", images[:8])
    write_png(tmp_path / "images" / "z", images[8:])
    return tmp_path / "images"


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        predict(compose_command("predict", *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_table_and_grid_contain_the_probabilities_of_the_network(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = plots.sample_grid
    monkeypatch.setattr(plots, "sample_grid", lambda *args, **options: drawn.extend(args) or draw(*args, **options))
    options = (f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={tmp_path / 'run'}", "device=cpu")
    assert predict(compose_command("predict", *options, "top_k=3", "batch_size=3")) == []
    module, rows = restore(checkpoint), read_csv(tmp_path / "run" / "predictions.csv")
    with torch.inference_mode():
        expected = module(draw_shapes(10, seed=5)[0]).softmax(1)
    names = list(module.class_names)
    more = ["label_2", "probability_2", "label_3", "probability_3"]
    assert list(rows[0]) == ["path", "label", "probability", *names, *more, "error"]
    files = [*(f"{i:02d}.png" for i in range(8)), "z/00.png", "z/01.png"]
    assert [row["path"] for row in rows] == [str(folder / file) for file in files]
    found = torch.tensor([[float(row[name]) for name in names] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for row in rows:
        ranked = sorted(names, key=lambda name: -float(row[name]))
        assert [row["label"], row["label_2"], row["label_3"]] == ranked[:3]
        assert (row["probability"], row["probability_3"]) == (row[ranked[0]], row[ranked[2]])
        assert row["error"] == ""
    images, titles = drawn
    assert np.array_equal(images, draw_shapes(10, seed=5)[0].permute(0, 2, 3, 1).numpy())
    assert [label for ((label, _),) in titles] == [row["label"] for row in rows]
    percents = [float(percent.strip(" <>%")) for ((_, percent),) in titles]
    assert percents == pytest.approx([100 * float(row["probability"]) for row in rows], abs=0.06)
    with Image.open(tmp_path / "run" / "predictions.png") as grid:
        assert grid.format == "PNG"
    assert "top_k=11" in error_of(*options, "top_k=11")


def test_an_interrupt_stops_the_threads_that_decode(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Prediction, "top", interrupt)  # while the second batch is decoded
    options = (f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={tmp_path / 'run'}", "batch_size=4")
    with pytest.raises(KeyboardInterrupt):
        predict(compose_command("predict", *options, "device=cpu"))
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_unreadable_files_and_folders_are_reported(
    checkpoint: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = folder / "01.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    (folder / "03.txt").write_text("no image")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    lock(monkeypatch, folder / "z")
    options = (f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={tmp_path}", "batch_size=2")
    with caplog.at_level(logging.INFO):
        unreadable = predict(compose_command("predict", *options))
    rows = {Path(row.pop("path")).name: row for row in read_csv(tmp_path / "predictions.csv")}
    errors = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert list(errors) == [Path(str(p.path)).name for p in unreadable]
    assert list(errors) == ["z", "01.png", "03.txt", "link.png", "loop.png"]
    assert (errors["z"], errors["link.png"]) == ("Permission denied", "No such file or directory")
    assert "truncated" in errors["01.png"]
    assert "symbolic link" in errors["loop.png"]
    assert all(value == "" for name in errors for column, value in rows[name].items() if column != "error")
    assert [name for name in rows if name not in errors] == [f"0{i}.png" for i in (0, 2, 3, 4, 5, 6, 7)]
    assert "5 of 12 files cannot be read" in caplog.text
    assert f"{folder}/z: Permission denied" in caplog.text


def test_without_a_readable_image_an_older_table_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = tmp_path / "texts", tmp_path / "run"
    (folder / "locked").mkdir(parents=True)
    run.mkdir()
    (run / "predictions.csv").write_text("older")
    options = (f"checkpoint={checkpoint}", f"paths.output_dir={run}")
    for empty in ("", "/*.png", "/c.png"):
        message = f"images={folder}{empty}: no such file, or no files in this folder"
        assert error_of(*options, f"images={folder}{empty}") == message
    lock(monkeypatch, folder / "locked")
    assert error_of(*options, f"images={folder}").endswith(f"{folder}/locked: Permission denied")
    (folder / "a.txt").write_text("no image")
    message = f"images={folder}/a.txt: no readable image; the first error: {folder}/a.txt: not an image"
    assert message in error_of(*options, f"images={folder}/a.txt")
    assert [p.name for p in run.iterdir()] == ["predictions.csv"]
    assert (run / "predictions.csv").read_text() == "older"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["images=x"], "set checkpoint=FILE"),
        (["checkpoint=nowhere.ckpt", "images={file}"], "nowhere.ckpt: no such file"),
        (["checkpoint={file}"], "images=null"),
        (["checkpoint={file}", "images=[]"], "images=[]"),
        (["checkpoint={file}", "images=x", "batch_size=0"], "batch_size=0"),
        (["checkpoint={file}", "images=x", "top_k=0"], "top_k=0"),
        (["checkpoint={file}", "images=x", "device=gpu"], "device=gpu"),
        (["checkpoint={file}", "images=x", "paths.output_dir={file}.run"], "paths.output_dir="),
    ],
)
def test_invalid_settings_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file.run").mkdir()
    (tmp_path / "file.run" / "config.yaml").touch()
    assert error_of(*(o.format(file=tmp_path / "file") for o in overrides)).startswith(message)


def test_files_are_sorted_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png", "10/c.png", "9/c.png", ".git/d.png", "[x]/e.png", "predict.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(images: str | list[str]) -> list[str]:
        return [str(Path(f).relative_to(tmp_path)) for f in find_files(images, tmp_path)[0]]

    everything = ["10/c.png", "9/c.png", "[x]/e.png", "a.jpg", "b.png"]  # without the command's own log
    assert found(str(tmp_path)) == everything
    assert found(f"{tmp_path}/*.*") == ["a.jpg", "b.png"]
    assert found(f"{tmp_path}/**/c.png") == ["10/c.png", "9/c.png"]
    assert found(f"{tmp_path}/*") == everything
    assert found(f"{tmp_path}/[x]") == ["[x]/e.png"]  # an existing folder is not a pattern
    assert found([f"{tmp_path}/b.png", f"{tmp_path}/10", f"{tmp_path}/a.jpg"]) == ["b.png", "10/c.png", "a.jpg"]
    with pytest.raises(UserError, match="nowhere: no such file"):
        find_files([f"{tmp_path}/a.jpg", f"{tmp_path}/nowhere"], tmp_path)


def test_file_names_that_are_not_utf8_keep_their_bytes(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    name = os.fsencode(folder) + b"/\xff, \n.png"
    os.rename(folder / "00.png", name)
    (folder / "bad\udcff.png").touch()
    options = (f"checkpoint={checkpoint}", f"images={folder}", f"paths.output_dir={tmp_path}")
    predict(compose_command("predict", *options))
    with (tmp_path / "predictions.csv").open(newline="", errors="surrogateescape") as file:
        assert os.fsdecode(name) in [row["path"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_command(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if k not in (run_dir.STAMP_VARIABLE, "HYDRA_FULL_ERROR")}
        env |= {"PYTHONPATH": str(REPOSITORY), **environment}
        command = [sys.executable, "-m", "cifar10_tl.predict", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    (folder / "notes.txt").write_text("no image")
    done = command(f"checkpoint={checkpoint}", f"images={folder}")
    assert (done.returncode, done.stderr) == (3, "")
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert {p.name for p in run.iterdir()} == {".hydra", "predict.log", "predictions.csv", "predictions.png"}
    assert len(read_csv(run / "predictions.csv")) == 11
    assert f"{folder}/notes.txt: " in (run / "predict.log").read_text()

    done = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.startswith("usage: python -m cifar10_tl.predict checkpoint=FILE")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M))
    assert not imported & {"torch", "lightning", "matplotlib", "torchvision", "PIL"}
