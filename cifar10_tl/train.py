"""Fine-tune, test the best checkpoint, and leave everything to look at in the run folder.

python -m cifar10_tl.train                                the default recipe on CIFAR-10
python -m cifar10_tl.train experiment=quickstart          a few minutes on two CPU cores, nothing to download
python -m cifar10_tl.train resume=outputs/runs/<stamp>    go on where that run stopped
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifar10_tl.config import process_rank, run_command
from cifar10_tl.errors import UserError, known_arguments
from cifar10_tl.files import atomic_write_text, claim, remove_temporary
from cifar10_tl.interruption import Interruption, Stopped
from cifar10_tl.resume import RUN_CONFIG, resume_command

if TYPE_CHECKING:  # Lightning takes seconds to import: only once the settings are known to be good
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback

    from cifar10_tl.data.datamodule import CIFAR10DataModule
    from cifar10_tl.data.features import FeatureCache
    from cifar10_tl.models.module import LitClassifier

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


def train(cfg: DictConfig) -> dict[str, Any] | None:
    """Run what ``cfg`` says, in the folder ``cfg.paths.output_dir``.

    Returns:
        What results.json holds; None under ``fast_dev_run``, which writes nothing.

    Raises:
        UserError: a setting does not fit the data, the machine or another setting.
    """
    requeue = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else []  # not so under nohup
    run_dir = Path(cfg.paths.output_dir)
    with Interruption(*requeue, *hang_up) as interruption:
        try:
            from cifar10_tl.processes import own_processes
            from cifar10_tl.runtime import quiet_libraries

            quiet_libraries()
            with own_processes(), only_one_run(run_dir):
                return _train(cfg, interruption)
        except Stopped:
            if process_rank() == 0 and (run_dir / RUN_CONFIG).exists():
                log.info("go on with: %s", resume_command(run_dir))
            if process_rank() > 0 and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
                raise SystemExit(0) from None  # for these, another status means that the others are to be killed
            raise


def _train(cfg: DictConfig, interruption: Interruption) -> dict[str, Any] | None:
    import lightning.pytorch as pl

    from cifar10_tl.checkpoints import find_resumable, make_last

    pl.seed_everything(cfg.seed, verbose=False)
    run_dir = Path(cfg.paths.output_dir)
    resumes = bool(cfg.resume) or was_requeued(run_dir)
    if process_rank() == 0 and not resumes and (run_dir / RUN_CONFIG).exists():
        raise UserError(
            f"paths.output_dir={run_dir}: a run lies there; go on with it by resume={run_dir}, or choose another"
        )
    start = find_resumable(run_dir) if resumes else None
    if resumes and process_rank() == 0:
        remove_temporary(run_dir)
        if start is not None:
            make_last(start)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule)
    if start is not None:
        check_same_run(start, module)
    if cfg.init_from and start is None:
        module.load_weights_from(Path(cfg.init_from))
    trainer = build_trainer(cfg, start, interruption)
    check_batch_size(cfg.data.batch_size, trainer.world_size)
    if cfg.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type != "cuda":
        raise UserError("trainer.sync_batchnorm=true is for GPUs; BatchNorm on a CPU has the statistics of its process")
    speed_up(cfg, module, trainer)
    if cfg.data.cache_features:
        datamodule.feature_cache = build_feature_cache(cfg, module, trainer)
    if trainer.is_global_zero:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            atomic_write_text(run_dir / RUN_CONFIG, own_settings(cfg))
        log.info("%s", describe(cfg, module, trainer, start))

    clock = time.perf_counter()
    trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    seconds = {"fit": time.perf_counter() - clock}
    if cfg.test:
        clock = time.perf_counter()
        trainer.test(
            module, datamodule=datamodule, ckpt_path=best_checkpoint(run_dir), weights_only=True, verbose=False
        )
        seconds["test"] = time.perf_counter() - clock
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.info("fast_dev_run: every stage ran; nothing was written")
        return None
    return finish(cfg, module, trainer, seconds)


@contextmanager
def only_one_run(run_dir: Path) -> Iterator[None]:
    """Around a run: no other one may write into its folder meanwhile.

    Raises:
        UserError: another one does.
    """
    with ExitStack() as stack:
        if process_rank() == 0 and run_dir.is_dir() and not stack.enter_context(claim(run_dir)):
            raise UserError(f"{run_dir}: another process is at work in this folder; wait for its end, or stop it")
        yield


def own_settings(cfg: DictConfig) -> str:
    """What the run is, and with which length it was last started: what a resumed run begins with."""
    return OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": None, "trust": False}), resolve=True)


def check_same_run(start: Path, module: LitClassifier) -> None:
    """Complain where the run's settings are no longer those that its checkpoint was made with.

    Raises:
        UserError: naming the first difference.
    """
    from cifar10_tl.checkpoints import read_checkpoint

    for key, value in read_checkpoint(start)["hyper_parameters"].items():
        if key in module.hparams and module.hparams[key] != value:
            raise UserError(
                f"{start} was made with {key}={value}, but {RUN_CONFIG} or its data now say {module.hparams[key]}: put "
                f"that right, or start a new run with init_from={start}"
            )


def was_requeued(run_dir: Path) -> bool:
    """Whether SLURM starts this job again, and it has left a run there."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and (run_dir / RUN_CONFIG).exists()


