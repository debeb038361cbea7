"""Rows of ``python scripts/benchmark.py`` that run on a CPU."""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import benchmark_tools as tools
import numpy as np
from bare_loop import bare_steps, peak_mb
from baselines import TemplateModule, TinyNetwork, per_image_loaders
from benchmark_tools import BATCH, Pair, Row, build, compose, in_turn, seconds_of
from torchvision.models import resnet50

from cifar10_tl.engine.hardware import choose_precision

CHECKPOINT, ONNX = "run/checkpoints/last.ckpt", "model.onnx"
STACK_STEPS = {32: 30, 128: 12}


def loader(quick: bool) -> Callable[[int], Pair]:
    """Fetch, flip, crop and normalize images."""
    _, module, datamodule = build(train_size=3_000 if quick else 9_000)
    train = datamodule.splits["train"]
    usual = per_image_loaders(train.images, train.labels, 32, BATCH)
    num_images = len(train) // BATCH * BATCH

    def ours() -> None:
        for batch in datamodule.train_dataloader():
            module.network.preprocess(datamodule.augmented(batch, 0).images)

    def theirs() -> float:
        return max(num_images / seconds_of(lambda: sum(1 for _ in batches)) for batches in usual)  # noqa: B023

    theirs()  # starts the workers
    return lambda number: in_turn(number, lambda: num_images / seconds_of(ours), theirs)


def fit_overhead(quick: bool) -> Callable[[int], Pair]:
    """Alternate steps of Trainer.fit with steps of a plain loop."""
    steps = 8 if quick else 30

    def pair(number: int) -> Pair:
        cfg, module, datamodule = build()
        network, batches = copy.deepcopy(module.network), tools.ready_batches(datamodule, steps)
        plain = bare_steps(network, batches, choose_precision("auto")[0])
        seconds: list[float] = []
        fit = tools.our_fit(cfg, module, datamodule, steps, lambda: seconds.append(seconds_of(lambda: next(plain))))
        return tools.images_per_second(fit), tools.images_per_second([*accumulate(seconds)])

    return pair


def step_overhead(quick: bool) -> Callable[[int], Pair]:
    """Subtract a plain loop's step from both sides' steps of a network that costs next to nothing."""
    steps, size = 200 if quick else 1000, 16
    # without augmentation, because the batches of the other side are prepared beforehand
    plain_data = (f"data.batch_size={size}", "data.augment.horizontal_flip=false", "data.augment.random_crop_padding=0")

    def pair(number: int) -> Pair:
        cfg, module, datamodule = build(*plain_data, "trainer.precision=32-true", train_size=size * steps + 1000)
        module.network = TinyNetwork()
        batches = tools.ready_batches(datamodule, steps)
        plain = tools.microseconds(tools.bare_fit(TinyNetwork(), batches, steps, "32-true"))
        ours, theirs = in_turn(
            number,
            lambda: tools.microseconds(tools.our_fit(cfg, module, datamodule, steps)),
            lambda: tools.microseconds(tools.template_fit(TemplateModule(TinyNetwork(), fused=True), batches, steps)),
        )
        return ours - plain, theirs - plain

    return pair


def printed_number(*command: str) -> float:
    """Return the number that a Python process prints as its last line."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def side(name: str, quick: bool) -> Callable[[], float]:
    """Return a function that measures one of ``SIDES`` in its own process."""
    return partial(printed_number, "benchmark.py", "--side", name, *(["--quick"] if quick else []))


def stack(size: int, quick: bool) -> Callable[[int], Pair]:
    """Compare all defaults with a template's at an image size."""
    return lambda number: in_turn(number, side(f"ours-{size}", quick), side(f"template-{size}", quick))


def stack_ours(size: int, quick: bool) -> float:
    """Return the images/s of the defaults."""
    steps = STACK_STEPS[size] // (2 if quick else 1)
    return tools.images_per_second(tools.our_fit(*build(f"model.image_size={size}"), steps))


def stack_template(size: int, quick: bool) -> float:
    """Return the images/s of a template's defaults."""
    train, steps = build()[2].splits["train"], STACK_STEPS[size] // (2 if quick else 1)
    loaders = per_image_loaders(train.images, train.labels, size, BATCH)
    fits = (tools.template_fit(TemplateModule(resnet50(num_classes=10)), batches, steps) for batches in loaders)
    return max(tools.images_per_second(times) for times in fits)


def probe(quick: bool) -> Callable[[int], Pair]:
    """Train a head on a frozen backbone for ten epochs, from the config to the last step."""
    num_images, size = (500, 64) if quick else (2000, 96)

    def seconds(cached: str) -> float:
        from cifar10_tl.train import train

        folder = tools.new_folder()
        cfg = compose(
            *("experiment=probe", "data=shapes", f"data.train_size={num_images + 200}", "data.val_size=200"),
            *("data.test_size=10", "model.weights=null", f"model.image_size={size}", f"data.cache_features={cached}"),
            *(f"paths.cache_dir={folder}/cache", f"paths.output_dir={folder}/run"),
            *("trainer.enable_progress_bar=false", "test=false"),
        )
        return seconds_of(lambda: train(cfg))

    train_small_run()  # imports everything
    return lambda number: in_turn(number, lambda: seconds("false"), lambda: seconds("true"))


