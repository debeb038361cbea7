"""Every command in the README and in docs/ runs, shortened, in an empty folder with a few images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import PAGES, Session, blocks, commands

#: Beginnings of commands that are not run.
NOT_RUN = {
    "make": "creates .venv and downloads packages",
    "source .venv/bin/activate": "needs what make creates",
    "pip install": "downloads packages",
    "pre-commit install": "changes the checkout",
    "tensorboard": "is a server; tests/engine/test_tensorboard.py starts one",
    "python scripts/screenshots.py": "needs a browser and changes docs/images",
    "python scripts/benchmark.py": "measures for minutes; tests/scripts/test_benchmark.py runs it",
}
COMMANDS = {page: commands(page) for page in PAGES}


def is_run(words: list[str]) -> bool:
    return not any(f"{' '.join(words)} ".startswith(f"{start} ") for start in NOT_RUN)


def test_the_list_of_commands_that_are_not_run_is_up_to_date() -> None:
    lines = [f"{' '.join(words)} " for found in COMMANDS.values() for words in found]
    assert [start for start in NOT_RUN if not any(line.startswith(f"{start} ") for line in lines)] == []
    assert {words[0] for found in COMMANDS.values() for words in found if is_run(words)} == {"python"}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session(tmp_path_factory.mktemp("documented")) as session:
        yield session


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_command_runs(page: Path, session: Session) -> None:
    shutil.rmtree(session.folder / "outputs", ignore_errors=True)  # of another page
    session.runs.clear()
    for words in filter(is_run, COMMANDS[page]):
        if session.is_new(words[1:]):
            session.run(words[1:])
    shutil.copy(session.folder / "photos" / "00.png", session.folder / "cat.jpg")
    for block in blocks(page, "python"):
        if "pl.Trainer(" not in block:  # see test_readme_script.py
            (session.folder / "example.py").write_text(block)
            assert "Prediction(path='cat.jpg', label='class " in session.run(["example.py"])
