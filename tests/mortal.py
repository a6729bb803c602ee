"""run.py, with a solver that ends as told in the midst of a run: for tests of several ranks.

The file `end` of the working directory says how and on which rank: `raise 1`, `kill 0`.
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Sequence
from pathlib import Path

from harness.solvers import GPTQ, Problem, Solution

solve = GPTQ.solve_together


def ending(self: GPTQ, problems: Sequence[Problem]) -> list[Solution]:
    """Ends when it meets a linear of the second block."""
    if Path("end").exists() and list(Path("runs").glob("tiny*/blocks/0000.safetensors")):
        how, rank = Path("end").read_text().split()
        if os.environ.get("RANK") == rank:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no luck")
    return solve(self, problems)


GPTQ.solve_together = ending  # of this process
runpy.run_path(str(Path(__file__).parent.parent / "run.py"), run_name="__main__")
