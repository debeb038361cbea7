"""From the command line to a checked configuration, and from a user's mistake to one clear line.

Every command is started by :func:`run_command`. It imports no torch, so that ``--help``, ``--cfg job`` and a mistake
in a setting answer at once.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from omegaconf import OmegaConf

PACKAGE_DIR = Path(__file__).resolve().parents[1]


#: In a wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(d for d in (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf") if (d / "train.yaml").is_file())


STAMP_VARIABLE = "CIFAR10_TL_RUN_STAMP"


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


RUN_CONFIG = "config.yaml"
