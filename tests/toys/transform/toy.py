"""x -> x P at each of the four sites, W <- W P, with the permutation P that reverses the
features."""

from __future__ import annotations

import torch

from harness.codecs.codec import Blocks
from harness.codecs.placement import Placement
from harness.transforms import CalibrationModel, ModelShape, Transform


class Reversal(Transform):
    """Nothing is learned and nothing is gained: groups meet other neighbours, in reverse."""

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"a permutation at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(shape.widths)

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        return Placement(
            online={(None, site): Blocks(reversal(n)) for site, n in shape.widths.items()}
        )


def reversal(n: int) -> torch.Tensor:
    """P, float64 [n, n], with ones on the antidiagonal."""
    return torch.eye(n, dtype=torch.float64).flip(0)
