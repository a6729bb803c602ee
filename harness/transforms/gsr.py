"""gsr: x -> x H_w block by block, W <- W H_w, the Sylvester matrix in sequency order (Walsh).

    H_w[:, j] = the column of H_g that changes sign j times going down        j = 0 .. g - 1

It mixes as hadamard does, but neighbouring outputs have neighbouring frequencies, so a format's
group inside a larger block has values of like variance; with a block no larger than the group it
differs from hadamard only in their order.

Source: FP-Quant `transform_class=gsr`, MR-GPTQ (arXiv 2509.23202), after grouped sequency-arranged
rotation (arXiv 2505.03810). Differences: none in the matrix; it is applied block by block.
"""

from __future__ import annotations

from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.config.errors import ConfigError
from harness.linalg.hadamard import hadamard
from harness.transforms.block_diagonal import BlockDiagonal


class SequencyBlocks(BlockDiagonal):
    """block_size: auto, full, or a power of two that divides every site."""

    def refuse(self, order: int) -> None:
        if order & (order - 1):  # zero for a power of two alone
            raise ConfigError(
                f"transform.block_size={self.block_size}: sequency order needs a power of two, "
                f"{order} is none."
            )

    def codec(self, order: int, site: str, seed: int) -> Codec:
        return Blocks(sequency(order))


def sequency(n: int) -> Tensor:
    """H_w, float64 `[n, n]`, entries +-1/sqrt(n), for n a power of two."""
    matrix = hadamard(n)
    return matrix[:, sign_changes(matrix).argsort()].contiguous()


def sign_changes(matrix: Tensor) -> Tensor:
    """How often each column changes sign going down, int64 `[columns]`."""
    return (matrix[1:] * matrix[:-1] < 0).sum(0)
