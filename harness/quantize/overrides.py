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
Place = tuple[int | None, str]  # (block, linear); None: outside the blocks
RANGE = re.compile(r"(?:first|last)_(\d+)|blocks_(\d+)(?:_(\d+))?")


def resolve(
    chosen: Mapping, family: Family, layers: int, serves: Mapping[str, Mapping] | None = None
) -> dict[Place, dict]:
    """{(block, linear): {part: Format or None}} from a `format` section.

    serves: `export.serves`, by which options named here are changed as the format itself is. Raises
    ConfigError naming the field.
    """
    chosen = {**chosen, "serves": serves or {}}
    ranked: dict[Place, dict[int, tuple[str, dict]]] = {}
    overrides = chosen["overrides"]
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"format.overrides={overrides}: needs a mapping such as {{down_proj: 8, lm_head: 8}}, "
            "or null."
        )
    for key, value in overrides.items():
        for field, rank, place, parts in _entries(key, value, chosen, family, layers):
            others = ranked.setdefault(place, {})
            if rank in others:
                raise ConfigError(
                    f"{field} and {others[rank][0]} both name block {place[0]}; let the ranges "
                    "not meet."
                )
            others[rank] = (field, parts)
    resolved = {}
    for place, entries in ranked.items():
        merged: dict = {}
        # what is named more closely has the higher rank, and replaces what is there
        for rank in sorted(entries):
            merged |= entries[rank][1]
        resolved[place] = merged
    _one_activation(resolved, chosen, family, layers)
    return resolved


def _entries(
    key: str, value, chosen: Mapping, family: Family, layers: int
) -> Iterator[tuple[str, int, Place, dict]]:
    """(field, rank, place, parts) of all that one key of `format.overrides` names."""
    field = f"format.overrides.{key}"
    linears = {name.rpartition(".")[2]: name for site in family.sites for name in site.linears}
    outside = {name.rpartition(".")[2]: name for name in (family.embedding, family.head)}
    if key in outside:
        embedding = outside[key] == family.embedding
        yield field, 1, (None, outside[key]), _outside(field, value, chosen, embedding)
    elif key == "decoder":
        parts = _parts(field, value, chosen)
        yield from (
            (field, 0, (i, name), parts) for i in range(layers) for name in linears.values()
        )
    elif key in linears:
        parts = _parts(field, value, chosen)
        yield from ((field, 1, (i, linears[key]), parts) for i in range(layers))
    elif RANGE.fullmatch(str(key)):
        for layer in _blocks(field, key, layers):
            for rank, name, source, parts in _within(field, value, chosen, linears):
                yield source, rank, (layer, name), parts
    else:
        legal = (*linears, *outside, "decoder", "first_N", "last_N", "blocks_N", "blocks_N_M")
        raise ConfigError(
            f"{field}: names nothing to quantize.{nearest(key, legal)} Legal: {', '.join(legal)}."
        )


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
        act = None
        if parts.get("weight") is not None:
            act = build(chosen["act"], "format.act", Format)
        return {"weight": None, "act": act} | parts
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
        return option("format", name)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None


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
