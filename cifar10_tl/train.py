"""Fine-tune a network, test its best checkpoint, and write results, figures and checkpoints to the run folder.

python -m cifar10_tl.train                                the default recipe on CIFAR-10
python -m cifar10_tl.train experiment=quickstart          a few minutes on two CPU cores, without downloads
python -m cifar10_tl.train resume=outputs/runs/<time>     resume a run
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.resume import resume_command
from cifar10_tl.config.run_dir import RUN_CONFIG, check_owner, process_rank
from cifar10_tl.engine.processes import SignalHandler, Stopped, own_processes, requeue
from cifar10_tl.io import claim, remove_temporary

if TYPE_CHECKING:  # slow to import, therefore imported by the functions that need it
    import lightning.pytorch as pl

    from cifar10_tl.models.lit_classifier import LitClassifier

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """Train in the folder ``cfg.paths.output_dir``.

    Returns:
        The content of results.json; None for a ``fast_dev_run``, which writes nothing.
    """
    started, run_dir = time.perf_counter(), Path(cfg.paths.output_dir)
    lock = claim(run_dir) if process_rank() == 0 and run_dir.is_dir() else nullcontext(True)
    with SignalHandler() as handler, own_processes(handler), own_wandb_run(), lock as is_only_run:
        if not is_only_run:
            raise UserError(f"{run_dir}: another process is running in this folder; wait for it or stop it")
        try:
            return _train(cfg, handler, started)
        except Stopped:
            if process_rank() == 0 and handler.received == signal.SIGUSR1:
                requeue()
            if process_rank() == 0 and (run_dir / "checkpoints").exists():  # else the command removes the folder
                log.info("resume with: %s", resume_command(run_dir))
            raise


@contextmanager
def own_wandb_run() -> Iterator[None]:
    """Finish the run of Weights & Biases that a logger starts, which the next job of a sweep would continue."""
    was_running, status = getattr(sys.modules.get("wandb"), "run", None) is not None, 1
    try:
        yield
        status = 0
    finally:
        wandb: Any = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and not was_running:
            wandb.finish(exit_code=status)


def _train(cfg: DictConfig, handler: SignalHandler, started: float) -> dict[str, Any] | None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LambdaCallback

    from cifar10_tl.engine import builder, checkpoints, hardware, results
    from cifar10_tl.engine.tensorboard import log_start
    from cifar10_tl.models.weights import check_weights

    hardware.quiet_libraries()
    pl.seed_everything(cfg.seed, verbose=False)
    run_dir, checkpoint_io = Path(cfg.paths.output_dir), checkpoints.RunCheckpointIO()
    start, resumed = prepare_resume(cfg, checkpoint_io)
    datamodule = builder.build_datamodule(cfg)
    module = builder.build_module(cfg, datamodule)
    if start is not None:
        check_same_run(start, resumed, module)
        if not cfg.get("budget"):  # else the checkpoint has the number of epochs
            check_length(cfg, builder.next_epoch(resumed))
        module.has_weights = True  # those of the checkpoint
    elif cfg.init_from:
        module.load_weights_from(Path(cfg.init_from))
    else:
        check_weights(cfg.model.backbone, cfg.model.weights)
    trainer = builder.build_trainer(cfg, handler, checkpoint_io, builder.next_epoch(resumed), started)
    builder.speed_up(cfg, module, trainer)
    if cfg.data.cache_features:
        datamodule.feature_cache = builder.build_feature_cache(cfg, module, trainer)
    earlier = results.read_results(run_dir)
    if trainer.is_global_zero:
        if start is None:
            results.begin(cfg)
        else:  # the folder keeps its settings if these do not fit the checkpoint
            begin = LambdaCallback(on_train_start=lambda *_: results.begin(cfg))
            trainer.callbacks.append(begin)  # type: ignore[attr-defined]
        log_start(cfg, trainer, builder.next_epoch(resumed), is_new=start is None)
    clock = time.perf_counter()
    trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    if cfg.get("budget"):
        cfg.trainer.max_epochs = trainer.max_epochs
    if trainer.is_global_zero:
        results.write_config(cfg)
    if resumed and trainer.global_step == resumed["global_step"]:
        log.info(
            "nothing left to train after step %d: raise trainer.max_epochs, max_steps or max_time to train further, or "
            "start a new run with init_from= if budget= or early stopping has ended this one",
            trainer.global_step,
        )
        has_report = cfg.get("report", "none") == "none" or (run_dir / results.REPORT).exists()
        if "test" in earlier and (has_report or not cfg.test):
            kept = run_dir / "checkpoints" / "best.ckpt"
            log.info("%s", results.summary(earlier, run_dir, kept if kept.exists() else None))
            return earlier
    return _finish(cfg, trainer, module, time.perf_counter() - clock)


def _finish(cfg: DictConfig, trainer: pl.Trainer, module: LitClassifier, seconds: float) -> dict[str, Any] | None:
    """Test the best checkpoint after a fit of ``seconds``, write the results, and return them."""
    from cifar10_tl.engine import analysis, checkpoints, logistic_regression, report, results
    from cifar10_tl.engine.tensorboard import log_test

    run_dir, datamodule = Path(cfg.paths.output_dir), trainer.datamodule  # type: ignore[attr-defined]
    best, best_epoch = checkpoints.best_checkpoint(trainer) or (None, None)
    outcome = results.fit_results(cfg, module, trainer, best_epoch, seconds)
    outcome |= logistic_regression.results(trainer, module)
    if cfg.test:
        clock = time.perf_counter()
        trainer.test(module, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)
        outcome["seconds"]["test"] = time.perf_counter() - clock
        outcome |= results.test_results(cfg, module, datamodule.splits["test"])
    if cfg.trainer.fast_dev_run:
        log.info("fast_dev_run: all stages ran, nothing was written")
        return None
    if trainer.is_global_zero:
        if cfg.test:
            log_test(trainer, module, outcome, datamodule.splits["test"])
        tested = (module.evaluation if cfg.test else None, datamodule.splits["test"])
        results.write_results(run_dir, outcome, *tested)
        if cfg.get("report", "none") != "none":
            report.write_report(run_dir, *tested, explain=partial(analysis.heatmaps, module, trainer))
        log.info("%s", results.summary(outcome, run_dir, best))
    return outcome


def prepare_resume(cfg: DictConfig, checkpoint_io: Any) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the checkpoint that the run resumes from and its content, None and an empty dict for a new run."""
    from cifar10_tl.engine.checkpoints import find_resumable

    run_dir, is_rank_zero = Path(cfg.paths.output_dir), process_rank() == 0
    exists = (run_dir / RUN_CONFIG).exists()
    restarts = (os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    is_requeued = exists and any(int(count) > 0 for count in restarts)  # both repeat the first command
    if not cfg.resume and not is_requeued:
        check_owner(run_dir, "train")
        if exists and is_rank_zero:
            raise UserError(
                f"paths.output_dir={run_dir}: contains a run; resume it with resume={run_dir}, or use another folder"
            )
        return None, {}
    start, resumed = find_resumable(run_dir, checkpoint_io) or (None, {})
    if is_rank_zero:
        remove_temporary(run_dir)
    if start is not None:
        log.info("resuming from %s, at step %d", start, resumed["global_step"])
        if is_rank_zero and start.name != "last.ckpt":
            checkpoint_io.save_checkpoint(resumed, start.with_name("last.ckpt"))
    return start, resumed


def check_same_run(start: Path, checkpoint: Mapping[str, Any], module: LitClassifier) -> None:
    """Check that the settings of a run are those of its checkpoint."""
    for key, value in checkpoint["hyper_parameters"].items():
        if key in module.hparams and module.hparams[key] != value:
            raise UserError(
                f"{start} was saved with {key}={value}, but {RUN_CONFIG} or the data has {module.hparams[key]}: "
                f"restore it, or start a new run with init_from={start}"
            )


def check_length(cfg: DictConfig, done: int) -> None:
    """Check that a resumed run is not shorter than the ``done`` epochs that it has."""
    if 0 < (cfg.trainer.max_epochs or 0) < done:
        raise UserError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: {cfg.paths.output_dir} already has {done} epochs"
        )


def main() -> None:
    """Run ``python -m cifar10_tl.train``."""
    run_command("train", train)


if __name__ == "__main__":
    main()
