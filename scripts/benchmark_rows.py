"""Comparisons of scripts/benchmark.py."""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_files as files
import benchmark_fits as fits
import numpy as np
import torch
from bare_loop import bare_steps, peak_mb
from benchmark_fits import BATCH, TemplateModule, TinyNetwork, build
from torch.utils.data import DataLoader
from torchvision.models import resnet50

from cifar10_tl import load_classifier
from cifar10_tl.config.launcher import compose_command
from cifar10_tl.engine.checkpoints import restore
from cifar10_tl.engine.hardware import choose_precision
from cifar10_tl.export import export
from cifar10_tl.io import read_csv
from cifar10_tl.train import train

Pair = tuple[float, float]
Measure = Callable[[int], Pair]  # from the number of the repeat to the values of both sides
STACK_STEPS = {32: 30, 128: 12}
GPU_STEPS = {32: 100, 128: 60, 224: 40}
GPU_GOALS = {32: 0.93, 128: 0.98, 224: 0.98}


class Row(NamedTuple):
    """Comparison of this project (a) with an alternative (b); ``prepare`` gets ``--quick``."""

    prepare: Callable[[bool], Measure]
    unit: str
    a: str
    b: str
    goal: float | None = None  # bound of a / b
    at_least: bool = True


def in_turn(a: Callable[[], float], b: Callable[[], float]) -> Measure:
    """Measure both sides, in odd repeats the second one first, so that drift affects both."""

    def measure(number: int) -> Pair:
        values = {side: side() for side in ((b, a) if number % 2 else (a, b))}
        return values[a], values[b]

    return measure


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def loader(quick: bool) -> Measure:
    _, module, datamodule = build(train_size=3_000 if quick else 9_000)
    usual, num_images = fits.per_image_loaders(datamodule, 32), len(datamodule.splits["train"]) // BATCH * BATCH

    def ours() -> None:
        for batch in datamodule.train_dataloader():
            module.network.preprocess(datamodule.augmented(batch, 0).images)

    def theirs() -> float:
        return max(num_images / seconds_of(lambda: sum(1 for _ in batches)) for batches in usual)  # noqa: B023

    theirs()  # starts the workers
    return in_turn(lambda: num_images / seconds_of(ours), theirs)


def fit_overhead(quick: bool) -> Measure:
    """Alternate steps of Trainer.fit with steps of a plain loop."""
    steps = 8 if quick else 30

    def measure(number: int) -> Pair:
        cfg, module, datamodule = build()
        network, batches = copy.deepcopy(module.network), fits.ready_batches(datamodule, steps)
        plain = bare_steps(network, batches, choose_precision("auto")[0])
        seconds: list[float] = []
        fit = fits.our_fit(cfg, module, datamodule, steps, lambda: seconds.append(seconds_of(lambda: next(plain))))
        return fits.images_per_second(fit), fits.images_per_second([*accumulate(seconds)])

    return measure


def step_overhead(quick: bool) -> Measure:
    """Subtract a plain loop's step from both sides' steps of a network that costs next to nothing."""
    steps, size = 200 if quick else 1000, 16
    # without augmentation, because the batches of the other side are prepared beforehand
    plain_data = (f"data.batch_size={size}", "data.augment.horizontal_flip=false", "data.augment.random_crop_padding=0")

    def measure(number: int) -> Pair:
        cfg, module, datamodule = build(*plain_data, "trainer.precision=32-true", train_size=size * steps + 1000)
        module.network = TinyNetwork()
        batches, template = fits.ready_batches(datamodule, steps), TemplateModule(TinyNetwork(), fused=True)
        plain = fits.microseconds(fits.bare_fit(TinyNetwork(), batches, steps, "32-true"))
        ours, theirs = in_turn(
            lambda: fits.microseconds(fits.our_fit(cfg, module, datamodule, steps)),
            lambda: fits.microseconds(fits.template_fit(template, batches, steps)),
        )(number)
        return ours - plain, theirs - plain

    return measure


def printed_number(*command: str) -> float:
    """Return the number that a Python process prints as its last line."""
    output = subprocess.check_output([sys.executable, *command], text=True, cwd=Path(__file__).parent)
    return float(output.splitlines()[-1])


def in_processes(a: str, b: str, quick: bool) -> Measure:
    """Measure two of ``SIDES`` in processes of their own."""
    flags = ["--quick"] if quick else []
    return in_turn(*(partial(printed_number, "benchmark.py", "--side", side, *flags) for side in (a, b)))


def stack_ours(size: int, quick: bool) -> float:
    return fits.images_per_second(fits.our_fit(*build(f"model.image_size={size}"), STACK_STEPS[size]))


