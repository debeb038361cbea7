from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import compose_command
from hydra import initialize_config_dir

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.engine.builder import plain
from cifar10_tl.engine.settings import changed_options, changed_settings, flat, repeat_command


def composed(folder: Path, *overrides: str, command: str = "train") -> dict[str, Any]:
    return plain(compose_command(command, *overrides, f"paths.output_dir={folder}"))


def test_settings_of_the_experiment_and_the_command_line_differ_from_the_defaults(tmp_path: Path) -> None:
    config = composed(tmp_path, "experiment=partial", "optimizer.lr=0.5", "callbacks.curves=null", "data.root=pets")
    expected = {"model.freeze": "layer3", "trainer.max_epochs": 15, "optimizer.lr": 0.5, "data.root": "pets"}
    found = changed_settings(config | {"resume": str(tmp_path), "trust": True})
    assert found == expected | {"callbacks.curves": None}
    assert changed_settings(composed(tmp_path)) == {}
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):  # as within a command
        assert changed_settings(config) == found


def test_options_of_groups_are_named_instead_of_their_settings(tmp_path: Path) -> None:
    config = composed(tmp_path, "data=folder", "data.root=pets", "optimizer=sgd", "optimizer.lr=0.5", "model/head=lstm")
    found = changed_options(config)
    expected = {"data": "folder", "optimizer": "sgd", "model/head": "lstm", "data.root": "pets", "optimizer.lr": 0.5}
    assert found == expected
    assert changed_settings(config).keys() >= {"data.source", "optimizer.momentum", "model.head.lstm_size"}


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("experiment=accurate", "optimizer.lr=1e-3", "model.image_size=[[0,64],[0.5,128]]"),
        ("experiment=quickstart", "model/head=lstm", "scheduler=linear", "~optimizer.betas"),
        ("data=folder", 'data.root="it\'s here"', "optimizer=sgd", "optimizer.name=RMSprop", "~optimizer.nesterov"),
        ("callbacks=minimal", "+callbacks.stop={_target_: x.Y, patience: 3}", "trainer.max_time='00:01:00:00'"),
    ],
)
def test_the_repeat_command_composes_the_same_settings(
    overrides: tuple[str, ...], is_recorded: bool, tmp_path: Path
) -> None:
    config = composed(tmp_path, *overrides)
    if is_recorded:
        (tmp_path / ".hydra").mkdir()
        given = [*overrides, f"paths.output_dir={tmp_path}"]
        (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(given))
    config["trainer"]["max_epochs"] += 1  # by a later start
    command = repeat_command({**config, "resume": str(tmp_path)}, tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "cifar10_tl.train"]
    assert str(tmp_path) not in command
    repeated, expected = flat(composed(tmp_path, *words[3:])), flat(config)
    assert {key: repeated[key] for key in expected} == expected
    if is_recorded:
        assert repeated == expected
        assert [word for word in words[3:] if not word.startswith("trainer.max_epochs=")] == list(overrides)


def test_settings_in_a_folder_of_the_user_are_found_again(tmp_path: Path) -> None:
    folder, run = tmp_path / "my conf", tmp_path / "run"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "gentle.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.0001\n")
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("[experiment=gentle]")
    config = composed(run, "optimizer.lr=0.0001")
    assert repeat_command(config, run).startswith("# train cannot be repeated: In 'train': Could not find 'experiment/")
    sources = [{"provider": "main", "path": "conf"}, {"provider": "command-line", "path": str(folder)}]
    hydra = {"hydra": {"runtime": {"config_sources": sources}}}
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    words = shlex.split(repeat_command(config, run))
    assert words == ["python", "-m", "cifar10_tl.train", f"--config-dir={folder}", "experiment=gentle"]


def test_epochs_of_a_budget_are_chosen_again(tmp_path: Path) -> None:
    config = composed(tmp_path, "budget=1h")
    config["trainer"]["max_epochs"] = 12
    assert changed_settings(config) == {"budget": "1h", "trainer.max_epochs": 12}
    assert repeat_command(config, tmp_path) == "python -m cifar10_tl.train 'budget=\"1h\"'"


def test_the_command_of_an_evaluation(tmp_path: Path) -> None:
    config = composed(tmp_path, "checkpoint=best.ckpt", "split=val", "tta=flip", command="evaluate")
    assert changed_settings(config, "evaluate") == {"checkpoint": "best.ckpt", "split": "val", "tta": "flip"}
    expected = "python -m cifar10_tl.evaluate checkpoint=best.ckpt split=val tta=flip"
    assert repeat_command(config, tmp_path, "evaluate") == expected
