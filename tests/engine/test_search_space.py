from __future__ import annotations

from typing import Any

import optuna
import pytest
from helpers import compose_train
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.search_space import as_overrides, plain_values, read_space, shared_overrides

KNOWN = dict.fromkeys(("optimizer.lr", "model.label_smoothing", "ema_decay", "data.batch_size", "data.val_size"), 0)
LR = {"low": 1e-4, "high": 1e-2, "log": True}


def test_ranges_and_choices_become_distributions_by_dotted_key() -> None:
    search = {
        "optimizer": {"lr": LR},
        "model.label_smoothing": {"low": 0, "high": 0.2},
        "data": {"batch_size": {"low": 32, "high": 128, "step": 32}, "val_size": {"low": 0, "high": 1, "step": 0.25}},
        "model/head": {"choices": ["linear", "dense"]},
        "ema_decay": {"choices": [None, 0.99]},
    }
    assert read_space(search, KNOWN) == {
        "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "model.label_smoothing": FloatDistribution(0, 0.2),
        "data.batch_size": IntDistribution(32, 128, step=32),
        "data.val_size": FloatDistribution(0, 1, step=0.25),
        "model/head": CategoricalDistribution(['"linear"', '"dense"']),
        "ema_decay": CategoricalDistribution(["null", "0.99"]),
    }


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "search: has no settings"),
        ({"optimizer": {"lrr": LR}}, r"search\.optimizer\.lrr: no such setting"),
        ({"optimizer": {"lr": 0.1}}, r"search\.optimizer\.lr=0\.1: must be \{low: "),
        (
            {"optimizer": {"lr": {"low": 1, "high": 0.1}}},
            r'search\.optimizer\.lr=\{"low": 1, "high": 0\.1\}: must be',
        ),
        ({"optimizer": {"lr": {"low": 0, "high": 0.1, "log": True}}}, "must be"),
        ({"optimizer": {"lr": {"low": 0.1}}}, "must be"),
        ({"optimizer": {"lr": {"low": 0.1, "high": "b"}}}, "must be"),
        ({"optimizer": {"lr": {"low": 0.1, "high": 1, "logg": True}}}, "must be .*logg"),
        ({"ema_decay": {"choices": "abc"}}, "must be"),
        ({"ema_decay": {"choices": []}}, "must be"),
    ],
)
def test_bad_entries_are_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_space(search, KNOWN)


def test_overrides_compose_to_exactly_the_values_of_a_trial() -> None:
    params = {"optimizer.lr": 0.1 + 0.2, "data.batch_size": 96, "model/head": '"lstm"', "ema_decay": "null"}
    params |= {"optimizer.nesterov": "true", "model.head.hidden": "[32, 8]", "model.backbone": '"resnet18"'}
    cfg = compose_train(*as_overrides(params), "optimizer=sgd", "+model.head.hidden=[]")
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.model.head.name) == (0.30000000000000004, 96, "lstm")
    assert (cfg.ema_decay, cfg.optimizer.nesterov, cfg.model.backbone) == (None, True, "resnet18")
    assert plain_values(params)["model.head.hidden"] == [32, 8]
    assert "model.head.hidden=[32, 8]" in as_overrides(params)


def test_runs_take_the_overrides_that_are_not_of_the_search() -> None:
    space: Any = {"optimizer.lr": FloatDistribution(0, 1)}
    given = ["experiment=quickstart", "trials=3", "~search.model", "search=mine", "pruner.name=none"]
    given += ["paths.output_dir=x", "paths.data_dir=y", "+callbacks.a={_target_: b.C}"]
    shared = ["experiment=quickstart", "paths.data_dir=y", "+callbacks.a={_target_: b.C}"]
    assert shared_overrides(given, space) == shared
    with pytest.raises(UserError, match=r"optimizer\.lr=1: this setting is searched; .*~search\.optimizer\.lr"):
        shared_overrides(["optimizer.lr=1"], space)


def test_no_value_of_a_long_search_leaves_its_range() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = read_space({"optimizer": {"lr": LR}}, KNOWN)
    values = [float(as_overrides(study.ask(space).params)[0].split("=")[1]) for _ in range(200)]
    assert 1e-4 <= min(values) < 1.3e-4
    assert 0.8e-2 < max(values) <= 1e-2
    assert 80 < sum(value < 1e-3 for value in values) < 120, "lr should be uniform on a logarithmic scale"
