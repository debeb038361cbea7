"""Kill a small run at random moments, resume it, and compare it with an uninterrupted run.

The run (ResNet10, built-in images) is ended by SIGKILL, SIGTERM or SIGINT up to three times per round. Afterwards the
weights and the optimizer must be bit-identical, metrics.csv and results.json must hold the same numbers, and
TensorBoard must show the same points, each of them once. The exit status is 1 if a round differs.
"""

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar10_tl.callbacks.metrics_logger import SPEED
from cifar10_tl.io import read_csv

RUN = (
    *("experiment=quickstart", "model.backbone=resnet10", "model.head.hidden=[32]", "model.head.dropout=0.2"),
    *("data.train_size=700", "data.val_size=100", "data.test_size=100", "data.batch_size=50", "trainer.max_epochs=4"),
    *("trainer.devices=1", "trainer.deterministic=true", "ema_decay=0.9"),
    *("trainer.enable_progress_bar=false", "checkpoint_every_n_steps=3", "callbacks=minimal", "report=none"),
)
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def start(*overrides: str) -> subprocess.Popen[str]:
    """Start the train command on one thread."""
    command = (sys.executable, "-m", "cifar10_tl.train", *overrides)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(process: subprocess.Popen[str], *statuses: int) -> None:
    """Wait for the end of a process with exit status 0 or one of ``statuses``."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode in (0, *statuses), f"status {process.returncode}:\n{output[-3000:]}"


def interrupted_run(run: Path, settings: tuple[str, ...], seconds: float, rng: random.Random) -> list[str]:
    """Start, end and resume a run until it is finished, and return the interruptions."""
    interruptions: list[str] = []
    while True:
        resume = (run / "config.yaml").is_file()
        process = start(f"resume={run}") if resume else start(*settings, f"paths.output_dir={run}")
        number = rng.choice(list(STATUS))
        if len(interruptions) == 3 or (interruptions and rng.random() < 0.4):
            wait(process)
            return interruptions
        delay = rng.uniform(0.1, 1.0) * seconds
        time.sleep(delay)
        process.send_signal(number)
        # before the handler is installed and after the run, a signal has its default effect
        default = (-number, 1) if delay < 0.5 * seconds or (run / "results.json").exists() else ()
        wait(process, STATUS[number], *default)
        interruptions.append(f"{number.name} after {delay:.1f} s")


def outcome(run: Path) -> dict[str, Any]:
    """Return what must not depend on interruptions."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    tensors = {f"{i}.{key}": value for i, values in moments.items() for key, value in values.items()}
    tensors |= checkpoint["state_dict"]
    tensors |= {f"current.{key}": value for key, value in checkpoint.get("current_model_state", {}).items()}
    rows = [{key: value for key, value in row.items() if key not in SPEED} for row in read_csv(run / "metrics.csv")]
    results = json.loads((run / "results.json").read_text())
    events = EventAccumulator(str(run)).Reload()
    scalars = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "val/", "lr/"))]
    return {
        "weights or optimizer": {key: value.contiguous().numpy().tobytes() for key, value in tensors.items()},
        "metrics.csv": rows,
        "results.json": {key: results[key] for key in ("test", "val", "best_epoch", "epochs", "confusion_matrix")},
        "TensorBoard": {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in scalars},
    }


def main() -> int:
    """Run the rounds and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="seed of the interruptions (default: %(default)s)")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    arguments = parser.parse_args()
    rounds, settings = arguments.rounds, (*RUN, f"trainer.accelerator={arguments.accelerator}")
    rng, identical = random.Random(arguments.seed), 0  # noqa: S311
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports each restart
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        wait(start(*settings, f"paths.output_dir={folder}/reference"))
        seconds, reference = time.perf_counter() - clock, outcome(Path(folder) / "reference")
        print(f"uninterrupted run: {seconds:.1f} s", flush=True)
        for number in range(1, rounds + 1):
            interruptions = interrupted_run(run := Path(folder) / str(number), settings, seconds, rng)
            different = [name for name, value in outcome(run).items() if value != reference[name]]
            identical += not different
            verdict = f"DIFFERENT {', '.join(different)}" if different else "identical"
            print(f"round {number}: {', '.join(interruptions)}: {verdict}", flush=True)
    print(f"{identical} of {rounds} rounds identical")
    return 0 if identical == rounds else 1


if __name__ == "__main__":
    sys.exit(main())
