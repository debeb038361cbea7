"""The rows of ``python scripts/benchmark.py``: what is measured on a processor."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmark_sides import (
    BATCH,
    ROOT,
    Pairs,
    Row,
    child,
    compose,
    images_per_second,
    in_turn,
    microseconds,
    numpy_images,
    our_fit,
    parts,
    peak_mb,
    per_second,
    precision,
    ready_batches,
    run,
    seconds_of,
    small_run,
    template_fit,
    tiny_network,
)

CHECKPOINT, ONNX = "run/checkpoints/last.ckpt", "model.onnx"


def loader(repeats: int, quick: bool) -> Pairs:
    """Images as the network wants them: fetched, flipped, cropped, normalised, on the processor."""
    import torch
    from baselines import per_image_loader

    num_images = 2_000 if quick else 8_000
    _, module, datamodule = parts(f"data.train_size={num_images + 1000}")
    images, labels = numpy_images(datamodule)
    usual = [per_image_loader(images, labels, 32, workers, BATCH) for workers in (0, 2)]

    def ours(epoch: int) -> int:
        count = 0
        for batch in datamodule.train_dataloader():
            count += len(module.network.preprocess(datamodule.augmented(batch, epoch).images))
        return count

    def theirs(batches: Any) -> int:
        return sum(len(x) for x, _ in batches)

    pairs = []
    with torch.no_grad():
        for epoch in range(repeats + 1):
            pairs.append(
                in_turn(
                    epoch,
                    lambda: per_second(lambda: ours(epoch)),  # noqa: B023
                    lambda: max(per_second(partial(theirs, batches)) for batches in usual),
                )
            )
    return pairs[1:]  # in the first, workers start


def fit_overhead(repeats: int, quick: bool) -> Pairs:
    """Trainer.fit as the command runs it; after each of its steps, one of a loop over batches that lie ready."""
    import copy

    from bare_loop import bare_steps

    steps = 8 if quick else 30
    pairs = []
    for _ in range(repeats):
        cfg, module, datamodule = parts()
        network, batches = copy.deepcopy(module.network), ready_batches(datamodule, steps)
        plain = bare_steps(network, batches, precision=precision())
        seconds: list[float] = []
        fit = our_fit(cfg, module, datamodule, steps, lambda: seconds.append(seconds_of(lambda: next(plain))))  # noqa: B023
        pairs.append((images_per_second(fit, BATCH), images_per_second([*accumulate(seconds)], BATCH)))
    return pairs


def step_overhead(repeats: int, quick: bool) -> Pairs:
    """A network that costs next to nothing leaves the framework's own time; that of a plain loop is taken off."""
    from bare_loop import bare_loop
    from baselines import TemplateModule

    steps = 200 if quick else 1000
    size = 16
    pairs = []
    for _ in range(repeats):
        cfg, module, datamodule = parts(
            f"data.batch_size={size}",
            f"data.train_size={size * steps + 1000}",
            "data.augment.horizontal_flip=false",  # the template's batches lie ready
            "data.augment.random_crop_padding=0",
            "trainer.precision=32-true",
        )
        module.network = tiny_network()
        batches = ready_batches(datamodule, steps)
        plain = microseconds(bare_loop(tiny_network(), batches, precision="32-true"))
        ours, template = in_turn(
            len(pairs),
            lambda: microseconds(our_fit(cfg, module, datamodule, steps)),  # noqa: B023
            lambda: microseconds(template_fit(TemplateModule(tiny_network(), fused=True), batches, steps)),  # noqa: B023
        )
        pairs.append((ours - plain, template - plain))
    return pairs


def stack(size: int) -> Callable[[int, bool], Pairs]:
    """Everything together: our defaults against a template's, at an image size; processes of their own, as in life."""

    def measure(repeats: int, quick: bool) -> Pairs:
        def side(name: str) -> float:
            return float(child("--side", f"{name}-{size}", *(["--quick"] if quick else [])))

        return [in_turn(number, lambda: side("ours"), lambda: side("template")) for number in range(repeats)]

    return measure


def stack_ours(size: int, quick: bool) -> float:
    """Our side of ``stack``, in images/s."""
    cfg, module, datamodule = parts(f"model.image_size={size}")
    return images_per_second(our_fit(cfg, module, datamodule, stack_steps(size, quick)), BATCH)


def stack_template(size: int, quick: bool) -> float:
    """The other side of ``stack``, in images/s."""
    from bare_loop import torchvision_resnet50
    from baselines import TemplateModule, per_image_loader

    images, labels = numpy_images(parts()[2])
    loaders = [per_image_loader(images, labels, size, workers, BATCH) for workers in (0, 2)]
    fits = (template_fit(TemplateModule(torchvision_resnet50()), x, stack_steps(size, quick)) for x in loaders)
    return max(images_per_second(times, BATCH) for times in fits)


def stack_steps(size: int, quick: bool) -> int:
    """Steps of a fit in ``stack``."""
    return {32: 30, 128: 12}[size] // (2 if quick else 1)


