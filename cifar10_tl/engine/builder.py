"""Objects of a run, built from its validated config."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from cifar10_tl.callbacks import (
    GracefulStop,
    GradientFlow,
    NaNGuard,
    RunCheckpoint,
    RunProgressBar,
    TimeBudget,
    WeightEMA,
)
from cifar10_tl.config.errors import UserError, known_arguments
from cifar10_tl.data.datamodule import CIFAR10DataModule, origin
from cifar10_tl.data.feature_cache import FeatureCache
from cifar10_tl.engine.checkpoints import RunCheckpointIO
from cifar10_tl.engine.hardware import choose_compile, choose_precision, device_name, tune_for
from cifar10_tl.engine.logistic_regression import LogisticRegression
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.optim import find_optimizer, schedule_factor
from cifar10_tl.models.weights import load_safely

log = logging.getLogger(__name__)

#: Hooks that Lightning calls in every training step.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def build_datamodule(cfg: DictConfig) -> CIFAR10DataModule:
    """Build the DataModule of ``cfg.data``."""
    options = plain(cfg.data)
    options.pop("cache_features")  # see build_feature_cache
    return CIFAR10DataModule(**options, seed=cfg.seed)


def build_module(cfg: DictConfig, datamodule: CIFAR10DataModule) -> LitClassifier:
    """Build the LightningModule of ``cfg.model`` for the classes of the data, after checking its settings."""
    find_optimizer(cfg.optimizer.name)
    schedule_factor(plain(cfg.scheduler), num_steps=1)
    own = {
        "class_names": datamodule.class_names,
        "native_size": getattr(datamodule.source, "native_size", 32),
        "fit": getattr(datamodule.source, "fit", "crop"),
        "optimizer": plain(cfg.optimizer),
        "scheduler": plain(cfg.scheduler),
        "seed": cfg.seed,
    }
    return LitClassifier(**own, **known_arguments(LitClassifier, plain(cfg.model), "model", taken=own))


def build_trainer(
    cfg: DictConfig,
    handler: SignalHandler | None = None,
    checkpoint_io: RunCheckpointIO | None = None,
    first_epoch: int = 0,
    started: float | None = None,
) -> pl.Trainer:
    """Build the Trainer of ``cfg``.

    ``first_epoch`` is the first one that is not complete in a resumed run, and ``started`` the ``time.perf_counter()``
    at the start of the run (default: now).
    """
    callbacks = build_callbacks(cfg, handler, started)
    try:
        trainer = pl.Trainer(
            **trainer_arguments(cfg),
            callbacks=callbacks,
            logger=build_loggers(cfg, first_epoch) or False,
            default_root_dir=cfg.paths.output_dir,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            plugins=[checkpoint_io or RunCheckpointIO()],
            use_distributed_sampler=False,  # BatchSampler is distributed and does not pad
            inference_mode=False,  # as in the validation of a fit, whose compiled graphs the test uses, too
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        given = ", ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("accelerator", "devices", "strategy"))
        raise UserError(f"{given}: {error}") from error
    # with max_steps, a resumed run would end a complete epoch again (Lightning issue 19617)
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    check_processes(trainer)
    check_batch_size(cfg.data.batch_size, trainer.world_size)
    if cfg.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type != "cuda":
        raise UserError("trainer.sync_batchnorm=true requires GPUs; use trainer.sync_batchnorm=false on a CPU")
    return trainer


def trainer_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the Trainer in ``cfg.trainer``, with "auto" and null resolved for this machine."""
    arguments: dict[str, Any] = instantiate(cfg.trainer, _convert_="all")
    if arguments["precision"] == "auto":
        arguments["precision"], reason = choose_precision(arguments["accelerator"])
        log.info("precision %s: %s", arguments["precision"], reason)
    if arguments["benchmark"] is None:
        arguments["benchmark"] = arguments["deterministic"] is False
    return arguments


