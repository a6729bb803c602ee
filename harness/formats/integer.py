"""INT-b, b = 2 .. 8, symmetric or asymmetric, with a float scale.

With m, M the least and greatest value of a group, A = max(|m|, |M|), Q = 2^(b-1) - 1, N = 2^b - 1:

    symmetric    s = A / Q                           q = clamp(RNE(x / s), -Q - 1, Q)
                                                     dq = s * q
    asymmetric   s = (M - m) / N,  z = RNE(-m / s)   q = clamp(RNE(x / s) + z, 0, N)
                                                     dq = s * (q - z)

Sources: QuaRot and SpinQuant (the defaults), compressed-tensors (half_range, add_then_round,
signed, eps), FP-Quant (half_range, add_then_round, incl0=never, one), AIMET (aimet).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.formats.base import Format, over
from harness.formats.integer_settings import IntegerSettings
from harness.formats.observers import absmax, search
from harness.formats.qtensor import Scales
from harness.formats.settings import SCALE_DTYPES

HALF = torch.finfo(torch.float16).max
FLOOR = 1e-5  # least range of a weight's group


@dataclass(frozen=True)
class Integer(IntegerSettings):
    """The integers that its settings describe (integer_settings.py)."""

    def calibrated(self, low: Tensor, high: Tensor) -> Tensor | None:
        """The range itself, [2]."""
        return torch.stack([low, high]) if self.needs_static else None

    def dynamic(self) -> Format:
        return replace(self, range="dynamic")

    # scales

    def _global(self, x: Tensor, global_scale: Tensor | None) -> Tensor | None:
        if self.needs_static and global_scale is None:
            raise ConfigError(
                "Integer: range=static needs a calibrated range and got none; "
                "calibrate activations, or set range=dynamic."
            )
        return global_scale if self.needs_static else None

    def _extremes(self, blocks: Tensor, calibrated: Tensor | None) -> tuple[Tensor, Tensor]:
        """The range (lo, hi) of each group after clip, incl0 and the rules for degenerate groups.

        calibrated: a range [2] that stands for that of every group.
        """
        if calibrated is not None:
            blocks = calibrated.to(blocks).expand(*blocks.shape[:-1], 2)
        if self.symmetric and self.int_scale != "aimet":
            hi = absmax(blocks) * self.clip
            lo = -hi
        else:
            lo = blocks.amin(-1) * self.clip
            hi = blocks.amax(-1) * self.clip
        if self.spans_zero:
            lo = lo.clamp(max=0)
            hi = hi.clamp(min=0)
        if self.degenerate == "auto":
            lo, hi = self._widened(lo, hi)
        return lo, hi

    def _widened(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The ranges under degenerate=auto: where one has no width, a width that represents it."""
        if self.symmetric and self.role == "weight":
            return lo, hi.clamp(min=FLOOR)
        if self.symmetric or self.shifted:  # mended where s is known
            return lo, hi
        constant = lo == hi  # has no range of its own; one that reaches to zero represents it
        lo = torch.where(constant, lo.clamp(max=0), lo)
        hi = torch.where(constant, hi.clamp(min=0), hi)
        empty = (lo == 0) & (hi == 0)
        return lo.masked_fill(empty, -1), hi.masked_fill(empty, 1)

    def _step(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The unguarded scale of a range."""
        levels = 2**self.bits - 1
        if not self.symmetric:
            return over(hi - lo, levels)
        if self.int_scale == "half_range":
            return over(hi, levels / 2)
        s = over(hi, levels // 2)
        if self.int_scale == "aimet":
            s = torch.maximum(s, over(-lo, levels // 2 + 1))
        return s

    def _parameters(self, lo: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(s,) or (s, z) from an unguarded scale.

        s is rounded as a tensor stored as `dtype` has it, but in the arithmetic's dtype, and
        without zeros.
        """
        s = s.to(self._storage(dtype))
        if self.scale_dtype == "bf16":  # its exponents reach beyond those of a float16 tensor
            s = s.to(dtype)
        s = s.to(lo.dtype)
        empty = s == 0
        guarded = s.masked_fill(empty, torch.finfo(s.dtype).eps if self.degenerate == "eps" else 1)
        if self.symmetric:
            return (guarded,)
        # eps and one divide by the unguarded s, as the libraries do that they stand for
        z = self._zero_point(lo, guarded if self.degenerate == "auto" else s)
        if self.degenerate == "eps":
            z = z.masked_fill(empty, 0)
        return guarded, z

    def _zero_point(self, lo: Tensor, s: Tensor) -> Tensor:
        """z of ranges that begin at lo."""
        if self.shifted:
            return lo.clamp(-HALF, HALF).half().to(lo) if self.zp == "half_offset" else lo
        z = (self.qmin - lo / s).round()
        if self.spans_zero:
            z = z.clamp(self.qmin, self.qmax)
        return z

    def _storage(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the scales of a tensor stored as dtype."""
        return SCALE_DTYPES.get(self.scale_dtype, dtype)

    def _scales(self, blocks: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Scales:
        blocks = blocks.to(self._compute(dtype))
        lo, hi = self._extremes(blocks, global_scale)
        s = self._step(lo, hi)
        floored = self.shifted or (
            self.degenerate == "auto" and self.role == "weight" and not self.symmetric
        )
        if floored:
            s = over((hi - lo).clamp(min=FLOOR), 2**self.bits - 1)
        parameters = self._parameters(lo, s, dtype)
        if self.observer == "mse":
            candidates = self._candidates(blocks, lo, hi, s, dtype)
            parameters = search(blocks, parameters, candidates, self._mse)
        scale = parameters[0].to(self._storage(dtype))
        if self.symmetric:
            return Scales(scale)
        return Scales(scale, parameters[1].float() + 0.0)  # -0 + 0 = +0

    def _candidates(
        self, blocks: Tensor, lo: Tensor, hi: Tensor, s: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """((s,) or (s, z), dq) of every shrink factor."""
        for p in self._mse.factors:
            if self._mse.shrink == "range":
                candidate = self._parameters(p * lo, self._step(p * lo, p * hi), dtype)
            else:
                candidate = self._parameters(lo, p * s, dtype)
            yield candidate, self.snap(blocks, *(t.unsqueeze(-1) for t in candidate))

    def clipped(self, scales: Scales, low: Tensor, high: Tensor) -> Scales:
        if scales.zero is None:
            return super().clipped(scales, low, high)
        s, z = self.lattice(scales)
        first, last = (self._value(torch.full_like(s, code), s, z) for code in self.reach)
        factor = (last * high - first * low) / (last - first)
        moved = self.rescaled(scales, factor)
        zero = self._zero_point(first * low, moved.scale.to(s))
        return replace(moved, zero=zero + 0.0)  # -0 + 0 = +0

    def offset(self, scales: Scales) -> Tensor | float:
        if self.shifted and scales.zero is not None:
            return scales.zero
        return super().offset(scales)

    def nearby(self, scales: Scales) -> Iterator[Scales]:
        """Symmetric: the step times .975, .95, .. .2. Asymmetric: ranges whose ends, lower end or
        upper end are multiplied by .96, .92, .. .2."""
        if scales.zero is None:
            yield from super().nearby(scales)
            return
        one = torch.ones_like(scales.zero)
        for step in range(1, 21):
            shrunk = one * (1 - step / 25)
            for low, high in ((shrunk, shrunk), (shrunk, one), (one, shrunk)):
                yield self.clipped(scales, low, high)

    # elements

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(s,) or (s, z)."""
        s = scales.scale.to(dtype)
        return (s,) if scales.zero is None else (s, scales.zero.to(dtype))

    def _level(
        self, x: Tensor, s: Tensor, z: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The code of x as a float. RNE may leave -0, which no integer is: adding 0 makes it +0."""
        if z is None:
            q = torch.div(x, s, out=out).round_()
        elif self.shifted:
            q = torch.sub(x, z, out=out).div_(s).round_()
        elif self.zp_order == "round_then_add":
            q = torch.div(x, s, out=out).round_().add_(z)
        else:
            q = torch.div(x, s, out=out).add_(z).round_().add_(0.0)
        return q.clamp_(self.qmin, self.qmax)

    def _value(self, q: Tensor, s: Tensor, z: Tensor | None = None) -> Tensor:
        """The value of a float code, in place."""
        if z is None:
            return q.add_(0.0).mul_(s)
        if self.shifted:
            return q.mul_(s).add_(z)
        return q.sub_(z).mul_(s)

    def snap(self, x: Tensor, *lattice: Tensor, out: Tensor | None = None) -> Tensor:
        return self._value(self._level(x, *lattice, out=out), *lattice)

    def _encode(self, x: Tensor, *lattice: Tensor) -> Tensor:
        return self._level(x, *lattice).to(torch.int8 if self.signed else torch.uint8)

    def _decode(self, codes: Tensor, *lattice: Tensor) -> Tensor:
        return self._value(codes.to(lattice[0].dtype), *lattice)
