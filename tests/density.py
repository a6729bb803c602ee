"""How dense the text of the package is: `python tests/density.py [FOLDER]` counts it.

A conditional expression is `a if b else c`. A tuple assignment has as many targets as values side
by side, `a, b = c, d`. Complexity is McCabe's, of one function, as ruff's C901 counts it.

The settings and the Makefile, which ruff does not read, keep to as many columns as the code
(test_configs.py).
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "harness"
COLUMNS = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, *FUNCTIONS)


@dataclass(frozen=True)
class File:
    """One file: its lines, its comments, and all nodes of its syntax tree."""

    path: Path
    lines: list[str]
    comments: list[str]
    nodes: list[ast.AST]

    @classmethod
    def read(cls, path: Path) -> File:
        text = path.read_text(encoding="utf-8")
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return cls(path, text.splitlines(), comments, list(ast.walk(ast.parse(text))))

    def functions(self) -> Iterator[tuple[int, str]]:
        """(complexity, where) of every function."""
        for node in self.nodes:
            if isinstance(node, FUNCTIONS):
                yield complexity(node), f"{self.path.name}:{node.lineno} {node.name}"


def settings() -> list[Path]:
    """The texts that are no Python: every option, every grid, the Makefile."""
    grids = (ROOT / "sweeps").glob("*.yaml")
    return [ROOT / "Makefile", *sorted((ROOT / "conf").rglob("*.yaml")), *sorted(grids)]


def wide(path: Path) -> list[str]:
    """Where lines are longer than COLUMNS, a tab being eight."""
    lines = path.read_text(encoding="utf-8").expandtabs().splitlines()
    return [f"{path.name}:{n}" for n, line in enumerate(lines, 1) if len(line) > COLUMNS]


def complexity(function: ast.AST) -> int:
    """McCabe's number: one, and one for every branch and every function inside."""
    nodes = list(ast.walk(function))
    found = sum(isinstance(node, BRANCHES) for node in nodes)  # the function itself is the one
    found += sum(isinstance(node, ast.Try) and bool(node.orelse) for node in nodes)
    return found + sum(_cases(node) for node in nodes if isinstance(node, ast.Match))


def _cases(match: ast.Match) -> int:
    """Cases, without a last one that takes all."""
    last = match.cases[-1]
    takes_all = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None
    return len(match.cases) - (takes_all and last.guard is None)


def is_tuple_assignment(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    values = len(node.value.elts)
    return any(isinstance(t, ast.Tuple) and len(t.elts) == values for t in node.targets)


if __name__ == "__main__":
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    files = [File.read(path) for path in sorted(package.rglob("*.py"))]
    lines = [line for file in files for line in file.lines]
    nodes = [node for file in files for node in file.nodes]
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    long = sum(len(line) > COLUMNS for line in lines)
    conditional = sum(isinstance(node, ast.IfExp) for node in nodes)
    tuples = sum(map(is_tuple_assignment, nodes))
    comments = sum(len(file.comments) for file in files)
    highest, where = max(found for file in files for found in file.functions())
    print(f"{len(files)} files, {len(lines)} lines, {statements} statements")
    print(f"lines over {COLUMNS} columns: {100 * long / len(lines):.1f} %")
    print(f"in settings and the Makefile: {sum(len(wide(path)) for path in settings())} lines")
    print(f"conditional expressions: {1000 * conditional / statements:.1f} in 1,000 statements")
    print(f"tuple assignments: {1000 * tuples / statements:.1f} in 1,000 statements")
    print(f"comments: {1000 * comments / len(lines):.1f} in 1,000 lines")
    print(f"highest complexity: {highest} ({where})")
