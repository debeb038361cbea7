"""Search for the settings with the highest val accuracy, one training run per trial.

python -m cifar10_tl.tune trials=50 paths.output_dir=outputs/search      the same command continues the search
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import config_dir_flags, run_command
from cifar10_tl.config.run_dir import check_owner
from cifar10_tl.engine.processes import SignalHandler, Stopped
from cifar10_tl.io import claim

log = logging.getLogger(__name__)


def tune(cfg: DictConfig) -> dict[str, Any]:
    """Search in the folder ``cfg.paths.output_dir`` and return the content of results.json."""
    run_dir = Path(cfg.paths.output_dir)
    check_owner(run_dir, "tune")
    if find_spec("optuna") is None:
        raise UserError("the search needs Optuna: run pip install 'cifar10_tl[tune]' first")
    from cifar10_tl.engine.search import Search
    from cifar10_tl.engine.search_report import summary, write_report

    with SignalHandler() as handler, claim(run_dir) as is_only_search:
        if not is_only_search:
            raise UserError(f"{run_dir}: another process is running in this folder; wait for it or stop it")
        try:
            search = Search(cfg, [*config_dir_flags(), *HydraConfig.get().overrides.task])
            search.run(cfg.trials, handler)
        except Stopped:
            log.info("stopped; the same command with paths.output_dir=%s continues the search", run_dir)
            raise
        results = write_report(run_dir, search.study, search.overrides)
        log.info("%s", summary(results, run_dir))
        return results


def main() -> None:
    """Run ``python -m cifar10_tl.tune``."""
    run_command("tune", tune)


if __name__ == "__main__":
    main()
