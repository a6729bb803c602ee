"""Products with block-diagonal matrices: x diag(M_1, .., M_nb), differentiable in both.

On a CPU each block is one matmul between slices of the rows, written where it belongs; a batched
matmul needs the blocks moved to the front and back again, which for blocks of 64 costs more than
the arithmetic (twice the seconds at 2,048 x 576). On a GPU the batched one wins.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x diag(M_1, .., M_nb), n features.

    x: [..., n] of any float dtype. matrix: M [nb, g, g], or [g, g] for every block; nb g = n.

    Computed in float32 or in float64 if x is that; returned in x's dtype. Raises ValueError where
    nb g is not n.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrix = matrix.to(x.device, dtype)
    if matrix.ndim == 3 and len(matrix) == 1:  # one matmul, with nothing to slice
        matrix = matrix[0]
    if matrix.ndim == 3 and len(matrix) * matrix.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{len(matrix)} blocks of {matrix.shape[1]} do not make up {x.shape[-1]} features"
        )
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    if matrix.ndim == 2:
        product = rows.reshape(-1, len(matrix)) @ matrix
    elif x.device.type == "cpu":
        product = _Times.apply(rows, matrix)
    else:
        blocks = rows.unflatten(-1, matrix.shape[:2]).transpose(0, 1)
        product = torch.bmm(blocks, matrix).transpose(0, 1)
    return product.reshape(x.shape).to(x.dtype)


class _Times(torch.autograd.Function):
    """y_i = x_i M_i on slices:  dx_i = dy_i M_i^T,  dM_i = x_i^T dy_i."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return _slices(x, matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable  # the products below leave no graph behind
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, matrix = ctx.saved_tensors
        to_x = _slices(gradient, matrix.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        g = matrix.shape[-1]
        to_matrix = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for block, a, b in zip(to_matrix, x.split(g, 1), gradient.split(g, 1)):
            torch.mm(a.T, b, out=block)
        return to_x, to_matrix


def _slices(x: Tensor, matrix: Tensor) -> Tensor:
    """x diag(M_1, .., M_nb) for x [rows, n], M [nb, g, g], block by block."""
    product = torch.empty_like(x, memory_format=torch.contiguous_format)
    g = matrix.shape[-1]
    for columns, rows, block in zip(product.split(g, 1), x.split(g, 1), matrix):
        torch.mm(rows, block, out=columns)
    return product
