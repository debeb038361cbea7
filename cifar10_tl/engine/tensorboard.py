"""TensorBoard of a run: logger, texts, HPARAMS, precision-recall curves and projector."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_STRING
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.v2.functional import resize

from cifar10_tl.callbacks.metrics_logger import tensorboard_loggers
from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.data.batch import CHUNK, Split
from cifar10_tl.engine.builder import plain
from cifar10_tl.engine.comparison import settings_of
from cifar10_tl.engine.results import environment, formatted, markdown_table
from cifar10_tl.engine.settings import changed_options, experiment_name, flat, repeat_command
from cifar10_tl.io import atomic_write
from cifar10_tl.metrics.evaluation import Evaluation
from cifar10_tl.models.lit_classifier import LitClassifier

#: Settings in the first columns of HPARAMS, by title. TensorBoard shows five columns until others are selected.
COLUMNS = {
    "experiment": "experiment",
    "weights": "model.weights",
    "image size": "model.image_size",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "head": "model.head.name",
    "batch size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "augmentation": "data.augment",
    "schedule": "scheduler.name",
    "freeze": "model.freeze",
    "data": "data.source",
    "seed": "seed",
}
_OF_A_TEST = r"_hparams_/|test/|precision_recall/|run/result|\w+/test$"  # tags
PROJECTED_IMAGES, PROJECTED_FEATURES, THUMBNAIL_SIZE = 2000, 64, 32


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoardLogger with one event file per start of a run, and at most one test.

    A test is logged by ``log_hyperparams`` alone, when its results are complete: a run that is killed before that
    tests again when it is resumed. A test replaces that of an earlier start, for example if a run is trained further,
    because TensorBoard would keep the first HPARAMS.
    """

    def __init__(self, save_dir: str, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._earlier_files = sorted(Path(self.log_dir).glob("events.out.tfevents.*"))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, except those that :meth:`log_hyperparams` logs."""
        super().log_metrics({k: v for k, v in metrics.items() if k not in ("test/acc", "test/loss")}, step)

    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Log settings with dotted keys: in hparams.yaml, and in HPARAMS if there are the metrics of a test."""
        super().log_hyperparams(params)
        if metrics:
            for file in self._earlier_files:
                kept = without_test(events := file.read_bytes())
                if kept != events:
                    with atomic_write(file) as target:
                        target.write(kept)
            super().log_metrics(metrics, step)
            for summary in hparams_summaries(params, metrics):
                self.experiment.file_writer.add_summary(summary, step)

    def finalize(self, status: str) -> None:
        """Flush the event file; Lightning would close it after ``fit`` and start another one for ``test``."""
        if self._experiment is not None:
            self.save()


def without_test(events: bytes) -> bytes:
    """Return the content of an event file without the events of a test and without an incomplete event.

    Format: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details.
    """
    kept, start = [], 0
    while (end := start + 16 + int.from_bytes(events[start : start + 8], "little")) <= len(events):
        values = Event.FromString(events[start + 12 : end - 4]).summary.value
        if not any(re.match(_OF_A_TEST, value.tag) for value in values):
            kept.append(events[start:end])
        start = end
    return b"".join(kept)


def log_start(cfg: DictConfig, trainer: pl.Trainer, epoch: int, *, is_new: bool = True) -> None:
    """Log the settings, the command and the environment of a run that starts or is resumed at ``epoch``.

    Other loggers get the settings of a new run only: some refuse changed ones.
    """
    config, run_dir, loggers = plain(cfg), Path(cfg.paths.output_dir), tensorboard_loggers(trainer)
    for other in trainer.loggers:
        if is_new and other not in loggers:
            other.log_hyperparams(_settings(config, run_dir))
    where = environment(trainer.strategy.root_device, trainer.world_size, trainer.precision)
    for logger in loggers:
        logger.log_hyperparams(_settings(config, run_dir))
        (Path(logger.log_dir) / logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)  # of an earlier start
        logger.save()
        logger.experiment.add_text("run/settings", _table("differs from the default", changed_options(config)), epoch)
        logger.experiment.add_text("run/command", f"`{repeat_command(config, run_dir)}`", epoch)
        logger.experiment.add_text("run/environment", _table("environment", flat(where)), epoch)


def log_test(trainer: pl.Trainer, module: LitClassifier, results: Mapping[str, Any], split: Split) -> None:
    """Log the test of ``module``: HPARAMS, text, precision-recall curves and projector."""
    evaluation, epoch, test = module.evaluation, module.restored_epoch, results["test"]
    assert evaluation is not None
    outcome = {
        "accuracy": f"{test['acc']:.2%}",
        "95% interval (Wilson)": formatted(test["acc_interval"], ""),
        **{key: test[key] for key in ("loss", "count")},
        **{key: results[key] for key in ("best_epoch", "epochs", "val", "seconds", "images_per_second")},
    }
    settings = _settings(results["config"], Path(trainer.default_root_dir))
    for logger in tensorboard_loggers(trainer):
        logger.log_hyperparams(settings, {f"test/{key}": test[key] for key in ("acc", "loss")}, step=epoch)
        logger.experiment.add_text("run/result", _table("test", flat(outcome)), epoch)
        for k, name in enumerate(evaluation.class_names):
            truth, probability = evaluation.labels == k, evaluation.probabilities[:, k]
            logger.experiment.add_pr_curve(f"precision_recall/{name}", truth, probability, epoch)
        if evaluation.features is not None and evaluation.features.isfinite().all():
            add_projection(logger, evaluation, evaluation.features, split, epoch)


def _settings(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    return {"experiment": experiment_name(run_dir), **settings_of({"config": config})}


def _table(title: str, values: Mapping[str, Any]) -> str:
    texts = {
        k: v if isinstance(v, str) else f"{v:.6g}" if isinstance(v, float) else json.dumps(v) for k, v in values.items()
    }
    return markdown_table([title, "value"], texts.items() or [("nothing", "")])


def hparams_summaries(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Any]:
    """Return the summaries of HPARAMS: ``COLUMNS`` first, then all other settings.

    TensorBoard takes the columns from one of the runs that it shows, and sorts them: those that differ first, then by
    name. Their names are therefore numbered, and the settings that only other runs have are added.
    """
    front = {f"{i:02d} {title}": _short(key, settings) for i, (title, key) in enumerate(COLUMNS.items())}
    rest = {key: _cell(value) for key, value in settings.items() if key not in COLUMNS.values()}
    experiment, *session = hparams({**front, **rest}, dict(metrics))  # type: ignore[no-untyped-call]
    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    columns = content.experiment.hparam_infos
    for column in columns:
        if column.name in front:
            column.display_name, column.differs = column.name[3:], True
    others = (_all_settings() | settings.keys()) - {column.name for column in columns} - set(COLUMNS.values())
    for key in sorted(others):
        columns.add(name=key, type=DATA_TYPE_STRING)
    plugin.content = content.SerializeToString()
    return [experiment, *session]


def _short(key: str, settings: Mapping[str, Any]) -> Any:
    value = settings.get(key)
    if key == "model.weights":
        value = settings.get("init_from") or value
        return Path(value).name if value else "random"
    if key == "model.image_size" and isinstance(value, list):
        return value[-1][1]
    if key == "data.augment":
        options = {k.rsplit(".")[-1]: v for k, v in settings.items() if k.startswith(key)}
        used = {k: v for k, v in options.items() if v and v != "none" and not k.startswith("mix_")}
        return ", ".join(k if v is True else f"{k} {v}" for k, v in used.items()).replace("_", " ") or "none"
    return _cell(value)


def _cell(value: Any) -> Any:
    """Return a value that HPARAMS can hold; None is an empty cell."""
    is_plain = value is None or (isinstance(value, str | int | float) and not isinstance(value, bool))
    return value if is_plain else json.dumps(value)


def _all_settings() -> set[str]:
    """Return the settings of all options of the config groups, with dotted keys."""
    keys = set()
    for group in ("data", "model", "model/head", "optimizer", "scheduler", "trainer"):
        for path in (CONFIG_DIR / group).glob("*.yaml"):
            content: Any = OmegaConf.to_container(OmegaConf.load(path))
            keys |= flat(content, f"{group.replace('/', '.')}.").keys() - {f"{group}.defaults"}
    return keys


def add_projection(
    logger: TensorBoardLogger, evaluation: Evaluation, features: Tensor, split: Split, epoch: int | None
) -> None:
    """Add the features of up to ``PROJECTED_IMAGES`` images, evenly spaced, to the projector.

    Their principal components are enough, because the projector itself uses at most 200 random projections.
    """
    folder = Path(logger.log_dir)
    (folder / "projector_config.pbtxt").unlink(missing_ok=True)  # names the files of an earlier test of this run
    for old in folder.glob("[0-9]*/test/tensors.tsv"):
        shutil.rmtree(old.parent)
    rows = torch.linspace(0, len(evaluation) - 1, min(PROJECTED_IMAGES, len(evaluation))).round().long()
    indices, predicted = evaluation.indices[rows], evaluation.predictions[rows]
    with torch.random.fork_rng(devices=[]):  # the algorithm is randomized
        torch.manual_seed(0)
        left, scales, _ = torch.pca_lowrank(features[rows], min(PROJECTED_FEATURES, len(rows), features.shape[1]))
    labels = [[evaluation.class_names[k] for k in classes.tolist()] for classes in (evaluation.labels[rows], predicted)]
    probabilities = [f"{p:.4f}" for p in evaluation.probabilities[rows, predicted].tolist()]
    metadata = zip(*labels, probabilities, indices.tolist(), split.paths_of(indices), strict=True)
    size = [THUMBNAIL_SIZE, THUMBNAIL_SIZE]
    logger.experiment.add_embedding(
        (left * scales).double().round(decimals=4),
        [[" ".join(str(cell).split()) for cell in row] for row in metadata],
        torch.cat([resize(split.by_index(chunk), size) for chunk in torch.split(indices, CHUNK)]) / 255,
        epoch,
        "test",
        ["true", "predicted", "probability", "index", "path"],
    )
