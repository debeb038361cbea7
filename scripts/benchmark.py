"""Compare the speed and memory of this project with alternatives.

python scripts/benchmark.py [--quick] [--json FILE]             rows for CPUs
python scripts/benchmark.py --gpu [--quick] [--json FILE]       rows for GPUs
python scripts/benchmark.py --only NAME ...                     some rows

Each row measures both sides alternately on built-in images or drawn pictures, in a process of its own. The ratio is the
median over the repeats, with the lowest and highest in brackets. Run nothing else on the machine meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_rows import CPU_ROWS, GPU_ROWS, SIDES, Row

from cifar10_tl.engine.hardware import choose_precision
from cifar10_tl.engine.results import environment

REPEATS = 5


def main() -> None:
    """Measure the chosen rows; exit with status 2 after an error in the arguments."""
    rows = {**CPU_ROWS, **GPU_ROWS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a single short repeat, to see that it runs")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=rows, help=f"rows to measure: {', '.join(CPU_ROWS)}"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--gpu", action="store_true", help="measure the rows for GPUs")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # used by child processes: print the pairs of a row
    parser.add_argument("--side", help=argparse.SUPPRESS)  # or the value of one side
    arguments = parser.parse_args()
    if arguments.side:
        print(SIDES[arguments.side](arguments.quick))
    elif arguments.row:
        measure = rows[arguments.row].prepare(arguments.quick)
        print(json.dumps([measure(number) for number in range(1 if arguments.quick else REPEATS)]))
    elif arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch finds no CUDA GPU; leave --gpu out to measure the rows for CPUs")
    else:
        names = arguments.only or (GPU_ROWS if arguments.gpu else CPU_ROWS)
        report({name: rows[name] for name in names}, arguments.quick, arguments.json)


def report(rows: dict[str, Row], quick: bool, file: str | None) -> None:
    """Measure each row in its own process, print it and write the numbers."""
    gpus = torch.cuda.device_count()
    print(environment(torch.device("cuda" if gpus else "cpu"), max(1, gpus), choose_precision("auto")[0]))
    print("ratio a / b: median [lowest, highest]\n", flush=True)
    results = {}
    for name, row in rows.items():
        results[name] = measured(name, quick)
        print(row_text(name, row, results[name]), flush=True)
        if file:
            Path(file).write_text(json.dumps(results, indent=1) + "\n")


def measured(name: str, quick: bool) -> dict[str, Any]:
    """Measure a row in another process, and return median and range of the ratios and the median of each side."""
    command = [sys.executable, __file__, "--row", name, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.check_output(command, text=True, env={**os.environ, "TMPDIR": folder})
    pairs = json.loads(output.splitlines()[-1])
    ratios = [a / b for a, b in pairs]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "a": a, "b": b}


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
