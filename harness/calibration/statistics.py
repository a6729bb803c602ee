"""What a solver may know of a site's activation: Hessian, largest magnitude, a sample of rows."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 384  # columns of X^T X computed at a time: wide enough for the matmul, narrow enough to skip half of the square
SAMPLE_ROWS = 256


class Statistics:
    """Running statistics of one site over the calibration tokens.

    hessian: [n, n] float32, `2/N sum x^T x` once `finish()` was called (None unless needed); range:
    [2] float32, least and greatest value (with 0); sample: every k-th token's row [s, n] float32,
    at least 256 where there are so many, for measuring output errors.
    """

    def __init__(self, width: int, tokens: int, device, hessian: bool):
        self.hessian = torch.zeros(width, width, device=device) if hessian else None
        self.range = torch.zeros(2, device=device)
        self.tokens = 0
        self._stride = max(1, tokens // SAMPLE_ROWS)
        self._sample = torch.empty(-(-tokens // self._stride), width, device=device)

    def add(self, x: Tensor, product_of: Tensor | None = None) -> None:
        """Take in activations [..., n]; the Hessian sees `product_of` instead when the quantized
        input is asked for.
        """
        x = x.reshape(-1, x.shape[-1])
        low, high = torch.aminmax(x)
        self.range = torch.stack(
            [torch.minimum(self.range[0], low), torch.maximum(self.range[1], high)]
        ).float()
        first = -(-self.tokens // self._stride)
        rows = x[first * self._stride - self.tokens :: self._stride]
        self._sample[first : first + len(rows)] = rows
        self.tokens += len(x)
        if self.hessian is not None:
            z = (x if product_of is None else product_of.reshape(x.shape)).float()
            for lo in range(0, z.shape[1], PANEL):
                # the product is symmetric: each panel of rows stops at its own diagonal block
                hi = lo + PANEL
                self.hessian[lo:hi, :hi].addmm_(z[:, lo:hi].T, z[:, :hi])

    def observe(self, x: Tensor, act, solver) -> None:
        """Take in encoded activations [..., n] that will be quantized by `act`, as `solver` wants
        its Hessian.
        """
        product_of = None
        if self.hessian is not None and solver.hessian_input == "quantized" and act is not None:
            # a static scale is not known before the last micro-batch; each one's own range stands
            # in for it
            product_of = act.fake(
                x, global_scale=act.calibrated(*torch.aminmax(x)) if act.needs_static else None
            )
        self.add(x, product_of)

    @property
    def sample(self) -> Tensor:
        """The kept rows [s, n], float32."""
        return self._sample

    def finish(self) -> None:
        """Mirror the half that was computed and scale to the mean; once, after the last `add`."""
        if self.hessian is not None:
            for lo in range(PANEL, len(self.hessian), PANEL):
                self.hessian[:lo, lo : lo + PANEL] = self.hessian[lo : lo + PANEL, :lo].T
            self.hessian *= 2.0 / self.tokens
