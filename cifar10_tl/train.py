"""Fine-tune a network, test its best checkpoint, and write results, figures and checkpoints to the run folder.

python -m cifar10_tl.train                                the default recipe on CIFAR-10
python -m cifar10_tl.train experiment=quickstart          a few minutes on two CPU cores, without downloads
python -m cifar10_tl.train resume=outputs/runs/<stamp>    resume a run
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.config.resume import resume_command
from cifar10_tl.config.run_dir import RUN_CONFIG, process_rank
from cifar10_tl.engine.processes import SignalHandler, Stopped, own_processes
from cifar10_tl.io import atomic_write_text, claim, remove_temporary

if TYPE_CHECKING:  # slow to import, therefore imported by the functions that need them
    import lightning.pytorch as pl

    from cifar10_tl.models.lit_classifier import LitClassifier

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """Train in the folder ``cfg.paths.output_dir``.

    Returns:
        The content of results.json; None for a ``fast_dev_run``, which writes nothing.

    Raises:
        UserError: A setting does not fit the data, the machine or another setting.
    """
    run_dir = Path(cfg.paths.output_dir)
    with SignalHandler() as handler:
        try:
            with own_processes(handler), only_one_run(run_dir):
                return _train(cfg, handler)
        except Stopped:
            if process_rank() == 0 and (run_dir / RUN_CONFIG).exists():
                log.info("resume with: %s", resume_command(run_dir))
            if process_rank() > 0 and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
                raise SystemExit(0) from None  # torchrun and SLURM kill the other processes after any other status
            raise


def _train(cfg: DictConfig, handler: SignalHandler) -> dict[str, Any] | None:
    import lightning.pytorch as pl

    from cifar10_tl.engine import builder
    from cifar10_tl.engine.checkpoints import RunCheckpointIO, best_checkpoint
    from cifar10_tl.engine.hardware import quiet_libraries
    from cifar10_tl.engine.results import fit_results, summary, test_results, write_results

    quiet_libraries()
    pl.seed_everything(cfg.seed, verbose=False)
    run_dir, checkpoint_io = Path(cfg.paths.output_dir), RunCheckpointIO()
    start, resumed = prepare_resume(cfg, checkpoint_io)
    datamodule = builder.build_datamodule(cfg)
    module = builder.build_module(cfg, datamodule)
    if start is not None:
        check_same_run(start, resumed, module)
    elif cfg.init_from:
        module.load_weights_from(Path(cfg.init_from))
    trainer = builder.build_trainer(cfg, resumed or None, handler, checkpoint_io)
    builder.speed_up(cfg, module, trainer)
    if cfg.data.cache_features:
        datamodule.feature_cache = builder.build_feature_cache(cfg, module, trainer)
    earlier = builder.read_results(cfg)
    begin(cfg, trainer, builder.describe(cfg, module, trainer, start))

    clock = time.perf_counter()
    trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    if resumed and trainer.global_step == resumed["global_step"]:
        log.info(
            "nothing left to train after epoch %d, step %d: to train further, raise the limit that ended the run "
            "(trainer.max_epochs, max_steps or max_time, or early stopping)",
            *(builder.next_epoch(resumed) - 1, trainer.global_step),
        )
        if earlier:
            return earlier
    best, best_epoch = best_checkpoint(trainer) or (None, None)
    results = fit_results(cfg, module, trainer, best_epoch, time.perf_counter() - clock)
    if cfg.test:
        clock = time.perf_counter()
        trainer.test(module, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)
        results["seconds"]["test"] = time.perf_counter() - clock
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.info("fast_dev_run: all stages ran, nothing was written")
        return None
    if cfg.test:
        results |= test_results(cfg, module, trainer)
    if trainer.is_global_zero:
        write_results(run_dir, results, module, trainer)
        log.info("%s", summary(results, run_dir, best))
    return results


def prepare_resume(cfg: DictConfig, checkpoint_io: Any) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the checkpoint that the run resumes from and its content, None and an empty dict for a new run.

    Raises:
        UserError: The folder contains a run that is not resumed, or its checkpoints are broken.
    """
    from cifar10_tl.engine.checkpoints import copy_to_last, find_resumable

    run_dir = Path(cfg.paths.output_dir)
    if not cfg.resume and not was_requeued(run_dir):
        if process_rank() == 0 and (run_dir / RUN_CONFIG).exists():
            raise UserError(
                f"paths.output_dir={run_dir}: contains a run; resume it with resume={run_dir}, or use another folder"
            )
        return None, {}
    start, resumed = find_resumable(run_dir, checkpoint_io) or (None, {})
    if process_rank() == 0:
        remove_temporary(run_dir)
        if start is not None:
            copy_to_last(start)
    return start, resumed


def begin(cfg: DictConfig, trainer: pl.Trainer, description: str) -> None:
    """Write the config of the run, and log its settings and its description, on rank zero."""
    from cifar10_tl.engine.builder import plain
    from cifar10_tl.engine.results import log_settings

    if trainer.is_global_zero:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            config = OmegaConf.merge(cfg, {"resume": None, "trust": False})
            atomic_write_text(Path(cfg.paths.output_dir) / RUN_CONFIG, OmegaConf.to_yaml(config, resolve=True))
            log_settings(trainer, plain(cfg))
        log.info("%s", description)


@contextmanager
def only_one_run(run_dir: Path) -> Iterator[None]:
    """Prevent other runs from writing to the folder.

    Raises:
        UserError: Another run does.
    """
    with ExitStack() as stack:
        if process_rank() == 0 and run_dir.is_dir() and not stack.enter_context(claim(run_dir)):
            raise UserError(f"{run_dir}: another process is running in this folder; wait for it or stop it")
        yield


def check_same_run(start: Path, checkpoint: Mapping[str, Any], module: LitClassifier) -> None:
    """Check that the settings of a run are those of its checkpoint.

    Raises:
        UserError: They differ; the message names the first difference.
    """
    for key, value in checkpoint["hyper_parameters"].items():
        if key in module.hparams and module.hparams[key] != value:
            raise UserError(
                f"{start} was saved with {key}={value}, but {RUN_CONFIG} or the data has {module.hparams[key]}: "
                f"restore it, or start a new run with init_from={start}"
            )


def was_requeued(run_dir: Path) -> bool:
    """Return whether SLURM has restarted this job after it began a run in ``run_dir``."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 and (run_dir / RUN_CONFIG).exists()


def main() -> None:
    """Run ``python -m cifar10_tl.train``."""
    run_command("train", train)


if __name__ == "__main__":
    main()
