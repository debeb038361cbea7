"""Kill a run at random moments, resume it, and see whether it ends as the run that nobody killed.

python scripts/soak.py [--rounds 25] [--seed 0]

Each round starts the same small run (built-in images, ResNet18, trainer.deterministic=true, a checkpoint every 3
steps), ends it at a random moment by SIGKILL, SIGTERM or SIGINT, resumes it, perhaps ends it again, and lets it finish.
Then weights and optimizer must be the same bit by bit, metrics.csv and results.json the same numbers, and TensorBoard
must show each epoch once. The exit status is 1 if any round differs.
"""

from __future__ import annotations

import argparse
import csv
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

RUN = (
    "experiment=quickstart",
    "model.backbone=resnet18",
    "model.head.hidden=[32]",
    "model.head.dropout=0.2",
    "data.train_size=700",
    "data.val_size=100",
    "data.test_size=100",
    "data.batch_size=50",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.deterministic=true",
    "trainer.enable_progress_bar=false",
    "checkpoint_every_n_steps=3",
    "ema_decay=0.9",
    *(f"callbacks.{name}=null" for name in ("confusion_matrix", "correct_predictions", "incorrect_predictions")),
)
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def start(*overrides: str) -> subprocess.Popen[str]:
    """The train command, under way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "cifar10_tl.train", *overrides)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], *, good: tuple[int, ...] = (0,)) -> None:
    """Wait for its end.

    Raises:
        RuntimeError: its status is not among the ``good`` ones.
    """
    output, _ = process.communicate(timeout=600)
    if process.returncode not in good:
        raise RuntimeError(f"status {process.returncode}:\n{output[-3000:]}")


def one_round(run: Path, seconds: float, dice: random.Random) -> tuple[str, int]:
    """Start, end, resume until the run is done: what happened, and how often it was ended."""
    story, kills = [], 0
    while True:
        resume = (run / "config.yaml").is_file()
        process = start(f"resume={run}") if resume else start(*RUN, f"paths.output_dir={run}")
        how = dice.choice(list(STATUS)) if kills < 3 else None
        if how is None or (kills and dice.random() < 0.4):
            finish(process)
            return ", ".join(story), kills
        delay = dice.uniform(0.1, 1.0) * seconds
        time.sleep(delay)
        process.send_signal(how)
        # before Python has come to our code, and behind it, a signal does what it always does
        plain = {-how, 1} if delay < 0.5 * seconds or (run / "results.json").exists() else set()
        finish(process, good=(0, STATUS[how], *plain))
        story.append(f"{how.name} after {delay:.1f} s")
        kills += 1


def differences(run: Path, reference: Path) -> list[str]:
    """What is not as in the reference, in words."""
    found = []
    if state(run) != state(reference):
        found.append("weights or optimizer")
    if rows(run) != rows(reference):
        found.append("metrics.csv")
    if results(run) != results(reference):
        found.append("results.json")
    if curve(run) != curve(reference):
        found.append("TensorBoard")
    return found


def state(run: Path) -> list[tuple[str, bytes]]:
    """Every tensor of the last checkpoint's weights, their average and the optimizer, as bytes."""
    import torch

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    tensors = {f"{i}.{k}": v for i, values in moments.items() for k, v in values.items()} | checkpoint["state_dict"]
    tensors |= {f"learning.{k}": v for k, v in checkpoint.get("current_model_state", {}).items()}
    return [(name, t.contiguous().numpy().tobytes()) for name, t in tensors.items()]


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv but for what tells of speed."""
    from cifar10_tl.callbacks.metrics_logger import SPEED

    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(file)]


def results(run: Path) -> dict[str, Any]:
    """The numbers of results.json that are not times."""
    content = json.loads((run / "results.json").read_text())
    return {key: content[key] for key in ("test", "val", "best_epoch", "epochs", "confusion_matrix")}


def curve(run: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the training loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it tells of each restart
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def main() -> int:
    """Run the rounds; exit status 1 if one of them ended otherwise than the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)  # noqa: S311
    survived = total = 0
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        clock = time.perf_counter()
        finish(start(*RUN, f"paths.output_dir={reference}"))
        seconds = time.perf_counter() - clock
        print(f"the run that nobody ends takes {seconds:.1f} s", flush=True)
        for number in range(1, arguments.rounds + 1):
            run = Path(folder) / str(number)
            try:
                story, kills = one_round(run, seconds, dice)
                faults = differences(run, reference)
            except RuntimeError as error:
                story, kills, faults = "", 0, [str(error)]
            survived += not faults
            total += kills
            print(f"round {number}: {story}: {'DIFFERS in ' + ', '.join(faults) if faults else 'the same'}", flush=True)
    print(f"{survived} of {arguments.rounds} rounds survived, {total} ends in all")
    return 0 if survived == arguments.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
