"""The page report.html of a run or an evaluation: charts and images in one self-contained file."""

from __future__ import annotations

import base64
import io
import logging
import math
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from cifar10_tl.config.resume import as_override
from cifar10_tl.data.batch import Split
from cifar10_tl.engine.results import REPORT, formatted, read_results
from cifar10_tl.engine.settings import MONITOR, changed_options, flat, repeat_command
from cifar10_tl.io import atomic_write_text, read_csv
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.plots.style import as_percent

log = logging.getLogger(__name__)

GALLERY, PER_CELL = 48, 100  # largest numbers of images in a gallery and behind a cell of the confusion matrix
PIXELS = 4_500_000  # total of the images linked from the confusion matrix; keeps the page below 6 MB
SIDE, COLUMNS, QUALITY = 64, 64, 80  # largest side of a thumbnail in pixels, thumbnails per row, quality of WebP
MATRIX_LIMIT, PAIR_LIMIT = 30, 100  # classes of a matrix of numbers; confused pairs that are listed instead


class Neighbors(NamedTuple):
    """The k training images that are most similar to each of the N images of an evaluation."""

    train: Split
    positions: Tensor  # in ``train``, the most similar first, int64 [N, k]
    similarities: Tensor  # float [N, k]


class Gallery(NamedTuple):
    """Section of the page with images of an evaluation."""

    key: str
    title: str
    note: str
    positions: Tensor  # in the evaluation, int64 [n]


class Sprite:
    """Thumbnails in one image, each stored once."""

    def __init__(self) -> None:
        self.images: dict[Hashable, tuple[int, Tensor]] = {}

    def place(self, key: Hashable, image: Tensor) -> str:
        """Return the CSS that selects ``image``, uint8 [3, S, S], which ``key`` identifies."""
        number, _ = self.images.setdefault(key, (len(self.images), thumbnails(image[None])[0]))
        return f"--x:{number % COLUMNS};--y:{number // COLUMNS}"

    def uri(self) -> str:
        """Return the thumbnails as the data URI of a WebP image."""
        images, file = [image for _, image in self.images.values()], io.BytesIO()
        pixels = make_grid(images, nrow=COLUMNS, padding=0).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "webp", quality=QUALITY)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnails(images: Tensor) -> Tensor:
    """Return images, uint8 [N, 3, S, S], with sides of at most ``SIDE`` pixels."""
    return images if images.shape[-1] <= SIDE else F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)


def overlay(image: Tensor, heatmap: Tensor) -> Tensor:
    """Return an image, uint8 [3, S, S], with a map of values from 0 to 1, float [h, w], as uint8 [3, SIDE, SIDE]."""
    pixels = F.interpolate(thumbnails(image[None]).float() / 255, (SIDE, SIDE))[0]
    heat = F.interpolate(heatmap[None, None].float(), (SIDE, SIDE), mode="bilinear")[0, 0]
    colors = torch.from_numpy(mpl.colormaps["turbo"](heat.numpy())).float().permute(2, 0, 1)[:3]
    return (255 * torch.lerp(pixels, colors, 0.6 * heat)).round().byte()