def train_small_run(*overrides: str) -> None:
    """Train for one step to get a checkpoint."""
    from cifar10_tl.train import train

    sizes = ("data.train_size=60", "data.val_size=20", "data.test_size=20", "data.batch_size=20")
    limits = ("trainer.max_epochs=1", "trainer.devices=1", "trainer.limit_train_batches=1", "test=false")
    folder = (f"paths.output_dir={os.environ['BENCHMARK_FOLDER']}/run", "trainer.enable_progress_bar=false")
    train(compose("experiment=quickstart", *sizes, *limits, *folder, *overrides))


def help_text(quick: bool) -> Callable[[int], Pair]:
    """Time ``--help`` from start to exit."""

    def command(*arguments: str) -> float:
        options: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
        return seconds_of(lambda: subprocess.run([sys.executable, *arguments], **options))

    ours, lightning = ("-m", "cifar10_tl.train", "--help"), ("-c", "import lightning.pytorch")
    return lambda number: in_turn(number, lambda: command(*ours), lambda: command(*lightning))


def predict(quick: bool) -> Callable[[int], Pair]:
    """Compare an exported model with its checkpoint, in processes whose PyTorch does not keep freed memory."""
    from cifar10_tl.export import export

    train_small_run("model.image_size=224", "trainer.precision=32-true")
    folder = os.environ["BENCHMARK_FOLDER"]
    files = (f"checkpoint={folder}/{CHECKPOINT}", f"output={folder}/{ONNX}", f"paths.output_dir={folder}/export")
    export(compose(*files, name="export"))
    return lambda number: in_turn(number, side("onnx", quick), side("eager", quick))


def predict_with(file: str, quick: bool) -> float:
    """Return the images/s of ``load_classifier`` with a checkpoint or an exported model."""
    from cifar10_tl import load_classifier

    pixels = np.random.default_rng(0).integers(0, 256, (8 if quick else 32, 3, 32, 32), dtype=np.uint8)
    classifier = load_classifier(Path(os.environ["BENCHMARK_FOLDER"]) / file, "cpu")
    seconds = [seconds_of(lambda: classifier.probabilities(pixels)) for _ in range(6)]
    return len(pixels) / statistics.median(seconds[1:])


def memory(quick: bool) -> Callable[[int], Pair]:
    """Compare with a process that imports neither Lightning nor this project."""
    return lambda number: in_turn(number, side("memory", quick), lambda: printed_number("bare_loop.py"))


def memory_of_fit(quick: bool) -> float:
    """Return the peak memory of Trainer.fit in MB."""
    tools.our_fit(*build(), 6)
    return peak_mb()


PER_IMAGE = "per-image torchvision transforms in a DataLoader, best of 0 and 2 workers"
TEMPLATE = "a template's defaults (fp32, NCHW, per-image DataLoader, torchmetrics each step), best of 0 and 2 workers"
BARE = "bare PyTorch loop, same network, batch and precision, batches ready in memory"
CACHED = "the same with data.cache_features=true, including building the cache"
STEP = ("added per step by our fit, tiny network", "added by a template's fit: torchmetrics and self.log each step")
CPU_ROWS = {
    "loader": Row(loader, "images/s", "our pipeline: fetch, flip, crop, normalize", PER_IMAGE, 8),
    "fit_overhead": Row(fit_overhead, "images/s", "our Trainer.fit, ResNet50 at 32 px", BARE, 0.97),
    "step_overhead": Row(step_overhead, "us", *STEP, 0.4, False),
    "stack_32": Row(partial(stack, 32), "images/s", "our defaults, ResNet50 at 32 px", TEMPLATE, 1.3),
    "stack_128": Row(partial(stack, 128), "images/s", "our defaults, ResNet50 at 128 px", TEMPLATE, 1.8),
    "probe": Row(probe, "s", "ten epochs on a frozen ResNet50 at 96 px, no cache", CACHED, 6),
    "help": Row(help_text, "s", "train --help", 'python -c "import lightning.pytorch"', 0.25, False),
    "predict": Row(predict, "images/s", "exported ONNX in ONNX Runtime, 224 px", "checkpoint in PyTorch, fp32", 1.5),
    "memory": Row(memory, "MB", "peak memory of our Trainer.fit", "of a bare PyTorch loop", 1.15, False),
}
SIDES: dict[str, Callable[[bool], float]] = {
    "memory": memory_of_fit,
    "onnx": partial(predict_with, ONNX),
    "eager": partial(predict_with, CHECKPOINT),
    **{f"ours-{size}": partial(stack_ours, size) for size in STACK_STEPS},
    **{f"template-{size}": partial(stack_template, size) for size in STACK_STEPS},
}
