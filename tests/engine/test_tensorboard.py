"""What TensorBoard serves for a run, by both of its readers of event files, and what its page shows."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import lightning.pytorch as pl
import numpy as np
import pytest
from helpers import compose_train, rows
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.program import TensorBoard

from cifar10_tl.callbacks import MetricsLogger, StepLogger
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.results import read_results
from cifar10_tl.engine.tensorboard import COLUMNS, RunTensorBoardLogger, log_start
from cifar10_tl.io import read_csv

#: Request of the table of HPARAMS.
HPARAMS = {"sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]}
#: Text, widths of loaded images, and lengths of the lines in charts, of what is visible, also inside components.
LOOK = """
function walk(node, seen) {
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) seen.text += node.textContent.trim() + "\\n";
  if (node.nodeType !== Node.ELEMENT_NODE || ["style", "script", "noscript"].includes(node.localName)) return seen;
  if (node.checkVisibility && !node.checkVisibility()) return seen;
  if (node.localName === "img") seen.images.push(node.naturalWidth);
  if (node.matches("path.line")) seen.lines.push((node.getAttribute("d") || "").length);
  for (const child of [...(node.shadowRoot || node).childNodes, ...(node.shadowRoot ? node.childNodes : [])])
    walk(child, seen);
  return seen;
}
return walk(document.body, {text: "", images: [], lines: []});
"""


class Board:
    """TensorBoard as ``tensorboard --logdir`` starts it; ``load_fast`` selects the reader in Rust."""

    def __init__(self, logdir: Path, load_fast: bool = False) -> None:
        board = TensorBoard()
        options = (f"--logdir={logdir}", f"--load_fast={str(load_fast).lower()}", "--host=127.0.0.1", "--port=0")
        board.configure(["tensorboard", *options, "--samples_per_plugin=images=1000"])
        self.url = board.launch()

    def read(self, path: str, body: Any = None, **query: Any) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = Request(
            f"{self.url}data/plugin/{path}?{urlencode(query)}", data, {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            return response.read()

    def get(self, path: str, body: Any = None, **query: Any) -> Any:
        return json.loads(self.read(path, body, **query))

    def wait(self, is_loaded: Callable[[], Any]) -> None:
        """Wait until the event files are read."""
        limit = time.monotonic() + 180
        while not is_loaded():
            assert time.monotonic() < limit, "the event files are not read"
            time.sleep(0.2)

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in self.get("scalars/scalars", run=".", tag=tag)]


@pytest.fixture(scope="module", params=[False, True], ids=["python", "rust"])
def board(request: pytest.FixtureRequest, finished_run: Path) -> Board:
    board = Board(finished_run, load_fast=request.param)
    board.wait(lambda: len(board.get("pr_curves/tags").get(".", ())) == 10)
    return board


def test_scalars_have_one_point_per_epoch_or_step(board: Board, finished_run: Path) -> None:
    results, table = read_results(finished_run), rows(finished_run)
    tags = {f"{split}/{name}" for split in ("train", "val", "test") for name in ("loss", "acc")}
    steps = {"train/loss_step", "lr/backbone", "lr/head"}
    tags |= {f"{split}/{name}" for split in ("val", "test") for name in ("balanced_acc", "macro_f1")}
    assert set(board.get("scalars/tags")["."]) == tags | steps | {"images/s"}
    for tag, column in (("val/acc", "val/acc"), ("images/s", "images_per_second")):
        assert board.scalars(tag) == [(int(row["epoch"]), pytest.approx(float(row[column]))) for row in table]
    for name in ("acc", "balanced_acc", "macro_f1"):
        assert board.scalars(f"test/{name}") == [(results["best_epoch"], pytest.approx(results["test"][name]))]
    found = {tag: board.scalars(tag) for tag in steps}
    assert all([step for step, _ in points] == list(range(1, 11)) for points in found.values())
    means = np.reshape([loss for _, loss in found["train/loss_step"]], (2, 5)).mean(1)
    assert means == pytest.approx([float(row["train/loss"]) for row in table], rel=1e-5)
    assert [found["lr/head"][step - 1][1] for step in (5, 10)] == pytest.approx([float(row["lr"]) for row in table])


def test_train_and_val_share_a_chart(board: Board) -> None:
    (category,) = board.get("custom_scalars/layout")["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert charts.keys() == {"loss", "acc"}
    for name, patterns in charts.items():
        found = [board.get("custom_scalars/scalars", run=".", tag=tag)["tag_to_events"] for tag in patterns]
        assert [{tag: len(points) for tag, points in tags.items()} for tags in found] == [
            {f"train/{name}": 2},
            {f"val/{name}": 2},
        ]


def test_images_are_those_of_the_files(board: Board, finished_run: Path) -> None:
    best = read_results(finished_run)["best_epoch"]
    kinds = [f"{kind}/{stage}" for kind in ("confusion_matrix", "correct", "incorrect") for stage in ("val", "test")]
    assert set(board.get("images/tags")["."]) == {*kinds, "inputs/train", "curves"}
    for tag in kinds:
        images = board.get("images/images", run=".", tag=tag, sample=0)
        assert [image["step"] for image in images] == ([best] if tag.endswith("test") else [0, 1])
        (shown,) = (image for image in images if image["step"] == best)
        with urlopen(f"{board.url}data/plugin/images/individualImage?{shown['query']}") as response:
            logged = Image.open(io.BytesIO(response.read()))
        with Image.open(finished_run / "figures" / f"{tag.replace('/', '_')}.png") as file:
            assert logged.tobytes() == file.convert("RGB").tobytes(), "the file shows the best epoch"


def test_texts_describe_the_run(board: Board, finished_run: Path) -> None:
    texts = {}
    for tag in board.get("text/tags")["."]:
        (entry,) = board.get("text/text", run=".", tag=tag)
        texts[tag.removesuffix("/text_summary")] = entry["text"]
    assert set(texts) == {"run/settings", "run/command", "run/environment", "run/result"}
    results = read_results(finished_run)
    assert "<td>model.backbone</td>\n<td>resnet10</td>" in texts["run/settings"]
    assert "<td>data</td>\n<td>shapes</td>" in texts["run/settings"], "the option of a config group"
    assert "data.batch_size" in texts["run/settings"]
    assert "interpolation" not in texts["run/settings"], "the default"
    assert "<code>python -m cifar10_tl.train" in texts["run/command"]
    assert "model.backbone=resnet10" in texts["run/command"]
    assert str(finished_run) not in texts["run/command"]
    assert results["environment"]["versions"]["torch"] in texts["run/environment"]
    assert f"{results['test']['acc']:.2%}" in texts["run/result"]
    assert "95% interval" in texts["run/result"]


def test_precision_and_recall_of_each_class(board: Board, finished_run: Path) -> None:
    matrix, names = (read_results(finished_run)[key] for key in ("confusion_matrix", "class_names"))
    table = read_csv(finished_run / "predictions.csv")
    assert sorted(board.get("pr_curves/tags")["."]) == sorted(f"precision_recall/{name}" for name in names)
    for k, name in enumerate(names):
        (curve,) = board.get("pr_curves/pr_curves", run=".", tag=f"precision_recall/{name}")["."]
        assert curve["step"] == read_results(finished_run)["best_epoch"]
        first = {key: curve[key][0] for key in ("true_positives", "false_positives", "recall")}
        assert first == {"true_positives": sum(matrix[k]), "false_positives": 100 - sum(matrix[k]), "recall": 1}
        own = [float(row[name]) for row in table if row["true_label"] == name]
        found = [sum(p >= i / 126 for p in own) for i in range(len(curve["true_positives"]))]
        np.testing.assert_allclose(curve["true_positives"], found, atol=1)  # probabilities are rounded in the file


def test_projector_shows_images_with_their_predictions(board: Board, finished_run: Path) -> None:
    assert board.get("projector/runs") == ["."]
    (embedding,) = board.get("projector/info", run=".")["embeddings"]
    assert embedding["tensorShape"] == [100, 64]
    query = {"run": ".", "name": embedding["tensorName"]}
    tensor = np.frombuffer(board.read("projector/tensor", **query), np.float32).reshape(100, 64)
    assert np.abs(tensor.mean(0)).max() < 1e-3, "centered"
    assert (np.diff(tensor.std(0)) <= 1e-4).all(), "the principal components, the largest first"
    lines = [line.split("\t") for line in board.read("projector/metadata", **query).decode().splitlines()]
    assert lines[0] == ["true", "predicted", "probability", "index", "path"]
    table = read_csv(finished_run / "predictions.csv")
    assert [line[:2] for line in lines[1:]] == [[row["true_label"], row["predicted_label"]] for row in table]
    assert [int(line[3]) for line in lines[1:]] == list(range(100))
    sprite = Image.open(io.BytesIO(board.read("projector/sprite_image", **query)))
    assert (sprite.size, embedding["sprite"]["singleImageDim"]) == ((320, 320), [32, 32])
    thumbnails = np.asarray(sprite.convert("RGB"), int).reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    assert np.abs(thumbnails - draw_shapes(100, seed=1)[0].permute(0, 2, 3, 1).numpy()).max() <= 1


def test_hparams_have_short_columns_first(board: Board, finished_run: Path) -> None:
    experiment = board.get("hparams/experiment", {})
    titles = [column["displayName"] or column["name"] for column in experiment["hparamInfos"]]
    assert titles[: len(COLUMNS)] == list(COLUMNS)
    assert {"optimizer.betas", "optimizer.momentum", "model.head.lstm_size", "data.root"} <= set(titles)
    (group,) = board.get("hparams/session_groups", HPARAMS)["sessionGroups"]
    values = {name[3:]: value for name, value in group["hparams"].items() if name[:2].isdigit()}
    assert (values["weights"], values["optimizer"], values["lr"], values["image size"]) == ("random", "Adam", 0.001, 32)
    assert values["augmentation"] == "horizontal flip, random crop padding 4"
    metrics = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert metrics["test/acc"] == pytest.approx(read_results(finished_run)["test"]["acc"])


@pytest.mark.parametrize("load_fast", [False, True])
def test_a_resumed_run_has_each_point_and_all_images_once(tmp_path: Path, load_fast: bool) -> None:
    """Five steps per epoch; resumed from a checkpoint after 38 epochs, and from one in the middle of the next."""
    rows = [[step, step / 100, 0.1] for step in range(1, 201)]

    def start(epoch: int, num_rows: int, last: int) -> None:
        logger = RunTensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False, purge_step=epoch)
        metrics, steps = MetricsLogger(), StepLogger()
        metrics.rows = [{"epoch": e} for e in range(epoch)]
        steps.tags, steps.rows = ["train/loss_step", "lr/head"], rows[:num_rows]
        trainer: Any = SimpleNamespace(loggers=[logger], callbacks=[metrics, steps], strategy=None)
        steps.on_fit_start(trainer, None)
        for e in range(epoch, last):
            steps.rows = rows[: 5 * (e + 1)]
            steps.on_train_epoch_end(trainer, None)
            logger.log_metrics({"train/loss": e / 10}, e)
            logger.experiment.add_image("correct/val", np.full((3, 2, 2), e, np.uint8), e)
        logger.experiment.add_image("correct/test", np.full((3, 2, 2), last, np.uint8), last)
        logger.log_hyperparams({"trainer.max_epochs": last}, {"test/acc": last / 100}, step=last)
        logger.finalize("success")

    start(epoch=0, num_rows=0, last=39)
    start(epoch=38, num_rows=190, last=39)
    start(epoch=38, num_rows=193, last=40)
    board = Board(tmp_path, load_fast)
    board.wait(lambda: len(board.get("images/tags").get(".", ())) and len(board.scalars("train/loss_step")) >= 200)
    assert board.scalars("train/loss") == [(epoch, pytest.approx(epoch / 10)) for epoch in range(40)]
    assert board.scalars("train/loss_step") == [(step, pytest.approx(step / 100)) for step in range(1, 201)]
    images = board.get("images/images", run=".", tag="correct/val", sample=0)
    assert [image["step"] for image in images] == list(range(40))
    assert board.scalars("test/acc") == [(40, pytest.approx(0.4))], "the latest test"
    assert [image["step"] for image in board.get("images/images", run=".", tag="correct/test", sample=0)] == [40]
    (group,) = board.get("hparams/session_groups", HPARAMS)["sessionGroups"]
    assert group["hparams"]["07 epochs"] == 40


@pytest.mark.parametrize("load_fast", [False, True])
def test_runs_with_other_settings_share_the_columns(tmp_path: Path, load_fast: bool) -> None:
    runs = {
        "a": {
            "optimizer.name": "Adam",
            "optimizer.betas": [0.9, 0.999],
            "model.image_size": [[0, 128], [0.5, 224]],
            "ema_decay": None,
        },
        "b": {"optimizer.name": "SGD", "optimizer.momentum": 0.9, "model.weights": "weights/x.pth", "ema_decay": 0.9},
    }
    for name, settings in runs.items():
        logger = RunTensorBoardLogger(tmp_path / name, name="", version="", default_hp_metric=False)
        logger.log_hyperparams(settings, {"test/acc": 0.5}, step=1)
        logger.finalize("success")
    board = Board(tmp_path, load_fast)
    board.wait(lambda: len(board.get("hparams/session_groups", HPARAMS).get("sessionGroups", ())) == 2)
    columns = {column["name"] for column in board.get("hparams/experiment", {})["hparamInfos"]}
    groups = board.get("hparams/session_groups", HPARAMS)["sessionGroups"]
    found = [{name[3:] if name[:2].isdigit() else name: v for name, v in g["hparams"].items()} for g in groups]
    assert {"optimizer.betas", "optimizer.momentum", "ema_decay"} <= columns
    assert [(row["optimizer"], row["weights"]) for row in found] == [("Adam", "random"), ("SGD", "x.pth")]
    assert found[0]["image size"] == 224
    assert found[1]["optimizer.momentum"] == 0.9


def looks(browser: Any, is_complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until what is visible on the page is complete, at most three minutes, and return it."""
    limit = time.monotonic() + 180
    while not is_complete(seen := browser.execute_script(LOOK)) and time.monotonic() < limit:
        time.sleep(0.5)
    return seen


