"""One block on its way from float to quantized, while the calibration activations pass through it.

Sites are solved in the order of the forward; experts of a layer, none of which reads another, side
by side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, zip_longest

from torch import Tensor

from harness.calibration.block import BlockScales, BlockView
from harness.calibration.passage import Arriving
from harness.calibration.stream import Stream
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.quantize.gathering import Gathered, Gathering, site_input
from harness.quantize.untouched import Untouched
from harness.quantize.weights import stored, swap_in
from harness.solvers import Problem, Solution, Solver
from harness.solvers.propagation import compensated
from harness.structure.site import Site

TOGETHER = 2**27  # numbers that solving experts at once may hold: 512 MiB of float32


class SolvedBlock:
    """One block on its way from float to quantized: solved now, or installed from a record.

    record: (tensors, report) of an earlier attempt; None where the block is to be solved.
    untouched: where the original stream passes through it, and not through what this block was.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        solver: Solver | None,
        index: int,
        record: tuple[dict, dict] | None,
        untouched: Untouched | None = None,
    ):
        self.adapter = adapter
        self.scheme = scheme
        self.solver = solver
        self.index = index
        self.record = record
        self.untouched = untouched
        self.block = adapter.blocks[index]
        self.sites = adapter.sites(index)
        self.inputs = {site.name: site_input(adapter, index, site) for site in self.sites}
        self.acts = {site.name: scheme.part("act", index, site.linears[0]) for site in self.sites}
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[dict] = []
        self.output: dict = {}
        if record is not None:
            self.tensors, report = record
            self.layers = report["layers"]
            self.output = report.get("output", {})

    def walk(self, stream: Stream, original: Stream | None, view: BlockView) -> None:
        """Pass the stream through, solving each site on the way.

        Where the solver works on whole blocks, all sites are solved first. original: the stream
        through the unquantized blocks, for a solver of scope block or one that propagates.
        """
        if original is not None and self._by_block:
            if self.record is None:
                view.original = [hidden.clone() for hidden in original.hidden]
            original.advance(self.block)
            view.targets = original.hidden
        shared = self._prepare(view)
        beside: Iterator[tuple[Site, Arriving]] = iter(())
        if self.untouched is not None and original is not None:
            block = self.untouched.adapter.blocks[self.index]
            beside = original.walk(block, twin=block)
        elif original is not None and not self._by_block:
            # after what was merged, so that both read the same features
            beside = original.walk(self.block, twin=copy.deepcopy(self.block))
        whole = self.solver is not None and "block" in (self.solver.sequencing, self.solver.scope)
        if self.record is not None:
            self._load()
        elif whole:
            self._solve_whole(stream, view, shared)
        self._pass(stream, beside, shared, whole)

    def _prepare(self, view: BlockView) -> Mapping:
        """Merge what the solver merges into the block, or the record has; the solver's report."""
        if self.record is not None:
            self._merge()
        elif self.solver is not None and self.solver.prepares:
            report = self.solver.prepare(view)
            self.tensors |= {f"{site}.merged": scale for site, scale in view.merged.items()}
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
        walk = stream.walk(self.block)
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
                        self._calibrate(site, found.statistics.range)
                else:
                    self._solve(sites, gathered, shared)
                del gathered  # Hessians, before there are others
            if self.solver is not None and self.solver.stream == "both":
                for site in sites:
                    self.inputs[site.name].format = self.acts[site.name]
        next(walk, None)  # on to the block's end
        if self.index + 1 < len(self.adapter.blocks):  # nobody compares what leaves the last
            next(beside, None)
        for given in self.inputs.values():
            given.format = None

    def _gathering(self, stream: Stream) -> Gathering:
        raw = self.untouched is not None
        return Gathering(self.adapter, self.scheme, self.solver, self.index, stream.tokens, raw)

    @property
    def _by_block(self) -> bool:
        """Whether the solver looks at the block as a whole."""
        return self.solver is not None and self.solver.scope == "block"

    def _together(self) -> Iterator[list[Site]]:
        """The sites in their order, those of experts as many at once as memory may hold."""
        for _, group in groupby(self.sites, key=_kind):
            sites = list(group)
            rows = sum(self._linear(name).out_features for name in sites[0].linears)
            width = self.adapter.width(sites[0], self.index)
            # H and its inverse; the weights before and after, as they stand and turned
            count = max(1, TOGETHER // (2 * width**2 + 4 * width * rows))
            for first in range(0, len(sites), count):
                yield sites[first : first + count]

    def install(self) -> None:
        """Take weights, merged scales and activation scales from the record.

        Nothing is streamed.
        """
        # before the weights: what is loaded holds these scales, and is not to be scaled again
        self._merge()
        self._load()

    def _merge(self) -> None:
        """Merge the scales of the record."""
        scales = BlockScales(self.adapter, self.index)
        for site in self.sites:
            if f"{site.name}.merged" in self.tensors:
                scale = self.tensors[f"{site.name}.merged"]
                scales.merge(site.name, scale.to(self.adapter.device))

    def _load(self) -> None:
        """Take weights and activation scales from the record."""
        for site in self.sites:
            self._calibrate(site, self.tensors[f"{site.name}.range"])
            formats = {} if self.solver is None else self.scheme.weights(self.index, site.linears)
            for name, format in formats.items():
                linear = self._linear(name)
                linear.load(stored(self.tensors, name, format, linear.weight).dequantize())

    def _linear(self, name: str) -> QuantLinear:
        """The linear of that block-relative name."""
        linear = self.block.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        return linear

    def _solve_whole(self, stream: Stream, view: BlockView, shared: Mapping) -> None:
        """Solve all sites from the unquantized block, which leaves the stream where it is."""
        assert self.solver is not None
        gathering = self._gathering(stream)
        gathered = {
            site.name: gathering.gather(site, arriving)
            for site, arriving in stream.walk(self.block, stay=True)
        }
        if self.solver.scope == "site":
            for sites in self._together():
                self._solve(sites, [gathered[site.name] for site in sites], shared)
            return
        solution = Solution({}, {})
        if view.formats:  # else all linears of this block stay as they are
            solution = self.solver.solve_block(view)
        for site in self.sites:
            qtensors = {name: q for name, q in solution.qtensors.items() if name in site.linears}
            self._settle(site, gathered[site.name], Solution(qtensors, solution.report))

    def _solve(self, sites: Sequence[Site], gathered: Sequence[Gathered], shared: Mapping) -> None:
        """Solve some sites and swap their weights in.

        shared: what the solver said of the whole block.
        """
        problems = {}
        origins = [self._origins(site, found) for site, found in zip(sites, gathered)]
        for site, found, acting in zip(sites, gathered, origins):
            formats = self.scheme.weights(self.index, site.linears)
            weights = {name: self._linear(name).weight for name in formats}
            if self.solver is not None and weights:
                problem = Problem(
                    weights,
                    formats,
                    found.statistics.hessian,
                    drift=found.statistics.drift,
                    origins=acting,
                )
                if self.solver.propagate == "qep":
                    alpha, damp = self.solver.propagate_alpha, self.solver.propagate_damp
                    problem = compensated(problem, alpha, damp)
                problems[site.name] = problem
        solutions = {}
        if self.solver is not None and problems:
            solutions = dict(zip(problems, self.solver.solved(list(problems.values()))))
        for site, found, acting in zip(sites, gathered, origins):
            solution = solutions.get(site.name, Solution({}, {}))
            report = {**shared, **solution.report}
            self._settle(site, found, Solution(solution.qtensors, report), acting)

    def _origins(self, site: Site, found: Gathered) -> dict[str, Tensor] | None:
        """{linear: what acts in the untouched model}, of a site that is compared with that."""
        if self.untouched is None or found.statistics.drift is None:
            return None
        names = {name: self.adapter.name(self.index, name) for name in site.linears}
        return {name: self.untouched.origin(absolute) for name, absolute in names.items()}

    def _settle(
        self,
        site: Site,
        found: Gathered,
        solution: Solution,
        origins: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Swap a site's solved weights in and report on them."""
        linears = {n: self._linear(n) for n in site.linears}
        self._calibrate(site, found.statistics.range)
        names = {n: self.adapter.name(self.index, n) for n in site.linears}
        reports = swap_in(
            linears,
            names,
            solution.qtensors,
            found.statistics,
            self.acts[site.name],
            self.inputs[site.name].global_scale,
            counts=self.solver is not None,
            origins=origins,
        )
        for name, q in solution.qtensors.items():
            reports[name] |= {**solution.report, **found.report}
            self.tensors |= {f"{name}.{key}": value for key, value in q.state().items()}
        self.layers += reports.values()

    def _calibrate(self, site: Site, seen: Tensor) -> None:
        """Give the site the activation scale of the range [2] it saw, and keep that."""
        self.tensors[f"{site.name}.range"] = seen
        act = self.acts[site.name]
        if act is not None and act.needs_static:
            weight = self._linear(site.linears[0]).weight
            self.inputs[site.name].global_scale = act.calibrated(*seen.to(weight))


def _kind(site: Site) -> str:
    """The name that sites of experts share; its own of any other."""
    return site.name if site.expert is None else site.name.rpartition(".")[0]
