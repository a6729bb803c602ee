"""Mixed precision: `format.overrides` resolved to single linears.

    overrides:
      lm_head: 8                                # outside the blocks, quantized only when named here
      embed_tokens: 8                           # weights only, to nearest
      decoder: {act: 16}                        # every linear of every block
      down_proj: {weight: 8, act: int8}         # this linear of every block
      first_2: mxfp8                            # blocks 0 and 1;  last_1: the last one
      blocks_4_7: {down_proj: 8}                # this linear of these blocks

A value is a number of bits (of the weight; 16 leaves it float), an option of conf/format (its
weight and act), or a mapping of weight and act to bits, an option, or settings that replace those
of `format.weight` and `format.act`. What is named more closely wins: decoder < linear < blocks <
linear of blocks; two ranges of blocks that meet are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from harness.config.build import build, option
from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.formats import Format
from harness.models.adapter import Family

PARTS = ("weight", "act")
RANGE = re.compile(r"(?:first|last)_(\d+)|blocks_(\d+)(?:_(\d+))?")


def resolve(
    chosen: Mapping, family: Family, layers: int, serves: Mapping[str, Mapping] | None = None
) -> dict[tuple[int | None, str], dict]:
    """{(block, linear): {part: Format or None}} from a `format` section.

    serves: `export.serves`, by which options named here are changed as the format itself is. Raises
    ConfigError naming the field.
    """
    chosen = {**chosen, "serves": serves or {}}
    linears = {name.rpartition(".")[2]: name for site in family.sites for name in site.linears}
    outside = {name.rpartition(".")[2]: name for name in (family.embedding, family.head)}
    ranked: dict[tuple[int | None, str], dict[int, tuple[str, dict]]] = {}

    def put(field: str, rank: int, where: tuple[int | None, str], parts: dict) -> None:
        other = ranked.setdefault(where, {}).get(rank)
        if other is not None:
            raise ConfigError(
                f"{field} and {other[0]} both name block {where[0]}; let the ranges not meet."
            )
        ranked[where][rank] = (field, parts)

    overrides = {} if chosen["overrides"] is None else chosen["overrides"]
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"format.overrides={overrides}: needs a mapping such as {{down_proj: 8, lm_head: 8}}, "
            "or null."
        )
    for key, value in overrides.items():
        field = f"format.overrides.{key}"
        if key in outside:
            put(
                field,
                1,
                (None, outside[key]),
                _outside(field, value, chosen, key == family.embedding.rpartition(".")[2]),
            )
        elif key in linears or key == "decoder":
            parts = _parts(field, value, chosen)
            for layer in range(layers):
                for name in linears.values() if key == "decoder" else [linears[key]]:
                    put(field, 0 if key == "decoder" else 1, (layer, name), parts)
        elif RANGE.fullmatch(str(key)):
            for layer in _blocks(field, key, layers):
                for rank, name, own, parts in _within(field, value, chosen, linears):
                    put(own, rank, (layer, name), parts)
        else:
            legal = (*linears, *outside, "decoder", "first_N", "last_N", "blocks_N", "blocks_N_M")
            raise ConfigError(
                f"{field}: names nothing to quantize.{nearest(key, legal)} Legal: "
                f"{', '.join(legal)}."
            )
    resolved = {}
    for where, found in ranked.items():
        merged: dict = {}
        for rank in sorted(found):
            merged |= found[rank][1]
        resolved[where] = merged
    _one_activation(resolved, chosen, family, layers)
    return resolved


def _within(
    field: str, value, chosen: Mapping, linears: Mapping[str, str]
) -> Iterator[tuple[int, str, str, dict]]:
    """(rank, linear, field, parts) of what one range of blocks says."""
    if isinstance(value, Mapping) and value and not set(value) & set(PARTS):
        for key, own in value.items():
            if key not in linears:
                raise ConfigError(
                    f"{field}.{key}: no such linear.{nearest(key, linears)} Legal: "
                    f"{', '.join(linears)}, weight, "
                    "act."
                )
            yield 3, linears[key], f"{field}.{key}", _parts(f"{field}.{key}", own, chosen)
    else:
        parts = _parts(field, value, chosen)
        yield from ((2, name, field, parts) for name in linears.values())


def _blocks(field: str, key: str, layers: int) -> range:
    match = RANGE.fullmatch(key)
    assert match is not None
    end, low, high = match.groups()
    if end is not None:
        count = int(end)
        found = range(count) if key.startswith("first") else range(layers - count, layers)
    else:
        found = range(int(low), int(high or low) + 1)
    if not found or found[0] < 0 or found[-1] >= layers:
        raise ConfigError(f"{field}: the model has blocks 0 to {layers - 1}.")
    return found


def _outside(field: str, value, chosen: Mapping, embedding: bool) -> dict:
    """Parts of the embedding or the head.

    A quantized head reads its activation like the other linears unless said otherwise.
    """
    parts = _parts(field, value, chosen)
    if not embedding:
        quantized = parts.get("weight") is not None
        return {
            "weight": None,
            "act": build(chosen["act"], "format.act", Format) if quantized else None,
        } | parts
    if isinstance(value, Mapping) and "act" in value:
        raise ConfigError(
            f"{field}.act: tokens are looked up there, no activation is read; set weight only."
        )
    return {"weight": parts.get("weight")}


def _parts(field: str, value, chosen: Mapping) -> dict:
    """{part: Format or None} of one value."""
    if isinstance(value, bool) or not isinstance(value, int | str | Mapping):
        raise ConfigError(
            f"{field}={value}: needs bits, an option of format, or a mapping of weight and act."
        )
    if isinstance(value, int):
        return {"weight": _part(field, "weight", value, chosen)}
    if isinstance(value, str):
        return {part: _part(field, part, value, chosen) for part in PARTS}
    unknown = [key for key in value if key not in PARTS]
    if unknown or not value:
        raise ConfigError(
            f"{field}: {', '.join(map(str, unknown)) or 'nothing'} is not a part; choose weight or "
            "act."
        )
    return {part: _part(f"{field}.{part}", part, own, chosen) for part, own in value.items()}


def _part(field: str, part: str, value, chosen: Mapping):
    """The Format of one part, or None at 16 bits."""
    if isinstance(value, str):
        return build(
            as_served(_option(field, value)[part], chosen["serves"].get(part)), field, Format
        )
    base = chosen[part]
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 16:
            return None
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field}={value}: needs bits, an option of format, or settings.")
    changed = dict(value) if "_target_" in value else {**base, **value}
    if changed.get("_target_") is None and changed.get("bits") != 16:
        raise ConfigError(
            f"{field}={dict(value)}: format.{part} is off, so there is nothing to change; give an "
            "option of "
            "format such as int8."
        )
    try:
        return build(changed, field, Format)
    except ConfigError as error:
        raise ConfigError(
            f"{error} For another number format name its option, e.g. {field}=mxfp8."
        ) from None


def as_served(settings: Mapping, serves: Mapping | None) -> dict:
    """The settings of one format, with the values by which an exported file is computed where it
    has such settings. serves: a part of `export.serves`.
    """
    return {key: (serves or {}).get(key, value) for key, value in settings.items()}


def _option(field: str, name: str) -> dict:
    """An option of conf/format with what it inherits."""
    try:
        found = option("format", name)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None
    return found


def _one_activation(resolved: Mapping, chosen: Mapping, family: Family, layers: int) -> None:
    """Linears that read one activation must agree on its format, for it is quantized once."""
    base = build(chosen["act"], "format.act", Format)
    for layer in range(layers):
        for site in family.sites:
            acts = [resolved.get((layer, name), {}).get("act", base) for name in site.linears]
            if any(act != acts[0] for act in acts):
                readers = ", ".join(name.rpartition(".")[2] for name in site.linears)
                raise ConfigError(
                    f"format.overrides: {readers} of block {layer} read one activation but would "
                    "quantize it "
                    "differently; give all of them the same act."
                )
