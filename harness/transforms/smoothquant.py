"""smoothquant: moves the range of activation channels into the weights, by a diagonal that folds away on both sides.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X <- X / s,   W <- W diag(s)

j: input channel of a site, max|W_j| over all linears that read it; both maxima and s are clamped at 1e-5. 1/s goes into the
norm's weight (attn_in, mlp_in), v's rows (o_in; one s for the query heads of a key/value head, the max over them) or up's rows
(down_in; the gate is left alone, SiLU is not homogeneous). Source: SmoothQuant (arXiv 2211.10438); o_in and down_in as in
DartQuant. alpha = 1 moves everything to the weights.

Stacked with another transform by `transform.smooth.{alpha,when}`. Before a residual rotation the norm sites would be a no-op,
W diag(s) diag(gamma / s) = W diag(gamma), so `before` takes o_in and down_in; `after`, in the rotated basis, the norm sites.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.codecs.codec import Diagonal
from harness.codecs.placement import Placement
from harness.config.checks import names, number
from harness.formats import MX, NVFP4
from harness.transforms.base import CalibrationModel, ModelShape, Transform

FLOOR = 1e-5
NORM_SITES, PRODUCT_SITES = ("attn_in", "mlp_in"), ("o_in", "down_in")


class SmoothQuant(Transform):
    """alpha in [0, 1]; sites: where, default all four."""

    def __init__(self, alpha: float = 0.5, sites: list[str] | None = None):
        number("SmoothQuant: alpha", alpha, 0, 1)
        known = (*NORM_SITES, *PRODUCT_SITES)
        self.alpha, self.sites = (
            alpha,
            known if sites is None else tuple(names("SmoothQuant: sites", sites, known)),
        )

    def check(self, context: ModelShape) -> list[str]:
        act = context.scheme.act
        if isinstance(act, NVFP4 | MX):
            return [
                f"smoothquant with {type(act).__name__}: its blocks are local, so smoothing channels has little to give"
            ]
        return []

    def fit(self, context: ModelShape, subject: CalibrationModel) -> Placement:
        peaks = subject.observe(lambda layer, site, width: _Peak(), self.sites, "channel maxima")
        merged = {}
        for (layer, site), x_max in peaks.items():
            readers = [
                r.name for r in subject.roles.values() if (r.layer, r.reads) == (layer, site)
            ]
            w_max = torch.stack(
                [subject.weight(layer, name).float().abs().amax(0) for name in readers]
            ).amax(0)
            if site == "o_in":
                x_max, w_max = (_per_kv_head(t, context) for t in (x_max, w_max))
            x_max, w_max = x_max.double().clamp_min(FLOOR), w_max.double().clamp_min(FLOOR)
            merged[layer, site] = Diagonal(
                (x_max**self.alpha / w_max ** (1 - self.alpha)).clamp_min(FLOOR)
            )
        return Placement(merged=merged)


class _Peak:
    """max|X_j| over all tokens, float32 [width]."""

    def __init__(self):
        self.peak = None

    def add(self, x: Tensor) -> None:
        peak = x.abs().flatten(0, -2).amax(0).float()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def finish(self) -> Tensor:
        return self.peak


def _per_kv_head(x: Tensor, context: ModelShape) -> Tensor:
    """The maximum over the query heads of each key/value head: [heads * head_dim] -> [kv_heads * head_dim]."""
    return (
        x.view(context.kv_heads, context.heads // context.kv_heads, context.head_dim)
        .amax(1)
        .flatten()
    )
