"""FP8: E4M3 or E5M2 elements with a float scale, for any tensor, row, group or square block.

    s = A / max  (the dtype's epsilon where that is 0),    q = cast(clamp(x / s)),    dq = q * s

A is the greatest |x| of the group, max 448 (E4M3) or 57344 (E5M2). A block is a square of rows and
columns of a weight, the last of them as short as the weight has it:

    W [m, n]  ->  blocks [ceil(m / b), ceil(n / b), b b]        scale: [ceil(m / b), ceil(n / b)]

Sources: compressed-tensors (its FP8, FP8_DYNAMIC and FP8_BLOCK), whose order of operations this is
in every bit; blocks of 128 x 128 beside activations in groups of 128: DeepSeek-V3 (arXiv
2412.19437), which divides by the same float32 scale.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.errors import ConfigError
from harness.formats.base import Format, over
from harness.formats.floating import Floating
from harness.formats.grids import GRIDS, Grid
from harness.formats.qtensor import Scales
from harness.formats.settings import SCALE_DTYPES


@dataclass(frozen=True)
class FP8(Floating):
    """FP8 with float scales. Besides the shared knobs:

    granularity: block, too (of group_size rows by group_size columns; weights only).
    element: e4m3 | e5m2.
    scale_dtype: float32 | bf16 | fp16 | input, rounded before the codes are computed.
    range: dynamic (of each tensor) | static (calibrated; activations) | unit (s = 1, a plain cast);
        the last two with granularity=tensor and observer=minmax.

    Weights of a site with one scale each share the greatest, for engines fuse them.
    """

    bits: int = 8
    granularity: str = "channel"
    element: str = "e4m3"
    scale_dtype: str = "float32"
    range: str = "dynamic"

    granularities = (*Format.granularities, "block")

    def __post_init__(self):
        self._choose("element", "e4m3", "e5m2")  # first, for the shared checks ask for the grid
        super().__post_init__()
        self._choose("scale_dtype", *SCALE_DTYPES, "input")
        self._choose("range", "dynamic", "static", "unit")
        if self.granularity == "block" and self.role == "activation":
            raise ConfigError(
                "FP8: granularity=block is for weights: rows of an activation are tokens, which "
                "have no neighbours; set granularity=group."
            )
        if self.range == "static" and self.role == "weight":
            raise ConfigError(
                "FP8: range=static is for activations, which are calibrated; set range=dynamic."
            )
        if self.range == "dynamic":
            return
        for field, only in (("granularity", "tensor"), ("observer", "minmax")):
            if getattr(self, field) != only:
                raise ConfigError(
                    f"FP8: range={self.range} with {field}={getattr(self, field)}: one scale is "
                    f"known beforehand; set {field}={only}, or range=dynamic."
                )

    @property
    def unread(self) -> tuple[str, ...]:
        return (*super().unread, "pad") if self.granularity == "block" else super().unread

    @property
    def grid(self) -> Grid:
        return GRIDS[self.element]

    @property
    def needs_static(self) -> bool:
        return self.range == "static"

    @property
    def spans_tokens(self) -> bool:
        return self.range == "dynamic" and super().spans_tokens

    def dynamic(self) -> Format:
        return replace(self, range="dynamic") if self.needs_static else self

    # geometry

    @property
    def spans_rows(self) -> bool:
        return self.granularity == "block" or super().spans_rows

    def check(self, in_features: int, field: str, where: str) -> None:
        if self.granularity != "block":  # whose last columns may be fewer
            super().check(in_features, field, where)

    def per_row(self, t: Tensor, rows: int) -> Tensor:
        if self.granularity != "block":
            return super().per_row(t, rows)
        assert self.group_size is not None  # a block has one
        return t.repeat_interleave(self.group_size, 0)[:rows]

    def split(self, x: Tensor) -> Tensor:
        """Of a block: W [m, n] -> [ceil(m / b), ceil(n / b), b b], zeros where W ends."""
        if self.granularity != "block":
            return super().split(x)
        b = self.group_size
        assert b is not None
        x = x.reshape(-1, x.shape[-1])
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % b, 0, -x.shape[0] % b))
        return x.view(len(x) // b, b, -1, b).transpose(1, 2).flatten(2)

    def join(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        if self.granularity != "block":
            return super().join(blocks, shape)
        b = self.group_size
        assert b is not None
        rows = blocks.unflatten(-1, (b, b)).transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[: shape[:-1].numel(), : shape[-1]].reshape(shape)

    # scales

    @property
    def _given(self) -> bool:
        """Whether the greatest magnitude is another's: calibrated, or that of a site's weights."""
        shared = (self.role, self.granularity, self.range) == ("weight", "tensor", "dynamic")
        return shared or self.needs_static

    def global_from_amax(self, amax: Tensor) -> Tensor | None:
        """amax itself, float32, where the scale follows from what is given."""
        if not self._given:
            return None
        amax = amax.detach().float()
        return amax.reshape(1) if amax.ndim == 0 else amax

    def _global(self, x: Tensor, global_scale: Tensor | None) -> Tensor | None:
        if self.range == "unit":
            return torch.full((1,), self.grid.max, device=x.device)
        if self.needs_static and global_scale is None:
            raise ConfigError(
                "FP8: range=static needs a calibrated range and got none; "
                "calibrate activations, or set range=dynamic."
            )
        return global_scale if self._given else None

    def _scales(self, blocks: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Scales:
        """global_scale: the greatest magnitude [1] that stands for that of the blocks."""
        if global_scale is None or self.observer == "mse":
            return super()._scales(blocks, None, dtype)
        peak = global_scale.to(self._compute(dtype)).expand(blocks.shape[:-1])
        return self._store(peak, over(peak, self.grid.max), None, dtype)

    def _store(
        self, peak: Tensor, a: Tensor, global_scale: Tensor | None, dtype: torch.dtype
    ) -> Scales:
        s = a.to(SCALE_DTYPES.get(self.scale_dtype, dtype))
        return Scales(s.masked_fill(s == 0, torch.finfo(s.dtype).eps))

    def lattice(self, scales: Scales, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(s,)"""
        return (scales.scale.to(dtype),)
