"""block_affine: a learned invertible matrix for each block of g features, at every site.

    x -> x diag(E_1, .., E_nb),   W <- W diag(D_1, .., D_nb)^T,   D_i = E_i^-1
    E_i = U diag(e^s) V                                           learned as affine.py has it

For formats whose blocks share a scale: a matrix within a block leaves what the block's neighbours
hold alone, where a full rotation would spread outliers over all of them. It begins with WUSH's
closed form (wush.py), which makes both sides' second moments equal and flat, and goes on from there
by the error that quantizing really makes. T n g online.

Sources: LATMiX (arXiv 2602.17681), BATQuant (arXiv 2603.16590). Differences: begun with WUSH, not
with identity or a Hadamard matrix; no shift beside the matrix; no factors shared among the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.placement import Role, Where
from harness.config.checks import one_of
from harness.linalg.invertible import Invertible
from harness.transforms.affine import Affine
from harness.transforms.affine_sites import Matrices
from harness.transforms.base import ModelShape
from harness.transforms.block_diagonal import smaller_than_groups
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.wush import Wush


class Block(Matrices):
    """E_1 .. E_nb, [nb, g, g]."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.matrix = Invertible(start)

    def online(self) -> Codec:
        return Blocks(*self.matrix.matrices())


class BlockAffine(Affine):
    """init: wush | identity. block_size, damp: as for wush. The rest: see affine.Affine."""

    def __init__(
        self,
        objective: str,
        steps: int,
        batch: int,
        lr: float,
        clip: bool = True,
        init: str = "wush",
        block_size: int | str = "auto",
        damp: float = 0.01,
    ):
        super().__init__(objective, steps, batch, lr, clip)
        self.init = one_of("transform.init", init, ("wush", "identity"))
        self.wush = Wush(block_size, damp)
        if init != "wush":
            self.unread = ("damp",)

    def settled(self, shape: ModelShape) -> tuple[object, ...]:
        return self.wush.settled(shape)

    def check(self, shape: ModelShape) -> list[str]:
        warnings = super().check(shape)
        if self.init == "wush":
            return warnings + self.wush.check(shape)
        return warnings + smaller_than_groups(self.wush.order(shape), shape.scheme)

    def begin(
        self, shape: ModelShape, model: CalibrationModel, readers: Mapping[Where, Sequence[Role]]
    ) -> Iterator[tuple[Where, Matrices]]:
        if self.init == "wush":
            for where, codec in self.wush.fit(shape, model).online.items():
                assert isinstance(codec, Blocks) and codec.encoder is not None
                yield where, Block(codec.encoder)
            return
        g = self.wush.order(shape)
        widths = {site: shape.widths_of(site) for site in shape.widths}
        for layer, site in readers:
            width = widths[site].get(layer, shape.widths[site])
            yield (layer, site), Block(torch.eye(g, dtype=torch.float64).repeat(width // g, 1, 1))
