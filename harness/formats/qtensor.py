"""QTensor: a quantized tensor as it is stored, codes and scales, with the format that reads them.

What a solver returns, what evaluation dequantizes and what an export packs is this one thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from harness.formats.packing import pack_nibbles, unpack_nibbles


class CodeFormat(Protocol):
    """What a quantized tensor asks of its format (base.Format).

    The widths in bits of a code and of a zero point, whether codes carry a sign, and their values.
    """

    @property
    def bits(self) -> int: ...

    @property
    def zero_bits(self) -> int: ...

    @property
    def signed(self) -> bool: ...

    def decode(
        self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32
    ) -> Tensor: ...


@dataclass(frozen=True)
class Scales:
    """What is stored besides the codes, in storage dtypes.

    scale: [*lead, groups]; float32, bfloat16 or float16 (integer, FP4), float8_e4m3fn (NVFP4),
    uint8 E8M0 code (MX). zero: [*lead, groups] float32 zero points, None for symmetric and floating
    formats. global_scale: float32 [1], or [*lead, 1] with one per token; NVFP4's g, FourOverSix's
    amax, None elsewhere.
    """

    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """{field: tensor} of those that are there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in values.items() if t is not None}


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor.

    codes: [*shape] uint8 or int8, of INT16 int16 or int32. format: what reads them. dtype: that of
    the original.
    """

    codes: Tensor
    scales: Scales
    format: CodeFormat
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The values [*shape] in the original dtype."""
        return self.format.decode(self.codes, self.scales, self.dtype)

    def bits(self) -> int:
        """Stored bits: codes, scales, global scales, zero points.

        A zero point that is a code counts as one, an offset as a float (format.zero_bits).
        """
        total = self.codes.numel() * self.format.bits
        for name, t in self.scales.tensors().items():
            width = self.format.zero_bits if name == "zero" else 8 * t.element_size()
            total += t.numel() * width
        return total

    def state(self) -> dict[str, Tensor]:
        """Flat tensors for a file; codes of four bits or fewer are packed two a byte."""
        codes = pack_nibbles(self.codes) if self.format.bits <= 4 else self.codes.contiguous()
        return {"codes": codes, **self.scales.tensors()}

    @classmethod
    def from_state(
        cls,
        format: CodeFormat,
        state: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> QTensor:
        """Inverse of `state`; shape and dtype are those of the original tensor."""
        codes = state["codes"]
        if format.bits <= 4:
            codes = unpack_nibbles(codes, shape[-1], format.signed)
        scales = Scales(**{k: t for k, t in state.items() if k != "codes"})
        return cls(codes.view(shape), scales, format, dtype)

    def rows(self, rows: range) -> QTensor:
        """Those rows of a matrix [out, in], on the scales that are theirs."""
        chosen = slice(rows.start, rows.stop, rows.step)
        count = len(self.codes)
        # of what is there once for the whole matrix, they have all
        scales = {k: t[chosen] if len(t) == count else t for k, t in self.scales.tensors().items()}
        return replace(self, codes=self.codes[chosen], scales=Scales(**scales))

    def to(self, device: torch.device | str) -> QTensor:
        scales = Scales(**{k: t.to(device) for k, t in self.scales.tensors().items()})
        return replace(self, codes=self.codes.to(device), scales=scales)
