from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.hardware import choose_compile, choose_precision, limit_threads, tune_for
from cifar10_tl.models.lit_classifier import LitClassifier

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HARDWARE = "cifar10_tl.engine.hardware"
COUNT_PAGE_FAULTS = """
import resource
import torch
from cifar10_tl.engine.hardware import keep_freed_memory

for prepare in (lambda: None, keep_freed_memory):
    prepare()
    for _ in range(30):  # it takes a few until a gap is wide enough
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25_000_000)  # 100 MB, freed at once
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "precision"),
    [(True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")],
)
def test_precision_follows_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("cpu")[0] == precision


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_precision_follows_what_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, native: bool, precision: str, accelerator: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    chosen, reason = choose_precision(accelerator)
    assert chosen == precision
    assert reason.startswith("a GPU")
    assert ("trainer.precision=16-mixed may be faster" in reason) is not native


@pytest.mark.parametrize(
    ("setting", "device", "missing", "capability", "compiled"),
    [
        ("auto", CPU, "", (9, 0), False),
        ("auto", CUDA, "", (9, 0), True),
        ("auto", CUDA, "triton", (9, 0), False),
        ("auto", CUDA, "compiler", (9, 0), False),
        ("auto", CUDA, "Python.h", (9, 0), False),
        ("auto", CUDA, "", (6, 1), False),
        (False, CUDA, "", (9, 0), False),
        (True, CUDA, "", (7, 0), True),
        (True, CPU, "triton", (0, 0), True),
    ],
)
def test_compile_is_for_gpus_that_triton_supports_unless_it_is_set(
    setting: Any,
    device: torch.device,
    missing: str,
    capability: Any,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(f"{HARDWARE}.importlib.util.find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr(f"{HARDWARE}.shutil.which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(f"{HARDWARE}.sysconfig.get_path", lambda name, scheme: str(tmp_path))
    if missing != "Python.h":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path.home())
    assert choose_compile(setting, device)[0] is compiled
    assert device == CPU or os.environ["TRITON_CACHE_DIR"].startswith(tempfile.gettempdir()), "home is read-only"


@pytest.mark.parametrize(("device", "needed"), [(CPU, r"a C\+\+ compiler"), (CUDA, "Triton")])
def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, device: torch.device, needed: str) -> None:
    monkeypatch.setattr(f"{HARDWARE}.shutil.which", lambda name: None)
    monkeypatch.setattr(f"{HARDWARE}.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"compile=true needs {needed}.* use compile=false"):
        choose_compile(True, device)


def test_each_device_gets_what_is_faster_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(f"{HARDWARE}.keep_freed_memory", lambda: asked.append("memory"))
    network = LitClassifier(["a", "b"], backbone="resnet18", weights=None, image_size=32).network
    tune_for(CPU, network)
    assert asked == ["memory"]
    assert network.backbone.layer1[0].conv1.weight.is_contiguous()
    tune_for(CUDA, network)
    assert asked == ["memory", "high"]
    assert network.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("processes", "of_task", "threads"), [(1, "", 4), (3, "", 1), (8, "", 1), (8, "3", 3)])
def test_a_container_with_four_of_many_cores(
    monkeypatch: pytest.MonkeyPatch, processes: int, of_task: str, threads: int
) -> None:
    set_to: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setattr(f"{HARDWARE}._THREADS", 48)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(f"{HARDWARE}.available_cores", lambda: 4)
    limit_threads(processes)
    assert set_to == [], "as the user has set it"
    monkeypatch.delenv("OMP_NUM_THREADS")
    if of_task:
        monkeypatch.setenv("SLURM_NTASKS", "8")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", of_task)
    limit_threads(processes)
    assert set_to == [threads]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_large_tensors_take_the_memory_of_earlier_ones() -> None:
    default, kept = map(int, subprocess.check_output([sys.executable, "-c", COUNT_PAGE_FAULTS]).split())
    assert kept < 100 < default
