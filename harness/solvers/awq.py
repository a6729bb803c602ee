r"""awq: scale channels that carry large activations before rounding, then shrink groups' ranges.

    s = m^r / sqrt(max m^r min m^r),   m_j = mean |X_j|,   r in 0, 1/20, .., 19/20
        duo: m^r / (mean |W_j|^(1-r) + 1e-4) in place of m^r
    r minimises |f(X; Q(W diag(s)) diag(1/s)) - f(X; W)|^2,   f: what is around the site
        (attention, MLP, the last linear itself)
    p in 1, .95, .., .55 minimises d^T H_gg d for each group g,
        d = w_g - Q(w_g; its extremes times p)

1/s is merged into what feeds the site (norm, v's rows, up's rows), so the float function stays;
r = 0 is in the grid, so the search never ends worse than rounding. Then `rtn` or `gptq` solves the
scaled weights on the clipped scales. What queries and keys are made by is not clipped. Where an
encoder stands between the site and what feeds it (R4, block rotations, AdaCodec's down encoder)
nothing is scaled.

Source: AWQ (arXiv 2306.00978) and llm-awq; duo from llm-compressor. Differences: the activation
quantizer stands in the search where activations are quantized, Q_a(X / s) s; clipping measures with
the Hessian blocks, which is its published error of a group's partial output, on all tokens instead
of 512.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, one_of
from harness.formats import Format, FourOverSix, Scales
from harness.solvers.base import Solver
from harness.solvers.block import Block
from harness.solvers.gptq import GPTQ
from harness.solvers.problem import Problem, Solution
from harness.solvers.rtn import RTN
from harness.solvers.search import least, raw

CLIPS = tuple(1 - step / 20 for step in range(1, 10))
UNSCALED = {  # why a site of that freedom (Block.scalable) gets no scale
    "fixed": "an encoder stands before it",
    "shared": "heads share its values, solver.gqa=skip",
    "free": "solver.grid=1 tries none",
}


@dataclass(frozen=True, kw_only=True)
class AWQ(Solver):
    """grid: ratios tried.
    duo: weights too enter the scale.
    gqa: what becomes of o_in where query heads share a value head, skip | mean (one scale from the
    mean over them).
    clip: search each group's range.
    with_act: the activation quantizer stands in the search.
    then: rtn | gptq.
    scored: the linears that queries and keys are made by, which `told` fills in: these meet in a
    product, which a partial output says nothing of, and are not clipped.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    prepares: ClassVar[bool] = True

    grid: int = 20
    duo: bool = False
    gqa: str = "skip"
    clip: bool = True
    with_act: bool = True
    then: str = "rtn"
    scored: frozenset[str] = frozenset()

    def __post_init__(self):
        super().__post_init__()
        integer("solver.grid", self.grid)
        boolean("solver.duo", self.duo)
        boolean("solver.clip", self.clip)
        boolean("solver.with_act", self.with_act)
        one_of("solver.gqa", self.gqa, ("skip", "mean"))
        one_of("solver.then", self.then, ("rtn", "gptq"))

    def told(self, scored: frozenset[str]) -> AWQ:
        return replace(self, scored=scored)

    def check(self, format: Format) -> list[str]:
        if not self.clip or clippable(format):
            return []
        why = "its groups are no blocks of the Hessian"
        if isinstance(format, FourOverSix):
            why = "it chooses ranges itself"
        return [f"solver.clip=true with {type(format).__name__}: {why}, so none is clipped"]

    def check_together(self, formats: Sequence[Format], sites: Mapping[str, str]) -> list[str]:
        if self.grid > 1 and any(self._scales(freedom) for freedom in sites.values()):
            return []
        why = "; ".join(f"{site}: {UNSCALED[freedom]}" for site, freedom in sites.items())
        left = f"this is solver={self.then}"
        if self.clip and any(clippable(format) for format in formats):
            left = "it only clips ranges"
        return [
            f"solver=awq: no channels can be scaled ({why or 'no site is quantized'}), so {left}"
        ]

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        for layer in layers:
            if any(value for key, value in layer.items() if _is_change(key)):
                return []
        return [
            f"awq changed nothing against {self.then}: no scale was merged, and no range clipped"
        ]

    def _scales(self, freedom: str) -> bool:
        """Whether a site of that freedom (Block.scalable) gets a scale."""
        return freedom == "free" or (freedom == "shared" and self.gqa == "mean")

    def prepare(self, block: Block) -> dict:
        """Merge each site's best scale.

        Returns {awq_<site>: its ratio} for the sites where one could be.
        """
        report = {}
        for site, linears in block.sites.items():
            names = [name for name in linears if name in block.formats]
            if names and self._scales(block.scalable(site)):
                ratio, scale = self._search(block, site, names)
                report[f"awq_{site}"] = ratio
                if ratio > 0:  # at 0 the scale is all ones
                    block.merge(site, scale)
        return report

    def _search(self, block: Block, site: str, names: list[str]) -> tuple[float, Tensor]:
        """The best ratio of a site, and its scale."""
        weights = {name: block.weights[name] for name in names}
        # extremes alone: an observer's search would cost its grid again at every ratio
        formats = {name: replace(block.formats[name], observer="minmax") for name in names}
        loud = block.share(site, block.inputs(site).abs().float().mean(0))
        heavy = block.share(site, torch.cat(list(weights.values())).abs().float().mean(0))
        target = block.parent(site, {})
        lowest = torch.inf
        best = (0.0, torch.ones_like(loud))
        for step in range(self.grid):
            ratio = step / self.grid
            scale = self.scale(loud, heavy, ratio)
            scaled = {name: weight * scale.to(weight) for name, weight in weights.items()}
            qtensors = RTN().solve(Problem(scaled, formats)).qtensors
            # divided again: the activation that `parent` reads has its own size
            rounded = {name: q.dequantize() / scale.to(q.dtype) for name, q in qtensors.items()}
            output = block.parent(site, rounded, scale if self.with_act else None)
            error = float((output.float() - target.float()).square().mean())
            if error < lowest:
                lowest = error
                best = (ratio, scale)
        return best

    def scale(self, loud: Tensor, heavy: Tensor, ratio: float) -> Tensor:
        """s [n] of a ratio, from mean |X_j| and mean |W_j|; all ones for ratio 0."""
        scale = loud**ratio
        if self.duo and ratio > 0:
            scale = scale / (heavy ** (1 - ratio) + 1e-4)
        scale = scale.clamp_min(1e-4)  # of a channel that is never on
        scale = scale / (scale.max() * scale.min()).sqrt()
        # a channel whose scale is no number is better left alone
        return torch.where(scale.isfinite(), scale, 1)

    def solve(self, problem: Problem) -> Solution:
        return self.solve_together([problem])[0]

    def solve_together(self, problems: Sequence[Problem]) -> list[Solution]:
        """The reports say how many groups of a site were `clipped`."""
        clips = [self._clipped(problem) for problem in problems]
        solver = {"rtn": RTN, "gptq": GPTQ}[self.then](fuse_global_scale=self.fuse_global_scale)
        solutions = solver.solve_together([problem for problem, _ in clips])
        return [
            replace(solution, report={**solution.report, "clipped": count})
            for solution, (_, count) in zip(solutions, clips)
        ]

    def _clipped(self, problem: Problem) -> tuple[Problem, int]:
        """A problem with scales, and how many of them were shrunk."""
        assert problem.hessian is not None  # as `needs` asks
        scales = self.static_scales(problem)
        count = 0
        if self.clip:
            for name, weight in problem.weights.items():
                if name in self.scored:
                    continue
                before = scales[name]
                scales[name] = clipped(weight, problem.formats[name], before, problem.hessian)
                count += int((raw(scales[name].scale) != raw(before.scale)).sum())
        return replace(problem, scales=scales), count


