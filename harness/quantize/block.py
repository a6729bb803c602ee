"""One block on its way from float to quantized, while the calibration activations pass through it.

Sites are solved in the order of the forward; experts of a layer, none of which reads another, side
by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from torch import Tensor

from harness.calibration.block import BlockScales, BlockView
from harness.calibration.passage import Arriving
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.experts import is_last
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.quantize.weights import stored, swap_in
from harness.solvers import Problem, Solution, Solver
from harness.structure.site import Site

TOGETHER = 2**27  # numbers that solving experts at once may hold: 512 MiB of float32


def site_input(adapter: Adapter, index: int, site: Site) -> SiteInput:
    """The SiteInput that the linears of a site share."""
    return adapter.blocks[index].get_submodule(site.linears[0]).site


@dataclass(frozen=True)
class Gathered:
    """Statistics of what a site's linears read; report: what is said of its router, if any."""

    statistics: Statistics
    report: dict


class SolvedBlock:
    """One block on its way from float to quantized: solved now, or installed from a record.

    record: (tensors, report) of an earlier attempt; None where the block is to be solved.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        solver: Solver | None,
        index: int,
        record: tuple[dict, dict] | None,
    ):
        self.adapter = adapter
        self.scheme = scheme
        self.solver = solver
        self.index = index
        self.record = record
        self.block = adapter.blocks[index]
        self.sites = adapter.sites(index)
        self.inputs = {site.name: site_input(adapter, index, site) for site in self.sites}
        self.acts = {site.name: scheme.part("act", index, site.linears[0]) for site in self.sites}
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[dict] = []
        self.output: dict = {}
        self._shared: dict[tuple, Statistics] = {}
        if record is not None:
            self.tensors, report = record
            self.layers = report["layers"]
            self.output = report.get("output", {})

    def walk(self, stream: Stream, original: Stream | None, view: BlockView) -> None:
        """Pass the stream through, solving each site on the way.

        Where the solver works on whole blocks, all sites are solved first. original: the stream
        through the unquantized blocks, for a solver of scope block.
        """
        whole = self.solver is not None and "block" in (self.solver.sequencing, self.solver.scope)
        if original is not None:
            if self.record is None:
                view.original = [hidden.clone() for hidden in original.hidden]
            original.advance(self.block)
            view.targets = original.hidden
        if self.record is not None:
            self.install()
        else:
            shared = {}
            if self.solver is not None and self.solver.prepares:
                shared = self.solver.prepare(view)
                self.tensors |= {f"{site}.merged": scale for site, scale in view.merged.items()}
            if whole:
                self._solve_whole(stream, view, shared)
        self._shared.clear()
        walk = stream.walk(self.block)
        for sites in self._together():
            arrived = list(islice(walk, len(sites)))
            if self.record is not None:
                continue  # it needs no statistics, but the stream must get past the block
            gathered = [self._gather(*each, stream, hessian=not whole) for each in arrived]
            if whole:
                for site, found in zip(sites, gathered):
                    self._calibrate(site, found.statistics.range)
            else:
                self._solve(sites, gathered, shared)
            del gathered  # Hessians, before there are others
        next(walk, None)  # on to the block's end

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
        scales = BlockScales(self.adapter, self.index)
        for site in self.sites:
            if f"{site.name}.merged" in self.tensors:
                scale = self.tensors[f"{site.name}.merged"]
                scales.merge(site.name, scale.to(self.adapter.device))
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
        gathered = {
            site.name: self._gather(site, arriving, stream)
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

    def _gather(
        self, site: Site, arriving: Arriving, stream: Stream, hessian: bool = True
    ) -> Gathered:
        """Statistics of what a site's linears are about to read.

        hessian: with that, where the solver needs it.
        """
        formats = self.scheme.weights(self.index, site.linears)
        if self.solver is None or not formats or "hessian" not in self.solver.needs:
            hessian = False
        report = {}
        if arriving.routed is not None:
            report = {"routed": arriving.routed, "every": arriving.every}
        if not arriving.every or is_last(site.linears[0]):
            return Gathered(self._statistics(site, arriving, stream, hessian), report)
        # experts that see all tokens see the same tensor
        key = (site.activation, self.acts[site.name], hessian)
        if key not in self._shared:
            self._shared[key] = self._statistics(site, arriving, stream, hessian)
        return Gathered(self._shared[key], report)

    def _statistics(
        self, site: Site, arriving: Arriving, stream: Stream, hessian: bool
    ) -> Statistics:
        reader = self._linear(site.linears[0])
        statistics = Statistics(reader.in_features, stream.tokens, reader.weight.device, hessian)
        for x in arriving:
            encoded = self.inputs[site.name].encode(x)
            statistics.observe(encoded, self.acts[site.name], self.solver)
        statistics.finish()
        return statistics

    def _solve(self, sites: Sequence[Site], gathered: Sequence[Gathered], shared: Mapping) -> None:
        """Solve some sites and swap their weights in.

        shared: what the solver said of the whole block.
        """
        problems = {}
        for site, found in zip(sites, gathered):
            formats = self.scheme.weights(self.index, site.linears)
            weights = {name: self._linear(name).weight for name in formats}
            if self.solver is not None and weights:
                problems[site.name] = Problem(weights, formats, found.statistics.hessian)
        solutions = {}
        if self.solver is not None and problems:
            solutions = dict(zip(problems, self.solver.solve_together(list(problems.values()))))
        for site, found in zip(sites, gathered):
            solution = solutions.get(site.name, Solution({}, {}))
            report = {**shared, **solution.report}
            self._settle(site, found, Solution(solution.qtensors, report))

    def _settle(self, site: Site, found: Gathered, solution: Solution) -> None:
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
