"""Invertible matrices that are learned and stay well conditioned.

    M = U diag(e^s) V,   M^-1 = V^T diag(e^-s) U^T,   U = U_0 C(A),  V = V_0 C(B),  s = s_0 + r

C is the Cayley map of stiefel.py. A, B and r are zero at first, where M is the matrix begun with,
U_0 e^(s_0) V_0 its singular value decomposition. Nothing is inverted: M M^-1 = I as far as U and V
are orthogonal, wherever A, B and r have gone, and the condition number moves by e^(2 |r|) at most.

Source: the parametrization `svd` of FlatQuant (arXiv 2410.09426).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.linalg.stiefel import cayley


class Invertible(nn.Module):
    """M around `start` [.., n, n], in the dtype of its parameters: float32, or float64 once
    `.double()` was called."""

    def __init__(self, start: Tensor):
        super().__init__()
        u, s, v = torch.linalg.svd(start.double())
        # attributes, no buffers: they stay float64 whatever the parameters are
        self._u, self._s, self._v = u, s.log(), v
        self.a = nn.Parameter(torch.zeros_like(u, dtype=torch.float32))
        self.r = nn.Parameter(torch.zeros_like(s, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros_like(u, dtype=torch.float32))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(M, M^-1), differentiable."""
        u = cayley(self._u.to(self.a), self.a)
        v = cayley(self._v.to(self.b), self.b)
        s = (self._s.to(self.r) + self.r)[..., None, :]
        return u * s.exp() @ v, (v.mT * (-s).exp()) @ u.mT

    @torch.no_grad()
    def condition(self) -> float:
        """The greatest condition number of all [n, n]."""
        s = self._s.to(self.r) + self.r
        return float((s.amax(-1) - s.amin(-1)).exp().max())
