"""Fine-tune, test the best checkpoint, and leave everything to look at in the run folder.

python -m cifar10_tl.train                                the default recipe on CIFAR-10
python -m cifar10_tl.train experiment=quickstart          a few minutes on two CPU cores, nothing to download
python -m cifar10_tl.train resume=outputs/runs/<stamp>    go on where that run stopped
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
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

if TYPE_CHECKING:  # Lightning takes seconds to import: only once the settings are known to be good
    from cifar10_tl.models.lit_classifier import LitClassifier


log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """Run what ``cfg`` says, in the folder ``cfg.paths.output_dir``.

    Returns:
        What results.json holds; None under ``fast_dev_run``, which writes nothing.

    Raises:
        UserError: a setting does not fit the data, the machine or another setting.
    """
    run_dir = Path(cfg.paths.output_dir)
    with SignalHandler() as handler:
        try:
            from cifar10_tl.engine.hardware import quiet_libraries

            quiet_libraries()
            with own_processes(handler), only_one_run(run_dir):
                return _train(cfg, handler)
        except Stopped:
            if process_rank() == 0 and (run_dir / RUN_CONFIG).exists():
                log.info("resume with: %s", resume_command(run_dir))
            if process_rank() > 0 and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
                raise SystemExit(0) from None  # for these, another status means that the others are to be killed
            raise


def _train(cfg: DictConfig, handler: SignalHandler) -> dict[str, Any] | None:
    import lightning.pytorch as pl

    from cifar10_tl.engine.builder import (
        build_datamodule,
        build_feature_cache,
        build_module,
        build_trainer,
        describe,
        speed_up,
    )
    from cifar10_tl.engine.checkpoints import best_checkpoint, find_resumable, make_last
    from cifar10_tl.engine.results import results_of_fit, results_of_test, summary, write_results

    pl.seed_everything(cfg.seed, verbose=False)
    run_dir = Path(cfg.paths.output_dir)
    resumes = bool(cfg.resume) or was_requeued(run_dir)
    if process_rank() == 0 and not resumes and (run_dir / RUN_CONFIG).exists():
        raise UserError(
            f"paths.output_dir={run_dir}: a run lies there; go on with it by resume={run_dir}, or choose another"
        )
    start = find_resumable(run_dir) if resumes else None
    if resumes and process_rank() == 0:
        remove_temporary(run_dir)
        if start is not None:
            make_last(start)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    if start is not None:
        check_same_run(start, module)
    if cfg.init_from and start is None:
        module.load_weights_from(Path(cfg.init_from))
    trainer = build_trainer(cfg, start, handler)
    speed_up(cfg, module, trainer)
    if cfg.data.cache_features:
        datamodule.feature_cache = build_feature_cache(cfg, module, trainer)
    if trainer.is_global_zero:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            atomic_write_text(run_dir / RUN_CONFIG, own_settings(cfg))
        log.info("%s", describe(cfg, module, trainer, start))

    clock = time.perf_counter()
    trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    best = best_checkpoint(trainer)
    results = results_of_fit(cfg, module, trainer, best, time.perf_counter() - clock)
    if cfg.test:
        clock = time.perf_counter()
        trainer.test(module, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)
        results["seconds"]["test"] = time.perf_counter() - clock
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.info("fast_dev_run: every stage ran; nothing was written")
        return None
    if cfg.test:
        results |= results_of_test(cfg, module, trainer)
    if trainer.is_global_zero:
        write_results(run_dir, results, module, trainer)
        log.info("%s", summary(results, run_dir, best))
    return results


@contextmanager
def only_one_run(run_dir: Path) -> Iterator[None]:
    """Around a run: no other one may write into its folder meanwhile.

    Raises:
        UserError: another one does.
    """
    with ExitStack() as stack:
        if process_rank() == 0 and run_dir.is_dir() and not stack.enter_context(claim(run_dir)):
            raise UserError(f"{run_dir}: another process is at work in this folder; wait for its end, or stop it")
        yield


def own_settings(cfg: DictConfig) -> str:
    """What the run is, and with which length it was last started: what a resumed run begins with."""
    return OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": None, "trust": False}), resolve=True)


def check_same_run(start: Path, module: LitClassifier) -> None:
    """Complain where the run's settings are no longer those that its checkpoint was made with.

    Raises:
        UserError: naming the first difference.
    """
    from cifar10_tl.engine.checkpoints import read_checkpoint

    for key, value in read_checkpoint(start)["hyper_parameters"].items():
        if key in module.hparams and module.hparams[key] != value:
            raise UserError(
                f"{start} was made with {key}={value}, but {RUN_CONFIG} or its data now say {module.hparams[key]}: put "
                f"that right, or start a new run with init_from={start}"
            )


def was_requeued(run_dir: Path) -> bool:
    """Whether SLURM starts this job again, and it has left a run there."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and (run_dir / RUN_CONFIG).exists()


def main() -> None:
    """Entry of ``python -m cifar10_tl.train``."""
    run_command("train", train)


if __name__ == "__main__":
    main()
