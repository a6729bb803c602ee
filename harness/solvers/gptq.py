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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError, DataError
from harness.formats import Format, Scales
from harness.solvers.base import Problem, Solution, Solver
from harness.solvers.columns import Columns, DynamicLattice, Lattice, StaticLattice


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
        if self.scales == "dynamic" and format.pad == "zero":
            raise ConfigError(
                "solver.scales=dynamic with format.weight.pad=zero: the last group is short; "
                "use scales=static."
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
        assert problem.hessian is not None  # as `needs` asks
        hessian = problem.hessian.to(self._dtype)
        if not hessian.isfinite().all():
            raise DataError(
                f"the activations read by {', '.join(problem.weights)} contain NaN or Inf; "
                "check the model and its dtype"
            )
        dead = hessian.diagonal() == 0
        if dead.any():  # before the scales: a group then has zero in its range
            weights = {name: w.masked_fill(dead, 0) for name, w in problem.weights.items()}
            problem = replace(problem, weights=weights)
        scales = self.static_scales(problem)

        order = torch.arange(len(hessian), device=hessian.device)
        if self.order == "activation":
            # stable: equal diagonals keep their order, whatever machine sorts them
            order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = self._factor(hessian, dead, order)
        report = {
            "damp": None,
            "redamped": False,
            "fallback": "rtn",
            "dead_columns": int(dead.sum()),
        }
        if factor is None:
            qtensors = {
                name: problem.formats[name].quantize(weight, scales=scales[name])
                for name, weight in problem.weights.items()
            }
            return Solution(qtensors, report)

        unit, damp = factor
        report |= {"damp": damp, "redamped": damp > self.damp, "fallback": None}
        work = torch.cat(list(problem.weights.values())).to(self._dtype).T.contiguous()
        work = work[order]
        lattice = self._lattice(problem, scales, order)
        quantized = torch.empty_like(work)
        Columns(work, quantized, unit, lattice, self.block).solve(0, len(work))

        columns = torch.empty_like(quantized)
        columns[order] = quantized
        rows = [len(weight) for weight in problem.weights.values()]
        qtensors = {}
        for name, part in zip(problem.weights, columns.T.split(rows)):
            values = part.to(problem.weights[name].dtype).contiguous()
            # values lie on the lattice, so encoding them loses nothing
            qtensors[name] = problem.formats[name].quantize(values, scales=lattice.stored(name))
        return Solution(qtensors, report)

    def _lattice(self, problem: Problem, scales: dict[str, Scales], order: Tensor) -> Lattice:
        """Of the linears side by side."""
        names = list(problem.weights)
        rows = [len(problem.weights[name]) for name in names]
        groups = [problem.formats[name].group(len(order)) for name in names]
        if self.scales == "static":
            return StaticLattice(problem, names, rows, scales, groups, order)
        if len(set(groups)) > 1:
            raise ConfigError(
                "solver.scales=dynamic: the linears of one site have different group sizes; "
                "use static."
            )
        return DynamicLattice(problem, names, rows, scales, groups[0])

    def _factor(self, hessian: Tensor, dead: Tensor, order: Tensor) -> tuple[Tensor, float] | None:
        """U of the damped, ordered Hessian with rows scaled to unit diagonal, and the damping that
        it took; None where no damping was enough."""
        for dtype in dict.fromkeys((self._dtype, torch.float64)):
            for damp in _dampings(self.damp):
                upper = _unit_upper(hessian, dead, order, damp, dtype)
                if upper is not None:
                    return upper.to(self._dtype), damp
        return None


def _dampings(damp: float) -> Iterator[float]:
    """From the setting on, ten times more each, up to 1."""
    yield damp
    while damp < 1:
        damp = min(1.0, max(damp, 1e-3) * 10)
        yield damp


def _unit_upper(
    hessian: Tensor, dead: Tensor, order: Tensor, damp: float, dtype: torch.dtype
) -> Tensor | None:
    """U at one damping, or None where it is not finite."""
    # reversed here and back at the end: the inverse of the lower factor is then U
    backwards = order.flip(0)
    damped = hessian.to(dtype, copy=True)
    # a feature that is always 0 takes any weight, but a row of zeros has no inverse
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(damp * damped.diagonal().mean())
    damped = damped[backwards[:, None], backwards]
    # _ex: a matrix that is not positive definite is no exception here
    factor, info = torch.linalg.cholesky_ex(damped)
    del damped  # a Hessian is the largest thing a solver holds
    if info != 0 or not factor.isfinite().all():
        return None
    eye = torch.eye(len(factor), dtype=dtype, device=factor.device)
    upper = torch.linalg.solve_triangular(factor, eye, upper=False)
    del factor, eye
    upper = upper.flip(0, 1)
    upper /= upper.diagonal()[:, None].clone()
    return upper if upper.isfinite().all() else None
