"""gptq's loop over the columns of W, and the lattices they are rounded onto.

Everything is transposed: a column of W is one contiguous row here, and a site's linears lie side by
side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.formats import Scales
from harness.solvers.problem import Problem


class Lattice(ABC):
    """What columns are rounded onto. group: how many must enter together; None where none must."""

    group: int | None = None

    @abstractmethod
    def enter(self, lo: int, hi: int, work: Tensor) -> None:
        """The first column of the group work[lo:hi] is due."""

    @abstractmethod
    def snap(self, i: int, column: Tensor, out: Tensor) -> None:
        """Round ordered column i [rows] onto its lattice, into `out`."""

    @abstractmethod
    def stored(self, name: str) -> Scales:
        """The scales of one weight, in the stored (unordered) layout."""


class StaticLattice(Lattice):
    """Scales fixed before the loop; each ordered column knows the lattice of the group it came
    from."""

    def __init__(
        self,
        problem: Problem,
        names: Sequence[str],
        rows: Sequence[int],
        scales: dict[str, Scales],
        groups: Sequence[int],
        orders: Sequence[Tensor],
    ):
        """names, rows, groups: of the linears side by side. orders: their columns [in] as they are
        due."""
        self.scales = scales
        self.parts = []
        for name, count, group, order in zip(names, rows, groups, orders):
            format = problem.formats[name]
            lattice = [
                # column by column, as they are rounded
                format.per_row(t, count).T.contiguous().unbind(0)
                for t in format.lattice(scales[name])
            ]
            self.parts.append((format.snap, count, lattice, (order // group).tolist()))
        # linears of one format are one linear here: a call a column instead of three
        if len(names) > 1 and all(problem.formats[n] == problem.formats[names[0]] for n in names):
            self.parts = [self._joined()]

    def _joined(self) -> tuple:
        """The parts as one."""
        snap, _, _, index = self.parts[0]
        lattices = [lattice for _, _, lattice, _ in self.parts]
        if all(part[-1] == index for part in self.parts):
            joined = [[torch.cat(ts) for ts in zip(*parts)] for parts in zip(*lattices)]
        else:  # each in an order of its own: a lattice a column
            due = list(zip(*(part[-1] for part in self.parts)))
            joined = [
                [torch.cat([of[group] for of, group in zip(parts, groups)]) for groups in due]
                for parts in zip(*lattices)
            ]
            index = range(len(due))
        return snap, sum(count for _, count, _, _ in self.parts), joined, index

    def enter(self, lo: int, hi: int, work: Tensor) -> None:
        """Nothing to take: the scales are there."""

    def snap(self, i: int, column: Tensor, out: Tensor) -> None:
        start = 0
        for snap, count, lattice, index in self.parts:
            piece = slice(start, start + count)
            snap(column[piece], *(t[index[i]] for t in lattice), out=out[piece])
            start += count

    def stored(self, name: str) -> Scales:
        return self.scales[name]


class DynamicLattice(Lattice):
    """A group's scales come from the weights as they stand when its first column is due; global
    scales stay fixed."""

    def __init__(
        self,
        problem: Problem,
        names: Sequence[str],
        rows: Sequence[int],
        scales: dict[str, Scales],
        group: int,
    ):
        self.problem = problem
        self.names = names
        self.rows = list(rows)
        self.group = group
        self.fixed = {name: scales[name].global_scale for name in names}
        self.entered: dict[str, list[Scales]] = {name: [] for name in names}

    def enter(self, lo: int, hi: int, work: Tensor) -> None:
        self.parts = []
        for name, part in zip(self.names, work[lo:hi].T.split(self.rows)):
            format = self.problem.formats[name]
            weight = part.to(self.problem.weights[name].dtype).contiguous()
            scales = format.scales(weight, global_scale=self.fixed[name])
            self.entered[name].append(scales)
            lattice = [t.expand(len(part), -1)[:, 0].contiguous() for t in format.lattice(scales)]
            self.parts.append((format.snap, len(part), lattice))

    def snap(self, i: int, column: Tensor, out: Tensor) -> None:
        start = 0
        for snap, count, lattice in self.parts:
            piece = slice(start, start + count)
            snap(column[piece], *lattice, out=out[piece])
            start += count

    def stored(self, name: str) -> Scales:
        groups = self.entered[name]
        zeros = [scales.zero for scales in groups if scales.zero is not None]
        return Scales(
            torch.cat([scales.scale for scales in groups], -1),
            torch.cat(zeros, -1) if zeros else None,
            groups[0].global_scale,
        )


class Columns:
    """The loop. work [in, rows] holds w on entry and d = w - q on return; quantized [in, rows]
    receives q.

    unit [in, in]: U with unit diagonal. block: columns solved one by one between matrix products.
    pull [in, in]: P, strictly upper, where w_j <- w_j + w_i P_ij besides (asymmetry.py).
    """

    def __init__(
        self,
        work: Tensor,
        quantized: Tensor,
        unit: Tensor,
        lattice: Lattice,
        block: int,
        pull: Tensor | None = None,
    ):
        self.work = work
        # (what a column that is done leaves, how much of it is taken off each column after it)
        self.carried = [(work, unit)]
        if pull is not None:
            # w_i itself is gone by then, but is d_i + q_i:  d U - w P = d (U - P) - q P
            self.carried = [(work, unit - pull), (quantized, -pull)]
        self.lattice = lattice
        self.block = block
        self.columns = work.unbind(0)
        self.outputs = quantized.unbind(0)

    def solve(self, lo: int, hi: int) -> None:
        """Columns lo..hi, all errors of earlier columns having arrived there."""
        group = self.lattice.group
        if group == hi - lo:
            self.lattice.enter(lo, hi, self.work)
        step = 1
        if group is not None and hi - lo > group:
            step = group  # halves meet at a group's border
        elif hi - lo <= self.block:
            self._one_by_one(lo, hi)
            return
        mid = lo + (hi - lo) // step // 2 * step
        self.solve(lo, mid)
        self._pass_on(lo, mid, hi)
        self.solve(mid, hi)

    def _pass_on(self, lo: int, mid: int, hi: int) -> None:
        """What columns lo..mid leave, onto mid..hi."""
        for left, matrix in self.carried:
            self.work[mid:hi].addmm_(matrix[lo:mid, mid:hi].T, left[lo:mid], alpha=-1)

    def _one_by_one(self, lo: int, hi: int) -> None:
        within = [self._within(lo, hi, *carried) for carried in self.carried]
        for k in range(hi - lo):
            column = self.columns[lo + k]
            output = self.outputs[lo + k]
            if k:  # all that the columns before it in this block have left, at once
                for left, coefficients in within:
                    self._take(column, left, coefficients, k)
            self.lattice.snap(lo + k, column, output)
            column -= output  # d, which the columns after it take over

    def _within(self, lo: int, hi: int, left: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """What a block leaves as `_take` wants it, and what it is passed on with."""
        return left[lo:hi].T, matrix[lo:hi, lo:hi].T.contiguous()

    def _take(self, column: Tensor, left: Tensor, coefficients: Tensor, k: int) -> None:
        """What a block's first k columns leave, onto its next."""
        column.addmv_(left[:, :k], coefficients[k, :k], alpha=-1)