class Pictures:
    """Images of an evaluation as they are shown on the page; see :func:`write_report` for the arguments."""

    def __init__(self, evaluation: Evaluation, split: Split, neighbors: Neighbors | None) -> None:
        self.evaluation, self.neighbors = evaluation, neighbors
        self.heatmaps: dict[int, Tensor] = {}  # by position
        self.split = split.subset(split.positions_of(evaluation.indices))
        self.predictions, self.labels = evaluation.predictions.tolist(), evaluation.labels.tolist()
        self.indices = evaluation.indices.tolist()
        self.sprite, self.overlays = Sprite(), Sprite()

    def explain(self, function: Callable[[Tensor, Tensor], Tensor], positions: Iterable[int]) -> None:
        """Compute the maps of the images at these positions."""
        shown = sorted(set(positions))
        if shown:
            maps = function(self.split.take(torch.tensor(shown)), self.evaluation.predictions[shown])
            if maps[0].numel() > 1:  # else it says nothing
                self.heatmaps = dict(zip(shown, maps, strict=True))

    def thumbnail(self, position: int) -> dict[str, Any]:
        """Return an image for the template, without details."""
        return {
            "place": self.sprite.place(position, self.split.image(position)),
            "index": self.indices[position],
            "path": self.split.paths[position],
            "true": self.labels[position],
            "predicted": self.predictions[position],
            "probabilities": self.evaluation.probabilities[position].tolist(),
        }

    def card(self, position: int) -> dict[str, Any]:
        """Return an image for the template, with its most likely classes, Grad-CAM and neighbors."""
        card = self.thumbnail(position)
        likely = self.evaluation.probabilities[position].argsort(descending=True, stable=True)[:3].tolist()
        card["classes"] = dict.fromkeys([*likely, card["true"]])
        if position in self.heatmaps:
            explained = overlay(self.split.image(position), self.heatmaps[position])
            card["overlay"] = self.overlays.place(position, explained)
        if self.neighbors is not None:
            train, found, similarities = self.neighbors
            card["neighbors"] = [
                {
                    "place": self.sprite.place(("train", near), train.image(near)),
                    "index": int(train.indices[near]),
                    "path": train.paths[near],
                    "label": int(train.labels[near]),
                    "similarity": similarity,
                }
                for near, similarity in zip(found[position].tolist(), similarities[position].tolist(), strict=True)
            ]
        return card

    def cells(self) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """Return the first images of each cell of the confusion matrix that has a link."""
        cells: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position in self.evaluation.probabilities.max(1).values.argsort(descending=True, stable=True).tolist():
            cells[self.labels[position], self.predictions[position]].append(position)
        # errors first, and of these the most frequent; of correct predictions, the least confident
        found = sorted(cells.items(), key=lambda cell: (cell[0][0] == cell[0][1], -len(cell[1]), cell[0]))
        if self.evaluation.num_classes > MATRIX_LIMIT:
            found = [cell for cell in found if cell[0][0] != cell[0][1]][:PAIR_LIMIT]
        budget, sizes = PIXELS // min(SIDE, self.split.shape[-1]) ** 2, [len(positions) for _, positions in found]
        limit = max((n for n in range(1, PER_CELL + 1) if sum(min(size, n) for size in sizes) <= budget), default=1)
        shown = {(i, j): (positions[::-1] if i == j else positions)[:limit] for (i, j), positions in found}
        return {cell: [self.thumbnail(position) for position in positions] for cell, positions in shown.items()}


def standard_galleries(evaluation: Evaluation) -> list[Gallery]:
    """Return the galleries of every page: confident errors, and unsure correct predictions."""
    errors = evaluation.incorrect(len(evaluation))
    correct = (evaluation.predictions == evaluation.labels).nonzero().flatten()
    unsure = correct[evaluation.probabilities.max(1).values[correct].argsort(stable=True)]
    return [
        Gallery("errors", "Errors", _note("most confident", errors), errors[:GALLERY]),
        Gallery("unsure", "Correct, but unsure", _note("least confident", unsure), unsure[:GALLERY]),
    ]


def _note(first: str, found: Tensor) -> str:
    return f"{min(GALLERY, len(found)):,} of {len(found):,} shown, the {first} first."


def write_report(
    run_dir: Path,
    evaluation: Evaluation | None = None,
    split: Split | None = None,
    *,
    neighbors: Neighbors | None = None,
    explain: Callable[[Tensor, Tensor], Tensor] | None = None,
    galleries: Sequence[Gallery] = (),
) -> None:
    """Write report.html from results.json and metrics.csv of a run or an evaluation, and its images.

    A failure is logged and raises no error, because the results are complete without the page.

    Args:
        run_dir: Folder of results.json, which contains all numbers.
        evaluation: Evaluation of the images in ``split``; None if there was none.
        split: Images of the evaluation.
        neighbors: Nearest training images of all images of the evaluation.
        explain: Function from images and classes to maps of the parts that support the class, see :func:`grad_cam`.
        galleries: More sections with images.
    """
    try:
        page = _page(run_dir)
        if evaluation is not None and split is not None:
            galleries = [*standard_galleries(evaluation), *galleries]
            pictures = Pictures(evaluation, split, neighbors)
            if explain is not None:
                pictures.explain(explain, torch.cat([gallery.positions for gallery in galleries]).tolist())
            page |= _evaluation(pictures, page["scores"], galleries)
        atomic_write_text(run_dir / REPORT, render("report.html.jinja", page))
    except Exception as error:
        log.warning("%s was not written: %s: %s", run_dir / REPORT, type(error).__name__, error)
        log.debug("", exc_info=True)


def _page(run_dir: Path) -> dict[str, Any]:
    """Return what the page shows without images."""
    results = read_results(run_dir)
    checkpoint = Path(results.get("checkpoint", run_dir / "checkpoints" / "best.ckpt"))
    train_dir, split = training_dir(run_dir, results), results.get("split", "test" if "test" in results else "val")
    training = read_results(train_dir)
    config = training.get("config", {}) if "epochs" in training else {}  # else the folder is not that of a run
    runs = {"train": (config, train_dir)}
    if "checkpoint" in results:
        runs["evaluate"] = (results.get("config"), run_dir)
    return {
        "results": results,
        "training": training,
        "config": config,
        "monitor": flat(config).get(MONITOR),
        "split": split,
        "scores": results[split],
        "charts": curves({split: (train_dir / "metrics.csv", split) for split in ("train", "val")}),
        "changed": [as_override(*item) for item in changed_options(config).items()],
        "commands": [repeat_command(*run, name) for name, run in runs.items() if run[0]],
        "folder": run_dir,
        "evaluate": f"python -m cifar10_tl.evaluate {shlex.quote(as_override('checkpoint', str(checkpoint)))}",
    }


