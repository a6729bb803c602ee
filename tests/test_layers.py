"""Imports go down only: each floor uses the ones below it, and no other, and no
file imports itself by way of others."""

import pytest
from imports import by_file, circle, floors, loose

FLOORS = [
    {"config"},
    {"libraries"},
    {"parallel"},
    {"store", "formats", "linalg", "structure"},
    {"codecs", "solvers", "tracking"},
    {"transforms"},
    {"models"},
    {"calibration"},
    {"evaluation", "quantize", "tune"},
    {"report"},
    {"checkpoints"},
    {"engines"},
    {"pipeline", "lm_eval", "chat"},
    {"command"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


FILES = by_file()


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    rooms = {name.split(".")[1] for name in FILES[module] if "." in name}
    if module == "harness":
        assert not rooms
        return
    room = module.split(".")[1]
    assert [other for other in rooms - {room} if LEVEL[other] >= LEVEL[room]] == []


def test_no_file_imports_itself_by_way_of_others():
    assert circle(FILES) == []


def test_a_circle_and_the_floors_are_found():
    """Of two files on one floor, too, which the floors alone would let pass."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == 3


def test_every_file_is_in_a_room():
    assert loose() == []
