"""Collect the results of runs in docs/results.json, and make the tables in docs/results.md and README.md.

python scripts/results.py add DIR... --data-name "JPEG q75 CIFAR-10"   add runs of the train command, and render
python scripts/results.py render                                       render after a change in conf/experiment

Folders of ``evaluate tta=flip`` given together with their runs add the accuracy with flip averaging. Runs that differ
only in the seed are one row. Runs without a test have their own table. Adding a recipe, seed and hardware again
replaces the older run. The tables are written between two comments, ``<!-- results -->`` and
``<!-- end of results -->``.
"""

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.engine.comparison import OWN_CALLBACKS, settings_of
from cifar10_tl.engine.results import markdown_table, read_results
from cifar10_tl.engine.settings import changed_settings, final_overrides
from cifar10_tl.metrics.intervals import spread, wilson_interval
from cifar10_tl.plots import style, to_png

Run = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[1]
RUNS, PAGE, FIGURE = (ROOT / "docs" / name for name in ("results.json", "results.md", "images/results.png"))
README = ROOT / "README.md"
COLUMNS = (
    *("recipe", "weights", "epochs", "image size", "seeds", "val accuracy"),
    *("test accuracy", "difference", "flip averaging", "fit", "images/s", "hardware"),
)
SHORT = ("recipe", "data", "seeds", "test accuracy", "fit", "hardware")
COPIED = ("val", "best_epoch", "epochs", "seconds", "images_per_second", "environment")
TRAIN = "python -m cifar10_tl.train"
#: Names of the test images of the datasets that are always the same.
DATA_NAMES = {"cifar10": "CIFAR-10", "shapes": "built-in shapes"}
#: Highest speed of the runs of a row, divided by the lowest one.
SPEED_RATIO = 1.3
#: Overrides that do not change the recipe.
UNCOUNTED = r"seed|paths|hydra|logger|resume|test|report|trust"
UNCOUNTED += rf"|callbacks(?=$|=)|callbacks\.({'|'.join(OWN_CALLBACKS)})(?!\.monitor)"
UNCOUNTED += r"|checkpoint_every_n_steps|trainer\.(accelerator|devices|enable_progress_bar)"
HEIGHT, PANEL = 4.0, 3.1  # inches of a panel with and without its title and ticks


class Point(NamedTuple):
    """A recipe with its time, if it was measured, and its accuracy, which is between ``low`` and ``high``."""

    name: str
    minutes: float | None
    accuracy: float
    low: float
    high: float
    device: str


class Row(NamedTuple):
    """Runs that differ in the seed: title and ``COLUMNS`` of the table, command, and point of the figure."""

    title: str
    cells: Sequence[str]
    command: str
    point: Point


def digest(
    folder: Path,
    data_name: str | None = None,
    evaluations: Iterable[Run] = (),
    *,
    device_name: str | None = None,
    timed: bool = True,
) -> Run:
    """Return what docs/results.json keeps of a run, without names of the machine's folders.

    Args:
        folder: Folder of the run.
        data_name: Name of the test images; None: that of their dataset.
        evaluations: Results of the evaluate command, of which those of this run's test with ``tta=flip`` are used.
        device_name: Name of the device; None: as recorded.
        timed: Whether to keep the time and the speed.

    Raises:
        ValueError: If the images need a name.
    """
    results = read_results(folder)
    if (name := data_name or DATA_NAMES.get(results["config"]["data"]["source"])) is None:
        raise ValueError(f"{folder}: name the test images with --data-name")
    results["environment"]["device"] = device_name or results["environment"]["device"]
    if not timed:
        results |= {"seconds": {"fit": None}, "images_per_second": None}
    given = final_overrides(results["config"], folder)
    tested = results.get("test")
    test = (folder.resolve(), results["best_epoch"], results.get("test_images"), "flip")
    averaged = {tested_by(evaluation): evaluation["tta"]["acc"] for evaluation in evaluations}
    return {
        "data": name,
        "seed": results["config"]["seed"],
        "overrides": [shortened(o) for o in given if not re.match(rf"[+~]*({UNCOUNTED})\b", o)],
        "settings": {key: shortened(value) for key, value in sorted(recipe_settings(results["config"]).items())},
        "weights": shortened(results["config"].get("init_from") or results["config"]["model"]["weights"] or "random"),
        "image_size": results["config"]["model"]["image_size"],
        "test": tested and {key: tested[key] for key in ("acc", "loss", "count")},
        "test_images": results.get("test_images"),
        "flip_averaging": averaged.get(test),
        **{key: results[key] for key in COPIED},
    }


def tested_by(evaluation: Run) -> tuple[Path, int, str, str]:
    """Return the run, epoch, test images and views of an evaluation with test-time augmentation."""
    run = Path(evaluation["checkpoint"]).resolve().parent.parent
    return run, evaluation["epoch"], evaluation["test_images"], evaluation["tta"]["name"]


