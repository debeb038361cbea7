"""Measure a trained network, or set finished runs side by side.

python -m cifar10_tl.evaluate checkpoint=outputs/runs/<stamp>/checkpoints/best.ckpt
python -m cifar10_tl.evaluate checkpoint=best.ckpt data=folder data.root=DIR tta=flip corrupt=all
python -m cifar10_tl.evaluate compare=outputs/runs/<one>,outputs/runs/<other>
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.io import atomic_write, atomic_write_text

if TYPE_CHECKING:  # torch and Lightning take seconds to import: only once the settings are known to be good
    import lightning.pytorch as pl

    from cifar10_tl.data.batch import Split
    from cifar10_tl.data.datamodule import CIFAR10DataModule
    from cifar10_tl.metrics.evaluation import Evaluation
    from cifar10_tl.models.lit_classifier import LitClassifier


log = logging.getLogger(__name__)

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Do what ``cfg`` says, and leave the outcome in ``cfg.paths.output_dir``.

    Returns:
        What results.json holds; where runs are compared, the table under "runs".

    Raises:
        UserError: a file is missing or broken, the data does not fit the checkpoint, or a setting does not fit.
    """
    if (Path(cfg.paths.output_dir) / RUN_CONFIG).is_file():
        raise UserError(f"paths.output_dir={cfg.paths.output_dir}: a training run lies there; choose another folder")
    return compare_runs(cfg) if cfg.compare else evaluate_checkpoint(cfg)


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Metrics, figures and predictions of ``cfg.checkpoint``; see :func:`evaluate`."""
    from cifar10_tl.engine.checkpoints import restore
    from cifar10_tl.engine.hardware import quiet_libraries, tune_for
    from cifar10_tl.engine.results import describe, environment, write_corruption, write_json, write_predictions
    from cifar10_tl.metrics.calibration import fit_temperature
    from cifar10_tl.plots import evaluation_figures, to_png

    quiet_libraries()
    clock = time.perf_counter()
    module = restore(Path(cfg.checkpoint))
    datamodule = build_datamodule(cfg, module)
    run = Evaluator(build_trainer(cfg), module, datamodule.hparams["batch_size"])
    tune_for(run.device, module.network)  # as in training
    datamodule.prepare_data()
    datamodule.setup()
    split = datamodule.splits[cfg.split]
    truth = read_ground_truth(cfg, split, len(module.class_names))

    evaluation = run(split, cfg.split)
    val = evaluation if cfg.split == "val" else run(datamodule.splits["val"], "val, for the temperature")
    temperature = fit_temperature(val.logits, val.labels)
    results = {
        "checkpoint": str(cfg.checkpoint),
        "epoch": module.restored_epoch,
        "split": cfg.split,
        cfg.split: all_metrics(evaluation, temperature),
        "confusion_matrix": evaluation.confusion_matrix.tolist(),
        "class_names": list(module.class_names),
        **further_results(cfg, run, split, evaluation),
        **{name: judge(evaluation) for name, judge in truth.items()},
        "data": dict(datamodule.hparams),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": environment(run.device, 1, run.precision),
    }
    run_dir = Path(cfg.paths.output_dir)
    where = f"{SPLIT_NAMES[cfg.split]}, epoch {module.restored_epoch}"
    for name, figure in evaluation_figures(evaluation, evaluation.scaled(temperature), split, where).items():
        with atomic_write(run_dir / "figures" / f"{name}_{cfg.split}.png") as file:
            file.write(to_png(figure))
    write_predictions(run_dir / "predictions.csv", evaluation)
    if "corruption" in results:
        write_corruption(run_dir / "corruption.csv", results["corruption"])
    results["seconds"] = {"evaluate": time.perf_counter() - clock}
    write_json(run_dir / "results.json", results)
    log.info("%s", describe(results, run_dir))
    return results


def all_metrics(evaluation: Evaluation, temperature: float) -> dict[str, Any]:
    """Everything that is measured of one pass, and its calibration at ``temperature``."""
    calibrated = evaluation.scaled(temperature)
    return {
        **evaluation.scores(),
        "calibrated": {"temperature": temperature, "nll": calibrated.loss, **calibrated.calibration()},
        "per_class": evaluation.per_class(),
        "confused_pairs": evaluation.confused_pairs(),
        "confident_errors": evaluation.confident_errors(),
    }


def further_results(cfg: DictConfig, run: Evaluator, split: Split, evaluation: Evaluation) -> dict[str, Any]:
    """What else is asked for: the scores over several views, and those on images made worse."""
    from cifar10_tl.metrics.corruptions import robustness
    from cifar10_tl.metrics.tta import views_averaged

    found: dict[str, Any] = {}
    if cfg.tta != "none":
        found["tta"] = views_averaged(run, split, evaluation, cfg.tta)
    if cfg.corrupt != "none":
        found["corruption"] = robustness(run, split, evaluation, cfg.corrupt)
    return found


def read_ground_truth(cfg: DictConfig, split: Split, num_classes: int) -> dict[str, Callable[[Evaluation], Any]]:
    """Under the name of each file of extra ground truth that ``cfg`` gives, what is to be asked of the evaluation.

    Raises:
        UserError: a file is missing, broken, or not about these images.
    """
    from cifar10_tl.metrics.ground_truth import DoubtfulLabels, HumanLabels

    found: dict[str, Callable[[Evaluation], Any]] = {}
    if cfg.human_labels:
        if cfg.split != "test":
            raise UserError(f"human_labels={cfg.human_labels} is about the test images, and split={cfg.split}")
        found["human_labels"] = HumanLabels.read(Path(cfg.human_labels), num_classes, split.indices).judge
    if cfg.doubtful_labels:
        found["doubtful_labels"] = DoubtfulLabels.read(Path(cfg.doubtful_labels), split.indices).judge
    return found


class Evaluator:
    """Runs the network over images, by the steps that test a network after training: the numbers are the same."""

    def __init__(self, trainer: pl.Trainer, module: LitClassifier, batch_size: int) -> None:
        self.trainer, self.module, self.batch_size = trainer, module, batch_size

    def __call__(self, split: Split, description: str) -> Evaluation:
        """The evaluation of all images of ``split``, in order; ``description`` is shown meanwhile."""
        from cifar10_tl.callbacks import RunProgressBar
        from cifar10_tl.data.batch import BatchLoader, BatchSampler

        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunProgressBar):
                callback.description = description
        order = BatchSampler(len(split), self.batch_size, shuffle=False)
        loader = BatchLoader(split, order, pin_memory=self.device.type == "cuda")
        self.trainer.test(self.module, dataloaders=loader, verbose=False)
        evaluation = self.module.evaluation
        assert evaluation is not None
        assert len(evaluation) == len(split)
        return evaluation

    @property
    def device(self) -> Any:
        """Where the network runs."""
        return self.trainer.strategy.root_device

    @property
    def precision(self) -> str:
        """Lightning's name of it."""
        return str(self.trainer.precision_plugin.precision)


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's Trainer on one device, writing nothing."""
    import lightning.pytorch as pl

    from cifar10_tl.callbacks import RunProgressBar
    from cifar10_tl.engine.checkpoints import recorded_precision
    from cifar10_tl.engine.hardware import choose_precision

    precision, accelerator = cfg.trainer.precision, cfg.trainer.accelerator
    if precision == "auto":
        recorded = recorded_precision(Path(cfg.checkpoint))
        precision, reason = (recorded, "so was the run tested") if recorded else choose_precision(accelerator)
        log.info("precision %s: %s", precision, reason)
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=cfg.trainer.enable_progress_bar,
            enable_model_summary=False,
            callbacks=[RunProgressBar()] if cfg.trainer.enable_progress_bar else [],
            default_root_dir=cfg.paths.output_dir,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: {error}") from error


