"""What adascale learns of one weight, and the weight as it is rounded by that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.formats import Format, QTensor, Scales


class Rounding(nn.Module):
    """Of a weight [out, in] or [out, in, h, w]; calling it gives W^ in the weight's dtype.

    start: its min-max scales. lwc: learn beta and gamma. flexround: learn s2, s3 (and s4).
    `clip()`, `shape()`: the parameters in use, all zero at first.
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
        self.weight = weight.detach()
        self.format = format
        self.start = start
        self.lwc = lwc
        self.flexround = flexround
        per_scale = format.lattice(start)[0]
        self.beta = _zeros(per_scale)
        self.gamma = _zeros(per_scale)
        self.s3 = _zeros(per_scale)
        self.s2 = _zeros(weight)
        self.s4 = None
        if weight.ndim == 4:
            self.s4 = _zeros(weight[:1, :, :1, :1])

    def clip(self) -> list[nn.Parameter]:
        """Of the ranges."""
        return [self.beta, self.gamma] if self.lwc else []

    def shape(self) -> list[nn.Parameter]:
        """Of the divisors."""
        if not self.flexround:
            return []
        return [p for p in (self.s2, self.s3, self.s4) if p is not None]

    def factor(self) -> Tensor:
        """Delta / delta, one value a scale; exactly 1 at the start."""
        low, high = self.format.reach
        return (high * self.gamma.exp() - low * self.beta.exp()) / (high - low)

    def forward(self) -> Tensor:
        weight = self.weight.flatten(1)
        rounded = _Round.apply(
            self.factor(), self._exponent(), self.s3, weight, self.format, self.start
        )
        return rounded.view_as(self.weight)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The weight for good: W~ on the frozen Delta."""
        divided = _divided(self.weight.flatten(1), self._exponent(), self.s3, self.format)
        scales = self.format.rescaled(self.start, self.factor())
        return self.format.quantize(divided, scales=scales, dtype=self.weight.dtype)

    def _exponent(self) -> Tensor:
        """s2, with s4 of a Conv2d weight, [out, in]."""
        s2 = self.s2
        if self.s4 is not None:
            s2 = s2 + self.s4
        return s2.flatten(1)


def _zeros(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(like, dtype=torch.float32))


def _divided(weight: Tensor, s2: Tensor, s3: Tensor, format: Format) -> Tensor:
    """W / e^s2 / e^s3 in float32."""
    # two divisions, for one by e^(s2 + s3) differs in the last bit, which flips codes
    divided = s2.exp()
    torch.div(weight.float(), divided, out=divided)
    return format.join(format.split(divided).div_(s3.exp().unsqueeze(-1)), divided.shape)


class _Round(torch.autograd.Function):
    """W^ of (Delta / delta, s2, s3); the gradient of RNE is 1, that of the clamp 1 inside, 0
    outside.

    With inside = 1 where W~ / Delta is not clamped, and G the gradient of W^:

        dW~ = inside G,    ds2 = -W~ dW~,    ds3 = sum over the group of ds2,
        dDelta = sum (W^ G - inside W~ G) / Delta
    """

    @staticmethod
    def forward(
        ctx, factor: Tensor, s2: Tensor, s3: Tensor, weight: Tensor, format: Format, start: Scales
    ) -> Tensor:
        divided = _divided(weight, s2, s3, format)
        step = format.lattice(format.rescaled(start, factor))[0].unsqueeze(-1)
        blocks = format.split(divided)
        value = format.snap(blocks, step)
        ctx.format = format
        ctx.shape = weight.shape
        ctx.save_for_backward(blocks, value, step, format.lattice(start)[0])
        return format.join(value, weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        blocks, value, step, start = ctx.saved_tensors
        gradient = ctx.format.split(upstream.float())
        least, greatest = ctx.format.reach
        # what rounds to the last code is inside, too
        low = (least - ctx.format.slack) * step
        high = (greatest + ctx.format.slack) * step
        # s2's gradient of each element; the sums of it are those of s3 and of the scale
        moved = (gradient * blocks).mul_((blocks >= low) & (blocks <= high)).neg_()
        s3 = moved.sum(-1)
        factor = ((gradient * value).sum(-1) + s3) * start / step.squeeze(-1)
        return factor, ctx.format.join(moved, ctx.shape), s3, None, None, None
