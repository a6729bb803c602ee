"""Placements as JSON and tensors, and back: what a file says is data, its shape is checked and only codecs come of it.

{"notes": {..}, "residual": C, "query_key": C, "merged": [[layer, site, C], ..], "online", "encoders", "decoders"}
C = null | {"codec": name, "fields": {field: V}}
V = C | scalar | [V, ..] | {"tensor": name} | {"hadamard": n, "signs": V}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from torch import Tensor, contiguous_format

from harness.codecs.codec import Codec
from harness.codecs.placement import Placement
from harness.config.errors import DataError
from harness.linalg.hadamard import Hadamard

SINGLE = ("residual", "query_key")
KEYED = ("merged", "online", "encoders", "decoders")


def pack(placement: Placement, tensors: dict[str, Tensor], start: str = "") -> dict:
    """A placement as JSON; its matrices go into `tensors`, under names that begin with `start`."""
    spec: dict = {"notes": dict(placement.notes)}
    for name in SINGLE:
        spec[name] = _pack(getattr(placement, name), f"{start}{name}", tensors)
    for name in KEYED:
        placed = getattr(placement, name).items()
        spec[name] = [
            [*where, _pack(codec, f"{start}{name}.{where[0]}.{where[1]}", tensors)]
            for where, codec in placed
        ]
    return spec


def unpack(spec: Mapping, tensors: Mapping[str, Tensor]) -> Placement:
    """Inverse of `pack`. Raises DataError where the JSON is not that of a placement of these tensors."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("notes"), Mapping):
        raise DataError("a placement's description is damaged: it needs notes and places.")
    single = {name: _codec(spec.get(name), tensors, name) for name in SINGLE}
    keyed = {name: _placed(spec.get(name), tensors, name) for name in KEYED}
    return Placement(**single, **keyed, notes=spec["notes"])


def _pack(value, name: str, tensors: dict[str, Tensor]):
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=contiguous_format)
        return {"tensor": name}
    if isinstance(value, Hadamard):
        return {"hadamard": value.n, "signs": _pack(value.signs, f"{name}.signs", tensors)}
    if isinstance(value, Codec):
        inner = {
            f.name: _pack(getattr(value, f.name), f"{name}.{f.name}", tensors)
            for f in fields(value)
        }
        return {"codec": type(value).__name__, "fields": inner}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _placed(spec, tensors: Mapping[str, Tensor], where: str) -> dict:
    """{(layer, name): codec} of one kind of place."""
    found = {}
    for entry in spec if isinstance(spec, list) else [spec]:
        if not (
            isinstance(entry, list)
            and len(entry) == 3
            and type(entry[0]) in (int, type(None))
            and type(entry[1]) is str
        ):
            raise DataError(
                f"a placement's description is damaged: {where} needs [layer, name, codec], not {entry}."
            )
        found[entry[0], entry[1]] = _codec(
            entry[2], tensors, f"{where}.{entry[0]}.{entry[1]}", optional=False
        )
    return found


def _codec(spec, tensors: Mapping[str, Tensor], where: str, optional: bool = True) -> Codec | None:
    found = _value(spec, tensors, where)
    if not isinstance(found, Codec) and not (optional and found is None):
        raise DataError(f"a placement's description is damaged: {where} is no codec.")
    return found


def _value(spec, tensors: Mapping[str, Tensor], where: str):
    """What one V stands for."""
    if isinstance(spec, list):
        return [_value(item, tensors, f"{where}.{i}") for i, item in enumerate(spec)]
    if not isinstance(spec, Mapping):
        return spec
    kind = frozenset(spec)
    if kind == {"tensor"} and isinstance(spec["tensor"], str) and spec["tensor"] in tensors:
        return tensors[spec["tensor"]]
    if kind == {"hadamard", "signs"}:
        signs = _value(spec["signs"], tensors, f"{where}.signs")
        n = spec["hadamard"]
        if (
            type(n) is int
            and n > 0
            and (signs is None or (isinstance(signs, Tensor) and signs.shape == (n,)))
        ):
            return Hadamard(n, signs)
    if kind == {"codec", "fields"} and isinstance(spec["fields"], Mapping):
        known = {codec.__name__: codec for codec in Codec.__subclasses__()}.get(str(spec["codec"]))
        values = {
            name: _value(value, tensors, f"{where}.{name}")
            for name, value in spec["fields"].items()
        }
        hints = get_type_hints(known) if known is not None else {}
        if (
            known is not None
            and set(values) == set(hints)
            and all(_is(values[name], hints[name]) for name in hints)
        ):
            return known(**values)
    raise DataError(
        f"a placement's description is damaged: {where} is neither a codec nor one of the file's matrices."
    )


def _is(value, hint) -> bool:
    """Whether a value is of a codec's declared field type."""
    if isinstance(hint, UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(_is(item, get_args(hint)[0]) for item in value)
    return type(value) is int if hint is int else isinstance(value, hint)
