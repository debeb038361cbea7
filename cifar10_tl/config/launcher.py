"""Start of every command: from the command line to a checked config, without importing torch."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar10_tl.config import CONFIG_DIR, run_dir
from cifar10_tl.config.errors import OneProcessError, UserError, explain, is_connection_loss, is_of_one_process
from cifar10_tl.config.resume import quoted, resumed_config
from cifar10_tl.config.validation import check_config
from cifar10_tl.io import claim

log = logging.getLogger(__name__)

#: Files in the folder of a run that has not taken a step.
_FIRST_FILES = (run_dir.RUN_CONFIG, "hparams.yaml", "events.out.*")
_FLAGS = {"-m", "--multirun", "-h", "--help", "--hydra-help", "--version", "--resolve", "-sc", "--shell-completion"}
_FLAGS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cn", "--config-name", "-cd", "--config-dir"}
_FIXED = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.chdir")


def run_command(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``conf/<name>.yaml`` with the command line, check it and call ``task`` with it.

    A user error ends the process with one ``error:`` line on stderr and status 2; a sweep whose jobs are single
    processes first runs the others. ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting with status 1
    os.environ["MPLBACKEND"] = "agg"  # that of Jupyter may not be installed in this environment
    logging.raiseExceptions = False  # no traceback for each message after the reader of our output ended
    reported: set[str] = set()

    def report(error: Exception) -> None:
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `| head`, ended
            os._exit(1)
        line = None if full_error == "1" else explain(error, name)
        if line is None:
            raise error
        if should_print(error) and line not in reported:
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            origin = "" if rank == "0" else f"process {rank} on {platform.node()}: "
            print(f"error: {origin}{line}", file=sys.stderr)
        reported.add(line)

    def job(cfg: DictConfig) -> Any:  # reports errors itself because Hydra would print lines of its own
        folder, records = Path(HydraConfig.get().runtime.output_dir), (".hydra", f"{name}.log")
        is_new = _holds_only(folder, records)
        os.environ["HYDRA_FULL_ERROR"] = full_error  # for processes that the task starts
        try:
            cfg = _checked(cfg)
            if run_dir.process_rank() == 0 and not OmegaConf.select(cfg, "trainer.fast_dev_run"):
                log.info("run folder %s", cfg.paths.output_dir)  # before libraries are imported, which takes seconds
            import_modules(cfg.get("imports") or [])
            return task(cfg)
        except (Exception, SystemExit) as error:
            if is_new and run_dir.process_rank() == 0:
                with claim(folder) as is_own:  # it may be that of a run that has just started
                    if is_own and _holds_only(folder, (*records, *_FIRST_FILES)):
                        shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, SystemExit):  # by a signal
                raise
            report(error)
            if _has_other_processes():
                sys.exit(2)  # in the next job of a sweep, they would be those of this one
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    try:
        if {"-h", "--help"} & {*sys.argv[1:]}:
            print(help_text(name), end="")
            return
        run_dir.check_launch_variables()
        run_dir.register_resolvers(command=True)
        sys.argv[1:] = _prepared(sys.argv[1:], name)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)(job)()
    except Exception as error:
        report(error)
    except KeyboardInterrupt:  # before the run handles signals
        sys.exit(128 + signal.SIGINT)
    if reported:
        sys.exit(2)


def compose_command(command: str, *overrides: str) -> DictConfig:
    """Return the checked config of a command with these overrides, to call its function from Python."""
    run_dir.register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(command, list(overrides))
    check_config(cfg)
    return cfg


def help_text(name: str) -> str:
    """Return the help of a command, which Hydra would print too, but after 0.2 s."""
    text: str = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())["hydra"]["help"]["template"]
    return text


def should_print(error: Exception) -> bool:
    """Return whether this process should print ``error``.

    The first process of each node prints, and the second one a lost connection, because the first may have died. Any
    process prints an error that others may not have, such as about its memory.
    """
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return local == "0" or (local == "1" and is_connection_loss(error)) or is_of_one_process(error)


def _has_other_processes() -> bool:
    is_connected = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    return is_connected or "TORCHELASTIC_RUN_ID" in os.environ or run_dir.is_started_by_srun()


def _prepared(arguments: list[str], name: str = "train") -> list[str]:
    """Return the arguments as Hydra parses them: flags first, and a value such as ``~/data`` expanded and quoted."""
    is_first = run_dir.process_rank() == 0
    prepared: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if prepared and prepared[-1] in _FLAGS_WITH_VALUE and not argument.startswith("-"):
            prepared[-1] += f"={argument}"
            continue
        if argument.startswith("-") and key not in _FLAGS | _FLAGS_WITH_VALUE:
            raise UserError(f"{argument}: no such flag; write settings as key=value, such as seed=1 (see --help)")
        if is_first and key.lstrip("+") in _FIXED:  # Lightning gives them to the processes that it starts
            raise UserError(f"{argument}: set paths.output_dir instead, which is the run folder (or the sweep folder)")
        if key == "hydra/sweeper" and value != "basic":
            raise UserError(f"{argument}: not supported; search with python -m cifar10_tl.tune (see docs/search.md)")
        if name == "tune" and key in ("-m", "--multirun"):
            raise UserError(f"{argument}: a search is one run; use {{choices: [a, b]}} instead of a sweep")
        if key == "resume" and {"-m", "--multirun"} & {*arguments}:
            raise UserError(f"{argument}: a command resumes one run; leave -m out")
        if name == "tune" and key == "resume":
            raise UserError(f"{argument}: a search is continued by its own command; leave resume out")
        if key in ("data.labels", "data.cache_dir") and any(a.startswith("resume=") for a in arguments):
            key = f"++{key}"  # of data=folder, which only the config of the run has
            argument = f"{key}={value}"
        if value.startswith("~") and "," not in value:
            argument = f"{key}={quoted(os.path.expanduser(value))}"
        prepared.append(argument)
    if not is_first:  # only the first process writes the records of the run
        prepared += ["hydra.output_subdir=null", "hydra/job_logging=none"]
    return sorted(prepared, key=lambda argument: not argument.startswith("-"))


def _holds_only(folder: Path, patterns: tuple[str, ...]) -> bool:
    return all(any(map(path.match, patterns)) for path in folder.glob("*"))


def _checked(cfg: DictConfig) -> DictConfig:
    """Return the checked config of a job: that of a single run, of a job of a sweep, or of a resumed run."""
    hydra_config: Any = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:  # the job and its child processes take the settings of a single run
        cfg.paths.output_dir = hydra_config.runtime.output_dir
        with read_write(hydra_config), open_dict(hydra_config):
            hydra_config.run.dir = cfg.paths.output_dir
        given = [*config_dir_flags(), *hydra_config.overrides.task]
        sys.argv[1:] = [*given, f"paths.output_dir={quoted(cfg.paths.output_dir)}"]
    if cfg.get("resume"):
        cfg = resumed_config(cfg, hydra_config.overrides.task)
    check_config(cfg)
    check_nodes(cfg)
    return cfg


def config_dir_flags() -> list[str]:
    """Return the ``--config-dir`` flag of this command to pass to the processes that it starts."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


def import_modules(names: str | Sequence[str]) -> None:
    """Import modules that add heads and datasets to the registries of this package."""
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"imports={name}: {error} in the current folder or on PYTHONPATH") from error
        except Exception as error:  # of the module itself
            where = "(HYDRA_FULL_ERROR=1 shows where)"
            raise UserError(f"imports={name}: {type(error).__name__}: {error} {where}") from error


def check_nodes(cfg: DictConfig) -> None:
    """Raise :class:`UserError` if the number of nodes does not fit the environment or the run folder."""
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if run_dir.run_stamp().startswith(("slurm-", "torchrun-")):
        return
    if nodes == 1 and int(os.environ.get("NODE_RANK", 0)) > 0:
        raise OneProcessError("NODE_RANK (environment variable): needs trainer.num_nodes above 1; unset NODE_RANK")
    default = cfg.paths.output_dir.startswith(run_dir.default_run_dir())
    if nodes > 1 and default and not cfg.get("resume"):
        raise UserError(
            f"trainer.num_nodes={nodes}: each node would create a different run folder; set the same "
            "paths.output_dir= on all nodes (or give torchrun the same --rdzv-id)"
        )