def clippable(format: Format) -> bool:
    """Whether each group's error is a block of H, and the format leaves its range to others."""
    blocks = not format.spans_rows and format.pad != "zero"
    return blocks and not isinstance(format, FourOverSix)


def clipped(weight: Tensor, format: Format, scales: Scales, hessian: Tensor) -> Scales:
    """Scales of a weight [out, n] whose extremes are shrunk, group by group.

    By the factor with the least error under the diagonal blocks of the Hessian [n, n]; as they are
    where the format is not clippable. A factor of 1 leaves the scales as they are, and wins ties.
    """
    if not clippable(format):
        return scales
    # the extremes of what was clamped are the range: nothing is left to search
    plain = replace(format, observer="minmax")

    def shrunk(rows: Tensor, scales: Scales) -> Iterator[Scales]:
        blocks = format.split(rows.float())
        peak = blocks.abs().amax(-1, keepdim=True)
        for factor in CLIPS:
            limit = factor * peak
            clamped = format.join(blocks.clamp(-limit, limit), rows.shape).to(rows.dtype)
            yield plain.scales(clamped, global_scale=scales.global_scale)

    return least(weight, format, scales, hessian, shrunk)


def _is_change(key: str) -> bool:
    """Whether a key of a linear's report is of what awq did beyond rounding."""
    return key == "clipped" or key.startswith("awq_")
