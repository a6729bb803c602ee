"""Quantize a model block by block while the calibration activations stream through it.

For each site of a block, in the order of the forward: collect statistics, solve, swap the weights,
go on with what was quantized. A solver may also prepare a block first (AWQ) or solve it as a whole
(AdaScale). A finished block is on disk before the next one begins; a block found there is loaded
and replayed by the same arithmetic, so an interrupted run ends with the same bits. What stands
outside the blocks, embedding and head, is one more block at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness.calibration.block import BlockScales, BlockView
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.subject import quiet, unlogged
from harness.formats import QTensor, Scheme
from harness.models.adapter import Adapter
from harness.models.offload import trim
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.quantize.embeddings import Embeddings
from harness.quantize.weights import decibel, relative, stored, swap_in
from harness.solvers import Problem, Solver
from harness.store import Run
from harness.structure.structure import Site
from harness.structure.tape import tensors_of
from harness.transforms import generator


@torch.no_grad()
def quantize(
    adapter: Adapter,
    scheme: Scheme,
    solver: Solver | None,
    windows: Tensor,
    run: Run,
    done: Callable[[int, list[dict], dict], None],
    seed: int = 0,
    stage: Callable[[str, int], AbstractContextManager] = quiet,
    folder: Path | None = None,
    log: Callable[[dict, int], None] = unlogged,
    everyone: bool = False,
) -> None:
    """Solve every block of a placed model and switch its activation quantizers on.

    windows: calibration token ids [N, L]; solver None: only activation scales are taken. Solved
    blocks go to `run` and come from it when they are there. `done(index, layers, output)` is called
    after each block, and after what stands outside of them where that is quantized, with the report
    of every linear and of the block's output. stage shows the progress inside a block, log keeps
    its learning curve. folder: where activations lie; None: in memory. everyone: experts are
    calibrated on all tokens, not on what the router gives them.
    """
    count = len(adapter.blocks)
    outside = Embeddings(adapter, scheme, solver)
    missing = any(run.load_block(i) is None for i in range(count + outside.quantizes))
    streaming = partial(Stream, adapter, windows, folder=folder, everyone=everyone)
    # where scales span tokens, a text is quantized without its neighbours, as it is when evaluated
    at_once = 1 if scheme.spans_tokens else None
    if solver is not None and solver.windows is not None:
        at_once = solver.windows
    if at_once is not None:
        streaming = partial(streaming, tokens_at_once=at_once * windows.shape[1])
    original = stream = error = None
    if missing and solver is not None and solver.scope == "block":
        original = streaming()
    # the original stream has begun: it sees the embedding before this rounds it
    outside.embed(run)
    if missing:
        stream = streaming()
        error = OutputError(adapter, scheme, stream)
    for index in range(count):
        solved = _Block(adapter, scheme, solver, index, run.load_block(index))
        with adapter.open(index, write=True):
            if stream is not None and error is not None:
                if solved.record is None:
                    error.before(index)
                view = BlockView(
                    adapter, scheme, index, stream, generator(seed, "solver", index), stage, log
                )
                solved.walk(stream, original, view)
                if solved.record is None:
                    solved.output = error.after(index)
            else:
                solved.install()
        if solved.record is None:
            run.save_block(
                index, solved.tensors, {"layers": solved.layers, "output": solved.output}
            )
        done(index, solved.layers, solved.output)
        trim()
    if outside.quantizes:
        done(count, outside.finish(stream, run), {})
    for index in range(count):
        _activations(adapter, scheme, index, on=True)


def _activations(adapter: Adapter, scheme: Scheme, index: int, on: bool) -> None:
    """Switch the activation quantizers of a block on or off."""
    for site in adapter.sites(index):
        act = scheme.part("act", index, site.linears[0]) if on else None
        _input(adapter, index, site).format = act


class OutputError:
    """What quantizing a block, weights and activations, costs its output.

    On the first calibration window: the stream's input goes through the block before and after, so
    errors of earlier blocks do not count.
    """

    def __init__(self, adapter: Adapter, scheme: Scheme, stream: Stream):
        self.adapter = adapter
        self.scheme = scheme
        self.stream = stream
        # once: tensors made anew for each block would split the heap between its temporaries
        hidden, _ = stream.window(adapter.blocks[0])
        self._hidden = torch.empty_like(hidden)
        self._target = torch.empty_like(hidden)

    def before(self, index: int) -> None:
        """To be called before block `index` is changed."""
        self._hidden.copy_(self.stream.window(self.adapter.blocks[index])[0])
        self._target.copy_(self._forward(index))

    def after(self, index: int) -> dict:
        """{"output_error": |y' - y|^2 / |y|^2, "sqnr_db"}, once the block is quantized."""
        _activations(self.adapter, self.scheme, index, on=True)
        noise = relative(self._forward(index), self._target)
        _activations(self.adapter, self.scheme, index, on=False)
        return {"output_error": noise, "sqnr_db": decibel(noise)}

    def _forward(self, index: int) -> Tensor:
        block = self.adapter.blocks[index]
        return tensors_of(block(self._hidden, **self.stream.window(block)[1]))[0]


def _input(adapter: Adapter, index: int, site: Site) -> SiteInput:
    """The SiteInput that the linears of a site share."""
    return adapter.blocks[index].get_submodule(site.linears[0]).site


class _Block:
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
        self.inputs = {site.name: _input(adapter, index, site) for site in self.sites}
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
        for site, activations in stream.walk(self.block):
            # a record needs no statistics, but the stream must get past the block
            if self.record is not None:
                continue
            statistics = self._statistics(site, stream, hessian=not whole)
            for x in activations:
                self._observe(site, statistics, x)
            if whole:
                self._calibrate(site, statistics.range)
            else:
                statistics.finish()
                self._settle(site, statistics, *self._solved(site, statistics), shared)

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
        gathered = self._gather(stream)
        if self.solver.scope == "site":
            for site in self.sites:
                self._settle(
                    site, gathered[site.name], *self._solved(site, gathered[site.name]), shared
                )
            return
        solution = self.solver.solve_block(view)
        for site in self.sites:
            qtensors = {name: q for name, q in solution.qtensors.items() if name in site.linears}
            self._settle(site, gathered[site.name], qtensors, solution.report, shared)

    def _gather(self, stream: Stream) -> dict[str, Statistics]:
        """Statistics of all sites from one pass of the unquantized block."""
        statistics = {site.name: self._statistics(site, stream) for site in self.sites}
        handles = []
        for site in self.sites:
            reader = self.block.get_submodule(site.linears[0])

            def observe(_, args, site=site):
                return self._observe(site, statistics[site.name], args[0])

            handles.append(reader.register_forward_pre_hook(observe))
        for hidden, context in zip(stream.hidden, stream.block_kwargs[self.block]):
            self.block(hidden, **context)
        for handle in handles:
            handle.remove()
        for each in statistics.values():
            each.finish()
        return statistics

    def _statistics(self, site: Site, stream: Stream, hessian: bool = True) -> Statistics:
        reader = self._linear(site.linears[0])
        needed = (
            self.solver is not None
            and "hessian" in self.solver.needs
            and self.scheme.weights(self.index, site.linears)
        )
        return Statistics(
            reader.in_features, stream.tokens, reader.weight.device, hessian and bool(needed)
        )

    def _observe(self, site: Site, statistics: Statistics, x: Tensor) -> None:
        statistics.observe(self.inputs[site.name].encode(x), self.acts[site.name], self.solver)

    def _solved(self, site: Site, statistics: Statistics) -> tuple[dict[str, QTensor], Mapping]:
        """What the solver makes of one site, with its report."""
        formats = self.scheme.weights(self.index, site.linears)
        if self.solver is None or not formats:
            return {}, {}
        weights = {name: self._linear(name).weight for name in formats}
        solution = self.solver.solve(Problem(weights, formats, statistics.hessian))
        return solution.qtensors, solution.report

    def _settle(
        self,
        site: Site,
        statistics: Statistics,
        qtensors: Mapping[str, QTensor],
        report: Mapping,
        shared: Mapping,
    ) -> None:
        """Swap a site's solved weights in and report on them.

        shared: what the solver said of the whole block.
        """
        linears = {n: self._linear(n) for n in site.linears}
        self._calibrate(site, statistics.range)
        names = {n: self.adapter.name(self.index, n) for n in site.linears}
        reports = swap_in(
            linears,
            names,
            qtensors,
            statistics,
            self.acts[site.name],
            self.inputs[site.name].global_scale,
            counts=self.solver is not None,
        )
        for name in qtensors:
            reports[name] |= {**shared, **report}
            self.tensors |= {
                f"{name}.{key}": value for key, value in qtensors[name].state().items()
            }
        self.layers += reports.values()

    def _calibrate(self, site: Site, seen: Tensor) -> None:
        """Give the site the activation scale of the range [2] it saw, and keep that."""
        self.tensors[f"{site.name}.range"] = seen
        act = self.acts[site.name]
        if act is not None and act.needs_static:
            weight = self._linear(site.linears[0]).weight
            self.inputs[site.name].global_scale = act.calibrated(*seen.to(weight))
