"""Placements as JSON and tensors, and back.

What a file says is data: its shape is checked, and only codecs come of it.

    {"notes": {..}, "residual": C, "query_key": C,
     "merged": [[layer, site, C], ..], "online": .., "encoders": .., "decoders": ..,
     "clips": [[layer, linear, {"act": ratio, "weight": ratio}], ..]}
    C = null | {"codec": name, "fields": {field: V}}
    V = C | scalar | [V, ..] | {"tensor": name} | {"hadamard": n, "signs": V}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import TypeGuard, get_args, get_origin, get_type_hints

from torch import Tensor, contiguous_format

from harness.codecs.codec import Codec
from harness.codecs.placement import Placement, Where
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
    if placement.clips:  # which came later: files without any stay as they were
        spec["clips"] = [[*where, dict(ratios)] for where, ratios in placement.clips.items()]
    return spec


def unpack(spec: Mapping, tensors: Mapping[str, Tensor]) -> Placement:
    """Inverse of `pack`.

    Raises DataError where the JSON is not that of a placement of these tensors.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("notes"), Mapping):
        raise DataError("a placement's description is damaged: it needs notes and places.")
    return Placement(
        residual=_codec(spec.get("residual"), tensors, "residual"),
        query_key=_codec(spec.get("query_key"), tensors, "query_key"),
        merged=_placed(spec.get("merged"), tensors, "merged"),
        online=_placed(spec.get("online"), tensors, "online"),
        encoders=_placed(spec.get("encoders"), tensors, "encoders"),
        decoders=_placed(spec.get("decoders"), tensors, "decoders"),
        notes=spec["notes"],
        clips=dict(_clip(entry) for entry in spec.get("clips", ())),
    )


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """What stands for a value in the file; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=contiguous_format)
        return {"tensor": name}
    if isinstance(value, Hadamard):
        return {"hadamard": value.n, "signs": _pack(value.signs, f"{name}.signs", tensors)}
    if isinstance(value, Codec):
        inner = {
            field.name: _pack(getattr(value, field.name), f"{name}.{field.name}", tensors)
            for field in fields(value)
        }
        return {"codec": type(value).__name__, "fields": inner}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _placed(spec: object, tensors: Mapping[str, Tensor], where: str) -> dict[Where, Codec]:
    """{(layer, name): codec} of one kind of place."""
    codecs = {}
    for entry in spec if isinstance(spec, list) else [spec]:
        if not _keyed(entry):
            raise DataError(
                f"a placement's description is damaged: {where} needs [layer, name, codec], "
                f"not {entry}."
            )
        layer, name, description = entry
        place = f"{where}.{layer}.{name}"
        codec = _codec(description, tensors, place)
        if codec is None:
            raise DataError(f"a placement's description is damaged: {place} is no codec.")
        codecs[layer, name] = codec
    return codecs


def _keyed(entry: object) -> TypeGuard[list]:
    """Whether an entry is [layer, name, ..]."""
    # a truth value is an int to isinstance, and no layer
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and type(entry[0]) in (int, type(None))
        and type(entry[1]) is str
    )


def _clip(entry: object) -> tuple[Where, Mapping[str, float]]:
    """((layer, linear), ratios) of one entry of `clips`."""
    if _keyed(entry):
        layer, linear, ratios = entry
        if isinstance(ratios, Mapping) and all(
            type(ratio) is float and 0 < ratio <= 1 for ratio in ratios.values()
        ):
            return (layer, linear), ratios
    raise DataError(
        "a placement's description is damaged: clips needs [layer, linear, ratios in (0, 1]], "
        f"not {entry}."
    )


def _codec(spec: object, tensors: Mapping[str, Tensor], where: str) -> Codec | None:
    """The codec of one C."""
    value = _value(spec, tensors, where)
    if value is None or isinstance(value, Codec):
        return value
    raise DataError(f"a placement's description is damaged: {where} is no codec.")


def _value(spec: object, tensors: Mapping[str, Tensor], where: str) -> object:
    """What one V stands for."""
    if isinstance(spec, list):
        return [_value(item, tensors, f"{where}.{i}") for i, item in enumerate(spec)]
    if not isinstance(spec, Mapping):
        return spec
    value = None
    kind = frozenset(spec)
    if kind == {"tensor"} and isinstance(spec["tensor"], str):
        value = tensors.get(spec["tensor"])
    elif kind == {"hadamard", "signs"}:
        value = _hadamard(spec["hadamard"], _value(spec["signs"], tensors, f"{where}.signs"))
    elif kind == {"codec", "fields"} and isinstance(spec["fields"], Mapping):
        values = {
            name: _value(field, tensors, f"{where}.{name}")
            for name, field in spec["fields"].items()
        }
        value = _built(str(spec["codec"]), values)
    if value is None:
        raise DataError(
            f"a placement's description is damaged: {where} is neither a codec nor one of "
            "the file's matrices."
        )
    return value


def _hadamard(n: object, signs: object) -> Hadamard | None:
    """The matrix of that order and those signs, or None where they do not describe one."""
    if type(n) is not int or n < 1:
        return None
    if signs is None:
        return Hadamard(n)
    if isinstance(signs, Tensor) and signs.shape == (n,):
        return Hadamard(n, signs)
    return None


def _built(name: str, values: dict[str, object]) -> Codec | None:
    """The codec of that class with those fields, or None where they do not fit."""
    # those of composed.py, too, which placement.py imports
    classes = {codec.__name__: codec for codec in Codec.__subclasses__()}
    if name not in classes:
        return None
    hints = get_type_hints(classes[name])
    if set(values) != set(hints) or not all(_is(values[key], hints[key]) for key in hints):
        return None
    return classes[name](**values)


def _is(value: object, hint) -> bool:
    """Whether a value is of a codec's declared field type."""
    if isinstance(hint, UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(_is(item, get_args(hint)[0]) for item in value)
    if hint is int:  # and no truth value
        return type(value) is int
    return isinstance(value, hint)
