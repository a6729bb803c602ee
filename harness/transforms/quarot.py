"""quarot: random Hadamard rotations R1 .. R4 (places: rotations.py). Nothing is learned.

    R = diag(sigma) H_n,    sigma in {+-1}^n

Source: QuaRot (arXiv 2404.00456). Differences: the embedding mean is not subtracted (a LayerNorm
leftover that changes an RMSNorm model), biases of v are rotated, and R3 works for every head size
that has a Hadamard matrix. `online_heads` is QuaRot's own R2: H_heads (x) H_head_dim on the input
of o, of which v can absorb the head_dim factor only. Cost online: the two small matmuls of R4 (and
R3, with a quantized KV cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec, Kronecker, Rotation
from harness.codecs.placement import Placement
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.linalg.hadamard import Hadamard, hadamard, reachable
from harness.linalg.stiefel import random_orthogonal
from harness.transforms.base import ModelShape, generator
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.rotations import Rotations


class QuaRot(Rotations):
    """r1: hadamard (of full order) | random (Haar) | off | a block size. online_heads: mix whole
    heads, online."""

    fixes_ones = True

    def __init__(
        self,
        r1: str | int | bool = "hadamard",
        r2: bool = True,
        r3: str | int | bool = "auto",
        r4: str | bool = "auto",
        online_heads: bool = False,
        random_signs: bool = True,
    ):
        super().__init__(r2, r3, r4, random_signs)
        self.r1 = "off" if r1 is False else r1  # YAML reads a bare off as a truth value
        self.online_heads = boolean("transform.online_heads", online_heads)
        self.residual = self.r1 != "off"
        block = isinstance(r1, int) and not isinstance(r1, bool) and r1 >= 1
        if not block and self.r1 not in ("hadamard", "random", "off"):
            raise ConfigError(f"transform.r1={r1}: choose hadamard, random, off, or a block size.")

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        online = super().leaves(shape)
        if self.online_heads:
            return (*online, "a mix of heads (transform.online_heads=false)")
        return online

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        sites = super().encodes(shape)
        return (*sites, "o_in") if self.online_heads else sites

    def check(self, shape: ModelShape) -> list[str]:
        if self.r1 == "hadamard":
            reachable("transform.r1=hadamard", shape.hidden, "transform.r1=random")
        elif isinstance(self.r1, int):
            if shape.hidden % self.r1:
                raise ConfigError(
                    f"transform.r1={self.r1} does not divide the hidden size {shape.hidden}."
                )
            reachable(f"transform.r1={self.r1}", self.r1, "transform.r1=random")
        if self.online_heads:
            reachable("transform.online_heads=true", shape.heads, "transform.online_heads=false")
        return super().check(shape)

    def matrices(
        self, shape: ModelShape, model: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        return self.draw_r1(shape), self.draw_r2(shape), {}

    def draw_r1(self, shape: ModelShape) -> Blocks | Rotation | None:
        """R1 of the setting; None where it is off."""
        if self.r1 == "off":
            return None
        if self.r1 == "random":
            # Haar: for a hidden size that no Hadamard matrix has
            drawn = Blocks(random_orthogonal(shape.hidden, generator(shape.seed, "R1")))
        else:
            order = self.r1 if isinstance(self.r1, int) else shape.hidden
            drawn = self.draw(shape, order, "R1")
        if not shape.fixes_ones:
            return drawn
        return Blocks(fixing_ones(drawn.encode(torch.eye(shape.hidden, dtype=torch.float64))))

    def draw_r2(self, shape: ModelShape) -> dict[int, Rotation]:
        """R2 of each layer; empty where it is off."""
        if not self.r2:
            return {}
        layers = shape.turns
        if self.online_heads:
            # H_heads (x) H_head_dim as published, which has no signs
            return dict.fromkeys(layers, Rotation(Hadamard(shape.head_dim)))
        return {i: self.draw(shape, shape.head_dim, i, "R2") for i in layers}

    def placement(
        self, shape: ModelShape, r1: Codec | None, r2: Mapping[int, Codec], notes: Mapping
    ) -> Placement:
        placement = super().placement(shape, r1, r2, notes)
        if not self.online_heads:
            return placement
        # across heads alone: the factor within a head is R2, which v has absorbed
        across = Kronecker(hadamard(shape.heads), torch.eye(shape.head_dim, dtype=torch.float64))
        return replace(placement, online={**placement.online, (None, "o_in"): across})


def fixing_ones(rotation: Tensor) -> Tensor:
    """The rotation R [n, n] followed by a reflection, so that 1 R = 1.

    R (I - 2 w w^T) with w along 1 R - 1, which exchanges the two. It is as spread out as a random R
    or a Hadamard matrix with random signs; a bare one, whose first row is the ones, keeps its first
    feature to itself.
    """
    ones = torch.ones(len(rotation), dtype=rotation.dtype)
    w = ones @ rotation - ones
    if w.norm() < 1e-9:
        return rotation
    w = w / w.norm()
    return rotation - 2 * torch.outer(rotation @ w, w)
