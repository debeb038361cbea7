"""Label images with a trained network.

python -m cifar10_tl.predict checkpoint=outputs/runs/<time>/checkpoints/best.ckpt images=photos
python -m cifar10_tl.predict checkpoint=model.onnx images='photos/*.jpg' top_k=3
"""

from __future__ import annotations

import codecs
import csv
import glob
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.run_dir import check_owner
from cifar10_tl.io import atomic_write, printable

if TYPE_CHECKING:  # slow to import, therefore imported by the functions that need them
    from cifar10_tl.inference import Pixels, Prediction

log = logging.getLogger(__name__)

TABLE, GRID = "predictions.csv", "predictions.png"
GRID_IMAGES = 64


def predict(cfg: DictConfig) -> list[Prediction]:
    """Label ``cfg.images``, write the table and the grid, and return the files and folders that cannot be read."""
    from cifar10_tl.engine.hardware import keep_freed_memory, limit_threads, quiet_libraries
    from cifar10_tl.inference import Prediction, load_classifier

    run_dir = Path(cfg.paths.output_dir)
    check_owner(run_dir, "predict")
    files, errors = find_files(cfg.images, run_dir)
    keep_freed_memory()
    limit_threads()
    quiet_libraries()
    classify = load_classifier(cfg.checkpoint, cfg.device)
    if cfg.top_k > len(classify.class_names):
        raise UserError(f"top_k={cfg.top_k}: {cfg.checkpoint} has only {len(classify.class_names)} classes")
    folders = ((Prediction(error.filename, error=error.strerror), None) for error in errors)
    bar = partial(tqdm, total=len(files), unit=" images", disable=None, leave=False)
    more = [f"{kind}_{rank}" for rank in range(2, cfg.top_k + 1) for kind in ("label", "probability")]
    header = ["path", "label", "probability", *classify.class_names, *more, "error"]
    unreadable: list[Prediction] = []
    shown: list[tuple[Prediction, Pixels]] = []
    labels: Counter[str | None] = Counter()
    with atomic_write(run_dir / TABLE) as file, closing(classify.stream(files, cfg.batch_size)) as stream:
        # Linux file names may hold bytes that are not UTF-8
        table = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"), lineterminator="\n")
        table.writerow(header)
        for prediction, pixels in chain(folders, bar(stream)):
            if pixels is None:
                unreadable.append(prediction)
                cells = [""] * (len(header) - 2)
            else:
                labels[prediction.label] += 1
                shown += [(prediction, pixels)] if len(shown) < GRID_IMAGES else []
                top = [cell for label, p in prediction.top(cfg.top_k) for cell in (label, f"{p:.6g}")]
                cells = [*top[:2], *(f"{p:.6g}" for p in prediction.probabilities.values()), *top[2:]]
            table.writerow([prediction.path, *cells, prediction.error])
        if not shown:
            first = printable(f"{unreadable[0].path}: {unreadable[0].error}")
            raise UserError(f"images={cfg.images}: no readable image; the first error: {first}")
    write_grid(run_dir / GRID, shown, labels.total())
    log.info("%s", summary(labels, unreadable, run_dir))
    return unreadable


def find_files(images: str | Sequence[str], run_dir: Path) -> tuple[list[str], list[OSError]]:
    """Return the files that ``images`` names, and an error for each folder that cannot be read.

    Folders and patterns stand for all visible files in them, sorted, except those of this command in ``run_dir``. A
    list keeps its order.
    """
    from cifar10_tl.data.images import list_files

    own = {os.path.realpath(run_dir / name) for name in (TABLE, GRID, "predict.log")}
    found: list[str] = []
    errors: list[OSError] = []
    for name in [images] if isinstance(images, str) else images:
        matches = map(Path, [name] if Path(name).exists() else glob.glob(name, recursive=True))
        listings = [list_files(path) if path.is_dir() else ([str(path)], []) for path in matches]
        files = {path for paths, _ in listings for path in map(Path, paths) if os.path.realpath(path) not in own}
        failed = [error for _, folders in listings for error in folders]
        if not files and not failed:
            raise UserError(f"images={name}: no such file, or no files in this folder")
        found += map(str, sorted(files))
        errors += {error.filename: error for error in failed}.values()
    return found, errors


def write_grid(path: Path, shown: Sequence[tuple[Prediction, Pixels]], total: int) -> None:
    """Draw images, as they enter the network, with their labels and probabilities."""
    import numpy as np

    from cifar10_tl.plots import legible, sample_grid, to_png
    from cifar10_tl.plots.style import as_percent

    names = list(shown[0][0].probabilities)
    printed = dict(zip(names, legible(names), strict=True))
    titles = [[(printed[str(p.label)], f" {as_percent(p.probability or 0.0)}")] for p, _ in shown]
    images = np.stack([pixels.transpose(1, 2, 0) for _, pixels in shown])
    heading = "Predictions" if len(shown) == total else f"Predictions: the first {len(shown)} of {total:,} images"
    with atomic_write(path) as file:
        file.write(to_png(sample_grid(images, titles, heading=heading)))


def summary(labels: Counter[Any], unreadable: Sequence[Prediction], run_dir: Path) -> str:
    """Return the closing lines: the most frequent labels, files written, and the first files that cannot be read."""
    total, found = labels.total(), ", ".join(f"{count:,} {label}" for label, count in labels.most_common(10))
    lines = [
        f"\n  {total:,} image{'s' * (total != 1)}: {found}{', ...' if len(labels) > 10 else ''}",
        f"  table    {run_dir / TABLE}",
        f"  picture  {run_dir / GRID}",
    ]
    if unreadable:
        lines.append(f"  {len(unreadable):,} of {total + len(unreadable):,} files cannot be read (see column error):")
        lines += [printable(f"    {p.path}: {p.error}") for p in unreadable[:20]] + ["    ..."] * (len(unreadable) > 20)
    return "\n".join(lines)


def main() -> None:
    """Run ``python -m cifar10_tl.predict``. The exit status is 3 if a file or folder cannot be read."""
    run_command("predict", lambda cfg: sys.exit(3) if predict(cfg) else None)


if __name__ == "__main__":
    main()