def build_callbacks(cfg: DictConfig, handler: SignalHandler | None, started: float | None) -> list[Callback]:
    """Build the callbacks of ``cfg.callbacks`` and those of other settings, in the order in which they are called."""
    callbacks: list[Callback] = [*instantiate_all(cfg.get("callbacks"), "callbacks", Callback), NaNGuard()]
    callbacks.append(RunHeader(cfg))
    if cfg.get("budget") and not cfg.trainer.fast_dev_run:
        started = time.perf_counter() if started is None else started
        callbacks.insert(0, TimeBudget(cfg.budget, started, cfg.test))  # before others that read the number of epochs
    if decay := cfg.get("ema_decay"):
        callbacks.append(WeightEMA(decay, cfg.get("ema_bn_batches", 0)))
    if cfg.get("logistic_regression") and not cfg.trainer.fast_dev_run:
        callbacks.append(LogisticRegression(cfg.test))
    if cfg.get("gradient_flow"):
        callbacks.append(GradientFlow())
    if every := cfg.checkpoint_every_n_steps:
        folder = Path(cfg.paths.output_dir) / "checkpoints"
        options = {"filename": "last", "every_n_train_steps": every, "enable_version_counter": False}
        callbacks.append(RunCheckpoint(dirpath=folder, **options))
    if handler is not None:
        callbacks.append(GracefulStop(handler))  # after the callbacks whose state it saves
    if not cfg.trainer.enable_progress_bar:
        callbacks = [c for c in callbacks if not isinstance(c, RunProgressBar)]
    for callback in callbacks:
        skip_idle_hooks(callback)
    return callbacks


def build_loggers(cfg: DictConfig, first_epoch: int) -> list[Logger]:
    """Build the loggers of ``cfg.logger``, none for a ``fast_dev_run``.

    TensorBoard discards what an earlier start of the run has logged for ``first_epoch`` and later ones.
    """
    if cfg.trainer.fast_dev_run:
        return []
    entries = plain(cfg.logger) if cfg.get("logger") else {}
    for entry in entries.values():
        if isinstance(entry, dict) and str(entry.get("_target_")).endswith(".RunTensorBoardLogger"):
            entry["purge_step"] = first_epoch
    return instantiate_all(entries, "logger", Logger)


def next_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return the first epoch that is not complete in a checkpoint; 0 without one."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]) if checkpoint else 0


def skip_idle_hooks(callback: Callback) -> None:
    """Disable the step hooks that a callback of this project does not implement.

    Lightning profiles each hook of each callback, which takes up to 0.1 ms per step even if the hook does nothing.
    """
    if not type(callback).__module__.startswith("cifar10_tl."):
        return
    for name in STEP_HOOKS:
        if getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback):
            setattr(callback, name, None)


