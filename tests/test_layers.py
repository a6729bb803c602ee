"""Imports go down only: each floor may use the ones below it and itself, and no
file imports itself by way of others."""

import pytest
from imports import by_file, circle, floors

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


FILES = by_file()


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    rooms = [name.split(".")[1] for name in FILES[module] if "." in name]
    if module == "harness":
        assert not rooms
        return
    assert [room for room in rooms if LEVEL[room] > LEVEL[module.split(".")[1]]] == []


def test_no_file_imports_itself_by_way_of_others():
    assert circle(FILES) == []


def test_a_circle_and_the_floors_are_found():
    """Of two files on one floor, too, which the floors alone would let pass."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == 3
