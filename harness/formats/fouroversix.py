"""Four Over Six: NVFP4 whose blocks choose between mapping their maximum to 6 and to 4.

    E = 1536 / amax,    1536 = 256 * 6
    h = (amax_b / 6) * E,    s6 = E4M3(h),    s4 = E4M3(1.5 * h)
    per candidate:  q = E2M1(clamp(x * (1 / (s / E)), -6, 6)),    dq = ((q * s) * amax) / 1536

4 is taken where its error is strictly less. Block scales reach 256, since 1.5 * 448 would overflow
E4M3 and 256 and 384 are E4M3 numbers. The stored global scale is amax itself; a compressed-tensors
file takes `encode_multiplier`, 1536 / amax. Source: FourOverSix (repository
mit-han-lab/fouroversix).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.formats.base import over
from harness.formats.grids import E4M3
from harness.formats.nvfp4 import NVFP4
from harness.formats.observers import absmax
from harness.formats.qtensor import Scales


@dataclass(frozen=True)
class FourOverSix(NVFP4):
    """NVFP4 with adaptive block scaling.

    choose: mse (sum of squares) | mae (sum of |.|) | abs_max (greatest |.|), the error that
        decides.

    Arithmetic is float32, the observer minmax, and global_scale amax_256; other values raise
    ConfigError.
    """

    PRODUCT: ClassVar[float] = 1536.0  # the greatest element times the greatest block scale
    SCALE: ClassVar[str] = "amax_256"  # the one global_scale that goes with it

    global_scale: str = SCALE
    choose: str = "mse"

    def __post_init__(self):
        super().__post_init__()
        self._choose("choose", "mse", "mae", "abs_max")
        for field, only in (
            ("observer", "minmax"),
            ("compute_dtype", "float32"),
            ("global_scale", self.SCALE),
        ):
            if getattr(self, field) != only:
                raise ConfigError(
                    f"{type(self).__name__}: {field}={getattr(self, field)} is not legal: "
                    f"it defines its own scales, so only {field}={only}; NVFP4 takes the others."
                )

    def global_from_amax(self, amax: Tensor) -> Tensor:
        """amax itself, float32."""
        amax = amax.detach().float()
        return amax.reshape(1) if amax.ndim == 0 else amax

    @classmethod
    def encode_multiplier(cls, amax: Tensor) -> Tensor:
        """1536 / amax, 1 where that overflows: the global scale g of a compressed-tensors file."""
        E = torch.full_like(amax, cls.PRODUCT) / amax
        return E.masked_fill(E.isinf(), 1)

    def _scales(self, blocks: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Scales:
        x = blocks.float()
        h = over(absmax(x), 6.0) * self.encode_multiplier(global_scale)
        six, four = (
            Scales(u.clamp(max=E4M3.max).to(torch.float8_e4m3fn), None, global_scale)
            for u in (h, h * 1.5)
        )
        better = self._error(x, four) < self._error(x, six)
        # through bytes: torch.where takes no float8
        codes = torch.where(better, four.scale.view(torch.uint8), six.scale.view(torch.uint8))
        return Scales(codes.view(torch.float8_e4m3fn), None, global_scale)

    def _error(self, x: Tensor, scales: Scales) -> Tensor:
        """The error of each block [*lead, groups], in the measure that `choose` names."""
        d = self.snap(x, *(t.unsqueeze(-1) for t in self.lattice(scales))).sub_(x)
        if self.choose == "mse":
            return d.square_().sum(-1)
        if self.choose == "mae":
            return d.abs_().sum(-1)
        return d.abs_().amax(-1)

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(1 / (s / E), 0 where s = 0;  s;  amax)"""
        amax = scales.global_scale
        assert amax is not None  # `_scales` stores it with every tensor
        s = E4M3.decode(scales.scale.view(torch.uint8))
        effective = s * self.encode_multiplier(amax).reciprocal()
        return effective.reciprocal().masked_fill(s == 0, 0), s, amax.expand_as(s)

    def snap(
        self, x: Tensor, inverse: Tensor, s: Tensor, amax: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return self._value(self.grid.round_(torch.mul(x, inverse, out=out), self.fp4_ties), s, amax)

    def _value(self, q: Tensor, s: Tensor, amax: Tensor) -> Tensor:
        return (
            q.mul_(s).mul_(amax).div_(torch.full((), self.PRODUCT, device=q.device))
        )  # see `over`

    def _encode(self, x: Tensor, inverse: Tensor, s: Tensor, amax: Tensor) -> Tensor:
        return self.grid.encode(self.grid.round_(x * inverse, self.fp4_ties), x < 0)

    def _decode(self, codes: Tensor, inverse: Tensor, s: Tensor, amax: Tensor) -> Tensor:
        return self._value(self.grid.decode(codes), s, amax)
