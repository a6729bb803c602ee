"""Plain FP4: E2M1 elements with a float scale, for any group, channel or tensor.

    s = A / 6  (1 where that is 0),    q = E2M1(x / s),    dq = q * s

Source: FP-Quant (its `fp` format).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.formats.floating import Floating
from harness.formats.qtensor import Scales
from harness.formats.settings import SCALE_DTYPES


@dataclass(frozen=True)
class FP4(Floating):
    """E2M1 with float scales.

    scale_dtype: float32 | bf16 | fp16 | input, rounded before the codes are computed.
    """

    group_size: int | None = 32
    scale_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        self._choose("scale_dtype", *SCALE_DTYPES, "input")

    def _store(
        self, peak: Tensor, a: Tensor, global_scale: Tensor | None, dtype: torch.dtype
    ) -> Scales:
        s = a.to(SCALE_DTYPES.get(self.scale_dtype, dtype))
        return Scales(s.masked_fill(s == 0, 1))

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(s,)"""
        return (scales.scale.to(dtype),)
