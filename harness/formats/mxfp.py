"""MXFP4, MXFP6, MXFP8: blocks of 32 elements with a power-of-two scale.

The scale 2^(k - 127) is stored as its E8M0 code k. With E and mant the exponent field and the low
23 bits of the block's amax as a float32:

    floor     k = E - emax                                      OCP v1.0
    ceil      k = E + (mant != 0) - emax
    even      k = exponent of (bits + 2^(22 - mb)) - emax       mb mantissa bits; serving engines
    rceil     least k with 2^(k - 127) >= amax / max            NVIDIA's conversion
    fpquant   scale 4/3 of floor's, stored as 2^(k - 127) / 3 with k = E (exported by fp_quant only)

    q = cast(clamp(x / 2^(k - 127))),    dq = q * 2^(k - 127)

Sources: OCP Microscaling (MX) v1.0, section 6.3; torchao (ceil, even, rceil); FP-Quant and Quartet
(fpquant).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.formats.base import over
from harness.formats.floating import Floating
from harness.formats.grids import GRIDS, Grid
from harness.formats.qtensor import Scales

NAN = 255  # the E8M0 code of NaN


@dataclass(frozen=True)
class MX(Floating):
    """MX block formats.

    element: e2m1 (4 bits) | e2m3 | e3m2 (6) | e4m3 | e5m2 (8).
    mx_scale: table above.
    mx_even_mbits: element | 1, mb of mx_scale=even.

    compute_dtype=input matters to observer=mse and to mx_scale=fpquant, whose scale and elements it
    rounds to x's dtype (unless that is float16, which lacks small scales); all else is exact in
    either.
    """

    group_size: int | None = 32
    element: str = "e2m1"
    mx_scale: str = "floor"
    mx_even_mbits: str | int = "element"

    def __post_init__(self):
        self._choose("element", *GRIDS)  # first, for the shared checks ask for the grid
        super().__post_init__()
        self._choose("mx_scale", "floor", "ceil", "even", "rceil", "fpquant")
        self._choose("mx_even_mbits", "element", 1)
        if self.group_size != 32:
            raise ConfigError(
                f"MX: group_size={self.group_size} is not legal: an MX block has 32 elements "
                "(granularity=group, group_size=32); FP4 takes other groups."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        if self.mx_scale == "even":
            return super().unread
        return (*super().unread, "mx_even_mbits")

    @property
    def grid(self) -> Grid:
        return GRIDS[self.element]

    def _store(
        self, peak: Tensor, a: Tensor, global_scale: Tensor | None, dtype: torch.dtype
    ) -> Scales:
        if self.mx_scale == "rceil":
            # up to 2^22, a subnormal of at most 2^-127, the least scale will do
            bits = over(peak.float(), self.grid.max).view(torch.int32)
            k = torch.where(bits <= 1 << 22, 0, (bits + 0x7FFFFF) >> 23)
        else:
            bits = peak.float().view(torch.int32)
            mantissa = 1 if self.mx_even_mbits == 1 else self.grid.mantissa
            # added below the exponent bits, it carries into them where k is to be one more
            carry = {"ceil": 0x7FFFFF, "even": 1 << (22 - mantissa)}.get(self.mx_scale, 0)
            k = (bits + carry) >> 23
            if self.mx_scale == "fpquant":
                k = k.clamp(min=1)
            else:
                k = k - self.grid.emax
        k = k.clamp(0, NAN - 1).masked_fill(peak.isnan(), NAN)
        return Scales(k.to(torch.uint8))

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        # only powers of two can be stored, so the factor is rounded to one
        code = (scales.scale + factor.log2().round()).clamp(0, NAN - 1)
        return Scales(code.to(torch.uint8).where(scales.scale != NAN, NAN))

    def nearby(self, scales: Scales) -> Iterator[Scales]:
        """Twice and half the scale; nothing clips at twice that of mx_scale=floor."""
        for offset in (1, -1):
            code = (scales.scale.short() + offset).clamp(0, NAN - 1).to(torch.uint8)
            yield replace(scales, scale=code.where(scales.scale != NAN, NAN))

    def _element(self, dtype: torch.dtype) -> torch.dtype:
        """float32 but for FP-Quant's scale.

        float16 lacks most of the scales, and products with powers of two are exact. FP-Quant's
        scale is no such power but rounded to x's dtype, so its elements are, too.
        """
        rounded = self.mx_scale == "fpquant" and dtype != torch.float16
        return super()._element(dtype) if rounded else torch.float32

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(2^(k - 127),), a third of it for mx_scale=fpquant."""
        scale = scales.scale.view(torch.float8_e8m0fnu).to(dtype)
        if self.mx_scale == "fpquant":
            scale = over(scale, 3.0)
        return (scale,)