def training_dir(run_dir: Path, results: Mapping[str, Any]) -> Path:
    """Return the folder of the training run that the ``results`` in ``run_dir`` belong to."""
    return Path(results["checkpoint"]).resolve().parent.parent if "checkpoint" in results else run_dir


def _evaluation(pictures: Pictures, scores: Mapping[str, Any], galleries: Sequence[Gallery]) -> dict[str, Any]:
    """Return what the page shows of an evaluation."""
    evaluation, cells = pictures.evaluation, pictures.cells()
    errors = [(i, j) for i, j in cells if i != j]
    has_matrix = evaluation.num_classes <= MATRIX_LIMIT
    scaled = [evaluation.scaled(scores["calibrated"]["temperature"])] if "calibrated" in scores else []
    return {
        "names": evaluation.class_names,
        "has_matrix": has_matrix,
        "cells": cells,
        "pairs": errors[: 10 if has_matrix else PAIR_LIMIT],
        "bins": [list(zip(*map(Tensor.tolist, e.reliability_bins()), strict=True)) for e in (evaluation, *scaled)],
        "galleries": [(gallery, [pictures.card(p) for p in gallery.positions.tolist()]) for gallery in galleries],
        "pictures": pictures,
        "sprites": {"t": pictures.sprite, "g": pictures.overlays},
    }


class Axis:
    """Axis of an SVG chart from pixel ``start`` to ``end``, for one value or more in "%", "epochs" or no unit."""

    def __init__(self, values: Iterable[float], start: float, end: float, unit: str = "", margin: float = 0.05) -> None:
        low, high = min(values := list(values)), max(values)
        spare = margin * (high - low) or (0.005 if unit == "%" else 0.5) * (low == high)  # centers a single value
        self.low, self.high, self.start, self.end, self.unit = low - spare, high + spare, start, end, unit
        ticks = MaxNLocator(6, integer=unit == "epochs", min_n_ticks=1).tick_values(self.low, self.high)
        top = min(self.high, 1 + 1e-9) if unit == "%" else self.high
        self.ticks = [float(tick) for tick in ticks if self.low <= tick <= top]
        texts = {digits: {f"{tick:.{digits}g}" for tick in self.ticks} for digits in range(17, 3, -1)}
        self.digits = min(digits for digits in texts if len(texts[digits]) == len(texts[17]))  # tells ticks apart

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def text(self, value: float) -> str:
        """Return ``value`` as a label."""
        return f"{100 * value:.{self.digits}g}%" if self.unit == "%" else f"{value:.{self.digits}g}"


def curves(sources: Mapping[str, tuple[Path, str]]) -> list[dict[str, Any]]:
    """Return the charts of accuracy and loss, with one line per source: a metrics.csv and a split in it."""
    charts = [
        line_chart(title, {name: read_curve(file, f"{split}/{key}") for name, (file, split) in sources.items()}, unit)
        for key, title, unit in (("acc", "accuracy", "%"), ("loss", "loss", ""))
    ]
    return [chart for chart in charts if chart]


def read_curve(metrics_csv: Path, key: str) -> list[tuple[float, float]]:
    """Return the epochs and values of a metric in metrics.csv, none if there is no such file."""
    return [(float(row["epoch"]), float(row[key])) for row in read_csv(metrics_csv) if row.get(key)]


def line_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> dict[str, Any]:
    """Return a chart for the macro of this name: the finite points (epoch, value) of each line, empty without any."""
    finite = {name: [point for point in line if math.isfinite(point[1])] for name, line in lines.items()}
    finite = {name: line for name, line in finite.items() if line}
    if not finite:
        return {}
    x, y = zip(*(point for line in finite.values() for point in line), strict=True)
    y_axis = Axis(y, 200, 8, unit)
    left = 8 + 8 * max(len(y_axis.text(tick)) for tick in y_axis.ticks)  # pixels per character
    return {"title": title, "lines": finite, "x": Axis(x, left, 412, "epochs", 0.02), "y": y_axis}


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return the page of a template in the folder ``templates``, in which all text is escaped."""
    environment = Environment(loader=PackageLoader("cifar10_tl.engine"), autoescape=True, trim_blocks=True)
    environment.filters |= {"percent": as_percent, "at": at, "spec": formatted}
    written = time.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(context, Axis=Axis, written=written)


def at(results: Any, key: str) -> Any:
    """Return the value of a dotted key, such as ``test.acc_interval.0``."""
    for part in key.split("."):
        results = results[int(part) if isinstance(results, list) else part]
    return results