def recipe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults, except seed, folders, and the epochs chosen by ``budget``."""
    counted = settings_of({"config": config}).keys() - {"seed", "data.root", "data.cache_dir"}
    counted -= {"trainer.max_epochs"} if config.get("budget") else set()
    settings = changed_settings(config).items()
    return {key: value for key, value in settings if key in counted and not re.match(UNCOUNTED, key)}


def shortened(value: Any) -> Any:
    """Return a value, or an override such as ``data.root=/data/jpeg``, with only the last part of a path.

    A checkpoint keeps the name of its run, ``RUN/checkpoints/best.ckpt``.
    """
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    *folders, last = path.strip("\"'").rstrip("/").split("/") if "/" in path else [path]
    return f"{key}{equals}{'/'.join([*folders[-2:], last]) if folders[-1:] == ['checkpoints'] else last}"


def circumstances(run: Run) -> list[Any]:
    """Return the images and the hardware of a run."""
    hardware = [run["environment"][key] for key in ("device", "devices", "threads", "precision")]
    return [run["data"], run["test_images"] or run["val"]["count"], hardware]


def recipe(run: Run) -> list[str]:
    """Return the overrides of a run, sorted, without the folder of the data."""
    return sorted(o for o in run["overrides"] if not re.match(r"[+~]*data\.(root|cache_dir)=", o))


def identity(run: Run) -> str:
    """Return what the runs of a row have in common."""
    return json.dumps([circumstances(run), recipe(run), run["settings"]], sort_keys=True)


def merged(runs: Iterable[Run]) -> list[Run]:
    """Return the runs in a fixed order, the latest one of each recipe, seed and hardware."""
    latest = {(identity(run), run["seed"]): run for run in runs}
    return [latest[key] for key in sorted(latest)]


def rows_by_data(runs: Iterable[Run]) -> dict[str, list[Row]]:
    """Return the rows, the highest accuracy first, by a description of their test images."""
    tables: dict[str, list[Row]] = {}
    groups = [list(same) for _, same in groupby(runs, identity)]
    for group in groups:
        row = make_row(group, differences(group, groups))
        tables.setdefault(row.title, []).append(row)
    return {title: sorted(rows, key=lambda row: -row.point.accuracy) for title, rows in tables.items()}


def tested(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that have a test."""
    return [run for run in runs if run["test"]]


def accuracies(runs: Iterable[Run]) -> list[float]:
    """Return the test accuracies, or those on the validation images of runs without a test."""
    return [(run["test"] or run["val"])["acc"] for run in runs]


def differences(runs: Sequence[Run], others: Iterable[Sequence[Run]]) -> str:
    """Return the paired differences, with intervals, from runs of the same seeds with one override fewer."""
    found = []
    for base in others:
        added = only_difference(base[0], runs[0])
        seeds = [{run["seed"]: run for run in group} for group in (base, runs)]
        pairs = [accuracies(group[seed] for group in seeds) for seed in seeds[0].keys() & seeds[1].keys()]
        if added and len(pairs) > 1:
            points = spread([100 * (b - a) for a, b in pairs])
            found.append(f"`{added}`: {points.mean:+.2f} [{points.low:+.2f}, {points.high:+.2f}]")
    return "; ".join(found)


def only_difference(base: Run, run: Run) -> str | None:
    """Return the only override that ``run`` adds to ``base``, or None if other overrides or settings differ."""
    given, more = recipe(base), recipe(run)
    added = [override for override in more if override not in given]
    if circumstances(base) != circumstances(run) or len(added) != 1 or len(given) + 1 != len(more):
        return None
    settings, own = base["settings"], run["settings"]
    key = added[0].lstrip("+~").partition("=")[0].replace("/", ".")  # settings of a group begin with its name
    changed = [name for name in settings | own if settings.get(name) != own.get(name)]
    return added[0] if all(f"{name}.".startswith(f"{key}.") for name in changed) else None


