from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers import REPOSITORY, TINY, compose_train, rows

from cifar10_tl.train import train

EXPERIMENTS = sorted(file.stem for file in (REPOSITORY / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_says_what_it_costs_and_where_its_results_are(name: str) -> None:
    header = (REPOSITORY / "conf" / "experiment" / f"{name}.yaml").read_text().split("\n")
    comment = " ".join(line for line in header if line.startswith("# "))
    assert "Cost on two cores" in comment
    assert "one H100" in comment
    assert "docs/results.md" in comment


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_trains_a_step_of_each_image_size(name: str, tmp_path: Path) -> None:
    """Built-in images, random weights and a small network instead of those of the recipe."""
    size = compose_train(f"experiment={name}").model.image_size
    starts = [] if isinstance(size, int) else [start for start, _ in size]
    small = [[start, 33 + 8 * i] for i, start in enumerate(starts)] or 33
    cfg = compose_train(
        *(f"experiment={name}", "data=shapes", *TINY, "model.backbone=resnet10", "model.weights=null", "logger=none"),
        *(f"model.image_size={small}", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"),
        *("trainer.max_epochs=4", "trainer.limit_train_batches=1", "trainer.enable_progress_bar=false"),
        *("trainer.check_val_every_n_epoch=4", "callbacks.last_checkpoint.every_n_epochs=4", "report=none"),
        *("callbacks=minimal", f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"),
    )
    results = train(cfg)
    assert results is not None
    assert results["test"]["count"] == 32
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(math.isfinite(float(row["train/loss"])) for row in rows(tmp_path / "run"))
