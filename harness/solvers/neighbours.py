"""The two points of a lattice around a number, found by snapping alone, so for any format.

Of the two, p is the nearer to x; the other lies at least as far from p as twice x does, and as the
least gap. Steps that double from there leave p for the other one, never for one behind it: the last
that stays reaches no farther than halfway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.formats import Format, Scales

NUDGE = 2.0**-12  # of the range: how far inside its ends what lies beyond them is looked at


class Around(NamedTuple):
    """Blocks [*lead, groups, group] of a weight, and the lattice points lo < hi around each.

    Where a weight lies beyond the ends `least`, `greatest` [*lead, groups, 1], lo and hi are the
    outermost two; they are equal where the lattice has a single point.
    """

    blocks: Tensor
    lattice: tuple[Tensor, ...]
    least: Tensor
    greatest: Tensor
    lo: Tensor
    hi: Tensor


def around(weight: Tensor, format: Format, scales: Scales) -> Around:
    """What is around each element of a weight [out, in], in float32."""
    blocks = format.split(weight.float())
    lattice = columns(format, scales)
    least, greatest = ends(format, lattice)
    nudge = NUDGE * (greatest - least)
    x = blocks.clamp(least + nudge, greatest - nudge)
    near = format.snap(x, *lattice)
    offset = x - near
    step = torch.copysign(torch.maximum(2 * offset.abs(), _gap(format, lattice)), offset)
    other = near
    several = least < greatest
    while (stays := (other == near) & several).any():
        other = torch.where(stays, format.snap(near + step, *lattice), other)
        step *= 2
    lo = torch.minimum(near, other)
    hi = torch.maximum(near, other)
    return Around(blocks, lattice, least, greatest, lo, hi)


def columns(format: Format, scales: Scales) -> tuple[Tensor, ...]:
    """The lattice of stored scales, [*lead, groups, 1] each, as blocks are snapped to it."""
    return tuple(t.unsqueeze(-1) for t in format.lattice(scales))


def ends(format: Format, lattice: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The least and the greatest point of each group's lattice [*lead, groups, 1]."""
    far = torch.full_like(lattice[0], torch.finfo(torch.float32).max)
    return format.snap(-far, *lattice), format.snap(far, *lattice)


def _gap(format: Format, lattice: Sequence[Tensor]) -> Tensor:
    """The least gap of each group's lattice [*lead, groups, 1]: lattices are finest midway."""
    least, greatest = ends(format, lattice)
    middle = format.snap((least + greatest) / 2, *lattice)
    step = (greatest - least) / 2
    gap = step
    while ((found := format.snap(middle + step, *lattice)) != middle).any():
        gap = torch.where(found == middle, gap, found - middle)
        step = step / 2
    return gap
