"""scales: learned block scales, each through its own grid.

    w_q = (Q(w / s) - z) s^,    s = G(s_0 e^lambda),    lambda = 0 at first

G rounds a scale as it is stored (E4M3, E8M0, a float); zero points and global scales stay. What is
learned is the logarithm, for Adam's step is then a relative change of a scale, the same for every
layer and format: lr 1e-3 moves a scale by a thousandth a step. Gradients pass G straight in the
logarithm (d log s / d lambda = 1), so that with v the value and z~ what a code of zero means,

    codes    d w_q / d lambda
    fixed    v - z~                                               exact but for G
    rounded  v - w  inside,  v - z~  where Q clamps               LSQ's rule, times s
    dual     lambda_post: v - z~;  lambda_pre: -(w - z~) s_post / s_pre  inside

fixed keeps the solver's codes. rounded rounds w (cells.py) anew under the scale as it is. dual
rounds under one scale, s_pre, and decodes by another, s_post, the one that is stored. Where a grid
is coarse, a scale moves only once lambda has come half of its cell: 3 to 6 % for E4M3, 41 % for
E8M0.

Source: LSQ (arXiv 1902.08153), whose s and gradient scale become lambda and Adam; dual is
Dual-LSQ's form, here through the grid both times. Differences: w is not learned, and lies within
the cell of its solved code at first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Format, FourOverSix, QTensor, Scales, weight_format
from harness.tune.cells import within
from harness.tune.distill import Distillation, Quantized

CODES = ("fixed", "rounded", "dual")
# half a cell of a stored scale's grid, in the logarithm: the way to another value
CELLS = {MX: math.log(2) / 2, NVFP4: math.log(1 + 1 / 8) / 2}


@dataclass(frozen=True, kw_only=True)
class LearnedScales(Distillation):
    """codes: fixed | rounded | dual; lr: of the scales' logarithms."""

    codes: str = "fixed"

    def __post_init__(self):
        super().__post_init__()
        one_of("tune.codes", self.codes, CODES)

    @property
    def needs_solved(self) -> bool:
        return self.codes != "fixed"

    def check(self, formats: Sequence[Format]) -> list[str]:
        if self.codes != "fixed" and any(isinstance(format, FourOverSix) for format in formats):
            raise ConfigError(
                f"tune.codes={self.codes} with FourOverSix: its codes are made by another scale "
                "than the stored one's inverse; set tune.codes=fixed."
            )
        reach = self.lr * self.steps / 2  # the most that a cosine lets Adam go
        short = [
            f"tune.lr={self.lr} and tune.steps={self.steps} with {type(format).__name__}: no scale "
            f"can reach the next value of its grid; set tune.lr={4 * cell / self.steps:.2g}"
            for format in dict.fromkeys(formats)
            for kind, cell in CELLS.items()
            if isinstance(format, kind) and 0 < reach < cell
        ]
        return list(dict.fromkeys(short))

    def follow(self, q: QTensor, weight: Tensor | None) -> Scaled:
        return Scaled(q, None if weight is None else within(weight, q), self.codes == "dual")


class Scaled(Quantized):
    """A weight whose scales are learned; `post` is lambda.

    weight: w [out, in], to be rounded anew; None keeps the codes. dual: with a lambda for rounding
    of its own, `pre`.
    """

    def __init__(self, q: QTensor, weight: Tensor | None = None, dual: bool = False):
        super().__init__()
        self.q = q
        self.format = weight_format(q)
        self.weight = weight
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        zeros = torch.zeros(q.scales.scale.shape, dtype=self.dtype, device=q.codes.device)
        self.post = nn.Parameter(zeros)
        self.pre = nn.Parameter(zeros.clone()) if dual else None

    def forward(self) -> Tensor:
        return _Scale.apply(self.post, self.pre, self)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        scales = self.scales(self.post)
        return replace(self.q, codes=self.codes(), scales=scales)

    def scales(self, exponent: Tensor) -> Scales:
        """G(s_0 e^lambda)."""
        return self.format.rescaled(self.q.scales, exponent.exp())

    @property
    def rounding(self) -> Tensor:
        """The lambda that codes are made by."""
        return self.post if self.pre is None else self.pre

    def codes(self) -> Tensor:
        """The codes now."""
        if self.weight is None:
            return self.q.codes
        return self.format.encode(self.weight, self.scales(self.rounding))

    def offset(self, scales: Scales) -> Tensor | float:
        """z~, [.., groups, 1] or 0."""
        offset = self.format.offset(scales)
        if isinstance(offset, Tensor):
            return offset.to(self.dtype).unsqueeze(-1)
        return offset

    def inside(self, x: Tensor, step: Tensor, scales: Scales) -> Tensor:
        """Which of x [.., groups, group], less z~, are not clamped."""
        level = x / step
        if scales.zero is not None and isinstance(self.offset(scales), float):
            level = level + scales.zero.to(x).unsqueeze(-1)
        low, high = self.format.reach
        return (level >= low - self.format.slack) & (level <= high + self.format.slack)


class _Scale(torch.autograd.Function):
    """w_q [out, in] in the weight's dtype, of (lambda_post, lambda_pre or None)."""

    @staticmethod
    def forward(ctx, post: Tensor, pre: Tensor | None, scaled: Scaled) -> Tensor:
        value = scaled.format.decode(scaled.codes(), scaled.scales(post), scaled.q.dtype)
        ctx.scaled = scaled
        ctx.save_for_backward(post, pre, value)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        post, pre, value = ctx.saved_tensors
        scaled = ctx.scaled
        split = scaled.format.split
        gradient = split(upstream.to(post))
        scales = scaled.scales(post)
        offset = scaled.offset(scales)
        decoded = (gradient * (split(value.to(post)) - offset)).sum(-1)
        if scaled.weight is None:
            return decoded, None, None
        rounding = scaled.scales(scaled.rounding)
        step = scaled.format.lattice(rounding, scaled.dtype)[0].unsqueeze(-1)
        x = split(scaled.weight) - offset
        rounded = -(gradient * x * scaled.inside(x, step, rounding)).sum(-1)
        if pre is None:
            return decoded + rounded, None, None
        ratio = scaled.format.lattice(scales, scaled.dtype)[0] / step.squeeze(-1)
        return decoded, rounded * ratio, None
