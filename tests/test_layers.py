"""Imports go down only: each floor may use the ones below it and itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harness"
FLOORS = [
    {"errors", "checks", "store"},
    {"formats", "linalg", "config", "libraries"},
    {"transforms", "solvers"},
    {"models", "calibration"},
    {"evaluation", "export", "tracking", "report"},
    {"plan", "unread", "marks", "components", "allocation", "overrides", "solved", "outside", "blockwise", "hints"},
    {"pipeline", "stages", "measure", "exported", "devices"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for module in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            parts = (module or "").split(".")
            if parts[0] == "harness":
                names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported(path)
        return
    assert {name for name in imported(path) if LEVEL[name] > LEVEL[part]} == set()
