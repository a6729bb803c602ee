"""Fake quantization whose scales pass gradients, for what learns the ranges that it quantizes.

    x^ = s q,    s = c R(x) / (levels),    R the peak of a group, or its range with a zero point
    d x^ = inside dx + (x^ - inside x) d log s,    d log s = d log R + d log c

inside: 1 where x lies within the lattice's ends, else 0. Rounding passes gradients straight, the
rounding of the scale too. A straight-through estimator has the first term alone; the second says
that a smaller peak makes a smaller error, which is all that an invertible matrix can learn from:
its own effect on x is undone behind the quantizer. The value is the format's in every bit.

Source: LSQ (arXiv 1902.08153) for d s; OmniQuant (arXiv 2308.13137) for c. Differences: the same
formula for every format, a zero point is held fast, and so is a scale of the whole tensor beside
those of groups (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.formats import Format, Integer
from harness.solvers.neighbours import columns, ends

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Ranged:
    """A format, and the ratio c [] of its ranges where that is learned (Integer)."""

    format: Format
    clip: Tensor | None = None

    def fake(self, x: Tensor, ste: bool = True, global_scale: Tensor | None = None) -> Tensor:
        """x [.., n] quantized and dequantized; ste: differentiable in x and c."""
        format = self._clipped()
        with torch.no_grad():
            value = format.fake(x, global_scale=global_scale)
            if not ste:
                return value
            lattice = columns(format, format.scales(x, global_scale))
            least, greatest = ends(format, lattice)
        blocks = format.split(x).to(torch.promote_types(x.dtype, torch.float32))
        near = blocks.masked_fill((blocks < least) | (blocks > greatest), 0)
        width = _width(blocks, len(lattice) > 1).clamp_min(TINY).log()
        if self.clip is not None:
            width = width + self.clip.log()
        slope = near + (format.split(value) - near).detach() * width
        slope = format.join(slope, x.shape).to(x.dtype)
        # slope in gradient, value in value: a difference of equals is exactly 0
        return value + (slope - slope.detach())

    def _clipped(self) -> Format:
        if self.clip is None:
            return self.format
        assert isinstance(self.format, Integer)  # which alone has such a ratio
        return replace(self.format, clip=self.format.clip * float(self.clip.detach()))


def _width(blocks: Tensor, offset: bool) -> Tensor:
    """R of each group [.., groups, 1]."""
    if not offset:
        return blocks.abs().amax(-1, keepdim=True)
    high = blocks.amax(-1, keepdim=True).clamp_min(0)
    return high - blocks.amin(-1, keepdim=True).clamp_max(0)
