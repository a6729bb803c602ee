"""W <- Q(c W): round to nearest what was shrunk a little, with the scales of the weight as it
is."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.checks import number
from harness.solvers import Problem, Solution, Solver


@dataclass(frozen=True, kw_only=True)
class Shrink(Solver):
    """factor: c, in [0, 1]."""

    factor: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        number("solver.factor", self.factor, 0, 1)

    def solve(self, problem: Problem) -> Solution:
        scales = self.static_scales(problem)
        qtensors = {
            name: problem.formats[name].quantize(self.factor * weight, scales=scales[name])
            for name, weight in problem.weights.items()
        }
        return Solution(qtensors, report={"factor": self.factor})
