"""What has become of one block: its weights and activation scales, and what the run keeps of them.

    {site}.range     [2]: what its activations span       {linear}.{part}    codes, scales, ..
    {site}.merged    [n]: a scale that the solver merged, where it did

are the block's tensors, by which it is installed again without a text.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.calibration.block import BlockScales
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.quantize.gathering import Gathered, site_input
from harness.quantize.weights import stored, swap_in
from harness.solvers import Solution, Solver
from harness.structure.site import Site


class BlockState:
    """Block `index` of a model, site by site as it is settled, or installed from a record.

    record: (tensors, report) of an earlier attempt; None where the block is to be solved. tensors,
    layers, output: what a record is made of, the tensors, the reports of the linears and that of
    the block.
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

    def install(self) -> None:
        """Take weights, merged scales and activation scales from the record.

        Nothing is streamed.
        """
        # before the weights: what is loaded holds these scales, and is not to be scaled again
        self.merge()
        self.load()

    def merge(self) -> None:
        """Merge the scales of the record."""
        scales = BlockScales(self.adapter, self.index)
        for site in self.sites:
            if f"{site.name}.merged" in self.tensors:
                scale = self.tensors[f"{site.name}.merged"]
                scales.merge(site.name, scale.to(self.adapter.device))

    def load(self) -> None:
        """Take weights and activation scales from the record."""
        for site in self.sites:
            self.calibrate(site, self.tensors[f"{site.name}.range"])
            formats = {} if self.solver is None else self.scheme.weights(self.index, site.linears)
            for name, format in formats.items():
                linear = self.linear(name)
                linear.load(stored(self.tensors, name, format, linear.weight).dequantize())

    def linear(self, name: str) -> QuantLinear:
        """The linear of that block-relative name."""
        linear = self.block.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        return linear

    def settle(
        self,
        site: Site,
        found: Gathered,
        solution: Solution,
        origins: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Swap a site's solved weights in and report on them."""
        linears = {n: self.linear(n) for n in site.linears}
        self.calibrate(site, found.statistics.range)
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

    def calibrate(self, site: Site, seen: Tensor) -> None:
        """Give the site the activation scale of the range [2] it saw, and keep that."""
        self.tensors[f"{site.name}.range"] = seen
        act = self.acts[site.name]
        if act is not None and act.needs_static:
            weight = self.linear(site.linears[0]).weight
            self.inputs[site.name].global_scale = act.calibrated(*seen.to(weight))
