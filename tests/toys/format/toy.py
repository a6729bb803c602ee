"""Powers of two under a float scale, the greatest magnitude of the group; 2 bits are ternary.

    s = A  (1 where that is 0),    q in {0, +-2^(1 - K), .., +-1/2, +-1},  K = 2^(b-1) - 1

q is nearest to x / s, the smaller of two that are as near; dq = q s.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.formats.base import Format
from harness.formats.observers import absmax
from harness.formats.qtensor import Scales


@dataclass(frozen=True)
class PowerOfTwo(Format):
    """bits: 2 (ternary) | 3 | 4. A code is a sign bit and, below it, 0 or k for 2^(k - K)."""

    group_size: int | None = 32

    def __post_init__(self):
        super().__post_init__()
        self._choose("bits", 2, 3, 4)
        self._choose("observer", "minmax")
        if not self.symmetric:
            raise ConfigError("PowerOfTwo: symmetric=false: the grid has no zero point; set true.")

    @property
    def reach(self) -> tuple[float, float]:
        return -1.0, 1.0

    def _scales(self, blocks: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Scales:
        peak = absmax(blocks.to(self._compute(dtype))).to(dtype)
        return Scales(peak.masked_fill(peak == 0, 1))

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(s,)"""
        return (scales.scale.to(dtype),)

    def snap(self, x: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
        snapped = self._decode(self._encode(x, s), s)
        return snapped if out is None else out.copy_(snapped)

    def _encode(self, x: Tensor, s: Tensor) -> Tensor:
        points = self._points(x)
        code = torch.bucketize((x / s).abs(), (points[1:] + points[:-1]) / 2)
        negative = (x < 0) & (code > 0)
        return (code + negative * len(points)).to(torch.uint8)

    def _decode(self, codes: Tensor, s: Tensor) -> Tensor:
        points = self._points(s)
        signed = torch.cat([points, -points])
        return (signed[codes.int()] * s).add_(0.0)  # -0 + 0 = +0

    def _points(self, like: Tensor) -> Tensor:
        """The magnitudes [2^(b-1)] from 0 to 1, in the dtype of a tensor and where it lies."""
        least = 2 - 2 ** (self.bits - 1)
        return like.new_tensor([0.0, *(2.0**k for k in range(least, 1))])
