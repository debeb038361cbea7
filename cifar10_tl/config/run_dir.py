"""Run folders, and the environment variables that describe the processes of a job."""

from __future__ import annotations

import itertools
import os
import platform
import re
import time
from pathlib import Path

from omegaconf import OmegaConf

from cifar10_tl.config.errors import OneProcessError, UserError

RUN_CONFIG = "config.yaml"
STAMP_VARIABLE = "CIFAR10_TL_RUN_STAMP"
SWEEP_VARIABLE = "CIFAR10_TL_SWEEP_DIR"
#: Files that only one command writes: its name, and what the folder is.
_OWNERS = {
    RUN_CONFIG: ("train", "a training run"),
    "study.journal": ("tune", "a search"),
    "predictions.png": ("predict", "predictions"),
    "results.json": ("evaluate", "an evaluation"),
}
_NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_CPUS_PER_TASK"),
)
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
_composed = itertools.count(1)


def check_launch_variables() -> None:
    """Raise :class:`UserError` if a variable of torchrun, SLURM or Lightning is malformed, missing or left over."""
    env = os.environ
    for name in _NUMBERS:
        if not re.fullmatch("0|[1-9][0-9]*", env.get(name, "0")):
            raise OneProcessError(f"{name}={env[name]} (environment variable): must be a whole number; unset {name}")
    if int(env.get("MASTER_PORT", 1)) not in range(1, 2**16):
        raise OneProcessError(f"MASTER_PORT={env['MASTER_PORT']} (environment variable): must be 1 to 65535")
    if "TORCHELASTIC_RUN_ID" in env:
        _check_job("torchrun", "TORCHELASTIC_RUN_ID", _TORCHRUN, "WORLD_SIZE")
    elif is_started_by_srun():
        _check_job("srun", "SLURM_NTASKS", _SLURM, "SLURM_NTASKS")
    else:
        names = ("RANK", "SLURM_PROCID")
        for name in names if env.get("MASTER_ADDR") else (*names, "LOCAL_RANK", "NODE_RANK"):
            if env.get(name, "0") != "0":
                raise OneProcessError(
                    f"{name}={env[name]} (environment variable): must be 0 or unset, because neither torchrun nor "
                    f"srun started this command; unset {name}"
                )


def _check_job(launcher: str, mark: str, names: tuple[str, ...], size: str) -> None:
    env = os.environ
    if missing := [name for name in names if not env.get(name)]:
        raise OneProcessError(
            f"{mark} (environment variable) is set, but {', '.join(missing)} is not: start the command with "
            f"{launcher}, or unset {mark}"
        )
    if int(env[names[0]]) >= int(env[size]):
        raise OneProcessError(f"{names[0]}={env[names[0]]} (environment variable): must be below {size}={env[size]}")


def is_started_by_srun() -> bool:
    """Return whether srun started this process, by the rule of Lightning's ``SLURMEnvironment``."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def process_rank() -> int:
    """Return 0 in the first process of a job and a positive number in all others."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env.get("RANK", 0))
    # Lightning starts the other processes of each node, and the user sets the node's number; in a shell of SLURM they
    # inherit SLURM_PROCID=0, and in a pod of Kubernetes RANK=0
    return int(env.get("LOCAL_RANK", 0)) or int(env.get("NODE_RANK", 0)) or int(env.get("SLURM_PROCID", 0))


def run_stamp() -> str:
    """Return the name of the run folder, which all processes of the job share.

    Child processes inherit it from the environment. The processes of torchrun and SLURM derive it from the job's ID.
    """
    return os.environ.setdefault(STAMP_VARIABLE, os.environ.get(STAMP_VARIABLE) or _new_stamp())


def _new_stamp() -> str:
    env = os.environ
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:  # started by srun, not in the batch script
        return f"slurm-{env.get('SLURM_JOB_ID', 0)}-{env.get('SLURM_STEP_ID', 0)}"
    started, process = time.time(), os.getpid()
    host = f"_{platform.node()}" if process < 100 else ""  # in a container: others use the same numbers
    if job := env.get("TORCHELASTIC_RUN_ID"):
        if job != "none":
            return f"torchrun-{re.sub(r'[^A-Za-z0-9_.-]', '_', job)}"
        process = os.getppid()
        if not Path("/proc").is_dir():  # macOS
            return f"torchrun-{env['MASTER_PORT']}-{process}"
        started = Path(f"/proc/{process}").stat().st_mtime
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.localtime(started))}_{process}{host}"


def check_owner(folder: Path, command: str) -> None:
    """Raise :class:`UserError` if ``folder`` holds the results of another command."""
    owner, content = next((owner for file, owner in _OWNERS.items() if (folder / file).is_file()), (command, ""))
    if owner != command:
        raise UserError(f"paths.output_dir={folder}: contains {content}; choose another folder")


def default_run_dir() -> str:
    """Return the run folder of a command without ``paths.output_dir``."""
    return f"outputs/runs/{run_stamp()}"


def _run_dir(resume: object, count: int = 1) -> str:
    return os.path.expanduser(str(resume)) if resume else default_run_dir() + (f"_{count}" if count > 1 else "")


def _sweep_dir(output_dir: object) -> str:
    folder = f"outputs/sweeps/{run_stamp()}" if output_dir == default_run_dir() else os.path.expanduser(str(output_dir))
    # another process of the job, or the one that started this job of the sweep, may have created the folder
    is_known = os.environ.get(SWEEP_VARIABLE) == folder or "TORCHELASTIC_RUN_ID" in os.environ or is_started_by_srun()
    if not is_known and (Path(folder) / "multirun.yaml").exists():
        raise UserError(f"paths.output_dir={folder}: this folder holds a sweep; choose another folder")
    os.environ[SWEEP_VARIABLE] = folder
    return folder


def _hydra_dir(output_dir: str) -> str:
    """Return the folder of Hydra's records. Those of an existing run are kept."""
    return f".hydra/{run_stamp()}" if (Path(output_dir) / RUN_CONFIG).is_file() else ".hydra"


def register_resolvers(command: bool = False) -> None:
    """Register the resolvers of ``conf/``. Outside a ``command``, each composed config gets its own run folder."""
    OmegaConf.register_new_resolver("sweep_dir", _sweep_dir, replace=True)
    OmegaConf.register_new_resolver("hydra_dir", _hydra_dir, replace=True)
    OmegaConf.register_new_resolver("expand_user", lambda p: p and os.path.expanduser(str(p)), replace=True)
    run_dir = _run_dir if command else lambda resume: _run_dir(resume, next(_composed))
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=not command)