def probe(repeats: int, quick: bool) -> Pairs:
    """Ten epochs of a head on a frozen backbone, from the built network to the last step."""
    num_images, size = (500, 64) if quick else (2000, 96)
    with tempfile.TemporaryDirectory() as folder:
        run(small_run(folder))  # imports everything

    def seconds(cached: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            cfg = compose(
                "experiment=probe",
                "data=shapes",
                f"data.train_size={num_images + 200}",
                "data.val_size=200",
                "data.test_size=10",
                "model.weights=null",
                f"model.image_size={size}",
                f"data.cache_features={cached}",
                f"paths.cache_dir={folder}/cache",
                f"paths.output_dir={folder}/run",
                "trainer.enable_progress_bar=false",
                "test=false",
            )
            return seconds_of(lambda: run(cfg))

    return [in_turn(number, lambda: seconds("false"), lambda: seconds("true")) for number in range(repeats)]


def help_text(repeats: int, quick: bool) -> Pairs:
    """From the shell's prompt to its next."""

    def command(*arguments: str) -> float:
        return seconds_of(
            lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        )

    sides = (("-m", "cifar10_tl.train", "--help"), ("-c", "import lightning.pytorch"))
    pairs = [in_turn(n, lambda: command(*sides[0]), lambda: command(*sides[1])) for n in range(repeats + 1)]
    return pairs[1:]  # the first fills the disk cache


def predict(repeats: int, quick: bool) -> Pairs:
    """The exported model in ONNX Runtime, and the checkpoint in PyTorch, both as load_classifier gives them.

    Each in a process of its own: here, a run has made PyTorch keep freed memory, as the predict command does, too.
    """
    from cifar10_tl.export import export

    folder = os.environ["BENCHMARK_FOLDER"]
    run(small_run(folder, "model.image_size=224", "trainer.precision=32-true"))
    files = (f"checkpoint={folder}/{CHECKPOINT}", f"output={folder}/{ONNX}", f"paths.output_dir={folder}/export")
    export(compose(*files, name="export"))

    def side(name: str) -> float:
        return float(child("--side", name, *(["--quick"] if quick else [])))

    return [in_turn(n, lambda: side("onnx"), lambda: side("eager")) for n in range(repeats)]


def predict_with(file: str, quick: bool) -> float:
    """A side of ``predict``, in images/s."""
    import numpy as np

    from cifar10_tl import load_classifier

    pixels = np.random.default_rng(0).integers(0, 256, (8 if quick else 32, 3, 32, 32), dtype=np.uint8)
    classifier = load_classifier(Path(os.environ["BENCHMARK_FOLDER"]) / file, "cpu")
    speeds = [per_second(lambda: len(classifier.probabilities(pixels))) for _ in range(6)]
    return statistics.median(speeds[1:])


def memory(repeats: int, quick: bool) -> Pairs:
    """Peak resident memory of a process that does nothing else."""
    sides = (lambda: float(child("--side", "memory-fit")), lambda: float(child("--side", "memory-loop")))
    return [in_turn(number, *sides) for number in range(repeats)]


def memory_fit(quick: bool) -> float:
    """Our side of ``memory``, in MB."""
    cfg, module, datamodule = parts("data.train_size=5000")
    our_fit(cfg, module, datamodule, 6)
    return peak_mb()


def memory_loop(quick: bool) -> float:
    """The other side of ``memory``: such a network and as many images, but no Lightning, and nothing of ours."""
    import torch
    from bare_loop import bare_loop_from_memory

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    bare_loop_from_memory(4000, 6, BATCH, precision="bf16-mixed" if native else "32-true")
    return peak_mb()


CPU_ROWS = {
    "loader": Row(
        "our pipeline (fetch, flip, crop, normalise)",
        "per-image torchvision transforms in a DataLoader, best of 0 and 2 workers",
        "images/s",
        8,
        True,
        loader,
    ),
    "fit_overhead": Row(
        "our Trainer.fit, ResNet50 at 32 px, default callbacks and logging",
        "a bare PyTorch loop, same network, batch and precision, batches ready in memory",
        "images/s",
        0.97,
        True,
        fit_overhead,
    ),
    "step_overhead": Row(
        "added to a step by our module, callbacks and loader, tiny network",
        "added by a template's module (torchmetrics and self.log each step), batches ready in memory",
        "us",
        0.4,
        False,
        step_overhead,
    ),
    "stack_32": Row(
        "our defaults, ResNet50 at 32 px",
        "a template's defaults (fp32, NCHW, per-image DataLoader, torchmetrics each step), best of 0 and 2 workers",
        "images/s",
        1.3,
        True,
        stack(32),
    ),
    "stack_128": Row(
        "our defaults, ResNet50 at 128 px", "a template's defaults, as stack_32", "images/s", 1.8, True, stack(128)
    ),
    "probe": Row(
        "ten epochs on a frozen ResNet50 at 96 px without a cache, 2,000 images",
        "the same with data.cache_features=true, building the cache included",
        "s",
        6,
        True,
        probe,
    ),
    "help": Row("train --help", 'python -c "import lightning.pytorch"', "s", 0.25, False, help_text),
    "predict": Row(
        "exported ONNX in ONNX Runtime, 224 px", "the checkpoint in PyTorch, fp32", "images/s", 1.5, True, predict
    ),
    "memory": Row(
        "peak memory of our Trainer.fit, ResNet50 at 32 px", "of a bare PyTorch loop", "MB", 1.15, False, memory
    ),
}
SIDES: dict[str, Callable[[bool], float]] = {
    "memory-fit": memory_fit,
    "memory-loop": memory_loop,
    "onnx": partial(predict_with, ONNX),
    "eager": partial(predict_with, CHECKPOINT),
    **{f"ours-{size}": partial(stack_ours, size) for size in (32, 128)},
    **{f"template-{size}": partial(stack_template, size) for size in (32, 128)},
}
