"""The page report.html: its numbers, images, links and texts, read from the file and in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import compose_train
from jinja2 import Environment, PackageLoader
from PIL import Image

from cifar10_tl.data.batch import Split
from cifar10_tl.engine import report
from cifar10_tl.engine.builder import plain
from cifar10_tl.engine.report import Axis, Gallery, Neighbors, standard_galleries, write_report
from cifar10_tl.engine.results import all_metrics, read_results, write_results
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.plots.style import as_percent

HOSTILE = ("<script>alert(1)</script>", "a\"b'c&amp;</style>", "{{ 7 * 7 }}", "plain")


class Page(HTMLParser):
    """Elements of a page: those with a value, links, identifiers, styles of pictures, and the tags of all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[tuple[str, str, str]] = []  # class, style, title
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found: dict[str, Any] = dict(attrs)
        self.tags[tag] += 1
        if tag == "data":
            self.values[found["data-key"]] = found["value"]
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        if tag == "i" and found.get("class") in ("t", "g"):
            self.pictures.append((found["class"], found["style"], found["title"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluate(num_images: int = 300, names: tuple[str, ...] = HOSTILE, side: int = 32) -> tuple[Evaluation, Split]:
    """Return an evaluation of noise, in which each class is mistaken for others, and its images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % len(names)
    logits = torch.randn(num_images, len(names), generator=generator)
    logits[torch.arange(num_images), labels] += 1
    coarse = torch.randint(0, 256, (num_images, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images = coarse.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    paths = [f'test/{names[label]}/it\'s "{i}".png' for i, label in enumerate(labels.tolist())]
    return Evaluation(logits, labels, torch.arange(num_images), names), Split(images, labels, paths=paths)


def write(
    folder: Path,
    evaluation: Evaluation,
    split: Split,
    temperature: float | None = 1.5,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> Page:
    """Write results.json, metrics.csv and report.html, and return the page."""
    results = {
        "test": all_metrics(evaluation, split, temperature),
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "near_duplicates": {"count": 2, "acc_with": 0.5, "acc_without": 0.25},
        **(extra or {}),
    }
    write_results(folder, results, evaluation, split)
    (folder / "metrics.csv").write_text("epoch,train/loss,train/acc,val/loss,val/acc\n0,2,0.25,nan,0.5\n1,1,0.5,1,\n")
    write_report(folder, evaluation, split, **options)
    return Page((folder / "report.html").read_text())


def explain(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return a map for each image in place of Grad-CAM: the quarter of its class is as warm as its first pixel."""
    return F.one_hot(classes, 4).view(-1, 2, 2) * images[:, 0, :1, :1] / 255


def words(source: str) -> str:
    """Return the texts of a part of the page, with spaces between them."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", source)).split())


def part(folder: Path, start: str, end: str) -> str:
    """Return the only part of the page with this start and end."""
    (found,) = re.findall(f"{start}.*?{end}", (folder / "report.html").read_text(), re.S)
    return found


def sprite(folder: Path, name: str = "t") -> np.ndarray:
    """Return the pixels of the thumbnails."""
    source = (folder / "report.html").read_text()
    (uri,) = re.findall(rf"\.{name} {{ background-image: url\(data:image/webp;base64,([^)]+)\)", source)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))


def difference(pixels: np.ndarray, style: str, image: torch.Tensor) -> float:
    """Return the mean difference of an image from what a picture of this style shows of the thumbnails."""
    side = image.shape[-1]
    x, y = (side * int(number) for number in re.fullmatch(r"--x:(\d+);--y:(\d+)", style).groups())
    return np.abs(pixels[y : y + side, x : x + side].astype(float) - image.permute(1, 2, 0).numpy()).mean()


def test_numbers_are_those_of_results_json_to_the_last_digit(tmp_path: Path) -> None:
    page, results = write(tmp_path, *evaluate()), json.loads((tmp_path / "results.json").read_text())
    for key, value in page.values.items():
        assert value == json.dumps(report.at(results, key)), key
    scores = ("acc", "acc_interval.0", "acc_interval.1", "loss", "top2_acc", "macro_f1", "nll", "brier", "ece", "count")
    calibrated = ("temperature", "nll", "brier", "ece")
    classes = [f"per_class.{i}.{score}" for i in range(4) for score in ("precision", "recall", "f1", "count")]
    expected = {f"test.{key}" for key in (*scores, *(f"calibrated.{key}" for key in calibrated), *classes)}
    assert expected <= page.values.keys()
    matrix = {(i, j): n for i, row in enumerate(results["confusion_matrix"]) for j, n in enumerate(row)}
    assert all(page.values[f"confusion_matrix.{i}.{j}"] == str(count) for (i, j), count in matrix.items() if count)
    assert f"{results['test']['acc']:.2%}" in page.text
    assert "test.balanced_acc" not in page.values, "it equals the accuracy"
    page = write(tmp_path, *evaluate(301))
    assert page.values["test.balanced_acc"] == str(read_results(tmp_path)["test"]["balanced_acc"])


def test_cells_open_their_images(tmp_path: Path) -> None:
    evaluation, split = evaluate()
    page, matrix = write(tmp_path, evaluation, split), evaluation.confusion_matrix
    assert {link for link in page.links if link.startswith("#c-")} == {
        f"#c-{i}-{j}" for i, j in matrix.nonzero().tolist()
    }
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    source, pixels = (tmp_path / "report.html").read_text(), sprite(tmp_path)
    for i, j in matrix.nonzero().tolist():
        (section,) = re.findall(rf'<section class="cell" id="c-{i}-{j}">.*?</section>', source, re.S)
        shown = min(100, int(matrix[i, j]))
        assert f"{shown} of {matrix[i, j]} shown" in section
        assert words(section).startswith(f"{HOSTILE[i]} → {HOSTILE[j]} ")
        captions = re.findall(r"</i>([\d.]+%) #(\d+)</figure>", section)
        found = [int(index) for _, index in captions]
        assert [percent for percent, _ in captions] == [*map(as_percent, evaluation.probabilities[found, j].tolist())]
        confidence = evaluation.probabilities.max(1).values[found]
        assert len(set(found)) == shown
        assert set(evaluation.labels[found].tolist()) == {i}
        assert set(evaluation.predictions[found].tolist()) == {j}
        assert confidence.tolist() == sorted(confidence.tolist(), reverse=i != j)
        for index, (_, style, title) in zip(found, Page(section).pictures, strict=True):
            assert difference(pixels, style, split.images[index]) < 20
            assert title == split.paths[index]


def test_tables_show_each_number_in_its_row_and_column(tmp_path: Path) -> None:
    evaluation, split = evaluate()
    write(tmp_path, evaluation, split)
    counts, matrix = evaluation.confusion_matrix.tolist(), part(tmp_path, '<table class="matrix">', "</table>")
    rows = [[name, *map(str, row)] for name, row in zip(HOSTILE, counts, strict=True)]
    assert words(matrix) == " ".join(sum(rows, [*HOSTILE]))
    confusions = {(i, j): f"{HOSTILE[i]} → {HOSTILE[j]}" for i in range(4) for j in range(4)}
    shares = {(i, j): as_percent(counts[i][j] / 75) for i, j in confusions}  # each class has 75 images
    links = re.findall(r'<a href="#c-(\d)-(\d)" title="(.*?)">', matrix)
    assert [(int(i), int(j), html.unescape(title)) for i, j, title in links] == [
        (*cell, f"{text}: {shares[cell]}") for cell, text in confusions.items()
    ]
    listed = re.findall(r'<li><a href="#c-(\d)-(\d)">(.*?)</li>', part(tmp_path, "<ol>", "</ol>"))
    assert len(listed) == 10
    for i, j, text in listed:
        cell = int(i), int(j)
        assert words(text) == f"{confusions[cell]} : {counts[cell[0]][cell[1]]} images, {shares[cell]} of the class"
    table, classes = part(tmp_path, '<table class="table sortable">', "</table>"), evaluation.per_class()
    scores = [[as_percent(row[key]) for key in ("precision", "recall", "f1")] for row in classes]
    rows = [[row["class"], str(row["count"]), *cells] for row, cells in zip(classes, scores, strict=True)]
    assert words(table) == " ".join(sum(rows, ["class images precision recall F1"]))


def test_a_card_shows_its_image_classes_map_and_neighbors(tmp_path: Path) -> None:
    """Of a part of the split, with training images that have other labels, indices and paths."""
    (whole, split), chosen = evaluate(60, ("a", "b", "c", "d")), torch.arange(20, 60)
    evaluation = Evaluation(whole.logits[chosen], whole.labels[chosen], chosen, whole.class_names)
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    train = Split(evaluate(50)[1].images, labels, torch.arange(100, 150), paths=[None, "train.png"] * 25)
    positions = torch.arange(200).view(40, 5) % 50
    write(tmp_path, evaluation, split, neighbors=Neighbors(train, positions, positions / 50), explain=explain)
    names, sprites = evaluation.class_names, {kind: sprite(tmp_path, kind) for kind in ("t", "g")}
    cards = re.findall('<article class="card">.*?</article>', (tmp_path / "report.html").read_text(), re.S)
    shown = torch.cat([gallery.positions for gallery in standard_galleries(evaluation)]).tolist()
    for position, card in zip(shown, cards, strict=True):
        near, probabilities = positions[position].tolist(), evaluation.probabilities[position].tolist()
        true, predicted, image = (int(x[position]) for x in (evaluation.labels, evaluation.predictions, chosen))
        order = sorted(range(4), key=lambda k: -probabilities[k])
        classes = [k for k in order if k in order[:3] or k == true]
        heading = [names[true], "→", names[predicted]] if true != predicted else [names[true]]
        rows = [f"{names[k]} {as_percent(probabilities[k])}" for k in classes]
        below = [f"{names[labels[n]]} {n / 50:.2f}" for n in near]
        assert words(card) == " ".join([*heading, *rows, split.paths[image] or "", *below])
        assert re.findall('--p:(.*?)"', card) == [f"{probabilities[k]:.3f}" for k in classes]
        roles = {predicted: "wrong", true: "true"}
        colored = [predicted, *classes, *labels[near].tolist()]
        assert re.findall('<(?:b|tr|figure) class="(.*?)">', card) == [roles.get(k, "") for k in colored]
        pictures = Page(card).pictures
        titles = [f"{train.paths[n] or f'#{100 + n}'}: {names[labels[n]]}" for n in near]
        assert [title for *_, title in pictures] == [split.paths[image], "Grad-CAM", *titles]
        explained = report.overlay(split.images[image], explain(split.images[[image]], torch.tensor([predicted]))[0])
        expected = [split.images[image], explained, *train.images[near]]
        for (kind, style, _), pixels in zip(pictures, expected, strict=True):
            assert difference(sprites[kind], style, pixels) < 20


def test_a_map_colors_its_part_of_the_image() -> None:
    colored = report.overlay(torch.full((3, 32, 32), 100, dtype=torch.uint8), torch.eye(2))
    assert colored[:, 2, 61].tolist() == [100, 100, 100]
    assert colored[:, 2, 2].tolist() == [113, 42, 42]  # 40% of it and 60% of a dark red


def test_galleries_show_each_image_once_in_the_file(tmp_path: Path) -> None:
    evaluation, split = evaluate()
    errors, unsure = (gallery.positions for gallery in standard_galleries(evaluation))
    assert errors.tolist() == evaluation.incorrect(48).tolist()
    confidence = evaluation.probabilities.max(1).values
    assert (evaluation.predictions == evaluation.labels)[unsure].all()
    assert confidence[unsure].tolist() == sorted(confidence[evaluation.predictions == evaluation.labels].tolist())[:48]
    neighbors = Neighbors(split, torch.arange(300)[:, None].repeat(1, 5), torch.full((300, 5), 0.5))
    more = Gallery("near_duplicates", "Near-duplicates", "A hint.", torch.tensor([0, 1]))
    page = write(tmp_path, evaluation, split, neighbors=neighbors, explain=explain, galleries=[more])
    assert (page.tags["article"], page.tags["section"]) == (98, 16)
    places = {(kind, style) for kind, style, _ in page.pictures}
    assert Counter(kind for kind, *_ in page.pictures) == {"t": 300 + 98 + 98 * 5, "g": 98}
    shown = {int(p) for positions in (errors, unsure, more.positions) for p in positions}
    assert Counter(kind for kind, _ in places) == {"t": 300 + len(shown), "g": len(shown)}
    assert page.values["near_duplicates.acc_without"] == "0.25"
    assert "report=full" not in page.text


def test_settings_and_commands_of_the_run(tmp_path: Path) -> None:
    evaluation, split = evaluate(20)
    config = plain(compose_train("optimizer=sgd", "seed=3", f"paths.output_dir={tmp_path}"))
    run = {"epochs": 5, "best_epoch": 4, "seconds": {"fit": 90}, "images_per_second": 123.4, "config": config}
    also = {"tta": {"acc": 0.875}, "doubtful_labels": {"acc_without": None}}
    also["logistic_regression"] = {"test": {"acc": 1.0}}
    page = write(tmp_path, evaluation, split, extra=run | also)
    assert (page.values["tta.acc"], page.values["logistic_regression.test.acc"]) == ("0.875", "1.0")
    assert "n/a accuracy without images of doubtful labels" in page.text
    command = "python -m cifar10_tl.train optimizer=sgd seed=3"
    for text in (command, "optimizer=sgd seed=3 ", "the best by val/acc is epoch 4; SGD"):
        assert text in page.text
    assert "1.5 min of training, 123 images/s" in page.text


def test_without_analysis_the_page_names_the_command(tmp_path: Path) -> None:
    page = write(tmp_path, *evaluate(), temperature=None, explain=lambda images, _: torch.ones(len(images), 1, 1))
    assert "g" not in {kind for kind, *_ in page.pictures}, "a map of one value says nothing"
    assert "No Grad-CAM" in page.text
    command = f"python -m cifar10_tl.evaluate checkpoint={tmp_path / 'checkpoints' / 'best.ckpt'}"
    assert f"{command} report=full" in page.text
    assert "temperature scaling is in the report of" in page.text


def test_texts_stay_texts_and_nothing_is_loaded(tmp_path: Path) -> None:
    page, source = write(tmp_path, *evaluate()), (tmp_path / "report.html").read_text()
    assert (page.tags["script"], page.tags["style"]) == (1, 1)
    assert "49" not in re.findall(r"<th[^>]*>([^<]*)</th>", source)
    assert page.text.count("<script>alert(1)</script>") > 5
    assert 'test/{{ 7 * 7 }}/it\'s "2".png' in {title for *_, title in page.pictures}
    assert not re.findall(r"https?:|\bsrc=|@import|<link", source)
    assert set(re.findall(r"url\(([^,;)]*)", source)) == {"data:image/webp"}


def test_curves_leave_out_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, *evaluate())
    accuracy, loss = report.curves({split: (tmp_path / "metrics.csv", split) for split in ("train", "val")})
    assert accuracy["lines"] == {"train": [(0, 0.25), (1, 0.5)], "val": [(0, 0.5)]}
    assert loss["lines"] == {"train": [(0, 2.0), (1, 1.0)], "val": [(1, 1.0)]}
    assert report.curves({"val": (tmp_path / "none.csv", "val")}) == []
    source = (tmp_path / "report.html").read_text()
    points = re.findall(r'<circle cx="(.*?)" cy="(.*?)" .*?<title>(.*?)</title>', source)
    assert points == [
        ("39.3", "191.3", "train, epoch 0: 25%"),  # from 200, the lowest, to 8
        ("404.7", "16.7", "train, epoch 1: 50%"),
        ("39.3", "16.7", "val, epoch 0: 50%"),
        ("39.3", "16.7", "train, epoch 0: 2"),
        ("404.7", "191.3", "train, epoch 1: 1"),
        ("404.7", "191.3", "val, epoch 1: 1"),
    ]
    assert re.findall('<polyline points="(.*?)"', source)[0] == "39.3,191.3 404.7,16.7 "


def test_reliability_before_and_after_temperature_scaling(tmp_path: Path) -> None:
    """Of the logits (2, 0), correct in 3 of 4: the confidence is 88%, and 75% at the temperature 2 / log 3."""
    _, split = evaluate(4)
    evaluation = Evaluation(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]), torch.arange(4), ("a", "b"))
    write(tmp_path, evaluation, split, temperature=2 / math.log(3))
    charts = part(tmp_path, '<h2 id="calibration">', '<div><table class="table">')
    assert re.findall("<(?:figcaption|title)>(.*?)</", charts) == [
        *("uncalibrated", "4 images, confidence 88.1%, accuracy 75.0%"),
        *("temperature-scaled", "4 images, confidence 75.0%, accuracy 75.0%"),
    ]
    bars = re.findall('<rect class="bar" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', charts)
    assert [[*map(float, bar)] for bar in bars] == [  # in the bins 13 and 11 of 15
        pytest.approx([44 + k * 232 / 15 + 1, 250 - 0.75 * 240, 232 / 15 - 2, 0.75 * 240], abs=0.1) for k in (13, 11)
    ]
    marks = re.findall('<path class="mark" d="M.*? (.*?)h', charts)
    assert [*map(float, marks)] == pytest.approx([250 - 0.8808 * 240, 250 - 0.75 * 240], abs=0.1)
    labels = re.findall('<text x=".*?" y="(.*?)" text-anchor="end">(.*?)</text>', charts)
    assert {("254.0", "0%"), ("14.0", "100%")} <= {*labels}


@pytest.mark.parametrize("values", [(0.11667, 0.11721), (0.0, 1.0), (0.5, 0.5), (0.5, 0.5 + 1e-12), (1e-3, 1e12)])
@pytest.mark.parametrize("unit", ["%", ""])
def test_labels_of_a_chart_fit_beside_it(values: tuple[float, float], unit: str) -> None:
    chart = report.line_chart("accuracy", {"val": list(enumerate(values))}, unit)
    labels = [chart["y"].text(tick) for tick in chart["y"].ticks]
    assert 7.7 * max(map(len, labels)) <= chart["x"].start - 6  # width of a digit at 12 px
    assert len({*labels}) == len(labels) > 0


def test_lines_of_the_same_color_are_told_apart() -> None:
    environment = Environment(loader=PackageLoader("cifar10_tl.engine"), autoescape=True)
    environment.filters |= dict.fromkeys(("at", "spec", "percent"), str)
    macros: Any = environment.get_template("macros.html.jinja").module
    assert [macros.line_style(number) for number in (0, 5, 6, 11)] == ["s0", "s5", "s0 dashed", "s5 dashed"]


def test_axes_map_values_to_pixels() -> None:
    axis = Axis([0, 10], 100, 0, margin=0.1)
    assert [axis(value) for value in (-1, 5, 11)] == [100, 50, 0]
    assert axis.ticks == [0, 2, 4, 6, 8, 10]
    assert Axis([3], 0, 100, "epochs").ticks == [3]
    full = Axis([1.0, 1.0], 0, 100, "%")
    assert (full.low, full.ticks[-1]) == (0.995, 1.0)
    assert [Axis([0, 1], 0, 1, unit).text(0.125) for unit in ("%", "")] == ["12.5%", "0.125"]
    near = Axis([2.2985, 2.3012], 0, 1)
    assert [float(near.text(tick)) for tick in near.ticks] == pytest.approx(near.ticks, abs=1e-9)


def test_a_run_without_test_has_a_page(tmp_path: Path) -> None:
    write_results(tmp_path, {"val": {"acc": 0.75, "loss": 1.0, "count": 80}})
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.values == {"val.acc": "0.75", "val.count": "80"}
    assert not page.pictures


def test_a_page_needs_neither_the_run_of_a_checkpoint_nor_its_experiment(tmp_path: Path) -> None:
    evaluation, split = evaluate(20)
    write_results(tmp_path / "a", {"config": {"images": 3}})  # of something else
    of_checkpoint = {"checkpoint": str(tmp_path / "a" / "b" / "best.ckpt"), "epoch": 3, "data": {"source": "shapes"}}
    page = write(tmp_path / "evaluation", evaluation, split, extra=of_checkpoint)
    assert "best.ckpt, epoch 3, on shapes" in page.text
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("[experiment=gone]")
    run = {"epochs": 5, "best_epoch": None, "seconds": {"fit": 90}, "config": plain(compose_train())}
    page = write(tmp_path / "run", evaluation, split, extra=run)
    assert re.search(r"# train cannot be repeated: .*experiment/gone", page.text)


def test_another_split_is_named(tmp_path: Path) -> None:
    evaluation, split = evaluate(20)
    page = write(tmp_path, evaluation, split, extra={"split": "val", "val": all_metrics(evaluation, split)})
    assert "of 20 validation images are classified correctly" in " ".join(page.text.split())
    assert {key.split(".")[0] for key in page.values} == {"val", "confusion_matrix"}


def test_many_classes_are_listed_by_pair(tmp_path: Path) -> None:
    evaluation, split = evaluate(200, tuple(f"class {i}" for i in range(31)))
    page = write(tmp_path, evaluation, split)
    pairs = [tuple(map(int, link.split("-")[1:])) for link in page.links if link.startswith("#c-")]
    counts = [int(evaluation.confusion_matrix[pair]) for pair in pairs]
    assert len(pairs) == page.tags["section"] == 100
    assert all(i != j for i, j in pairs)
    assert counts == sorted(counts, reverse=True)
    logits, labels = 5 * torch.eye(31)[[1, *range(1, 31)]], torch.arange(31)
    one_error = Evaluation.of(logits, labels, labels, evaluation.class_names)
    page = write(tmp_path, one_error, Split(split.images[:31], labels))
    assert [link for link in page.links if link.startswith("#c-")] == ["#c-0-1"]
    assert page.tags["section"] == 1, "correct predictions have no link"


def test_a_failure_is_logged_and_keeps_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> str:
        raise MemoryError("too large")

    monkeypatch.setattr(report, "render", fail)
    with pytest.raises(FileNotFoundError):
        write(tmp_path, *evaluate(20))
    assert caplog.messages == [f"{tmp_path / 'report.html'} was not written: MemoryError: too large"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "predictions.csv", "metrics.csv"}


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 96])
def test_ten_thousand_images_fit_into_six_megabytes(side: int, tmp_path: Path) -> None:
    """Noise of the worst kind, for WebP as for the network: all cells of the confusion matrix are about equal."""
    evaluation, _ = evaluate(10_000, tuple(f"a rather long class name {i}" for i in range(10)))
    evaluation.logits[:] = torch.randn(evaluation.logits.shape)
    images = torch.randint(0, 256, (10_000, 3, side, side), dtype=torch.uint8)
    split = Split(
        images, evaluation.labels, paths=[f"test/a rather long class name/image {i}.jpg" for i in range(10_000)]
    )
    write(tmp_path, evaluation, split)
    assert (tmp_path / "report.html").stat().st_size <= 6_000_000


def open_page(browser: Any, file: Path, width: int, theme: str) -> None:
    """Open a file in a window of this width, on a phone if it is narrow, in a light or dark theme."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())


#: Texts with less contrast to their background than 4.5 to 1 (WCAG 2.2, success criterion 1.4.3).
PALE = """
const mixed = colors => colors.reduce(
  (under, over) => over.slice(0, 3).map((c, i) => c * over[3] + under[i] * (1 - over[3])));
const parse = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
const light = color => color.map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const pale = [];
for (const element of document.querySelectorAll("body *")) {
  const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.getClientRects().length) continue;
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
  const style = getComputedStyle(element), svg = element.closest("svg");
  const [a, b] = [mixed(layers), mixed([mixed(layers), parse(svg ? style.fill : style.color)])].map(light);
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) pale.push(`${element.tagName} ${element.textContent.slice(0, 40)} ${ratio}`);
}
return pale;
"""


VIEWS = ((1200, "light"), (375, "light"), (375, "dark"))


@pytest.mark.slow
def test_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    evaluation, split = evaluate()
    neighbors = Neighbors(split, torch.arange(300)[:, None].repeat(1, 5), torch.full((300, 5), 0.5))
    write(tmp_path, evaluation, split, neighbors=neighbors, explain=explain)
    many = evaluate(names=("W" * 80, *(f"class {i}" for i in range(19))))
    write(tmp_path / "many", *many)
    pages = [(folder, width, theme) for folder in (tmp_path, tmp_path / "many") for width, theme in VIEWS]
    for folder, width, theme in (*pages, (tmp_path, 1200, "dark")):
        open_page(browser, folder / "report.html", width, theme)
        page = "document.documentElement"
        assert browser.execute_script(f"return {page}.scrollWidth - {page}.clientWidth") == 0
        assert browser.execute_script(PALE) == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    names = browser.execute_script(
        "return [...document.querySelectorAll('.matrix thead span')].map(e => e.textContent)"
    )
    assert tuple(names) == HOSTILE

    def visible() -> list[str]:
        script = "return [...document.querySelectorAll('.cell')].filter(e => e.getClientRects().length).map(e => e.id)"
        return browser.execute_script(script)

    i, j = next((i, j) for i, j in evaluation.confusion_matrix.nonzero().tolist() if i != j)
    assert visible() == []
    browser.find_element("css selector", f".matrix a[href='#c-{i}-{j}']").click()
    assert visible() == [f"c-{i}-{j}"]
    painted = "return getComputedStyle(document.querySelector('.cell:target .t')).backgroundImage.slice(0, 20)"
    assert browser.execute_script(painted) == 'url("data:image/webp'
    browser.find_element("css selector", ".cell:target a").click()
    assert visible() == []

    recall = [row["recall"] for row in evaluation.per_class()]
    browser.find_elements("css selector", ".sortable th")[3].click()
    shown = "return [...document.querySelectorAll('.sortable tbody tr')].map(row => +row.cells[3].firstChild.value)"
    assert browser.execute_script(shown) == sorted(recall, reverse=True)
