"""What the README says is there, is there."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, compose_train
from omegaconf import OmegaConf

from cifar10_tl.data import sources
from cifar10_tl.models import heads

README = (REPOSITORY / "README.md").read_text()


def test_every_setting_in_the_table_exists_with_its_default() -> None:
    cfg = compose_train()
    checked = 0
    of_train = README.split("## Use a trained model")[0]
    for key, default in re.findall(r"^\| `([\w.]+)` \| `?([^`|]+?)`? \|", of_train, flags=re.M):
        if key in ("experiment", "debug", "data", "optimizer", "scheduler") or default.startswith(("flip", "outputs")):
            continue
        value = OmegaConf.select(cfg, key, throw_on_missing=True)
        assert str(value).lower().replace("none", "null") == default.lower().replace("none", "null"), key
        checked += 1
    assert checked > 15


def test_every_train_command_in_the_readme_composes() -> None:
    commands = re.findall(r"python -m cifar10_tl\.train([^#`\n]*)", README)
    assert len(commands) >= 6
    for command in commands:
        overrides = [o for o in command.split() if "=" in o and "<" not in o and "," not in o]
        if not any(o.startswith(("'+", "resume=")) for o in overrides):
            compose_train(*overrides)


def test_links_and_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (REPOSITORY / target).exists(), target
    for path in re.findall(r"`((?:cifar10_tl|conf|scripts|tests|docs)/[\w/.]+)`", README):
        assert (REPOSITORY / path).exists() or "cosine" in path or "cifar100" in path, path


def test_make_targets_that_are_named_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def pasted(name: str, module: ModuleType | None = None) -> Any:
    """The class of the README's example, its block put as it is at the end of ``module`` or into an empty file."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, flags=re.S) if f"class {name}" in b)
    space = dict(vars(module)) if module else {}
    exec(block, space)
    return space[name]


def test_the_head_of_the_readme_works_as_it_is_written() -> None:
    assert pasted("CosineHead", heads)(16, 3)(torch.randn(2, 16, 4, 4)).shape == (2, 3)


def test_the_data_set_of_the_readme_works_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class FewImages:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.data = np.zeros((20 if train else 10, 32, 32, 3), np.uint8)
            self.targets = list(range(len(self.data)))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", FewImages)
    source = pasted("Cifar100", sources)("data")
    source.prepare()
    splits = source.load()
    assert {name: tuple(split.images.shape) for name, split in splits.items()} == {
        "train": (20, 3, 32, 32),
        "test": (10, 3, 32, 32),
    }
    assert len(source.class_names) == 100


def test_the_callback_of_the_readme_works_as_it_is_written() -> None:
    callback = pasted("StopWhenGood")(0.9)
    trainer, module = SimpleNamespace(should_stop=False), SimpleNamespace(evaluation=SimpleNamespace(accuracy=0.95))
    callback.on_validation_end(trainer, module)
    assert trainer.should_stop


def test_help_names_the_groups_that_there_are() -> None:
    text = (REPOSITORY / "conf" / "hydra" / "default.yaml").read_text()
    told = {k: set(v.split(" | ")) for k, v in re.findall(r"([\w/]+)=((?:\w+ \| )+\w+)(?=\s{2}|\n)", text)}
    for group in (
        "data",
        "model/head",
        "optimizer",
        "scheduler",
        "trainer",
        "callbacks",
        "logger",
        "experiment",
        "debug",
    ):
        there = {p.stem for p in (REPOSITORY / "conf" / group).glob("*.yaml")} - {"base", "checkpoint"}
        assert told[group] == there, group
    assert {"data", "model/head", "experiment", "debug", "trainer"} <= told.keys()
