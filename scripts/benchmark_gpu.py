"""The rows of ``python scripts/benchmark.py --gpu``: our fit beside a bare loop, real images beside synthetic ones."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark_sides import Pairs, Row, images_per_second, in_turn, our_fit, parts, ready_batches, synchronize, warm_up

SIZES, BATCHES = (32, 128, 224), (128, 512)
GOALS = {32: 0.93, 128: 0.98, 224: 0.98}
STEPS = {32: 100, 128: 60, 224: 40}


def fit(size: int, batch: int, compiled: bool) -> Callable[[int, bool], Pairs]:
    """Our fit against the bare loop, both eager or both compiled, batches of the latter on the GPU already."""

    def measure(repeats: int, quick: bool) -> Pairs:
        import torch
        from bare_loop import bare_loop

        device, steps = torch.device("cuda"), STEPS[size] // (4 if quick else 1)
        torch.backends.cudnn.benchmark = True  # for both sides; Lightning sets it anew
        torch.set_float32_matmul_precision("high")
        pairs = []
        for _ in range(repeats):
            cfg, module, datamodule = gpu_parts(size, batch, compiled)
            network = copy.deepcopy(module.network).to(device)
            network.lay_out_for(device)
            few = [(x.to(device), y.to(device)) for x, y in ready_batches(datamodule, 10)]
            if compiled:
                network.compile()

            def ours() -> float:
                return images_per_second(our_fit(cfg, module, datamodule, steps), batch)  # noqa: B023

            def plain() -> float:
                times = bare_loop(
                    network,  # noqa: B023
                    (few[step % len(few)] for step in range(steps)),  # noqa: B023
                    precision="bf16-mixed",
                    warm_up=warm_up(steps),
                    synchronize=lambda: synchronize(device),
                )
                return images_per_second(times, batch)

            pairs.append(in_turn(len(pairs), ours, plain))
        return pairs

    return measure


def real(size: int, on_device: bool) -> Callable[[int, bool], Pairs]:
    """Our fit on images that are fetched and augmented, against the same fit on one batch again and again."""

    def measure(repeats: int, quick: bool) -> Pairs:
        steps, batch = STEPS[size] // (4 if quick else 1), 512

        def speed(synthetic: bool) -> float:
            cfg, module, datamodule = gpu_parts(size, batch, True, f"data.on_device={str(on_device).lower()}")
            if synthetic:
                use_one_batch(datamodule)
            return images_per_second(our_fit(cfg, module, datamodule, steps), batch)

        return [in_turn(number, lambda: speed(False), lambda: speed(True)) for number in range(repeats)]

    return measure


def scaling(devices: int) -> Callable[[int, bool], Pairs]:
    """The train command on several GPUs, 512 images each, against as many times the speed of one."""

    def measure(repeats: int, quick: bool) -> Pairs:
        import torch

        if torch.cuda.device_count() < devices:
            return []
        return [(command_speed(devices, quick), devices * command_speed(1, quick)) for _ in range(repeats)]

    return measure


def gpu_parts(size: int, batch: int, compiled: bool, *overrides: str) -> tuple[Any, Any, Any]:
    """As :func:`benchmark.parts`, for one GPU."""
    settings = (f"model.image_size={size}", f"data.batch_size={batch}", f"compile={str(compiled).lower()}")
    train_size = f"data.train_size={STEPS[size] * batch + 1000}"
    return parts(train_size, *settings, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", *overrides)


def use_one_batch(datamodule: Any, device: str = "cuda") -> None:
    """Let the training loader give the same batch, on the device, unchanged, as often as it would give others."""
    import torch
    from torch.utils.data import DataLoader

    loader = datamodule.train_dataloader()
    batch = type(first := next(iter(loader)))(*(x if x is None else x.to(device) for x in first))

    class OneBatch(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (batch for _ in range(len(loader)))

    datamodule.train_dataloader = lambda: DataLoader(OneBatch(), batch_size=None, collate_fn=lambda x: x)
    datamodule.augmented = lambda batch, epoch: batch


def command_speed(devices: int, quick: bool) -> float:
    """Images/s of the second epoch of the train command at 224 px."""
    with tempfile.TemporaryDirectory() as folder:
        command = (
            *(sys.executable, "-m", "cifar10_tl.train", "data=shapes", "model.weights=null", "test=false"),
            *("trainer=ddp", f"trainer.devices={devices}", f"data.batch_size={512 * devices}"),
            f"data.train_size={(20 if quick else 60) * 512 * devices + 1000}",
            *("data.val_size=1000", "trainer.max_epochs=2", f"paths.output_dir={folder}/run"),
        )
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv") as file:
            return float(list(csv.DictReader(file))[-1]["images_per_second"])


GPU_ROWS = {
    f"fit_{'compiled' if compiled else 'eager'}_{size}_{batch}": Row(
        f"our Trainer.fit, ResNet50 at {size} px, batch {batch}, bf16, {'compiled' if compiled else 'eager'}",
        "a bare PyTorch loop, likewise, batches on the GPU already",
        "images/s",
        GOALS[size],
        True,
        fit(size, batch, compiled),
    )
    for size in SIZES
    for batch in BATCHES
    for compiled in (False, True)
}
GPU_ROWS |= {
    f"real_{size}{'_on_device' if on_device else ''}": Row(
        f"our Trainer.fit on real batches of 512 {'kept on the GPU' if on_device else 'from memory'}, {size} px",
        "on one synthetic batch",
        "images/s",
        0.97,
        True,
        real(size, on_device),
    )
    for size in SIZES
    for on_device in (False, True)
}
GPU_ROWS |= {
    f"scaling_{devices}": Row(
        f"the train command on {devices} GPUs, 224 px, 512 images each",
        f"{devices} times its speed on one",
        "images/s",
        None,
        True,
        scaling(devices),
    )
    for devices in (2, 4, 8)
}
