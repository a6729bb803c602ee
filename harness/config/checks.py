"""Checks of single settings.

Each returns the value, or raises a ConfigError with the field, the value and what is legal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

from harness.config.errors import ConfigError

WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
}


def one_of(field: str, value, legal: Iterable):
    """`value` if it is one of `legal`; the error lists the legal values and the nearest one."""
    legal = list(legal)
    if isinstance(value, bool) or value not in legal:
        raise ConfigError(
            f"{field}={value}: not a legal value.{nearest(value, legal)} "
            f"Legal: {', '.join('null' if x is None else str(x) for x in legal)}."
        )
    return value


def integer(field: str, value, low: int = 1, optional: bool = False):
    """`value` if it is an int of at least `low` (or None where that is allowed)."""
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        or_null = " or null" if optional else ""
        raise ConfigError(f"{field}={value}: needs a whole number of at least {low}{or_null}.")
    return value


def number(field: str, value, low: float, high: float):
    """`value` as a float inside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{field}={value}: needs a number from {low} to {high}.")
    return float(value)


def boolean(field: str, value) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field}={value}: needs true or false.")
    return value


def device(field: str, value: str, words: Iterable[str] = ("cpu", "cuda")) -> str:
    """`value` if it is one of these words or cuda:N; torch is not asked for the N-th."""
    if value not in words and not (value.startswith("cuda:") and value[5:].isdecimal()):
        raise ConfigError(f"{field}={value}: needs {', '.join(words)} or cuda:N.")
    return value


def names(field: str, value, legal: Iterable) -> list:
    """`value` if it is a list of distinct legal names, at least one."""
    legal = list(legal)
    listed = isinstance(value, list | tuple) and value and all(name in legal for name in value)
    if not listed or len(set(value)) != len(value):
        raise ConfigError(
            f"{field}={value}: needs a list of some of {', '.join(map(str, legal))}, each once."
        )
    return list(value)


def known_keys(field: str, section: object, known: Iterable[str]) -> None:
    """Refuse a key that nothing would read, and a section that is none."""
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{field.rstrip('.')}={section}: this is a group of settings: {', '.join(known)}."
        )
    for key in section:
        if key not in known:
            raise ConfigError(
                f"{field}{key}: no such setting.{nearest(key, known)} Known: {', '.join(known)}."
            )


def typed(
    field: str, section: object, hints: Mapping[str, object], needed: Iterable[str] = ()
) -> None:
    """Refuse a key of `section` that `hints` {key: its type} lacks, or a value of another type.

    field: what stands before a key, with its dot. needed: keys that may not be left out. A float
    may be written as a whole number, a truth value is no number, a list may stand for any sequence.
    What a type leaves open (ranges, legal words) is for who reads the value.
    """
    known_keys(field, section, hints)
    assert isinstance(section, Mapping)  # known_keys refuses all else
    for key in needed:
        if key not in section:
            raise ConfigError(
                f"{field}{key}: this setting is missing, and nothing runs without it."
            )
    for key, value in section.items():
        if not fits(value, hints[key]):
            raise ConfigError(f"{field}{key}={value}: needs {_words(hints[key])}.")


def fits(value, hint) -> bool:
    """Whether a plain value is of a type, e.g. Mapping[str, float | None]; see `typed`."""
    origin, inner = _parts(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (int, float):
        return not isinstance(value, bool) and isinstance(value, int | origin)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(own, one) for one in inner[1:] for own in value.values()
        )
    if issubclass(origin, Sequence) and origin is not str:
        return isinstance(value, list | tuple) and all(
            fits(own, one) for one in inner[:1] for own in value
        )
    return isinstance(value, origin)


def _parts(hint) -> tuple[type, tuple]:
    """(list, (str,)) of list[str]; what stands for null is its type."""
    return get_origin(hint) or (NoneType if hint is None else hint), get_args(hint)


def _words(hint) -> str:
    origin, inner = _parts(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    if issubclass(origin, Sequence) and origin is not str:
        return "a list" + "".join(f", each {_words(one)}" for one in inner[:1])
    return WORDS.get(origin, "a group of settings")


def nearest(name, known: Iterable) -> str:
    """` Did you mean X?` for the known names closest to `name`, or nothing."""
    close = get_close_matches(str(name), dict.fromkeys(str(k) for k in known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""
