"""kronecker: x -> x (L (x) R), W <- W (L^-1 (x) R^-1)^T, one such matrix a site.

    X -> L^T X R    on x reshaped to X [l, r],    L [l, l],  R [r, r]

l <= r are the closest factors n = l r of the site's width (576 = 24 * 24). Source: FP-Quant
`transform_class=kronecker`, MR-GPTQ (arXiv 2509.23202), after FlatQuant (arXiv 2410.09426), which
learns L and R. Difference: untrained, both drawn as `full` draws its matrix. Online cost
T n (l + r).
"""

from __future__ import annotations

import math

from harness.codecs.codec import Codec, Kronecker
from harness.transforms.base import generator
from harness.transforms.full import FullMatrix, dense


class KroneckerProduct(FullMatrix):
    """parametrization and init of both factors, as for `full`."""

    def sides(self, width: int) -> tuple[int, int]:
        return closest(width)

    def codec(self, order: int, site: str, seed: int) -> Codec:
        draw = generator(seed, "kronecker", site, order)
        left, right = (
            dense(side, self.parametrization, self.init, draw) for side in self.sides(order)
        )
        return Kronecker(left, right)


def closest(n: int) -> tuple[int, int]:
    """(l, r) with l r = n, l <= r and r - l least."""
    # down from the square root: the first divisor leaves the least difference
    left = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return left, n // left
