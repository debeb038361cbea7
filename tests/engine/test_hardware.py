from __future__ import annotations

import pytest
import torch

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.hardware import choose_compile, choose_precision, tune_for
from cifar10_tl.models.lit_classifier import LitClassifier

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "precision"),
    [(True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")],
)
def test_precision_follows_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    chosen, reason = choose_precision("cpu")
    assert chosen == precision
    assert "bfloat16" in reason


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_follows_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    for accelerator in ("auto", "gpu", "cuda"):
        chosen, reason = choose_precision(accelerator)
        assert chosen == precision
        assert reason.startswith("a GPU")


@pytest.mark.parametrize(
    ("setting", "device", "triton", "capability", "compiled"),
    [
        ("auto", CPU, True, (9, 0), False),
        ("auto", CUDA, True, (9, 0), True),
        ("auto", CUDA, False, (9, 0), False),
        ("auto", CUDA, True, (6, 1), False),
        (False, CUDA, True, (9, 0), False),
        (True, CUDA, True, (7, 0), True),
        (True, CPU, False, (0, 0), True),
    ],
)
def test_compile_is_for_gpus_that_triton_knows_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
    setting: bool | str,
    device: torch.device,
    triton: bool,
    capability: tuple[int, int],
    compiled: bool,
) -> None:
    monkeypatch.setattr(
        "cifar10_tl.engine.hardware.importlib.util.find_spec", lambda name: object() if triton else None
    )
    monkeypatch.setattr("cifar10_tl.engine.hardware.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_compile(setting, device)[0] is compiled


def test_compiling_without_a_compiler_is_refused_with_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar10_tl.engine.hardware.shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler .* use compile=false"):
        choose_compile(True, CPU)
    monkeypatch.setattr("cifar10_tl.engine.hardware.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile=true needs Triton"):
        choose_compile(True, CUDA)


def test_each_device_gets_what_is_faster_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr("cifar10_tl.engine.hardware.keep_freed_memory", lambda: asked.append("memory"))
    network = LitClassifier(["a", "b"], backbone="resnet18", weights=None, image_size=32).network
    tune_for(CPU, network)
    assert asked == ["memory"]
    assert network.backbone.layer1[0].conv1.weight.is_contiguous()
    tune_for(CUDA, network)
    assert asked == ["memory", "high"]
    assert network.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
