"""dct: x -> DCT-II(x) block by block, W <- W C with the same orthonormal matrix C.

    C[i, k] = sqrt(2 / g) c_k cos(pi (2 i + 1) k / (2 g)),    i, k = 0 .. g - 1
    c_0 = 1 / sqrt 2,  else 1

Source: FP-Quant `transform_class=dct`, MR-GPTQ (arXiv 2509.23202). C is not symmetric, hence not
its own inverse. Differences: built without SciPy, and applied block by block where FP-Quant
multiplies by the whole block-diagonal matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.transforms.block_diagonal import BlockDiagonal


class DCTBlocks(BlockDiagonal):
    """block_size: auto, full, or any order that divides every site."""

    def codec(self, order: int, site: str, seed: int) -> Codec:
        return Blocks(dct(order))


def dct(n: int) -> Tensor:
    """C, float64 `[n, n]`; rows are positions, columns frequencies."""
    matrix = angles(n, torch.arange(n)).cos() * math.sqrt(2 / n)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def angles(n: int, frequencies: Tensor) -> Tensor:
    """pi (2 i + 1) k / (2 n) modulo 2 pi, float64 `[n, len(frequencies)]`, for integers k."""
    # Reduced as integers: a cosine of 10^5 radians would lose five digits.
    steps = torch.outer(2 * torch.arange(n) + 1, frequencies) % (4 * n)
    return steps.double() * (math.pi / (2 * n))
