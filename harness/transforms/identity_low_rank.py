"""identity_low_rank: x -> x T block by block, W <- W (T^-1)^T, T the identity plus rank r.

    T    = I + U V,    U = (alpha / r) A^T [g, r],    V = B^T [r, g]
    T^-1 = I - U (I + V U)^-1 V

A [r, g] and B [g, r] are normal of variance 1 / g. With alpha = r much less than g the singular
values of T lie between about 0.5 and 2; its condition grows as (alpha / r)^2. An ablation.

Source: FP-Quant `transform_class=identity_low_rank`, MR-GPTQ (arXiv 2509.23202). Differences:
FP-Quant's inverse is not Woodbury's, as it multiplies by I + A B where it should divide; B is
drawn, where FP-Quant starts at B = 0 and trains it, which untrained would be the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.config.checks import integer, number
from harness.config.errors import ConfigError
from harness.transforms.base import generator
from harness.transforms.block_diagonal import BlockDiagonal


class IdentityLowRank(BlockDiagonal):
    """block_size: auto, full, or an order that divides every site. rank: r, at most the order.
    alpha: 0 to 1000, None is r."""

    def __init__(self, block_size: int | str = "auto", rank: int = 8, alpha: float | None = None):
        super().__init__(block_size)
        integer("transform.rank", rank)
        self.rank = rank
        self.alpha = float(rank)
        if alpha is not None:
            self.alpha = number("transform.alpha", alpha, 0, 1000)

    def refuse(self, order: int) -> None:
        if self.rank > order:
            raise ConfigError(f"transform.rank={self.rank} is more than the block's order {order}.")

    def codec(self, order: int, site: str, seed: int) -> Codec:
        draw = generator(seed, "identity_low_rank", order, self.rank)
        a, b = torch.randn(2, self.rank, order, generator=draw, dtype=torch.float64) / order**0.5
        return Blocks(*with_inverse(self.alpha / self.rank * a.mT, b))


def with_inverse(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """I + U V and its inverse, for U [g, r] and V [r, g]."""
    outer = torch.eye(len(u)).to(u)
    inner = torch.eye(len(v)).to(u)
    # Woodbury: a solve of order r instead of g
    return outer + u @ v, outer - u @ torch.linalg.solve(inner + v @ u, v)
