"""Mixed precision: `format.overrides` resolved to single linears.

    overrides:
      lm_head: 8                                # outside the blocks, quantized only when named here
      embed_tokens: 8                           # weights only, to nearest
      decoder: {act: 16}                        # every linear of every block
      down_proj: {weight: 8, act: int8}         # this linear of every block, and of every expert
      experts.down_proj.3: int8                 # of expert 3;  experts.down_proj: of all experts
      first_2: mxfp8                            # blocks 0 and 1;  last_1: the last one
      blocks_4_7: {down_proj: 8}                # this linear of these blocks

A value is a number of bits (of the weight; 16 leaves it float), an option of conf/format (its
weight and act), or a mapping of weight and act to bits, an option, or settings that replace those
of `format.weight` and `format.act`. A linear is named by the last part of its name or by several.
What is named more closely wins: decoder < linear < blocks < linear of blocks, more parts over
fewer, one expert over all; two ranges of blocks that meet are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.config.build import build, option
from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.formats import Format
from harness.quantize.named import closeness, ends, fits, linears
from harness.structure.structure import Structure

PARTS = ("weight", "act")
Place = tuple[int | None, str]  # (block, linear); None: outside the blocks
Parts = dict[str, Format | None]  # by PARTS; None: float
Rank = tuple[int, ...]  # of what is named more closely it is larger
RANGE = re.compile(r"(?:first|last)_(\d+)|blocks_(\d+)(?:_(\d+))?")


@dataclass(frozen=True)
class _Base:
    """What an override changes.

    settings: {part: section} of `format`; serves: {part: settings} of `export.serves`.
    """

    settings: Mapping[str, Mapping]
    serves: Mapping[str, Mapping]

    def act(self) -> Format | None:
        """The format of activations where no override names another."""
        return build(self.settings["act"], "format.act", Format)


def resolve(
    section: Mapping, structure: Structure, serves: Mapping[str, Mapping] | None = None
) -> dict[Place, Parts]:
    """{(block, linear): {part: Format or None}} from a `format` section.

    serves: `export.serves`, by which options named here are changed as the format itself is. Raises
    ConfigError naming the field.
    """
    base = _Base({part: section[part] for part in PARTS}, serves or {})
    ranked: dict[Place, dict[Rank, tuple[str, Parts]]] = {}
    overrides = section["overrides"]
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"format.overrides={overrides}: needs a mapping such as {{down_proj: 8, lm_head: 8}}, "
            "or null."
        )
    for key, value in overrides.items():
        for field, rank, place, parts in _entries(key, value, base, structure):
            others = ranked.setdefault(place, {})
            if rank in others:
                raise ConfigError(
                    f"{field} and {others[rank][0]} both name block {place[0]}; let the ranges "
                    "not meet."
                )
            others[rank] = (field, parts)
    resolved = {}
    for place, entries in ranked.items():
        merged: Parts = {}
        # what is named more closely has the higher rank, and replaces what is there
        for rank in sorted(entries):
            merged |= entries[rank][1]
        resolved[place] = merged
    _one_activation(resolved, base, structure)
    return resolved


def _entries(
    key: str, value: object, base: _Base, structure: Structure
) -> Iterator[tuple[str, Rank, Place, Parts]]:
    """(field, rank, place, parts) of all that one key of `format.overrides` names."""
    field = f"format.overrides.{key}"
    places = linears(structure)
    outside = {name.rpartition(".")[2]: name for name in (structure.embedding, structure.head)}
    named = [place for place in places if fits(str(key), place[1])]
    if key in outside:
        embedding = outside[key] == structure.embedding
        yield field, (1,), (None, outside[key]), _outside(field, value, base, embedding)
    elif key == "decoder":
        parts = _parts(field, value, base)
        yield from ((field, (0,), place, parts) for place in places)
    elif named:
        parts = _parts(field, value, base)
        yield from ((field, (1, *closeness(key)), place, parts) for place in named)
    elif RANGE.fullmatch(str(key)):
        blocks = _blocks(field, key, structure.layers)
        for rank, place, source, parts in _within(field, value, base, places):
            if place[0] in blocks:
                yield source, rank, place, parts
    else:
        legal = (*ends(places), *outside, "decoder", "first_N", "last_N", "blocks_N")
        legal = (*legal, "blocks_N_M")
        raise ConfigError(
            f"{field}: names nothing to quantize.{nearest(key, legal)} Legal: {', '.join(legal)}."
        )


def _within(
    field: str, value: object, base: _Base, places: Sequence[tuple[int, str]]
) -> Iterator[tuple[Rank, tuple[int, str], str, Parts]]:
    """(rank, place, field, parts) of what a range of blocks says, in any block."""
    # a mapping names linears, unless it names parts: then it is of all linears
    if isinstance(value, Mapping) and value and not set(value) & set(PARTS):
        for key, entry in value.items():
            named = [place for place in places if fits(str(key), place[1])]
            if not named:
                legal = ends(places)
                raise ConfigError(
                    f"{field}.{key}: no such linear.{nearest(key, legal)} "
                    f"Legal: {', '.join(legal)}, weight, act."
                )
            parts = _parts(f"{field}.{key}", entry, base)
            yield from (((3, *closeness(key)), place, f"{field}.{key}", parts) for place in named)
    else:
        parts = _parts(field, value, base)
        yield from (((2,), place, field, parts) for place in places)


def _blocks(field: str, key: str, layers: int) -> range:
    """The blocks that a key such as first_2 or blocks_4_7 names."""
    match = RANGE.fullmatch(key)
    assert match is not None
    end, low, high = match.groups()
    if end is None:
        blocks = range(int(low), int(high or low) + 1)
    elif key.startswith("first"):
        blocks = range(int(end))
    else:
        blocks = range(layers - int(end), layers)
    if not blocks or blocks[0] < 0 or blocks[-1] >= layers:
        raise ConfigError(f"{field}: the model has blocks 0 to {layers - 1}.")
    return blocks


def _outside(field: str, value: object, base: _Base, embedding: bool) -> Parts:
    """Parts of the embedding or the head.

    A quantized head reads its activation like the other linears unless said otherwise.
    """
    parts = _parts(field, value, base)
    if not embedding:
        act = None
        if parts.get("weight") is not None:
            act = base.act()
        return {"weight": None, "act": act} | parts
    if isinstance(value, Mapping) and "act" in value:
        raise ConfigError(
            f"{field}.act: tokens are looked up there, no activation is read; set weight only."
        )
    return {"weight": parts.get("weight")}


def _parts(field: str, value: object, base: _Base) -> Parts:
    """{part: Format or None} of one value."""
    if isinstance(value, bool) or not isinstance(value, int | str | Mapping):
        raise ConfigError(
            f"{field}={value}: needs bits, an option of format, or a mapping of weight and act."
        )
    if isinstance(value, int):
        return {"weight": _part(field, "weight", value, base)}
    if isinstance(value, str):
        return {part: _part(field, part, value, base) for part in PARTS}
    unknown = [key for key in value if key not in PARTS]
    if unknown or not value:
        names = ", ".join(map(str, unknown)) or "nothing"
        raise ConfigError(f"{field}: {names} is not a part; choose weight or act.")
    return {part: _part(f"{field}.{part}", part, entry, base) for part, entry in value.items()}


def _part(field: str, part: str, value: object, base: _Base) -> Format | None:
    """The Format of one part, or None at 16 bits."""
    if isinstance(value, str):
        served = as_served(_option(field, value)[part], base.serves.get(part))
        return build(served, field, Format)
    # YAML's true is an int of Python's, and no number of bits
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 16:
            return None
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field}={value}: needs bits, an option of format, or settings.")
    changed = dict(value)
    # settings of another class replace all, for that class need not know the others
    if "_target_" not in value:
        changed = {**base.settings[part], **value}
    if changed.get("_target_") is None and changed.get("bits") != 16:
        raise ConfigError(
            f"{field}={dict(value)}: format.{part} is off, so there is nothing to change; give an "
            "option of format such as int8."
        )
    try:
        return build(changed, field, Format)
    except ConfigError as error:
        raise ConfigError(
            f"{error} For another number format name its option, e.g. {field}=mxfp8."
        ) from None


def as_served(settings: Mapping, serves: Mapping | None) -> dict:
    """The settings of one format, changed to the values by which an exported file is computed.

    serves: a part of `export.serves`; what the format has no setting for is left out.
    """
    return {key: (serves or {}).get(key, value) for key, value in settings.items()}


def _option(field: str, name: str) -> dict:
    """An option of conf/format with what it inherits."""
    try:
        return option("format", name)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None


def _one_activation(resolved: Mapping[Place, Parts], base: _Base, structure: Structure) -> None:
    """Linears that read one activation must agree on its format, for it is quantized once."""
    everywhere = base.act()
    for layer in range(structure.layers):
        for site in structure.expanded(layer):
            acts = [resolved.get((layer, name), {}).get("act", everywhere) for name in site.linears]
            if any(act != acts[0] for act in acts):
                readers = ", ".join(name.rpartition(".")[2] for name in site.linears)
                raise ConfigError(
                    f"format.overrides: {readers} of block {layer} read one activation but would "
                    "quantize it differently; give all of them the same act."
                )
