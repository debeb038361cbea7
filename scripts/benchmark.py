"""Compare the speed and memory of this project with alternatives.

python scripts/benchmark.py [--quick] [--only NAME,NAME] [--json FILE]      rows for CPUs
python scripts/benchmark.py --gpu [--quick] [--only NAME,NAME] [--json FILE]

Each row measures both sides alternately on the built-in images (data=shapes), in a process of its own. The ratio is the
median over the repeats, with the lowest and highest in brackets. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_cpu import CPU_ROWS, SIDES
from benchmark_gpu import GPU_ROWS
from benchmark_tools import Pair, Row

from cifar10_tl.engine.hardware import choose_precision
from cifar10_tl.engine.results import environment

TRAINING_IMAGES = 45_000  # of CIFAR-10, without the validation images


def main() -> None:
    """Measure the chosen rows; exit with status 2 after an error in the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer repeats, to see that it runs")
    parser.add_argument("--only", metavar="NAME,NAME", help="rows to measure (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--gpu", action="store_true", help="measure the rows for GPUs")
    parser.add_argument("--repeats", type=int, help="repeats of each row (default: 5, with --quick 3)")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # used by child processes: print the pairs of a row
    parser.add_argument("--side", help=argparse.SUPPRESS)  # or the value of one side
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 5)
    rows = GPU_ROWS if arguments.gpu else CPU_ROWS
    names = arguments.only.split(",") if arguments.only else list(rows)
    if arguments.side:
        print(SIDES[arguments.side](arguments.quick))
    elif arguments.row:
        pair = rows[arguments.row].measure(arguments.quick)
        print(json.dumps([pair(number) for number in range(arguments.repeats)]))
    elif unknown := [name for name in names if name not in rows]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(rows)}")
    elif arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch finds no CUDA GPU; leave --gpu out to measure the rows for CPUs")
    else:
        report({name: rows[name] for name in names}, arguments)


def report(rows: dict[str, Row], arguments: argparse.Namespace) -> None:
    """Measure each row in its own process, print it and write the numbers."""
    print(machine())
    print(f"ratio a / b: median of {arguments.repeats} repeats [lowest, highest]\n", flush=True)
    results = {}
    for name, row in rows.items():
        if name.startswith("scaling_") and int(name.split("_")[1]) > torch.cuda.device_count():
            print(f"{name:<14} skipped: {torch.cuda.device_count()} GPUs")
            continue
        results[name] = summarize(measured_pairs(name, arguments), row.unit)
        print(row_text(name, row, results[name]), flush=True)
        if arguments.gpu:
            print(f"    epoch of {TRAINING_IMAGES:,} images: {TRAINING_IMAGES / results[name]['a']:.2f} s")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


def measured_pairs(name: str, arguments: argparse.Namespace) -> list[Pair]:
    """Measure a row in another process."""
    flags = [f"--{flag}" for flag in ("quick", "gpu") if getattr(arguments, flag)]
    command = [sys.executable, __file__, "--row", name, "--repeats", str(arguments.repeats), *flags]
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "BENCHMARK_FOLDER": folder}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """Return two lines with versions and hardware."""
    gpus, precision = torch.cuda.device_count(), choose_precision("auto")[0]
    found = environment(torch.device("cuda" if gpus else "cpu"), max(1, gpus), precision)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{versions}\n{found['device']}, {cores}, {platform.system()}, precision {precision}"


def summarize(pairs: list[Pair], unit: str) -> dict[str, Any]:
    """Return median and range of the ratios, and the median of each side."""
    ratios = [a / b for a, b in pairs]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    bounds = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {**bounds, "a": a, "b": b, "unit": unit, "repeats": len(pairs)}


def row_text(name: str, row: Row, result: dict[str, Any]) -> str:
    """Return the three lines of a row: ratio and goal, then both sides."""
    verdict = ""
    if row.goal is not None:
        met = result["ratio"] >= row.goal if row.at_least else result["ratio"] <= row.goal
        verdict = f"goal {'>=' if row.at_least else '<='} {row.goal:g}: {'met' if met else 'MISSED'}"
    ratio = f"{name:<14} {result['ratio']:8.3f} [{result['low']:.3f}, {result['high']:.3f}]  {verdict}"
    sides = (f"    {side}  {result[side]:10.5g} {row.unit:<9} {text}" for side, text in (("a", row.a), ("b", row.b)))
    return "\n".join([ratio, *sides])


if __name__ == "__main__":
    main()
