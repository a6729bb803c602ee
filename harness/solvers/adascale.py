r"""adascale: learn, block by block, how each weight is divided before it is rounded, and the range of each scale.

    Delta = (q_max e^gamma - q_min e^beta) / (q_max - q_min) delta        delta: the min-max scale of the channel or group
    W~ = W / e^s2 / e^s3,     W^ = Delta clamp(RNE(W~ / Delta), q_min, q_max)
    min  mean_{batch, channels} sum_{sequence} (block(x) - block^(x'))^2        over beta, gamma, s2, s3, all zero at first

s2 has the weight's shape, the others one value a scale; a Conv2d weight has s4 [1, in, 1, 1] too. x is the untouched stream, x'
takes each element from the quantized prefix with probability 1/2. Rounding passes gradients straight, clamping only inside.
Afterwards W~ is the weight and Delta its frozen scale, so iteration 0 is min-max bit for bit and the result is what was
trained.

Source: AIMET's AdaScale (FlexRound, arXiv 2306.00317, with OmniQuant's learned clipping, arXiv 2308.13137). Differences: Delta
is written through the min-max delta, which is the same number, (e^gamma max - e^beta min) / N; the best iterate by the held-out
tenth of the calibration windows is kept, iteration 0 included; float grids (beta = gamma follows, their reach being symmetric)
and groups, whose scale is rounded as it is stored at every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from harness.config.checks import boolean, integer, number
from harness.config.errors import ConfigError
from harness.formats import Format, FourOverSix, QTensor, Scales
from harness.solvers.base import Block, Problem, Solution, Solver
from harness.solvers.minmax import MinMax, minmax

HELD = 10  # every tenth micro-batch, at the end, chooses the best iterate
CHECKS = 8  # times the held-out loss is taken


@dataclass(frozen=True, kw_only=True)
class AdaScale(Solver):
    """iterations: steps a block, one micro-batch of `batch` windows each, in turn. lr_clip: of beta and gamma; lr_round: of s2,
    s3 (and s4); Adam, both falling to 0 by a cosine. lwc: learn beta and gamma. flexround: learn s2, s3. mix: share of the
    elements taken from the quantized prefix."""

    unread: ClassVar[tuple[str, ...]] = ("sequencing", "hessian_input")
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
        for field in ("lr_clip", "lr_round"):
            number(f"solver.{field}", getattr(self, field), 0, 1)
        boolean("solver.lwc", self.lwc)
        boolean("solver.flexround", self.flexround)
        number("solver.mix", self.mix, 0, 1)
        if not (self.lwc or self.flexround):
            raise ConfigError(
                "solver.lwc=false with solver.flexround=false: nothing is learned; use solver=minmax."
            )

    def check(self, format: Format) -> list[str]:
        if not format.symmetric or isinstance(format, FourOverSix):
            raise ConfigError(
                f"solver=adascale with format.weight={type(format).__name__} (symmetric={format.symmetric}): it learns one "
                "scale without zero point; use format.weight.symmetric=true and one of int4, fp4, nvfp4, mxfp4."
            )
        return []

    def idle(self, layers: Sequence[Mapping]) -> list[str]:
        if any(layer.get("best_step") for layer in layers):
            return []
        return [
            "adascale changed nothing against minmax: in no block did a step lower the held-out loss"
        ]

    @property
    def windows(self) -> int:
        return self.batch

    @property
    def outside(self) -> Solver:
        return MinMax(fuse_global_scale=self.fuse_global_scale)

    def solve_block(self, block: Block) -> Solution:
        """Raises RuntimeError where the loss is no longer finite."""
        problem = Problem(
            {n: block.weights[n] for n in block.formats},
            {n: minmax(f) for n, f in block.formats.items()},
        )
        start = {}
        for linears in block.sites.values():
            site = [name for name in linears if name in problem.formats]
            weights = {name: problem.weights[name] for name in site}
            start |= (
                self.static_scales(Problem(weights, {name: problem.formats[name] for name in site}))
                if site
                else {}
            )
        learned = {
            name: Rounding(weight, problem.formats[name], start[name], self.lwc, self.flexround)
            for name, weight in problem.weights.items()
        }
        with torch.enable_grad():
            report = self._learn(block, learned)
        return Solution({name: rounding.qtensor() for name, rounding in learned.items()}, report)

    def _learn(self, block: Block, learned: dict[str, Rounding]) -> dict:
        count = len(block.quantized)
        held = range(count - max(1, count // HELD), count) if count > 1 else range(count)
        train = count - len(held) if count > 1 else count
        clip = [p for rounding in learned.values() for p in rounding.clip()]
        shape = [p for rounding in learned.values() for p in rounding.shape()]
        groups = [{"params": clip, "lr": self.lr_clip}, {"params": shape, "lr": self.lr_round}]
        adam = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, self.iterations))
        every = max(1, self.iterations // CHECKS)
        first = lowest = self._held_out(block, learned, held)
        best, best_step = None, 0
        with block.stage("adascale", max(1, self.iterations)) as advance:
            for step in range(self.iterations):
                index = step % train
                taken = torch.rand(block.original[index].shape, generator=block.generator).to(
                    block.original[index].device
                )
                hidden = torch.where(
                    taken < self.mix, block.quantized[index], block.original[index]
                )
                loss = distance(
                    block.forward(index, hidden, {n: r() for n, r in learned.items()}),
                    block.targets[index],
                )
                if not loss.isfinite():
                    raise RuntimeError(
                        f"adascale: the loss is {loss.item()} after {step} steps; lower solver.lr_round and "
                        "solver.lr_clip"
                    )
                adam.zero_grad()
                loss.backward()
                adam.step()
                rates.step()
                point = {"adascale/loss": loss.item()}
                if (step + 1) % every == 0 or step + 1 == self.iterations:
                    now = point["adascale/held_out"] = self._held_out(block, learned, held)
                    if now < lowest:
                        lowest, best_step = now, step + 1
                        best = [p.detach().clone() for p in clip + shape]
                block.log(point, block.index * self.iterations + step + 1)
                advance(f"loss {point['adascale/loss']:.4g}")
        with torch.no_grad():
            for parameter, kept in zip(
                clip + shape, best or [torch.zeros_like(p) for p in clip + shape]
            ):
                parameter.copy_(kept)
        return {"loss_before": first, "loss_after": lowest, "best_step": best_step}

    @torch.no_grad()
    def _held_out(self, block: Block, learned: dict[str, Rounding], held: range) -> float:
        """Mean loss on the held-out micro-batches as the block will really read them."""
        weights = {name: rounding() for name, rounding in learned.items()}
        losses = [
            distance(block.forward(i, block.quantized[i], weights), block.targets[i]) for i in held
        ]
        mean = float(torch.stack(losses).mean())
        return mean if math.isfinite(mean) else math.inf


def distance(output: Tensor, target: Tensor) -> Tensor:
    """(output - target)^2 summed over the sequence, averaged over batch and channels; [B, L, n] each."""
    return (output.float() - target.float()).square().sum(1).mean()


class Rounding(nn.Module):
    """What is learned of one weight [out, in] or [out, in, h, w], and the weight as it is rounded by that.

    start: its min-max scales. `clip()`, `shape()`: the parameters in use. Calling it gives W^ in the weight's dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        format: Format,
        start: Scales,
        lwc: bool = True,
        flexround: bool = True,
    ):
        super().__init__()
        self.weight, self.format, self.start, self.lwc, self.flexround = (
            weight.detach(),
            format,
            start,
            lwc,
            flexround,
        )
        per_scale = format.lattice(start)[0]

        def make(like):
            return nn.Parameter(torch.zeros_like(like, dtype=torch.float32))

        self.beta, self.gamma, self.s3 = make(per_scale), make(per_scale), make(per_scale)
        self.s2 = make(weight)
        self.s4 = make(weight[:1, :, :1, :1]) if weight.ndim == 4 else None

    def clip(self) -> list[nn.Parameter]:
        return [self.beta, self.gamma] if self.lwc else []

    def shape(self) -> list[nn.Parameter]:
        return [p for p in (self.s2, self.s3, self.s4) if p is not None] if self.flexround else []

    def factor(self) -> Tensor:
        """Delta / delta, one value a scale; exactly 1 at the start."""
        low, high = self.format.reach
        return (high * self.gamma.exp() - low * self.beta.exp()) / (high - low)

    def forward(self) -> Tensor:
        s2 = self.s2 if self.s4 is None else self.s2 + self.s4
        arguments = (self.factor(), s2.flatten(1), self.s3)
        return _Round.apply(*arguments, self.weight.flatten(1), self.format, self.start).view_as(
            self.weight
        )

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The weight for good: W~ on the frozen Delta."""
        s2 = self.s2 if self.s4 is None else self.s2 + self.s4
        divided = _divided(self.weight.flatten(1), s2.flatten(1), self.s3, self.format)
        scales = self.format.rescaled(self.start, self.factor())
        return self.format.quantize(divided, scales=scales, dtype=self.weight.dtype)


def _divided(weight: Tensor, s2: Tensor, s3: Tensor, format: Format) -> Tensor:
    """W / e^s2 / e^s3 in float32; two divisions, for one by e^(s2 + s3) differs in the last bit, which flips codes."""
    divided = s2.exp()
    torch.div(weight.float(), divided, out=divided)
    return format.join(format.split(divided).div_(s3.exp().unsqueeze(-1)), divided.shape)


class _Round(torch.autograd.Function):
    """W^ of (Delta / delta, s2, s3); the gradient of RNE is 1, that of the clamp 1 inside and 0 outside.

    With inside = 1 where W~ / Delta is not clamped, and G the gradient of W^:
    dW~ = inside G,  ds2 = -W~ dW~,  ds3 = sum over the group of ds2,  dDelta = sum (W^ G - inside W~ G) / Delta.
    """

    @staticmethod
    def forward(ctx, factor, s2, s3, weight, format, start):
        divided = _divided(weight, s2, s3, format)
        step = format.lattice(format.rescaled(start, factor))[0].unsqueeze(-1)
        blocks = format.split(divided)
        value = format.snap(blocks, step)
        ctx.format, ctx.shape = format, weight.shape
        ctx.save_for_backward(blocks, value, step, format.lattice(start)[0])
        return format.join(value, weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        blocks, value, step, start = ctx.saved_tensors
        gradient = ctx.format.split(gradient.float())
        low, high = (
            (reach + slack) * step
            for reach, slack in zip(ctx.format.reach, (-ctx.format.slack, ctx.format.slack))
        )
        moved = (gradient * blocks).mul_((blocks >= low) & (blocks <= high)).neg_()
        s3 = moved.sum(-1)
        factor = ((gradient * value).sum(-1) + s3) * start / step.squeeze(-1)
        return factor, ctx.format.join(moved, ctx.shape), s3, None, None, None
