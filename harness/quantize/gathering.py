"""What is gathered of the activations that a site's linears are about to read."""

from __future__ import annotations

from dataclasses import dataclass

from harness.calibration.passage import Arriving
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.experts import is_last
from harness.models.quant_linear import SiteInput
from harness.solvers import Solver
from harness.structure.site import Site


def site_input(adapter: Adapter, index: int, site: Site) -> SiteInput:
    """The SiteInput that the linears of a site share."""
    return adapter.blocks[index].get_submodule(site.linears[0]).site


@dataclass(frozen=True)
class Gathered:
    """Statistics of what a site's linears read; report: what is said of its router, if any."""

    statistics: Statistics
    report: dict


class Gathering:
    """The statistics that a solver wants of the sites of block `index`; stream: what passes there.

    Experts that are shown all tokens share one site's. raw: what the untouched model reads is
    compared as it is, and not encoded.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        solver: Solver | None,
        index: int,
        stream: Stream,
        raw: bool = False,
    ):
        self.adapter = adapter
        self.scheme = scheme
        self.solver = solver
        self.index = index
        self.stream = stream
        self.raw = raw
        self._shared: dict[tuple, Statistics] = {}

    def gather(
        self,
        site: Site,
        arriving: Arriving,
        hessian: bool = True,
        untouched: Arriving | None = None,
    ) -> Gathered:
        """Statistics of what a site's linears are about to read.

        hessian: with that, where the solver needs it. untouched: what they read in the untouched
        model, for a solver that propagates.
        """
        formats = self.scheme.weights(self.index, site.linears)
        curvature = 0
        if hessian and self.solver is not None and formats:
            width = self.adapter.width(site, self.index)
            curvature = self.solver.curvature(formats.values(), width)
        report = {}
        if arriving.routed is not None:
            report = {"routed": arriving.routed, "every": arriving.every}
            untouched = None  # another router's choice
        if self.solver is not None and site.name in self.solver.propagate_skip:
            untouched = None
        if not arriving.every or is_last(site.linears[0]):
            return Gathered(self._statistics(site, arriving, curvature, untouched), report)
        # experts that see all tokens see the same tensor
        act = self.scheme.part("act", self.index, site.linears[0])
        key = (site.activation, act, curvature)
        if key not in self._shared:
            self._shared[key] = self._statistics(site, arriving, curvature)
        return Gathered(self._shared[key], report)

    def _statistics(
        self, site: Site, arriving: Arriving, curvature: int, untouched: Arriving | None = None
    ) -> Statistics:
        width = self.adapter.width(site, self.index)
        stream = self.stream
        device = self.adapter.device
        statistics = Statistics(width, stream.tokens, device, curvature, stream.ranks)
        given = site_input(self.adapter, self.index, site)
        act = self.scheme.part("act", self.index, site.linears[0])
        if untouched is None:
            for x, start in zip(arriving, arriving.starts, strict=True):
                encoded = given.encode(x)
                statistics.observe(encoded, act, self.solver, twice=given.twice, start=start)
        else:
            statistics.compares()
            for x, there, start in zip(arriving, untouched, arriving.starts, strict=True):
                beside = there if self.raw else given.encode(there)
                encoded = given.encode(x)
                statistics.observe(encoded, act, self.solver, beside, given.twice, start)
        statistics.finish()
        return statistics
