"""rtn: W <- Q(W), round to nearest with the format's observer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.solvers.base import Solver
from harness.solvers.problem import Problem, Solution


@dataclass(frozen=True, kw_only=True)
class RTN(Solver):
    """The yardstick of the others; of activations it knows what an observer reads, if any."""

    apart: ClassVar[bool] = True

    def solve(self, problem: Problem) -> Solution:
        scales = self.static_scales(problem)
        qtensors = {
            n: problem.formats[n].quantize(w, scales=scales[n]) for n, w in problem.weights.items()
        }
        return Solution(qtensors, report={})
