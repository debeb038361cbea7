from __future__ import annotations

import ast
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

SCRIPT = """
import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.models.lit_classifier import LitClassifier

data = CIFAR10DataModule(source="shapes", batch_size=32, train_size=128, val_size=32, test_size=32)
model = LitClassifier(data.class_names, backbone="resnet18", image_size=32)
stop = EarlyStopping(monitor="val/acc", mode="max")
trainer = pl.Trainer(max_epochs=1, logger=CSVLogger("outputs"), callbacks=[stop])
trainer.fit(model, data)
print(trainer.test(model, data))
"""


@pytest.mark.slow
def test_plain_lightning_script_logs_each_metric_once_per_epoch(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert 0 <= results["test/acc"] <= 1
    assert math.isfinite(results["test/loss"])

    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    for stage in ("train", "val", "test"):
        for name in ("loss", "acc"):
            points = [(row["step"], float(row[f"{stage}/{name}"])) for row in rows if row[f"{stage}/{name}"]]
            assert [step for step, _ in points] == ["0"], f"{stage}/{name}"
    assert float(rows[-1]["test/acc"]) == pytest.approx(results["test/acc"])
