"""Start of every command: from the command line to a checked config, without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar10_tl.config import CONFIG_DIR, run_dir
from cifar10_tl.config.errors import UserError, explain, is_connection_loss
from cifar10_tl.config.resume import quoted, resumed_config
from cifar10_tl.config.validation import check_config

LINES_VARIABLE = "CIFAR10_TL_ERROR_LINES"
#: Files in the folder of a run that has not taken a step.
_FIRST_FILES = {run_dir.RUN_CONFIG, "hparams.yaml", "events"}
_FLAGS = {"-m", "--multirun", "-r", "--run", "-h", "--help", "--hydra-help", "--version", "--resolve"}
_FLAGS |= {"-sc", "--shell-completion"}
_FLAGS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name"}
_FLAGS_WITH_VALUE |= {"-cd", "--config-dir", "--experimental-rerun"}
_HYDRA_DIRS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")


def run_command(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``conf/<name>.yaml`` with the command line, check it and call ``task`` with it.

    A user error ends the process with one ``error:`` line on stderr and status 2. ``HYDRA_FULL_ERROR=1`` shows the
    traceback instead.
    """
    is_child = LINES_VARIABLE in os.environ and "LOCAL_RANK" in os.environ
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1" and not is_child
    if not show_traceback:
        os.environ[LINES_VARIABLE] = "1"  # tells child processes that HYDRA_FULL_ERROR was not set by the user
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting with status 1

    def report(error: Exception) -> NoReturn:
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `| head`, ended
            os._exit(1)
        line = None if show_traceback else explain(error, name)
        if line is None:
            raise error
        if should_print(error):
            rank = _number("RANK", "SLURM_PROCID")
            print(f"error: {f'process {rank} on {platform.node()}: ' if rank else ''}{line}", file=sys.stderr)
        sys.exit(2)

    try:
        _check_arguments(sys.argv[1:], is_child)
        run_dir.check_launch_variables()
        run_dir.register_resolvers(command=True)
        sys.argv[1:] = _prepared(sys.argv[1:])
        if run_dir.process_rank() > 0:  # only the first process writes the records of the run
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(_job(task, report))()
    except Exception as error:
        report(error)
    except KeyboardInterrupt:  # before the run handles signals
        sys.exit(128 + signal.SIGINT)


def _prepared(arguments: list[str]) -> list[str]:
    """Return the arguments as Hydra parses them: flags first, and a value such as ``~/data`` expanded and quoted."""
    expanded = [
        f"{key}={quoted(os.path.expanduser(value))}" if value.startswith("~") and "," not in value else argument
        for argument in arguments
        for key, _, value in [argument.partition("=")]
    ]
    return sorted(expanded, key=lambda argument: argument not in _FLAGS)


def _number(*variables: str) -> int:
    """Return the first of the environment variables that is set, or 0."""
    text = next((os.environ[name] for name in variables if name in os.environ), "0")
    return int(text) if text.isdecimal() else 0


def should_print(error: Exception) -> bool:
    """Return whether this process should print ``error``.

    The first process of each node prints. A process prints its own lack of memory, and the second one also prints a
    lost connection because the first process may be gone.
    """
    rank = _number("LOCAL_RANK", "SLURM_LOCALID")
    invalid = isinstance(error, UserError) and "(environment variable)" in str(error)
    lost = rank == 1 and is_connection_loss(error)
    return rank == 0 or invalid or lost or type(error).__name__ == "OutOfMemoryError"


def _check_arguments(arguments: list[str], is_child: bool) -> None:
    for argument in arguments:
        key = argument.lstrip("+").split("=")[0]
        if argument.startswith("-") and key not in _FLAGS | _FLAGS_WITH_VALUE:
            raise UserError(f"{argument}: no such flag; write settings as key=value, such as seed=1 (see --help)")
        if key in _HYDRA_DIRS and not is_child:
            raise UserError(f"{argument}: set paths.output_dir instead, which is the run folder (or the sweep folder)")


def _job(task: Callable[[DictConfig], Any], report: Callable[[Exception], NoReturn]) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls. It reports errors itself because Hydra would print lines of its own."""

    def job(cfg: DictConfig) -> Any:
        folder = Path(HydraConfig.get().runtime.output_dir)
        records = {".hydra", f"{HydraConfig.get().job.config_name}.log"}
        is_new = _holds_only(folder, records)
        try:
            if HydraConfig.get().job.chdir:
                raise UserError("hydra.job.chdir=true: not supported; paths are relative to the current folder")
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _prepare_sweep_job(cfg)
            if cfg.get("resume"):
                cfg = resumed_config(cfg, HydraConfig.get().overrides.task)
            check_config(cfg)
            check_nodes(cfg)
            return task(cfg)
        except (Exception, SystemExit) as error:
            if is_new and run_dir.process_rank() == 0 and _holds_only(folder, records | _FIRST_FILES):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, SystemExit):  # by a signal
                raise
            report(error)

    return job


def _holds_only(folder: Path, names: set[str]) -> bool:
    """Return whether ``folder`` holds nothing but ``names``, where "events" stands for TensorBoard's files."""
    return {"events" if path.name.startswith("events.out") else path.name for path in folder.glob("*")} <= names


def check_nodes(cfg: DictConfig) -> None:
    """Raise :class:`UserError` if the number of nodes does not fit the environment or the run folder."""
    nodes = OmegaConf.select(cfg, "trainer.num_nodes") or 1
    if run_dir.run_stamp().startswith(("slurm-", "torchrun-")):
        return
    if nodes == 1 and _number("NODE_RANK") > 0:
        raise UserError("NODE_RANK (environment variable): needs trainer.num_nodes above 1; unset NODE_RANK")
    default = cfg.paths.output_dir.startswith(run_dir.default_run_dir())
    if nodes > 1 and default and not cfg.get("resume"):
        raise UserError(
            f"trainer.num_nodes={nodes}: each node would create a different run folder; set the same "
            "paths.output_dir= on all nodes (or give torchrun the same --rdzv-id)"
        )


def _prepare_sweep_job(cfg: DictConfig) -> None:
    """Give a job of a sweep, and the processes that it starts, the settings of a single run."""
    hydra_config: Any = HydraConfig.get()
    job_dir = hydra_config.runtime.output_dir
    cfg.paths.output_dir = job_dir
    with read_write(hydra_config), open_dict(hydra_config):
        hydra_config.run.dir = job_dir
    sys.argv[1:] = [*hydra_config.overrides.task, f"paths.output_dir={quoted(job_dir)}"]
