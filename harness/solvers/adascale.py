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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, number
from harness.config.errors import ConfigError
from harness.formats import Format, FourOverSix
from harness.solvers.base import Block, Problem, Solution, Solver
from harness.solvers.minmax import MinMax, minmax
from harness.solvers.rounding import Rounding

HELD = 10  # every tenth micro-batch, at the end, chooses the best iterate
CHECKS = 8  # times the held-out loss is taken


@dataclass(frozen=True, kw_only=True)
class AdaScale(Solver):
    """iterations: steps a block, one micro-batch of `batch` windows each, in turn.
    lr_clip: of beta and gamma; lr_round: of s2, s3 (and s4); Adam, both falling to 0 by a cosine.
    lwc: learn beta and gamma. flexround: learn s2, s3.
    mix: share of the elements taken from the quantized prefix.
    """

    unread: ClassVar[tuple[str, ...]] = ("sequencing",)
    scope: ClassVar[str] = "block"
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
        for linears in block.sites.values():
            formats = {n: minmax(block.formats[n]) for n in linears if n in block.formats}
            if not formats:
                continue
            # site by site, whose linears may share a global scale
            weights = block.weights
            problem = Problem({name: weights[name] for name in formats}, formats)
            start = self.static_scales(problem)
            for name, format in formats.items():
                weight = problem.weights[name]
                roundings[name] = Rounding(weight, format, start[name], self.lwc, self.flexround)
        with torch.enable_grad():
            report = self._learn(block, roundings)
        return Solution({name: r.qtensor() for name, r in roundings.items()}, report)

    def _learn(self, block: Block, roundings: Mapping[str, Rounding]) -> dict:
        train, held = _split(len(block.quantized))
        clip = [p for rounding in roundings.values() for p in rounding.clip()]
        shape = [p for rounding in roundings.values() for p in rounding.shape()]
        parameters = clip + shape
        groups = [{"params": clip, "lr": self.lr_clip}, {"params": shape, "lr": self.lr_round}]
        # fused: one pass over all parameters, which are as many as the weights
        adam = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, self.iterations))
        every = max(1, self.iterations // CHECKS)
        first = self._held_out(block, roundings, held)
        lowest = first
        best_step = 0
        best: list[Tensor] | None = None  # the start needs no copy: it is zero
        with block.stage("adascale", max(1, self.iterations)) as advance:
            for step in range(1, self.iterations + 1):
                loss = self._loss(block, roundings, (step - 1) % train)
                if not loss.isfinite():
                    raise RuntimeError(
                        f"adascale: the loss is {loss.item()} after {step - 1} steps; "
                        "lower solver.lr_round and solver.lr_clip"
                    )
                adam.zero_grad()
                loss.backward()
                adam.step()
                rates.step()
                point = {"adascale/loss": loss.item()}
                if step % every == 0 or step == self.iterations:
                    now = self._held_out(block, roundings, held)
                    point["adascale/held_out"] = now
                    if now < lowest:
                        lowest = now
                        best_step = step
                        best = [p.detach().clone() for p in parameters]
                block.log(point, block.index * self.iterations + step)
                advance(f"loss {point['adascale/loss']:.4g}")
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                if best is None:
                    parameter.zero_()
                else:
                    parameter.copy_(best[index])
        return {"loss_before": first, "loss_after": lowest, "best_step": best_step}

    def _loss(self, block: Block, roundings: Mapping[str, Rounding], index: int) -> Tensor:
        """Of micro-batch `index`, each element of which is from one stream or the other."""
        quantized = block.quantized[index]
        original = block.original[index]
        draws = torch.rand(original.shape, generator=block.generator).to(original.device)
        hidden = torch.where(draws < self.mix, quantized, original)
        weights = {name: rounding() for name, rounding in roundings.items()}
        return distance(block.forward(index, hidden, weights), block.targets[index])

    @torch.no_grad()
    def _held_out(self, block: Block, roundings: Mapping[str, Rounding], held: range) -> float:
        """Mean loss on the held-out micro-batches as the block will really read them."""
        weights = {name: rounding() for name, rounding in roundings.items()}
        losses = [
            distance(block.forward(i, block.quantized[i], weights), block.targets[i]) for i in held
        ]
        mean = float(torch.stack(losses).mean())
        # NaN is neither more nor less than anything; infinity is never the least
        return mean if math.isfinite(mean) else math.inf


def _split(count: int) -> tuple[int, range]:
    """(how many of the first micro-batches are learned from, the others)."""
    if count == 1:  # which has to serve as both
        return 1, range(1)
    train = count - max(1, count // HELD)
    return train, range(train, count)


def distance(output: Tensor, target: Tensor) -> Tensor:
    """(output - target)^2 summed over the sequence, averaged over batch and channels.

    [B, L, n] each.
    """
    return (output.float() - target.float()).square().sum(1).mean()
