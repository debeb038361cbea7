"""Code of users in a folder beside the package, by the files and commands in CONTRIBUTING.md."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented import REPOSITORY, Session, commands, write_files

from cifar10_tl import LitClassifier
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.shapes import draw_shapes
from cifar10_tl.engine.results import read_results

PAGE = REPOSITORY / "CONTRIBUTING.md"
COMMANDS = [words[1:] for words in commands(PAGE) if words[0] == "python"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session in a folder with the files of the page."""
    with Session(tmp_path_factory.mktemp("own")) as session:
        write_files(PAGE, session.folder)
        yield session


def documented(*words: str) -> list[str]:
    """Return the command of the page with these words."""
    (found,) = (command for command in COMMANDS if set(words) <= set(command))
    return found


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_head_is_trained_evaluated_and_resumed(session: Session) -> None:
    session.run(documented("model/head=cosine"), "model.head.scale=10")
    run = session.runs[-1]
    assert checkpoint(run)["state_dict"]["network.head.prototypes"].shape == (3, 512)
    assert checkpoint(run)["hyper_parameters"]["head"] == {"name": "cosine", "scale": 10}
    evaluate = documented("cifar10_tl.evaluate", "imports=my_heads")
    session.run(evaluate, "paths.output_dir=evaluation")
    assert read_results(session.folder / "evaluation")["test"]["acc"] == read_results(run)["test"]["acc"]

    file = run / "checkpoints" / "best.ckpt"
    with pytest.raises(UserError, match=r"model\.head\.name=cosine: .* first import the module that adds it to HEADS"):
        LitClassifier.load_from_checkpoint(file)
    assert "my_heads" not in sys.modules
    status, printed = session(["-m", "cifar10_tl.evaluate", f"checkpoint={file}"])
    assert status == 2, printed
    assert "model.head.name=cosine: choose from linear, dense, lstm, or first import" in printed.splitlines()[-1]
    status, printed = session(["-m", "cifar10_tl.evaluate", f"checkpoint={file}", "imports=gone"])
    assert status == 2
    assert printed.endswith("\nerror: imports=gone: No module named 'gone' in the current folder or on PYTHONPATH\n")

    trusted = documented("resume=outputs/runs/@time@")
    status, printed = session(["-m", "cifar10_tl.train", f"resume={run}", "trainer.max_epochs=2"])
    assert status == 2
    assert "refers to code outside this project and Lightning: imports=my_heads; read it" in printed
    session.run(trusted)
    assert read_results(run)["epochs"] == 2


@pytest.mark.slow
def test_a_dataset_is_trained_on_and_evaluated(session: Session) -> None:
    for split, count in (("train", 40), ("test", 12)):
        images, labels = draw_shapes(5 * count, seed=count)
        kept = (labels < 2).nonzero().flatten()[:count]
        (session.folder / "arrays").mkdir(exist_ok=True)
        arrays = {"images": images[kept].permute(0, 2, 3, 1).numpy(), "labels": labels[kept].numpy()}
        np.savez(session.folder / "arrays" / f"{split}.npz", **arrays)
    session.run(documented("data=arrays"))
    results = read_results(session.runs[-1])
    assert (results["test"]["count"], results["class_names"]) == (12, ["circle", "square"])
    file = session.runs[-1] / "checkpoints" / "best.ckpt"
    evaluate = ["-m", "cifar10_tl.evaluate", f"checkpoint={file}"]
    session.run(evaluate, "imports=my_data", "paths.output_dir=evaluated")
    assert read_results(session.folder / "evaluated")["test"]["acc"] == results["test"]["acc"]
    status, printed = session(evaluate)
    assert status == 2, printed
    assert printed.splitlines()[-1].startswith(
        "error: data.source=arrays: choose from cifar10, folder, shapes, or first"
    )


@pytest.mark.slow
def test_a_callback_is_called(session: Session) -> None:
    command = documented("+callbacks.stop={_target_: my_callbacks.StopAbove, accuracy: 0.9}")
    for accuracy, epochs in ((0, 1), (2, 3)):
        session.run(command, "trainer.max_epochs=3", f"callbacks.stop.accuracy={accuracy}")
        assert read_results(session.runs[-1])["epochs"] == epochs


@pytest.mark.slow
def test_an_experiment_is_run_and_searched_from(session: Session) -> None:
    session.run(documented("cifar10_tl.train", "experiment=gentle"))
    config = read_results(session.runs[-1])["config"]
    assert (config["optimizer"]["name"], config["optimizer"]["lr"]) == ("SGD", 0.005)
    session.run(documented("cifar10_tl.tune", "experiment=gentle"))
    search = session.folder / "outputs" / "search_gentle"
    assert read_results(search / "trials" / "0")["config"]["optimizer"]["name"] == "SGD"
    best = json.loads((search / "results.json").read_text())["best"]["command"]
    assert f"--config-dir={session.folder / 'my_conf'}" in shlex.split(best)