@pytest.mark.slow
def test_no_panel_of_the_page_is_empty(finished_run: Path, browser: Any) -> None:
    board = Board(finished_run, load_fast=True)
    board.wait(lambda: len(board.get("pr_curves/tags").get(".", ())) == 10)
    browser.set_window_size(1600, 5000)  # cards are loaded when they are visible
    results = read_results(finished_run)
    epochs, best = f"{results['test']['acc']:.2%}", results["best_epoch"]
    expected: dict[str, tuple[tuple[str, ...], int, int]] = {  # texts, least numbers of images and lines
        "timeseries": (("train", "lr", "confusion_matrix", "incorrect"), 4, 0),
        "scalars": (("train", "lr/head", "images/s"), 0, 3),
        "custom_scalars": (("train and val", "loss", "acc", "Matches (2)"), 0, 4),
        "images": (("confusion_matrix/val", "correct/test", f"step\n{best}\n"), 4, 0),
        "text": (("python -m cifar10_tl.train", "model.backbone", epochs, "95% interval"), 0, 0),
        "pr_curves": (tuple(f"precision_recall/{name}" for name in results["class_names"]), 0, 10),
        "hparams": ((*list(COLUMNS)[:5], "test/acc", "Adam"), 0, 0),
    }
    for tab, (texts, num_images, num_lines) in expected.items():
        browser.get("about:blank")
        browser.get(f"{board.url}#{tab}")

        def is_complete(seen: dict[str, Any]) -> bool:
            enough = len(seen["images"]) >= num_images and sum(n > 5 for n in seen["lines"]) >= num_lines  # noqa: B023
            return enough and all(seen["images"]) and all(text in seen["text"] for text in texts)  # noqa: B023

        seen = looks(browser, is_complete)
        assert is_complete(seen), (tab, seen)
        assert "No dashboards are active" not in seen["text"]
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "favicon" not in message]


@pytest.mark.slow
def test_the_page_draws_the_projection(finished_run: Path, browser: Any) -> None:
    board = Board(finished_run)
    board.wait(lambda: board.get("projector/runs") == ["."])
    browser.set_window_size(1500, 1000)
    browser.get("about:blank")
    browser.get(f"{board.url}data/plugin/projector/projector_binary.html")
    seen = looks(browser, lambda seen: "Points:\n100" in seen["text"])
    assert "Points:\n100\nDimension:\n64" in seen["text"]

    def num_colors() -> int:
        page = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        middle = page.crop((400, 150, 1100, 800))
        return len(middle.getcolors(700 * 650) or ())

    limit = time.monotonic() + 180
    while num_colors() < 500 and time.monotonic() < limit:  # thumbnails on a white page
        time.sleep(0.5)
    assert num_colors() >= 500


def test_other_loggers_get_the_settings_of_a_new_run(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
    cfg = compose_train("optimizer.lr=0.03")
    log_start(cfg, trainer, epoch=0, is_new=False)
    assert not logger.experiment.hparams, "a resumed run has other settings, which MLflow refuses"
    log_start(cfg, trainer, epoch=0)
    assert logger.experiment.hparams["optimizer.lr"] == 0.03
