"""NVFP4: blocks of 16 E2M1 elements with an E4M3 scale, and one float32 scale a tensor or token.

    g = 2688 * (1 / max(amax, 2^-126)),  2688 = 448 * 6;  1 where that overflows
    per block:  u = g * (amax_b / 6),   s = E4M3(min(u, 448)), or 0.125 where u rounds to 0
                eff = s / g,            q = E2M1(clamp(x / eff, -6, 6)),      dq = q * eff

g is the encode multiplier that compressed-tensors files store. With a fixed decode scale t,
u = (amax_b / t) / 6 and g = 1 / t. Source: compressed-tensors, whose operation order this is, so
that an exported file decodes to the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.checks import number
from harness.config.errors import ConfigError
from harness.formats.base import Format, over
from harness.formats.floating import Floating
from harness.formats.grids import E4M3
from harness.formats.qtensor import Scales

TINY = 2.0**-126  # the least normal float32


@dataclass(frozen=True)
class NVFP4(Floating):
    """NVFP4. Besides the shared knobs:

    global_scale: amax (of the scope) | amax_256 (block scales reach 256, not 448) | fixed (decode
        scale fixed_decode_scale, AdaCodec's 1/6) | none (1).
    scope: of amax: tensor | token | static (calibrated, activations only).

    compute_dtype=input rounds amax, g and amax_b / 6 to x's dtype; block scales and elements are
    float32 always, as in compressed-tensors.
    """

    group_size: int | None = 16
    global_scale: str = "amax"
    fixed_decode_scale: float = 1 / 6
    scope: str = "tensor"

    def __post_init__(self):
        name = type(self).__name__
        super().__post_init__()
        self._choose("global_scale", "amax", "amax_256", "fixed", "none")
        number(f"{name}: fixed_decode_scale", self.fixed_decode_scale, TINY, 1 / TINY)
        self._choose("scope", "tensor", "token", "static")
        if self.group_size != 16:
            raise ConfigError(
                f"{name}: group_size={self.group_size} is not legal: an NVFP4 block has "
                "16 elements (granularity=group, group_size=16); FP4 takes other groups."
            )
        if self.role == "weight" and self.scope != "tensor":
            raise ConfigError(
                f"{name}: scope={self.scope} is for activations; a weight has scope=tensor."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        if self.global_scale == "fixed":
            return (*super().unread, "scope")
        if self.global_scale == "none":
            return (*super().unread, "scope", "fixed_decode_scale")
        return (*super().unread, "fixed_decode_scale")

    @property
    def needs_static(self) -> bool:
        return self.scope == "static" and self.global_scale in ("amax", "amax_256")

    @property
    def spans_tokens(self) -> bool:
        """The global scale is the tensor's own with scope=tensor and one of the amax kinds."""
        global_spans = self.scope == "tensor" and self.global_scale in ("amax", "amax_256")
        return global_spans or super().spans_tokens

    def dynamic(self) -> Format:
        return replace(self, scope="tensor") if self.needs_static else self

    # the global scale

    def global_from_amax(self, amax: Tensor) -> Tensor:
        """g, float32, from max |x| of the scope, [] gives [1], other shapes stay."""
        amax = amax.detach()
        if amax.ndim == 0:
            amax = amax.reshape(-1)
        if self.global_scale in ("fixed", "none"):
            return over(torch.ones((1,), device=amax.device), self._decode_scale)
        # As the reference computes it: a true division would often differ in the last bit.
        reach = 256 if self.global_scale == "amax_256" else E4M3.max
        amax = amax.to(self._compute(amax.dtype)).clamp(min=TINY)
        g = amax.reciprocal() * (reach * self.grid.max)
        return g.masked_fill(g.isinf(), 1).float()

    @property
    def _decode_scale(self) -> float:
        return self.fixed_decode_scale if self.global_scale == "fixed" else 1.0

    def _global(self, x: Tensor, global_scale: Tensor | None) -> Tensor:
        if global_scale is not None:
            if global_scale.numel() == 1 and self.scope != "token":
                return global_scale.reshape(1)
            return global_scale
        if self.needs_static:
            raise ConfigError(
                f"{type(self).__name__}: scope=static needs a calibrated global scale and "
                "got none; calibrate activations, or set scope=tensor or scope=token."
            )
        if self.global_scale in ("fixed", "none"):
            return self.global_from_amax(x.new_zeros(1))
        if self.scope == "token":
            return self.global_from_amax(x.abs().amax(-1, keepdim=True))
        return self.global_from_amax(x.abs().amax())

    # block scales

    def _store(self, peak: Tensor, a: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Scales:
        if self.global_scale in ("fixed", "none"):
            u = over(over(peak.float(), self._decode_scale), 6.0)
        else:
            u = global_scale * a
        u = torch.threshold(u, 2.0**-10, 0.125)  # half the least E4M3 number, a tie, rounds to 0
        return Scales(u.clamp(max=E4M3.max).to(torch.float8_e4m3fn), None, global_scale)

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        # from the least E4M3 number on, so that no scale becomes 0; one of 0 (FourOverSix) stays
        before = E4M3.decode(scales.scale.view(torch.uint8))
        scale = (before * factor).clamp(2.0**-9, E4M3.max).masked_fill(before == 0, 0)
        return replace(scales, scale=scale.to(torch.float8_e4m3fn))

    def nearby(self, scales: Scales) -> Iterator[Scales]:
        """The E4M3 codes up to 4 below and 10 above: of -20 .. +12, all but .4 % of the best."""
        code = scales.scale.view(torch.uint8).short()
        for offset in sorted(range(-4, 11), key=abs)[1:]:
            shifted = (code + offset).clamp(1, 126).to(torch.uint8)
            yield replace(scales, scale=shifted.view(torch.float8_e4m3fn))

    # elements

    def _element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(s / g,)"""
        assert scales.global_scale is not None  # `_store` puts it beside every block scale
        return (E4M3.decode(scales.scale.view(torch.uint8)) / scales.global_scale,)
