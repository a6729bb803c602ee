"""The embedding and the head, where `format.overrides` quantizes them.

The embedding is rounded to nearest before anything else, the head goes through the solver after
the last block.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.codecs.placement import HEAD_SITE
from harness.formats import QTensor, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap_head
from harness.models.quant_linear import QuantLinear
from harness.models.source import untie
from harness.quantize.weights import decibel, relative, stored, swap_in
from harness.solvers import Problem, Solver
from harness.store import Run


class Embeddings:
    """The embedding and the head, where they are quantized: one more block, after the last."""

    def __init__(self, adapter: Adapter, scheme: Scheme, solver: Solver | None):
        self.adapter = adapter
        self.quantizes = scheme.outside
        self.solver = None if solver is None else solver.outside
        structure = adapter.structure
        self.table = None if solver is None else scheme.part("weight", None, structure.embedding)
        self.weight = None if solver is None else scheme.part("weight", None, structure.head)
        self.act = scheme.part("act", None, structure.head)
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[dict] = []
        self.record: tuple[dict, dict] | None = None  # the record of an earlier attempt

    def embed(self, run: Run) -> None:
        """Untie, and round the embedding to nearest; it is the first thing a token meets."""
        if not self.quantizes:
            return
        untie(self.adapter.model)
        self.record = run.load_block(len(self.adapter.blocks))
        if self.table is not None:
            name = self.adapter.structure.embedding
            weight = self.adapter.model.get_parameter(f"{name}.weight")
            if self.record is not None:
                quantized = stored(self.record[0], name, self.table, weight)
            else:
                # rows are looked up, not multiplied: there is no Hessian for an observer to read
                quantized = self.table.quantize(weight.detach())
                self.tensors |= {f"{name}.{key}": value for key, value in quantized.state().items()}
                noise = relative(quantized.dequantize(), weight)
                self.layers.append(
                    {
                        "name": name,
                        "sqnr_db": decibel(noise),
                        "bits": quantized.bits(),
                        "weights": weight.numel(),
                        "rel_error": noise,
                    }
                )
            weight.copy_(quantized.dequantize())

    def finish(self, stream: Stream | None, run: Run) -> list[dict]:
        """Solve the head, or install it from its record; returns the report.

        stream: past the last block; None where there is a record of everything.
        """
        if self.weight is not None or self.act is not None:
            linear = swap_head(self.adapter)
            if self.record is not None:
                self._install(linear, self.record[0])
            else:
                assert stream is not None
                self._solve(linear, stream)
            linear.site.format = self.act
        if self.record is not None:
            return self.record[1]["layers"]
        run.save_block(len(self.adapter.blocks), self.tensors, {"layers": self.layers})
        return self.layers

    def _install(self, linear: QuantLinear, tensors: Mapping[str, Tensor]) -> None:
        """Take the head's weights and its activation scale from a record."""
        if self.weight is not None:
            name = self.adapter.structure.head
            linear.load(stored(tensors, name, self.weight, linear.weight).dequantize())
        self._calibrate(linear, tensors[f"{HEAD_SITE}.range"])

    def _solve(self, linear: QuantLinear, stream: Stream) -> None:
        """Solve the head for what leaves the stream, swap it in and report on it."""
        name = self.adapter.structure.head
        solver = self.solver
        curvature = 0
        if self.weight is not None and solver is not None:
            curvature = solver.curvature([self.weight], linear.in_features)
        device = linear.weight.device
        width = linear.in_features
        statistics = Statistics(width, stream.tokens, device, curvature, stream.ranks)
        for x, start in zip(stream.leave(), stream.starts):
            encoded = linear.site.encode(x)
            statistics.observe(encoded, self.act, solver, twice=linear.site.twice, start=start)
        statistics.finish()
        qtensors: dict[str, QTensor] = {}
        report = {}
        if self.weight is not None and solver is not None:
            problem = Problem({name: linear.weight}, {name: self.weight}, statistics.hessian)
            solution = solver.solved([problem])[0]
            qtensors = solution.qtensors
            report = solution.report
        self._calibrate(linear, statistics.range)
        reports = swap_in(
            {name: linear},
            {name: name},
            qtensors,
            statistics,
            self.act,
            linear.site.global_scale,
            counts=True,
        )
        self.layers.append(reports[name] | report)
        for quantized in qtensors.values():
            self.tensors |= {f"{name}.{key}": value for key, value in quantized.state().items()}

    def _calibrate(self, linear: QuantLinear, seen: Tensor) -> None:
        """Give the head the activation scale of the range [2] it saw, and keep that."""
        self.tensors[f"{HEAD_SITE}.range"] = seen
        if self.act is not None and self.act.needs_static:
            linear.site.global_scale = self.act.calibrated(*seen.to(linear.weight))