def stack_template(size: int, quick: bool) -> float:
    loaders, fit = fits.per_image_loaders(build()[2], size), partial(fits.template_fit, steps=STACK_STEPS[size])
    return max(fits.images_per_second(fit(TemplateModule(resnet50(num_classes=10)), batches)) for batches in loaders)


def probe(quick: bool) -> Measure:
    """Train a head on a frozen backbone for ten epochs, from the config to the last step."""
    num_images, size = (500, 64) if quick else (2000, 96)

    def seconds(cached: str) -> float:
        folder = tempfile.mkdtemp()
        cfg = compose_command(
            *("train", "experiment=probe", "data=shapes", f"data.train_size={num_images + 200}", "data.val_size=200"),
            *("data.test_size=10", "model.weights=null", f"model.image_size={size}", f"data.cache_features={cached}"),
            *(f"paths.cache_dir={folder}/cache", f"paths.output_dir={folder}/run"),
            *("trainer.enable_progress_bar=false", "test=false", "logistic_regression=false"),
        )
        return seconds_of(lambda: train(cfg))

    train_small_run()  # imports everything
    return in_turn(partial(seconds, "false"), partial(seconds, "true"))


def train_small_run(*overrides: str) -> None:
    """Train for one step to get a checkpoint."""
    sizes = ("data.train_size=60", "data.val_size=20", "data.test_size=20", "data.batch_size=20")
    limits = ("trainer.max_epochs=1", "trainer.devices=1", "trainer.limit_train_batches=1", "test=false")
    folder = (f"paths.output_dir={tempfile.gettempdir()}/run", "trainer.enable_progress_bar=false")
    train(compose_command("train", "experiment=quickstart", *sizes, *limits, *folder, *overrides))


def help_text(quick: bool) -> Measure:
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    commands = (("-m", "cifar10_tl.train", "--help"), ("-c", "import lightning.pytorch"))
    measure = in_turn(*(partial(seconds_of, partial(run, (sys.executable, *command))) for command in commands))
    if not quick:
        measure(0)  # fills the disk cache
    return measure


def predict(quick: bool) -> Measure:
    """Compare an exported model with its checkpoint, in processes whose PyTorch does not keep freed memory."""
    train_small_run("model.image_size=224", "trainer.precision=32-true")
    folder = tempfile.gettempdir()
    files = (
        f"checkpoint={folder}/run/checkpoints/last.ckpt",
        f"output={folder}/model.onnx",
        f"paths.output_dir={folder}/export",
    )
    export(compose_command("export", *files))
    return in_processes("onnx", "eager", quick)


def predict_with(file: str, quick: bool) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (8 if quick else 32, 3, 32, 32), dtype=np.uint8)
    classifier = load_classifier(Path(tempfile.gettempdir()) / file, "cpu")
    seconds = [seconds_of(lambda: classifier.probabilities(pixels)) for _ in range(6)]
    return len(pixels) / statistics.median(seconds[1:])


def decode(kind: str, size: int, quick: bool) -> Measure:
    """List and decode a folder once: into our cache, and by the first epoch of the usual loader."""
    root = files.write_pictures(kind, quick)
    num_images = len(list(root.rglob("*.jpg")))
    sides = (
        lambda: files.folder_data(root, size).prepare_data(),
        lambda: sum(1 for _ in files.usual_loader(root, size)),
    )
    for first in sides:
        first()
    return in_turn(*(lambda side=side: num_images / seconds_of(side) for side in sides))


def folder_epoch(quick: bool) -> Measure:
    root = files.write_pictures("small", quick)
    usual, datamodule = files.usual_loader(root, files.TILE), files.folder_data(root, files.TILE)
    datamodule.prepare_data()
    datamodule.setup()

    def speed(batches: Any) -> float:
        return BATCH * len(batches) / seconds_of(lambda: sum(1 for _ in batches))

    sides = [partial(speed, batches) for batches in (datamodule.train_dataloader(), usual)]
    for first_epoch in sides:
        first_epoch()
    return in_turn(*sides)


def predict_files(quick: bool) -> Measure:
    """Compare load_classifier with a loop that reads a batch by Pillow and then runs the same network."""
    train_small_run(f"model.image_size={files.SIDE}", f"data.native_size={files.SIDE}")
    checkpoint = Path(tempfile.gettempdir()) / "run/checkpoints/last.ckpt"
    pictures = [str(path) for path in files.write_pictures("large", quick).rglob("*.jpg")]
    classify, network = load_classifier(checkpoint, "cpu"), restore(checkpoint)
    sides = (
        lambda: classify(pictures, batch_size=32),
        lambda: files.predict_plainly(network, pictures, files.SIDE, batch_size=32),
    )
    return in_turn(*(lambda side=side: len(pictures) / seconds_of(side) for side in sides))


