r"""gptq: quantize the columns of W one after another, each error pushed onto those still to come.

    H = 2/N sum x^T x + damp mean(diag H) I,     H^-1 = U^T U,  U upper triangular
    for column i:   q_i = Q(w_i);   e_i = (w_i - q_i) / U_ii;   w_j <- w_j - e_i U_ij   for j > i

Source: GPTQ (arXiv 2210.17323); static activation reordering from MR-GPTQ (arXiv 2509.23202).
Differences from the usual code:

- U comes from one Cholesky factor of H with rows and columns reversed, H = R R^T, U = R^-1; the
  inverse of H is never formed.
- Rows of U are scaled to unit diagonal, so what is kept is d_i = w_i - q_i and no division stays in
  the loop.
- Everything is transposed: a column of W is one contiguous row here, and a site's linears lie side
  by side.
- Columns are walked by halving, so every update but those inside the last `block` columns is a
  matrix product, and a column inside takes all pending errors in one matrix-vector product just
  before it is rounded. Halves meet at group borders; when a group's turn comes all errors before it
  have arrived, so `dynamic` scales never read a stale tail.
- A Hessian that cannot be factored is damped ten times more, up to 1, then tried in float64; only
  then the site falls back to RTN, and the report says so.
- Problems of one shape (experts of a layer) go through one loop, each with its own U.

propagate=gptaq adds a term to the loop (asymmetry.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Format, Scales
from harness.solvers.asymmetry import pulls
from harness.solvers.base import Solver
from harness.solvers.columns import Columns, DynamicLattice, Lattice, ManyColumns, StaticLattice
from harness.solvers.inverses import Begun, inverses
from harness.solvers.problem import Problem, Solution


@dataclass(frozen=True, kw_only=True)
class GPTQ(Solver):
    """damp: share of mean(diag H) added to the diagonal.
    order: `default`, or `activation` = descending diag(H).
    scales: `static` = fixed from W before the loop, `dynamic` = each group's from the current W
    (order=default only).
    block: columns solved one by one between matrix products.
    precision: of H, U and the loop.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    propagates: ClassVar[tuple[str, ...]] = ("none", "qep", "gptaq")
    apart: ClassVar[bool] = True

    damp: float = 0.01
    order: str = "default"
    scales: str = "static"
    block: int = 32
    precision: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        number("solver.damp", self.damp, 0.0, 1.0)
        one_of("solver.order", self.order, ("default", "activation"))
        one_of("solver.scales", self.scales, ("static", "dynamic"))
        integer("solver.block", self.block)
        one_of("solver.precision", self.precision, ("float32", "float64"))
        if self.scales == "dynamic" and self.order == "activation":
            raise ConfigError(
                "solver.scales=dynamic with solver.order=activation: a group's columns are then "
                "not neighbours; use solver.scales=static or solver.order=default."
            )

    def check(self, format: Format) -> list[str]:
        for field, value in (("pad", "zero"), ("granularity", "block")):
            if self.scales == "dynamic" and getattr(format, field) == value:
                raise ConfigError(
                    f"solver.scales=dynamic with format.weight.{field}={value}: the last group is "
                    "short; use scales=static."
                )
        if self.scales == "dynamic" and format.under_hessian:
            raise ConfigError(
                f"solver.scales=dynamic with format.weight.observer={format.observer}: its choice "
                "is made once, from W as it was; use solver.scales=static or observer=mse."
            )
        if self.scales == "dynamic" and format.granularity != "group":
            return [
                f"solver.scales=dynamic with format.weight.granularity={format.granularity}: a row "
                "is one group, whose scale is due before any error arrives, so this is "
                "scales=static"
            ]
        return []

    def check_together(self, formats: Sequence[Format], sites: Mapping[str, str]) -> list[str]:
        sizes = {format.group_size for format in formats}
        if self.scales == "dynamic" and len(sizes) > 1:
            listed = ", ".join(map(str, sizes))
            raise ConfigError(
                f"solver.scales=dynamic with formats of different groups ({listed}): linears of "
                "one site are solved together; use solver.scales=static."
            )
        return []

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def solve(self, problem: Problem) -> Solution:
        """Raises DataError for a Hessian with NaN or Inf."""
        return self.solve_together([problem])[0]

    def solve_together(self, problems: Sequence[Problem]) -> list[Solution]:
        """Problems of one shape and format in one loop. Raises DataError as `solve`."""
        alike: dict[tuple, list[int]] = {}
        for index, problem in enumerate(problems):
            alike.setdefault(_shape(problem), []).append(index)
        solutions: dict[int, Solution] = {}
        for places in alike.values():
            found = self._solve_alike([self._begun(problems[index]) for index in places])
            solutions |= zip(places, found)
        return [solutions[index] for index in range(len(problems))]

    def _begun(self, problem: Problem) -> Begun:
        """A problem with its Hessian, scales and order."""
        assert problem.hessian is not None  # as `needs` asks
        hessian = problem.hessian.to(self._dtype)
        dead = hessian.diagonal() == 0
        problem = _masked(problem)  # before the scales: a group then has zero in its range
        order = torch.arange(len(hessian), device=hessian.device)
        reordered = self.order == "activation"
        if reordered:
            # stable: equal diagonals keep their order, whatever machine sorts them
            order = hessian.diagonal().argsort(descending=True, stable=True)
        return Begun(problem, hessian, dead, order, reordered, self.static_scales(problem))

    def part(self, problem: Problem, names: Sequence[str]) -> Problem:
        return super().part(_masked(problem), names)

    def _solve_alike(self, begun: Sequence[Begun]) -> list[Solution]:
        """Problems of one shape."""
        units, damps = inverses(begun, self.damp, self._dtype)
        solvable = [index for index, damp in enumerate(damps) if damp is not None]
        if len(solvable) < len(begun):
            units = units[solvable]
        quantized = iter(self._columns([begun[index] for index in solvable], units))
        solutions = []
        for each, damp in zip(begun, damps):
            report = {
                "damp": damp,
                "redamped": damp is not None and damp > self.damp,
                "fallback": "rtn" if damp is None else None,
                "dead_columns": int(each.dead.sum()),
            }
            weights, stored = each.problem.weights, each.scales
            if damp is not None:
                weights, stored = next(quantized)
            # values that lie on the lattice lose nothing when they are encoded
            qtensors = {
                name: each.problem.formats[name].quantize(weight, scales=stored[name])
                for name, weight in weights.items()
            }
            solutions.append(Solution(qtensors, report))
        return solutions

    def _columns(
        self, begun: Sequence[Begun], units: Tensor
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Scales]]]:
        """(weights on their lattices, scales as they are stored) of each problem."""
        if not begun:
            return
        pull = None
        if self.propagate == "gptaq":
            pull = pulls(begun, self.propagate_alpha, self.propagate_damp, self._dtype)
        sides = []
        for each in begun:
            side = torch.cat(list(each.problem.weights.values())).to(self._dtype)
            sides.append(side[:, each.order] if each.reordered else side)
        rows = len(sides[0])
        work = torch.cat(sides).T.contiguous()
        del sides
        quantized = torch.empty_like(work)
        lattice = self._lattice(begun)
        if len(begun) == 1:
            one = None if pull is None else pull[0]
            Columns(work, quantized, units[0], lattice, self.block, one).solve(0, len(work))
        else:
            shape = (len(work), len(begun), rows)
            many = work.view(shape), quantized.view(shape)
            ManyColumns(*many, units, lattice, self.block, pull).solve(0, len(work))
        del work
        for each, columns in zip(begun, quantized.T.contiguous().split(rows)):
            values = columns
            if each.reordered:
                values = torch.empty_like(columns)
                values[:, each.order] = columns
            weights = each.problem.weights
            parts = values.split([len(weight) for weight in weights.values()])
            yield (
                {name: part.to(weights[name].dtype) for name, part in zip(weights, parts)},
                {name: lattice.stored(name) for name in weights},
            )

    def _lattice(self, begun: Sequence[Begun]) -> Lattice:
        """Of the linears of all problems side by side."""
        weights: dict[str, Tensor] = {}
        formats: dict[str, Format] = {}
        scales: dict[str, Scales] = {}
        orders = []
        for each in begun:
            weights |= each.problem.weights
            formats |= each.problem.formats
            scales |= each.scales
            orders += [each.order] * len(each.problem.weights)
        names = list(weights)
        rows = [len(weight) for weight in weights.values()]
        groups = [formats[name].group(len(orders[0])) for name in names]
        problem = Problem(weights, formats)
        if self.scales == "static":
            return StaticLattice(problem, names, rows, scales, groups, orders)
        if len(set(groups)) > 1:
            raise ConfigError(
                "solver.scales=dynamic: the linears of one site have different group sizes; "
                "use static."
            )
        return DynamicLattice(problem, names, rows, scales, groups[0])


def _masked(problem: Problem) -> Problem:
    """With 0 for weights of features that are always 0, which may be anything."""
    assert problem.hessian is not None
    dead = problem.hessian.diagonal() == 0
    if not dead.any():
        return problem
    weights = {name: w.masked_fill(dead, 0) for name, w in problem.weights.items()}
    return replace(problem, weights=weights)


def _shape(problem: Problem) -> tuple:
    """What problems have in common that are solved in one loop."""
    linears = (
        (weight.shape, weight.dtype, weight.device, problem.formats[name])
        for name, weight in problem.weights.items()
    )
    return (problem.drift is None, *linears)