class ManyColumns(Columns):
    """The loop over several problems of one shape at once, each with an inverse of its own.

    work, quantized [in, problems, rows], unit, pull [problems, in, in].
    """

    def __init__(
        self,
        work: Tensor,
        quantized: Tensor,
        unit: Tensor,
        lattice: Lattice,
        block: int,
        pull: Tensor | None = None,
    ):
        super().__init__(work.flatten(1), quantized.flatten(1), unit, lattice, block, pull)
        self.problems = work.transpose(0, 1)  # [problems, in, rows]
        self.carried = [
            (left.view_as(work).transpose(0, 1), matrix) for left, matrix in self.carried
        ]

    def _pass_on(self, lo: int, mid: int, hi: int) -> None:
        for left, matrix in self.carried:
            coefficients = matrix[:, lo:mid, mid:hi].mT
            self.problems[:, mid:hi].baddbmm_(coefficients, left[:, lo:mid], alpha=-1)

    def _within(self, lo: int, hi: int, left: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return left[:, lo:hi], matrix[:, lo:hi, lo:hi].mT.contiguous()

    def _take(self, column: Tensor, left: Tensor, coefficients: Tensor, k: int) -> None:
        after = column.view(len(left), 1, -1)
        after.baddbmm_(coefficients[:, k : k + 1, :k], left[:, :k], alpha=-1)