def build_feature_cache(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> FeatureCache:
    """Build the cache of the backbone's features, shared by the processes of this machine."""
    folder = Path(cfg.paths.cache_dir) / "features"
    return FeatureCache(folder, module.features, module.features_description, trainer)


def speed_up(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> None:
    """Prepare the network for the device of the trainer, and compile it where that is faster."""
    device = trainer.strategy.root_device
    tune_for(device, module.network, trainer.num_devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Lightning counts the cores
    if trainer.precision == "64-true":  # Lightning restores a checkpoint before it converts the module
        module.double()
    is_cached = cfg.data.get("cache_features")
    compiled, reason = (False, "the features are cached") if is_cached else choose_compile(cfg.compile, device)
    if compiled:
        torch.compiler.reset()  # graphs of an earlier run in this process count against the limit
        num_sizes = len(module.image_sizes)
        torch._dynamo.config.recompile_limit += num_sizes - 1  # compiled once per size
        # else a smaller batch of validation would make the graphs of later sizes dynamic
        dynamic = False if num_sizes > 1 else None
        module.network.compile(dynamic=dynamic)  # in place: the names in checkpoints do not change
    log.info("compile %s: %s", str(compiled).lower(), reason)


def instantiate_all(entries: Mapping[str, Any] | None, group: str, kind: type[Any]) -> list[Any]:
    """Instantiate the entries of a config group that are not null, each of which must be a ``kind``."""
    instances = []
    for name, entry in (entries or {}).items():
        is_config = isinstance(entry, Mapping | DictConfig) and "_target_" in entry
        instance = instantiate(entry, _convert_="all") if is_config else entry
        if isinstance(instance, kind):
            instances.append(instance)
        elif instance is not None:
            raise UserError(f"{group}.{name}={instance}: must be a {kind.__name__} (_target_ names its class) or null")
    return instances


def check_processes(trainer: pl.Trainer) -> None:
    """Check that SLURM or torchrun has started one process per device."""
    devices, nodes = trainer.num_devices, trainer.num_nodes
    launcher = "WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_STEP_NUM_TASKS"
    started = max(trainer.world_size, int(os.environ.get(launcher, 1)))  # an interactive step of SLURM has one task
    if started != devices * nodes:
        raise UserError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: {started} processes were started instead of "
            f"{devices * nodes}; start one per device (see docs/scaling.md), or correct these settings"
        )


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Check that the global batch can be divided over the devices."""
    below = batch_size // world_size * world_size
    if below != batch_size:
        nearest = " or ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(
            f"data.batch_size={batch_size}: the global batch is not divisible by {world_size} devices; use {nearest}"
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as dicts, lists and values that a checkpoint may contain."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return container


class RunHeader(Callback):
    """Callback that logs the header of a run."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the header, now that the data are loaded."""
        if not trainer.is_global_zero:
            return
        log.info("%s", describe(self.cfg, trainer, pl_module))
        start, datamodule = self.cfg.get("init_from"), trainer.datamodule  # type: ignore[attr-defined]
        if start and not self.cfg.resume and (seen := seen_splits(Path(start), datamodule)):
            log.warning(
                "init_from=%s: was trained on another split of these images: accuracies on %s may be too high",
                *(start, " and ".join(seen)),
            )


def seen_splits(checkpoint: Path, datamodule: CIFAR10DataModule) -> list[str]:
    """Return which of val and test may contain images that the network of a checkpoint was trained on."""
    content, options = load_safely(checkpoint), datamodule.hparams
    before = content.get("datamodule_hyper_parameters", {})
    is_same_split = all(before.get(key) == options.get(key) for key in ("val_size", "test_size", "split_seed"))
    if origin(before) != origin(options) or (is_same_split and before.get("image_limit") != options["image_limit"]):
        return []  # a limit applies after the split
    changed = datamodule.changed_splits(content.get(CIFAR10DataModule.__qualname__, {}))
    has_own_test = options["source"] in ("cifar10", "shapes")
    return [name for name in changed if name == "val" or (name == "test" and not has_own_test)]


def describe(cfg: DictConfig, trainer: Any, module: LitClassifier) -> str:
    """Return the header of a run."""
    images = ", ".join(f"{len(trainer.datamodule.splits[name]):,} {name}" for name in ("train", "val", "test"))
    sizes = " -> ".join(str(size) for _, size in module.image_sizes)
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad is trained) for trained in (True, False)]
    epochs = f"as many epochs as fit in {cfg.budget}" if cfg.get("budget") else f"epochs: {trainer.max_epochs}"
    lines = {
        "data": f"{cfg.data.source}: {images} images of {len(module.class_names)} classes",
        "network": f"{cfg.model.backbone}, {cfg.init_from or cfg.model.weights or 'random weights'}, {sizes} px, "
        f"{cfg.model.head.name} head: {counts[0]:,} trainable and {counts[1]:,} frozen parameters",
        "training": f"{epochs}, {cfg.data.batch_size} images per step, {cfg.optimizer.name}, lr {cfg.optimizer.lr:g}",
        "device": f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}, {trainer.precision}",
    }
    return "\n".join(["", *(f"  {name:<12} {line}" for name, line in lines.items())])
