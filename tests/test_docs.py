"""Commands, settings, links and examples in the documentation work."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import documented
import pytest
from helpers import REPOSITORY, compose_train

from cifar10_tl.config.launcher import help_text

README = (REPOSITORY / "README.md").read_text()
PAGES = {page: page.read_text() for page in documented.PAGES}
SHELL = "\n".join(block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S))
SPANS = [
    span for text in PAGES.values() for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
]
SETTINGS = runpy.run_path(str(REPOSITORY / "docs" / "settings.py"))
RESULTS = runpy.run_path(str(REPOSITORY / "scripts" / "results.py"))
HELP = help_text("train")
GROUPS = ("data", "model/head", "optimizer", "scheduler", "trainer", "callbacks", "logger", "experiment", "debug")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_settings_page_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "settings.md").read_text() == SETTINGS["settings"](), "run: make settings"


def test_the_tables_of_results_are_up_to_date() -> None:
    runs = json.loads((REPOSITORY / "docs" / "results.json").read_text())
    page, advice = (REPOSITORY / "docs" / "results.md").read_text(), "run: python scripts/results.py render"
    assert page == RESULTS["filled"](page, RESULTS["long_tables"](runs)), advice
    assert RESULTS["filled"](README, RESULTS["short_table"](runs)) == README, advice


def test_settings_are_read_with_the_comments_beside_and_above_them() -> None:
    lines = ["a: # parent", "  b: 1 # a | b", "# above", "c: [x]", "defaults:", "  - d: e"]
    assert SETTINGS["table"](lines, "p.")[2:] == [
        "| `p.a` |  | parent |",
        r"| `p.a.b` | `1` | a \| b |",
        "| `p.c` | `[x]` | above |",
    ]


def test_every_documented_setting_exists() -> None:
    known = {*re.findall(r"^\| `([\w.]+)` \|", SETTINGS["settings"](), flags=re.M), *GROUPS, "model", "paths"}
    known |= {"key", "weights_only", "search"}  # placeholder, argument of torch.load, group of tune
    known |= {key.rsplit(".", n)[0] for key in known for n in range(key.count("."))}
    words = {word.strip("'\"") for text in (SHELL, *SPANS) for word in text.split()}
    keys = {match[1] for word in words if (match := re.match(r"([a-z_]+(?:[./]\w+)*)=", word))}
    keys |= {
        span
        for span in SPANS
        if re.fullmatch(r"(data|model|optimizer|scheduler|trainer|paths|callbacks)\.\w+(\.\w+)?", span)
    }
    assert len(keys) > 20
    assert sorted(keys - known) == []


def test_every_default_in_the_readme_is_the_default() -> None:
    from omegaconf import OmegaConf

    cfg = compose_train()
    rows = re.findall(r"^\| `([\w.]+)` \| `?([^`|]+?)`? \|", README, flags=re.M)
    defaults = {key: OmegaConf.select(cfg, key, throw_on_missing=True) for key, _ in rows}
    assert {key: str(value).replace("None", "null") for key, value in defaults.items()} == dict(rows)


def test_every_train_command_composes() -> None:
    commands = [words[3:] for page in PAGES for words in documented.commands(page) if "cifar10_tl.train" in words]
    assert len(commands) >= 6
    for command in commands:
        if "--config-dir" not in command:
            compose_train(*(word for word in command if "=" in word and "@" not in word and "," not in word))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", PAGES[page])
    paths = [page.parent / target for found in targets for target in found if target and not target.startswith("http")]
    paths += [
        REPOSITORY / path
        for path in re.findall(r"`((?:cifar10_tl|conf|scripts|tests|docs)/[\w/.]+)`", PAGES[page])
        if "two_machines" not in path
    ]
    assert [path for path in paths if not path.exists()] == []


def test_every_picture_is_shown() -> None:
    shown = {Path(name).name for text in PAGES.values() for name in re.findall(r"images/\w+\.png", text)}
    assert {file.name for file in (REPOSITORY / "docs" / "images").iterdir()} == shown


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = {target for text in PAGES.values() for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.M)}
    for target in {name for pair in targets for name in pair if name}:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_tensorboard_command_shows_all_images() -> None:
    """TensorBoard keeps 10 random images per tag otherwise (tensorboard #5550)."""
    folders = {"cifar10_tl": "*.py", "scripts": "*.*", "conf": "*.yaml"}
    sources = [file for folder, pattern in folders.items() for file in (REPOSITORY / folder).rglob(pattern)]
    files = [*PAGES, REPOSITORY / "Makefile", *(file for file in sources if file.suffix != ".pyc")]
    lines = [line for file in files for line in file.read_text().splitlines() if "tensorboard --" in line]
    assert len(lines) >= 3, "README, Makefile and the end of a run"
    assert [line for line in lines if "--samples_per_plugin=images=1000" not in line] == []


def test_help_lists_the_options_of_each_group_and_the_purpose_of_each_experiment() -> None:
    listed = {k: set(v.split(" | ")) for k, v in re.findall(r"([\w/]+)=((?:\w+ \| )+\w+)(?=\s{2}|\n)", HELP)}
    files = {group: sorted((REPOSITORY / "conf" / group).glob("*.yaml")) for group in GROUPS}
    for group in set(GROUPS) - {"experiment"}:
        assert listed[group] == {file.stem for file in files[group]} - {"base", "checkpoint"}, group
    described = dict(re.findall(r"^  (\w+) +(.*)$", HELP.split("Experiments")[1].split("Other groups")[0], flags=re.M))
    assert next(iter(described)) == "quickstart"
    assert described.keys() == {file.stem for file in files["experiment"]}
    for file in files["experiment"]:
        comment = " ".join(line[2:] for line in file.read_text().splitlines() if re.match("# [^@]", line))
        assert comment.startswith(f"{described[file.stem]} "), file


def test_help_lists_ten_settings_with_their_defaults() -> None:
    from omegaconf import OmegaConf

    cfg = compose_train()
    rows = dict(re.findall(r"^  ([\w.]+)=(\S+)", HELP.split("Common settings")[1], flags=re.M))
    assert len(rows) == 10
    assert rows.pop("paths.output_dir") == "outputs/runs/<time>"
    defaults = {key: OmegaConf.select(cfg, key, throw_on_missing=True) for key in rows}
    assert {key: str(value).replace("None", "null") for key, value in defaults.items()} == rows
