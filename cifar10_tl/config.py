"""From the command line to a checked configuration, and from a user's mistake to one clear line.

Every command is started by :func:`run_command`. It imports no torch, so that ``--help``, ``--cfg job`` and a mistake
in a setting answer at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from cifar10_tl.checks import check_config
from cifar10_tl.errors import UserError
from cifar10_tl.resume import RUN_CONFIG, resumed_config

log = logging.getLogger(__name__)

PACKAGE_DIR = Path(__file__).resolve().parent
#: In a wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(d for d in (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf") if (d / "train.yaml").is_file())
STAMP_VARIABLE = "CIFAR10_TL_RUN_STAMP"
LINES_VARIABLE = "CIFAR10_TL_ERROR_LINES"
#: What lies in the folder of a run that has not taken a step.
_BEGINNINGS = {RUN_CONFIG, "hparams.yaml", "events"}
_NO_MEMORY = "MemoryError|can't allocate memory|Storage size calculation overflowed|Overflow when unpacking"
#: Of Hydra's parser.
BARE_FLAGS = {"-m", "--multirun", "-r", "--run", "-h", "--help", "--hydra-help", "--version", "--resolve"}
BARE_FLAGS |= {"-sc", "--shell-completion"}
FLAGS_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name"}
FLAGS_WITH_VALUE |= {"-cd", "--config-dir", "--experimental-rerun"}

# --------------------------------------------------------------------------------------------------- the run folder


def process_rank() -> int:
    """0 in the first process of a job, and where there is but one; its rank, or another number above 0, elsewhere."""
    for key in ("RANK", "SLURM_PROCID"):
        if key in os.environ:
            return int(os.environ[key])
    # Lightning starts the others by itself on each machine, and the user says which machine it is
    return int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("NODE_RANK", 0))


def run_stamp() -> str:
    """A name for this run's folder, the same in every process of the job.

    The process that a person starts writes it into the environment, from where its children have it. Processes
    started side by side (``torchrun``, SLURM) take it from what they share: the job's id or the parent's start.
    """
    if STAMP_VARIABLE not in os.environ:
        os.environ[STAMP_VARIABLE] = _new_stamp(os.environ)
    return os.environ[STAMP_VARIABLE]


def _new_stamp(environment: os._Environ[str]) -> str:
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:  # not in a script's own shell
        return f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_STEP_ID', 0)}"
    if "TORCHELASTIC_RUN_ID" in environment:  # a worker of torchrun
        job = environment["TORCHELASTIC_RUN_ID"]
        if job != "none":
            return f"torchrun-{job}"
        parent = os.getppid()
        started = Path(f"/proc/{parent}").stat().st_mtime
        return f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.localtime(started))}_{parent}"
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"


def _run_dir(resume: object) -> str:
    return str(resume) if resume else f"outputs/runs/{run_stamp()}"


def _sweep_dir(output_dir: str) -> str:
    """A sweep's folder: the ``paths.output_dir`` that the user gave, else one among the sweeps."""
    given = output_dir != _run_dir(None)
    return output_dir if given else f"outputs/sweeps/{run_stamp()}"


def _hydra_dir(output_dir: str) -> str:
    """Hydra's own records: where a run lies already (it is resumed, or named by mistake), its records must stay."""
    return f".hydra/{run_stamp()}" if (Path(str(output_dir)) / RUN_CONFIG).is_file() else ".hydra"


def register_resolvers() -> None:
    """Make ``${run_dir:…}``, ``${sweep_dir:…}`` and ``${hydra_dir:…}`` known to OmegaConf; safe to call again."""
    for name, resolver in {"run_dir": _run_dir, "sweep_dir": _sweep_dir, "hydra_dir": _hydra_dir}.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


# ------------------------------------------------------------------------------------------------- starting a command


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


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(
        re.search(r"Connection (closed|reset) by peer|Broken pipe|TCPStore|NCCL|gloo", str(error))
    )


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


# ------------------------------------------------------------------------------------------ a mistake as one clear line


