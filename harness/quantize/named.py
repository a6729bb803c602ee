"""Which linears a key of `format.overrides` names: those whose names end with its parts.

`down_proj` is that of every MLP and every expert, `experts.down_proj` of all experts,
`experts.down_proj.3` of one. One number alone names nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from harness.structure.structure import Structure


def linears(structure: Structure) -> list[tuple[int, str]]:
    """(block, block-relative name) of all linears of the blocks, each expert's by itself."""
    return [
        (layer, name)
        for layer in range(structure.layers)
        for site in structure.expanded(layer)
        for name in site.linears
    ]


def _unnumbered(linear: str) -> str:
    """The name without an expert's number."""
    start, _, last = linear.rpartition(".")
    return start if last.isdigit() else linear


def ends(linears: Iterable[tuple[int, str]]) -> list[str]:
    """The last parts of names, each once."""
    return list(dict.fromkeys(_unnumbered(name).rpartition(".")[2] for _, name in linears))


def fits(key: str, linear: str) -> bool:
    """Whether a key is how a linear's name ends, an expert's with its number or without."""
    ends = (f".{linear}", f".{_unnumbered(linear)}")
    return not key.isdigit() and any(end.endswith(f".{key}") for end in ends)


def closeness(key: str) -> tuple[int, int]:
    """(whether one expert is named, by how many parts)."""
    return int(_unnumbered(key) != key), key.count(".")
