"""Solver: what all solvers share, their settings and the scales that a format's observer chooses.

A solver turns the weights that read one site into QTensors (problem.py), or those of a whole block
at once (block.py). It knows nothing of models, files or progress; it returns a report of plain
numbers (damping used, retries, fallbacks) and the pipeline tells people.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Format, Scales
from harness.solvers.block import Block
from harness.solvers.problem import Problem, Solution
from harness.solvers.refit import refit
from harness.solvers.search import under_hessian

PROPAGATION = ("propagate_alpha", "propagate_damp", "propagate_skip")
OF_SITES = ("sequencing", "refit")  # what solving a whole block never asks


@dataclass(frozen=True, kw_only=True)
class Solver:
    """(weights, statistics, format) -> QTensors.

    needs: the statistics wanted beyond the sample: {"hessian"}.
    scope: `site` = `solve` sees one site at a time; `block` = `solve_block` sees a whole block.
    prepares: whether `prepare` is to be called with each block before its sites are solved.
    encodings: the folder of the run that gets AIMET's encodings.
    apart: whether the linears of a site may be solved on different ranks, as `part` cuts them.
    propagates: what `propagate` may be.

    sequencing: `sites` = later sites of a block see earlier ones quantized (true-sequential);
        `block` = one pass a block.
    hessian_input: `fp` = X E, `quantized` = Q(X E), the input as it will be read; `auto` =
        quantized where a trained decoder changes what the weights are for (AdaCodec) or the stream
        is of quantized activations (stream=both), else fp.
    fuse_global_scale: linears of one site (q/k/v, gate/up) share a two-level format's global scale,
        as fused kernels demand.
    min_tokens: an expert of a mixture that the router gave fewer is calibrated on all tokens of its
        layer.
    stream: what later sites read of the solved ones: `weights` = their weights quantized, `both` =
        their activations too.
    propagate: how weights undo what earlier layers did, none | qep (before anything is rounded,
        propagation.py) | gptaq (in gptq's loop, asymmetry.py); propagate_alpha: how much of it;
        propagate_damp: its damping, a share of mean(diag H); propagate_skip: sites left out. Routed
        experts always are: their tokens differ.
    refit: whether scales are chosen anew once codes are (refit.py).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "site"
    prepares: ClassVar[bool] = False
    encodings: ClassVar[str | None] = None
    apart: ClassVar[bool] = False
    propagates: ClassVar[tuple[str, ...]] = ("none", "qep")

    sequencing: str = "sites"
    hessian_input: str = "auto"
    fuse_global_scale: bool = True
    min_tokens: int = 128
    stream: str = "weights"
    propagate: str = "none"
    propagate_alpha: float = 0.5
    propagate_damp: float = 1.0
    propagate_skip: Sequence[str] = ("down_in",)
    refit: bool = False

    def __post_init__(self):
        one_of("solver.sequencing", self.sequencing, ("sites", "block"))
        one_of("solver.hessian_input", self.hessian_input, ("auto", "fp", "quantized"))
        boolean("solver.fuse_global_scale", self.fuse_global_scale)
        integer("solver.min_tokens", self.min_tokens)
        one_of("solver.stream", self.stream, ("weights", "both"))
        one_of("solver.propagate", self.propagate, ("none", "qep", "gptaq"))
        number("solver.propagate_alpha", self.propagate_alpha, 0, 1)
        number("solver.propagate_damp", self.propagate_damp, 0, 1e6)
        boolean("solver.refit", self.refit)
        if self.refit and self.propagate == "gptaq":
            raise ConfigError(
                "solver.refit=true with solver.propagate=gptaq: codes then make up for what is "
                "read, which scales would undo; use solver.propagate=qep."
            )
        if self.propagate not in self.propagates:
            why = "it stands in the loop over columns that only gptq has; use solver=gptq or"
            if self.scope == "block":
                why = "a block is learned from the untouched one's output already; use"
            raise ConfigError(
                f"solver.propagate={self.propagate} with {type(self).__name__}: {why} "
                f"solver.propagate={self.propagates[-1]}."
            )
        if self.propagate != "none" and self.sequencing == "block":
            raise ConfigError(
                f"solver.propagate={self.propagate} with solver.sequencing=block: errors are "
                "undone from site to site; use solver.sequencing=sites."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        """Settings without effect as the others are set."""
        how = () if self.propagate != "none" else PROPAGATION
        return how if self.scope == "site" else (*OF_SITES, *how)

    def told(self, scored: frozenset[str]) -> Solver:
        """This solver for one model; scored: its linears that queries and keys are made by."""
        return self

    def check(self, format: Format) -> list[str]:
        """Refuse a weight format this solver cannot solve for (ConfigError); returns warnings."""
        return []

    def check_together(self, formats: Sequence[Format], sites: Mapping[str, str]) -> list[str]:
        """Refuse weight formats of one model that this solver cannot have side by side.

        Raises ConfigError; returns warnings of what it cannot do here. sites: {site: free | shared
        | fixed} of those whose linears are quantized, as `Block.scalable` will say.
        """
        return []

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        """Warnings where the reports of all linears, once solved, say that a plainer solver would
        have given the same weights."""
        return []

    def curvature(self, formats: Iterable[Format], width: int) -> int:
        """How much of the Hessian [width, width] it reads for linears of these weight formats.

        The width of the blocks of its diagonal: `width` where all of it is read, 0 where none is.
        """
        if "hessian" in self.needs or self.propagate != "none":
            return width
        wanting = [format for format in formats if format.under_hessian or self.refit]
        groups = [format.group(width) for format in wanting]
        if not groups or self.scope == "block":
            return 0
        size = math.lcm(*groups)
        return width if width % size else size

    @property
    def windows(self) -> int | None:
        """Calibration windows in a micro-batch; None leaves that to the stream."""
        return None

    @property
    def outside(self) -> Solver:
        """Who solves the output head, which belongs to no block."""
        return self

    def solve(self, problem: Problem) -> Solution:
        """The quantized weights of one site."""
        raise NotImplementedError

    def solve_together(self, problems: Sequence[Problem]) -> list[Solution]:
        """The solutions of sites of which none reads another: the experts of a layer.

        One by one here; a solver may have a faster way.
        """
        return [self.solve(problem) for problem in problems]

    def part(self, problem: Problem, names: Sequence[str]) -> Problem:
        """The problem of some linears of a site, which get the scales that they have beside the
        others."""
        if len(names) == len(problem.weights):
            return problem
        return replace(
            problem,
            weights={name: problem.weights[name] for name in names},
            formats={name: problem.formats[name] for name in names},
            peaks={name: self._peak(problem, name) for name in names},
        )

    def solved(self, problems: Sequence[Problem]) -> list[Solution]:
        """Their solutions with scales as they are to be stored."""
        solutions = self.solve_together(problems)
        if not self.refit:
            return solutions
        refitted = []
        for problem, found in zip(problems, solutions):
            assert problem.hessian is not None  # as `curvature` asks
            qtensors = {
                name: refit(problem.weights[name], problem.formats[name], q, problem.hessian)
                for name, q in found.qtensors.items()
            }
            refitted.append(replace(found, qtensors=qtensors))
        return refitted

    def solve_block(self, block: Block) -> Solution:
        """The quantized weights of one block."""
        raise NotImplementedError

    def prepare(self, block: Block) -> dict:
        """Change a block, by `block.merge`, before its sites are solved.

        Returns a report of plain numbers.
        """
        raise NotImplementedError

    def static_scales(self, problem: Problem) -> dict[str, Scales]:
        """Each weight's scales by its format's observer, from the weights as they are.

        And from the problem's Hessian, where the observer reads one. Those that are decided already
        stay. A global scale is shared by the weights of the site
        whose format is the same.
        """
        if problem.scales is not None:
            return dict(problem.scales)
        scales = {}
        for name, weight in problem.weights.items():
            format = problem.formats[name]
            # NVFP4's g and FourOverSix's amax; formats of one scale ignore it
            amax = self._peak(problem, name)
            found = format.scales(weight, global_scale=format.global_from_amax(amax))
            if format.under_hessian:
                assert problem.hessian is not None  # as `curvature` asks
                found = under_hessian(weight, format, found, problem.hessian)
            scales[name] = found
        return scales

    def _peak(self, problem: Problem, name: str) -> Tensor:
        """The greatest magnitude [] of a weight, or of all that share its global scale."""
        if problem.peaks is not None:
            return problem.peaks[name]
        peers = [problem.weights[name]]
        if self.fuse_global_scale:
            format = problem.formats[name]
            peers = [
                problem.weights[other]
                for other, theirs in problem.formats.items()
                if theirs == format
            ]
        return torch.stack([peer.abs().amax() for peer in peers]).amax()
