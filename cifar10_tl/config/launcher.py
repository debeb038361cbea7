"""From the command line to a checked configuration, and from a user's mistake to one clear line.

Every command is started by :func:`run_command`. It imports no torch, so that ``--help``, ``--cfg job`` and a mistake
in a setting answer at once.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar10_tl.config.errors import UserError, _is_lost, explain
from cifar10_tl.config.resume import resumed_config
from cifar10_tl.config.run_dir import CONFIG_DIR, RUN_CONFIG, _run_dir, process_rank, register_resolvers, run_stamp
from cifar10_tl.config.validation import check_config

log = logging.getLogger(__name__)


LINES_VARIABLE = "CIFAR10_TL_ERROR_LINES"


#: What lies in the folder of a run that has not taken a step.
_BEGINNINGS = {RUN_CONFIG, "hparams.yaml", "events"}


#: Of Hydra's parser.
BARE_FLAGS = {"-m", "--multirun", "-r", "--run", "-h", "--help", "--hydra-help", "--version", "--resolve"}
BARE_FLAGS |= {"-sc", "--shell-completion"}


FLAGS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name"}
FLAGS_WITH_VALUE |= {"-cd", "--config-dir", "--experimental-rerun"}


def run_command(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``conf/<name>.yaml`` with the command line, check it, and call ``task`` with it.

    A :class:`UserError`, or a mistake that Hydra found, ends the process with one ``error:`` line on stderr and
    status 2. ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    started_by_us = LINES_VARIABLE in os.environ and "LOCAL_RANK" in os.environ
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1" and not started_by_us
    if not show_traceback:
        os.environ[LINES_VARIABLE] = "1"  # tells processes that Lightning starts: what comes next is no wish of a user
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise to us, rather than print and exit with status 1
    register_resolvers()
    sys.argv[1:] = _flags_first(sys.argv[1:])
    if process_rank() > 0:  # one process writes the run's records; the others would write over them
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]

    def report(error: Exception) -> NoReturn:
        if isinstance(error, BrokenPipeError):  # whoever read our output, such as `| head`, has seen enough
            os._exit(1)
        line = None if show_traceback else explain(error, name)
        if line is None:
            raise error
        if _tells(error):
            print(f"error: {_speaker()}{line}", file=sys.stderr)
        sys.exit(2)

    start = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(_job(task, report))
    try:
        _check_flags(sys.argv[1:])
        start()
    except Exception as error:
        report(error)
    except KeyboardInterrupt:  # before a run takes care of it
        sys.exit(128 + signal.SIGINT)


def _tells(error: Exception) -> bool:
    """Whether this process is to tell of ``error``: the first of each machine does, and each of its own lack of memory.

    That a process is gone the second tells as well, for that may be the first.
    """
    place = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return place == 0 or (place == 1 and _is_lost(error)) or type(error).__name__ == "OutOfMemoryError"


def _speaker() -> str:
    rank = process_rank()
    return f"process {rank} on {platform.node()}: " if rank else ""


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's parser takes no override behind a flag that stands behind an override, as in ``seed=1 -m lr=1,2``."""
    return sorted(arguments, key=lambda argument: argument not in BARE_FLAGS)


def _check_flags(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument.startswith("-") and argument.split("=")[0] not in BARE_FLAGS | FLAGS_WITH_VALUE:
            raise UserError(
                f"{argument}: there is no such flag; settings are given as key=value, such as seed=1 (see --help)"
            )


def _job(task: Callable[[DictConfig], Any], report: Callable[[Exception], NoReturn]) -> Callable[[DictConfig], Any]:
    """What Hydra is to call. It reports by itself: Hydra would print lines of its own about an error in a job."""

    def job(cfg: DictConfig) -> Any:
        folder = Path(HydraConfig.get().runtime.output_dir)
        begins = _holds_only(folder, _records())
        try:
            if HydraConfig.get().job.chdir:
                raise UserError("hydra.job.chdir=true: paths in settings are relative to where the command is started")
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _check_sweeper(cfg, HydraConfig.get().sweeper.get("_target_", ""))
                _settle_sweep_job(cfg)
            if cfg.get("resume"):
                cfg = resumed_config(cfg, HydraConfig.get().overrides.task)
            check_config(cfg)
            _check_one_folder(cfg)
            return task(cfg)
        except (Exception, SystemExit) as error:
            if begins and process_rank() == 0 and _holds_only(folder, _records() | _BEGINNINGS):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, SystemExit):  # by a signal
                raise
            report(error)

    return job


def _records() -> set[str]:
    """What Hydra writes into a run folder before our code runs."""
    return {".hydra", f"{HydraConfig.get().job.config_name}.log"}


def _holds_only(folder: Path, names: set[str]) -> bool:
    """Whether nothing else lies in ``folder``; event files, of whatever name, go by "events"."""
    found = {"events" if path.name.startswith("events.out") else path.name for path in folder.glob("*")}
    return found <= names


def _check_sweeper(cfg: DictConfig, sweeper: str) -> None:
    """Refuse sweeps whose values are drawn at random, over several processes: each of them would draw its own.

    Raises:
        UserError: naming the sweeper.
    """
    devices = OmegaConf.select(cfg, "trainer.devices"), OmegaConf.select(cfg, "trainer.num_nodes")
    if not sweeper.endswith(".BasicSweeper") and devices not in ((1, 1), ("1", 1)):
        raise UserError(
            f"hydra/sweeper={sweeper.rpartition('.')[2]} draws values, and each process of a run would draw others: "
            "use trainer.devices=1 trainer.num_nodes=1, or Hydra's own sweeper, which goes through lists"
        )


def _check_one_folder(cfg: DictConfig) -> None:
    """Complain of a run over several machines that know no common name for its folder.

    Raises:
        UserError: with what would give it one.
    """
    machines = OmegaConf.select(cfg, "trainer.num_nodes") or 1
    if machines == 1 or cfg.get("resume") or cfg.paths.output_dir != _run_dir(None):
        return
    if not run_stamp().startswith(("slurm-", "torchrun-")):
        raise UserError(
            f"trainer.num_nodes={machines}: each machine would make a run folder of its own; give the same "
            "paths.output_dir= on all of them (or, to torchrun, the same --rdzv-id)"
        )


def _settle_sweep_job(cfg: DictConfig) -> None:
    """Make a job of a sweep look like a run of its own, to itself and to the processes that it starts."""
    hydra_config: Any = HydraConfig.get()
    job_dir = hydra_config.runtime.output_dir
    cfg.paths.output_dir = job_dir
    with read_write(hydra_config), open_dict(hydra_config):
        hydra_config.run.dir = job_dir
    sys.argv[1:] = [*hydra_config.overrides.task, f"paths.output_dir='{job_dir}'"]
