"""Honesty marks (evaluation/caveats.py) as letters beside a number, and their legend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LEGEND = {
    "c": "same corpus as calibration",
    "a": "adapted, a learned transform or a tuner was trained on it",
    "f": "learned matrices from a file, perhaps of this corpus",
    "s": "a subset, the first windows or documents only",
    "o": "the only corpus, nothing shows whether it holds elsewhere",
}


def letters(marks: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """{corpus or task: "cs"}: one letter a kind of mark, in the order of LEGEND."""
    return {
        name: "".join(sorted(set(map(letter, told)), key=list(LEGEND).index))
        for name, told in marks.items()
    }


def legend(used: Iterable[str]) -> str:
    """`c same corpus as calibration; s ...` for the letters that occur in `used`; empty where there
    are none."""
    occurring = set("".join(used))
    return "; ".join(f"{one} {meaning}" for one, meaning in LEGEND.items() if one in occurring)


def letter(mark: str) -> str:
    """The letter of one mark."""
    if mark == "same corpus as calibration":
        return "c"
    if mark == "adapted":
        return "a"
    if mark == "learned elsewhere":
        return "f"
    if mark.startswith("first "):
        return "s"
    return "o"
