"""Transfer without ImageNet: compare a backbone that was trained on other classes with random weights, on few images.

python scripts/transfer.py --data-root FOLDER --data-name "JPEG q75 CIFAR-10" --out DIR [key=value ...]

FOLDER/train/<class> and FOLDER/test/<class> have the images. A ResNet18 is trained on every second class, saved as a
torchvision state dict, and fine-tuned on the other classes with model.weights=DIR/backbone.pth. Random weights get the
same settings and steps. Each seed has other training images. Writes DIR/transfer.md, a page like docs/transfer.md. The
same command continues after an interruption.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import fill

import torch

from cifar10_tl.engine.results import markdown_table, read_results
from cifar10_tl.io import atomic_write_text
from cifar10_tl.metrics.intervals import spread

BATCH = 50
SETTINGS = (
    *("data=folder", "model.backbone=resnet18", "model.image_size=64", "model/head=linear", "optimizer=sgd"),
    *("callbacks=minimal", "report=none", "compile=false", "trainer.enable_progress_bar=false"),
)


def command(name: str, run: Path, *overrides: str) -> None:
    """Run a command of this project in the folder ``run`` unless it is finished there; resume training."""
    begun = name == "train" and (run / "config.yaml").is_file()
    if not read_results(run):
        given = [f"resume={run}"] if begun else [*overrides, f"paths.output_dir={run}"]
        subprocess.run([sys.executable, "-m", f"cifar10_tl.{name}", *given], check=True, stdout=subprocess.DEVNULL)


def save_backbone(checkpoint: Path, file: Path) -> None:
    """Save the backbone of a checkpoint under torchvision's names, without ``fc``."""
    state, prefix = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"], "network.backbone."
    torch.save({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, file)


def accuracy(run: Path, images: int, steps: int, *overrides: str) -> float:
    """Return the test accuracy after ``steps`` steps on ``images`` images."""
    epochs = max(1, round(steps / max(1, images // BATCH)))
    every = max(1, epochs // 10)
    length = (f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={every}", f"data.batch_size={BATCH}")
    length += (f"callbacks.last_checkpoint.every_n_epochs={every}", f"data.image_limit={images}", "test=false")
    command("train", run, *SETTINGS, *length, *overrides)
    # image_limit applies to the test images, too
    command("evaluate", run / "test", f"checkpoint={run}/checkpoints/best.ckpt", "data.image_limit=null", "report=none")
    return float(read_results(run / "test")["test"]["acc"])


def page(table: str, given: argparse.Namespace) -> str:
    """Return the page: the table, and the data, settings and hardware of its runs."""
    backbone = read_results(given.out / "backbone" / "run")
    other, tested = (read_results(given.out / "other" / f"{given.images[0]}_null_0" / name) for name in ("", "test"))
    seen, unseen = (", ".join(run["class_names"]) for run in (backbone, other))
    where, size = other["environment"], other["config"]["model"]["image_size"]
    text = (
        f"A {backbone['config']['model']['backbone']} was trained from random weights on the classes {seen} (epochs: "
        f"{backbone['epochs']}, test accuracy {backbone['test']['acc']:.2%} on these classes). Its backbone, loaded by "
        f"`model.weights=FILE`, is compared with random weights on the classes {unseen}, with {given.steps:,} steps of "
        f"{BATCH} images for both. The table has the mean test accuracy over {given.seeds} seeds on "
        f"{tested['test']['count']:,} images and its 95% interval (Student's t). Each seed has other training images, "
        "and as many validation images, which choose the epoch; all share the backbone and the settings."
    )
    command = ["python", "scripts/transfer.py", "--data-root", given.data_root.name, "--data-name", given.data_name]
    command += ["--out", "DIR", *given.overrides]
    commit = re.sub(r"(?<=^.{7})[0-9a-f]+", "", str(where["git"]))
    details = (
        f"{given.data_name}, {size} px, {where['device']}, threads: {where['threads']}, {where['precision']}, commit "
        f"{commit}, torch {where['versions']['torch']}, by `{shlex.join(command)}`."
    )
    return "\n\n".join(["# Transfer without ImageNet", fill(text, 120), table.strip(), fill(details, 120)]) + "\n"


def main() -> None:
    """Train, compare and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data-root", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--data-name", required=True, help="name of the images on the page")
    parser.add_argument("--images", type=int, nargs="+", default=[50, 200, 1000], help="images per class")
    for name, default in (("--seeds", 3), ("--steps", 1000), ("--backbone-epochs", 8)):
        parser.add_argument(name, type=int, default=default, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    given = parser.parse_args()
    if not (given.data_root / "train").is_dir():
        parser.error(f"{given.data_root}: has no folder train with a folder per class")
    record, own = given.out / "arguments.json", ("data_root", "steps", "backbone_epochs", "overrides")
    arguments = json.dumps({name: str(getattr(given, name)) for name in own})
    if record.is_file() and record.read_text() != arguments:
        parser.error(f"{given.out}: has results of other arguments, {record.read_text()}; choose another --out")
    atomic_write_text(record, arguments)
    out, classes = given.out.resolve(), sorted(path.name for path in (given.data_root / "train").iterdir())
    for number, name in enumerate(classes):
        for split in ("train", "test"):
            (folder := out / ("backbone", "other")[number % 2] / "data" / split).mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to((given.data_root / split / name).resolve())
    shared = [f"paths.cache_dir={out}/cache", *given.overrides]
    data, length = f"data.root={out}/backbone/data", f"trainer.max_epochs={given.backbone_epochs}"
    command(
        "train", out / "backbone" / "run", *SETTINGS, data, length, "model.weights=null", "optimizer.lr=0.1", *shared
    )
    save_backbone(out / "backbone" / "run" / "checkpoints" / "best.ckpt", out / "backbone.pth")
    rows = []
    for images in given.images:
        found: dict[str, list[float]] = {"null": [], f"{out}/backbone.pth": []}
        for weights, seed in ((weights, seed) for weights in found for seed in range(given.seeds)):
            own = (f"seed={seed}", f"data.split_seed={seed}", f"model.weights={weights}", f"data.root={out}/other/data")
            run = out / "other" / f"{images}_{Path(weights).stem}_{seed}"
            found[weights].append(accuracy(run, images * (len(classes) // 2), given.steps, *own, *shared))
        found["gain"] = [b - a for a, b in zip(*found.values(), strict=True)]
        spreads = map(spread, found.values())
        texts = (f"{100 * s.mean:.2f}" + f" [{100 * s.low:.2f}, {100 * s.high:.2f}]" * (s.n > 1) for s in spreads)
        rows.append([str(images), *texts])
    table = markdown_table(
        ["images per class", "random weights, %", "backbone of other classes, %", "gain, points"], rows
    )
    text = page(table, given)
    atomic_write_text(out / "transfer.md", text)
    print(text)


if __name__ == "__main__":
    main()
