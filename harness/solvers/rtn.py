"""rtn: W <- Q(W), round to nearest with the format's observer (minmax or mse)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.solvers.base import Problem, Solution, Solver


@dataclass(frozen=True, kw_only=True)
class RTN(Solver):
    """No statistics of the activations; the yardstick of every other solver."""

    unread: ClassVar[tuple[str, ...]] = ("hessian_input",)

    def solve(self, problem: Problem) -> Solution:
        scales = self.static_scales(problem)
        qtensors = {
            n: problem.formats[n].quantize(w, scales=scales[n]) for n, w in problem.weights.items()
        }
        return Solution(qtensors, report={})
