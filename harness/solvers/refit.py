r"""Scales chosen anew once codes are: what rounded a weight and what is stored differ.

    min over the scales s_b of  (w - Q)^T H (w - Q),   Q_b = s_b k_b + z_b,   codes k fixed
    one group after another:    s_b <- s_b (1 + k~^T (H (w - Q))_b / (k~^T H_bb k~)),   k~ = s_b k_b

each rounded as it is stored, and taken only where the error falls. Source: the split scales of
SOAR (arXiv 2605.12245), s_d = k^T H_b w / k^T H_b k, which this is where only the group's own block
of H is there. Differences: all of H where the solver has it (GPTQ), so that a group also makes up
for what others left; several rounds; s_q is the one the observer found.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.formats import Format, QTensor, Scales
from harness.solvers.search import raw

ROUNDS = 2  # a third takes at most .4 % more off the error of random weights, in five formats


def refit(weight: Tensor, format: Format, q: QTensor, hessian: Tensor) -> QTensor:
    """The same codes of a weight [out, n] on scales of less error, stored as those were.

    hessian: [n, n], or blocks of its diagonal [n / k, k, k], k a multiple of the group; computed
    with in float32.
    """
    blocks = hessian.float()
    if blocks.ndim == 2:
        blocks = blocks[None]
    scales = replace(q.scales, scale=q.scales.scale.clone())
    size = format.group(weight.shape[-1])
    noise = weight.float() - format.decode(q.codes, scales)
    for number, block in enumerate(blocks):
        first = number * len(block)
        columns = slice(first, first + len(block))
        pull = noise[:, columns] @ block
        for _ in range(ROUNDS):
            _round(format, q.codes[:, columns], _groups(scales, columns, size), pull, block)
    return replace(q, scales=scales)


def _round(format: Format, codes: Tensor, scales: Scales, pull: Tensor, block: Tensor) -> None:
    """Each group's scale once; scales and pull, H times what is left of the error, in place."""
    size = format.group(codes.shape[-1])
    for lo in range(0, codes.shape[-1], size):
        columns = slice(lo, lo + size)
        within = block[columns, columns]
        mine = _groups(scales, columns, size)
        moved, change = _moved(format, codes[:, columns], mine, pull[:, columns], within)
        mine.scale.copy_(moved)
        pull.addmm_(change, block[columns], alpha=-1)


def _moved(
    format: Format, codes: Tensor, scales: Scales, pull: Tensor, within: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale [out, 1] of one group, and by how much its values [out, group] change.

    pull: [out, group]. within: [group, group] of H.
    """
    before = format.decode(codes, scales)
    slope = before - format.offset(scales)
    stiff = (slope @ within).mul_(slope).sum(-1, keepdim=True)
    factor = 1 + (slope * pull).sum(-1, keepdim=True) / stiff
    # a group of zeros, or one that nothing reads, stays
    factor = torch.where(stiff > 0, factor, 1.0).clamp(0.5, 2.0)
    moved = format.rescaled(scales, factor)
    change = format.decode(codes, moved) - before
    gain = (2 * pull - change @ within).mul_(change).sum(-1, keepdim=True)
    better = gain > 0
    kept = torch.where(better, raw(moved.scale), raw(scales.scale))
    return kept.view(scales.scale.dtype), change.mul_(better)


def _groups(scales: Scales, columns: slice, size: int) -> Scales:
    """Those of some columns, as views."""
    groups = slice(columns.start // size, -(-columns.stop // size))
    zero = None if scales.zero is None else scales.zero[:, groups]
    return replace(scales, scale=scales.scale[:, groups], zero=zero)
