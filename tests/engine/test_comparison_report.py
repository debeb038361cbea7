from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import compose_command, make_run

from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.engine.comparison import read_run
from cifar10_tl.engine.comparison_report import load_images
from cifar10_tl.engine.results import images_checksum
from cifar10_tl.evaluate import evaluate, quote_list

DATA = {"source": "shapes", "train_size": 40, "val_size": 10, "test_size": 8}
PROBABILITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.75, 0.5, 0.65)


def checksum() -> str:
    datamodule = CIFAR10DataModule(**DATA)
    datamodule.setup()
    return images_checksum(datamodule.splits["test"])


def write_run(
    folder: Path,
    correct: str,
    config: dict[str, Any] | None = None,
    probabilities: Sequence[float] = PROBABILITIES,
    **results: Any,
) -> Path:
    """Write a run on built-in images, with a probability for each, and the path of a file."""
    config = {"seed": 0, "data": {**DATA, "cache_features": True}, **(config or {})}
    make_run(folder, correct, config=config, **{"test_images": checksum(), **results})
    with (folder / "predictions.csv").open() as file:
        header, *rows = csv.reader(file)
    rows = [[*row, p, f"<{row[0]}>.png"] for row, p in zip(rows, probabilities, strict=True)]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*header, "probability", "path"], *rows])
    return folder


def compare(out: Path, *runs: Path) -> str:
    """Return the page that the command writes."""
    evaluate(compose_command("evaluate", quote_list(f"compare={','.join(map(str, runs))}"), f"paths.output_dir={out}"))
    return (out / "report.html").read_text()


def sections(page: str) -> dict[str, list[str]]:
    """Return the paths of the images in each section."""
    parts = re.split(r'<h2 id="([A-Z]-[A-Z])">', page)[1:]
    return {name: re.findall(r"<small>(.*?)</small>", text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def test_images_that_only_one_run_gets_correct_are_shown_by_the_confidence_of_the_error(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "11111000"),
        write_run(tmp_path / "b", "10010111", probabilities=PROBABILITIES[::-1]),
        write_run(tmp_path / "c", "11111000"),
    ]
    page = compare(tmp_path / "out", *runs)
    only_a, only_b = ([f"&lt;{i}&gt;.png" for i in images] for images in ((2, 4, 1), (5, 7, 6)))
    assert sections(page) == {"A-B": only_a, "B-A": only_b, "A-C": [], "C-A": []}
    assert page.count('<i class="t"') == 6
    assert "3 of 3 images shown, the most confident errors of B first" in page
    for text in ("A: dog 80.0%, B: frog 50.0%", "B: dog 70.0%, A: frog 75.0%"):  # of images 1 and 5
        assert page.count(text) == 1
    assert "+12.50%" not in page
    assert "0.00%" in page  # of b, with 5 of 8 correct like a
    assert "<1>" not in page


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_images": "1234"}, "the images are not those of the test"),
        ({"config": {"data": {"source": "folder", "root": "gone"}}}, "gone: there is no such folder"),
        ({"config": {"data": None}}, "TypeError"),
    ],
)
def test_images_that_cannot_be_loaded_are_listed(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    page = compare(tmp_path / "out", *(write_run(tmp_path / name, name * 8, **changes) for name in "01"))
    assert reason in re.search("could not be loaded again: (.*)</p>", page)[1]
    assert [len(found) for found in sections(page).values()] == [0, 8]
    assert '<i class="t"' not in page


def test_images_come_from_the_first_run_that_has_them(tmp_path: Path) -> None:
    gone = write_run(tmp_path / "gone", "1" * 8, config={"data": {"source": "folder", "root": "gone"}})
    evaluation = write_run(tmp_path / "evaluation", "1" * 8, config={}, data=DATA, checkpoint="a/checkpoints/best.ckpt")
    split, problem = load_images([read_run(gone), read_run(evaluation)])
    assert problem == ""
    assert split is not None
    assert images_checksum(split) == checksum()


def test_curves_of_all_runs_and_seeds_are_on_the_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "1" * (4 + n) + "0" * (4 - n), {"seed": n}) for n, name in enumerate("abc")]
    for run, accuracy in zip(runs, (0.5, 0.25), strict=False):  # none of the third one
        (run / "metrics.csv").write_text(f"epoch,val/acc,val/loss\n0,{accuracy},nan\n1,0.75,\n")
    checkpoint = str(runs[0] / "checkpoints" / "best.ckpt")
    page = compare(tmp_path / "out", *runs, write_run(tmp_path / "d", "1" * 8, checkpoint=checkpoint))
    (chart,) = re.findall(r'<figure class="chart">.*?</figure>', page, re.S)
    assert re.findall(r"<title>(.*?)</title>", chart) == [
        f"{name}, epoch {epoch}: {value}"
        for name, first in (("A", "50%"), ("B", "25%"), ("D", "50%"))
        for epoch, value in ((0, first), (1, "75%"))
    ]
    assert '<h2 id="settings">' in page
    assert "62.50%" in page  # the mean of three seeds


@pytest.mark.slow
def test_page_fits_a_phone_in_a_browser(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f'<b>"{seed}', "1" * (4 + seed) + "0" * (4 - seed), {"seed": seed}) for seed in (0, 1)]
    (runs[0] / "metrics.csv").write_text("epoch,val/acc,val/loss\n0,0.5,1\n1,0.75,0.5\n")
    compare(tmp_path / "out", *runs)
    for width in (375, 1200):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "out" / "report.html").as_uri())
        page = "document.documentElement"
        assert browser.execute_script(f"return {page}.scrollWidth - {page}.clientWidth") == 0
        assert browser.execute_script("return [...document.querySelectorAll('dd')].map(e => e.firstChild.data)") == [
            str(run) for run in runs
        ]
        (picture,) = browser.execute_script("return [...document.querySelectorAll('i.t')].map(e => e.offsetWidth)")
        assert picture == 96
    assert [entry["message"] for entry in browser.get_log("browser")] == []
