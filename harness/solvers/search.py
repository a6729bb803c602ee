r"""Scales by search: of several candidates, each group takes the one of least error under H.

    s = argmin over candidates of  e^T H_b e,   e = w_b - Q(w_b; s),   H_b: the g x g block of
                                                H = 2/N sum x^T x that the group b multiplies
    hessian_diagonal:  sum_j H_jj e_j^2 instead

Candidates are scales near those that the extremes give (`Format.nearby`), nearest
first; one replaces another only where its error is strictly less, so ties stay with the extremes.
Source: ScaleSweep (arXiv 2606.07618) and ModelOpt's "local Hessian". Differences: for every format
with scales of groups or channels, not E4M3's alone; E4M3 codes -4 .. +10 instead of -20 .. +12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.formats import Format, Scales

Candidates = Callable[[Tensor, Scales], Iterable[Scales]]
PIECE = 2**17  # elements searched at a time, so that they stay in a cache of a CPU


def under_hessian(weight: Tensor, format: Format, scales: Scales, hessian: Tensor) -> Scales:
    """Scales of a weight [out, n] as its format's observer has it, from those of its extremes.

    hessian: [n, n], or blocks of its diagonal [n / k, k, k], k a multiple of the group.
    """

    def nearby(rows: Tensor, scales: Scales) -> Iterable[Scales]:
        return format.nearby(scales)

    diagonal = format.observer == "hessian_diagonal"
    return least(weight, format, scales, hessian, nearby, diagonal)


def least(
    weight: Tensor,
    format: Format,
    scales: Scales,
    hessian: Tensor,
    candidates: Candidates,
    diagonal: bool = False,
) -> Scales:
    """Of `scales` and candidates(rows of the weight, scales of these rows), group by group, those
    of least error under the Hessian's diagonal blocks, or under its diagonal alone."""
    within = diagonal_blocks(hessian, format.group(weight.shape[-1])).float()
    if diagonal:
        within = within.diagonal(dim1=1, dim2=2)
    step = max(1, PIECE // weight.shape[-1])
    found = []
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        best = _rows(scales, slice(first, first + step))
        lowest = _errors(rows, format, best, within)
        for candidate in candidates(rows, best):
            errors = _errors(rows, format, candidate, within)
            better = errors < lowest
            lowest = torch.where(better, errors, lowest)
            best = _pick(better, candidate, best)
        found.append(best)
    zero = None
    if scales.zero is not None:
        zero = torch.cat([piece.zero for piece in found if piece.zero is not None])
    scale = torch.cat([raw(piece.scale) for piece in found]).view(scales.scale.dtype)
    return replace(scales, scale=scale, zero=zero)


def diagonal_blocks(hessian: Tensor, size: int) -> Tensor:
    """The blocks [n / size, size, size] on the diagonal of a Hessian [n, n].

    Or of one of which larger blocks are there. A last block that is not full is filled with zeros.
    """
    if hessian.ndim == 2:
        hessian = hessian[None]
    short = -hessian.shape[-1] % size
    if short:
        hessian = pad(hessian, (0, short, 0, short))
    parts = hessian.shape[-1] // size
    grid = hessian.unflatten(2, (parts, size)).unflatten(1, (parts, size))
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def raw(scale: Tensor) -> Tensor:
    """Stored scales so that they can be compared and picked: those in float8 as bytes."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale


def _errors(rows: Tensor, format: Format, scales: Scales, within: Tensor) -> Tensor:
    """The error [rows, groups] of each group of some rows [rows, n]."""
    noise = format.split(format.project(rows, scales).sub_(rows))
    if within.ndim == 2:
        return noise.square_().mul_(within).sum(-1)
    noise = noise.transpose(0, 1)
    return (noise @ within).mul_(noise).sum(-1).T.contiguous()


def _rows(scales: Scales, rows: slice) -> Scales:
    """The scales of some rows of a matrix."""
    zero = None if scales.zero is None else scales.zero[rows]
    return replace(scales, scale=scales.scale[rows], zero=zero)


def _pick(better: Tensor, candidate: Scales, best: Scales) -> Scales:
    """Scale by scale, `candidate` where it is better."""
    scale = torch.where(better, raw(candidate.scale), raw(best.scale))
    zero = None
    if candidate.zero is not None and best.zero is not None:
        zero = torch.where(better, candidate.zero, best.zero)
    return replace(best, scale=scale.view(candidate.scale.dtype), zero=zero)