def folder_memory(quick: bool) -> Measure:
    """Compare the memory of training on all of the small pictures and on a twentieth of them."""
    for name, part in (("all", 1), ("few", 20)):
        root = files.write_pictures("small", quick).rename(Path(tempfile.gettempdir()) / name)
        for number, path in enumerate(root.rglob("*.jpg")):
            if number % part:
                path.unlink()
    return in_processes("memory-all", "memory-few", quick)


def memory_on(name: str, quick: bool) -> float:
    folder = Path(tempfile.gettempdir())
    data = ("data=folder", f"data.root={folder / name}", f"data.cache_dir={folder / 'cache'}", "data.batch_size=16")
    evaluated = ("data.val_size=8", "data.test_size=8", "callbacks=minimal", "report=none")
    run = ("trainer.max_epochs=1", "trainer.enable_progress_bar=false", f"paths.output_dir={tempfile.mkdtemp()}")
    train(compose_command("train", "experiment=quickstart", "model.backbone=resnet18", *data, *evaluated, *run))
    return peak_mb()


def memory_ours(quick: bool) -> float:
    fits.our_fit(*build(), 6)
    return peak_mb()


def memory_bare(quick: bool) -> float:
    return printed_number("bare_loop.py", choose_precision("auto")[0])  # imports neither Lightning nor this project


def build_on_gpu(size: int, batch: int, compiled: bool, *overrides: str) -> tuple[Any, Any, Any]:
    settings = (f"model.image_size={size}", f"data.batch_size={batch}", f"compile={str(compiled).lower()}")
    trainer = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
    return build(*settings, *trainer, *overrides, train_size=GPU_STEPS[size] * batch + 1000)


def gpu_fit(size: int, batch: int, compiled: bool, quick: bool) -> Measure:
    """Compare our fit with the bare loop, both eager or both compiled."""
    device, steps = torch.device("cuda"), GPU_STEPS[size] // (4 if quick else 1)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    cfg, module, datamodule = build_on_gpu(size, batch, compiled)
    network = copy.deepcopy(module.network).to(device)
    network.lay_out_for(device)
    batches = [(x.to(device), y.to(device)) for x, y in fits.ready_batches(datamodule, 10)]
    if compiled:
        network.compile()
    return in_turn(
        lambda: fits.images_per_second(fits.our_fit(cfg, module, datamodule, steps), batch),
        lambda: fits.images_per_second(
            fits.bare_fit(network, islice(cycle(batches), steps), steps, "bf16-mixed"), batch
        ),
    )


def gpu_real(size: int, on_device: bool, quick: bool) -> Measure:
    """Compare our fit on augmented batches with the same fit on one repeated batch."""
    steps, batch = GPU_STEPS[size] // (4 if quick else 1), 512

    def prepared(synthetic: bool) -> Callable[[], float]:
        cfg, module, datamodule = build_on_gpu(size, batch, True, f"data.on_device={str(on_device).lower()}")
        if synthetic:
            repeat_one_batch(datamodule, "cuda")
        return lambda: fits.images_per_second(fits.our_fit(cfg, module, datamodule, steps), batch)

    return in_turn(prepared(False), prepared(True))


def repeat_one_batch(datamodule: Any, device: str) -> None:
    """Replace the training loader by one that yields the same batch, on the device, without augmentation."""
    loader = datamodule.train_dataloader()
    first = next(iter(loader))
    batches = [type(first)(*(x if x is None else x.to(device) for x in first))] * len(loader)
    datamodule.train_dataloader = lambda: DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    datamodule.augmented = lambda batch, epoch: batch


def gpu_scaling(devices: int, quick: bool) -> Measure:
    return in_turn(partial(command_speed, devices, quick), lambda: devices * command_speed(1, quick))


