from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import REPOSITORY, compose_train
from plots.figures import strings

from cifar10_tl.engine.builder import plain
from cifar10_tl.metrics.intervals import wilson_interval

SCRIPT = REPOSITORY / "scripts" / "results.py"
RESULTS = runpy.run_path(str(SCRIPT))


def make_run(
    folder: Path, acc: float, *overrides: str, device: str = "cpu (X)", devices: int = 1, images: str = "aa", **own: Any
) -> Path:
    """Write the files of a finished run of the train command."""
    given = [*overrides, f"paths.output_dir={folder}"]
    results = {
        "test": {"acc": acc, "loss": 0.4, "count": 1000, "per_class": []},
        "val": {"acc": 0.9, "loss": 0.3, "count": 500},
        "test_images": images,
        "best_epoch": 3,
        "epochs": 4,
        "seconds": {"fit": 600.0, "first_step": 1.0, "test": 2.0},
        "images_per_second": 1234.0,
        "config": plain(compose_train(*given)),
        "environment": {
            "device": device,
            "devices": devices,
            "threads": 2,
            "precision": "32-true",
            "git": "0123456789" * 4 + "-dirty",
            "versions": {"torch": "2.15.0"},
        },
        **own,
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(given))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def digests(tmp_path: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the digests of runs that are given by the arguments of ``make_run``."""
    folders = [make_run(tmp_path / str(i), run.pop("acc"), *run.pop("on"), **run) for i, run in enumerate(runs)]
    return RESULTS["merged"](RESULTS["digest"](folder, "drawn shapes") for folder in folders)


def rows(runs: list[dict[str, Any]]) -> list[Any]:
    return [row for table in RESULTS["rows_by_data"](runs).values() for row in table]


def test_seeds_of_a_recipe_are_one_row_with_students_interval(tmp_path: Path) -> None:
    """The mean of 0.90, 0.92 and 0.94 is uncertain by 4.3027 * 0.02 / sqrt(3)."""
    recipe = ("experiment=quickstart", "optimizer.lr=0.01")
    runs = digests(tmp_path, *({"acc": 0.9 + 0.02 * seed, "on": (*recipe, f"seed={seed}")} for seed in range(3)))
    (row,) = rows(runs)
    assert row.point[:2] == ("experiment=quickstart optimizer.lr=0.01", 10)
    assert row.point[2:5] == pytest.approx((0.92, 0.87032, 0.96968), abs=1e-5)
    cells = dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))
    assert cells["test accuracy"] == "92.00% [87.03, 96.97]"
    assert cells["seeds"] == "3"
    assert cells["weights"] == "random"
    assert cells["hardware"] == "cpu (X), 2 threads, 32-true"
    assert row.command.startswith("python -m cifar10_tl.train experiment=quickstart optimizer.lr=0.01 -m seed=0,1,2  #")
    assert row.title == "drawn shapes, 1,000 test images (aa)"


def test_one_seed_has_wilsons_interval(tmp_path: Path) -> None:
    (row,) = rows(digests(tmp_path, {"acc": 0.9, "on": ()}))
    assert row.point == ("default", 10, 0.9, *wilson_interval(900, 1000), "cpu (X)")
    assert row.command.startswith("python -m cifar10_tl.train seed=0  # commit 0123456-dirty, torch 2.15.0")


def test_flip_averaging_is_the_one_of_the_same_test(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), 0.9, f"seed={seed}") for seed in range(2)]

    def evaluation(run: Path, acc: float, epoch: int = 3, images: str = "aa", name: str = "flip") -> dict[str, Any]:
        checkpoint = str(run / "checkpoints" / "best.ckpt")
        return {"checkpoint": checkpoint, "epoch": epoch, "test_images": images, "tta": {"name": name, "acc": acc}}

    first, second = (evaluation(run, acc) for run, acc in zip(folders, (0.91, 0.93), strict=True))
    changes = ({"epoch": 2}, {"images": "bb"}, {"name": "flip_shift"})
    others = [evaluation(folders[1], 0.99, **change) for change in changes]

    def cell(*evaluations: dict[str, Any]) -> str:
        (row,) = rows(RESULTS["merged"](RESULTS["digest"](folder, "shapes", evaluations) for folder in folders))
        return dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))["flip averaging"]

    assert cell(first, second, *others) == "92.00%"
    assert cell(first, *others) == "", "not the mean of other seeds than those of the test accuracy"


def test_difference_is_that_of_the_same_seeds_without_a_setting(tmp_path: Path) -> None:
    """Differences of 0.03, 0.04 and 0.05 are uncertain by 4.3027 * 0.01 / sqrt(3)."""
    found, batch = ("optimizer.lr=0.01",), ("optimizer.lr=0.01", "data.batch_size=32")
    runs = digests(
        tmp_path,
        *({"acc": 0.50 + 0.1 * seed, "on": (f"seed={seed}",)} for seed in range(3)),
        *({"acc": 0.60 + 0.1 * seed, "on": (f"seed={seed}", *found)} for seed in range(3)),
        *({"acc": 0.63 + 0.11 * seed, "on": (f"seed={seed}", *batch)} for seed in range(3)),
        *({"acc": 0.9, "on": (f"seed={seed}", *batch), "device": "NVIDIA H100"} for seed in range(3)),
        *({"acc": 0.8, "on": (f"seed={seed}", "optimizer=sgd")} for seed in range(2)),
        {"acc": 0.7, "on": ("seed=0", *batch, "optimizer.weight_decay=0.1")},
    )
    cells = {
        (row.point.name, row.point.device): dict(zip(RESULTS["COLUMNS"], row.cells, strict=True)) for row in rows(runs)
    }
    differences = {name: cells[name, "cpu (X)"]["difference"] for name, device in cells if device == "cpu (X)"}
    assert differences.pop(" ".join(batch)) == "`data.batch_size=32`: +4.00 [+1.52, +6.48]", "with the same rate"
    assert differences.pop(found[0]) == "`optimizer.lr=0.01`: +10.00 [+10.00, +10.00]"
    assert differences.pop("optimizer=sgd") == "`optimizer=sgd`: +25.00 [-38.53, +88.53]", "of the seeds of both"
    assert set(differences.values()) == {""}, "one seed, or nothing to compare with"
    assert cells[" ".join(batch), "NVIDIA H100"]["difference"] == "", "other hardware"


def test_only_the_settings_of_an_override_may_differ(tmp_path: Path) -> None:
    recipe = ("experiment=cpu", "seed=0")
    base, lstm, rate = digests(
        tmp_path,
        {"acc": 0.5, "on": (*recipe, "data.root=/a")},
        {"acc": 0.5, "on": (*recipe, "model/head=lstm", "data.root=/b")},
        {"acc": 0.5, "on": (*recipe, "model/head=lstm", "optimizer.lr=1")},
    )
    base, lstm, rate = sorted((base, lstm, rate), key=lambda run: len(RESULTS["recipe"](run)))
    difference = RESULTS["only_difference"]
    assert difference(base, lstm) == "model/head=lstm"
    assert difference(lstm, rate) == "optimizer.lr=1"
    assert difference(base, rate) is difference(lstm, base) is difference(base, base) is None
    assert difference({**base, "settings": {**base["settings"], "model.backbone": "resnet18"}}, lstm) is None
    assert difference({**base, "test_images": None}, {**lstm, "test_images": None}) == "model/head=lstm"
    other = {**lstm, "test_images": None, "val": {"acc": 0.9, "count": 1000}}
    assert difference({**base, "test_images": None}, other) is None, "other validation images"


def test_runs_without_a_test_have_their_own_table(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), 0.8, f"seed={seed}", "experiment=cpu", "budget=1h") for seed in range(2)]
    for folder, acc in zip(folders, (0.7, 0.8), strict=True):
        results = json.loads((folder / "results.json").read_text())
        del results["test"], results["test_images"]
        results["val"] = {"acc": acc, "count": 500}
        (folder / "results.json").write_text(json.dumps(results))
    tested = RESULTS["digest"](make_run(tmp_path / "tested", 0.9, "experiment=quickstart"), "drawn shapes")
    runs = RESULTS["merged"]([tested, *(RESULTS["digest"](folder, "drawn shapes") for folder in folders)])
    found = RESULTS["rows_by_data"](runs)
    (row,) = found["drawn shapes, 500 validation images, without a test"]
    cells = dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))
    assert (cells["val accuracy"], cells["test accuracy"]) == ("75.00% [11.47, 138.53]", "")
    (row,) = found["drawn shapes, 1,000 test images (aa)"]
    assert dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))["val accuracy"] == "90.00%"
    assert "experiment=cpu" in RESULTS["not_measured"](runs)
    assert "75.00%" not in RESULTS["short_table"](runs)
    assert list(RESULTS["timed_points"](runs)) == ["drawn shapes, 1,000 test images (aa)"]
    page = RESULTS["long_tables"](runs)
    assert "experiment=cpu budget=1h test=false -m seed=0,1  #" in page
    assert page.index("1,000 test images") < page.index("500 validation images")
    assert "| recipe | weights | epochs | image size | seeds | val accuracy | fit | images/s | hardware |" in page


def test_settings_hardware_and_test_images_are_kept_apart(tmp_path: Path) -> None:
    runs = digests(
        tmp_path,
        {"acc": 0.5, "on": ("seed=1",)},
        {"acc": 0.6, "on": ("seed=2", "optimizer.lr=0.1")},
        {"acc": 0.7, "on": ("seed=3",), "device": "NVIDIA H100"},
        {"acc": 0.8, "on": ("seed=4",), "images": "bb"},
        {"acc": 0.4, "on": ("seed=1",)},  # replaces the first one
        {"acc": 0.45, "on": ("seed=1",), "devices": 8},
        {"acc": 0.55, "on": ("seed=1", "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping}")},
    )
    found = RESULTS["rows_by_data"](runs)
    assert {title: [row.point.accuracy for row in table] for title, table in found.items()} == {
        "drawn shapes, 1,000 test images (aa)": [0.7, 0.6, 0.55, 0.45, 0.4],
        "drawn shapes, 1,000 test images (bb)": [0.8],
    }
    assert sum(row.cells[-1] == "8 x cpu (X), 2 threads, 32-true" for row in rows(runs)) == 1


def test_runs_of_machines_with_one_name_and_different_speeds_are_refused(tmp_path: Path) -> None:
    given = {"acc": 0.5, "images_per_second": 180.0}, {"acc": 0.51, "images_per_second": 360.0}
    folders = [make_run(tmp_path / str(i), run.pop("acc"), f"seed={i}", **run) for i, run in enumerate(given)]

    def kept(second: dict[str, Any]) -> list[Any]:
        runs = [RESULTS["digest"](folders[0], "a"), RESULTS["digest"](folders[1], "a", **second)]
        RESULTS["check_speeds"](RESULTS["merged"](runs))
        return rows(runs)

    with pytest.raises(ValueError, match=r"one recipe at 180 and 360 images/s: .* --device-name"):
        kept({})
    assert [row.cells[-1] for row in kept({"device_name": "a fast one"})] == [
        "a fast one, 2 threads, 32-true",
        "cpu (X), 2 threads, 32-true",
    ]
    (row,) = kept({"timed": False})
    assert row.cells[4:11] == ["2", "90.00%", "50.50% [44.15, 56.85]", "", "", "", ""], "no mean of fewer seeds"
    assert row.point.minutes is None
    untimed = RESULTS["digest"](folders[0], "a", timed=False)
    assert list(RESULTS["timed_points"]([untimed, RESULTS["digest"](folders[1], "b")])) == ["b, 1,000 test images (aa)"]


def test_images_are_named_after_their_dataset(tmp_path: Path) -> None:
    for data, name in (("cifar10", "CIFAR-10"), ("shapes", "built-in shapes")):
        assert RESULTS["digest"](make_run(tmp_path / data, 0.5, f"data={data}"))["data"] == name
    photos = make_run(tmp_path / "photos", 0.5, "data=folder", f"data.root={tmp_path}")
    with pytest.raises(ValueError, match="photos: name the test images with --data-name"):
        RESULTS["digest"](photos)


def test_a_digest_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "trunk.pth").touch()
    on = ("data=folder", f"data.root={tmp_path}/jpeg", f"model.weights={tmp_path}/trunk.pth", "model.backbone=resnet18")
    (run,) = digests(tmp_path, {"acc": 0.5, "on": on})
    assert str(tmp_path) not in json.dumps(run)
    assert run["overrides"] == ["data=folder", "data.root=jpeg", "model.weights=trunk.pth", "model.backbone=resnet18"]
    assert run["settings"]["model.weights"] == run["weights"] == "trunk.pth"
    assert "data.root" not in run["settings"]
    (best := tmp_path / "a" / "checkpoints" / "best.ckpt").parent.mkdir(parents=True)
    best.touch()
    (run,) = digests(tmp_path / "other", {"acc": 0.5, "on": (f"init_from={best}",)})
    assert run["overrides"] == ["init_from=a/checkpoints/best.ckpt"], "runs from other checkpoints are other recipes"
    assert RESULTS["shortened"]('data.root="/home/me/jpeg"') == "data.root=jpeg"


def test_a_run_that_was_resumed_for_longer_has_a_command_with_all_of_its_epochs(tmp_path: Path) -> None:
    config = plain(compose_train("seed=0", "trainer.max_epochs=54", f"paths.output_dir={tmp_path}/0"))
    (run,) = digests(tmp_path, {"acc": 0.5, "on": ("seed=0", "trainer.max_epochs=27"), "config": config})
    assert run["overrides"] == ["trainer.max_epochs=54"]


def test_the_order_of_overrides_and_the_folder_of_the_data_make_no_other_recipe(tmp_path: Path) -> None:
    given = [("data=folder", "optimizer.lr=1", "seed=0"), ("optimizer.lr=1", "data=folder", "seed=1")]
    folders = ("data.root=/a/jpeg", "data.root=/b/images")
    runs = digests(tmp_path, *({"acc": 0.5, "on": (*o, f)} for o, f in zip(given, folders, strict=True)))
    assert len(rows(runs)) == 1


def test_overrides_of_the_device_and_the_files_make_no_other_recipe(tmp_path: Path) -> None:
    on_device = (
        "report=none",
        "checkpoint_every_n_steps=9",
        "seed=1",
        "trainer.devices=1",
        "trainer.accelerator=gpu",
        "trainer.enable_progress_bar=false",
    )
    runs = digests(tmp_path, {"acc": 0.5, "on": ("seed=0",)}, {"acc": 0.5, "on": on_device})
    (row,) = rows(runs)
    assert row.point.name == "default"
    assert runs[1]["settings"] == RESULTS["recipe_settings"]({"trainer": {"devices": 1, "accelerator": "gpu"}}) == {}


def test_epochs_that_a_budget_has_chosen_do_not_separate_seeds(tmp_path: Path) -> None:
    runs = digests(tmp_path, *({"acc": 0.5, "on": (f"seed={n}",)} for n in (0, 1)))
    for run, epochs in zip(runs, (12, 14), strict=True):
        run["epochs"] = epochs
    (row,) = rows(runs)
    assert dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))["epochs"] == "12,14"
    assert RESULTS["recipe_settings"]({"budget": "1h", "trainer": {"max_epochs": 12}}) == {"budget": "1h"}
    assert RESULTS["recipe_settings"]({"trainer": {"max_epochs": 12}}) == {"trainer.max_epochs": 12}


def test_a_schedule_of_image_sizes_is_listed(tmp_path: Path) -> None:
    (run,) = digests(tmp_path, {"acc": 0.5, "on": ()})
    (row,) = rows([{**run, "image_size": [[0, 128], [0.5, 224]]}])
    assert dict(zip(RESULTS["COLUMNS"], row.cells, strict=True))["image size"] == "128,224"


def test_recipes_without_a_run_are_listed(tmp_path: Path) -> None:
    given = ("probe",), ("scratch", "budget=5min"), ("cpu", "budget=1h")
    runs = digests(tmp_path, *({"acc": 0.5, "on": (f"experiment={name}", *more)} for name, *more in given))
    purposes = RESULTS["not_measured"](runs)
    files = {f"experiment={file.stem}" for file in (REPOSITORY / "conf" / "experiment").iterdir()}
    assert set(purposes) == {"default", *files} - {"experiment=probe", "experiment=cpu"}, "scratch has 200 epochs"
    assert purposes["experiment=original"] == "The recipe that this project started from, unchanged."
    last = RESULTS["short_table"](runs).splitlines()[-1]
    assert last.startswith("| `default`, `accurate`, ")
    assert last.endswith("`scratch` without `budget=` |  |  | not measured here |  |  |")


def test_tables_are_filled_in_between_the_comments() -> None:
    page = "a\n<!-- results -->\nold\n<!-- end of results -->\nb"
    assert RESULTS["filled"](page, r"new \1") == "a\n<!-- results -->\nnew \\1\n<!-- end of results -->\nb"
    assert RESULTS["filled"]("no comments", "new") == "no comments"


def test_each_point_has_its_bar_and_its_name() -> None:
    point = RESULTS["Point"]
    points = [
        point("experiment=cpu model.weights=a.pth", 60, 0.9, 0.88, 0.91, "a CPU"),
        point("$x_1", 10, 0.8, 0.7, 0.9, "a GPU"),
    ]
    fig = RESULTS["accuracy_against_time"]({"photos": points, "drawings": points[:1]})
    _, first, second = fig.axes
    assert [text.get_text() for text in first.texts] == ["1", "2"]
    assert [text.get_text() for text in second.texts] == ["1"]
    assert {"photos", "1 cpu weights=a.pth, a CPU", "2 $x_1, a GPU", "drawings"} <= set(strings(fig))
    bars = [container.lines[2][0].get_segments()[0] for container in first.containers]
    assert np.allclose(bars, [[[60, 0.88], [60, 0.91]], [[10, 0.7], [10, 0.9]]])
    assert first.get_xscale() == "log"


def test_runs_are_added_and_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("runs.json", "page.md", "readme.md"):
        (tmp_path / name).write_text("[]" if name == "runs.json" else "<!-- results -->\n\n<!-- end of results -->\n")
    files = zip(("RUNS", "PAGE", "README", "FIGURE"), ("runs.json", "page.md", "readme.md", "f.png"), strict=True)
    namespace = RESULTS["main"].__globals__
    for name, file in files:
        monkeypatch.setitem(namespace, name, tmp_path / file)
    run = make_run(tmp_path / "run", 0.9, "experiment=quickstart")
    monkeypatch.setattr(sys, "argv", ["results.py", "add", str(run), "--data-name", "drawn shapes"])
    RESULTS["main"]()
    (kept,) = json.loads((tmp_path / "runs.json").read_text())
    assert kept["test"] == {"acc": 0.9, "loss": 0.4, "count": 1000}
    assert "90.00% [87.98, 91.71]" in (tmp_path / "page.md").read_text()
    assert "| `experiment=quickstart` | drawn shapes | 1 | 90.00%" in (tmp_path / "readme.md").read_text()
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    averaged = {"checkpoint": str(run / "checkpoints" / "best.ckpt"), "epoch": 3, "test": {}, "test_images": "aa"}
    (tmp_path / "flip").mkdir()
    (tmp_path / "flip" / "results.json").write_text(json.dumps({**averaged, "tta": {"name": "flip", "acc": 0.925}}))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(run), str(tmp_path / "flip"), *sys.argv[3:]])
    RESULTS["main"]()
    assert "| 90.00% | 90.00% [87.98, 91.71] | 92.50% | 10 min |" in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(sys, "argv", ["results.py", "add", str(tmp_path / "flip")])
    with pytest.raises(SystemExit, match="2"):
        RESULTS["main"]()
    assert "an evaluation matches no run" in capsys.readouterr().err
    evaluation, unmeasured = '{"config": {}, "test": {}}', '{"config": {}, "best_epoch": 1, "val": {"acc": null}}'
    for content in (evaluation, unmeasured):
        (tmp_path / "results.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["results.py", "add", str(tmp_path)])
        with pytest.raises(SystemExit, match="2"):
            RESULTS["main"]()
        assert "not the folder of a finished run" in capsys.readouterr().err
