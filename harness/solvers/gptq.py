r"""gptq: quantize the columns of W one after another, each error pushed onto the columns still to come.

    H = 2/N sum x^T x + damp mean(diag H) I,     H^-1 = U^T U,  U upper triangular
    for column i:   q_i = Q(w_i);   e_i = (w_i - q_i) / U_ii;   w_j <- w_j - e_i U_ij   for j > i

Source: GPTQ (arXiv 2210.17323); static activation reordering from MR-GPTQ (arXiv 2509.23202). Differences from the usual code:
- U comes from one Cholesky factor of H with rows and columns reversed, H = R R^T, U = R^-1; the inverse of H is never formed.
- Rows of U are scaled to unit diagonal, so what is kept is d_i = w_i - q_i and no division stays in the loop.
- Everything is transposed: a column of W is one contiguous row here, and a site's linears lie side by side.
- Columns are walked by halving, so every update but those inside the last `block` columns is a matrix product, and a
  column inside takes all pending errors in one matrix-vector product just before it is rounded. Halves meet at group
  borders; when a group's turn comes all errors before it have arrived, so `dynamic` scales never read a stale tail.
- A Hessian that cannot be factored is damped ten times more, up to 1, then tried in float64; only then the site falls back
  to RTN, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError, DataError
from harness.formats import Format, Scales
from harness.solvers.base import Problem, Solution, Solver


@dataclass(frozen=True, kw_only=True)
class GPTQ(Solver):
    """damp: share of mean(diag H) added to the diagonal. order: `default`, or `activation` = descending diag(H).
    scales: `static` = fixed from W before the loop, `dynamic` = each group's from the current W (order=default only).
    block: columns solved one by one between matrix products. precision: of H, U and the loop."""

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
                "solver.scales=dynamic with solver.order=activation: a group's columns are then not neighbours; "
                "use solver.scales=static or solver.order=default."
            )

    def check(self, format: Format) -> list[str]:
        if self.scales == "dynamic" and format.pad == "zero":
            raise ConfigError(
                "solver.scales=dynamic with format.weight.pad=zero: the last group is short; use scales=static."
            )
        if self.scales == "dynamic" and format.granularity != "group":
            return [
                f"solver.scales=dynamic with format.weight.granularity={format.granularity}: a row is "
                "one group, whose scale is due before any error arrives, so this is scales=static"
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
        names = list(problem.weights)
        rows = [problem.weights[n].shape[0] for n in names]
        hessian = problem.hessian.to(self._dtype)
        if not hessian.isfinite().all():
            raise DataError(
                f"the activations read by {', '.join(names)} contain NaN or Inf; check the model and its dtype"
            )
        dead = hessian.diagonal() == 0
        if dead.any():  # before the scales: a group then has zero in its range
            problem = replace(
                problem, weights={n: w.masked_fill(dead, 0) for n, w in problem.weights.items()}
            )
        scales = self.static_scales(problem)

        order = torch.arange(len(hessian), device=hessian.device)
        if self.order == "activation":
            order = hessian.diagonal().argsort(descending=True, stable=True)
        unit, damp = self._factor(hessian, dead, order)
        if unit is None:
            qtensors = {
                n: problem.formats[n].quantize(w, scales=scales[n])
                for n, w in problem.weights.items()
            }
            return Solution(
                qtensors,
                {
                    "damp": None,
                    "redamped": False,
                    "fallback": "rtn",
                    "dead_columns": int(dead.sum()),
                },
            )

        work = torch.cat([problem.weights[n] for n in names]).to(self._dtype).T.contiguous()
        work = work[order]
        groups = [problem.formats[n].group(len(order)) for n in names]
        if self.scales == "dynamic":
            if len(set(groups)) > 1:
                raise ConfigError(
                    "solver.scales=dynamic: the linears of one site have different group sizes; use static."
                )
            lattice = _Dynamic(problem, names, rows, scales, groups[0])
        else:
            lattice = _Static(problem, names, rows, scales, groups, order)
        quantized = torch.empty_like(work)
        _Columns(work, quantized, unit, lattice, self.block).solve(0, len(work))

        solved = torch.empty_like(quantized)
        solved[order] = quantized
        qtensors = {}
        for name, part in zip(names, solved.T.split(rows)):
            weight = problem.weights[name]
            qtensors[name] = problem.formats[name].quantize(
                part.to(weight.dtype).contiguous(), scales=lattice.stored(name)
            )
        report = {
            "damp": damp,
            "redamped": damp > self.damp,
            "fallback": None,
            "dead_columns": int(dead.sum()),
        }
        return Solution(qtensors, report)

    def _factor(
        self, hessian: Tensor, dead: Tensor, order: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """U of the damped, ordered Hessian with rows scaled to unit diagonal, and the damping that it took."""
        backwards = order.flip(0)
        for dtype in dict.fromkeys((self._dtype, torch.float64)):
            damp = self.damp
            while True:
                damped = hessian.to(dtype, copy=True)
                damped.diagonal()[dead] = 1
                damped.diagonal().add_(damp * damped.diagonal().mean())
                damped = damped[backwards[:, None], backwards]
                factor, info = torch.linalg.cholesky_ex(damped)
                del damped  # a Hessian is the largest thing a solver holds
                if info == 0 and factor.isfinite().all():
                    eye = torch.eye(len(factor), dtype=dtype, device=factor.device)
                    upper = torch.linalg.solve_triangular(factor, eye, upper=False)
                    del factor, eye
                    upper = upper.flip(0, 1)
                    upper /= upper.diagonal()[:, None].clone()
                    if upper.isfinite().all():
                        return upper.to(self._dtype), damp
                if damp >= 1:
                    break
                damp = min(1.0, max(damp, 1e-3) * 10)
        return None, None


class _Static:
    """Scales fixed before the loop; each ordered column knows the lattice of the group it came from."""

    group = None

    def __init__(
        self,
        problem: Problem,
        names,
        rows,
        scales: dict[str, Scales],
        groups: list[int],
        order: Tensor,
    ):
        self.scales = scales
        self.parts = []
        for name, count, group in zip(names, rows, groups):
            format = problem.formats[name]
            lattice = [
                t.expand(count, -1).T.contiguous().unbind(0) for t in format.lattice(scales[name])
            ]
            self.parts.append((format.snap, count, lattice, (order // group).tolist()))
        if len(names) > 1 and all(problem.formats[n] == problem.formats[names[0]] for n in names):
            snap, _, _, index = self.parts[0]
            joined = [
                [torch.cat(ts) for ts in zip(*parts)] for parts in zip(*(p[2] for p in self.parts))
            ]
            self.parts = [(snap, sum(rows), joined, index)]

    def snap(self, i: int, column: Tensor, out: Tensor) -> None:
        """Round ordered column i [rows] onto its lattice, into `out`."""
        start = 0
        for snap, count, lattice, index in self.parts:
            piece = slice(start, start + count)
            snap(column[piece], *(t[index[i]] for t in lattice), out=out[piece])
            start += count

    def stored(self, name: str) -> Scales:
        """The scales of one weight, in the stored (unordered) layout."""
        return self.scales[name]


class _Dynamic:
    """A group's scales come from the weights as they stand when its first column is due; global scales stay fixed."""

    def __init__(self, problem: Problem, names, rows, scales: dict[str, Scales], group: int):
        self.problem, self.names, self.rows, self.group = problem, names, rows, group
        self.fixed = {n: scales[n].global_scale for n in names}
        self.found: dict[str, list[Scales]] = {n: [] for n in names}

    def enter(self, lo: int, hi: int, work: Tensor) -> None:
        """Take the scales of the group whose columns are work[lo:hi]."""
        self.parts = []
        for name, part in zip(self.names, work[lo:hi].T.split(self.rows)):
            format = self.problem.formats[name]
            scales = format.scales(
                part.to(self.problem.weights[name].dtype).contiguous(),
                global_scale=self.fixed[name],
            )
            self.found[name].append(scales)
            lattice = [t.expand(len(part), -1)[:, 0].contiguous() for t in format.lattice(scales)]
            self.parts.append((format.snap, len(part), lattice))

    def snap(self, i: int, column: Tensor, out: Tensor) -> None:
        """Round column i [rows] onto the lattice of the group entered last, into `out`."""
        start = 0
        for snap, count, lattice in self.parts:
            piece = slice(start, start + count)
            snap(column[piece], *lattice, out=out[piece])
            start += count

    def stored(self, name: str) -> Scales:
        """The scales of all groups of one weight, side by side."""
        found = self.found[name]
        zero = None if found[0].zero is None else torch.cat([s.zero for s in found], -1)
        return Scales(torch.cat([s.scale for s in found], -1), zero, found[0].global_scale)


