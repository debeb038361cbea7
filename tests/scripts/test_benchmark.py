from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import bare_loop
import benchmark
import benchmark_cpu
import benchmark_gpu
import benchmark_sides

SCRIPT = REPOSITORY / "scripts" / "benchmark.py"


def test_the_ratio_is_the_median_of_the_repeats_ratios() -> None:
    found = benchmark.summarise([(1.0, 2.0), (9.0, 3.0), (4.0, 4.0)], "images/s")
    assert found == {"ratio": 1.0, "low": 0.5, "high": 3.0, "a": 4.0, "b": 3.0, "unit": "images/s", "repeats": 3}


def test_the_first_steps_do_not_count() -> None:
    times = [100.0, 105.0, *(106.0 + step for step in range(9))]  # two slow steps, then one a second
    assert benchmark_sides.images_per_second(times, 10) == 10.0
    assert benchmark_sides.microseconds(times) == 1e6


@pytest.mark.parametrize(("ratio", "verdict"), [(0.97, "met"), (0.96, "MISSED")])
def test_a_row_tells_both_sides_and_whether_the_goal_is_met(ratio: float, verdict: str) -> None:
    row = benchmark_cpu.CPU_ROWS["fit_overhead"]
    told = benchmark.line("fit_overhead", row, benchmark.summarise([(ratio, 1.0)], row.unit))
    assert row.a in told
    assert row.b in told
    assert f"goal >= 0.97: {verdict}" in told


def test_the_goals_are_those_that_were_set() -> None:
    goals = {name: (row.goal, row.at_least) for name, row in benchmark_cpu.CPU_ROWS.items()}
    assert goals == {
        "loader": (8, True),
        "fit_overhead": (0.97, True),
        "step_overhead": (0.4, False),
        "stack_32": (1.3, True),
        "stack_128": (1.8, True),
        "probe": (6, True),
        "help": (0.25, False),
        "predict": (1.5, True),
        "memory": (1.15, False),
    }
    assert benchmark_gpu.GPU_ROWS["fit_eager_32_128"].goal == 0.93
    assert benchmark_gpu.GPU_ROWS["fit_compiled_128_512"].goal == 0.98
    assert benchmark_gpu.GPU_ROWS["real_224_on_device"].goal == 0.97


def test_the_bare_loop_learns() -> None:
    """A baseline that did not do the work would flatter us."""
    network = benchmark_sides.tiny_network()
    before = [p.detach().clone() for p in network.parameters()]
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    times = bare_loop.bare_loop(network, [(images, torch.arange(8))] * 3, precision="32-true")
    assert len(times) == 3
    assert times == sorted(times)
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_our_fit_and_the_template_take_the_steps_they_are_timed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baselines import TemplateModule

    monkeypatch.setenv("BENCHMARK_FOLDER", str(tmp_path))
    sizes = ("data.train_size=1064", "data.batch_size=16", "trainer.precision=32-true", "trainer.accelerator=cpu")
    cfg, module, datamodule = benchmark_sides.parts(*sizes)
    module.network = benchmark_sides.tiny_network()
    assert len(benchmark_sides.our_fit(cfg, module, datamodule, 4)) == 4
    with pytest.raises(ValueError, match="its end would be timed"):
        benchmark_sides.our_fit(cfg, module, datamodule, 5)
    template = TemplateModule(benchmark_sides.tiny_network())
    assert len(benchmark_sides.template_fit(template, benchmark_sides.ready_batches(datamodule, 6), 6)) == 6


def test_the_synthetic_batch_comes_as_often_as_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_FOLDER", str(tmp_path))
    _, _, datamodule = benchmark_sides.parts("data.train_size=1064", "data.batch_size=16")
    benchmark_gpu.use_one_batch(datamodule, "cpu")
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 4
    assert all(batch is batches[0] for batch in batches)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "nosuch"], "error: --only nosuch: there are loader, fit_overhead"),
        (["--fast"], "error: unrecognized arguments: --fast"),
        (["--json", "no/such/file"], "error: --json no/such/file: there is no such folder"),
        (["--gpu"], "error: --gpu: PyTorch finds no CUDA GPU here"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    try:
        status = benchmark.main()
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert capsys.readouterr().err.startswith(told)


def test_the_sides_take_turns_in_going_first() -> None:
    order: list[str] = []
    for number in (0, 1):
        assert benchmark_sides.in_turn(number, lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0) == (
            1.0,
            2.0,
        )
    assert order == ["a", "b", "b", "a"]


def test_every_row_stands_in_the_document() -> None:
    document = (REPOSITORY / "docs" / "performance.md").read_text()
    for name in benchmark_cpu.CPU_ROWS:
        assert f"`{name}`" in document


@pytest.mark.slow
def test_a_row_is_measured_and_written(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    arguments = ("--quick", "--repeats", "1", "--only", "help", "--json", str(file))
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text()).values()
    assert found["ratio"] == pytest.approx(found["a"] / found["b"])
    assert found.keys() == {"ratio", "low", "high", "a", "b", "unit", "repeats"}
    assert "train --help" in done.stdout
