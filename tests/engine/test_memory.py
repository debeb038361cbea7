"""Memory of freed tensors."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
import torch
from cifar10_tl.engine.hardware import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(30):  # it takes a few until a gap is wide enough
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)  # 100 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_large_tensors_take_the_memory_of_earlier_ones() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", MEASURE, how], check=True, capture_output=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 100 < faults["leave"]
