"""Write docs/settings.md from the YAML files and their comments in conf/."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "tune", "evaluate", "predict", "export")
GROUPS = ("data", "model", "model/head", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths", "search")
GLOBAL_GROUPS = ("experiment", "debug")
KEY = re.compile(r"( *)(\w+):(?: ([^#]*?))?(?:\s*# (.*))?")
INTRODUCTION = "# Settings\n\nGenerated from `conf/` by `make settings`. Append settings to a command as `key=value`."


def table(lines: list[str], prefix: str) -> list[str]:
    """Return a row per key. A comment stands after its key or in the lines above."""
    rows, comments, path = [], [], []
    for line in lines:
        if line.startswith("#"):
            comments.append(line[2:])
            continue
        if found := KEY.fullmatch(line):
            indent, key, value, comment = found.groups(default="")
            path = [*path[: len(indent) // 2], key]
            comment = (comment or " ".join(comments)).replace("|", r"\|").replace("<", r"\<")
            if path[0] not in ("defaults", "hydra") and (value or comment):
                rows.append(f"| `{prefix}{'.'.join(path)}` | {value and f'`{value}`'} | {comment} |")
        comments = []
    return ["| key | value | |", "|---|---|---|", *rows] if rows else []


def section(name: str, file: Path, prefix: str = "") -> str:
    """Return the heading, the comment at the start of the file and its table."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("# @package", "# python -m"))]
    end = next(number for number, line in enumerate([*lines, ""]) if not line.startswith("#"))
    comment = " ".join(line[2:] for line in lines[:end]).replace("<", r"\<")
    parts = (f"## `{name}`", comment, "\n".join(table(lines[end:], prefix)))
    return "\n\n".join(part for part in parts if part)


def settings() -> str:
    """Return the text of docs/settings.md."""
    sections = [section(f"python -m cifar10_tl.{name}", ROOT / "conf" / f"{name}.yaml") for name in COMMANDS]
    for group in (*GROUPS, *GLOBAL_GROUPS):
        prefix = "" if group in GLOBAL_GROUPS else f"{group.replace('/', '.')}."
        files = sorted((ROOT / "conf" / group).glob("*.yaml"))
        sections += [section(f"{group}={file.stem}", file, prefix) for file in files]
    return "\n\n".join([INTRODUCTION, *sections]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings())
