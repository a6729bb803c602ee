"""full: x -> x A with one dense matrix a site, W <- W (A^-1)^T.

    init               identity   A = I                     hadamard   A = H_n
                       orthogonal A Haar-distributed        xavier     A normal of variance 1 / n
    parametrization    general    A = the init itself
                       orthogonal A = the init, xavier through QR with positive diagonal (so Haar
                                  too)
                       svd        A = U diag(s) V, U and V two such orthogonal matrices, log2 s
                                  uniform in [-1, 1]; s = 1 for identity

Source: FP-Quant `transform_class=full`, MR-GPTQ (arXiv 2509.23202). Differences: FP-Quant's
parametrizations are there to be trained (orthogonal by Cayley), ours only say on which manifold the
draw lies; (A^-1)^T in float64, no pseudo-inverse. A normal matrix of order n has a condition number
of n and more: an ablation, and one that costs digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.linalg.hadamard import factors, hadamard
from harness.linalg.stiefel import qr_orth, random_orthogonal
from harness.transforms.base import generator
from harness.transforms.block_diagonal import BlockDiagonal

PARAMETRIZATIONS = ("general", "orthogonal", "svd")
INITS = ("identity", "orthogonal", "hadamard", "xavier")


class FullMatrix(BlockDiagonal):
    """parametrization: general | orthogonal | svd. init: identity | orthogonal | hadamard |
    xavier."""

    def __init__(self, parametrization: str = "general", init: str = "orthogonal"):
        super().__init__("full")
        self.parametrization = one_of(
            "transform.parametrization", parametrization, PARAMETRIZATIONS
        )
        self.init = one_of("transform.init", init, INITS)

    def refuse(self, order: int) -> None:
        if self.init != "hadamard":
            return
        for side in self.sides(order):
            try:
                factors(side)
            except ConfigError:
                raise ConfigError(
                    f"transform.init=hadamard: there is no Hadamard matrix of order {side}, "
                    f"which a site of {order} features needs; use transform.init=orthogonal."
                ) from None

    def sides(self, width: int) -> tuple[int, ...]:
        """The orders of the matrices a site of that width needs."""
        return (width,)

    def codec(self, order: int, site: str, seed: int) -> Codec:
        matrix = dense(order, self.parametrization, self.init, generator(seed, "full", site, order))
        if self._orthogonal:
            return Blocks(matrix)  # whose inverse is its transpose, without the digits of a solve
        return Blocks(matrix, torch.linalg.inv(matrix))

    @property
    def _orthogonal(self) -> bool:
        if self.parametrization == "general":
            return self.init != "xavier"
        return self.parametrization == "orthogonal"


def dense(n: int, parametrization: str, init: str, draw: torch.Generator) -> Tensor:
    """A, float64 `[n, n]`."""
    if parametrization == "general":
        return _initial(n, init, draw)
    if parametrization == "orthogonal":
        return _orthogonal(n, init, draw)
    u = _orthogonal(n, init, draw)
    v = _orthogonal(n, init, draw)
    octaves = torch.zeros(n)
    if init != "identity":
        octaves = 2 * torch.rand(n, generator=draw, dtype=torch.float64) - 1
    return u * octaves.to(u).exp2() @ v


def _initial(n: int, init: str, draw: torch.Generator) -> Tensor:
    if init == "identity":
        return torch.eye(n, dtype=torch.float64)
    if init == "orthogonal":
        return random_orthogonal(n, draw)
    if init == "hadamard":
        return hadamard(n)
    return torch.randn(n, n, generator=draw, dtype=torch.float64) / n**0.5


def _orthogonal(n: int, init: str, draw: torch.Generator) -> Tensor:
    matrix = _initial(n, init, draw)
    if init == "xavier":
        return qr_orth(matrix)
    return matrix  # every other init is orthogonal as it is
