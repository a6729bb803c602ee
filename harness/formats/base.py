"""Format: how a tensor becomes codes and scales.

A tensor is split in blocks that share one scale (geometry.py). A format is four maps:

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.config.checks import boolean, integer, one_of
from harness.config.errors import ConfigError, DataError
from harness.formats.geometry import Geometry
from harness.formats.observers import MSE
from harness.formats.qtensor import QTensor, Scales

# Elements worked on at once on a CPU, so that input, output and one temporary stay in its cache.
CHUNK = 2**17
# Observers that leave the choice of a weight's scales to its solver, which has a Hessian.
UNDER_HESSIAN = ("hessian", "hessian_diagonal")


@dataclass(frozen=True)
class Format(Geometry, ABC):
    """The knobs that all formats share.

    granularity: tensor | channel (weight row) | token (activation row) | group (of group_size
        elements); FP8 has another.
    observer: minmax | mse (its knobs in `mse`) | hessian | hessian_diagonal (of weights: solvers
        choose among `nearby` of minmax's scales; solvers/search.py).
    compute_dtype: float32 | input.
    pad: error | zero, for a last axis that the group does not divide.
    role: weight | activation; a weight must be finite, and degenerate integer groups differ.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = None
    symmetric: bool = True
    observer: str = "minmax"
    mse: MSE | Mapping = field(default_factory=MSE)
    compute_dtype: str = "float32"
    pad: str = "error"
    role: str = "weight"

    signed = False  # whether codes are two's complement integers
    slack = 0.0  # steps beyond the outermost lattice points that round to them without a clamp
    needs_static = False  # whether scales need a calibrated global_scale

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.mse, MSE):
            # the one way to set a field of a frozen class
            object.__setattr__(self, "mse", MSE.of(self.mse, f"{name}: mse"))
        self._choose("granularity", *self.granularities)
        boolean(f"{name}: symmetric", self.symmetric)
        self._choose("observer", "minmax", "mse", *UNDER_HESSIAN)
        self._choose("compute_dtype", "float32", "input")
        self._choose("pad", "error", "zero")
        self._choose("role", "weight", "activation")
        integer(f"{name}: group_size", self.group_size, optional=True)
        if self.under_hessian and self.role == "activation":
            raise ConfigError(
                f"{name}: observer={self.observer} is for weights: an activation's scales follow "
                "from what is read; set observer=minmax or mse."
            )
        if self.under_hessian and self.spans_rows:
            raise ConfigError(
                f"{name}: observer={self.observer} with granularity={self.granularity}: a scale "
                "spans rows; set granularity=channel or group, or observer=mse."
            )
        if (self.role, self.granularity) in (("weight", "token"), ("activation", "channel")):
            other = {"token": "channel", "channel": "token"}[self.granularity]
            raise ConfigError(
                f"{name}: granularity={self.granularity} is not for role={self.role}; "
                f"set granularity={other}."
            )
        if (self.granularity in ("group", "block")) != (self.group_size is not None):
            raise ConfigError(
                f"{name}: group_size={self.group_size} contradicts granularity={self.granularity}: "
                "a group needs a size, and nothing else has one (group_size=null)."
            )

    def _choose(self, field: str, *legal) -> None:
        """Refuse a value of `field` that is not one of `legal`."""
        one_of(f"{type(self).__name__}: {field}", getattr(self, field), legal)

    @property
    def _mse(self) -> MSE:
        """The knobs of the grid search; a mapping given as `mse` does not stay one."""
        assert isinstance(self.mse, MSE)
        return self.mse

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields without effect as the others are set."""
        return () if self.observer == "mse" else ("mse",)

    @property
    def under_hessian(self) -> bool:
        """Whether scales are to be chosen by the error under the Hessian of what is read."""
        return self.observer in UNDER_HESSIAN

    @property
    def zero_bits(self) -> int:
        return self.bits

    @property
    def spans_tokens(self) -> bool:
        """Whether an activation's scales follow from more than one token.

        Then whatever else is in the tensor, other texts and padding too, moves every value of it.
        """
        patient = self.observer == "mse" and self._mse.patience is not None  # until no group gains
        return self.granularity == "tensor" or patient

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the scales' arithmetic for a tensor stored as dtype."""
        return torch.float32 if self.compute_dtype == "float32" else dtype

    def _element(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the elements' arithmetic."""
        return self._compute(dtype)

    # the four maps

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
        """Codes [*lead, n] (int8 or uint8) of x [*lead, n]."""
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
