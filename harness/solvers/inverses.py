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
from harness.solvers.problem import Problem

LEAF = 64  # width at which many Hessians at once are factored by LAPACK


@dataclass(frozen=True)
class Begun:
    """A problem before its loop.

    hessian: [in, in]. dead: [in] bool, features that are always 0. order: [in], columns as they are
    due; reordered: whether that is not as they stand. scales: {name: Scales}.
    """

    problem: Problem
    hessian: Tensor
    dead: Tensor
    order: Tensor
    reordered: bool
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
        for tried in dampings(damp):
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


def dampings(damp: float) -> Iterator[float]:
    """From the setting on, ten times more each, up to 1."""
    yield damp
    while damp < 1:
        damp = min(1.0, max(damp, 1e-3) * 10)
        yield damp


def uppers(begun: Sequence[Begun], damp: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(U [problems, in, in] of each at one damping, in the order of its columns; whether each H was
    positive definite [problems])."""
    # a Hessian is the largest thing a solver holds: what is made of it takes its copy's place
    if len(begun) == 1:
        units, leaf = begun[0].hessian.to(dtype, copy=True)[None], len(begun[0].order)
    else:
        units, leaf = torch.stack([each.hessian.to(dtype) for each in begun]), LEAF
    for each, damped in zip(begun, units):
        # a feature that is always 0 takes any weight, but a row of zeros has no inverse
        damped.diagonal()[each.dead] = 1
        damped.diagonal().add_(damp * damped.diagonal().mean())
        if each.reordered:
            damped.copy_(damped[each.order[:, None], each.order])
    return units, _invert(units, leaf)


def _unit_uppers(
    begun: Sequence[Begun], damp: float, dtype: torch.dtype
) -> tuple[Tensor, list[bool]]:
    """U of each with unit diagonal, and whether it is finite."""
    units, good = uppers(begun, damp, dtype)
    units /= units.diagonal(dim1=-2, dim2=-1)[..., None].clone()
    return units, [fine and finite(each) for each, fine in zip(units, good.tolist())]


def _invert(matrices: Tensor, leaf: int) -> Tensor:
    """Put R^-1 of A = R R^T, R upper triangular, in place of A [.., n, n]; whether each A was
    positive definite [..].

    By halves down to `leaf`, which makes matrix products of many small factorizations:

        A = [A1  A12]   R^-1 = [U1  -U1 B U2]   U2 = R2^-1,  R2 R2^T = A2,  B = A12 U2^T
            [.   A2 ]          [.    U2     ]   U1 = R1^-1,  R1 R1^T = A1 - B B^T
    """
    n = matrices.shape[-1]
    if n <= leaf:
        # _ex: a matrix that is not positive definite is no exception here
        factor, info = torch.linalg.cholesky_ex(matrices.flip(-2, -1))
        eye = torch.eye(n, dtype=factor.dtype, device=factor.device).expand_as(factor)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        del factor, eye
        matrices.copy_(inverse.flip(-2, -1))
        return info == 0
    half = n // 2
    first, beside = matrices[..., :half, :half], matrices[..., :half, half:]
    second = matrices[..., half:, half:]
    good = _invert(second, leaf)
    passed = beside @ second.mT
    first.baddbmm_(passed, passed.mT, alpha=-1)
    good &= _invert(first, leaf)
    beside.copy_((first @ passed @ second).neg_())
    matrices[..., half:, :half] = 0
    return good


def finite(x: Tensor) -> bool:
    """Whether all of x are numbers; a sum says so in most cases, and reads x once."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
