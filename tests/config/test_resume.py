from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers import compose_train
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.resume import is_trusted, resume_command, resumed_config
from cifar10_tl.config.run_dir import RUN_CONFIG


def test_a_resumed_run_keeps_its_settings_but_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    own = compose_train("optimizer.lr=0.5", "data.batch_size=32", f"paths.output_dir={tmp_path}")
    (tmp_path / RUN_CONFIG).write_text(OmegaConf.to_yaml(own, resolve=True))
    given = [f"resume='~/{tmp_path.name}'", "trainer.max_epochs=99", "test=false"]
    cfg = resumed_config(compose_train(*given), given)
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.max_epochs, cfg.test) == (0.5, 32, 99, False)
    assert (cfg.paths.output_dir, cfg.resume) == (str(tmp_path), str(tmp_path))
    assert "trainer.max_epochs: 40 -> 99" in caplog.text
    for override in ("optimizer.lr=1", "init_from=some.ckpt", "trainer.limit_train_batches=4"):
        with pytest.raises(UserError, match=rf"{override}: a resumed run keeps its own settings"):
            resumed_config(compose_train(*given), [*given, override])
    own = compose_train("data=folder", "data.root=a", "paths.cache_dir=b", f"paths.output_dir={tmp_path}")
    (tmp_path / RUN_CONFIG).write_text(OmegaConf.to_yaml(own, resolve=True))
    moved = resumed_config(compose_train(*given, "paths.cache_dir=c"), [*given, "paths.cache_dir=c"])
    assert (moved.paths.cache_dir, moved.data.cache_dir) == ("c", "c")
    moved = resumed_config(compose_train(*given, "+data.labels=b.csv"), [*given, "+data.labels=b.csv"])
    assert moved.data.labels == "b.csv"
    own.budget = "10min"
    (tmp_path / RUN_CONFIG).write_text(OmegaConf.to_yaml(own, resolve=True))
    with pytest.raises(UserError, match=r"trainer\.max_epochs=99: budget=10min sets it; use init_from="):
        resumed_config(compose_train(*given), given)
    with pytest.raises(UserError, match="contains no run"):
        resumed_config(compose_train("resume=nowhere"), ["resume=nowhere"])


def test_settings_that_are_named_like_a_moved_folder_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = compose_train("paths.output_dir=lstm", "model/head=lstm")
    Path("moved").mkdir()
    Path("moved", RUN_CONFIG).write_text(OmegaConf.to_yaml(own, resolve=True))
    cfg = resumed_config(compose_train("resume=moved"), ["resume=moved"])
    assert (cfg.model.head.name, cfg.paths.output_dir) == ("lstm", "moved")
    assert (cfg.callbacks.best_checkpoint.dirpath, cfg.logger.tensorboard.save_dir) == ("moved/checkpoints", "moved")


@pytest.mark.parametrize(
    "name",
    [
        *("run", "a b", "a=b", "a,b", "it's", 'a"b', "a\\b", "a\\", "[x]", "{x: 1}", "$HOME", "~x", "-m", "ü", "1"),
        *("null", "True", "a;b", "outputs/runs/2026-01-01_00-00-00_1"),
    ],
)
def test_the_resume_command_is_parsed_by_shell_and_hydra(name: str) -> None:
    typed = shlex.split(resume_command(Path(name)))
    assert typed[:3] == ["python", "-m", "cifar10_tl.train"]
    (override,) = OverridesParser.create().parse_overrides(typed[3:])
    assert override.key_or_group == "resume"
    assert Path(str(override.value())) == Path(f"./{name}")


TRUSTED = ("cifar10_tl.callbacks.Curves", "lightning.pytorch.callbacks.LearningRateMonitor", "torch.optim.SGD")
TRUSTED += ("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.strategies.DDPStrategy")
TRUSTED += ("torch.profiler.schedule",)  # type: ignore[assignment]
UNTRUSTED = ("os.system", "torch.load", "cifar10_tl.io.atomic_write_text", "cifar10_tl.io.Path", "cifar10_tlx.Thing")
UNTRUSTED += ("lightning.pytorch.callbacks.model_checkpoint.os.system", ["os.system"])  # type: ignore[assignment]
UNTRUSTED += ("torch.profiler.schedule.x", "torch.profiler.profiler.os.system")  # type: ignore[assignment]


def test_only_classes_of_trusted_packages_are_trusted() -> None:
    assert all(map(is_trusted, TRUSTED))
    assert not any(map(is_trusted, UNTRUSTED))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: ${oc.create:{_target_:shutil.rmtree,path:/nowhere}}", r"config\.yaml: x holds \$\{\.\.\.\}"),
        ("x: ${oc.env:HOME}", "holds"),
        ("x: !!python/object/apply:os.system [ls]", "is damaged"),
        ("x: [1, 2", "is damaged"),
        ("x: 1\nx: 2", "is damaged"),
        ("\0\x81", "is damaged"),
        *((text, "alone") for text in ("", "paths: null", "paths: {output_dir: 7}")),
    ],
)
def test_a_damaged_run_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    config = OmegaConf.to_yaml(compose_train(f"paths.output_dir={tmp_path}"), resolve=True)
    (tmp_path / RUN_CONFIG).write_text(text if message == "alone" else f"{config}{text}\n")
    given = [f"resume={tmp_path}"]
    with pytest.raises(UserError, match="is damaged" if message == "alone" else message):
        resumed_config(compose_train(*given), given)
