"""One block on its way from float to quantized, while the calibration activations pass through it.

Sites are solved in the order of the forward; experts of a layer, none of which reads another, side
by side. A solved block's state (block_state.py) is taken from its record instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, zip_longest

from torch import Tensor

from harness.calibration.block import BlockView
from harness.calibration.passage import Arriving
from harness.calibration.stream import Stream
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.parallel import ALONE, Ranks
from harness.quantize.block_state import BlockState
from harness.quantize.gathering import Gathered, Gathering
from harness.quantize.spread import spread
from harness.quantize.untouched import Untouched
from harness.solvers import Problem, Solution, Solver
from harness.solvers.propagation import compensated
from harness.structure.site import Site

TOGETHER = 2**27  # numbers that solving experts at once may hold: 512 MiB of float32


class SolvedBlock:
    """One block on its way from float to quantized; `state` is what has become of it.

    record: (tensors, report) of an earlier attempt; None where the block is to be solved.
    untouched: where the original stream passes through it, and not through what this block was.
    ranks: each has a share of the stream, and solves some of the linears.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        solver: Solver | None,
        index: int,
        record: tuple[dict, dict] | None,
        untouched: Untouched | None = None,
        ranks: Ranks = ALONE,
    ):
        self.adapter = adapter
        self.scheme = scheme
        self.solver = solver
        self.index = index
        self.record = record
        self.untouched = untouched
        self.ranks = ranks
        self.state = BlockState(adapter, scheme, solver, index, record)

    def walk(self, stream: Stream, original: Stream | None, view: BlockView) -> None:
        """Pass the stream through, solving each site on the way.

        Where the solver works on whole blocks, all sites are solved first. original: the stream
        through the unquantized blocks, for a solver of scope block or one that propagates.
        """
        if original is not None and self._by_block:
            if self.record is None:
                view.original = [hidden.clone() for hidden in original.hidden]
            original.advance(self.state.block)
            view.targets = original.hidden
        shared = self._prepare(view)
        beside: Iterator[tuple[Site, Arriving]] = iter(())
        if self.untouched is not None and original is not None:
            block = self.untouched.adapter.blocks[self.index]
            beside = original.walk(block, twin=block)
        elif original is not None and not self._by_block:
            # after what was merged, so that both read the same features
            beside = original.walk(self.state.block, twin=copy.deepcopy(self.state.block))
        whole = self.solver is not None and "block" in (self.solver.sequencing, self.solver.scope)
        if self.record is not None:
            self.state.load()
        elif whole:
            self._solve_whole(stream, view, shared)
        self._pass(stream, beside, shared, whole)

    def _prepare(self, view: BlockView) -> Mapping:
        """Merge what the solver merges into the block, or the record has; the solver's report."""
        if self.record is not None:
            self.state.merge()
        elif self.solver is not None and self.solver.prepares:
            report = self.solver.prepare(view)
            self.state.tensors |= {f"{site}.merged": scale for site, scale in view.merged.items()}
            return report
        return {}

    def _pass(
        self,
        stream: Stream,
        beside: Iterator[tuple[Site, Arriving]],
        shared: Mapping,
        whole: bool,
    ) -> None:
        """Pass the stream through, and the untouched one beside it.

        Sites are solved on the way, unless they have been: by a record, or as a whole block.
        """
        gathering = self._gathering(stream)
        walk = stream.walk(self.state.block)
        for sites in self._together():
            arrived = list(islice(walk, len(sites)))
            untouched = [arriving for _, arriving in islice(beside, len(sites))]
            if self.record is None:
                gathered = [
                    gathering.gather(site, arriving, not whole, there)
                    for (site, arriving), there in zip_longest(arrived, untouched)
                ]
                if whole:
                    for site, found in zip(sites, gathered):
                        self.state.calibrate(site, found.statistics.range)
                else:
                    self._solve([sites], dict(zip((s.name for s in sites), gathered)), shared)
                del gathered  # Hessians, before there are others
            if self.solver is not None and self.solver.stream == "both":
                for site in sites:
                    self.state.inputs[site.name].format = self.state.acts[site.name]
        next(walk, None)  # on to the block's end
        if self.index + 1 < len(self.adapter.blocks):  # nobody compares what leaves the last
            next(beside, None)
        for given in self.state.inputs.values():
            given.format = None

    def _gathering(self, stream: Stream) -> Gathering:
        raw = self.untouched is not None
        return Gathering(self.adapter, self.scheme, self.solver, self.index, stream, raw)

    @property
    def _by_block(self) -> bool:
        """Whether the solver looks at the block as a whole."""
        return self.solver is not None and self.solver.scope == "block"

    def _together(self) -> Iterator[list[Site]]:
        """The sites in their order, those of experts as many at once as memory may hold."""
        for _, group in groupby(self.state.sites, key=_kind):
            sites = list(group)
            rows = sum(self.state.linear(name).out_features for name in sites[0].linears)
            width = self.adapter.width(sites[0], self.index)
            # H and its inverse; the weights before and after, as they stand and turned
            count = max(1, TOGETHER // (2 * width**2 + 4 * width * rows))
            for first in range(0, len(sites), count):
                yield sites[first : first + count]

    def _solve_whole(self, stream: Stream, view: BlockView, shared: Mapping) -> None:
        """Solve all sites from the unquantized block, which leaves the stream where it is."""
        assert self.solver is not None
        gathering = self._gathering(stream)
        gathered = {
            site.name: gathering.gather(site, arriving)
            for site, arriving in stream.walk(self.state.block, stay=True)
        }
        if self.solver.scope == "site":
            self._solve(list(self._together()), gathered, shared)
            return
        solution = Solution({}, {})
        if view.formats:  # else all linears of this block stay as they are
            solution = self.solver.solve_block(view)
        for site in self.state.sites:
            qtensors = {name: q for name, q in solution.qtensors.items() if name in site.linears}
            self.state.settle(site, gathered[site.name], Solution(qtensors, solution.report))

    def _solve(
        self,
        groups: Sequence[Sequence[Site]],
        gathered: Mapping[str, Gathered],
        shared: Mapping,
    ) -> None:
        """Solve groups of sites, those of one group together, and swap their weights in.

        shared: what the solver said of the whole block.
        """
        sites = [site for group in groups for site in group]
        origins = {site.name: self._origins(site, gathered[site.name]) for site in sites}
        solutions: dict[str, Solution] = {}
        if self.solver is not None:
            problems = []
            for group in groups:
                posed = {s.name: self._problem(s, gathered[s.name], origins[s.name]) for s in group}
                problems.append({name: each for name, each in posed.items() if each is not None})
            solutions = spread(self.solver, problems, self.ranks)
        for site in sites:
            solution = solutions.get(site.name, Solution({}, {}))
            whole = Solution(solution.qtensors, {**shared, **solution.report})
            self.state.settle(site, gathered[site.name], whole, origins[site.name])

    def _problem(
        self, site: Site, found: Gathered, origins: Mapping[str, Tensor] | None
    ) -> Problem | None:
        """What is to be solved of a site; None where nothing is."""
        formats = self.scheme.weights(self.index, site.linears)
        if self.solver is None or not formats:
            return None
        weights = {name: self.state.linear(name).weight for name in formats}
        hessian, drift = found.statistics.hessian, found.statistics.drift
        problem = Problem(weights, formats, hessian, drift=drift, origins=origins)
        if self.solver.propagate == "qep":
            alpha, damp = self.solver.propagate_alpha, self.solver.propagate_damp
            problem = compensated(problem, alpha, damp)
        return problem

    def _origins(self, site: Site, found: Gathered) -> dict[str, Tensor] | None:
        """{linear: what acts in the untouched model}, of a site that is compared with that."""
        if self.untouched is None or found.statistics.drift is None:
            return None
        names = {name: self.adapter.name(self.index, name) for name in site.linears}
        return {name: self.untouched.origin(absolute) for name, absolute in names.items()}


def _kind(site: Site) -> str:
    """The name that sites of experts share; its own of any other."""
    return site.name if site.expert is None else site.name.rpartition(".")[0]
