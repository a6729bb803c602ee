"""dst: x -> DST-II(x) block by block, W <- W S with the same orthonormal matrix S.

    S[i, k] = sqrt(2 / g) c_k sin(pi (2 i + 1) (k + 1) / (2 g)),    i, k = 0 .. g - 1
    c_{g-1} = 1 / sqrt 2,  else 1

Source: FP-Quant `transform_class=dst`, MR-GPTQ (arXiv 2509.23202). S is not symmetric, hence not
its own inverse. Differences as for dct: no SciPy, block by block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.transforms.block_diagonal import BlockDiagonal
from harness.transforms.dct import angles


class DSTBlocks(BlockDiagonal):
    """block_size: auto, full, or any order that divides every site."""

    def codec(self, order: int, site: str, seed: int) -> Codec:
        return Blocks(dst(order))


def dst(n: int) -> Tensor:
    """S, float64 `[n, n]`; rows are positions, columns frequencies."""
    matrix = angles(n, torch.arange(1, n + 1)).sin() * math.sqrt(2 / n)
    matrix[:, -1] /= math.sqrt(2)
    return matrix
