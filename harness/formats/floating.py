"""What the floating formats share: a small float grid, one positive effective scale a group.

    q = cast(clamp(x / eff)),   dq = q * eff

A subclass says how a group's peak (its amax, or the candidate the grid search chose) becomes the
stored scale.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.config.checks import boolean, integer
from harness.config.errors import ConfigError
from harness.formats.base import Format, over
from harness.formats.grids import E2M1, Grid
from harness.formats.observers import absmax, search
from harness.formats.qtensor import Scales


@dataclass(frozen=True)
class Floating(Format):
    """Floating element grid.

    fp4_ties: even | zero | away, for values halfway between two grid points.
    mse_on_rounded_scale: whether the grid search measures with the scale that will be stored, or
        with it unrounded.
    """

    fp4_ties: str = "even"
    mse_on_rounded_scale: bool = False

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        integer(f"{name}: bits", self.bits)
        self._choose("bits", self.grid.bits)
        self._choose("fp4_ties", "even", "zero", "away")
        boolean(f"{name}: mse_on_rounded_scale", self.mse_on_rounded_scale)
        if not self.symmetric:
            raise ConfigError(
                f"{name}: symmetric=false is not possible: a float grid has no zero point; "
                "set symmetric=true or take Integer."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        if self.observer == "mse":
            return super().unread
        return (*super().unread, "mse_on_rounded_scale")

    @property
    def grid(self) -> Grid:
        return E2M1

    @property
    def reach(self) -> tuple[float, float]:
        return -self.grid.max, self.grid.max

    @abstractmethod
    def _store(
        self, peak: Tensor, a: Tensor, global_scale: Tensor | None, dtype: torch.dtype
    ) -> Scales:
        """Stored scales of groups with greatest magnitude `peak`.

        a: peak / grid.max, not rounded to a storage dtype.
        """

    def _scales(self, blocks: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Scales:
        blocks = blocks.to(self._compute(dtype))
        peak = absmax(blocks)
        a = over(peak, self.grid.max)
        if self.observer == "mse":
            candidates = self._candidates(blocks, peak, a, global_scale, dtype)
            peak, a = search(blocks, (peak, a), candidates, self._mse)
        return self._store(peak, a, global_scale, dtype)

    def _candidates(
        self,
        blocks: Tensor,
        peak: Tensor,
        a: Tensor,
        global_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """((peak, a), dq) of every shrink factor."""
        for p in self._mse.factors:
            # One of the two shrinks and the other follows from it: they differ in the last bit.
            if self._mse.shrink == "range":
                candidate = (p * peak, over(p * peak, self.grid.max))
            else:
                candidate = (p * a * self.grid.max, p * a)
            eff = candidate[1]
            if self.mse_on_rounded_scale:
                (eff,) = self.lattice(self._store(*candidate, global_scale, dtype), blocks.dtype)
            yield candidate, self.snap(blocks, eff.unsqueeze(-1))

    def nearby(self, scales: Scales) -> Iterator[Scales]:
        """Eighths of an octave, 4 below to 10 above: beyond them, hardly ever is one the best."""
        for eighths in sorted(range(-4, 11), key=abs)[1:]:
            yield self.rescaled(scales, scales.scale.new_full((), 2 ** (eighths / 8)))

    def snap(self, x: Tensor, eff: Tensor, out: Tensor | None = None) -> Tensor:
        return self.grid.round_(torch.div(x, eff, out=out), self.fp4_ties).mul_(eff)

    def _encode(self, x: Tensor, eff: Tensor) -> Tensor:
        # the sign of x itself: rounding drops that of a zero, and its code has one
        return self.grid.encode(self.grid.round_(x / eff, self.fp4_ties), x < 0)

    def _decode(self, codes: Tensor, eff: Tensor) -> Tensor:
        return self.grid.decode(codes).to(eff.dtype).mul_(eff)
