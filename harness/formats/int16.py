"""INT16: the integers of integer.py at 16 bits, a class of their own.

    symmetric     q = clamp(RNE(x / s), -32768, 32767)
    asymmetric    q = clamp(RNE(x / s) + z, 0, 65535)

A setting bits=16 leaves a part in the model's dtype everywhere; this format has one width, which no
setting names (bits: null). Source: AIMET, whose driver has activations of 16 bits on one calibrated
range a tensor beside weights of 4. Difference: ranges are the extremes of the calibration text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.formats.integer import Integer


@dataclass(frozen=True)
class Int16(Integer):
    """Integers of 16 bits; its knobs are Integer's."""

    bits: int = 16

    widths = (16,)

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        # floats of 16 bits have not all of its codes, so compute_dtype=input is float32 for them
        return torch.promote_types(super()._compute(dtype), torch.float32)

    def _encode(self, x: Tensor, *lattice: Tensor) -> Tensor:
        # codes without a sign reach beyond int16
        return self._level(x, *lattice).to(torch.int16 if self.signed else torch.int32)
