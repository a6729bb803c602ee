"""weights: quantization-aware distillation, every quantized weight trained.

    w_q = Q(w),    d w_q / d w = 1,    w from where it was solved from (cells.py)

Scales and zero points stay the solver's, so the first iterate is the solved model in every bit;
afterwards w is quantized by them again. Adam's rate is relative to the root mean square of each
weight. Takes about seven times the memory of the model (the untouched one, w_q, w, its gradient,
two moments, the best).

Source: QAD (arXiv 2601.20088). Differences: it starts from any solver's weights instead of round to
nearest, on frozen scales instead of ones that follow w; the text is the calibration's, some hundred
steps instead of a training run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.formats import QTensor, weight_format
from harness.tune.cells import rounded, within
from harness.tune.distill import Distillation, Quantized


@dataclass(frozen=True, kw_only=True)
class LearnedWeights(Distillation):
    """lr: relative to the root mean square of a weight."""

    lr: float = 1e-4

    @property
    def needs_solved(self) -> bool:
        return True

    def follow(self, q: QTensor, weight: Tensor | None) -> Master:
        assert weight is not None
        return Master(q, within(weight, q))


class Master(Quantized):
    """A weight [out, in] under a straight-through quantizer with q's scales."""

    def __init__(self, q: QTensor, weight: Tensor):
        super().__init__()
        self.q = q
        self.weight = nn.Parameter(weight)

    def rates(self) -> dict[str, float]:
        return {"weight": float(self.weight.detach().square().mean().sqrt())}

    def forward(self) -> Tensor:
        return _Round.apply(self.weight, self.q)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        format = weight_format(self.q)
        return format.quantize(self.weight, scales=self.q.scales, dtype=self.q.dtype)


class _Round(torch.autograd.Function):
    """Q(w), to the last bit, with the gradient of w."""

    @staticmethod
    def forward(ctx, weight: Tensor, q: QTensor) -> Tensor:
        ctx.dtype = weight.dtype
        return rounded(weight, weight_format(q), q.scales, q.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.to(ctx.dtype), None