def command_speed(devices: int, quick: bool) -> float:
    """Return the images/s of the train command's second epoch at 224 px with 512 images per GPU."""
    run, train_size = Path(tempfile.mkdtemp(), "run"), (20 if quick else 60) * 512 * devices + 1000
    command = (
        *(sys.executable, "-m", "cifar10_tl.train", "data=shapes", "model.weights=null", "test=false"),
        *("trainer=ddp", f"trainer.devices={devices}", f"data.batch_size={512 * devices}", "trainer.max_epochs=2"),
        *(f"data.train_size={train_size}", "data.val_size=1000", f"paths.output_dir={run}"),
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(read_csv(run / "metrics.csv")[-1]["images_per_second"])


PER_IMAGE = "per-image torchvision transforms in a DataLoader, best of 0 and 2 workers"
TEMPLATE = "a template's defaults (fp32, NCHW, per-image DataLoader, torchmetrics each step), best of 0 and 2 workers"
BARE = "bare PyTorch loop, same network, batch and precision, batches ready in memory"
CACHED = "the same with data.cache_features=true, including building the cache"
STEP = ("added per step by our fit, tiny network", "added by a template's fit: torchmetrics and self.log each step")
MEMORY = ("peak memory of our Trainer.fit, ResNet50 at 32 px", "of a bare PyTorch loop")
FOLDER = "torchvision's ImageFolder, Resize, CenterCrop, ToTensor in a DataLoader with two workers"
PILLOW = "loop that reads a batch with Pillow, then runs the same network"
STACK = {size: partial(in_processes, f"ours-{size}", f"template-{size}") for size in STACK_STEPS}
CPU_ROWS = {
    "loader": Row(loader, "images/s", "our pipeline: fetch, flip, crop, normalize", PER_IMAGE, 8),
    "fit_overhead": Row(fit_overhead, "images/s", "our Trainer.fit, ResNet50 at 32 px", BARE, 0.97),
    "step_overhead": Row(step_overhead, "us", *STEP, 0.4, False),
    "stack_32": Row(STACK[32], "images/s", "our defaults, ResNet50 at 32 px", TEMPLATE, 1.3),
    "stack_128": Row(STACK[128], "images/s", "our defaults, ResNet50 at 128 px", TEMPLATE, 1.8),
    "probe": Row(probe, "s", "ten epochs on a frozen ResNet50 at 96 px, no cache", CACHED, 6),
    "help": Row(help_text, "s", "train --help", 'python -c "import lightning.pytorch"', 0.25, False),
    "predict": Row(predict, "images/s", "exported ONNX in ONNX Runtime, 224 px", "checkpoint in PyTorch, fp32", 1.5),
    "decode_small": Row(partial(decode, "small", files.TILE), "images/s", "data=folder, 64 px JPEG files", FOLDER, 1.0),
    "decode_large": Row(partial(decode, "large", files.SIDE), "images/s", "data=folder, 12 MP JPEG files", FOLDER, 3),
    "folder_epoch": Row(folder_epoch, "images/s", "second epoch of data=folder, 64 px, input only", FOLDER, 10),
    "folder_memory": Row(folder_memory, "MB", "peak memory of training on 20,000 pictures", "on 1,000", 1.05, False),
    "predict_files": Row(predict_files, "images/s", "load_classifier, 12 MP JPEG files, 224 px, CPU", PILLOW, 2),
    "memory": Row(partial(in_processes, "memory-ours", "memory-bare"), "MB", *MEMORY, 1.15, False),
}
SIDES: dict[str, Callable[[bool], float]] = {
    "memory-ours": memory_ours,
    "memory-bare": memory_bare,
    "memory-all": partial(memory_on, "all"),
    "memory-few": partial(memory_on, "few"),
    "onnx": partial(predict_with, "model.onnx"),
    "eager": partial(predict_with, "run/checkpoints/last.ckpt"),
    **{f"ours-{size}": partial(stack_ours, size) for size in STACK_STEPS},
    **{f"template-{size}": partial(stack_template, size) for size in STACK_STEPS},
}
GPU_ROWS: dict[str, Row] = {}
for size, goal in GPU_GOALS.items():
    for batch in (128, 512):
        for kind in ("eager", "compiled"):
            a = f"our Trainer.fit, ResNet50 at {size} px, batch {batch}, bf16, {kind}"
            fit = partial(gpu_fit, size, batch, kind == "compiled")
            GPU_ROWS[f"fit_{kind}_{size}_{batch}"] = Row(fit, "images/s", a, f"{BARE} on the GPU", goal)
    for suffix, place in (("", "in memory"), ("_on_device", "on the GPU")):
        a = f"our Trainer.fit on real batches of 512, images {place}, {size} px"
        real = partial(gpu_real, size, bool(suffix))
        GPU_ROWS[f"real_{size}{suffix}"] = Row(real, "images/s", a, "on one repeated batch", 0.97)
for devices in (n for n in (2, 4, 8) if n <= torch.cuda.device_count()):
    a = f"the train command on {devices} GPUs, 224 px, 512 images each"
    GPU_ROWS[f"scaling_{devices}"] = Row(partial(gpu_scaling, devices), "images/s", a, f"{devices} x its speed on one")
