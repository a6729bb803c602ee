"""quarot: random Hadamard rotations R1 .. R4 (places: rotations.py). Nothing is learned.

    R = diag(sigma) H_n,    sigma in {+-1}^n

Source: QuaRot (arXiv 2404.00456). Differences: the embedding mean is not subtracted (a LayerNorm leftover that changes an
RMSNorm model), biases of v are rotated, and R3 works for every head size that has a Hadamard matrix. `online_heads` is
QuaRot's own R2: H_heads (x) H_head_dim on the input of o, of which v can absorb the head_dim factor only. Cost online: the
two small matmuls of R4 (and R3, with a quantized KV cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from harness.codecs.codec import Blocks, Codec, Kronecker, Rotation
from harness.codecs.placement import Placement
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.linalg.hadamard import Hadamard, hadamard, reachable
from harness.linalg.stiefel import random_orthogonal
from harness.transforms.base import CalibrationModel, ModelShape, generator
from harness.transforms.rotations import Rotations


class QuaRot(Rotations):
    """r1: hadamard (of full order) | random (Haar) | off | a block size. online_heads: mix whole heads, online."""

    def __init__(
        self,
        r1: str | int | bool = "hadamard",
        r2: bool = True,
        r3: str | bool = "auto",
        r4: str | bool = "auto",
        online_heads: bool = False,
        random_signs: bool = True,
    ):
        super().__init__(r2, r3, r4, random_signs)
        self.r1 = "off" if r1 is False else r1
        self.online_heads = boolean("transform.online_heads", online_heads)
        self.residual = self.r1 != "off"
        if self.r1 not in ("hadamard", "random", "off") and (
            isinstance(r1, bool) or not isinstance(r1, int) or r1 < 1
        ):
            raise ConfigError(f"transform.r1={r1}: choose hadamard, random, off, or a block size.")

    def leaves(self, context: ModelShape) -> tuple[str, ...]:
        return (
            *super().leaves(context),
            *(["a mix of heads (transform.online_heads=false)"] if self.online_heads else []),
        )

    def encodes(self, context: ModelShape) -> tuple[str, ...]:
        return (*super().encodes(context), *(["o_in"] if self.online_heads else []))

    def check(self, context: ModelShape) -> list[str]:
        if self.r1 == "hadamard":
            reachable("transform.r1=hadamard", context.hidden, "transform.r1=random")
        elif isinstance(self.r1, int):
            if context.hidden % self.r1:
                raise ConfigError(
                    f"transform.r1={self.r1} does not divide the hidden size {context.hidden}."
                )
            reachable(f"transform.r1={self.r1}", self.r1, "transform.r1=random")
        if self.online_heads:
            reachable("transform.online_heads=true", context.heads, "transform.online_heads=false")
        return super().check(context)

    def matrices(
        self, context: ModelShape, subject: CalibrationModel
    ) -> tuple[Codec | None, dict[int, Codec], dict]:
        r1 = None
        if self.r1 == "random":
            r1 = Blocks(random_orthogonal(context.hidden, generator(context.seed, "R1")))
        elif self.r1 != "off":
            r1 = self.draw(context, context.hidden if self.r1 == "hadamard" else self.r1, "R1")
        if not self.r2:
            return r1, {}, {}
        plain = Rotation(Hadamard(context.head_dim))
        r2 = {
            i: plain if self.online_heads else self.draw(context, context.head_dim, i, "R2")
            for i in range(context.layers)
        }
        return r1, r2, {}

    def placement(
        self, context: ModelShape, r1: Codec | None, r2: Mapping[int, Codec], notes: Mapping
    ) -> Placement:
        placed = super().placement(context, r1, r2, notes)
        if not self.online_heads:
            return placed
        across = Kronecker(
            hadamard(context.heads), torch.eye(context.head_dim, dtype=torch.float64)
        )
        return replace(placed, online={**placed.online, (None, "o_in"): across})
