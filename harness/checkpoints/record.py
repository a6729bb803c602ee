"""What the files of a checkpoint say, as data.

Every field is checked; nothing is built or imported because a file names it.

    harness.json                version, dtype, {"format", "names"} of weights and activations,
                                "kv"; read as a Record
    digests.json                {file: sha256}
    quantization_metadata.json  what the checkpoint is, for people and tools

A format stands there by the name of its class and its fields. The name is looked up among the
formats of this project, the fields are plain values and the class itself judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch

from harness import formats
from harness.checkpoints.native_files import RECORD, VERSION, recorded
from harness.config.errors import ConfigError, DataError
from harness.formats import Format, KVCache

SPELLED = "harness.formats."  # in front of a class's name in the file
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Record:
    """harness.json.

    dtype: of the evaluated model; weights, activations: {module or site: format}; kv: of the cache.
    """

    dtype: torch.dtype
    weights: Mapping[str, Format]
    activations: Mapping[str, Format]
    kv: KVCache | None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """From the file in a checkpoint's folder.

        Raises DataError naming the field that is missing or wrong.
        """
        found, where = recorded(folder), folder / RECORD
        if found.get("dtype") not in FLOATS:
            raise DataError(
                f"{where}: dtype={found.get('dtype')}: needs one of {', '.join(FLOATS)}."
            )
        kv = found.get("kv")
        return cls(
            dtype=getattr(torch, found["dtype"]),
            weights=_formats(found.get("weights"), f"{where}: weights", "weight"),
            activations=_formats(found.get("activations"), f"{where}: activations", "activation"),
            kv=None if kv is None else format_of(kv, f"{where}: kv", KVCache),
        )

    def written(self) -> dict:
        """The same as JSON, a format once."""
        return {
            "version": VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": _grouped(self.weights),
            "activations": _grouped(self.activations),
            "kv": None if self.kv is None else spec(self.kv),
        }


def spec(format: Format | KVCache) -> dict:
    """A format as JSON: its class and all of its fields."""
    return {"_target_": SPELLED + type(format).__name__, **asdict(format)}


def format_of(found, where: str, base: type) -> Format | KVCache:
    """Inverse of `spec`, for the formats of this project of that base.

    Raises DataError, beginning with `where`.
    """
    if not isinstance(found, Mapping):
        raise DataError(f"{where}={found}: needs a format, its class and its fields.")
    name = str(found.get("_target_"))
    known = classes(base).get(name.removeprefix(SPELLED)) if name.startswith(SPELLED) else None
    if known is None:
        raise DataError(f"{where}._target_={name}: is no {base.__name__.lower()} of this project.")
    values = {key: value for key, value in found.items() if key != "_target_"}
    legal = {field.name for field in fields(known)}
    for key, value in values.items():
        nested = value.values() if key == "mse" and isinstance(value, Mapping) else [value]
        if key not in legal or not all(_plain(each) for each in nested):
            raise DataError(f"{where}.{key}={value}: {known.__name__} has no such field or value.")
    try:
        return known(**values)
    except (ConfigError, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from None


def classes(base: type) -> dict[str, type]:
    """{name: class} of every class of that base in the files of harness/formats.

    In no other files.
    """
    names = [f"{formats.__name__}.{module.name}" for module in iter_modules(formats.__path__)]
    found = [each for name in names for each in vars(import_module(name)).values()]
    return {
        each.__name__: each for each in found if isinstance(each, type) and issubclass(each, base)
    }


def _plain(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _formats(found, where: str, role: str) -> dict[str, Format]:
    """{name: format} of [{"format", "names"}]."""
    if not isinstance(found, list):
        raise DataError(f"{where}={found}: needs a list of formats and the names that have them.")
    named = {}
    for index, group in enumerate(found):
        names = group.get("names") if isinstance(group, Mapping) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}[{index}]: needs a format and the names that have it.")
        format = format_of(group.get("format"), f"{where}[{index}].format", Format)
        if format.role != role:
            raise DataError(f"{where}[{index}].format.role={format.role}: needs {role}.")
        named |= dict.fromkeys(names, format)
    return named


def _grouped(named: Mapping[str, Format]) -> list[dict]:
    names: dict[Format, list[str]] = {}
    for name, format in named.items():
        names.setdefault(format, []).append(name)
    return [{"format": spec(format), "names": own} for format, own in names.items()]
