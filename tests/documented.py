"""Commands and files in the Markdown pages, and a session that runs such commands on tiny data.

``python documented.py`` imports the libraries once, and runs each command that it reads from stdin in a fork of itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
#: Without PATH, each command is "not found", and handed to this function of bash.
_RECORDER = r"""
PATH=/nowhere
command_not_found_handle() { printf '%s\x1f' "$@"; printf '\x1e'; }
source() { command_not_found_handle source "$@"; }
"""


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the bash blocks of a page, as bash reads them; <name> becomes @name@."""
    script = _RECORDER + re.sub(r"<(\w+)>", r"@\1@", "\n".join(blocks(page, "bash")))
    output = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True).stdout
    return [record.split("\x1f")[:-1] for record in output.split("\x1e")[:-1]]


def write_files(page: Path, folder: Path) -> list[Path]:
    """Write the Python and YAML blocks of a page that begin with a comment that is a file name."""
    files = []
    for text in (*blocks(page, "python"), *blocks(page, "yaml")):
        if name := re.match(r"(?:# @package _global_\n)?# ([\w/]+\.(?:py|yaml))\n", text):
            files.append(folder / name[1])
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_text(text)
    return files


#: Overrides that make a training run as short as possible.
SHORT = {
    "model.backbone": "resnet10",
    "model.weights": "null",
    "model.image_size": "32",
    "model.freeze": "backbone",
    "data.batch_size": "16",
    "data.val_size": "10",
    "trainer.max_epochs": "1",
    "trainer.limit_train_batches": "2",
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
    "trainer.precision": "32-true",
    "budget": "null",
    "callbacks": "minimal",
    "logger": "none",
    "compile": "false",
    "report": "none",
}


def shortened(words: Sequence[str]) -> list[str]:
    """Return a command with settings that make it quick. Values that are swept or searched are kept."""
    if words[0] != "-m" or "--help" in words:
        return list(words)
    flag, module, *given = words
    name = module.removeprefix("cifar10_tl.")
    if name in ("predict", "export"):
        return list(words)
    if name == "evaluate":
        return [*words, "trainer.accelerator=cpu", "trainer.precision=32-true"]
    if any(word.startswith("resume=") for word in given):
        return [*words, "trainer.max_epochs=2"]
    keys = {word.lstrip("+~").partition("=")[0].removeprefix("search."): word for word in given}
    kept = {key for key, word in keys.items() if "," in word or word.lstrip("+~").startswith("search.")}
    short = {key: value for key, value in SHORT.items() if key not in kept}
    if "experiment=quickstart" in given:
        short |= {"data.train_size": "64", "data.test_size": "16"}
    elif "data" not in keys:
        short |= {"data": "folder", "data.root": "pets"}
    if name == "tune":
        short |= {"trials": "1"}
    if "gradient_flow=true" in given:
        del short["model.freeze"]
    given = [re.sub(r"^(seed=\d+,\d+),.*", r"\1", word) for word in given if word.partition("=")[0] not in short]
    return [flag, module, *given, *(f"{key}={value}" for key, value in short.items())]


class Python(AbstractContextManager["Python"]):
    """Process that runs ``python -m MODULE ...`` or ``python FILE ...`` in ``folder``."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.log = folder, folder / "commands.log"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **variables}
        environment = {key: value for key, value in environment.items() if key != "CIFAR10_TL_RUN_STAMP"}
        options: dict[str, Any] = {"cwd": folder, "env": environment, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, **options)

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run a command, and return its exit status and what it printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(list(arguments)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.log.read_text()


class Session(Python):
    """Process that runs documented commands, shortened, in a folder with the images that they name."""

    def __init__(self, folder: Path) -> None:
        from helpers import write_png, write_shapes

        from cifar10_tl.data.shapes import draw_shapes

        for root in ("pets", "DIR", "jpeg", "jpeg/five", "jpeg/other"):
            write_shapes(folder / root, num_classes=3, train=12, test=3)
        write_png(folder / "photos", draw_shapes(4, seed=1, image_size=40)[0])
        self.runs: list[Path] = []
        self.seen: set[tuple[str, ...]] = set()
        super().__init__(folder)

    def is_new(self, words: Sequence[str]) -> bool:
        """Return whether a command is not the same, when shortened, as an earlier one, apart from files of runs."""
        key = tuple(shortened(words))
        is_known, self.seen = key in self.seen, self.seen | {key}
        return not is_known or "@" in "".join(key) or "checkpoint=best.ckpt" in key

    def run(self, words: Sequence[str], *overrides: str) -> str:
        """Run a command, check that it succeeds, and return what it printed."""
        names = {"@time@": -1, "@one@": -1, "@other@": -2}
        text = "\n".join(shortened(words))
        for name, number in names.items():
            while name in text and len(self.runs) < -number:
                self.run(["-m", "cifar10_tl.train"])
            text = text.replace(name, self.runs[number].name) if name in text else text
        if "checkpoint=best.ckpt" in words:
            shutil.copy(self.runs[-1] / "checkpoints" / "best.ckpt", self.folder)
        status, printed = self([*text.split("\n"), *overrides])
        assert status == 0, f"{words}:\n{printed}"
        assert not re.search(r"[^\t\n -\U0010ffff]", printed), "control characters in a log file"
        configs = (self.folder / "outputs" / "runs").glob("*/config.yaml")
        self.runs += [file.parent for file in sorted(configs) if file.parent not in self.runs]
        return printed


def serve() -> None:
    """Import what the commands import, and run the commands that are read from stdin."""
    import cifar10_tl.engine.evaluator
    import cifar10_tl.engine.search
    import cifar10_tl.inference  # noqa: F401

    while line := sys.stdin.readline():
        if not (child := os.fork()):
            os._exit(run_here(json.loads(line)))  # the end of an interpreter with torch takes a second
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_here(arguments: Sequence[str]) -> int:
    """Run a command in this process, and return its exit status."""
    for descriptor in (1, 2):
        os.dup2(os.open("commands.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.path[0] = os.getcwd()
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        logging.shutdown()
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    serve()
