"""Say what is in pictures, with a trained network.

python -m cifar10_tl.predict checkpoint=outputs/runs/<stamp>/checkpoints/best.ckpt images=photos
python -m cifar10_tl.predict checkpoint=model.onnx images='photos/*.jpg' top_k=3
"""

from __future__ import annotations

import csv
import glob
import io
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from tqdm import tqdm

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.io import atomic_write

if TYPE_CHECKING:  # torch takes seconds to import: only once the settings are known to be good
    from cifar10_tl.inference import Classifier, Pixels, Prediction


log = logging.getLogger(__name__)


TABLE, GRID = "predictions.csv", "predictions.png"


SOME_UNREADABLE = 3  # exit status


_IN_GRID = 64


_LISTED = 20  # unreadable files in the log; all are in the table


def predict(cfg: DictConfig) -> list[Prediction]:
    """Label ``cfg.images`` and leave the table and the grid in ``cfg.paths.output_dir``.

    Returns:
        The files that could not be read, each with its ``error``.

    Raises:
        UserError: a setting is wrong, ``cfg.images`` names no file, or none of the files can be read.
    """
    run_dir = Path(cfg.paths.output_dir)
    files = find_files(cfg.images, run_dir)

    from cifar10_tl.engine.hardware import keep_freed_memory
    from cifar10_tl.inference import load_classifier

    keep_freed_memory()
    classify = load_classifier(cfg.checkpoint, cfg.device)
    if cfg.top_k > len(classify.class_names):
        raise UserError(f"top_k={cfg.top_k}: {cfg.checkpoint} knows {len(classify.class_names)} classes")

    unreadable: list[Prediction] = []
    first: list[tuple[Prediction, Pixels]] = []
    labels: Counter[str | None] = Counter()
    with table_writer(run_dir / TABLE, classify, cfg.top_k) as write_row:
        stream = classify.stream(files, cfg.batch_size)
        for prediction, pixels in tqdm(stream, total=len(files), unit=" images", disable=None, leave=False):
            write_row(prediction)
            if pixels is None:
                unreadable.append(prediction)
                continue
            labels[prediction.label] += 1
            if len(first) < _IN_GRID:
                first.append((prediction, pixels))
        if not first:
            raise UserError(f"images={cfg.images}: {_none_readable(unreadable)}")
    write_grid(run_dir / GRID, first, len(files) - len(unreadable))
    log.info("%s", summary(labels, unreadable, run_dir))
    return unreadable


def find_files(images: str | Sequence[str], run_dir: Path) -> list[str]:
    """The files that ``images`` names: files as they are, folders and patterns as all they hold, sorted by path.

    Hidden files are passed over, and so is what this command itself writes into ``run_dir``. A list keeps its order.

    Raises:
        UserError: a name stands for no file.
    """
    names = [images] if isinstance(images, str) else images
    own = {(run_dir / name).resolve() for name in (TABLE, GRID, "predict.log")}
    found = []
    for name in names:
        files = [str(p) for p in _expand(name) if p.resolve() not in own]
        if not files:
            raise UserError(f"images={name}: {_nothing_there(name)}")
        found += files
    return found


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    matches = [path] if path.is_dir() else map(Path, glob.glob(name, recursive=True))
    return sorted(file for match in matches for file in ([match] if match.is_file() else _files_below(match)))


def _files_below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_file() or not path.exists()):  # a broken link is there, and does not exist
            yield path


def _nothing_there(name: str) -> str:
    if Path(name).is_dir():
        return "the folder holds no files"
    return "no file matches the pattern" if glob.has_magic(name) else "there is no such file or folder"


@contextmanager
def table_writer(path: Path, classify: Classifier, top_k: int) -> Iterator[Callable[[Prediction], None]]:
    """A function that adds a prediction to the table, which takes the name ``path`` when all are there.

    Columns: path, label, probability, one for each class, label_2, probability_2, ... up to ``top_k``, error.
    """
    further = [f"{kind}_{rank}" for rank in range(2, top_k + 1) for kind in ("label", "probability")]
    with atomic_write(path) as file:
        # Names of files are bytes; those that are no UTF-8 are written as they are.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "probability", *classify.class_names, *further, "error"])

        def write_row(prediction: Prediction) -> None:
            if prediction.error is None:
                cells = _cells(prediction, top_k)
            else:
                cells = [""] * (2 + len(classify.class_names) + len(further))
            writer.writerow([prediction.path, *cells, prediction.error])

        yield write_row
        text.detach()  # flushes, and leaves the file open for atomic_write


def _cells(prediction: Prediction, top_k: int) -> list[str]:
    """The cells between path and error."""
    (best, *others) = [[label, f"{probability:.6g}"] for label, probability in prediction.top(top_k)]
    return [
        *best,
        *(f"{p:.6g}" for p in prediction.probabilities.values()),
        *(cell for pair in others for cell in pair),
    ]


def write_grid(path: Path, first: Sequence[tuple[Prediction, Pixels]], total: int) -> None:
    """Draw the first pictures, as the network was given them, with label and probability."""
    import numpy as np

    from cifar10_tl.plots import legible, sample_grid, to_png
    from cifar10_tl.plots.style import as_percent

    names = list(first[0][0].probabilities)
    shown = dict(zip(names, legible(names), strict=True))
    titles = [[(shown[str(p.label)], f" {as_percent(p.probability or 0.0)}")] for p, _ in first]
    images = np.stack([pixels.transpose(1, 2, 0) for _, pixels in first])
    heading = "Predictions" if len(first) == total else f"Predictions: the first {len(first)} of {total:,} images"
    figure = sample_grid(images, titles, heading=heading)
    with atomic_write(path) as file:
        file.write(to_png(figure))


def summary(labels: Counter[Any], unreadable: Sequence[Prediction], run_dir: Path) -> str:
    """The closing words: what was found, where it is written, and what could not be read."""
    found = ", ".join(f"{count:,} {label}" for label, count in labels.most_common(10))
    lines = [
        "",
        f"  {labels.total():,} image{'s' * (labels.total() != 1)}: {found}{', ...' if len(labels) > 10 else ''}",
        f"  table    {run_dir / TABLE}",
        f"  picture  {run_dir / GRID}",
    ]
    if unreadable:
        lines.append(f"  {len(unreadable):,} of {labels.total() + len(unreadable):,} files could not be read:")
        lines += [f"    {_printable(p)}" for p in unreadable[:_LISTED]]
    if len(unreadable) > _LISTED:
        lines.append(f"    and {len(unreadable) - _LISTED:,} more: see the column error of the table")
    return "\n".join(lines)


def _none_readable(unreadable: Sequence[Prediction]) -> str:
    if len(unreadable) == 1:
        return f"cannot be read: {unreadable[0].error}"
    return f"none of the {len(unreadable):,} files can be read as an image; the first: {_printable(unreadable[0])}"


def _printable(prediction: Prediction) -> str:
    return f"{prediction.path}: {prediction.error}".encode(errors="backslashreplace").decode()


def _predict_and_exit(cfg: DictConfig) -> None:
    if predict(cfg):
        sys.exit(SOME_UNREADABLE)


def main() -> None:
    """Entry of ``python -m cifar10_tl.predict``."""
    run_command("predict", _predict_and_exit)


if __name__ == "__main__":
    main()
