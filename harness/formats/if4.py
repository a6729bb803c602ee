"""IF4: NVFP4 whose blocks choose between the elements of FP4 and those of INT4.

    E = 2688 / amax,    s = E4M3((amax_b / 6) E),    y = x (1 / (s / E)),    2688 = 448 * 6
    FP4     q = E2M1(clamp(y, -6, 6)),             dq = ((q s) amax) / 2688
    INT4    q = RNE(clamp(7/6 y, -7, 7)),          dq = (((q s) amax) 6/7) / 2688

Both lay the block's maximum on their last element under the same s, so the choice needs no other
scale: the sign bit of s, which is positive, says INT4. INT4 is taken where its error is strictly
less; it is where values fill their range evenly, FP4 where few are large. Stored is amax, as
FourOverSix has it. Source: Adaptive Block-Scaled Data Types (arXiv 2603.28765) and its reference
(repository mit-han-lab/fouroversix, `if4`), whose order of operations this is.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.formats.base import over
from harness.formats.fouroversix import FourOverSix
from harness.formats.grids import E4M3
from harness.formats.observers import absmax
from harness.formats.qtensor import Scales

INT4 = 0x80  # the bit of a block scale
MOST = 7  # the greatest INT4 element; -8 is none


@dataclass(frozen=True)
class IF4(FourOverSix):
    """FP4 or INT4 by the block. Knobs as FourOverSix has them; global_scale is amax."""

    PRODUCT: ClassVar[float] = 2688.0
    SCALE: ClassVar[str] = "amax"

    global_scale: str = SCALE

    def _scales(self, blocks: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Scales:
        x = blocks.float()
        u = over(absmax(x), 6.0) * self.encode_multiplier(global_scale)
        code = u.clamp(max=E4M3.max).to(torch.float8_e4m3fn).view(torch.uint8)
        floats, integers = (
            Scales(each.view(torch.float8_e4m3fn), None, global_scale)
            for each in (code, code | INT4)
        )
        better = self._error(x, integers) < self._error(x, floats)
        # through bytes: torch.where takes no float8
        code = torch.where(better, code | INT4, code)
        return Scales(code.view(torch.float8_e4m3fn), None, global_scale)

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        # the elements stay what they are
        code = scales.scale.view(torch.uint8)
        positive = (code & 0x7F).view(torch.float8_e4m3fn)
        moved = super().rescaled(replace(scales, scale=positive), factor)
        code = moved.scale.view(torch.uint8) | (code & INT4)
        return replace(moved, scale=code.view(torch.float8_e4m3fn))

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(1 / (s / E), 0 where s = 0;  s;  amax;  whether elements are INT4)"""
        code = scales.scale.view(torch.uint8)
        positive = Scales((code & 0x7F).view(torch.float8_e4m3fn), None, scales.global_scale)
        return *super().lattice(positive, dtype), code >= INT4

    def snap(
        self,
        x: Tensor,
        inverse: Tensor,
        s: Tensor,
        amax: Tensor,
        integer: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        y = torch.mul(x, inverse, out=out)
        levels = _level(y)
        q = torch.where(integer, levels, self.grid.round_(y, self.fp4_ties))
        return y.copy_(self._of(q, s, amax, integer))

    def _of(self, q: Tensor, s: Tensor, amax: Tensor, integer: Tensor) -> Tensor:
        """The values of elements, in place."""
        q.mul_(s).mul_(amax)
        q = torch.where(integer, q * (6 / 7), q)
        return q.div_(torch.full((), self.PRODUCT, device=q.device))  # see `over`

    def _encode(
        self, x: Tensor, inverse: Tensor, s: Tensor, amax: Tensor, integer: Tensor
    ) -> Tensor:
        y = x * inverse
        levels = _level(y).to(torch.int8).view(torch.uint8) & 0xF
        return torch.where(
            integer, levels, self.grid.encode(self.grid.round_(y, self.fp4_ties), x < 0)
        )

    def _decode(
        self, codes: Tensor, inverse: Tensor, s: Tensor, amax: Tensor, integer: Tensor
    ) -> Tensor:
        levels = (codes << 4).view(torch.int8) >> 4  # two's complement of four bits
        q = torch.where(integer, levels.float(), self.grid.decode(codes))
        return self._of(q, s, amax, integer)


def _level(y: Tensor) -> Tensor:
    """The nearest INT4 element of quotients that reach to 6; -0 + 0 = +0."""
    return (y * (7 / 6)).clamp_(-MOST, MOST).round_().add_(0.0)
