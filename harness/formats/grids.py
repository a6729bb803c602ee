"""Element grids: the values a 4, 6 or 8 bit float can take, and how a float32 is cast to them.

A grid has m mantissa bits and a least exponent emin. With a = min(|x|, max) and
e = max(floor(log2 a), emin),

    step = 2^(e - m),        cast(x) = sign(x) * RNE(a / step) * step,

where e is read from the exponent bits of the float32, never from log2(). Adding and subtracting
1.5 * 2^23 * step leaves RNE(x / step) * step, because float32 has no finer digit at that magnitude;
no table is searched. A cast to zero gives +0. The sign of zero lives in the codes only: a strictly
negative x that rounds to zero has code -0.

Sources: OCP Microscaling (MX) v1.0, section 5.3; OCP 8-bit Floating Point v1.0.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT = 0x7F800000  # the exponent bits of a float32


@dataclass(frozen=True)
class Grid:
    """A small float of `bits` bits.

    mantissa: m of them. emin, emax: least and greatest exponent. max: greatest value.
    """

    name: str
    bits: int
    mantissa: int
    emin: int
    emax: int
    max: float

    def round_(self, x: Tensor, ties: str = "even") -> Tensor:
        """Cast x (any float dtype and shape) to the grid in place, saturating.

        NaN stays NaN. ties: even | zero | away.
        """
        if x.dtype != torch.float32:
            return x.copy_(self.round_(x.float(), ties))
        x.clamp_(-self.max, self.max)
        power = (
            x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32).clamp_(min=2.0**self.emin)
        )
        if ties == "even":
            shift = 1.5 * 2.0 ** (23 - self.mantissa)
            return x.add_(power, alpha=shift).sub_(power, alpha=shift)
        step = power.mul_(2.0**-self.mantissa)
        exact = x.abs().div_(step)
        even = exact.round()
        tie = exact.sub_(even)  # exact: within half a step of its rounding
        if ties == "away":
            even += tie == 0.5
        else:
            even -= (tie == -0.5).float()
        return x.copy_(torch.copysign(even.mul_(step), x)).add_(0.0)  # -0 + 0 = +0

    def encode(self, q: Tensor, negative: Tensor) -> Tensor:
        """Bit patterns (uint8) of grid values q; the boolean tensor `negative` gives the signs."""
        a = q.abs().float()
        normal = (a.view(torch.int32) >> (23 - self.mantissa)) - (
            (126 + self.emin) << self.mantissa
        )
        subnormal = (a * 2.0 ** (self.mantissa - self.emin)).int()
        code = torch.where(a < 2.0**self.emin, subnormal, normal).to(torch.uint8)
        return code.bitwise_or_(negative.to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of bit patterns (uint8, any shape)."""
        values = _values(self, codes.device)
        return values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@functools.cache
def _values(grid: Grid, device: torch.device) -> Tensor:
    """The value of every bit pattern, float32 [2^bits].

    Patterns beyond `max` (E4M3's 0x7F, E5M2's Inf) are NaN.
    """
    code = torch.arange(2 ** (grid.bits - 1))
    exponent = code >> grid.mantissa
    fraction = code & (2**grid.mantissa - 1)
    significand = fraction + (exponent > 0) * 2**grid.mantissa
    a = significand * torch.exp2((exponent.clamp(min=1) + grid.emin - 1 - grid.mantissa).double())
    a = torch.where(a > grid.max, torch.nan, a).float()
    return torch.cat([a, 0.0 - a]).to(device)


E2M1 = Grid("e2m1", 4, mantissa=1, emin=0, emax=2, max=6.0)
E2M3 = Grid("e2m3", 6, mantissa=3, emin=0, emax=2, max=7.5)
E3M2 = Grid("e3m2", 6, mantissa=2, emin=-2, emax=4, max=28.0)
E4M3 = Grid("e4m3", 8, mantissa=3, emin=-6, emax=8, max=448.0)
E5M2 = Grid("e5m2", 8, mantissa=2, emin=-14, emax=15, max=57344.0)
GRIDS = {grid.name: grid for grid in (E2M1, E2M3, E3M2, E4M3, E5M2)}