def best_checkpoint(run_dir: Path) -> Path | None:
    """The best epoch's checkpoint, or the last one where nothing was validated; None where there is no good one."""
    from cifar10_tl.checkpoints import read_checkpoint

    for path in (run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")):
        if path.is_file():
            try:
                read_checkpoint(path)
            except UserError as error:
                log.warning("%s", error)
            else:
                return path
    return None


# ------------------------------------------------------------------------------------------------- from config to parts


def build_datamodule(cfg: DictConfig) -> CIFAR10DataModule:
    """The DataModule of ``cfg.data``."""
    from cifar10_tl.data.datamodule import CIFAR10DataModule

    options = plain(cfg.data)
    options.pop("cache_features")  # no property of the data: see build_feature_cache
    return CIFAR10DataModule(**options, seed=cfg.seed)


def build_module(cfg: DictConfig, datamodule: CIFAR10DataModule) -> LitClassifier:
    """The LightningModule of ``cfg.model``, for the classes of the data."""
    from cifar10_tl.models.backbone import check_weights
    from cifar10_tl.models.module import LitClassifier, find_optimizer, schedule_factor

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


def build_trainer(cfg: DictConfig, start: Path | None = None, interruption: Interruption | None = None) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of ``cfg``, and those that guard every run.

    Args:
        cfg: of the train command.
        start: the checkpoint of a run that is resumed.
        interruption: where the trainer is to heed signals.
    """
    import lightning.pytorch as pl
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import Logger

    from cifar10_tl.callbacks import FiniteLoss, RunProgress, StopOnSignal
    from cifar10_tl.runtime import AtomicCheckpointIO, choose_precision

    flags = instantiate(cfg.trainer, _convert_="all")
    callbacks = [
        *instantiate_all(cfg, "callbacks", Callback),
        FiniteLoss(),
        *weight_average(cfg),
        *step_checkpoint(cfg),
    ]
    if interruption is not None:
        callbacks.append(StopOnSignal(interruption))  # behind those whose state it saves
    if not flags["enable_progress_bar"]:
        callbacks = [c for c in callbacks if not isinstance(c, RunProgress)]
    begun = (Path(cfg.paths.output_dir) / RUN_CONFIG).is_file()
    loggers = instantiate_all(cfg, "logger", Logger, **resume_point(start, begun)) if not flags["fast_dev_run"] else []
    if flags["precision"] == "auto":
        flags["precision"], reason = choose_precision(flags["accelerator"])
        log.info("precision %s: %s", flags["precision"], reason)
    if flags["benchmark"] is None:
        flags["benchmark"] = flags["deterministic"] is False
    for callback in callbacks:
        skip_idle_hooks(callback)
    try:
        return pl.Trainer(
            **flags,
            callbacks=callbacks,
            logger=loggers or False,
            default_root_dir=cfg.paths.output_dir,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # ours knows its rank, and never pads
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        given = ", ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("accelerator", "devices", "strategy"))
        raise UserError(f"{given}: {error} (conf/trainer shows what goes together)") from error


def skip_idle_hooks(callback: Callback) -> None:
    """Take away the hooks of a step in which ``callback`` does nothing.

    Lightning enters its profiler for each callback at each hook, idle or not, which adds up to a tenth of a millisecond
    a step and more; it looks first whether the hook can be called.
    """
    from lightning.pytorch.callbacks import Callback

    for name in STEP_HOOKS:
        if getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback):
            setattr(callback, name, None)


def build_feature_cache(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> FeatureCache:
    """The cache of the features that ``module`` computes on ``trainer``, shared by the processes of a machine."""
    from cifar10_tl.data.features import FeatureCache, Processes

    processes = Processes(trainer.local_rank, trainer.num_devices, trainer.strategy.barrier)
    folder = Path(cfg.paths.cache_dir) / "features"
    return FeatureCache(folder, module.features, module.features_description, processes)


def speed_up(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer) -> None:
    """Choose the faster kernels of the trainer's device, and compile the network where that helps.

    ``Module.compile`` compiles in place: names in checkpoints stay as they are.
    """
    from cifar10_tl.runtime import allow_tf32, choose_compile

    device = trainer.strategy.root_device
    allow_tf32(device)
    compiled, reason = choose_compile(cfg.compile, device)
    if compiled:
        module.network.compile()
    log.info("compile %s: %s", str(compiled).lower(), reason)


def instantiate_all(cfg: DictConfig, group: str, kind: type[Any], **extra: Any) -> list[Any]:
    """The objects of a config group, one an entry; an entry that is null is left out.

    Raises:
        UserError: an entry is none of that ``kind``.
    """
    from hydra.utils import instantiate

    found = []
    for name, entry in (cfg.get(group) or {}).items():
        if entry is None:
            continue
        is_config = isinstance(entry, DictConfig) and "_target_" in entry
        made = instantiate(entry, **extra, _convert_="all") if is_config else entry
        if not isinstance(made, kind):
            raise UserError(
                f"{group}.{name}={made}: this is no {kind.__name__}; _target_ names the class of one, null takes it "
                "away"
            )
        found.append(made)
    return found


def step_checkpoint(cfg: DictConfig) -> list[Callback]:
    """What writes last.ckpt inside epochs, too."""
    from cifar10_tl.callbacks import RunCheckpoint

    every = cfg.checkpoint_every_n_steps
    folder = Path(cfg.paths.output_dir) / "checkpoints"
    options = {"filename": "last", "every_n_train_steps": every, "enable_version_counter": False}
    return [RunCheckpoint(dirpath=folder, **options)] if every else []


def weight_average(cfg: DictConfig) -> list[Callback]:
    """What averages the weights."""
    from cifar10_tl.callbacks import WeightEMA

    decay = cfg.get("ema_decay")
    return [WeightEMA(decay)] if decay else []


def resume_point(start: Path | None, begun: bool) -> dict[str, int]:
    """What makes TensorBoard forget the epochs that were logged but not yet in the checkpoint, which come again.

    Args:
        start: the checkpoint, if there is one.
        begun: whether a run has begun in this folder.
    """
    from cifar10_tl.checkpoints import read_checkpoint

    if start is None:
        return {"purge_step": 0} if begun else {}
    rows = read_checkpoint(start).get("callbacks", {}).get("History", {}).get("rows", [])
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


# ---------------------------------------------------------------------------------------------------- what a run leaves


def finish(cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, seconds: dict[str, float]) -> dict[str, Any]:
    """Write results.json and the HPARAMS, and say where everything is; only rank zero writes."""
    from cifar10_tl.results import write_json, write_predictions

    results = collect_results(cfg, module, trainer, seconds)
    if trainer.is_global_zero:
        run_dir = Path(cfg.paths.output_dir)
        log_hparams(trainer, results)
        write_json(run_dir / "results.json", results)
        if cfg.test:
            assert module.evaluation is not None
            write_predictions(run_dir / "predictions.csv", module.evaluation)
        log.info("%s", summary(results, run_dir))
    return results


def collect_results(
    cfg: DictConfig, module: LitClassifier, trainer: pl.Trainer, seconds: dict[str, float]
) -> dict[str, Any]:
    """What results.json holds."""
    from cifar10_tl.callbacks import History, Throughput
    from cifar10_tl.checkpoints import read_checkpoint
    from cifar10_tl.results import environment

    history = next((c for c in trainer.callbacks if isinstance(c, History)), History())  # type: ignore[attr-defined]
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), Throughput())  # type: ignore[attr-defined]
    best = best_checkpoint(Path(cfg.paths.output_dir))
    best_epoch = read_checkpoint(best)["epoch"] if best else None
    best_row = next((row for row in history.rows if row["epoch"] == best_epoch), {})
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    results: dict[str, Any] = {
        "val": {
            "acc": best_row.get("val/acc"),
            "loss": best_row.get("val/loss"),
            "count": best_row.get("val/count"),
        },
        "best_epoch": best_epoch,
        "epochs": trainer.current_epoch,
        "seconds": {
            **seconds,
            "fit": throughput.earlier_seconds + seconds["fit"],
            "first_step": throughput.first_step_seconds,
        },
        "images_per_second": throughput.images_per_second,
        "class_names": list(module.class_names),
        "config": plain(cfg),
        "environment": environment(
            trainer.strategy.root_device, trainer.world_size, str(trainer.precision_plugin.precision)
        ),
    }
    if cfg.test:
        assert module.evaluation is not None
        check_count(len(module.evaluation), len(datamodule.splits["test"]), cfg.trainer.limit_test_batches)
        results["test"] = module.evaluation.metrics()
        results["confusion_matrix"] = module.evaluation.confusion_matrix.tolist()
    return results


def check_count(count: int, expected: int, limit: Any) -> None:
    """A test that left out images, or counted some twice, must not pass for a result."""
    if limit is None and count != expected:
        raise RuntimeError(f"the test saw {count} of {expected} images")


def log_hparams(trainer: pl.Trainer, results: dict[str, Any]) -> None:
    """Write TensorBoard's HPARAMS: the settings of the run and its test metrics."""
    from torch.utils.tensorboard.summary import hparams

    from cifar10_tl.callbacks.publish import tensorboard_writers
    from cifar10_tl.results import flat

    metrics = {f"test/{k}": v for k, v in results.get("test", {}).items() if k in ("acc", "loss")}
    groups = ("seed", "data", "model", "optimizer", "scheduler", "trainer", "init_from")
    settings = flat({k: v for k, v in results["config"].items() if k in groups})
    for writer in tensorboard_writers(trainer):
        for part in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            writer.add_summary(part)


def summary(results: dict[str, Any], run_dir: Path) -> str:
    """The closing words of a run."""
    val, test = results["val"], results.get("test")
    validated = f"best epoch {results['best_epoch']}, val acc {val['acc']:.2%}" if val["acc"] is not None else None
    best = validated or "nothing was validated"
    lines = ["", f"  {best}"]
    if test:
        lines.append(f"  test acc {test['acc']:.2%}, loss {test['loss']:.4f}, on {test['count']} images")
    lines += [
        f"  figures      {run_dir / 'figures'}",
        f"  numbers      {run_dir / 'results.json'}, {run_dir / 'metrics.csv'}",
        f"  checkpoint   {best_checkpoint(run_dir) or 'none'}",
        f"  TensorBoard  tensorboard --host localhost --logdir {run_dir}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Entry of ``python -m cifar10_tl.train``."""
    run_command("train", train)


if __name__ == "__main__":
    main()
