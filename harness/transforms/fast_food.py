"""fast_food: x -> x B block by block, W <- W (B^-1)^T, with B in place of a Gaussian matrix.

    B = c S H G P H D,    c = 1 / |G|_F

    D  signs                           G = diag(g_i), g_i normal
    P  a permutation                   S = diag(s_i), s_i chi with g degrees of freedom
    H  an orthonormal Hadamard matrix

B is invertible, not orthogonal. Rows of H G P H D have the norm |G|_F / sqrt(g), so row i of B has
s_i / sqrt(g), one in the mean square. |g_i| is raised to at least FLOOR and s_i to at least
FLOOR sqrt(g), signs kept: cond(B) is at most max|g_i| max s_i / (FLOOR^2 sqrt(g)), in practice
about 30. An ablation.

Source: Fastfood (arXiv 1408.3060) as FP-Quant's `transform_class=fast_food`, MR-GPTQ (arXiv
2509.23202). Differences: the floor; c gives rows of norm one, where FP-Quant divides each s_i by
|g_i| and scales by sqrt 2; any Hadamard order; seeded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.linalg.hadamard import hadamard, random_signs, reachable
from harness.transforms.base import generator
from harness.transforms.block_diagonal import BlockDiagonal

FLOOR = 1 / 8  # least share of its typical size that a g_i or s_i keeps


class FastFood(BlockDiagonal):
    """block_size: auto, full, or a Hadamard order that divides every site."""

    def refuse(self, order: int) -> None:
        reachable(f"transform.block_size={self.block_size}", order)

    def codec(self, order: int, site: str, seed: int) -> Codec:
        matrix = fast_food(order, generator(seed, "fast_food", order))
        return Blocks(matrix, torch.linalg.inv(matrix))


def fast_food(n: int, draw: torch.Generator) -> Tensor:
    """B, float64 `[n, n]`."""
    h = hadamard(n)
    signs = random_signs(n, draw)
    order = torch.randperm(n, generator=draw)
    gauss = torch.randn(n, generator=draw, dtype=torch.float64)
    gauss = gauss.abs().clamp_min(FLOOR).copysign(gauss)
    chi = _chi(n, draw).clamp_min(FLOOR * math.sqrt(n))
    return (chi / gauss.norm())[:, None] * (h * gauss) @ (h * signs)[order]


def _chi(n: int, draw: torch.Generator) -> Tensor:
    """n draws from the chi distribution with n degrees of freedom: norms of Gaussian vectors."""
    return torch.randn(n, n, generator=draw, dtype=torch.float64).norm(dim=1)
