"""Check and measure a GPU with the public commands, in calls of some minutes that continue where the last one stopped.

python scripts/gpu_suite.py --out DIR [--data-root FOLDER] [--minutes 9]    repeat this until it prints "complete"
python scripts/gpu_suite.py --out DIR --steps losses speed                  only some steps; failed ones are repeated
python scripts/gpu_suite.py --out DIR --cpu-check                           tiny steps on a CPU, to test this script

losses: five steps on the GPU against a CPU, compiled against eager, DDP on one GPU against none. resume: killed runs
against an uninterrupted one, bit for bit. speed: each recipe with random weights. scratch: experiment=scratch on
--data-root (train/<class>/*, test/<class>/*), and the time to 94, 95 and 96%. benchmark: scripts/benchmark.py --gpu.
Results are kept in DIR/state.json, and written as tables to DIR/gpu.md.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from benchmark_rows import GPU_ROWS
from omegaconf import OmegaConf

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.config.launcher import compose_command
from cifar10_tl.engine.results import environment, markdown_table, read_results
from cifar10_tl.io import atomic_write_text, read_csv
from cifar10_tl.metrics.intervals import wilson_interval

Result = dict[str, Any]
SCRIPTS = Path(__file__).resolve().parent
NOT_FOR_A_GPU = {"cpu", "photos_probe", "probe", "quickstart"}
EXPERIMENTS = {file.stem for file in (CONFIG_DIR / "experiment").iterdir()} - NOT_FOR_A_GPU
#: The overrides of each recipe for a GPU.
RECIPES: dict[str, list[str]] = {"default": [], **{name: [f"experiment={name}"] for name in sorted(EXPERIMENTS)}}
#: One step in each of five epochs, so that metrics.csv has the loss of each step. Dropout masks depend on the device.
#: At the recipe's learning rate, rounding alone changes the fifth loss by 1%.
FIVE_STEPS = (
    *("experiment=quickstart", "model.backbone=resnet18", "model.head.dropout=0", "test=false"),
    *("optimizer=sgd", "optimizer.lr=0.001"),
    *("trainer.precision=32-true", "trainer.deterministic=true", "trainer.limit_train_batches=1"),
    *("trainer.max_epochs=5", "data.train_size=1000", "data.val_size=128", "data.test_size=10"),
)
#: Overrides of a run, the run that it is compared with, and the largest relative difference of a loss.
COMPARED = {
    "gpu": (("compile=false",), "cpu", 2e-3),
    "compiled": (("compile=true",), "gpu", 2e-3),
    "ddp": (("compile=false", "trainer.strategy=ddp"), "gpu", 1e-5),
    "cpu": (("compile=false", "trainer.accelerator=cpu"), "cpu", 0.0),
}
QUIET = ("callbacks=minimal", "report=none", "trainer.enable_progress_bar=false", "trainer.devices=1")
TINY = ("model.backbone=resnet10", "data.batch_size=16", "trainer.max_epochs=1", "trainer.precision=32-true")


class Suite:
    """The steps and their results; a step raises ``TimeoutExpired`` if another call has to continue it."""

    def __init__(self, out: Path, minutes: float, data_root: Path | None, on_cpu: bool) -> None:
        self.out, self.deadline, self.data_root, self.on_cpu = out, time.monotonic() + 60 * minutes, data_root, on_cpu
        self.accelerator, self.tiny, file = *(("cpu", TINY) if on_cpu else ("gpu", ())), out / "state.json"
        new = {"environment": environment(torch.device("cpu" if on_cpu else "cuda"), 1, "auto"), "steps": {}}
        self.state: Result = json.loads(file.read_text()) if file.is_file() else new
        if self.state["environment"] != new["environment"]:
            sys.exit(f"error: {out} has results of another commit or machine; choose another --out")

    def python(self, *command: str) -> str:
        """Return the output of a Python process, and stop it gracefully at the deadline."""
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options["env"] = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}  # only matters in fp32
        process = subprocess.Popen([sys.executable, *command], start_new_session=True, **options)
        try:
            output, _ = process.communicate(timeout=max(0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # the train command saves a checkpoint
            process.communicate()
            raise
        if process.returncode:
            raise RuntimeError(output[-2000:])
        return output

    def train(self, name: str, *overrides: str) -> tuple[Path, list[dict[str, str]]]:
        """Return the folder of a finished run and its metrics.csv; resume a run of an earlier call."""
        run = self.out / "runs" / name.replace(" ", "_")
        given = (*QUIET, f"trainer.accelerator={self.accelerator}", *overrides, f"paths.output_dir={run}")
        if not read_results(run):
            self.python("-m", "cifar10_tl.train", *([f"resume={run}"] if (run / "config.yaml").is_file() else given))
        return run, read_csv(run / "metrics.csv")

    def losses(self, name: str) -> Result:
        """Compare the losses of five steps with those of another run."""
        overrides, reference, tolerance = COMPARED[name]
        ours, theirs = (
            [float(row["train/loss"]) for row in self.train(f"losses {n}", *FIVE_STEPS, *more)[1]]
            for n, more in ((name, overrides), (reference, COMPARED[reference][0]))
        )
        difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        if difference > tolerance:
            raise RuntimeError(f"the losses differ by {difference:.2g} > {tolerance:g}: {ours} and {theirs}")
        return {"compared with": reference, "largest relative difference": difference, "tolerance": tolerance}

    def resume(self, seed: int) -> Result:
        """Kill a deterministic run at random moments and compare it with an uninterrupted one."""
        chosen = ("--rounds", "1", "--seed", str(seed), "--accelerator", self.accelerator)
        output = self.python(f"{SCRIPTS}/soak.py", *chosen)
        return {"result": output.splitlines()[-1]}  # a round that differs is an error

    def speed(self, recipe: str, sizes: list[Any], number: int, batch: int) -> Result:
        """Measure the last epoch of an image size, in a short run of the recipe with all of its sizes."""
        images, epochs = (2 if self.on_cpu else 40) * batch, 8 if len(sizes) > 1 else 2
        given = ("data=shapes", f"data.train_size={images + 100}", "data.val_size=100", "data.test_size=10")
        given += ("model.weights=null", "test=false", *self.tiny, f"trainer.max_epochs={epochs}")
        run = self.out / "runs" / f"speed_{recipe}"
        if not read_results(run):  # resumed, the run of an earlier call would measure another epoch
            shutil.rmtree(run, ignore_errors=True)
        rows = self.train(run.name, *RECIPES[recipe], *given)[1]
        ends = [round(start * epochs) for start, _ in sizes[1:]] + [epochs]
        row = rows[ends[number] - 1]
        speed = float(row["images_per_second"])
        found = {"batch": batch, "images/s": speed, "ms/step": row["step_ms"], "peak GB": row["peak_memory_gb"]}
        return {**found, "waiting for data": row["data_wait"], "45,000 images (s)": 45_000 / speed}

    def scratch(self) -> Result:
        """Train without weights; report the time of the training steps until val reached an accuracy."""
        data = ("data=folder", f"data.root={self.data_root}", f"paths.cache_dir={self.out / 'cache'}")
        run, rows = self.train("scratch", "experiment=scratch", *data, *self.tiny)
        test, clock = read_results(run)["test"], list(accumulate(float(row["seconds"]) for row in rows))
        low, high = wilson_interval(round(test["acc"] * test["count"]), test["count"])
        reached: dict[float, Any] = dict.fromkeys((0.94, 0.95, 0.96), "not reached")
        for seconds, row in zip(reversed(clock), reversed(rows), strict=True):
            reached |= {goal: seconds for goal in reached if float(row["val/acc"]) >= goal}
        times = {f"{goal:.0%} val (s)": seconds for goal, seconds in reached.items()}
        return {"test acc": test["acc"], "95% low": low, "95% high": high, "training (s)": clock[-1], **times}

    def benchmark(self, row: str) -> Result:
        """Measure a row of scripts/benchmark.py."""
        file, quick = self.out / f"{row}.json", ("--quick",) if self.on_cpu else ()
        self.python(f"{SCRIPTS}/benchmark.py", "--only", row, "--json", str(file), *quick)
        return dict(json.loads(file.read_text())[row])

    def steps(self) -> dict[str, Callable[[], Result]]:
        """Return all steps in their order; the first word of the name is the group."""
        compared = [name for name in COMPARED if name != "cpu" and not (name == "compiled" and self.on_cpu)]
        steps: dict[str, Any] = {f"losses {name}": partial(self.losses, name) for name in compared}
        steps |= {f"resume {seed}": partial(self.resume, seed) for seed in range(1 if self.on_cpu else 3)}
        for recipe in ("scratch",) if self.on_cpu else RECIPES:
            cfg: Any = OmegaConf.to_container(compose_command("train", *RECIPES[recipe], *self.tiny))
            size, batch = cfg["model"]["image_size"], cfg["data"]["batch_size"]
            sizes = size if isinstance(size, list) else [[0, size]]
            for number, (_, pixels) in enumerate(sizes):
                steps[f"speed {recipe} {pixels}"] = partial(self.speed, recipe, sizes, number, batch)
        steps |= {"scratch": self.scratch} if self.data_root else {}
        return steps | {f"benchmark {r}": partial(self.benchmark, r) for r in (["help"] if self.on_cpu else GPU_ROWS)}

    def run(self, chosen: Sequence[str]) -> None:
        """Run the chosen steps (none: all) that are not finished; failed ones are repeated only if they are chosen."""
        for name, step in self.steps().items():
            is_chosen, known = bool({name, name.split()[0]} & set(chosen)), self.state["steps"].get(name)
            if (chosen and not is_chosen) or (known and not (is_chosen and "failed" in known)):
                continue
            print(f"{name} ...", flush=True)
            try:
                self.state["steps"][name] = step()
            except RuntimeError as error:
                self.state["steps"][name] = {"failed": str(error)}
            print(f"    {self.state['steps'][name]}", flush=True)
            atomic_write_text(self.out / "state.json", json.dumps(self.state, indent=1) + "\n")
            atomic_write_text(self.out / "gpu.md", tables(self.state))


def tables(state: Result) -> str:
    """Return a page with a table for each group of steps."""
    where = state["environment"]
    parts = [f"# {where['device']}\n\ntorch {where['versions']['torch']}, commit {where['git']}\n"]
    for group, names in groupby(state["steps"], lambda name: name.split()[0]):
        results = {name: state["steps"][name] for name in names}
        columns = list(dict.fromkeys(key for result in results.values() for key in result))
        cells = ([result.get(key, "") for key in columns] for result in results.values())
        texts = ([f"{v:.4g}" if isinstance(v, float) else " ".join(str(v).split()) for v in row] for row in cells)
        rows = [[name, *row] for name, row in zip(results, texts, strict=True)]
        parts.append(f"## {group}\n\n{markdown_table(['step', *columns], rows)}")
    return "\n".join(parts)


def main() -> int:
    """Return 0 if all chosen steps are complete, 1 if one has failed, and 3 if another call has to continue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of this machine's results")
    parser.add_argument("--data-root", type=Path, help="folder of the images of the step scratch")
    parser.add_argument("--minutes", type=float, default=9, help="time of this call (default: %(default)s)")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STEP", help='groups, or names as "speed fast 96"')
    parser.add_argument("--cpu-check", action="store_true", help="run tiny steps on a CPU")
    arguments = parser.parse_args()
    if not arguments.cpu_check and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU; --cpu-check tests this script on a CPU")
    suite = Suite(arguments.out.resolve(), arguments.minutes, arguments.data_root, arguments.cpu_check)
    try:
        suite.run(arguments.steps)
    except subprocess.TimeoutExpired:
        print("out of time: run the same command again")
        return 3
    failed = [name for name, result in suite.state["steps"].items() if "failed" in result]
    print(f"failed: {', '.join(failed)}" if failed else "complete", suite.out / "gpu.md")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
