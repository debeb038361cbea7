"""From a checked configuration to the parts of a run: data, module, trainer and what goes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from cifar10_tl.callbacks import GracefulStop, NaNGuard, RunCheckpoint, RunProgressBar, WeightEMA
from cifar10_tl.config.errors import UserError, known_arguments
from cifar10_tl.config.run_dir import RUN_CONFIG
from cifar10_tl.data.datamodule import CIFAR10DataModule
from cifar10_tl.data.feature_cache import FeatureCache, Processes
from cifar10_tl.engine.checkpoints import AtomicCheckpointIO, read_checkpoint
from cifar10_tl.engine.hardware import choose_compile, choose_precision, tune_for
from cifar10_tl.engine.processes import SignalHandler
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.optim import find_optimizer, schedule_factor
from cifar10_tl.models.weights import check_weights

log = logging.getLogger(__name__)


#: What Lightning calls of every callback in every training step.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def build_datamodule(cfg: DictConfig) -> CIFAR10DataModule:
    """The DataModule of ``cfg.data``."""
    options = plain(cfg.data)
    options.pop("cache_features")  # no property of the data: see build_feature_cache
    return CIFAR10DataModule(**options, seed=cfg.seed)


def build_module(cfg: DictConfig, datamodule: CIFAR10DataModule) -> LitClassifier:
    """The LightningModule of ``cfg.model``, for the classes of the data."""
    check_weights(cfg.model.backbone, cfg.model.weights)  # now, rather than after the data was fetched
    find_optimizer(cfg.optimizer.name)
    schedule_factor(plain(cfg.scheduler), num_steps=1)
    own = {
        "class_names": datamodule.class_names,
        "native_size": cfg.data.get("native_size", 32),
        "optimizer": plain(cfg.optimizer),
        "scheduler": plain(cfg.scheduler),
        "seed": cfg.seed,
    }
    return LitClassifier(**own, **known_arguments(LitClassifier, plain(cfg.model), "model", taken=own))


def build_trainer(cfg: DictConfig, start: Path | None = None, handler: SignalHandler | None = None) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of ``cfg``, and those that guard every run.

    Args:
        cfg: of the train command.
        start: the checkpoint of a run that is resumed.
        handler: where the trainer is to heed signals.

    Raises:
        UserError: Lightning cannot make such a trainer, or the batch does not fit its devices.
    """
    callbacks = build_callbacks(cfg, handler)
    try:
        trainer = pl.Trainer(
            **trainer_flags(cfg),
            callbacks=callbacks,
            logger=build_loggers(cfg, start) or False,
            default_root_dir=cfg.paths.output_dir,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # ours knows its rank, and never pads
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        given = ", ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("accelerator", "devices", "strategy"))
        raise UserError(f"{given}: {error} (conf/trainer shows what goes together)") from error
    check_batch_size(cfg.data.batch_size, trainer.world_size)
    if cfg.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type != "cuda":
        raise UserError("trainer.sync_batchnorm=true is for GPUs; BatchNorm on a CPU has the statistics of its process")
    return trainer


def trainer_flags(cfg: DictConfig) -> dict[str, Any]:
    """The arguments in ``cfg.trainer``, with what "auto" and null stand for on this machine."""
    flags: dict[str, Any] = instantiate(cfg.trainer, _convert_="all")
    if flags["precision"] == "auto":
        flags["precision"], reason = choose_precision(flags["accelerator"])
        log.info("precision %s: %s", flags["precision"], reason)
    if flags["benchmark"] is None:
        flags["benchmark"] = flags["deterministic"] is False
    return flags


def build_callbacks(cfg: DictConfig, handler: SignalHandler | None) -> list[Callback]:
    """Those of the config, and those that settings and every run want; in the order in which they are called."""
    callbacks: list[Callback] = [*instantiate_all(cfg.get("callbacks"), "callbacks", Callback), NaNGuard()]
    if decay := cfg.get("ema_decay"):
        callbacks.append(WeightEMA(decay))
    if every := cfg.checkpoint_every_n_steps:
        folder = Path(cfg.paths.output_dir) / "checkpoints"
        options = {"filename": "last", "every_n_train_steps": every, "enable_version_counter": False}
        callbacks.append(RunCheckpoint(dirpath=folder, **options))
    if handler is not None:
        callbacks.append(GracefulStop(handler))  # behind those whose state it saves
    if not cfg.trainer.enable_progress_bar:
        callbacks = [c for c in callbacks if not isinstance(c, RunProgressBar)]
    for callback in callbacks:
        skip_idle_hooks(callback)
    return callbacks


def build_loggers(cfg: DictConfig, start: Path | None) -> list[Logger]:
    """Those of the config, TensorBoard's told where a resumed run goes on; none for a ``fast_dev_run``."""
    if cfg.trainer.fast_dev_run:
        return []
    point = resume_point(start, begun=(Path(cfg.paths.output_dir) / RUN_CONFIG).is_file())
    entries = plain(cfg.logger) if cfg.get("logger") else {}
    for entry in entries.values():
        if isinstance(entry, dict) and str(entry.get("_target_")).endswith("TensorBoardLogger"):
            entry.update(point)
    return instantiate_all(entries, "logger", Logger)


def skip_idle_hooks(callback: Callback) -> None:
    """Take away the hooks of a step in which ``callback`` does nothing.

    Lightning enters its profiler for each callback at each hook, idle or not, which adds up to a tenth of a millisecond
    a step and more; it looks first whether the hook can be called.
    """
    for name in STEP_HOOKS:
        if getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback):
            setattr(callback, name, None)


