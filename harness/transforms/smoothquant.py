"""smoothquant: moves the range of activation channels into the weights, by a diagonal.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X <- X / s,   W <- W diag(s)

j: input channel of a site, max|W_j| over all linears that read it; both maxima and s are clamped at
1e-5. It folds away on both sides: 1/s goes into the norm's weight (attn_in, mlp_in), v's rows
(o_in; one s for the query heads of a key/value head, the max over them) or up's rows (down_in; the
gate is left alone, SiLU is not homogeneous). alpha = 1 moves everything to the weights.

Stacked with another transform by `transform.smooth.{alpha,when}`. Before a residual rotation the
norm sites would be a no-op, W diag(s) diag(gamma / s) = W diag(gamma), so `before` takes o_in and
down_in; `after`, in the rotated basis, the norm sites.

Source: SmoothQuant (arXiv 2211.10438). Differences: o_in and down_in, as in DartQuant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.codecs.codec import Codec, Diagonal
from harness.codecs.placement import Placement, Where
from harness.config.checks import names, number
from harness.formats import MX, NVFP4
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel, weights_at
from harness.transforms.sampling import Peak

FLOOR = 1e-5
NORM_SITES = ("attn_in", "mlp_in")
PRODUCT_SITES = ("o_in", "down_in")


class SmoothQuant(Transform):
    """alpha in [0, 1]; sites: where, default all four."""

    def __init__(self, alpha: float = 0.5, sites: list[str] | None = None):
        number("SmoothQuant: alpha", alpha, 0, 1)
        self.alpha = alpha
        self.sites = (*NORM_SITES, *PRODUCT_SITES)
        if sites is not None:
            self.sites = tuple(names("SmoothQuant: sites", sites, self.sites))

    def check(self, shape: ModelShape) -> list[str]:
        act = shape.scheme.act
        if isinstance(act, NVFP4 | MX):
            return [
                f"smoothquant with {type(act).__name__}: its blocks are local, so smoothing "
                "channels has little to give"
            ]
        return []

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        peaks = model.observe(lambda layer, site, width: Peak(), self.sites, "channel maxima")
        merged: dict[Where, Codec] = {}
        for (layer, site), x_max in peaks.items():
            if layer not in shape.merges(site):  # nothing before it takes a scale
                continue
            rows = [weight.float().abs().amax(0) for weight in weights_at(model, layer, site)]
            w_max = torch.stack(rows).amax(0)
            if site == "o_in" and layer in shape.turns:
                x_max = _per_kv_head(x_max, shape)
                w_max = _per_kv_head(w_max, shape)
            # in float64, as all that is folded; a channel that is never on would give a scale of 0
            x_max = x_max.double().clamp_min(FLOOR)
            w_max = w_max.double().clamp_min(FLOOR)
            s = x_max**self.alpha / w_max ** (1 - self.alpha)
            merged[layer, site] = Diagonal(s.clamp_min(FLOOR))
        return Placement(merged=merged)


def _per_kv_head(x: Tensor, shape: ModelShape) -> Tensor:
    """The maximum over the query heads of each key/value head.

    [heads * head_dim] -> [kv_heads * head_dim].
    """
    heads = x.view(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    return heads.amax(1).flatten()
