"""What a checkpoint says of itself in quantization_metadata.json.

Read as data: words and numbers, or nothing. Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.config.errors import DataError
from harness.models.facts import read_object

ABOUT = "quantization_metadata.json"
WORD = re.compile(
    r"[\w.+-]{1,40}", re.ASCII
)  # what an option or a format may be called in a file of others


def about(folder: Path) -> dict:
    """The object in the file; empty where it is missing or something else."""
    try:
        return read_object(folder / ABOUT)
    except DataError:
        return {}


def held(folder: Path) -> dict[str, str | None]:
    """{"format": `int4-w4a4kv4`, "transform", "solver"} as the file names them.

    None for what it does not say in one short word.
    """
    found = about(folder)
    method = {name: _word(_at(found, "method", name)) for name in ("transform", "solver")}
    return {"format": _format(found), **method}


def _format(found: dict) -> str | None:
    """The formats of its weights, most tensors first, and the bits of all linears."""
    counts = _at(found, "formats")
    counts = (
        counts if isinstance(counts, dict) and all(type(n) is int for n in counts.values()) else {}
    )
    names = sorted(counts, key=counts.get, reverse=True) or [
        _at(found, "bits", "weights", "format")
    ]
    bits = [_at(found, "bits", part, "bits") for part in ("weights", "activations", "kv")]
    if not all(type(n) is int and 1 <= n <= 16 for n in bits) or not all(map(_word, names)):
        return None
    w, a, kv = bits
    cache = f"kv{kv}" if kv < 16 else ""
    return _word(f"{'+'.join(names)}-w{w}a{a}{cache}")


def _at(value, *keys: str):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _word(value) -> str | None:
    return value if isinstance(value, str) and WORD.fullmatch(value) else None