def build_datamodule(cfg: DictConfig, module: LitClassifier) -> CIFAR10DataModule:
    """The data of ``cfg.data``, what it leaves open taken from the checkpoint.

    Raises:
        UserError: its classes are not those of the checkpoint, or a setting does not fit the data.
    """
    from cifar10_tl.data.datamodule import CIFAR10DataModule, data_options
    from cifar10_tl.engine.checkpoints import read_checkpoint

    trained_with = read_checkpoint(Path(cfg.checkpoint)).get("datamodule_hyper_parameters", {})
    given: Any = OmegaConf.to_container(cfg.data, resolve=True)
    given.pop("cache_features", None)  # one pass has no use for it
    options = data_options(given, trained_with)
    if "native_size" in options:
        options["native_size"] = module.hparams["native_size"]  # other images are brought to what the network knows
    datamodule = CIFAR10DataModule(**options)
    own, other = list(module.class_names), list(datamodule.class_names)
    if own != other:
        raise UserError(
            f"the classes differ: those of the checkpoint are {', '.join(own)}; "
            f"those of the data are {', '.join(other)}"
        )
    return datamodule


def compare_runs(cfg: DictConfig) -> dict[str, Any]:
    """Set the runs of ``cfg.compare`` side by side: on the terminal, in comparison.csv and in comparison.md."""
    from cifar10_tl.engine.comparison import HEADER, Comparison, read_run

    comparison = Comparison([read_run(Path(folder)) for folder in cfg.compare])
    run_dir = Path(cfg.paths.output_dir)
    atomic_write_text(run_dir / "comparison.csv", comparison.csv())
    atomic_write_text(run_dir / "comparison.md", comparison.markdown())
    log.info("\n\n%s\n\n  %s, comparison.md", comparison.text(), run_dir / "comparison.csv")
    return {"runs": [dict(zip(HEADER, row, strict=True)) for row in comparison.rows()]}


def as_list(argument: str) -> str:
    """``compare=A,B`` as Hydra writes a list, ``compare=['A','B']``; it would take the comma for a sweep."""
    key, _, value = argument.partition("=")
    if key != "compare" or not value or value[0] in "['\"":
        return argument
    quoted = ["'" + folder.replace("'", "\\'") + "'" for folder in value.split(",") if folder]
    return f"compare=[{','.join(quoted)}]"


def main() -> None:
    """Entry of ``python -m cifar10_tl.evaluate``."""
    sys.argv[1:] = map(as_list, sys.argv[1:])
    run_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
