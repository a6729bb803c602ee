"""minmax: round to nearest on AIMET's symmetric grid, the baseline AdaScale is measured against.

    delta = max(M / Q, -m / (Q + 1)),     W <- delta clamp(RNE(W / delta), -Q - 1, Q)

m, M: least and greatest weight of a channel (or group); positive and negative extremes are scaled
separately, 8:7 at four bits. That is rtn with observer=minmax and, for symmetric integers,
int_scale=aimet. Source: AIMET (qualcomm/aimet), its `tf`/min-max calibration of symmetric weights.
Differences: other formats are taken, too; they have one rule, which stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.formats import Format, Integer
from harness.solvers.problem import Problem, Solution
from harness.solvers.rtn import RTN


@dataclass(frozen=True, kw_only=True)
class MinMax(RTN):
    """No statistics of the activations, and no search."""

    encodings: ClassVar[str] = "min_max_encodings"
    propagates: ClassVar[tuple[str, ...]] = ("none",)

    def check(self, format: Format) -> list[str]:
        why = "its rule is for symmetric integers"
        if isinstance(format, Integer) and format.symmetric:
            if minmax(format) != format:
                return []
            why = "the format has its rule already"
        return [
            f"solver=minmax with {type(format).__name__} (symmetric={format.symmetric}): {why}, "
            "so this is rtn with observer=minmax"
        ]

    def curvature(self, formats: Iterable[Format], width: int) -> int:
        return 0

    def solve(self, problem: Problem) -> Solution:
        formats = {name: minmax(format) for name, format in problem.formats.items()}
        return super().solve(replace(problem, formats=formats))


def minmax(format: Format) -> Format:
    """The same grid, with scales from the extremes."""
    if isinstance(format, Integer) and format.symmetric:
        return replace(format, observer="minmax", int_scale="aimet")
    return replace(format, observer="minmax")
