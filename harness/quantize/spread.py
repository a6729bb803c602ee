"""The linears of a block solved on several ranks at once, largest first; all ranks have them then.

    a linear goes to the rank that has least to do so far;  cost = rows x columns

Linears of one site have one Hessian, and may share a global scale: a rank solves its own of them
side by side, as `Solver.part` cuts them out. Where a solver wants a site whole it gets it whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.parallel import Ranks
from harness.solvers import Problem, Solution, Solver

Problems = Mapping[str, Problem]  # by site


def spread(solver: Solver, groups: Sequence[Problems], ranks: Ranks) -> dict[str, Solution]:
    """{site: its solution} of all groups; the problems of a group are solved together."""
    owners = assigned(solver, [each for group in groups for each in group.values()], ranks.count)
    own: dict[str, Solution] = {}
    for group in groups:
        parts = {}
        for site, problem in group.items():
            names = [name for name in problem.weights if owners[name] == ranks.rank]
            if names:
                parts[site] = solver.part(problem, names)
        if parts:
            own |= zip(parts, solver.solved(list(parts.values())))
    everyone = ranks.gather(own)
    return {
        site: _joined(problem, [own[site] for own in everyone if site in own])
        for group in groups
        for site, problem in group.items()
    }


def assigned(solver: Solver, problems: Sequence[Problem], count: int) -> dict[str, int]:
    """{linear: the rank that solves it}."""
    units: list[tuple[int, list[str]]] = []
    for problem in problems:
        sizes = {name: weight.numel() for name, weight in problem.weights.items()}
        if solver.apart:
            units += [(size, [name]) for name, size in sizes.items()]
        else:
            units.append((sum(sizes.values()), list(sizes)))
    loads = [0] * count
    owners = {}
    for size, names in sorted(units, key=lambda unit: -unit[0]):  # stable
        rank = loads.index(min(loads))
        loads[rank] += size
        owners |= dict.fromkeys(names, rank)
    return owners


def _joined(problem: Problem, parts: Sequence[Solution]) -> Solution:
    """One solution of a site's parts, whose linears are in the problem's order."""
    found = {name: q for part in parts for name, q in part.qtensors.items()}
    qtensors = {name: found[name] for name in problem.weights if name in found}
    return Solution(qtensors, {key: x for part in parts for key, x in part.report.items()})
