"""The import graph of the package, read from its text: `python tests/imports.py` counts it.

A room is a folder of `harness/`, or a loose file beside them. An arrow: one room imports from
another. Floors: how many rooms lie on the longest chain of arrows. Imports inside functions count
like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "harness"
Graph = Mapping[str, set[str]]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """{dotted name: file} of a package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def by_file(package: Path = PACKAGE) -> dict[str, set[str]]:
    """{module: modules of the same package that its text imports}."""
    known = modules(package)
    return {name: set(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else node.module


def by_room(files: Graph) -> dict[str, set[str]]:
    """The same between rooms; the package's own `__init__` is none."""
    rooms: dict[str, set[str]] = {}
    for name, imported in files.items():
        if "." in name:
            room = rooms.setdefault(_room(name), set())
            room |= {_room(other) for other in imported if "." in other} - {_room(name)}
    return rooms


def _room(name: str) -> str:
    return name.split(".")[1]


def circle(graph: Graph) -> list[str]:
    """One circle, first node again at its end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def floors(graph: Graph) -> int:
    """Nodes on the longest chain of a graph without circles."""
    height: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[other] for other in graph.get(name, ())), default=0)
    return max(height.values(), default=0)


def loose(package: Path = PACKAGE) -> list[str]:
    """Files at the root of the package beside its `__init__`."""
    return sorted(path.name for path in package.glob("*.py") if path.name != "__init__.py")


def told(graph: Graph) -> str:
    """How many nodes and arrows a graph has, and one circle if there is any."""
    arrows = sum(map(len, graph.values()))
    return f"{len(graph)}, {arrows} arrows, {' -> '.join(circle(graph)) or 'no circle'}"


if __name__ == "__main__":
    files = by_file()
    rooms = by_room(files)
    print(f"files: {told(files)}")
    print(f"rooms: {told(rooms)}")
    print(f"floors: {'endless' if circle(rooms) else floors(rooms)}; loose files: {len(loose())}")