def explain(error: BaseException, config_name: str) -> str | None:
    """The line that tells a user of ``error``, or None where it is no mistake of theirs but a fault of ours."""
    if unknown := re.search(r"Could not override '([^']+)'\.\s+To append", str(error)):
        return _explain_unknown_key(unknown[1], config_name)
    if isinstance(error, OverrideParseException):
        return one_line(f"{error.override}: {error} (a value with signs of its own wants quotes: 'key=\"a=b\"')")
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, (UserError, OSError)):
        return explain(cause, config_name)  # raised while Hydra built an object
    if isinstance(error, HydraException) and cause is not None and str(cause) not in str(error):
        return one_line(f"{error} {cause}")
    if isinstance(error, ValueError) and "Config group override must be a string" in str(error):
        return "a group of settings wants a name, such as logger=none or callbacks=minimal; --help lists them"
    if isinstance(error, ValueError) and _raised_by("hydra", error):
        return one_line(str(error))
    if isinstance(error, OSError) and error.filename and _raised_by("hydra", error):
        return f"paths.output_dir={error.filename}: {error.strerror}; choose another folder"
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException, OSError)):
        return one_line(str(error))
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; not imported here, for its 5 seconds
        return one_line(str(error))
    if isinstance(error, (ValueError, RuntimeError)) and str(error).startswith("You set `"):  # of how it was started
        return one_line(
            f"trainer.devices, trainer.num_nodes: these are not the processes that torchrun or SLURM started. {error} "
            "Give trainer.devices=PROCESSES_A_MACHINE trainer.num_nodes=MACHINES"
        )
    if isinstance(error, (MemoryError, RuntimeError)) and re.search(_NO_MEMORY, f"{type(error).__name__} {error}"):
        return "more memory is asked for than this machine has; lower the sizes that were given"
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in str(error):
        return "data.batch_size gives a device one image, too few for BatchNorm: choose 2 or more for each device"
    if isinstance(error, (ValueError, TypeError)) and _raised_by("lightning", error):
        return one_line(f"trainer: {error} (HYDRA_FULL_ERROR=1 shows where)")
    if _is_lost(error):
        return (
            "another process of this run has ended, or cannot be reached any more (it may have said why above); "
            "go on with resume= and this run's folder"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return "out of device memory; lower data.batch_size or model.image_size, or set trainer.precision=bf16-mixed"
    return None


def _raised_by(library: str, error: BaseException) -> bool:
    """Whether a library itself found the fault: some complaints of Hydra and Lightning are plain ValueErrors."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1] in ("os", "pathlib"):  # called by Hydra
        modules.pop()
    return bool(modules) and modules[-1].startswith(f"{library}.")


def one_line(text: str) -> str:
    """``text`` with every run of white space made one blank, and without Hydra's list of its search path."""
    return " ".join(text.split("Config search path:")[0].split())


def _explain_unknown_key(key: str, config_name: str) -> str:
    known = config_keys(config_name)
    section, _, name = key.rpartition(".")
    if key in known:
        return f"{key}: no such setting goes with the groups that were chosen (data=, model/head=, scheduler= ...)"
    beside = {k[len(section) + 1 if section else 0 :].split(".")[0]: None for k in known if k.startswith(section)}
    close = difflib.get_close_matches(name, beside, n=1)
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    if close:
        advice = f"did you mean {section}.{close[0]}?".replace(" .", " ")
    elif elsewhere:
        advice = f"did you mean {' or '.join(elsewhere)}?"
    else:
        advice = f"there are {', '.join(beside)};" if section and beside else ""
    return one_line(f"{key}: there is no such setting; {advice} --cfg job shows them all")


def config_keys(config_name: str) -> list[str]:
    """Every key of a command's default config, dotted, such as ``trainer.max_epochs``."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(config_name)
    return list(_leaves(OmegaConf.to_container(cfg)))


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix] if prefix else []
    return [leaf for key, child in node.items() for leaf in _leaves(child, f"{prefix}.{key}" if prefix else str(key))]
