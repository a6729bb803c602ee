"""Solvers turn transformed weights into QTensors. A new one is one file here and one in conf/solver."""

from harness.solvers.base import Problem, Solution, Solver
from harness.solvers.gptq import GPTQ
from harness.solvers.rtn import RTN

__all__ = ["GPTQ", "RTN", "Problem", "Solution", "Solver"]
