r"""awq: scale the channels that carry large activations before rounding, then shrink each group's range where that helps.

    s = m^r / sqrt(max m^r min m^r),   m_j = mean |X_j|,   r in 0, 1/20, .., 19/20        duo: m^r / (mean |W_j|^(1-r) + 1e-4)
    r minimises |f(X; Q(W diag(s)) diag(1/s)) - f(X; W)|^2,  f: what is around the site (attention, MLP, the last linear itself)
    p in 1, .95, .., .55 minimises d^T H_gg d for each group g,  d = w_g - Q(w_g; its extremes times p)

1/s is merged into what feeds the site (norm, v's rows, up's rows), so the float function stays; r = 0 is in the grid, so the
search never ends worse than rounding. Then `rtn` or `gptq` solves the scaled weights on the clipped scales. q and k are not
clipped. Where an encoder stands between the site and what feeds it (R4, block rotations, AdaCodec's down encoder) nothing is
scaled.

Source: AWQ (arXiv 2306.00978) and llm-awq; duo from llm-compressor. Differences: the activation quantizer stands in the search
where activations are quantized, Q_a(X / s) s; clipping measures with the Hessian blocks, which is its published error of a
group's partial output, on all tokens instead of 512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, one_of
from harness.formats import Format, FourOverSix, Scales
from harness.solvers.base import Block, Problem, Solution, Solver
from harness.solvers.gptq import GPTQ
from harness.solvers.rtn import RTN

UNCLIPPED = (
    "q_proj",
    "k_proj",
)  # their outputs meet in a product, which a partial output says nothing of
CLIPS = tuple(1 - step / 20 for step in range(10))
UNSCALED = {  # why a site of that freedom (Block.scalable) gets no scale
    "fixed": "an encoder stands before it",
    "shared": "heads share its values, solver.gqa=skip",
    "free": "solver.grid=1 tries none",
}


@dataclass(frozen=True, kw_only=True)
class AWQ(Solver):
    """grid: ratios tried. duo: weights too enter the scale. gqa: what becomes of o_in where query heads share a value head,
    skip | mean (one scale from the mean over them). clip: search each group's range. with_act: the activation quantizer stands
    in the search. then: rtn | gptq."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    prepares: ClassVar[bool] = True

    grid: int = 20
    duo: bool = False
    gqa: str = "skip"
    clip: bool = True
    with_act: bool = True
    then: str = "rtn"

    def __post_init__(self):
        super().__post_init__()
        integer("solver.grid", self.grid)
        for field in ("duo", "clip", "with_act"):
            boolean(f"solver.{field}", getattr(self, field))
        one_of("solver.gqa", self.gqa, ("skip", "mean"))
        one_of("solver.then", self.then, ("rtn", "gptq"))

    def check(self, format: Format) -> list[str]:
        if not self.clip or clippable(format):
            return []
        own = isinstance(format, FourOverSix)
        why = "it chooses ranges itself" if own else "its groups are no blocks of the Hessian"
        return [f"solver.clip=true with {type(format).__name__}: {why}, so none is clipped"]

    def check_together(self, formats: Sequence[Format], sites: Mapping[str, str]) -> list[str]:
        if self.grid > 1 and any(self._scales(freedom) for freedom in sites.values()):
            return []
        why = "; ".join(f"{site}: {UNSCALED[freedom]}" for site, freedom in sites.items())
        clips = self.clip and any(clippable(format) for format in formats)
        left = "it only clips ranges" if clips else f"this is solver={self.then}"
        return [
            f"solver=awq: no channels can be scaled ({why or 'no site is quantized'}), so {left}"
        ]

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        own = [
            value
            for layer in layers
            for key, value in layer.items()
            if key == "clipped" or key.startswith("awq_")
        ]
        if any(own):
            return []
        return [
            f"awq changed nothing against {self.then}: no scale was merged, and no range clipped"
        ]

    def _scales(self, freedom: str) -> bool:
        """Whether a site of that freedom (Block.scalable) gets a scale."""
        return freedom == "free" or (freedom == "shared" and self.gqa == "mean")

    def prepare(self, block: Block) -> dict:
        """Merge each site's best scale; returns {awq_<site>: ratio chosen} for the sites where one could be."""
        report = {}
        for site, linears in block.sites.items():
            names = [name for name in linears if name in block.formats]
            if names and self._scales(block.scalable(site)):
                ratio, scale = self._search(block, site, names)
                report[f"awq_{site}"] = ratio
                if ratio > 0:
                    block.merge(site, scale)
        return report

    def _search(self, block: Block, site: str, names: list[str]) -> tuple[float, Tensor]:
        weights = {name: block.weights[name] for name in names}
        formats = {name: replace(block.formats[name], observer="minmax") for name in names}
        loud = block.share(site, block.inputs(site).abs().float().mean(0))
        heavy = block.share(site, torch.cat(list(weights.values())).abs().float().mean(0))
        wanted = block.parent(site, {})
        lowest, best = torch.inf, (0.0, torch.ones_like(loud))
        for step in range(self.grid):
            ratio = step / self.grid
            scale = self.scale(loud, heavy, ratio)
            problem = Problem(
                {name: weight * scale.to(weight) for name, weight in weights.items()}, formats
            )
            rounded = {
                name: q.dequantize() / scale.to(q.dtype)
                for name, q in RTN().solve(problem).qtensors.items()
            }
            output = block.parent(site, rounded, scale if self.with_act else None)
            error = float((output.float() - wanted.float()).square().mean())
            if error < lowest:
                lowest, best = error, (ratio, scale)
        return best

    def scale(self, loud: Tensor, heavy: Tensor, ratio: float) -> Tensor:
        """s [n] of a ratio, from mean |X_j| and mean |W_j|; all ones for ratio 0."""
        scale = loud**ratio
        if self.duo and ratio > 0:
            scale = scale / (heavy ** (1 - ratio) + 1e-4)
        scale = scale.clamp_min(1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        return torch.where(scale.isfinite(), scale, 1)

    def solve(self, problem: Problem) -> Solution:
        """The report says how many groups of the site were `clipped`."""
        scales, count = self.static_scales(problem), 0
        if self.clip:
            for name, weight in problem.weights.items():
                if name.rpartition(".")[2] not in UNCLIPPED:
                    found = clipped(weight, problem.formats[name], scales[name], problem.hessian)
                    count += int((_raw(found.scale) != _raw(scales[name].scale)).sum())
                    scales[name] = found
        solver = {"rtn": RTN, "gptq": GPTQ}[self.then](fuse_global_scale=self.fuse_global_scale)
        solution = solver.solve(replace(problem, scales=scales))
        return replace(solution, report={**solution.report, "clipped": count})


def clippable(format: Format) -> bool:
    """Whether each group's error is a block of H, and the format leaves its range to others."""
    blocks = format.granularity != "tensor" and format.pad != "zero"
    return blocks and not isinstance(format, FourOverSix)


def clipped(weight: Tensor, format: Format, scales: Scales, hessian: Tensor) -> Scales:
    """Scales of a weight [out, n] whose extremes are shrunk, group by group, by the factor with the least error under the
    diagonal blocks of the Hessian [n, n]; as they are where the format is not clippable."""
    if not clippable(format):
        return scales
    blocks = format.split(weight.float())  # [out, groups, g]
    groups, width = blocks.shape[-2:]
    within = (
        hessian.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )  # [groups, g, g]
    peak = blocks.abs().amax(-1, keepdim=True)
    plain = replace(format, observer="minmax")
    chosen, lowest = scales, None
    for factor in CLIPS:
        limit = factor * peak
        shrunk = format.join(blocks.clamp(-limit, limit), weight.shape).to(weight.dtype)
        found = scales if factor == 1 else plain.scales(shrunk, global_scale=scales.global_scale)
        noise = (
            format.split(format.decode(format.encode(weight, found), found))
            .sub_(blocks)
            .transpose(0, 1)
        )
        error = (noise @ within).mul_(noise).sum(-1).T.contiguous()  # [out, groups]
        if lowest is None:
            lowest = error
            continue
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        chosen = _pick(better, found, chosen)
    return chosen


def _pick(better: Tensor, found: Scales, chosen: Scales) -> Scales:
    """Scale by scale, `found` where it is better."""
    scale = torch.where(better, _raw(found.scale), _raw(chosen.scale)).view(found.scale.dtype)
    zero = None if found.zero is None else torch.where(better, found.zero, chosen.zero)
    return replace(chosen, scale=scale, zero=zero)


def _raw(scale: Tensor) -> Tensor:
    """Stored scales so that they can be compared and picked: those in float8 as bytes."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale
