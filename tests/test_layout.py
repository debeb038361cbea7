"""Imports of the package point strictly downward, and each layer knows only the libraries that it needs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import REPOSITORY

PACKAGE = REPOSITORY / "cifar10_tl"
COMMANDS = ("train", "tune", "evaluate", "predict", "export")
LEVELS = (("io",), ("config",), ("data", "metrics", "plots"), ("models",), ("callbacks",), ("engine",), ("inference",))
LEVEL = {name: level for level, names in enumerate((*LEVELS, COMMANDS)) for name in names}
FORBIDDEN_LIBRARIES = {
    "io": {"torch", "torchvision", "lightning"},
    "config": {"torch", "torchvision", "lightning"},
    "metrics": {"lightning"},
    "plots": {"lightning"},
    "models.network": {"lightning"},
}


def module_name(file: Path) -> str:
    """Return the dotted name below the package, without ``__init__``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py") if module_name(file)}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below ``node``, also those in functions, except the bodies of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from runtime_nodes(child)


def imported_names(source: str) -> set[str]:
    """Return the dotted names that a source file imports at run time."""
    names = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def local_imports(module: str) -> set[str]:
    """Return the modules of this package that ``module`` imports."""
    found = set()
    for name in imported_names(MODULES[module].read_text()):
        parts = name.removeprefix("cifar10_tl.").split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        found |= {next((p for p in prefixes if p in MODULES), module)} if name.startswith("cifar10_tl.") else set()
    return found - {module}


GRAPH = {module: local_imports(module) for module in MODULES}


def top(module: str) -> str:
    return module.split(".")[0]


def test_the_top_level_holds_commands_packages_and_public_modules_only() -> None:
    assert {top(module) for module in MODULES} == set(LEVEL)


def test_imports_point_strictly_downward() -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if top(module) != top(other) and LEVEL[top(module)] <= LEVEL[top(other)]
    ]
    assert not sorted(upward)


def test_the_diagram_shows_the_imports() -> None:
    """Each arrow is an import that no other path implies, and each import follows the arrows."""
    package = {module: "commands" if top(module) in COMMANDS else top(module) for module in MODULES}
    edges = {(package[module], package[other]) for module, others in GRAPH.items() for other in others}
    direct = {(a, b) for a, b in edges if a != b}
    nodes = set(package.values())

    def below(name: str) -> set[str]:
        return set().union(*({b} | below(b) for a, b in direct if a == name))

    needed = {(a, b) for a, b in direct if not any(b in below(other) for x, other in direct if x == a)}
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", (REPOSITORY / "docs" / "architecture.md").read_text(), flags=re.S)
    arrows = re.findall(r"^ *(\w+)(?:\[[^]]*\])? --> (\w+)$", diagram, flags=re.M)
    assert set(arrows) == needed
    assert {name for arrow in arrows for name in arrow} == nodes
    assert ", ".join(COMMANDS) in diagram


def test_imports_have_no_cycle() -> None:
    assert set(TopologicalSorter(GRAPH).static_order()) >= set(GRAPH), "a cycle raises CycleError"


def reachable(module: str) -> set[str]:
    """Return ``module`` and all modules that it imports, directly or not."""
    seen, queue = set(), [module]
    while queue:
        seen.add(current := queue.pop())
        queue += GRAPH[current] - seen
    return seen


@pytest.mark.parametrize("name", FORBIDDEN_LIBRARIES)
def test_each_layer_loads_only_the_libraries_it_needs(name: str) -> None:
    loaded = {module for start in MODULES if f"{start}.".startswith(f"{name}.") for module in reachable(start)}
    libraries = {top(imported) for module in loaded for imported in imported_names(MODULES[module].read_text())}
    assert not libraries & FORBIDDEN_LIBRARIES[name]


def test_the_network_knows_no_data() -> None:
    assert "data" not in {top(module) for module in reachable("models.network")}
