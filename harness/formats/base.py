"""Format: how a tensor becomes codes and scales.

A tensor is split in blocks that share one scale (geometry.py). A format is four maps, on what it is
set to (settings.py):

    scales          observes the groups
    lattice         turns stored scales into the tensors that the arithmetic needs
    snap            moves x to the nearest lattice point
    encode, decode  do the same through integer codes

`fake` is snap alone, in pieces that fit a cache, and equals `quantize(x).dequantize()` in every
bit. Zeros come out as +0.

All arithmetic is float32 unless compute_dtype=input (that of x), with one cast to x's dtype at the
end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.errors import DataError
from harness.formats.qtensor import QTensor, Scales
from harness.formats.settings import Settings

# Elements worked on at once on a CPU, so that input, output and one temporary stay in its cache.
CHUNK = 2**17


@dataclass(frozen=True)
class Format(Settings, ABC):
    """Tensors to codes and scales and back; a format of its own says what the abstract ones do."""

    signed = False  # whether codes are two's complement integers
    slack = 0.0  # steps beyond the outermost lattice points that round to them without a clamp
    needs_static = False  # whether scales need a calibrated global_scale

    def scales(
        self, x: Tensor, global_scale: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Scales:
        """Scales of x [*lead, n] by the observer.

        global_scale: given for NVFP4 with a static or shared one. dtype: dtype of the stored tensor
        where x is a float32 working copy of it. Raises DataError if x is a weight that is not
        finite.
        """
        if self.role == "weight" and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise DataError(
                f"{bad} of {x.numel()} values of a weight are NaN or Inf; "
                "mend or exclude it before quantizing"
            )
        global_scale = self._global(x, global_scale)
        return self._scales(self.split(x), global_scale, dtype or x.dtype)

    def global_from_amax(self, amax: Tensor) -> Tensor | None:
        """The global scale of a tensor whose max |x| is amax.

        float32 [1], or amax's shape from one dimension on; None where the format has none.
        """
        return None

    def calibrated(self, low: Tensor, high: Tensor) -> Tensor | None:
        """What `fake` takes as global_scale where activations were seen from `low` to `high`.

        low, high: [] each. None where nothing is static.
        """
        return self.global_from_amax(torch.maximum(-low, high))

    def dynamic(self) -> Format:
        """This format with scales that follow from each tensor alone.

        It stands in for this one before anything is calibrated.
        """
        return self

    def _global(self, x: Tensor, global_scale: Tensor | None) -> Tensor | None:
        """The global scale that x is quantized with, where `global_scale` is what a caller gave."""
        return None

    @abstractmethod
    def _scales(self, blocks: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Scales:
        """Scales of blocks [*lead, groups, group] of a tensor stored as dtype."""

    @abstractmethod
    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """What snap needs, each [*lead, groups].

        In the arithmetic's dtype: that of x where compute_dtype=input.
        """

    @abstractmethod
    def snap(self, x: Tensor, *lattice: Tensor, out: Tensor | None = None) -> Tensor:
        """The lattice point nearest to x, in x's units; elementwise with broadcasting.

        out may be x.
        """

    @abstractmethod
    def _encode(self, x: Tensor, *lattice: Tensor) -> Tensor:
        """Code of the lattice point nearest to x, elementwise."""

    @abstractmethod
    def _decode(self, codes: Tensor, *lattice: Tensor) -> Tensor:
        """Lattice point of a code, elementwise."""

    @property
    def reach(self) -> tuple[float, float]:
        """The least and greatest lattice point of a format without zero point, in steps."""
        raise NotImplementedError

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        """Stored scales times a positive factor [*lead, groups].

        Rounded as they are stored; the global scale stays.
        """
        return replace(scales, scale=(scales.scale * factor).to(scales.scale.dtype))

    def clipped(self, scales: Scales, low: Tensor, high: Tensor) -> Scales:
        """Stored scales of a range whose ends were multiplied by low and high [*lead, groups].

        Rounded as they are stored; a lattice without zero points takes the greater of the two.
        """
        return self.rescaled(scales, torch.maximum(low, high))

    def offset(self, scales: Scales) -> Tensor | float:
        """What a value has that does not grow with its scale, [*lead, groups] or 0."""
        return 0.0

    def nearby(self, scales: Scales) -> Iterator[Scales]:
        """Other scales that a search by error may try around those of the extremes, nearest first.

        Ranges shrunk to .975, .95, .. .2 here.
        """
        for step in range(1, 33):
            yield self.rescaled(scales, scales.scale.new_full((), 1 - step / 40))

    def project(self, x: Tensor, scales: Scales) -> Tensor:
        """decode(encode(x)) [*lead, n] in float32, without codes where the arithmetic is that."""
        if self._element(x.dtype) != torch.float32:
            return self.decode(self.encode(x, scales), scales)
        lattice = (t.unsqueeze(-1) for t in self.lattice(scales))
        return self.join(self.snap(self.split(x).float(), *lattice), x.shape)

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes [*lead, n] of x [*lead, n]: int8 or uint8, of INT16 int16 or int32."""
        dtype = self._element(x.dtype)
        lattice = (t.unsqueeze(-1) for t in self.lattice(scales, dtype))
        return self.join(self._encode(self.split(x).to(dtype), *lattice), x.shape)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [*lead, n] of codes [*lead, n], in dtype."""
        lattice = (t.unsqueeze(-1) for t in self.lattice(scales, self._element(dtype)))
        return self.join(self._decode(self.split(codes), *lattice), codes.shape).to(dtype)

    def quantize(
        self,
        x: Tensor,
        scales: Scales | None = None,
        global_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> QTensor:
        """x [*lead, n] as codes.

        scales: frozen ones (of a solver), or those of x. dtype: that of the stored tensor, if not
        x's.
        """
        scales = scales or self.scales(x, global_scale, dtype)
        return QTensor(self.encode(x, scales), scales, self, dtype or x.dtype)

    def fake(
        self,
        x: Tensor,
        ste: bool = False,
        global_scale: Tensor | None = None,
        twice: int = 0,
    ) -> Tensor:
        """quantize(x).dequantize() without the codes, bit for bit.

        ste: with the straight-through gradient, x + (dq - x). twice: of so many leading features
        the residual is quantized, too, Q(x) + Q(x - Q(x)), on the same global scale.
        """
        with torch.no_grad():
            global_scale = self._global(x, global_scale)
            dq = self._fake(x, global_scale)
            if twice:
                leading = dq[..., :twice]
                leading += self._fake(x[..., :twice] - leading, global_scale)
        return straight_through(x, dq) if ste else dq

    def _fake(self, x: Tensor, global_scale: Tensor | None) -> Tensor:
        # a GPU has no such cache to fit, and a group of several rows cannot be had in pieces
        if x.device.type != "cpu" or self.spans_rows:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return self._fake_rows(x, global_scale, out)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows.shape, dtype=x.dtype)
        step = max(1, CHUNK // x.shape[-1])
        g = global_scale
        for i in range(0, len(rows), step):
            if global_scale is not None and global_scale.ndim > 1:  # one a row
                g = global_scale.reshape(-1, 1)[i : i + step]
            self._fake_rows(rows[i : i + step], g, out[i : i + step])
        return out.view(x.shape)

    def _fake_rows(self, x: Tensor, global_scale: Tensor | None, out: Tensor) -> Tensor:
        blocks = self.split(x)
        work = blocks.to(self._element(x.dtype))
        # Where elements and scales are worked in one dtype, the copy in it serves both.
        observed = work if work.dtype == self._compute(x.dtype) else blocks
        scales = self._scales(observed, global_scale, x.dtype)
        lattice = (t.unsqueeze(-1) for t in self.lattice(scales, work.dtype))
        # without a cast or padding at the end, the result can be written where it belongs
        whole = work.numel() == out.numel() and self.granularity != "block"
        if whole and work.dtype == out.dtype:
            self.snap(work, *lattice, out=self.split(out))
            return out
        return out.copy_(self.join(self.snap(work, *lattice), x.shape))


def straight_through(x: Tensor, dq: Tensor) -> Tensor:
    """dq in value (to one ulp), x in gradient: x + (dq - x)."""
    return x + (dq - x).detach()


def over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded.

    On a GPU torch multiplies by the reciprocal of a Python number instead.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
