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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # for a checkout that is not installed

Pairs = list[tuple[float, float]]
BATCH = 128
CHECKPOINT, ONNX = "run/checkpoints/last.ckpt", "model.onnx"
TRAINING_IMAGES = 45_000  # of CIFAR-10, without those held out for validation


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        a: our side.
        b: the other.
        unit: of both.
        goal: a bound of the ratio a / b.
        at_least: whether the goal is a lower bound.
        measure: repeats and --quick -> a pair a repeat.
    """

    a: str
    b: str
    unit: str
    goal: float | None
    at_least: bool
    measure: Callable[[int, bool], Pairs]


# ----------------------------------------------------------------------------------------------------- what is measured


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
            "data.augment.flip=false",  # the template's batches lie ready
            "data.augment.crop_padding=0",
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


ROWS = {
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


# ----------------------------------------------------------------------------------------------------------- both sides


def compose(*overrides: str, name: str = "train") -> Any:
    """The config of a command."""
    import hydra

    from cifar10_tl.checks import check_config
    from cifar10_tl.config import CONFIG_DIR, register_resolvers

    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose(name, overrides=list(overrides))
    check_config(cfg)
    return cfg


def run(cfg: Any) -> None:
    """The train command."""
    from cifar10_tl.train import train

    train(cfg)


def small_run(folder: str, *overrides: str) -> Any:
    """The config of a run of one step, for its checkpoint."""
    sizes = ("data.train_size=60", "data.val_size=20", "data.test_size=20", "data.batch_size=20")
    return compose(
        "experiment=quickstart",
        *sizes,
        "trainer.max_epochs=1",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "trainer.limit_train_batches=1",
        f"paths.output_dir={folder}/run",
        "test=false",
        *overrides,
    )


def parts(*overrides: str) -> tuple[Any, Any, Any]:
    """Config, module and data of our defaults, but for random weights and 32 px, with the images drawn."""
    from cifar10_tl.parts import build_datamodule, build_module
    from cifar10_tl.runtime import quiet_libraries

    quiet_libraries()
    folder = tempfile.mkdtemp(dir=os.environ["BENCHMARK_FOLDER"])
    size = next((o.split("=")[1] for o in overrides if o.startswith("data.train_size")), "5000")
    cfg = compose(
        "data=shapes",
        "data.val_size=1000",
        "data.test_size=10",
        "model.weights=null",
        "model.image_size=32",
        "model.label_smoothing=0",
        "optimizer.backbone_lr_scale=1",
        "trainer.max_epochs=1",
        "trainer.devices=1",
        "trainer.limit_val_batches=1",
        "trainer.enable_progress_bar=false",
        f"data.train_size={size}",
        f"paths.output_dir={folder}",
        *(o for o in overrides if not o.startswith("data.train_size")),
    )
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    datamodule.setup()
    return cfg, module, datamodule


def precision() -> str:
    """What trainer.precision=auto stands for here."""
    from cifar10_tl.runtime import choose_precision

    return choose_precision("auto")[0]


def numpy_images(datamodule: Any) -> tuple[Any, list[int]]:
    """The training images as torchvision's data sets keep them: uint8 [N, H, W, 3], and a list of labels."""
    train = datamodule.splits["train"]
    return train.images.permute(0, 2, 3, 1).contiguous().numpy(), train.labels.tolist()


def ready_batches(datamodule: Any, steps: int) -> list[tuple[Any, Any]]:
    """Augmented uint8 batches and their labels, for ``steps`` steps."""
    found: list[tuple[Any, Any]] = []
    epoch = 0
    while len(found) < steps:
        for batch in datamodule.train_dataloader():
            augmented = datamodule.augmented(batch, epoch)
            found.append((augmented.images, augmented.targets))
        epoch += 1
    return found[:steps]


