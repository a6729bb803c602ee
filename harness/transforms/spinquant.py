"""spinquant: R1 and R2 learned through the whole model; R3, R4 random Hadamard (rotations.py).

    min over R1, R2_1 .. R2_L in O(n)  of  L(model with Q_a(x R)),    by Cayley SGD from random
                                                                      Hadamard matrices

Weights stay float in the loop (W16A4), which is what a GPTQ evaluation needs. Exact: every R leaves
the float model as it was.

Source: SpinQuant (arXiv 2405.16406), whose loss is the language model's own (objective=lm) and
whose step is bounded only by 1/||W||_1 (preset spinquant_paper: lr 1.5, SGD-G's fixed point, 100
steps of 8 x 2048 tokens, linear decay in the paper, cosine here). Differences: the default is ours,
distillation, exact Cayley steps of at most `max_angle` radians, a budget for two CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.placement import Placement
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.linalg.stiefel import deviation
from harness.transforms.base import ModelShape
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.learn import Descent, end_to_end
from harness.transforms.quarot import QuaRot


class SpinQuant(QuaRot):
    """objective: lm | kd; the other knobs of learning are those of learn.Descent, of the places
    those of quarot."""

    learned = True
    fixes_ones = False

    def __init__(
        self,
        objective: str,
        steps: int,
        batch: int,
        lr: float,
        optimizer: str = "cayley",
        max_angle: float | None = None,
        cap: str = "tensor",
        r1: str | int | bool = "hadamard",
        r2: bool = True,
        r3: str | int | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        super().__init__(r1, r2, r3, r4, random_signs=random_signs)
        self.objective = one_of("transform.objective", objective, ("lm", "kd"))
        if self.r1 == "off" and not self.r2:
            raise ConfigError(
                "transform.r1=off with transform.r2=false: no rotation is left to learn; "
                "leave one of them on."
            )
        self.descent = Descent(steps, batch, lr, optimizer, max_angle, cap)

    def check(self, shape: ModelShape) -> list[str]:
        self.needs_activations(shape)
        return super().check(shape)

    def start(self, shape: ModelShape, model: CalibrationModel) -> dict[str, Tensor]:
        """{R1 [hidden, hidden], R2 [layers, head_dim, head_dim]}, random Hadamard, float64."""
        start = {}
        r1 = self.draw_r1(shape)
        if r1 is not None:
            start["R1"] = r1.encode(torch.eye(shape.hidden, dtype=torch.float64))
        r2 = self.draw_r2(shape)
        if r2:
            start["R2"] = torch.stack([codec.matrix.dense() for codec in r2.values()])
        return start

    def build(
        self, shape: ModelShape, model: CalibrationModel, matrices: Mapping[str, Tensor]
    ) -> Placement:
        """Where such matrices go."""
        return self.placement(shape, *_codecs(matrices), {})

    def matrices(
        self, shape: ModelShape, model: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        # weights stay float: their error is the solver's to make up for, afterwards
        scheme = shape.scheme.seen("act", "kv")
        build = partial(self.build, shape, model)
        start = self.start(shape, model)
        learned, notes = end_to_end(model, scheme, start, build, self.descent, self.objective)
        notes["orthogonality"] = max(deviation(matrix) for matrix in learned.values())
        return *_codecs(learned), notes


def _codecs(matrices: Mapping[str, Tensor]) -> tuple[Codec | None, dict[int, Codec]]:
    """R1 and R2 of each layer, of those that are learned."""
    r1 = None
    if "R1" in matrices:
        r1 = Blocks(matrices["R1"])
    r2: dict[int, Codec] = {}
    if "R2" in matrices:
        r2 |= {i: Blocks(matrix) for i, matrix in enumerate(matrices["R2"].unbind(0))}
    return r1, r2
