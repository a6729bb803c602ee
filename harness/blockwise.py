"""Quantize a model block by block while the calibration activations stream through it.

For each site of a block, in the order of the forward: collect statistics, solve, swap the weights, go on with what was
quantized. A finished block is on disk before the next one begins; a block found there is loaded and replayed by the same
arithmetic, so an interrupted run ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.formats import QTensor, Scheme
from harness.models.families import Adapter, Site
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.solvers import Problem, Solver
from harness.store import Run


@torch.no_grad()
def quantize(adapter: Adapter, scheme: Scheme, solver: Solver | None, windows: Tensor, run: Run,
             done: Callable[[int, list[dict]], None]) -> None:
    """Solve every block of a placed model and switch its activation quantizers on.

    windows: calibration token ids [N, L]; solver None: only activation scales are taken. Solved blocks go to `run` and
    come from it when they are there. `done(index, layers)` is called after each block with its per-linear report.
    """
    count = len(adapter.blocks)
    missing = any(run.load_block(i) is None for i in range(count))
    stream = Stream(adapter, windows) if missing else None
    for index in range(count):
        solved = _Block(adapter, scheme, solver, index, run.load_block(index))
        if stream is not None:
            solved.walk(stream)
        else:
            solved.install()
        if solved.found is None:
            run.save_block(index, solved.tensors, {"layers": solved.layers})
        done(index, solved.layers)
    for index in range(count):
        for site in _inputs(adapter, index).values():
            site.format = scheme.act


def _inputs(adapter: Adapter, index: int) -> dict[str, SiteInput]:
    """Site name -> the SiteInput that its linears share."""
    return {s.name: next(iter(adapter.linears(index, s).values())).site for s in adapter.family.sites}


class _Block:
    """One block on its way from float to quantized: either solved now, or installed from what was `found` on disk."""

    def __init__(self, adapter: Adapter, scheme: Scheme, solver: Solver | None, index: int, found):
        self.adapter, self.scheme, self.solver, self.index, self.found = adapter, scheme, solver, index, found
        self.block = adapter.blocks[index]
        self.inputs = _inputs(adapter, index)
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[dict] = []
        if found is not None:
            self.tensors, self.layers = found[0], found[1]["layers"]

    def walk(self, stream: Stream) -> None:
        """Pass the stream through, solving each site on the way (or all of them first, for `sequencing: block`)."""
        whole = self.solver is not None and self.solver.sequencing == "block"
        if self.found is not None:
            self.install()
        elif whole:
            gathered = self._gather(stream)
            for site in self.adapter.family.sites:
                self._settle(site, gathered[site.name])
        for branch in self.adapter.family.branches:
            for site, activations in ((branch.entry, stream.entry), (branch.exit, stream.exit)):
                statistics = None if self.found is not None else self._statistics(site, stream, hessian=not whole)
                for x in activations(self.block, branch) if statistics or site is branch.exit else ():
                    if statistics:
                        self._observe(site, statistics, x)
                if statistics and whole:
                    self._calibrate(site, statistics.amax)
                elif statistics:
                    self._settle(site, statistics)
            stream.close(self.block, branch)

    def install(self) -> None:
        """Take weights and activation scales from what was found; nothing is streamed."""
        for site in self.adapter.family.sites:
            self._calibrate(site, self.tensors[f"{site.name}.amax"])
            for name in site.linears if self.solver is not None else ():
                linear: QuantLinear = self.block.get_submodule(name)
                prefix = f"{name}."
                state = {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}
                quantized = QTensor.from_state(self.scheme.weight, state, linear.weight.shape, linear.weight.dtype)
                linear.load(quantized.to(linear.weight.device).dequantize())

    def _gather(self, stream: Stream) -> dict[str, Statistics]:
        """Statistics of all sites from one pass of the unquantized block, which leaves the stream where it is."""
        statistics = {site.name: self._statistics(site, stream) for site in self.adapter.family.sites}
        handles = []
        for site in self.adapter.family.sites:
            reader = self.block.get_submodule(site.linears[0])
            observe = lambda _, args, site=site: self._observe(site, statistics[site.name], args[0])  # noqa: E731
            handles.append(reader.register_forward_pre_hook(observe))
        for hidden, context in zip(stream.hidden, stream.context):
            self.block(hidden, **context)
        for handle in handles:
            handle.remove()
        return statistics

    def _statistics(self, site: Site, stream: Stream, hessian: bool = True) -> Statistics:
        reader: QuantLinear = self.block.get_submodule(site.linears[0])
        needed = self.solver is not None and "hessian" in self.solver.needs
        return Statistics(reader.in_features, stream.tokens, reader.weight.device, hessian and needed)

    def _observe(self, site: Site, statistics: Statistics, x: Tensor) -> None:
        x = self.inputs[site.name].encode(x)
        act = self.scheme.act
        product_of = None
        if statistics.hessian is not None and self.solver.hessian_input == "quantized" and act is not None:
            # a static scale is not known before the last micro-batch; each one's own range stands in for it
            product_of = act.fake(x, global_scale=act.global_from_amax(x.abs().amax()) if act.needs_static else None)
        statistics.add(x, product_of)

    def _settle(self, site: Site, statistics: Statistics) -> None:
        """Solve a site from its statistics, report on it, swap the weights in."""
        statistics.finish()
        linears = {n: self.block.get_submodule(n) for n in site.linears}
        sample = statistics.sample
        wanted = {n: sample @ linear.weight.float().T for n, linear in linears.items()}
        reports = {n: {"name": self.adapter.name(self.index, n), "sqnr_db": None} for n in linears}
        if self.solver is not None:
            weights = {n: linear.weight for n, linear in linears.items()}
            formats = dict.fromkeys(weights, self.scheme.weight)
            solution = self.solver.solve(Problem(weights, formats, statistics.hessian))
            for name, quantized in solution.qtensors.items():
                self.tensors |= {f"{name}.{key}": value for key, value in quantized.state().items()}
                values = quantized.dequantize()
                noise = _relative(values, weights[name])
                if 0 < noise < math.inf:
                    reports[name]["sqnr_db"] = -10 * math.log10(noise)
                reports[name] |= {"bits": quantized.bits(), "weights": weights[name].numel(), **solution.report}
                linears[name].load(values)
        self._calibrate(site, statistics.amax)
        act = self.scheme.act
        read = sample if act is None else act.fake(sample, global_scale=self.inputs[site.name].global_scale)
        for name, linear in linears.items():
            reports[name]["rel_error"] = _relative(read @ linear.weight.float().T, wanted[name])
        self.layers += reports.values()

    def _calibrate(self, site: Site, amax: Tensor) -> None:
        """Give the site the activation scale that follows from the greatest magnitude it saw, and keep that."""
        self.tensors[f"{site.name}.amax"] = amax.reshape(1)
        act = self.scheme.act
        if act is not None and act.needs_static:
            weight = self.block.get_submodule(site.linears[0]).weight
            self.inputs[site.name].global_scale = act.global_from_amax(amax.to(weight).reshape(1))


def _relative(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted|^2 / |wanted|^2, a plain ratio."""
    wanted = wanted.float()
    return float((got.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