class _Columns:
    """The loop over columns. work [in, rows] holds w on entry and d = w - q on return; quantized [in, rows] receives q.

    unit [in, in]: U with unit diagonal. block: columns solved one by one between matrix products.
    """

    def __init__(self, work: Tensor, quantized: Tensor, unit: Tensor, lattice, block: int):
        self.work, self.unit, self.lattice, self.block = work, unit, lattice, block
        self.columns, self.outputs = work.unbind(0), quantized.unbind(0)

    def solve(self, lo: int, hi: int) -> None:
        """Columns lo..hi, all errors of earlier columns having arrived there."""
        work, unit, group = self.work, self.unit, self.lattice.group
        if group == hi - lo:
            self.lattice.enter(lo, hi, work)
        crossing = group is not None and hi - lo > group
        if crossing or hi - lo > self.block:
            step = group if crossing else 1
            mid = lo + (hi - lo) // step // 2 * step
            self.solve(lo, mid)
            work[mid:hi].addmm_(unit[lo:mid, mid:hi].T, work[lo:mid], alpha=-1)
            self.solve(mid, hi)
            return
        errors, coefficients = work[lo:hi].T, unit[lo:hi, lo:hi].T.contiguous()
        for k in range(hi - lo):
            column, output = self.columns[lo + k], self.outputs[lo + k]
            if k:
                column.addmv_(errors[:, :k], coefficients[k, :k], alpha=-1)
            self.lattice.snap(lo + k, column, output)
            column -= output
