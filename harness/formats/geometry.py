"""Which elements of a tensor share a scale: its last axis is split in groups.

    x [*lead, n]  ->  blocks [*lead, groups, group]        scale, zero: [*lead, groups]

Granularity `tensor` has one group over everything: blocks [1, .., 1, numel], scale [1, .., 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.config.errors import ConfigError


class Geometry:
    """granularity, group_size, pad: the fields of a format that decide it (settings.py)."""

    granularity: str
    group_size: int | None
    pad: str

    granularities = ("tensor", "channel", "token", "group")

    @property
    def spans_rows(self) -> bool:
        """Whether rows share a scale."""
        return self.granularity == "tensor"

    def per_row(self, t: Tensor, rows: int) -> Tensor:
        """A tensor of `lattice`, of a matrix [rows, n], with what each row has: [rows, groups]."""
        return t.expand(rows, -1)

    def group(self, n: int) -> int:
        """Elements that share a scale on a last axis of n.

        Raises ConfigError where they do not divide n and pad=error.
        """
        self.check(n, f"{type(self).__name__}.group_size", "tensor")
        return self.group_size or n

    def check(self, in_features: int, field: str, where: str) -> None:
        """Refuse a width the group does not divide.

        field: config field to name; where: site whose width it is.
        """
        if self.group_size and self.pad == "error" and in_features % self.group_size:
            divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
            format = field.rpartition(".")[0] or "the format"
            raise ConfigError(
                f"{field}={self.group_size} does not divide the width {in_features} of {where}; "
                f"sizes that do: {', '.join(map(str, divisors))} (or set {format}.pad=zero)"
            )

    def split(self, x: Tensor) -> Tensor:
        """x [*lead, n] -> blocks [*lead, groups, group], a view where there is nothing to pad."""
        if self.granularity == "tensor":
            return x.reshape(*[1] * x.ndim, -1)
        group = self.group(x.shape[-1])
        if x.shape[-1] % group:
            x = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
        return x.reshape(*x.shape[:-1], -1, group)

    def join(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of split."""
        if self.granularity == "tensor":
            return blocks.reshape(shape)
        return blocks.flatten(-2)[..., : shape[-1]]
