"""Solvers turn transformed weights into QTensors.

A new one is one file here and one in conf/solver.
"""

from harness.solvers.adascale import AdaScale
from harness.solvers.awq import AWQ
from harness.solvers.base import Solver
from harness.solvers.block import Block
from harness.solvers.gptq import GPTQ
from harness.solvers.minmax import MinMax
from harness.solvers.problem import Problem, Solution
from harness.solvers.rtn import RTN
from harness.solvers.signround import SignRound

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "AdaScale",
    "Block",
    "MinMax",
    "Problem",
    "SignRound",
    "Solution",
    "Solver",
]
