"""What a name among the candidates of format=auto stands for: the first of these that it is.

    int4, int8    int4's weight, in its groups, with 4 or 8 bits
    an option     its weight, where conf/format, a plug-in or HARNESS_CONF has one of that name
    intN          int4's weight with N bits

Imports no torch, for ids are made of it.
"""

from __future__ import annotations

import re

from harness.config import options
from harness.config.build import option

GROUPS = "int4"  # the option whose weight takes other bits
# int8 by itself has one scale a channel; in a list of candidates bits alone are to differ.
ALWAYS = ("int4", "int8")
INTEGER = re.compile(r"int(\d+)")


def named_by(candidate: str) -> tuple[str, int | None]:
    """(option of conf/format, the bits its weight takes instead of its own), of a candidate.

    The option need not exist.
    """
    integer = INTEGER.fullmatch(candidate)
    if integer and (candidate in ALWAYS or not options.has("format", candidate)):
        return GROUPS, int(integer[1])
    return candidate, None


def weight_of(candidate: str) -> dict:
    """The settings of its weight. Raises ConfigError where there is no such option."""
    name, bits = named_by(candidate)
    weight = option("format", name)["weight"]
    return weight if bits is None else weight | {"bits": bits}