def make_row(runs: Sequence[Run], difference: str) -> Row:
    """Return the row of runs, with Student's t interval for several seeds, and Wilson's for the images of one."""
    first, where, size = runs[0], runs[0]["environment"], runs[0]["image_size"]
    measured, count = accuracies(runs), (first["test"] or first["val"])["count"]
    low, high = spread(measured)[-2:] if len(runs) > 1 else wilson_interval(round(measured[0] * count), count)
    mean, seconds = fmean(measured), mean_of(run["seconds"]["fit"] for run in runs)
    minutes = None if seconds is None else seconds / 60
    name = " ".join(o for o in first["overrides"] if not re.match(r"data(\.root)?=", o)) or "default"
    sizes = listed(pixels for _, pixels in size) if isinstance(size, list) else str(size)
    cells = [f"`{name}`", first["weights"], listed(run["epochs"] for run in runs), sizes, str(len(runs))]
    flips, speed = (mean_of(run.get(key) for run in runs) for key in ("flip_averaging", "images_per_second"))
    accuracy = f"{mean:.2%} [{100 * low:.2f}, {100 * high:.2f}]"
    val = mean_of(run["val"]["acc"] for run in runs)
    cells += ["" if val is None else f"{val:.2%}", accuracy] if first["test"] else [accuracy, ""]
    cells += [difference, "" if flips is None else f"{flips:.2%}"]
    cells += ["" if minutes is None else f"{minutes:.3g} min", "" if speed is None else f"{speed:,.0f}"]
    devices = f"{where['devices']} x " * (where["devices"] > 1)
    cells += [
        f"{devices}{where['device']}, {where['threads']} thread{'s' * (where['threads'] > 1)}, {where['precision']}"
    ]
    commits = listed(re.sub(r"(?<=^\w{7})\w+", "", str(run["environment"]["git"])) for run in runs)
    given = [*first["overrides"], *["test=false"] * (not first["test"]), *["-m"] * (len(runs) > 1)]
    given += [f"seed={listed(run['seed'] for run in runs)}"]
    torch = listed(run["environment"]["versions"]["torch"] for run in runs)
    command = f"{TRAIN} {shlex.join(given)}  # commit {commits}, torch {torch}"
    images = f"test images ({first['test_images']})" if first["test"] else "validation images, without a test"
    title = f"{first['data']}, {count:,} {images}"
    return Row(title, cells, command, Point(name, minutes, mean, low, high, where["device"]))


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean, None if a value is missing."""
    given = list(values)
    known = [value for value in given if value is not None]
    return fmean(known) if known == given else None


def check_speeds(runs: Sequence[Run]) -> None:
    """Check that the runs of each row are from machines of about the same speed."""
    for _, same in groupby(runs, identity):
        speeds = [run["images_per_second"] for run in same if run["images_per_second"]]
        if speeds and max(speeds) > SPEED_RATIO * min(speeds):
            speeds_text = " and ".join(f"{speed:,.0f}" for speed in (min(speeds), max(speeds)))
            raise ValueError(
                f"runs of one recipe at {speeds_text} images/s: name each machine with --device-name, or add runs that "
                "shared it with other programs with --untimed"
            )


def listed(values: Iterable[Any]) -> str:
    """Return the values, separated by commas, or the only distinct one."""
    texts = list(map(str, values))
    return ",".join(texts if len(set(texts)) > 1 else texts[:1])


def not_measured(runs: Sequence[Run]) -> dict[str, str]:
    """Return the purpose, the first sentence of its file, of each recipe in conf/experiment without a run.

    Runs with other overrides count only if the header of the recipe has them, as ``budget=1h`` in cpu.yaml.
    """
    measured = [set(row.point.name.split()) for rows in rows_by_data(tested(runs)).values() for row in rows]
    texts = {f"experiment={file.stem}": file.read_text() for file in sorted((CONFIG_DIR / "experiment").iterdir())}
    headers = {"default": "ImageNet weights at 224 px, all layers trained."}
    headers |= {name: " ".join(re.findall(r"^# ([^@].*)", text, re.M)) for name, text in texts.items()}
    return {
        name: re.split(r"(?<=\.)(?: |$)", text)[0]
        for name, text in headers.items()
        if not any(name in given <= {name, *text.split()} for given in measured)
    }


def long_tables(runs: Sequence[Run]) -> str:
    """Return the figure and the tables of docs/results.md."""
    parts = ["![test accuracy against training time](images/results.png)"] * bool(runs)
    tables = sorted(rows_by_data(runs).items(), key=lambda table: "without a test" in table[0])
    for title, rows in tables:
        filled = [any(column) for column in zip(*(row.cells for row in rows), strict=True)]
        lines = [list(compress(cells, filled)) for cells in (COLUMNS, *(row.cells for row in rows))]
        parts += [f"## {title}", markdown_table(lines[0], lines[1:]).rstrip()]
        parts += ["\n".join(["```bash", *(row.command for row in rows), "```"])]
    rest = "\n".join(f"- `{name}`: {purpose}" for name, purpose in not_measured(runs).items())
    return "\n\n".join([*parts, f"## Not measured here\n`{TRAIN}` with:", rest])


def short_table(runs: Sequence[Run]) -> str:
    """Return the table of README.md: recipes without other changes than a budget and a backbone."""
    recipe = re.compile(r"default|((experiment|budget|model\.backbone)=\S+ ?)+")
    rows = [row for rows in rows_by_data(tested(runs)).values() for row in rows if recipe.fullmatch(row.point.name)]
    cells = [{"data": row.title.rsplit(", ", 1)[0], **dict(zip(COLUMNS, row.cells, strict=True))} for row in rows]
    lines = [[row[column] for column in SHORT] for row in cells]
    begun = {name for row in rows for name in row.point.name.split()}
    names = {name: f"`{name.removeprefix('experiment=')}`" for name in not_measured(runs)}
    rest = ", ".join(names[name] + " without `budget=`" * (name in begun) for name in names)
    lines += [[rest, "", "", "not measured here", "", ""]] if rest else []
    return markdown_table(SHORT, lines).rstrip()


def filled(text: str, table: str) -> str:
    """Return a page with the text between the comments replaced, if it has them."""
    between = r"(?<=<!-- results -->\n).*(?=\n<!-- end of results -->)"
    return re.sub(between, lambda _: table, text, flags=re.S)


def timed_points(runs: Sequence[Run]) -> dict[str, list[Point]]:
    """Return the points of the rows that have a time, by a description of their test images."""
    panels = {
        title: [row.point for row in rows if row.point.minutes is not None]
        for title, rows in rows_by_data(tested(runs)).items()
    }
    return {title: points for title, points in panels.items() if points}


@style.default_style
def accuracy_against_time(panels: Mapping[str, Sequence[Point]]) -> Figure:
    """Plot one panel for each set of test images, with numbered points and bars from the low to the high accuracy."""
    height = HEIGHT * len(panels)
    fig, page = style.new_page(9, height, "Test accuracy against training time", "bars: 95% intervals")
    for number, (title, points) in enumerate(panels.items()):
        top = HEIGHT * number
        panel = style.add_panel(page, 0.8, top + 0.25, 4.2, PANEL, ("minutes of training and validation", "", title))
        draw_points(panel, points)
        step = min(0.2, PANEL / len(points))
        for i, point in enumerate(points):
            name = re.sub(r"(?<!\S)(experiment=|[a-z_]+\.)", "", point.name)  # short keys: "cpu lr=0.1"
            style.write(page, 5.2, top + 0.35 + i * step, style.fit(f"{i + 1} {name}, {point.device}", 3.8))
    return fig


def draw_points(panel: Axes, points: Sequence[Point]) -> None:
    """Draw numbered points with their bars."""
    for i, (_, minutes, accuracy, low, high, _) in enumerate(points):
        assert minutes is not None
        bar = [[accuracy - low], [high - accuracy]]
        panel.errorbar(minutes, accuracy, bar, fmt="o", color=style.BLUE, capsize=3, markersize=4, linewidth=1)
        font: dict[str, Any] = {"family": style.FONT, "fontsize": style.TINY + 1, "ha": ("left", "right")[i % 2]}
        panel.annotate(str(i + 1), (minutes, accuracy), (4 - 8 * (i % 2), 2), textcoords="offset points", **font)
    panel.set_xscale("log")
    panel.margins(x=0.1, y=0.1)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter(PercentFormatter(1))


def main() -> None:
    """Add runs and write everything; exit with status 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("add", "render"))
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of finished runs and evaluations")
    parser.add_argument("--data-name", help="name of the test images; only images in folders need one")
    parser.add_argument("--device-name", help="name of the CPU or GPU, if faster ones record the same name")
    parser.add_argument("--untimed", action="store_true", help="leave out times, of runs that shared their machine")
    arguments = parser.parse_args()
    results = {folder: read_results(folder) for folder in arguments.folders}
    evaluations = [content for content in results.values() if {"checkpoint", "test", "tta"} <= content.keys()]
    folders = [folder for folder, content in results.items() if content not in evaluations]
    for folder in folders:
        if "best_epoch" not in results[folder] or ("test" not in results[folder] and not results[folder]["val"]["acc"]):
            parser.error(f"{folder}: not the folder of a finished run; finish it with resume={folder}")
    options: dict[str, Any] = {"device_name": arguments.device_name, "timed": not arguments.untimed}
    try:
        added = [digest(folder, arguments.data_name, evaluations, **options) for folder in folders]
        check_speeds(runs := merged([*json.loads(RUNS.read_text()), *added]))
    except ValueError as error:
        parser.error(str(error))
    if len(evaluations) > sum(run["flip_averaging"] is not None for run in added):
        parser.error("an evaluation matches no run: it needs tta=flip, the best epoch and the same test images")
    # first, because an error must leave the files as they are
    long, short, figure = long_tables(runs), short_table(runs), accuracy_against_time(timed_points(runs))
    RUNS.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    PAGE.write_text(filled(PAGE.read_text(), long))
    README.write_text(filled(README.read_text(), short))
    FIGURE.write_bytes(to_png(figure))


if __name__ == "__main__":
    main()
