r"""adascale: learn, block by block, how weights are divided before rounding, and their ranges.

    Delta = (q_max e^gamma - q_min e^beta) / (q_max - q_min) delta
    W~ = W / e^s2 / e^s3,     W^ = Delta clamp(RNE(W~ / Delta), q_min, q_max)
    min  mean_{batch, channels} sum_{sequence} (block(x) - block^(x'))^2

over beta, gamma, s2, s3, all zero at first; delta is the min-max scale of the channel or group. s2
has the weight's shape, the others one value a scale; a Conv2d weight has s4 [1, in, 1, 1] too. x is
the untouched stream, x' takes each element from the quantized prefix with probability 1/2. Rounding
passes gradients straight, clamping only inside. Afterwards W~ is the weight and Delta its frozen
scale, so iteration 0 is min-max bit for bit and the result is what was trained.

Source: AIMET's AdaScale (FlexRound, arXiv 2306.00317, with OmniQuant's learned clipping, arXiv
2308.13137). Differences: Delta is written through the min-max delta, which is the same number,
(e^gamma max - e^beta min) / N; the best iterate by the held-out tenth of the calibration windows is
kept, iteration 0 included; float grids (beta = gamma follows, their reach being symmetric) and
groups, whose scale is rounded as it is stored at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, number
from harness.config.errors import ConfigError
from harness.formats import Format, FourOverSix
from harness.solvers.base import Solver
from harness.solvers.block import Block
from harness.solvers.learning import error, learn, problems
from harness.solvers.minmax import MinMax, minmax
from harness.solvers.problem import Solution
from harness.solvers.rounding import Rounding


@dataclass(frozen=True, kw_only=True)
class AdaScale(Solver):
    """iterations: steps a block, `batch` windows each, in turn.
    lr_clip: of beta and gamma; lr_round: of s2, s3 (and s4); Adam, both falling to 0 by a cosine.
    lwc: learn beta and gamma. flexround: learn s2, s3.
    mix: share of the elements taken from the quantized prefix.
    """

    scope: ClassVar[str] = "block"
    propagates: ClassVar[tuple[str, ...]] = ("none",)
    encodings: ClassVar[str] = "encodings"

    iterations: int = 1500
    batch: int = 1
    lr_clip: float = 1e-3
    lr_round: float = 5e-4
    lwc: bool = True
    flexround: bool = True
    mix: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        integer("solver.iterations", self.iterations, low=0)
        integer("solver.batch", self.batch)
        number("solver.lr_clip", self.lr_clip, 0, 1)
        number("solver.lr_round", self.lr_round, 0, 1)
        boolean("solver.lwc", self.lwc)
        boolean("solver.flexround", self.flexround)
        number("solver.mix", self.mix, 0, 1)
        if not (self.lwc or self.flexround):
            raise ConfigError(
                "solver.lwc=false with solver.flexround=false: nothing is learned; "
                "use solver=minmax."
            )

    def check(self, format: Format) -> list[str]:
        if not format.symmetric or isinstance(format, FourOverSix):
            raise ConfigError(
                f"solver=adascale with format.weight={type(format).__name__} "
                f"(symmetric={format.symmetric}): it learns one scale without zero point; "
                "use format.weight.symmetric=true and one of int4, fp4, nvfp4, mxfp4."
            )
        return []

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        if any(layer.get("best_step") for layer in layers):
            return []
        return [
            "adascale changed nothing against minmax: in no block did a step lower the "
            "held-out loss"
        ]

    @property
    def windows(self) -> int:
        return self.batch

    @property
    def outside(self) -> Solver:
        return MinMax(fuse_global_scale=self.fuse_global_scale)

    def solve_block(self, block: Block) -> Solution:
        """Raises RuntimeError where the loss is no longer finite."""
        # min-max, whatever observer the format has: it is what Delta is a multiple of
        roundings: dict[str, Rounding] = {}
        for problem in problems(block):
            formats = {name: minmax(format) for name, format in problem.formats.items()}
            start = self.static_scales(replace(problem, formats=formats))
            for name, format in formats.items():
                weight = problem.weights[name]
                roundings[name] = Rounding(weight, format, start[name], self.lwc, self.flexround)
        with torch.enable_grad():
            report = self._learn(block, roundings)
        return Solution({name: r.qtensor() for name, r in roundings.items()}, report)

    def _learn(self, block: Block, roundings: Mapping[str, Rounding]) -> dict:
        clip = [p for rounding in roundings.values() for p in rounding.clip()]
        shape = [p for rounding in roundings.values() for p in rounding.shape()]
        groups = [{"params": clip, "lr": self.lr_clip}, {"params": shape, "lr": self.lr_round}]
        # fused: one pass over all parameters, which are as many as the weights
        adam = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, self.iterations))

        def weights() -> dict[str, Tensor]:
            return {name: rounding() for name, rounding in roundings.items()}

        def loss(step: int, batch: int) -> Tensor:
            return error(block, batch, self._mixed(block, batch), weights())

        def move(step: int) -> None:
            adam.step()
            rates.step()

        remedy = "lower solver.lr_round and solver.lr_clip"
        parameters = clip + shape
        return learn(block, "adascale", self.iterations, parameters, weights, loss, move, remedy)

    def _mixed(self, block: Block, batch: int) -> list[Tensor]:
        """The parts of a batch, each element of which is from one stream or the other."""
        mixed = []
        for part, draws in zip(block.batches[batch], block.draws(batch)):
            original = block.original[part.index]
            first = draws.to(original.device) < self.mix
            mixed.append(torch.where(first, block.quantized[part.index], original))
        return mixed
