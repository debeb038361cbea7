"""How fast this project is, beside what one would write without it. Each row says what both sides are.

python scripts/benchmark.py [--quick] [--only NAME] [--json FILE]      on this machine's processor
python scripts/benchmark.py --gpu [--quick] [--json FILE]              on its GPUs

Images are the built-in ones (data=shapes, 32x32 colour): the time does not depend on what they show. Each row runs in a
process of its own, both sides in turn, again and again; the first steps of each are left out. The ratio is the median
of the repeats' ratios, in brackets the lowest and the highest. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from benchmark_cpu import CPU_ROWS, SIDES
from benchmark_sides import Pairs, Row, child, precision

TRAINING_IMAGES = 45_000  # of CIFAR-10, without those held out for validation


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        """One ``error:`` line, exit status 2."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    """Run the rows; the exit status: 0 whether goals are met or not, 2 after a one-line `error:`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer repeats: a try, not a measurement")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"one of {', '.join(CPU_ROWS)}; or several")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--gpu", action="store_true", help="the rows for GPUs, see scripts/benchmark_gpu.py")
    parser.add_argument("--repeats", type=int, help="of each row (default: 5, with --quick 3)")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in a process of its own: print its pairs
    parser.add_argument("--side", help=argparse.SUPPRESS)  # and one side of a repeat: print its number
    arguments = parser.parse_args()
    repeats = arguments.repeats or (3 if arguments.quick else 5)
    os.environ.setdefault("BENCHMARK_FOLDER", tempfile.gettempdir())
    if arguments.side:
        return result_line(SIDES[arguments.side](arguments.quick))
    if arguments.row:
        return result_line(all_rows(arguments.gpu)[arguments.row].measure(repeats, arguments.quick))
    try:
        return report(arguments, repeats)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def all_rows(gpu: bool) -> dict[str, Row]:
    """The rows for the processor, or those for GPUs."""
    if not gpu:
        return CPU_ROWS
    from benchmark_gpu import GPU_ROWS

    return GPU_ROWS


def report(arguments: argparse.Namespace, repeats: int) -> int:
    """Run each row in a process of its own, and print what it found."""
    rows = all_rows(arguments.gpu)
    chosen = [name for given in arguments.only or rows for name in given.split(",")]
    if unknown := [name for name in chosen if name not in rows]:
        raise ValueError(f"--only {unknown[0]}: there are {', '.join(rows)}")
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        raise ValueError(f"--json {arguments.json}: there is no such folder")
    if arguments.gpu and not has_gpu():
        raise ValueError("--gpu: PyTorch finds no CUDA GPU here; without --gpu the processor's rows are run")
    for text in machine():
        print(text)
    print(f"ratio a / b: median of {repeats} repeats [lowest, highest]\n", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BENCHMARK_FOLDER"] = folder
        flags = [flag for flag in ("quick", "gpu") if getattr(arguments, flag)]
        for name in chosen:
            pairs = child("--row", name, "--repeats", str(repeats), *(f"--{flag}" for flag in flags))
            if not pairs:
                print(f"{name:<14} left out: this machine has too few GPUs", flush=True)
                continue
            results[name] = summarise(pairs, rows[name].unit)
            print(line(name, rows[name], results[name]), flush=True)
            if arguments.gpu:
                results[name]["epoch_seconds"] = TRAINING_IMAGES / results[name]["a"]
                print(f"    an epoch of {TRAINING_IMAGES:,} images takes a {results[name]['epoch_seconds']:.2f} s")
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def has_gpu() -> bool:
    """Whether PyTorch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def machine() -> Iterator[str]:
    """Versions and hardware."""
    import torch

    from cifar10_tl.engine.results import environment

    found = environment(torch.device("cuda" if has_gpu() else "cpu"), max(1, torch.cuda.device_count()), precision())
    yield ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (
        f"{found['device']}{f' x {torch.cuda.device_count()}' if has_gpu() else ''}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {platform.system()}, precision auto = {precision()}"
    )


def summarise(pairs: Pairs, unit: str) -> dict[str, Any]:
    """Median and range of the ratios, and the median of each side."""
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "a": statistics.median(a for a, _ in pairs),
        "b": statistics.median(b for _, b in pairs),
        "unit": unit,
        "repeats": len(pairs),
    }


def line(name: str, row: Row, result: dict[str, Any]) -> str:
    """A row of the table, over three lines."""
    met = ""
    if row.goal is not None:
        good = result["ratio"] >= row.goal if row.at_least else result["ratio"] <= row.goal
        met = f"goal {'>=' if row.at_least else '<='} {row.goal:g}: {'met' if good else 'MISSED'}"
    head = f"{name:<14} {result['ratio']:8.3f} [{result['low']:.3f}, {result['high']:.3f}]  {met}"
    sides = [
        f"    {side}  {result[side]:10.5g} {result['unit']:<9} {text}" for side, text in (("a", row.a), ("b", row.b))
    ]
    return "\n".join([head, *sides])


def result_line(value: Any) -> int:
    """Print a value for :func:`child`; exit status 0."""
    print(json.dumps(value))
    return 0


if __name__ == "__main__":
    sys.exit(main())