def build_feature_cache(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> FeatureCache:
    """The cache of the features that ``module`` computes on ``trainer``, shared by the processes of a machine."""
    processes = Processes(trainer.local_rank, trainer.num_devices, trainer.strategy.barrier)
    folder = Path(cfg.paths.cache_dir) / "features"
    return FeatureCache(folder, module.features, module.features_description, processes)


def speed_up(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> None:
    """Choose what is faster on the trainer's device, and compile the network where that helps.

    ``Module.compile`` compiles in place: names in checkpoints stay as they are.
    """
    device = trainer.strategy.root_device
    tune_for(device, module.network)
    compiled, reason = choose_compile(cfg.compile, device)
    if compiled:
        module.network.compile()
    log.info("compile %s: %s", str(compiled).lower(), reason)


def instantiate_all(entries: Mapping[str, Any] | None, group: str, kind: type[Any]) -> list[Any]:
    """The objects of the config group ``group``, one an entry; an entry that is null is left out.

    Raises:
        UserError: an entry is none of that ``kind``.
    """
    found = []
    for name, entry in (entries or {}).items():
        if entry is None:
            continue
        is_config = isinstance(entry, Mapping | DictConfig) and "_target_" in entry
        made = instantiate(entry, _convert_="all") if is_config else entry
        if not isinstance(made, kind):
            raise UserError(
                f"{group}.{name}={made}: this is no {kind.__name__}; _target_ names the class of one, null takes it "
                "away"
            )
        found.append(made)
    return found


def resume_point(start: Path | None, begun: bool) -> dict[str, int]:
    """What makes TensorBoard forget the epochs that were logged but not yet in the checkpoint, which come again.

    Args:
        start: the checkpoint, if there is one.
        begun: whether a run has begun in this folder.
    """
    if start is None:
        return {"purge_step": 0} if begun else {}
    rows = read_checkpoint(start).get("callbacks", {}).get("MetricsLogger", {}).get("rows", [])
    return {"purge_step": rows[-1]["epoch"] + 1 if rows else 0}


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Complain of a global batch that cannot be shared evenly.

    Raises:
        UserError: with the nearest sizes that can.
    """
    below = batch_size // world_size * world_size
    if below != batch_size:
        near = " or ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(
            f"data.batch_size={batch_size} is for all devices together and cannot be divided over {world_size}: "
            f"choose {near}"
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A group of settings as plain dicts, lists and values: what may travel in a checkpoint."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return container


def describe(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, start: Path | None) -> str:
    """What is about to run, in a line."""
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    parts = [
        f"{cfg.model.backbone} ({cfg.model.weights or 'random weights'}, {cfg.model.image_size} px)",
        f"{cfg.model.head.name} head",
        f"{learning / 1e6:.1f} M parameters to learn",
        f"data {cfg.data.source}",
        f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        f"going on from {start}" if start else f"run folder {cfg.paths.output_dir}",
    ]
    return ", ".join(parts)
