"""gptq's U: the inverse of H as a triangular factor, H^-1 = U^T U, of many Hessians at once.

    H + damp mean(diag H) I = R R^T  with rows and columns reversed,   U = R^-1

R is lower triangular there, so U is upper triangular in the order of the columns, and the inverse
of H is never formed. Rows of U are scaled to unit diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.formats import Scales
from harness.solvers.base import Problem

LEAF = 64  # width at which many Hessians at once are factored by LAPACK


@dataclass(frozen=True)
class Begun:
    """A problem before its loop.

    hessian: [in, in]. dead: [in] bool, features that are always 0. order: [in], columns as they are
    due. scales: {name: Scales}.
    """

    problem: Problem
    hessian: Tensor
    dead: Tensor
    order: Tensor
    scales: dict[str, Scales]


def inverses(
    begun: Sequence[Begun], damp: float, precision: torch.dtype
) -> tuple[Tensor, list[float | None]]:
    """(U [problems, in, in] in `precision`, the damping that each took), all of one width.

    Damped ten times more where that fails, up to 1, then in float64; None where none was enough,
    and that U is no number.
    """
    units = torch.empty(0)
    took: list[float | None] = [None] * len(begun)
    for dtype in dict.fromkeys((precision, torch.float64)):
        for tried in _dampings(damp):
            left = [index for index, found in enumerate(took) if found is None]
            if not left:
                break
            uppers, good = _unit_uppers([begun[index] for index in left], tried, dtype)
            if len(left) == len(begun):
                units = uppers.to(precision)
            else:
                units[left] = uppers.to(precision)
            for index, fine in zip(left, good):
                took[index] = tried if fine else None
    return units, took


def _dampings(damp: float) -> Iterator[float]:
    """From the setting on, ten times more each, up to 1."""
    yield damp
    while damp < 1:
        damp = min(1.0, max(damp, 1e-3) * 10)
        yield damp


def _unit_uppers(
    begun: Sequence[Begun], damp: float, dtype: torch.dtype
) -> tuple[Tensor, list[bool]]:
    """U of each at one damping, and whether it is finite."""
    width = len(begun[0].order)
    if len(begun) == 1:
        # a Hessian is the largest thing a solver holds
        damped, leaf = _damped(begun[0], damp, dtype)[None], width
    else:
        damped, leaf = torch.stack([_damped(each, damp, dtype) for each in begun]), LEAF
    upper, good = _lower_inverse(damped, leaf)
    del damped
    upper = upper.flip(-2, -1)
    upper /= upper.diagonal(dim1=-2, dim2=-1)[..., None].clone()
    return upper, [fine and finite(each) for each, fine in zip(upper, good.tolist())]


def _lower_inverse(matrices: Tensor, leaf: int) -> tuple[Tensor, Tensor]:
    """(L^-1 of A = L L^T [.., n, n], whether A was positive definite [..]).

    By halves down to `leaf`, which makes matrix products of many small factorizations:

        A = [A1  .]   L^-1 = [    L1^-1             .   ]   B = A21 L1^-T
            [A21 A2]         [-L2^-1 B L1^-1      L2^-1 ]   L2 L2^T = A2 - B B^T
    """
    n = matrices.shape[-1]
    if n <= leaf:
        # _ex: a matrix that is not positive definite is no exception here
        factor, info = torch.linalg.cholesky_ex(matrices)
        eye = torch.eye(n, dtype=factor.dtype, device=factor.device).expand_as(factor)
        return torch.linalg.solve_triangular(factor, eye, upper=False), info == 0
    half = n // 2
    inverse = torch.zeros_like(matrices)
    first, first_good = _lower_inverse(matrices[..., :half, :half], leaf)
    below = matrices[..., half:, :half] @ first.mT
    rest = torch.baddbmm(matrices[..., half:, half:], below, below.mT, alpha=-1)
    second, second_good = _lower_inverse(rest, leaf)
    inverse[..., :half, :half] = first
    inverse[..., half:, half:] = second
    inverse[..., half:, :half] = (second @ below @ first).neg_()
    return inverse, first_good & second_good


def _damped(begun: Begun, damp: float, dtype: torch.dtype) -> Tensor:
    """H with damping, its last column first."""
    backwards = begun.order.flip(0)
    damped = begun.hessian.to(dtype, copy=True)
    # a feature that is always 0 takes any weight, but a row of zeros has no inverse
    damped.diagonal()[begun.dead] = 1
    damped.diagonal().add_(damp * damped.diagonal().mean())
    return damped[backwards[:, None], backwards]


def finite(x: Tensor) -> bool:
    """Whether all of x are numbers; a sum says so in most cases, and reads x once."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
