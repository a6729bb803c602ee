r"""A weight between its neighbours on the lattice, lo <= w <= hi, and what is learned of it.

    Offset     w^ = snap(w + v (hi - lo)),    v in [-1/2, 1/2]
    Interval   w^ = lo + h(v0 + v) (hi - lo), h(u) = clamp(k (sigmoid(u) - 1/2) + 1/2, 0, 1)

k is 1.2 at first, with which h(v0) (hi - lo) = w - lo, and grows, which pushes h to 0 or 1; what is
stored is what h(v0 + v) is nearer to. v = 0 is rounding to nearest in both.

The ends L, U of an offset's lattice move with ratios a, b in (0, 1], one for both where it is
symmetric about 0. Rounding passes gradients straight, clamping only inside: w^ has the gradient of

    v (hi - lo) + w' + (w^ - w') log(b U - a L),    w' = w inside, a L below, b U above

with both factors in brackets held fast, and the first term inside only. On integers hi - lo is the
scale s, and this is the gradient of s (clamp(round(w / s + v) + z) - z) with s = (b U - a L) / N
and z = round(-a L / s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from harness.formats import Format, QTensor, Scales
from harness.solvers.neighbours import Around, around, columns, ends

STRETCH = 1.2  # of the sigmoid, so that h reaches 0 and 1 (AdaRound)
SHARPEST = 1000.0  # times that, at the end
LEAST = 2.0**-6  # ratio of a range
TINY = torch.finfo(torch.float32).tiny


class Between(nn.Module, ABC):
    """A weight [out, in] on its way to one neighbour or the other; parameters are zero at first."""

    def __init__(self, weight: Tensor, format: Format, start: Scales):
        super().__init__()
        self.weight = weight.detach()
        self.format = format
        self.start = start
        self.v = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    @abstractmethod
    def forward(self, progress: float) -> Tensor:
        """w^ [out, in] in the weight's dtype, differentiable; progress: 0 to 1."""

    @abstractmethod
    def confine(self) -> None:
        """Bring the parameters back to where they may be."""

    @abstractmethod
    def _stored(self) -> tuple[Scales, Around, Tensor]:
        """The scales, what is around the weight, and how much of an interval it is moved."""

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The weight as it is stored; that of rounding to nearest where nothing is learned."""
        scales, place, moved = self._stored()
        blocks = place.blocks + moved * (place.hi - place.lo)
        x = self._joined(blocks.clamp(place.lo, place.hi))
        if self.format.compute_dtype == "input":  # rounded in the arithmetic of that dtype
            x = x.to(self.weight.dtype)
        return self.format.quantize(x, scales=scales, dtype=self.weight.dtype)

    def _joined(self, blocks: Tensor) -> Tensor:
        return self.format.join(blocks, self.weight.shape)


class Offset(Between):
    """Moved before it is rounded. clip: learn a and b, whose parameters are 1 - a and 1 - b."""

    def __init__(self, weight: Tensor, format: Format, start: Scales, clip: bool):
        super().__init__(weight, format, start)
        count = 1 if start.zero is None else 2
        shrunk = torch.zeros(count, *start.scale.shape, device=weight.device)
        self.shrunk = nn.Parameter(shrunk, requires_grad=clip)

    @torch.no_grad()
    def confine(self) -> None:
        self.v.clamp_(-0.5, 0.5)
        self.shrunk.clamp_(0, 1 - LEAST)

    def forward(self, progress: float) -> Tensor:
        v = self.format.split(self.v)
        with torch.no_grad():
            _, place, _ = self._stored()
            gap = place.hi - place.lo
            moved = place.blocks + v * gap
            value = self.format.snap(moved.clamp(place.lo, place.hi), *place.lattice)
            # what rounds to the last code is inside, too
            margin = self.format.slack * place.lattice[0]
            below = moved < place.least - margin
            above = moved > place.greatest + margin
            gap = gap.masked_fill(below | above, 0)
            first, last = ends(self.format, columns(self.format, self.start))
        a, b = (ratio.unsqueeze(-1) for ratio in self._ratios())
        low = a * first
        high = b * last
        near = torch.where(below, low, torch.where(above, high, place.blocks))
        width = (high - low).clamp_min(TINY)
        slope = v * gap + near + (value - near.detach()) * width.log()
        # slope in gradient, value in value: a difference of equals is exactly 0
        rounded = value + (slope - slope.detach())
        return self._joined(rounded).to(self.weight.dtype)

    def _ratios(self) -> tuple[Tensor, Tensor]:
        """a, b [*lead, groups]."""
        ratios = 1 - self.shrunk
        return ratios[0], ratios[-1]

    def _stored(self) -> tuple[Scales, Around, Tensor]:
        scales = self.format.clipped(self.start, *self._ratios())
        place = around(self.weight, self.format, scales)
        return scales, place, self.format.split(self.v)


class Interval(Between):
    """Anywhere between its neighbours, and ever nearer to one of them."""

    def __init__(self, weight: Tensor, format: Format, start: Scales):
        super().__init__(weight, format, start)
        # scales that stay have neighbours that do
        place = around(self.weight, format, start)
        # what lies beyond the lattice starts at its end
        self.place = place._replace(blocks=place.blocks.clamp(place.lo, place.hi))
        gap = (place.hi - place.lo).clamp_min(TINY)
        share = (self.place.blocks - place.lo) / gap
        self.v0 = ((share - 0.5) / STRETCH + 0.5).logit()

    def confine(self) -> None:
        """v may be anything."""

    def forward(self, progress: float) -> Tensor:
        u = self.v0 + self.format.split(self.v)
        h = _pushed(u, STRETCH * SHARPEST**progress)
        blocks = self.place.lo + h * (self.place.hi - self.place.lo)
        return self._joined(blocks).to(self.weight.dtype)

    def _stored(self) -> tuple[Scales, Around, Tensor]:
        u = self.v0 + self.format.split(self.v)
        # the difference is 0 without a learned v, whatever was rounded on the way
        return self.start, self.place, _pushed(u, STRETCH) - _pushed(self.v0, STRETCH)


def _pushed(u: Tensor, k: float) -> Tensor:
    """h(u) of slope k."""
    return (k * (u.sigmoid() - 0.5) + 0.5).clamp(0, 1)
