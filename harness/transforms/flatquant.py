"""flatquant: a learned Kronecker pair and a learned scale of each channel at every site.

    x -> (x diag(1 / s)) (L (x) R),    W <- W diag(s) (L^-1 (x) R^-1)^T
    L = U_L diag(e^a) V_L,  R = U_R diag(e^b) V_R,  s = e^c       learned as affine.py has it

l <= r are the closest factors n = l r of the site's width, as in kronecker.py: T n (l + r) online,
and s nothing, for it goes into what feeds the site, where that takes a scale (structure.merges; the
query heads of a value head share theirs). L and R begin as `init` has them, s as 1.

Source: FlatQuant (arXiv 2410.09426), which begins with random orthogonal matrices, too, and learns
block by block with AdamW and a cosine, from floats alike. Differences: the error is relative to
what the block adds; one clip for each weight and one for both ends of an activation, not one a row
and one an end; no matrices for the heads of queries, keys and values; s begins as 1, not as
SmoothQuant's; the best iterate is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.codecs.codec import Codec, Diagonal, Kronecker
from harness.codecs.placement import Role, Where
from harness.config.checks import boolean, one_of
from harness.linalg.invertible import Invertible
from harness.transforms.affine import Affine
from harness.transforms.affine_sites import Matrices
from harness.transforms.base import ModelShape, generator
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.full import FullMatrix, dense
from harness.transforms.kronecker import closest

INITS = ("orthogonal", "hadamard", "identity")


class Pair(Matrices):
    """L (x) R, and s of so many features, 0 for none."""

    def __init__(self, left: Tensor, right: Tensor, scales: int):
        super().__init__()
        self.left = Invertible(left)
        self.right = Invertible(right)
        self.log_scale = nn.Parameter(torch.zeros(scales), requires_grad=scales > 0)

    def online(self) -> Codec:
        return Kronecker(self.left.matrices()[0], self.right.matrices()[0])

    def merged(self) -> Codec | None:
        return Diagonal(self.log_scale.exp()) if len(self.log_scale) else None


class FlatQuant(Affine):
    """init: orthogonal (random) | hadamard | identity, of L and R. scale: learn s. The rest: see
    affine.Affine."""

    def __init__(
        self,
        objective: str,
        steps: int,
        batch: int,
        lr: float,
        clip: bool = True,
        init: str = "orthogonal",
        scale: bool = True,
    ):
        super().__init__(objective, steps, batch, lr, clip)
        self.init = one_of("transform.init", init, INITS)
        self.scale = boolean("transform.scale", scale)

    def check(self, shape: ModelShape) -> list[str]:
        if self.init == "hadamard":
            needs = FullMatrix(init="hadamard")
            for site in shape.widths:
                for width in shape.widths_of(site).values():
                    for side in closest(width):
                        needs.refuse(side)
        return super().check(shape)

    def begin(
        self, shape: ModelShape, model: CalibrationModel, readers: Mapping[Where, Sequence[Role]]
    ) -> Iterator[tuple[Where, Matrices]]:
        widths = {site: shape.widths_of(site) for site in shape.widths}
        for where, linears in readers.items():
            layer, site = where
            width = widths[site].get(layer, shape.widths[site])
            draw = generator(shape.seed, "flatquant", layer, site)
            left, right = (dense(side, "general", self.init, draw) for side in closest(width))
            scales = 0
            if self.scale and layer in shape.merges(site):
                heads = linears[0].heads
                scales = width if heads is None else width // heads[1]
            yield where, Pair(left, right, scales)
