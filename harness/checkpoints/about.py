"""What a checkpoint says of itself in quantization_metadata.json.

Read as data: words and numbers, or nothing. Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.config.errors import DataError
from harness.structure.facts import read_object

ABOUT = "quantization_metadata.json"
# what an option or a format may be called in a file of others
WORD = re.compile(r"[\w.+-]{1,40}", re.ASCII)


def about(folder: Path) -> dict:
    """The object in the file; empty where it is missing or something else."""
    try:
        return read_object(folder / ABOUT)
    except DataError:
        return {}


def held(folder: Path) -> dict[str, str | None]:
    """{"format": `int4-w4a4kv4`, "transform", "solver"} as the file names them, "tune" if it does.

    None for what it does not say in one short word.
    """
    metadata = about(folder)
    method = {name: _word(_at(metadata, "method", name)) for name in ("transform", "solver")}
    tuner = _word(_at(metadata, "method", "tune"))
    if tuner is not None:
        method["tune"] = tuner
    return {"format": _format(metadata), **method}


def _format(metadata: dict) -> str | None:
    """The formats of its weights, most tensors first, and the bits of all linears."""
    names: list[object] = [_at(metadata, "bits", "weights", "format")]
    counts = _at(metadata, "formats")
    if isinstance(counts, dict) and counts and all(type(n) is int for n in counts.values()):
        names = [name for name, _ in sorted(counts.items(), key=lambda item: -item[1])]
    words = [word for name in names if (word := _word(name)) is not None]
    values = [_at(metadata, "bits", part, "bits") for part in ("weights", "activations", "kv")]
    bits = [n for n in values if type(n) is int and 1 <= n <= 16]
    # the file may be of anyone: what is not all there in short words is not repeated
    if len(words) < len(names) or len(bits) < len(values):
        return None
    w, a, kv = bits
    cache = f"kv{kv}" if kv < 16 else ""
    return _word(f"{'+'.join(words)}-w{w}a{a}{cache}")


def _at(value: object, *keys: str) -> object:
    """What lies under these keys, one in the other; None where there is nothing."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and WORD.fullmatch(value) else None