def our_fit(
    cfg: Any, module: Any, datamodule: Any, steps: int, between: Callable[[], Any] = lambda: None
) -> list[float]:
    """The time at the end of each step of Trainer.fit, with all that the train command puts around it.

    ``between`` is called after each step, and takes no time.
    """
    from cifar10_tl.interruption import Interruption
    from cifar10_tl.models.network import TransferResNet
    from cifar10_tl.parts import build_trainer, speed_up

    if steps > len(datamodule.splits["train"]) // cfg.data.batch_size:
        raise ValueError(f"{steps} steps are more than an epoch: its end would be timed, too")
    cfg.trainer.limit_train_batches = steps
    with Interruption() as interruption:
        trainer = build_trainer(cfg, interruption=interruption)
        if isinstance(module.network, TransferResNet):
            speed_up(cfg, module, trainer)
        return clocked(trainer, steps, lambda: trainer.fit(module, datamodule=datamodule), between)


def template_fit(module: Any, batches: Any, steps: int) -> list[float]:
    """As :func:`our_fit`, with a Trainer as a template sets it up: a logger, a checkpoint an epoch; no progress bar."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    folder = tempfile.mkdtemp(dir=os.environ["BENCHMARK_FOLDER"])
    loader = DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        logger=pl.loggers.TensorBoardLogger(folder),
    )
    return clocked(trainer, steps, lambda: trainer.fit(module, loader))


def clocked(trainer: Any, steps: int, fit: Callable[[], Any], between: Callable[[], Any] = lambda: None) -> list[float]:
    """The time at the end of each training step of ``fit``; where the clock starts and stops, the device is done.

    The clock stands still while ``between`` is called, after each step.
    """
    import lightning.pytorch as pl

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.between = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if len(self.times) in (warm_up(steps), steps - 1):
                synchronize(pl_module.device)
            now = time.perf_counter()
            self.times.append(now - self.between)
            between()
            self.between += time.perf_counter() - now

    clock = Clock()
    trainer.callbacks.append(clock)
    fit()
    return clock.times


def synchronize(device: Any) -> None:
    """Wait until a GPU has done its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tiny_network() -> Any:
    """uint8 images to logits, in as few operations as can learn."""
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Identity()
            self.head = nn.Linear(3, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(images.float().mean((2, 3)) / 255)

    return Tiny()


# -------------------------------------------------------------------------------------------------------------- numbers


def in_turn(number: int, a: Callable[[], float], b: Callable[[], float]) -> tuple[float, float]:
    """Both sides, every other time the second one first: what drifts, drifts for both."""
    if number % 2:
        second = b()
        return a(), second
    return a(), b()


def warm_up(steps: int) -> int:
    """Steps to leave out at the start: a fifth, at most ten."""
    return min(10, max(1, steps // 5))


def images_per_second(times: Sequence[float], batch: int) -> float:
    """Of steps that ended at ``times``, the first ones left out."""
    first = warm_up(len(times))
    return batch * (len(times) - 1 - first) / (times[-1] - times[first])


def microseconds(times: Sequence[float]) -> float:
    """A step, the median of those that ended at ``times``, the first ones left out."""
    kept = times[warm_up(len(times)) :]
    return 1e6 * statistics.median(b - a for a, b in pairwise(kept))


def seconds_of(action: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def per_second(action: Callable[[], int]) -> float:
    """What it counts, a second."""
    start = time.perf_counter()
    count = action()
    return count / (time.perf_counter() - start)


def peak_mb() -> float:
    """Peak resident memory of this process so far, in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux lets ru_maxrss begin with the parent's
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


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


# ---------------------------------------------------------------------------------------------------------- the command


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
    parser.add_argument("--only", action="append", metavar="NAME", help=f"one of {', '.join(ROWS)}; repeat for more")
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
        return ROWS
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

    from cifar10_tl.results import environment

    found = environment(torch.device("cuda" if has_gpu() else "cpu"), max(1, torch.cuda.device_count()), precision())
    yield ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (
        f"{found['device']}{f' x {torch.cuda.device_count()}' if has_gpu() else ''}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {platform.system()}, precision auto = {precision()}"
    )


def child(*arguments: str) -> Any:
    """What this script, started anew with these arguments, printed as its last line."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def result_line(value: Any) -> int:
    """Print a value for :func:`child`; exit status 0."""
    print(json.dumps(value))
    return 0


if __name__ == "__main__":
    sys.exit(main())
