"""What the files of a checkpoint say, as data.

Every field is checked; nothing is built or imported because a file names it, but the formats that
the options of an installed plug-in name.

    harness.json                version, dtype, {"format", "names"} of weights and activations,
                                "kv"; read as a Record
    digests.json                {file: sha256}
    quantization_metadata.json  what the checkpoint is, for people and tools

A format stands there by the name of its class and its fields. The name is looked up among the
formats of this project and those that a plug-in offers as options; the fields are plain values and
the class itself judges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

import torch

from harness import formats
from harness.checkpoints.native_files import RECORD, VERSION, recorded
from harness.config.build import class_of
from harness.config.errors import ConfigError, DataError
from harness.config.plugins import plugins
from harness.formats import Format, KVCache

SPELLED = "harness.formats."  # in front of a class's name in the file
FLOATS = ("float32", "bfloat16", "float16")
F = TypeVar("F", Format, KVCache)


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
        values = recorded(folder)
        where = folder / RECORD
        dtype = values.get("dtype")
        if dtype not in FLOATS:
            raise DataError(f"{where}: dtype={dtype}: needs one of {', '.join(FLOATS)}.")
        kv = values.get("kv")
        return cls(
            dtype=getattr(torch, dtype),
            weights=_formats(values.get("weights"), f"{where}: weights", "weight"),
            activations=_formats(values.get("activations"), f"{where}: activations", "activation"),
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
    return {"_target_": _spelled(type(format)), **asdict(format)}


def format_of(entry: object, where: str, base: type[F]) -> F:
    """Inverse of `spec`, for the formats of that base, of this project and of installed plug-ins.

    Raises DataError, beginning with `where`; ConfigError where a plug-in's options cannot be read.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}={entry}: needs a format, its class and its fields.")
    name = str(entry.get("_target_"))
    kind = _kind(name, base)
    if kind is None:
        raise DataError(
            f"{where}._target_={name}: is no {base.__name__.lower()} of this project, nor of an "
            "option that an installed plug-in offers."
        )
    values = {key: value for key, value in entry.items() if key != "_target_"}
    legal = {field.name for field in fields(kind)}
    for key, value in values.items():
        nested = value.values() if key == "mse" and isinstance(value, Mapping) else [value]
        if key not in legal or not all(_plain(each) for each in nested):
            raise DataError(f"{where}.{key}={value}: {kind.__name__} has no such field or value.")
    try:
        return kind(**values)
    except (ConfigError, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from None


def _kind(name: str, base: type[F]) -> type[F] | None:
    """The class that a file names; None where there is no such format."""
    if name.startswith(SPELLED):
        return classes(base).get(name.removeprefix(SPELLED))
    offering = [plugin for plugin in plugins() if plugin.package == name.partition(".")[0]]
    targets = [target for plugin in offering for target in plugin.targets("format")]
    return next((kind for kind in _built(targets, base) if _spelled(kind) == name), None)


def _built(targets: list[str], base: type[F]) -> Iterator[type[F]]:
    for target in targets:
        try:
            yield class_of(target, "format", base)
        except ConfigError:  # what stands there is of another kind
            continue


def _spelled(kind: type) -> str:
    """The name of a class in a file: of our own no more than that, so that it outlives a move."""
    module = SPELLED if kind.__module__.startswith(SPELLED) else f"{kind.__module__}."
    return f"{module}{kind.__name__}"


def classes(base: type[F]) -> dict[str, type[F]]:
    """{name: class} of every class of that base that a file of harness/formats itself defines."""
    names = [f"{formats.__name__}.{module.name}" for module in iter_modules(formats.__path__)]
    members = [each for name in names for each in vars(import_module(name)).values()]
    return {
        each.__name__: each
        for each in members
        if isinstance(each, type) and issubclass(each, base) and each.__module__ in names
    }


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _formats(groups: object, where: str, role: str) -> dict[str, Format]:
    """{name: format} of [{"format", "names"}]."""
    if not isinstance(groups, list):
        raise DataError(f"{where}={groups}: needs a list of formats and the names that have them.")
    named = {}
    for index, group in enumerate(groups):
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
    return [{"format": spec(format), "names": group} for format, group in names.items()]
