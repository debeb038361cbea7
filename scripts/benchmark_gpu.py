"""Rows of ``python scripts/benchmark.py --gpu``."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any

import benchmark_tools as tools
import torch
from benchmark_tools import Pair, Row, in_turn
from torch.utils.data import DataLoader

GOALS = {32: 0.93, 128: 0.98, 224: 0.98}
STEPS = {32: 100, 128: 60, 224: 40}


def build_on_gpu(size: int, batch: int, compiled: bool, *overrides: str) -> tuple[Any, Any, Any]:
    """Return config, module and data for one GPU."""
    settings = (f"model.image_size={size}", f"data.batch_size={batch}", f"compile={str(compiled).lower()}")
    trainer = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
    return tools.build(*settings, *trainer, *overrides, train_size=STEPS[size] * batch + 1000)


def fit(size: int, batch: int, compiled: bool, quick: bool) -> Callable[[int], Pair]:
    """Compare our fit with the bare loop, both eager or both compiled."""
    device, steps = torch.device("cuda"), STEPS[size] // (4 if quick else 1)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")

    def pair(number: int) -> Pair:
        cfg, module, datamodule = build_on_gpu(size, batch, compiled)
        network = copy.deepcopy(module.network).to(device)
        network.lay_out_for(device)
        batches = [(x.to(device), y.to(device)) for x, y in tools.ready_batches(datamodule, 10)]
        if compiled:
            network.compile()
        repeated = islice(cycle(batches), steps)
        return in_turn(
            number,
            lambda: tools.images_per_second(tools.our_fit(cfg, module, datamodule, steps), batch),
            lambda: tools.images_per_second(tools.bare_fit(network, repeated, steps, "bf16-mixed"), batch),
        )

    return pair


def real(size: int, on_device: bool, quick: bool) -> Callable[[int], Pair]:
    """Compare our fit on augmented batches with the same fit on one repeated batch."""
    steps, batch = STEPS[size] // (4 if quick else 1), 512

    def speed(synthetic: bool) -> float:
        cfg, module, datamodule = build_on_gpu(size, batch, True, f"data.on_device={str(on_device).lower()}")
        if synthetic:
            repeat_one_batch(datamodule, "cuda")
        return tools.images_per_second(tools.our_fit(cfg, module, datamodule, steps), batch)

    return lambda number: in_turn(number, lambda: speed(False), lambda: speed(True))


def repeat_one_batch(datamodule: Any, device: str) -> None:
    """Replace the training loader by one that yields the same batch, on the device, without augmentation."""
    loader = datamodule.train_dataloader()
    first = next(iter(loader))
    batches = list(repeat(type(first)(*(x if x is None else x.to(device) for x in first)), len(loader)))
    datamodule.train_dataloader = lambda: DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    datamodule.augmented = lambda batch, epoch: batch


def scaling(devices: int, quick: bool) -> Callable[[int], Pair]:
    """Compare the train command on several GPUs with a multiple of its speed on one."""
    return lambda number: (command_speed(devices, quick), devices * command_speed(1, quick))


def command_speed(devices: int, quick: bool) -> float:
    """Return the images/s of the train command's second epoch at 224 px with 512 images per GPU."""
    run = f"{tools.new_folder()}/run"
    command = (
        *(sys.executable, "-m", "cifar10_tl.train", "data=shapes", "model.weights=null", "test=false"),
        *("trainer=ddp", f"trainer.devices={devices}", f"data.batch_size={512 * devices}", "trainer.max_epochs=2"),
        *(f"data.train_size={(20 if quick else 60) * 512 * devices + 1000}", "data.val_size=1000"),
        f"paths.output_dir={run}",
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(f"{run}/metrics.csv") as file:
        return float(list(csv.DictReader(file))[-1]["images_per_second"])


BARE = "bare PyTorch loop, same settings, batches on the GPU already"
GPU_ROWS: dict[str, Row] = {}
for size in STEPS:
    for batch in (128, 512):
        for kind in ("eager", "compiled"):
            a = f"our Trainer.fit, ResNet50 at {size} px, batch {batch}, bf16, {kind}"
            measure = partial(fit, size, batch, kind == "compiled")
            GPU_ROWS[f"fit_{kind}_{size}_{batch}"] = Row(measure, "images/s", a, BARE, GOALS[size])
for size in STEPS:
    for suffix, place in (("", "in memory"), ("_on_device", "on the GPU")):
        a = f"our Trainer.fit on real batches of 512, images {place}, {size} px"
        measure = partial(real, size, bool(suffix))
        GPU_ROWS[f"real_{size}{suffix}"] = Row(measure, "images/s", a, "on one repeated batch", 0.97)
for devices in (2, 4, 8):
    a = f"the train command on {devices} GPUs, 224 px, 512 images each"
    GPU_ROWS[f"scaling_{devices}"] = Row(partial(scaling, devices), "images/s", a, f"{devices} x its speed on one")
