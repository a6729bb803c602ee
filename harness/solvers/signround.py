r"""signround: learn, block by block, to which of its two neighbours each weight is rounded.

    v <- v - lr (1 - t / T) sign(dL / dv),    t = 0 .. T - 1
    L = mean_{batch, channels} sum_{sequence} (block(x) - block^(x'))^2

over v of every weight, zero at first, x the untouched stream and x' the quantized one. Two ways of
rounding by v (intervals.py):

    offset     v in [-1/2, 1/2] is added before rounding; ratios a, b in (0, 1] of each range's ends
               are learned by the same steps. Source: SignRound, AutoRound (arXiv 2309.05516)
    interval   w^ = lo + h(v) (hi - lo), h a rectified sigmoid pushed to 0 or 1.
               Source: FAAR (arXiv 2603.22370), AdaRound (arXiv 2004.10568)

Differences: v is a share of the interval between the neighbours, which is the step on integers;
AutoRound's float formats add v steps, which is too little where intervals are wide and too much
where they are narrow. Ratios multiply the range of the format's observer, so that v = 0 is rtn bit
for bit. Float and symmetric integer formats have one ratio, for one end decides their scale.
Batches come in turn, activations are not quantized meanwhile, and the best iterate by the
held-out tenth of the calibration windows is kept, the start included. h is pushed by a slope that
grows, not by a penalty: that has no weight to choose, and needs few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Format, Scales
from harness.solvers.base import Solver
from harness.solvers.block import Block
from harness.solvers.intervals import Between, Interval, Offset
from harness.solvers.learning import arriving, error, learn, problems
from harness.solvers.problem import Solution
from harness.solvers.rtn import RTN

TRAVEL = {"offset": 1.0, "interval": 4.0}  # steps times the first rate; v goes half as far


@dataclass(frozen=True, kw_only=True)
class SignRound(Solver):
    """rounding: offset | interval.
    steps: a block, `batch` windows each, in turn.
    lr: the first rate, null for 1 / steps (offset) or 4 / steps (interval).
    clip: learn a and b (offset).
    """

    scope: ClassVar[str] = "block"
    propagates: ClassVar[tuple[str, ...]] = ("none",)

    rounding: str = "offset"
    steps: int = 200
    batch: int = 4
    lr: float | None = None
    clip: bool = True

    def __post_init__(self):
        super().__post_init__()
        one_of("solver.rounding", self.rounding, tuple(TRAVEL))
        integer("solver.steps", self.steps, low=0)
        integer("solver.batch", self.batch)
        if self.lr is not None:
            number("solver.lr", self.lr, 0, 10)
        boolean("solver.clip", self.clip)
        if self.clip and self.rounding == "interval":
            raise ConfigError(
                "solver.clip=true with solver.rounding=interval: intervals are those of fixed "
                "scales; set solver.clip=false, or solver.rounding=offset."
            )

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        if any(layer.get("best_step") for layer in layers):
            return []
        return [
            "signround changed nothing against rtn: in no block did a step lower the held-out loss"
        ]

    @property
    def windows(self) -> int:
        return self.batch

    @property
    def outside(self) -> Solver:
        return RTN(fuse_global_scale=self.fuse_global_scale)

    def solve_block(self, block: Block) -> Solution:
        """Raises RuntimeError where the loss is no longer finite."""
        roundings: dict[str, Between] = {}
        for problem in problems(block):
            start = self.static_scales(problem)
            for name, weight in problem.weights.items():
                roundings[name] = self._rounding(weight, problem.formats[name], start[name])
        with torch.enable_grad():
            report = self._learn(block, roundings)
        return Solution({name: r.qtensor() for name, r in roundings.items()}, report)

    def _rounding(self, weight: Tensor, format: Format, start: Scales) -> Between:
        if self.rounding == "offset":
            return Offset(weight, format, start, self.clip)
        return Interval(weight, format, start)

    def _learn(self, block: Block, roundings: Mapping[str, Between]) -> dict:
        parameters = [
            p for rounding in roundings.values() for p in rounding.parameters() if p.requires_grad
        ]

        def stored() -> dict[str, Tensor]:
            return {name: r.qtensor().dequantize() for name, r in roundings.items()}

        def loss(step: int, batch: int) -> Tensor:
            weights = {name: r(step / self.steps) for name, r in roundings.items()}
            return error(block, batch, arriving(block, batch), weights)

        def move(step: int) -> None:
            first = TRAVEL[self.rounding] / self.steps if self.lr is None else self.lr
            rate = first * (1 - (step - 1) / self.steps)
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:  # as of an expert that was given no token
                        parameter.sub_(parameter.grad.sign(), alpha=rate)
            for rounding in roundings.values():
                rounding.confine()

        remedy = "lower solver.lr"
        return learn(block, "signround", self.steps, parameters, stored, loss, move, remedy)
